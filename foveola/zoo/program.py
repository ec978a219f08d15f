"""An encoder, with its head, as a program of torch.export: from pixels to answers without foveola."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from foveola import files
from foveola.config import UserError, to_dict
from foveola.models.encoder import Encoder
from foveola.tasks.detection import encoder_map

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


class DetectorProgram(Program):
    """From RGB pixels of a square view, and where its image ends, to the objects in it."""

    def forward(self, images: UInt8[Tensor, "1 3 S S"], extent: Int64[Tensor, "2"]) -> dict[str, Tensor]:  # type: ignore[override]
        """Return boxes, labels, scores and, where they are learned, masks of boxes."""
        pixels = (images.float() / 255 - self.mean) / self.std
        return self.encoder.head.traced(self.encoder.backbone, pixels, extent)


def write_program(encoder: Encoder, out: Path) -> None:
    """Write a program to a file, which `torch.export.load(out).module()` runs.

    It takes uint8 [B, 3, S, S], RGB images as the encoder's transform cuts them (S is its crop), any B from 1
    on, and gives a dict: `logits` [B, C] of a classifier or [B, C, S, S] of a segmenter; without a head
    `embedding` [B, D], what stands for each image, and `patches` [B, N, D].

    Of a detector it takes one image, uint8 [1, 3, S, S], in the upper left of a square, and int64 [2], its
    rows and columns, and gives a dict: `boxes` [K, 4] in pixels, `labels` [K], `scores` [K] and, where they
    are learned, `masks` [K, 28, 28] of boxes, of any number K of objects, best first. `foveola.json` inside
    the file says so, with the names of the classes.

    Raises UserError for what cannot be one program, and where the program differs from the network.
    """
    made, trials, sizes = _parts(encoder)
    program = made(encoder).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*create_unbacked_symint", FutureWarning)  # of torchvision
            exported = torch.export.export(program, trials[0], dynamic_shapes=sizes, strict=False)
    except Exception as error:  # whatever torch meets in modules of others
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch.export cannot express this encoder: {first}") from error
    with torch.no_grad():
        wanted = [_answers(encoder, program, each) for each in trials]
    _compare_runs(exported, trials, wanted)
    with files.whole(out) as part, part.open("wb") as file:  # by name it warns of any that lacks .pt2
        about = {FACTS_INSIDE: json.dumps(_about(encoder, wanted[0]), indent=2)}
        torch.export.save(exported, file, extra_files=about)


def _parts(encoder: Encoder) -> tuple[type[Program], list[tuple[Tensor, ...]], Any]:
    """The program of an encoder, what it is tried on, and which of the sizes of that may vary."""
    head, device, generator = encoder.head, encoder.device, torch.Generator().manual_seed(0)

    def noise(count: int, side: int) -> Tensor:
        pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        return pixels.to(device)

    if hasattr(head, "traced"):
        side = head.side(encoder)
        extents = ((side, side), (side, side - side // 3), (side // 4, side))
        return (
            DetectorProgram,
            [(noise(1, side), torch.tensor(each, device=device)) for each in extents],
            None,
        )
    if head is not None and not hasattr(head, "logits"):
        raise UserError(
            f"a head for {head.config.name} cannot be one program, as it says neither `logits` nor `traced` "
            "answers; head=false exports its encoder"
        )
    side, batch = encoder.config.transform.crop, torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    return Program, [(noise(n, side),) for n in (2, 1, 3)], ({0: batch},)


def _answers(encoder: Encoder, program: Program, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the network says: of a detector by the way of `predict`, which is not that of the program."""
    if not isinstance(program, DetectorProgram):
        return program(*given)
    images, extent = given
    rows, columns = extent.tolist()
    view = torch.zeros(images.shape, device=images.device)
    view[:, :, :rows, :columns] = encoder.normalise(images[:, :, :rows, :columns])
    found = encoder.head.detect(encoder_map(encoder.backbone, view), images.shape[2:], (rows, columns))
    masks = {"masks": found["masks"][:, 0]} if "masks" in found else {}
    return {**found, "labels": found["labels"] - 1, **masks}


@torch.no_grad()
def _compare_runs(made: Any, trials: list[tuple[Tensor, ...]], wanted: list[dict[str, Tensor]]) -> None:
    run = made.module()
    for given, answers in zip(trials, wanted, strict=True):
        for name, found in run(*given).items():
            expected = answers[name]
            if found.shape != expected.shape:
                raise UserError(
                    f"the program gives {len(found)} {name} where the network gives {len(expected)}"
                )
            if not found.numel():
                continue
            scale = expected.abs().max().clamp(min=1e-6)
            apart = float((found - expected).abs().max() / scale)
            if not apart <= PROGRAM_TOLERANCE:
                raise UserError(
                    f"the program gives other numbers than the network: {name} differs by {apart:.1e}"
                )


def _about(encoder: Encoder, answers: dict[str, Tensor]) -> dict[str, Any]:
    head = encoder.head
    about: dict[str, Any]
    if hasattr(head, "traced"):
        side = head.side(encoder)
        about = {
            "images": f"uint8 [1, 3, {side}, {side}], RGB: one image whose longer side is resized to {side}, "
            "in the upper left; what lies beyond it does not matter",
            "extent": "int64 [2], rows and columns of the image",
            "gives": {name: ["found", *value.shape[1:]] for name, value in answers.items()},
            "boxes": "x0, y0, x1, y1 in pixels of images, best first; masks are those of their boxes",
            "needs": "torchvision, imported before torch.export.load",
        }
    else:
        side = encoder.config.transform.crop
        about = {
            "images": f"uint8 [batch, 3, {side}, {side}], RGB, resized and cut as `encoder.transform` says",
            "gives": {name: ["batch", *value.shape[1:]] for name, value in answers.items()},
        }
    about["encoder"] = to_dict(encoder.config)
    if head is not None:
        about |= {"classes": list(head.classes), "head": to_dict(head.config)}
    return about
