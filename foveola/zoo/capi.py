"""State dicts of CAPI's released models to our names."""

from typing import Any

from foveola.zoo.sizes import WRAPPERS, depth_of, mlp_ratio, patch_kernel, published_heads, size_of


def capi_weights(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the tensors of a CAPI encoder and decoder, from a bare state dict or the wrappers of a training
    run.
    """
    prefixes = ("", "module.", "backbone.", "teacher.", "student_ema.")
    for state in (checkpoint, *(checkpoint[w] for w in WRAPPERS if isinstance(checkpoint.get(w), dict))):
        for prefix in prefixes:
            if f"{prefix}encoder.blocks.0.residual1.fn.q_proj.weight" in state:
                return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return None


def capi(state: dict[str, Any], heads: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and settings from the state dict of CAPI's released models.

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

    width, patch = patch_kernel(take("patch_embed.weight"), "patch_embed.weight")
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
    depth = depth_of(state, "encoder.blocks.")
    for i in range(depth):
        weights |= block(f"encoder.blocks.{i}", f"blocks.{i}", {"qkv": ("q", "k", "v")})
    weights |= block("decoder.blocks.0", "predictor.blocks.0", {"q": ("q",), "kv": ("k", "v")})
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    model = {
        **size_of(width, heads or published_heads((width, depth, hidden))),
        "depth": depth,
        "patch_size": patch,
        "image_size": 16 * patch,
        "class_token": False,
        "registers": registers.shape[1],
        "norm": "rms",
        "final_norm_affine": False,
        "bias": False,
        "mlp_ratio": mlp_ratio(hidden, width),
        "positions": "rope",
        "rope": "capi",
        "drop_path": 0.0,
        "init": "xavier",
    }
    predictor = {"kind": "cross", "width": token.shape[2], "depth": 1}
    return weights, {"model": model, "pool": "predictor", "predictor": predictor}
