"""Objects that are wrong on purpose: how wrong, and always in the same way."""

from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import ConfigError, build
from foveola.data.loader import Loader, LoaderConfig
from foveola.data.noise import NoiseConfig, make_noisy
from foveola.data.sample import BadImage, DataError, Objects, Sample
from foveola.data.scenes import Scenes
from foveola.training.recipe import resolve
from foveola.training.supply import with_data


class Marked:
    """Flat images; image i has two boxes, at a place and of a class that tell which one it is."""

    name, classes, has_objects = "marked:", None, True

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            raise BadImage("cannot be read")
        low = 0.3 + 0.1 * index / self.count
        boxes = np.array([[low, 0.4, low + 0.2, 0.6], [0.2, low, 0.8, low + 0.1]])
        found = Objects.from_boxes(boxes, np.array([index, index]), scores=np.float32([0.5, 0.25]))
        return Sample(np.full((8, 8, 3), index % 256, np.uint8), f"{index}", found)


SOURCE = Marked(2000)


@cache
def noise_of(**changes: Any) -> NoiseConfig:
    return build(NoiseConfig, changes)


def noisy(index: int, source: Any = SOURCE, seed: int = 0, **changes: Any) -> Objects | None:
    return make_noisy(source[index].objects, source, index, seed, noise_of(**changes))


def test_edges_move_by_a_share_of_the_side_uniformly_and_proportionally() -> None:
    moves = []
    for index in range(500):
        true = SOURCE[index].objects
        assert true is not None
        less, more = noisy(index, jitter=0.1), noisy(index, jitter=0.2)
        assert less is not None
        assert more is not None
        sides = np.tile(true.boxes[:, 2:] - true.boxes[:, :2], 2)
        moves.append((less.boxes - true.boxes) / sides)
        assert np.allclose(more.boxes - true.boxes, 2 * (less.boxes - true.boxes), atol=1e-6)
        size = less.boxes[:, 2:] - less.boxes[:, :2]
        assert np.allclose(less.areas, size.prod(1), rtol=1e-4)
        assert np.array_equal(less.labels, true.labels)
        assert np.array_equal(less.scores, true.scores)
    found = np.stack(moves)  # 1,000 boxes, 4 edges
    assert 0.099 < np.abs(found).max() <= 0.1 + 1e-5
    assert np.abs(found.mean(axis=(0, 1))).max() < 5 * 0.1 / np.sqrt(3 * 1000)
    assert np.allclose(found.std(axis=(0, 1)), 0.1 / np.sqrt(3), rtol=0.1)
    assert np.abs(np.corrcoef(found.reshape(-1, 4).T) - np.eye(4)).max() < 0.2


def test_masks_move_with_their_boxes_as_an_affine_map_of_another_library_moves_them() -> None:
    scenes = Scenes(size=48, count=12, objects=(2, 4))
    compared = 0
    for index in range(len(scenes)):
        true = scenes[index].objects
        assert true is not None
        assert true.masks is not None
        found = noisy(index, scenes, jitter=0.4)
        assert found is not None
        assert found.masks is not None
        assert len(found) == len(true)
        shift = 0.4 * np.random.default_rng([0, 3, 3, index]).uniform(-1, 1, (len(true), 4))
        for i in range(len(true)):
            old = true.boxes[i].astype(np.float64)
            new = old + shift[i] * np.tile(old[2:] - old[:2], 2)
            sx, sy = ((old[2 + a] - old[a]) / (new[2 + a] - new[a]) for a in (0, 1))
            h, w = true.masks[i].shape
            affine = (sx, 0, w * (old[0] - sx * new[0]), 0, sy, h * (old[1] - sy * new[1]))
            image = Image.fromarray(255 * true.masks[i].astype(np.uint8))
            want = np.asarray(image.transform((w, h), Image.Transform.AFFINE, affine)) > 0
            if not want.any():
                assert found.masks[i] is None
                continue
            assert (found.masks[i] != want).mean() < 0.002  # ties between two pixels
            assert found.areas[i] == pytest.approx(want.mean(), abs=0.002)
            assert np.allclose(found.boxes[i], new.clip(0, 1), atol=1e-6)
            compared += 1
    assert compared > 20


