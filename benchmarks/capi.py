"""What a step of CAPI costs: kept tokens against all, and the clustering's share of a step.

    python -m benchmarks.capi [--batch 8] [--steps 3] [--device cpu] [--large 1]

The first table takes encoder and predictor of the published recipes, forward and backward, against the same
encoder on all patches. The second takes a whole step of ViT-S with 16,384 prototypes apart; the sum of its
parts may differ a little from the whole. The third is the memory that clustering needs beyond its inputs and
outputs, measured as the growth of a process, in pieces and all at once.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.memory import in_a_process, peak_mib
from benchmarks.step import canvases, flops, seconds
from foveola.clustering import cluster
from foveola.losses import assignment_loss
from foveola.methods.capi import Capi
from foveola.models.vit import Inputs
from foveola.schedules import Progress
from foveola.training.recipe import resolve
from foveola.views.batch import Streams, make_views


def median_seconds(work: Callable[[], object], device: torch.device, steps: int) -> float:
    work()
    return statistics.median(seconds(work, device) for _ in range(steps))


class Bench:
    """A recipe's networks and a batch for them."""

    def __init__(self, recipe: str, batch: int, device: torch.device, **changes: object) -> None:
        self.config, self.device = resolve(recipe, changes), device
        torch.manual_seed(0)
        self.method = Capi(self.config.method, self.config.model, self.config.views).to(device).train()
        patch = self.config.model.patch_size
        self.batch = make_views(canvases(batch, device), self.config.views, patch, Streams(0, 0))
        selection = self.batch.large.selection
        assert selection is not None
        self.images = self.batch.large.pixels[:, 0]
        self.keep, self.predict = selection.kept[:, 0], selection.predicted[:, 0]

    def full(self) -> None:
        self.method.student.backbone(self.images).patches.square().mean().backward()

    def kept(self) -> None:
        self.method.student.backbone(self.images, Inputs(kept=self.keep)).patches.square().mean().backward()

    def asked(self) -> None:
        student = self.method.student
        student.predictor(
            student.backbone(self.images, Inputs(kept=self.keep)), self.predict, self.keep
        ).square().mean().backward()

    def teacher(self) -> Tensor:
        with torch.no_grad():
            return self.method.teacher.backbone(self.images).patches

    def step(self) -> None:
        output = self.method(self.batch, Progress(0, 1000, 100, len(self.images)))
        torch.stack(list(output.losses.values())).sum().backward()
        self.method.after_step(Progress(0, 1000, 100, len(self.images)), 1e-3)


def encoder_table(recipe: str, batch: int, steps: int, device: torch.device) -> None:
    bench = Bench(recipe, batch, device, **{"model.drop_path": 0.0})
    kept, patches = bench.keep.shape[1], (bench.images.shape[-1] // bench.config.model.patch_size) ** 2
    extra = bench.config.model.registers
    print(
        f"\n{bench.config.about.model}: {kept} of {patches} patches kept, {bench.predict.shape[1]} predicted"
    )
    print(f"{'forward and backward':<30}{'GFLOP/image':>15}{'of full':>9}{'s/image':>11}{'of full':>9}")
    rows = {"encoder, all patches": bench.full, "encoder, kept patches": bench.kept}
    rows |= {"encoder + predictor": bench.asked}
    reference: tuple[float, float] | None = None
    for name, work in rows.items():
        cost, time = flops(work) / batch, median_seconds(work, device, steps) / batch
        reference = reference or (cost, time)
        shares = f"{cost / reference[0]:>9.2f}{time:>11.3f}{time / reference[1]:>9.2f}"
        print(f"{name:<30}{cost / 1e9:>15.1f}{shares}")
    print(f"tokens of the encoder: {(kept + extra) / (patches + extra):.2f} of all")


def step_table(batch: int, steps: int, device: torch.device) -> None:
    bench = Bench("capi-vits14", batch, device, **{"model.patch_size": 16})
    clustering = bench.method.clustering
    assert clustering is not None
    teacher = bench.teacher()
    predictions = torch.randn(bench.predict.numel(), bench.config.model.shape[0], device=device)

    def losses() -> None:
        targets = clustering(teacher, bench.predict)
        logits = bench.method.student.head(predictions)
        (targets.loss + assignment_loss(targets.targets.flatten(0, 1), logits, 0.12)).backward()

    whole = median_seconds(bench.step, device, steps)
    parts = {
        "teacher": median_seconds(bench.teacher, device, steps),
        "encoder + predictor": median_seconds(bench.asked, device, steps),
        "clustering and losses": median_seconds(losses, device, steps),
    }
    print(f"\nViT-S/16, {clustering.config.prototypes} prototypes: {whole / batch:.3f} s/image a step")
    for name, time in parts.items():
        print(f"{name:<30}{time / batch:>9.3f} s/image{time / whole:>8.1%} of the step")
    # Logits, and the gradient of the centroids: matrix products as those of any linear layer.
    unit = normalize(teacher, dim=-1).flatten(0, 1)
    logits = unit @ clustering.weight.T
    products = median_seconds(lambda: (unit @ clustering.weight.T, logits.T @ unit), device, steps)
    rest = parts["clustering and losses"] - products
    print(f"{'  its two matrix products':<30}{products / batch:>9.3f} s/image{products / whole:>8.1%}")
    print(f"{'  Sinkhorn and losses':<30}{rest / batch:>9.3f} s/image{rest / whole:>8.1%}")


def grown(batch: int, pieces: bool) -> float:
    """Peak growth in MiB of this process over one clustering of ViT-S/16 patches."""
    torch.set_num_threads(1)
    patches = normalize(torch.randn(196, batch, 384), dim=-1)
    weight = torch.randn(16384, 384, requires_grad=True)
    wanted = torch.randint(0, 196, (6, batch))
    settings = {"temperature": 0.06, "student_temperature": 0.12}
    cluster(patches[:1, :1], weight, None, torch.zeros(1, 1, dtype=torch.int64), **settings).loss.backward()
    before = peak_mib()
    made = cluster(patches, weight, None, wanted, **settings, chunk=None if pieces else 2**40)
    made.loss.backward()
    return peak_mib() - before


def memory_table(batch: int) -> None:
    size = batch * 196 * 16384 / 2**18
    print(f"\nclustering {batch} x 196 patches, 16384 prototypes: logits are {size:.0f} MiB; memory grows by")
    for name, pieces in (("in pieces", True), ("all at once", False)):
        print(f"{name:<30}{in_a_process(grown, batch, pieces):>9.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--large", type=int, default=1, help="batch of ViT-L/14")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{device}, {arguments.threads} thread(s), torch {torch.__version__}")
    encoder_table("capi-vitl14-in22k", arguments.large, arguments.steps, device)
    step_table(arguments.batch, arguments.steps, device)
    if device.type == "cpu" and Path("/proc/self/status").exists():
        memory_table(arguments.batch)


if __name__ == "__main__":
    main()
