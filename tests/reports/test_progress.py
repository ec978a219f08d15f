"""What is measured, with which settings, and that nothing is measured twice."""

import json
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from foveola import distributed
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.reports import progress as module
from foveola.reports.progress import measure_run, plan_protocols, position_fraction
from foveola.reports.record import Record, read_runs
from foveola.reports.request import Data, ReportConfig, choose_samples, open_data
from foveola.zoo.load import load

SCENES = "scenes:?size=32&count=12"
SMALL = {"knn": {"k": [3], "limit": 8}, "retrieval": {"objects": 4}, "label_free": {"limit": 4}}


def record(path: Path = Path("run"), **config: object) -> Record:
    return Record(path, "run", {"batch_size": 8, "evaluate": {"workers": 0}, **config}, [{"step": 10.0}], [])


# -- fractions of positions ----------------------------------------------------------------------------------


def test_place_share_equals_naive_components_of_variance() -> None:
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)) + torch.arange(5.0)[:, None]
    within = between = 0.0
    for d in range(3):
        for n in range(5):
            column = [x[p, n, d].item() for p in range(7)]
            within += sum((v - sum(column) / 7) ** 2 for v in column) / 6 / 5
        means = [sum(x[p, n, d].item() for p in range(7)) / 7 for n in range(5)]
        between += sum((m - sum(means) / 5) ** 2 for m in means) / 4
    between -= within / 7
    wanted = pytest.approx(between / (between + within), rel=1e-5)
    assert position_fraction([x]) == (wanted, 7)
    assert position_fraction(iter([x[:1], x[1:5], x[5:]])) == (wanted, 7), "one by one"
    assert position_fraction([]) == (0.0, 0)


def test_place_share_of_known_cases() -> None:
    torch.manual_seed(0)
    place, content = torch.randn(1, 64, 8), torch.randn(40, 64, 8)
    assert position_fraction([place.expand(40, -1, -1)])[0] == pytest.approx(1)
    assert position_fraction([content])[0] < 0.01
    assert position_fraction([place + content])[0] == pytest.approx(0.5, abs=0.08)
    assert position_fraction([torch.ones(4, 5, 6)])[0] == 0
    assert position_fraction([content[:, :1].expand(-1, 64, -1)])[0] == 0  # every image is one colour


# -- data ----------------------------------------------------------------------------------------------------


def test_the_run_s_own_images_may_be_gone_but_not_those_asked_for() -> None:
    gone = record(data="folder:/nowhere/at/all")
    found = open_data(gone, ReportConfig())
    assert found.test is None
    assert "cannot be opened" in found.notes[0]
    assert "data=" in found.notes[0]
    with pytest.raises(UserError, match="no folder"):
        open_data(record(data=SCENES), ReportConfig(data="folder:/nowhere/at/all"))
    assert open_data(gone, ReportConfig(data=SCENES)).test is not None
    assert "names no images" in open_data(record(), ReportConfig()).notes[0]


def test_which_images() -> None:
    def names(config: ReportConfig, **own: str) -> tuple[str, str]:
        data = open_data(record(**own), config)
        assert data.train is not None
        assert data.test is not None
        return data.train.name, data.test.name

    def of(text: str, split: Literal["train", "test"]) -> str:
        return open_source(text, split).name

    a, b, c = ("scenes:?size=32&count=4", "scenes:?size=32&count=5", "scenes:?size=32&count=6")
    assert names(ReportConfig(), data=a) == (of(a, "train"), of(a, "test"))
    assert names(ReportConfig(), data=a, evaluate_train=b, evaluate_test=c) == (of(b, "train"), of(c, "test"))
    assert names(ReportConfig(data=b), data=a, evaluate_test=c) == (of(b, "train"), of(b, "test"))
    assert names(ReportConfig(train=b), data=a, evaluate_test=c) == (of(b, "train"), of(b, "test"))
    assert names(ReportConfig(test=b), data=a) == (of(a, "train"), of(b, "test"))


def images_in(path: Path, classes: int, count: int = 6) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        folder = path / f"class {i % classes}" if classes else path
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    return path


