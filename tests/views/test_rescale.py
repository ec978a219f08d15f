"""Windows of resized images: their sizes and corners, padding, the fraction of one class; against loops."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from foveola.config import ConfigError
from foveola.data.sample import IGNORE, Canvases
from foveola.geometry import sample, sample_labels
from foveola.training.recipe import resolve
from foveola.views import color
from foveola.views.batch import Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.rescale import WINDOWS, RescaleConfig, draw_windows
from foveola.views.tokens import MaskingConfig

Make = Callable[..., Canvases]
PLAIN = ColorConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
ASPECTS = [0.2, 0.5, 0.75, 1.0, 4 / 3, 2.0, 5.0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("side", ["long", "short"])
@pytest.mark.parametrize("limits", [(0.1, 2.0), (0.5, 2.0), (1.0, 1.0)])
def test_windows_against_a_loop_over_images(side: str, limits: tuple[float, float]):
    """The resized image in whole pixels, a corner of the window, and from both the box in the unit square."""
    size, count = 48, 60
    flips = torch.rand(len(ASPECTS), count, generator=seeded(1)) < 0.5
    config = RescaleConfig(range=limits, side=side)  # type: ignore[arg-type]
    drawn = draw_windows(config, torch.tensor(ASPECTS), flips, size, seeded(2))
    uniform = torch.rand(1 + 2 * WINDOWS, len(ASPECTS), count, generator=seeded(2)).double().numpy()
    padded = longest = 0.0
    for b, aspect in enumerate(ASPECTS):
        for v in range(count):
            length = (limits[0] + (limits[1] - limits[0]) * uniform[0, b, v]) * size
            first = "width" if (aspect >= 1) == (side == "long") else "height"
            width, height = (length, length / aspect) if first == "width" else (length * aspect, length)
            if min(abs(x % 1 - 0.5) for x in (width, height)) < 1e-3:
                continue  # rounding decides
            width, height = max(round(width), 1), max(round(height), 1)
            longest = max(longest, size / width, size / height)
            padded += width < size or height < size
            for k in range(WINDOWS):
                x0 = int(uniform[1 + k, b, v] * max(width - size + 1, 1))
                y0 = int(uniform[1 + WINDOWS + k, b, v] * max(height - size + 1, 1))
                assert 0 <= x0 <= max(width - size, 0)
                assert 0 <= y0 <= max(height - size, 0)
                box = [x0 / width, y0 / height, (x0 + size) / width, (y0 + size) / height]
                if flips[b, v]:
                    box[0], box[2] = 1 - box[2], 1 - box[0]
                np.testing.assert_allclose(drawn.boxes[k, b, v], box, atol=2e-5, rtol=1e-5)
    assert padded > 0 or limits[0] == 1.0
    assert drawn.longest == pytest.approx(longest, rel=1e-5)


def test_scales_and_corners_are_uniform():
    aspects = torch.full((20,), 1.5)
    flips = torch.zeros(20, 100, dtype=torch.bool)
    x0, y0, x1, y1 = draw_windows(RescaleConfig(), aspects, flips, 512, seeded()).boxes[3].unbind(-1)
    width, height = 512 / (x1 - x0), 512 / (y1 - y0)
    assert torch.allclose(width / height, torch.tensor(1.5), rtol=0.02)
    assert kstest(width.flatten() / 512, "uniform", (0.1, 1.9)).pvalue > 1e-3
    large = height > 600
    assert kstest((y0 / (1 - 512 / height))[large], "uniform").pvalue > 1e-3
    small = width <= 512
    assert not x0[small].any()
    assert ((x0 >= 0) & (x1 <= 1 + 1e-6))[~small].all()


def test_a_small_image_lies_in_the_upper_left_also_where_it_is_mirrored(canvases: Make):
    """A view of an image at its own size: its pixels, mirrored or not, and 0 right and below."""
    made = canvases([[None]] * 6, size=24, aspects=[1.0] * 6)
    config = ViewsConfig(
        global_size=40, local_count=0, color=PLAIN, rescale=RescaleConfig(range=(24 / 40, 24 / 40))
    )
    batch = make_views(made, config, 8, Streams(0, 0))
    mean, std = (torch.tensor(side)[:, None, None] for side in (PLAIN.mean, PLAIN.std))
    assert 0 < batch.large.flips.sum() < 12
    for b in range(6):
        for v in range(2):
            expected = (made.images[b] / 255 - mean) / std
            expected = expected.flip(-1) if batch.large.flips[b, v] else expected
            view = batch.large.pixels[b, v]
            assert (view[:, :24, :24] - expected).abs().max() < 1e-4
            assert not view[:, 24:].any()
            assert not view[:, :, 24:].any()
            assert batch.large.inside[b, v].tolist() == [0, 0, 24, 24]
    assert batch.facts["views/padding"].item() == pytest.approx(1 - (24 / 40) ** 2)


def test_padding_changes_no_colour_and_has_none():
    """Every colour change of a padded view is that of its image alone; padding is 0 after it."""
    config = ColorConfig(jitter=0.8, grayscale=0.3, solarize=(0.3, 0.3, 0.3), blur=(0, 0, 0))
    views = torch.rand(40, 3, 9, 11, generator=seeded())
    inside = torch.zeros(40, 1, 9, 11, dtype=torch.bool)
    inside[:, :, :7, :6] = True
    views = torch.where(inside, views, torch.rand(views.shape, generator=seeded(1)))
    drawn = color.draw_colors(config, torch.zeros(40, dtype=torch.int64), seeded(2))
    alone = color.apply(views[:, :, :7, :6].clone(), drawn, config)
    padded = color.apply(views.clone(), drawn, config, inside)
    assert (padded[:, :, :7, :6] - alone).abs().max() < 1e-5
    assert not padded[~inside.expand_as(padded)].any()


def test_the_first_window_without_too_much_of_one_class(canvases: Make):
    """Of ten windows the first in which no class fills more than 60 % of labelled pixels, else the last."""
    made = canvases([[None]] * 8, size=32, aspects=[1.0] * 8)
    maps = torch.zeros(8, 32, 32, dtype=torch.uint8)
    maps[:, 10:, 12:] = 1
    maps[:4, 20:, :20] = 2
    maps[4:, :, :14] = IGNORE
    maps[7] = 3  # of one class alone: no window will do
    made = replace(made, label_maps=maps)
    config = ViewsConfig(
        global_size=16,
        global_count=50,
        local_count=0,
        rescale=RescaleConfig(range=(0.7, 2.5), max_class_share=0.6),
    )
    batch = make_views(made, config, 8, Streams(0, 4))
    flips = batch.large.flips
    windows = draw_windows(config.rescale, made.aspects, flips, 16, Streams(0, 4)("boxes")).boxes  # type: ignore[arg-type]
    taken = []
    for b in range(8):
        for v in range(50):
            cut = sample_labels(maps[b : b + 1], windows[None, :, b, v], None, 16, IGNORE)[0].numpy()
            good = [share_of_largest(labels) <= 0.6 for labels in cut]
            first = good.index(True) if any(good) else WINDOWS - 1
            assert torch.equal(batch.large.boxes[b, v], windows[first, b, v])
            taken.append(first)
            if b == 7:
                assert first == WINDOWS - 1
    assert set(taken) >= {0, 1, 2, WINDOWS - 1}


def share_of_largest(labels: np.ndarray) -> float:
    """The fraction of the largest class among labelled pixels; 1 where none is labelled."""
    classes, counts = np.unique(labels[labels != IGNORE], return_counts=True)
    return counts.max() / counts.sum() if len(classes) else 1.0


def test_a_view_as_large_as_its_image_is_that_of_the_whole_box(canvases: Make):
    made = canvases([[None]] * 2, size=32, aspects=[1.0, 1.0])
    plain = ColorConfig(
        jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1)
    )
    config = ViewsConfig(
        global_size=32, local_count=0, color=plain, flip=0, rescale=RescaleConfig(range=(1, 1))
    )
    batch = make_views(made, config, 8, Streams(0, 0))
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 2, 4)
    assert torch.equal(batch.large.boxes, whole)
    expected = sample(made.images / 255, whole, None, 32).clamp(0, 1)
    assert (batch.large.pixels - expected).abs().max() < 1e-6


PADDED = {"local_count": 0, "rescale": RescaleConfig()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local_count": 2}, "set local_count=0"),
        ({"objects": ObjectsConfig()}, "rescale pads views, .* objects .*: set one to null"),
        ({"masking": MaskingConfig()}, "rescale pads views, .* masking .*: set one to null"),
    ],
)
def test_what_does_not_go_with_padding_is_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ViewsConfig(**PADDED | changes)


def test_what_does_not_go_with_the_annotations_is_refused():
    """Padding is for methods that know of it, and counting classes needs label maps."""
    padded = ViewsConfig(**PADDED)
    for annotations in ("labels", "label_maps", "instances"):
        padded.check(16, annotations)
    with pytest.raises(ValueError, match="rescale pads views, as only methods with annotations"):
        padded.check(16)
    counted = ViewsConfig(local_count=0, rescale=RescaleConfig(max_class_share=0.75))
    counted.check(16, "label_maps")
    with pytest.raises(
        ValueError, match="max_class_share needs label maps, but the method learns from instances"
    ):
        counted.check(16, "instances")
    with pytest.raises(ConfigError, match="rescale pads views, as only methods with annotations"):
        resolve("dino-tiny-tinyimagenet", ["views.rescale.side=short", "views.local_count=0"])


@pytest.mark.parametrize("limits", [(0.0, 1.0), (2.0, 1.0), (1.0, 1000.0)])
def test_ranges_that_cannot_be(limits: tuple[float, float]):
    with pytest.raises(ValueError, match="range: needs 0 < low <= high <= 100"):
        RescaleConfig(range=limits)


def test_keys_that_windows_do_not_read():
    idle = ViewsConfig(**PADDED).unread()
    assert idle["global_scale"] == idle["ratio"] == "rescale chooses windows"
