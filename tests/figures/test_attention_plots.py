"""Charts of an analysis show its numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from foveola import AttentionAnalysis, analyze_attention
from foveola.evaluation.attention.statistics import HEAD_STATISTICS
from foveola.figures.attention_plots import between_vectors, over_blocks, over_heads, save_attention_plots
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig


def make(**changes) -> Encoder:
    settings = {"width": 16, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32} | changes
    return Encoder(EncoderConfig(ViTConfig(**settings), TransformConfig(resize=32, crop=32), pool="average"))


@pytest.fixture(scope="module")
def analysis() -> AttentionAnalysis:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"plain": make(), "bare": make(class_token=False, depth=3)}
    return analyze_attention(models, "scenes:?count=3", workers=0, progress=False)


def test_lines_are_the_means_of_blocks(analysis) -> None:
    figure = over_blocks(analysis, ("class_entropy", "nmi", "class_to_registers"))
    entropy, nmi = (axis for axis in figure.axes if axis.get_title(loc="left"))  # nobody has registers
    drawn = {line.get_label(): line.get_xydata() for line in nmi.get_lines()}
    for name in ("plain", "bare"):
        expected = analysis[name].blocks["nmi"].mean
        np.testing.assert_allclose(drawn[name], np.stack((np.arange(len(expected)) + 1, expected), axis=1))
    assert [line.get_label() for line in entropy.get_lines()] == ["plain", "uniform"]
    colors = {line.get_label(): line.get_color() for axis in (entropy, nmi) for line in axis.get_lines()}
    (legend,) = figure.legends
    named = {text.get_text(): h for text, h in zip(legend.texts, legend.legend_handles, strict=True)}
    shown = {name: handle.get_color() for name, handle in named.items() if name in ("plain", "bare")}
    assert shown["plain"] == colors["plain"] != shown["bare"] == colors["bare"]


def test_a_dot_for_each_head(analysis) -> None:
    figure = over_heads(analysis, ("patch_entropy", "class_entropy"))
    dots = figure.axes[0].collections[0].get_offsets()
    expected = analysis["plain"].heads["patch_entropy"].mean
    np.testing.assert_allclose(dots, [(b + 1, expected[b, h]) for b in range(2) for h in range(2)])
    assert [text.get_text() for text in figure.axes[3].texts] == ["no class token"]
    assert HEAD_STATISTICS["class_entropy"].unit in figure.axes[1].get_title()


def test_divergences_as_a_map(analysis) -> None:
    figure = between_vectors(analysis.vectors)
    (group,) = analysis.vectors
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), group.divergence.mean)
    assert len(figure.axes[0].texts) == len(group.names) ** 2


def test_files(analysis, tmp_path) -> None:
    made = save_attention_plots(analysis, tmp_path)
    assert [path.name for path in made] == ["attention.png", "attention_heads.png", "attention_vectors.png"]
    for path in made:
        with Image.open(path) as image:
            assert min(image.size) > 300
