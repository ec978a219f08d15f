"""One training serves several test sets, at once and later: a probe is kept, and answers as it did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from foveola.config import ConfigError, UserError
from foveola.evaluation.classification.training import train_plans
from foveola.evaluation.compare import compare
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.result import Result
from foveola.models.encoder import Encoder, TransformConfig

QUIET = {"progress": False, "workers": 0}
SHORT = {
    "linear": {"epochs": 4, "batch": 30, "lr": (1e-2, 0.1)},
    "attentive": {"epochs": 12, "batch": 30, "heads": (2, 4), "lr": (0.05,), "weight_decay": (1e-3, 1e-2)},
    "attentive cae": {"style": "cae", "epochs": 4, "batch": 30},
    "abmilp": {"epochs": 4, "batch": 30, "lr": (0.1, 1.0), "depth": (1, 2), "heads": (4,), "attention": True},
}


@pytest.fixture
def sets(shades):
    """Training images and two test sets, whose classes are named; the second numbers them otherwise."""
    train, one, two = shades(0, 60), shades(900, 24), shades(500, 18)
    for source in (train, one):
        source.classes = ("dark", "middle", "bright")
    two.classes = ("middle", "bright", "dark")
    two.name = "two:"
    two.samples = [type(s)(s.image, s.name, s.objects, [2, 0, 1][s.label]) for s in two.samples]
    return train, one, two


def without_grid(result: Result) -> dict[str, float]:
    return {name: value for name, value in result.metrics.items() if not name.endswith("best_on_test")}


@pytest.mark.parametrize("case", SHORT)
def test_one_training_serves_all_test_sets_now_and_later(case, encoder, sets, tmp_path, monkeypatch) -> None:
    train, one, two = sets
    protocol, settings, trainings = case.split()[0], SHORT[case] | QUIET, []
    count = lambda *a: trainings.append(len(a[0])) or train_plans(*a)  # noqa: E731
    monkeypatch.setattr("foveola.evaluation.classification.trained.train_plans", count)
    first = evaluate(encoder, protocol, train=train, test=[one, two], out=tmp_path, **settings)
    assert trainings == [1]
    (second,) = first.others
    alone = evaluate(encoder, protocol, train=train, test=two, **settings)
    assert second.metrics == alone.metrics
    assert second.chosen == alone.chosen
    assert second.data["test"]["name"] == "two:"
    assert second.data["split"] == {**first.data["split"], "scored": 18}
    assert Result.read(tmp_path / "results" / f"{protocol}.json") == first

    file = tmp_path / "results" / protocol / "probe.safetensors"
    trainings.clear()
    for test, before in ((two, second), (one, first)):
        again = evaluate(encoder, protocol, test=test, probe=str(file), out=tmp_path, **QUIET)
        assert again.metrics == pytest.approx(without_grid(before), rel=1e-6)
        assert again.scores == before.scores
        assert again.chosen == before.chosen
        assert again.settings == before.settings
        assert again.data["train"] == before.data["train"]
    assert not trainings
    assert file.is_file()  # where it was, also after other results were written
    stored = sorted(path.name for path in (tmp_path / "results").glob("*.json"))
    assert len(stored) == 2
    assert stored[-1] == f"{protocol}.json"


@pytest.mark.parametrize("protocol", ["linear", "attentive", "abmilp"])
def test_seeds_are_single_trainings(protocol, encoder, sets, tmp_path: Path) -> None:
    """Means and deviations are NumPy's of single runs; everything else, also the kept probe, is the first's.

    Of all images, and on the second test set as on the first, where another hold-out is drawn for each seed.
    """
    train, one, two = sets
    for source in sets:  # so that no probe has all right
        source.samples = [replace(s, label=(s.label + i % 2) % 3) for i, s in enumerate(source.samples)]
    settings = SHORT[protocol] | QUIET
    places = {"train": train, "test": [one, two]}
    found = evaluate(encoder, protocol, **places, seed=4, seeds=3, out=tmp_path, **settings)
    alone = [evaluate(encoder, protocol, **places, seed=seed, **settings) for seed in (4, 5, 6)]
    varied = []
    for result, *runs in zip((found, *found.others), *((run, *run.others) for run in alone), strict=True):
        names = {name for name in runs[0].metrics if not name.endswith(("_low", "_high"))}
        assert result.metrics.keys() == runs[0].metrics.keys() | {f"{name}_std" for name in names}
        for name in names:
            values = [run.metrics[name] for run in runs]
            assert result.metrics[name] == pytest.approx(np.mean(values), rel=1e-9)
            assert result.metrics[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
            varied += [name] * (len(set(values)) > 1)
            spread = result.metric(f"{name}_std")
            assert (spread.name, spread.main, spread.better) == (
                f"{result.metric(name).name}_std",
                False,
                None,
            )
        for name in runs[0].metrics.keys() - names:
            assert result.metrics[name] == runs[0].metrics[name]
        for part in ("scores", "chosen", "grid"):
            assert getattr(result, part) == getattr(runs[0], part)
        assert result.settings == runs[0].settings | {"seeds": 3}
        assert set(result.notes) - set(runs[0].notes) == {
            "numbers are means over trainings with seeds 4 to 6, _std is their standard deviation; "
            "intervals, differences of pairs, the grid and the kept probe are of seed 4"
        }
    assert varied
    file = tmp_path / "results" / protocol / "probe.safetensors"
    again = evaluate(encoder, protocol, test=two, probe=str(file), **QUIET)
    first = alone[0].others[0]
    assert again.metrics == pytest.approx(without_grid(first), rel=1e-6)
    assert (again.scores, again.settings) == (first.scores, first.settings)
    with pytest.raises(ConfigError, match=r"seeds: probe=.* is trained already"):
        evaluate(encoder, protocol, test=two, probe=str(file), seeds=3, **QUIET)


def test_seeds_of_all_probes_side_by_side(encoder, sets) -> None:
    """What is trained by steps has means of single runs; k-NN and logistic regression are measured once."""
    train, one, two = sets
    for source in sets:
        source.samples = [replace(s, label=(s.label + i % 2) % 3) for i, s in enumerate(source.samples)]
    short = {"run": ("knn", "logistic", "linear"), "epochs": 2, "batch": 32, "values": 2, "k": (5,)}
    places = {"train": train, "test": [one, two], **short, **QUIET}
    found = evaluate(encoder, "probes", **places, seed=4, seeds=2)
    alone = [
        evaluate(encoder, "probes", **places | {"run": run}, seed=seed)
        for seed, run in ((4, short["run"]), (5, ("linear",)))
    ]
    for result, *runs in zip((found, *found.others), *((run, *run.others) for run in alone), strict=True):
        for name, value in runs[0].metrics.items():
            if "linear" in name and not name.endswith(("_low", "_high")):
                values = [run.metrics[name] for run in runs]
                assert result.metrics[name] == pytest.approx(np.mean(values), rel=1e-9)
                assert result.metrics[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
            else:
                assert result.metrics[name] == value
        assert not any("_std" in name and "linear" not in name for name in result.metrics)
        assert result.scores == runs[0].scores
        assert sum("means over trainings with seeds 4 to 5" in note for note in result.notes) == 1
    with pytest.raises(UserError, match="seeds: has no effect, as nothing of run="):
        evaluate(encoder, "probes", **places | {"run": ("knn", "logistic")}, seeds=2)


def test_seeds_read_the_images_and_crops_of_the_first(encoder, sets) -> None:
    """Of a part of the images, too, which the first seed chooses, and of streamed crops."""
    train, one, two = sets
    settings = {"lr": (1e-2,), "features": ("average",), "epochs": 4, "batch": 10, **QUIET}
    places = {"train": train, "test": [one, two], "limit": 20}
    for views in (0, 2, "stream"):
        single = evaluate(encoder, "linear", views=views, **places, **settings)
        found = evaluate(encoder, "linear", views=views, seeds=2, **places, **settings)
        assert found.scores == single.scores
        assert found.data["test"]["fingerprint"] == single.data["test"]["fingerprint"]
        assert found.data["train"]["computed"] == single.data["train"]["computed"]
        assert found.others[0].metrics.keys() == found.metrics.keys()


def test_compare_shows_each_test_set(encoder, sets, tmp_path: Path) -> None:
    train, one, two = sets
    for place in ("a", "b"):
        evaluate(
            encoder, "linear", train=train, test=[one, two], out=tmp_path / place, **SHORT["linear"], **QUIET
        )
    both = compare([tmp_path / "a", tmp_path / "b"])
    assert [each.protocol for each in both] == ["linear", "linear"]
    assert {each.test for each in both} == {"shades900:", "two:"}
    assert all(each.results[0].metrics == each.results[1].metrics for each in both)
    assert "linear, two:" in "".join(each.table() for each in both)


def test_several_test_sets_of_protocols_that_train_nothing(encoder, sets) -> None:
    train, one, two = sets
    settings = {"train": train, "k": (5,), **QUIET}
    first = evaluate(encoder, "knn", test=[one, two], **settings)
    assert first.metrics == evaluate(encoder, "knn", test=one, **settings).metrics
    assert first.others[0].metrics == evaluate(encoder, "knn", test=two, **settings).metrics


def test_without_hold_out_the_first_test_set_chooses_for_the_others(encoder, sets) -> None:
    train, one, two = sets
    first = evaluate(encoder, "linear", train=train, test=[one, two], holdout=0, **SHORT["linear"], **QUIET)
    assert first.others[0].chosen == first.chosen


def test_a_probe_that_does_not_fit_is_one_clear_line(encoder, sets, shades, tmp_path: Path) -> None:
    train, one, two = sets
    evaluate(encoder, "linear", train=train, test=one, out=tmp_path, **SHORT["linear"], **QUIET)
    file = str(tmp_path / "results" / "linear" / "probe.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no")

    def refused(message: str, protocol="linear", error=UserError, probe=file, **settings) -> None:
        with pytest.raises(error, match=message):
            evaluate(encoder, protocol, **{"test": two, "probe": probe, **settings}, **QUIET)

    refused("leave out train=", train=train)
    refused("epochs: probe=.* is trained already", error=ConfigError, epochs=3)
    refused("is of the protocol linear", protocol="abmilp")
    refused("there is no such file", probe="nothing.safetensors")
    refused("is no trained probe", probe=str(tmp_path / "other.safetensors"))
    refused("cannot be read", probe=str(tmp_path / "text.safetensors"))
    unlike = shades(900, 9)
    unlike.classes = ("cat", "dog", "cow")
    refused("share no class", test=unlike)
    encoder.backbone.norm.weight.mul_(2)
    refused("trained on another encoder")


def test_image_size_is_that_of_an_encoder_with_that_transform(encoder, sets, tmp_path: Path) -> None:
    """At 48 of 32 pixels: as if the transform were resize 60, crop 48; a cache keeps both apart."""
    train, one, _ = sets
    config = replace(encoder.config, transform=TransformConfig(resize=60, crop=48))
    larger = Encoder(config, encoder.backbone)
    for protocol, settings in (
        ("linear", SHORT["linear"]),
        ("knn", {"k": (5,)}),
        ("logistic", {"values": 2}),
    ):
        places = {"train": train, "test": one, **settings, **QUIET}
        expected = evaluate(larger, protocol, **places)
        own = evaluate(encoder, protocol, cache=tmp_path, **places)
        assert evaluate(encoder, protocol, image_size=48, cache=tmp_path, **places).scores == expected.scores
        without = evaluate(encoder, protocol, image_size=48, **places)
        assert without.scores == expected.scores
        assert without.encoder == own.encoder  # the same weights, measured with another setting
        assert without.settings["image_size"] == 48
        assert evaluate(encoder, protocol, cache=tmp_path, **places).metrics == own.metrics
    with pytest.raises(UserError, match="image_size=33 is not a multiple of the patch size 8"):
        evaluate(encoder, "linear", train=train, test=one, image_size=33, **QUIET)


def test_a_block_is_the_last_one_of_a_shorter_network(encoder, sets, tmp_path: Path) -> None:
    train, one, _ = sets
    model = replace(encoder.config.model, depth=2)
    shorter = Encoder(replace(encoder.config, model=model))
    shorter.fill({n: t for n, t in encoder.weights().items() if not n.startswith("blocks.2.")}, tmp_path)
    for protocol in ("linear", "abmilp", "attentive cae"):
        places = {"train": train, "test": one, **SHORT[protocol], **QUIET}
        if protocol == "linear":
            places["features"] = ("token", "token2", "average")
        expected = evaluate(shorter, protocol.split()[0], **places)
        found = evaluate(encoder, protocol.split()[0], block=1, **places)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
        if protocol == "abmilp":  # whose entropies are no fractions of a few images
            assert found.metrics != evaluate(encoder, protocol, **places).metrics
    with pytest.raises(UserError, match="block"):
        evaluate(encoder, "linear", train=train, test=one, block=3, **QUIET)
    with pytest.raises(UserError, match="block=0: features of the 3 blocks up to it: there are 1"):
        evaluate(encoder, "linear", train=train, test=one, block=0, **QUIET)
