"""Is a run healthy? Verdicts in words from its metrics, each with its number and its threshold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

State = Literal["OK", "LOOK", "BAD", "NOT KNOWN"]
StepMetrics = Mapping[str, float | None]

# Where LOOK begins, and where BAD does. docs/report.md says where each comes from.
FLAT_FROM = 0.90, 0.98  # entropy of targets, as a fraction of log K
SHARP = 0.01  # the same, from below
ALIVE = 4.0, 2.0  # prototypes that the targets of a batch amount to: exp(entropy of their mean)
USED = 0.10, 0.01  # fraction of prototypes that were some row's first choice in an epoch
SPREAD = 0.10, 0.03  # of features: cosines between images are then about 0.99, 0.999
RANK = 0.05, 0.01  # effective rank, as a fraction of the most possible
RANK_LOST = 0.5  # fraction of its own highest value
POSITION = 0.5, 0.9  # fraction of the variance of patches that positions explain, beyond the untrained one
POSITION_FROM = 32  # images on which that can be measured
INFORMATION = 0.1, 0.5  # of position and cluster, as a fraction of the most possible
WAIT = 0.10, 0.30  # fraction of the time spent waiting for data
FALL = 0.01  # of the loss, as a fraction of where it began
NOT_FINITE = 0.01  # fraction of logged steps, and more than one
OVERFLOW = 0.10  # the same of gradients with precision=fp16, where some are ordinary
ONE = 1.5  # effective rank below which one direction tells all images apart

SHORT = 500  # steps below which a run tells nothing of its method
FEW_IMAGES = 1000  # images, likewise


@dataclass(frozen=True)
class Verdict:
    """One question, its answer, and the sentence with number and threshold behind it."""

    name: str
    state: State
    text: str


@dataclass(frozen=True)
class Facts:
    """What of a run the verdicts need besides its metrics; None or empty: not known."""

    fixed_targets: bool = False  # whether what the method predicts never moves
    precision: str = "fp32"
    total_steps: int | None = None
    prototypes: Mapping[str, int] | None = None  # by kind of targets
    features: int | None = None  # features of a batch from which rank and spread are computed
    width: int | None = None  # their dimensions
    positions: int | None = None  # patches of a view
    notes: Sequence[str] = ()  # log.txt
    # Fraction of the variance of patches that positions explain: trained, and untrained (measured apart).
    position_fraction: tuple[float, float | None] | None = None
    position_images: int | None = None  # on which they were measured
    images: int | None = None  # of the data
    processes: int | None = None  # over which `features` are those of one; None: not noted
    whole_steps: bool = False  # whether what was logged, `features` too, is of all processes


def health(lines: Sequence[StepMetrics], facts: Facts) -> list[Verdict]:
    """Return all verdicts that the metrics allow, in the order in which they are worth reading."""
    return [
        ended(lines, facts),
        enough(lines, facts),
        *targets(lines, facts),
        feature_spread(lines),
        rank_health(lines, facts),
        position(lines, facts),
        finite(lines, facts),
        loss(lines, facts),
        loader(lines),
        readable(lines),
    ]


def worst(verdicts: Sequence[Verdict]) -> State:
    """Return the worst state: BAD before LOOK before OK; NOT KNOWN where nothing is known."""
    states = {verdict.state for verdict in verdicts}
    order: tuple[State, ...] = ("BAD", "LOOK", "OK", "NOT KNOWN")
    for state in order:
        if state in states:
            return state
    return "NOT KNOWN"


def values(lines: Sequence[StepMetrics], name: str) -> list[float]:
    """Return the finite values of a metric, in order."""
    found = (line.get(name) for line in lines)
    return [value for value in found if value is not None and math.isfinite(value)]


def recent(lines: Sequence[StepMetrics], name: str) -> float | None:
    """Return the mean of a metric over the last tenth of its values, at least three of them where there
    are.
    """
    found = values(lines, name)
    return fmean(found[-max(3, len(found) // 10) :]) if found else None


def as_percent(fraction: float, digits: int = 0) -> str:
    return f"{100 * fraction:.{digits}f} %"


# -- one verdict each ----------------------------------------------------------------------------------------


def ended(lines: Sequence[StepMetrics], facts: Facts) -> Verdict:
    name = "Is the run finished?"
    if not lines:
        return Verdict(name, "NOT KNOWN", "No step was logged.")
    step = int(lines[-1]["step"] or 0)
    if facts.total_steps is None:
        return Verdict(
            name, "NOT KNOWN", f"{step:,} steps were logged; how many there are to be is not known."
        )
    if step >= facts.total_steps:
        return Verdict(name, "OK", f"All {facts.total_steps:,} steps were done.")
    fraction = step / facts.total_steps
    return Verdict(
        name,
        "LOOK",
        f"{step:,} of {facts.total_steps:,} steps are logged ({as_percent(fraction)}). The schedules have "
        "not run out, so numbers will still move; the same command goes on.",
    )


def enough(lines: Sequence[StepMetrics], facts: Facts) -> Verdict:
    """Judge whether there were enough steps and images for the other verdicts to mean anything."""
    name = "Is it long enough to tell?"
    if not lines or not (step := int(lines[-1]["step"] or 0)):
        return Verdict(name, "NOT KNOWN", "No step was logged.")
    text = f"{step:,} steps" + ("" if facts.images is None else f" on {facts.images:,} images")
    limits = f"LOOK below {SHORT} steps" + ("" if facts.images is None else f" or {FEW_IMAGES:,} images")
    if step < SHORT or (facts.images is not None and facts.images < FEW_IMAGES):
        lacking = "too short" if step < SHORT else "too few images"
        return Verdict(name, "LOOK", f"{text}: {lacking} to tell whether the method works. {limits}.")
    return Verdict(name, "OK", f"{text}. {limits}.")


def targets(lines: Sequence[StepMetrics], facts: Facts) -> list[Verdict]:
    """Judge each kind of targets: neither flat nor all alike, and prototypes in use."""
    kinds = dict.fromkeys(
        name.partition("/")[0] for line in lines for name in line if name.endswith("/target_entropy")
    )
    if not kinds:
        why = "This method has no prototypes, or none were logged; feature spread and rank tell of collapse."
        return [Verdict("Do the targets say something?", "NOT KNOWN", why)]
    verdicts = []
    for kind in kinds:
        count = (facts.prototypes or {}).get(kind)
        if count is None or count < 2:
            why = "How many prototypes there are is not known, so neither is the most possible entropy."
            verdicts.append(Verdict(f"Do the targets of {kind} say something?", "NOT KNOWN", why))
            continue
        verdicts += [_entropy(lines, kind, count), _usage(lines, kind, count)]
    return verdicts


def _entropy(lines: Sequence[StepMetrics], kind: str, count: int) -> Verdict:
    name, bound = f"Do the targets of {kind} say something?", math.log(count)
    entropy, apart = recent(lines, f"{kind}/target_entropy"), recent(lines, f"{kind}/kl_to_uniform")
    if entropy is None:
        return Verdict(name, "NOT KNOWN", "No finite entropy was logged.")
    fraction = entropy / bound
    text = f"Mean entropy {entropy:.2f} of at most {bound:.2f} nats "
    text += f"({as_percent(fraction, 1)}; {count:,} prototypes)"
    if fraction >= FLAT_FROM[0]:
        state = "BAD" if fraction >= FLAT_FROM[1] else "LOOK"
        return Verdict(
            name,
            state,
            f"{text}: close to uniform, so this term teaches little or nothing. LOOK from "
            f"{as_percent(FLAT_FROM[0])}, BAD from {as_percent(FLAT_FROM[1])}. "
            "A lower teacher temperature, fewer prototypes or a larger batch may help.",
        )
    if apart is not None and (alive := math.exp(max(bound - apart, 0.0))) < ALIVE[0]:
        state = "BAD" if alive < ALIVE[1] else "LOOK"
        return Verdict(
            name,
            state,
            f"{text}, but all targets of a batch together amount to {alive:.1f} prototypes: everything is "
            f"called the same. LOOK below {ALIVE[0]:.0f}, BAD below {ALIVE[1]:.0f}.",
        )
    if fraction < SHARP:
        return Verdict(
            name,
            "LOOK",
            f"{text}: one-hot, without any doubt left. LOOK below {as_percent(SHARP)}. Harmless while many "
            "prototypes are in use; else a higher teacher temperature.",
        )
    return Verdict(name, "OK", f"{text}. OK from {as_percent(SHARP)} to {as_percent(FLAT_FROM[0])}.")


def _usage(lines: Sequence[StepMetrics], kind: str, count: int) -> Verdict:
    name = f"Are the prototypes of {kind} in use?"
    last = values(lines, "epoch")[-1:] or [0.0]
    # They are counted anew in each epoch: the highest count since the start of the one before the last.
    late = [line for line in lines if (line.get("epoch") or 0.0) > math.ceil(last[0]) - 2]
    found = values(late, f"{kind}/prototypes_used")
    if not found:
        return Verdict(name, "NOT KNOWN", "Their use was not logged.")
    fraction = max(found)
    text = (
        f"{as_percent(fraction, 1)} of {count:,} prototypes were the first choice of something within "
        "an epoch"
    )
    limits = f"LOOK below {as_percent(USED[0])}, BAD below {as_percent(USED[1])}"
    if fraction < USED[0]:
        return Verdict(
            name, "BAD" if fraction < USED[1] else "LOOK", f"{text}. {limits}. Fewer would do as well."
        )
    return Verdict(name, "OK", f"{text}. {limits}.")


def feature_spread(lines: Sequence[StepMetrics]) -> Verdict:
    name, value = "Do images have different features?", recent(lines, "feature_spread")
    if value is None:
        return Verdict(name, "NOT KNOWN", "The spread of features was not logged.")
    cosine = max(0.0, 1 - value**2)
    text = f"Feature spread {value:.3f}: two images have a cosine of about {cosine:.3f}"
    limits = f"1 is in all directions, 0 is one point. LOOK below {SPREAD[0]}, BAD below {SPREAD[1]}."
    state = "BAD" if value < SPREAD[1] else "LOOK" if value < SPREAD[0] else "OK"
    return Verdict(name, state, f"{text}. {limits}")


def rank_health(lines: Sequence[StepMetrics], facts: Facts) -> Verdict:
    name, value = "Do features use many directions?", recent(lines, "effective_rank")
    if value is None:
        return Verdict(name, "NOT KNOWN", "The effective rank was not logged.")
    bounds = [bound for bound in (facts.width, facts.features) if bound]
    if not bounds:
        return Verdict(name, "NOT KNOWN", f"Effective rank {value:.1f}; the most possible is not known.")
    most, highest = min(bounds), max(values(lines, "effective_rank"))
    text = f"Effective rank {value:.1f} of at most {most}"
    if most == facts.features:
        of_one = "of a batch of one process" + ("" if facts.processes else ", if there was one")
        text += f" (rows {'of a step' if facts.whole_steps else of_one})"
    limits = f"LOOK below {as_percent(RANK[0])} of that or {as_percent(RANK_LOST)} of its own peak"
    limits += f", BAD below {as_percent(RANK[1])}"
    if value < max(RANK[1] * most, ONE):
        reason = "one direction tells all images apart" if value < ONE else "hardly any directions"
        return Verdict(name, "BAD", f"{text}: {reason}. {limits} (or {ONE}).")
    if value < RANK[0] * most:
        return Verdict(name, "LOOK", f"{text}: few directions. {limits}.")
    if value < RANK_LOST * highest:
        return Verdict(name, "LOOK", f"{text}, fallen from {highest:.1f}: directions die out. {limits}.")
    return Verdict(name, "OK", f"{text}. {limits}.")


def position(lines: Sequence[StepMetrics], facts: Facts) -> Verdict:
    """Judge positional collapse: features or clusters that tell the position of a patch and not what is
    there.
    """
    name = "Do patches tell content, not position?"
    known = recent(lines, "clustering/position_information")
    clusters = (facts.prototypes or {}).get("clustering")
    if known is not None and clusters and facts.positions and facts.positions > 1:
        bound = math.log(min(clusters, facts.positions))
        fraction, (look, bad) = known / bound, INFORMATION
        told = f"{known:.3f} of at most {bound:.2f} nats of a patch's cluster ({as_percent(fraction, 1)})"
        text = f"Position tells {told}"
        return _fraction_verdict(name, text, fraction, look, bad)
    overall, content = recent(lines, "targets/std"), recent(lines, "targets/content_std")
    if overall is not None and content is not None and overall > 0:
        fraction = 1 - min(content / overall, 1.0) ** 2
        text = f"Position explains {as_percent(fraction, 1)} of the variance of the teacher's patches"
        return _fraction_verdict(name, text, fraction, *POSITION)
    if facts.position_fraction is not None:
        return _measured_position(name, *facts.position_fraction, facts.position_images)
    return Verdict(
        name, "NOT KNOWN", "The method does not log it, and no images or no encoder to measure it on."
    )


def _measured_position(name: str, trained: float, fresh: float | None, images: int | None) -> Verdict:
    """Aligned images, such as faces, let position explain much without any collapse, also when untrained."""
    text = f"Position explains {as_percent(trained, 1)} of the variance of the encoder's patches"
    text += "" if images is None else f" of {images} images"
    if images is not None and images < POSITION_FROM:
        return Verdict(name, "NOT KNOWN", f"{text}: too few, {POSITION_FROM} are needed.")
    if fresh is None:
        return _fraction_verdict(name, text, trained, *POSITION)
    excess = (trained - fresh) / (1 - fresh) if fresh < 1 else 0.0
    left = as_percent(max(excess, 0.0), 1)
    text += f", {as_percent(fresh, 1)} untrained: {left} of what was left to explain"
    return _fraction_verdict(name, text, excess, *POSITION)


def _fraction_verdict(name: str, text: str, fraction: float, look: float, bad: float) -> Verdict:
    state = "BAD" if fraction >= bad else "LOOK" if fraction >= look else "OK"
    return Verdict(name, state, f"{text}. LOOK from {as_percent(look)}, BAD from {as_percent(bad)}.")


def finite(lines: Sequence[StepMetrics], facts: Facts) -> Verdict:
    name = "Was every step finite?"
    if not lines:
        return Verdict(name, "NOT KNOWN", "No step was logged.")
    trained = [line for line in lines if "loss" in line]
    losses = sum(line["loss"] is None for line in trained)
    norms = sum(line.get("grad_norm", 0.0) is None for line in trained)
    skipped = sum("gradients are not finite" in note for note in facts.notes)
    if any("gradients were not finite in" in note for note in facts.notes):
        return Verdict(name, "BAD", "Training gave up: gradients were not finite in several steps in a row.")
    if trained and trained[-1]["loss"] is None:
        return Verdict(name, "BAD", "The last loss that was logged is not finite.")
    fraction = max(losses, norms) / max(len(trained), 1)
    text = f"{losses} losses and {norms} gradient norms of {len(trained)} logged steps are not finite"
    limits = f"LOOK from the first, BAD from the second that are {as_percent(NOT_FINITE)} of the logged steps"
    if facts.precision == "fp16" and not losses:
        state = "OK" if fraction < OVERFLOW else "LOOK"
        why = f"with precision=fp16 gradients overflow now and then. LOOK from {as_percent(OVERFLOW)}"
        return Verdict(name, state, f"{text}; {why}.")
    if fraction >= NOT_FINITE and max(losses, norms) > 1:
        return Verdict(name, "BAD", f"{text}. {limits}.")
    if skipped or losses or norms:
        return Verdict(name, "LOOK", f"{text}, and {skipped} steps left the weights as they were. {limits}.")
    return Verdict(name, "OK", f"{text}, no step was skipped. {limits}.")


def loss(lines: Sequence[StepMetrics], facts: Facts) -> Verdict:
    name, found = "Does the loss fall?", values(lines, "loss")
    if len(found) < 4:
        return Verdict(name, "NOT KNOWN", f"{len(found)} losses were logged, at least 4 are needed.")
    tenth = max(1, len(found) // 10)
    first, last = fmean(found[:tenth]), fmean(found[-tenth:])
    fraction = (first - last) / max(abs(first), 1e-12)
    text = f"From {first:.3g} in the first tenth of the log to {last:.3g} in the last"
    if fraction >= FALL:
        return Verdict(name, "OK", f"{text}. OK from a fall of {as_percent(FALL)} on.")
    if facts.fixed_targets:
        return Verdict(
            name, "BAD", f"{text}, with targets that do not move. OK from a fall of {as_percent(FALL)} on."
        )
    return Verdict(
        name,
        "LOOK",
        f"{text}. OK from a fall of {as_percent(FALL)} on. Here targets move with the teacher, so a loss "
        "may stay or rise while features improve: trust the measurements below more.",
    )


def loader(lines: Sequence[StepMetrics]) -> Verdict:
    name, found = "Does data come fast enough?", values(lines, "data_wait")
    if not found:
        return Verdict(name, "NOT KNOWN", "The time spent waiting for data was not logged.")
    if len(found) < 2:  # the first line has the start of the workers in it
        return Verdict(
            name, "NOT KNOWN", "Too few steps were logged to tell it from the start of the workers."
        )
    fraction = fmean(found[1:])
    state = "BAD" if fraction >= WAIT[1] else "LOOK" if fraction >= WAIT[0] else "OK"
    text = f"{as_percent(fraction, 1)} of the time was spent waiting for data"
    text += f". LOOK from {as_percent(WAIT[0])}, BAD from {as_percent(WAIT[1])}."
    more = " More loader.workers, or smaller files on a faster disk help."
    return Verdict(name, state, text + (more if state != "OK" else ""))


def readable(lines: Sequence[StepMetrics]) -> Verdict:
    name, found = "Could all images be read?", values(lines, "bad_images")
    if not found:
        return Verdict(name, "NOT KNOWN", "Unreadable images were not counted.")
    bad = int(max(found))
    if bad:
        return Verdict(
            name, "LOOK", f"{bad:,} could not, and were replaced by others; log.txt names them. LOOK from 1."
        )
    return Verdict(name, "OK", "None had to be replaced. LOOK from 1.")
