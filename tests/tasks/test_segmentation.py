"""Segmentation as a task: its loss against loops, one process against two, what it learns, mistakes."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import foveola
from foveola.config import UserError, build, merge, to_dict
from foveola.data.sample import IGNORE, Canvases, Sample
from foveola.drawing.classes import palette
from foveola.schedules import Progress
from foveola.tasks.segmentation import Segmentation, inside_patches, summed_loss
from foveola.training.finetune import finetune
from foveola.training.recipe import RunConfig, nested, resolve
from foveola.views.batch import Streams, make_views

SCENES = "scenes:?size=32&count=32&objects=2-3&background=class"
TINY: dict[str, Any] = {
    "data": SCENES,
    "duration": "8 steps",
    "batch_size": 8,
    "device": "cpu",
    "init": None,
    "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 32, "drop_path": 0.1},
    "views": {"global_size": 32},
    "loader": {"canvas": 32, "workers": 0},
    "log_every": 1,
    "checkpoint_every": "3 steps",
    "keep": 10,
}


def tiny(**changes: Any) -> dict[str, Any]:
    return merge(TINY, nested(changes))


def test_loss_equals_a_loop_over_labelled_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=generator, requires_grad=True)
    maps = torch.randint(0, 4, (2, 5, 6), generator=generator).to(torch.uint8)
    maps[0, :3], maps[1, :, 5:] = IGNORE, IGNORE
    total, right, count = 0.0, 0, 0
    for b, y, x in np.ndindex(2, 5, 6):
        if maps[b, y, x] != IGNORE:
            one = logits[b, :, y, x].detach().double()
            total += float(one.logsumexp(0) - one[int(maps[b, y, x])])
            right += int(one.argmax()) == int(maps[b, y, x])
            count += 1
    found = summed_loss(logits, maps)
    assert [float(each.detach()) for each in found] == pytest.approx([total, right, count], rel=1e-5)
    assert count == 6 * 2 + 5 * 5
    found[0].backward()
    assert not logits.grad[0, :, :3].any()
    assert not logits.grad[1, :, :, 5:].any()


def test_a_batch_without_a_label_teaches_nothing():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss, right, count = summed_loss(logits, torch.full((1, 4, 4), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert (float(loss.detach()), int(right), int(count)) == (0, 0, 0)
    assert not logits.grad.any()


def test_patches_inside_equal_a_loop():
    boxes = torch.tensor([[0, 0, 12, 12], [0, 0, 5, 12], [3, 4, 9, 5], [0, 0, 0, 0], [8, 8, 12, 12]])
    found = inside_patches(boxes, (3, 3), 4)
    for box, row in zip(boxes.tolist(), found.view(-1, 3, 3), strict=True):
        x0, y0, x1, y1 = box
        for i, j in np.ndindex(3, 3):
            pixels = [(y, x) for y in range(4 * i, 4 * i + 4) for x in range(4 * j, 4 * j + 4)]
            assert bool(row[i, j]) == any(y0 <= y < y1 and x0 <= x < x1 for y, x in pixels), (box, i, j)


def method_of(**changes: Any) -> tuple[Segmentation, RunConfig]:
    config = build(RunConfig, merge(_plain(), nested({"method.classes": ["a", "b", "c"]} | changes)))
    torch.manual_seed(0)
    return Segmentation(config.method, config.model, config.views), config


def _plain() -> dict[str, Any]:
    return merge(to_dict(resolve("segment-small")), TINY | {"data": None})


def canvases(count: int = 3) -> Canvases:
    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.integers(0, 3, (count, 32, 24)).astype(np.uint8))
    maps[0, :9], maps[-1, :, :] = IGNORE, IGNORE
    return Canvases(
        images=torch.from_numpy(rng.integers(0, 256, (count, 3, 32, 24)).astype(np.uint8)),
        extents=torch.tensor([[32, 24]] * count),
        aspects=torch.tensor([24 / 32] * count),
        object_masks=torch.full((count, 1, 8, 8), 255, dtype=torch.uint8),
        whole=torch.ones(count, 1, dtype=torch.bool),
        object_labels=torch.full((count, 1), -1),
        labels=torch.full((count,), -1),
        indices=torch.arange(count),
        label_maps=maps,
    )


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_the_loss_of_a_step_is_that_of_its_views(decoder):
    """Against the decoder's logits enlarged and compared pixel by pixel; padding has no label."""
    method, config = method_of(**{"method.decoder.kind": decoder, "views.rescale.range": [0.5, 0.75]})
    method.eval()
    batch = make_views(canvases(), config.views, 4, Streams(0, 0))
    output = method(batch, Progress(0, 8, 4, 3))
    views, maps = batch.large.pixels[:, 0], batch.large.label_maps[:, 0]
    logits = method.task_head(method.backbone(views)).detach().double()
    field = interpolate(logits.mT.unflatten(2, (8, 8)), (32, 32), mode="bilinear", align_corners=False)
    losses = [
        float(field[b, :, y, x].logsumexp(0) - field[b, int(maps[b, y, x]), y, x])
        for b, y, x in np.ndindex(*maps.shape)
        if maps[b, y, x] != IGNORE
    ]
    assert 0 < len(losses) < maps.numel() / 2  # more than half of the views is padding or has no class
    assert output.losses["segmentation"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    right = (field.argmax(dim=1) == maps).sum().item() / len(losses)
    assert method.diagnose() == {"pixel_accuracy": pytest.approx(right)}
    assert method.diagnose() == {}


def test_a_figure_shows_views_labels_and_answers():
    """Tiles with white between them: the brightness of the view, under the colour of each pixel's class."""
    method, config = method_of(**{"views.rescale.range": [0.5, 0.75]})
    assert method.figures() == {}
    batch = make_views(canvases(5), config.views, 4, Streams(0, 0))
    method.eval()
    method(batch, Progress(0, 8, 4, 5))
    (name, sheet), *_ = method.figures().items()
    assert (name, sheet.shape) == ("segmentation", (3 * 36, 4 * 36, 3))
    views, maps = batch.large.pixels[:, 0], batch.large.label_maps[:, 0]
    logits = method.task_head(method.backbone(views)).detach().double()
    field = interpolate(logits.mT.unflatten(2, (8, 8)), (32, 32), mode="bilinear", align_corners=False)
    mean, std = (np.array(each)[:, None, None] for each in (config.views.color.mean, config.views.color.std))
    colors = palette(3).astype(float)
    for b in range(4):
        shown, truth, said = (sheet[36 * r + 2 : 36 * r + 34, 36 * b + 2 : 36 * b + 34] for r in range(3))
        wanted = np.clip(np.rint(255 * (views[b].numpy() * std + mean)), 0, 255).transpose(1, 2, 0)
        assert np.abs(shown.astype(float) - wanted).max() <= 1
        for y, x in np.ndindex(32, 32):
            light = 0.55 + 0.45 * shown[y, x].mean() / 255
            if maps[b, y, x] == IGNORE:
                assert not truth[y, x].any()
                assert not said[y, x].any()
            else:
                for tile, label in ((truth, maps[b, y, x]), (said, field[b, :, y, x].argmax())):
                    assert np.abs(tile[y, x] - light * colors[int(label)]).max() < 1
    assert (sheet[:2] == 255).all()


RANKS = """
import torch
from foveola import distributed
from foveola.schedules import Progress
from foveola.views.batch import Streams, make_views
import sys
sys.path.insert(0, "tests/tasks")
from test_segmentation import canvases, method_of
from dataclasses import fields, replace

distributed.start("cpu")
method, config = method_of(**{"method.decoder.batch_norm": True, "model.drop_path": 0.0})
batch = make_views(canvases(), config.views, 4, Streams(0, 0))
def part(rows):
    large = batch.large
    keys = ("pixels", "boxes", "flips", "positions", "label_maps")
    return replace(batch, large=replace(large, **{k: getattr(large, k)[rows] for k in keys}))
mine = part(slice(0, 1)) if distributed.rank() == 0 else part(slice(1, 3))
loss = method(mine, Progress(0, 8, 4, 3)).losses["segmentation"]
loss.backward()
ours = {n: distributed.all_reduce_mean(p.grad) for n, p in method.named_parameters() if p.grad is not None}
total = distributed.all_reduce_mean(loss.detach())
size, distributed.world_size = distributed.world_size, lambda: 1
whole, _ = method_of(**{"method.decoder.batch_norm": True, "model.drop_path": 0.0})
for p in whole.backbone.parameters():
    p.requires_grad_(False)
expected = whole(batch, Progress(0, 8, 4, 3)).losses["segmentation"]
expected.backward()
torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
found = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
assert len(found) == 4
for name, gradient in found.items():
    torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
distributed.world_size = size
print("same")
distributed.stop()
"""


def test_two_processes_learn_what_one_would(run_ranks):
    """One has a labelled third of a view, the other a whole one and one without any label."""
    assert run_ranks(RANKS, ranks=2) == ["same\n"] * 2


def test_a_frozen_encoder_stays_and_its_head_is_kept(tmp_path):
    asked = tiny(
        **{"method.decoder.batch_norm": True, "freeze": {"encoder": "all"}, "optimizer.layer_decay": 1.0}
    )
    run = finetune("segment-small", **asked, test="scenes:?size=32&count=4&background=class",
                   out=str(tmp_path / "run"), **{"evaluations.test.every": "8 steps",
                                                 "evaluations.test.settings.workers": 0})  # fmt: skip
    first, last = foveola.load(f"untrained:{run.folder}"), foveola.load(run.folder)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(value, last.backbone.state_dict()[name]), name
    assert last.head.decoder.norm.running_var.std() > 0
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3)).astype(np.uint8)
    found = last.predict(image)
    assert found.names[:3] == ("background", "t-shirt", "trousers")
    assert found.classes.shape == (37, 50)
    assert torch.equal(last.predict([image, image[:20]])[0].classes, found.classes)
    written = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line["test/miou"] for line in written if "test/miou" in line]
    assert len(measured) == 2
    test = {"test": "scenes:?size=32&count=4&background=class", "workers": 0, "progress": False}
    found = foveola.evaluate(run.folder, "segment", **test).metrics["miou"]
    assert found == pytest.approx(measured[-1], abs=1e-3)


