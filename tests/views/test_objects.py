"""Object-aware boxes: the first good candidate, or the most visible; border, one-pixel, empty, whole."""

import numpy as np
import pytest
import torch
from torch import Tensor

from foveola.geometry import random_boxes
from foveola.views.objects import ObjectsConfig, object_boxes, object_patches

SCALE, RATIO = (0.1, 0.6), (3 / 4, 4 / 3)
VIEWS = 2


def generators(seed: int = 0) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)


def masks_of(*images: list[tuple[int, int, int, int]], size: int = 16) -> Tensor:
    """Rectangles in mask pixels, one a mask; [B, M, size, size]."""
    masks = torch.zeros(len(images), len(images[0]), size, size)
    for b, boxes in enumerate(images):
        for m, (x0, y0, x1, y1) in enumerate(boxes):
            masks[b, m, y0:y1, x0:x1] = 1
    return masks


def draw(
    masks: Tensor,
    config: ObjectsConfig,
    whole: Tensor | None = None,
    aspects: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    whole = torch.zeros(masks.shape[:2], dtype=torch.bool) if whole is None else whole
    aspects = torch.ones(len(masks)) if aspects is None else aspects
    return object_boxes(aspects, masks, whole, VIEWS, SCALE, RATIO, config, generators(seed))


def visible(mask: np.ndarray, box: list[float]) -> float:
    """Fraction of a mask inside a box, pixel by pixel."""
    size = mask.shape[0]
    x0, y0, x1, y1 = (side * size for side in box)
    total = 0.0
    for row, column in zip(*np.nonzero(mask), strict=True):
        high = max(0.0, min(y1, row + 1) - max(y0, row))
        wide = max(0.0, min(x1, column + 1) - max(x0, column))
        total += mask[row, column] * high * wide
    return total / max(mask.sum(), 1e-6)


def candidates(batch: int, config: ObjectsConfig, seed: int = 0) -> Tensor:
    """The boxes that were drawn, [B, V, T, 4]."""
    first, retries = generators(seed)
    aspects = torch.ones(batch)
    boxes = random_boxes(aspects, VIEWS, SCALE, RATIO, first)[:, :, None]
    more = random_boxes(aspects, VIEWS * (config.candidates - 1), SCALE, RATIO, retries)
    return torch.cat((boxes, more.view(batch, VIEWS, config.candidates - 1, 4)), dim=2)


@pytest.mark.parametrize("min_visible", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("objects", [1, 2])
def test_the_first_candidate_that_shows_enough_else_the_most_visible(min_visible: float, objects: int):
    rectangles = [(0, 0, 3, 4), (12, 2, 16, 16), (5, 5, 6, 6), (2, 3, 13, 14), (0, 15, 16, 16), (4, 4, 9, 12)]
    masks = masks_of(*([first, second][:objects] for first in rectangles for second in rectangles))
    config = ObjectsConfig(min_visible=min_visible, candidates=6)
    boxes, tries = draw(masks, config)
    drawn = candidates(len(masks), config)
    fallbacks = 0
    for b in range(len(masks)):
        for v in range(VIEWS):
            shares = [
                min(visible(mask, box) for mask in masks[b].double().numpy())
                for box in drawn[b, v].double().tolist()
            ]
            good = [share > 1e-6 and share >= min_visible - 2e-6 for share in shares]
            if any(good):
                assert tries[b, v] == good.index(True) + 1
                assert torch.equal(boxes[b, v], drawn[b, v, good.index(True)])
            else:
                fallbacks += 1
                assert tries[b, v] == 0
                chosen = [torch.equal(boxes[b, v], box) for box in drawn[b, v]].index(True)
                assert shares[chosen] == pytest.approx(max(shares), abs=1e-5)
    assert 0 < fallbacks < len(masks) * VIEWS


def test_no_more_than_the_allowed_draws():
    _, tries = draw(masks_of(*[[(0, 0, 1, 1)]] * 200), ObjectsConfig(candidates=20))
    assert tries.max() <= 20
    assert (tries > 1).any()
    boxes, tries = draw(masks_of([(0, 0, 1, 1)]), ObjectsConfig(candidates=1))
    assert set(tries.flatten().tolist()) <= {0, 1}
    assert torch.equal(boxes, random_boxes(torch.ones(1), VIEWS, SCALE, RATIO, generators()[0]))


@pytest.mark.parametrize(
    "rectangle", [(0, 0, 1, 1), (15, 15, 16, 16), (0, 7, 1, 8), (7, 7, 8, 8), (0, 0, 16, 1)], ids=str
)
def test_small_objects_and_those_at_the_border_are_held(rectangle: tuple[int, int, int, int]):
    masks = masks_of(*[[rectangle]] * 100)
    boxes, tries = draw(masks, ObjectsConfig(candidates=50))
    assert (tries > 0).float().mean() > 0.7  # a corner is the rarest place to be
    for b in range(100):
        for v in range(VIEWS):
            share = visible(masks[b, 0].numpy(), boxes[b, v].double().tolist())
            assert (share > 0) == bool(tries[b, v] > 0)


def test_faint_masks_count_by_share_not_by_area():
    """A pixel touched by an object may hold 1/255 only; the box that holds it holds all of the object."""
    faint = masks_of(*[[(7, 7, 8, 8)]] * 50) / 255
    full = masks_of(*[[(7, 7, 8, 8)]] * 50)
    config = ObjectsConfig(min_visible=1.0)
    assert torch.equal(draw(faint, config)[0], draw(full, config)[0])
    assert (draw(faint, config)[1] > 0).any()


def test_an_empty_mask_is_missed_and_takes_the_first_draw():
    boxes, tries = draw(torch.zeros(3, 1, 16, 16), ObjectsConfig())
    assert (tries == 0).all()
    assert torch.equal(boxes, candidates(3, ObjectsConfig())[:, :, 0])


def test_whole_images_are_cropped_as_without_objects():
    aspects = torch.tensor([0.2, 0.7, 1.0, 1.6, 4.0])
    masks = torch.ones(5, 2, 16, 16)
    for min_visible in (0.0, 1.0):
        config = ObjectsConfig(min_visible=min_visible)
        boxes, tries = draw(masks, config, torch.ones(5, 2, dtype=torch.bool), aspects)
        assert torch.equal(boxes, random_boxes(aspects, VIEWS, SCALE, RATIO, generators()[0]))
        assert (tries == 1).all()


def test_a_whole_object_beside_a_small_one_constrains_nothing():
    small = masks_of(*[[(3, 3, 5, 5)]] * 40)
    both = torch.cat((small, torch.ones_like(small)), dim=1)
    whole = torch.tensor([[False, True]]).expand(40, 2)
    alone, together = (
        draw(small, ObjectsConfig(min_visible=0.5)),
        draw(both, ObjectsConfig(min_visible=0.5), whole),
    )
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


def test_patches_of_an_object_by_the_formula_of_a_rectangle():
    """Columns floor(u0 / p) .. ceil(u1 / p) - 1, rows likewise, flips mirrored."""
    size, grid = 32, 7
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, size, (60, 2), generator=generator)
    ends = torch.minimum(corners + torch.randint(2, 20, (60, 2), generator=generator), torch.tensor(size))
    rectangles = [[(*map(int, c), *map(int, e))] for c, e in zip(corners, ends, strict=True)]
    masks = masks_of(*rectangles, size=size)
    boxes = random_boxes(torch.ones(60), 3, (0.1, 0.9), RATIO, generator)
    flips = torch.rand(60, 3, generator=generator) < 0.5
    ours = object_patches(masks, boxes, flips, (grid, grid), 1e-5).view(60, 3, grid, grid)
    edges = 0
    for b in range(60):
        left, top, right, bottom = (side / size for side in rectangles[b][0])
        for v in range(3):
            x0, y0, x1, y1 = boxes[b, v].double().tolist()
            u0, u1 = (left - x0) / (x1 - x0), (right - x0) / (x1 - x0)
            v0, v1 = (top - y0) / (y1 - y0), (bottom - y0) / (y1 - y0)
            if flips[b, v]:
                u0, u1 = 1 - u1, 1 - u0
            cells = [np.clip(side, 0, 1) * grid for side in (u0, u1, v0, v1)]
            if any(0 < abs(cell - round(cell)) < 1e-2 for cell in cells):
                edges += 1  # thinner than the least share that counts
                continue
            expected = np.zeros((grid, grid), dtype=bool)
            if cells[1] > cells[0] and cells[3] > cells[2]:
                rows = slice(int(np.floor(cells[2])), int(np.ceil(cells[3])))
                expected[rows, int(np.floor(cells[0])) : int(np.ceil(cells[1]))] = True
            assert (ours[b, v].numpy() == expected).all()
    assert edges < 30


def test_min_coverage_is_a_share_of_the_patch():
    masks = masks_of([(0, 0, 2, 16)])  # two of the four columns of pixels of the first patches
    full, no = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), torch.zeros(1, 1, dtype=torch.bool)
    assert object_patches(masks, full, no, (4, 4), 0.49).sum() == 4
    assert object_patches(masks, full, no, (4, 4), 0.51).sum() == 0
    flipped = object_patches(masks, full, ~no, (4, 4), 0.49).view(4, 4)
    assert flipped[:, 3].all()
    assert flipped.sum() == 4


def test_masks_on_local_views_alone_are_refused():
    with pytest.raises(ValueError, match="attention_local: needs attention=true"):
        ObjectsConfig(attention=False, attention_local=True)
