"""An encoder, with its head, as a program of torch.export: from pixels to answers without foveola."""

import io
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64, UInt8
from torch import Tensor, nn

import foveola
from foveola import files
from foveola.config import UserError, to_dict
from foveola.models.encoder import Encoder
from foveola.tasks.detection import encoder_map
from foveola.zoo.exported import FACTS_INSIDE

PROGRAM_TOLERANCE = 1e-5  # of the program to the network, over the largest number
MOST_IMAGES = 2**16  # of a batch
MOST_OBJECTS = 2**12  # of an image
MOST_PATCHES = 2**9  # of a side, where sizes may vary
TRIED_OBJECTS = 3


# Pixels of 8 bits; of an encoder with a range the values of files, as files have them.
ProgramImages = UInt8[Tensor, "B ch H W"] | Float32[Tensor, "B ch H W"]


class Program(nn.Module):
    """Maps pixels, or values, of squares that are cut already to named tensors."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        transform, device = encoder.config.transform, encoder.device
        self.register_buffer("mean", torch.tensor(transform.mean, device=device)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.std, device=device)[:, None, None])
        self.ranged = transform.value_ranges is not None
        for name, end in (("low", 0), ("high", 1)) if self.ranged else ():
            ends = torch.tensor([float(each[end]) for each in transform.value_ranges or ()], device=device)
            self.register_buffer(name, ends[:, None, None])

    def normalised(self, images: ProgramImages) -> Float32[Tensor, "B ch H W"]:
        """Return fractions of the range, less the mean, over the deviation."""
        if self.ranged:
            fractions = ((images - self.low) / (self.high - self.low)).clamp(0, 1)
        else:
            fractions = images.float() / 255
        return (fractions - self.mean) / self.std

    def forward(
        self, images: ProgramImages, masks: Bool[Tensor, "B M h w"] | None = None
    ) -> dict[str, Tensor]:
        """Return the logits of a head, or what the encoder says without one: `embedding` and `patches`; with
        `masks` also `objects`, each asked for alone, as `Encoder.forward` asks.
        """
        pixels = self.normalised(images)
        encoder, head = self.encoder, self.encoder.head
        if head is not None:
            return {"logits": head.logits(encoder.backbone, pixels)}
        features = encoder(pixels)
        found = {"embedding": features.objects[:, 0], "patches": features.patches}
        if masks is None:
            return found
        if encoder.config.pool != "token":
            return found | {"objects": encoder.means(features, masks.flatten(2))}
        each = pixels[:, None].expand(-1, masks.shape[1], -1, -1, -1).flatten(0, 1)
        alone = encoder.backbone(each, masks.flatten(2).flatten(0, 1)[:, None]).objects[:, 0]
        return found | {"objects": alone.unflatten(0, (masks.shape[0], masks.shape[1]))}


class DetectorProgram(Program):
    """Maps pixels, or values, of a square view, and where its image ends, to the objects in it."""

    def forward(self, images: ProgramImages, extent: Int64[Tensor, "2"]) -> dict[str, Tensor]:  # type: ignore[override]
        """Return boxes, labels, scores and, where they are learned, masks of boxes."""
        pixels = self.normalised(images)
        return self.encoder.head.traced(self.encoder.backbone, pixels, extent)


@dataclass
class Traced:
    """A program as torch.export has it, what it was tried on, and what it should give there."""

    encoder: Encoder
    program: Program
    names: tuple[str, ...]  # of what goes in
    trials: list[tuple[Tensor, ...]]
    fixed: str  # why images must have the size of the transform; "" where they may have others
    exported: Any = None
    wanted: list[dict[str, Tensor]] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        """Return what goes in, what comes out, what the encoder is: all that a user needs to know."""
        return {"foveola": foveola.__version__} | _about(self)


def write_program(encoder: Encoder, out: Path, objects: bool = False) -> dict[str, Any]:
    """Write a program to a file, which `torch.export.load(out).module()` runs; returns what it says.

    It takes uint8 [B, C, H, W], images as the encoder's transform cuts them (H = W = its crop), or of any
    other size in whole patches where the network allows it, any B from 1 on; of an encoder with a range
    float32, the values of files, which it scales. It gives a dict: `logits` [B, C] of a classifier or [B, C,
    H, W] of a segmenter; without a head `embedding` [B, D], what stands for each image, and `patches` [B, N,
    D]. With `objects` it also takes bool [B, M, h, w], the patches of M objects of each image, and gives
    `objects` [B, M, D].

    Of a detector it takes one image, [1, C, S, S], in the upper left of a square, and int64 [2], its
    rows and columns, and gives a dict: `boxes` [K, 4] in pixels, `labels` [K], `scores` [K] and, where they
    are learned, `masks` [K, 28, 28] of boxes, of any number K of objects, best first. `foveola.json` inside
    the file says so, with the names of the classes.

    Raises UserError for what cannot be one program, and where the program differs from the network.
    """
    traced = trace(encoder, objects)
    run = traced.exported.module()
    compare_runs(traced, lambda *inputs: run(*inputs), PROGRAM_TOLERANCE, "program")
    about = traced.about()
    written, inside = io.BytesIO(), {FACTS_INSIDE: json.dumps(about, indent=2)}
    # Into memory first: on a full disk torch's writer ends the process.
    torch.export.save(traced.exported, written, extra_files=inside)
    with files.whole(out) as part:
        part.write_bytes(written.getbuffer())
    return about


def trace(encoder: Encoder, objects: bool = False) -> Traced:
    """Return the program of an encoder as torch.export has it. Raises UserError for what cannot be one."""
    traced, sizes = _parts(encoder, objects)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*create_unbacked_symint", FutureWarning)  # of torchvision
            traced.exported = torch.export.export(
                traced.program, traced.trials[0], dynamic_shapes=sizes, strict=False
            )
    except Exception as error:  # whatever torch meets in modules of others
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch.export cannot express this encoder: {first}") from error
    with torch.no_grad():
        traced.wanted = [_outputs(encoder, traced.program, each) for each in traced.trials]
    return traced


def fixed_size(encoder: Encoder) -> str:
    """Return why a program takes images of one size only, or "" where it takes others."""
    model, crop = encoder.config.model, encoder.config.transform.crop
    reasons = (
        (model.window is not None, "windows of patches are cut for one size"),
        (model.relative_bias, "tables of relative positions are resized for one size"),
        (crop < 2 * model.patch_size, "an image is one patch"),
    )
    return next((reason for wrong, reason in reasons if wrong), "")


def _parts(encoder: Encoder, objects: bool) -> tuple[Traced, Any]:
    """The program of an encoder, what it is tried on, and which of the sizes of that may vary."""
    head, device, generator = encoder.head, encoder.device, torch.Generator().manual_seed(0)

    def noise(count: int, height: int, width: int) -> Tensor:
        size = (count, len(encoder.config.transform.mean), height, width)
        ranges = encoder.config.transform.value_ranges
        if ranges is None:
            return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)
        low, high = (torch.tensor(ends)[:, None, None] for ends in zip(*ranges, strict=True))
        beyond = 1.1 * torch.rand(size, generator=generator) - 0.05  # some are cut off
        return (low + beyond * (high - low)).float().to(device)

    def covered(count: int, height: int, width: int) -> Tensor:
        size = (count, TRIED_OBJECTS, height // encoder.patch_size, width // encoder.patch_size)
        found = torch.rand(size, generator=generator) < 0.4
        found[:, 0] = False  # an object without patches reads everything
        return found.to(device)

    if head is not None and objects:
        raise UserError(
            f"objects=true is of encoders, and this one has a head for {head.config.name}: head=false"
        )
    if head is not None and hasattr(head, "traced"):
        side = head.side(encoder)
        extents = ((side, side), (side, side - side // 3), (side // 4, side))
        trials = [(noise(1, side, side), torch.tensor(each, device=device)) for each in extents]
        why = "a detector looks at squares of one size"
        return Traced(encoder, DetectorProgram(encoder).eval(), ("images", "extent"), trials, why), None
    if head is not None and not hasattr(head, "logits"):
        raise UserError(
            f"a head for {head.config.name} cannot be one program, as it says neither `logits` nor `traced` "
            "answers; head=false exports its encoder"
        )
    patch, side, fixed = encoder.patch_size, encoder.config.transform.crop, fixed_size(encoder)
    # Traced where rows and columns differ, so that neither is taken for the other.
    sizes = (
        [(side, side)] * 3 if fixed else [(side + patch, side), (side, side), (2 * patch, side + 2 * patch)]
    )
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    shapes: dict[str, Any] = {"images": {0: batch}}
    counts: list[tuple[int, int, int]] = [(n, *size) for n, size in zip((2, 1, 3), sizes, strict=True)]
    trials = [(noise(*count),) for count in counts]
    if objects:
        trials = [(*inputs, covered(*count)) for inputs, count in zip(trials, counts, strict=True)]
        shapes["masks"] = {0: batch, 1: torch.export.Dim("objects", min=1, max=MOST_OBJECTS)}
    if not fixed:
        rows, columns = (torch.export.Dim(n, min=2, max=MOST_PATCHES) for n in ("rows", "columns"))
        shapes["images"] |= {2: patch * rows, 3: patch * columns}
        if objects:
            shapes["masks"] |= {2: rows, 3: columns}
    return Traced(encoder, Program(encoder).eval(), tuple(shapes), trials, fixed), tuple(shapes.values())


def _outputs(encoder: Encoder, program: Program, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the network says, by the ways of Python, which are not those of the program."""
    if isinstance(program, DetectorProgram):
        images, extent = inputs
        rows, columns = extent.tolist()
        view = torch.zeros(images.shape, device=images.device)
        view[:, :, :rows, :columns] = _normalised(encoder, images[:, :, :rows, :columns])
        found = encoder.head.detect(encoder_map(encoder.backbone, view), images.shape[2:], (rows, columns))
        masks = {"masks": found["masks"][:, 0]} if "masks" in found else {}
        return {**found, "labels": found["labels"] - 1, **masks}
    if encoder.head is not None:
        return program(*inputs)
    pixels = _normalised(encoder, inputs[0])
    features = encoder(pixels)
    outputs = {"embedding": features.objects[:, 0], "patches": features.patches}
    return outputs | ({"objects": encoder.tokens(pixels, inputs[1].flatten(2))} if len(inputs) > 1 else {})


