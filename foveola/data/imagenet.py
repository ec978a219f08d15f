"""Test sets for classifiers of ImageNet-1k (v2, A, ReaL, ObjectNet), and images that a list names.

The `classes` of the test sets are ImageNet's 1000 wnids, so that labels match those of `imagenet:` by name.
What a plain label cannot say is in two more attributes: `answers(index)`, all labels that count as right, and
`candidates`, the classes among which a prediction is chosen (CAPI and DINOv2 restrict it, which changes the
numbers strongly).
"""

import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from foveola.data.annotations import read_json
from foveola.data.decode import decode
from foveola.data.identity import Identity
from foveola.data.layouts import ImageFiles, open_imagenet
from foveola.data.listing import check_inside, check_listed, find_images, misfit, printable, read_lines
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.segmentation import read_names

WNIDS = Path(__file__).with_name("imagenet_wnids.txt")


class Variant(ImageFiles):
    """Images with one or more right labels among ImageNet's classes."""

    candidates: tuple[int, ...] | None = None  # classes that may be predicted; None: all
    border = 0  # pixels of frame around an image, cut off

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        answers: Sequence[Sequence[int]],
        classes: Sequence[str],
    ) -> None:
        super().__init__(name, root, files, [of_image[0] for of_image in answers], classes)
        self.ends = np.cumsum([len(of_image) for of_image in answers], dtype=np.int64)
        self.flat = np.array([label for of_image in answers for label in of_image], np.int64)

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return the identity of images and labels, and of what counts as right, what may be predicted and
        what is cut off.
        """
        plain = super().identity(chosen)
        rows = self.rows if chosen is None else self.rows[chosen]
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        right = [self.flat[a:b].tolist() for a, b in zip(starts, self.ends[rows], strict=True)]
        return Identity.of(plain.contents, plain.digest, right, self.candidates, self.border)

    def answers(self, index: int) -> Int64[np.ndarray, "a"]:
        """Return all labels that count as right for an image; the first is the sample's label."""
        row = int(self.rows[index])
        return self.flat[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        if not self.border:
            return sample
        pixels = decode(sample.image)
        if min(pixels.shape[:2]) <= 2 * self.border + 8:
            raise BadImage(
                f"{pixels.shape[1]}x{pixels.shape[0]} pixels is too small for a frame of {self.border}"
            )
        inner = pixels[self.border : -self.border, self.border : -self.border]
        return Sample(np.ascontiguousarray(inner), sample.name, None, sample.label)


def wnids() -> list[str]:
    """Return ImageNet-1k's classes in order."""
    return read_names(WNIDS)


def open_imagenet_v2(name: str, root: Path) -> Variant:
    """Open ImageNet-v2: folders 0 to 999 that are class numbers (sorted as text they would be 0, 1, 10,
    100).
    """
    files, notes = find_images(root)
    folders = [file.split("/", 1)[0] for file in files]
    wrong = [folder for folder in folders if not folder.isdecimal() or int(folder) > 999]
    if wrong:
        raise misfit("imagenetv2", f"{root} has {printable(wrong[0])}")
    source = Variant(name, root, files, [[int(folder)] for folder in folders], wnids())
    source.notes = notes
    return source


def open_imagenet_a(name: str, root: Path) -> Variant:
    """Open ImageNet-A (or R, of the same layout): folders of 200 wnids, which alone are candidates."""
    (files, notes), classes = find_images(root), wnids()
    index = {wnid: number for number, wnid in enumerate(classes)}
    folders = [file.split("/", 1)[0] for file in files]
    wrong = [folder for folder in folders if folder not in index]
    if wrong:
        raise misfit("imagenet-a", f"{root} has {printable(wrong[0])}")
    source = Variant(name, root, files, [[index[folder]] for folder in folders], classes)
    source.candidates, source.notes = tuple(sorted({index[folder] for folder in folders})), notes
    return source


def open_imagenet_real(name: str, root: Path, labels: Path | None = None) -> Variant:
    """Open ImageNet's validation images with ReaL's label lists; images with an empty list are left out."""
    if labels is None:
        raise DataError("imagenet-real: needs labels=, as in imagenet-real:/imagenet?labels=/real.json")
    lists = read_json(labels)
    if not isinstance(lists, list) or not all(isinstance(of_image, list) for of_image in lists):
        raise DataError(
            f"{labels}: must be a list of lists of class numbers, in order of the validation images"
        )
    images = open_imagenet(name, root, "test")
    files, answers = [], []
    for row in range(len(images)):
        file = images[row].name
        number = Path(file).stem.rsplit("_", 1)[-1]  # ILSVRC2012_val_00000001
        if not number.isdecimal() or not 0 < int(number) <= len(lists):
            raise DataError(f"{labels}: {len(lists)} lists, and none for the number of {file}")
        if of_image := lists[int(number) - 1]:
            files.append(file)
            answers.append([int(label) for label in of_image])
    if not files or not all(0 <= label < 1000 for of_image in answers for label in of_image):
        raise DataError(f"{labels}: needs class numbers from 0 to 999")
    source = Variant(name, images.root, files, answers, wnids())
    source.notes = images.notes
    return source


def open_objectnet(name: str, root: Path, border: int = 2) -> Variant:
    """Open ObjectNet: of its 313 classes the 113 that ImageNet has, some of them as several classes."""
    folders = [folder for folder in (root, root / "objectnet-1.0") if (folder / "mappings").is_dir()]
    if not folders:
        raise misfit("objectnet", f"no folder mappings in {root}")
    base, tables = folders[0], folders[0] / "mappings"
    label_of = _table(tables / "folder_to_objectnet_label.json")
    known = _table(tables / "objectnet_to_imagenet_1k.json")
    answers_of = {label: _numbers(tables, words) for label, words in known.items()}
    files, labels = [], []
    found = find_images(base / "images")
    for file in found.files:
        folder = file.split("/", 1)[0]
        if folder not in label_of:
            raise DataError(f"{tables}: no label for the folder {folder}")
        if label_of[folder] in answers_of:
            files.append(file)
            labels.append(answers_of[label_of[folder]])
    if not files:
        raise DataError(f"objectnet: none of the folders in {base / 'images'} is a class of ImageNet")
    source = Variant(name, base / "images", files, labels, wnids())
    source.candidates = tuple(sorted({label for of_image in answers_of.values() for label in of_image}))
    source.border, source.notes = border, found.notes
    return source


def _table(path: Path) -> Mapping[str, str]:
    table = read_json(path)
    if not isinstance(table, dict):
        raise DataError(f"{path}: must be an object of names")
    return {str(name): str(value) for name, value in table.items()}


def _numbers(tables: Path, words: str) -> list[int]:
    """ImageNet's class numbers of "name a; name b", by a list of names in the order of the devkit."""
    paths = [tables / "imagenet_to_label_2012_v2", tables / "imagenet_to_label_2012_v2.txt"]
    listed = next((path for path in paths if path.is_file()), None)
    if listed is None:
        raise DataError(f"objectnet: no file {paths[0]}")
    line_of = {line.strip(): i for i, line in enumerate(read_lines(listed))}
    number_of = {int(i): int(n) for n, i in _table(tables / "pytorch_to_imagenet_2012_id.json").items()}
    numbers = []
    for word in (part.strip() for part in words.split("; ")):
        if word not in line_of or line_of[word] not in number_of:
            raise DataError(f"{listed}: does not name {word!r}")
        numbers.append(number_of[line_of[word]])
    return sorted(numbers)


# -- lists --------------------------------------------------------------------------------------------------


def open_listed(
    name: str, root: Path, files: Path | None = None, classes: str | None = None, several: bool = False
) -> ImageFiles:
    """Return images that a list names, a line each: `path label` (Places205), or `path` in class folders
    (SUN397).

    Fields are apart by a comma, a tab, or the last space. Labels are numbers from 0, or names. Without
    labels the class is the folder of the image, however deep. `classes` is a file of class names, in order.
    With `several` all fields after the path, apart by commas or tabs, are classes of the image, perhaps none
    (NUS-WIDE).
    """
    if files is None:
        raise DataError("listed: needs files=, as in listed:/images?files=/train.csv")
    lines = [line for line in read_lines(files) if line.strip()]
    rows = [_all_fields(line) if several else _fields(line) for line in lines]
    if not rows or (not several and len({len(row) for row in rows}) > 1):
        raise DataError(f"{files}: every line is `path label`, or every line is `path`; and there is a line")
    paths = [row[0].lstrip("/") for row in rows]
    check_inside(files, paths)
    check_listed(root, paths, "listed images")
    if several:
        words = [word for row in rows for word in row[1:]]
    else:
        words = [row[1] if len(row) > 1 else row[0].lstrip("/").rpartition("/")[0] for row in rows]
    labels, names = _numbered(words, files, classes)
    if not several:
        return ImageFiles(name, root, paths, labels, names)
    source, left = ImageFiles(name, root, paths, classes=names), iter(labels)
    source.label_sets = [tuple(next(left) for _ in row[1:]) for row in rows]
    source.annotations = f"classes {hashlib.sha256(repr(source.label_sets).encode()).hexdigest()}"
    return source


def _numbered(words: list[str], files: Path, classes: str | None) -> tuple[list[int], list[str]]:
    """Labels of a list as numbers, and the names of all classes."""
    names = None if classes is None else read_names(Path(classes).expanduser())
    if all(word.isdecimal() for word in words):
        labels = [int(word) for word in words]
        names = names or [str(number) for number in range(max(labels, default=-1) + 1)]
        if max(labels, default=-1) >= len(names):
            raise DataError(f"{files}: label {max(labels)}, but {classes} names {len(names)} classes")
        return labels, names
    names = [name.strip("/") for name in names] if names else sorted(set(words))
    index = {word: number for number, word in enumerate(names)}
    unknown = [word for word in words if word.strip("/") not in index]
    if unknown:
        raise DataError(f"{files}: class {unknown[0]!r} is not in {classes}")
    return [index[word.strip("/")] for word in words], names


def _all_fields(line: str) -> list[str]:
    """A path and what follows it, apart by commas or tabs."""
    separator = "," if "," in line else "\t"
    return [field.strip() for field in next(csv.reader([line.strip()], delimiter=separator)) if field.strip()]


def _fields(line: str) -> list[str]:
    """A path, and the label if there is one. A path may hold spaces, but not end before its extension."""
    line = line.strip()
    for separator in (",", "\t"):
        if separator in line:
            return [field.strip() for field in next(csv.reader([line], delimiter=separator))][:2]
    path, space, label = line.rpartition(" ")
    return [path.strip(), label] if space and "." not in label else [line]
