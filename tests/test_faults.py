"""Every command x every broken thing: exit code 2, one line, no traceback, and nothing lost."""

import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from foveola import cli

KNN = "rows=objects view=object workers=0 limit=24 k=[5]"
COMMANDS = {
    "pretrain": "pretrain tiny.yaml out={run} duration='5 steps'",
    "again": "pretrain tiny.yaml out={run}",
    "evaluate": f"evaluate knn model={{run}} train={{data}} test={{data}} device=cpu {KNN}",
    "visualize": "visualize attention model={run} data={data} device=cpu count=2 out=drawn",
    "analyze": "analyze attention model={run} data={data} device=cpu limit=4 out=analysed",
    "export": "export {run} out=exported format=torch",
    "report": "report {run} data={data} limit=8 device=cpu",
    "compare": "compare {run} other",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_recipe) -> Path:
    """A finished run with a result; copied for each case."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(tiny_recipe)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main(["pretrain", "tiny.yaml", "out=run"]) == 0
        words = COMMANDS["evaluate"].format(run="run", data="scenes:?size=32&count=64").split()
        assert cli.main(words) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    shutil.copytree(made / "run", tmp_path / "here" / "other")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FOVEOLA_DEBUG", raising=False)
    return tmp_path / "here"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_instead(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("a file")


WEIGHTS, CONFIG = "run/encoder/model.safetensors", "run/encoder/config.json"
STATE = "run/checkpoints/step-00000004/state.pt"
READERS = ("evaluate", "visualize", "analyze", "export")
CASES: list[tuple[str, Callable[[Path], None], str, str]] = [
    *((name, how, WEIGHTS, "") for name in READERS for how in (cut, noise, folder_instead, gone)),
    *((name, how, CONFIG, "") for name in READERS for how in (cut, noise, gone)),
    *(("again", how, STATE, "") for how in (cut, noise, gone, folder_instead)),
    *(("again", how, "run/config.yaml", "") for how in (noise, folder_instead)),
    ("again", file_instead, "run", ""),
    ("again", gone, "run/checkpoints", ""),
    *(("report", how, "run/config.yaml", "") for how in (noise, gone, folder_instead)),
    *(("compare", how, "run/results/knn.json", "") for how in (cut, noise, gone)),
    ("compare", gone, "run/results", ""),
    ("visualize", file_instead, "drawn", ""),
    ("analyze", file_instead, "analysed", ""),
    ("export", file_instead, "exported", ""),
    ("evaluate", file_instead, "taken", "out=taken"),
    ("evaluate", file_instead, "taken", "out=taken/below"),
    ("evaluate", file_instead, "run/results", ""),
    ("report", file_instead, "taken", "out=taken/report.html"),
    ("pretrain", file_instead, "taken", "out=taken"),
    ("pretrain", file_instead, "taken", "out=taken/below"),
    *((name, file_instead, "images", "data=folder:nowhere") for name in ("pretrain", "visualize", "analyze")),
    ("evaluate", file_instead, "images", "test=folder:images"),
]


@pytest.mark.parametrize(
    ("command", "how", "what", "more"), CASES, ids=[f"{c}-{h.__name__}-{w}-{m}" for c, h, w, m in CASES]
)
def test_a_broken_thing_is_one_line_and_costs_nothing(here: Path, capsys, command, how, what, more):
    how(here / what)
    before = snapshot(here)
    words = [word.strip("'") for word in COMMANDS[command].replace("'5 steps'", "'5\u00a0steps'").split()]
    words = [w.replace("\u00a0", " ").format(run="run", data="scenes:?size=32&count=64") for w in words]
    if more:
        key = more.partition("=")[0] + "="
        words = [word for word in words if not word.startswith(key)] + [more]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, last = err.splitlines()
    assert last.startswith("foveola: error: ")
    assert err.count("foveola: error: ") == 1
    assert "Traceback" not in err
    after = snapshot(here)
    assert {name: after.get(name) for name in before} == before


def snapshot(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def full_disk() -> Iterator[Callable[[], None]]:
    """From when it is called on, no file of more than 8 kB can be written; until the test ends."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_while_training_is_one_line_and_goes_on_afterwards(here: Path, capsys, full_disk):
    full_disk()
    assert cli.main(["pretrain", "tiny.yaml", "out=new"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("foveola: error: step 4 cannot be saved in new: writing failed: the disk is full")
    text = (here / "new" / "log.txt").read_text()
    assert "step 4 cannot be saved in new" in text
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert cli.main(["pretrain", "tiny.yaml", "out=new"]) == 0
    weights = "encoder/model.safetensors"
    assert (here / "new" / weights).read_bytes() == (here / "run" / weights).read_bytes()


def test_what_is_measured_is_shown_though_it_cannot_be_written(here: Path, capsys, monkeypatch):
    from foveola.evaluation import evaluate
    from foveola.evaluation.result import Result

    def full(result: Result, folder: Path, further: bool) -> Result:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(evaluate, "store", full)
    words = COMMANDS["evaluate"].format(run="run", data="scenes:?size=32&count=64").split()
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert "top1_masks" in out
    what = "knn is measured, but its result cannot be written to run: run: No space left on device"
    assert err.splitlines()[-1].startswith(f"foveola: error: {what}")


def test_finished_protocols_are_shown_and_written_when_a_later_one_refuses(here: Path, capsys, monkeypatch):
    from foveola.config import UserError
    from foveola.evaluation import evaluate

    measure = evaluate._measure

    def refusing(jobs, at):
        if jobs[0].protocol.name == "label_free":
            raise UserError("label_free: such data")
        return measure(jobs, at)

    monkeypatch.setattr(evaluate, "_measure", refusing)
    (here / "run" / "results" / "knn.json").unlink()
    words = COMMANDS["evaluate"].replace("knn", "knn,label_free").replace("rows=objects view=object", "")
    assert cli.main(words.format(run="run", data="scenes:?size=32&count=64").split()) == 2
    out, err = capsys.readouterr()
    assert "top1" in out
    assert err.splitlines()[-1] == "foveola: error: label_free: such data"
    assert (here / "run" / "results" / "knn.json").is_file()


def test_a_signal_ends_other_commands_as_if_they_had_been_interrupted(here: Path, capsys, monkeypatch):
    from foveola.evaluation import evaluate

    closed: list[bool] = []

    def killed(*_) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            closed.append(True)  # what was opened is closed

    monkeypatch.setattr(evaluate, "_measure", killed)
    before = signal.getsignal(signal.SIGTERM)
    words = COMMANDS["evaluate"].format(run="run", data="scenes:?size=32&count=64").split()
    assert cli.main(words) == 128 + signal.SIGTERM
    assert closed == [True]
    assert capsys.readouterr().err.splitlines()[-1] == "foveola: ended by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
