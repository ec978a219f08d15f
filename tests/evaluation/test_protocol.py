import json
from pathlib import Path

import pytest
import torch

import foveola
from foveola.config import UserError
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.protocol import PROTOCOLS, every
from foveola.evaluation.result import Result

QUIET = {"progress": False, "workers": 0}


@pytest.fixture
def shades(list_source, make_sample):
    """shades(first, count): noise with a box of one brightness; its class is the brightness."""
    import numpy as np

    from foveola.data.sample import Sample

    def make(first: int, count: int, **kwargs):
        samples = []
        for i in range(first, first + count):
            sample = make_sample(i, [(24, 14, 56, 46)], label=i % 3, labels=[i % 3])
            image = np.asarray(sample.image).copy()
            image[14:46, 24:56] = 40 + 90 * (i % 3)
            samples.append(Sample(image, sample.name, sample.objects, i % 3))
        return list_source(samples, name=f"shades{first}:", **kwargs)

    return make


def test_knn_on_an_encoder(encoder, shades, tmp_path: Path) -> None:
    result = evaluate(
        encoder, "knn", train=shades(0, 60), test=shades(1000, 30), out=tmp_path, k=(5, 10), **QUIET
    )
    metrics = result.metrics
    assert {
        "top1_plain",
        "top1_masks",
        "top1_masks_k5",
        "top1_plain_k10",
        "top5_masks",
        "best_k_masks",
    } <= set(metrics)
    assert metrics["top1_masks"] == max(metrics["top1_masks_k5"], metrics["top1_masks_k10"]) > 90
    assert metrics["top1_masks_low"] <= metrics["top1_masks"] <= metrics["top1_masks_high"]
    assert result.data["train"]["rows"] == result.data["train"]["rows_with_mask"] == 60
    assert result.settings["k"] == [5, 10]
    assert result.encoder == encoder.fingerprint()
    assert result.versions["foveola"] == foveola.__version__
    path = tmp_path / "results" / "knn.json"
    assert json.loads(path.read_text())["metrics"] == metrics
    assert Result.read(path) == result
    assert [p.name for p in path.parent.iterdir()] == ["knn.json"]
    lines = result.table().splitlines()
    assert lines[0].startswith("knn: train shades0: (60 rows), test shades1000: (30 rows)")
    low, high = (metrics[f"top1_plain_{end}"] for end in ("low", "high"))
    assert lines[1].split() == ["top1_plain", f"{metrics['top1_plain']:.2f}", f"[{low:.2f},", f"{high:.2f}]"]


def test_a_run_folder_keeps_its_results(encoder, shades, tmp_path: Path) -> None:
    encoder.save(tmp_path / "run" / "encoder")
    result = evaluate(
        tmp_path / "run", "knn", train=shades(0, 20), test=shades(99, 9), device="cpu", k=(3,), **QUIET
    )
    assert Result.read(tmp_path / "run" / "results" / "knn.json").metrics == result.metrics
    evaluate(
        tmp_path / "run" / "encoder",
        "knn",
        train=shades(0, 20),
        test=shades(99, 9),
        device="cpu",
        k=(3,),
        **QUIET,
    )
    assert not (tmp_path / "run" / "encoder" / "results").exists()


def test_objects_of_the_built_in_scenes(encoder) -> None:
    settings = {"rows": "objects", "view": "object", "k": (5, 20), **QUIET}
    result = evaluate(encoder, "knn", train="scenes:?count=40", test="scenes:?count=20", **settings)
    assert result.data["train"]["rows"] > 80
    assert result.data["train"]["fingerprint"] != result.data["test"]["fingerprint"]
    assert {"top1_plain", "top1_masks"} <= set(result.metrics)


def test_k_above_the_reference_set_is_clipped_and_said(encoder, shades) -> None:
    result = evaluate(encoder, "knn", train=shades(0, 15), test=shades(99, 6), masks=False, **QUIET)
    assert {"top1_plain_k10", "top1_plain_k15"} <= set(result.metrics)
    assert "top1_plain_k20" not in result.metrics
    assert result.notes == ("the reference set has 15 rows: k = 10, 15 instead of [10, 20, 100, 200]",)


