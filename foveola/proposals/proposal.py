"""The contract of this room: `Proposals`, what was found in one image, and `Proposer`, who finds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from foveola.config import UserError, kind_of
from foveola.data.decode import decode
from foveola.data.decoding import RGB, channels_of
from foveola.data.shown import shown_channels, shown_image
from foveola.data.values import ImagePixels

NUMPY_KINDS = {"f": "floating point", "iu": "whole numbers", "b": "bool"}  # NumPy's letters for dtypes


@dataclass(frozen=True, eq=False)
class Proposals:
    """The K >= 0 objects that were found in one image, best first.

    `boxes` are (x0, y0, x1, y1) in pixels of the upright image. Higher `scores` are surer; they compare
    within one proposer. `labels` index `Proposer.classes`. `masks` have the size of the image; None: boxes
    alone.
    """

    boxes: Float32[np.ndarray, "K 4"]
    scores: Float32[np.ndarray, "K"]
    labels: Int64[np.ndarray, "K"]
    masks: Bool[np.ndarray, "K H W"] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def chosen(self, indices: Int64[np.ndarray, "n"]) -> "Proposals":
        """Return the proposals of these indices, in their order."""
        masks = None if self.masks is None else self.masks[indices]
        return Proposals(self.boxes[indices], self.scores[indices], self.labels[indices], masks)


@runtime_checkable
class Proposer(Protocol):
    """Who finds objects in images.

    One that is prompted by the objects that the data have says so with `prompts = True`, and its `propose`
    takes them as well: `propose(images, objects)`, for each image `Objects` or None. If it has `of_classes`,
    the proposer that is asked is what `of_classes(classes)` of the data's classes returns.

    Images are uint8 RGB: others are shown as people see them. One that has `sees` gets pixels as they are
    in `sees(source)`, the data in the range and channels that it wants; it may be None.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what it finds; ("object",) where it knows none."""
        ...

    @property
    def batch_size(self) -> int:
        """How many images it wants at a time."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain values that tell its work from other work: kind, settings, identity of the weights."""
        ...

    def propose(self, images: Sequence[Shaped[np.ndarray, "_ _ ch"]], /) -> list[Proposals]:
        """Return what is in each of these upright images, whose sizes may differ."""
        ...


def as_seen(source: Any, proposer: Proposer) -> Any:
    """Return data as a proposer sees them. Raises UserError for channels of which nobody says which three are
    to be shown to one that sees RGB.
    """
    if (sees := getattr(proposer, "sees", None)) is not None:
        return sees(source)
    if (count := channels_of(source)) not in (1, RGB) and shown_channels(source) is None:
        raise UserError(
            f"{source.name}: images of {count} channels, and {kind_of(proposer)} sees RGB: "
            "show= in the data string says which three it is shown, such as show=3,2,1, or show=pca"
        )
    return source


def seen_pixels(image: Any, proposer: Proposer) -> ImagePixels:
    """Return the pixels of an image of such data. Raises BadImage and OSError."""
    return shown_image(image) if getattr(proposer, "sees", None) is None else decode(image)


def check_arrays(found: Any, classes: int) -> None:
    """Raise UserError for other things than `Proposals` with labels of so many classes.

    A mask of 0 and 255, for one, would count as 255 pixels each.
    """
    if not isinstance(found, Proposals):
        raise UserError(f"the model found {kind_of(found)}, expected foveola.Proposals")
    count = len(found.boxes)
    size = () if found.masks is None else np.shape(found.masks)[1:3]
    for name, kinds, shape in (
        ("boxes", "f", (count, 4)),
        ("scores", "f", (count,)),
        ("labels", "iu", (count,)),
        ("masks", "b", (count, *size)),
    ):
        array = getattr(found, name)
        if name == "masks" and array is None:
            continue
        if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
            what = str(array.dtype) if isinstance(array, np.ndarray) else kind_of(array)
            raise UserError(
                f"the model found {name} of {what}, expected a NumPy array of {NUMPY_KINDS[kinds]}"
            )
        if array.shape != shape:
            raise UserError(f"the model found {name} of shape {array.shape} for {count} boxes")
    if wrong := set(found.labels.tolist()) - set(range(classes)):
        raise UserError(f"the model found the label {min(wrong)}, and has {classes} classes")
