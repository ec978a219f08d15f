import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from foveola import __version__, cli, console
from foveola.config import KeyInfo, UserError, parse_overrides

ROOT = Path(__file__).resolve().parents[1]


def error_of(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("foveola: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("foveola: error: ").strip()


def test_version_and_usage(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"foveola {__version__}\n"
    for words, code in ([], 2), (["--help"], 0), (["-h"], 0), (["pretrain", "--help"], 0):
        assert cli.main(words) == code
        assert "pretrain RECIPE" in capsys.readouterr().out


def test_the_package_can_be_run_as_a_module():
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "foveola", *words], capture_output=True, text=True, cwd=ROOT
        )

    assert run("--version").stdout == f"foveola {__version__}\n"
    wrong = run("pretrian")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("foveola: error: unknown command 'pretrian'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrian demo", "unknown command 'pretrian'; did you mean 'pretrain'?"),
        ("frobnicate", "unknown command 'frobnicate'; known: pretrain, finetune, "),
        ("pretrain", "which recipe? usage: foveola pretrain RECIPE"),
        ("pretrain demo --dryrun", "unknown option '--dryrun'; did you mean '--dry-run'?"),
        ("pretrain demo --seed=1", "keys take no dashes: write seed=1"),
        ("pretrain demo seed 1", "expected key=value, got 'seed'"),
        ("pretrain ibot-vits16-in1", "unknown recipe 'ibot-vits16-in1'; did you mean 'ibot-vits16-in1k'?"),
        ("pretrain ./nowhere.yaml", "no configuration file nowhere.yaml"),
        ("pretrain ibot-vits16-in1k sede=1", "unknown key 'sede'; did you mean 'seed'?"),
        ("pretrain ibot-vits16-in1k seed=one", "seed: expected int, got 'one'"),
        ("pretrain ibot-vits16-in1k seed=-1", "seed: must be >= 0, got -1"),
        ("evaluate", "which protocol (classify"),
        ("evaluate knm model=x", "unknown protocol 'knm'; did you mean 'knn'?"),
        ("evaluate knn train=scenes:", "evaluate knn needs model=: a run folder"),
        ("evaluate knn model=x kk=3", "unknown key 'kk'; "),
        ("analyze", "which analysis (attention)? usage: foveola analyze attention model=A[,B ...]"),
        ("analyze attentoin model=x", "unknown analysis 'attentoin'; known: attention"),
        ("analyze attention data=scenes: out=x", "analyze attention needs model=; usage: "),
        ("analyze attention model=x,y data=scenes:", "analyze attention needs out=; usage: "),
        ("analyze attention model=x data=scenes: out=x limit=0", "limit: must be >= 1, got 0"),
        ("visualize pac", "unknown kind 'pac'; did you mean 'pca'?"),
        ("visualize pca data=scenes:", "visualize pca needs model=: a run folder"),
        ("recipes all", "recipes takes no 'all'"),
        ("report", "which run? usage: foveola report RUN [RUN ...]"),
        ("report nowhere", "nowhere is no run folder: it does not exist"),
        ("demo quick", "expected key=value, got 'quick'; usage: foveola demo [out=runs/demo] [seeds=1]"),
        ("demo seeds=0", "seeds: expected a number of at least 1, got 0"),
        ("demo seeds=few", "seeds: expected a number of at least 1, got 'few'"),
        ("demo durations=3", "unknown key 'durations'; did you mean 'duration'?"),
        ("demo --seeds=2", "keys take no dashes: write seeds=2"),
        ("pretrain demo --dry-run data=folder:/nowhere", "folder: no folder /nowhere"),
        ("pretrain demo data=scenes:?count=9", "scenes:?count=9 has 9 images, fewer than batch_size=64"),
        ("pretrain demo device=tpu9", "no such device: 'tpu9'"),
        ("evaluate knn model=untrained:nowhere train=scenes: test=scenes:", "no model at nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, message):
    assert error_of(capsys, *arguments.split()).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate knn model=runs/exmaple train=scenes: test=scenes:", "no model at runs/exmaple"),
        ("evaluate knn model=untrained:rnus/example train=scenes: test=scenes:", "no model at rnus/example"),
        ("report runs/exmaple", "runs/exmaple is no run folder: it does not exist"),
        ("compare runs/exmaple runs/example", "no run, folder or result file runs/exmaple"),
        ("pretrain runs/exmaple", "unknown recipe 'runs/exmaple'"),
        ("export runs/exmaple out=x", "no model at runs/exmaple"),
    ],
)
def test_a_misspelt_run_folder_is_told_the_nearest(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "example").mkdir(parents=True)
    error = error_of(capsys, *arguments.split())
    assert error.startswith(message)
    assert error.rstrip("\n").endswith("; did you mean runs/example?")


