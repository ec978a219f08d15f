"""The contract of this room: `Proposals`, what was found in one image, and `Proposer`, who finds it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8


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

    def propose(self, images: Sequence[UInt8[np.ndarray, "H W 3"]], /) -> list[Proposals]:
        """Return what is in each of these upright RGB images, whose sizes may differ."""
        ...
