"""The analysis as a whole: against float64 attention of each image by itself, and its files."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import foveola
from foveola.config import UserError
from foveola.evaluation.attention.analysis import cut
from foveola.evaluation.attention.result import CSV_COLUMNS, RunningMoments
from foveola.evaluation.attention.statistics import (
    BLOCK_STATISTICS,
    HEAD_STATISTICS,
    Layout,
    head_statistics,
    logits_for,
)
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

analyze = foveola.analyze_attention


def make(**changes) -> Encoder:
    settings = {"width": 16, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32} | changes
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Encoder(
            EncoderConfig(ViTConfig(**settings), TransformConfig(resize=40, crop=32), pool="average")
        )
        for block in made.backbone.blocks:
            block.attn.qkv.weight.mul_(30)
    return made


@pytest.fixture
def source(list_source, make_sample):
    return list_source([make_sample(seed, height=50, width=60 + seed) for seed in range(7)])


def attention_of(encoder: Encoder, image: Tensor) -> list[Tensor]:
    """[heads, T, T] of every block in float64, from inputs seen by hooks and the block's weights."""
    inputs: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, i, o: inputs.append(i[0])) for b in encoder.backbone.blocks]
    encoder.backbone(image[None])
    for hook in hooks:
        hook.remove()
    found = []
    for x, block in zip(inputs, encoder.backbone.blocks, strict=True):
        q, k, _ = (part[0].double() for part in block.attn.heads_of(block.norm1(x)))
        found.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))
    return found


def same(a, b, rtol: float = 1e-9) -> None:
    """Two encoders' estimates of every statistic."""
    for level in ("heads", "blocks", "whole"):
        for name, estimate in getattr(a, level).items():
            for one, other in zip(estimate, getattr(b, level)[name], strict=True):
                np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(a.head_divergences.mean, b.head_divergences.mean, rtol=rtol, atol=1e-7)


def test_means_and_errors_over_images(source) -> None:
    encoder = make(registers=2)
    found = analyze({"mine": encoder}, source, workers=0, batch_size=3)["mine"]
    at = Layout(True, 2, (4, 4), 8)
    geometry = (40, 32, "bicubic", False)
    values, means, entropies = [], [], []
    for sample in source.samples:
        image = encoder.normalise(cut(sample.image, geometry)[None])[0]
        every = attention_of(encoder, image)
        values.append([head_statistics(logits_for(a[None]), at).statistics[0].numpy() for a in every])
        row = every[-1][:, 0, 3:].mean(dim=0)
        entropies.append(-(row / row.sum() * (row / row.sum()).log()).sum().item())
    values = np.array(values)  # [images, blocks, heads, statistics]
    for i, name in enumerate(HEAD_STATISTICS):
        if name == "head_divergence":
            continue
        for level, x in (
            ("heads", values[..., i]),
            ("blocks", values[..., i].mean(axis=2)),
            ("whole", values[..., i].mean(axis=(1, 2))),
        ):
            estimate = getattr(found, level)[name]
            np.testing.assert_allclose(estimate.mean, x.mean(axis=0), rtol=1e-4, atol=1e-6)
            error = x.std(axis=0, ddof=1) / math.sqrt(7)
            np.testing.assert_allclose(estimate.error, error, rtol=2e-2, atol=1e-6)
    means = found.blocks["aggregation_entropy"]
    assert means.mean[-1] == pytest.approx(np.mean(entropies), rel=1e-5)
    assert means.error[-1] == pytest.approx(np.std(entropies, ddof=1) / math.sqrt(7), rel=1e-2)
    assert found.about["grid"] == [4, 4]


def test_batches_and_company_change_nothing(source) -> None:
    a, b = make(registers=1), make(class_token=False, positions="rope", registers=4)
    together = analyze({"a": a, "b": b}, source, workers=0, batch_size=2)
    at_once = analyze({"a": a, "b": b}, source, workers=2, batch_size=64)
    for name, encoder in (("a", a), ("b", b)):
        same(together[name], at_once[name], 1e-5)
        same(together[name], analyze({name: encoder}, source, workers=0, batch_size=2)[name])
    np.testing.assert_allclose(
        together.vectors[0].divergence.mean, at_once.vectors[0].divergence.mean, rtol=1e-5
    )


def test_heads_one_by_one_change_nothing(source, monkeypatch) -> None:
    """Images whose matrices do not fit are read a head at a time."""
    encoder = make(registers=1)
    before = analyze(encoder, source, workers=0, limit=3)
    monkeypatch.setattr("foveola.models.capture.CACHED", 1)
    after = analyze(encoder, source, workers=0, limit=3)
    same(before.encoders[0], after.encoders[0], 1e-5)
    np.testing.assert_allclose(before.vectors[0].entropy.mean, after.vectors[0].entropy.mean, rtol=1e-5)


def test_half_precision_is_near(source) -> None:
    exact = analyze(make(), source, workers=0, limit=3).encoders[0]
    coarse = analyze(make(), source, workers=0, limit=3, precision="bf16").encoders[0]
    for name in ("class_entropy", "patch_entropy", "distance_share"):
        difference = abs(coarse.whole[name].mean - exact.whole[name].mean)
        assert 0 < difference < 0.05, name


