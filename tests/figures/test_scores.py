"""Score maps and boxes of kept probes, and feature channels, against what they are made of."""

import numpy as np
import pytest
import torch

from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.drawing.overlays import cool_to_warm, lit
from foveola.evaluation.attention.analysis import analyze_attention
from foveola.evaluation.classification.abmilp import load_weights
from foveola.evaluation.evaluate import evaluate
from foveola.figures.dense import patch_map
from foveola.figures.pca import Basis
from foveola.figures.scores import channels_sheet, scores_sheet
from foveola.figures.tiles import encoded, images_of
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

SCENES = "scenes:?size=48&count=24"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=48)
        return Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=48, crop=48)))


@pytest.fixture(scope="module")
def probe(encoder, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("probe")
    settings = {"epochs": 30, "lr": (1.0,), "fixed": (), "workers": 0, "progress": False}
    evaluate(encoder, "abmilp", train=SCENES, test=SCENES, overlap="allow", out=folder, **settings)
    return str(folder / "results" / "abmilp" / "probe.safetensors")


@pytest.fixture(scope="module")
def samples() -> list:
    source = open_source(SCENES, "test")
    return [source[0], source[7]]


def test_maps_are_the_probes_weights_and_boxes_have_their_colours(encoder, samples, probe) -> None:
    sheet = scores_sheet(encoder, samples, probe=probe, maps=("attention", "abmilp"), size=48)
    assert sheet.columns == ["image", "attention", "abmilp"]
    plain = scores_sheet(encoder, samples, maps=("attention",), size=48)
    for sample, row, bare in zip(samples, sheet.rows, plain.rows, strict=True):
        pixels = encoded(encoder, images_of([sample])[0], 48)
        weights = load_weights(probe, encoder)(encoder(pixels).patches)[0].view(6, 6).numpy()
        shares = (weights - weights.min()) / (weights.max() - weights.min())
        base = channels_sheet(encoder, [sample], size=48, components=1).rows[0].tiles[0]
        np.testing.assert_allclose(row.tiles[2], lit(base, shares), atol=2)
        with_boxes, without = row.tiles[0], bare.tiles[0]
        assert (with_boxes == (30, 170, 60)).all(axis=2).any()  # green: AbMILP
        assert not (without == (30, 170, 60)).all(axis=2).any()
        x0, y0, *_ = np.round(sample.objects.boxes[0] * base.shape[0]).astype(int)
        assert (without[y0, max(x0, 0)] == (40, 90, 255)).all() or (without[y0, x0] == (235, 40, 40)).all()
    with pytest.raises(UserError, match="give train="):
        scores_sheet(encoder, samples, maps=("abmilp",))


def test_channels_are_whitened_components(encoder, samples) -> None:
    sheet = channels_sheet(encoder, samples, size=48, components=3, joint=False)
    for image, row in zip(images_of(samples), sheet.rows, strict=True):
        features = patch_map(encoder, image, 48)
        values = Basis.fit(features, 3).project(features)
        for channel in range(3):
            side = row.tiles[0].shape[0] // 6
            small = row.tiles[1 + channel][side // 2 :: side, side // 2 :: side]
            np.testing.assert_array_equal(small, cool_to_warm(values[..., channel], -2.3, 2.3))


def test_a_probes_weights_are_one_more_vector_of_the_analysis(encoder, probe) -> None:
    """KL(p || uniform) = ln N - H(p), the mean over images of both sides."""
    settings = {"limit": 6, "workers": 0, "progress": False}
    analysis = analyze_attention({"small": encoder}, SCENES, probe=(probe,), **settings)
    (group,) = analysis.vectors
    assert group.names == ("small: class", "small: sharpest", "small: centre", "small: abmilp", "uniform")
    entropy, divergence = group.entropy.mean, group.divergence.mean
    assert divergence[3, 4] == pytest.approx(np.log(36) - entropy[3], rel=1e-6)
    other = Encoder(encoder.config)
    with pytest.raises(UserError, match="was trained on none of these encoders"):
        analyze_attention({"other": other}, SCENES, probe=(probe,), **settings)
