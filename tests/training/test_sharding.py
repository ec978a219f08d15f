"""Weights cut over processes: the same numbers as whole ones, less memory, and checkpoints of either kind."""

import json
import os
import pickle

import pytest
import torch

from foveola.config import ConfigError, UserError
from foveola.files import RunFolder
from foveola.state_files import read_state
from foveola.training.checkpoint import newest, read_checkpoint
from foveola.training.recipe import resolve
from foveola.training.sharding import dimension_to_cut
from foveola.zoo.load import load
from tests.training.conftest import HEADS, SMALL

TRAIN = """
import dataclasses, json, sys
import torch
from foveola import distributed
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.training.assemble import assemble, local_batch_size, encoder_of
from foveola.training.durations import plan
from foveola.training.recipe import resolve
from foveola.training.sharding import local_part, whole_tensors
from foveola.training.supply import with_data

torch.set_num_threads(1)


def train(recipe, changes, steps=3):
    config = resolve(recipe, changes)
    source = open_source(config.data)
    config = with_data(config, source)
    progress = plan(config, len(source), distributed.world_size())
    trainer = assemble(config, progress, torch.device("cpu"))
    rank, world = distributed.rank(), distributed.world_size()
    what = {"with_objects": config.views.objects is not None, "annotations": config.method.annotations}
    loader = Loader(
        source, local_batch_size(config), config.seed, config.loader, **what, rank=rank, world_size=world,
        accumulate=config.accumulate,
    )
    batches, values = iter(loader), []
    for step in range(steps):
        found = trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
        loss = distributed.all_reduce_mean(torch.as_tensor(found["loss"]))
        values += [loss.item(), float(found["grad_norm"])]
    trainer.diagnose()
    trainer.figures()
    encoder = encoder_of(config, trainer.method, steps).backbone.state_dict()
    own = sum(local_part(p).numel() for p in trainer.method.parameters())
    return values, whole_tensors(trainer.state_dict()), encoder, own


def farthest(a, b):
    worst = 0.0
    for name, one in a.items():
        if isinstance(one, torch.Tensor) and one.is_floating_point() and one.numel():
            worst = max(worst, float((one - b[name]).abs().max() / one.abs().max().clamp(min=1e-3)))
    return worst


if __name__ == "__main__":
    distributed.start("cpu")
    for recipe, changes, kinds in json.loads(sys.argv[1]):
        one = train(recipe, changes | {"parallel": "ddp"})
        for kind in kinds:
            two = train(recipe, changes | kind)
            if distributed.is_main():
                losses = max(abs(x - y) / max(abs(x), 1e-3) for x, y in zip(one[0], two[0]))
                moments = max(
                    farthest(state, two[1]["optimizer"][i]) for i, state in one[1]["optimizer"].items()
                )
                differ = {
                    "losses": losses, "moments": moments, "encoder": farthest(one[2], two[2]),
                    "weights": farthest(one[1]["method"], two[1]["method"]),
                }
                adaptive = resolve(recipe, changes).optimizer.kind == "adamw"
                about = {"what": [recipe, kind], "share": two[3] / one[3], "adaptive": adaptive}
                weights = [v for v in two[1]["method"].values() if isinstance(v, torch.Tensor)]
                weights += [v for state in two[1]["optimizer"].values() for v in state.values()]
                differ["dtypes"] = sorted({str(v.dtype) for v in weights if v.is_floating_point()})
                print(json.dumps(about | differ))
    distributed.stop()
"""
LOCAL = {"views.local_size": 16, "views.local_count": 2}
DECAYED = SMALL | {"optimizer.weight_decay": {"value": 0.1}}
DISTILLED = DECAYED | {"method.heads": {"main": HEADS}, "optimizer.freeze_last_layer": "1 steps"}
BOTH_HEADS = "main", "patches"
BOTH = DISTILLED | {"method.heads": dict.fromkeys(BOTH_HEADS, HEADS)}
CAPI = {
    "method.clustering.prototypes": 24,
    "model": {k: v for k, v in SMALL["model"].items() if k != "image_size"},
}
METHODS = {
    "dino-tiny-tinyimagenet": DISTILLED | LOCAL,
    "ibot-tiny-tinyimagenet": DISTILLED | LOCAL,
    "odis-tiny-tinyimagenet": DISTILLED | LOCAL,
    "dinov2-tiny-tinyimagenet": BOTH | LOCAL,
    "posfield-tiny-tinyimagenet": DISTILLED | LOCAL,
    "odis-posfield-tiny-tinyimagenet": DISTILLED | LOCAL,
    "capi-tiny-tinyimagenet": DECAYED | CAPI,
    "mae-tiny-tinyimagenet": DECAYED,
    "ijepa-tiny-tinyimagenet": DECAYED,
    "classify-small": DECAYED,
    "vitdet-small": {
        "data": "scenes:?size=64&count=16&objects=2-4",
        "batch_size": 4,
        "duration": "6 steps",
        "device": "cpu",
        "loader.workers": 0,
        "method": {"channels": 16, "hidden": 32, "proposals": 16},
        "optimizer": SMALL["optimizer"] | {"lr": {"value": 0.01, "warmup": "0 steps"}, "layer_decay": 1.0},
    },
}
FULLY = {"parallel": "fsdp"}


