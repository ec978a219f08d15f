"""Schedules as pure functions of the step, and durations in whatever unit is natural.

Nothing here keeps state: a value follows from the step alone, so a resumed run has nothing to restore.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from foveola.config import ConfigError, key

_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)\s*([kM]?)\s*(steps?|epochs?|samples?|%|)\s*")

LONGEST_WARMUP = (
    0.3  # of a run, for a warm-up that does not fit: no published recipe has a longer one (DINOv2)
)


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` steps are done of `total_steps`, with a global batch of `batch_size`."""

    step: int
    total_steps: int
    steps_per_epoch: int
    batch_size: int

    @property
    def epoch(self) -> float:
        """Passes over the data so far, with fraction."""
        return self.step / self.steps_per_epoch

    @property
    def fraction(self) -> float:
        """Fraction of the run that is done, in [0, 1]."""
        return self.step / self.total_steps

    def steps_of(self, duration: str | int) -> int:
        """Return the steps of a duration of this run: `steps_of`, which raises ConfigError for what is
        none.
        """
        return steps_of(
            duration,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.batch_size,
        )


def steps_of(duration: str | int, *, total_steps: int | None, steps_per_epoch: int, batch_size: int) -> int:
    """Return the steps of a duration: "10 epochs", "1000 steps", "5 %" (of the run), "1.5M samples", or an
    int.

    `batch_size` is the global one. Fractions of a step are rounded. `total_steps` may be None while the
    length of the run itself is being computed. Raises ConfigError for anything else.
    """
    match = _DURATION.fullmatch(str(duration))
    number = float(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]] if match else math.inf
    if match is None or not math.isfinite(number) or (match[2] and match[3] == "%"):
        raise ConfigError(
            f"not a duration: {duration!r}; write '10 epochs', '1000 steps', '5 %' or '1M samples'"
        )
    unit = match[3].rstrip("s")
    if unit == "%" and total_steps is None:
        raise ConfigError(f"the length of the run cannot be a fraction of itself: {duration!r}")
    if unit == "%" and number > 100:
        raise ConfigError(f"not a fraction of the run: {duration!r}")
    steps = {"epoch": steps_per_epoch, "%": (total_steps or 0) / 100, "sample": 1 / batch_size}.get(unit, 1)
    return round(number * steps)


@dataclass(frozen=True)
class Schedule:
    """A warm-up from `start` to `value`, then a way from `value` to `end`, or drops.

    The warm-up of W steps is linspace(start, value, W): its last step already has `value`. The rest, of n
    steps, runs from `value` at i = 0 towards `end`, which would be reached at i = n, one step too late. With
    t = i / n the way is linear, a cosine, or `poly`: end + (value - end) (1 - t)^power (Segmenter,
    MMSegmentation). `steps` stays at `value` and divides it by 10 at each of `drops`, which are durations
    from the first step of the run, its warm-up included (ViTDet).

    A warm-up that is longer than the whole run takes 30 % of it, so that a published recipe can be shortened
    by its duration alone.
    """

    value: float = key(help="value after the warm-up")
    start: float | None = key(None, "value at the first step of the warm-up; null: 0")
    end: float | None = key(None, "value that a cosine, a line or poly runs to")
    warmup: str | int = key(
        "0 steps", "duration of the warm-up: '10 epochs', '1000 steps', '5 %', '1M samples'"
    )
    shape: Literal["constant", "cosine", "linear", "poly", "steps"] = key(
        "constant", "way from value to end after the warm-up"
    )
    truncate: float = key(1.0, "fraction of the way to end that is used (CAPI: 0.8)", above=0, at_most=1)
    power: float = key(0.9, "shape=poly: power of the remaining fraction of the way", above=0)
    drops: tuple[str, ...] = key(
        (), "shape=steps: when the value falls to a tenth: ['89 %', '96 %'], or ['19667 steps']"
    )
    per_epoch: bool = key(False, "change once per epoch, not every step (DINO's teacher temperature)")

    def __post_init__(self) -> None:
        runs = self.shape in ("cosine", "linear", "poly")
        if not runs and (self.end is not None or self.truncate != 1):
            raise ConfigError("`end` and `truncate` need shape=cosine, shape=linear or shape=poly")
        if runs and self.end is None:
            raise ConfigError(f"shape={self.shape} needs an `end`")
        if self.shape == "steps" and not self.drops:
            raise ConfigError("shape=steps needs `drops`, such as drops=['89 %', '96 %']")

    def numbers(self) -> dict[str, float]:
        """Return the numbers that it runs between, by name: what a range of the key that holds it
        applies to.
        """
        found = {"value": self.value}
        if self.warms_up:
            found["start"] = self.start or 0.0
        return found if self.end is None else found | {"end": self.end}

    @property
    def warms_up(self) -> bool:
        """Whether there is a warm-up at all: its length is not zero."""
        return any(digit in "123456789" for digit in str(self.warmup).lower().partition("e")[0])

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if self.shape != "poly":
            idle["power"] = f"it is of shape=poly, not of shape={self.shape}"
        if self.shape != "steps":
            idle["drops"] = f"they are of shape=steps, not of shape={self.shape}"
        if self.warms_up:
            return idle
        idle["start"] = f"there is no warm-up to start from it (warmup={str(self.warmup)!r})"
        if self.shape == "constant":
            idle["per_epoch"] = "the schedule is constant, without a warm-up"
        return idle

    def at(self, progress: Progress) -> float:
        """Return the value that the step `progress.step` uses (0-based; beyond the last step the schedule
        rests).
        """
        step, total, warmup = self._clock(progress)
        if step < warmup:
            start = self.start or 0.0
            return start + (self.value - start) * (step / (warmup - 1) if warmup > 1 else 0.0)
        if self.shape == "steps":
            unit = progress.steps_per_epoch if self.per_epoch else 1
            return self.value / 10 ** sum(step * unit >= drop for drop in self._drops(progress))
        if self.shape == "constant" or self.end is None or total == warmup:
            return self.value
        done = self.truncate * min((step - warmup) / (total - warmup), 1.0)
        if self.shape == "linear":
            return self.value + (self.end - self.value) * done
        if self.shape == "poly":
            return self.end + (self.value - self.end) * (1 - done) ** self.power
        return self.end + 0.5 * (self.value - self.end) * (1 + math.cos(math.pi * done))

    def shortened(self, progress: Progress) -> str | None:
        """Return what to say of a warm-up that is longer than the run, so takes a part of it; None if it
        fits.
        """
        steps = self._warmup(progress)
        if steps <= progress.total_steps:
            return None
        return (
            f"warmup '{self.warmup}' is {steps:,} steps, longer than the run of {progress.total_steps:,}: it "
            f"takes {LONGEST_WARMUP:.0%} of it"
        )

    def _warmup(self, progress: Progress) -> int:
        return progress.steps_of(self.warmup)

    def _drops(self, progress: Progress) -> list[int]:
        return [progress.steps_of(drop) for drop in self.drops]

    def _clock(self, progress: Progress) -> tuple[int, int, int]:
        """Now, the end of the run and the end of the warm-up, in steps (or in epochs)."""
        warmup = self._warmup(progress)
        if warmup > progress.total_steps:
            warmup = round(LONGEST_WARMUP * progress.total_steps)
        if not self.per_epoch:
            return progress.step, progress.total_steps, warmup
        length = progress.steps_per_epoch
        return progress.step // length, math.ceil(progress.total_steps / length), round(warmup / length)
