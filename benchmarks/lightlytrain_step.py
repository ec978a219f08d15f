"""A step of DINOv2 with a ViT-S/14, ours and LightlyTrain's: core-seconds of a thread, or seconds of several.

    python -m venv /tmp/theirs && /tmp/theirs/bin/pip install lightly-train
    python -m benchmarks.lightlytrain_step --python /tmp/theirs/bin/python --photos /data/photos [--rounds 2]
        [--threads 1]

Shapes are those of its defaults: views of 2 x 224 and 8 x 98 pixels, 65,536 prototypes, stochastic depth 0.3,
batches of 4. LightlyTrain stands in an environment of its own, so that its packages are no part of ours. It
trains one epoch of 12 images and one of 36; the difference, by six steps, is a step without its start and
end, but with the reading of its images. Ours makes all views of images that are read.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.lightly_step import CPU, ours
from benchmarks.step import seconds

BATCH, FEW, MANY = 4, 12, 36
SHAPES = {"model.patch_size": 14, "model.image_size": 224, "views.local_size": 98}
THEIRS = """
import resource, sys, time, torch
torch.set_num_threads(int(sys.argv[4]))
import lightly_train
from lightly_train._methods.dinov2 import dinov2
for each in vars(dinov2).values():  # what it says to runs as short as this one ends them
    if isinstance(each, type) and hasattr(each, "warn_if_steps_too_low"):
        each.warn_if_steps_too_low = lambda self: None
began = time.perf_counter()
lightly_train.pretrain(
    out=sys.argv[2] + "/out", data=sys.argv[1], model="dinov2/vits14-notpretrained", method="dinov2",
    batch_size=int(sys.argv[3]), num_workers=0, devices=1, accelerator="cpu", precision="32-true", epochs=1,
    overwrite=True, loggers={"tensorboard": None},
)
used = resource.getrusage(resource.RUSAGE_SELF)
print("core-seconds", used.ru_utime + used.ru_stime, "seconds", time.perf_counter() - began)
"""


def theirs(python: str, photos: list[Path], images: int, threads: int) -> float:
    """Return the core-seconds of an epoch of so many images; of several threads seconds of the clock."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        for number in range(images):
            photo = photos[number % len(photos)]
            (folder / f"{number}{photo.suffix}").symlink_to(photo.resolve())
        alone = {"OMP_NUM_THREADS": str(threads), "LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | alone
        words = [python, "-c", THEIRS, str(folder), name, str(BATCH), str(threads)]
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("core-seconds ")]
    if not lines:
        raise SystemExit(f"LightlyTrain ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(lines[-1].split()[1 if threads == 1 else 3])


def own_step(steps: int) -> float:
    """Return the core-seconds of a step of ours, of several threads seconds; the median of so many."""
    once, _ = ours("dinov2-vits16-in1k", BATCH, dict(SHAPES))
    once()
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        used = seconds(once, CPU)
        taken.append(used if torch.get_num_threads() == 1 else time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="interpreter of the environment with lightly-train")
    parser.add_argument("--photos", required=True, help="folder with some JPEG files")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps of ours in each round")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    photos = sorted(
        path for path in Path(arguments.photos).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not photos:
        raise SystemExit(f"{arguments.photos}: no JPEG files")
    for _ in range(arguments.rounds):
        mine = own_step(arguments.steps)
        many, few = (theirs(arguments.python, photos, n, arguments.threads) for n in (MANY, FEW))
        other = (many - few) * BATCH / (MANY - FEW)
        print(f"ours {mine:.2f}  LightlyTrain {other:.2f}  ratio {mine / other:.2f}", flush=True)


if __name__ == "__main__":
    main()
