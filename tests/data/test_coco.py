"""Hostile COCO: refused with the annotation's name before pycocotools, which would hang or crash, sees it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as official

from foveola.data.coco import rle_counts
from foveola.data.identity import identity_of
from foveola.data.sample import DataError
from foveola.data.sources import open_source

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_compressed_counts_are_those_of_pycocotools(share: float):
    mask = np.random.default_rng(0).random((480, 640)) < share
    mask[200:400, 100:300] = share > 0
    counts = rle_counts(official.encode(np.asfortranarray(mask, np.uint8))["counts"])
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    np.testing.assert_array_equal(counts, np.diff([0, *changes, flat.size]))


GOOD = {"bbox": [1, 1, 8, 8], "area": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": [[0, 0, 1e9, 0, 5, 5]]}, "a polygon reaches from 0 to 1e"),
        ({"segmentation": [[0, 0, float("nan"), 0, 5, 5]]}, "a polygon reaches from nan"),
        ({"segmentation": [[0, 0, float("inf"), 0, 5, 5]]}, "a polygon reaches from 0 to inf"),
        ({"segmentation": [[0, 0, 5, 0, 5, 5, 1]]}, "a polygon is a list of x, y"),
        ({"segmentation": [["0", "0", "5", "0", "5", "5"]]}, "a polygon is a list of x, y"),
        ({"segmentation": "mask.png"}, "neither polygons nor RLE"),
        ({"segmentation": {"size": [20, 30], "counts": [10**9]}}, "do not add up to the 600 pixels"),
        ({"segmentation": {"size": [20, 30], "counts": [700, -100]}}, "do not add up to the 600 pixels"),
        ({"segmentation": {"size": [20, 30], "counts": [1.5, 598.5]}}, "whole numbers"),
        (
            {"segmentation": {"size": [30, 20], "counts": [600]}},
            r"RLE of size \[30, 20\] in an image of height 20",
        ),
        ({"segmentation": {"size": [20, 30], "counts": "ooooooooooo"}}, "compressed RLE is damaged"),
        ({"segmentation": {"size": [20, 30], "counts": "ooooooooooo1"}}, "a number beyond 30 bits"),
        ({"segmentation": {"size": [20, 30], "counts": "\x7f~"}}, "compressed RLE is damaged"),
        ({"segmentation": {"size": [20, 30], "counts": ""}}, "compressed RLE is damaged"),
        ({"segmentation": {"size": [20, 30]}}, "segmentation: 'counts'"),
        ({"bbox": [1, 1, -8, 8]}, r"bbox \[1, 1, -8, 8\] is not x, y, width, height"),
        ({"bbox": [1, 1, float("nan"), 8]}, "is not x, y, width, height"),
        ({"bbox": [1, 1, 10**400, 8]}, "is not x, y, width, height"),
        ({"bbox": ["1", 1, 8, 8]}, "is not x, y, width, height"),
        ({"bbox": [40, 1, 8, 8]}, r"bbox \[40, 1, 8, 8\] lies outside its 30x20 pixels"),
        ({"area": float("inf")}, "area inf"),
        ({"score": "high"}, "score high"),
    ],
)
def test_hostile_annotations(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(
        DataError, match=rf"coco.json: annotation 7 of image 1: .*{message}|annotation 7.*{message}"
    ):
        open_source(write(tmp_path, changes))


@pytest.mark.parametrize("size", [(10**9, 10**9), (0, 20), (30.5, 20), ("30", 20)])
def test_hostile_sizes(tmp_path: Path, size: tuple):
    with pytest.raises(DataError, match=r"image 1: width and height are"):
        open_source(write(tmp_path, {}, size))


def test_names_that_leave_the_folder(tmp_path: Path):
    with pytest.raises(DataError, match=r"names '\.\./outside.png', which is not below"):
        open_source(write(tmp_path, {}, name="../outside.png"))


@pytest.mark.parametrize("kind", ["polygon", "counts", "compressed", "text"])
def test_what_is_right_is_read(tmp_path: Path, kind: str):
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 10:20] = 1
    rle = official.encode(np.asfortranarray(mask))
    segmentation = {
        "polygon": [[10, 5, 20, 5, 20, 15, 10, 15]],
        "counts": {"size": [20, 30], "counts": [205, *[10, 10] * 9, 10, 205]},
        "compressed": {"size": [20, 30], "counts": rle["counts"].decode()},
        "text": {"counts": rle["counts"].decode()},
    }[kind]
    sample = open_source(write(tmp_path, {"segmentation": segmentation}))[0]
    assert sample.objects is not None
    assert np.array_equal(sample.objects.draw(0, 60) > 127, np.kron(mask, np.ones((3, 2))) > 0)


def test_scores_are_kept_by_the_objects_that_are_left(tmp_path: Path):
    name = write(tmp_path, {"score": 0.25})
    file = tmp_path / "coco.json"
    tree = json.loads(file.read_text())
    plain = open_source(name)[0].objects
    assert plain is not None
    assert plain.scores is not None
    assert plain.scores.tolist() == [0.25]
    for number, (box, score) in enumerate((([2, 2, 0, 8], 0.5), ([2, 2, 8, 8], 0.75)), start=8):
        tree["annotations"].append(tree["annotations"][0] | {"id": number, "bbox": box, "score": score})
    file.write_text(json.dumps(tree))
    source = open_source(name)
    found = source[0].objects
    assert found is not None
    assert found.scores is not None
    assert found.scores.tolist() == [0.25, 0.75]  # the second has no area
    digest = identity_of(source).digest
    tree["annotations"][0]["score"] = 0.3
    file.write_text(json.dumps(tree))
    assert identity_of(open_source(name)).digest != digest
    del tree["annotations"][0]["score"]
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"coco.json: 2 of 3 annotations have a score"):
        open_source(name)


def write(folder: Path, changes: dict, size: tuple = (30, 20), name: str = "a.png") -> str:
    (folder / "p").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "p" / "a.png")
    Image.new("RGB", (30, 20)).save(folder / "outside.png")
    tree = {
        "images": [{"id": 1, "file_name": name, "width": size[0], "height": size[1]}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 1, **GOOD, **changes}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "coco.json").write_text(json.dumps(tree))
    return f"coco:{folder / 'p'}?annotations={folder / 'coco.json'}"


def test_a_list_of_files_selects_images(tmp_path: Path):
    """Lists name images with more folders than the annotations do, such as that of COCO20k."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")
    tree = {
        "images": [
            {"id": k, "file_name": f"{name}.png", "width": 30, "height": 20} for k, name in enumerate("abc")
        ],
        "annotations": [{"id": 7 + k, "image_id": k, "category_id": 1, **GOOD} for k in range(3)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(tree))
    listed = tmp_path / "some.txt"
    listed.write_text("train2014/c.png\n\na.png\nc.png\n")
    spec = f"coco:{tmp_path}?annotations={tmp_path / 'coco.json'}&files={listed}"
    source = open_source(spec)
    assert [source[index].name for index in range(len(source))] == ["a.png", "c.png"]
    assert source[1].objects is not None
    listed.write_text("a.png\nd.png\n")
    with pytest.raises(DataError, match=r"some.txt: 1 of its names are of no annotated image, such as d.png"):
        open_source(spec)
    listed.write_text("")
    with pytest.raises(DataError, match=r"some.txt: names no image"):
        open_source(spec)
