"""Images with a class for every pixel: VOC, ADE20K, Cityscapes, COCO-Stuff, CamVid, and own label maps.

A label map is read when it is asked for (`source.label_map(index)`): uint8 [H, W] of class indices from 0, as
in `source.classes`, and IGNORE where a pixel has no class. What a data set means by its values is settled
here.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8

from foveola.data.annotations import Packed, map_size, read_values
from foveola.data.fit import upright_map
from foveola.data.layouts import ImageFiles
from foveola.data.listing import check_listed, find_images, misfit, printable, read_lines
from foveola.data.sample import IGNORE, DataError, Sample

UNKNOWN = 254  # in a table of values: one that the data set does not have
MAPS_LOOKED_AT = 500  # looked at for a class without a pixel
MAX_CLASSES = UNKNOWN  # a byte a pixel: a reference set of patches holds some hundred labels for each


@runtime_checkable
class PixelSource(Protocol):
    """A `Source` with a class for every pixel. `classes` is never None."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def has_objects(self) -> bool: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of numbers should know about the data: that a part of it is missing."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def label_map(self, index: int, /) -> UInt8[np.ndarray, "H W"]:
        """Return classes of the pixels of an image; IGNORE for none. Raises BadImage and DataError."""
        ...


class LabelledImages(ImageFiles):
    """Image files with a label map each. `values[v]` is the class of the value v of the maps on disk."""

    def __init__(
        self,
        name: str,
        root: Path,
        pairs: Sequence[tuple[str, str]],
        values: UInt8[np.ndarray, "256"],
        classes: Sequence[str],
        official: int | None = None,
    ) -> None:
        super().__init__(name, root, [file for file, _ in pairs])
        if not 0 < len(classes) <= MAX_CLASSES:
            raise DataError(f"{name}: {len(classes)} classes; from 1 to {MAX_CLASSES} are possible")
        self.classes: tuple[str, ...] = tuple(classes)
        self.maps = Packed(os.fsencode(file) for _, file in pairs)
        self.values = values
        if official is not None and len(pairs) != official:
            self.notes = (f"{name} has {len(pairs)} images, the official set {official}",)
        self.annotations = f"pixels {values.tobytes().hex()}"

    def beside(self, row: int) -> str:
        """Return the label map of an image."""
        return os.fsdecode(self.maps[row])

    def label_map(self, index: int) -> UInt8[np.ndarray, "H W"]:
        """Return classes of the pixels of an image. Raises BadImage (damaged), DataError (values of no
        class).
        """
        row = int(self.rows[index])
        where = self.root / os.fsdecode(self.maps[row])
        file = printable(os.fsdecode(self.files[row]))
        labels = to_classes(read_values(where, file), self.values, str(where))
        return upright_map(labels, self.path(index), self.raw, file)

    def annotation_size(self, index: int) -> tuple[int, int] | None:
        """Return the width and height of a label map."""
        return map_size(self.root / os.fsdecode(self.maps[int(self.rows[index])]))


def to_classes(
    found: Integer[np.ndarray, "H W"], values: UInt8[np.ndarray, "256"], where: str
) -> UInt8[np.ndarray, "H W"]:
    """Return the class indices of the values of a label map. Raises DataError, naming one that stands for
    nothing.
    """
    low, high = int(found.min(initial=0)), int(found.max(initial=0))
    if low < 0 or high > 255:
        raise DataError(f"{where}: holds the value {low if low < 0 else high}; label maps end at 255")
    labels = values[found]
    if (labels == UNKNOWN).any():
        wrong = int(found[labels == UNKNOWN][0])
        known = np.flatnonzero(values < UNKNOWN)
        raise DataError(
            f"{where}: holds the value {wrong}, which is no class ({known[0]} to {known[-1]}) and not ignored"
        )
    return labels


def value_table(classes: Mapping[int, int], ignore: Sequence[int] = (), other: int = UNKNOWN) -> np.ndarray:
    """Return uint8 [256]: the class of each value on disk; IGNORE for `ignore`, `other` for what is not
    named.
    """
    values = np.full(256, other, np.uint8)
    for value, label in classes.items():
        values[value] = label
    values[list(ignore)] = IGNORE
    return values


# -- own label maps -----------------------------------------------------------------------------------------


def open_masks(
    name: str,
    root: Path,
    labels: Path | None = None,
    classes: str | None = None,
    ignore: int | None = None,
    values: tuple[int, ...] | None = None,
    absent: bool = False,
) -> LabelledImages:
    """Return a folder of images, and one of PNG label maps with the same names.

    `classes` is the number of classes, or a file that names one a line. `values` are their values on disk, in
    order; 0, 1, ... without. A class that no map looked at holds is an error unless `absent` allows it.
    """
    if labels is None or classes is None:
        raise DataError(
            "masks: needs labels= and classes= (a number, or a file of names), as in "
            "masks:/images?labels=/labels&classes=21"
        )
    names, table = declared_classes("masks", classes, ignore, values)
    files, notes = find_images(root, without=labels)
    pairs = _pairs(root, files, lambda file: os.path.relpath(labels / Path(file).with_suffix(".png"), root))
    source = LabelledImages(name, root, pairs, table, names)
    source.notes = notes
    if not absent:
        check_present(name, source.label_map, len(pairs), source.classes)
    return source