def test_a_misspelt_folder_above_a_file_is_told_with_the_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "example").mkdir(parents=True)
    (tmp_path / "runs" / "example" / "config.yaml").touch()
    error = error_of(capsys, "pretrain", "runs/exmaple/config.yaml")
    assert error == ("no configuration file runs/exmaple/config.yaml; did you mean runs/example/config.yaml?")
    assert error_of(capsys, "report", "elsewhere/altogether").endswith("it does not exist")


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("FOVEOLA_DEBUG", "1")
    with pytest.raises(UserError, match="unknown command"):
        cli.main(["nonsense"])


def test_interruption(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    assert cli.main(["pretrain", "demo"]) == 130
    assert capsys.readouterr().err == "foveola: interrupted\n"


def test_recipes_names_them_all(capsys):
    from foveola.training.recipe import recipes

    assert cli.main(["recipes"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "method", "model", "data", "aim"]
    assert [row.split()[0] for row in rows] == list(recipes())
    assert "ibot-vits16-in1k" in recipes()


def test_help_lists_every_key_with_its_value_in_this_recipe(capsys):
    from foveola.config import build, describe, to_dict
    from foveola.training.recipe import RunConfig, resolve

    assert cli.main(["pretrain", "ibot-vits16-in1k", "seed=7", "--help"]) == 0
    table = capsys.readouterr().out.split("\n\n", 1)[1].splitlines()
    keys = {line.split()[0]: line for line in table[1:]}
    config = resolve("ibot-vits16-in1k", ["seed=7"])
    assert list(keys) == [info.path for info in describe(config)]
    assert keys["seed"].split()[1:4] == ["7", "int", ">="]
    assert build(RunConfig, to_dict(config)) == config
    without_meaning = [info.path for info in describe(config) if not info.help]
    assert not without_meaning


def test_help_of_a_protocol(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    assert "knn" in capsys.readouterr().out
    assert cli.main(["evaluate", "knn", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"model", "train", "test"} <= {line.split()[0] for line in lines if line}


def test_words_reach_the_python_api_unchanged(monkeypatch, capsys):
    from foveola.evaluation import evaluate
    from foveola.training import run

    calls = []

    class Table(evaluate.Result):
        protocol, written = "knn", "a file"

        def __init__(self) -> None:
            pass

        def table(self) -> str:
            return "the table"

    def evaluate_all(model, names, show, **settings):
        calls.append((model, names, settings))
        show(Table())
        return dict.fromkeys(names, Table())

    monkeypatch.setattr(evaluate, "evaluate_all", evaluate_all)

    def pretrain(config):
        calls.append(config)
        return run.Run(Path(), config, 1, 1, {})

    monkeypatch.setattr(run, "pretrain", pretrain)
    words = "evaluate knn model=2024 train=scenes: test=folder:/a?split=test k=[1,3] temperature=0.1"
    assert cli.main(words.split()) == 0
    assert capsys.readouterr().out == "the table\n"
    model, names, settings = calls.pop()
    assert (model, names) == ("2024", ["knn"])
    assert settings.pop("device") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = {"train": "scenes:", "test": "folder:/a?split=test", "out": None, "cache": None}
    expected |= {"overlap": "refuse"}
    assert settings == expected | parse_overrides(["k=[1,3]", "temperature=0.1"])
    assert cli.main(["pretrain", "ibot-vits16-in1k", "seed=3", "data=folder:/a b"]) == 0
    config = calls.pop()
    assert (config.seed, config.data) == (3, "folder:/a b")


def test_analysis_of_attention_prints_its_table_and_paths(capsys, tmp_path):
    assert cli.main(["analyze", "attention", "--help"]) == 0
    assert "outlier_deviations" in capsys.readouterr().out
    out = tmp_path / "found"
    words = ["data=scenes:?count=2", f"out={out}", "workers=0", "device=cpu"]
    assert cli.main(["analyze", "attention", "model=pixels:,pixels:?size=64&patch=32", *words]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert printed.startswith("attention: scenes:")
    assert str(out / "attention_heads.png") in printed.splitlines()
    made = ".csv", ".json", ".png", "_heads.png", "_vectors.png"
    assert {path.name for path in out.iterdir()} == {f"attention{name}" for name in made}


def test_help_of_the_demo(capsys):
    assert cli.main(["demo", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: foveola demo [out=runs/demo] [seeds=1] [key=value ...]"
    keys = [line.split()[0] for line in lines if line]
    for key in ("out", "seeds", "duration", "optimizer.lr.value"):
        assert keys.count(key) == 1


def test_words_reach_the_demo(monkeypatch):
    from foveola import demo

    calls = []
    monkeypatch.setattr(demo, "demo", lambda *arguments: calls.append(arguments))
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "seeds=1", "out=a/b", "model.depth=2", "seed=5", "processes=1"]) == 0
    assert calls == [("runs/demo", 1, {}, None), ("a/b", 1, {"model": {"depth": 2}, "seed": 5}, 1)]


# -- the whole way -------------------------------------------------------------------------------------------

RESULT = "device=cpu rows=objects view=object workers=0 limit=24 k=[5]"


@pytest.fixture
def tiny(tmp_path, monkeypatch, tiny_recipe) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny_recipe)
    return tmp_path


def test_from_a_recipe_to_a_result(tiny, capsys, run_ranks):
    assert cli.main(["pretrain", "tiny.yaml", "--dry-run"]) == 0
    assert "4 (4 an epoch, 1 epochs)" in capsys.readouterr().out
    assert [path.name for path in tiny.iterdir()] == ["tiny.yaml"]

    assert cli.main(["pretrain", "tiny.yaml", "out=run"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "training in run: 4 steps of 16 images" in err
    assert "finished; encoder: run/encoder" in err
    files = {path: path.stat().st_mtime_ns for path in tiny.rglob("*") if path.is_file()}
    assert cli.main(["pretrain", "tiny.yaml", "out=run"]) == 0
    assert capsys.readouterr().out == "run is finished: nothing to do\n"
    assert error_of(capsys, *["pretrain", "tiny.yaml", "out=run", "seed=3"]) == (
        "run holds another run (its seed is 0, not 3): choose another out=, or repeat its settings"
    )
    assert "is a run folder; to go on with it" in error_of(capsys, "pretrain", "run")
    assert files == {path: path.stat().st_mtime_ns for path in tiny.rglob("*") if path.is_file()}

    words = f"evaluate knn train=scenes:?size=32&count=64 test=scenes:?size=32&count=64 {RESULT}".split()
    assert cli.main([*words, "model=run"]) == 0
    table = capsys.readouterr().out
    saved = json.loads((tiny / "run" / "results" / "knn.json").read_text())
    assert f"{saved['metrics']['top1_masks']:.2f}" in table
    assert cli.main([*words, "model=untrained:run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] != table.splitlines()[1:]

    # Two processes share the images, and one of them speaks.
    code = f"import sys\nfrom foveola import cli\nsys.exit(cli.main({[*words, f'model={tiny}/run']!r}))"
    first, second = run_ranks(code)
    assert second == ""
    *same, written = first.splitlines()[1:]
    assert same == table.splitlines()[1:-1]
    assert written == f"written to {tiny}/run/results/knn.json"


def test_tables_align_and_do_not_wrap_in_a_pipe(capsys):
    keys = [KeyInfo("a", "int", 1, "word " * 60), KeyInfo("long.key", "text or null", None, "last")]
    console.print_keys(keys)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.index("meaning") == first.index("word") == second.index("last")
    assert second.split() == ["long.key", "null", "text", "or", "null", "last"]


def test_a_closed_pipe_is_no_error():
    reader = f"{sys.executable} -m foveola.cli --help | head -n 1"
    done = subprocess.run(["bash", "-c", reader], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("always")
def test_a_former_spelling_is_said_in_one_line(capsys):
    """What follows is the mistake that the command was asked with."""
    assert cli.main(["evaluate", "knn", "model=nowhere", "test=scenes:", "rows=pictures"]) == 2
    *said, last = capsys.readouterr().err.splitlines()
    assert set(said) == {"foveola: rows: 'pictures' is now called 'images'"}
    assert last.startswith("foveola: error: ")


def test_what_all_processes_of_torchrun_meet_is_said_once(monkeypatch, capsys):
    """Each process of a start counts in torchrun's store; another start, and another mistake, begin anew."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    agent = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in agent.items():
        monkeypatch.setenv(name, value)

    def said(recipe: str) -> int:
        assert cli.main(["pretrain", recipe]) == 2
        return capsys.readouterr().err.count("foveola: error: ")

    assert [said("nowhere"), said("nowhere"), said("elsewhere")] == [1, 0, 1]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert said("nowhere") == 1
    monkeypatch.setenv("MASTER_PORT", "no number")  # a store that cannot be asked
    assert [said("nowhere"), said("nowhere")] == [1, 1]
