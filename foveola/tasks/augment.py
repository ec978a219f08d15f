"""Augmentation of classifiers that is no geometry: RandAugment, erasing, mixup, cutmix, smoothing."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveola.config import UserError, key
from foveola.views.batch import ViewsConfig

MAGNITUDE_STEPS = 10  # of torchvision's integer magnitudes to one of RandAugment's


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to views and labels besides what `views` does. Defaults: nothing."""

    randaugment: int = key(0, "RandAugment: random operations on each view", at_least=0, at_most=10)
    magnitude: float = key(9.0, "strength of these operations, from 0 to 10", at_least=0, at_most=10)
    magnitude_std: float = key(0.5, "standard deviation of the strength between views", at_least=0)
    erasing: float = key(0.0, "probability that a rectangle of a view becomes noise", at_least=0, at_most=1)
    mixup: float = key(0.0, "alpha of mixup: images are averaged in pairs; 0 = none", at_least=0)
    cutmix: float = key(
        0.0, "alpha of cutmix: a rectangle is of the other image of a pair; 0 = none", at_least=0
    )
    mix_probability: float = key(1.0, "fraction of batches that are mixed", at_least=0, at_most=1)
    cutmix_share: float = key(
        0.5, "fraction of mixed batches that are mixed by cutmix, where both are", at_least=0, at_most=1
    )
    smoothing: float = key(0.0, "fraction of each label that is spread over all classes", at_least=0, below=1)

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if not self.randaugment:
            idle |= dict.fromkeys(("magnitude", "magnitude_std"), "randaugment=0")
        if not self.mixes:
            idle["mix_probability"] = "mixup=0.0 and cutmix=0.0"
        if not (self.mixup and self.cutmix):
            idle["cutmix_share"] = "one of mixup and cutmix is 0.0"
        return idle

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return bool(self.mixup or self.cutmix)


class Augment:
    """Changes views as they are given to a method, which are normalised, and the fractions of their classes.

    Draws come from torch's own generator of the CPU, which a step seeds, so a step that is repeated is the
    same. Raises UserError where torchvision is needed and is not there.
    """

    def __init__(self, config: AugmentConfig, views: ViewsConfig) -> None:
        self.config, self.color = config, views.color
        self.library: Any = _library() if config.randaugment or config.erasing else None

    def __call__(
        self, images: Float[Tensor, "B ch H W"], soft_labels: Float[Tensor, "B C"]
    ) -> tuple[Float[Tensor, "B ch H W"], Float[Tensor, "B C"]]:
        """Return views after RandAugment, erasing and mixing, and the fraction of each class in them.

        The fractions of an image sum to one, or to zero where its class is not known, and still do.
        """
        config = self.config
        if config.randaugment:
            images = self._random_operations(images)
        if config.erasing:
            erase = self.library.RandomErasing(p=config.erasing, value="random")
            images = torch.stack([erase(view) for view in images])
        spread = soft_labels.sum(dim=1, keepdim=True) / soft_labels.shape[1]
        return self._mixed(images, torch.lerp(soft_labels, spread.expand_as(soft_labels), config.smoothing))

    def _random_operations(self, images: Tensor) -> Tensor:
        """RandAugment of the pixels in 256 levels, as it is defined, each view with draws of its own."""
        mean, std = (
            torch.tensor(each, device=images.device)[:, None, None]
            for each in (self.color.mean, self.color.std)
        )
        plain = ((images * std + mean) * 255).round_().clamp_(0, 255).byte()
        changed = []
        for view in plain:
            strength = self.config.magnitude + self.config.magnitude_std * float(torch.randn(()))
            change = self.library.RandAugment(
                self.config.randaugment,
                round(MAGNITUDE_STEPS * min(max(strength, 0.0), 10.0)),
                num_magnitude_bins=10 * MAGNITUDE_STEPS + 1,
                fill=[round(255 * level) for level in self.color.mean],
            )
            changed.append(change(view))
        return (torch.stack(changed).float() / 255 - mean) / std

    def _mixed(self, images: Tensor, soft_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019): each image with the one before it."""
        config = self.config
        if not config.mixes or float(torch.rand(())) >= config.mix_probability:
            return images, soft_labels
        cut = not config.mixup or (config.cutmix > 0 and float(torch.rand(())) < config.cutmix_share)
        alpha = torch.tensor(config.cutmix if cut else config.mixup)
        remaining = float(torch.distributions.Beta(alpha, alpha).sample())
        others = images.roll(1, 0)
        if cut:
            remaining, (y0, y1, x0, x1) = rectangle(remaining, images.shape[-2], images.shape[-1])
            images = images.clone()
            images[:, :, y0:y1, x0:x1] = others[:, :, y0:y1, x0:x1]
        else:
            images = torch.lerp(others, images, remaining)
        return images, torch.lerp(soft_labels.roll(1, 0), soft_labels, remaining)


def rectangle(remaining: float, height: int, width: int) -> tuple[float, tuple[int, int, int, int]]:
    """Return what remains of an image beside a random rectangle, and its ends y0, y1, x0, x1 (CutMix).

    The rectangle has the shape of the image and 1 - `remaining` of its area, around any pixel; what of it
    lies outside is cut off, so that more may remain in the end.
    """
    side = (1 - remaining) ** 0.5
    y, x = (int(torch.randint(length, ())) for length in (height, width))
    down, across = int(height * side) // 2, int(width * side) // 2
    y0, y1, x0, x1 = max(y - down, 0), min(y + down, height), max(x - across, 0), min(x + across, width)
    return 1 - (y1 - y0) * (x1 - x0) / (height * width), (y0, y1, x0, x1)


def _library() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise UserError("method.augment needs torchvision: pip install 'foveola[finetune]'") from error
    return v2
