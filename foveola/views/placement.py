"""Where views stand in the position field: moved together, so that a network learns objects at other scales.

The views of an image keep their pixels and their positions relative to each other; only the part of the field
that their positions are read from is scaled and shifted (position field paper, Section 3.2.2).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from foveola.config import key


@dataclass(frozen=True)
class PlacementConfig:
    """Defaults: the position field paper."""

    around: Literal["views", "image"] = key(
        "views", "what gets the drawn area: the smallest rectangle around an image's views, or all of it"
    )
    distribution: Literal["beta", "uniform", "constant"] = key(
        "beta", "distribution of the area, between the ends of `area`; constant = its upper end (Table 4a)"
    )
    beta: tuple[int, int] = key(
        (2, 5), "parameters of distribution=beta, whole numbers", at_least=1, at_most=1000
    )
    area: tuple[float, float] = key(
        (0.2, 1.0), "least and largest fraction of the field's area", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        if self.area[0] > self.area[1]:
            raise ValueError("area: needs low <= high")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {} if self.distribution == "beta" else {"beta": f"distribution={self.distribution}"}


def draw_areas(config: PlacementConfig, count: int, generator: torch.Generator) -> Float64[Tensor, "n"]:
    """Return fractions s of the field's area: s = low + (high - low) x, x ~ Beta(a, b) or uniform in [0, 1).

    The paper gives Beta(2, 5) and the ends 0.2 and 1; cut off at 0.2 instead, a third of the draws would be
    0.2.
    """
    low, high = config.area
    if config.distribution == "constant":
        return torch.full((count,), high, dtype=torch.float64)
    if config.distribution == "uniform":
        fraction = torch.rand(count, generator=generator, dtype=torch.float64)
    else:
        # The a-th smallest of a + b - 1 uniform numbers: torch's own beta takes no generator.
        a, b = config.beta
        uniform = torch.rand(count, a + b - 1, generator=generator, dtype=torch.float64)
        fraction = uniform.sort(dim=1).values[:, a - 1]
    return low + (high - low) * fraction


def place_views(
    config: PlacementConfig, boxes: Float[Tensor, "B V 4"], generator: torch.Generator
) -> Float[Tensor, "B V 4"]:
    """Return boxes in the position field of all V views of each of B images, given their boxes in the image.

    One factor for both axes and one shift for all views of an image: the rectangle A around them, of area
    |A|, gets the area s by the factor sqrt(s / |A|), less where A would be longer or wider than the field,
    and is put uniformly where it stays inside. With `around=image` A is the whole image: the factor is
    sqrt(s) and s = 1 changes nothing. Computed in float64; draws on the CPU whatever the device of `boxes`.
    """
    count, device = len(boxes), boxes.device
    areas = draw_areas(config, count, generator).to(device, non_blocking=True)
    shift = torch.rand(count, 2, generator=generator, dtype=torch.float64).to(device, non_blocking=True)
    corners = boxes.double().unflatten(2, (2, 2))  # (low, high) of (x, y)
    if config.around == "views":
        origin, end = corners[:, :, 0].amin(dim=1), corners[:, :, 1].amax(dim=1)
        sides = end - origin
    else:
        origin = torch.zeros_like(shift)
        sides = torch.ones_like(shift)
    factor = torch.minimum((areas / sides.prod(dim=1)).sqrt(), (1 / sides).amin(dim=1))[:, None]
    start = shift * (1 - factor * sides).clamp(min=0)
    placed = start[:, None, None] + factor[:, None, None] * (corners - origin[:, None, None])
    return placed.flatten(2).clamp(0, 1).to(boxes.dtype)  # beyond 0 and 1 only by rounding