def test_labels_decide_what_is_measured(tmp_path: Path) -> None:
    def plans(data: str, config: ReportConfig | None = None, **changes: object) -> dict:
        run = record(data=data)
        found = open_data(run, config or ReportConfig())
        return plan_protocols(run, found, config or ReportConfig(), changes)

    scenes = plans(SCENES)
    assert list(scenes) == ["label_free", "knn", "retrieval"]
    assert scenes["knn"].get("rows", "images") == "images"
    both = open_source(SCENES, "train"), open_source(SCENES, "test")
    objects = plan_protocols(record(), Data(*both, labels="objects"), ReportConfig(), {})["knn"]
    assert (objects["rows"], objects["view"]) == ("objects", "object")
    turned = record(evaluate={"rows": "objects", "view": "object"})
    images = plan_protocols(turned, Data(*both, labels="images"), ReportConfig(), {})["knn"]
    assert (images["rows"], images["view"]) == ("images", "image")
    assert list(plan_protocols(turned, Data(*both), ReportConfig(), {})) == ["label_free", "retrieval"]
    assert scenes["knn"]["exclude_self"] is False
    assert scenes["label_free"]["objects"] is False, "retrieval does that"
    labelled = plans(f"folder:{images_in(tmp_path / 'labelled', 2)}")
    assert list(labelled) == ["label_free", "knn"]
    assert labelled["knn"]["exclude_self"] is True, "the same images on both sides"
    assert labelled["knn"].get("rows", "images") == "images"
    assert list(plans(f"folder:{images_in(tmp_path / 'flat', 0)}")) == ["label_free"]
    assert list(plans(SCENES, ReportConfig(protocols=("knn",)))) == ["knn"]


def test_settings_of_the_recipe_and_of_the_user() -> None:
    def knn(config: ReportConfig, *, own: dict | None = None, **changes: object) -> dict:
        run = record(
            data=SCENES, evaluate={"rows": "objects", "view": "image", "limit": 30, "old": 1} | (own or {})
        )
        return plan_protocols(run, open_data(run, config), config, changes)["knn"]

    assert knn(ReportConfig())["limit"] == 30
    assert knn(ReportConfig(limit=5))["limit"] == 5
    assert knn(ReportConfig(), own={"limit": None})["limit"] == module.LIMIT
    assert "old" not in knn(ReportConfig()), "a key of another version"
    assert knn(ReportConfig())["view"] == "image"
    assert knn(ReportConfig(), k=[7])["k"] == [7]
    assert knn(ReportConfig(), knn={"k": [8]}, k=[7])["k"] == [8]
    with pytest.raises(UserError, match="unknown key 'kk'"):
        knn(ReportConfig(), kk=3)
    with pytest.raises(UserError, match="unknown protocol 'knm'"):
        knn(ReportConfig(protocols=("knm",)))


def test_samples_are_drawn_by_seed() -> None:
    source = open_data(record(data=SCENES), ReportConfig()).test
    assert source is not None
    first = choose_samples(source, 5)
    assert [index for index, _ in first] == [index for index, _ in choose_samples(source, 5)]
    assert len({index for index, _ in first}) == 5
    assert all(isinstance(sample.image, np.ndarray) for _, sample in first)
    assert len(choose_samples(source, 100)) == 12


# -- measuring -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an encoder at the end and three on the way, the last of them as good as the end."""
    path = tmp_path_factory.mktemp("progress") / "run"
    path.mkdir()
    (path / "config.yaml").write_text(f"data: {SCENES!r}\nbatch_size: 8\nevaluate: {{workers: 0}}\n")
    (path / "metrics.jsonl").write_text('{"step": 100}\n')
    torch.manual_seed(1)
    model = ViTConfig(width=32, depth=1, heads=2, patch_size=8, image_size=16)
    encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=16, crop=16)))
    for name in ("encoders/step-00000025", "encoders/step-00000050", "encoders/step-00000099", "encoder"):
        encoder.backbone.cls_token.data += 0.1
        encoder.save(path / name)
    return path


def test_each_encoder_is_measured_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[str, ...]]] = []
    original = module.evaluate_all

    def counted(encoder: Encoder, names: tuple[str, ...], **settings: object):
        calls.append((encoder.fingerprint(), tuple(names)))
        return original(encoder, names, **settings)

    monkeypatch.setattr(module, "evaluate_all", counted)
    (found,) = read_runs([run])
    config = ReportConfig(device="cpu")
    data = open_data(found, config)
    first = measure_run(found, data, config, SMALL)
    assert [point.label for point in first.points] == ["untrained", "step 25", "step 50", "end"]
    assert [point.step for point in first.points] == [0, 25, 50, 100]
    assert [set(point.results) for point in first.points] == [{"label_free", "knn", "retrieval"}] * 4
    assert calls == [(fingerprint, ("label_free", "knn", "retrieval")) for fingerprint, _ in calls]
    assert len(set(calls)) == 4
    assert calls[-1][0] == load(run).fingerprint()
    assert first.points[0].position_fraction is not None
    assert not first.notes

    again = measure_run(found, data, config, SMALL)
    assert len(calls) == 4
    assert again.points[-1].results["knn"].metrics == first.points[-1].results["knn"].metrics
    assert again.points[-1].position_fraction == first.points[-1].position_fraction

    # Another setting of one protocol measures that one again; fewer checkpoints measure nothing.
    measure_run(
        found, data, ReportConfig(device="cpu", checkpoints=1), SMALL | {"knn": {"k": [2], "limit": 8}}
    )
    assert [names for _, names in calls[4:]] == [("knn",)] * 3


