"""Objects that detectors find: those of torchvision and transformers, YOLO exports, and runs of foveola."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from foveola.config import ConfigError, UserError, key, to_dict
from foveola.model_names import is_there
from foveola.proposals.found import ImagePixels, OpenedDetector, chosen, proposals_of
from foveola.proposals.hf_models import open_hf
from foveola.proposals.onnx_models import open_onnx
from foveola.proposals.own_models import open_own
from foveola.proposals.proposal import Proposals
from foveola.proposals.torchvision_models import open_torchvision

SOME_READ = ("names", "text", "segments", "nms", "image_size", "layout")  # which models do not share
ENCODERS = ("timm", "pixels", "untrained", "python")


@dataclass(frozen=True)
class DetectorConfig:
    """Settings of detectors. A key that the model does not read is refused."""

    score: float | None = key(
        None,
        "score above which proposals are kept; null = usual for the model, 0.5 for most",
        at_least=0,
        below=1,
    )
    classes: tuple[str, ...] | None = key(None, "names of the classes to keep; null = all")
    agnostic: bool = key(False, 'call everything that is found "object"')
    text: tuple[str, ...] | None = key(None, "what to look for, in words (OWL-ViT, OWLv2, Grounding DINO)")
    segments: Literal["instance", "panoptic"] | None = key(
        None, "segments to look for (MaskFormer, Mask2Former, OneFormer); null = instance, which may overlap"
    )
    names: tuple[str, ...] | None = key(
        None, "names of classes, in the order of outputs, for weights without names"
    )
    nms: float | None = key(
        None,
        "IoU above which the worse of two boxes of a class is dropped (YOLO exports without NMS); null = 0.7",
        above=0,
        at_most=1,
    )
    image_size: int | None = key(
        None, "side of the square that images are fitted into (YOLO exports of any size)", at_least=32
    )
    layout: Literal["v8", "v5", "end2end"] | None = key(
        None, "how outputs of a YOLO export are read; null = by their shapes"
    )
    batch_size: int = key(4, "images at a time", at_least=1)


class Detector:
    """A `Proposer` that asks a detector."""

    def __init__(self, opened: OpenedDetector, config: DetectorConfig, model: str) -> None:
        self.opened, self.config, self.model, self.sees = opened, config, model, opened.sees
        self.chosen = chosen(opened.names, config.classes, config.agnostic, model)
        self.score = opened.score if config.score is None else config.score

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what it finds: those of the model that are kept, or "object"."""
        return self.chosen.classes

    @property
    def batch_size(self) -> int:
        """How many images it wants at a time."""
        return self.config.batch_size

    def describe(self) -> dict[str, Any]:
        """Return kind, model, identity of the weights and settings."""
        settings = to_dict(replace(self.config, score=self.score))
        for name in ("batch_size", *(set(SOME_READ) - self.opened.reads)):
            del settings[name]  # which changes nothing that is found
        return {"kind": "detect", "model": self.model, "weights": self.opened.identity, **settings}

    @torch.no_grad()
    def propose(self, images: Sequence[ImagePixels], /) -> list[Proposals]:
        """Return what is found in each image; the result for an image does not depend on the others."""
        found: dict[int, Proposals] = {}
        for rows in self._together(images):
            each = self.opened.find([images[row] for row in rows], self.score)
            for row, one in zip(rows, each, strict=True):
                found[row] = proposals_of(one, images[row].shape[:2], self.score, self.chosen, self.model)
        return [found[row] for row in range(len(images))]

    def _together(self, images: Sequence[ImagePixels]) -> list[list[int]]:
        """The images that the model may see in one batch: padding to the largest changes predictions."""
        if self.opened.one_size:
            return [list(range(len(images)))] if images else []
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            groups.setdefault(image.shape, []).append(row)
        return list(groups.values())


def detector(model: str, config: DetectorConfig, device: str | torch.device = "cpu") -> Detector:
    """Open a detector as a `Proposer`.

    Args:
        model: `torchvision:NAME`, `hf:NAME` or `hf:FOLDER`, `onnx:FILE`, or a run (or encoder folder) of
            foveola that has a head for detection. `docs/masks.md` lists what they may be.

    Code that comes with a model is never run. Raises UserError, in one line, for models that are not found,
    that are no detectors or whose library is not installed, and ConfigError for keys that the model does not
    read.
    """
    kind, _, rest = model.partition(":")
    if kind in OPENERS:
        with torch.random.fork_rng(devices=[]):  # networks draw weights before they get others
            opened = OPENERS[kind](rest, config, torch.device(device))
    elif kind in ENCODERS:
        known = ", ".join(f"{kind}:" for kind in OPENERS)
        raise UserError(f"{model} is an encoder without a detector: expected {known}, or a run of foveola")
    else:
        if not is_there(model):
            known = ", ".join(f"{kind}:" for kind in OPENERS)
            raise UserError(f"no detector at {model}: expected {known}, or a run of foveola")
        opened = open_own(model, config.score, device)
    for name in SOME_READ:
        if getattr(config, name) is not None and name not in opened.reads:
            raise ConfigError(f"{name} has no effect: {model} does not read it")
    return Detector(opened, config, model)


def _torchvision(name: str, config: DetectorConfig, device: torch.device) -> OpenedDetector:
    return open_torchvision(name, config.names, device)


def _hf(name: str, config: DetectorConfig, device: torch.device) -> OpenedDetector:
    return open_hf(name, config.text, config.segments, device)


def _onnx(file: str, config: DetectorConfig, device: torch.device) -> OpenedDetector:
    asked = {name: getattr(config, name) for name in ("nms", "image_size", "layout")}
    return open_onnx(file, config.names, config.agnostic, asked, device)


OPENERS: dict[str, Callable[[str, DetectorConfig, torch.device], OpenedDetector]] = {
    "torchvision": _torchvision,
    "hf": _hf,
    "onnx": _onnx,
}