def compare(run_ranks, cases, ranks=2):
    printed, *others = run_ranks(TRAIN, ranks=ranks, words=[json.dumps(cases)], timeout=280)
    assert not any(others)
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_method_learns_the_same_with_its_weights_in_parts(run_ranks, ranks):
    for found in compare(run_ranks, [(name, changes, [FULLY]) for name, changes in METHODS.items()], ranks):
        assert found["losses"] < 1e-6, found
        assert max(found["weights"], found["encoder"], found["moments"]) < 1e-5, found
        assert -0.01 < found["share"] - 1 / ranks < 0.06, found  # the first process has what cannot be cut


def test_every_way_of_cutting_learns_the_same(run_ranks):
    """Accumulation, activations computed again, clipping by part, AdamW, and weights that stay gathered."""
    capi, dinov2 = "capi-tiny-tinyimagenet", "dinov2-tiny-tinyimagenet"
    hybrid = {"parallel": "hsdp", "sharding.replicas": 2}
    ways = {
        "accumulate": 2,
        "checkpoint_activations": True,
        "optimizer.clip": 0.1,
        "optimizer.clip_each": "module",
    }
    adam = {"optimizer": {"kind": "adamw", "lr": {"value": 1e-3, "warmup": "0 steps"}, "lr_rule": "none"}}
    kept = FULLY | {"sharding.reshard": False}
    cases = [
        (dinov2, METHODS[dinov2] | ways | {"batch_size": 16}, [FULLY, kept, hybrid]),
        (dinov2, METHODS[dinov2] | adam, [FULLY]),
        (capi, METHODS[capi], [FULLY, hybrid]),
    ]
    for found in compare(run_ranks, cases, ranks=4):
        assert found["losses"] < 3e-6, found
        assert found["moments"] < 1e-5, found
        assert max(found["weights"], found["encoder"]) < (2e-3 if found["adaptive"] else 1e-5), found
        half = 0.5 if "replicas" in str(found["what"]) else 0.25
        assert half - 0.01 < found["share"] < half + 0.06, found


BUILT = """
from foveola.training import assemble as room

built = room._built
distributed.start("cpu")
for recipe, changes in json.loads(sys.argv[1]):
    config = resolve(recipe, changes)
    config = with_data(config, open_source(config.data))
    whole, made = built(config, None), []
    room._built = lambda *words: (made.append(1), built(*words))[1]
    method = assemble(config, plan(config, 64, 2), torch.device("cpu")).method
    found, meant = whole_tensors(dict(method.named_parameters())), dict(whole.named_parameters())
    found |= dict(method.named_buffers())
    meant |= dict(whole.named_buffers())
    assert found.keys() == meant.keys()
    different = [name for name, tensor in meant.items() if not torch.equal(tensor, found[name])]
    learns = [name for name, p in method.named_parameters() if p.requires_grad != meant[name].requires_grad]
    print(json.dumps([len(made), different + learns]))
distributed.stop()
"""


def test_the_main_process_alone_builds_whole_networks(run_ranks):
    """To the bit those of one process, with statistics and tables; what rests, rests."""
    names = (
        "dinov2-tiny-tinyimagenet",
        "posfield-tiny-tinyimagenet",
        "capi-tiny-tinyimagenet",
        "ijepa-tiny-tinyimagenet",
    )
    cases = [(name, METHODS[name] | FULLY) for name in names]
    cases.append(
        (names[0], METHODS[names[0]] | FULLY | {"method.heads.patches.mlp_of": "main", "train_blocks": 1})
    )
    code = TRAIN.partition("if __name__")[0] + BUILT
    for rank, text in enumerate(run_ranks(code, words=[json.dumps(cases)])):
        for line in text.splitlines():
            times, different = json.loads(line)
            assert (times, different) == (rank == 0, [])
        assert len(text.splitlines()) == 5


COMPILED = """
compile = torch.nn.Module.compile
torch.nn.Module.compile = lambda self: compile(self, backend="aot_eager")  # inductor takes minutes on a CPU
"""
GRAPHS = """
from torch._dynamo.utils import counters

print(json.dumps([dict(counters["graph_break"]), counters["stats"]["unique_graphs"]]))
"""


