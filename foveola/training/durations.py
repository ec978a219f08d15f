"""Durations of a run in steps, once the number of its images is known, and what does not fit them."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from foveola.config import ConfigError
from foveola.schedules import Progress, Schedule, steps_of
from foveola.training.freezing import ALL
from foveola.training.planned import planned
from foveola.training.recipe import RunConfig

SHARE = re.compile(r"[0-9.]*[1-9][0-9.]*\s*%")  # of a run, above 0
PERIODS = ("checkpoint_every", "keep_every", "evaluate_every")  # durations of at least a step, or null


def plan(config: RunConfig, images: int, processes: int = 1) -> Progress:
    """Return the start of a run on this many images.

    Raises ConfigError for what does not fit the data, all of it in one message with what to write instead.
    """
    whole = processes * config.accumulate
    wrong, write = [], []
    if config.batch_size % whole:
        shared = f"{processes} process{'es' * (processes > 1)} x accumulate={config.accumulate}"
        wrong.append(f"batch_size={config.batch_size} cannot be shared by {shared}")
    if images < config.batch_size:
        wrong.append(f"{config.data} has {images} images, fewer than batch_size={config.batch_size}")
        fitting = 2 ** max(images.bit_length() - 2, 0)  # two steps an epoch at least
        if fitting >= whole:
            write.append(f"batch_size={fitting // whole * whole}")
    elif wrong and config.batch_size > whole:
        write.append(f"batch_size={config.batch_size // whole * whole}")
    batch = min(config.batch_size, max(images, 1))
    progress = Progress(0, 0, max(images // batch, 1), batch)
    total = 0
    try:
        total = _steps(config.duration, "duration", progress)
        if not total:
            wrong.append(f"duration: {config.duration!r} is less than a step of {batch} images")
    except ConfigError as error:
        wrong.append(str(error))
    if total:
        wrong += _misfits(config, dataclasses.replace(progress, total_steps=total))
    if wrong:
        raise ConfigError("; ".join(wrong) + (f": write {' '.join(write)}" if write else ""))
    return dataclasses.replace(progress, total_steps=total)


def _misfits(config: RunConfig, progress: Progress) -> list[str]:
    """What is wrong with the durations of a configuration, each with its key."""
    wrong = []
    for name in periods(config):
        try:
            period(config, name, progress)
        except ConfigError as error:
            wrong.append(str(error))
    for name, duration in _parts(config).items():
        try:
            _steps(duration, name, progress)
        except ConfigError as error:
            wrong.append(str(error))
    return wrong


def _parts(config: RunConfig) -> dict[str, str | int]:
    """Durations of what is not done for all of a run, by their keys."""
    parts: dict[str, str | int] = {}
    for path, schedule in schedules(config):
        parts[f"{path}.warmup"] = schedule.warmup
        parts |= {f"{path}.drops[{i}]": drop for i, drop in enumerate(schedule.drops)}
    parts["optimizer.freeze_last_layer"] = config.optimizer.freeze_last_layer
    return parts | {f"freeze.{part}": how for part, how in config.freeze.items() if how.strip() != ALL}


def durations(config: RunConfig, progress: Progress) -> dict[str, int]:
    """Return the steps of every duration of a run besides its length, by their keys."""
    found = {name: _steps(duration, name, progress) for name, duration in _parts(config).items()}
    apart = {name: period(config, name, progress) for name in periods(config)}
    return found | {name: steps for name, steps in apart.items() if steps is not None}


def periods(config: RunConfig) -> dict[str, str | None]:
    """Return the durations of at least a step, or null, by their keys."""
    return {name: getattr(config, name) for name in PERIODS} | {
        each.time: each.every for each in planned(config)
    }


def period(config: RunConfig, name: str, progress: Progress) -> int | None:
    """Return the steps of one of `periods`, at least 1; None where it is null.

    Of a fraction of the run that is less than half a step it is every step: a recipe can be tried for some
    steps. Any other duration below that raises ConfigError.
    """
    duration = periods(config)[name]
    if duration is None:
        return None
    steps = _steps(duration, name, progress)
    if not steps and SHARE.fullmatch(duration.strip()):
        return 1
    if not steps:
        raise ConfigError(f"{name}: {duration!r} is less than a step of {progress.batch_size} images")
    return steps


def schedules(config: Any, where: str = "") -> Iterator[tuple[str, Schedule]]:
    """Yield all schedules of a configuration with their paths, wherever they stand."""
    if isinstance(config, Schedule):
        yield where, config
        return
    inner: dict[str, Any] = config if isinstance(config, dict) else {}
    if dataclasses.is_dataclass(config):
        inner = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in inner.items():
        yield from schedules(value, f"{where}.{name}" if where else name)


def _steps(duration: str | int, name: str, progress: Progress) -> int:
    units = {"steps_per_epoch": progress.steps_per_epoch, "batch_size": progress.batch_size}
    try:
        return steps_of(duration, total_steps=progress.total_steps or None, **units)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
