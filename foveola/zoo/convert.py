"""State dicts of public checkpoints to our names: pure functions from dict to dict, no files, no networks."""

import re
from typing import Any

WIDTHS = {192: ("tiny", 3), 384: ("small", 6), 768: ("base", 12), 1024: ("large", 16), 1536: ("giant", 24)}
WRAPPERS = ("teacher", "state_dict", "model", "student")  # in order of preference
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
DROPPED = ("head.", "head_dist.", "fc_norm.", "last_layer", "mlp.")  # heads; `mlp.` only at the top level


def convert(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and settings of an encoder (a tree for EncoderConfig) from a public checkpoint.

    Raises ValueError with one line that says what is missing.
    """
    if found := _capi_weights(checkpoint):
        return capi(found)
    weights, shape = plain_vit(checkpoint)
    return weights, {"model": shape}


def _capi_weights(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The tensors of a CAPI encoder and decoder, from a bare state dict or the wrappers of a training run."""
    prefixes = ("", "module.", "backbone.", "teacher.")
    for state in (checkpoint, *(checkpoint[w] for w in WRAPPERS if isinstance(checkpoint.get(w), dict))):
        for prefix in prefixes:
            if f"{prefix}encoder.blocks.0.residual1.fn.q_proj.weight" in state:
                return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return None


def capi(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and settings from the state dict of CAPI's released models.

    Its blocks hold `residual1` (attention with q_proj, k_proj, v_proj, proj) and `residual2` (MLP), each with
    a norm. Of the decoder the first block is kept, which pools. Frequencies of rotary positions are
    constants. Raises ValueError where tensors are missing.
    """
    import torch

    def take(name: str) -> Any:
        if name not in state:
            raise ValueError(f"not a whole CAPI checkpoint: no {name}")
        return state[name]

    def block(theirs: str, ours: str, packed: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        weights = {
            f"{ours}.norm1.weight": take(f"{theirs}.residual1.norm.weight"),
            f"{ours}.attn.proj.weight": take(f"{theirs}.residual1.fn.proj.weight"),
            f"{ours}.norm2.weight": take(f"{theirs}.residual2.norm.weight"),
            f"{ours}.mlp.fc1.weight": take(f"{theirs}.residual2.fn.fc1.weight"),
            f"{ours}.mlp.fc2.weight": take(f"{theirs}.residual2.fn.fc2.weight"),
        }
        for name, parts in packed.items():
            found = [take(f"{theirs}.residual1.fn.{part}_proj.weight") for part in parts]
            weights[f"{ours}.attn.{name}.weight"] = torch.cat(found)
        return weights

    kernel = tuple(take("patch_embed.weight").shape)
    width, patch = kernel[0], kernel[2]
    if width not in WIDTHS:
        raise ValueError(f"a ViT of width {width} is unknown; known widths: {', '.join(map(str, WIDTHS))}")
    size, heads = WIDTHS[width]
    registers = take("registers").reshape(1, -1, width)
    token = take("mask_token").reshape(1, 1, -1)
    weights = {
        "patch_embed.proj.weight": take("patch_embed.weight"),
        "patch_embed.proj.bias": take("patch_embed.bias"),
        "mask_token": torch.zeros(1, 1, width),  # of the encoder, which never gets one
        "predictor.mask_token": token,
    }
    if registers.shape[1]:
        weights["reg_token"] = registers
    depth = 1 + max(int(m[1]) for name in state if (m := re.match(r"encoder\.blocks\.(\d+)\.", name)))
    for i in range(depth):
        weights |= block(f"encoder.blocks.{i}", f"blocks.{i}", {"qkv": ("q", "k", "v")})
    weights |= block("decoder.blocks.0", "predictor.blocks.0", {"q": ("q",), "kv": ("k", "v")})
    model = {
        "size": size,
        "heads": heads,
        "depth": depth,
        "patch_size": patch,
        "image_size": 16 * patch,
        "class_token": False,
        "registers": registers.shape[1],
        "norm": "rms",
        "final_norm_affine": False,
        "bias": False,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "positions": "rope",
        "rope": "capi",
        "drop_path": 0.0,
        "init": "xavier",
    }
    predictor = {"kind": "cross", "width": token.shape[2], "depth": 1}
    return weights, {"model": model, "pool": "predictor", "predictor": predictor}


def plain_vit(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and shape of a plain ViT from a DINO, iBOT or timm checkpoint.

    Accepts the teacher of a full training checkpoint, a bare backbone, and any nesting of the prefixes that
    data-parallel and multi-crop wrappers leave. Returns (state dict with our names, keyword arguments of
    ViTConfig). Raises ValueError with one line that says what is missing.
    """
    state: dict[str, Any] = checkpoint
    while wrapper := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None):
        state = state[wrapper]
    weights: dict[str, Any] = {}
    for name, value in state.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if hasattr(value, "shape") and not name.startswith(DROPPED):
            weights[name] = value
    for needed in (
        "patch_embed.proj.weight",
        "cls_token",
        "pos_embed",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.fc1.weight",
        "norm.weight",
    ):
        if needed not in weights:
            found = ", ".join(sorted(weights)[:3]) or "no tensors"
            raise ValueError(f"not a known ViT checkpoint: no {needed} (found {found} ...)")

    kernel = tuple(weights["patch_embed.proj.weight"].shape)
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        raise ValueError(f"patch_embed.proj.weight is {kernel}, expected (width, 3, side, side)")
    width, _, patch, _ = kernel
    if width not in WIDTHS:
        raise ValueError(f"a ViT of width {width} is unknown; known widths: {', '.join(map(str, WIDTHS))}")
    size, heads = WIDTHS[width]
    if "masked_embed" in weights:  # iBOT
        weights["mask_token"] = weights.pop("masked_embed")
    token = weights.get("mask_token")
    weights["mask_token"] = weights["cls_token"] * 0 if token is None else token.reshape(1, 1, width)
    for theirs in [name for name in weights if name.startswith("register_tokens")]:
        weights["reg_token"] = weights.pop(theirs)
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name)))
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    if side * side + 1 != weights["pos_embed"].shape[1]:
        raise ValueError(
            f"pos_embed has {weights['pos_embed'].shape[1]} entries: expected a square and a class token"
        )
    shape: dict[str, Any] = {
        "size": size,
        "heads": heads,
        "depth": depth,
        "patch_size": patch,
        "image_size": side * patch,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "registers": weights["reg_token"].shape[1] if "reg_token" in weights else 0,
        "drop_path": 0.0,
    }
    if "blocks.0.ls1.gamma" in weights:
        shape["layer_scale"] = 1e-5
    return weights, shape
