"""Colour augmentation of batches of views: jitter, grayscale, solarise, normalise; blur is part of sampling.

Brightness, contrast, lightness, blur, noise and channel drop act on any number of channels. Saturation, hue,
grayscale and solarising are of RGB: they leave images of other than three channels as they are, so that one
recipe serves all.

Parameters are drawn for all views at once on the CPU, so that a step is the same on every device, and each
view gets its own. Images are float in [0, 1]. The operations are torchvision's: brightness, contrast,
saturation and hue in a random order, each clipped to [0, 1].
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from foveola.config import key

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class ColorConfig:
    """Defaults: DINO, iBOT and ODIS (the augmentation of their official code)."""

    jitter: float = key(
        0.8, "probability of brightness, contrast, saturation and hue jitter", at_least=0, at_most=1
    )
    brightness: float = key(0.4, "brightness factor in 1 +- this", at_least=0, at_most=1)
    contrast: float = key(0.4, "contrast factor in 1 +- this", at_least=0, at_most=1)
    saturation: float = key(0.2, "saturation factor in 1 +- this", at_least=0, at_most=1)
    hue: float = key(0.1, "hue shift in +- this, in turns of the colour circle", at_least=0, at_most=0.5)
    lightness: float = key(
        0.0,
        "added to all channels, which are in [0, 1], in +- this, before all others",
        at_least=0,
        at_most=1,
    )
    jitter_each: bool = key(
        False,
        "whether each of these is drawn with the probability `jitter`, not all of them together (mmseg)",
    )
    grayscale: float = key(0.2, "probability of turning gray", at_least=0, at_most=1)
    blur: tuple[float, float, float] = key(
        (1.0, 0.1, 0.5), "probability of blur in first global, other global, local views"
    )
    blur_sigma: tuple[float, float] = key(
        (0.1, 2.0), "range of the Gaussian's standard deviation, in view pixels"
    )
    solarize: tuple[float, float, float] = key((0.0, 0.2, 0.0), "probability of solarising, as for blur")
    noise: float = key(
        0.0, "standard deviation of Gaussian noise, drawn for each view in [0, this]", at_least=0, at_most=1
    )
    channel_drop: float = key(
        0.0,
        "probability of each channel to become its mean, as if it were not there; one stays",
        at_least=0,
        below=1,
    )
    normalise: Literal["auto", "data", "given"] = key(
        "auto", "mean and std: measured in the data, or given; auto: measured unless there are 3 channels"
    )
    mean: tuple[float, ...] = key((0.485, 0.456, 0.406), "subtracted from each channel in [0, 1]")
    std: tuple[float, ...] = key((0.229, 0.224, 0.225), "then divided by")

    def __post_init__(self) -> None:
        for name in ("blur", "solarize"):
            if not all(0 <= p <= 1 for p in getattr(self, name)):
                raise ValueError(f"{name}: probabilities lie in [0, 1]")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError("blur_sigma: needs 0 < low <= high")
        if not all(s > 0 for s in self.std):
            raise ValueError("std: must be positive")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channel(s), std {len(self.std)}")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        jitter = ("brightness", "contrast", "saturation", "hue", "lightness", "jitter_each")
        idle: dict[str, str] = {}
        if not self.jitter:
            idle |= dict.fromkeys(jitter, "jitter=0.0")
        elif self.jitter == 1:
            idle["jitter_each"] = "jitter=1.0: all are drawn in any case"
        if not any(self.blur):
            idle["blur_sigma"] = "no view is blurred (blur)"
        return idle


@dataclass(frozen=True, eq=False)
class ColorDraw:
    """What was drawn for each of n views; CPU tensors."""

    order: Int64[Tensor, "n 4"]  # which operation comes at each turn; 4 = none (view not jittered)
    factors: Float[Tensor, "n 4"]  # brightness, contrast, saturation factors and hue shift
    gray: Bool[Tensor, "n"]
    solarize: Bool[Tensor, "n"]
    blur: Float[Tensor, "n"]  # sigma in view pixels, 0 = no blur
    lightness: Float[Tensor, "n"] | None = None  # added first of all; None = nothing
    noise: Float[Tensor, "n"] | None = None  # its deviation; None = there is none
    noise_seed: int = 0  # of its pixels
    dropped: Bool[Tensor, "n C"] | None = None  # channels that become their mean; None = none


def draw_colors(
    config: ColorConfig, kinds: Int64[Tensor, "n"], generator: torch.Generator, channels: int = 3
) -> ColorDraw:
    """Draw colour parameters; `kinds` is 0 for the first global view, 1 for other globals, 2 for locals."""
    n = kinds.shape[0]
    uniform = torch.rand(n, 12, generator=generator)
    strength = torch.tensor([config.brightness, config.contrast, config.saturation, config.hue])
    base = torch.tensor([1.0, 1.0, 1.0, 0.0])
    factors = base + strength * (2 * uniform[:, :4] - 1)
    jittered = uniform[:, 8] < config.jitter
    order = torch.where(jittered[:, None], uniform[:, 4:8].argsort(dim=1), 4)
    low, high = config.blur_sigma
    sigma = low + (high - low) * torch.rand(n, generator=generator)
    blurred = uniform[:, 10] < torch.tensor(config.blur)[kinds]
    lightness = None
    if config.lightness or config.jitter_each:  # drawn last: others stay as they are
        more = torch.rand(n, 6, generator=generator)
        lit = more[:, 0] < config.jitter if config.jitter_each else jittered
        lightness = torch.where(lit, config.lightness * (2 * more[:, 1] - 1), 0.0)
        if config.jitter_each:
            order = uniform[:, 4:8].argsort(dim=1)
            order = torch.where((more[:, 2:] < config.jitter).gather(1, order), order, 4)
    noise, seed, dropped = None, 0, None
    if config.noise:
        noise = config.noise * torch.rand(n, generator=generator)
        seed = int(torch.randint(2**62, (1,), generator=generator))
    if config.channel_drop:
        chances = torch.rand(n, channels, generator=generator)
        # The one that is least likely to go stays.
        dropped = (chances < config.channel_drop) & (chances < chances.amax(dim=1, keepdim=True))
    return ColorDraw(
        noise=noise,
        noise_seed=seed,
        dropped=dropped,
        order=order,
        factors=factors,
        gray=uniform[:, 9] < config.grayscale,
        solarize=uniform[:, 11] < torch.tensor(config.solarize)[kinds],
        blur=torch.where(blurred, sigma, 0.0),
        lightness=lightness,
    )


def apply(
    images: Float[Tensor, "n C H W"],
    drawn: ColorDraw,
    config: ColorConfig,
    inside: Bool[Tensor, "n 1 H W"] | None = None,
) -> Float[Tensor, "n C H W"]:
    """Colour and normalise views in [0, 1], in place; also clips the overshoot of bicubic sampling
    first.

    `inside` tells the pixels of the image from padding, which changes no colour and is 0 in the end, the mean
    colour. None: all are the image's.
    """
    images.clamp_(0, 1)
    if drawn.lightness is not None:
        images.add_(drawn.lightness.to(images.device, non_blocking=True)[:, None, None, None]).clamp_(0, 1)
    colours = images.shape[1] == 3  # others have no hue, no saturation, and no grey that is theirs
    operations = (_brightness, _contrast, _saturation, _hue)[: 4 if colours else 2]
    for turn in range(4):
        for kind, operation in enumerate(operations):
            chosen = (drawn.order[:, turn] == kind).nonzero()[:, 0]
            if len(chosen):
                factor = drawn.factors[chosen, kind].to(images.device, non_blocking=True)[:, None, None, None]
                if inside is not None and operation is _contrast:
                    part = inside[chosen.to(images.device, non_blocking=True)]
                    operation = partial(_contrast, inside=part)
                _update(images, chosen, lambda x, f=factor, op=operation: op(x, f))
    if colours:
        _update(images, drawn.gray.nonzero()[:, 0], lambda x: _luma(x).expand_as(x))
        _update(images, drawn.solarize.nonzero()[:, 0], lambda x: torch.where(x >= 128 / 255, 1 - x, x))
    if drawn.noise is not None:
        pixels = torch.randn(images.shape, generator=torch.Generator().manual_seed(drawn.noise_seed))
        images.add_((pixels * drawn.noise[:, None, None, None]).to(images.device)).clamp_(0, 1)
    mean, std = (
        torch.tensor(each).to(images.device, non_blocking=True)[:, None, None]
        for each in (config.mean, config.std)
    )
    images.sub_(mean).div_(std)
    if drawn.dropped is not None:
        images.masked_fill_(drawn.dropped.to(images.device)[:, :, None, None], 0)
    return images if inside is None else images.masked_fill_(~inside, 0)


def _update(images: Tensor, chosen: Tensor, operation) -> None:
    if len(chosen):
        chosen = chosen.to(images.device, non_blocking=True)
        images.index_copy_(0, chosen, operation(images.index_select(0, chosen)))


def _luma(x: Float[Tensor, "n C H W"]) -> Float[Tensor, "n 1 H W"]:
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return torch.mul(x[:, 0:1], LUMA[0]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:3], alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor, inside: Bool[Tensor, "n 1 H W"] | None = None) -> Tensor:
    luma = _luma(x)
    if inside is None:
        mean = luma.mean(dim=(1, 2, 3), keepdim=True)
    else:
        mean = luma.mul_(inside).sum(dim=(1, 2, 3), keepdim=True) / inside.sum(dim=(1, 2, 3), keepdim=True)
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by `shift` turns; value and the spread max - min (so saturation) stay."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = high - low
    # Below a thousandth of a grey level there is no hue; a denormal spread has an infinite inverse.
    inverse = 1 / torch.where(spread > 1e-6, spread, 1.0)
    hue = torch.where(
        high == red,
        (green - blue) * inverse,
        torch.where(high == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    hue = hue + 6 * shift
    # Each channel is the same trapezoid of the hue, shifted by 5 (red), 3 (green), 1 (blue) sixths of a turn.
    offsets = torch.arange(5.0, 0.0, -2.0, device=x.device)[:, None, None]
    k = torch.remainder(hue + offsets, 6)
    return high - spread * torch.minimum(k, 4 - k).clamp_(0, 1)
