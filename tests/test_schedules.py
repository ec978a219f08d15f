import numpy as np
import pytest

from foveola.config import ConfigError, build
from foveola.schedules import Progress, Schedule, steps_of

TOTAL, EPOCH, BATCH = 120, 10, 64


def curve(schedule: Schedule, total: int = TOTAL) -> np.ndarray:
    return np.array([schedule.at(Progress(step, total, EPOCH, BATCH)) for step in range(total)])


def published_cosine(base, final, total, warmup=0, start=0.0, cut=1.0):
    """The usual helper of the official code bases, on arrays."""
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * cut * i / len(i)))
    return np.concatenate([np.linspace(start, base, warmup), cosine])


@pytest.mark.parametrize("cut", [1.0, 0.8])
def test_cosine_with_warmup_is_the_published_curve(cut):
    schedule = Schedule(5e-4, start=1e-5, end=1e-6, warmup="2 epochs", shape="cosine", truncate=cut)
    values = curve(schedule)
    np.testing.assert_allclose(values, published_cosine(5e-4, 1e-6, TOTAL, 20, 1e-5, cut), rtol=1e-12)
    assert values[19] == values[20] == 5e-4  # the last warm-up step and the first of the cosine
    assert np.all(np.diff(values[20:]) < 0)
    assert values[-1] > 1e-6  # the end is not reached within the run
    rest = schedule.at(Progress(TOTAL + 7, TOTAL, EPOCH, BATCH))
    assert rest == pytest.approx(1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + np.cos(np.pi * cut)))


def test_linear_and_constant():
    momentum = Schedule(0.996, end=1.0, shape="linear")
    np.testing.assert_allclose(curve(momentum), 0.996 + 0.004 * np.arange(TOTAL) / TOTAL, rtol=1e-12)
    assert set(curve(Schedule(0.05))) == {0.05}
    assert curve(Schedule(1.0, warmup=4))[:5].tolist() == [0.0, 1 / 3, 2 / 3, 1.0, 1.0]
    assert curve(Schedule(1.0, start=0.5, warmup=1))[:2].tolist() == [0.5, 1.0]


def test_per_epoch_steps_like_dino_teacher_temperature():
    """DINO indexes linspace(start, value, warm-up epochs) followed by constants with the epoch."""
    schedule = Schedule(0.07, start=0.04, warmup="5 epochs", per_epoch=True)
    table = np.concatenate([np.linspace(0.04, 0.07, 5), np.full(7, 0.07)])
    np.testing.assert_allclose(curve(schedule), np.repeat(table, EPOCH), rtol=1e-12)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (7, 7),
        ("7", 7),
        ("1000 steps", 1000),
        ("1 step", 1),
        ("10 epochs", 100),
        ("0.25 epochs", 2),
        ("1epoch", 10),
        ("5 %", 6),
        ("5%", 6),
        ("100k samples", 1562),
        ("1.5M samples", 23438),
        ("1e3 samples", 16),
        ("2k steps", 2000),
    ],
)
def test_durations(duration, steps):
    assert steps_of(duration, total_steps=TOTAL, steps_per_epoch=EPOCH, batch_size=BATCH) == steps


@pytest.mark.parametrize(
    "duration", ["", "ten epochs", "-1 steps", "5 parsecs", "5 k%", "200 %", "epochs", -3]
)
def test_impossible_durations(duration):
    with pytest.raises(ConfigError, match=r"not a (duration|share)"):
        steps_of(duration, total_steps=TOTAL, steps_per_epoch=EPOCH, batch_size=BATCH)


def test_share_needs_a_known_length():
    with pytest.raises(ConfigError, match="share of itself"):
        steps_of("5 %", total_steps=None, steps_per_epoch=EPOCH, batch_size=BATCH)


def test_progress():
    progress = Progress(25, 100, 10, 64)
    assert (progress.epoch, progress.fraction) == (2.5, 0.25)


@pytest.mark.parametrize(
    ("schedule", "numbers"),
    [
        (Schedule(0.5), {"value": 0.5}),
        (Schedule(0.5, start=9.0, warmup="0 steps"), {"value": 0.5}),  # there is no warm-up to start
        (Schedule(0.5, start=9.0, warmup="0.0e5 %"), {"value": 0.5}),
        (Schedule(0.5, warmup="0.5 epochs"), {"value": 0.5, "start": 0.0}),
        (
            Schedule(0.5, start=0.1, end=0.2, warmup=4, shape="linear"),
            {"value": 0.5, "start": 0.1, "end": 0.2},
        ),
    ],
)
def test_the_numbers_between_which_a_schedule_runs(schedule, numbers):
    assert schedule.numbers() == numbers
    low, high = min(numbers.values()), max(numbers.values())
    assert all(low <= value <= high for value in curve(schedule))


def test_a_warmup_that_is_longer_than_the_run_takes_30_percent_of_it():
    run = Progress(0, TOTAL, EPOCH, BATCH)
    whole = Schedule(5e-4, end=1e-6, warmup="12 epochs", shape="cosine")
    assert whole.shortened(run) is None
    np.testing.assert_allclose(curve(whole), published_cosine(5e-4, 1e-6, TOTAL, 120), rtol=1e-12)
    long = Schedule(5e-4, end=1e-6, warmup="30 epochs", shape="cosine")
    assert (
        long.shortened(run)
        == "warmup '30 epochs' is 300 steps, longer than the run of 120: it takes 30% of it"
    )
    np.testing.assert_allclose(curve(long), published_cosine(5e-4, 1e-6, TOTAL, 36), rtol=1e-12)
    by_epoch = Schedule(0.07, start=0.04, warmup="13 epochs", per_epoch=True)
    table = np.concatenate([np.linspace(0.04, 0.07, 4), np.full(8, 0.07)])  # 3.6 of 12 epochs
    np.testing.assert_allclose(curve(by_epoch), np.repeat(table, EPOCH), rtol=1e-12)


def test_schedules_that_cannot_be():
    with pytest.raises(ConfigError, match=r"^lr: shape=cosine needs an `end`$"):
        build(Schedule, {"value": 1, "shape": "cosine"}, "lr")
    with pytest.raises(ConfigError, match="need shape=cosine"):
        Schedule(1.0, end=0.5)
    with pytest.raises(ConfigError, match=r"lr\.truncate: must be <= 1, got 1\.2"):
        build(Schedule, {"value": 1, "shape": "cosine", "end": 0, "truncate": 1.2}, "lr")
