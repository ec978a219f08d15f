"""Each verdict on both sides of each of its thresholds, from hand-made metrics."""

import math

import pytest

from foveola import health as h
from foveola.health import Facts, Verdict, health, recent, worst

EPS = 1e-6


def series(name: str, *values: float | None, **more: float) -> list[dict[str, float | None]]:
    return [
        {"step": 10.0 * (i + 1), "epoch": 0.1 * (i + 1), name: value, **more}
        for i, value in enumerate(values)
    ]


def only(verdicts: list[Verdict], start: str) -> Verdict:
    (found,) = [verdict for verdict in verdicts if verdict.name.startswith(start)]
    return found


def check(verdict: Verdict, state: str, *words: str) -> None:
    assert verdict.state == state, verdict
    for word in words:
        assert word in verdict.text, verdict


def test_recent_is_the_mean_of_the_last_tenth_and_of_at_least_three() -> None:
    assert recent(series("x", *map(float, range(100))), "x") == pytest.approx(94.5)
    assert recent(series("x", 5.0, 1.0, 2.0, 3.0), "x") == pytest.approx(2)
    assert recent(series("x", None, 7.0), "x") == 7
    assert recent([], "x") is None
    assert recent(series("x", None), "x") is None


def test_the_worst_state_speaks_for_all() -> None:
    states = ["OK", "NOT KNOWN", "LOOK", "BAD"]
    verdicts = [Verdict("", state, "") for state in states]  # pyright: ignore
    assert worst(verdicts) == "BAD"
    assert worst(verdicts[:3]) == "LOOK"
    assert worst(verdicts[:2]) == "OK"
    assert worst(verdicts[1:2]) == worst([]) == "NOT KNOWN"


@pytest.mark.parametrize(
    ("total", "state", "words"),
    [(30, "OK", "All 30"), (31, "LOOK", "30 of 31"), (None, "NOT KNOWN", "30 steps were logged")],
)
def test_the_end(total: int | None, state: str, words: str) -> None:
    check(h.ended(series("loss", 3.0, 2.0, 1.0), Facts(total_steps=total)), state, words)
    check(h.ended([], Facts(total_steps=total)), "NOT KNOWN", "No step")


@pytest.mark.parametrize(
    ("share", "state"),
    [
        (h.SHARP - EPS, "LOOK"),
        (h.SHARP + EPS, "OK"),
        (h.FLAT_FROM[0] - EPS, "OK"),
        (h.FLAT_FROM[0] + EPS, "LOOK"),
        (h.FLAT_FROM[1] - EPS, "LOOK"),
        (h.FLAT_FROM[1] + EPS, "BAD"),
    ],
)
def test_entropy_of_targets(share: float, state: str) -> None:
    lines = series("token/target_entropy", *[share * math.log(128)] * 4)
    found = only(h.targets(lines, Facts(prototypes={"token": 128})), "Do the targets of token")
    check(found, state, "4.85", f"{100 * share:.1f} %")


@pytest.mark.parametrize(
    ("alive", "state"),
    [
        (h.ALIVE[1] - 0.01, "BAD"),
        (h.ALIVE[1] + 0.01, "LOOK"),
        (h.ALIVE[0] - 0.01, "LOOK"),
        (h.ALIVE[0] + 0.01, "OK"),
    ],
)
def test_targets_that_are_all_alike(alive: float, state: str) -> None:
    """`alive` prototypes with equal shares have the entropy log(alive): a distance of log(K / alive)."""
    lines = series("patch/target_entropy", 0.3, **{"patch/kl_to_uniform": math.log(64 / alive)})
    found = only(h.targets(lines, Facts(prototypes={"patch": 64})), "Do the targets of patch")
    check(found, state)
    assert (f"{alive:.1f} prototypes" in found.text) == (state != "OK")


