from dataclasses import replace

import numpy as np
import pytest
import torch

from foveola.config import ConfigError, UserError, build
from foveola.data.sample import BadImage, Objects, Sample
from foveola.data.sources import open_source
from foveola.evaluation.images import Images
from foveola.evaluation.protocol import At
from foveola.evaluation.views import retrieval
from foveola.evaluation.views.retrieval import (
    OBJECTS_TOGETHER,
    CanvasCut,
    Retrieval,
    RetrievalConfig,
    choose_targets,
    two_views,
)
from foveola.models.encoder import Encoder, Features
from foveola.models.transform import resize


def test_a_damaged_annotation_stops_nothing(list_source, make_sample) -> None:
    """It is counted where the image is read; up to one in a hundred may be bad."""

    class Damaged(type(list_source([]))):
        def __getitem__(self, index: int):
            if index == 3:
                raise BadImage("3.png: label map is damaged")
            return super().__getitem__(index)

    source = Damaged([make_sample(i, [(0, 0, 20, 20)]) for i in range(5)])
    assert sorted(choose_targets(source, 5, 0, seed=3)) == [(0, 0), (1, 0), (2, 0), (3, -1), (4, 0)]


def test_one_object_a_image_while_images_last(list_source, make_sample) -> None:
    boxes = [(0, 0, 20, 20), (30, 10, 60, 50), (40, 0, 44, 3)]
    source = list_source([make_sample(i, boxes[: 1 + i % 3]) for i in range(12)])
    few = choose_targets(source, 12, 0, seed=3)
    assert sorted(t.image for t in few) == list(range(12))
    assert few == choose_targets(source, 12, 0, seed=3) != choose_targets(source, 12, 0, seed=4)
    assert choose_targets(source, 5, 0, seed=3) == few[:5]
    every = choose_targets(source, 1000, 0, seed=3)
    assert every[:12] == few
    assert sorted(every) == [(i, j) for i in range(12) for j in range(1 + i % 3)]
    assert len({t.image for t in every[12:20]}) == 8  # the second object of each before the third of any


def test_small_objects_can_be_left_out(list_source, make_sample) -> None:
    source = list_source([make_sample(0, [(0, 0, 8, 6)]), make_sample(1, [(0, 0, 40, 30)]), make_sample(2)])
    assert {t.image for t in choose_targets(source, 9, 0.02, seed=0)} == {1, 2}
    assert sorted(choose_targets(source, 9, 0.0, seed=0)) == [(0, 0), (1, 0), (2, -1)]


def test_views_hold_their_object(encoder, list_source) -> None:
    """A white square on black: what a mask marks is lit, what it does not mark is dark."""
    samples = []
    for i in range(40):
        image = np.zeros((64, 64, 3), np.uint8)
        y, x = np.random.default_rng(i).integers(0, 48, 2)
        image[y : y + 16, x : x + 16] = 255
        box = np.array([[x / 64, y / 64, (x + 16) / 64, (y + 16) / 64]], np.float32)
        samples.append(Sample(image, str(i), Objects(box, np.array([1 / 16], np.float32))))
    source = list_source(samples)
    targets = choose_targets(source, 40, 0, 0)
    color = retrieval.ColorConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    config = RetrievalConfig(color=color, min_visible=0.5)
    cut = CanvasCut(64, 64, encoder.config.transform)
    parcel = Images(source, np.array(targets), cut, OBJECTS_TOGETHER)[0]
    canvases = parcel.made.canvases()
    assert parcel.bad == ()
    assert len(canvases) == OBJECTS_TOGETHER
    views, masks = two_views(canvases, encoder, config, 0)
    assert views.shape == (OBJECTS_TOGETHER, 2, 3, 32, 32)
    light = (
        (views[:, :, 0] * 0.229 + 0.485).unflatten(2, (4, 8)).unflatten(4, (4, 8)).mean(dim=(3, 5)).flatten(2)
    )
    assert (light[masks] > 0.003).float().mean() > 0.98
    assert light[~masks].max() < 0.1
    assert (masks.sum(dim=2) < 16).any()
    assert (views[:, 0] - views[:, 1]).abs().amax(dim=(1, 2, 3)).min() > 0.1  # two crops, not one twice


class Painter(Encoder):
    """An encoder that knows an object by the mean colour of the patches it may read."""

    blind = False
    width = 3

    def forward(self, images: torch.Tensor, objects: torch.Tensor | None = None) -> Features:
        transform = self.config.transform
        mean, std = (torch.tensor(v)[:, None, None] for v in (transform.mean, transform.std))
        patches = torch.nn.functional.avg_pool2d(images * std + mean, 8).flatten(2).mT
        if objects is None:
            objects = torch.ones(len(images), 1, patches.shape[1], dtype=torch.bool)
        tokens = (objects.float() / objects.sum(dim=2, keepdim=True)) @ patches
        return Features(tokens * (not self.blind), patches[:, :0], patches, (4, 4))


@pytest.fixture
def colours(list_source):
    """Each image holds a large object of its own hue, on a background of the same grey."""
    import colorsys

    samples = []
    for i in range(30):
        image = np.full((48, 64, 3), 90, np.uint8)
        image[8:40, 10:54] = np.array([255 * c for c in colorsys.hsv_to_rgb(i / 30, 1, 1)], np.uint8)
        box = np.array([[10 / 64, 8 / 48, 54 / 64, 40 / 48]], np.float32)
        samples.append(Sample(image, str(i), Objects(box, np.array([0.45], np.float32))))
    return list_source(samples)