def _normalised(encoder: Encoder, images: Tensor) -> Tensor:
    """Images as the network gets them, values in float64 on the way."""
    transform = encoder.config.transform
    if transform.value_ranges is None:
        return encoder.normalise(images)
    ends = (*zip(*transform.value_ranges, strict=True), transform.mean, transform.std)
    low, high, mean, std = (
        torch.tensor(each, dtype=torch.float64, device=images.device)[:, None, None] for each in ends
    )
    return ((((images - low) / (high - low)).clamp(0, 1) - mean) / std).float()


@torch.no_grad()
def compare_runs(traced: Traced, run: Any, tolerance: float, what: str) -> None:
    """Raise UserError where `run(*inputs)`, a dict of tensors, differs from what the network gives."""
    for inputs, outputs in zip(traced.trials, traced.wanted, strict=True):
        for name, found in run(*inputs).items():
            expected = outputs[name]
            if found.shape != expected.shape:
                raise UserError(
                    f"the {what} gives {list(found.shape)} {name}, the network {list(expected.shape)}"
                )
            if not found.numel():
                continue
            scale = expected.abs().max().clamp(min=1e-6)
            apart = float((found - expected).abs().max() / scale)
            if not apart <= tolerance:
                raise UserError(
                    f"the {what} gives other numbers than the network: {name} differs by {apart:.1e} of the "
                    f"largest, on images of {list(inputs[0].shape)}"
                )