def declared_classes(
    kind: str, classes: str, ignore: int | None, values: tuple[int, ...] | None
) -> tuple[list[str], UInt8[np.ndarray, "256"]]:
    """Return names of own classes, and the class of each value on disk. Raises DataError for what
    cannot be.
    """
    if not classes.isdecimal():
        names = read_names(Path(classes).expanduser())
    elif 0 < int(classes) <= MAX_CLASSES:
        names = [str(number) for number in range(int(classes))]
    else:
        raise DataError(f"{kind}: {classes} classes; from 1 to {MAX_CLASSES} are possible")
    values = tuple(range(min(len(names), MAX_CLASSES))) if values is None else values
    if len(values) != len(set(values)) or len(values) < min(len(names), MAX_CLASSES):
        raise DataError(f"{kind}: values= needs a value for each of the {len(names)} classes, each once")
    if max(*values, ignore or 0) > 255:
        raise DataError(f"{kind}: values of label maps end at 255 (values=, ignore=)")
    if ignore in values:
        raise DataError(f"{kind}: ignore={ignore} is also the value of a class")
    ignored = [IGNORE] if ignore is None else [ignore]
    table = value_table({v: i for i, v in enumerate(values)}, [v for v in ignored if v not in values])
    return names, table


def check_present(
    name: str, label_map: Callable[[int], np.ndarray], count: int, classes: Sequence[str]
) -> None:
    """Check that every declared class is somewhere in the maps. Raises DataError: it may be a value that is
    ignored.

    Looks at maps until all classes are found, at most at `MAPS`, in an order that a seed draws.
    """
    missing = set(range(len(classes)))
    order = np.random.default_rng(0).permutation(count)[:MAPS_LOOKED_AT]
    for index in order.tolist():
        try:
            missing -= set(np.unique(label_map(index)).tolist())
        except DataError:  # said where the map is used
            return
        if not missing:
            return
    first = classes[min(missing)]
    raise DataError(
        f"{name}: class {first} ({len(missing)} of {len(classes)} classes) has no pixel in {len(order)} "
        "label maps; values=0,255 says which values are the classes, absent=allow that they may be missing"
    )


def read_names(path: Path) -> list[str]:
    """Return names of classes, one a line. Raises DataError for a file that is missing or names none."""
    if not path.is_file():
        raise DataError(f"no file of class names {path}")
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if len(set(names)) < len(names) or not names:
        raise DataError(f"{path}: needs a class name a line, each once")
    return names


def _pairs(root: Path, files: Sequence[str], label_of: Callable[[str], str]) -> list[tuple[str, str]]:
    """Each image with its label map, all there."""
    pairs = [(file, label_of(file)) for file in files]
    check_listed(root, [label for _, label in pairs], "label maps")
    return pairs


# -- official layouts ---------------------------------------------------------------------------------------