def test_results_of_another_version_or_of_other_data_are_not_used(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (found,) = read_runs([copy])
    config, changes = ReportConfig(device="cpu", protocols=("knn",), checkpoints=0, limit=6), {"k": [3]}
    data = open_data(found, config)
    measure_run(found, data, config, changes)
    (path,) = (copy / "report" / load(copy).fingerprint()).glob("*/results/knn.json")
    kept = json.loads(path.read_text())

    def spoiled(**change: object) -> float:
        path.write_text(json.dumps(kept | change | {"metrics": {"top1_plain": -1.0}}))
        return measure_run(found, data, config, changes).points[-1].results["knn"].metrics["top1_plain"]

    assert spoiled() == -1, "as it is, it is used"
    assert spoiled(versions=kept["versions"] | {"foveola": "0.0"}) != -1
    assert spoiled(settings=kept["settings"] | {"temperature": 0.5}) != -1
    for torn in ("", "{", "[1]"):
        path.write_text(torn)
        assert measure_run(found, data, config, changes).points[-1].results["knn"].metrics["top1_plain"] >= 0
        (place,) = path.parents[1].glob("place.json")
        place.write_text(torn)


def test_the_same_names_with_other_pixels_are_measured_again(run: Path, tmp_path: Path) -> None:
    copy, flat = Path(shutil.copytree(run, tmp_path / "run")), images_in(tmp_path / "flat", 0)
    (found,) = read_runs([copy])
    config = ReportConfig(device="cpu", data=f"folder:{flat}", protocols=("label_free",), checkpoints=0)

    def point() -> module.MeasuredStep:
        return measure_run(found, open_data(found, config), config, {"limit": 6}).points[-1]

    first = point()
    assert point().results == first.results
    from PIL import Image

    for path in flat.iterdir():
        Image.effect_noise((24, 24), 90).convert("RGB").save(path)
    second = point()
    assert second.results != first.results
    assert second.position_fraction != first.position_fraction


def test_an_interrupted_run_and_a_damaged_encoder(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "checkpoints" / "step-00000060").mkdir(parents=True)
    (copy / "encoders" / "step-00000025" / "model.safetensors").write_bytes(b"torn")
    (found,) = read_runs([copy])
    config = ReportConfig(device="cpu", protocols=("knn",))
    measured = measure_run(found, open_data(found, config), config, {"k": [3]})
    assert [(p.label, p.step) for p in measured.points] == [("untrained", 0), ("step 50", 50), ("end", 60)]
    (note,) = measured.notes
    assert note.startswith("step 25 was not measured: ")
    assert "damaged" in note


def test_a_device_that_is_not_there(run: Path) -> None:
    (found,) = read_runs([run])
    for name, words in (
        ("foo", "no such device: 'foo'"),
        ("cuda:99", "no GPU with index 99"),
        ("meta", "meta"),
    ):
        config = ReportConfig(device=name)
        with pytest.raises(UserError, match=words):
            measure_run(found, open_data(found, config), config, {})
    assert distributed.find_device("cpu") == torch.device("cpu")
    assert distributed.find_device("auto") == distributed.find_device(None)


def test_what_fails_is_said_and_the_rest_is_measured(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (found,) = read_runs([copy])
    flat = f"folder:{images_in(tmp_path / 'flat', 0)}"
    config = ReportConfig(device="cpu", data=flat, protocols=("knn", "label_free"), checkpoints=0)
    measured = measure_run(found, open_data(found, config), config, {})
    assert [set(point.results) for point in measured.points] == [{"label_free"}] * 2
    (note,) = measured.notes
    assert note.startswith("knn was not measured: ")
    (copy / "config.yaml").write_text(f"data: {SCENES!r}\nevaluate: {{workers: 0, k: many}}\n")
    (found,) = read_runs([copy])
    config = ReportConfig(device="cpu", protocols=("knn",), checkpoints=0)
    assert measure_run(found, open_data(found, config), config, {}).notes == (
        "knn was not measured: k: expected [int, ...], got 'many'",
    )


def test_another_encoder_and_a_run_without_one(run: Path, tmp_path: Path) -> None:
    (found,) = read_runs([run])
    config = ReportConfig(device="cpu", protocols=("knn",), checkpoints=0, reference=f"untrained:{run}")
    measured = measure_run(found, open_data(found, config), config, {"k": [3]})
    assert [point.step for point in measured.points] == [0, 100, None]
    assert measured.points[0].results == measured.points[2].results, "the same encoder"
    bad = ReportConfig(device="cpu", protocols=("knn",), checkpoints=0, reference="nowhere")
    with pytest.raises(UserError, match="no model at nowhere"):
        measure_run(found, open_data(found, bad), bad, {"k": [3]})
    empty = record(tmp_path, data=SCENES)
    without = measure_run(empty, open_data(empty, ReportConfig()), ReportConfig(), {})
    assert not without.points
    assert "no encoder yet" in without.notes[0]
    assert measure_run(empty, Data(notes=("gone",)), ReportConfig(), {}).notes == ("gone",)
