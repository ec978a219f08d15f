"""Benchmarks that cannot be tried where they are to tell: of GPUs, and of what many processes exchange."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import gpu, gpu_steps, growth
from benchmarks.gpu_checks import checks
from benchmarks.gpu_steps import Cost, Step
from foveola.training.recipe import resolve

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
SHALLOW = (("model.depth", 1), ("views.local_count", 2))


def test_losses_and_views_are_checked():
    said = {
        name: check(CPU) for name, check in checks(Path("/nowhere")).items() if name in ("losses", "views")
    }
    assert float(said["losses"].rpartition(" ")[2]) < 1e-5
    assert said["views"] == "boxes equal, pixels differ by 0.0e+00"


def test_the_table_goes_on_after_what_fails(tmp_path, monkeypatch, capsys):
    def fails(device):
        raise AssertionError("0.5 is not\n0.25")

    chosen = [
        Step("good", "ibot-tiny-tinyimagenet", 2, changes=SHALLOW),
        Step("bad", "ibot-tiny-tinyimagenet", 2, changes=(("model.depth", -1),)),
    ]
    monkeypatch.setattr(gpu, "checks", lambda root: {"one": lambda device: "fine", "two": fails})
    monkeypatch.setattr(gpu, "steps", lambda tiny: chosen)
    monkeypatch.setattr(gpu, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(gpu, "photos", lambda count: ([_jpeg()] * count, ""))
    assert not gpu.run(CPU, tmp_path / "table.md", minutes=10, quick=False)
    written = (tmp_path / "table.md").read_text()
    assert written == capsys.readouterr().out
    assert "- one: fine" in written
    assert "- two: **failed**: AssertionError: 0.5 is not (" in written
    rows = {cells[0]: cells[1:] for cells in map(_cells, written.splitlines()) if len(cells) == 8}
    assert (rows["good"][0], rows["good"][5]) == ("2", "0")
    assert float(rows["good"][1]) > 0
    assert int(rows["good"][4].replace(",", "")) > 100
    assert rows["bad"][6].startswith("ConfigError: ")
    assert re.fullmatch(r"data wait \d+%, 1 workers", rows["ibot fed by the loader"][6])
    assert not [name for name, cells in rows.items() if "Error" in cells[6] and name != "bad"]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def _jpeg() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(out, "JPEG")
    return out.getvalue()


def test_what_the_time_does_not_suffice_for_is_named(capsys):
    table = gpu.Table(None, 0.0)
    gpu.step_rows(table, [Step("one", "", 2), Step("two", "", 2, "graphs")], CPU, 1.0, 1.0)
    assert table.lines == ["| left out for time |  |  |  |  |  |  | one, two, CUDA graphs |"]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def measured(step, batch, *_):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("of 80 GiB")
        return Cost(batch, 0.5)

    monkeypatch.setattr(gpu_steps, "_measure", measured)
    monkeypatch.setattr(gpu_steps, "forget", lambda device: None)
    assert gpu_steps.measure(Step("", "", 12), CPU, 1.0).speed == 6.0
    assert tried == [12, 6, 3]


def test_a_compiled_step_knows_the_operations_that_were_counted_before():
    row = gpu.cells(
        Cost(8, 0.5, flops=2e12, memory=1.5, kernels=1234, waits=1, places=("/x/foveola/a.py:3",)), 8e12
    )
    assert row == ["8", "16.0", "50%", "1.5", "1,234", "1", "a.py:3"]


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_nowhere():
    step = Step("", "odis-dinov2-tiny-tinyimagenet", 8)
    cost = gpu_steps.measure(step, torch.device("cuda"), 0.1)
    assert cost.places == ()


EXCHANGED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from benchmarks.growth import exchanged
from benchmarks.step import canvases
from foveola import distributed
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.recipe import resolve
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

cpu = distributed.start("cpu")
summed, plain = [], torch.distributed.all_reduce

def counting(tensor, *words, **more):
    summed.append(tensor.nbytes)
    return plain(tensor, *words, **more)

torch.distributed.all_reduce = counting
found = []
for recipe in ("ibot", "odis-dinov2", "capi"):
    changes = {"batch_size": 8, "model.depth": 1}
    if recipe != "capi":
        changes |= {"views.local_count": 1}
    config = resolve(f"{recipe}-tiny-tinyimagenet", changes)
    progress = Progress(50, 1000, 100, 8)
    trainer = assemble(config, progress, cpu)
    trainer.wrapped.register_comm_hook(None, allreduce_hook)  # through the same function
    images = canvases(8 // distributed.world_size(), cpu)
    summed.clear()
    trainer.step(progress, lambda: images)
    expected = exchanged(config, trainer)
    found.append([sum(summed), sum(expected.values()), expected["gradients"]])
print(json.dumps(found))
distributed.stop()
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_exchange_what_the_formula_says(run_ranks, ranks):
    first, *others = map(json.loads, run_ranks(EXCHANGED, ranks, words=[str(ROOT)], timeout=280))
    assert all(first == other for other in others)
    for summed, expected, gradients in first:
        assert summed == expected > gradients > 0


GATHERED = """
import collections, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from benchmarks.step import canvases
from foveola import distributed
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.recipe import resolve

cpu = distributed.start("cpu")
moved = collections.Counter()


def counting(what, plain):
    def call(*words, **more):
        tensors = [each for each in (*words, *more.values()) if isinstance(each, torch.Tensor)]
        moved[what] += max(each.nbytes for each in tensors)  # the whole one
        return plain(*words, **more)
    return call


# torch has renamed both.
for what, names in {
    "gathered": ("all_gather_single", "all_gather_into_tensor"),
    "gradients": ("reduce_scatter_single", "reduce_scatter_tensor"),
}.items():
    for name in [name for name in names if hasattr(torch.distributed, name)]:
        setattr(torch.distributed, name, counting(what, getattr(torch.distributed, name)))
found = []
for recipe, changes in json.loads(sys.argv[2]):
    config = resolve(recipe, changes | {"batch_size": 8, "parallel": "fsdp"})
    progress = Progress(0, 1000, 100, 8)
    trainer = assemble(config, progress, cpu)
    images = canvases(8 // distributed.world_size(), cpu)
    moved.clear()
    trainer.step(progress, lambda: images)
    found.append(dict(moved))
print(json.dumps(found))
distributed.stop()
"""
GATHERING = [(f"{name}-tiny-tinyimagenet", {"views.local_count": 1}) for name in ("ibot", "dinov2")]
GATHERING += [("capi-tiny-tinyimagenet", {}), ("mae-tiny-tinyimagenet", {})]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_weights_in_parts_gather_what_the_formula_says(run_ranks, ranks):
    """A group is filled up as a whole by some bytes more."""
    printed = run_ranks(GATHERED, ranks, words=[str(ROOT), json.dumps(GATHERING)], timeout=280)
    for (recipe, changes), moved in zip(GATHERING, json.loads(printed[0]), strict=True):
        config = resolve(recipe, changes)
        trainer, step = growth.on_meta(config, 2)
        with growth.without_autocast():
            expected = growth.gathered(trainer, step)(ranks)
        assert expected <= moved["gathered"] < 1.01 * expected, recipe
        learning = [p for p in trainer.method.parameters() if p.requires_grad]
        gradients = sum(growth.whole_bytes(p, ranks) for p in learning)
        assert gradients <= moved["gradients"] < 1.01 * gradients, recipe
