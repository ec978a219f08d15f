"""`pretrain auto` as a user asks for it: a plan is printed, run, and gone on with."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import foveola
from foveola import cli
from foveola.config import ConfigError
from foveola.training.auto import request as module
from foveola.training.auto.facts import Machine, weights_at_hand

QUICK = {
    "data": "scenes:?size=32&count=48&objects=2",
    "batch_size": 8,
    "model": {"width": 32, "depth": 1, "heads": 2},
    "loader": {"workers": 0},
    "device": "cpu",
    "evaluate_every": None,
}


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, without any weights, on a machine whose speed is known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    machine = Machine("cpu", "CPU", 1, 2, 8 * 2**30, 4e9, False)
    monkeypatch.setattr(module, "look_at_machine", lambda device: machine)
    return tmp_path


def test_a_run_is_planned_begun_and_gone_on_with(at_home, capsys) -> None:
    run = foveola.pretrain("auto", budget="3 steps", **QUICK)
    assert run.finished
    assert run.step == 3
    assert run.folder.name.startswith("auto-")
    said = capsys.readouterr().out
    assert said.startswith("plan for 48 images and a budget of 3 steps\nrecipe ")
    assert "odis-small" in said
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert saved["recipe"] == "auto"
    assert saved["duration"] == "3 steps"
    assert saved["about"]["budget"] == "3 steps"
    again = foveola.pretrain("auto", budget="3 steps", **QUICK, out=str(run.folder))
    assert again.step == 3
    assert "plan for" not in capsys.readouterr().out


def test_a_plan_is_not_made_anew_when_the_machine_is_slower(at_home, monkeypatch, capsys) -> None:
    run = foveola.pretrain("auto", budget="2 s", **QUICK)
    slower = Machine("cpu", "CPU", 1, 2, 8 * 2**30, 2e8, False)
    monkeypatch.setattr(module, "look_at_machine", lambda device: slower)
    again = foveola.pretrain("auto", budget="2 s", **QUICK, out=str(run.folder))
    assert again.total_steps == run.total_steps
    with pytest.raises(ConfigError, match="holds another run"):
        foveola.pretrain("auto", budget="2 s", **QUICK | {"batch_size": 4}, out=str(run.folder))


def test_the_command_says_what_it_would_do(at_home, capsys) -> None:
    words = ["data=scenes:?size=32&count=48", "device=cpu", "batch_size=8", "model.width=32"]
    words += ["model.depth=1", "model.heads=2", "budget=5 steps"]
    assert cli.main(["pretrain", "auto", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "plan for 48 images" in said
    assert "as you said" in said
    assert "trial" in said
    assert not list(at_home.glob("runs/*"))


def test_help_lists_what_auto_adds(capsys) -> None:
    assert cli.main(["pretrain", "auto", "--help"]) == 0
    said = capsys.readouterr().out
    assert "\nbudget " in said
    assert said.count("\ninit ") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "pretrain auto needs data=..."),
        (["data=scenes:", "budget=soon"], "budget='soon'"),
        (["data=scenes:", "budgett=2 hours"], "did you mean 'budget'"),
        (["data=scenes:?count=8", "method.name=ijepa"], "auto plans distillation, capi, mae"),
        (["data=scenes:", "batchsize=8"], "did you mean 'batch_size'"),
        (["data=scenes:?count=8", "init=nowhere"], "no model at nowhere"),
    ],
)
def test_mistakes_are_one_line(at_home, capsys, words, told) -> None:
    assert cli.main(["pretrain", "auto", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_plan_is_made_in_python_and_run_as_it_is(at_home, capsys) -> None:
    plan = foveola.make_plan(
        QUICK["data"], budget="2 steps", **{k: v for k, v in QUICK.items() if k != "data"}
    )
    assert plan.table().startswith("plan for 48 images and a budget of 2 steps\nrecipe ")
    assert capsys.readouterr().out == ""
    assert not list(at_home.glob("runs/*"))
    run = foveola.pretrain(plan.config)
    assert (run.step, run.config.recipe) == (2, "auto")


@pytest.mark.parametrize(
    ("name", "recipe"), [("mae", "mae-small"), ("capi", "capi-small"), ("distillation", "odis-small")]
)
def test_the_method_can_be_asked_for(at_home, name, recipe) -> None:
    plan = foveola.make_plan(**QUICK | {"method.name": name}, budget="2 steps")
    assert plan.lines[0].value == recipe
    assert plan.config.method.name == name


def test_a_folder_is_measured_on_itself_unless_other_images_are_named(at_home) -> None:
    for number in range(16):
        for folder in ("mine", "others"):
            path = at_home / folder / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (9 * number, 50, 200 if folder == "mine" else 10)).save(path)
    settings: dict[str, Any] = QUICK | {"data": "folder:mine", "evaluate_every": "1 steps"}
    itself = foveola.make_plan(**settings, budget="2 steps").config
    assert itself.evaluate.exclude_self
    others = foveola.make_plan(**settings, evaluate_test="folder:others", budget="2 steps").config
    assert not others.evaluate.exclude_self
    assert foveola.pretrain(others).finished


def test_an_empty_group_is_something_that_was_said(at_home) -> None:
    """The planned recipe hides no positions: it does by what was said alone."""
    head = {"prototypes": 16, "hidden": 8, "bottleneck": 4}
    said = {"views.position_masking": {}, "method.heads.positions": head, "method.position.head": "positions"}
    config = foveola.make_plan(**QUICK | said, budget="2 steps").config
    assert config.views.position_masking is not None


def test_a_budget_is_for_auto_alone(capsys) -> None:
    assert cli.main(["pretrain", "ibot-small", "budget=2 hours", "data=scenes:"]) == 2
    assert "only `foveola pretrain auto` plans by a budget" in capsys.readouterr().err


def test_weights_are_found_in_the_caches_of_libraries(at_home) -> None:
    assert weights_at_hand() == []
    folder = at_home / "hf" / "hub" / "models--facebook--dinov2-small" / "snapshots" / "0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    file = at_home / "torch" / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert weights_at_hand() == ["hf:facebook/dinov2-small", str(file)]
