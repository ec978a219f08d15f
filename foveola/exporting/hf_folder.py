"""An encoder as a folder of Hugging Face's transformers: ViT, I-JEPA, DINOv2 (with registers) or DINOv3."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola import files
from foveola.config import UserError
from foveola.exporting.plain import plain_weights
from foveola.models.encoder import Encoder
from foveola.zoo.foreign import import_library
from foveola.zoo.hf_models import plain_name

PACKED = {  # one matrix of ours, several of Hugging Face's
    ".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."),
    ".mlp.fc1.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def _hf_kind(encoder: Encoder) -> str:
    """Which of Hugging Face's networks is ours. Raises UserError where none is."""
    model = encoder.config.model
    if model.positions == "rope":
        return _check_pool(encoder, "DINOv3ViT")
    plain = model.mlp == "gelu" and model.layer_scale is None and not model.registers
    if not model.class_token:
        if plain and encoder.config.pool == "average":
            return "IJepa"
        raise UserError("Hugging Face has no network without class token but with what this encoder has")
    _check_pool(encoder, "")
    if plain:
        return "ViT"
    if not float(model.mlp_ratio).is_integer():
        raise UserError(f"Hugging Face's DINOv2 takes a whole mlp_ratio only, not {model.mlp_ratio:g}")
    return "Dinov2WithRegisters" if model.registers else "Dinov2"


def _check_pool(encoder: Encoder, kind: str) -> str:
    if encoder.config.pool != "token":
        raise UserError(
            "Hugging Face's networks with a class token pool by it, and this encoder pools otherwise: other "
            "formats keep that; in Python export(encoder.pooled('token'), ...) gives it up"
        )
    return kind


def write_hf(encoder: Encoder, out: Path) -> None:
    """Write a folder for `transformers.AutoModel.from_pretrained(OUT)` and its image processor.

    Raises UserError for what transformers does not express.
    """
    transformers = import_library("transformers", "hf")
    model, transform = encoder.config.model, encoder.config.transform
    if transform.squash and transform.crop != transform.resize:
        raise UserError("Hugging Face's processors that squash do not crop: resize and crop must be the same")
    kind, (width, depth, heads) = _hf_kind(encoder), model.shape
    settings: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "layer_norm_eps": 1e-6 if model.norm_eps is None else model.norm_eps,
        "image_size": transform.crop,
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "hidden_act": "gelu",
    }
    options: dict[str, Any] = {}
    state = plain_weights(encoder)
    if kind == "DINOv3ViT":
        hidden = state["blocks.0.mlp.fc2.weight"].shape[1]
        settings |= {"intermediate_size": hidden, "key_bias": True, "use_gated_mlp": model.mlp == "swiglu"}
        settings |= {"hidden_act": "silu" if model.mlp == "swiglu" else "gelu", "rope_theta": 100.0}
    elif kind in ("ViT", "IJepa"):
        settings["intermediate_size"] = model.block(0).hidden
        options["add_pooling_layer"] = False
    else:
        settings |= {"mlp_ratio": int(model.mlp_ratio), "use_swiglu_ffn": model.mlp == "swiglu"}
    if model.registers:
        settings["num_register_tokens"] = model.registers
    config = getattr(transformers, f"{kind}Config")(**settings)
    network = getattr(transformers, f"{kind}Model")(config, **options)
    own = network.state_dict()
    plain = {name: plain_name(name) for name in own}
    names = set(plain.values())
    network.load_state_dict({n: _part(state, plain[n], names).view_as(value) for n, value in own.items()})
    network.save_pretrained(out)
    size: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": transform.resize},
    }
    if transform.squash:
        side = {"height": transform.crop, "width": transform.crop}
        size = {"image_processor_type": "ViTImageProcessor", "size": side}
    processor = size | {
        "do_resize": True,
        "do_center_crop": not transform.squash,
        "crop_size": {"height": transform.crop, "width": transform.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": {"bilinear": 2, "bicubic": 3}[transform.interpolation],
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        **({} if model.channels == 3 else {"do_convert_rgb": False}),
    }
    files.write_text(out / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    mode = (out / "preprocessor_config.json").stat().st_mode
    for file in out.iterdir():  # transformers writes weights that only their owner can read
        file.chmod(mode)


def _part(state: dict[str, Tensor], name: str, names: set[str]) -> Tensor:
    """A tensor by its half-way name: a third of `attn.qkv`, a half of a gated `mlp.fc1`, or as it is."""
    if ".mlp.up_proj." in name and name.replace(".up_proj.", ".gate_proj.") not in names:
        return state[name.replace(".up_proj.", ".fc1.")]  # DINOv3 without a gate
    for ours, parts in PACKED.items():
        for index, part in enumerate(parts):
            if part in name:
                return state[name.replace(part, ours)].chunk(len(parts))[index]
    if name.endswith(".gamma") and name not in state:  # a network without LayerScale
        block = name.rsplit(".", 2)[0]
        return torch.ones_like(state[f"{block}.norm1.weight"])
    if name == "reg_token" and name not in state:  # DINOv3 has a tensor of none
        return state["cls_token"][:, :0]
    return state[name]
