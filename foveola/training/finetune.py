"""Fine-tuning: a run whose method is a task, measured on test data while it trains."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from foveola.config import ConfigError, merge, nearest
from foveola.tasks.task import TaskConfig
from foveola.training.auto.plan import AUTO
from foveola.training.planned import TEST
from foveola.training.recipe import RunConfig, nested, resolve
from foveola.training.run import Run, pretrain

EVERY = "10 %"  # the time between two of them, unless it is given


def finetune(recipe: str | Path, *, callbacks: Sequence[Any] = (), test: Any = None, **overrides: Any) -> Run:
    """Train an encoder and a head for a task, as a recipe says, or go on with the run in its folder.

    It is `pretrain` with a recipe whose method is a task. The encoder folder of the run holds the head, so
    that `foveola.load(run).predict(image)` answers.

    Args:
        recipe: name, or YAML path.
        callbacks: as of `pretrain`.
        test: annotated data (a data string, or a source) on which the protocol of the task measures, every
            tenth of the run unless `evaluations.test.every` says otherwise; encoders/best is the best of
            them.
        overrides: any key of `RunConfig`, as of `pretrain`: `data` are annotated images, `init` the weights
            to start from; without them the encoder starts fresh.

    Raises UserError as `pretrain` does, and ConfigError for a recipe whose method is no task.
    """
    return pretrain(recipe, callbacks=callbacks, **with_test(recipe, overrides, test))


def with_test(recipe: str | Path, overrides: dict[str, Any], test: Any) -> dict[str, Any]:
    """Return what is laid over a recipe, with the evaluation on `test` if there is any.

    Raises ConfigError for a recipe whose method is no task, and for what is next to `test` by its name.
    """
    if recipe == AUTO:
        raise ConfigError(
            "auto chooses how to pretrain, and knows no costs of heads: name a recipe of fine-tuning "
            "(`foveola finetune --help` lists them); --dry-run measures its step, heads and windows included "
            "and says what helps where memory is short"
        )
    known = [each.name for each in fields(RunConfig)]
    for given in overrides:
        if given not in known and nearest(given, [*known, "test"]) == "test":
            raise ConfigError(f"unknown key {given!r}; did you mean 'test'?")
    name = (
        nested({k: v for k, v in overrides.items() if k.startswith("method")}).get("method", {}).get("name")
    )
    protocol = protocol_of(resolve(recipe, {} if name is None else {"method.name": name}))
    if test is None:
        return overrides
    where = f"evaluations.{TEST}"
    asked = nested({f"{where}.protocol": protocol, f"{where}.every": EVERY})
    return merge(asked, nested(overrides)) | {f"{where}.test": test}


def protocol_of(config: RunConfig) -> str:
    """Return the protocol that measures a task. Raises ConfigError where the method is none."""
    if not isinstance(config.method, TaskConfig):
        raise ConfigError(
            f"recipe {config.recipe!r} learns without annotations: foveola pretrain {config.recipe}; "
            "`foveola recipes` lists those of fine-tuning"
        )
    return config.method.protocol
