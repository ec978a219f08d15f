"""Data strings of shards: which files, which members or columns hold what, and how classes are called."""

import json
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np

from foveola.config import nearest
from foveola.data.sample import DataError
from foveola.data.segmentation import check_present, declared_classes, read_names
from foveola.data.shards.held import TarHeld
from foveola.data.shards.index import ShardIndex, index_of
from foveola.data.shards.parquet import ParquetHeld, class_names, find_columns, index_parquet
from foveola.data.shards.parts import NO_LABEL, ShardColumns
from foveola.data.shards.source import Annotating, HeldSamples, ShardImages, ShardPixels
from foveola.data.shards.stores import find_shards, read_beside
from foveola.data.shards.tar import MAP_EXTENSION, index_tar

BESIDE = "foveola.json"  # the file that `pack` leaves beside shards, with the names of classes
MOST_CLASSES = 10**6  # of numbers without names


def open_shards(spec: str, path: str, /, **options: Any) -> ShardImages:
    """Return the samples of tar files. `options` are those of the data string, docs/shards.md."""
    columns, rest = _columns(options)
    files = find_shards("shards", path, ".tar", rest.pop("cache", None))
    beside = _beside("shards", path)
    index = index_of(files, columns, index_tar)
    pixels = columns.pixels or (MAP_EXTENSION if beside.get("pixels") else None)
    held = TarHeld(index)
    known = tuple(beside["classes"]) if beside.get("classes") else None
    return _opened(spec, held, columns, pixels, known, rest)


def open_parquet(spec: str, path: str, /, **options: Any) -> ShardImages:
    """Return the rows of parquet files. `options` are those of the data string, docs/shards.md."""
    requested, rest = _columns(options)
    files = find_shards("parquet", path, ".parquet", rest.pop("cache", None))
    columns = find_columns(files[0], requested)
    index = index_of(files, columns, index_parquet)
    held = ParquetHeld(index, columns)
    return _opened(spec, held, columns, columns.pixels, class_names(files[0], columns), rest)


def _columns(options: dict[str, Any]) -> tuple[ShardColumns, dict[str, Any]]:
    own = {key: options.pop(key, None) for key in ("image", "label", "pixels", "masks", "objects", "name")}
    if own["pixels"] and own["masks"]:
        raise DataError("shards: takes pixels= or masks=, not both")
    return ShardColumns(**own), options


def _opened(
    name: str,
    held: HeldSamples,
    columns: ShardColumns,
    pixels: str | None,
    known: tuple[str, ...] | None,
    options: dict[str, Any],
) -> ShardImages:
    kind, index = name.partition(":")[0], held.index
    classes, ignore, values = (options.get(key) for key in ("classes", "ignore", "values"))
    if not len(index):
        example = f", such as {index.example}" if index.left_out else ""
        raise DataError(f"{kind}: no sample has an image ({index.left_out} have none{example})")
    if pixels is None or pixels == "-":
        for key in ("values", "absent"):
            if options.get(key):
                raise DataError(f"{kind}: {key}= needs pixels=, which names the label maps")
        if ignore is not None and not columns.masks:
            raise DataError(f"{kind}: ignore= needs masks= or pixels=, which name the maps")
    table = None
    if pixels not in (None, "-"):
        if classes is None and known is None:
            raise DataError(f"{kind}: pixels= needs classes=, a number or a file of names")
        names, table = declared_classes(kind, classes or str(len(known or ())), ignore, values)
        names = tuple(names) if classes else known
    else:
        names = _named(kind, classes) or known
    names, labels, numbers = _classes(index, names, columns, name)
    annotated = bool((index.array("annotated") & 1).any())
    if columns.objects not in (None, "-") and not annotated and kind == "shards":
        raise DataError(f"{kind}: objects={columns.objects} takes no value but -, which leaves them out")
    if columns.masks and not index.array("map_sizes").any():
        raise DataError(f"{kind}: no sample has {columns.masks}, which masks= names")
    annotating = Annotating(numbers, annotated and not columns.masks, bool(columns.masks), ignore)
    if table is None:
        source = ShardImages(name, held, labels, names, annotating)
    else:
        if not index.array("map_sizes").any():
            raise DataError(f"{kind}: no sample has {pixels}, the label map")
        source = ShardPixels(name, held, labels, names or (), annotating, table)
        if not options.get("absent") and classes is not None:
            check_present(name, source.label_map, len(source), source.classes)
    source.notes = held.notes()
    if index.left_out:
        source.notes += (
            f"{name}: {index.left_out} samples without an image are left out, such as {index.example}",
        )
    return source


def _named(kind: str, classes: str | None) -> tuple[str, ...] | None:
    if classes is None:
        return None
    if classes.isdecimal():
        if not 0 < int(classes) <= MOST_CLASSES:
            raise DataError(f"{kind}: classes={classes}: from 1 to {MOST_CLASSES} are possible")
        return tuple(map(str, range(int(classes))))
    return tuple(read_names(Path(classes).expanduser()))


def _classes(
    index: ShardIndex, names: tuple[str, ...] | None, columns: ShardColumns, where: str
) -> tuple[tuple[str, ...] | None, np.ndarray, dict[str, int]]:
    """The names of classes, the label of each image, and the number of each word."""
    words, highest, found = index.words, index.highest, index.array("labels")
    if names is None and words and highest > NO_LABEL:
        raise DataError(
            f"{where}: classes are numbers (up to {highest}) and text (such as {words[0]!r}): classes= "
            "names them"
        )
    if names is None and highest >= MOST_CLASSES:
        raise DataError(
            f"{where}: {highest} as the number of a class; classes= names them, label=- leaves them out"
        )
    if names is None:
        names = tuple(words) or tuple(map(str, range(highest + 1))) or None
    known: tuple[str, ...] = names or ()
    if highest >= len(known):
        raise DataError(
            f"{where}: has a class {highest}, but {len(known)} classes have names: 0 to {len(known) - 1}"
        )
    numbers = {word: number for number, word in enumerate(known)}
    for word in words:
        if word not in numbers:
            near = nearest(word, known)
            hint = f"; did you mean {near!r}?" if near else ""
            raise DataError(f"{where}: has a class {word!r}, which is none of {len(known)} names{hint}")
    if not words:
        return names, found, numbers
    table = np.array([numbers[word] for word in words], np.int32)
    text = found <= -2
    labels = np.array(found)
    labels[text] = table[-2 - labels[text]]
    return names, labels, numbers


def _beside(kind: str, path: str) -> dict[str, Any]:
    """What `pack` wrote beside shards; empty where somebody else made them."""
    folder = path
    while not Path(folder).expanduser().is_dir() and (
        has_magic(folder) or "{" in folder or folder.endswith(".tar")
    ):
        folder = folder.rpartition("/")[0]
    text = read_beside(kind, f"{folder.rstrip('/') or '.'}/{BESIDE}")
    if text is None:
        return {}
    try:
        tree = json.loads(text)
        classes = tree.get("classes")
        if classes is not None and not all(isinstance(each, str) for each in classes):
            raise ValueError("classes is no list of names")
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{kind}: {folder}/{BESIDE}: {error}; it holds the names of classes") from None
    return tree