def test_compiled_blocks_learn_the_same_with_their_weights_in_parts(run_ranks):
    """Each block is a graph without breaks: for views of the student, of each size, and of the teacher."""
    recipe = "ibot-tiny-tinyimagenet"
    before, main, after = TRAIN.partition("if __name__")
    cases = [(recipe, METHODS[recipe], [FULLY | {"compile": True}])]
    code = before + COMPILED + main + after + GRAPHS
    printed, _ = run_ranks(code, words=[json.dumps(cases)], timeout=280)
    found, (breaks, graphs) = map(json.loads, printed.splitlines())
    assert (breaks, graphs) == ({}, 3)
    assert found["losses"] < 1e-5, found
    assert max(found["weights"], found["encoder"], found["moments"]) < 1e-5, found


WHOLE = """
from foveola import losses
from foveola.methods import capi, clusters
from foveola.state_files import is_cut
from foveola.training import sharding

seen, method = {}, None


def note(when):
    whole = [name for name in units if not is_cut(next(method.get_submodule(name).parameters()))]
    seen.setdefault(when, set()).add(tuple(whole))


def noting(room, name):
    inner = getattr(room, name)
    setattr(room, name, lambda *words, **more: (note(name), inner(*words, **more))[1])


make = sharding.shard


def shard(built, *words):
    global method, units
    make(built, *words)
    method = built
    names = {id(module): name for name, module in method.named_modules()}
    units = [names[id(unit)] for unit in method.units()]
    for network in method.trained():
        network.blocks[-1].register_forward_hook(lambda *_: note("block"))
    method.register_forward_hook(lambda *_: note("end"))


sys.modules["foveola.training.assemble"].shard = shard
noting(losses, "cross_entropy")
noting(clusters, "cluster")
distributed.start("cpu")
recipe, changes = json.loads(sys.argv[1])
train(recipe, changes, 2)
print(json.dumps({"units": units, **{when: sorted(found) for when, found in seen.items()}}))
distributed.stop()
"""


def test_heads_and_clusters_are_whole_just_while_they_are_read(run_ranks):
    """Of a head, its prototypes where a loss reads them, which is when the network computes nothing."""
    code = TRAIN.partition("if __name__")[0] + WHOLE
    found = {}
    for recipe in ("dinov2-tiny-tinyimagenet", "capi-tiny-tinyimagenet"):
        words = [json.dumps([recipe, METHODS[recipe] | FULLY])]
        found[recipe], _ = map(json.loads, run_ranks(code, words=words))
    for each in found.values():
        assert each["block"] == each["end"] == [[]]
    dino, capi = found.values()
    heads = [[f"{side}.heads.{name}.last_layer" for side in ("student", "teacher")] for name in BOTH_HEADS]
    assert dino["cross_entropy"] == sorted(heads)
    assert len(dino["units"]) == 8  # MLPs, too
    assert capi["cluster"] == [["clustering"]]
    assert {"student.head", "clustering", "student.predictor.blocks.0"} <= set(capi["units"])


