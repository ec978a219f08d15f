"""What is known of the images of one file of a set, as arrays; and of several files, one after the other."""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from foveola import files
from foveola.data.sample import DataError
from foveola.data.shards.schema import Label

LARGEST_FILE = 2**32 - 1  # bytes of an image, kept in 32 bits
NO_LABEL = -1  # no class; text is -2, -3, ...: a word of the list


@dataclass(frozen=True)
class ShardColumns:
    """Which members (by extension) or columns hold what; None: as is usual, "-": nothing."""

    image: str | None = None
    label: str | None = None
    pixels: str | None = None
    masks: str | None = None
    objects: str | None = None
    name: str | None = None


@dataclass
class ShardPart:
    """The n images of a file. A place is an offset in bytes, or a row group; a size counts bytes, or is the
    row in the group. `about` is JSON, `maps` a label map; of size 0 where there is none.
    """

    arrays: dict[str, np.ndarray]
    words: list[str] = field(default_factory=list)  # classes that are text
    highest: int = NO_LABEL  # number of a class, those of objects included
    left_out: int = 0  # samples without an image
    example: str = ""

    def __len__(self) -> int:
        return len(self.arrays["places"])

    def save(self, path: Path) -> None:
        """Write the facts of the file as one file, whole or not at all."""
        rest = {"words": self.words, "highest": self.highest, "left_out": self.left_out}
        text = np.frombuffer(json.dumps(rest | {"example": self.example}).encode(), np.uint8)
        with files.whole(path) as part, part.open("wb") as file:
            np.savez(file, rest=text, **self.arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> "ShardPart | None":
        """Return what `save` wrote; None for a file that is missing or damaged."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            rest = json.loads(arrays.pop("rest").tobytes())
            return cls(arrays, **rest) if arrays.keys() == ARRAYS.keys() else None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None


# Of each file: dtype, and whether it has one value an image (the others are as long as what they hold).
ARRAYS: dict[str, tuple[Any, bool]] = {
    "places": (np.int64, True),
    "sizes": (np.uint32, True),
    "about_places": (np.int64, True),
    "about_sizes": (np.uint32, True),
    "map_places": (np.int64, True),
    "map_sizes": (np.uint32, True),
    "labels": (np.int32, True),
    "annotated": (np.uint8, True),  # 1: has objects or crowds, 2: lists its classes
    "several_ends": (np.int64, True),
    "several": (np.int32, False),
    "name_ends": (np.int64, True),
    "names": (np.uint8, False),
    "name_hashes": (np.uint64, True),
}


class PartBuilder:
    """Takes the images of a file one by one."""

    def __init__(self) -> None:
        self.lists: dict[str, list[Any]] = {name: [] for name in ARRAYS}
        self.words: dict[str, int] = {}
        self.highest, self.left_out, self.example = NO_LABEL, 0, ""
        self.names = bytearray()

    def add(
        self,
        name: str,
        image: tuple[int, int],
        about: tuple[int, int] = (0, 0),
        label_map: tuple[int, int] = (0, 0),
        *,
        label: Label | None = None,
        labels: Sequence[Label] | None = None,
        annotated: bool = False,
    ) -> None:
        """Add an image: where it, its JSON and its label map lie, each as offset and size."""
        lists = self.lists
        for kind, (offset, size) in (("", image), ("about_", about), ("map_", label_map)):
            if size > LARGEST_FILE:
                raise DataError(f"{name}: {size} bytes are more than memory should be given for")
            lists[f"{kind}places"].append(offset)
            lists[f"{kind}sizes"].append(size)
        lists["labels"].append(self.number(label))
        lists["annotated"].append(int(annotated) + 2 * (labels is not None))
        lists["several"] += [self.number(each) for each in labels or ()]
        lists["several_ends"].append(len(lists["several"]))
        text = name.encode("utf-8", "backslashreplace")
        self.names += text
        lists["name_ends"].append(len(self.names))
        lists["name_hashes"].append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))

    def number(self, label: Label | None) -> int:
        """Return the number of a class in the arrays."""
        if label is None:
            return NO_LABEL
        if isinstance(label, int):
            self.highest = max(self.highest, label)
            return label
        return -2 - self.words.setdefault(label, len(self.words))

    def without(self, name: str) -> None:
        """Count a sample without an image."""
        self.left_out += 1
        self.example = self.example or name

    def part(self) -> ShardPart:
        """Return what was added."""
        arrays = {name: np.array(self.lists[name], dtype) for name, (dtype, _) in ARRAYS.items()}
        arrays["names"] = np.frombuffer(bytes(self.names), np.uint8)
        return ShardPart(arrays, [*self.words], self.highest, self.left_out, self.example)
