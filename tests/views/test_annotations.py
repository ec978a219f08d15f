"""Label maps and instances in views: they agree with pixels; what is cut off, crowds, many, none, purity."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from foveola.data.sample import IGNORE, Canvases, Instances, Objects
from foveola.views import annotations as annotations_file
from foveola.views.batch import Batch, Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.rescale import RescaleConfig

PLAIN = ColorConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1))
WINDOWS = ViewsConfig(
    global_size=32,
    global_count=100,
    local_count=0,
    color=PLAIN,
    rescale=RescaleConfig(range=(0.3, 2.5)),
)
SHAPES = [(40, 48), (48, 30), (24, 24), (33, 48), (48, 48), (20, 44), (48, 25), (31, 37), (45, 45), (29, 41)]


def ellipse(rows: int, columns: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A mask that fills its box as an ellipse does, whole pixels."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:rows, :columns] + 0.5
    return ((x - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((y - (y0 + y1) / 2) / (y1 - y0)) ** 2 < 0.25


def drawn(masks: list[list[np.ndarray]], mask_size: int = 32, crowds: tuple[int, ...] = ()) -> Canvases:
    """Images with instances: object k of an image is class k and bright in channel k; `crowds` are crowds."""
    images = torch.zeros(len(masks), 3, 48, 48, dtype=torch.uint8)
    maps = torch.full((len(masks), 48, 48), IGNORE, dtype=torch.uint8)
    extents, both = [], []
    for b, some in enumerate(masks):
        rows, columns = some[0].shape
        extents.append((rows, columns))
        maps[b, :rows, :columns] = 9
        for k, mask in enumerate(some):
            images[b, k, :rows, :columns] = torch.from_numpy(mask * np.uint8(255))
            maps[b, :rows, :columns][torch.from_numpy(mask)] = k
        parts = []
        for crowd in (False, True):
            chosen = [k for k in range(len(some)) if (k in crowds) == crowd and some[k].any()]
            parts.append(objects_of([some[k] for k in chosen], chosen) if chosen else None)
        both.append(tuple(parts))
    return Canvases(
        images=images,
        extents=torch.tensor(extents),
        aspects=torch.tensor([c / r for r, c in extents]),
        object_masks=torch.full((len(masks), 1, 8, 8), 255, dtype=torch.uint8),
        whole=torch.ones(len(masks), 1, dtype=torch.bool),
        object_labels=torch.full((len(masks), 1), -1),
        labels=torch.zeros(len(masks), dtype=torch.int64),
        indices=torch.arange(len(masks)),
        label_maps=maps,
        instances=Instances.of(both, mask_size),
    )


def objects_of(masks: list[np.ndarray], labels: list[int]) -> Objects:
    boxes = []
    for mask in masks:
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
    sides = np.array([masks[0].shape[1], masks[0].shape[0]] * 2)
    found = Objects.from_boxes(np.array(boxes) / sides, np.array(labels), masks)
    assert found is not None
    return found


def some_images() -> Canvases:
    """Ten images of three ellipses that do not meet, in a grid of halves; the third one is a crowd."""
    rng = np.random.default_rng(0)
    masks = []
    for rows, columns in SHAPES:
        middle = columns // 2, rows // 2
        corners = [(0, 0), (middle[0], 0), (0, middle[1])]
        some = []
        for x, y in corners:
            w, h = rng.integers(6, middle[0] - 1), rng.integers(6, middle[1] - 1)
            x0, y0 = x + rng.integers(0, middle[0] - w), y + rng.integers(0, middle[1] - h)
            some.append(ellipse(rows, columns, (x0, y0, x0 + w, y0 + h)))
        masks.append(some)
    return drawn(masks, crowds=(2,))


def eroded(mask: Tensor, by: int) -> Tensor:
    """Pixels all of whose neighbours within `by` are there and true."""
    padded = torch.nn.functional.pad(mask[None].float(), (by,) * 4)
    return -torch.nn.functional.max_pool2d(-padded, 2 * by + 1, 1)[0] > 0.5


def test_pixels_label_maps_masks_and_boxes_agree_in_a_thousand_views():
    """Within a pixel of every border in the image or of it, pixels and label maps are what the masks say."""
    canvases = some_images()
    large = make_views(canvases, WINDOWS, 8, Streams(0, 0)).large
    instances, maps = large.instances, large.label_maps
    assert instances is not None
    assert instances.masks is not None
    assert maps is not None
    pixels, maps = large.pixels.flatten(0, 1), maps.flatten(0, 1)
    inside = large.inside.flatten(0, 1)
    assert len(instances.view.unique()) > 700
    assert (instances.view.diff() >= 0).all()
    assert torch.equal(instances.crowd, instances.labels == 2)
    seen = torch.zeros(1000, 3, 32, 32, dtype=torch.bool)
    for view, label, mask, box in zip(
        instances.view, instances.labels, instances.masks.bool(), instances.boxes, strict=True
    ):
        seen[view, label] = mask
        x0, y0, x1, y1 = inside[view].tolist()
        outside = mask.clone()
        outside[y0:y1, x0:x1] = False
        assert not outside.any()
        ys, xs = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        around = torch.stack([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]).float()
        assert (box - around).abs().max() <= 1
        assert (box >= inside[view].float()[[0, 1, 0, 1]]).all()
        assert (box <= inside[view].float()[[2, 3, 2, 3]]).all()
    for view in range(1000):
        x0, y0, x1, y1 = inside[view].tolist()
        for k in range(3):
            mask = seen[view, k, y0:y1, x0:x1][None]
            sure, without = eroded(mask, 1), eroded(~mask, 2)
            labels, channel = maps[view, y0:y1, x0:x1][None], pixels[view, k, y0:y1, x0:x1][None]
            assert (labels[sure] == k).all()
            assert (labels[without] != k).all()
            assert (channel[sure] > 0.4).all()
            assert (channel[without] < 0.6).all()
    padding = torch.ones(1000, 32, 32, dtype=torch.bool)
    for view, (x0, y0, x1, y1) in enumerate(inside.tolist()):
        padding[view, y0:y1, x0:x1] = False
    assert padding.float().mean() > 0.05
    assert not pixels.amax(dim=1)[padding].any()
    assert (maps[padding] == IGNORE).all()
    assert (maps[~padding] != IGNORE).all()


def test_boxes_are_cut_boxes_and_what_has_no_pixel_is_gone():
    """Boxes without masks: the arithmetic of each, clipped to the image in the view; a loop in float64."""
    canvases = some_images()
    assert canvases.instances is not None
    canvases = replace(canvases, instances=canvases.instances._replace(masks=None))
    batch = make_views(canvases, WINDOWS, 8, Streams(0, 1))
    instances, inside = batch.large.instances, batch.large.inside.flatten(0, 1)
    assert instances is not None
    assert instances.masks is None
    boxes, flips = batch.large.boxes.flatten(0, 1).double().tolist(), batch.large.flips.flatten().tolist()
    expected = []
    for view, (box, flip) in enumerate(zip(boxes, flips, strict=True)):
        of_image = canvases.instances.image == view // 100  # type: ignore[union-attr]
        for n in of_image.nonzero()[:, 0].tolist():
            one = canvases.instances.boxes[n].double().tolist()  # type: ignore[union-attr]
            x0, x1 = ((x - box[0]) / (box[2] - box[0]) * 32 for x in (one[0], one[2]))
            y0, y1 = ((y - box[1]) / (box[3] - box[1]) * 32 for y in (one[1], one[3]))
            x0, x1 = (32 - x1, 32 - x0) if flip else (x0, x1)
            low, high = inside[view, :2].tolist(), inside[view, 2:].tolist()
            cut = [np.clip(x0, low[0], high[0]), np.clip(y0, low[1], high[1])]
            cut += [np.clip(x1, low[0], high[0]), np.clip(y1, low[1], high[1])]
            if cut[2] - cut[0] > 1e-4 and cut[3] - cut[1] > 1e-4:
                expected.append((view, int(canvases.instances.labels[n]), *cut))  # type: ignore[union-attr]
    found = [
        (v, k, *b)
        for v, k, b in zip(
            instances.view.tolist(), instances.labels.tolist(), instances.boxes.tolist(), strict=True
        )
        if b[2] - b[0] > 1e-4 and b[3] - b[1] > 1e-4
    ]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    pairs = 3000
    assert float(batch.facts["instances/lost"]) == pytest.approx(1 - len(instances.view) / pairs)
    assert batch.facts["instances/view"].item() == pytest.approx(len(instances.view) / 1000)


def one_view(canvases: Canvases, **changes: object) -> Batch:
    config = replace(WINDOWS, global_count=1, flip=0, rescale=RescaleConfig(range=(1.5, 1.5)))
    return make_views(canvases, replace(config, **changes), 8, Streams(0, 0))


def test_the_box_of_a_cut_mask_is_that_of_what_is_left():
    """An L of which the view shows the foot alone: its box is the foot's, not that of the whole height."""
    corner = np.zeros((48, 48), bool)
    corner[:, :4] = True
    corner[44:, :] = True
    batch = one_view(drawn([[corner]] * 30))
    instances, boxes = batch.large.instances, batch.large.boxes[:, 0]
    assert instances is not None
    right = (boxes[instances.view, 0] > 4 / 48 + 1 / 32) & (boxes[instances.view, 3] > 45 / 48)
    assert right.any()
    # 32 pixels show 2/3 of the image: one is 1/48 of it.
    foot = 44 - boxes[instances.view, 1] * 48
    assert (instances.boxes[right, 1] - foot[right]).abs().max() <= 1
    assert (instances.boxes[right, 3] == 32).logical_or(instances.boxes[right, 3] >= foot[right] + 3).all()


