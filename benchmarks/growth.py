"""How the cost of a step grows, and that of a start with the number of images.

    python -m benchmarks.growth steps
    python -m benchmarks.growth ranks
    python -m benchmarks.growth data [--counts 10000,100000] [--folder /tmp/growth]

`steps` needs no machine that could train what it tells of: a step is taken on torch's `meta` device, where
tensors have shapes but no numbers. Operations are those of matrix products and attention, forward and
backward; activations are all tensors that autograd keeps for the backward pass, in float32 (bf16 keeps about
half); weights count student, teacher, gradients and both averages of AdamW. `ranks` has what each of several
ranks sends in a step. What ranks exchange is a formula, which tests compare with what they did exchange.

`data` makes folders of so many empty files, in 100 folders of classes, and measures what a start does with
them.
"""

import argparse
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.memory import in_a_process, peak_mib
from benchmarks.step import canvases, flops
from foveola.methods.capi import CapiConfig
from foveola.methods.distillation import DistillationConfig
from foveola.schedules import Progress
from foveola.training.assemble import blueprint
from foveola.training.freezing import Freezing
from foveola.training.loop import Trainer
from foveola.training.optimizer import Optimizer
from foveola.training.recipe import RunConfig, resolve
from foveola.training.sharding import dimension_to_cut, filled_up

META = torch.device("meta")


@contextmanager
def without_autocast() -> Iterator[None]:
    """torch has none for the meta device."""
    with (
        mock.patch("torch.autocast"),
        mock.patch("torch.is_autocast_enabled", return_value=False),
    ):
        yield


def on_meta(config: RunConfig, batch: int) -> tuple[Trainer, Callable[[], Any]]:
    """Return a trainer without numbers, and what takes a step of it with random images."""
    method = blueprint(config).train()
    progress = Progress(0, 1000, 100, batch)
    optimizer = Optimizer(method, config.optimizer, progress)
    # As on a GPU, where one kernel of torch's moves everything; there is none for this device.
    optimizer.skips_alone, optimizer.inner.step = True, mock.Mock()
    trainer = Trainer(
        method, Freezing(method, config.freeze, progress), optimizer, config.views, "fp32", 1, 0, META
    )
    images = canvases(batch, torch.device("cpu"), objects=config.loader.objects_per_image).to(META)
    return trainer, lambda: trainer.step(dataclasses.replace(progress, step=150), lambda: images)


@dataclasses.dataclass(frozen=True)
class Grown:
    """What a step needs: operations an image, and GiB."""

    flops: float
    activations: float
    weights: float
    exchanged: float  # by the formula, from one rank to the others and back