def test_without_class_token_and_registers(source, tmp_path) -> None:
    """Null, not an error; the mean of the patches is the uniform aggregation."""
    analysis = analyze({"bare": make(class_token=False)}, source, workers=0, out=tmp_path / "new")
    found = analysis["bare"]
    for name in HEAD_STATISTICS | BLOCK_STATISTICS:
        lacking = "class" in name or "register" in name or name in ("head_divergence", "lowest_entropy")
        assert np.isnan(found.whole[name].mean) == (lacking or name == "outlier_share_fixed"), name
    assert found.blocks["aggregation_entropy"].mean == pytest.approx([math.log(16)] * 2)
    tree = json.loads((tmp_path / "new" / "attention.json").read_text())
    statistics = tree["encoders"][0]["statistics"]
    assert statistics["class_entropy"]["heads"]["mean"] == [[None, None], [None, None]]
    assert statistics["class_entropy"]["uniform"] == pytest.approx(math.log(16))
    assert statistics["nmi"]["whole"]["mean"] == pytest.approx(float(found.whole["nmi"].mean))
    assert analysis.vectors[0].names == ("bare: centre", "uniform")
    assert "bare has no class token" in analysis.table()
    assert "cls entropy" not in analysis.table()


def test_files_hold_every_number(source, tmp_path) -> None:
    analysis = analyze({"a": make(), "b": make(depth=1, heads=4)}, source, workers=0, outlier_norm=3.0)
    tree, table = analysis.save(tmp_path)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert analysis.frame()["statistic"].tolist() == [row["statistic"] for row in rows]
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == sum(
        len(HEAD_STATISTICS) * (blocks * (heads + 1) + 1) + len(BLOCK_STATISTICS) * (blocks + 1)
        for blocks, heads in ((2, 2), (1, 4))
    )
    want = {"encoder": "a", "block": "2", "head": "1", "statistic": "nmi"}
    (row,) = [row for row in rows if want.items() <= row.items()]
    assert float(row["mean"]) == pytest.approx(analysis["a"].heads["nmi"].mean[1, 0])
    assert float(row["standard_error"]) == pytest.approx(analysis["a"].heads["nmi"].error[1, 0])
    assert (row["uniform"], row["low"], row["high"], row["images"]) == ("0.0", "0.0", "1.0", "7")
    want = {"encoder": "b", "block": "mean", "head": "all", "statistic": "patch_norm"}
    (row,) = [row for row in rows if want.items() <= row.items()]
    assert float(row["mean"]) == pytest.approx(float(analysis["b"].whole["patch_norm"].mean))
    written = json.loads(tree.read_text())
    assert [e["name"] for e in written["encoders"]] == ["a", "b"]
    assert written["data"]["analysed"] == 7
    assert written["settings"]["outlier_norm"] == 3.0
    assert all(encoder.cost["ratio"] > 0 and encoder.cost["images"] == 7 for encoder in analysis.encoders)
    assert "times)" in analysis.table()


def test_one_image_has_no_standard_error(source) -> None:
    analysis = analyze(make(), source, workers=0, limit=1)
    estimate = analysis.encoders[0].heads["nmi"]
    assert np.isfinite(estimate.mean).all()
    assert np.isnan(estimate.error).all()
    assert json.dumps(analysis.to_json(), allow_nan=False)


def test_vectors_of_encoders_on_the_same_patches(source) -> None:
    """Encoders of one grid are compared, others apart; an encoder is at no distance from itself."""
    coarse = make(patch_size=16)
    analysis = analyze({"a": make(), "twin": make(), "coarse": coarse}, source, workers=0)
    first, second = analysis.vectors
    assert (first.grid, second.grid) == ((4, 4), (2, 2))
    assert first.names[::3] == ("a: class", "twin: class", "uniform")
    assert first.divergence.mean[0, 3] == pytest.approx(0, abs=1e-12)
    assert first.divergence.mean[0, -1] == pytest.approx(math.log(16) - first.entropy.mean[0])
    assert first.divergence.mean[0, -1] > 0.01
    assert first.entropy.mean[-1] == pytest.approx(math.log(16))
    assert any("different patches" in note for note in analysis.notes)
    narrow = make()
    narrow.config = replace(narrow.config, transform=TransformConfig(resize=32, crop=32))
    assert len(analyze({"a": make(), "narrow": narrow}, source, workers=0).vectors) == 2


def test_encoders_of_timm_and_pixels(source, tmp_path) -> None:
    timm = pytest.importorskip("timm")
    name = "timm:vit_tiny_patch16_224?pretrained=false"
    analysis = analyze([name, "pixels:?size=16&patch=8"], source, workers=0, limit=2, size=32)
    found, pixels = analysis.encoders
    assert (found.name, found.about["grid"], found.about["size"]) == (name, [2, 2], 32)
    assert found.heads["class_entropy"].mean.shape == (12, 3)
    assert pixels.about["grid"] == [4, 4]
    assert timm.__version__


