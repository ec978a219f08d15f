"""Linear segmentation: the loss against a loop, heads of a grid against heads alone, and colour."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from foveola.config import UserError, build
from foveola.data.segmentation import IGNORE
from foveola.evaluation.protocol import At
from foveola.evaluation.segmentation import linear
from foveola.evaluation.segmentation.linear import (
    LinearSegmentation,
    LinearSegmentationConfig,
    label_loss,
    train_heads,
)

COLOURS = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220]], np.uint8)
FAST = {"workers": 0, "steps": 150, "train_batch": 4, "rates": [1e-4, 1e-2]}


@pytest.fixture
def coloured(pixel_source):
    def make(seed: int, count: int = 6):
        rng, images, maps = np.random.default_rng(seed), [], []
        for _ in range(count):
            labels = np.repeat(np.repeat(rng.integers(0, 3, (2, 2)), 16, 0), 16, 1).astype(np.uint8)
            images.append(COLOURS[labels])
            labels = labels.copy()
            labels[:, 30:] = IGNORE
            maps.append(labels)
        return pixel_source(images, maps, name=f"coloured-{seed}:")

    return make


def test_loss_equals_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 4, generator=generator)
    maps = torch.randint(0, 4, (2, 12, 12), generator=generator).to(torch.uint8)
    maps[:, :3] = IGNORE
    total, count = 0.0, 0
    for one, labels in zip(logits.double(), maps, strict=True):
        field = interpolate(one.T.reshape(1, 4, 3, 3), (12, 12), mode="bilinear", align_corners=False)[0]
        for y, x in np.ndindex(12, 12):
            if labels[y, x] != IGNORE:
                total += float(field[:, y, x].logsumexp(0) - field[int(labels[y, x]), y, x])
                count += 1
    assert label_loss(logits, maps, 3).item() == pytest.approx(total / count, rel=1e-5)


def test_loss_of_a_head_is_of_all_pixels_that_have_a_class():
    """Not the mean of the images' means: the second has half of its pixels, the third none."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 4, 5, generator=generator)
    maps = torch.randint(0, 3, (3, 8, 8), generator=generator).to(torch.uint8)
    maps[1, :4], maps[2] = IGNORE, IGNORE
    head = torch.nn.Linear(5, 3)
    with torch.no_grad():
        one, half = (float(label_loss(head(features[i : i + 1]), maps[i : i + 1], 2)) for i in (0, 1))
    assert linear._losses([head], features, maps, 2) == pytest.approx([(64 * one + 32 * half) / 96], rel=1e-6)


def test_equal_rates_are_told_apart_by_their_loss(encoder, coloured, monkeypatch):
    monkeypatch.setattr(linear, "_held_out", lambda *_: 50.0)
    config = build(LinearSegmentationConfig, FAST | {"steps": 30, "rates": [1e-6, 1e-2]})
    chosen = run(encoder, coloured(1), coloured(2), config, False).chosen
    assert chosen == {"linear_segmentation": {"rate": 1e-2}}


def test_images_without_a_class_give_no_gradient():
    logits = torch.randn(1, 4, 3, requires_grad=True)
    label_loss(logits, torch.full((1, 8, 8), IGNORE, dtype=torch.uint8), 2).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_heads_trained_together_equal_heads_trained_alone():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, 5, generator=generator)
    maps = torch.randint(0, 3, (7, 8, 8), generator=generator).to(torch.uint8)
    settings = {"steps": 9, "batch": 3, "weight_decay": 0.1, "seed": 4}
    rates = [1e-3, 1e-2, 1e-1]
    together = train_heads(features, maps, 3, rates, **settings)
    for rate, head in zip(rates, together, strict=True):
        (alone,) = train_heads(features, maps, 3, [rate], **settings)
        assert torch.equal(alone.weight, head.weight)
        assert torch.equal(alone.bias, head.bias)
    assert not torch.allclose(together[0].weight, together[1].weight)


def run(encoder, train, test, config, progress=False):
    return LinearSegmentation().measure(At(encoder, train, test, progress=progress), config)


def test_rate_falls_to_zero_as_a_polynomial():
    """With one head and one image the first step of AdamW is rate x sign(gradient), unless decayed."""
    features, maps = torch.ones(1, 4, 2), torch.zeros(1, 8, 8, dtype=torch.uint8)
    settings = {"batch": 1, "weight_decay": 0.0, "seed": 0}
    (one,) = train_heads(features, maps, 2, [0.1], steps=1, **settings)
    (two,) = train_heads(features, maps, 2, [0.1], steps=2, **settings)
    assert one.bias.tolist() == pytest.approx([0.1, -0.1], rel=1e-4)
    assert (two.bias[0] - one.bias[0]).item() == pytest.approx(0.1 * 0.5**0.9, rel=0.05)


def test_colour_is_found(encoder, coloured):
    config = build(LinearSegmentationConfig, FAST)
    outcome = run(encoder, coloured(1), coloured(2), config, progress=False)
    assert outcome.metrics["miou"] > 60
    assert outcome.chosen["linear_segmentation"] == {"rate": 1e-2}
    assert [entry["rate"] for entry in outcome.grid["linear_segmentation"]] == [1e-4, 1e-2]
    again = run(encoder, coloured(1), coloured(2), config, progress=False)
    assert again.metrics == outcome.metrics
    at_image = build(LinearSegmentationConfig, FAST | {"evaluate_at": "image"})
    assert run(encoder, coloured(1), coloured(2), at_image, False).metrics == outcome.metrics


def test_the_choice_knows_nothing_of_test(encoder, coloured):
    config = build(LinearSegmentationConfig, FAST | {"steps": 30})
    honest = run(encoder, coloured(1), coloured(2), config, False)
    poisoned = coloured(2)
    poisoned.maps = [np.full_like(labels, 1) for labels in poisoned.maps]
    other = run(encoder, coloured(1), poisoned, config, False)
    assert other.grid == honest.grid


def test_mistakes(encoder, coloured):
    void = coloured(1)
    void.maps = [np.full_like(labels, IGNORE) for labels in void.maps]
    with pytest.raises(UserError, match="no pixel has a class"):
        run(encoder, void, coloured(2), build(LinearSegmentationConfig, FAST), False)
    with pytest.raises(UserError, match="rates: needs different values"):
        build(LinearSegmentationConfig, {"rates": []})


def test_the_global_generator_is_left_alone():
    features, maps = torch.ones(2, 4, 2), torch.zeros(2, 8, 8, dtype=torch.uint8)
    before = torch.get_rng_state()
    train_heads(features, maps, 2, [0.1], steps=2, batch=2, weight_decay=0.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
