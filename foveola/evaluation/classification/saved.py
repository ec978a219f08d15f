"""Trained probes as files, `results/<protocol>/probe.safetensors`, which score other test sets later."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola import files
from foveola.config import UserError
from foveola.evaluation.classification.task import Known
from foveola.evaluation.classification.training import ChosenProbes, ProbeGrid
from foveola.evaluation.protocol import Outcome
from foveola.models.encoder import Encoder

PROBE_FORMAT = 1
PROBE = "probe.safetensors"


@dataclass(frozen=True, eq=False)
class SavedProbe:
    """The chosen probe of each group, with everything that a score needs besides the encoder.

    Attributes:
        about: what it is: `protocol`, `settings` (of the training), `encoder` (fingerprint), `known`
            (classes), `data` (facts of the training images), `notes`, and `groups`: of each the kind of grid,
            its shape and settings, and what the hold-out said.
        tensors: the numbers of each group by name, `<group>.<name>`, without the dimension of the grid.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, grids: Any, choice: ChosenProbes, outcome: Outcome, about: Mapping[str, Any]) -> "SavedProbe":
        """Return the chosen probes of trained grids, as measured in `outcome`."""
        groups, tensors = {}, {}
        for group, (i, g) in choice.probes.items():
            grid = grids[i]
            own = {
                n: t[g if len(t) > 1 else 0].detach().cpu().contiguous() for n, t in grid.tensors().items()
            }
            tensors |= {f"{group}.{name}": tensor for name, tensor in own.items()}
            groups[group] = {
                "kind": grid.kind,
                "shape": grid.shape,
                "settings": grid.settings[g],
                "holdout": outcome.metrics.get(f"holdout_{group}"),
            }
        return cls({**about, "groups": groups}, tensors)

    def save(self, path: Path) -> None:
        """Write one file, whole or not at all: tensors, and the rest as JSON in its header."""
        from safetensors.torch import save_file

        text = json.dumps({"format": PROBE_FORMAT, **self.about})
        with files.whole(path) as part:
            save_file(self.tensors, part, {"foveola_probe": text})

    @classmethod
    def load(cls, path: str | Path) -> "SavedProbe":
        """Return what `save` wrote. Raises UserError for any other file."""
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(
                f"probe={path}: there is no such file; a run keeps results/<protocol>/probe.safetensors"
            )
        try:
            with safe_open(path, "pt") as opened:
                text = (opened.metadata() or {}).get("foveola_probe")
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            about = json.loads(text) if text else None
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"probe={path} cannot be read ({error})") from error
        if not isinstance(about, dict):
            raise UserError(
                f"probe={path} is no trained probe; a run keeps results/<protocol>/probe.safetensors"
            )
        if about.pop("format", None) != PROBE_FORMAT:
            raise UserError(f"probe={path} is of another version of foveola: train it again")
        return cls(about, tensors)

    @property
    def known(self) -> Known:
        """The classes that it tells apart."""
        names, count, present = (self.about["known"][name] for name in ("names", "count", "present"))
        return Known(None if names is None else tuple(names), count, tuple(present))

    def fits(self, encoder: Encoder, protocol: str, path: str) -> None:
        """Raise UserError for another encoder than that on whose features it was trained, and for another
        protocol.
        """
        if (own := self.about["protocol"]) != protocol:
            raise UserError(f"probe={path} is of the protocol {own}: foveola evaluate {own} probe={path} ...")
        if (own := self.about["encoder"]) != (mine := encoder.fingerprint()):
            raise UserError(
                f"probe={path} was trained on another encoder ({own}, this one is {mine}): "
                "give model= the encoder that it was trained on, or train it on this one with train="
            )

    def grids(self, classes: Sequence[Any], device: torch.device) -> tuple[list[ProbeGrid], ChosenProbes]:
        """Return its probes as grids of these classes, of one probe each, which are chosen."""
        grids: list[ProbeGrid] = []
        probes = {}
        for group, own in self.about["groups"].items():
            start = f"{group}."
            tensors = {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}
            cls = next((each for each in classes if each.kind == own["kind"]), None)
            grids.append(_grid(cls, own, group, tensors, self.known.count, device))
            probes[group] = (len(grids) - 1, 0)
        return grids, ChosenProbes(probes)

    def completed(self, outcome: Outcome) -> Outcome:
        """Return an outcome with the numbers of the hold-out by which the probes were chosen."""
        found = {f"holdout_{group}": own["holdout"] for group, own in self.about["groups"].items()}
        held = {name: value for name, value in found.items() if value is not None}
        return replace(outcome, metrics=outcome.metrics | held)


def _grid(
    cls: Any,
    own: Mapping[str, Any],
    group: str,
    tensors: Mapping[str, Tensor],
    classes: int,
    device: torch.device,
) -> ProbeGrid:
    """A grid of one probe with these numbers. Raises UserError where they are not those of its kind."""
    zero, matrix = torch.zeros(1), tensors.get("query", tensors.get("weight", tensors.get("trained_0")))
    if cls is None or matrix is None:
        raise UserError(f"the probe {group} is of an unknown kind: {own['kind']}")
    rates = {"rates": zero} | ({"weight_decay": zero} if cls.kind == "attentive" else {})
    grid = cls(**rates, width=matrix.shape[-1], classes=classes, group=group, device=device, **own["shape"])
    mine = grid.tensors()
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in mine.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise UserError(f"the probe {group} is damaged: its numbers are not those of its kind")
    for name, tensor in tensors.items():
        mine[name][0].copy_(tensor)
    grid.settings = [dict(own["settings"])]
    return grid
