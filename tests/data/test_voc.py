"""Boxes of VOC by hand: the first and the last pixel from 1, flags, lists, and folders that are none."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.identity import identity_of
from foveola.data.sample import DataError
from foveola.data.sources import open_source

W, H = 40, 20


def write(base: Path, stem: str, objects: list[tuple], size: tuple[int, int] = (W, H)) -> None:
    """Objects are (name, xmin, ymin, xmax, ymax, difficult, truncated); a part has a box of its own."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H)).save(base / "JPEGImages" / f"{stem}.jpg")
    text = "".join(
        f"<object><name>{name}</name><truncated>{cut}</truncated><difficult>{hard}</difficult>"
        f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymin>{y0}</ymin><ymax>{y1}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
        "</part></object>"
        for name, x0, y0, x1, y1, hard, cut in objects
    )
    size_text = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    (base / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size_text}{text}</annotation>")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    base = tmp_path / "VOCdevkit" / "VOC2007"
    write(base, "000005", [("dog", 1, 1, W, H, 0, 0), ("chair", 11, 6.5, 20, 10, 1, 0)])
    write(base, "000007", [("car", 1, 1, 20, 10, 0, 1)])
    write(base, "000009", [])
    lists = base / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text("000007\n000005\n")
    (lists / "train.txt").write_text("000005\n")
    (lists / "val.txt").write_text("000007  1\n")
    (lists / "test.txt").write_text("000009\n")
    return base


@pytest.mark.parametrize("above", [0, 1, 2])
def test_boxes_from_the_first_pixel_to_the_last(voc: Path, above: int):
    root = (voc, *voc.parents)[above]  # VOC2007, VOCdevkit, or the folder that it is in
    source = open_source(f"voc-objects:{root}?split=trainval")
    assert [source[index].name for index in range(len(source))] == ["000005.jpg", "000007.jpg"]
    assert source.classes is not None
    assert len(source.classes) == 20
    objects = source[0].objects
    assert objects is not None
    np.testing.assert_allclose(objects.boxes, [[0, 0, 1, 1], [10 / W, 5.5 / H, 20 / W, 10 / H]])
    np.testing.assert_allclose(objects.areas, [1, 10 * 4.5 / (W * H)])
    assert [source.classes[label] for label in objects.labels] == ["dog", "chair"]
    assert source[0].crowds is None
    assert source.with_objects() == 2  # type: ignore[attr-defined]


def test_ignored_flags_are_crowds(voc: Path):
    source = open_source(f"voc-objects:{voc}?split=trainval&ignore=difficult,truncated")
    first, second = source[0], source[1]
    assert first.objects is not None
    assert first.crowds is not None
    assert (len(first.objects), len(first.crowds)) == (1, 1)
    assert second.objects is None
    assert second.crowds is not None
    hard = open_source(f"voc-objects:{voc}?split=trainval&ignore=difficult")[1]
    assert hard.objects is not None
    digests = {
        identity_of(open_source(f"voc-objects:{voc}?split=trainval{option}")).digest
        for option in ("", "&ignore=difficult", "&ignore=difficult,truncated")
    }
    assert len(digests) == 3


def test_halves(voc: Path):
    names = {split: open_source(f"voc-objects:{voc}", split)[0].name for split in ("train", "test")}
    assert names == {"train": "000005.jpg", "test": "000009.jpg"}
    (voc / "Annotations" / "000009.xml").unlink()  # as of VOC2012, whose test list has no annotations
    assert open_source(f"voc-objects:{voc}", "test")[0].name == "000007.jpg"


def test_own_classes_are_sorted(tmp_path: Path):
    write(tmp_path, "a", [("zebra", 1, 1, 9, 9, 0, 0), ("dog", 1, 1, 9, 9, 0, 0)])
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    source = open_source(f"voc-objects:{tmp_path}")
    assert source.classes == ("dog", "zebra")
    assert source[0].objects is not None
    assert source[0].objects.labels is not None
    assert source[0].objects.labels.tolist() == [1, 0]


def test_mistakes(voc: Path, tmp_path: Path):
    with pytest.raises(DataError, match="needs difficult or truncated, or both"):
        open_source(f"voc-objects:{voc}?ignore=hard")
    with pytest.raises(DataError, match="no folder Annotations"):
        open_source(f"voc-objects:{voc / 'JPEGImages'}")
    write(voc.parent / "VOC2012", "2008_1", [])
    with pytest.raises(DataError, match=r"holds several: VOC2007, VOC2012; give one, as in voc-objects:/"):
        open_source(f"voc-objects:{tmp_path}")
    with pytest.raises(DataError, match=r"no list ImageSets/Main/trainval.txt"):
        open_source(f"voc-objects:{voc.parent / 'VOC2012'}?split=trainval")
    (voc / "Annotations" / "000007.xml").write_text("<annotation><size><width>40</width></size></annotation>")
    with pytest.raises(
        DataError, match=r"000007.xml is no annotation of VOC: annotation without size/height"
    ):
        open_source(f"voc-objects:{voc}?split=val")
    endless = "<annotation><size><width>inf</width><height>20</height></size></annotation>"
    (voc / "Annotations" / "000007.xml").write_text(endless)
    with pytest.raises(DataError, match=r"000007.xml is no annotation of VOC: cannot convert float infinity"):
        open_source(f"voc-objects:{voc}?split=val")
    (voc / "ImageSets/Main/val.txt").write_text("000008\n../../x\n")
    with pytest.raises(DataError, match=r"2 of 2 listed images are missing, such as \.\./\.\./x"):
        open_source(f"voc-objects:{voc}?split=val")
