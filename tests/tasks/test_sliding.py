"""Whole images and windows against naive loops, for images of any shape."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from foveola.config import ConfigError, build
from foveola.tasks import sliding
from foveola.tasks.sliding import LookConfig, enlarged_rows, label_map, look_whole, looks, offsets, slide


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pretend(images: torch.Tensor) -> torch.Tensor:
    """Logits of four classes that depend on where a pixel is in its window, and on its neighbours."""
    smooth = avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    where = torch.arange(images.shape[2] * images.shape[3]).view(1, 1, *images.shape[2:]) / 100
    return torch.cat((smooth, where.expand(len(images), -1, -1, -1)), dim=1)


@pytest.mark.parametrize(("length", "window", "stride", "expected"), [
    (10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 3, [0]), (5, 4, 4, [0, 1]), (8, 4, 4, [0, 4]),
    (3, 4, 2, [0]), (9, 4, 1, [0, 1, 2, 3, 4, 5]),
])  # fmt: skip
def test_windows_cover_a_side(length, window, stride, expected):
    assert offsets(length, window, stride) == expected
    assert {i for at in expected for i in range(at, at + window)} >= set(range(length))


@pytest.mark.parametrize(("height", "width"), [(13, 21), (8, 8), (5, 30), (40, 6), (3, 3), (9, 8)])
@pytest.mark.parametrize("stride", [8, 5])
def test_windows_equal_a_naive_loop(height, width, stride, monkeypatch):
    monkeypatch.setattr(sliding, "AT_ONCE", 3)
    image, window = drawn(3, height, width), 8
    canvas = torch.zeros(3, max(height, window), max(width, window))
    canvas[:, :height, :width] = image
    total, count = np.zeros((4, *canvas.shape[1:])), np.zeros(canvas.shape[1:])
    tops, lefts = [], []
    for starts, length in ((tops, canvas.shape[1]), (lefts, canvas.shape[2])):
        at = 0
        while at + window < length:
            starts.append(at)
            at += stride
        starts.append(length - window)
    for top in tops:
        for left in lefts:
            found = pretend(canvas[None, :, top : top + window, left : left + window])[0].double().numpy()
            total[:, top : top + window, left : left + window] += found
            count[top : top + window, left : left + window] += 1
    assert count.min() >= 1
    expected = (total / count)[:, :height, :width]
    np.testing.assert_allclose(slide(image, pretend, window, stride).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_overlaps_of_equal_logits_change_nothing():
    same = slide(drawn(3, 50, 37), lambda x: x.new_ones(len(x), 2, *x.shape[2:]) * 0.3, 16, 7)
    assert torch.allclose(same, torch.tensor(0.3))
    assert same.shape == (2, 50, 37)


def test_whole_images_are_filled_up_to_whole_patches():
    image, seen = drawn(3, 13, 21), []
    found = look_whole(image, lambda x: seen.append(x) or pretend(x), 8)
    assert seen[0].shape == (1, 3, 16, 24)
    assert torch.equal(seen[0][0, :, :13, :21], image)
    assert not seen[0][0, :, 13:].any()
    assert torch.equal(found, pretend(seen[0])[0, :, :13, :21])


@pytest.mark.parametrize("size", [(31, 17), (9, 40), (6, 7), (1, 1)])
def test_rows_of_an_enlarged_field_are_those_of_the_whole(size):
    field = drawn(3, 6, 7)
    expected = interpolate(field[None], size, mode="bilinear", align_corners=False)[0]
    for step in (1, 4, 100):
        parts = [
            enlarged_rows(field, range(top, min(top + step, size[0])), size)
            for top in range(0, size[0], step)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-6)


def test_a_label_map_has_the_largest_logit_and_the_mean_probability(monkeypatch):
    one, other = drawn(4, 5, 6), drawn(4, 9, 11, seed=1) * 3
    large = [
        interpolate(x[None].double(), (23, 19), mode="bilinear", align_corners=False)[0] for x in (one, other)
    ]
    for room in (2**26, 4 * 19 * 3):  # at once, and three rows at a time
        monkeypatch.setattr(sliding, "ROOM", room)
        assert torch.equal(label_map([one], (23, 19)).long(), large[0].argmax(dim=0))
        mean = (large[0].softmax(dim=0) + large[1].softmax(dim=0)) / 2
        assert torch.equal(label_map([one, other], (23, 19)).long(), mean.argmax(dim=0))
        assert not torch.equal(mean.argmax(dim=0), (large[0] + large[1]).argmax(dim=0))  # not that of logits


def seen_by(image: np.ndarray, config: LookConfig, logits=pretend) -> list[torch.Tensor]:
    return looks(image, config, logits, lambda pixels: pixels.float() / 255, 16, 4, "bilinear")


@pytest.mark.parametrize(
    ("shape", "sizes"), [((48, 96), (16, 32)), ((96, 48), (32, 16)), ((16, 24), (16, 24))]
)
def test_the_shorter_side_has_the_size(shape, sizes):
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3)).astype(np.uint8)
    for mode in ("whole", "slide"):
        (found,) = seen_by(image, LookConfig(mode=mode))
        assert found.shape[1:] == sizes
    scaled = seen_by(image, LookConfig(size=8, window=8, scales=(1.0, 2.0), flip=True))
    assert [one.shape[1:] for one in scaled] == 2 * [tuple(s // 2 for s in sizes)] + 2 * [sizes]


def test_mirror_images_are_turned_back():
    """Logits that are a function of a pixel's own colour are those of the plain image, from both."""
    image = np.random.default_rng(0).integers(0, 255, (16, 40, 3)).astype(np.uint8)
    plain, mirrored = seen_by(image, LookConfig(flip=True), lambda x: x)
    torch.testing.assert_close(mirrored, plain)
    away, there = seen_by(image, LookConfig(mode="whole", flip=True))  # the place counts: another answer
    assert not torch.allclose(away, there)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scales": []}, "scales: needs different values"),
        ({"scales": [1.0, 1.0]}, "scales: needs different values"),
        ({"scales": [0.0]}, r"scales\[0\]: must be > 0"),
        ({"window": 8, "stride": 9}, "stride=9 leaves gaps between windows of window=8"),
        ({"mode": "slid"}, "did you mean 'slide'"),
    ],
)
def test_looks_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        build(LookConfig, keys)
    assert LookConfig(mode="whole").unread().keys() == {"window", "stride"}
    with pytest.raises(ValueError, match="window=20 is not a multiple of the patch size 16"):
        LookConfig(window=20).check(16)
