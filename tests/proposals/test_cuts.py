"""Cuts of features against the published algorithms, written again with scipy in float64."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.linalg import eigh
from torch import Tensor

from foveola.proposals.cuts import (
    affinity,
    brightest,
    centred,
    connected,
    corners,
    lost,
    maskcut,
    objectness,
    separation,
    tokencut,
)

GRID = (9, 12)


def scenes(count: int = 6, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    """Features of images with two blobs on a ground, and noise that makes some edges wrong."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    images = []
    for _ in range(count):
        kinds = torch.randn(3, 16, generator=random)
        place = torch.zeros(grid, dtype=torch.int64)
        for kind in (1, 2):
            y, x = (torch.rand(2, generator=random) * torch.tensor(grid)).tolist()
            place[((rows - y) ** 2 + (columns - x) ** 2) < 4 + 4 * kind] = kind
        images.append(kinds[place.flatten()] + 0.7 * torch.randn(place.numel(), 16, generator=random))
    return torch.stack(images)


def dense_cut(x: np.ndarray, tau: float) -> np.ndarray:
    """The second smallest generalised eigenvector, positive where its absolute value is largest."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    weights = np.where(x @ x.T > tau, 1.0, 1e-5)
    degrees = np.diag(weights.sum(axis=1))
    vector = eigh(degrees - weights, degrees, subset_by_index=[1, 1])[1][:, 0]
    return vector * np.sign(vector[np.abs(vector).argmax()])


def part(mask: np.ndarray, seed: int) -> np.ndarray:
    labels = ndimage.label(mask.reshape(GRID))[0].ravel()
    return labels == labels[seed]


def naive_maskcut(x: np.ndarray, tau: float, objects: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    hidden = np.zeros(len(x), bool)
    while len(found) < objects:
        vector = dense_cut(np.where(hidden[:, None], 0, x), tau)
        front = vector > vector.mean()
        if front.reshape(GRID)[[0, 0, -1, -1], [0, -1, 0, -1]].sum() >= 3:
            vector, front = -vector, ~front
        mask = part(front, int(vector.argmax()))
        new = mask & ~hidden
        if found and ((mask & found[-1]).sum() / (mask | found[-1]).sum() > 0.5 or new.mean() <= 0.01):
            break
        found.append(new)
        hidden |= new
    return found


def test_tokencut_is_the_published_cut():
    features = scenes(12)
    found = tokencut(features, GRID)
    assert found.masks.shape == (12, 1, 108)
    for x, mask in zip(features.double().numpy(), found.masks[:, 0].numpy(), strict=True):
        vector = dense_cut(x, 0.2)
        np.testing.assert_array_equal(mask, part(vector > vector.mean(), int(vector.argmax())))


def test_maskcut_is_the_published_cut_and_its_objects_never_overlap():
    features = scenes(16)
    found = maskcut(features, GRID)
    numbers = set()
    for x, masks in zip(features.double().numpy(), found.masks.numpy(), strict=True):
        expected = naive_maskcut(x, 0.15, 3)
        numbers.add(len(expected))
        np.testing.assert_array_equal(masks[: len(expected)], expected)
        assert not masks[len(expected) :].any()
        assert masks.sum(axis=0).max() == 1
    assert len(numbers) > 1, "images of different numbers of objects are wanted here"


def test_a_side_with_three_corners_is_background_to_maskcut():
    """A thin ground around a large object: by its values the ground would be the object."""
    field = torch.ones(GRID, dtype=torch.bool)
    field[1:-1, 1:-1] = False
    features = torch.where(field.flatten()[:, None], torch.tensor([1.0, 0]), torch.tensor([0, 1.0]))[None]
    vector = dense_cut(features[0].double().numpy(), 0.15)
    np.testing.assert_array_equal(vector > vector.mean(), field.flatten())  # here are the corners
    assert torch.equal(tokencut(features, GRID).masks[0, 0], field.flatten())
    assert torch.equal(maskcut(features, GRID).masks[0, 0], ~field.flatten())


def naive_lost(x: np.ndarray, k: int) -> np.ndarray:
    product = x @ x.T
    degrees = [sum(product[i, j] > 0 for j in range(len(x)) if j != i) for i in range(len(x))]
    order = sorted(range(len(x)), key=lambda i: degrees[i])
    voters = [i for i in order[:k] if product[order[0], i] > 0]
    return part(sum(product[i] for i in voters) > 0, order[0])


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_lost_is_the_published_expansion(k: int):
    features = scenes(8)
    found = lost(features, GRID, k).masks[:, 0].numpy()
    for x, mask in zip(features.double().numpy(), found, strict=True):
        expected = naive_lost(x, k)
        np.testing.assert_array_equal(mask, expected & ~expected.all())


def test_the_brightest_patches_by_hand():
    maps = torch.tensor([[6.0, 1, 5, 5], [1, 1, 1, 1], [0, 0, 1, 0], [4, 4, 4, 8]])
    features = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    # 6, 5 and 5 make 94 % of 17, so that 6 and 5 would not do for 0.7; on a grid of 1 x 4 the last two hang
    # together. Three quarters of 20 are 8 and 4 and 4, the last of equals.
    found = brightest(maps, features, (1, 4), 0.7).masks[:, 0]
    assert found.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 1]]
    found = brightest(maps, features, (2, 2), 0.7).masks[0, 0]
    assert found.int().tolist() == [1, 0, 1, 1]


def test_parts_of_masks_are_scipys():
    random = torch.Generator().manual_seed(0)
    masks = torch.rand(20, 13, 17, generator=random) < 0.6
    snake = torch.zeros(13, 17, dtype=torch.bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    masks[0] = snake
    for mask, labels in zip(masks.numpy(), connected(masks).numpy(), strict=True):
        expected, count = ndimage.label(mask)
        firsts = [np.flatnonzero(expected.ravel() == i)[0] for i in range(1, count + 1)]
        np.testing.assert_array_equal(labels, np.array([13 * 17, *firsts])[expected])


def test_separation_is_the_mean_over_pairs():
    features, masks = scenes(2), torch.rand(2, 3, 108, generator=torch.Generator().manual_seed(1)) < 0.3
    masks[1, 2] = False
    found = separation(features, masks)
    x = torch.nn.functional.normalize(features.double(), dim=2)
    for image in range(2):
        for index in range(3):
            own, other = x[image][masks[image, index]], x[image][~masks[image, index]]
            pairs = [(a @ b).item() for a in own for b in own]
            apart = [(a @ b).item() for a in own for b in other]
            expected = np.mean(pairs) - np.mean(apart) if len(own) else 0
            assert found[image, index].item() == pytest.approx(expected, abs=1e-6)


def test_objectness_by_hand():
    """An object of 2 x 2 patches of 3 x 4 that are alike, in a corner and so on 3 of the border's 10."""
    field = torch.zeros(3, 4, dtype=torch.bool)
    field[:2, :2] = True
    features = torch.where(field.flatten()[:, None], torch.tensor([1.0, 0]), torch.tensor([-0.6, 0.8]))[None]
    mask = field.flatten()[None, None]
    assert separation(features, mask).item() == pytest.approx(1.6)
    assert objectness(features, mask, (3, 4)).item() == pytest.approx(0.8 * 7 / 10)
    assert objectness(features, ~mask & mask, (3, 4)).item() == 0
    alike = torch.tensor([[[1.0, 0], [-1, 0], [1, 0], [1, 0]]])  # the mask's are less alike than to the rest
    assert objectness(alike, torch.tensor([[[True, True, False, False]]]), (2, 2)).item() == 0


