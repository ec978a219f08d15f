"""Encoders of ours in the layouts of other libraries, which then load them as theirs.

Positions are written as a table for the images of `encoder.transform`; at other sizes each library resizes
it in its own way.
"""

import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola import files
from foveola.config import UserError, to_dict
from foveola.models.encoder import Encoder
from foveola.zoo.foreign import TOLERANCE, import_library
from foveola.zoo.hf_models import plain_name
from foveola.zoo.libraries import load_library
from foveola.zoo.load import load
from foveola.zoo.program import write_program
from foveola.zoo.sizes import mlp_ratio
from foveola.zoo.weights import SETTINGS

EXPORT_FORMATS = ("timm", "hf", "torch", "program")
PACKED = {  # one matrix of ours, several of Hugging Face's
    ".attn.qkv.": (".attn.q.", ".attn.k.", ".attn.v."),
    ".mlp.fc1.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def export(encoder: Encoder | str | Path, out: str | Path, format: str = "timm", head: bool = True) -> Path:
    """Write an encoder for another library, and check that it gives the same tokens there.

    The encoder may also be named, as for `load`.

    `timm`: a folder for `timm.create_model("local-dir:OUT", pretrained=True)`. `hf`: a folder for
    `transformers.AutoModel.from_pretrained(OUT)` and its image processor. `torch`: one file, a dict of the
    tensors (`state_dict`) by timm's names and of the settings as JSON (`foveola`), which `foveola.load` reads
    back; any encoder can be had so. `program`: a file of `torch.export`, from pixels to the answers of the
    head (`zoo.program`), or to features where there is none or `head` is false. The others hold encoders
    alone, and warn of a head that is left behind, unless `head` is false.

    Raises UserError for networks that the library cannot express, for outputs that differ, for an `out` that
    exists, and where the library is missing; nothing is then left at `out`.
    """
    out = Path(out)
    _check_place(out, format)
    encoder = encoder if isinstance(encoder, Encoder) else load(encoder)
    encoder.check_inside("export")
    if format == "program":
        encoder = encoder if head else Encoder(encoder.config, encoder.backbone, encoder.predictor)
        write_program(encoder, out)
        return out
    if encoder.head is not None and head:
        warnings.warn(
            f"{out} is without the head for {encoder.head.config.name}, as format={format} holds encoders "
            "alone; format=program takes the head along",
            stacklevel=2,
        )
    if format == "torch":
        state = {name: value.detach().float().cpu().contiguous() for name, value in encoder.weights().items()}
        with files.whole(out) as part:
            torch.save({"state_dict": state, SETTINGS: json.dumps(to_dict(encoder.config))}, part)
        return out
    _check(encoder, format)
    import_library({"timm": "timm", "hf": "transformers"}[format], format)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        part.mkdir(parents=True)
        (_write_timm if format == "timm" else _write_hf)(encoder, part)
        _compare(encoder, load_library(f"{format}:{part}"), out)
        if out.exists():  # an empty folder
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _check_place(out: Path, format: str) -> None:
    """Raise UserError for an unknown format, and for a place that it cannot be written to."""
    if format not in EXPORT_FORMATS:
        raise UserError(f"format={format}: expected {', '.join(EXPORT_FORMATS)}")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"out={out} exists; export writes to a new place")
    if format == "program" and out.suffix != ".pt2":
        raise UserError(f"format=program writes a file of torch.export: out={out.with_suffix('.pt2')}")
    if format == "torch" and out.suffix == ".safetensors":  # as which every reader would take it
        raise UserError(f"format=torch writes a file of torch: out={out.with_suffix('.pth')}")


def _check(encoder: Encoder, format: str) -> None:
    model, library = encoder.config.model, {"timm": "timm", "hf": "transformers"}[format]
    ways = {"axial": "no ViT", "capi": "no ViT", "dinov3": "DINOv3, which this command does not write,"}
    for wrong, what in (
        (model.positions == "rope", f"rotary positions, with which {library} has {ways[model.rope]}"),
        (model.relative_bias, f"biases by relative position, which {library}'s plain ViTs lack"),
        (model.positions == "none", f"no positions, which {library}'s plain ViTs have"),
        (model.patch_norm, f"a norm of embedded patches, which {library}'s plain ViTs lack"),
        (model.final_norm != "tokens", f"final_norm={model.final_norm}, which this command does not write"),
        (model.norm != "layer", f"norm={model.norm}, which {library}'s ViTs lack"),
        (not model.final_norm_affine, f"a final norm without weights, which {library}'s ViTs lack"),
        (not model.bias, f"no biases, where {library}'s ViTs have them"),
        (encoder.config.pool == "predictor", f"pool=predictor, which {library} has not"),
    ):
        if wrong:
            raise UserError(
                f"format={format}: this encoder has {what}; format=torch writes any encoder into one file "
                "for foveola.load"
            )


@torch.inference_mode()
def _compare(encoder: Encoder, other: Encoder, out: Path) -> None:
    side = encoder.config.transform.crop
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours, theirs = encoder.backbone(images.to(encoder.device)), other.backbone(images)
    for part in ("objects", "registers", "patches"):
        a, b = getattr(ours, part).cpu(), getattr(theirs, part)
        scale = a.square().mean().sqrt().item() if a.numel() else 1.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale):
            raise UserError(f"{out}: the exported network gives other {part} than the encoder")
    settings = ("mean", "std", "crop", "resize", "squash", "interpolation")
    for name in settings:
        if getattr(encoder.config.transform, name) != getattr(other.config.transform, name):
            raise UserError(f"{out}: the exported network has another transform.{name} than the encoder")


