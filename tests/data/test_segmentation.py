"""Official layouts with a label for every pixel, in miniature, and every mistake in them: one clear line."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.identity import identity_of
from foveola.data.sample import BadImage, DataError
from foveola.data.segmentation import IGNORE, LabelledImages, PixelSource
from foveola.data.sources import decode, open_source

SIZE = (12, 20)  # height, width


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(path.name.encode()[:4])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), np.uint8)).save(path)


def label_map(path: Path, values: list[int], palette: bool = False) -> np.ndarray:
    """A PNG whose columns cycle through the values; with a palette its colours say something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.resize(np.array(values, np.uint8), SIZE[1])[None].repeat(SIZE[0], 0)
    image = Image.fromarray(np.ascontiguousarray(labels))
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        assert image.mode == "P"
    image.save(path)
    return labels


def check(source: object, count: int) -> LabelledImages:
    """What every such source promises."""
    assert isinstance(source, PixelSource)
    assert isinstance(source, LabelledImages)
    assert len(source) == count
    again = pickle.loads(pickle.dumps(source))
    assert identity_of(again).digest == identity_of(source).digest
    for index in range(count):
        labels = source.label_map(index)
        assert labels.dtype == np.uint8
        assert labels.shape == decode(source[index].image).shape[:2]
        assert labels[labels != IGNORE].max(initial=0) < len(source.classes)
        np.testing.assert_array_equal(labels, again.label_map(index))
    return source


# -- VOC --------------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    base = tmp_path / "VOCdevkit" / "VOC2012"
    sets = {"train": ["2007_01", "2007_02"], "val": ["2007_03"], "trainaug": ["2007_01", "2008_04"]}
    for stems in sets.values():
        for stem in stems:
            image(base / "JPEGImages" / f"{stem}.jpg")
            label_map(base / "SegmentationClass" / f"{stem}.png", [0, 15, 20, 255], palette=True)
            label_map(base / "SegmentationClassAug" / f"{stem}.png", [0, 15, 20])
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, stems in sets.items():
        (base / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(stems) + "\n")
    return base


def test_voc(voc: Path):
    source = check(open_source(f"voc:{voc.parent}"), 2)
    assert source.classes[15] == "person"
    assert len(source.classes) == 21
    assert source.label_map(0)[0, :4].tolist() == [0, 15, 20, IGNORE]  # indices of the palette, not colours
    assert source.notes == (f"voc:{voc.parent}?split=train has 2 images, the official set 1464",)
    assert check(open_source(f"voc:{voc}", "test"), 1)[0].name == "JPEGImages/2007_03.jpg"
    augmented = check(open_source(f"voc:{voc}?split=trainaug"), 2)
    assert IGNORE not in augmented.label_map(0)
    prints = {identity_of(open_source(f"voc:{voc}?split={s}")).digest for s in ("train", "trainaug", "val")}
    assert len(prints) == 3


def test_voc_list_that_names_both_files(voc: Path):
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text(
        "/JPEGImages/2008_04.jpg /SegmentationClassAug/2008_04.png\n"
    )
    assert check(open_source(f"voc:{voc}?split=trainaug"), 1)[0].name == "JPEGImages/2008_04.jpg"


def test_voc_mistakes(voc: Path, tmp_path: Path):
    with pytest.raises(DataError, match="needs one of train, trainaug, val, test"):
        open_source(f"voc:{voc}?split=aug")
    with pytest.raises(DataError, match="no folder SegmentationClass"):
        open_source(f"voc:{voc / 'JPEGImages'}")
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("2007_01\n2007_03\n")
    with pytest.raises(DataError, match="1 images of trainaug belong to val, such as 2007_03"):
        open_source(f"voc:{voc}?split=trainaug")
    (voc / "SegmentationClass" / "2007_02.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 label maps are missing, .*2007_02.png"):
        open_source(f"voc:{voc}")
    label_map(voc / "SegmentationClass" / "2007_02.png", [0, 21])
    with pytest.raises(DataError, match=r"2007_02.png: holds the value 21, which is no class \(0 to 20\)"):
        open_source(f"voc:{voc}").label_map(1)  # type: ignore[attr-defined]


# -- ADE20K -----------------------------------------------------------------------------------------------


