"""The list of protocols, `evaluate()`, and the `Result` that it writes."""

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import foveola
from foveola import distributed
from foveola.config import UserError, build, nearest, to_dict
from foveola.data.sources import Source, open_source
from foveola.evaluation import knn, retrieval
from foveola.evaluation.metrics import Outcome
from foveola.models.encoder import Encoder, load


@dataclass(frozen=True)
class Protocol:
    """A way to measure an encoder: its settings, what runs it, whether it needs labelled training data."""

    config: type
    run: Callable[[Encoder, Any, Source, Any, bool], Outcome]
    needs_train: bool
    help: str


PROTOCOLS = {
    "knn": Protocol(
        knn.KnnConfig, knn.run, True, "k-NN classification by weighted vote, with and without object masks"
    ),
    "retrieval": Protocol(
        retrieval.RetrievalConfig,
        retrieval.run,
        False,
        "find the other crop of an object among those of others",
    ),
}


@dataclass(frozen=True)
class Result:
    """What one evaluation found, with everything needed to repeat it. Shares are in percent."""

    protocol: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    data: dict[str, Any]
    encoder: str
    versions: dict[str, str]
    date: str
    seconds: float
    notes: tuple[str, ...] = field(default=())

    def save(self, folder: str | Path) -> Path:
        """Write `folder/results/<protocol>.json`, replaced whole, and return its path."""
        path = Path(folder) / "results" / f"{self.protocol}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Result":
        """The result that `save` wrote. Raises UserError for a file that holds none."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**tree, "notes": tuple(tree["notes"])})
        except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no result of an evaluation: {error}") from error

    def table(self) -> str:
        """Metrics as aligned plain text, then the notes."""
        wide = max(len(name) for name in self.metrics)
        lines = [f"{name:<{wide}}  {value:8.2f}" for name, value in self.metrics.items()]
        head = f"{self.protocol}: {self._data_line()}, {self.seconds:.1f} s"
        return "\n".join([head, *lines, *(f"note: {note}" for note in self.notes)])

    def _data_line(self) -> str:
        sets = {which: facts for which, facts in self.data.items() if isinstance(facts, dict)}
        return ", ".join(
            f"{which} {facts['name']} ({facts.get('rows', facts.get('objects'))} rows)"
            for which, facts in sets.items()
        )


def evaluate(
    model: Encoder | str | Path,
    protocol: str,
    *,
    train: Source | str | None = None,
    test: Source | str | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Measure a frozen encoder by one of `PROTOCOLS`. All ranks call it; all get the result.

    Args:
        model: an `Encoder`, or what `foveola.load` takes. Of a run folder the encoder is measured, and the
        result is
            written to its `results/<protocol>.json`.
        train, test: data strings (opened with the split of that name) or sources; `train` where the protocol
        needs it. out: folder for `results/<protocol>.json`; by default the run folder, if the model is one.
        device: where a model that is loaded runs; by default a GPU if there is one. An `Encoder` stays where
        it is. settings: keys of the protocol's configuration, such as `k=(20,)`, `rows="objects"`.

    Raises UserError for unknown protocols and keys, bad values, data without what the protocol needs, and
    encoders whose features are not finite.
    """
    if protocol not in PROTOCOLS:
        near = nearest(protocol, PROTOCOLS)
        raise UserError(
            f"unknown protocol {protocol!r}; "
            + (f"did you mean {near!r}?" if near else f"known: {', '.join(PROTOCOLS)}")
        )
    chosen = PROTOCOLS[protocol]
    config = build(chosen.config, settings)
    for name, source in {"test": test, **({"train": train} if chosen.needs_train else {})}.items():
        if source is None:
            raise UserError(f"{protocol}: {name} is needed, such as {name}=folder:/pictures")
    bank = _open(train, "train") if chosen.needs_train else None
    queries = _open(test, "test")
    encoder = model if isinstance(model, Encoder) else load(model, _device(device))
    if out is None and not isinstance(model, Encoder) and (Path(model) / "encoder" / "config.json").is_file():
        out = model
    began = perf_counter()
    outcome = chosen.run(encoder, bank, queries, config, progress)
    result = Result(
        protocol=protocol,
        settings=to_dict(config),
        metrics=outcome.metrics,
        data=outcome.data,
        encoder=encoder.fingerprint(),
        versions={
            "foveola": foveola.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(perf_counter() - began, 2),
        notes=outcome.notes,
    )
    if out is not None and distributed.is_main():
        result.save(out)
    return result


def _open(source: Source | str | None, split: str) -> Any:
    return open_source(source, split) if isinstance(source, str) else source  # type: ignore[arg-type]


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