@torch.inference_mode()
def _weights(encoder: Encoder) -> dict[str, Tensor]:
    """Tensors by our names on the CPU; `pos_embed` fits the images: class token's row first, if any."""
    network = encoder.backbone
    state = {name: value.detach().float().cpu().clone() for name, value in network.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.startswith(("pos_field.", "pos_mask"))}
    table = network.positions(encoder.grid)
    if table is None:
        raise UserError("this encoder has no positions to write")
    rows = [table.float().cpu()]
    if "cls_token" in state:
        rows.insert(0, state["pos_embed"][:, :1])
    return state | {"pos_embed": torch.cat(rows, dim=1)}


def _timm_weights(encoder: Encoder) -> dict[str, Tensor]:
    """By timm's names and shapes: with registers, the class token holds its position (`no_embed_class`)."""
    state = _weights(encoder)
    del state["mask_token"]
    if "reg_token" in state and "cls_token" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state


def _write_timm(encoder: Encoder, out: Path) -> None:
    from safetensors.torch import save_file

    model, transform = encoder.config.model, encoder.config.transform
    if model.norm_eps not in (None, 1e-6):
        raise UserError(f"this encoder has norm_eps={model.norm_eps}; a folder of timm's can only say 1e-6")
    width, depth, heads = model.shape
    gated, pool = model.mlp == "swiglu", "token" if encoder.config.pool == "token" else "avg"
    state = _timm_weights(encoder)
    arguments = {
        "img_size": transform.crop,
        "patch_size": model.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(state["blocks.0.mlp.fc1.weight"].shape[0], width),
        "init_values": model.layer_scale,
        "class_token": model.class_token,
        "reg_tokens": model.registers,
        "no_embed_class": model.registers > 0,
        "global_pool": pool,
        "fc_norm": False,
        "dynamic_img_size": True,
    }
    share = transform.crop / transform.resize  # timm rounds crop / share down
    while math.floor(transform.crop / share) != transform.resize:
        share = math.nextafter(share, 0)
    config = {
        "architecture": "vit_giant_patch14_dinov2" if gated else "vit_small_patch16_224",  # for their MLP
        "num_classes": 0,
        "num_features": width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, transform.crop, transform.crop],
            "fixed_input_size": False,
            "interpolation": transform.interpolation,
            "crop_pct": share,
            "crop_mode": "squash" if transform.squash else "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    files.write_text(files.EncoderFolder(out).config, json.dumps(config, indent=2) + "\n")
    with files.whole(files.EncoderFolder(out).weights) as part:
        save_file({name: value.contiguous() for name, value in state.items()}, part)


def _hf_kind(encoder: Encoder) -> str:
    """Which of Hugging Face's networks is ours. Raises UserError where none is."""
    model = encoder.config.model
    plain = model.mlp == "gelu" and model.layer_scale is None and not model.registers
    if not model.class_token:
        if plain and encoder.config.pool == "average":
            return "IJepa"
        raise UserError("Hugging Face has no network without class token but with what this encoder has")
    if encoder.config.pool != "token":
        raise UserError(
            "Hugging Face's networks with a class token pool by it, and this encoder pools otherwise: other "
            "formats keep that; in Python export(encoder.pooled('token'), ...) gives it up"
        )
    if plain:
        return "ViT"
    if not float(model.mlp_ratio).is_integer():
        raise UserError(f"Hugging Face's DINOv2 takes a whole mlp_ratio only, not {model.mlp_ratio:g}")
    return "Dinov2WithRegisters" if model.registers else "Dinov2"


def _write_hf(encoder: Encoder, out: Path) -> None:
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
        "hidden_act": "gelu",
    }
    options: dict[str, Any] = {}
    if kind in ("ViT", "IJepa"):
        settings["intermediate_size"] = model.block(0).hidden
        options["add_pooling_layer"] = False
    else:
        settings |= {"mlp_ratio": int(model.mlp_ratio), "use_swiglu_ffn": model.mlp == "swiglu"}
    if model.registers:
        settings["num_register_tokens"] = model.registers
    config = getattr(transformers, f"{kind}Config")(**settings)
    network = getattr(transformers, f"{kind}Model")(config, **options)
    state = _weights(encoder)
    own = network.state_dict()
    network.load_state_dict({name: _part(state, plain_name(name)).view_as(v) for name, v in own.items()})
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
    }
    files.write_text(out / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    mode = (out / "preprocessor_config.json").stat().st_mode
    for file in out.iterdir():  # transformers writes weights that only their owner can read
        file.chmod(mode)


def _part(state: dict[str, Tensor], name: str) -> Tensor:
    """A tensor by its half-way name: a third of `attn.qkv`, a half of a gated `mlp.fc1`, or as it is."""
    for ours, parts in PACKED.items():
        for index, part in enumerate(parts):
            if part in name:
                return state[name.replace(part, ours)].chunk(len(parts))[index]
    if name.endswith(".gamma") and name not in state:  # a network without LayerScale
        block = name.rsplit(".", 2)[0]
        return torch.ones_like(state[f"{block}.norm1.weight"])
    return state[name]
