"""State dicts of relatives of the plain ViT to our names: BEiT, SimMIM, data2vec (1.0), AIM."""

import math
import re
from typing import Any

TABLE = "relative_position_bias_table"
BEIT = (  # names of BEiT's code, which SimMIM and data2vec use, to ours
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)
AIM = (
    (r"^preprocessor\.patchifier\.proj\.", "patch_embed.proj."),
    (r"^preprocessor\.patchifier\.norm\.", "patch_norm."),
    (r"^preprocessor\.(cls_token|pos_embed)$", r"\1"),
    (r"^trunk\.post_trunk_norm\.", "norm."),
    (r"^trunk\.(blocks\.\d+\.)norm_([12])\.", r"\1norm\2."),
    (r"^trunk\.", ""),
)
AIM_HEAD = 128  # channels of a head in all its networks


def beit(tensors: dict[str, Any], depth: int) -> dict[str, Any]:
    """Return tensors by our names: biases of queries, keys and values in one, a table for each block.

    Keys have no bias, which is a bias of zero. A table that all blocks share becomes as many of the same
    values, as in the code with which these networks are fine-tuned. Indices of tables are constants. What
    has none of these names is returned as it is.
    """
    import torch

    weights = {
        name: value for name, value in tensors.items() if not name.endswith(("_position_index", ".k_bias"))
    }
    for pattern, ours in BEIT:
        weights = {re.sub(pattern, ours, name): value for name, value in weights.items()}
    for name in [name for name in weights if name.endswith(".attn.q_bias")]:
        block = name.removesuffix("q_bias")
        query, value = weights.pop(name), weights.pop(f"{block}v_bias", None)
        if value is None:
            raise ValueError(f"not a whole checkpoint: {name} without {block}v_bias")
        weights[f"{block}qkv.bias"] = torch.cat((query, torch.zeros_like(query), value))
    shared = weights.pop(f"rel_pos_bias.{TABLE}", None)
    if shared is not None:
        weights |= {f"blocks.{i}.attn.{TABLE}": shared.clone() for i in range(depth)}
    return weights


def relative_shape(weights: dict[str, Any]) -> dict[str, Any]:
    """Return heads and grid side of networks with tables of relative positions; nothing of others.

    Raises ValueError for tables that are not of a square grid and a class token.
    """
    name = f"blocks.0.attn.{TABLE}"
    if name not in weights:
        return {}
    if weights[name].ndim != 2:
        raise ValueError(f"{name} is {tuple(weights[name].shape)}, expected (offsets, heads)")
    rows, heads = weights[name].shape
    across = math.isqrt(max(rows - 3, 0))
    if across % 2 == 0 or across**2 != rows - 3:
        raise ValueError(f"{name} has {rows} rows: expected those of a square grid and of a class token")
    return {"heads": heads, "side": (across + 1) // 2}


def aim(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return AIM's tensors (also of AIMv2, whose gated MLPs have three maps) by our names."""
    import torch

    weights = dict(tensors)
    for pattern, ours in AIM:
        weights = {re.sub(pattern, ours, name): value for name, value in weights.items()}
    for name in [name for name in weights if name.endswith(".mlp.fc3.weight")]:
        gate = name.replace(".fc3.", ".fc1.")
        if gate not in weights:
            raise ValueError(f"not a whole AIMv2: {name} without {gate}")
        weights[gate] = torch.cat((weights[gate], weights.pop(name)))
    return weights
