"""Detectors of transformers, `hf:NAME` or `hf:FOLDER`: of known classes, of any words, and with masks."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from foveola.config import ConfigError, UserError
from foveola.proposals.found import Find, FoundInImage, ImagePixels, OpenedDetector, weights_identity
from foveola.proposals.hf_library import HubModel, has_one_size, pillows
from foveola.proposals.hf_masks import open_mask_model
from foveola.zoo.foreign import import_library

OWL = ("owlvit", "owlv2")
GROUNDING = ("grounding-dino", "mm-grounding-dino")
WITH_MASKS = ("maskformer", "mask2former", "oneformer")
DETECTORS_KNOWN = (
    "classes for object detection (DETR, Conditional and Deformable DETR, RT-DETR, D-FINE, YOLOS, ...), "
    "MaskFormer, Mask2Former, OneFormer, OWL-ViT, OWLv2 and Grounding DINO"
)


def open_hf(
    text: str, words: tuple[str, ...] | None, segments: str | None, device: torch.device
) -> OpenedDetector:
    """Open a detector of transformers; boxes and scores are those of its library's post-processing.

    Args:
        words: what to look for, which models of open vocabularies need.
        segments: "instance" or "panoptic", of models with masks (`hf_masks`).

    Raises UserError, in one line, for what is not found and for classes that are no detectors, ConfigError
    for models that need words without any.
    """
    found = HubModel.named(text)
    kind = found.config.model_type
    if kind in WITH_MASKS:
        return open_mask_model(found, segments or "instance", device)
    if kind in (*OWL, *GROUNDING):
        if not words:
            raise ConfigError(f"text: {found.where} looks for what it is told, such as text='[a cat, a dog]'")
        return (_open_owl if kind in OWL else _open_grounding)(found, words, device)
    auto = import_library("transformers.models.auto.modeling_auto", "hf")
    detects = auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    if kind not in detects or found.architecture not in (kind, detects[kind]):
        raise UserError(
            f"{found.where} is a {found.architecture}, which finds no objects here: "
            f"known are {DETECTORS_KNOWN}"
        )
    processor = found.processor("AutoImageProcessor")
    if not hasattr(processor, "post_process_object_detection"):
        raise UserError(
            f"{found.where}: its images are made by a {type(processor).__name__}, which knows no boxes"
        )
    model = found.model("AutoModelForObjectDetection", device)
    names = found.class_names()

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        inputs = processor(images=pillows(images), return_tensors="pt").to(device)
        return _boxes(processor, model(**inputs), images, score)

    return OpenedDetector(names, find, weights_identity(model.state_dict()), one_size=has_one_size(processor))


def _sizes(images: Sequence[ImagePixels], device: torch.device) -> Int64[Tensor, "B 2"]:
    return torch.tensor([image.shape[:2] for image in images], device=device)


def _boxes(processor: Any, outputs: Any, images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
    sizes = _sizes(images, outputs.logits.device)
    found = processor.post_process_object_detection(outputs, threshold=score, target_sizes=sizes)
    return [FoundInImage(each["boxes"], each["scores"], each["labels"]) for each in found]


def _of_words(words: tuple[str, ...], find: Find, model: Any, processor: Any, score: float) -> OpenedDetector:
    """What both models of open vocabularies are."""
    one_size = has_one_size(processor.image_processor)
    identity = weights_identity(model.state_dict())
    return OpenedDetector(words, find, identity, score, one_size, reads=frozenset({"text"}))


def _open_owl(found: HubModel, words: tuple[str, ...], device: torch.device) -> OpenedDetector:
    """OWL-ViT and OWLv2: each phrase is a query of its own."""
    processor = found.processor("AutoProcessor")
    model = found.model("AutoModelForZeroShotObjectDetection", device)
    longest = model.config.text_config.max_position_embeddings
    padded = {"padding": "max_length", "max_length": longest}
    for phrase in words:
        if len(processor.tokenizer(phrase)["input_ids"]) > longest:
            raise ConfigError(
                f"text: {phrase!r} has more words than {found.where} reads at once ({longest} tokens)"
            )

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        texts = [list(words)] * len(images)
        inputs = processor(text=texts, images=pillows(images), return_tensors="pt", **padded).to(device)
        return _boxes(processor.image_processor, model(**inputs), images, score)

    return _of_words(words, find, model, processor, score=0.1)


def _open_grounding(found: HubModel, words: tuple[str, ...], device: torch.device) -> OpenedDetector:
    """Grounding DINO: all phrases are one sentence, and a box belongs to the phrase with its best word."""
    if any("." in phrase for phrase in words):
        raise ConfigError(f"text: {found.where} ends phrases by full stops: leave them out")
    processor = found.processor("AutoProcessor")
    model = found.model("AutoModelForZeroShotObjectDetection", device)
    sentence = ". ".join(phrase.strip().lower() for phrase in words) + "."
    phrases = _phrases(processor.tokenizer(sentence, return_offsets_mapping=True)["offset_mapping"], sentence)
    if len(phrases) > model.config.max_text_len:
        raise ConfigError(
            f"text: {found.where} reads {model.config.max_text_len} tokens at once, not {len(phrases)}"
        )
    if without := set(range(len(words))) - set(phrases.tolist()):
        raise ConfigError(f"text: {found.where} knows no word of {words[min(without)]!r}")

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        inputs = processor(text=[sentence] * len(images), images=pillows(images), return_tensors="pt").to(
            device
        )
        outputs = model(**inputs)
        results = processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=score, target_sizes=_sizes(images, device)
        )
        found = []
        for each, logits in zip(results, outputs.logits, strict=True):
            kept = logits.sigmoid().amax(dim=1) > score
            found.append(FoundInImage(each["boxes"], each["scores"], best_phrase(logits[kept], phrases)))
        return found

    return _of_words(words, find, model, processor, score=0.25)


def _phrases(offsets: Sequence[tuple[int, int]], sentence: str) -> Int64[Tensor, "T"]:
    """The phrase of each token; -1 for full stops and special tokens."""
    return torch.tensor(
        [
            sentence.count(".", 0, start) if start < end and sentence[start:end].strip() != "." else -1
            for start, end in offsets
        ]
    )


def best_phrase(logits: Float[Tensor, "K T2"], phrases: Int64[Tensor, "T"]) -> Int64[Tensor, "K"]:
    """Return the phrase of the best token of each box; tokens of no phrase have -1."""
    phrases = phrases.to(logits.device)
    inner = logits[:, : len(phrases)].masked_fill(phrases < 0, -torch.inf)
    return phrases[inner.argmax(dim=1)]
