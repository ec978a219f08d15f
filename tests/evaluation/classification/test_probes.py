"""The protocols of trained probes end to end: they learn, nothing leaks, mistakes are clear."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from foveola.config import ConfigError, UserError
from foveola.evaluation.classification import task
from foveola.evaluation.classification.task import ProbeConfig, held_out, length_of, open_task
from foveola.evaluation.classification.training import Columns, batches
from foveola.evaluation.evaluate import evaluate, evaluate_all
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.need import need
from foveola.evaluation.metrics import GroundTruth, judged
from foveola.evaluation.protocol import At
from foveola.evaluation.result import Result

QUIET = {"progress": False, "workers": 0}
SHORT = {
    "linear": {"iterations": 60, "batch": 32},
    "logistic": {"values": 4},
    "attentive": {"iterations": 60, "batch": 32, "lr": (1e-3, 1e-2), "weight_decay": (1e-3,)},
    "abmilp": {"epochs": 40, "batch": 32, "lr": (0.1, 1.0), "warmup": 2},
    "probes": {"epochs": 8, "batch": 32, "values": 3, "k": (5,)},
}


@pytest.mark.parametrize("protocol", SHORT)
def test_probes_learn_brightness(protocol, encoder, shades, check_scores, tmp_path: Path) -> None:
    result = evaluate(
        encoder, protocol, train=shades(0, 90), test=shades(900, 30), out=tmp_path, **SHORT[protocol], **QUIET
    )
    groups = {name.removeprefix("top1_") for name in result.metrics if name.startswith("top1_")}
    groups -= {name for name in groups if name.endswith(("_low", "_high", "_best_on_test"))}
    expected = {
        "abmilp": {"abmilp", "token", "average", "attention", "lowest_entropy", "centre"},
        "probes": {
            *("knn", "logistic", "linear", "abmilp", "token", "average", "attention", "lowest_entropy"),
            *("centre", "attentive", "cae"),  # of width 32, with one head in any case
        },
    }
    assert groups == expected.get(protocol, {protocol})
    strong = {"linear", "logistic", "attentive", "average", "knn"} & groups
    for group in groups:
        value = result.metrics[f"top1_{group}"]
        assert value > (80 if group in strong else 45), group
        assert result.metrics[f"top1_{group}_low"] <= value <= result.metrics[f"top1_{group}_high"]
    assert result.data["split"] == {"fit": 81, "holdout": 9, "scored": 30}
    for group, rows in result.grid.items():
        assert {"holdout", "test"} < set(rows[0]), group
        best = max(row["holdout"] for row in rows)
        assert result.metrics[f"holdout_{group}"] == best
    assert Result.read(tmp_path / "results" / f"{protocol}.json") == result
    check_scores(result)
    assert json.loads((tmp_path / "results" / f"{protocol}.json").read_text())["grid"] == result.grid
    assert "pass over train: 90 images in" in result.table()


def test_heads_of_abmilp_are_reported_beside_each_other(encoder, shades) -> None:
    """One head is what there is without the key; several in one call are what they are alone."""
    places = {"train": shades(0, 60), "test": shades(900, 15), "fixed": ("average",), **SHORT["abmilp"]}
    alone = evaluate(encoder, "abmilp", **places, **QUIET)
    both = evaluate(encoder, "abmilp", heads=(1, 4), **places, **QUIET)
    four = evaluate(encoder, "abmilp", heads=(4,), depth=(1, 2), **places, **QUIET)
    for name, value in alone.metrics.items():
        assert both.metrics[name.replace("abmilp", "abmilp_heads1")] == value
    assert both.metrics["entropy_abmilp_heads4"] == four.metrics["entropy_abmilp_1"]
    assert both.metrics["entropy_abmilp_heads4"] != both.metrics["entropy_abmilp_heads1"]
    assert "entropy_abmilp_2_relu" in four.metrics
    assert "heads" not in alone.chosen["abmilp"]
    one, several = (both.chosen[f"abmilp_heads{heads}"]["parameters"] for heads in (1, 4))
    assert several == one + 3 * 33
    with pytest.raises(UserError, match="heads=5 do not divide the width of the patches, 32; 4 or 8 do"):
        evaluate(encoder, "abmilp", heads=(5,), **places, **QUIET)
    with pytest.raises(UserError, match="heads: needs different values"):
        evaluate(encoder, "abmilp", heads=(2, 2), **places, **QUIET)


def test_styles_of_the_linear_probe(encoder, shades) -> None:
    for style, group, count in (
        ("dino", "linear", 4 * 15),
        ("dinov2", "linear", 4 * 13),
        ("mae", "token", 1),
    ):
        result = evaluate(
            encoder,
            "linear",
            train=shades(0, 60),
            test=shades(900, 15),
            style=style,
            epochs=2,
            batch=32,
            **QUIET,
        )
        rows = result.grid[group]
        assert len(rows) == count
        assert len({(row["features"], row["lr"]) for row in rows}) == count
    assert result.chosen["token"]["parameters"] == 3 * 33


def test_masks_change_the_tokens_that_are_read(encoder, shades, monkeypatch) -> None:
    settings = {"train": shades(0, 60), "test": shades(900, 15), "values": 3, **QUIET}
    opened, plain = [], Feed.open
    monkeypatch.setattr(Feed, "open", lambda self, *a: opened.append(a[2].features) or plain(self, *a))
    for masks, kinds in ((False, {"token"}), (True, {"masked"})):
        result = evaluate(encoder, "logistic", masks=masks, **settings)
        assert opened[-1] == kinds
        assert result.data["train"].get("rows_with_mask") == (60 if masks else None)
        assert result.metrics["top1_logistic"] > 80


@pytest.mark.parametrize("protocol", ["linear", "logistic", "attentive"])
def test_the_test_set_has_no_say(protocol, encoder, shades, tmp_path: Path) -> None:
    """With poisoned test labels the same probe is chosen and trained: only its score falls."""
    good, poisoned = shades(900, 30), shades(900, 30)
    poisoned.samples = [dataclasses.replace(s, label=(s.label + 1) % 3) for s in poisoned.samples]
    poisoned.name = "poisoned:"
    one, two = (
        evaluate(encoder, protocol, train=shades(0, 90), test=test, **SHORT[protocol], **QUIET)
        for test in (good, poisoned)
    )
    assert one.chosen == two.chosen
    for a, b in zip(one.grid[protocol], two.grid[protocol], strict=True):
        assert a["holdout"] == b["holdout"]
    assert one.metrics[f"top1_{protocol}"] > 80 > 20 > two.metrics[f"top1_{protocol}"]


def test_the_hold_out_does_not_train(encoder, shades, monkeypatch) -> None:
    """With poisoned labels of the hold-out alone, every probe of the grid scores the same on test."""
    train, poisoned = shades(0, 90), shades(0, 90)
    fit, hold = held_out(torch.arange(90), 0.1, 0, torch.arange(90) % 3)
    monkeypatch.setattr(task, "held_out", lambda *_: (fit, hold))  # of either labels the same rows
    for i in hold.tolist():
        poisoned.samples[i] = dataclasses.replace(
            poisoned.samples[i], label=(poisoned.samples[i].label + 1) % 3
        )
    poisoned.name = "poisoned:"
    one, two = (
        evaluate(encoder, "linear", train=t, test=shades(900, 30), **SHORT["linear"], **QUIET)
        for t in (train, poisoned)
    )
    assert [row["test"] for row in one.grid["linear"]] == [row["test"] for row in two.grid["linear"]]
    perfect = [
        b["holdout"]
        for a, b in zip(one.grid["linear"], two.grid["linear"], strict=True)
        if a["holdout"] == 100
    ]
    assert len(perfect) > 10
    assert max(perfect) == 0


def test_train_and_test_may_not_be_one(encoder, shades) -> None:
    same = shades(0, 30)
    for protocol in SHORT:
        with pytest.raises(UserError, match=r"30 of 30 test images are in train as well"):
            evaluate(
                encoder, protocol, train=same, test=same, **SHORT[protocol], run=("linear",), **QUIET
            ) if (protocol == "probes") else evaluate(
                encoder, protocol, train=same, test=same, **SHORT[protocol], **QUIET
            )


def test_hold_out_is_a_seeded_partition() -> None:
    rows = torch.arange(5, 105)
    fit, hold = held_out(rows, 0.1, 3)
    assert len(hold) == 10
    assert torch.equal(torch.cat((fit, hold)).sort().values, rows)
    assert torch.equal(held_out(rows, 0.1, 3)[1], hold)
    assert not torch.equal(held_out(rows, 0.1, 4)[1], hold)
    assert len(held_out(rows[:4], 0.1, 0)[1]) == 1
    assert len(held_out(rows, 0.0, 0)[1]) == 0


def test_the_hold_out_is_of_every_class_and_leaves_one() -> None:
    """Of 40, 10, 3, 2 and 1 rows: each gives its share as nearly as whole rows can, the last gives none."""
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 3 + [3] * 2 + [7])
    labels = labels[torch.randperm(56, generator=torch.Generator().manual_seed(0))]
    rows = torch.arange(56) + 100
    held = torch.zeros(8)
    for seed in range(60):
        fit, hold = held_out(rows, 0.25, seed, labels)
        assert len(hold) == 14
        assert torch.equal(torch.cat((fit, hold)).sort().values, rows)
        assert set(labels[fit - 100].tolist()) == {0, 1, 2, 3, 7}
        counts = labels[hold - 100].bincount(minlength=8)
        assert 9 <= counts[0] <= 12
        assert 2 <= counts[1] <= 3
        assert counts[7] == 0
        held += counts / 60
    assert held[:4].tolist() == pytest.approx([10.2, 2.55, 0.77, 0.5], abs=0.25)
    assert len(held_out(rows[:5], 0.5, 0, torch.arange(5))[1]) == 0  # none can be spared


def test_equals_on_the_hold_out_are_told_apart_by_its_loss(encoder, shades) -> None:
    """Separable classes: many rates have all right; the smallest of them hardly learned anything."""
    settings = {"iterations": 60, "batch": 32, "features": ("average",), **QUIET}
    result = evaluate(encoder, "linear", train=shades(0, 90), test=shades(900, 30), **settings)
    rows = result.grid["linear"]
    equals = [row["lr"] for row in rows if row["holdout"] == max(r["holdout"] for r in rows)]
    assert len(equals) > 2
    assert result.chosen["linear"]["lr"] > min(equals)
    losses = torch.tensor([[[2.0, 0.0]], [[5.0, 0.0]], [[5.0, torch.nan]]])
    found = judged(lambda rows: losses, 1, GroundTruth(torch.tensor([0]), torch.tensor([0])))
    assert found.order() == [
        (100.0, pytest.approx(-math.log1p(math.exp(-2)))),
        (100.0, pytest.approx(-math.log1p(math.exp(-5)))),
        (0.0, -math.inf),
    ]
    assert max(range(3), key=found.order().__getitem__) == 1


def test_one_candidate_trains_on_everything(encoder, shades) -> None:
    train, test = shades(0, 30), shades(900, 9)
    for protocol, settings, held in (
        ("abmilp", {"epochs": 2, "fixed": ("average",)}, 0),
        ("linear", {"style": "mae", "epochs": 2}, 0),
        ("linear", {"style": "mae", "epochs": 2, "holdout": 0.2}, 6),
        ("linear", {"style": "mae", "epochs": 2, "lr": (0.1, 1.0)}, 3),
    ):
        result = evaluate(encoder, protocol, train=train, test=test, **settings, **QUIET)
        assert result.data["split"] == {"fit": 30 - held, "holdout": held, "scored": 9}
        assert not any("chosen on the test set" in note for note in result.notes)
    assert any("BatchNorm over 27 images (MAE: 512)" in note for note in result.notes)
    train.samples = train.samples[:3]  # one of each class
    with pytest.raises(UserError, match=r"no class has two .* choose among 52 probes; .* holdout=0"):
        evaluate(encoder, "linear", train=train, test=test, **QUIET)


def test_small_sets_do_not_train_for_as_long_as_imagenet(encoder, shades, monkeypatch) -> None:
    assert length_of(1_281_167, 1024, None, None, 12500) == (1024, 1251, 12500)
    assert length_of(128_000, 1024, None, None, 12500)[2] == 12500
    assert length_of(20_480, 1024, None, None, 12500) == (1024, 20, 2000)
    assert length_of(2, 1024, None, None, 12500) == (2, 1, 100)
    assert length_of(2, 1024, None, 70, None)[2] == 70
    assert length_of(20_480, 1024, 3, None, None)[2] == 60
    monkeypatch.setattr(task, "MOST_PASSES", 4)
    for protocol, settings in (("linear", {"lr": (0.1, 0.2)}), ("attentive", {"weight_decay": (1e-3,)})):
        result = evaluate(
            encoder, protocol, train=shades(0, 30), test=shades(900, 9), batch=9, **settings, **QUIET
        )
        assert result.data["training"] == {"batch": 9, "steps": 12, "epochs": 4}
        assert any("12 steps, 4 passes over 27 images; published: 12,500" in n for n in result.notes)
        assert any("published probes train on random crops (views=)" in note for note in result.notes)


def test_without_hold_out_the_test_set_chooses_and_it_is_said(encoder, shades) -> None:
    result = evaluate(
        encoder, "linear", train=shades(0, 60), test=shades(900, 15), holdout=0, **SHORT["linear"], **QUIET
    )
    assert result.metrics["top1_linear"] == result.metrics["top1_linear_best_on_test"]
    assert "the best of 52 probes was chosen on the test set (holdout=0)" in result.notes
    assert "holdout" not in result.grid["linear"][0]


def test_epochs_see_every_row_once_and_crops_in_turn(encoder, shades, monkeypatch) -> None:
    train = shades(0, 24)
    with Feed(encoder, None, progress=False) as feed:
        config = ProbeConfig(workers=0, views=2)
        store = feed.open(train, config, need("average"), 2)
        columns = Columns(store, torch.arange(24), need("average"), torch.device("cpu"), 2)
        views = [store.take("average", slice(None), view) for view in range(3)]
        monkeypatch.setattr("foveola.evaluation.classification.training.PRELOAD", 0)
        on_disk = Columns(store, torch.arange(24), need("average"), torch.device("cpu"), 2)
        assert columns.kept
        assert not on_disk.kept
        labels = torch.arange(24)
        drawn = list(batches(columns, labels, 8, 9, 0, 2))
        for (x, y), (x2, y2) in zip(drawn, batches(on_disk, labels, 8, 9, 0, 2), strict=True):
            assert torch.equal(y, y2)
            assert torch.equal(x["average"], x2["average"])
    for epoch in range(3):
        seen = torch.cat([y for _, y in drawn[3 * epoch : 3 * epoch + 3]])
        assert torch.equal(seen.sort().values, labels)
        for x, y in drawn[3 * epoch : 3 * epoch + 3]:
            assert torch.equal(x["average"], views[1 + epoch % 2][y])
    assert not torch.equal(drawn[0][1], drawn[3][1])


def test_views_train_and_the_evaluation_view_chooses(encoder, shades) -> None:
    result = evaluate(
        encoder, "linear", train=shades(0, 60), test=shades(900, 15), views=3, **SHORT["linear"], **QUIET
    )
    assert result.data["train"]["views"] == 3
    assert result.data["test"]["views"] == 0
    assert result.metrics["top1_linear"] > 60


def test_top5_is_any_right_answer_among_candidates() -> None:
    """Nine classes of falling score; the first answer is the lowest, another one is the second of all."""
    logits = torch.arange(9.0).flip(0).expand(4, -1)
    others = tuple(torch.tensor(some) for some in ([8, 1], [8, 5], [8], [4, 8]))
    labels, images = torch.tensor([8, 8, 8, 4]), torch.arange(4)
    assert GroundTruth(labels, images).top5(logits).tolist() == [False, False, False, True]
    assert GroundTruth(labels, images, others).top5(logits).tolist() == [True, False, False, True]
    allowed = torch.tensor([c not in (0, 2, 3) for c in range(9)])
    assert GroundTruth(labels, images, others, allowed).top5(logits).tolist() == [True, True, False, True]
    three = torch.tensor([c in (4, 5, 8) for c in range(9)])  # fewer candidates than five
    assert GroundTruth(torch.tensor([0, 1, 2, 3]), images, None, three).top5(logits).tolist() == [False] * 4


def test_answers() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    labels, images = torch.tensor([0, 1, -1]), torch.arange(3)
    assert GroundTruth(labels, images).hits(logits).tolist() == [True, False, False]
    some = (torch.tensor([1, 0]), torch.tensor([2]), torch.tensor([2, 1]))
    assert GroundTruth(labels, images, some).hits(logits).tolist() == [True, False, True]
    allowed = torch.tensor([False, True, True])
    restricted = GroundTruth(labels, images, None, allowed)
    assert restricted.hits(logits).tolist() == [False, True, False]
    junk = logits.clone()
    junk[:, 0] = torch.tensor([-9.0, 50.0, 7.0])
    assert torch.equal(restricted.hits(junk), restricted.hits(logits))
    assert torch.equal(restricted.hits(torch.stack((logits, junk)))[1], restricted.hits(logits))
    assert restricted.hits(logits[1:], slice(1, 3)).tolist() == [True, False]
    assert GroundTruth(labels, images).top5(logits).tolist() == [True, True, False]


def test_classes_by_name_missing_and_empty(encoder, shades) -> None:
    """Test classes are matched by name; one that train lacks is wrong, an empty one never chosen."""
    train = shades(0, 60, classes=("dark", "grey", "bright", "never"))
    test = shades(900, 30, classes=("grey", "bright", "dark"))
    # The same images in the test set's own numbers.
    test.samples = [dataclasses.replace(s, label=(s.label + 2) % 3) for s in test.samples]
    result = evaluate(encoder, "logistic", train=train, test=test, values=3, **QUIET)
    assert result.metrics["top1_logistic"] > 80
    assert "train: 1 of 4 classes have no image" in result.notes
    lacking = shades(900, 30, classes=("dark", "grey", "other"))
    fewer = evaluate(encoder, "logistic", train=train, test=lacking, values=3, **QUIET)
    assert fewer.metrics["top1_logistic"] < 70
    assert any("10 of 30 rows are of classes that train lacks" in note for note in fewer.notes)


def test_imagenet_variants_restrict_and_accept_several(encoder, shades) -> None:
    train, test = shades(0, 30), shades(900, 6)
    test.candidates = (1, 2)
    test.answers = lambda index: np.array([test.samples[index].label, 2])
    with Feed(encoder, None, progress=False) as feed:
        config = ProbeConfig(workers=0)
        task = open_task(At(encoder, train, test, feed), config, need("average"), 2)
    assert task.exam.truth.candidates.tolist() == [False, True, True]
    assert [some.tolist() for some in task.exam.truth.others] == [[0, 2], [1, 2], [2, 2]] * 2


def test_mistakes_are_one_clear_line(encoder, shades, list_source, make_sample) -> None:
    train, test = shades(0, 30), shades(900, 9)
    bare = list_source([make_sample(i) for i in range(9)], name="bare:")
    single = list_source([make_sample(i, label=1) for i in range(9)], name="single:")
    for protocol, settings, message in [
        ("linear", {"train": bare}, "train: no labels on its images, which a probe needs"),
        ("linear", {"test": bare}, "test: no labels on its images, which a probe needs"),
        ("linear", {"train": single}, "single:: labels of 1 class; a probe needs two or more"),
        ("linear", {"features": ("tokens",)}, "unknown features 'tokens'; known: token"),
        ("linear", {"features": ("token9",)}, "last 9 blocks: this encoder has 3"),
        (
            "linear",
            {"features": ("predictor",)},
            "linear: features=predictor: this encoder has token",
        ),
        ("linear", {"lr": (0.1, 0.1)}, "lr: needs different values"),
        ("linear", {"epochs": 1, "iterations": 1}, "give one of them"),
        ("logistic", {"views": 2}, "learns from the evaluation view"),
        ("attentive", {"heads": (5,)}, "heads=5 do not divide the width of the patches, 32"),
        ("abmilp", {"depth": (9,)}, r"depth\[0\]: must be <= 8"),
        ("probes", {"run": ("knn", "knn")}, "run: needs different probes"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            evaluate(encoder, protocol, **{"train": train, "test": test, **QUIET, **settings})
        assert "\n" not in str(error.value)


def test_several_protocols_share_one_pass(encoder, shades, tmp_path: Path) -> None:
    """k-NN gives the numbers that it gives alone; what the second needs was read with the first."""
    train, test = shades(0, 60), shades(900, 15)
    results = evaluate_all(
        encoder,
        ("knn", "linear", "attentive"),
        train=train,
        test=test,
        out=tmp_path,
        k=(5, 10),
        linear=SHORT["linear"],
        attentive=SHORT["attentive"],
        **QUIET,
    )
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        "attentive",  # the probe
        "attentive.json",
        "knn.json",
        "linear",
        "linear.json",
    ]
    alone = evaluate(encoder, "knn", train=train, test=test, k=(5, 10), **QUIET)
    for name, value in alone.metrics.items():
        assert results["knn"].metrics[name] == pytest.approx(value, rel=1e-4), name
    assert results["linear"].settings["iterations"] == 60
    folders = {r.data["train"]["fingerprint"] for r in results.values()}
    assert len(folders) == 1
    for mistake, message in (
        ({"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"linear": {"depth": 1}}, "unknown key 'depth'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate_all(encoder, ("knn", "linear"), train=train, test=test, **mistake, **QUIET)
    with pytest.raises(UserError, match="expected different protocols"):
        evaluate_all(encoder, ("knn", "knn"), train=train, test=test, **QUIET)


def test_knn_of_averages_reads_the_shared_pass_too(encoder, shades) -> None:
    settings = {"train": shades(0, 60), "test": shades(900, 15), "pool": "average", "masks": False, "k": (5,)}
    shared = evaluate_all(encoder, ("knn", "logistic"), values=3, **settings, **QUIET)
    assert shared["knn"].data["train"]["fingerprint"] == shared["logistic"].data["train"]["fingerprint"]
    assert "computed" in shared["knn"].data["train"]
    alone = evaluate(encoder, "knn", **settings, **QUIET)
    assert "computed" not in alone.data["train"]
    for name, value in alone.metrics.items():
        assert shared["knn"].metrics[name] == pytest.approx(value, rel=1e-4), name
    tokens = evaluate(encoder, "knn", **{**settings, "pool": "token"}, **QUIET)
    assert tokens.metrics["effective_rank_plain"] != pytest.approx(alone.metrics["effective_rank_plain"])


def test_a_cache_folder_serves_the_next_evaluation(encoder, shades, tmp_path: Path, monkeypatch) -> None:
    settings = {"train": shades(0, 60), "test": shades(900, 15), "values": 3, **QUIET}
    first = evaluate(encoder, "logistic", cache=tmp_path, **settings)
    again = evaluate(encoder, "logistic", cache=tmp_path, **settings)
    assert (first.data["train"]["computed"], again.data["train"]["computed"]) == (60, 0)
    assert first.metrics == again.metrics
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path))
    assert evaluate(encoder, "logistic", **settings).data["test"]["computed"] == 0


def test_features_that_are_not_finite(encoder, shades) -> None:
    encoder.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate(encoder, "linear", train=shades(0, 20), test=shades(900, 6), **QUIET)


def test_more_classes_in_test_than_in_train(encoder, shades) -> None:
    """Sets that do not name their classes: numbers that train lacks are wrong, and it is said."""
    test = shades(900, 30)
    test.samples = [dataclasses.replace(s, label=7 if s.label == 2 else s.label) for s in test.samples]
    result = evaluate(encoder, "logistic", train=shades(0, 60), test=test, values=3, **QUIET)
    assert result.metrics["top1_logistic"] < 67
    assert any("10 of 30 rows are of classes that train lacks" in note for note in result.notes)
    test.samples = [dataclasses.replace(s, label=9) for s in test.samples]
    with pytest.raises(UserError, match="train and test share no class"):
        evaluate(encoder, "logistic", train=shades(0, 60), test=test, values=3, **QUIET)


def test_an_encoder_without_class_token(shades) -> None:
    from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
    from foveola.models.vit import ViTConfig

    model = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=32, class_token=False)
    config = EncoderConfig(model=model, transform=TransformConfig(resize=40, crop=32), pool="average")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Encoder(config)
    sources = {"train": shades(0, 60), "test": shades(900, 15)}
    result = evaluate(made, "probes", **sources, **SHORT["probes"], **QUIET)
    groups = {
        "knn",
        "logistic",
        "linear",
        "abmilp",
        "average",
        "centre",
        "attentive",
        "cae",
    }
    assert {
        name.removeprefix("top1_").removesuffix("_low") for name in result.metrics if name.endswith("_low")
    } == groups
    with pytest.raises(UserError, match="logistic: features=token: this encoder has no class token"):
        evaluate(made, "logistic", **sources, features="token", **QUIET)
    assert evaluate(made, "logistic", **sources, values=2, **QUIET).metrics["top1_logistic"] > 50
