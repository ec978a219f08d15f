"""What can be foreseen of a run before its first step: too short, few images, a teacher that hardly moves."""

import math

from foveola.data.sources import Source
from foveola.health import FEW_IMAGES, SHORT
from foveola.methods.method import Method
from foveola.schedules import Progress, Schedule
from foveola.training.durations import schedules
from foveola.training.freezing import ALL, phase_steps
from foveola.training.recipe import RunConfig

FIRST = 0.05  # fraction of its first weights that a teacher may still have at the end
MOST = 0.5  # fraction of starting weights beyond which a run hardly changes them
FASTEST = 0.9  # momentum below which none is proposed: what follows a student at once teaches it nothing


def advice(config: RunConfig, method: Method, progress: Progress, images: int) -> list[str]:
    """Return one line for each thing that is unwise about a run on this many images, with what to write
    instead.
    """
    at_once = config.batch_size // config.accumulate
    found = method.advice(at_once, images, config.loader.objects_per_image)
    if images < FEW_IMAGES:
        others = "its starting weights lack" if config.init else "an untrained one lacks; init= names weights"
        found.append(f"{images:,} images are few: below {FEW_IMAGES:,} a network learns little that {others}")
    if progress.total_steps < SHORT:
        found.append(
            f"{progress.total_steps:,} steps are too few to tell whether a method works; below {SHORT} they "
            "only show that it runs"
        )
    for path, schedule in schedules(config):
        if line := schedule.shortened(progress):
            found.append(f"{path}.{line}")
    for part, how in config.freeze.items():
        if how.strip() != ALL and phase_steps(how, progress) >= progress.total_steps:
            found.append(
                f"freeze.{part}={how!r} is the whole run: it never learns; write freeze.{part}=all to mean it"
            )
    frozen = progress.steps_of(config.optimizer.freeze_last_layer)
    if method.prototypes() and frozen >= progress.total_steps:
        found.append(
            f"optimizer.freeze_last_layer={config.optimizer.freeze_last_layer!r} is the whole run: its "
            "prototypes never train; for example optimizer.freeze_last_layer='1 %'"
        )
    return found + _slow_teacher(config, progress)


def _slow_teacher(config: RunConfig, progress: Progress) -> list[str]:
    """A teacher theta <- m theta + ... has prod_t m_t of its first weights at the end."""
    momentum = getattr(config.method, "momentum", None)
    if not isinstance(momentum, Schedule):
        return []
    total = progress.total_steps
    steps = range(0, total, max(total // 1000, 1))
    moved = sum(
        1 - momentum.at(Progress(s, total, progress.steps_per_epoch, progress.batch_size)) for s in steps
    )
    moved *= total / len(steps)
    # Starting weights are there to be kept, but not for the most part.
    if (left := math.exp(-moved)) <= (FIRST if config.init is None else MOST):
        return []
    line = f"the teacher is slow for {total:,} steps: at the end it still has {left:.0%} of its first weights"
    faster = 1 - (1 - momentum.value) * -math.log(FIRST / 5) / moved if moved else 0.0
    if faster < FASTEST:  # it would hardly differ from the student
        return [f"{line}; a longer duration, or a lower method.momentum.value"]
    return [f"{line}; for example method.momentum.value={faster:.2g}"]


def objects_line(source: Source) -> str:
    """Return how many images have objects, as far as that is known without reading every file."""
    if not source.has_objects:
        return f"none: {source.name} has no objects, so each image counts as one object"
    count = getattr(source, "with_objects", lambda: None)()
    if count is None:
        return f"annotated in {source.name}"
    rest = "" if count == len(source) else "; each of the others counts as one object"
    return f"{count:,} of {len(source):,} images have any{rest}"
