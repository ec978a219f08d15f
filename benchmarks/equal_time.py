"""Train recipes for the same time each, one after the other, so that encoders can be compared.

    python -m benchmarks.equal_time ibot-tiny-tinyimagenet capi-tiny-tinyimagenet \
        --data tinyimagenet:/data/tiny-imagenet --seconds 600 --out runs/equal [key=value ...]

A trial tells how many steps fit; the schedule is stretched over exactly those. On a CPU, time is that of the
training process: what it would take on an idle machine, however busy this one is. On a GPU it is wall time.
Runs go to `out/<recipe>`; finished ones are kept. `foveola evaluate` and `foveola compare` tell them apart.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from foveola.config import parse_overrides
from foveola.training.recipe import RunConfig, resolve
from foveola.training.run import pretrain

TRIAL = 5, 45  # steps of two runs, of which the difference counts


def speed(config: RunConfig) -> float:
    """Images a second."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken = []
    for steps in (TRIAL[0], *TRIAL):  # once to warm up
        began = clock()
        with tempfile.TemporaryDirectory() as folder:
            pretrain(config, out=folder, duration=f"{steps} steps", evaluate_every=None)
        taken.append(clock() - began)
    return (TRIAL[1] - TRIAL[0]) * config.batch_size / (taken[2] - taken[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="+", help="recipes, and key=value for all of them")
    parser.add_argument("--data", required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/equal")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    overrides = parse_overrides([word for word in arguments.words if "=" in word])
    print(f"{arguments.threads} thread(s), torch {torch.__version__}, {arguments.seconds:g} s each")
    for recipe in (word for word in arguments.words if "=" not in word):
        folder = Path(arguments.out) / recipe
        if not (folder / "config.yaml").exists():
            config = resolve(recipe, overrides | {"data": arguments.data})
            rate = speed(config)
            print(f"{recipe}: {rate:.1f} images/s", flush=True)
            steps = max(int(arguments.seconds * rate / config.batch_size), 1)
            config = resolve(recipe, overrides | {"data": arguments.data, "duration": f"{steps} steps"})
        else:
            config = resolve(folder / "config.yaml", {})
        began = time.perf_counter()
        run = pretrain(config, out=str(folder))
        facts = {"recipe": recipe, "steps": run.total_steps, "batch": config.batch_size}
        print(json.dumps(facts | {"seconds": round(time.perf_counter() - began)}), flush=True)


if __name__ == "__main__":
    main()