@pytest.mark.parametrize(
    ("used", "state"),
    [(h.USED[1] - EPS, "BAD"), (h.USED[1] + EPS, "LOOK"), (h.USED[0] - EPS, "LOOK"), (h.USED[0] + EPS, "OK")],
)
def test_use_of_prototypes(used: float, state: str) -> None:
    lines = series("token/target_entropy", 1.0, 1.0, **{"token/prototypes_used": used})
    check(
        only(h.targets(lines, Facts(prototypes={"token": 64})), "Are the prototypes of token"),
        state,
        "64 prototypes",
    )


def test_use_is_the_highest_of_the_last_two_epochs() -> None:
    def lines(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        more = {"token/target_entropy": 1.0}
        return [{"step": 1.0, "epoch": e, "token/prototypes_used": u, **more} for e, u in pairs]

    facts = Facts(prototypes={"token": 64})
    fresh = lines((1.0, 0.9), (2.0, 0.8), (2.1, 0.001))  # counted anew just now
    check(only(h.targets(fresh, facts), "Are the prototypes"), "OK", "80.0 %")
    lost = lines((1.0, 0.9), (2.0, 0.004), (3.0, 0.005))
    check(only(h.targets(lost, facts), "Are the prototypes"), "BAD", "0.5 %")


def test_targets_of_which_too_little_is_known() -> None:
    lines = series("token/target_entropy", 1.0)
    check(only(h.targets(lines, Facts()), "Do the targets of token"), "NOT KNOWN", "not known")
    check(only(h.targets(series("loss", 1.0), Facts()), "Do the targets"), "NOT KNOWN", "no prototypes")
    empty = h.targets(series("token/target_entropy", None), Facts(prototypes={"token": 8}))
    assert [verdict.state for verdict in empty] == ["NOT KNOWN", "NOT KNOWN"]


@pytest.mark.parametrize(
    ("value", "state"),
    [
        (h.SPREAD[1] - EPS, "BAD"),
        (h.SPREAD[1] + EPS, "LOOK"),
        (h.SPREAD[0] - EPS, "LOOK"),
        (h.SPREAD[0] + EPS, "OK"),
    ],
)
def test_spread(value: float, state: str) -> None:
    check(
        h.feature_spread(series("feature_spread", 1.0, value, value, value)),
        state,
        f"{value:.3f}",
        "0.1",
        "0.03",
    )


def test_spread_and_cosine_belong_together() -> None:
    """With the same deviation in every direction, spread squared is one minus the mean cosine."""
    import torch

    from foveola.methods.method import spread_and_rank

    x = torch.nn.functional.normalize(
        torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) + 1.5, dim=1
    )
    spread, _ = spread_and_rank(x)
    cosine = x.mean(dim=0).square().sum().item()
    check(h.feature_spread(series("feature_spread", spread)), "OK", f"cosine of about {cosine:.2f}")


@pytest.mark.parametrize(
    ("value", "peak", "state"),
    [
        (1.4, 1.4, "BAD"),
        (1.6, 1.6, "LOOK"),
        (0.05 * 96 - EPS, 5.0, "LOOK"),
        (0.05 * 96 + EPS, 5.0, "OK"),
        (10 - EPS, 20.0, "LOOK"),
        (10 + EPS, 20.0, "OK"),
    ],
)
def test_effective_rank(value: float, peak: float, state: str) -> None:
    lines = series("effective_rank", peak, value, value, value)
    check(h.rank_health(lines, Facts(width=96, features=128)), state, "of at most 96")


def test_effective_rank_is_bounded_by_rows_too() -> None:
    lines = series("effective_rank", 15.0)
    check(h.rank_health(lines, Facts(width=384, features=16)), "OK", "of at most 16")
    check(h.rank_health(lines, Facts(width=384)), "LOOK", "of at most 384")
    check(h.rank_health(series("effective_rank", 9.9), Facts(width=1000, features=2000)), "BAD", "hardly any")
    check(h.rank_health(series("effective_rank", 1.4), Facts(width=96)), "BAD", "one direction")
    check(h.rank_health(lines, Facts(features=16, processes=2)), "OK", "of one process)")
    check(h.rank_health(lines, Facts(features=16, processes=2, whole_steps=True)), "OK", "rows of a step)")
    check(h.rank_health(lines, Facts()), "NOT KNOWN", "15.0")
    check(h.rank_health([], Facts(width=3)), "NOT KNOWN")


