"""What a user asks of `auto`: the plan of a new run, or that of the run which is already there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from foveola import distributed
from foveola.config import ConfigError, UserError, build, merge, nearest, parse_overrides, read_yaml, renewed
from foveola.data.identity import saying
from foveola.data.sources import OBJECT, Source, as_source
from foveola.files import RunFolder
from foveola.training.auto.facts import budget_of, look_at_data, look_at_machine, weights_at_hand
from foveola.training.auto.plan import AUTO, Plan, PlannedStart, plan_run
from foveola.training.recipe import RunConfig, nested, with_changes
from foveola.trees import flat
from foveola.zoo.load import load

USUAL_BUDGET = "1 hour"
FRESH = ("none", "null", "scratch")  # values of init= that ask for fresh weights


def request(overrides: list[str] | dict[str, Any] | None = None, source: Source | None = None) -> RunConfig:
    """Return the configuration that `foveola pretrain auto` runs, and print the plan on the first process.

    Arguments and errors are those of `make_plan`, in whichever form of `key=value`. A run that was planned
    for the same request, in `out` or unfinished below runs/, goes on by its own plan.
    """
    changes, budget = _read(overrides)
    with distributed.joined(str(changes.get("device", "auto"))) as device:
        if (before := _planned_before(changes, budget)) is not None:
            return before
        made = distributed.on_main(lambda: _plan(changes, budget, str(device), source))
    if distributed.is_main():
        print(made.table(), flush=True)
    return made.config


def make_plan(data: Source | str, **overrides: Any) -> Plan:
    """Return the plan of `foveola pretrain auto` without running it: `print(plan.table())` shows it, and
    `pretrain(plan.config)` runs it.

    Args:
        data: images to train on, a data string or a source of the caller's own. (A plan for a source is to be
            run as `pretrain("auto", data=source)`, as a configuration cannot hold it.)
        overrides: `budget="2 hours"`, `init=...`, and any key of `RunConfig`, which stays as it is.

    Raises UserError for mistakes in what is asked for, and for data of which no image can be read.
    """
    source = None if isinstance(data, str) else as_source(data, "train", "data")
    overrides, budget = _read(overrides | {"data": data if source is None else f"{OBJECT}:{source.name}"})
    with distributed.joined(str(overrides.get("device", "auto"))) as device:
        return distributed.on_main(lambda: _plan(overrides, budget, str(device), source))


def _read(overrides: list[str] | dict[str, Any] | None) -> tuple[dict[str, Any], str | None]:
    """What the user says, by full paths, and the budget."""
    tree = nested(overrides) if isinstance(overrides, dict) else parse_overrides(overrides or [])
    budget = tree.pop("budget", None)
    known = [*RunConfig.__dataclass_fields__, "budget"]
    for name in tree:
        if name not in known and nearest(name, known) == "budget":
            raise ConfigError(f"unknown key {name!r}; did you mean 'budget'?")
    if tree.get("data") is None:
        raise ConfigError("pretrain auto needs data=..., for example data=folder:/my/images")
    return flat(tree), None if budget is None else str(budget)


def _plan(overrides: dict[str, Any], budget: str | None, device: str, source: Source | None) -> Plan:
    """The plan of a new run: made by one process, as what others time differs."""
    asked = budget_of(budget or USUAL_BUDGET, distributed.world_size())
    with saying(True):
        images = as_source(source or overrides["data"], "train", "data")
        data = look_at_data(images, _test_split(overrides["data"], images) if source is None else None)
    start = _start(overrides)
    if start is None:
        overrides = {key: value for key, value in overrides.items() if key != "init"}
    made = plan_run(data, look_at_machine(device), asked, overrides, start)
    about = f"plan for {data.images:,} images and a budget of {asked.text}"
    about += " (none was given: budget='8 hours' trains longer)" if budget is None else ""
    return replace(made, title=about)


def _test_split(data: str, images: Source) -> Source | None:
    """The test images of a data string, where they are others than those to train on."""
    try:
        found = as_source(data, "test", "data")
    except UserError:  # it lacks that part, which training does not need
        return None
    return None if found.name == images.name else found


def _start(overrides: dict[str, Any]) -> PlannedStart | None:
    """The weights that the user names, or the first public ones on this machine that can be loaded."""
    name = overrides.get("init")
    if "init" in overrides and (name is None or str(name) in FRESH):
        return None
    if name is not None:
        return PlannedStart(str(name), "as you said", load(str(name)).config)
    for found in weights_at_hand():
        try:
            encoder = load(found)
        except UserError:  # a library is missing, or the file is damaged: not at hand
            continue
        return PlannedStart(
            found, "public weights on this machine; init=none trains from nothing", encoder.config
        )
    return None


def _planned_before(overrides: dict[str, Any], budget: str | None) -> RunConfig | None:
    """The configuration of a run that was planned for the same request: in `out`, or the newest in runs/."""
    if overrides.get("out") is not None:
        folders = [Path(str(overrides["out"])).expanduser()]
    else:
        folders = sorted(Path("runs").glob(f"{AUTO}-*/"), reverse=True)
    asked = {key: value for key, value in overrides.items() if key not in ("out", "device")}
    if asked.get("init") in FRESH:
        del asked["init"]
    for path in (RunFolder(folder).config for folder in folders):
        if not path.is_file():
            continue
        try:
            tree = renewed(read_yaml(path))
            there, now = build(RunConfig, tree), with_changes(tree, nested(asked))
        except ConfigError:  # of another version, or not a plan: choosing the folder says what is wrong
            continue
        if there.recipe == AUTO and there == now and budget in (None, there.about.budget):
            return build(
                RunConfig, merge(tree, {k: overrides[k] for k in ("out", "device") if k in overrides})
            )
    return None