def test_images_without_instances_and_images_whose_every_object_is_cut_off():
    nothing = np.zeros((48, 48), bool)
    corner = nothing.copy()
    corner[:10, :10] = True
    none = one_view(drawn([[nothing], [nothing]])).large.instances
    assert none is not None
    assert none.masks is not None
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, 32, 32)
    some = one_view(drawn([[corner]] * 40))
    found = some.large.instances
    assert found is not None
    sees = (some.large.boxes[:, 0, :2] < 9.5 / 48).all(dim=1)
    assert 0 < sees.sum() < 40
    assert found.view.tolist() == sees.nonzero()[:, 0].tolist()
    gone = one_view(drawn([[corner]] * 2), rescale=RescaleConfig(range=(0.02, 0.02))).large.instances
    assert gone is not None
    assert not len(gone.view)  # of less than half a pixel


def test_boxes_at_the_border_end_there():
    whole = np.ones((48, 30), bool)
    for limits in ((0.4, 0.4), (1.0, 1.0)):
        batch = one_view(drawn([[whole]]), rescale=RescaleConfig(range=limits))
        found = batch.large.instances
        assert found is not None
        assert found.masks is not None
        inside = batch.large.inside[0, 0]
        assert torch.allclose(found.boxes[0], inside.float(), atol=1e-3)
        assert found.masks[0].sum() == (inside[2] - inside[0]) * (inside[3] - inside[1])


