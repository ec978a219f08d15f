"""Maps from a trained AbMILP probe (Selective Aggregation): how much of each patch it reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import gelu, relu

from foveola.config import UserError
from foveola.models.encoder import Encoder

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu, "tanh": torch.tanh}
HINT = "`foveola evaluate abmilp` keeps results/abmilp/probe.safetensors in a run"

ProbeMaps = Callable[[Float[Tensor, "B N D"]], Float[Tensor, "B N"]]


def probe_maps(path: str, encoder: Encoder) -> ProbeMaps:
    """Return the weights of patches of the first AbMILP probe in a file that an evaluation has kept.

    A score of each patch by the probe's linear maps, a softmax over the patches of each head, the mean over
    heads. Raises UserError for another file, a probe of another encoder, and one whose scores read all
    patches (attention=true).
    """
    about, tensors = _read(Path(path).expanduser(), path)
    if about.get("encoder") != (mine := encoder.fingerprint()):
        own = about.get("encoder")
        raise UserError(f"probe={path} was trained on another encoder ({own}, this one is {mine})")
    named = ((n, g) for n, g in about.get("groups", {}).items() if g.get("kind") == "abmilp")
    group, own = next(named, ("", None))
    if own is None:
        raise UserError(f"probe={path} has no AbMILP probe: {HINT}")
    shape = own["shape"]
    if shape.get("attention"):
        raise UserError(f"probe={path}: method=abmilp takes probes with attention=false")
    depth, activation = shape["depth"], ACTIVATION_FUNCTIONS[shape["activation"]]
    parts = [tensors[f"{group}.trained_{i}"].to(encoder.device) for i in range(2 * depth)]

    def maps(patches: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
        x = patches.float()
        for layer in range(depth):
            x = activation(x) if layer else x
            x = x @ parts[2 * layer].mT + parts[2 * layer + 1]
        return x.softmax(dim=1).mean(dim=2)

    return maps


def _read(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"probe={name}: there is no such file; {HINT}")
    try:
        with safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get("foveola_probe")
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        about = json.loads(text) if text else None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"probe={name} cannot be read ({error})") from error
    if not isinstance(about, dict):
        raise UserError(f"probe={name} is no trained probe: {HINT}")
    return about, tensors
