"""Which image files lie below a folder, and whether those that a list names are there and inside it."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from foveola.config import nearest
from foveola.data.dicom import is_dicom
from foveola.data.readers import HEAD_BYTES, SUFFIXES, VIDEO_SUFFIXES
from foveola.data.sample import DataError

# How the data sets of each kind lie in their folder, and what reads images that do not.
OWN, OWN_MAPS = "folder: reads images in any folders", "masks: reads images and label maps in any two folders"
LAYOUTS = {
    "tinyimagenet": ("wnids.txt, train/<wnid>/images, val/images and their lists of boxes", OWN),
    "imagenet": ("train/<wnid>/*.JPEG and val/<wnid>/*.JPEG", OWN),
    "imagenetv2": ("folders 0 to 999", OWN),
    "imagenet-a": ("folders named by ImageNet's wnids", OWN),
    "objectnet": ("the folders images and mappings of objectnet-1.0", OWN),
    "voc": ("JPEGImages, SegmentationClass and ImageSets/Segmentation, the folder VOC2012", OWN_MAPS),
    "voc-objects": (
        "JPEGImages, Annotations and ImageSets/Main, the folder VOC2007 or VOC2012",
        "coco: and folder:?boxes= read boxes in other files",
    ),
    "ade20k": ("images/training, annotations/training, ..., the folder ADEChallengeData2016", OWN_MAPS),
    "cityscapes": ("leftImg8bit/<split>/<city> and gtFine/<split>/<city>", OWN_MAPS),
    "camvid": ("<split>/images and <split>/labels, or <split> and <split>annot", OWN_MAPS),
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SUFFIXES_NAMED = 6  # suffixes of other files that a note names


class Listing(NamedTuple):
    """Image files below a folder, sorted; and what was left out, in words."""

    files: list[str]
    notes: tuple[str, ...]


def find_images(root: Path, without: Path | None = None, videos: bool = False) -> Listing:
    """Return all image files below a folder, by extension; hidden ones and the folder `without` are left out.

    Videos are left out unless frames of them are images (`videos`). A file without an extension, or with
    digits for one, is an image where it is a DICOM file, which often has none.

    Links are followed. Each folder is read once, by its own path rather than by that of a link, so that a
    link upwards ends and one beside its folder doubles nothing. Raises DataError for a folder that cannot be
    listed (its images would be missing without a word) and where there is no image.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    read: set[str] = set()
    folders, links, repeated = [(str(root), "")], [], 0
    suffixes = SUFFIXES if videos else SUFFIXES - VIDEO_SUFFIXES
    left_out = None if without is None else os.path.realpath(without)
    while folders or links:
        folder, prefix = (folders or links).pop()
        real = os.path.realpath(folder)
        if prefix and real == left_out:
            continue
        if real in read:
            repeated += 1
            continue
        read.add(real)
        for entry in _entries(folder):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append((entry.path, f"{prefix}{entry.name}/"))
                continue
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 (speed)
            if suffix in suffixes or (_may_be_dicom(suffix) and _is_dicom(entry)):
                found.append(prefix + entry.name)
            else:
                others[suffix] += 1
    if not found:
        if not others:
            raise DataError(f"folder {root} {'holds no images' if any(root.iterdir()) else 'is empty'}")
        known = " ".join(sorted(suffixes))
        raise DataError(f"folder {root} holds no images ({known}), but {_named(others)}")
    return Listing(sorted(found), _left_out(root, others, repeated))


def _may_be_dicom(suffix: str) -> bool:
    return not suffix[1:] or suffix[1:].isdecimal()


def _is_dicom(entry: os.DirEntry) -> bool:
    if not entry.is_file() or entry.name == "DICOMDIR":  # which lists others
        return False
    try:
        with open(entry.path, "rb") as file:  # noqa: PTH123 (speed)
            return is_dicom(file.read(HEAD_BYTES))
    except OSError:
        return False


def misfit(kind: str, what: str) -> DataError:
    """Return the error for a folder that is not as data of this kind lie: `what` is wrong, and what was
    expected.
    """
    layout, otherwise = LAYOUTS[kind]
    return DataError(f"{kind}: {what}; expected {layout} ({otherwise})")


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            # Backwards, as the last is taken first: so links are followed in the same order on every disk.
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be listed: {error.strerror or error}") from error


def _left_out(root: Path, others: Counter[str], repeated: int) -> tuple[str, ...]:
    notes = []
    if others:
        notes.append(f"{root}: files of other kinds are left out: {_named(others)}")
    if repeated:
        notes.append(f"{root}: {repeated} links to folders that are read anyway are left out")
    return tuple(notes)


def _named(others: Counter[str]) -> str:
    commonest = sorted(others.items(), key=lambda item: (-item[1], item[0] or "~"))[:SUFFIXES_NAMED]
    named = [f"{count} {suffix or 'without a suffix'}" for suffix, count in commonest]
    return ", ".join(named) + (
        f" and {len(others) - SUFFIXES_NAMED} more kinds" if len(others) > SUFFIXES_NAMED else ""
    )


def check_listed(root: Path, files: Sequence[str], what: str = "annotated images") -> None:
    """Check that every listed file is there. One look into each folder: a million separate questions take
    minutes.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, _, name = file.rpartition("/")
        if folder not in present:
            present[folder] = (
                {p.name for p in (root / folder).iterdir()} if (root / folder).is_dir() else set()
            )
        if name not in present[folder]:
            missing.append(file)
    if missing:
        raise DataError(f"{root}: {len(missing)} of {len(files)} {what} are missing, such as {missing[0]}")


def check_inside(where: Path | str, files: Sequence[str]) -> None:
    """Check that no name that a file gives leaves the folder of images: lists of others may name anything."""
    for file in files:
        path = posixpath.normpath(file.replace("\\", "/"))
        if path.startswith(("/", "../")) or path in (".", "..") or "\0" in path:
            raise DataError(f"{where}: names {printable(file)!r}, which is not below the folder of images")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, with empty ones. Raises DataError for one that is not in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8 (byte {error.start})") from None


def printable(text: str) -> str:
    """Return the text that any file and terminal takes, on one line: bytes of a name that are not UTF-8, and
    control characters, become backslashes.
    """
    text = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def find_names(named: Iterable[str], files: Sequence[str]) -> dict[str, int]:
    """Return which of the image `files` each name in an annotation file means: by path, or unique file name.

    -1 for a name that no image has.
    """
    by_path = {file: row for row, file in enumerate(files)}
    by_name: dict[str, int] = {}
    for row, file in enumerate(files):
        name = file.rsplit("/", 1)[-1]
        by_name[name] = -1 if name in by_name else row
    slashed = {name: name if name in by_path else name.replace("\\", "/") for name in named}
    return {name: by_path.get(path, by_name.get(name, -1)) for name, path in slashed.items()}


def match_names(named: Iterable[str], files: Sequence[str], where: Path) -> dict[str, int]:
    """Return what `find_names` does. Raises DataError for names that no image has."""
    rows = find_names(named, files)
    missing = [name for name, row in rows.items() if row < 0]
    if missing:
        near = nearest(missing[0], [*files, *(file.rsplit("/", 1)[-1] for file in files)][:100000])
        raise DataError(
            f"{where}: {len(missing)} of {len(rows)} images that it names are missing, such as {missing[0]}"
            + (f"; did you mean {near}?" if near else "")
        )
    return rows
