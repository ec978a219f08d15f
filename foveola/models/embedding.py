"""What enters the blocks of a ViT: pixels of patches through a linear map, and rotations of tokens."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear

from foveola.geometry import resampling_weights
from foveola.models.positions import Rope, border_coordinates, take_rows


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map, kept as a convolution for its parameter names."""

    def __init__(self, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(
        self, images: Float[Tensor, "B C H W"], kept: Int64[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B N2 D"]:
        """Embed all patches, or the kept ones without any work on the others."""
        if kept is None:
            return self.proj(images).flatten(2).mT
        return linear(
            take_rows(patchify(images, self.patch_size), kept), self.proj.weight.flatten(1), self.proj.bias
        )


def patchify(images: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B N CPP"]:
    """Return the pixels of each patch, channel by channel as a convolution kernel has them; patches
    row-major.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(
    patches: Float[Tensor, "B N CPP"], patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "B C H W"]:
    """Return images from the pixels of all their patches, row-major over (rows, columns): undoes
    `patchify`.
    """
    rows, columns = grid
    x = patches.view(len(patches), rows, columns, -1, patch_size, patch_size)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, rows * patch_size, columns * patch_size)


def token_rotation(
    rope: Rope, grid: tuple[int, int], kept: Int64[Tensor, "B K"] | None, objects: int, registers: int
) -> Float[Tensor, "B 2 T d"]:
    """Return the rotation of [object tokens, registers, patches]; object tokens (DINOv3's registers too) stay
    put.

    One row serves all images unless each keeps its own patches, which then also place its registers.
    """
    coordinates = rope.coordinates(grid)
    if kept is not None:
        coordinates = take_rows(coordinates, kept)
    still_ones = objects
    if rope.kind == "dinov3":
        still_ones += registers
    else:
        coordinates = torch.cat((border_coordinates(registers, coordinates), coordinates), dim=1)
    rotation = rope(coordinates)
    if not still_ones:
        return rotation
    still = torch.zeros_like(rotation[:, :, :1]).expand(-1, -1, still_ones, -1).clone()
    still[:, 0] = 1  # cosines
    return torch.cat((still, rotation), dim=2)


def resized_kernel(kernel: Float[Tensor, "D C P P"], patch_size: int) -> Float[Tensor, "D C P2 P2"]:
    """Return the kernel of a patch embedding for patches of another size (FlexiViT, Section 3.4: PI-resize).

    With B the antialiased bicubic resizing of a patch, the new kernel w2 is the least squares solution of
    <B x, w2> = <x, w> over all patches x: w2 = pinv(B^T) w. For larger patches the solution is exact: a patch
    that was enlarged gives the embedding that it gave before. B is separable, and so is its pseudo-inverse.
    Computed in float64.
    """
    size = kernel.shape[-1]
    if size == patch_size:
        return kernel
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=kernel.device)
    resize = resampling_weights(ends[0], ends[1], patch_size, size)  # [P2, P]
    inverse = torch.linalg.pinv(resize.mT)
    return (inverse @ kernel.double() @ inverse.mT).to(kernel.dtype)