VOC_WORDS = """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
VOC_COUNTS = {"train": 1464, "val": 1449, "trainaug": 10582}


def open_voc(name: str, root: Path, split: str) -> LabelledImages:
    """Open PASCAL VOC 2012: train, trainaug (with SBD's label maps), val (also as `test`: that has no
    labels).
    """
    which = "val" if split == "test" else split
    base = next((folder for folder in (root, root / "VOC2012", root / "VOCdevkit/VOC2012")
                 if (folder / "SegmentationClass").is_dir()), None)  # fmt: skip
    if base is None:
        raise misfit("voc", f"no folder SegmentationClass in {root}")
    stems = _voc_set(base, which)
    if which == "trainaug" and (leaked := sorted(set(stems) & set(_voc_set(base, "val")))):
        raise DataError(f"voc: {len(leaked)} images of trainaug belong to val, such as {leaked[0]}")
    images = "JPEGImages" if (base / "JPEGImages").is_dir() else "images"
    labels = "SegmentationClassAug" if which == "trainaug" else "SegmentationClass"
    files = [f"{images}/{stem}.jpg" for stem in stems]
    check_listed(base, files)
    pairs = _pairs(base, files, lambda file: f"{labels}/{Path(file).stem}.png")
    return LabelledImages(
        name,
        base,
        pairs,
        value_table({i: i for i in range(21)}, [IGNORE]),
        VOC_WORDS.split(),
        VOC_COUNTS[which],
    )


def _voc_set(base: Path, which: str) -> list[str]:
    """Names in an image set. Some lists of trainaug name `/JPEGImages/x.jpg /SegmentationClassAug/x.png`."""
    paths = [base / "ImageSets/Segmentation" / f"{which}.txt", base / "sets" / f"{which}.txt"]
    path = next((each for each in paths if each.is_file()), None)
    if path is None:
        raise misfit("voc", f"no list {paths[0]}")
    stems = [Path(line.split()[0]).stem for line in read_lines(path) if line.strip()]
    if not stems:
        raise DataError(f"{path}: names no image")
    return sorted(set(stems))


def open_ade20k(name: str, root: Path, split: str) -> LabelledImages:
    """Open ADE20K of the scene parsing challenge (2016): 150 classes; 0 (other, unlabelled) is ignored."""
    half = "training" if split == "train" else "validation"
    base = root if (root / "images").is_dir() else root / "ADEChallengeData2016"
    if not (base / "images" / half).is_dir():
        raise misfit("ade20k", f"no folder images/{half} in {root}")
    info = base / "objectInfo150.txt"  # Idx, Ratio, Train, Val, Name
    names = [f"class {number}" for number in range(1, 151)]
    if info.is_file():
        lines = read_lines(info)[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
        names = [f"{number} {word}" for number, word in enumerate(names, start=1)]  # two classes are "screen"
    if len(names) != 150:
        raise DataError(f"{info}: names {len(names)} classes, not 150")
    files = [f"images/{half}/{file}" for file in find_images(base / "images" / half).files]
    pairs = _pairs(base, files, lambda file: f"annotations{file[len('images') :].rsplit('.', 1)[0]}.png")
    values = value_table({i: i - 1 for i in range(1, 151)}, [0, IGNORE])
    return LabelledImages(name, base, pairs, values, names, 20210 if split == "train" else 2000)


CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


def open_cityscapes(name: str, root: Path, split: str) -> LabelledImages:
    """Open Cityscapes, fine annotations, the 19 classes of the benchmark; from labelIds or
    labelTrainIds.
    """
    half = "train" if split == "train" else "val"
    folder = root / "leftImg8bit" / half
    if not folder.is_dir():
        raise misfit("cityscapes", f"no folder leftImg8bit/{half} in {root}")
    found = [file for file in find_images(folder).files if file.endswith("_leftImg8bit.png")]
    if not found:
        raise DataError(f"cityscapes: no images *_leftImg8bit.png in {folder}")

    def label_of(file: str, kind: str) -> str:
        return f"gtFine/{half}/{file.removesuffix('_leftImg8bit.png')}_gtFine_{kind}.png"

    kind = "labelIds" if (root / label_of(found[0], "labelIds")).is_file() else "labelTrainIds"
    pairs = [(f"leftImg8bit/{half}/{file}", label_of(file, kind)) for file in found]
    check_listed(root, [label for _, label in pairs], "label maps")
    if kind == "labelIds":
        values = value_table({value: i for i, value in enumerate(CITYSCAPES)}, other=IGNORE)
    else:
        values = value_table({i: i for i in range(19)}, [IGNORE])
    official = 2975 if half == "train" else 500
    return LabelledImages(name, root, pairs, values, list(CITYSCAPES.values()), official)


COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # things that COCO 2017 does not annotate


def open_coco_stuff(
    name: str, root: Path, labels: Path | None = None, classes: str | None = None
) -> LabelledImages:
    """Open COCO-Stuff: images of COCO 2017 and the PNG files of `stuffthingmaps`; 171 classes in order of
    id.
    """
    if labels is None:
        raise DataError(
            "cocostuff: needs labels=, as in cocostuff:/train2017?labels=/stuffthingmaps/train2017"
        )
    used = [value for value in range(182) if value not in COCO_UNUSED]
    names = [f"class {value + 1}" for value in used] if classes is None else read_names(Path(classes))
    if len(names) != len(used):
        raise DataError(f"cocostuff: {classes} names {len(names)} classes, not {len(used)}")
    files, notes = find_images(root)
    pairs = _pairs(root, files, lambda file: os.path.relpath(labels / Path(file).with_suffix(".png"), root))
    values = value_table({value: i for i, value in enumerate(used)}, [IGNORE])
    source = LabelledImages(name, root, pairs, values, names)
    source.notes = notes
    return source


CAMVID_WORDS = "sky building pole road pavement tree sign fence car pedestrian bicyclist"


def open_camvid(name: str, root: Path, split: str) -> LabelledImages:
    """Open CamVid in 11 classes (11 = void): train/images with train/labels, or SegNet's train with
    trainannot.
    """
    images, labels = f"{split}/images", f"{split}/labels"
    if not (root / images).is_dir():
        images, labels = split, f"{split}annot"
    if not (root / images).is_dir() or not (root / labels).is_dir():
        raise misfit("camvid", f"no {split}/images with {split}/labels in {root}")
    files = [f"{images}/{file}" for file in find_images(root / images).files]
    pairs = _pairs(root, files, lambda file: f"{labels}{file[len(images) :].rsplit('.', 1)[0]}.png")
    official = {"train": 367, "val": 101, "test": 233}[split]
    return LabelledImages(
        name,
        root,
        pairs,
        value_table({i: i for i in range(11)}, [11, IGNORE]),
        CAMVID_WORDS.split(),
        official,
    )