@pytest.mark.parametrize(
    ("share", "state"), [(0.5 - EPS, "OK"), (0.5 + EPS, "LOOK"), (0.9 - EPS, "LOOK"), (0.91, "BAD")]
)
def test_place_by_what_there_is(share: float, state: str) -> None:
    trained = 0.087 + share * (1 - 0.087)  # of what the untrained one leaves
    measured = h.position([], Facts(position_fraction=(trained, 0.087), position_images=64))
    check(measured, state, f"{100 * trained:.1f} %", "64 images", "8.7 % untrained", "50 %", "90 %")
    check(h.position([], Facts(position_fraction=(share, None))), state, f"{100 * share:.1f} %")
    check(
        h.position([], Facts(position_fraction=(share, 0.087), position_images=31)),
        "NOT KNOWN",
        "31 images",
        "32",
    )
    check(h.position([], Facts(position_fraction=(0.95, 0.95), position_images=64)), "OK", "0.0 %")
    logged = series("targets/std", 2.0, **{"targets/content_std": 2 * math.sqrt(1 - share)})
    check(h.position(logged, Facts(position_fraction=(0.0, 0.0))), state, f"{100 * share:.1f} %")


@pytest.mark.parametrize(
    ("share", "state"), [(0.1 - EPS, "OK"), (0.1 + EPS, "LOOK"), (0.5 - EPS, "LOOK"), (0.51, "BAD")]
)
def test_place_and_clusters(share: float, state: str) -> None:
    """The most possible is the log of the smaller of places and clusters."""
    for clusters, positions, least in ((512, 64, 64), (16, 64, 16)):
        lines = series("clustering/position_information", share * math.log(least))
        facts = Facts(prototypes={"clustering": clusters}, positions=positions)
        check(h.position(lines, facts), state, f"{math.log(least):.2f} nats")


def test_place_unknown() -> None:
    check(h.position(series("loss", 1.0), Facts()), "NOT KNOWN", "does not log it")


def test_steps_that_are_not_finite() -> None:
    good: list[dict[str, float | None]] = series("loss", *[1.0] * 400, grad_norm=1.0)
    check(h.finite(good, Facts()), "OK", "0 losses and 0 gradient norms of 400")
    one = [*good[:-2], good[-2] | {"grad_norm": None}, good[-1]]
    check(h.finite(one, Facts()), "LOOK", "1 gradient norms")
    note = "2026-01-01 00:00:00  step 7: gradients are not finite; the weights stay as they are"
    check(h.finite(good, Facts(notes=[note])), "LOOK", "1 steps left the weights")
    three = [line | {"loss": None} for line in good[:3]] + good[3:]
    check(h.finite(three, Facts()), "LOOK", "3 losses")
    four = [line | {"loss": None} for line in good[:4]] + good[4:]
    check(h.finite(four, Facts()), "BAD", "4 losses")
    few = series("loss", None, 1.0, 1.0)
    check(h.finite(few, Facts()), "LOOK", "1 losses")
    check(h.finite(series("loss", 1.0, 1.0, None), Facts()), "BAD", "last loss")
    check(h.finite([], Facts()), "NOT KNOWN")
    told = "x  gradients were not finite in 3 steps in a row, up to step 9: try precision=bf16"
    check(h.finite(good, Facts(notes=[told])), "BAD", "gave up")


def test_overflow_is_ordinary_in_half_precision() -> None:
    lines = [line | {"grad_norm": None} for line in series("loss", 1.0, 1.0)] + series("loss", 1.0)
    check(h.finite(lines, Facts(precision="fp16")), "LOOK", "fp16", "10 %")
    check(h.finite(lines[:1] + series("loss", *[1.0] * 19), Facts(precision="fp16")), "OK", "fp16")
    check(h.finite(lines, Facts(precision="bf16")), "BAD")


