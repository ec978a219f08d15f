import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import interpolate

from foveola.cli import main
from foveola.config import ConfigError, UserError, build
from foveola.data.sample import BadImage, Objects, Sample
from foveola.data.sources import open_source
from foveola.evaluation.compare import compare
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.features.cache import Feed, feeding
from foveola.evaluation.localisation import localisation
from foveola.evaluation.localisation.box_accuracy import (
    STEPS,
    best_iou,
    distinct,
    enlarge,
    overlaps,
    square_hits,
)
from foveola.evaluation.localisation.components import components, holes
from foveola.evaluation.localisation.localisation import Localisation, LocalisationConfig, locate, max_box_acc
from foveola.evaluation.localisation.score_maps import MapReader, choose_maps, first_component, learn_weights
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At
from foveola.evaluation.result import Result
from foveola.models.encoder import Encoder

IOUS = (0.3, 0.5, 0.7)
NONE = np.zeros((0, 4), np.int64)


def smooth(seed: int, side: int = 20, grid: int = 5) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return interpolate(torch.rand(1, 1, grid, grid), (side, side), mode="bicubic")[0, 0]


def boxes_of(binary: np.ndarray) -> tuple[list, list, list]:
    """Boxes of parts, of holes (half open), and the number of pixels of each part, by another library."""
    labels, _ = ndimage.label(binary, np.ones((3, 3)))
    places = ndimage.find_objects(labels)
    parts = [(x.start, y.start, x.stop, y.stop) for y, x in places]
    sizes = [int((labels == i + 1).sum()) for i in range(len(places))]
    empty, _ = ndimage.label(~binary)
    height, width = binary.shape
    inside = [
        (x.start, y.start, x.stop, y.stop)
        for y, x in ndimage.find_objects(empty)
        if x.start > 0 and y.start > 0 and x.stop < width and y.stop < height
    ]
    return parts, inside, sizes


def iou(a, b, one: float) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0]) + one
    h = min(a[3], b[3]) - max(a[1], b[1]) + one
    shared = max(w, 0.0) * max(h, 0.0)
    areas = [(x[2] - x[0] + one) * (x[3] - x[1] + one) for x in (a, b)]
    return shared / (sum(areas) - shared)


def brute_force(maps, boxes, thresholds, ious, side: int, official: bool) -> tuple:
    """(score, best, largest) by a loop over images, thresholds, boxes and IoU levels."""
    found = np.zeros((len(ious), len(thresholds)))
    largest_found = np.zeros(len(thresholds))
    for score, truth in zip(maps, boxes, strict=True):
        large = interpolate(score[None, None], (side, side), mode="bicubic")[0, 0].numpy()
        large = large - large.min()
        grey = (255 * (large / large.max() if large.max() > 0 else large)).astype(np.uint8)
        for t, threshold in enumerate(thresholds):
            parts, inside, sizes = boxes_of(grey > int(threshold * grey.max()))
            largest = [parts[int(np.argmax(sizes))]] if parts else [(0, 0, 0, 0)]
            every = parts or [(0, 0, 0, 0)]
            true = truth.astype(np.float64) * side
            if official:
                last, true = side - 1, np.trunc(true + 1e-4)
                every = every + [(a - 1, b - 1, c + 1, d + 1) for a, b, c, d in inside]
                every, largest = (
                    [(a, b, min(c, last), min(d, last)) for a, b, c, d in some] for some in (every, largest)
                )
            best = max(iou(p, g, float(official)) for p in every for g in true)
            for d, level in enumerate(ious):
                found[d, t] += best >= level
            largest_found[t] += max(iou(largest[0], g, float(official)) for g in true) >= 0.5
    shares = 100 * found.max(axis=1) / len(maps)
    return shares.mean(), shares, 100 * largest_found.max() / len(maps)


