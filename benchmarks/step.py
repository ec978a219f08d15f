"""One training step at ViT-S/16: iBOT, ODIS, DINOv2; the share of views, the distance to the matmul peak.

    python -m benchmarks.step [--batch 4] [--steps 3] [--device cpu] [--precision fp32] [--compile]

Everything is measured in one process, alternating, because machines are shared; ratios are what counts.
`heads on all tokens` runs the same iBOT step with the heads on every patch, as the official code does;
`dinov2, all branches` is DINOv2's step without stochastic depth, which skips 30 % of the images.
Its recipe has 8 local views where iBOT's has 10, and 65,536 prototypes where that has 8,192.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from foveola.data.sample import Canvases
from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.schedules import Progress
from foveola.training.recipe import resolve
from foveola.views.batch import Batch, Streams, make_views


def canvases(batch: int, device: torch.device, side: int = 512, objects: int = 1) -> Canvases:
    """Random images of 500x375, or as much smaller as the canvas is, with objects of a third of each."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(batch, objects, 128, 128, dtype=torch.uint8)
    masks[:, :, 30:100, 30:110] = 255
    return Canvases(
        images=torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator),
        extents=torch.tensor([[375 * side // 512, 500 * side // 512]] * batch),
        aspects=torch.full((batch,), 4 / 3),
        object_masks=masks,
        whole=torch.zeros(batch, objects, dtype=torch.bool),
        object_labels=torch.full((batch, objects), -1),
        labels=torch.full((batch,), -1),
        indices=torch.arange(batch),
    ).to(device)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several square products, in FLOP/s."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return max(2 * side**3 / seconds(lambda: a @ b, device) for _ in range(8))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a GPU those of the clock; on a CPU core-seconds, in which other programs' turns do not count."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def flops(work: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


class Bench:
    """One method, ready to step."""

    def __init__(
        self,
        recipe: str,
        arguments: argparse.Namespace,
        device: torch.device,
        all_tokens: bool = False,
        changes: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.device, self.all_tokens = resolve(recipe, changes), device, all_tokens
        terms = self.config.method
        assert isinstance(terms, DistillationConfig)
        torch.manual_seed(0)
        self.method = Distillation(terms, self.config.model, self.config.views).to(device).train()
        if arguments.compile:
            for network in self.method.trained():
                network.compile()
        self.progress = Progress(0, 1000, 100, arguments.batch)
        self.images = canvases(arguments.batch, device)
        half = arguments.precision == "bf16"
        self.cast = lambda: torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
        self.times: dict[str, list[float]] = {"views": [], "step": []}
        self.number = 0

    def views(self) -> Batch:
        return make_views(
            self.images, self.config.views, self.config.model.patch_size, Streams(0, self.number)
        )

    def train(self, batch: Batch) -> None:
        if self.all_tokens:
            hidden = batch.large.hidden_contents
            assert hidden is not None
            every = replace(hidden, indices=torch.arange(hidden.mask.numel(), device=self.device))
            batch = replace(batch, large=replace(batch.large, hidden_contents=every))
        with self.cast():
            output = self.method(batch, self.progress)
            loss = torch.stack(list(output.losses.values())).sum()
        loss.backward()
        self.method.zero_grad(set_to_none=True)
        self.method.after_step(self.progress, 1e-3)

    def once(self, keep: bool) -> None:
        self.number += 1
        held: list[Batch] = []
        views = seconds(lambda: held.append(self.views()), self.device)
        step = seconds(lambda: self.train(held[0]), self.device)
        if keep:
            self.times["views"].append(views)
            self.times["step"].append(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    benches = {
        "ibot": Bench("ibot-vits16-in1k", arguments, device),
        "odis": Bench("odis-vits16-in1k", arguments, device),
        "ibot, heads on all tokens": Bench("ibot-vits16-in1k", arguments, device, all_tokens=True),
        "dinov2": Bench("dinov2-vits16-in1k", arguments, device),
        "dinov2, all branches": Bench(
            "dinov2-vits16-in1k", arguments, device, changes={"model.drop_path": 0.0}
        ),
        "odis-dinov2": Bench("odis-dinov2-vits16-in1k", arguments, device),
    }
    peaks: list[float] = []
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    for round_ in range(arguments.steps + 1):
        for bench in benches.values():
            bench.once(keep=round_ > 0)
        peaks.append(matmul_peak(device, dtype))
    peak = statistics.median(peaks)

    where = f"{device}, {arguments.threads} thread(s), {arguments.precision}"
    print(f"{where}, batch {arguments.batch}, torch {torch.__version__}")
    print(f"matmul peak {peak / 1e9:.1f} GFLOP/s\n")
    head = ("method", "s/image", "of iBOT", "GFLOP/image", "of peak", "views", "views/step")
    print("{:<26}{:>10}{:>9}{:>15}{:>9}{:>9}{:>12}".format(*head))
    reference = 0.0
    for name, bench in benches.items():
        step, views = (min(bench.times[part]) / arguments.batch for part in ("step", "views"))
        reference = reference or step + views
        batch = bench.views()
        work = flops(lambda b=bench, v=batch: b.train(v)) / arguments.batch
        print(
            f"{name:<26}{step + views:>10.3f}{(step + views) / reference:>9.2f}{work / 1e9:>15.1f}"
            f"{work / step / peak:>9.0%}{views:>9.3f}{views / step:>12.1%}"
        )
    if device.type == "cuda":
        print(f"\npeak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB for all")
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\npeak memory of this process {memory:.2f} GiB")


if __name__ == "__main__":
    main()
