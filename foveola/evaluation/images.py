"""Which images an evaluation reads, and how: the keys that all protocols have in common."""

from dataclasses import dataclass
from typing import Literal

from foveola.config import again, key


@dataclass(frozen=True)
class ReadingConfig:
    """How images are read and encoded."""

    batch_size: int = key(64, "images encoded at once", at_least=1)
    workers: int = key(2, "processes that read images; 0 = none besides this one", at_least=0)
    seed: int = key(0, "seed of every random choice", at_least=0, at_most=2**64 - 1)
    precision: Literal["fp32", "bf16"] = key(
        "fp32", "arithmetic of the encoder; features are float32 in any case"
    )


@dataclass(frozen=True)
class ChosenConfig(ReadingConfig):
    """The same, of a part of the images."""

    limit: int | None = key(
        None, "use at most this many images of each set, drawn by seed; null = all", at_least=1
    )


@dataclass(frozen=True)
class MaskedConfig(ChosenConfig):
    """The same, of images with the patch masks of their objects."""

    mask_canvas: int | None = key(
        None,
        "pixels a side on which masks are drawn; null = the encoder's resize, below 256 up to twice that",
        at_least=1,
    )
    min_coverage: float | None = key(
        None,
        "share of a patch that an object must cover for its token to read it; null = half a pixel",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True)
class SquashedConfig(ChosenConfig):
    """The same, of images squashed to squares, of which patches are kept."""

    image_size: int | None = key(
        None, "pixels a side to which images are squashed; null = the encoder's crop", at_least=8
    )
    limit: int | None = again(ChosenConfig, "limit", None, at_least=2)
    store: Literal["float32", "float16"] = key("float32", "number format of stored patch features")
