"""Images of a source by their numbers: which of them are left, and how their files are read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from foveola.data.decoding import Decoding, ImageFile
from foveola.data.halves import halves_for_test
from foveola.data.sample import DataError

_USUAL = Decoding()


class SelectedImages:
    """A selection of images. `rows` are their numbers in the source, in order."""

    rows: Int64[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.rows)

    def keep(self, indices: Int64[np.ndarray, "n"]) -> None:
        """Leave only the images of these indices, in their order."""
        self.rows = self.rows[np.sort(indices)]

    def limit(self, count: int, seed: int) -> None:
        """Keep `count` images, drawn evenly from all, in their order."""
        self.keep(np.random.default_rng([seed, len(self.rows)]).permutation(len(self.rows))[:count])


class FilesReadAlike(SelectedImages):
    """Images in files, all of which are read as `reading` says.

    `labels` are those of all images that there were, -1 where unknown.
    """

    name: str
    classes: Any  # their names, or None
    labels: np.ndarray
    reading: Decoding

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.reading.count

    @property
    def depth(self) -> int:
        """Bits of a channel of the images, 8 or 16."""
        return self.reading.depth

    def as_read(self, image: Any) -> Any:
        """Return an image with how it is read, where that is not as usual."""
        return image if self.reading == _USUAL else ImageFile(image, self.reading)

    def read_as(self, reading: Decoding) -> None:
        """Read all files in this way, which makes them other data."""
        self.reading = reading

    def keep_half(self, contents: Sequence[bytes], fraction: float, seed: int, half: str) -> None:
        """Keep one half: "test", `fraction` of the images, drawn from each class by their contents, or
        "train", the others. Raises DataError where no image can be spared.
        """
        labels = self.labels[self.rows].astype(np.int64)
        held = halves_for_test(contents, labels, self.classes or (), fraction, seed)
        if not held.any():
            raise DataError(
                f"{self.name}: no class has two different images, so holdout={fraction:g} holds out none"
            )
        self.keep(np.flatnonzero(held if half == "test" else ~held))
