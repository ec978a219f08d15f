"""Sheets of positions: what an encoder adds to its patches, or turns them by, to tell where they are."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from foveola.config import UserError
from foveola.drawing.overlays import cool_to_warm, cosine_bar, magnify
from foveola.drawing.sheet import Pixels, Row, Sheet
from foveola.figures.pca import Basis, pca_rgb
from foveola.figures.tiles import TILE_SIDE, Encoders, encoders_by_name
from foveola.models.encoder import Encoder

POSITION_KINDS = {
    "learned": "learned table",
    "sincos": "fixed sines and cosines",
    "field": "learned field",
    "none": "none",
    "rope": "rotary: nothing is added; cosines and sines of the angles by which queries and keys turn",
}


@torch.no_grad()
def position_map(encoder: Encoder, grid: tuple[int, int] | None = None) -> Float32[np.ndarray, "h w D"]:
    """Return the position of each patch of a whole image of (rows, columns) patches, the transform's by
    default.

    What is added to the patches; with rotary positions, where nothing is, the cosines and sines of the angles
    by which queries and keys are turned: their dot product depends on the difference of two positions alone
    (with `axial` and `dinov3` angles).
    """
    network, grid = encoder.backbone, grid or encoder.grid
    if network.rope is not None:
        return (
            network.rope(network.rope.coordinates(grid))[0]
            .transpose(0, 1)
            .flatten(1)
            .unflatten(0, grid)
            .cpu()
            .numpy()
        )
    positions = network.positions(grid)
    if positions is None:
        raise UserError("this encoder adds no positions to its patches, so there are none to draw")
    return positions[0].float().unflatten(0, grid).cpu().numpy()


def position_sheet(encoders: Encoders, count: int = 5) -> Sheet:
    """Return positions as colours (PCA), and how alike `count` x `count` of them are to all, one row each
    encoder.
    """
    rows = []
    for name, encoder in encoders_by_name(encoders).items():
        field = encoder.backbone.pos_field
        grid = encoder.grid if field is None else (field.values.shape[0], field.values.shape[1])
        table = position_map(encoder, grid)
        rgb = np.rint(255 * pca_rgb(table, Basis.fit(table, min(3, table.shape[2])))).astype(np.uint8)
        times = max(TILE_SIDE * 2 // max(grid), 1)
        title = f"{name}\n{POSITION_KINDS[encoder.config.model.positions]}".strip()
        maps, low = alike(table, count)
        colors = magnify(rgb, times * grid[0], times * grid[1])
        rows.append(Row(title, [colors, maps], [f"{grid[0]} x {grid[1]} positions", f"{low:.2f} to 1"]))
    note = "Cosines from the lowest of all (blue) to 1 (red); each small map stands where its position is."
    columns = ["as colours", f"cosines of {count} x {count} positions with all"]
    return Sheet("Positions", columns, rows, note, cosine_bar())


def alike(table: Float32[np.ndarray, "h w D"], count: int = 5) -> tuple[Pixels, float]:
    """Return maps of cosines of `count` x `count` evenly spaced positions with all, each where it stands.

    Returns them in one image, and the lowest cosine of two positions, where the colours begin.
    """
    unit = table / np.maximum(np.linalg.norm(table, axis=2, keepdims=True), 1e-12)
    flat = unit.reshape(-1, unit.shape[2])
    low = float((flat @ flat.T).min())
    height, width = table.shape[:2]
    lines = []
    for i in range(count):
        line = []
        for j in range(count):
            row, column = (round((k + 0.5) * n / count - 0.5) for k, n in ((i, height), (j, width)))
            times = max(TILE_SIDE * 2 // (count * max(height, width)), 1)
            tile = magnify(cool_to_warm(unit @ unit[row, column], low, 1.0), times * height, times * width)
            line.append(np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=255))
        lines.append(np.concatenate(line, axis=1))
    return np.concatenate(lines, axis=0), low


def position_panel(encoders: Encoders, **settings: Any) -> Pixels:
    """Return `position_sheet`, drawn."""
    return position_sheet(encoders, **settings).draw(TILE_SIDE * 3 // 2)