def test_how_often_objects_are_missing_replaced_and_made_up() -> None:
    gone = [noisy(i, missing=0.3) for i in range(600)]
    left = np.array([0 if each is None else len(each) for each in gone])
    assert abs((left == 0).mean() - 0.09) < 4 * np.sqrt(0.09 * 0.91 / 600)
    assert abs(left.mean() / 2 - 0.7) < 4 * np.sqrt(0.21 / 1200)

    boxes, replaced = [], 0
    for i in range(600):
        true, found = SOURCE[i].objects, noisy(i, random=0.5)
        assert true is not None
        assert found is not None
        assert found.labels is not None
        assert len(found) == 2
        other = found.labels == -1
        assert np.array_equal(found.boxes[~other], true.boxes[~other])
        boxes += [*found.boxes[other]]
        replaced += other.sum()
    assert abs(replaced / 1200 - 0.5) < 4 * np.sqrt(0.25 / 1200)
    x0, y0, x1, y1 = np.stack(boxes).T
    area, ratio = (x1 - x0) * (y1 - y0), (x1 - x0) / (y1 - y0)
    assert (x0 >= 0).all()
    assert (y1 <= 1).all()
    assert ratio.min() > 0.49
    assert ratio.max() < 2.01
    wanted = [0.05, 0.1625, 0.275, 0.3875, 0.5]
    assert np.allclose(np.quantile(area, [0, 0.25, 0.5, 0.75, 1]), wanted, atol=0.02)

    more = [noisy(i, spurious=1.5) for i in range(600)]
    added = np.array([len(each) - 2 for each in more if each is not None])
    assert abs(added.mean() - 1.5) < 4 * np.sqrt(1.5 / 600)
    assert abs(added.var() - 1.5) < 0.25
    for each in more:
        assert each is not None
        assert each.labels is not None
        assert each.scores is not None
        assert (each.labels[2:] == -1).all()
        assert set(each.scores.tolist()) <= {0.5, 0.25}


def test_swapped_objects_are_those_of_another_image_that_can_be_read() -> None:
    source = Marked(40, bad=tuple(range(0, 40, 3)))
    seen = set()
    for index in range(1, 40, 3):
        found = noisy(index, source, swapped=1)
        assert found is not None
        assert found.labels is not None
        other = int(found.labels[0])
        assert other != index
        assert other not in source.bad
        true = source[other].objects
        assert true is not None
        assert np.array_equal(found.boxes, true.boxes)
        seen.add(other)
    assert len(seen) > 5
    kept = sum(int(noisy(i, swapped=0.2).labels[0]) == i for i in range(2000))  # type: ignore[union-attr, index]
    assert abs(kept / 2000 - 0.8) < 4 * np.sqrt(0.16 / 2000)


def test_one_kind_of_noise_does_not_change_the_draws_of_another() -> None:
    for index in range(30):
        alone, both = noisy(index, jitter=0.1), noisy(index, jitter=0.1, spurious=2, missing=0.0)
        assert alone is not None
        assert both is not None
        assert np.array_equal(alone.boxes, both.boxes[:2])


def batches(steps: range, source: Any = None, **options: Any) -> list[Any]:
    noise = options.pop("noise", None)
    settings = {"canvas": 8, "mask_canvas": 16, "objects_per_image": 2, "choose": "largest", "workers": 0}
    config = build(LoaderConfig, settings | {"objects_noise": noise} | options.pop("config", {}))
    loader = Loader(source or Marked(12), 4, 7, config, with_objects=True, start_step=steps.start, **options)
    return [*islice(loader, len(steps))]


