"""A step never waits for the device: it asks nothing of it, and copies nothing to it in the waiting way.

Shown on torch's `meta` device, where tensors have shapes but no numbers: what reads one back cannot work. It
is no CPU, so the ways of a GPU are gone.
"""

import dataclasses
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.step import canvases
from foveola.schedules import Progress
from foveola.training.assemble import blueprint
from foveola.training.freezing import Freezing
from foveola.training.loop import Trainer
from foveola.training.optimizer import Optimizer
from foveola.training.recipe import resolve

META = torch.device("meta")
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")
# Where the size of the result is the answer.
COUNTS = ("nonzero", "masked_select", "unique", "argwhere", "bincount")


class Waits(TorchFunctionMode):
    """Notes where Python asks something of a tensor of the device, or copies to it while it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        there = bool(args) and isinstance(args[0], Tensor) and args[0].device == META
        if there and name in READS:
            self.note(name)
            return {"cpu": torch.ones(args[0].shape, dtype=args[0].dtype), "__bool__": True}.get(name, 1)
        to = [str(each) for each in (*args[1:], *kwargs.values()) if isinstance(each, str | torch.device)]
        if (
            (there and name in COUNTS)
            or (there and name == "to" and "cpu" in to)
            or (not there and name == "to" and "meta" in to and not kwargs.get("non_blocking"))
            or (name in ("tensor", "as_tensor") and "meta" in to)
        ):
            self.note(name)
        return func(*args, **kwargs)

    def note(self, name: str) -> None:
        frames = [each for each in traceback.extract_stack() if "/foveola/" in each.filename]
        where = frames[-1] if frames else traceback.extract_stack()[-3]
        self.found.add(f"{name}: {where.filename.rpartition('/foveola/')[2]}:{where.lineno} {where.line}")


@contextmanager
def without_autocast() -> Iterator[None]:
    """There is none for this device."""
    with (
        mock.patch("torch.autocast"),
        mock.patch("torch.is_autocast_enabled", return_value=False),
    ):
        yield


def begin(recipe: str, **changes: Any) -> tuple[Trainer, Progress]:
    config = resolve(recipe, {"model": {"depth": 1}} | changes)
    method = blueprint(config).train()
    progress = Progress(0, 1000, 100, 4)
    optimizer = Optimizer(method, config.optimizer, progress)
    # As on a GPU, where one kernel of torch's moves everything; there is none for this device.
    optimizer.skips_alone, optimizer.inner.step = True, mock.Mock()
    freezing = Freezing(method, config.freeze, progress)
    return Trainer(method, freezing, optimizer, config.views, "fp32", 1, 0, META), progress


@pytest.mark.parametrize(
    "recipe",
    [
        "odis-posfield-tiny-tinyimagenet",
        "dinov2-tiny-tinyimagenet",
        "capi-tiny-tinyimagenet",
        "mae-tiny-tinyimagenet",
        "ijepa-tiny-tinyimagenet",
    ],
)
def test_a_step_asks_nothing_of_the_device(recipe):
    trainer, progress = begin(recipe)
    images = canvases(4, torch.device("cpu")).to(META)
    with without_autocast(), Waits() as waits:
        trainer.step(dataclasses.replace(progress, step=150), lambda: images)
    assert waits.found == set()


def test_what_waits_is_seen():
    with Waits() as waits:
        x = torch.ones(3).to(META)
        assert x.sum().item() == 1
        torch.tensor([1.0], device=META)
        torch.ones(3).to(META, non_blocking=True)
    assert sorted(each.partition(":")[0] for each in waits.found) == ["item", "tensor", "to"]
