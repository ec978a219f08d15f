"""k-NN evaluations of a run while it trains."""

from pathlib import Path

from foveola import distributed
from foveola.config import ConfigError, to_dict
from foveola.data.sources import Source, as_source
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.features.overlap import separate
from foveola.evaluation.result import Result
from foveola.files import RunFolder
from foveola.models.encoder import Encoder
from foveola.training.log import Log
from foveola.training.recipe import RunConfig


class Evaluations:
    """Every `every` steps, and after the last of `total`; never where `every` is None.

    Their data are opened at once: mistakes show now, not hours later. `own` are sources of the caller's.
    """

    def __init__(self, config: RunConfig, every: int | None, total: int, own: dict[str, Source]) -> None:
        self.config, self.every, self.total = config, every, total
        self.labelled = None if every is None else _labelled(config, own)
        self.said: set[str] = set()

    def due(self, step: int) -> bool:
        """Return whether there is one after this step."""
        return self.every is not None and (step % self.every == 0 or step == self.total)

    def missed(self, folder: Path, step: int) -> bool:
        """Return whether the run in `folder` ended between its checkpoint of `step` and the evaluation
        of it.
        """
        return bool(step) and self.due(step) and not distributed.on_main(lambda: _has(folder, step))

    def run(self, encoder: Encoder, step: int, log: Log) -> Result:
        """Measure, log, and say once what is to be said of it."""
        assert self.labelled is not None
        train, test = self.labelled
        settings = to_dict(self.config.evaluate)
        result = evaluate(encoder, "knn", train=train, test=test, progress=False, **settings)
        for text in result.notes:
            if text not in self.said:
                log.note(f"knn: {text}")
        self.said.update(result.notes)
        log.step(step, {f"knn/{name}": value for name, value in result.metrics.items()})
        return result


def _has(folder: Path, step: int) -> bool:
    """Whether the metrics of a run hold an evaluation of this step."""
    lines = RunFolder(folder).read_metrics()
    return any(line["step"] == step and any(name.startswith("knn/") for name in line) for line in lines)


def _labelled(config: RunConfig, own: dict[str, Source]) -> tuple[Source, Source]:
    given = {
        "data": config.data,
        "evaluate_train": config.evaluate_train,
        "evaluate_test": config.evaluate_test,
    }
    given |= own
    train = given["evaluate_train"] or given["data"]
    test = given["evaluate_test"] or train
    sources = as_source(train, "train", "evaluate_train"), as_source(test, "test", "evaluate_test")
    for name, source in zip(("evaluate_train", "evaluate_test"), sources, strict=True):
        if source.classes is None:
            raise ConfigError(f"{name}: {source.name} has no labels, which evaluate_every needs")
    remedies = "set evaluate_test= to images that training does not see, or evaluate.exclude_self=true"
    separate("evaluate_every", config.evaluate, *sources, otherwise=remedies)
    return sources