def test_centred_features_have_no_mean_and_constant_ones_are_zero():
    features = scenes(2) + 100
    found = centred(features)
    torch.testing.assert_close(
        found.double(), features.double() - features.double().mean(1, True), atol=1e-4, rtol=0
    )
    constant = torch.full((1, 108, 16), 0.1) * torch.linspace(0.3, 7, 16)
    assert not centred(constant).any()
    for cut in (tokencut, maskcut, lost):
        assert not cut(centred(constant), GRID).masks.any()


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 4), (12, 12)])
def test_where_all_patches_are_the_same_there_is_no_object(grid: tuple[int, int]):
    count = grid[0] * grid[1]
    for value in (0.0, 1.0):
        features = torch.full((2, count, 8), value)
        for found in (
            tokencut(features, grid),
            maskcut(features, grid),
            lost(features, grid),
            brightest(features[..., 0] + 1, features, grid),
        ):
            assert not found.masks.any()
            assert not found.scores.any()


def test_an_object_of_one_patch_is_one():
    features = torch.tensor([1.0, 0]).repeat(1, 108, 1)
    features[0, 50] = torch.tensor([0, 1.0])
    for found in (tokencut(features, GRID), maskcut(features, GRID)):
        assert found.masks[0, 0].nonzero().flatten().tolist() == [50]
        assert found.scores[0, 0] == 0.5  # half of 1 - 0, away from the border
        assert found.masks[0, 1:].sum() == 0
    assert lost(features - torch.tensor([0.5, 0.5]), GRID).masks[0, 0].nonzero().flatten().tolist() == [50]


def test_the_others_of_a_batch_change_nothing_and_results_come_again():
    features = scenes(8)
    together = maskcut(features, GRID)
    assert torch.equal(together.masks, maskcut(features, GRID).masks)
    for index in range(8):
        alone = maskcut(features[index : index + 1], GRID)
        assert torch.equal(together.masks[index], alone.masks[0])
        torch.testing.assert_close(together.scores[index], alone.scores[0])


def test_graphs_and_corners_by_hand():
    features = torch.tensor([[[2.0, 0], [3, 1], [0, 5]]])
    one, none = 1.0, 1e-5  # cosines 0.95, 0, 0.32
    assert affinity(features, 0.3)[0].tolist() == [
        pytest.approx(row) for row in ([one, one, none], [one, one, one], [none, one, one])
    ]
    hidden = affinity(features, 0.3, torch.tensor([[False, True, False]]))[0]
    assert hidden.tolist() == [pytest.approx(r) for r in ([one, none, none], [none] * 3, [none, none, one])]
    mask = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    assert corners(mask, (2, 3)).tolist() == [3, 0]
