"""Detectors that foveola trained: runs with a head for detection."""

from collections.abc import Sequence

import torch

from foveola.config import ConfigError, UserError
from foveola.models.seen import seen_by
from foveola.proposals.found import FoundInImage, ImagePixels, OpenedDetector
from foveola.zoo.load import load


def open_own(model: str, score: float | None, device: str | torch.device) -> OpenedDetector:
    """Open a run or an encoder folder with a head for detection, as `foveola finetune` writes them.

    Raises UserError for encoders without such a head, and ConfigError for a `score` below that from which the
    head gives detections.
    """
    encoder = load(model, device)
    if encoder.head is None or encoder.head.config.name != "detection":
        has = "no head" if encoder.head is None else f"a head for {encoder.head.config.name}"
        raise UserError(f"{model} has {has}: `foveola finetune vitdet-small` trains one that finds objects")
    least = encoder.head.config.score
    if score is not None and score < least:
        raise ConfigError(f"score={score}: the head of {model} gives detections from {least} on")

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        return [
            FoundInImage(each.boxes, each.scores, each.labels, each.masks)
            for each in encoder.head.predict(encoder, list(images))  # pixels already: `predict` reads values
        ]

    facts = encoder.head.classes, find, encoder.fingerprint(), max(0.5, least)
    return OpenedDetector(*facts, one_size=True, sees=lambda source: seen_by([encoder], source))
