"""CPU time of an image from its file to a step: loader, views, and the rest, of any recipe on any data.

    python -m benchmarks.data_path tinyimagenet:/data/tiny-imagenet batches=48

Compare two versions by runs in turn: the share of a machine that others leave changes by the minute.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from foveola.config import parse_overrides
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.training.assemble import assemble
from foveola.training.durations import plan
from foveola.training.recipe import resolve
from foveola.training.supply import with_data
from foveola.views.batch import Streams, make_views

BATCH = 64


def seconds(work: Callable[[], Any], times: int) -> float:
    """Return the CPU seconds of this process for so many calls."""
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began


def main(data: str, recipe: str = "ibot-tiny-tinyimagenet", batches: int = 48, canvas: int = 64) -> None:
    """Print milliseconds of CPU time an image, as JSON."""
    torch.set_num_threads(1)
    keys = {"data": data, "batch_size": BATCH, "device": "cpu", "precision": "fp32", "duration": "1000 steps"}
    config = resolve(recipe, keys | {"loader.workers": 0, "loader.canvas": canvas})
    source = open_source(data)
    config = with_data(config, source)
    progress = plan(config, len(source))
    trainer = assemble(config, progress, torch.device("cpu"))
    read = iter(
        Loader(source, BATCH, config.seed, config.loader, with_objects=config.views.objects is not None)
    )
    held = [next(read) for _ in range(3)][-1]
    steps, step = max(batches // 8, 3), dataclasses.replace(progress, step=1)
    trainer.step(step, lambda: held)
    found = {"loader": seconds(lambda: next(read), batches) / batches}
    views = config.views, config.model.patch_size
    found["views"] = seconds(lambda: make_views(held, *views, Streams(config.seed, 1)), steps) / steps
    whole = seconds(lambda: trainer.step(step, lambda: held), steps) / steps
    found["rest of a step"] = whole - found["views"]
    print(json.dumps({name: round(1000 * value / BATCH, 4) for name, value in found.items()}))
    read.close()


if __name__ == "__main__":
    main(sys.argv[1], **parse_overrides(sys.argv[2:]))
