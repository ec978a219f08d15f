"""The pyramid against loops in float64; its strides."""

import math

import pytest
import torch
from torch import Tensor, nn

from foveola.tasks.pyramid import ChannelNorm, Pyramid, as_map, factors, strides

WIDTH, CHANNELS, SIDE = 8, 6, 4


def made(patch: int = 16) -> Pyramid:
    torch.manual_seed(0)
    pyramid = Pyramid(WIDTH, patch, CHANNELS).double()
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return pyramid


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    """Cell by cell: less the mean over channels, over the deviation."""
    out = torch.empty_like(x)
    for y in range(x.shape[1]):
        for u in range(x.shape[2]):
            cell = x[:, y, u]
            centred = cell - cell.sum() / len(cell)
            out[:, y, u] = (
                centred / ((centred**2).sum() / len(cell) + 1e-6).sqrt() * layer.weight + layer.bias
            )
    return out


def up(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """Each cell writes 2 x 2 cells of its own."""
    out = torch.empty(layer.out_channels, 2 * x.shape[1], 2 * x.shape[2], dtype=x.dtype)
    for y in range(out.shape[1]):
        for u in range(out.shape[2]):
            out[:, y, u] = x[:, y // 2, u // 2] @ layer.weight[:, :, y % 2, u % 2] + layer.bias
    return out


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    reach = weight.shape[-1] // 2
    out = torch.zeros(weight.shape[0], *x.shape[1:], dtype=x.dtype)
    for y in range(x.shape[1]):
        for u in range(x.shape[2]):
            for dy in range(-reach, reach + 1):
                for du in range(-reach, reach + 1):
                    if 0 <= y + dy < x.shape[1] and 0 <= u + du < x.shape[2]:
                        out[:, y, u] += weight[:, :, dy + reach, du + reach] @ x[:, y + dy, u + du]
    return out


def halved(x: Tensor) -> Tensor:
    rows = [
        [x[:, y : y + 2, u : u + 2].amax(dim=(1, 2)) for u in range(0, x.shape[2], 2)]
        for y in range(0, x.shape[1], 2)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@torch.no_grad()
def test_maps_by_loops() -> None:
    pyramid = made()
    x = torch.randn(2, WIDTH, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).double()
    found = pyramid(x)
    one, two, three, four = pyramid.levels
    for image in range(2):
        finest = up(gelu(norm(up(x[image], one[0]), one[1])), one[3])
        before = [finest, up(x[image], two[0]), x[image], halved(x[image])]
        for level, (cells, layers) in enumerate(zip(before, (one, two, three, four), strict=True)):
            *_, squeeze, first, smooth, second = layers
            expected = norm(convolved(norm(convolved(cells, squeeze.weight), first), smooth.weight), second)
            torch.testing.assert_close(found[level][image], expected)
        torch.testing.assert_close(found[4][image], found[3][image][:, ::2, ::2])


def test_strides() -> None:
    """ViTDet's for patches of 16; the same pixels for patches of 8 and 4; for 14 the nearest to them."""
    assert strides(16) == (4, 8, 16, 32, 64)
    assert strides(8) == (4, 8, 16, 32, 64)
    assert strides(4) == (4, 8, 16, 32, 64)
    assert strides(14) == (3.5, 7, 14, 28, 56)
    assert factors(16) == (4, 2, 1, 0.5)
    assert factors(4) == (1, 0.5, 0.25, 0.125)
    for patch, side in ((16, 64), (8, 64), (4, 64), (14, 56)):
        x = torch.zeros(1, WIDTH, side // patch, side // patch).double()
        assert [m.shape[-1] for m in made(patch)(x)] == [side / stride for stride in strides(patch)]


def test_patches_as_a_map() -> None:
    patches = torch.arange(2 * 6 * 3).view(2, 6, 3).float()
    found = as_map(patches, (2, 3))
    for row in range(2):
        for column in range(3):
            assert torch.equal(found[:, :, row, column], patches[:, 3 * row + column])


def test_channel_norm_is_a_norm_for_the_optimizer() -> None:
    assert isinstance(ChannelNorm(4), nn.LayerNorm)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ChannelNorm(5)(x).mean(dim=1), torch.zeros(2, 3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_every_weight_is_used(patch) -> None:
    pyramid = made(patch)
    sum(level.pow(2).sum() for level in pyramid(torch.randn(1, WIDTH, 8, 8).double())).backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in pyramid.parameters()
    )