def test_mistakes_are_one_clear_line(encoder, shades, list_source, make_sample, tmp_path: Path) -> None:
    train, test = shades(0, 12), shades(99, 6)
    unlabelled = list_source([make_sample(i, [(20, 20, 40, 40)]) for i in range(6)], name="bare:")
    other = shades(200, 6, classes=("x", "y", "z"))
    for protocol, kwargs, message in [
        ("kn", {"train": train, "test": test}, "unknown protocol 'kn'; did you mean 'knn'"),
        ("linar", {"train": train, "test": test}, "did you mean 'linear'"),
        ("zzz", {"train": train, "test": test}, "known: classify, segment, knn, logistic"),
        ("knn", {"train": train}, "knn: test is needed"),
        ("knn", {"test": test}, "knn: train is needed"),
        ("retrieval", {}, "retrieval: test is needed"),
        ("knn", {"train": train, "test": test, "temprature": 1}, "temperature"),
        ("knn", {"train": unlabelled, "test": test}, "train: no labels on its images"),
        ("knn", {"train": train, "test": unlabelled}, "test: no labels on its images"),
        ("knn", {"train": unlabelled, "test": test, "rows": "objects"}, "train: no labels on its objects"),
        ("knn", {"train": shades(0, 12, classes=("a", "b", "c")), "test": other}, "share no class"),
        (
            "knn",
            {"train": train, "test": train},
            "12 of 12 test images .*exclude_self=true",
        ),
        ("knn", {"train": train, "test": test, "exclude_self": True}, "exclude_self=true does nothing here"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            evaluate(encoder, protocol, **kwargs, **QUIET)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no model at"):
        evaluate(tmp_path / "nothing", "knn", train=train, test=test, **QUIET)
    encoder.backbone.cls_token.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(encoder, "knn", train=train, test=test, **QUIET)


def test_leaving_one_out(encoder, shades) -> None:
    data = shades(0, 30)
    result = evaluate(
        encoder, "knn", train=data, test=data, exclude_self=True, k=(1, 29), masks=True, **QUIET
    )
    assert result.metrics["top1_masks_k1"] > 80
    assert result.data["train"] == result.data["test"]
    # In a vote of all 29 others, with all weights alike, one's own class is the rarest.
    soft = evaluate(
        encoder,
        "knn",
        train=data,
        test=data,
        exclude_self=True,
        k=(29,),
        temperature=1e9,
        masks=True,
        **QUIET,
    )
    assert soft.metrics["top1_masks"] == 0.0


def test_retrieval_through_evaluate(encoder, shades, tmp_path: Path) -> None:
    result = evaluate(encoder, "retrieval", test=shades(0, 20), out=tmp_path, objects=20, **QUIET)
    assert result.metrics["chance_rank1"] == 5.0
    assert (tmp_path / "results" / "retrieval.json").is_file()
    assert "(20 rows)" in result.table()


def test_training_images_are_refused_where_nothing_learns(encoder, shades) -> None:
    with pytest.raises(UserError, match="train= has no effect: retrieval learns from nothing; leave it out"):
        evaluate(encoder, "retrieval", train=shades(0, 3), test=shades(0, 6), **QUIET)


def test_every_protocol_says_what_it_is() -> None:
    assert [protocol.name for protocol in every()] == list(PROTOCOLS)
    for protocol in every():
        assert protocol.help
        protocol.Config()  # every key has a default
        assert any(metric.main for metric in protocol.metrics)


def test_ranks_find_what_one_process_finds(run_ranks) -> None:
    code = """
import torch
from foveola import distributed
from foveola.evaluation.evaluate import evaluate
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
torch.manual_seed(0)
model = ViTConfig(width=16, depth=1, heads=1, patch_size=8, image_size=32)
encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=36, crop=32)))
def measure():
    settings = {"rows": "objects", "k": (5, 9), "workers": 0}
    knn = evaluate(encoder, "knn", train="scenes:?count=31", test="scenes:?count=23", **settings)
    found = evaluate(encoder, "retrieval", test="scenes:?count=80", objects=70, workers=0)
    return {**knn.metrics, **found.metrics}
alone = measure()
distributed.start("cpu")
shared = measure()
assert alone.keys() == shared.keys()
for name, value in alone.items():
    assert abs(value - shared[name]) < 1e-3, (name, value, shared[name])
distributed.stop()
"""
    run_ranks(code, ranks=2)