def test_ade20k(tmp_path: Path):
    base = tmp_path / "ADEChallengeData2016"
    for half, names in {"training": ["a1", "a2"], "validation": ["v1"]}.items():
        for name in names:
            image(base / "images" / half / f"ADE_{name}.jpg")
            label_map(base / "annotations" / half / f"ADE_{name}.png", [0, 1, 150])
    source = check(open_source(f"ade20k:{tmp_path}"), 2)
    assert source.label_map(0)[0, :3].tolist() == [IGNORE, 0, 149]
    assert source.classes[149] == "class 150"
    assert len(check(open_source(f"ade20k:{base}", "test"), 1).notes) == 1
    rows = [f"{i}\t0.1\t1\t1\tword{i % 149}, other" for i in range(1, 151)]
    (base / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows))
    assert open_source(f"ade20k:{base}").classes[:2] == ("1 word1", "2 word2")  # type: ignore[index]
    (base / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows[:9]))
    with pytest.raises(DataError, match="names 9 classes, not 150"):
        open_source(f"ade20k:{base}")


# -- Cityscapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path: Path, kind: str):
    values = [7, 8, 33, 0, 9] if kind == "labelIds" else [0, 1, 18, 255, 255]
    for half, city in (("train", "ulm"), ("train", "bonn"), ("val", "jena")):
        stem = f"{half}/{city}/{city}_000_019"
        image(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png")
        label_map(tmp_path / "gtFine" / f"{stem}_gtFine_{kind}.png", values)
        label_map(tmp_path / "gtFine" / f"{stem}_gtFine_instanceIds.png", [3])
    source = check(open_source(f"cityscapes:{tmp_path}"), 2)
    assert source.label_map(0)[0, :5].tolist() == [0, 1, 18, IGNORE, IGNORE]
    assert (source.classes[0], source.classes[18], len(source.classes)) == ("road", "bicycle", 19)
    assert check(open_source(f"cityscapes:{tmp_path}", "test"), 1)[0].name.startswith("leftImg8bit/val/jena")


# -- COCO-Stuff, CamVid -----------------------------------------------------------------------------------


def test_coco_stuff(tmp_path: Path):
    image(tmp_path / "val2017" / "000000000139.jpg")
    label_map(tmp_path / "stuffthingmaps" / "000000000139.png", [0, 10, 12, 89, 91, 181, 255])
    spec = f"cocostuff:{tmp_path / 'val2017'}?labels={tmp_path / 'stuffthingmaps'}"
    source = check(open_source(spec), 1)
    assert source.label_map(0)[0, :7].tolist() == [0, 10, 11, 79, 80, 170, IGNORE]
    assert len(source.classes) == 171
    label_map(tmp_path / "stuffthingmaps" / "000000000139.png", [11])
    with pytest.raises(DataError, match="holds the value 11, which is no class"):
        source.label_map(0)
    with pytest.raises(DataError, match="needs labels="):
        open_source(f"cocostuff:{tmp_path / 'val2017'}")


@pytest.mark.parametrize("layout", ["folders", "segnet"])
def test_camvid(tmp_path: Path, layout: str):
    for split in ("train", "val", "test"):
        images, labels = (
            (f"{split}/images", f"{split}/labels") if layout == "folders" else (split, f"{split}annot")
        )
        image(tmp_path / images / f"{split}_1.png")
        label_map(tmp_path / labels / f"{split}_1.png", [0, 10, 11])
    for split in ("train", "val", "test"):
        source = check(open_source(f"camvid:{tmp_path}?split={split}"), 1)
        assert source[0].name.endswith(f"{split}_1.png")
        assert source.label_map(0)[0, :3].tolist() == [0, 10, IGNORE]
    assert open_source(f"camvid:{tmp_path}").classes[3] == "road"  # type: ignore[index]
    with pytest.raises(DataError, match=r"no .*/images with .*; expected .*annot"):
        open_source(f"camvid:{tmp_path / 'train'}")


@pytest.mark.skipif("FOVEOLA_DATA" not in os.environ, reason="FOVEOLA_DATA names no folder of real data")
def test_real_camvid():
    root = Path(os.environ["FOVEOLA_DATA"]) / "camvid"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    for split, count in (("train", 367), ("val", 101), ("test", 233)):
        source = open_source(f"camvid:{root}?split={split}")
        assert isinstance(source, LabelledImages)
        assert (len(source), source.notes) == (count, ())
        assert source.label_map(count - 1).shape == decode(source[count - 1].image).shape[:2] == (360, 480)


# -- own label maps ---------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> str:
    for name in ("x/a", "b"):
        image(tmp_path / "images" / f"{name}.jpg")
        label_map(tmp_path / "labels" / f"{name}.png", [0, 1, 7])
    return f"masks:{tmp_path / 'images'}?labels={tmp_path / 'labels'}"


def test_own_masks(own: str, tmp_path: Path):
    source = check(open_source(f"{own}&classes=2&ignore=7"), 2)
    assert source.label_map(1)[0, :3].tolist() == [0, 1, IGNORE]
    assert source.classes == ("0", "1")
    (tmp_path / "names.txt").write_text("sky\nground\n")
    named = check(open_source(f"{own}&classes={tmp_path / 'names.txt'}&ignore=7"), 2)
    assert named.classes == ("sky", "ground")
    limited = open_source(f"{own}&classes=2&ignore=7&limit=1")
    assert len(limited) == 1
    assert isinstance(limited, LabelledImages)
    index = [source[i].name for i in range(2)].index(limited[0].name)
    np.testing.assert_array_equal(limited.label_map(0), source.label_map(index))
    assert identity_of(open_source(f"{own}&classes=2&ignore=7")).digest == identity_of(source).digest
    assert identity_of(open_source(f"{own}&classes=2&ignore=8")).digest != identity_of(source).digest


def test_labels_inside_the_folder_of_images(tmp_path: Path):
    image(tmp_path / "a.jpg")
    label_map(tmp_path / "labels" / "a.png", [0, 1])
    check(open_source(f"masks:{tmp_path}?labels={tmp_path / 'labels'}&classes=2"), 1)


def test_a_declared_class_without_a_pixel_is_an_error_with_the_remedy(own: str, tmp_path: Path):
    """Maps of 0 and 255 with the default ignore=255: class 1 would silently be nowhere."""
    for name in ("x/a", "b"):
        label_map(tmp_path / "labels" / f"{name}.png", [0, 255])
    with pytest.raises(
        DataError, match=r"class 1 \(1 of 2 classes\) has no pixel in 2 .*values=0,255 .*absent="
    ):
        open_source(f"{own}&classes=2")
    source = check(open_source(f"{own}&classes=2&values=0,255"), 2)
    assert source.label_map(0)[0, :3].tolist() == [0, 1, 0]
    allowed = check(open_source(f"{own}&classes=2&absent=allow"), 2)
    assert allowed.label_map(0)[0, :3].tolist() == [0, IGNORE, 0]
    ignored = check(open_source(f"{own}&classes=1&values=255&ignore=0"), 2)
    assert ignored.label_map(0)[0, :3].tolist() == [IGNORE, 0, IGNORE]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("classes=99999999999", "99999999999 classes; from 1 to 254 are possible"),
        ("classes=2&values=0", "values= needs a value for each of the 2 classes"),
        ("classes=2&values=0,0", "each once"),
        ("classes=2&values=0,300", "values of label maps end at 255"),
        ("classes=2&values=0,x", "needs whole numbers such as 0,255"),
        ("classes=2&values=0,7&ignore=7", "ignore=7 is also the value of a class"),
        ("classes=2&absent=yes", "needs one of allow"),
    ],
)
def test_mistaken_classes(own: str, options: str, message: str):
    with pytest.raises(DataError, match=message):
        open_source(f"{own}&{options}")