class Painted:
    """Areas of flat colours with noise; a class is a colour. Void on one side."""

    name, classes, has_objects, notes = "painted:", ("red", "green", "blue"), False, ()

    def __init__(self, count: int = 16) -> None:
        rng, self.images, self.maps = np.random.default_rng(0), [], []
        for _ in range(count):
            labels = np.repeat(np.repeat(rng.integers(0, 3, (4, 6)), 8, 0), 8, 1).astype(np.uint8)
            colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[labels]
            self.images.append((colours + rng.integers(-40, 41, colours.shape)).clip(0, 255).astype(np.uint8))
            labels[:, 45:] = IGNORE
            self.maps.append(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], f"painted-{index}")

    def label_map(self, index: int) -> np.ndarray:
        return self.maps[index]


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_it_learns_sixteen_images(tmp_path, decoder):
    source = Painted()
    run = finetune(
        "segment-small", out=str(tmp_path / "run"),
        **merge(tiny(**{
            "duration": "60 steps", "batch_size": 8, "checkpoint_every": "60 steps", "log_every": 60,
            "method.decoder.kind": decoder, "views.rescale.range": [1.0, 1.5], "optimizer.lr.value": 3e-3,
            "views.color": {"jitter": 0.0}, "optimizer.layer_decay": 1.0, "model.drop_path": 0.0,
        }), {"data": source}),
    )  # fmt: skip
    found = foveola.evaluate(run.folder, "segment", test=source, workers=0, progress=False)
    assert found.metrics["miou"] > 95


