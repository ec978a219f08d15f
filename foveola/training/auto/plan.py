"""A plan of a run: choices in their order, what the user said instead of any, and what it costs."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from foveola.config import to_dict
from foveola.methods.capi import CapiConfig
from foveola.methods.distillation import DistillationConfig
from foveola.models.encoder import EncoderConfig
from foveola.training.auto import choices
from foveola.training.auto.choices import MODELS, Decision
from foveola.training.auto.cost import cost_of, seconds_on, too_large, weights_of
from foveola.training.auto.facts import Budget, DataFacts, Machine
from foveola.training.durations import plan
from foveola.training.recipe import RunConfig, nested, resolve, with_changes

AUTO = "auto"
TRAINED = {method: f"{method}-small" for method in ("odis", "ibot", "dinov2", "capi", "mae")}
ADAPTED = {method: f"{method}-vits14-adapt" for method in ("odis", "dinov2", "capi")}
ADAPTED["mae"] = "mae-vits16-adapt"
FIT = 2**20  # rows that no plan has
MEASURED_ON = 1000  # images of an evaluation on the way


@dataclass(frozen=True)
class PlanLine:
    """One decision of a plan."""

    key: str
    value: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What is to be run and why. `config` is complete: the run needs nothing else."""

    config: RunConfig
    lines: list[PlanLine]
    expected: dict[str, str]
    title: str = ""

    def table(self) -> str:
        """Return the plan for people: a key, its value and the reason in each line, then what to expect."""
        wide = max(len(line.key) for line in self.lines)
        values = min(max(len(line.value) for line in self.lines), 30)
        lines = [f"{line.key:<{wide}}  {line.value:<{values}}  {line.reason}" for line in self.lines]
        lines += [f"{name:<{wide}}  {text}" for name, text in self.expected.items()]
        return "\n".join([self.title, *lines] if self.title else lines)


@dataclass(frozen=True)
class PlannedStart:
    """The weights that a plan starts from: their name, why these, and the encoder that they are."""

    name: str
    reason: str
    encoder: EncoderConfig


@dataclass
class _Maker:
    """The changes to a recipe, in order; what the user gave stays as given."""

    recipe: str
    overrides: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    lines: list[PlanLine] = field(default_factory=list)
    shaped: dict[str, Any] | None = None  # the recipe as its starting weights change it

    def put(self, key: str, choice: Decision) -> Any:
        """Take a choice for a key, unless the user gave it; returns what stands there now."""
        if key in self.overrides:
            self.lines.append(PlanLine(key, str(self.overrides[key]), "as you said"))
            return self.overrides[key]
        self.changes[key] = choice.value
        self.lines.append(PlanLine(key, str(choice.value), choice.reason))
        return choice.value

    def quietly(self, key: str, value: Any) -> None:
        """Set a key that follows from others, unless the user gave it."""
        if key not in self.overrides:
            self.changes[key] = value

    def built(self, **more: Any) -> RunConfig:
        """Return the recipe with all changes so far. Raises ConfigError where they do not go together."""
        changes = self.changes | self.overrides | more
        if "init" not in changes:
            return resolve(self.recipe, nested(changes))
        shaped = self.shaped
        if shaped is None:  # the weights are read this once
            shaped = self.shaped = to_dict(resolve(self.recipe, nested(changes)))
        return with_changes(shaped, nested({k: v for k, v in changes.items() if k != "init"}))


