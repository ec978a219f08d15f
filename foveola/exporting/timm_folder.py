"""An encoder as a folder of timm's: a plain ViT, or with rotary positions an Eva, which DINOv3 is there."""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from foveola import files
from foveola.config import UserError
from foveola.exporting.plain import plain_weights
from foveola.models.encoder import Encoder
from foveola.zoo.sizes import mlp_ratio

EVA_ARGUMENTS = {  # DINOv3's
    "qkv_bias": True,
    "attn_type": "rope",  # which has a bias of keys, too
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "rope_grid_indexing": "ij",
    "rope_grid_offset": 0.0,
    "use_fc_norm": False,
    "scale_mlp": False,
    "swiglu_align_to": 0,
}


def _timm_weights(encoder: Encoder) -> dict[str, Tensor]:
    """Return weights as timm has them; with registers, the class token holds its position."""
    state = plain_weights(encoder)
    del state["mask_token"]
    if "pos_embed" not in state:  # rotary
        return {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): value for name, value in state.items()}
    if "reg_token" in state and "cls_token" in state:
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state


def write_timm(encoder: Encoder, out: Path) -> None:
    """Write a folder for `timm.create_model("local-dir:OUT", pretrained=True)`. Raises UserError for what a
    folder of timm's cannot say.
    """
    model, transform = encoder.config.model, encoder.config.transform
    rotary, eps = model.positions == "rope", 1e-6 if model.norm_eps is None else model.norm_eps
    if eps not in ((1e-6, 1e-5) if rotary else (1e-6,)):
        only = "1e-6 or 1e-5 of DINOv3's network" if rotary else "1e-6"
        raise UserError(f"this encoder has norm_eps={eps:g}; a folder of timm's can only say {only}")
    width, depth, heads = model.shape
    gated, pool = model.mlp == "swiglu", "token" if encoder.config.pool == "token" else "avg"
    state = _timm_weights(encoder)
    arguments: dict[str, Any] = {
        "img_size": transform.crop,
        "patch_size": model.patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio(state["blocks.0.mlp.fc1.weight"].shape[0], width),
        "init_values": model.layer_scale,
        "class_token": model.class_token,
        "global_pool": pool,
        "dynamic_img_size": True,
        **({} if model.channels == 3 else {"in_chans": model.channels}),
    }
    architecture = "vit_giant_patch14_dinov2" if gated else "vit_small_patch16_224"  # for their MLP
    if rotary:
        arguments |= EVA_ARGUMENTS | {"num_reg_tokens": model.registers, "swiglu_mlp": gated}
        if gated:  # of one half, where the ViT counts both
            arguments["mlp_ratio"] = mlp_ratio(state["blocks.0.mlp.fc2.weight"].shape[1], width)
        architecture = "vit_small_patch16_dinov3" if eps == 1e-5 else "vit_small_patch16_rope_224"  # for eps
    else:
        arguments |= {
            "reg_tokens": model.registers,
            "no_embed_class": model.registers > 0,
            "fc_norm": False,
        }
    fraction = transform.crop / transform.resize  # timm rounds crop / fraction down
    while math.floor(transform.crop / fraction) != transform.resize:
        fraction = math.nextafter(fraction, 0)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [model.channels, transform.crop, transform.crop],
            "fixed_input_size": False,
            "interpolation": transform.interpolation,
            "crop_pct": fraction,
            "crop_mode": "squash" if transform.squash else "center",
            "mean": list(transform.mean),
            "std": list(transform.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj" if model.channels == 3 else None,  # never adapted to RGB
            "classifier": "head",
        },
    }
    files.write_text(files.EncoderFolder(out).config, json.dumps(config, indent=2) + "\n")
    with files.whole(files.EncoderFolder(out).weights) as part:
        save_file({name: value.contiguous() for name, value in state.items()}, part)