def test_names_that_tell_apart(source, tmp_path) -> None:
    """The ends of paths; whole paths where those are the same."""
    paths = [make(heads=heads).save(tmp_path / str(heads) / "run") for heads in (1, 2)]
    models = [*paths, f"untrained:{paths[0]}"]
    analysis = analyze(models, source, workers=0, limit=1)
    assert [encoder.name for encoder in analysis.encoders] == [str(model) for model in models]
    analysis = analyze(models[1:], source, workers=0, limit=1)
    assert [encoder.name for encoder in analysis.encoders] == ["run", "untrained:run"]


@pytest.mark.parametrize("squash", [None, True])
def test_size_of_images(source, squash) -> None:
    """A larger size enlarges the same view; `squash` shows all of the image."""
    analysis = analyze(make(), source, workers=0, limit=2, size=64, squash=squash)
    about = analysis.encoders[0].about
    assert (about["grid"], about["resize"]) == ([8, 8], 64 if squash else 80)
    assert analysis.encoders[0].layout.patches == 64


def test_images_are_cut_as_the_encoder_does() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    for transform in (TransformConfig(resize=40, crop=32), TransformConfig(resize=32, crop=32, squash=True)):
        encoder = Encoder(EncoderConfig(make().config.model, transform))
        geometry = (transform.resize, transform.crop, transform.interpolation, transform.squash)
        mine = encoder.normalise(cut(image, geometry)[None])[0]
        assert (mine - encoder.transform(Image.fromarray(image))).abs().max() < 0.03  # one step of 255


def test_moments_are_numpys() -> None:
    x = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0)).double() + 1e6
    moments, other, empty = RunningMoments(3, 2), RunningMoments(3, 2), RunningMoments(3, 2)
    for part in x[:25].split(7):
        moments.add(part)
    other.add(x[25:])
    moments.merge(other)
    moments.merge(empty)
    empty.merge(moments)
    for found in (moments, empty):
        np.testing.assert_allclose(found.estimate().mean, x.numpy().mean(axis=0), rtol=1e-14)
        expected = x.numpy().std(axis=0, ddof=1) / math.sqrt(40)
        np.testing.assert_allclose(found.estimate().error, expected, rtol=1e-9)


def test_two_processes_find_what_one_does(run_ranks) -> None:
    code = """
import torch
from foveola import analyze_attention, distributed
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
torch.manual_seed(0)
encoder = Encoder(EncoderConfig(ViTConfig(width=16, depth=1, heads=2, patch_size=8, image_size=32),
                                TransformConfig(resize=32, crop=32)))
def numbers():
    found = analyze_attention(encoder, "scenes:?count=7", workers=0, progress=False, batch_size=2)
    norm = found.encoders[0].whole["patch_norm"]
    entropy = found.vectors[0].entropy
    return [norm.mean.item(), norm.error.item(), entropy.mean[0].item(), found.data["analysed"]]
alone = numbers()
with distributed.joined("cpu"):
    print(max(abs(a - b) for a, b in zip(alone, numbers())) < 1e-6, alone[3])
"""
    for line in run_ranks(code):
        assert line.split() == ["True", "7"]


def test_mistakes(source, list_source, make_sample, tmp_path) -> None:
    encoder = make()
    with pytest.raises(UserError, match="unknown key 'limits'; did you mean 'limit'"):
        analyze(encoder, source, limits=3)
    with pytest.raises(UserError, match="precision: expected"):
        analyze(encoder, source, precision="fp8")
    with pytest.raises(UserError, match="size=36 is not a multiple of the patch size 8 of mine"):
        analyze({"mine": encoder}, source, size=36)
    with pytest.raises(UserError, match="expected at least one encoder"):
        analyze([], source)
    with pytest.raises(UserError, match="model: nowhere is given twice"):
        analyze(["nowhere", "nowhere"], source)
    with pytest.raises(UserError, match="no model at nowhere"):
        analyze("nowhere", source)
    with pytest.raises(UserError, match="no images"):
        analyze(encoder, list_source([]), workers=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out=.*file: no folder can be made there: .*choose another place"):
        analyze(encoder, source, out=tmp_path / "file")
    encoder.backbone.blocks[1].norm1.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="mine: its attention on images of list: is not finite"):
        analyze({"mine": encoder}, source, workers=0)


def test_unreadable_images(list_source, make_sample, monkeypatch) -> None:
    good = [make_sample(seed) for seed in range(3)]
    source = list_source([*good, replace(good[0], image=b"no image", name="torn")])
    with pytest.raises(UserError, match="1 of 4 images cannot be read, such as torn"):
        analyze(make(), source, workers=0)
    monkeypatch.setattr("foveola.evaluation.images.MAX_BAD", 0.5)
    analysis = analyze(make(), source, workers=0)
    assert (analysis.data["analysed"], analysis.data["unreadable"]) == (3, 1)
    same(analysis.encoders[0], analyze(make(), list_source(good), workers=0).encoders[0])