def run(encoder, source, **settings):
    unchanged = retrieval.ColorConfig(jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0))
    config = RetrievalConfig(
        **{"workers": 0, "objects": 30, "color": unchanged, "scale": (0.8, 1.0), **settings}
    )
    return Retrieval().measure(At(encoder, None, source, progress=False), config)


def test_who_knows_the_colour_finds_the_object(encoder, colours) -> None:
    painter = Painter(encoder.config)
    metrics = run(painter, colours).metrics
    assert metrics["rank1_masks"] > 60 > 10 * metrics["chance_rank1"]
    assert metrics["recall5_masks"] > 95
    in_other_colours = run(painter, colours, color=retrieval.ColorConfig()).metrics
    assert in_other_colours["rank1_masks"] < 0.5 * metrics["rank1_masks"]
    painter.blind = True
    nothing = run(painter, colours).metrics
    assert nothing["recall5_masks"] == nothing["recall5_plain"] == 0


def test_both_directions_are_averaged(encoder, colours, monkeypatch: pytest.MonkeyPatch) -> None:
    """With known features: object i is found from its first view always, from its second one never."""
    ranks = iter([torch.zeros(30, dtype=torch.int64), torch.full((30,), 7)])
    monkeypatch.setattr(retrieval, "partner_ranks", lambda a, b: next(ranks))
    assert run(encoder, colours, masks=True).metrics["rank1_masks"] == 50.0


def test_metrics_of_a_random_encoder(encoder, colours, check_scores) -> None:
    outcome = run(encoder, colours)
    metrics = outcome.metrics
    check_scores(outcome, Retrieval.metrics)
    assert metrics["chance_rank1"] == pytest.approx(100 / 30)
    assert metrics["chance_recall5"] == pytest.approx(500 / 30)
    for name in ("plain", "masks"):
        low, rank1, high = (metrics[f"rank1_{name}{end}"] for end in ("_low", "", "_high"))
        assert 0 <= low <= rank1 <= high <= 100
        assert rank1 <= metrics[f"recall5_{name}"]


def test_parcels_have_crops_of_their_own(encoder, list_source, make_sample, monkeypatch) -> None:
    """The same image 64 times: those of the second parcel are not cut as those of the first were."""
    sample, seen = make_sample(0, [(20, 15, 50, 45)]), []

    def watched(*arguments):
        views, masks = two_views(*arguments)
        seen.append(views)
        return views, masks

    monkeypatch.setattr(retrieval, "two_views", watched)
    run(encoder, list_source([sample] * 64), objects=64, masks=True)
    assert [len(views) for views in seen] == [32, 32]  # of one size: equal streams would give equal views
    for i in range(32):
        assert not torch.equal(seen[0][i], seen[1][i])


def test_settings_of_speed_change_nothing(encoder, colours) -> None:
    expected = run(encoder, colours).metrics
    for settings in ({"batch_size": 7}, {"workers": 2}):
        assert run(encoder, colours, **settings).metrics == pytest.approx(expected)
    only = run(encoder, colours, masks=True).metrics
    assert only == pytest.approx({name: value for name, value in expected.items() if "plain" not in name})
    assert run(encoder, colours, seed=1).metrics != pytest.approx(expected)


def test_images_keep_their_pixels_or_are_shrunk_as_the_encoder_has_it(
    encoder, list_source, make_sample, monkeypatch
) -> None:
    samples = [make_sample(i, height=60 - 5 * i, width=44 + 9 * i) for i in range(4)]
    source, seen = list_source(samples), {}

    def watched(canvases, *rest):
        for index, image, (rows, columns) in zip(
            canvases.indices.tolist(), canvases.images, canvases.extents.tolist(), strict=True
        ):
            seen[index] = image[:, :rows, :columns]
        return two_views(canvases, *rest)

    monkeypatch.setattr(retrieval, "two_views", watched)
    transform = replace(encoder.config.transform, interpolation="bilinear")
    encoder.config = replace(encoder.config, transform=transform)
    Retrieval().measure(At(encoder, None, source, progress=False), RetrievalConfig(workers=0))
    for i, sample in enumerate(source.samples):
        assert torch.equal(seen[i].permute(1, 2, 0), torch.from_numpy(sample.image))
    Retrieval().measure(At(encoder, None, source, progress=False), RetrievalConfig(workers=0, canvas=40))
    for i, sample in enumerate(source.samples):
        assert torch.equal(seen[i], resize(sample.image, 40, 40, "bilinear"))
        assert not torch.equal(seen[i], resize(sample.image, 40, 40))


def test_fewer_objects_than_asked_for_is_said(encoder, colours) -> None:
    outcome = run(encoder, colours, objects=100)
    assert outcome.notes == ("list: gives 30 objects instead of 100",)
    colours.samples = colours.samples[:1]
    with pytest.raises(UserError, match="1 objects to find"):
        run(encoder, colours)


def test_settings_are_checked() -> None:
    for wrong in ({"scale": [0.5, 0.2]}, {"objects": 1}, {"scale": [0.0, 0.5]}, {"color": {"hue": 2}}):
        with pytest.raises(ConfigError):
            build(RetrievalConfig, wrong)


def test_runs_on_the_built_in_scenes(encoder) -> None:
    outcome = run(encoder, open_source("scenes:?count=60", "test"), objects=50, color=retrieval.ColorConfig())
    assert outcome.data["test"]["objects"] == outcome.data["test"]["images"] == 50
