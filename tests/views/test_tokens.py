"""Block masks: never above target, the realised share, their shape, tiny grids."""

import random

import numpy as np
import pytest
import torch

from foveola.views.tokens import (
    MaskingConfig,
    block_masks,
    draw_masks,
    random_masks,
    stratified_targets,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_capped_mask(target: float, size: int, least: int, most: int, rng: random.Random) -> np.ndarray:
    """One of DINOv2's masks, block by block: no block covers more than `most` patches."""
    mask = np.zeros((size, size), dtype=bool)
    while mask.sum() < target:
        room = min(target - mask.sum(), most)
        for _ in range(10):
            area = rng.uniform(least, room)
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if height < size and width < size:
                top, left = rng.randint(0, size - height), rng.randint(0, size - width)
                block = np.zeros_like(mask)
                block[top : top + height, left : left + width] = True
                if 0 < (block & ~mask).sum() <= room:
                    mask |= block
                    break
        else:
            break
    return mask


def naive_block_mask(ratio: float, size: int, rng: random.Random) -> np.ndarray:
    """One of iBOT's masks. Both ends of uniform() may be the larger one."""
    return naive_capped_mask(ratio * size * size, size, (size // 3) ** 2, size * size, rng)


def test_never_above_target_and_98_percent_of_it_realised():
    """iBOT's masks cover 0.297 of the patches where 0.303 was the aim."""
    ratios = 0.1 + 0.4 * torch.rand(4000, generator=seeded())
    masks = block_masks(ratios, (14, 14), seeded(1))
    counts = masks.sum(dim=1)
    assert (counts <= ratios * 196).all()
    assert (masks.float().mean() / ratios.mean()).item() == pytest.approx(0.297 / 0.303, abs=0.004)


def test_masks_are_distributed_as_the_naive_ones():
    rng = random.Random(0)
    ratios = 0.1 + 0.4 * torch.rand(800, generator=seeded())
    naive = np.stack([naive_block_mask(ratio, 14, rng) for ratio in ratios.tolist()])
    ours = block_masks(ratios, (14, 14), seeded(1)).view(-1, 14, 14).numpy()
    assert ours.mean() == pytest.approx(naive.mean(), abs=0.01)
    # How often each row and column is masked, and how compact masks are.
    for axis in (1, 2):
        assert np.abs(ours.mean(axis=(0, axis)) - naive.mean(axis=(0, axis))).max() < 0.05
    borders = [(np.diff(masks.astype(int), axis=1) != 0).sum() / masks.sum() for masks in (ours, naive)]
    assert borders[0] == pytest.approx(borders[1], rel=0.05)


def test_a_single_block_is_a_rectangle():
    # All the room in one block: area between 16 and 16.
    masks = block_masks(torch.full((200,), 16 / 196), (14, 14), seeded()).view(-1, 14, 14)
    found = 0
    for mask in masks:
        if mask.any():
            rows, columns = mask.any(dim=1), mask.any(dim=0)
            found += int(mask.sum() == rows.sum() * columns.sum())
    assert found > 100


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (2, 1), (1, 4), (4, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.99])
def test_tiny_grids(grid: tuple[int, int], ratio: float):
    masks = block_masks(torch.full((50,), ratio), grid, seeded())
    assert masks.shape == (50, grid[0] * grid[1])
    assert (masks.sum(dim=1) <= ratio * grid[0] * grid[1]).all()
    if grid == (3, 5) and ratio == 0.5:
        assert masks.any()


def test_ratio_zero_masks_nothing_and_no_mask_at_all_is_possible():
    assert not block_masks(torch.zeros(5), (14, 14), seeded()).any()
    assert block_masks(torch.zeros(0), (14, 14), seeded()).shape == (0, 196)


def test_half_of_the_views_are_masked_each_on_its_own():
    masks = draw_masks(MaskingConfig(), 1000, 2, (14, 14), seeded())
    masked = masks.any(-1)
    assert masked.float().mean().item() == pytest.approx(0.5, abs=0.035)
    both = (masked[:, 0] & masked[:, 1]).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.04)
    assert masks[masked].float().mean().item() == pytest.approx(0.297, abs=0.01)
    # Fractions of masked views fill the range.
    shares = masks[masked].float().mean(-1)
    assert shares.max() <= 0.5
    assert shares.max() > 0.45
    assert shares.min() < 0.13


def test_per_image_masks_all_views_of_a_image_or_none():
    masks = draw_masks(MaskingConfig(per_image=True), 300, 2, (14, 14), seeded())
    masked = masks.any(-1)
    assert torch.equal(masked[:, 0], masked[:, 1])
    assert masked.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(masks[:, 0], masks[:, 1])


def test_random_masks_have_exactly_their_share():
    ratios = torch.tensor([0.0, 0.1, 0.33, 0.5, 0.999])
    masks = random_masks(ratios.repeat(200), (5, 7), seeded())
    assert masks.sum(dim=1).tolist() == [int(r * 35) for r in ratios.tolist()] * 200
    # No patch is preferred.
    often = masks[3::5].float().mean(dim=0)
    assert (often - 17 / 35).abs().max() < 0.15
    drawn = draw_masks(
        MaskingConfig(shape="random", probability=1.0, ratio=(0.5, 0.5)), 10, 2, (4, 4), seeded()
    )
    assert (drawn.sum(-1) == 8).all()


# -- DINOv2: dealt out over a batch --------------------------------------------------------------------------

DINOV2 = MaskingConfig(stratified=True, smallest_block=4, largest_block=0.5)


@pytest.mark.parametrize(("images", "views"), [(64, 2), (5, 1), (7, 3), (1, 2), (1, 1), (2, 8)])
@pytest.mark.parametrize("probability", [0.5, 0.3, 1.0, 0.0])
def test_exactly_a_share_of_the_views_of_a_batch_is_masked(images: int, views: int, probability: float):
    config = MaskingConfig(
        stratified=True, probability=probability, ratio=(0.1, 0.5), smallest_block=4, largest_block=0.5
    )
    for seed in range(5):
        targets = stratified_targets(config, images * views, 196, seeded(seed))
        assert int((targets > 0).sum()) == int(probability * images * views)
        masks = draw_masks(config, images, views, (14, 14), seeded(seed))
        assert torch.equal(masks.any(-1).flatten(), targets > 0)
        assert (masks.sum(-1).flatten() <= targets).all()


def test_ratios_of_a_batch_are_one_from_each_interval():
    """Sorted, the i-th target lies in its n-th of [0.1, 0.5]: whole patches of a grid of 196."""
    config, counts = MaskingConfig(stratified=True), []
    for seed in range(200):
        targets = stratified_targets(config, 40, 196, seeded(seed)).sort().values
        assert not targets[:20].any()
        assert torch.equal(targets, targets.round())
        for i, target in enumerate(targets[20:].tolist()):
            low, high = (int(196 * (0.1 + 0.4 * j / 20)) for j in (i, i + 1))
            assert low <= target <= high
        counts.append(targets.sum().item())
    # Their number hardly varies from batch to batch, which is what this is for.
    assert np.mean(counts) == pytest.approx(20 * (0.3 * 196 - 0.5), rel=0.002)
    assert np.std(counts) < 8  # of independent ratios: 100


def test_masked_views_stand_anywhere_in_a_batch():
    masked = torch.stack(
        [stratified_targets(DINOV2, 12, 196, seeded(seed)) > 0 for seed in range(2000)]
    ).float()
    assert (masked.mean(dim=0) - 0.5).abs().max() < 0.05
    both = (masked[:, 0] * masked[:, 1]).mean().item()  # two views of an image
    assert both == pytest.approx(6 / 12 * 5 / 11, abs=0.03)


def test_blocks_of_dinov2_keep_their_limits_and_known_shares():
    """0.298 of masked views are masked, a corner 4.5 % of the time and the centre 51 %."""
    masks = torch.cat([draw_masks(DINOV2, 64, 2, (14, 14), seeded(seed)).flatten(0, 1) for seed in range(60)])
    masks = masks[masks.any(1)]
    assert len(masks) == 60 * 64
    assert masks.float().mean().item() == pytest.approx(0.298, abs=0.002)
    often = masks.float().mean(dim=0).view(14, 14)
    assert often[[0, 0, -1, -1], [0, -1, 0, -1]].mean().item() == pytest.approx(0.045, abs=0.006)
    assert often[6:8, 6:8].mean().item() == pytest.approx(0.51, abs=0.015)


@pytest.mark.parametrize(("least", "most"), [(4, 98), (4, 12), (1, 20), (30, 40)])
def test_limits_of_blocks_are_those_of_a_loop(least: int, most: int):
    rng = random.Random(0)
    naive = np.stack([naive_capped_mask(80, 14, least, most, rng) for _ in range(500)])
    ours = block_masks(torch.full((500,), 80.5 / 196), (14, 14), seeded(), least, most / 196)
    ours = ours.view(-1, 14, 14).numpy()
    assert ours.mean() == pytest.approx(naive.mean(), abs=0.012)
    borders = [(np.diff(masks.astype(int), axis=1) != 0).sum() / masks.sum() for masks in (ours, naive)]
    assert borders[0] == pytest.approx(borders[1], rel=0.06)


def test_no_block_adds_more_than_the_largest():
    one = block_masks(torch.full((300,), 0.99), (14, 14), seeded(), 4, 10 / 196)
    assert one.sum(dim=1).min() > 10  # several blocks
    # A mask that one block fills is that block.
    single = block_masks(torch.full((300,), 10.5 / 196), (14, 14), seeded(), 10, 10 / 196).view(-1, 14, 14)
    filled = [m for m in single if m.sum() >= 9]
    assert filled
    assert single.sum(dim=(1, 2)).max() <= 10


def test_random_patches_can_be_dealt_out_too():
    config = MaskingConfig(shape="random", stratified=True)
    masks = draw_masks(config, 20, 2, (7, 5), seeded())
    assert torch.equal(masks.sum(-1).flatten(), stratified_targets(config, 40, 35, seeded()).long())


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", ["block", "random"])
def test_other_ways_to_draw_do_not_move_the_streams_of_plain_masks(shape: str, per_image: bool):
    """A coin for each view (or image), a ratio for each view, then the masks: in this order, no more."""
    config = MaskingConfig(shape=shape, per_image=per_image)
    generator, own = seeded(3), seeded(3)
    for grid in ((14, 14), (8, 8), (3, 5)):
        coin = torch.rand(20, 1 if per_image else 2, generator=own).expand(20, 2)
        ratios = 0.1 + 0.4 * torch.rand(20, 2, generator=own)
        ratios = (ratios * (coin < 0.5)).flatten()
        expected = (block_masks if shape == "block" else random_masks)(ratios, grid, own)
        assert torch.equal(draw_masks(config, 20, 2, grid, generator).flatten(0, 1), expected)
        assert torch.equal(generator.get_state(), own.get_state())


def test_stratified_masks_are_not_drawn_per_image():
    with pytest.raises(ValueError, match=r"stratified .*per_image=false"):
        MaskingConfig(stratified=True, per_image=True)


def test_probability_one_and_zero():
    assert draw_masks(MaskingConfig(probability=1.0), 50, 2, (14, 14), seeded()).any(-1).all()
    assert not draw_masks(MaskingConfig(probability=0.0), 50, 2, (14, 14), seeded()).any()


@pytest.mark.parametrize("ratio", [(0.5, 0.1), (-0.1, 0.5), (0.1, 1.0)])
def test_impossible_shares_are_refused(ratio: tuple[float, float]):
    with pytest.raises(ValueError, match="ratio"):
        MaskingConfig(ratio=ratio)