@pytest.mark.parametrize("fixed", [True, False])
def test_loss(fixed: bool) -> None:
    facts = Facts(fixed_targets=fixed)
    check(h.loss(series("loss", 2.0, 1.9, 1.9, 1.97), facts), "OK", "From 2 ", "to 1.97", "1 %")
    stuck = h.loss(series("loss", 2.0, 1.0, 1.0, 1.99), facts)
    check(stuck, "BAD" if fixed else "LOOK", "to 1.99")
    check(h.loss(series("loss", 2.0, None, 1.0, 1.0), facts), "NOT KNOWN", "3 losses")
    # Also of losses below zero, as KoLeo makes them.
    assert h.loss(series("loss", -1.0, -1.1, -1.2, -1.3), facts).state == "OK"
    assert h.loss(series("loss", -1.0, -0.9, -0.8, -0.7), facts).state != "OK"


@pytest.mark.parametrize(
    ("share", "state"), [(0.1 - EPS, "OK"), (0.1 + EPS, "LOOK"), (0.3 - EPS, "LOOK"), (0.31, "BAD")]
)
def test_waiting_for_data(share: float, state: str) -> None:
    lines = series("data_wait", 0.9, share, share)  # the first has the start of the workers in it
    check(h.loader(lines), state, f"{100 * share:.1f} %", "10 %", "30 %")
    assert ("loader.workers" in h.loader(lines).text) == (state != "OK")
    check(h.loader([]), "NOT KNOWN")
    check(h.loader(series("data_wait", 0.9)), "NOT KNOWN", "the start of the workers")


def test_unreadable_images() -> None:
    check(h.readable(series("bad_images", 0.0, 0.0)), "OK")
    check(h.readable(series("bad_images", 0.0, 1.0)), "LOOK", "1 could not")
    check(h.readable(series("loss", 0.0)), "NOT KNOWN")


@pytest.mark.parametrize(
    ("step", "images", "state", "words"),
    [
        (h.SHORT - 1, None, "LOOK", "499 steps: too short to tell"),
        (h.SHORT, None, "OK", "500 steps."),
        (20, 143, "LOOK", "20 steps on 143 images: too short to tell"),
        (h.SHORT, h.FEW_IMAGES - 1, "LOOK", "500 steps on 999 images: too few images"),
        (h.SHORT, h.FEW_IMAGES, "OK", "500 steps on 1,000 images."),
    ],
)
def test_too_short_to_tell_is_a_verdict(step: int, images: int | None, state: str, words: str) -> None:
    lines = [{"step": float(step), "loss": 1.0}]
    check(h.enough(lines, Facts(images=images)), state, words)


def test_an_empty_log_is_known_to_be_unknown() -> None:
    verdicts = health([], Facts())
    assert {verdict.state for verdict in verdicts} == {"NOT KNOWN"}
    assert all(verdict.text.endswith(".") for verdict in verdicts)


def test_a_good_run_has_no_complaint() -> None:
    line = {
        "loss": 1.0,
        "grad_norm": 1.0,
        "token/target_entropy": 2.0,
        "token/kl_to_uniform": 0.1,
        "token/prototypes_used": 1.0,
        "feature_spread": 0.9,
        "effective_rank": 30.0,
        "data_wait": 0.01,
        "bad_images": 0.0,
    }
    lines = [{"step": 1000 * i, "epoch": i / 10, **line, "loss": 5.0 - i} for i in (1.0, 2.0, 3.0, 4.0)]
    facts = Facts(False, "fp32", 4000, {"token": 64}, 128, 96, 64, (), (0.2, 0.1))
    verdicts = health(lines, facts)
    assert [verdict.state for verdict in verdicts] == ["OK"] * 11
    assert all(any(digit in verdict.text for digit in "0123456789") for verdict in verdicts)
