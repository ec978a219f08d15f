"""A selection as text: names of images, a line each, and the data string that reads them."""

import csv
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from foveola.data.sample import BadImage

LIST_NAME = "selection.txt"
READING = ("range", "pages", "channels")  # options of data strings that say how files are read


@dataclass(frozen=True)
class SelectionList:
    """`text` is the file; `data` reads it with `foveola`, or is None for the reason `why`."""

    text: str
    data: str | None
    why: str


def listing(source: Any, images: Sequence[int]) -> SelectionList:
    """Return images of a source as a list, each once, in the order of the data.

    Files below one folder are listed as `listed:` reads them: with their classes, where each has one, as
    `name,class` with quotes, and else names alone. Other names are written as they are.
    """
    names, labels, why = [], [], ""
    for image in sorted(set(images)):
        try:
            sample = source[image]
        except BadImage:
            continue
        name = _name(source, image, sample.name)
        names.append(name)
        labels.append(-1 if sample.label is None else sample.label)
        why = why or _misfit(source, image, name)
    if why:
        return SelectionList("".join(f"{name}\n" for name in names), None, why)
    options = dict(parse_qsl(source.name.partition("?")[2]))
    options_text = "".join(f"&{name}={quote(options[name], safe='')}" for name in READING if name in options)
    data = f"listed:{quote(str(source.root))}?files={LIST_NAME}{options_text}"
    classes = source.classes
    words = [] if classes is None or min(labels, default=-1) < 0 else [classes[label] for label in labels]
    if all(word.isdecimal() for word in words):  # they would be read as numbers of classes
        words = []
    rows = zip(names, words, strict=True) if words else ((name,) for name in names)
    return SelectionList("".join(map(_line, rows)), data, "")


def _name(source: Any, image: int, shown: str) -> str:
    """The name of an image's file below the folder of its source; control characters are not shown of it."""
    path: Any = getattr(source, "path", None)
    root = getattr(source, "root", None)
    if not callable(path) or root is None:
        return shown
    with suppress(ValueError):  # a file elsewhere
        return Path(str(path(image))).relative_to(root).as_posix()
    return shown


def _misfit(source: Any, image: int, name: str) -> str:
    """Why an image is no file that a list can name; empty where it is."""
    if not hasattr(source, "root") or not callable(getattr(source, "path", None)):
        return f"{source.name.partition(':')[0]}: has no files below one folder, which listed: reads"
    if source.path(image) != source.root / name or any(mark in name for mark in "\n\r"):
        return f"the name of image {image} cannot stand in a list"
    if name != name.strip() or name.startswith("/"):
        return f"{name!r} begins or ends with a space, which listed: does not read"
    return ""


def _line(fields: Sequence[str]) -> str:
    if len(fields) == 1 and not any(mark in fields[0] for mark in ",\t"):
        return f"{fields[0]}\n"
    out = StringIO()
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(fields)
    return out.getvalue()