# -- components ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["noise", "smooth", "steps", "corner"])
def test_components_of_all_thresholds(kind) -> None:
    """Each part and hole of each of 255 thresholds, with its box and size, as by flood fills."""
    rng = np.random.default_rng(1)
    heights = {
        "noise": rng.random((17, 12)),
        "smooth": smooth(3, 24).numpy(),
        "steps": rng.integers(0, 4, (15, 19)) / 3,
        "corner": np.eye(6)[::-1] * np.arange(1, 7) / 6,
    }[kind].astype(np.float32)
    heights = (heights - heights.min()) / (heights.max() - heights.min())
    grey = (255 * heights).astype(np.uint8)
    parts, inner = components(heights, grey), holes(heights, grey)
    for level in range(255):
        expected, empty, sizes = boxes_of(grey > level)
        here = parts.levels == level
        found = [(*box, size) for box, size in zip(parts.boxes[here], parts.areas[here], strict=True)]
        assert sorted(found) == sorted((*b, s) for b, s in zip(expected, sizes, strict=True))
        assert sorted(map(tuple, inner.boxes[inner.levels == level])) == sorted(empty)


def test_maps_without_parts() -> None:
    flat = np.zeros((5, 5), np.float32)
    assert len(components(flat, flat.astype(np.uint8)).levels) == 0
    assert len(holes(flat, flat.astype(np.uint8)).levels) == 0
    full = components(flat + 1, np.full((5, 5), 255, np.uint8))
    assert full.levels.tolist() == list(range(255))
    assert (full.boxes == (0, 0, 5, 5)).all()
    assert (full.areas == 25).all()


# -- the measure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("official", [True, False])
def test_equals_brute_force(official) -> None:
    rng = np.random.default_rng(0)
    maps = torch.stack([smooth(i, 6, 4) for i in range(12)] + [torch.zeros(6, 6)])
    boxes = []
    for i in range(len(maps)):
        corners = rng.random((1 + i % 3, 2, 2))
        boxes.append(np.concatenate((corners.min(1), corners.max(1)), axis=1).astype(np.float32))
    thresholds = np.arange(0, 1, 0.04).tolist()
    found = max_box_acc(maps, boxes, thresholds, IOUS, side=20, official=official)
    score, best, largest = brute_force(maps, boxes, thresholds, IOUS, 20, official)
    assert found.score == pytest.approx(score, abs=1e-12)
    assert found.best == pytest.approx(best, abs=1e-12)
    assert found.largest == pytest.approx(largest, abs=1e-12)
    assert 0 < found.score < 100
    assert found.best[0] >= found.best[1] >= found.best[2]
    assert found.curves.shape == (3, len(distinct(thresholds)[0]))
    for level, (share, threshold) in enumerate(zip(found.best, found.chosen, strict=True)):
        alone = max_box_acc(maps, boxes, [threshold], IOUS[level : level + 1], side=20, official=official)
        assert alone.score == share


