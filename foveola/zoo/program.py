"""An encoder, with its head, as a program of torch.export: from pixels to answers without foveola."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from foveola import files
from foveola.config import UserError, to_dict
from foveola.models.encoder import Encoder

FACTS_INSIDE = (
    "foveola.json"  # in the file: what goes in, what comes out, the names of the classes, all settings
)
PROGRAM_TOLERANCE = 1e-5  # of the program to the network, over the largest number
MOST_IMAGES = 2**16  # of a batch


class Program(nn.Module):
    """From RGB pixels of the size that the encoder expects to named tensors."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        transform, device = encoder.config.transform, encoder.device
        self.register_buffer("mean", torch.tensor(transform.mean, device=device)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.std, device=device)[:, None, None])

    def forward(self, images: UInt8[Tensor, "B 3 S S"]) -> dict[str, Tensor]:
        """Return the logits of a head, or what the encoder says without one: `embedding` and `patches`."""
        pixels = (images.float() / 255 - self.mean) / self.std
        head = self.encoder.head
        if head is not None:
            return {"logits": head.logits(self.encoder.backbone, pixels)}
        features = self.encoder(pixels)
        return {"embedding": features.objects[:, 0], "patches": features.patches}


def write_program(encoder: Encoder, out: Path) -> None:
    """Write a program to a file, which `torch.export.load(out).module()` runs.

    It takes uint8 [B, 3, S, S], RGB images as the encoder's transform cuts them (S is its crop), any B from 1
    on, and gives a dict: `logits` [B, C] of a classifier or [B, C, S, S] of a segmenter; without a head
    `embedding` [B, D], what stands for each image, and `patches` [B, N, D]. `foveola.json` inside the file
    says so, with the names of the classes.

    Raises UserError for what cannot be one program, and where the program differs from the network.
    """
    if encoder.head is not None and not hasattr(encoder.head, "logits"):
        raise UserError(
            f"a head for {encoder.head.config.name} cannot be one program, as the number of its answers "
            "depends on the image; head=false exports its encoder"
        )
    program, side = Program(encoder).eval(), encoder.config.transform.crop
    generator = torch.Generator().manual_seed(0)
    trials = [
        torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8) for n in (2, 1, 3)
    ]
    trials = [each.to(encoder.device) for each in trials]
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with torch.no_grad():
            made = torch.export.export(program, (trials[0],), dynamic_shapes=({0: batch},), strict=False)
            wanted = [program(each) for each in trials]
    except Exception as error:  # whatever torch meets in modules of others
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch.export cannot express this encoder: {first}") from error
    _compare_runs(made, trials, wanted)
    with files.whole(out) as part, part.open("wb") as file:  # by name it warns of any that lacks .pt2
        torch.export.save(
            made, file, extra_files={FACTS_INSIDE: json.dumps(_about(encoder, wanted[0]), indent=2)}
        )


@torch.no_grad()
def _compare_runs(made: Any, trials: list[Tensor], wanted: list[dict[str, Tensor]]) -> None:
    run = made.module()
    for pixels, answers in zip(trials, wanted, strict=True):
        for name, found in run(pixels).items():
            apart = float((found - answers[name]).abs().max() / answers[name].abs().max().clamp(min=1e-6))
            if not apart <= PROGRAM_TOLERANCE:
                raise UserError(
                    f"the program gives other numbers than the network: {name} differs by {apart:.1e}"
                )


def _about(encoder: Encoder, answers: dict[str, Tensor]) -> dict[str, Any]:
    side = encoder.config.transform.crop
    about: dict[str, Any] = {
        "images": f"uint8 [batch, 3, {side}, {side}], RGB, resized and cut as `encoder.transform` says",
        "gives": {name: ["batch", *value.shape[1:]] for name, value in answers.items()},
        "encoder": to_dict(encoder.config),
    }
    if encoder.head is not None:
        about |= {"classes": list(encoder.head.classes), "head": to_dict(encoder.head.config)}
    return about
