"""Objects of the caller's own that `pretrain` tells of the steps, checkpoints and evaluations of a run."""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from foveola import distributed
from foveola.config import UserError, kind_of, nearest

EVENTS = {
    "on_step": "metrics",
    "on_checkpoint": "folder",
    "on_evaluation": "result",
}  # called with (step, it)


class Callbacks:
    """The callbacks of a run, checked. Only the first process calls them, each in its order.

    Raises UserError for an object that has none of `EVENTS`, or one that does not take two arguments.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        if not isinstance(objects, list | tuple):
            raise UserError(f"callbacks: expected a list of objects, got {kind_of(objects)}")
        for each in objects:
            _check(each)
        self.objects = tuple(objects)

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Take note that a step was logged: after it, with what metrics.jsonl has of it."""
        self._tell("on_step", step, dict(metrics))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Take note that the checkpoint of a step is whole, in this folder, and `encoder/` of the run is of
        that step.
        """
        self._tell("on_checkpoint", step, folder)

    def on_evaluation(self, step: int, result: Any) -> None:
        """Take note that the encoder of a step was measured (`evaluate_every`); a `foveola.Result`."""
        self._tell("on_evaluation", step, result)

    def _tell(self, event: str, step: int, what: Any) -> None:
        if distributed.is_main():
            for each in self.objects:
                if hasattr(each, event):
                    getattr(each, event)(step, what)


def _check(each: Any) -> None:
    """Raise UserError for an object that could not be called when it is too late."""
    what = f"callbacks: {kind_of(each)}"
    if isinstance(each, type):
        raise UserError(f"callbacks: {each.__name__} is a class: pass an object, {each.__name__}()")
    for name in dir(each):
        if name.startswith("on_") and name not in EVENTS:
            near = nearest(name, EVENTS)
            hint = f"did you mean {near}?" if near else f"what is called: {', '.join(EVENTS)}"
            raise UserError(f"{what} has {name}, which is never called; {hint}")
    found = [event for event in EVENTS if hasattr(each, event)]
    if not found:
        raise UserError(f"{what} has none of {', '.join(EVENTS)}")
    for event in found:
        try:
            signature(getattr(each, event)).bind(0, None)
        except (TypeError, ValueError) as error:
            raise UserError(f"{what} needs {event}(step, {EVENTS[event]}): {error}") from error