def by_image(found: list[Any]) -> dict[int, list[Any]]:
    seen: dict[int, list[Any]] = {}
    for batch in found:
        for row, index in enumerate(batch.indices.tolist()):
            seen.setdefault(index, []).append(batch.object_masks[row])
    return seen


NOISE = {"jitter": 0.3, "missing": 0.2, "spurious": 0.5, "swapped": 0.2, "random": 0.2}


def test_an_image_is_wrong_in_the_same_way_in_every_epoch_worker_and_process() -> None:
    one = by_image(batches(range(9), noise=NOISE))  # three epochs
    assert all(len(found) == 3 for found in one.values())
    assert all(torch.equal(found[0], other) for found in one.values() for other in found[1:])
    workers = by_image(batches(range(9), noise=NOISE, config={"workers": 2}))
    ranks = [by_image(batches(range(1), noise=NOISE, rank=rank, world_size=3)) for rank in range(3)]
    later = by_image(batches(range(6, 9), noise=NOISE))
    for index, found in one.items():
        assert torch.equal(workers[index][0], found[0])
        assert torch.equal(later[index][0], found[0])
        assert any(torch.equal(each[index][0], found[0]) for each in ranks if index in each)
    true = by_image(batches(range(3)))
    assert sum(not torch.equal(true[index][0], found[0]) for index, found in one.items()) > 8


def test_without_noise_nothing_changes() -> None:
    for off in ({}, {"jitter": 0}):
        for plain, other in zip(batches(range(4)), batches(range(4), noise=off), strict=True):
            assert all(map(torch.equal, plain.tensors(), other.tensors()))


def test_what_is_known_of_the_objects_that_are_drawn_comes_with_their_masks() -> None:
    for batch in batches(range(3), config={"objects_per_image": 3}):
        chosen = batch.chosen
        for row, image in enumerate(batch.indices.tolist()):
            true = Marked(12)[image].objects
            assert true is not None
            assert true.scores is not None
            assert sorted(chosen.which[row].tolist()) == sorted(np.resize(chosen.which[row][:2], 3).tolist())
            picked = chosen.which[row].numpy()
            assert np.array_equal(chosen.areas[row], true.areas[picked])
            assert np.array_equal(chosen.scores[row], true.scores[picked])


def test_mistakes_are_refused() -> None:
    class Bare(Marked):
        has_objects = False

    with pytest.raises(DataError, match=r"marked:: has no objects to make wrong: loader\.objects_noise=null"):
        batches(range(1), Bare(12), noise={"jitter": 0.1})
    with pytest.raises(ConfigError, match=r"objects_noise.*random_area: needs 0 < low <= high <= 1"):
        resolve("odis-small", ["loader.objects_noise={random: 1, random_area: [0.5, 0.1]}"])
    with pytest.raises(ConfigError, match=r"loader.objects_noise.* has no effect: objects are not used"):
        resolve("ibot-small", ["loader.objects_noise.jitter=0.1"])
    with pytest.raises(ConfigError, match=r"random_area has no effect: random=0, spurious=0"):
        resolve("odis-small", ["loader.objects_noise={jitter: 0.1, random_area: [0.1, 0.2]}"])


def test_weights_by_score_need_scores() -> None:
    small = {"model": {"width": 32, "heads": 2}, "loader": {"objects_per_image": 2}}
    config = resolve("odis-tiny-tinyimagenet", small | {"method": {"token": {"weight_by": "score"}}})
    assert with_data(config, Marked(12)).method == config.method
    with pytest.raises(ConfigError, match=r"weight_by=score: objects of scenes:.* have no scores"):
        with_data(config, Scenes(size=32, count=8, objects=(2, 3)))
    with pytest.raises(ConfigError, match=r"weight_by has no effect: one object of an image is drawn"):
        resolve("odis-tiny-tinyimagenet", ["method.token.weight_by=area"])
    with pytest.raises(ConfigError, match=r"weight_by=area: needs tokens of several objects"):
        resolve("ibot-tiny-tinyimagenet", ["method.token.weight_by=area"])