def _about(traced: Traced) -> dict[str, Any]:
    encoder, outputs = traced.encoder, traced.wanted[0]
    head, transform, about = encoder.head, encoder.config.transform, dict[str, Any]()
    channels = len(transform.mean)
    kind = "RGB" if channels == 3 else f"{channels} channels"
    dtype, scale = ("uint8" if transform.value_ranges is None else "float32"), _scale(transform)
    if isinstance(traced.program, DetectorProgram):
        side = head.side(encoder)
        about = {
            "images": f"{dtype} [1, {channels}, {side}, {side}], {kind}: one image whose longer side is "
            f"resized to {side}, in the upper left; what lies beyond it does not matter; {scale}",
            "extent": "int64 [2], rows and columns of the image",
            "gives": {name: ["found", *value.shape[1:]] for name, value in outputs.items()},
            "boxes": "x0, y0, x1, y1 in pixels of images, best first; masks are those of their boxes",
            "needs": "torchvision, imported before torch.export.load",
        }
    else:
        side, patch = transform.crop, encoder.patch_size
        size = f"{side}, {side}" if traced.fixed else "height, width"
        about = {
            "images": f"{dtype} [batch, {channels}, {size}], {kind}, {scale}",
            "sizes": f"{side} x {side} pixels only: {traced.fixed}"
            if traced.fixed
            else f"multiples of {patch} pixels, {2 * patch} to {MOST_PATCHES * patch}; evaluations see "
            f"{side} x {side}",
            "resized": _resized(transform),
            "gives": _shapes_of(traced),
        }
        if "masks" in traced.names:
            about["masks"] = (
                f"bool [batch, objects, rows, columns]: the patches ({patch} x {patch} pixels) of each "
                "object; one without patches reads the whole image"
            )
    about["transform"] = to_dict(transform)
    about["encoder"] = to_dict(encoder.config)
    if head is not None:
        about |= {"classes": list(head.classes), "head": to_dict(head.config)}
    return about


