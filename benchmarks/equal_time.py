"""Train recipes for the same wall time each, one after the other, so that encoders can be compared.

    python -m benchmarks.equal_time ibot-tiny-tinyimagenet capi-tiny-tinyimagenet \
        --data tinyimagenet:/data/tiny-imagenet --seconds 600 --out runs/equal [key=value ...]

A trial of some steps tells how many steps fit; the schedule is stretched over exactly those. Runs go to
`out/<recipe>`; finished ones are kept. Evaluate them with `foveola evaluate` and `foveola compare`.
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

TRIAL = 60  # steps; the speed of the last third counts


def speed(config: RunConfig) -> float:
    """Pictures a second of the last steps of a short run."""
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain(
            config, out=folder, duration=f"{TRIAL} steps", log_every=TRIAL // 3, evaluate_every=None
        )
    return run.metrics["images_per_second"]


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
            steps = max(int(arguments.seconds * speed(config) / config.batch_size), 1)
            config = resolve(recipe, overrides | {"data": arguments.data, "duration": f"{steps} steps"})
        else:
            config = resolve(folder / "config.yaml", {})
        began = time.perf_counter()
        run = pretrain(config, out=str(folder))
        facts = {"recipe": recipe, "steps": run.total_steps, "batch": config.batch_size}
        print(json.dumps(facts | {"seconds": round(time.perf_counter() - began)}), flush=True)


if __name__ == "__main__":
    main()
