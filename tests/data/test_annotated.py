"""What tasks learn from in batches: label maps and instances as the samples have them, crowds, bad maps."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import build
from foveola.data import loader as loader_file
from foveola.data.ahead import Asker
from foveola.data.identity import identity_of
from foveola.data.loader import Loader, LoaderConfig
from foveola.data.sample import (
    IGNORE,
    Canvases,
    DataError,
    Instances,
    Objects,
    Sample,
    full_mask,
    have_masks,
)
from foveola.data.scenes import Scenes
from foveola.data.segmentation import PixelSource
from foveola.data.sources import decode, open_source
from foveola.training.dryrun import try_images
from foveola.training.recipe import resolve

SCENES = "scenes:?size=40&count=24&background=class"


def loader(source: Any, annotations: Any, batch_size: int = 4, **options: Any) -> Loader:
    changes = {"canvas": 64, "mask_canvas": 16, "workers": 0} | options.pop("config", {})
    config = build(LoaderConfig, changes)
    return Loader(source, batch_size, 0, config, with_objects=False, annotations=annotations, **options)


def same(a: Canvases, b: Canvases) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


# -- label maps ---------------------------------------------------------------------------------------------


def test_label_maps_lie_on_their_canvases_as_images_do(tmp_path: Path):
    """An image that fits keeps its labels; of a longer side each cell has the label under its centre."""
    rng = np.random.default_rng(0)
    shapes = {"a": (20, 30), "b": (100, 12), "c": (9, 70)}
    for name, shape in shapes.items():
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        write_map(tmp_path, name, image, rng.integers(0, 5, shape, np.uint8))
    source = open_source(f"masks:{tmp_path / 'images'}?labels={tmp_path / 'labels'}&classes=5&absent=allow")
    assert isinstance(source, PixelSource)
    batch = next(iter(loader(source, "label_maps", 3)))
    assert batch.label_maps is not None
    assert batch.label_maps.shape == (3, 64, 64)
    for labels, index, (rows, columns) in zip(
        batch.label_maps, batch.indices.tolist(), batch.extents.tolist(), strict=True
    ):
        truth = source.label_map(index)
        height, width = truth.shape
        assert (rows, columns) == (min(height, 64), min(width, 64))
        for i in range(rows):
            for j in range(columns):
                assert labels[i, j] == truth[int((i + 0.5) * height / rows), int((j + 0.5) * width / columns)]
        assert (labels[rows:] == IGNORE).all()
        assert (labels[:, columns:] == IGNORE).all()


def write_map(folder: Path, name: str, image: np.ndarray, labels: np.ndarray, **exif: Any) -> None:
    for part, pixels in (("images", image), ("labels", labels)):
        (folder / part).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / part / f"{name}.png", **(exif if part == "images" else {}))


def test_label_maps_of_images_that_exif_turns(tmp_path: Path):
    labels = np.arange(600, dtype=np.uint8).reshape(20, 30) % 7
    image = np.repeat(labels[:, :, None] * 30, 3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = 6
    write_map(tmp_path, "a", image, labels, exif=exif)
    source = open_source(f"masks:{tmp_path / 'images'}?labels={tmp_path / 'labels'}&classes=7")
    batch = next(iter(loader(source, "label_maps", 1)))
    assert batch.label_maps is not None
    assert batch.extents.tolist() == [[30, 20]]
    assert torch.equal(batch.label_maps[0] * 30, batch.images[0, 0])


def test_bad_label_maps_are_bad_images_and_others_bring_their_own(tmp_path: Path):
    """Damaged, of another size, or with values of no class: replaced, counted, and named with the reason."""
    for number in range(12):
        image = np.full((16, 16, 3), 20 * number, np.uint8)
        labels = np.full((16, 16), number, np.uint8)
        if number == 3:
            labels = labels[:10]
        if number == 5:
            labels[2, 3] = 77
        write_map(tmp_path, f"{number:02}", image, labels)
    (tmp_path / "labels" / "07.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"class {k}" for k in range(12)))
    source = open_source(
        f"masks:{tmp_path / 'images'}?labels={tmp_path / 'labels'}&classes={names}&absent=allow"
    )
    made = loader(source, "label_maps", 12)
    batch = next(iter(made))
    assert batch.skipped == made.bad_count >= 3  # and those that were tried in their stead
    assert len(made.bad_names) == 3
    assert batch.label_maps is not None
    assert torch.equal(batch.label_maps.int() * 20, batch.images[:, 0].int())
    assert not set(batch.indices.tolist()) & {3, 5, 7}
    reasons = sorted(made.bad_names)
    assert "03.png (is 16x16 pixels, its label map 16x10)" in reasons[0]
    assert "05.png: holds the value 77, which is no class" in reasons[1]
    assert "07.png cannot be read" in reasons[2]
    said = try_images(source, "label_maps")
    assert said.startswith("9 of 12 images, spread evenly over 12; not: 03.png (is 16x16 pixels, its label")
    assert "holds the value 77" in said
    assert try_images(source) == "all of 12 images, spread evenly over 12"


# -- instances ----------------------------------------------------------------------------------------------


def test_instances_are_all_objects_with_masks_in_their_own_boxes():
    source = open_source(SCENES)
    batch = next(iter(loader(source, "instances", 6)))
    instances = batch.instances
    assert instances is not None
    assert instances.masks is not None
    assert batch.label_maps is None
    assert not instances.crowd.any()
    assert (instances.image.diff() >= 0).all()
    for row, index in enumerate(batch.indices.tolist()):
        objects = source[index].objects
        assert objects is not None
        assert objects.masks is not None
        part = instances.image == row
        np.testing.assert_array_equal(instances.boxes[part], objects.boxes)
        np.testing.assert_array_equal(instances.labels[part], objects.labels)
        for drawn, mask, box in zip(instances.masks[part], objects.masks, objects.boxes, strict=True):
            assert np.abs(drawn.numpy() / 255 - coverage(mask, box, 16)).max() < 0.51 / 255


def coverage(mask: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """The fraction of each cell of a box that the true pixels of a mask cover; a loop."""
    out = np.zeros((size, size))
    x0, y0, x1, y1 = scaled(box, mask.shape)
    down = [overlap(y0, y1, i, size, mask.shape[0]) for i in range(size)]
    across = [overlap(x0, x1, j, size, mask.shape[1]) for j in range(size)]
    for i in range(size):
        for j in range(size):
            out[i, j] = down[i] @ mask @ across[j]
    return out


def scaled(box: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return box.astype(np.float64) * [shape[1], shape[0], shape[1], shape[0]]


def overlap(low: float, high: float, i: int, size: int, pixels: int) -> np.ndarray:
    """The fraction of the i-th part of [low, high] in each pixel of an axis."""
    start, end = low + (high - low) * i / size, low + (high - low) * (i + 1) / size
    return np.array([max(0.0, min(end, k + 1) - max(start, k)) / (end - start) for k in range(pixels)])


@pytest.mark.parametrize("kind", ["array", "polygons", "rle"])
def test_masks_in_boxes_that_begin_between_pixels(kind: str):
    mask = np.zeros((20, 30), bool)
    mask[4:11, 6:17] = True
    mask[4:7, 6:9] = False
    held: Any = mask
    if kind == "polygons":
        held = {"size": [20, 30], "polygons": [[6, 7, 9, 7, 9, 4, 17, 4, 17, 11, 6, 11]]}
    if kind == "rle":
        flat = np.concatenate([[False], mask.ravel(order="F")])
        edges = np.flatnonzero(np.diff(flat))
        held = {"size": [20, 30], "counts": np.diff([0, *edges, mask.size]).tolist()}
    assert np.array_equal(full_mask(held), mask)
    box = np.array([[5.3 / 30, 3.1 / 20, 15.9 / 30, 11.4 / 20]])
    objects = Objects.from_boxes(box, None, [held])
    assert objects is not None
    drawn = objects.draw_in_box(0, 7)
    assert np.abs(drawn / 255 - coverage(mask, objects.boxes[0], 7)).max() < 0.51 / 255
    nothing = Objects.from_boxes(np.array([[0.7, 0.7, 0.9, 0.9]]), None, [held])
    assert nothing is not None
    assert (nothing.draw_in_box(0, 4) == 255).all()  # a mask without a pixel in its box


class Boxes:
    """Every third image has no object; there are no masks."""

    name, classes, has_objects = "boxes:", ("a", "b"), True

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Sample:
        boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]])
        objects = Objects.from_boxes(boxes) if index % 3 else None
        return Sample(np.full((8, 8, 3), index, np.uint8), f"number {index}", objects)


def test_images_without_annotation_are_empty_and_boxes_have_no_masks():
    batch = next(iter(loader(Boxes(), "instances", 9)))
    assert batch.instances is not None
    assert batch.instances.masks is None
    assert (batch.instances.labels == -1).all()
    counts = torch.bincount(batch.instances.image, minlength=9)
    assert torch.equal(counts, (batch.indices % 3 > 0) * 2)
    assert not have_masks(Boxes())
    assert have_masks(Scenes(size=32, count=3))
    empty = Instances.of([(None, None)] * 2, 8)
    assert empty.boxes.shape == (0, 4)
    assert empty.masks is not None
    assert empty.masks.shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ("labels", "has no classes of images"),
        ("label_maps", "has no label maps, classes of all pixels"),
        ("instances", "has no annotated objects"),
    ],
)
def test_a_source_without_what_a_task_learns_from_is_refused(annotations: str, message: str):
    class Bare(Boxes):
        classes, has_objects = None, False

    with pytest.raises(DataError, match=rf"boxes:: {message}; docs/data.md says which data strings"):
        loader(Bare(), annotations)


def test_the_size_of_masks_is_read_for_instances(monkeypatch: pytest.MonkeyPatch):
    config = resolve("dino-tiny-tinyimagenet")
    assert "loader.mask_canvas" in config.unread()
    monkeypatch.setattr(type(config.method), "annotations", "instances")
    assert config.unread().keys() >= {"loader.objects_per_image", "loader.choose"}
    assert "loader.mask_canvas" not in config.unread()


# -- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotations", ["label_maps", "instances"])
def test_workers_and_ranks_change_nothing(annotations: str):
    source = open_source(SCENES)
    alone = list(islice(loader(source, annotations), 4))
    helped = list(islice(loader(source, annotations, config={"workers": 2}), 4))
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    halves = [list(islice(loader(source, annotations, 2, rank=rank, world_size=2), 4)) for rank in range(2)]
    for whole, *parts in zip(alone, *halves, strict=True):
        assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
        if whole.label_maps is not None:
            maps = [part.label_maps for part in parts]
            assert torch.equal(whole.label_maps, torch.cat([m for m in maps if m is not None]))
        if whole.instances is not None:
            found = [part.instances for part in parts if part.instances is not None]
            assert torch.equal(whole.instances.boxes, torch.cat([each.boxes for each in found]))
            assert torch.equal(whole.instances.image, torch.cat([found[0].image, found[1].image + 2]))


def test_other_tensors_of_a_batch_do_not_depend_on_annotations():
    source = open_source(SCENES)
    plain = next(iter(loader(source, None)))
    assert plain.label_maps is None
    assert plain.instances is None
    for annotations in ("labels", "label_maps", "instances"):
        other = next(iter(loader(source, annotations)))
        assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), other.tensors(), strict=False))


def test_what_a_batch_weighs_and_where_it_goes(monkeypatch: pytest.MonkeyPatch):
    source = open_source(SCENES)
    plain = next(iter(loader(source, None)))
    maps, some = (next(iter(loader(source, kind))) for kind in ("label_maps", "instances"))
    assert maps.label_maps is not None
    assert some.instances is not None
    assert maps.nbytes == plain.nbytes + 4 * 40 * 40
    count = len(some.instances.image)
    assert some.nbytes == plain.nbytes + count * (8 + 16 + 8 + 1 + 16 * 16)
    moved = some.to("meta")
    assert moved.instances is not None
    assert all(x.device.type == "meta" or x is moved.aspects for x in moved.tensors())
    assert moved.aspects.device.type == "cpu"  # where boxes are drawn
    assert len([*moved.tensors()]) == len([*plain.tensors()]) + 5
    asked: list[int] = []

    def room(needed: int, workers: int, prefetch: int) -> tuple[int, int]:
        asked.append(needed)
        return workers, prefetch

    monkeypatch.setattr(loader_file, "room", room)
    for kind in (None, "label_maps", "instances"):
        next(iter(loader(source, kind, asker=Asker())))
    bare, mapped, full = asked[::2]  # it is asked twice each time
    assert mapped == bare + 4 * 64 * 64
    assert full == bare + 4 * loader_file.MANY_INSTANCES * 16 * 16


# -- crowds -------------------------------------------------------------------------------------------------


def coco(folder: Path, orientation: int = 1) -> str:
    """Three images of 30x20: an object and a crowd (RLE), a crowd alone, an object alone."""
    (folder / "p").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    for number in range(3):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[2:8, 4:24] = 255 - number
        Image.fromarray(pixels).save(folder / "p" / f"{number}.png", exif=exif)
    counts = [82, *[6, 14] * 19, 6, 132]  # columns of 20: rows 2 to 8 of columns 4 to 24
    region = {"size": [20, 30], "counts": counts}
    crowd = {"iscrowd": 1, "bbox": [4, 2, 20, 6], "area": 120, "segmentation": region}
    polygon = [6, 10, 14, 10, 14, 14, 6, 14]
    thing = {"iscrowd": 0, "bbox": [6, 10, 8, 4], "area": 32, "segmentation": [polygon]}
    tree = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in range(3)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, **what}
            for number, (image, category, what) in enumerate(
                [(0, 5, crowd), (0, 3, thing), (1, 3, crowd), (2, 5, thing)]
            )
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    (folder / "coco.json").write_text(json.dumps(tree))
    return f"coco:{folder / 'p'}?annotations={folder / 'coco.json'}"


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_crowds_of_coco_are_apart_from_objects(tmp_path: Path, orientation: int):
    """Crowds turn with their image as objects do; an image of a crowd alone has no object."""
    source = open_source(coco(tmp_path, orientation))
    samples = [source[index] for index in range(3)]
    assert [each.objects is not None for each in samples] == [True, False, True]
    assert [each.crowds is not None for each in samples] == [True, True, False]
    for sample, label in zip(samples[:2], (1, 0), strict=True):
        assert sample.crowds is not None
        assert sample.crowds.masks is not None
        assert sample.crowds.labels is not None
        assert sample.crowds.labels.tolist() == [label]
        white = decode(sample.image)[:, :, 0] > 127
        assert np.array_equal(full_mask(sample.crowds.masks[0]), white)
        x0, y0, x1, y1 = np.rint(scaled(sample.crowds.boxes[0], white.shape)).astype(int)
        assert white[y0:y1, x0:x1].all()
        assert white.sum() == (y1 - y0) * (x1 - x0)
    batch = next(iter(loader(source, "instances", 3)))
    assert batch.instances is not None
    found = {
        (int(batch.indices[row]), bool(crowd), int(label))
        for row, crowd, label in zip(*(batch.instances[k] for k in (0, 3, 2)), strict=True)
    }
    assert found == {(0, True, 1), (0, False, 0), (1, True, 0), (2, False, 1)}


def test_crowds_follow_their_images_into_parts(tmp_path: Path):
    text = coco(tmp_path)
    whole = open_source(text)
    for part in (open_source(f"{text}&limit=2"), open_source(f"{text}&holdout=0.5&split=test")):
        assert 0 < len(part) < 3
        for index in range(len(part)):
            sample = part[index]
            same_name = next(each for each in map(whole.__getitem__, range(3)) if each.name == sample.name)
            assert (sample.crowds is None) == (same_name.crowds is None)
            assert (sample.objects is None) == (same_name.objects is None)


def test_crowds_leave_the_identity_of_objects_as_it_was(tmp_path: Path):
    """Runs that began before crowds were read go on."""
    text = coco(tmp_path)
    before = identity_of(open_source(text)).digest
    path = tmp_path / "coco.json"
    tree = json.loads(path.read_text())
    tree["annotations"] = [each for each in tree["annotations"] if not each["iscrowd"]]
    path.write_text(json.dumps(tree))
    assert identity_of(open_source(text)).digest == before


def test_hostile_crowds_are_refused(tmp_path: Path):
    text = coco(tmp_path)
    path = tmp_path / "coco.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["segmentation"]["counts"] = [10**9]
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"annotation 0 of image 0: .*do not add up to the 600 pixels"):
        open_source(text)


# -- scenes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["class", "ignore"])
def test_scenes_with_a_class_for_every_pixel(background: str):
    plain = Scenes(size=40, count=5)
    source = open_source(f"scenes:?size=40&count=5&background={background}")
    assert isinstance(source, PixelSource)
    assert not isinstance(plain, PixelSource)
    assert source.name == f"{plain.name}&background={background}"
    first = 1 if background == "class" else 0
    assert source.classes == ("background",) * first + plain.classes
    for index in range(5):
        scene, sample, labels = plain.scene(index), source[index], source.label_map(index)
        assert np.array_equal(decode(sample.image), scene.image)
        assert sample.objects is not None
        assert sample.objects.labels is not None
        assert scene.objects.labels is not None
        assert source.classes[sample.label or 0] == plain.classes[plain[index].label or 0]
        assert (labels[scene.owner < 0] == (0 if background == "class" else IGNORE)).all()
        for k, (mask, label) in enumerate(zip(scene.objects.masks or (), sample.objects.labels, strict=True)):
            assert (labels[mask] == label).all()
            assert source.classes[label] == plain.classes[scene.objects.labels[k]]
    assert identity_of(source).digest != identity_of(plain).digest


def test_scenes_say_what_the_background_may_be():
    with pytest.raises(DataError, match="'background=sky' needs one of class, ignore"):
        open_source("scenes:?background=sky")
