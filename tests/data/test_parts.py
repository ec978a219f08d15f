"""Tiles: pixels, objects, label maps, names, identity, halves; cuts of masks against slices of the whole."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveola.data.cut import cut_mask, cut_objects
from foveola.data.decode import decode
from foveola.data.identity import identity_of
from foveola.data.loader import Loader, LoaderConfig
from foveola.data.sample import DataError, Objects, full_mask
from foveola.data.sources import open_source
from foveola.data.survey import survey

RNG = np.random.default_rng(0)
LARGE = RNG.integers(0, 256, (150, 210, 3), dtype=np.uint8)
SMALL = RNG.integers(0, 256, (30, 70, 3), dtype=np.uint8)
MASK = np.kron(RNG.integers(0, 2, (15, 21)), np.ones((10, 10))).astype(bool)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, pixels in (("a/large.png", LARGE), ("b/small.png", SMALL)):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    return tmp_path / "images"


def test_tiles_cover_the_image_and_the_last_ones_end_at_its_border(folder: Path):
    source: Any = open_source(f"folder:{folder}?tiles=64&overlap=14")
    # 210: 0, 50, 100, 146; 150: 0, 50, 86; the small one is 70 wide and 30 tall: 0 and 6.
    assert source.image_names() == [source[k].name for k in range(len(source))]
    assert source.image_names() == [
        *(f"a/large.png#{x},{y}" for y in (0, 50, 86) for x in (0, 50, 100, 146)),
        *(f"b/small.png#{x},0" for x in (0, 6)),
    ]
    covered = np.zeros(LARGE.shape[:2], bool)
    for index in range(len(source)):
        image, page, (x0, y0, x1, y1) = source.part(index)
        assert page is None
        assert np.array_equal(decode(source[index].image), (LARGE, SMALL)[image][y0:y1, x0:x1])
        if not image:
            covered[y0:y1, x0:x1] = True
    assert covered.all()
    assert [source[k].label for k in (0, 11, 12)] == [0, 0, 1]
    again = pickle.loads(pickle.dumps(source))
    assert np.array_equal(decode(again[5].image), decode(source[5].image))
    loader = Loader(source, 4, 0, LoaderConfig(canvas=64, workers=0), with_objects=False)
    assert next(iter(loader)).images.shape == (4, 3, 64, 64)
    assert survey(source).copies == []


def test_limit_halves_and_identity_know_the_image(folder: Path):
    for seed in range(4):
        (folder / "a" / f"{seed}.png").write_bytes((folder / "a/large.png").read_bytes() + bytes([seed]))
    train: Any
    test: Any
    train, test = (
        open_source(f"folder:{folder}?tiles=64&holdout=0.4&split={half}") for half in ("train", "test")
    )
    files = [{name.partition("#")[0] for name in half.image_names()} for half in (train, test)]
    assert not files[0] & files[1]
    assert len(files[0] | files[1]) == 6
    assert not set(identity_of(train).contents) & set(identity_of(test).contents)
    few: Any = open_source(f"folder:{folder}?tiles=64&limit=5")
    assert len(few) == 5
    digests = {
        identity_of(open_source(f"folder:{folder}?tiles={t}")).digest
        for t in ("64", "64", "32", "64&limit=5")
    }
    assert len(digests) == 3
    chosen = np.array([1, 3])
    every: Any = open_source(f"folder:{folder}?tiles=64")
    assert np.array_equal(identity_of(every, chosen).contents, identity_of(every).contents[chosen])


def test_objects_and_annotations_of_tiles(folder: Path, tmp_path: Path):
    (tmp_path / "boxes.csv").write_text("large.png,10,20,110,60,cat\nlarge.png,200,140,205,150,dog\n")
    source: Any = open_source(f"folder:{folder}?boxes={tmp_path / 'boxes.csv'}&tiles=64")
    boxes: dict[str, Any] = {source[k].name: source[k].objects for k in range(len(source))}
    assert np.allclose(boxes["a/large.png#0,0"].boxes * 64, [[10, 20, 64, 60]])
    assert np.allclose(boxes["a/large.png#64,0"].boxes * 64, [[0, 20, 46, 60]])
    assert np.allclose(boxes["a/large.png#64,0"].areas, [46 * 40 / 64**2])
    assert np.allclose(boxes["a/large.png#146,86"].boxes * 64, [[54, 54, 59, 64]])
    assert boxes["a/large.png#128,0"] is None
    assert boxes["b/small.png#0,0"] is None
    found = {
        "images": [{"id": 1, "file_name": "a/large.png#64,0", "width": 64, "height": 64}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 16, 32, 16], "area": 512,
                         "iscrowd": 0, "segmentation": [[8, 16, 40, 16, 40, 32, 8, 32]]}],
        "categories": [{"id": 1, "name": "object"}],
    }  # fmt: skip
    (tmp_path / "parts.json").write_text(json.dumps(found))
    source: Any = open_source(f"folder:{folder}?annotations={tmp_path / 'parts.json'}&tiles=64")
    sample = source[1]
    assert sample.name == "a/large.png#64,0"
    assert np.allclose(sample.objects.boxes * 64, [[8, 16, 40, 32]])


def test_label_maps_of_tiles(folder: Path, tmp_path: Path):
    labels = {"a/large": MASK.astype(np.uint8), "b/small": np.ones((30, 70), np.uint8)}
    for name, array in labels.items():
        (tmp_path / "maps" / name).parent.mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / "maps" / f"{name}.png")
    source: Any = open_source(f"masks:{folder}?labels={tmp_path / 'maps'}&classes=2&tiles=64&overlap=14")
    for index in range(len(source)):
        image, _, (x0, y0, x1, y1) = source.part(index)
        assert np.array_equal(source.label_map(index), [*labels.values()][image][y0:y1, x0:x1])


def masks() -> dict[str, Any]:
    from pycocotools import mask as coco

    runs: Any = coco.encode(np.asfortranarray(MASK.astype(np.uint8)))
    flat = MASK.T.reshape(-1)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(np.int8)])))
    lengths = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    rings = [
        [12.3, 5.2, 180.9, 33.7, 90.1, 140.4],
        [150.5, 90.25, 205.75, 90.25, 205.75, 149.5, 150.5, 149.5],
    ]
    size = [150, 210]
    return {
        "pixels": MASK,
        "compressed runs": runs,
        "runs as text": {"size": size, "counts": runs["counts"].decode()},
        "runs": {"size": size, "counts": lengths},
        "polygons": {"size": size, "polygons": rings},
        "polygons beyond the border": {"size": size, "polygons": [[-20.3, -9.7, 230.2, 40.1, 60.4, 170.8]]},
    }


@pytest.mark.parametrize("kind", masks())
def test_a_cut_mask_is_a_slice_of_the_whole(kind):
    mask = masks()[kind]
    whole = full_mask(mask)
    for x0, y0, x1, y1 in (
        (0, 0, 210, 150),
        (0, 0, 64, 64),
        (100, 50, 164, 114),
        (146, 86, 210, 150),
        (3, 7, 4, 9),
    ):
        assert np.array_equal(cut_mask(mask, (x0, y0, x1, y1), (210, 150)), whole[y0:y1, x0:x1])


def test_objects_whose_mask_is_elsewhere_are_left_out():
    mask = np.zeros((150, 210), bool)
    mask[:10, :10] = mask[100:, 100:] = True
    objects = Objects.from_boxes(np.array([[0, 0, 1, 1.0]]), np.array([3]), [mask], np.array([mask.mean()]))
    assert cut_objects(objects, (20, 20, 84, 84), (210, 150)) is None
    kept: Any = cut_objects(objects, (64, 64, 128, 128), (210, 150))
    assert kept.areas[0] == np.float32(28 * 28 / 64**2)
    assert kept.labels.tolist() == [3]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("overlap=3", "overlap=3 needs tiles="),
        ("tissue=0.2", "tissue=0.2 needs tiles="),
        ("tiles=64&overlap=64", "overlap=64 needs to be less than tiles=64"),
        ("tiles=4", "at least 8 pixels a side"),
        ("tiles=64&tissue=0.1", "tissue= changes nothing"),
        ("level=1", "level= changes nothing"),
        ("mpp=0.5", "mpp= changes nothing"),
        ("every=3", "every= changes nothing"),
        ("pages=each", "no image is a TIFF of several pages"),
        ("tile=64", "did you mean tiles"),
    ],
)
def test_options_without_an_effect(folder: Path, options: str, why: str):
    with pytest.raises(DataError, match=why):
        open_source(f"folder:{folder}?{options}")


def test_a_file_that_cannot_be_read_is_one_bad_image(folder: Path):
    (folder / "a" / "bad.png").write_bytes((folder / "a/large.png").read_bytes()[:20])
    source: Any = open_source(f"folder:{folder}?tiles=64")
    assert source.image_names().count("a/bad.png") == 1
    assert survey(source).unreadable[0][0] == "a/bad.png"


def test_scenes_are_cut_too():
    source: Any = open_source("scenes:?size=100&count=3&tiles=64")
    whole: Any = open_source("scenes:?size=100&count=3")
    assert len(source) == 12
    assert np.array_equal(decode(source[7].image), decode(whole[1].image)[36:, 36:])