# -- mistakes ------------------------------------------------------------------------------------------------


class OneClass(Painted):
    classes = ("red",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "scenes:?size=32&count=32"}, "no label for each pixel"),
        ({"data": OneClass()}, "has one class, 'red': there is nothing to tell apart"),
        ({"method.classes": ["cat", "dog"]}, r"method.classes is 2 classes \(cat, dog\), but data"),
        ({"method.look.window": 30}, "method.look.window=30 is not a multiple of the patch size 4"),
        ({"method.look.stride": 40, "method.look.window": 32}, "leaves gaps between windows"),
        ({"method.decoder.kind": "mask", "method.decoder.heads": 3}, "heads=3 does not divide the width 32"),
        ({"views.global_count": 2}, "looks at one view of an image, whole: set views.global_count=1"),
        ({"method.decoder.depth": 3}, "method.decoder.depth has no effect: kind=linear has no blocks"),
        ({"method.look.mode": "whole", "method.look.window": 32}, "mode=whole has no windows"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        finetune("segment-small", **merge(tiny(**changes), {}), out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_labels_beyond_the_classes_are_named(tmp_path):
    source = Painted()
    source.maps[3][:20] = 7
    with pytest.raises(UserError, match=r"painted-3.*its label map holds 7, which is none of 3 classes"):
        finetune("segment-small", **merge(tiny(), {"data": source}), out=str(tmp_path / "run"))
