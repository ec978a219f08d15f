"""A run that is to take longer: whether that is all that is asked, and what becomes of its schedules."""

import dataclasses
import math
from pathlib import Path

from foveola import distributed, files
from foveola.config import ConfigError, dump_yaml, read_yaml, renewed
from foveola.files import RunFolder
from foveola.schedules import Progress, Schedule
from foveola.training.durations import durations, plan, schedules
from foveola.training.recipe import RunConfig


def check_longer(folder: Path, before: RunConfig, config: RunConfig, images: int) -> None:
    """Raise ConfigError unless `config`, which differs from that of the run in its duration, is longer."""
    steps = [plan(each, images, distributed.world_size()).total_steps for each in (before, config)]
    if steps[1] <= steps[0]:
        raise ConfigError(
            f"{folder} has duration={before.duration!r}, {steps[0]:,} steps: a run can become longer, not "
            f"{config.duration!r}, {steps[1]:,} steps: repeat its duration, or choose another out="
        )


def lengthen(folder: Path, config: RunConfig) -> str:
    """Write another duration into the configuration of a run; the one before, or "" where it is the same."""
    path = RunFolder(folder).config
    tree = renewed(read_yaml(path))
    before = str(tree.get("duration", RunConfig.duration))
    if before == config.duration:
        return ""
    files.write_text(path, dump_yaml(tree | {"duration": config.duration}))
    return before


def what_changes(before: str, config: RunConfig, progress: Progress, images: int) -> str:
    """Return in a line what a run that had the duration `before` does otherwise from the step of `progress`
    on: the schedules whose values jump, and the durations that are fractions of the run.
    """
    shorter = dataclasses.replace(config, duration=before)
    earlier = plan(shorter, images, distributed.world_size())
    now = dataclasses.replace(earlier, step=progress.step)
    found = []
    for name, schedule in schedules(config):
        if name == "optimizer.lr":
            peak = config.optimizer.peak(progress.batch_size)
            schedule = Schedule(**{**vars(schedule), "value": peak})
        old, new = schedule.at(now), schedule.at(progress)
        if not math.isclose(old, new, rel_tol=1e-6):
            found.append(f"{name} {old:.3g} -> {new:.3g}")
    pairs = zip(durations(shorter, earlier).items(), durations(config, progress).values(), strict=True)
    found += [
        f"{name} {old:,} -> {new:,} steps"
        for (name, old), new in pairs
        if old != new and max(old, new) > progress.step
    ]
    changed = ", ".join(found) or "none of them has another value"
    return (
        f"duration {before} -> {config.duration}, {earlier.total_steps:,} -> {progress.total_steps:,} steps: "
        f"schedules are those of the longer run from step {progress.step:,} on: {changed}"
    )