def overlaps_of(large: np.ndarray, truth: tuple, official: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Of a map of 224 pixels a side and one box in pixels."""
    heights, grey = enlarge(torch.from_numpy(large.astype(np.float32))[None])
    return overlaps(heights[0], grey[0], np.array([truth]) / 224, official)


def test_worked_by_hand() -> None:
    square = np.zeros((224, 224))
    square[100:150, 50:100] = 1
    # The box ends one too far: 50 x 50 pixels of 51 x 51.
    every, largest = overlaps_of(square, (50, 100, 99, 149))
    assert every == pytest.approx(np.full(255, 2500 / 2601))
    assert every[0] == pytest.approx(0.9612, abs=5e-5)
    assert (largest == every).all()
    assert overlaps_of(square, (50, 100, 100, 150), official=False)[0] == pytest.approx(np.ones(255))
    full = np.ones((224, 224))
    full[0, 0] = 0
    assert overlaps_of(full, (0, 0, 223, 223))[0] == pytest.approx(np.ones(255))
    assert overlaps_of(full, (0, 0, 224, 224), official=False)[0] == pytest.approx(np.ones(255))
    for constant in (0.0, 3.7):  # no part at any threshold
        noise = 1e-7 * constant * np.random.default_rng(0).random((224, 224))
        every, largest = overlaps_of(constant + noise, (0, 0, 199, 199))
        assert (every == 1 / 200**2).all()
        assert (largest == every).all()
        assert not overlaps_of(np.full((224, 224), constant), (0, 0, 199, 199), official=False)[0].any()


def test_rings_have_two_boxes_and_blobs_one_each() -> None:
    ring = np.zeros((224, 224))
    ring[10:30, 10:30] = 1
    ring[15:25, 15:25] = 0
    assert overlaps_of(ring, (10, 10, 30, 30))[0] == pytest.approx(np.ones(255))
    every, largest = overlaps_of(ring, (14, 14, 26, 26))
    assert every == pytest.approx(np.ones(255))  # the box around the hole
    assert largest == pytest.approx(np.full(255, 13**2 / 21**2))
    assert overlaps_of(ring, (14, 14, 26, 26), official=False)[0][0] == pytest.approx(12**2 / 20**2)
    blobs = np.zeros((224, 224))
    blobs[5:25, 5:35] = 1
    blobs[60:70, 80:90] = 1
    every, largest = overlaps_of(blobs, (80, 60, 90, 70))
    assert every == pytest.approx(np.ones(255))
    assert not largest.any()
    heights, grey = enlarge(torch.from_numpy(blobs.astype(np.float32))[None])
    both = np.array([(80, 60, 90, 70), (100, 100, 120, 120)]) / 224
    assert overlaps(heights[0], grey[0], both)[0] == pytest.approx(np.ones(255))  # any annotated box will do


def test_maps_of_the_filled_boxes_find_everything() -> None:
    rng = np.random.default_rng(2)
    maps, boxes = torch.zeros(40, 224, 224), []
    for score in maps:
        x0, y0 = rng.integers(0, 150, 2)
        x1, y1 = x0 + rng.integers(20, 74), y0 + rng.integers(20, 74)
        score[y0:y1, x0:x1] = 1
        boxes.append(np.array([[x0, y0, x1, y1]], np.float32) / 224)
    for official in (True, False):
        found = max_box_acc(maps, boxes, [0.0, 0.5], official=official)
        assert found.score == found.largest == 100
    assert max_box_acc(maps, boxes, [0.5], (0.9999,), official=False).score == 100
    assert max_box_acc(maps.mT, boxes, [0.5]).score < 90  # rows are y


def test_a_thousand_thresholds_are_255() -> None:
    levels, lowest = distinct(np.arange(0, 1, 0.001).tolist())
    assert levels.tolist() == list(range(255))
    assert lowest[:3] == (0.0, 0.004, 0.008)
    maps = torch.stack([smooth(i, 14) for i in range(6)])
    boxes = 6 * [np.array([[0.2, 0.3, 0.7, 0.8]])]
    fine = max_box_acc(maps, boxes)
    few = max_box_acc(maps, boxes, lowest)
    assert (fine.curves == few.curves).all()
    assert fine.chosen == few.chosen
    assert (max_box_acc(5 - 0.01 * maps, boxes).curves != fine.curves).any()
    assert (max_box_acc(5 + 8 * maps, boxes).curves == fine.curves).mean() > 0.9  # but for rounding


def test_centred_squares() -> None:
    """Against a direct computation: s pixels a side in the middle of 224, for each s = 4, 8, ..., 224."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        corners = rng.random((2, 2, 2))
        boxes = np.concatenate((corners.min(1), corners.max(1)), axis=1)
        hits = square_hits(boxes, IOUS, 224, True)
        assert hits.shape == (4, STEPS)
        for k in range(STEPS):
            start = (224 - 4 * (k + 1)) // 2
            end = min(start + 4 * (k + 1), 223)
            best = max(iou((start, start, end, end), g, 1.0) for g in np.trunc(boxes * 224))
            assert hits[:, k].tolist() == [best >= d for d in (*IOUS, 0.5)]
    half = np.array([[0.25, 0.25, 0.75, 0.75]])
    exact = square_hits(half, (1.0,), 224, False)[0]
    assert np.flatnonzero(exact).tolist() == [STEPS // 2 - 1]
    assert best_iou(np.array([[0, 0, 224, 224]]), half, 224, False).item() == 0.25
    assert len(best_iou(NONE, half, 224, True)) == 0


def test_locate() -> None:
    score = torch.zeros(14, 14)
    score[3:9, 5:7] = 1.0
    score[12, 12] = 2.0
    assert locate(score, 0.7, side=14) == pytest.approx(np.array([12, 12, 13, 13]) / 14)
    assert locate(score, 0.3, side=14) == pytest.approx(np.array([5, 3, 7, 9]) / 14)
    assert (locate(torch.ones(14, 14)) == 0).all()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="2 maps and boxes of 1"):
        max_box_acc(torch.rand(2, 4, 4), [np.zeros((1, 4))])
    with pytest.raises(ValueError, match="0 maps"):
        max_box_acc(torch.rand(0, 4, 4), [])
    for wrong in (
        {"maps": ["atention"]},
        {"maps": []},
        {"maps": ["pca", "pca"]},
        {"iou": [0.5, 0.501]},
        {"iou": [0.0]},
        {"interval": 0.9},
        {"holdout": 0.0},
    ):
        with pytest.raises(ConfigError):
            build(LocalisationConfig, wrong)


# -- maps ----------------------------------------------------------------------------------------------------


def explicit(encoder: Encoder, images: torch.Tensor, block: int) -> torch.Tensor:
    """The attention matrix of a block, float64, from its weights: a registerless ViT with a class token."""
    net = encoder.backbone
    x, tokens = net.prepare(encoder.normalise(images))
    for before in list(net.blocks)[:block]:
        x = before(x, tokens.objects, tokens.readable, tokens.rotation)
    attn = net.blocks[block].attn
    qkv = attn.qkv(net.blocks[block].norm1(x)).double().unflatten(2, (3, attn.heads, -1))
    query, key = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)


