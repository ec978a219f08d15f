"""What a protocol needs of each image: which features, of which size and block, and in which numbers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from foveola.config import UserError, key
from foveola.evaluation.images import MaskedConfig
from foveola.models.encoder import Encoder, gives_attention

ATTENTION = ("attention", "lowest_entropy", "centre")
FEATURE_NAMES = ("token", "masked", "average", "patches", "predictor", *ATTENTION)
EXTERNAL = "external:"  # external:MODEL, patches averaged by the attention of another encoder


@dataclass(frozen=True)
class FeedConfig(MaskedConfig):
    """How images become stored features."""

    store: Literal["float32", "float16"] = key("float32", "number format of stored features")


@dataclass(frozen=True)
class Need:
    """What a protocol reads of an image.

    `features` are names: `token` and `masked` (class token, and object token that reads its object, of the
    last `layers` blocks), `average` (of the patches), `patches` (all), `predictor` (mean of CAPI's
    predictions), and the patches averaged by attention of the last block: `attention` (of the class token,
    mean over the heads), `lowest_entropy` (of its head of lowest entropy, for each image), `centre` (of the
    central patch, mean over the heads), `external:MODEL` (of the class token of another encoder).

    `crops` is how random crops of training images are resized; None = as the encoder resizes images.

    `size` is how many pixels a side the crop of an image has; None = as the encoder has it. `block` is the
    index of the block whose output is read in place of the last one's (and the `layers` before it), through
    the final norm as well; None = the last.

    With `side`, images are not resized and cropped as the encoder has it, but squashed whole to so many
    pixels a side; then there are `maps` too, their label maps squashed alike.
    """

    features: frozenset[str]
    layers: int = 1
    side: int | None = None
    crops: Literal["bicubic", "bilinear"] | None = None
    size: int | None = None
    block: int | None = None

    def __or__(self, other: "Need") -> "Need":
        if (self.side, self.size, self.block) != (other.side, other.size, other.block):
            raise ValueError("one pass over images of two sizes, or to two blocks")
        layers, crops = max(self.layers, other.layers), self.crops or other.crops
        return replace(self, features=self.features | other.features, layers=layers, crops=crops)

    def at(self, encoder: Encoder, size: int | None = None, block: int = -1) -> "Need":
        """Return the same of images of another size, or of another block. Raises UserError for what there is
        not.
        """
        size = None if size == encoder.config.transform.crop else size
        if size is not None:
            encoder.check_side(size, "image_size")
        index: int | None = encoder.block_index(block)
        if index == encoder.config.model.shape[1] - 1:
            index = None
        elif "predictor" in self.features:
            raise UserError(f"block={block}: predictor reads the last block")
        elif index is not None and index + 1 < self.layers:
            raise UserError(
                f"block={block}: features of the {self.layers} blocks up to it: there are {index + 1}"
            )
        return replace(self, size=size, block=index)


def need(*features: str, layers: int = 1) -> Need:
    """Return the `Need` of these features. Raises UserError for a name that no feature has."""
    for feature in features:
        if feature not in FEATURE_NAMES and not (
            feature.startswith(EXTERNAL) and len(feature) > len(EXTERNAL)
        ):
            raise UserError(
                f"unknown features {feature!r}; known: {', '.join(FEATURE_NAMES)}, {EXTERNAL}MODEL"
            )
    return Need(frozenset(features), layers)


def check_features(encoder: Encoder, features: Iterable[str], layers: int) -> None:
    """Raise UserError where the encoder cannot give one of these features."""
    depth = encoder.config.model.shape[1]
    if layers > 1:
        encoder.check_inside(f"features of the last {layers} blocks")
    if not 1 <= layers <= depth:
        raise UserError(f"features of the last {layers} blocks: this encoder has {depth}")
    for feature in features:
        if feature in ("masked", *ATTENTION):
            if feature == "masked":
                encoder.check_inside("a token that reads an object alone")
            if not gives_attention(encoder.backbone):
                encoder.check_inside(f"features={feature}")
        if (
            feature in ("token", "masked", "attention", "lowest_entropy")
            and not encoder.config.model.class_token
        ):
            raise UserError(f"features={feature}: this encoder has no class token; use average or centre")
        if feature == "predictor" and encoder.predictor is None:
            raise UserError(f"features=predictor: this encoder has {', '.join(encoder.config.pools)}")


def shape_of(encoder: Encoder, feature: str, wanted: Need) -> tuple[int, ...]:
    """Return the shape of a feature of one image."""
    width, side = encoder.config.model.shape[0], wanted.side or wanted.size or encoder.config.transform.crop
    patches = (side // encoder.patch_size) ** 2
    if feature in ("token", "masked"):
        return wanted.layers, width
    if feature == "maps":
        return side, side
    if feature == "predictor" and encoder.predictor is not None:
        return (encoder.predictor.width,)
    return (patches, width) if feature == "patches" else (width,)
