"""On which device encoders run that are loaded for pictures and reports."""

import torch

from foveola.config import UserError


def device_of(device: str | torch.device | None) -> torch.device:
    """`cpu`, `cuda`, `cuda:1`; None and `auto`: a GPU if there is one. UserError where it is not there."""
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"no such device: {str(device)!r}; known: auto, cpu, cuda, cuda:0, ...") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"no GPU with index {chosen.index or 0}: this machine shows {torch.cuda.device_count()}"
        )
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"device={chosen}: expected auto, cpu, cuda or cuda:0, ...")
    return chosen