def test_maps_are_rows_of_the_attention(encoder) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    names = ("attention", "lowest_entropy", "head1", "centre", "pca")
    for block in (0, 1, 2, -1):
        found = MapReader(encoder, names, block, "fp32")(images)
        weights = explicit(encoder, images, block % 3)
        token = weights[:, :, 0, 1:]
        assert found.shape == (3, 5, 4, 6)
        assert found[:, 0].flatten(1) == pytest.approx(token.mean(dim=1), abs=1e-6)
        assert found[:, 2].flatten(1) == pytest.approx(token[:, 1], abs=1e-6)
        shares = token / token.sum(dim=2, keepdim=True)
        lowest = (shares * shares.log()).sum(dim=2).argmax(dim=1)
        assert found[:, 1].flatten(1) == pytest.approx(shares[range(3), lowest], abs=1e-6)
        assert found[:, 3].flatten(1) == pytest.approx(weights[:, :, 1 + 1 * 6 + 2, 1:].mean(1), abs=1e-6)
    patches = encoder(encoder.normalise(images)).patches
    assert found[:, 4].flatten(1) == pytest.approx(first_component(patches, (4, 6)), abs=1e-4)


def test_first_component() -> None:
    """The first singular vector; brighter inside than on the border; nothing where there is nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 49, 12, generator=generator)
    x[:3, 16:33] += 5 * torch.randn(3, 1, 12, generator=generator)
    x[3] = x[3, :1]
    found = first_component(x, (7, 7))
    assert not found[3].any()
    for score, each in zip(found[:3].numpy(), x[:3].double().numpy(), strict=True):
        u, s, _ = np.linalg.svd(each - each.mean(0), full_matrices=False)
        assert abs(score) == pytest.approx(abs(u[:, 0] * s[0]), abs=1e-4)
        square = score.reshape(7, 7)
        assert square[1:-1, 1:-1].mean() > score.mean() > (score.sum() - square[1:-1, 1:-1].sum()) / 24
    turned = first_component(3 + x @ torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q, (7, 7))
    assert turned[:3] == pytest.approx(found[:3], abs=1e-4)


def test_which_maps_an_encoder_has(encoder) -> None:
    assert choose_maps(encoder, None, False) == ("attention", "lowest_entropy", "centre")
    assert choose_maps(encoder, None, True) == ("attention", "lowest_entropy", "centre", "abmilp")
    assert choose_maps(encoder, ("heads", "head0", "pca"), False) == ("head0", "head1", "pca")
    config = encoder.config
    without = dataclasses.replace(
        config, pool="average", model=dataclasses.replace(config.model, class_token=False)
    )
    bare = Encoder(without)
    assert choose_maps(bare, None, False) == ("centre",)
    for some, names, message in (
        (bare, ("attention",), "a class token, which this encoder lacks"),
        (bare, ("head0",), "a class token, which this encoder lacks"),
        (encoder, ("head2",), "there is no head2; this encoder has head0 to head1"),
        (encoder, ("abmilp",), "give train="),
    ):
        with pytest.raises(UserError, match=message):
            choose_maps(some, names, False)
    with pytest.raises(UserError, match="block=3: this encoder has 3 blocks, 0 to 2"):
        MapReader(encoder, ("centre",), 3, "fp32")


# -- the protocol --------------------------------------------------------------------------------------------


class Bright(MapReader):
    """Lights up what is light, so that a white object on black is found by whoever has geometry right."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        light = torch.nn.functional.avg_pool2d(images.float().mean(dim=1), 4)
        return light[:, None].expand(-1, len(self.names), -1, -1).contiguous()


