"""Rotary positions: rotations that know differences only, registers on the border, CAPI's variant."""

import math

import pytest
import torch

from foveola.models.attention import rotate
from foveola.models.positions import Rope, border_coordinates, grid_coordinates


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rope(width: int = 16, kind: str = "axial") -> Rope:
    return Rope(width, kind).double()


def scores(kind: str, shift: float) -> torch.Tensor:
    """q k^T of random heads at random places, moved together."""
    coordinates = torch.rand(1, 6, 2, generator=torch.Generator().manual_seed(3)).double() * 0.5 + shift
    positions = Rope(16, kind)
    rotation = positions(coordinates.float()).double()
    query, key = rotate(random(1, 2, 6, 16), rotation), rotate(random(1, 2, 6, 16, seed=1), rotation)
    return query @ key.mT


def test_axial_rotations_keep_lengths_and_know_differences_only():
    rotation = Rope(16)(torch.rand(2, 5, 2))
    x = torch.randn(2, 3, 5, 16)
    assert torch.allclose(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(scores("axial", 0.0), scores("axial", 0.3), atol=1e-4)


def test_the_released_variant_is_no_rotation():
    rotation = Rope(16, "capi")(torch.rand(2, 5, 2))
    x = torch.randn(2, 3, 5, 16)
    assert not torch.allclose(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1), rtol=1e-2)
    assert not torch.allclose(scores("capi", 0.0), scores("capi", 0.3), atol=1e-2)


@pytest.mark.parametrize("kind", ["axial", "capi"])
def test_against_loops_over_channels(kind):
    width, quarter = 16, 4
    coordinates = torch.tensor([[[0.2, 0.9], [1.0, 0.0]]])
    x = random(1, 1, 2, width)
    expected = torch.zeros_like(x)
    turns = [2 * math.pi * 7 * (7e-4 / 7) ** (i / (quarter - 1)) for i in range(quarter)]
    for token in range(2):
        row, column = coordinates[0, token].tolist()
        rows, columns = [row * t for t in turns], [column * t for t in turns]
        low = rows + columns if kind == "axial" else rows + rows
        high = rows + columns if kind == "axial" else columns + columns
        for j in range(8):
            a, b = x[0, 0, token, j], x[0, 0, token, j + 8]
            expected[0, 0, token, j] = a * math.cos(low[j]) - b * math.sin(low[j])
            expected[0, 0, token, j + 8] = b * math.cos(high[j]) + a * math.sin(high[j])
    assert torch.allclose(rotate(x, Rope(width, kind)(coordinates).double()), expected, atol=1e-4)


def test_variants_agree_where_row_and_column_do():
    same = torch.rand(1, 4, 1).expand(-1, -1, 2)
    x = torch.randn(1, 2, 4, 16)
    assert torch.allclose(rotate(x, Rope(16)(same)), rotate(x, Rope(16, "capi")(same)), atol=1e-5)


def test_coordinates_span_the_unit_square_row_first():
    coordinates = grid_coordinates((3, 2))[0]
    assert coordinates.tolist() == [[0, 0], [0, 1], [0.5, 0], [0.5, 1], [1, 0], [1, 1]]


def test_registers_stand_on_the_border_of_what_is_kept():
    whole = grid_coordinates((3, 3))
    border = border_coordinates(8, whole)[0].tolist()
    assert border == [[0, 0], [0.5, 0], [1, 0], [1, 0.5], [1, 1], [0.5, 1], [0, 1], [0, 0.5]]
    part = torch.tensor([[[0.5, 0.25], [0.75, 0.5]]])
    moved = border_coordinates(8, part)[0]
    expected = torch.tensor([0.5, 0.25]) + torch.tensor(border) * 0.25
    assert torch.allclose(moved, expected)
    assert border_coordinates(0, whole).shape == (1, 0, 2)
    with pytest.raises(ValueError, match="6 is not a multiple of 4"):
        border_coordinates(6, whole)


def test_angles_stay_exact_under_autocast():
    coordinates = grid_coordinates((16, 16))
    exact = Rope(64)(coordinates)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Rope(64)(coordinates), exact)
    half = torch.randn(1, 1, 256, 64, dtype=torch.bfloat16)
    assert rotate(half, exact).dtype == torch.bfloat16
