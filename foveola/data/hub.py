"""Data sets of Hugging Face: by name on the hub, or a folder that its library saved or can load."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from foveola.config import nearest
from foveola.data.annotations import read_values
from foveola.data.decoding import Decoding
from foveola.data.fit import upright_map
from foveola.data.identity import HASH, Identity, hash_of
from foveola.data.readers import contents, read_header
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.segmentation import MAX_CLASSES, check_present, declared_classes, to_classes
from foveola.data.selected import FilesReadAlike


class HubImages(FilesReadAlike):
    """Rows of a split: a column of images, perhaps one of classes. Rows are read when asked for."""

    def __init__(self, name: str, dataset: Any, image: str, label: str | None) -> None:
        from datasets import Image

        self.name, self.image, self.label = name, image, label
        self.dataset = dataset.cast_column(image, Image(decode=False))
        self.rows = np.arange(len(dataset))
        self.has_objects = False
        self.notes: tuple[str, ...] = ()
        self.reading, self.raw, self.reader = Decoding(), False, None
        self.classes: tuple[str, ...] | None = None
        self.labels = np.full(len(dataset), -1)
        if label is not None:
            self.classes, self.labels = _labels(dataset, label)

    def __getitem__(self, index: int) -> Sample:
        row = int(self.rows[index])
        label = int(self.labels[row])
        image = self.as_read(self._file(row, self.image))
        return Sample(image, f"row {row}", None, None if label < 0 else label)

    def image_names(self) -> list[str]:
        """Return what the images are called, in order."""
        return [f"row {row}" for row in self.rows.tolist()]

    def data(self, index: int) -> bytes | Path:
        """Return the bytes of the file of an image. Raises OSError and BadImage."""
        file = self._file(int(self.rows[index]), self.image)
        return contents(file)

    def drawn(self, raw: bool) -> None:
        """Say whether label maps were drawn on pixels as stored, before EXIF, where sizes do not tell."""
        self.raw = raw

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height of the label map of an image, if there are any."""
        return None

    def _file(self, row: int, column: str) -> Path | bytes:
        cell = self.dataset[row][column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise BadImage(f"row {row}: no image in column {column}")
        return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return contents of the cells, and labels. What the library knows of a version says nothing of
        pixels.
        """
        rows = self.rows if chosen is None else self.rows[chosen]
        about = self.classes, self.labels[rows], self.reading, self.raw
        return Identity.of(self.cells(rows, self.image), *about)

    def cells(self, rows: Int64[np.ndarray, "n"], column: str) -> np.ndarray:
        """Return hashes (S16 [n]) of the files in the cells of a column."""
        found = np.zeros(len(rows), HASH)
        for i, row in enumerate(rows.tolist()):
            with suppress(BadImage):
                found[i] = hash_of(self._file(row, column))
        return found


class HubPixels(HubImages):
    """Rows with a column of label maps."""

    def __init__(
        self, name: str, dataset: Any, image: str, pixels: str, classes: tuple[str, ...], values: np.ndarray
    ) -> None:
        from datasets import Image

        super().__init__(name, dataset.cast_column(pixels, Image(decode=False)), image, None)
        if not 0 < len(classes) <= MAX_CLASSES:
            raise DataError(f"{name}: {len(classes)} classes; from 1 to {MAX_CLASSES} are possible")
        self.pixels, self.classes = pixels, classes
        self.values = values

    def label_map(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """Return classes of the pixels of an image. Raises BadImage and DataError."""
        row = int(self.rows[index])
        where = f"{self.name}, row {row}"
        labels = to_classes(read_values(self._file(row, self.pixels), where), self.values, where)
        return upright_map(labels, self._file(row, self.image), self.raw, where)

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height of the label map of an image; None where it cannot be read."""
        try:
            file = self._file(int(self.rows[index]), self.pixels)
            return read_header(file).upright
        except (OSError, BadImage):
            return None

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return contents of images and label maps, and what their values mean."""
        plain = super().identity(chosen)
        maps = self.cells(self.rows if chosen is None else self.rows[chosen], self.pixels)
        return Identity.of(plain.contents, plain.digest, maps, self.values)


def open_hub(
    name: str,
    path: str,
    split: str = "train",
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    pixels: str | None = None,
    classes: str | None = None,
    ignore: int | None = None,
    values: tuple[int, ...] | None = None,
    absent: bool = False,
    streaming: bool = False,
) -> HubImages:
    """Return a split of a data set. Columns are found by their kind where only one fits; `label=` none:
    `label=-`.

    `pixels` is a column of label maps with `classes`, `ignore`, `values` and `absent` as of `masks:`.
    """
    if streaming:
        here = Path(path).expanduser().exists()
        where = path if here else f"hf://datasets/{path}/**/*.parquet"
        raise DataError(
            "hf: streaming=true gives rows in the order in which they arrive, so no run could be resumed "
            f"or repeated; parquet:{where} reads parquet files row group by row group, at random"
        )
    dataset = _load(path, split, config)
    kinds = {column: type(feature).__name__ for column, feature in dataset.features.items()}
    image = _column(path, kinds, image, "Image", "image", without=pixels)
    if pixels is not None:
        pixels = _column(path, kinds, pixels, "Image", "pixels")
        if classes is None:
            raise DataError("hf: pixels= needs classes=, a number or a file of names")
        names, table = declared_classes("hf", classes, ignore, values)
        source = HubPixels(name, dataset, image, pixels, tuple(names), table)
        if not absent:
            check_present(name, source.label_map, len(source), source.classes or ())
        return source
    if label == "-" or (label is None and "ClassLabel" not in kinds.values()):
        return HubImages(name, dataset, image, None)
    if label is None:
        label = _column(path, kinds, None, "ClassLabel", "label")
    elif label not in kinds:
        raise DataError(_no_column(path, label, kinds))
    return HubImages(name, dataset, image, label)


def _load(path: str, split: str, config: str | None) -> Any:
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError as error:
        raise DataError("hf: needs the extra `datasets`: pip install 'foveola[datasets]'") from error
    folder = Path(path).expanduser()
    saved = folder.is_dir() and any((folder / n).is_file() for n in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            return load_dataset(str(folder) if folder.is_dir() else path, config, split=split)
        found = load_from_disk(str(folder))
    except Exception as error:  # whatever the library and its file systems raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"hf: cannot load {path}, split {split}: {reason}") from error
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise DataError(f"hf: {path} has no split {split!r}; it has {', '.join(map(str, found))}")
    return found[split]


def _column(
    path: str, kinds: dict[str, str], wanted: str | None, kind: str, option: str, without: str | None = None
) -> str:
    """The column asked for, of the right kind; or the only one of that kind."""
    if wanted is not None:
        if wanted not in kinds:
            raise DataError(_no_column(path, wanted, kinds))
        if kinds[wanted] != kind:
            raise DataError(f"hf: column {wanted!r} of {path} is of kind {kinds[wanted]}, not {kind}")
        return wanted
    fitting = [column for column, found in kinds.items() if found == kind and column != without]
    if len(fitting) != 1:
        raise DataError(f"hf: {path} has {len(fitting)} columns of kind {kind}; name one with {option}=")
    return fitting[0]


def _no_column(path: str, wanted: str, kinds: dict[str, str]) -> str:
    near = nearest(wanted, kinds)
    return f"hf: {path} has no column {wanted!r}; " + (
        f"did you mean {near!r}?" if near else ", ".join(kinds)
    )


def _labels(dataset: Any, column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and int64 labels of a column: class labels, whole numbers, or text (-1: none)."""
    feature, cells = dataset.features[column], dataset[column][:]
    if hasattr(feature, "names"):
        return tuple(feature.names), np.array([-1 if cell is None else cell for cell in cells], np.int64)
    if any(not isinstance(cell, int | str | None) for cell in cells):
        raise DataError(f"hf: column {column!r} holds neither class labels, nor whole numbers, nor text")
    if all(isinstance(cell, int | None) for cell in cells):
        labels = np.array([-1 if cell is None else cell for cell in cells], np.int64)
        return tuple(str(number) for number in range(int(labels.max(initial=-1)) + 1)), labels
    words = sorted({str(cell) for cell in cells if cell is not None})
    index = {word: number for number, word in enumerate(words)}
    return tuple(words), np.array([-1 if cell is None else index[str(cell)] for cell in cells], np.int64)
