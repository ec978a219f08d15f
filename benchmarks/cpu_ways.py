"""Ways to take the same training step, or the same pass of an encoder, on a CPU, in turns: which is faster?

    python -m benchmarks.cpu_ways ibot-small [--ways plain,bf16,compiled] [--batch 64] [--steps 5]
        [--threads 1] [--features] [key=value ...]

Each way is a process of its own, since memory and compilation are settings of a process; all take one step
each in turns. Times are core-seconds, with more threads seconds of the clock, medians over the turns; ratios
are medians, least and most of those to the first way in the same turn. Steps are whole ones, with views and
optimizer; `--features` has instead the pass of the encoder over a batch of images of its size. `compiled`
takes minutes to begin with.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_steps import Step, config_of, trainer_of
from benchmarks.lightly_step import CPU, steps_of
from benchmarks.step import canvases, seconds
from foveola.config import parse_overrides
from foveola.trees import flat

# What each way changes: variables of its process, and keys of the recipe.
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "plain": ({}, {}),
    "huge-pages": ({"THP_MEM_ALLOC_ENABLE": "1"}, {}),
    "kept-memory": ({"MALLOC_TRIM_THRESHOLD_": "10000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}, {}),
    "channels-last": ({}, {}),
    "bf16": ({}, {"precision": "bf16"}),
    "compiled": ({}, {"compile": True}),
    "bf16-compiled": ({}, {"compile": True, "precision": "bf16"}),
}


def work_of(way: str, arguments: argparse.Namespace) -> Callable[[], Any]:
    """Return what is timed."""
    changes = flat(parse_overrides(arguments.words)) | WAYS[way][1]
    step = Step(arguments.recipe, arguments.recipe, arguments.batch, changes=tuple(changes.items()))
    config = config_of(step, arguments.batch, CPU)
    trainer, progress = trainer_of(step, arguments.batch, CPU)
    form = torch.channels_last if way == "channels-last" else torch.contiguous_format
    if not arguments.features:
        images = canvases(arguments.batch, CPU, config.loader.canvas)
        laid = images.images.contiguous(memory_format=form)
        return steps_of(trainer, progress, dataclasses.replace(images, images=laid))
    network, side = trainer.method.backbone.eval(), config.model.image_size
    batch = torch.randn(arguments.batch, 3, side, side).contiguous(memory_format=form)

    @torch.inference_mode()
    def features() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            network(batch)

    return features


def answer(arguments: argparse.Namespace) -> None:
    """As the process of one way: a time for each line of the input."""
    torch.set_num_threads(arguments.threads)
    work = work_of(arguments.way, arguments)
    for _ in sys.stdin:
        began = time.perf_counter()
        used = seconds(work, CPU)
        print(used if arguments.threads == 1 else time.perf_counter() - began, flush=True)


def child(way: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "benchmarks.cpu_ways", *sys.argv[1:], "--way", way]
    variables = os.environ | WAYS[way][0]
    return subprocess.Popen(
        words, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def asked(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    if not (line := process.stdout.readline()):
        raise SystemExit(f"the process of a way ended with {process.wait()}")
    return float(line)


def compare(arguments: argparse.Namespace) -> None:
    """Take steps in all ways in turns, and print the table."""
    children = {way: child(way) for way in arguments.ways.split(",")}
    times: dict[str, list[float]] = {way: [] for way in children}
    try:
        for turn in range(arguments.steps + 2):  # two warm up; a compiled network sees all shapes in them
            for way, process in children.items():
                taken = asked(process)
                if turn > 1:
                    times[way].append(taken)
    finally:
        for process in children.values():
            process.kill()
    first = next(iter(times.values()))
    threads = f"{arguments.threads} thread{'s' * (arguments.threads > 1)}"
    print(f"{arguments.recipe}, batch {arguments.batch}, {threads}, torch {torch.__version__}")
    for way, taken in times.items():
        ratios = sorted(a / b for a, b in zip(taken, first, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{way:<14} {statistics.median(taken):8.3f} s  {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("words", nargs="*", help="key=value of the recipe")
    parser.add_argument("--ways", default=",".join(WAYS), help="the first is what others are compared with")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--features", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if unknown := set(arguments.ways.split(",")) - set(WAYS):
        parser.error(f"--ways: {', '.join(sorted(unknown))} is not one of {', '.join(WAYS)}")
    if arguments.way:
        answer(arguments)
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
