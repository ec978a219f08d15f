"""The simple feature pyramid of ViTDet: maps of five resolutions, made from the last map of a plain ViT."""

from math import log2

from jaxtyping import Float
from torch import Tensor, nn

LEVELS = 4  # besides the coarsest one, which is a sample of the fourth
FINEST = (
    4  # pixels between the cells of the finest map, or as near to it as a power of two of the patch comes
)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of a map [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def factors(patch_size: int) -> tuple[float, ...]:
    """Return how many times as fine as the patches each of the four maps is.

    Of patches of 16 pixels 4, 2, 1 and 1/2 (ViTDet, Section 3): strides of 4, 8, 16 and 32 pixels. Of others
    the powers of two that come nearest to a finest stride of 4: patches of 14 have strides of 3.5 to 28, of 8
    again 4 to 32.
    """
    finest = 2.0 ** round(log2(patch_size / FINEST))
    return tuple(finest / 2**level for level in range(LEVELS))


def strides(patch_size: int) -> tuple[float, ...]:
    """Return pixels between the cells of all five maps, the finest first."""
    four = [patch_size / factor for factor in factors(patch_size)]
    return *four, 2 * four[-1]


class Pyramid(nn.Module):
    """Maps of five resolutions from one [B, D, h, w], each with `channels`.

    Finer ones come from transposed convolutions of 2 x 2, which halve the channels each time (between two of
    them LayerNorm and GELU), coarser ones from the maximum of 2 x 2 cells. All go through a convolution of 1
    x 1 to `channels` and one of 3 x 3, each with LayerNorm and without bias. The fifth map is every second
    cell of the fourth.
    """

    def __init__(self, width: int, patch_size: int, channels: int = 256) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(width, factor, channels) for factor in factors(patch_size))

    def forward(self, x: Float[Tensor, "B D h w"]) -> list[Float[Tensor, "B C _ _"]]:
        maps = [level(x) for level in self.levels]
        return [*maps, maps[-1][:, :, ::2, ::2]]


def _level(width: int, factor: float, channels: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    while factor > 1:
        parts += [ChannelNorm(width), nn.GELU()] if parts else []
        parts.append(nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2))
        factor, width = factor / 2, width // 2
    while factor < 1:
        parts.append(nn.MaxPool2d(2))
        factor *= 2
    return nn.Sequential(
        *parts,
        nn.Conv2d(width, channels, 1, bias=False),
        ChannelNorm(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        ChannelNorm(channels),
    )


def as_map(patches: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B D h w"]:
    """Return patches, row-major, as a map."""
    return patches.mT.unflatten(2, grid)