def test_three_hundred_instances_are_pasted_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    count = 300
    low = rng.random((2, count, 2)) * 0.9
    boxes = np.concatenate([low, low + 0.01 + rng.random((2, count, 2)) * 0.2], 2).clip(0, 1)
    nothing = np.zeros((48, 48), bool)
    both = [(Objects.from_boxes(each, np.arange(count)), None) for each in boxes]
    canvases = replace(drawn([[nothing]] * 2), instances=Instances.of(both, 8))
    whole = one_view(canvases).large.instances
    monkeypatch.setattr(annotations_file, "PASTED", 7 * 4 * 32**2)
    pasted = []
    plain = annotations_file.masks_in_views

    def counted(masks: Tensor, boxes: Tensor, views: Tensor, flips: Tensor, size: tuple[int, int]) -> Tensor:
        pasted.append(4 * len(masks) * size[0] * size[1])
        return plain(masks, boxes, views, flips, size)

    monkeypatch.setattr(annotations_file, "masks_in_views", counted)
    parts = one_view(canvases).large.instances
    assert whole is not None
    assert parts is not None
    assert len(pasted) > 10
    assert max(pasted) <= 7 * 4 * 32**2
    assert len(whole.view) > 200
    for one, other in zip(whole, parts, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_a_step_is_a_pure_function_of_seed_step_and_rank():
    canvases = some_images()
    config = replace(WINDOWS, global_count=2)
    first, again = (make_views(canvases, config, 8, Streams(3, 5, 1)).large for _ in range(2))
    assert first.instances is not None
    assert again.instances is not None
    assert torch.equal(first.pixels, again.pixels)
    assert torch.equal(first.label_maps, again.label_maps)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first.instances, again.instances, strict=True))  # type: ignore[arg-type]
    for other in (Streams(3, 5, 0), Streams(3, 6, 1), Streams(4, 5, 1)):
        assert not torch.equal(make_views(canvases, config, 8, other).large.boxes, first.boxes)


def test_annotations_change_no_pixel():
    canvases = some_images()
    bare = replace(canvases, label_maps=None, instances=None)
    config = ViewsConfig(global_size=32, local_size=16, local_count=2)
    for one, other in zip(
        *(vars(make_views(some, config, 8, Streams(0, 0))).values() for some in (canvases, bare)), strict=True
    ):
        if hasattr(one, "pixels"):
            assert torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.boxes, other.boxes)
            assert other.label_maps is None
            assert other.instances is None
            assert one.instances is not None
