"""What a step of MAE and I-JEPA costs: the encoder on kept patches against all, and whole steps against iBOT.

    python -m benchmarks.mae [--batch 8] [--steps 5] [--size base] [--device cpu] [--precision fp32]

The first table is the encoder alone, forward and backward, by the share of patches that it keeps; the second
a whole step (views, losses, backward, teacher) of each method with the same encoder. All is measured in one
process, alternating, because machines are shared: ratios are what counts. Times are the fastest of the
rounds. Of I-JEPA, whose blocks differ from batch to batch, each round draws anew.
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.step import canvases, flops, seconds
from foveola.methods import METHODS
from foveola.models.vit import Inputs, VisionTransformer
from foveola.schedules import Progress
from foveola.training.recipe import resolve
from foveola.views.batch import Streams, make_views

RATIOS = (1.0, 0.5, 0.25, 0.1)  # kept
RECIPES = {
    "iBOT, 2 x 224 + 10 x 96": ("ibot-vits16-in1k", {}),
    "MAE": ("mae-vits16-in1k", {}),
    "MAE, half of the patches predicted": ("mae-vits16-in1k", {"views.dropping.predict": 0.5}),
    "SimMIM": (
        "mae-vits16-in1k",
        {
            "method.decoder": None,
            "method.loss": "absolute",
            "method.normalise": False,
            "views.dropping.ratio": 0.6,
        },
    ),
    "I-JEPA": ("ijepa-vitb16-in1k", {}),
    "I-JEPA, published blocks": ("ijepa-vitb16-in1k", {"views.blocks.published": True}),
}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def fastest(works: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of each, the least of some rounds in which all take turns; a first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            time = seconds(work, device)
            if number:
                times[name].append(time)
    return {name: min(found) for name, found in times.items()}


def encoder_table(arguments: argparse.Namespace, device: torch.device) -> None:
    config = resolve("mae-vits16-in1k", {"model.size": arguments.size}).model
    torch.manual_seed(0)
    network = VisionTransformer(config).to(device).train()
    images = torch.randn(arguments.batch, 3, config.image_size, config.image_size, device=device)
    patches = config.grid[0] * config.grid[1]

    def work(share: float, backward: bool) -> Callable[[], None]:
        count = round(share * patches)
        keep = torch.rand(arguments.batch, patches, device=device).argsort(dim=1)[:, :count]

        def run() -> None:
            with torch.set_grad_enabled(backward), autocast(device, arguments.precision):
                found = network(images, Inputs(kept=None if share == 1 else keep)).patches.square().mean()
            if backward:
                found.backward()

        return run

    both = {f"{share}": work(share, backward=True) for share in RATIOS}
    ahead = {f"{share} forward": work(share, backward=False) for share in RATIOS}
    times = fastest(both | ahead, device, arguments.steps)
    works = {name: flops(run) for name, run in both.items()}
    print(f"\nencoder alone, ViT-{arguments.size}/16, {patches} patches and a class token")
    print(f"{'patches kept':<14}{'GFLOP/image':>15}{'of full':>9}{'forward':>10}{'of full':>9}", end="")
    print(f"{'and backward':>14}{'of full':>9}")
    for share in RATIOS:
        name = f"{share}"
        forward, whole = times[f"{name} forward"], times[name]
        print(f"{share:<14.0%}{works[name] / arguments.batch / 1e9:>15.1f}", end="")
        print(f"{works[name] / works['1.0']:>9.2f}{forward / arguments.batch:>10.4f}", end="")
        print(f"{forward / times['1.0 forward']:>9.2f}{whole / arguments.batch:>14.4f}", end="")
        print(f"{whole / times['1.0']:>9.2f}")


class Step:
    """One recipe with the encoder's size changed, ready to step."""

    def __init__(
        self, recipe: str, changes: dict, arguments: argparse.Namespace, device: torch.device
    ) -> None:
        self.config = resolve(recipe, {"model.size": arguments.size} | changes)
        torch.manual_seed(0)
        method = METHODS[self.config.method.name](self.config.method, self.config.model, self.config.views)
        self.method = method.to(device).train()
        self.images = canvases(arguments.batch, device)
        self.progress = Progress(0, 1000, 100, arguments.batch)
        self.device, self.precision, self.number = device, arguments.precision, 0

    def __call__(self) -> None:
        self.number += 1
        patch = self.config.model.patch_size
        batch = make_views(self.images, self.config.views, patch, Streams(0, self.number))
        with autocast(self.device, self.precision):
            losses = self.method(batch, self.progress).losses
        torch.stack(list(losses.values())).sum().backward()
        self.method.zero_grad(set_to_none=True)
        self.method.after_step(self.progress, 1e-3)


def step_table(arguments: argparse.Namespace, device: torch.device) -> None:
    steps: dict[str, Callable[[], object]] = {
        name: Step(recipe, changes, arguments, device) for name, (recipe, changes) in RECIPES.items()
    }
    times = fastest(steps, device, arguments.steps)
    works = {name: flops(step) for name, step in steps.items()}
    reference = next(iter(steps))
    print(f"\nwhole steps, ViT-{arguments.size}/16, one 224 view each but for iBOT")
    print(f"{'method':<36}{'GFLOP/image':>15}{'of iBOT':>9}{'s/image':>11}{'of iBOT':>9}")
    for name, time in times.items():
        print(f"{name:<36}{works[name] / arguments.batch / 1e9:>15.1f}", end="")
        print(f"{works[name] / works[reference]:>9.2f}{time / arguments.batch:>11.4f}", end="")
        print(f"{time / times[reference]:>9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", choices=("small", "base", "large"), default="base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    where = f"{device}, {arguments.threads} thread(s), {arguments.precision}"
    print(f"{where}, batch {arguments.batch}, torch {torch.__version__}")
    encoder_table(arguments, device)
    step_table(arguments, device)


if __name__ == "__main__":
    main()