def grown(recipe: str, batch: int, **changes: Any) -> Grown:
    config = resolve(recipe, changes)
    assert isinstance(config, RunConfig)
    trainer, step = on_meta(config, batch)
    own = {
        tensor.untyped_storage()._cdata
        for tensor in (*trainer.method.parameters(), *trainer.method.buffers())
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with without_autocast(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work = flops(step)
    numbers = sum(p.numel() * (4 if p.requires_grad else 1) for p in trainer.method.parameters())
    return Grown(
        work / batch,
        sum(kept.values()) / 2**30,
        4 * numbers / 2**30,
        sum(exchanged(config, trainer).values()) / 2**30,
    )


def exchanged(config: RunConfig, trainer: Trainer) -> dict[str, int]:
    """Return bytes that each rank puts into sums over all ranks in a step, by what they are for.

    A ring sends 2 (W - 1) / W times as many from each of W ranks, and receives as many. Gradients: a float32
    of each trained number. Sinkhorn-Knopp: for each problem the largest logit of each of K prototypes, and
    the sum of each at each iteration; centring: the sum of the logits of each, and one count.
    """
    found = {"gradients": 4 * sum(p.numel() for p in trainer.method.parameters() if p.requires_grad)}
    method = config.method
    if isinstance(method, DistillationConfig):
        for name, term in method.terms().items():
            if (target := getattr(term, "target", None)) is not None:
                count = method.heads[term.head].prototypes
                each = target.iterations + 1 if target.kind == "sinkhorn" else 1
                found[f"targets of {name}"] = 4 * (each * count + (target.kind == "centering"))
    if isinstance(method, CapiConfig) and method.targets == "clusters":
        clusters = method.clustering
        problems = (config.views.global_size // config.model.patch_size) ** 2
        problems = problems if clusters.balance == "position" else 1
        found["clusters"] = 4 * problems * clusters.prototypes * (clusters.iterations + 1)
    return found


def whole_bytes(parameter: Tensor, parts: int) -> int:
    """Return the bytes of a parameter once it is gathered: filled up to a multiple of the parts."""
    sizes = list(parameter.shape)
    dim = dimension_to_cut(sizes, parts)
    sizes[dim] = filled_up(sizes[dim], parts)
    return 4 * math.prod(sizes)


def gathered(trainer: Trainer, step: Callable[[], Any]) -> Callable[[int], int]:
    """Return what tells, for a number of ranks, the bytes of weights that each gathers in a step with fsdp.

    A rank's own part is among them. A unit is gathered for each call of it, and once more for the backward
    pass of each; what is in no unit once in a step. torch fetches ahead in the backward pass what was called
    before, also where that is a unit of the teacher's, which has none. Activations are not computed again.
    """
    method = trainer.method
    units = [block for network in method.trained() for block in network.blocks] + list(method.units())
    inside = {id(p) for unit in units for p in unit.parameters()}
    calls: list[tuple[torch.nn.Module, list[Tensor], bool]] = []  # whether a backward pass follows

    def noting(unit: torch.nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
        nested = {id(p) for other in units if other in list(unit.modules())[1:] for p in other.parameters()}
        own: list[Tensor] = [p for p in unit.parameters() if id(p) not in nested]

        def call(*words: Any, **more: Any) -> Any:
            result = plain(*words, **more)
            learning = torch.is_grad_enabled() and any(p.requires_grad for p in own)
            calls.append((unit, own, learning))
            return result

        return call

    with ExitStack() as stack:
        for unit in units:
            for name in ("forward", *getattr(unit, "entries", ())):
                changed = mock.patch.object(unit, name, noting(unit, getattr(unit, name)))
                stack.enter_context(changed)
        step()
    each = [p for p in method.parameters() if id(p) not in inside]
    each += [p for _, own, learning in calls for p in own * (2 if learning else 1)]
    ahead = {a: own for (a, own, learns), (_, _, next_learns) in pairwise(calls) if next_learns > learns}
    each += [p for own in ahead.values() for p in own]
    return lambda parts: sum(whole_bytes(p, parts) for p in each)


STEPS: dict[str, list[tuple[str, str, int, dict[str, Any]]]] = {
    "model (DINOv2)": [(name, f"dinov2-{name}16-in1k", 8, {}) for name in ("vits", "vitb", "vitl")]
    + [("vitg", "dinov2-vitl16-in1k", 8, {"model.size": "giant"})],
    "batch (iBOT S)": [(f"{n} images", "ibot-vits16-in1k", n, {}) for n in (4, 16, 64)],
    "local views (iBOT S)": [
        (f"2 + {n}", "ibot-vits16-in1k", 8, {"views.local_count": n}) for n in (0, 4, 10, 20)
    ],
    "prototypes (iBOT S)": [
        (f"{n:,}", "ibot-vits16-in1k", 8, {"method.heads.main.prototypes": n}) for n in (8192, 65536, 131072)
    ],
    "objects an image (ODIS S)": [
        (f"{n}", "odis-vits16-in1k", 8, {"loader.objects_per_image": n}) for n in (1, 2, 4, 8)
    ],
    "method": [
        ("odis S", "odis-vits16-in1k", 8, {}),
        ("posfield S", "posfield-vits16-in1k", 8, {}),
        ("capi L/14", "capi-vitl14-in1k", 8, {}),
        ("mae B", "mae-vitb16-in1k", 8, {}),
    ],
}


def steps() -> None:
    print("| | | GFLOP an image | activations, MiB an image | weights, GiB | exchanged, MiB a rank |")
    print("| --- | --- | --- | --- | --- | --- |")
    for what, cases in STEPS.items():
        for name, recipe, batch, changes in cases:
            try:
                cost = grown(recipe, batch, **changes)
            except Exception as error:
                print(f"| {what} | {name} | {type(error).__name__}: {str(error)[:90]} |", flush=True)
                continue
            shown = f"{cost.flops / 1e9:,.0f} | {cost.activations * 1024 / batch:,.0f} | {cost.weights:.2f}"
            print(f"| {what} | {name} | {shown} | {cost.exchanged * 1024:,.0f} |", flush=True)


RANKS = (2, 8, 64, 512)
SENDING = {
    "DINOv2 ViT-S": ("dinov2-vits16-in1k", {}),
    "DINOv2 ViT-L": ("dinov2-vitl16-in1k", {}),
    "DINOv2 ViT-g": ("dinov2-vitl16-in1k", {"model.size": "giant"}),
    "CAPI ViT-L": ("capi-vitl14-in1k", {}),
    "MAE ViT-B": ("mae-vitb16-in1k", {}),
}


def sent(recipe: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    """Return bytes that each of `RANKS` ranks sends around a ring in a step, by `parallel`, and additions.

    A sum over ranks sends each number twice but for its last stop: first parts are added up on their way,
    then they are handed on. Gathering weights, and adding up gradients in parts, send each number once.
    """
    config = resolve(recipe, changes)
    assert isinstance(config, RunConfig)
    trainer, step = on_meta(config, 2)
    summed = sum(exchanged(config, trainer).values())
    learning = [p for p in trainer.method.parameters() if p.requires_grad]
    rest = summed - 4 * sum(p.numel() for p in learning)
    with without_autocast():
        weights = gathered(trainer, step)
    found = []
    for parts in RANKS:
        share, gradients = (parts - 1) / parts, sum(whole_bytes(p, parts) for p in learning)
        cut = weights(parts) + gradients + 2 * rest
        found.append({"ddp": share * 2 * summed, "fsdp": share * cut, "additions": share * summed / 4})
    return found


def ranks() -> None:
    print("| sent by each rank in a step, MiB | | " + " | ".join(f"{n} ranks" for n in RANKS) + " |")
    print("| --- | --- |" + " --- |" * len(RANKS))
    for name, (recipe, changes) in SENDING.items():
        costs = sent(recipe, changes)
        for parallel in ("ddp", "fsdp"):
            cells = " | ".join(f"{cost[parallel] / 2**20:,.0f}" for cost in costs)
            print(f"| {name} | `{parallel}` | {cells} |", flush=True)
        additions = " | ".join(f"{cost['additions'] / 1e6:,.0f}" for cost in costs)
        print(f"| {name} | million additions | {additions} |", flush=True)


# -- data --------------------------------------------------------------------------------------------------


def make_folder(root: Path, count: int) -> None:
    """Make so many empty files in 100 folders."""
    for folder in range(100):
        (root / f"n{folder:08}").mkdir(parents=True)
    for number in range(count):
        (root / f"n{number % 100:08}" / f"n{number % 100:08}_{number:08}.JPEG").touch()


def start_on(root: Path, count: int) -> dict[str, float]:
    """Seconds of what a start does with the images below a folder, and MiB that the process then holds."""
    import numpy as np

    from foveola.data.order import epoch_order
    from foveola.data.sources import open_source
    from foveola.training.same_data import images_of_run

    before, found = peak_mib(), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        found[name] = time.perf_counter() - began
        return result

    source = timed("list and open", lambda: open_source(f"folder:{root}"))
    assert len(source) == count
    found["MiB, opened"] = peak_mib() - before
    images = timed("identity", lambda: images_of_run(source))
    assert images.inventory is not None
    with TemporaryDirectory() as folder:
        timed("write inventory", lambda: images.inventory.save(Path(folder) / "inventory.npz"))
    timed("order of an epoch", lambda: epoch_order(0, 0, count))
    read = np.random.default_rng(0).integers(count, size=1000).tolist()
    timed("1,000 samples, without reading files", lambda: [source[index].name for index in read])
    found["MiB, at most"] = peak_mib() - before
    return found


def data(counts: list[int], folder: Path) -> None:
    rows: dict[str, list[str]] = {}
    for count in counts:
        root = folder / f"files-{count}"
        make_folder(root, count)
        try:
            for name, value in in_a_process(start_on, root, count).items():
                rows.setdefault(name, []).append(f"{value:,.2f}")
        finally:
            shutil.rmtree(root)
    print(f"| images | {' | '.join(f'{count:,}' for count in counts)} |")
    print("| --- |" + " --- |" * len(counts))
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("steps", "ranks", "data"))
    parser.add_argument("--counts", default="10000,100000", help="numbers of files")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/growth"), help="where they are made")
    options = parser.parse_args()
    if options.what == "steps":
        steps()
    elif options.what == "ranks":
        ranks()
    else:
        data([int(count) for count in options.counts.split(",")], options.folder)


if __name__ == "__main__":
    main()