def test_own_masks_mistakes(own: str, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"needs labels= and classes= .* or a file|needs labels= and classes="
    ):
        open_source(own)
    with pytest.raises(DataError, match="no file of class names"):
        open_source(f"{own}&classes=/no/names.txt")
    with pytest.raises(DataError, match="0 classes; from 1 to 254 are possible"):
        open_source(f"{own}&classes=0")
    with pytest.raises(DataError, match="300 classes; from 1 to 254 are possible"):
        open_source(f"{own}&classes=300")
    with pytest.raises(DataError, match="values of label maps end at 255"):
        open_source(f"{own}&classes=2&ignore=256")
    source = open_source(f"{own}&classes=2")
    assert isinstance(source, LabelledImages)
    with pytest.raises(DataError, match=r"holds the value 7, which is no class \(0 to 1\) and not ignored"):
        source.label_map(0)
    where = tmp_path / "labels" / "b.png"
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(where)
    with pytest.raises(DataError, match=r"b.png: a label map has one channel .* this one is RGB"):
        source.label_map(0)
    Image.fromarray(np.full(SIZE, 1000, np.uint16)).save(where)
    with pytest.raises(DataError, match=r"b.png: holds the value 1000; label maps end at 255"):
        source.label_map(0)
    where.write_bytes(b"\x89PNG damaged")
    with pytest.raises(BadImage, match=r"b.jpg: its label map .* cannot be read"):
        source.label_map(0)
    where.unlink()
    with pytest.raises(DataError, match=r"1 of 2 label maps are missing, such as .*b.png"):
        open_source(f"{own}&classes=2")
