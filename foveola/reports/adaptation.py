"""What a run with starting weights gained and forgot, in one sentence: which encoder to use."""

from dataclasses import dataclass

from foveola.reports.progress import BEST, END, START, MeasuredRun
from foveola.reports.verdicts import MetricChange, changes

YOURS, CONTROL = "on your images", "on the control set"


@dataclass(frozen=True)
class Advice:
    """What to do after an adaptation: a state, a sentence, and the label of the network to use."""

    state: str  # HELPED, WORSE or OPEN
    sentence: str
    use: str  # START, BEST or END
    main: MetricChange | None = None  # the measurement behind it


def advise(progress: MeasuredRun, control: MeasuredRun | None) -> Advice:
    """Return what to do, by the main measurement: the better one of the best and the last encoder, if it is
    clearly better than the starting weights, and these otherwise.

    What became of the same network on the control set is said beside it.
    """
    last, best = changes(progress), changes(progress, BEST)
    found = [(label, each[0]) for label, each in ((BEST, best), (END, last)) if each]
    if not found:
        return Advice("OPEN", "Whether training helped was not measured: keep the starting weights.", START)
    sign = -1 if found[0][1].about.better == "lower" else 1
    label, main = max(found, key=lambda pair: sign * pair[1].after.value)
    if main.outcome == "better":
        text = f"Use {_named(progress, label)}: {_went(main)}{_forgotten(main, control, label)}."
        if label == BEST and last and last[0].outcome == "worse":
            text += f" The last encoder is worse than the starting weights: {_went(last[0])}."
        return Advice("HELPED", text, label, main)
    hurt = next((change for _, change in reversed(found) if change.outcome == "worse"), None)
    if hurt is not None:
        main, label = hurt, hurt.networks[1]
    start = (
        "Training hurt: keep the starting weights."
        if hurt
        else "Keep the starting weights: no gain is clear."
    )
    text = f"{start} {capital(_went(main))}{_forgotten(main, control, label)}."
    return Advice("WORSE" if hurt else "OPEN", text, START, main)


def moved(change: MetricChange) -> str:
    """Return what became of a number, as in: rose from 61.2 to 68.0 %."""
    unit = f" {change.about.unit}" * bool(change.about.unit)
    numbers = f"{change.before} to {change.after}{unit}"
    if change.outcome == "open":
        return f"did not clearly change ({numbers})"
    return f"{'rose' if change.after.value > change.before.value else 'fell'} from {numbers}"


def capital(text: str) -> str:
    """Return a sentence with a capital letter at its start, unless that belongs to a word such as k-NN."""
    return text[:1].upper() + text[1:] if text[1:2].islower() else text


def model_of(folder: object, use: str) -> str:
    """Return the name by which commands know the network with a label of a run."""
    return f"{folder}?step={ {START: 0, BEST: BEST}[use] }" if use in (START, BEST) else str(folder)


def _went(change: MetricChange) -> str:
    return f"{change.name} {YOURS} {moved(change)}"


def _forgotten(change: MetricChange, control: MeasuredRun | None, label: str) -> str:
    found = [] if control is None else changes(control, label)
    if not found:
        return "; what was forgotten was not measured"
    first = next((each for each in found if each.name == change.name), found[0])
    what = f"{CONTROL} it" if first.name == change.name else f"{first.name} {CONTROL}"
    return f"; {what} {moved(first)}"


def _named(progress: MeasuredRun, label: str) -> str:
    point = progress.point(label)
    step = "" if point is None or point.step is None else f" (step {point.step:,})"
    return f"{'encoders/best' if label == BEST else 'the last encoder'}{step}"