def plan_run(
    data: DataFacts,
    machine: Machine,
    budget: Budget,
    overrides: dict[str, Any],
    start: PlannedStart | None = None,
) -> Plan:
    """Return a plan.

    Args:
        overrides: what the user gave, by full paths ("model.size"); it stays as it is, `data` among it.
        start: the weights to start from; None: from nothing.

    Raises ConfigError where what was given cannot be had.
    """
    token = None if start is None else start.encoder.model.class_token
    method = choices.choose_method(data, token, overrides.get("method.name"))
    family = str(method.value)
    maker = _Maker((TRAINED if start is None else ADAPTED)[family], overrides)
    maker.lines.append(PlanLine("recipe", maker.recipe, method.reason))
    if machine.device != "cpu":  # before anything is built, as `sharding.gather=bf16` asks for it
        maker.put("precision", choices.choose_precision(machine))
    _choose_start(maker, start)
    _choose_views(maker, data, machine, start)
    batch = maker.put("batch_size", choices.choose_batch(data, machine, family))
    if start is None:
        _choose_model(maker, data, machine, budget, batch)
    if machine.device == "cpu":
        maker.put("precision", choices.choose_precision(machine, maker.built().model.shape[0]))
    config = maker.built()
    need = cost_of(config).activations, weights_of(config)
    parts = maker.put("accumulate", choices.choose_parts(batch, machine.processes, *need, machine.memory))
    _choose_prototypes(maker, config, batch // parts, data)
    seconds = batch * seconds_on(maker.built(), machine)
    steps = _choose_length(maker, budget, seconds, data, batch, start is not None)
    if start is None and family != "mae":
        maker.put("method.momentum.value", choices.choose_momentum(steps))
    maker.put("loader.workers", choices.choose_workers(machine))
    often = f"{choices.often(steps, 20, 60 / seconds)} steps"
    maker.put("checkpoint_every", Decision(often, "an interruption costs no more than that"))
    often = f"{choices.often(steps, 10, 120 / seconds)} steps"
    _choose_evaluation(maker, data, often, start is not None)
    config = maker.built(recipe=AUTO, **{"about.budget": budget.text})
    seen = steps * batch
    time = choices.duration_text(steps * seconds)
    memory = need[1] + batch / parts / machine.processes * need[0]
    expected = {
        "time": f"about {time} of training on {machine.name}, by arithmetic; --dry-run measures it",
        "memory": f"about {memory / 2**30:.1f} of {machine.memory / 2**30:.0f} GiB",
        "images seen": f"{seen:,}: {seen / data.images:,.3g} passes over {data.images:,} images",
        "expect": choices.expectation(data, start is not None, seen),
    }
    if large := too_large(config, batch / parts / machine.processes, machine.memory, machine.name):
        expected["too large"] = large
    if short := choices.too_short(steps, seconds):
        expected["budget"] = short
    return Plan(config, maker.lines, expected)


def _choose_start(maker: _Maker, start: PlannedStart | None) -> None:
    if start is None:
        none = "no weights were named, and none are on this machine: training starts from nothing"
        maker.lines.append(PlanLine("init", "none", none))
    else:
        maker.quietly("init", start.name)
        maker.lines.append(PlanLine("init", start.name, start.reason))


def _choose_views(maker: _Maker, data: DataFacts, machine: Machine, start: PlannedStart | None) -> None:
    patch = None if start is None else start.encoder.model.patch_size
    (side, patch), why = choices.choose_view(data, machine, maker.overrides.get("model.patch_size", patch))
    side = maker.put("views.global_size", Decision(side, why))
    if start is not None and start.encoder.model.class_token:  # CAPI has none
        if machine.device == "cpu":
            maker.put("views.local_count", Decision(0, "local views take half of the time of a CPU"))
        elif maker.overrides.get("views.local_count") != 0:
            maker.quietly("views.local_size", choices.choose_local(side, patch))
    if start is None:
        maker.put("model.patch_size", Decision(patch, f"{(side // patch) ** 2} patches of a view"))
        if maker.built().model.positions != "rope":  # which fit any size
            maker.quietly("model.image_size", side)
    canvas = Decision(min(max(side, data.side), 2 * side, 512), "views are cut out of images of this size")
    drawn = maker.put("loader.canvas", canvas)
    if maker.built().views.objects is not None:
        maker.quietly("loader.mask_canvas", min(drawn, 128))
    if not {"transform"} & {key.partition(".")[0] for key in maker.overrides}:
        whole = {"transform.resize": side, "transform.crop": side}  # such images have no margin to cut off
        maker.changes |= whole if data.side <= side else {"transform": None}
    if data.gray and maker.built().views.color.jitter:
        for key in ("saturation", "hue"):
            maker.put(f"views.color.{key}", Decision(0.0, "the images are gray"))


def _choose_model(maker: _Maker, data: DataFacts, machine: Machine, budget: Budget, batch: int) -> None:
    """The largest network that the images can fill and the budget can train."""
    if not any(key in maker.overrides for key in ("model.size", "model.width", "model.depth")):
        chosen, why = "micro", "the smallest: the budget is short"
        for name, (keys, worth) in MODELS.items():
            trial = maker.built(**{f"model.{key}": value for key, value in keys.items()})
            precision = choices.choose_precision(machine, trial.model.shape[0]).value
            trial = (
                trial if "precision" in maker.overrides else dataclasses.replace(trial, precision=precision)
            )
            seen = worth
            if budget.seconds is not None:
                seen = 0.9 * budget.seconds / seconds_on(trial, machine)
            if data.images >= choices.FEWEST[name] and seen >= worth:
                chosen = name
                why = f"{data.images:,} images, about {seen:,.0f} of them seen within the budget"
        keys, _ = MODELS[chosen]
        maker.changes |= {f"model.{key}": value for key, value in keys.items()}
        maker.lines.append(PlanLine("model", ", ".join(f"{k}={v}" for k, v in keys.items()), why))
    maker.put("optimizer.lr.value", choices.choose_rate(maker.built().model.shape[0], batch))


def _choose_prototypes(maker: _Maker, config: RunConfig, at_once: int, data: DataFacts) -> None:
    """Choose as many prototypes as rows of a part of a step can fill, over all processes."""
    method = config.method
    if isinstance(method, CapiConfig):
        count = config.views.global_count * at_once
        maker.put("method.clustering.prototypes", choices.choose_prototypes(count, data.images))
    if not isinstance(method, DistillationConfig):
        return
    rows: dict[str, float] = dict.fromkeys(method.used_heads(), FIT)
    patches = (config.views.global_size // config.model.patch_size) ** 2
    masks = config.views.masking
    for name, term in method.terms().items():
        count = float(config.views.global_count)
        if name == "patch" and masks is not None:
            count *= masks.probability * sum(masks.ratio) / 2 * patches
        for head in method.known[name].heads(term):
            rows[head] = min(rows[head], count * at_once)
    for head, count in rows.items():
        maker.put(f"method.heads.{head}.prototypes", choices.choose_prototypes(int(count), data.images))


def _choose_length(
    maker: _Maker, budget: Budget, seconds: float, data: DataFacts, batch: int, adapting: bool
) -> int:
    """The duration; returns it in steps."""
    if budget.duration is not None:
        choice = Decision(budget.duration, "the budget")
    else:
        steps, why = choices.choose_length(budget.seconds, seconds, data, batch, adapting)
        choice = Decision(f"{steps} steps", why)
    maker.put("duration", choice)
    return plan(maker.built(), data.images).total_steps


def _choose_evaluation(maker: _Maker, data: DataFacts, every: str, adapting: bool) -> None:
    """k-NN where the images have labels, with others or among themselves; else what needs no labels."""
    own = [key for key in ("evaluate_train", "evaluate_test") if maker.overrides.get(key) is not None]
    if data.labels < 2 and not own:
        if not any(key.partition(".")[0] in ("evaluations", "evaluate_every") for key in maker.overrides):
            settings = {"protocol": "label_free", "every": every, "settings": {"limit": MEASURED_ON}}
            maker.changes["evaluations"] = {"label_free": settings}
            why = f"no labels: rank, uniformity and retrieval of views, each {every}"
            maker.lines.append(PlanLine("evaluations", "label_free", why))
        return
    labels = f"the labels of {' and '.join(own)}" if own else f"the {data.labels} labels"
    why = f"k-NN by {labels} says whether it helps; training sees no label"
    if maker.put("evaluate_every", Decision(every, why)) is None:
        return
    maker.quietly("evaluate.limit", 2 * MEASURED_ON)
    if not data.test and not own:  # the images are queries of each other
        maker.quietly("evaluate.exclude_self", True)
    if adapting:
        maker.put(
            "stop_when_worse", Decision(True, "ends where it hurts beyond its interval; encoders/best stays")
        )