def test_weights_of_blocks_travel_as_halves(run_ranks):
    """Losses are those of halves that autocast makes, not to the bit; weights and averages stay float32."""
    recipe = "dinov2-tiny-tinyimagenet"
    halves = METHODS[recipe] | {"precision": "bf16"}
    whole, half = compare(run_ranks, [(recipe, halves, [FULLY, FULLY | {"sharding.gather": "bf16"}])])
    assert whole["losses"] < 1e-6, whole
    assert 1e-6 < half["losses"] < 1e-2, half
    assert half["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding.reshard": False}, "sharding.reshard has no effect: parallel=ddp"),
        ({"parallel": "fsdp", "sharding.replicas": 2}, "sharding.replicas has no effect: parallel=fsdp"),
        ({"parallel": "fsdp", "sharding.gather": "bf16"}, "goes with precision=bf16, not fp32"),
        ({"parallel": "hsdp", "lora": {}}, "parallel=ddp, not hsdp"),
        ({"parallel": "zero"}, "parallel"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve("demo", changes)


GO_ON = """
import json, shutil, sys
from pathlib import Path
import torch
from foveola import distributed
from foveola.training.recipe import resolve
from foveola.training.run import pretrain

torch.set_num_threads(1)
distributed.start("cpu")
recipe, changes, folder, (first, then) = json.loads(sys.argv[1])
every = {"checkpoint_every": "2 steps", "keep": 5, "evaluate_every": "2 steps", "keep_every": "2 steps"}
once = pretrain(resolve(recipe, changes | every | {"out": f"{folder}/once", "parallel": first}))
assert once.finished
if distributed.is_main():
    shutil.copytree(f"{folder}/once", f"{folder}/again")
    for path in Path(folder, "again", "checkpoints").glob("step-*[3-9]"):
        shutil.rmtree(path)
distributed.barrier()
again = pretrain(resolve(recipe, changes | every | {"out": f"{folder}/again", "parallel": then}))
assert again.finished and again.step == once.step
distributed.stop()
"""


@pytest.mark.parametrize("ways", [("fsdp", "ddp"), ("ddp", "fsdp")], ids=lambda ways: "-".join(ways))
def test_a_run_goes_on_with_its_weights_cut_or_whole(run_ranks, tmp_path, ways):
    """What it keeps has the same numbers, in parts or whole; so have its measurements, and its student."""
    changes = METHODS["odis-tiny-tinyimagenet"] | {"freeze": {"encoder": "3 steps"}}
    recipe = ["odis-tiny-tinyimagenet", changes | {"evaluate.workers": 0}, str(tmp_path), ways]
    run_ranks(GO_ON, words=[json.dumps(recipe)], timeout=280)
    once, again = (RunFolder(tmp_path / name) for name in ("once", "again"))
    assert [path.name for path in again.found_checkpoints()] == [f"step-0000000{n}" for n in (6, 4, 2)]
    states = [flat(read_checkpoint(run.checkpoint(6))["trainer"]) for run in (once, again)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-6, msg=str(name))
    for run, way in zip((once, again), ways, strict=True):
        assert (run.checkpoint(6) / "parts").is_dir() == (way == "fsdp")
        assert load(f"{run.path}?which=student").config.step == 6
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoders = [load(run.path) for run in (once, again)]
    torch.testing.assert_close(*(each(images).patches for each in encoders), rtol=1e-5, atol=1e-5)
    measured = [
        [line["knn/top1_masks"] for line in run.read_metrics() if "knn/top1_masks" in line]
        for run in (once, again)
    ]
    assert len(measured[0]) == 3
    assert measured[0] == measured[1]


def flat(tree, name=()):
    """What a state holds, by place."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {place: value for key, inner in tree.items() for place, value in flat(inner, (*name, key)).items()}


FAILING = """
import errno, json, os, sys
import torch
import torch.distributed.checkpoint as dcp
from foveola import distributed
from foveola.config import UserError
from foveola.training.recipe import resolve
from foveola.training.run import pretrain

torch.set_num_threads(1)
distributed.start("cpu")
recipe, changes, how = json.loads(sys.argv[1])
write, calls = dcp.FileSystemWriter.write_data, []

def fail(self, *words):
    calls.append(self)
    if len(calls) == 2 and distributed.rank() == 1:
        if how == "killed":
            os._exit(9)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(self, *words)

if how:
    dcp.FileSystemWriter.write_data = fail
try:
    pretrain(resolve(recipe, changes))
except UserError as error:
    print(error)
    os._exit(2)
distributed.stop()
"""


@pytest.mark.parametrize("how", ["killed", "full disk"])
def test_parts_that_cannot_be_written_leave_the_checkpoint_before(forked, run_ranks, tmp_path, how):
    changes = METHODS["mae-tiny-tinyimagenet"] | FULLY
    changes |= {"out": str(tmp_path / "run"), "checkpoint_every": "2 steps", "log_every": 1}
    words = ["mae-tiny-tinyimagenet", changes, how]
    with forked(FAILING, [json.dumps(words)], 2) as processes:
        codes = processes.wait()
        said = [path.read_text() for path in processes.printed]
    assert all(codes)
    if how == "full disk":
        assert codes == [2, 2]
        assert all("step 4 cannot be saved" in text or "No space left" in text for text in said), said
    run = RunFolder(tmp_path / "run")
    assert newest(run.path) == run.checkpoint(2)
    words[2] = ""
    run_ranks(FAILING, words=[json.dumps(words)])
    assert newest(run.path) == run.checkpoint(6)


@pytest.mark.parametrize(
    "code", [b"no pickle", pickle.dumps(print), pickle.dumps(os.system), b"cos\nsystem\n."]
)
def test_a_list_of_parts_runs_no_code(tmp_path, code):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".metadata").write_bytes(code)
    torch.save({}, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"\.metadata is (no list|not read)"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("shape", "parts", "dim"),
    [
        ((384, 1536), 4, 0),
        ((1, 197, 1024), 512, 2),  # else 512 times as large
        ((1, 197, 384), 512, 0),  # nothing divides evenly
        ((1, 64, 96), 2, 2),
        ((768, 3072), 512, 1),  # else a third larger
        ((1000, 512), 512, 0),  # 1024 rows are not much more
        ((3, 7), 2, 0),
        ((7,), 4, 0),
        ((0, 4), 2, 0),
    ],
)
def test_a_tensor_is_cut_where_little_is_filled_up(shape, parts, dim):
    assert dimension_to_cut(shape, parts) == dim
