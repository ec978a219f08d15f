"""How much do wrong objects cost? The small ODIS recipe on objects that are more and more wrong, over seeds.

    python -m benchmarks.objects_noise --data tinyimagenet:/data/tiny-imagenet --out runs/noise \
        [--discovered masks/objects.json] [--arms none,true,random] [--seeds 3] [--limit 5000] [key=value ...]

Every arm trains the same number of steps from the same first weights, on the same images in the same order;
key=value changes the recipe of all of them. `none` is iBOT: the same without objects. `discovered` reads the
objects of a file that `foveola masks` wrote. Each is measured by k-NN (k=20) without and with the *true*
objects, learned from the training half. Runs go to `out/ARM-SEED`; what is finished is left alone, what was
interrupted goes on, so the same command may be given again, with further arms or seeds.

The table has the mean over seeds, and the difference to `none`, paired by seed, with 95 % intervals of
Student's t over seeds (none for a single seed). Each run's own interval over test images is in its results.
"""

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from scipy import stats

from foveola.config import UserError, parse_overrides
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.result import Result
from foveola.files import RunFolder, results_in
from foveola.training.recipe import nested, resolve
from foveola.training.run import pretrain
from foveola.trees import flat

NOISE = "loader.objects_noise"
ARMS: dict[str, dict[str, Any]] = {
    "none": {"views.objects": None},
    "true": {},
    "jitter-10": {NOISE: {"jitter": 0.1}},
    "jitter-25": {NOISE: {"jitter": 0.25}},
    "jitter-50": {NOISE: {"jitter": 0.5}},
    "random": {NOISE: {"random": 1.0}},
    "missing-50": {NOISE: {"missing": 0.5}},
    "swapped": {NOISE: {"swapped": 1.0}},
    "spurious-1": {NOISE: {"spurious": 1.0}},
    "discovered": {},
}
USUAL = ("none", "true", "jitter-10", "jitter-25", "jitter-50", "random")
SMALL = {  # minutes of a core; leaves the plateau on Tiny ImageNet
    "model.width": 96,
    "model.depth": 4,
    "model.heads": 3,
    "method.heads.main.prototypes": 128,
    "batch_size": 64,
    "duration": "400 steps",
    "checkpoint_every": "25 %",
    "log_every": 20,
    "loader.workers": 0,
}
MEASURED = {"k-NN plain": "top1_plain_k20", "k-NN with masks": "top1_masks_k20"}


def annotated(data: str, file: str) -> str:
    """A data string that reads its objects from a file."""
    return f"{data}{'&' if '?' in data else '?'}annotations={quote(file)}"


def settings_of(arm: str, arguments: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    """Keys of the recipe that an arm is trained with."""
    data = annotated(arguments.data, arguments.discovered) if arm == "discovered" else arguments.data
    noise = flat(nested(ARMS[arm]))
    return SMALL | {"data": data} | changes | noise


def measure(arm: str, seed: int, arguments: argparse.Namespace, changes: dict[str, Any]) -> Result | None:
    """The k-NN result of an arm, trained as far as it is not; None where a signal stopped it."""
    folder = RunFolder(Path(arguments.out) / f"{arm}-{seed}")
    stored = results_in(folder.path) / "knn.json"
    if stored.is_file():
        return Result.read(stored)
    config = resolve(arguments.recipe, nested(settings_of(arm, arguments, changes) | {"seed": seed}))
    if not pretrain(config, out=str(folder.path)).finished:
        return None
    places = {"train": arguments.data, "test": arguments.test or arguments.data}
    return evaluate(
        folder.path, "knn", **places, device=config.device, limit=arguments.limit, k=[20], workers=0
    )


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval of Student's t."""
    mean, count = values.mean(), len(values)
    if count < 2:
        return f"{mean:.2f}"
    half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def table(found: dict[str, dict[int, Result]]) -> str:
    """A line for each arm."""
    titles = ["objects", "seeds", *(text for name in MEASURED for text in (name, "less none"))]
    lines = [titles]
    for arm, results in found.items():
        line = [arm, str(len(results))]
        for metric in MEASURED.values():
            values = {seed: result.metrics[metric] for seed, result in results.items()}
            both = sorted(values.keys() & found.get("none", {}).keys())
            pairs = [values[seed] - found["none"][seed].metrics[metric] for seed in both]
            line.append(interval(np.array([*values.values()])))
            line.append(interval(np.array(pairs)) if pairs and arm != "none" else "")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(titles), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="key=value of the recipe, for all arms")
    parser.add_argument("--data", required=True, help="data string with true objects")
    parser.add_argument("--test", help="data string of the queries; by default the test half of --data")
    parser.add_argument("--discovered", help="file of objects that were found, for the arm `discovered`")
    parser.add_argument("--recipe", default="odis-small")
    parser.add_argument("--arms", help=f"of {', '.join(ARMS)}; by default {', '.join(USUAL)}, and discovered")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="images of each half that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    usual = ",".join((*USUAL, *(("discovered",) if arguments.discovered else ())))
    arms = (arguments.arms or usual).split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"unknown arm {unknown[0]}; known: {', '.join(ARMS)}")
    if "discovered" in arms and not arguments.discovered:
        parser.error("the arm discovered needs --discovered FILE")
    changes = flat(parse_overrides(arguments.words))
    found: dict[str, dict[int, Result]] = {arm: {} for arm in arms}
    try:
        for seed in range(arguments.seeds):
            for arm in arms:
                if (result := measure(arm, seed, arguments, changes)) is None:
                    return print("stopped; the same command goes on")
                found[arm][seed] = result
            print(table(found), flush=True)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