@pytest.fixture
def white_boxes(list_source):
    """Black images, wide and high, with one or two white boxes of which each is annotated."""
    samples = []
    for i in range(24):
        height, width = ((40, 80), (64, 32), (32, 32))[i % 3]
        rng = np.random.default_rng(i)
        image = np.zeros((height, width, 3), np.uint8)
        boxes = []
        for part in range(1 + i % 2):
            x0, y0 = (
                rng.integers(part * width // 2, width // 4 + part * width // 2),
                rng.integers(height // 2),
            )
            x1, y1 = x0 + width // 4, y0 + height // 3
            image[y0:y1, x0:x1] = 255
            boxes.append((x0 / width, y0 / height, x1 / width, y1 / height))
        array = np.array(boxes, np.float32)
        areas = (array[:, 2:] - array[:, :2]).prod(axis=1)
        samples.append(Sample(image, f"white-{i}", Objects(array, areas), i % 2))
    return list_source(samples, name="white:")


def run(encoder, source, **settings):
    config = LocalisationConfig(**{"workers": 0, "image_size": 32, **settings})
    return Localisation().measure(At(encoder, None, source, progress=False), config)


def test_who_sees_the_box_finds_it(encoder, white_boxes, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = run(encoder, white_boxes).metrics
    monkeypatch.setattr(localisation, "MapReader", Bright)
    outcome = run(encoder, white_boxes, maps=("attention",), holdout=0.4)
    metrics = outcome.metrics
    assert metrics["maxboxacc_30_attention"] == metrics["maxboxacc_50_attention"] == 100
    assert metrics["maxboxacc_v2_attention"] > 90 > 2 * metrics["maxboxacc_v2_centred_box"]
    assert metrics["boxacc_v2_attention"] > 80 > 2 * blind["maxboxacc_v2_attention"]
    facts = outcome.data["test"]
    assert (facts["images"], facts["rows"], facts["boxes"], facts["holdout"]) == (24, 24, 36, 9)
    assert facts["mean_box_area"] == pytest.approx(1 / 12, abs=0.01)
    fast = run(encoder, white_boxes, maps=("attention",), holdout=0.4, batch_size=5, workers=2)
    assert fast.metrics == metrics
    assert fast.chosen == outcome.chosen


def test_squares_and_hold_out_are_what_they_say(encoder, white_boxes, check_scores) -> None:
    outcome = run(encoder, white_boxes, holdout=0.25, iou=(0.3, 0.5))
    check_scores(outcome, Localisation.metrics)
    metrics, chosen = outcome.metrics, outcome.chosen
    hits = np.stack([square_hits(s.objects.boxes, (0.3, 0.5), 224, True) for s in white_boxes.samples])
    assert metrics["maxboxacc_v2_centred_box"] == pytest.approx(100 * hits[:, :2].mean(0).max(1).mean())
    assert metrics["maxboxacc_30_full_image"] == pytest.approx(100 * hits[:, 0, -1].mean())
    held = np.zeros(24, bool)
    held[np.random.default_rng(0).permutation(24)[:6]] = True
    best = hits[held, :2].mean(0).argmax(1)
    honest = [100 * hits[~held, d, best[d]].mean() for d in range(2)]
    assert metrics["boxacc_v2_centred_box"] == pytest.approx(np.mean(honest))
    assert chosen["centred_box"]["side_30_of_holdout"] == pytest.approx((best[0] + 1) / STEPS, abs=1e-4)
    for name in ("attention", "lowest_entropy", "centre", "centred_box"):
        low, score, high = (metrics[f"maxboxacc_v2_{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= score <= high
        assert score == pytest.approx((metrics[f"maxboxacc_30_{name}"] + metrics[f"maxboxacc_50_{name}"]) / 2)
        assert metrics[f"maxboxacc_v1_{name}"] <= metrics[f"maxboxacc_50_{name}"]
        assert set(chosen[name]) >= {f"{next(iter(chosen[name])).split('_')[0]}_30"}
    assert outcome.grid["attention"][0]["threshold"] == 0
    assert "published numbers" in run(encoder, white_boxes, official=False).notes[1]


def test_images_without_boxes_are_left_out(encoder, white_boxes, make_sample) -> None:
    expected = run(encoder, white_boxes, maps=("centre",)).metrics
    white_boxes.samples += [make_sample(i) for i in range(3)]
    outcome = run(encoder, white_boxes, maps=("centre",))
    assert outcome.metrics == expected
    assert outcome.data["test"]["without_boxes"] == 3
    assert outcome.data["test"]["images"] == 27
    white_boxes.samples = white_boxes.samples[-4:]
    with pytest.raises(UserError, match="1 of 4 images have a box; 2 are needed"):
        run(encoder, white_boxes)


def test_mistakes_are_said_in_a_line(encoder, list_source, make_sample, white_boxes) -> None:
    with pytest.raises(UserError, match="list: has no boxes"):
        run(encoder, list_source([make_sample(0), make_sample(1)]))
    with pytest.raises(UserError, match="image_size=30 is not a multiple of the patch size 8"):
        run(encoder, white_boxes, image_size=30)
    encoder.backbone.blocks[2].attn.qkv.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        run(encoder, white_boxes)


def test_bad_images_are_counted(encoder, white_boxes) -> None:
    class Broken(type(white_boxes)):
        def __getitem__(self, index):
            if index == 30:
                raise BadImage("damaged")
            return super().__getitem__(index)

    samples = [dataclasses.replace(white_boxes.samples[i % 24], name=str(i)) for i in range(120)]
    outcome = run(encoder, Broken(samples, "broken:"), maps=("centre",))
    assert outcome.data["test"]["unreadable"] == 1
    assert outcome.data["test"]["rows"] == 119


def test_built_in_scenes_by_the_command_line(encoder, tmp_path, capsys) -> None:
    encoder.save(tmp_path / "run" / "encoder")
    words = f"model={tmp_path / 'run'} test=scenes:?count=24 workers=0 seed=3".split()
    assert main(["evaluate", "localisation", *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("localisation: test scenes:")
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    result = json.loads((tmp_path / "run" / "results" / "localisation.json").read_text())
    assert float(lines["attention"][1]) == pytest.approx(
        result["metrics"]["maxboxacc_v2_attention"], abs=0.01
    )
    assert {"full_image", "centred_box", "centre", "lowest_entropy"} <= set(lines)
    assert main(["evaluate", "localisation", *words, "maps=[abmilp]"]) == 2
    assert "give train=" in capsys.readouterr().err


def test_weights_of_a_trained_abmilp(encoder) -> None:
    """Trained on labelled images, from stored patches; its map is the softmax of its linear score."""
    train, test = open_source("scenes:?count=30", "train"), open_source("scenes:?count=12", "test")
    settings = {"epochs": 2, "lr": (0.01, 0.3), "workers": 0, "limit": 20, "progress": False}
    result = evaluate(encoder, "localisation", train=train, test=test, **settings)
    assert result.data["train"]["fit"] == 18
    assert result.data["test"]["rows"] == 12
    assert result.chosen["abmilp"]["lr"] in (0.01, 0.3)
    assert 0 <= result.metrics["holdout_abmilp"] <= 100
    assert {"maxboxacc_v2_abmilp", "boxacc_v2_abmilp"} <= set(result.metrics)
    alone = evaluate(encoder, "localisation", train=train, test=test, maps=("abmilp",), **settings)
    assert alone.table().splitlines()[1].split()[:2] == ["localisation", "maxboxacc_v2"]
    with pytest.raises(UserError, match="test images are in train as well"):
        evaluate(encoder, "localisation", train=test, test=test, **settings)
    without = evaluate(encoder, "localisation", train=train, test=test, maps=("centre",), **settings)
    assert any("train is not used" in note for note in without.notes)
    with Feed(encoder, progress=False) as feed:
        config = feeding(LocalisationConfig(workers=0))
        learned = learn_weights(
            feed, train, config, torch.device("cpu"), lr=(3.0,), epochs=3, progress=False
        ).weights
    patches = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    patches[:, 4] = (patches[:, 0] + patches[:, 1]) / 2
    logs = learned(patches).log()
    assert logs.exp().sum(dim=1) == pytest.approx(torch.ones(2))
    assert logs[:, 4] == pytest.approx((logs[:, 0] + logs[:, 1]) / 2, abs=1e-5)  # a linear score
    assert (logs.amax(dim=1) - logs.amin(dim=1)).min() > 1e-3


def test_tables(tmp_path) -> None:
    """A line for each map, the rest below; side by side the better map is marked, an equal baseline not."""
    names = ("attention", "centred_box")
    metrics = {}
    for i, name in enumerate(names):
        metrics |= {f"maxboxacc_v2_{name}": 50.0 + i, f"maxboxacc_v2_{name}_low": 48.0}
        metrics |= {f"maxboxacc_v2_{name}_high": 53.0, f"maxboxacc_30_{name}": 70.25}
    data = {"test": {"name": "a:", "fingerprint": "1", "rows": 9}}
    first, other = (
        Result("localisation", {}, metrics | {"holdout_abmilp": 12.5}, data, "x", {}, "2026", 1.5)
        for _ in range(2)
    )
    other.metrics["maxboxacc_v2_attention"] = 51.5
    each = torch.linspace(0, 1, 90)
    for result, attention in ((first, each), (other, each + 0.015)):
        for name, values in (("attention", attention), ("centred_box", each)):
            result.scores[f"maxboxacc_v2_{name}"] = packed(values, torch.arange(90))
    lines = first.table().splitlines()
    assert lines[1].split() == ["localisation", "maxboxacc_v2", "maxboxacc_30"]
    assert lines[2].split() == ["attention", "50.00", "[48.00,", "53.00]", "70.25"]
    assert lines[4].split() == ["holdout_abmilp", "12.50"]
    first.save(tmp_path / "a")
    other.save(tmp_path / "b")
    rows = {
        line.split()[0]: line for line in compare([tmp_path / "a", tmp_path / "b"])[0].table().splitlines()
    }
    assert "51.50* [48.0, 53.0]" in rows["maxboxacc_v2_attention"]
    assert "*" not in rows["maxboxacc_v2_centred_box"]


def test_a_kept_probe_gives_the_map_of_its_training(encoder, tmp_path: Path) -> None:
    """That of an evaluation by `abmilp` with the same settings, without train=."""
    train, test = open_source("scenes:?count=20", "train"), open_source("scenes:?count=8", "test")
    shared = {"epochs": 3, "lr": (1.0,), "workers": 0, "progress": False}
    evaluate(
        encoder, "abmilp", train=train, test=test, out=tmp_path, fixed=(), depth=(1,), holdout=0, **shared
    )
    probe = str(tmp_path / "results" / "abmilp" / "probe.safetensors")
    learned = evaluate(encoder, "localisation", train=train, test=test, **shared)
    kept = {"test": test, "probe": probe, "workers": 0, "progress": False}
    found = evaluate(encoder, "localisation", **kept)
    assert found.metrics == pytest.approx(learned.metrics, abs=1e-6)
    other = evaluate(encoder, "localisation", train=train, test=test, **shared | {"lr": (0.01,)})
    assert any(value != pytest.approx(other.metrics[name]) for name, value in found.metrics.items())
    assert found.data["train"]["fingerprint"] == learned.data["train"]["fingerprint"]
    for change, message in (
        ({"lr": (1.0,)}, "lr: probe=.* is trained already, so it has no effect"),
        ({"maps": ("centre",)}, "probe: has no effect, as maps= has no abmilp"),
        ({"train": train}, "train"),
        ({"probe": str(tmp_path)}, "there is no such file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(encoder, "localisation", **kept | change)