def _scale(transform: Any) -> str:
    """What values of images mean, in words."""
    ranges, reading = transform.value_ranges, transform.decoding
    if ranges is None:
        return "0 to 255; normalised inside"
    ends = ", ".join(f"{low:.15g} to {high:.15g}" for low, high in ranges)
    what = "values as files have them"
    if reading.deep and not reading.ranges:
        what = "fractions of the range that each file states"
    each = " (of each channel)" if len(ranges) > 1 else ""
    return f"{what}, from {ends}{each}: cut off beyond, also before they are resized; normalised inside"


def _resized(transform: Any) -> str:
    """What was done to images before they were normalised, in words."""
    side, crop = transform.resize, transform.crop
    way = f"{transform.interpolation}, antialiased"
    if transform.squash:
        return f"to {side} x {side} pixels, whatever the shape ({way}); then the central {crop} x {crop}"
    return f"the shorter side to {side} pixels ({way}); then the central {crop} x {crop}"


def _shapes_of(traced: Traced) -> dict[str, list[Any]]:
    """The shape of each output, with names for what varies."""
    width = {name: value.shape[-1] for name, value in traced.wanted[0].items()}
    known = {
        "embedding": ["batch", "D"],
        "patches": ["batch", "N", "D"],
        "objects": ["batch", "objects", "D"],
    }
    found: dict[str, list[Any]] = {}
    for name, value in traced.wanted[1].items():  # of images as the transform cuts them
        shape: list[Any] = list(value.shape)
        if name in known:
            shape = [width[name] if each == "D" else each for each in known[name]]
            if traced.fixed and "N" in shape:
                shape[1] = value.shape[1]
            elif "N" in shape:
                shape[1] = "rows * columns"
        else:
            shape[0] = "batch"
            if len(shape) == 4 and not traced.fixed:
                shape[2:] = ["height", "width"]
        found[name] = shape
    return found
