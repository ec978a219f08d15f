"""What the position field costs: its training step against DINOv2's, piece by piece, in one process.

    python -m benchmarks.posfield [--batch 8] [--steps 8] [--device cpu] [--recipe posfield-vits16-in1k]

Both have the settings of one recipe: heads of their own for class tokens and patches, masks in half of the
views. DINOv2 masks half of the images and leaves half whole; the method masks the contents of one half and
the positions of the other. Rounds alternate because machines are shared; the ratio is the median of the
rounds' ratios, seconds are those of the fastest round. Exits with 1 if the ratio is above the limit. What is
added is a head on as many patches again, whatever the network: with 65,536 prototypes much for ViT-S, little
for `posfield-vitb16-in1k`. Optimiser steps are left out.

Between both stand the pieces: a field at the views' own boxes, moved views, and masked positions on a table.
"""

import argparse
import statistics

import torch

from benchmarks.step import Bench, flops

DINOV2 = {  # the recipe without its pieces; half of the images stay whole
    "model.positions": "learned",
    "views.placement": None,
    "views.position_masking": None,
    "views.masking.probability": 0.5,
    "method.position": None,
}
PIECES = {
    "dinov2": DINOV2,
    "field": DINOV2 | {"model.positions": "field"},
    "field, moved": {
        name: value for name, value in DINOV2.items() if not name.startswith(("model", "views.pl"))
    },
    "masked positions": {"model.positions": "learned", "views.placement": None},
    "posfield": {},
}
COLUMNS = ("step", "s/image", "of dinov2", "GFLOP/image", "of dinov2", "views")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recipe", default="posfield-vits16-in1k")
    parser.add_argument("--pieces", nargs="+", choices=tuple(PIECES), default=list(PIECES))
    parser.add_argument("--limit", type=float, default=1.10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    pieces = ["dinov2", *(name for name in arguments.pieces if name != "dinov2")]
    benches = {name: Bench(arguments.recipe, arguments, device, changes=PIECES[name]) for name in pieces}
    for round_ in range(arguments.steps + 1):
        for bench in benches.values():
            bench.once(keep=round_ > 0)

    print(f"{arguments.recipe}: {device}, {arguments.threads} thread(s), {arguments.precision}", end=", ")
    print(f"batch {arguments.batch}, torch {torch.__version__}\n")
    print("{:<18}{:>11}{:>11}{:>15}{:>11}{:>9}".format(*COLUMNS))
    plain, operations = rounds(benches["dinov2"]), 0.0
    ratio = 0.0
    for name, bench in benches.items():
        ratio = statistics.median(t / p for t, p in zip(rounds(bench), plain, strict=True))
        batch = bench.views()
        work = flops(lambda b=bench, v=batch: b.train(v)) / arguments.batch
        operations = operations or work
        seconds, views = min(rounds(bench)) / arguments.batch, min(bench.times["views"]) / arguments.batch
        print(
            f"{name:<18}{seconds:>11.3f}{ratio:>11.3f}{work / 1e9:>15.1f}{work / operations:>11.3f}"
            f"{views:>9.4f}"
        )
    verdict = "within" if ratio <= arguments.limit else "above"
    print(f"\n{pieces[-1]} / dinov2 = {ratio:.3f}, {verdict} the limit of {arguments.limit:.2f}")
    return int(ratio > arguments.limit)


def rounds(bench: Bench) -> list[float]:
    """Seconds of each kept step, with its views."""
    return [step + views for step, views in zip(bench.times["step"], bench.times["views"], strict=True)]


if __name__ == "__main__":
    raise SystemExit(main())
