"""What a training step costs on a device: time, memory, operations, kernels, and waits for the device."""

import dataclasses
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import canvases, flops
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.loop import Trainer
from foveola.training.recipe import RunConfig, resolve

WAITING = "called a synchronizing CUDA operation"  # what torch says where the CPU waits for the GPU


@dataclass(frozen=True)
class Step:
    """A recipe to measure, how it is compiled, and the first batch size that is tried."""

    name: str
    recipe: str
    batch: int
    compiled: str = ""  # "", "default" or "graphs"
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return self.name + {"": "", "default": ", compiled", "graphs": ", CUDA graphs"}[self.compiled]


@dataclass
class Cost:
    """What a step costs; None: not measured here."""

    batch: int
    seconds: float
    memory: float | None = None  # GiB at most
    flops: float | None = None  # of matrix products and attention, forward and backward
    kernels: int | None = None
    waits: int | None = None
    places: tuple[str, ...] = ()  # where it waits

    @property
    def speed(self) -> float:
        """Images a second."""
        return self.batch / self.seconds


def precision_of(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"


def config_of(step: Step, batch: int, device: torch.device) -> RunConfig:
    changes = {"batch_size": batch, "precision": precision_of(device), **dict(step.changes)}
    config = resolve(step.recipe, changes)
    assert isinstance(config, RunConfig)
    return config


def trainer_of(step: Step, batch: int, device: torch.device) -> tuple[Trainer, Progress]:
    """Return networks and optimizer, compiled as `step` says, in the middle of a run."""
    progress = Progress(0, 100_000, 1000, batch)
    trainer = assemble(config_of(step, batch, device), progress, device)
    if step.compiled:
        # On a CPU the compiler would take minutes; what is tested there is that it sees whole graphs.
        mode = "reduce-overhead" if step.compiled == "graphs" else "default"
        how: dict[str, Any] = {"mode": mode} if device.type == "cuda" else {"backend": "eager"}
        for network in trainer.method.trained():
            network.compile(**how)
    return trainer, dataclasses.replace(progress, step=50_000)


def measure(step: Step, device: torch.device, seconds: float, known: float | None = None) -> Cost:
    """Return what a step costs at the first batch size, halved until it fits into memory.

    Args:
        seconds: how long steps are timed for, after those that warm up.
        known: operations an image, where they have been counted; None counts those of a step.
    """
    batch = step.batch
    while True:
        try:
            return _measure(step, batch, device, seconds, known)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        finally:
            forget(device)


def forget(device: torch.device) -> None:
    """Give all memory back."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _measure(step: Step, batch: int, device: torch.device, seconds: float, known: float | None) -> Cost:
    trainer, progress = trainer_of(step, batch, device)
    images = canvases(batch, torch.device("cpu")).to(device)
    number = progress.step

    def once() -> None:
        nonlocal number
        number += 1
        trainer.step(dataclasses.replace(progress, step=number), lambda: images)

    for _ in range(3):  # graphs are recorded at the second and third
        once()
    work = known
    if work is None and not step.compiled:
        work = flops(once) / batch
    kernels = _kernels(once, device)
    waits = _waits(once, device)
    time_of_step = timed(once, device, seconds)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    total = None if work is None else work * batch
    return Cost(batch, time_of_step, memory, total, kernels, len(waits), tuple(sorted(set(waits))))


def timed(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one `work` among as many as take `seconds`, and two at least; by the clock."""
    wait(device)
    began, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - began < seconds:
        for _ in range(1 if done < 2 else min(done, 10)):  # asked rarely, as to ask is to wait
            work()
            done += 1
        wait(device)
    return (time.perf_counter() - began) / done


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernels(work: Callable[[], object], device: torch.device) -> int:
    """Kernels that a GPU is given; on a CPU operations of torch."""
    if device.type != "cuda":
        with _Operations() as counted:
            work()
        return counted.number
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        wait(device)
    found = [event for event in seen.events() or () if event.device_type == torch.profiler.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in found)


class _Operations(TorchDispatchMode):
    """Counts operations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _waits(work: Callable[[], object], device: torch.device) -> list[str]:
    """Where the CPU waited for the GPU; on a CPU, which has nothing to wait for, nothing."""
    if device.type != "cuda":
        work()
        return []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in said if WAITING in str(each.message)]
