"""`RUN?step=400`, `RUN?which=student`: every command takes them, and they are what training had."""

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveola
from foveola import cli
from foveola.config import UserError
from foveola.evaluation.attention.analysis import analyze_attention
from foveola.figures.visualize import open_models
from foveola.files import RunFolder
from foveola.model_names import home_of, run_model
from foveola.training import checkpoint

EARLIER = Path(__file__).parents[1] / "training" / "earlier"


@pytest.fixture(scope="module")
def run(tiny_recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps that keeps all of them."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "tiny.yaml").write_text(tiny_recipe)
    lr = {"optimizer.lr.value": 0.05, "optimizer.lr.warmup": "1 steps"}
    settings = {"keep_every": "2 steps", "checkpoint_every": "1 steps", "keep": 2} | lr
    foveola.pretrain(folder / "tiny.yaml", out=str(folder / "run"), **settings)
    return folder / "run"


def state(run: Path, step: int, prefix: str) -> dict[str, Tensor]:
    tensors = checkpoint.read_checkpoint(RunFolder(run).checkpoint(step))["trainer"]["method"]
    return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("options", "step", "branch"),
    [
        ("step=2", 2, "teacher"),
        ("step=4", 4, "teacher"),
        ("which=student", 4, "student"),
        ("which=student&step=2", 2, "student"),
        ("step=3&which=student", 3, "student"),
    ],
)
def test_a_name_gives_the_network_of_that_step(run: Path, options: str, step: int, branch: str) -> None:
    encoder = foveola.load(f"{run}?{options}")
    wanted = state(run, step, f"{branch}.backbone.")
    own = encoder.backbone.state_dict()
    assert own.keys() <= wanted.keys()
    assert all(torch.equal(own[name], wanted[name]) for name in own)
    other = state(run, step, f"{'student' if branch == 'teacher' else 'teacher'}.backbone.")
    assert any(not torch.equal(own[name], other[name]) for name in own)
    assert (encoder.config.step, encoder.config.pool) == (step, foveola.load(run).config.pool)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_names_and_the_folders_of_their_results(run: Path) -> None:
    homes = {
        "step=2": "encoders/step-00000002",
        "step=best": "encoders/best",
        "which=student": "student",
        "which=student&step=2": "student/step-00000002",
    }
    for options, home in homes.items():
        assert home_of(f"{run}?{options}") == run / home
    assert home_of(run) == run
    for other in ("timm:vit?pretrained=false", f"{run}/encoder/model.safetensors?heads=3", "no/run?step=2"):
        assert run_model(other) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("step=3", r"kept no encoder of that step; there are step=2, step=4$"),
        ("step=best", r"the run has no encoders/best: best=EVALUATION/METRIC keeps it"),
        ("which=student&step=1", r"of which there are step=2, step=3, step=4$"),
        ("step=two", r"step=two: expected a number of steps, or best"),
        ("step=-2", r"step=-2: expected a number of steps, or best"),
        ("which=student&step=best", r"step=best: expected a number of steps$"),
        ("which=teacher", r"which=teacher: valid is student; without it"),
        ("steps=2", r"unknown option 'steps'; did you mean step=\?"),
        ("heads=2", r"unknown option 'heads'; a run takes \?step=N and \?which=student"),
        ("step=2&step=4", r"each once"),
        ("", r"expected \?step=N, \?which=student or both"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(run: Path, options: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        foveola.load(f"{run}?{options}")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{run}?{options}: ")


def test_the_newest_and_the_best_step_have_their_names_where_no_step_was_kept(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.move(copy / "encoders" / "step-00000002", copy / "encoders" / "best")
    shutil.rmtree(copy / "encoders" / "step-00000004")
    for step in ("2", "4", "best"):
        wanted = {"2": 2, "4": 4, "best": 2}[step]
        loaded = foveola.load(f"{copy}?step={step}")
        assert loaded.config.step == wanted
        assert loaded.fingerprint() == foveola.load(f"{run}?step={wanted}").fingerprint()
    assert home_of(f"{copy}?step=best") == copy / "encoders" / "step-00000002"
    with pytest.raises(UserError, match=r"of that step; there are step=2, step=4$"):
        foveola.load(f"{copy}?step=3")


def test_folders_that_are_no_runs_and_untrained_networks_have_no_steps(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder is no run folder, so it has no other steps"):
        foveola.load(f"{run}/encoder?step=2")
    with pytest.raises(UserError, match=f"untrained networks have no steps: write untrained:{run}$"):
        foveola.load(f"untrained:{run}?step=2")
    odd = tmp_path / "run?step=9"
    shutil.copytree(run, odd)  # a folder of such a name is that folder
    assert foveola.load(odd).config.step == 4
    assert foveola.load(f"{odd}?step=2").config.step == 2


def test_a_damaged_checkpoint_and_one_without_networks_are_told(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with (RunFolder(copy).checkpoint(4) / "state.pt").open("r+b") as file:
        file.truncate(1000)
    assert foveola.load(f"{copy}?which=student").config.step == 3
    with pytest.raises(UserError, match=r"of which there are step=2, step=3$"):
        foveola.load(f"{copy}?which=student&step=4")
    checkpoint.save(copy, 5, {"step": 5}, keep=9)
    with pytest.raises(UserError, match=r"step-00000005 is no checkpoint of a run: it holds no networks"):
        foveola.load(f"{copy}?which=student")
    broken = checkpoint.read_checkpoint(RunFolder(copy).checkpoint(3))
    del broken["trainer"]["method"]["student.backbone.norm.weight"]
    checkpoint.save(copy, 6, broken, keep=9)
    with pytest.raises(UserError, match=r"lacks student.backbone.norm.weight, a weight of the student"):
        foveola.load(f"{copy}?which=student")


@pytest.mark.parametrize("name", ["capi", "distillation", "ijepa", "mae"])
def test_runs_of_an_earlier_version_have_students_too(tmp_path: Path, name: str) -> None:
    with tarfile.open(EARLIER / f"{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / name / "expected.json").unlink()
    student, kept = foveola.load(f"{tmp_path / name}?which=student"), foveola.load(tmp_path / name)
    tensors = checkpoint.read_checkpoint(RunFolder(tmp_path / name).checkpoint(2))["trainer"]["method"]
    own = student.weights()
    for name_, value in own.items():
        inner = name_ if name_.startswith("predictor.") else f"backbone.{name_}"
        assert torch.equal(value, tensors[f"student.{inner}"]), name_
    same = all(torch.equal(value, kept.weights()[name_]) for name_, value in own.items())
    assert same == (name == "mae")  # which has no teacher


def test_commands_take_the_names(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    data = "scenes:?size=32&count=24"
    words = [f"train={data}", "test=scenes:?size=32&count=9", "rows=objects", "view=object", "workers=0"]
    models = {"run?step=2": "encoders/step-00000002", "run?which=student": "student", "run": "."}
    for model, home in models.items():
        assert cli.main(["evaluate", "knn", f"model={model}", "k=5", "device=cpu", *words]) == 0
        assert (run / home / "results" / "knn.json").is_file()
    capsys.readouterr()
    assert cli.main(["compare", *models]) == 0
    head = capsys.readouterr().out.splitlines()[0]
    assert head.split()[:4] == ["knn", *models]
    with pytest.raises(
        UserError, match=r"run\?step=4 holds no results/<protocol>.json: run foveola evaluate"
    ):
        foveola.compare(["run", "run?step=4"])

    assert cli.main(["export", "run?step=2", f"out={tmp_path}/two.pth", "format=torch"]) == 0
    one, two = foveola.load(f"{tmp_path}/two.pth"), foveola.load("run?step=2")
    assert one.fingerprint() == two.fingerprint()
    assert list(open_models("run?step=2,run?which=student")) == ["run?step=2", "run?which=student"]
    table = analyze_attention(["run?step=2", "run"], data, out=tmp_path, limit=4).table()
    assert "run?step=2" in table


def test_the_step_is_no_part_of_what_an_encoder_is(run: Path, tmp_path: Path) -> None:
    """A copy that does not know its step has the same fingerprint, so what was kept of it counts."""
    encoder = foveola.load(f"{run}?step=2")
    encoder.save(tmp_path / "copy")
    text = (tmp_path / "copy" / "config.json").read_text()
    assert '"step": 2' in text
    (tmp_path / "copy" / "config.json").write_text(text.replace('"step": 2', '"step": null'))
    again = foveola.load(tmp_path / "copy")
    assert again.config.step is None
    assert again.fingerprint() == encoder.fingerprint()
