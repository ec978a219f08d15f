"""Views of the loader's batches against PIL's crops of the original images."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from foveola.data.loader import Loader, LoaderConfig
from foveola.data.sample import Canvases, Objects, Sample
from foveola.views.batch import Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig

CLEAR = ColorConfig(
    jitter=0.0,
    grayscale=0.0,
    blur=(0.0, 0.0, 0.0),
    solarize=(0.0, 0.0, 0.0),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
VIEWS = ViewsConfig(global_size=28, local_size=12, local_count=4, color=CLEAR)
SHAPES = [(60, 90), (120, 75), (33, 47), (150, 170), (110, 118)]  # the canvas has 128 pixels a side


class Photos:
    """Noise at several scales, nowhere near black or white; on wish the object is a white rectangle."""

    name, classes, has_objects = "photos:", None, True

    def __init__(self, white: bool = False) -> None:
        self.white = white

    def __len__(self) -> int:
        return len(SHAPES)

    def __getitem__(self, index: int) -> Sample:
        height, width = SHAPES[index]
        rng = np.random.default_rng(index)
        coarse = rng.integers(100, 160, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
        pixels = coarse[:height, :width] + rng.integers(-30, 30, (height, width, 3))
        if self.white:
            pixels[height // 4 : height // 2, width // 5 : width // 2] = 255
        box = np.array([[width // 5 / width, height // 4 / height, width // 2 / width, height // 2 / height]])
        return Sample(pixels.astype(np.uint8), str(index), Objects.from_boxes(box))

    def fingerprint(self) -> str:
        return "photos"


def batch(source: Photos) -> Canvases:
    config = LoaderConfig(canvas=128, workers=0)
    return next(iter(Loader(source, len(SHAPES), 0, config, with_objects=True)))


def test_a_view_is_pils_crop_of_the_original():
    """Within rounding where the image fits on the canvas; of a larger one PIL takes the same two steps."""
    canvases = batch(Photos())
    views = make_views(canvases, VIEWS, 4, Streams(0, 0))
    assert views.small.boxes is not None
    assert views.small.pixels is not None
    assert views.small.flips is not None
    for row, index in enumerate(canvases.indices.tolist()):
        height, width = (min(side, 128) for side in SHAPES[index])
        image = Image.fromarray(Photos()[index].image).resize((width, height), Image.Resampling.BICUBIC)
        cut = zip(
            (*views.large.boxes[row].double().tolist(), *views.small.boxes[row].double().tolist()),
            (*views.large.flips[row], *views.small.flips[row]),
            (*views.large.pixels[row], *views.small.pixels[row]),
            strict=True,
        )
        for (x0, y0, x1, y1), flip, view in cut:
            box = (x0 * width, y0 * height, x1 * width, y1 * height)
            want = image.resize(view.shape[1:], Image.Resampling.BICUBIC, box=box)
            want = np.asarray(want.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else want)
            ours = 255 * view.permute(1, 2, 0).numpy()
            assert np.abs(ours - want).max() < (1.05 if (height, width) == SHAPES[index] else 2.05)


def test_masks_lie_over_their_pixels_in_images_of_any_shape():
    """The fraction of a patch that is white is the fraction that the mask covers."""
    canvases = batch(Photos(white=True))
    thresholds = (0.25, 0.5, 0.75)
    for least in thresholds:
        config = replace(VIEWS, objects=ObjectsConfig(min_coverage=least), local_count=0, global_count=6)
        views = make_views(canvases, config, 4, Streams(0, 1))
        assert views.large.objects is not None
        white = (views.large.pixels.amin(dim=2) > 0.8).float().unflatten(2, (7, 4)).unflatten(4, (7, 4))
        share = white.mean(dim=(3, 5)).flatten(2)
        seen = views.large.objects[:, :, 0]
        clear = (share - least).abs() > 0.2
        clear &= ~seen.all(dim=2).any(dim=1)[:, None, None]  # lost from a view: read as the whole image
        assert clear.float().mean() > 0.5
        assert torch.equal(seen[clear], (share > least)[clear])
