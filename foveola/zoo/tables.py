"""Tables of positions in files of weights: their size, whose they are, and how they are resized."""

from typing import Any

from foveola.zoo.sizes import HEADS as PUBLISHED
from foveola.zoo.sizes import MAE, MOCO

RESIZED = {"dino": {"position_offset": 0.1}, "timm": {"position_antialias": True}, "plain": {}}


def table_of(
    weights: dict[str, Any], shape: dict[str, Any], width: int, of_timm: bool, resized: str | None
) -> dict[tuple[int, int, int], int]:
    """Say in `shape` how the table is resized; returns the published networks that have such a table."""
    side = _square_positions(weights, width)
    shape["image_size"] = side * shape["patch_size"]
    # timm drops the mask token, and writes class positions into the token where there are registers.
    scaled, masks = "blocks.0.ls1.gamma" in weights, "mask_token" in weights
    of_mae = shape["class_token"] and _is_fixed(weights["pos_embed"], side)
    of_moco = shape["class_token"] and _is_fixed(weights["pos_embed"], side, rows_first=True)
    if resized is not None:
        shape |= RESIZED[resized]
    elif of_timm or "reg_token" in weights or (scaled and not masks):
        shape["position_antialias"] = True
    elif shape["class_token"] and not of_mae and not of_moco:
        shape["position_offset"] = 0.1
    return MAE if of_mae else MOCO if of_moco else PUBLISHED


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


def sines(side: int, width: int, rows_first: bool = False) -> Any:
    """Return the fixed positions [side^2, width] of MAE and AIM in float64; MoCo-v3 has rows first."""
    import torch

    positions = torch.arange(side, dtype=torch.float64)
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = positions[:, None] * frequencies
    waves = torch.cat((waves.sin(), waves.cos()), dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    return torch.cat((rows, columns) if rows_first else (columns, rows), dim=1)


def _is_fixed(table: Any, side: int, rows_first: bool = False) -> bool:
    """Whether positions, behind the class token's, are those of MAE, which are not trained; or MoCo-v3's."""
    width = table.shape[2]
    if width % 4 or table[:, :1].any():
        return False
    error = (table[0, 1:].double() - sines(side, width, rows_first)).abs().max()
    return bool(error < 2e-3)  # half precision is good to 1e-3
