"""What do the `-small` recipes learn from few images? k-NN against the untrained network and against pixels.

    python -m benchmarks.small_data --data tinyimagenet:/data/tiny-imagenet --out runs/small \
        [--recipes ibot-small,mae-small] [--images 2400,8000,24000] [--limit 2400] [key=value ...]

Each recipe trains on each number of images, with the settings that docs/small-data.md names for a CPU and the
same number of steps; key=value changes all of them. k-NN (k=20) of the classes learns from `--limit` of the
images of training, and asks for as many of the test half; `pixels:` are whole images of 32 x 32 pixels. Runs
go to `out/RECIPE-IMAGES`; what is finished is left alone, so the same command goes on.

The table has top-1 in percent with 95 % intervals, and the differences to the untrained network and to
pixels, paired over the same test images.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from foveola.config import UserError, parse_overrides
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.paired import difference
from foveola.evaluation.result import Result
from foveola.files import results_in
from foveola.training.recipe import nested, resolve
from foveola.training.run import pretrain
from foveola.trees import flat

RECIPES = ("ibot-small", "odis-small", "dinov2-small", "posfield-small", "capi-small", "mae-small")
NARROW = {"model.width": 96, "model.depth": 4, "model.heads": 3, "batch_size": 64}
TOKEN = {"method.heads.main.prototypes": 128}  # as many as a batch has rows to share them
PATCH = TOKEN | {"method.heads.patches.prototypes": 128}
PROTOTYPES = {
    "ibot-small": TOKEN,
    "odis-small": TOKEN,
    "dinov2-small": PATCH,
    "posfield-small": PATCH | {"method.heads.positions.prototypes": 128},
    "capi-small": {"method.clustering.prototypes": 64},
}
RUN = {"duration": "500 steps", "checkpoint_every": "25 %", "log_every": 20, "loader.workers": 0}
METRIC = "top1_plain"
COLUMNS = ("recipe", "images", "steps", "pixels", "untrained", "trained", "less untrained", "less pixels")


def limited(data: str, images: int) -> str:
    """A data string of so many of the images, evenly of all classes."""
    return f"{data}{'&' if '?' in data else '?'}limit={images}"


def measure(model: str, folder: Path, arguments: argparse.Namespace, train: str) -> Result:
    """The k-NN result of an encoder, which is kept in the folder `results` below `folder`."""
    stored = results_in(folder) / "knn.json"
    if stored.is_file():
        return Result.read(stored)
    data = {"train": train, "test": arguments.data, "out": folder}
    return evaluate(model, "knn", **data, limit=arguments.limit, k=[20], workers=0, progress=False)


def line_of(recipe: str, images: int, arguments: argparse.Namespace, changes: dict[str, Any]) -> list[str]:
    """The line of a recipe that was trained on so many images; empty where a signal stopped it."""
    train, folder = limited(arguments.data, images), Path(arguments.out) / f"{recipe}-{images}"
    settings = NARROW | PROTOTYPES.get(recipe, {}) | RUN | {"data": train} | changes
    run = pretrain(resolve(recipe, nested(settings)), out=str(folder))
    if not run.finished:
        return []
    measured = {
        "pixels": measure("pixels:", Path(arguments.out) / f"pixels-{images}", arguments, train),
        "untrained": measure(f"untrained:{folder}", folder / "untrained", arguments, train),
        "trained": measure(str(folder), folder, arguments, train),
    }
    ends = {name: result.interval(METRIC) or (float("nan"),) * 2 for name, result in measured.items()}
    told = [
        f"{result.metrics[METRIC]:.2f} [{ends[name][0]:.2f}, {ends[name][1]:.2f}]"
        for name, result in measured.items()
    ]
    for other in ("untrained", "pixels"):
        change = difference(measured[other], measured["trained"], METRIC)
        told.append(change.text() if change else "")
    return [recipe, f"{images:,}", str(run.total_steps), *told]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="key=value of the recipe, for all of them")
    parser.add_argument("--data", required=True, help="data string with classes, and objects for odis-small")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--images", default="2400,8000,24000")
    parser.add_argument("--limit", type=int, default=2400, help="images of each half that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    changes = flat(parse_overrides(arguments.words))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    try:
        for images in map(int, arguments.images.split(",")):
            for recipe in arguments.recipes.split(","):
                if not (line := line_of(recipe, images, arguments, changes)):
                    return print("stopped; the same command goes on")
                print(f"| {' | '.join(line)} |", flush=True)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
