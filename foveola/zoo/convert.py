"""State dicts of public checkpoints to our names: pure functions from dict to dict, no files, no networks."""

import re
from typing import Any

from foveola.zoo.capi import capi, capi_weights
from foveola.zoo.sizes import WRAPPERS, depth_of, mlp_ratio, patch_kernel, size_of

KNOWN = "DINO, iBOT, DINOv2, MAE, I-JEPA, CAPI and timm"
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
LABELS = ("head.weight", "head.bias")  # a classifier: the file is of supervised training
HEADS = (  # at the top level
    *("head.", "head_dist.", "fc_norm.", "last_layer", "mlp.", "dino_head.", "ibot_head."),
    *("decoder_", "predictor."),
)
OURS = (  # names of DINOv2 and iBOT to timm's, which are ours
    # DINOv2 trains blocks in chunks: the second number counts them.
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^register_tokens$", "reg_token"),
    (r"^masked_embed$", "mask_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
NEEDED = (  # and the dimensions of each
    ("patch_embed.proj.weight", 4),
    ("blocks.0.attn.qkv.weight", 2),
    ("blocks.0.mlp.fc1.weight", 2),
    ("blocks.0.mlp.fc2.weight", 2),
    ("norm.weight", 1),
)


def convert(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and settings of an encoder (a tree for EncoderConfig) from a public checkpoint.

    Raises ValueError with one line that says what is missing.
    """
    if found := capi_weights(checkpoint):
        return capi(found)
    weights, shape = plain_vit(checkpoint)
    settings: dict[str, Any] = {"model": shape}
    if not shape.get("class_token", True):  # I-JEPA
        settings["pool"] = "average"
    if not shape.get("position_antialias") and not shape.get("position_offset"):
        # MAE and I-JEPA are read at the size of their training, the others at 224 pixels.
        side = shape["image_size"]
        settings["transform"] = {"resize": round(side * 8 / 7), "crop": side}
    return weights, settings


def plain_vit(
    checkpoint: dict[str, Any], heads: int | None = None, rotary: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and shape of a plain ViT from a DINO, iBOT, DINOv2, MAE, I-JEPA or timm checkpoint.

    Accepts the teacher of a full training checkpoint, a bare backbone, and any nesting of the prefixes that
    data-parallel and multi-crop wrappers leave. Blocks may have LayerScale and gated MLPs; there may be
    registers, and positions with or without rows for the class token and registers, which are then added to
    these. Heads of training and decoders are left out.

    Args:
        heads: attention heads, where they are known; else by the width, which must then be a published one.
        rotary: there is no table of positions.

    Returns (state dict with our names, keyword arguments of ViTConfig). How positions are resized is told
    from what the file holds: as MAE's code does where the table is one of sines, as timm's where there is a
    classifier, registers, or LayerScale without mask token, as DINO's otherwise. Raises ValueError with one
    line that says what is missing.
    """
    found, with_labels = _backbone(checkpoint)
    named_gated = any(".mlp.w12." in name for name in found)
    named_registers = "register_tokens" in found
    weights = found
    for pattern, ours in OURS:
        weights = {re.sub(pattern, ours, name): value for name, value in weights.items()}
    _check(weights, found, rotary)
    width, patch = patch_kernel(weights["patch_embed.proj.weight"], "patch_embed.proj.weight")
    shape: dict[str, Any] = {
        **size_of(width, heads),
        "depth": depth_of(weights),
        "patch_size": patch,
        "class_token": "cls_token" in weights,
        "drop_path": 0.0,
        **_mlp_shape(weights, width, named_gated),
    }
    # timm drops the mask token, and writes class positions into the token where there are registers.
    scaled, masks = "blocks.0.ls1.gamma" in weights, "mask_token" in weights
    if rotary:
        shape["image_size"] = 16 * patch  # which no table binds
    else:
        side = _square_positions(weights, width)
        shape["image_size"] = side * patch
        if named_registers or "reg_token" in weights or with_labels or (scaled and not masks):
            shape["position_antialias"] = True
        elif shape["class_token"] and not _is_fixed(weights["pos_embed"], side):
            shape["position_offset"] = 0.1
    shape["registers"] = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    token = weights.get("mask_token")
    if token is None or token.numel() != width:  # a decoder's has the decoder's width
        token = weights["norm.weight"].new_zeros(width)
    weights["mask_token"] = token.reshape(1, 1, width)
    if scaled:
        shape["layer_scale"] = 1e-5
    _no_biases(weights, width, shape["depth"])
    return weights, shape


def _check(weights: dict[str, Any], found: dict[str, Any], rotary: bool) -> None:
    """Raise ValueError unless all is there that tells the shape."""
    needed = NEEDED if rotary else (*NEEDED, ("pos_embed", 3))
    for name, dimensions in needed:
        if name in weights and weights[name].ndim != dimensions:
            shape = tuple(weights[name].shape)
            raise ValueError(f"{name} is {shape}, expected a tensor of {dimensions} dimensions")
    if missing := next((name for name, _ in needed if name not in weights), None):
        names = ", ".join(sorted(found)[:3]) or "no tensors"
        hint = f"; known: {KNOWN}"
        if any("embeddings." in name for name in found):
            hint = "; names like Hugging Face's: load the model's folder as hf:FOLDER"
        elif missing == "norm.weight" and "blocks.0.norm1.weight" in found:
            hint = "; a network that is normalised after pooling (fc_norm) is not supported"
        raise ValueError(f"not a known ViT checkpoint: no {missing} (found {names} ...){hint}")


def _backbone(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Tensors of the backbone by bare names, the teacher's if there are two; is there a classifier?"""
    state: dict[str, Any] = checkpoint
    while wrapper := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None):
        state = state[wrapper]
    if isinstance(state.get("encoder"), dict):  # I-JEPA without its target encoder
        state = state["encoder"]
    for network in ("teacher.", "student."):  # both in one dict, as a model that holds them saves itself
        own = {name.partition(network)[2]: value for name, value in state.items() if _starts(name, network)}
        if own:
            state = own
            break
    tensors = {_bare(name): value for name, value in state.items() if hasattr(value, "shape")}
    weights = {name: value for name, value in tensors.items() if not name.startswith(HEADS)}
    return weights, all(name in tensors for name in LABELS)


def _bare(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


def _starts(name: str, network: str) -> bool:
    return _bare(name).startswith(network)


def _no_biases(weights: dict[str, Any], width: int, depth: int) -> None:
    """Zero biases for projections that have none in any block, which is the same function; in place."""
    zero = weights["norm.weight"].new_zeros
    if not any(name.endswith(".attn.qkv.bias") for name in weights):
        weights |= {f"blocks.{i}.attn.qkv.bias": zero(3 * width) for i in range(depth)}


def _mlp_shape(weights: dict[str, Any], width: int, named_gated: bool) -> dict[str, Any]:
    """Kind and ratio of the MLP, by what its two maps are made for: a gated one makes two of each channel."""
    up, inner = (
        weights[f"blocks.0.mlp.{name}.weight"].shape[axis] for name, axis in (("fc1", 0), ("fc2", 1))
    )
    if up == inner and not named_gated:
        return {"mlp_ratio": mlp_ratio(up, width)}
    if up == 2 * inner:
        if inner % 8:
            raise ValueError(f"a gated MLP of {inner} channels, which is no multiple of 8, is not supported")
        return {"mlp": "swiglu", "mlp_ratio": 1.5 * inner / width}
    kind = "a gated MLP" if named_gated else "an MLP"
    raise ValueError(f"blocks.0.mlp makes {up} channels and takes {inner}, which is not {kind}")


def _square_positions(weights: dict[str, Any], width: int) -> int:
    """Give pos_embed one row for the class token, if any, and a square for patches, in place; its side.

    timm also has tables without rows for class token and registers (`no_embed_class`), and with rows for all
    of them. A row of a token that needs none is zero; registers take theirs over.
    """
    table = weights["pos_embed"]
    registers = weights["reg_token"].reshape(1, -1, width) if "reg_token" in weights else None
    count = 0 if registers is None else registers.shape[1]
    entries, token = table.shape[1], int("cls_token" in weights)
    for rows in (token, 0, token + count):
        side = round(max(entries - rows, 0) ** 0.5)
        if side and side * side == entries - rows:
            break
    else:
        if not token and round((entries - 1) ** 0.5) ** 2 == entries - 1:
            raise ValueError("not a known ViT checkpoint: no cls_token, of which pos_embed has a row")
        raise ValueError(f"pos_embed has {entries} entries: expected a square, or a square and a class token")
    if rows == 0 and token:
        weights["pos_embed"] = table.new_zeros(1, 1 + entries, table.shape[2])
        weights["pos_embed"][:, 1:] = table
    if registers is not None:
        weights["reg_token"] = registers
        if rows > token:
            weights["reg_token"] = registers + table[:, token:rows]
            weights["pos_embed"] = table[:, [*range(token), *range(rows, entries)]]
    return side


def _is_fixed(table: Any, side: int) -> bool:
    """Whether positions, behind the class token's, are those of MAE, which are not trained."""
    import torch

    width = table.shape[2]
    if width % 4 or table[:, :1].any():
        return False
    places = torch.arange(side, dtype=torch.float64)
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = places[:, None] * frequencies
    waves = torch.cat((waves.sin(), waves.cos()), dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    difference = table[0, 1:].double() - torch.cat((columns, rows), dim=1)
    return bool(difference.abs().max() < 2e-3)  # half precision is good to 1e-3
