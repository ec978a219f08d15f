import numpy as np
import pytest
import torch

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


def of_torch(make) -> np.ndarray:
    """The rates that one of torch's schedulers gives to each step, from a rate of 0.3."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, rates = make(optimizer), []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_poly_is_that_of_torch_and_ends_at_a_floor(power):
    reference = of_torch(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, TOTAL, power))
    np.testing.assert_allclose(
        curve(Schedule(0.3, end=0.0, shape="poly", power=power)), reference, rtol=1e-9, atol=1e-12
    )
    # MMSegmentation's min_lr: the way goes to it, as that of torch goes to 0.
    floor = curve(Schedule(0.3, end=0.03, shape="poly", power=power))
    np.testing.assert_allclose(floor, 0.03 + 0.9 * reference, rtol=1e-9)


def test_poly_by_hand():
    """With a floor of a tenth, 0.9 0.5^0.9 + 0.1 = 0.5823 of the rate is left half-way (CrIBo)."""
    schedule = Schedule(1.0, end=0.1, shape="poly")
    assert schedule.at(Progress(60, TOTAL, EPOCH, BATCH)) == pytest.approx(0.582298, abs=1e-6)
    assert schedule.at(Progress(TOTAL + 9, TOTAL, EPOCH, BATCH)) == pytest.approx(0.1)
    warm = Schedule(1.0, start=0.0, end=0.1, warmup="20 steps", shape="poly")
    assert [warm.at(Progress(step, TOTAL, EPOCH, BATCH)) for step in (0, 19, 20)] == [0, 1, 1]
    assert warm.at(Progress(70, TOTAL, EPOCH, BATCH)) == pytest.approx(0.582298, abs=1e-6)


def test_steps_are_those_of_torch():
    reference = of_torch(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [60, 96], gamma=0.1))
    for drops in (("50 %", "80 %"), ("60 steps", "96 steps"), ("6 epochs", "9.6 epochs")):
        np.testing.assert_allclose(curve(Schedule(0.3, shape="steps", drops=drops)), reference, rtol=1e-12)
    # Whole epochs: a drop within one comes with the next.
    late = curve(Schedule(0.3, shape="steps", drops=("55 steps", "96 steps"), per_epoch=True))
    assert [i for i in range(1, TOTAL) if late[i] != late[i - 1]] == [60, 100]


def test_vitdet_drops_where_its_paper_says():
    """Of 22,128 steps with a warm-up of 250: a tenth from 19,667 on, a hundredth from 21,306 on."""
    schedule = Schedule(
        3e-4, start=3e-7, warmup="250 steps", shape="steps", drops=("19667 steps", "21306 steps")
    )
    steps = (0, 249, 250, 19_666, 19_667, 21_305, 21_306, 22_127)
    rates = [schedule.at(Progress(step, 22_128, 1844, 64)) for step in steps]
    expected = [3e-7, 3e-4, 3e-4, 3e-4, 3e-5, 3e-5, 3e-6, 3e-6]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shape": "poly"}, "shape=poly needs an `end`"),
        ({"shape": "steps"}, "shape=steps needs `drops`"),
        ({"shape": "steps", "drops": ["50 %"], "end": 0.1}, "`end` and `truncate` need"),
        ({"shape": "steps", "drops": ["50 %"], "truncate": 0.5}, "`end` and `truncate` need"),
        ({"shape": "poly", "end": 0.1, "power": 0}, "power: must be > 0"),
        ({"shape": "polly", "end": 0.1}, "did you mean 'poly'"),
    ],
)
def test_shapes_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        build(Schedule, {"value": 1.0, **keys})


def test_keys_of_another_shape_are_idle():
    assert build(Schedule, {"value": 1.0, "end": 0.1, "shape": "poly", "warmup": 3}).unread().keys() == {
        "drops"
    }
    steps = Schedule(1.0, shape="steps", drops=("50 %",), warmup=3)
    assert steps.unread() == {"power": "it is of shape=poly, not of shape=steps"}
    assert Schedule(1.0, end=0.1, shape="linear", warmup=3).unread().keys() == {"power", "drops"}


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
    with pytest.raises(ConfigError, match=r"not a (duration|fraction)"):
        steps_of(duration, total_steps=TOTAL, steps_per_epoch=EPOCH, batch_size=BATCH)


def test_share_needs_a_known_length():
    with pytest.raises(ConfigError, match="fraction of itself"):
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
