"""Runs that go on with other processes: as many as there are now, with weights whole or in parts."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from foveola.files import RunFolder
from foveola.training.checkpoint import newest, read_checkpoint

# The views of a step are drawn for each process. Here they are those of one process, so that nothing but
# what a run keeps tells one that went on with others from one in a go.
WORK = """
import importlib.util, json, os, signal, sys
import torch
from foveola import distributed
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.training import checkpoint, loop
from foveola.training.recipe import resolve
from foveola.training.run import pretrain
from foveola.views.batch import Streams, make_views

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("shared", "CONFTEST")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)


def as_one_process(config):
    source, world = open_source(config.data), distributed.world_size()
    objects = config.views.objects is not None
    everyone = Loader(source, config.batch_size, config.seed, config.loader, with_objects=objects).batches

    def views(part, config_, patch_size, streams):
        _, step, rank = streams.origin
        canvases, _ = everyone.batch(step)
        mine = slice(rank * len(part), (rank + 1) * len(part))
        assert torch.equal(part.indices, canvases.indices[mine])  # in the order of the run, whoever reads it
        whole = make_views(canvases, config_, patch_size, Streams(config.seed, step))
        return shared.part_of(whole, mine)

    loop.make_views = views


def die(name):
    # Of this process, as it calls a function of checkpoints for that of step 4.
    function = getattr(checkpoint, name)

    def wrapped(path, *words):
        if "step-00000004" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(path, *words)

    setattr(checkpoint, name, wrapped)


distributed.start("cpu")
for recipe, changes, out, parallel, killed in json.loads(sys.argv[1]):
    config = resolve(recipe, changes | {"out": out, "parallel": parallel})
    as_one_process(config)
    if killed and distributed.is_main():
        die(killed)
    assert pretrain(config).finished
distributed.stop()
"""
WORK = WORK.replace("CONFTEST", str(Path(__file__).parents[1] / "methods" / "conftest.py"))
SMALL = {
    "data": "scenes:?size=32&count=64",
    "batch_size": 6,
    "duration": "4 steps",
    "device": "cpu",
    "model": {"width": 16, "depth": 1, "heads": 2, "patch_size": 8, "drop_path": 0.0},
    "views.global_size": 32,
    "loader": {"canvas": 32, "workers": 0},
    "transform": {"resize": 32, "crop": 32},
    "optimizer": {"kind": "adamw", "lr": {"value": 1e-4, "warmup": "0 steps"}, "lr_rule": "none"},
    "log_every": 1,
    "checkpoint_every": "2 steps",
}
HEADS = {"prototypes": 20, "hidden": 16, "bottleneck": 8}
METHODS = {
    "odis-posfield-tiny-tinyimagenet": SMALL
    | {
        "method.heads": dict.fromkeys(("main", "positions"), HEADS),
        "method.token.target.kind": "centering",
        "method.spread": None,  # KoLeo is of the images of a process
        "views.local_count": 0,
        "optimizer.freeze_last_layer": "3 steps",
    },
    "capi-tiny-tinyimagenet": SMALL
    | {"method.clustering.prototypes": 12, "method.clustering.queue": 6, "method.predictor.depth": 1},
    "mae-tiny-tinyimagenet": SMALL
    | {"method.decoder": {"kind": "self", "width": 16, "depth": 1, "heads": 2, "drop_path": 0.0}},
}
FIRST, LAST = 2, 4  # of the steps that runs go on after, and to
ONCE = 2, "fsdp"
OTHERS = (1, "ddp"), (3, "fsdp"), (2, "ddp")  # three parts are not alike


def began(name, how, path, killed=""):
    """An entry of the work of processes: a run in the folder `path`."""
    return name, METHODS[name], str(path), how[1], killed


@pytest.fixture(scope="module")
def runs(run_ranks, tmp_path_factory):
    """The folder of each run, by its method, its number of processes and its `parallel`."""
    folder = tmp_path_factory.mktemp("runs")
    found = {
        (name, *how): RunFolder(folder / "-".join(map(str, (name, *how))))
        for name in METHODS
        for how in (ONCE, *OTHERS)
    }
    run_ranks(WORK, ONCE[0], [json.dumps([began(name, ONCE, found[name, *ONCE].path) for name in METHODS])])
    for name in METHODS:
        for how in OTHERS:
            run = found[name, *how]
            shutil.copytree(found[name, *ONCE].path, run.path)
            shutil.rmtree(run.checkpoint(LAST))
    for how in OTHERS:
        work = [began(name, how, found[name, *how].path) for name in METHODS]
        run_ranks(WORK, how[0], [json.dumps(work)])
    return found


def flat(tree, name=()):
    """What a state holds, by place."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {place: value for key, inner in tree.items() for place, value in flat(inner, (*name, key)).items()}


def learned(run):
    """What the last checkpoint holds but for what the first process alone saw; past images in any order."""
    state = flat(read_checkpoint(run.checkpoint(LAST))["trainer"])
    state.pop(("method", "clustering.seen"), None)
    if (past := state.get(("method", "clustering.past"))) is not None:
        order = past[..., 0].argsort(dim=1)
        state["method", "clustering.past"] = past.take_along_dim(order[..., None], dim=1)
    return state


def losses(run):
    return [line["loss"] for line in run.read_metrics() if line["step"] > FIRST]


@pytest.mark.parametrize("how", OTHERS, ids=lambda how: f"{how[0]}-{how[1]}")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_with_any_number_of_processes_as_in_a_go(runs, name, how):
    """Losses, weights, averages of the optimizer, centres and past patches; and the order of the images."""
    once, again = runs[name, *ONCE], runs[name, *how]
    said = again.log.read_text()
    assert f"going on after step {FIRST} " in said
    assert (f"{how[0]} processes instead of 2" in said) == (how[0] != 2)
    assert len(losses(once)) == LAST - FIRST
    assert losses(again) == pytest.approx(losses(once), rel=1e-6)
    states = [learned(run) for run in (once, again)]
    assert again.checkpoint(LAST).joinpath("parts").is_dir() == (how[1] == "fsdp")
    assert states[0].keys() == states[1].keys()
    for place, value in states[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(states[1][place], value, rtol=1e-6, atol=1e-6, msg=str(place))


@pytest.mark.parametrize("where", ["facts_of", "put_folder"])
def test_a_process_that_is_killed_while_it_saves_costs_the_steps_since_then(
    forked, run_ranks, runs, tmp_path, where
):
    """The parts are written; the first process is killed before their list, or before the name."""
    name = "mae-tiny-tinyimagenet"
    run = RunFolder(tmp_path / "run")
    with forked(WORK, [json.dumps([began(name, ONCE, run.path, where)])], ONCE[0]) as processes:
        codes = processes.wait()
    assert codes[0] == -signal.SIGKILL
    assert codes[1]
    assert newest(run.path) == run.checkpoint(FIRST)
    assert [path.name for path in run.checkpoints.iterdir() if path.name.startswith(".")]
    run_ranks(WORK, 1, [json.dumps([began(name, OTHERS[0], run.path)])])
    assert {path.name for path in run.checkpoints.iterdir()} == {f"step-0000000{n}" for n in (FIRST, LAST)}
    assert losses(run) == pytest.approx(losses(runs[name, *ONCE]), rel=1e-6)
