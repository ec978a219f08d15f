"""Detectors of transformers, in the layout of its hub with random weights, against the library itself.

Where images and boxes belong together is seen with networks that find the bright rectangle of what they get.
"""

import json
import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

from foveola.config import ConfigError, UserError
from foveola.proposals.detect import DetectorConfig, detector
from foveola.proposals.hf_masks import inside, instances, panoptic
from foveola.proposals.hf_models import best_phrase

LABELS = {0: "N/A", 1: "cat", 2: "dog"}
NAMED = {"id2label": LABELS, "label2id": {name: label for label, name in LABELS.items()}}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "layer_type": "basic",
}
DETR = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
DETR |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 6}
SWIN = {"image_size": 32, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EDGES = {"shortest_edge": 48, "longest_edge": 96}
WORDS = ("a red cat", "dogs")
SIZES = ((30, 70), (80, 40), (30, 70), (48, 48))


def clip_words(folder: Path) -> Any:
    """CLIP's tokenizer, which knows single letters and the word cat."""
    letters = [*string.ascii_lowercase, *string.digits]
    words = ["<pad>", *letters, *(f"{letter}</w>" for letter in letters)]
    words += ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return tf.CLIPTokenizer.from_pretrained(str(folder))


def bert_words(folder: Path) -> Any:
    """BERT's tokenizer, with few words and its numbers of special tokens, which Grounding DINO relies on."""
    words = [f"[unused{i}]" for i in range(1040)]
    for i, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: "."}.items():
        words[i] = word
    words[1030:1035] = ["a", "red", "cat", "dog", "##s"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return tf.BertTokenizer.from_pretrained(str(folder))


def detr(folder: Path) -> tuple[Any, Any]:
    backbone = tf.ResNetConfig(**RESNET, out_features=["stage4"])
    config = tf.DetrConfig(d_model=16, backbone_config=backbone, use_timm_backbone=False, **DETR, **NAMED)
    return tf.DetrForObjectDetection(config), tf.DetrImageProcessor(size=EDGES)


def deformable(folder: Path) -> tuple[Any, Any]:
    backbone = tf.ResNetConfig(**RESNET, out_features=STAGES[1:])
    config = tf.DeformableDetrConfig(
        d_model=32, num_feature_levels=3, backbone_config=backbone, use_timm_backbone=False, **DETR, **NAMED
    )
    return tf.DeformableDetrForObjectDetection(config), tf.DeformableDetrImageProcessor(size=EDGES)


def rt_detr(folder: Path) -> tuple[Any, Any]:
    config = tf.RTDetrV2Config(
        backbone_config=tf.RTDetrResNetConfig(**RESNET, out_features=STAGES[1:]),
        d_model=16,
        encoder_hidden_dim=16,
        encoder_in_channels=[8] * 3,
        decoder_in_channels=[16] * 3,
        num_denoising=0,
        **DETR,
        **NAMED,
    )
    size = {"height": 64, "width": 64}
    return tf.RTDetrV2ForObjectDetection(config), tf.RTDetrImageProcessor(size=size)


def yolos(folder: Path) -> tuple[Any, Any]:
    config = tf.YolosConfig(**SMALL, image_size=[48, 96], patch_size=16, num_detection_tokens=6, **NAMED)
    return tf.YolosForObjectDetection(config), tf.YolosImageProcessor(size=EDGES)


def owlv2(folder: Path) -> tuple[Any, Any]:
    words = clip_words(folder.with_name("clip"))
    text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": 0}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = tf.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    images = tf.Owlv2ImageProcessor(size={"height": 32, "width": 32})
    return tf.Owlv2ForObjectDetection(config), tf.Owlv2Processor(images, words)


def grounding(folder: Path) -> tuple[Any, Any]:
    words = bert_words(folder.with_name("bert"))
    config = tf.GroundingDinoConfig(
        backbone_config=tf.SwinConfig(**SWIN, out_features=STAGES[1:]),
        text_config={**SMALL, "model_type": "bert", "vocab_size": 1040, "max_position_embeddings": 24},
        d_model=32,
        max_text_len=24,
        use_timm_backbone=False,
        num_feature_levels=3,
        **DETR,
    )
    images = tf.GroundingDinoImageProcessor(size=EDGES)
    return tf.GroundingDinoForObjectDetection(config), tf.GroundingDinoProcessor(images, words)


def maskformer(folder: Path) -> tuple[Any, Any]:
    config = tf.MaskFormerConfig(
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config=tf.SwinConfig(**SWIN, out_features=STAGES),
        decoder_config=tf.DetrConfig(d_model=16, **DETR),
        **NAMED,
    )
    images = tf.MaskFormerImageProcessor(size=EDGES, size_divisor=32)
    return tf.MaskFormerForInstanceSegmentation(config), images


HIDDEN = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
HIDDEN |= {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_queries": 6}


def mask2former(folder: Path) -> tuple[Any, Any]:
    config = tf.Mask2FormerConfig(
        feature_size=32,
        mask_feature_size=32,
        backbone_config=tf.SwinConfig(**SWIN, out_features=STAGES),
        **HIDDEN,
        **NAMED,
    )
    images = tf.Mask2FormerImageProcessor(size={"height": 64, "width": 64}, size_divisor=32)
    return tf.Mask2FormerForUniversalSegmentation(config), images


def oneformer(folder: Path) -> tuple[Any, Any]:
    words = clip_words(folder.with_name("oneclip"))
    config = tf.OneFormerConfig(
        backbone_config=tf.SwinConfig(**SWIN, out_features=STAGES),
        conv_dim=32,
        mask_dim=32,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=len(words),
        query_dec_layers=1,
        is_training=False,
        **HIDDEN,
        **NAMED,
    )
    folder.mkdir(parents=True)
    classes = {str(label): {"name": name, "isthing": 1} for label, name in LABELS.items()}
    (folder / "classes.json").write_text(json.dumps(classes))
    images = tf.OneFormerImageProcessor(
        size=EDGES, repo_path=str(folder), class_info_file="classes.json", num_text=2
    )
    return tf.OneFormerForUniversalSegmentation(config), tf.OneFormerProcessor(images, words)


Made = tuple[str, Any, Any]  # the folder, the model, the processor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], Made]]:
    """made(maker): a model with random weights and its processor, kept as on the hub; each is made once."""
    known: dict[str, Made] = {}
    root = tmp_path_factory.mktemp("hub")
    tf.utils.logging.disable_progress_bar()

    def make(maker: Callable[[Path], tuple[Any, Any]]) -> Made:
        name = maker.__name__
        if name not in known:
            torch.manual_seed(0)
            model, processor = maker(root / name)
            with torch.no_grad():
                for parameter in model.parameters():  # queries differ
                    parameter += (0.4 if maker is detr else 0.1) * torch.randn_like(parameter)
            model.save_pretrained(root / name)
            processor.save_pretrained(root / name)
            known[name] = (str(root / name), model.eval(), processor)
        return known[name]

    yield make
    tf.utils.logging.enable_progress_bar()


def noise() -> list[UInt8[np.ndarray, "_ _ 3"]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def pixels(box: Tensor, width: float, height: float) -> Tensor:
    """Boxes (centre, size) in a unit square as corners in pixels."""
    x, y, w, h = box.unbind(-1)
    return torch.stack(
        [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], -1
    )


def same(found: Any, boxes: Tensor, scores: Tensor, labels: Tensor, size: tuple[int, int]) -> None:
    """What was found is this, cut at the image, best first."""
    order = scores.argsort(descending=True, stable=True)
    limits = torch.tensor([size[1], size[0]] * 2)
    boxes = boxes[order].clamp(min=0).minimum(limits)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    np.testing.assert_allclose(found.scores, scores[order][inside], atol=1e-4)
    np.testing.assert_allclose(found.boxes, boxes[inside], atol=2e-2)
    np.testing.assert_array_equal(found.labels, labels[order][inside])
    assert found.masks is None


@pytest.mark.parametrize(
    ("maker", "softmax"), [(detr, True), (yolos, True), (rt_detr, False), (deformable, False)]
)
@torch.no_grad()
def test_detectors_of_known_classes(made, maker, softmax: bool) -> None:
    """Those whose classes exclude each other take the best of each query, others the best pairs of all."""
    folder, model, processor = made(maker)
    images = noise()
    proposer = detector(f"hf:{folder}", DetectorConfig(score=0.2))
    assert proposer.classes == ("cat", "dog")
    count = 0
    for image, found in zip(images, proposer.propose(images), strict=True):
        outputs = model(**processor(images=image, return_tensors="pt", input_data_format="channels_last"))
        logits, boxes = outputs.logits[0], pixels(outputs.pred_boxes[0], image.shape[1], image.shape[0])
        if softmax:
            scores, labels = logits.softmax(-1)[:, :-1].max(-1)
        else:
            most = 6 if maker is rt_detr else 18
            scores, pairs = logits.sigmoid().flatten().topk(most)
            boxes, labels = boxes[pairs // 3], pairs % 3
        kept = (scores > 0.2) & (labels > 0)
        count += int(kept.sum())
        same(found, boxes[kept], scores[kept], labels[kept] - 1, image.shape[:2])
    assert count


@torch.no_grad()
def test_owlv2_looks_for_each_phrase(made) -> None:
    """Its boxes are in the unit of the square that an image is padded to."""
    folder, model, processor = made(owlv2)
    images = noise()
    words = ("a cat", "dog", "red")
    proposer = detector(f"hf:{folder}", DetectorConfig(text=words, score=0.01))
    assert proposer.classes == words
    assert len(set(np.concatenate([each.labels for each in proposer.propose(images)]))) > 1
    for image, found in zip(images, proposer.propose(images), strict=True):
        inputs = processor(
            text=[list(words)],
            images=image,
            return_tensors="pt",
            padding="max_length",
            max_length=16,
            input_data_format="channels_last",
        )
        outputs = model(**inputs)
        logits, labels = outputs.logits[0].max(-1)
        scores = logits.sigmoid()
        side = max(image.shape)
        kept = scores > 0.01
        same(
            found,
            pixels(outputs.pred_boxes[0], side, side)[kept],
            scores[kept],
            labels[kept],
            image.shape[:2],
        )


@torch.no_grad()
def test_grounding_dino_reads_a_sentence(made) -> None:
    folder, model, processor = made(grounding)
    images = noise()
    proposer = detector(f"hf:{folder}", DetectorConfig(text=WORDS, score=0.05))
    found = proposer.propose(images)
    assert {*np.concatenate([each.labels for each in found])} == {0, 1}
    for image, each in zip(images, found, strict=True):
        inputs = processor(
            text="a red cat. dogs.", images=image, return_tensors="pt", input_data_format="channels_last"
        )
        assert inputs["input_ids"].tolist() == [[101, 1030, 1031, 1032, 1012, 1033, 1034, 1012, 102]]
        outputs = model(**inputs)
        chances = outputs.logits[0].sigmoid()
        scores = chances.amax(-1)
        labels = (chances[:, 5:7].amax(-1) > chances[:, 1:4].amax(-1)).long()
        boxes = pixels(outputs.pred_boxes[0], image.shape[1], image.shape[0])
        kept = scores > 0.05
        same(each, boxes[kept], scores[kept], labels[kept], image.shape[:2])


def test_a_box_belongs_to_the_phrase_of_its_best_word() -> None:
    phrases = torch.tensor([-1, 0, 0, -1, 1, -1])
    logits = torch.tensor([[9.0, 1, 2, 9, 1, 9, 99], [9, 1, 2, 9, 3, 9, 99]])
    assert best_phrase(logits, phrases).tolist() == [0, 1]


def rectangle(pixel_values: Tensor, unit: Tensor) -> Tensor:
    """Centre and size of the bright rectangle of each image, in units of `unit` (columns, rows)."""
    boxes = []
    for image, (columns, rows) in zip(pixel_values.mean(1), unit.tolist(), strict=True):
        bright = image > 0.5 * image.max()
        y, x = bright.nonzero(as_tuple=True)
        x0, x1 = int(x.min()) / columns, (int(x.max()) + 1) / columns
        y0, y1 = int(y.min()) / rows, (int(y.max()) + 1) / rows
        boxes.append([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    return torch.tensor(boxes)[:, None]


def sees_boxes(queries: int) -> Callable[..., Any]:
    """The forward pass of a network that finds the bright rectangle, as the first class but one."""

    def forward(self: Any, pixel_values: Tensor, pixel_mask: Tensor | None = None, **_: Any) -> Any:
        if pixel_mask is None:  # the unit is the whole square
            unit = torch.tensor([pixel_values.shape[:1:-1]] * len(pixel_values))
        else:
            unit = torch.stack([pixel_mask.any(1).sum(1), pixel_mask.any(2).sum(1)], 1)
        logits = torch.full((len(pixel_values), 1, queries), -9.0)
        logits[:, :, 1] = 9
        return SimpleNamespace(logits=logits, pred_boxes=rectangle(pixel_values, unit))

    return forward


def lit(height: int, width: int, box: tuple[int, int, int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


LIT = (
    (96, 240, (40, 20, 120, 60)),
    (240, 96, (24, 160, 64, 200)),
    (96, 240, (160, 0, 240, 96)),
    (96, 96, (8, 8, 40, 80)),
)


@pytest.mark.parametrize("maker", [detr, yolos, rt_detr, owlv2, grounding])
def test_boxes_lie_where_things_are(made, maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images of any shape, through the library's resizing and padding."""
    folder, model, _ = made(maker)
    monkeypatch.setattr(type(model), "forward", sees_boxes({grounding: 8, owlv2: 2}.get(maker, 4)))
    words = {"text": ("a", "cat")} if maker in (owlv2, grounding) else {}
    proposer = detector(f"hf:{folder}", DetectorConfig(**words))
    for (*size, box), found in zip(LIT, proposer.propose([lit(*each) for each in LIT]), strict=True):
        cell = max(size) / 32  # a pixel of the smallest square
        np.testing.assert_allclose(found.boxes, [box], atol=cell)
        assert found.scores[0] > 0.99


def sees_masks(self: Any, pixel_values: Tensor, **_: Any) -> Any:
    """A network that takes the bright rectangle for a cat and the rest for a dog."""
    bright = 8 * avg_pool2d(pixel_values.mean(1, keepdim=True), 4)
    classes = torch.full((len(pixel_values), 6, 4), -9.0)
    classes[:, 0, 1] = 9
    classes[:, 1, 2] = 9
    classes[:, 2:, 3] = 9
    masks = torch.cat([bright, -bright, bright.expand(-1, 4, -1, -1)], 1)
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


@pytest.mark.parametrize("maker", [maskformer, mask2former, oneformer])
@pytest.mark.parametrize("segments", ["instance", "panoptic"])
def test_masks_lie_where_things_are(made, maker, segments, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, _ = made(maker)
    monkeypatch.setattr(type(model), "forward", sees_masks)
    proposer = detector(f"hf:{folder}", DetectorConfig(segments=segments))
    images = [lit(*each) for each in LIT]
    for image, (*size, box), found in zip(images, LIT, proposer.propose(images), strict=True):
        cats = np.flatnonzero(found.labels == proposer.classes.index("cat"))
        assert len(cats) == 1
        assert found.masks is not None
        (mask,), truth = found.masks[cats], image[..., 0] > 0
        assert (mask & truth).sum() / (mask | truth).sum() > 0.85
        np.testing.assert_allclose(found.boxes[cats], [box], atol=1 + max(size) / 32)
        y, x = mask.nonzero()
        assert found.boxes[cats].tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]


@pytest.mark.parametrize("maker", [maskformer, mask2former, oneformer])
def test_models_with_masks_run(made, maker) -> None:
    folder, *_ = made(maker)
    proposer = detector(f"hf:{folder}", DetectorConfig(score=0.0))
    for image, found in zip(noise(), proposer.propose(noise()), strict=True):
        assert found.masks is not None
        assert found.masks.shape == (len(found), *image.shape[:2])


def drawn() -> tuple[Tensor, Tensor]:
    """Logits of 6 queries, of 3 classes and none, and of their smooth masks of 24 x 24 cells."""
    generator = torch.Generator().manual_seed(0)
    classes = 3 * torch.randn(6, 4, generator=generator)
    masks = torch.randn(6, 1, 6, 6, generator=generator)
    return classes, 5 * torch.nn.functional.interpolate(masks, (24, 24), mode="bicubic")[:, 0]


def test_instances_are_those_of_the_library() -> None:
    """On images of 384 pixels a side, where it cuts masks at the pixels of the image, as ours always are."""
    classes, masks = drawn()
    whole = torch.tensor([[[0.0, 0, 1, 1]]])
    found = instances(classes, masks, whole, (384, 384), 0.2)
    outputs = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    (theirs,) = tf.Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs, threshold=0.2, target_sizes=[(384, 384)], return_binary_maps=True
    )
    known = sorted(
        zip(theirs["segments_info"], theirs["segmentation"], strict=True), key=lambda each: -each[0]["score"]
    )
    assert len(known) == len(found.scores) > 2
    order = found.scores.argsort(descending=True)
    for row, (segment, mask) in zip(order.tolist(), known, strict=True):
        assert found.labels[row] == segment["label_id"]
        assert found.scores[row] == pytest.approx(segment["score"], abs=1e-4)
        assert (found.masks[row] != mask.bool()).float().mean() < 1e-4


def test_segments_are_those_of_the_library() -> None:
    """Less the pixels that no query is sure of, which the official code gives to nobody."""
    classes, _ = drawn()
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    centres = torch.tensor([[6, 4], [6, 12], [6, 20], [17, 4], [17, 12], [17, 20]])[:, :, None, None]
    masks = 5 - torch.hypot(y - centres[:, 0], x - centres[:, 1])  # discs that overlap a little
    whole = torch.tensor([[[0.0, 0, 1, 1]]])
    found = panoptic(classes, masks, whole, (384, 384), 0.4)
    outputs = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    (theirs,) = tf.Mask2FormerImageProcessor().post_process_panoptic_segmentation(
        outputs, threshold=0.4, label_ids_to_fuse=set(), target_sizes=[(384, 384)]
    )
    assert len(found.scores) == len(theirs["segments_info"]) > 1
    large = torch.nn.functional.interpolate(masks[None], (384, 384), mode="bilinear")[0]
    queries = [
        query for query in range(6) if classes[query].softmax(0).max() > 0.4 and classes[query].argmax() < 3
    ]
    for row, segment in enumerate(theirs["segments_info"]):
        assert found.labels[row] == segment["label_id"]
        assert found.scores[row] == pytest.approx(segment["score"], abs=1e-4)
        query = next(q for q in queries if abs(classes[q].softmax(0).max() - segment["score"]) < 1e-4)
        mask = (theirs["segmentation"] == segment["id"]) & (large[query] >= 0)
        assert (found.masks[row] != mask).float().mean() < 1e-4
    none = classes.clone()
    none[:, 3] = 99
    assert len(panoptic(none, masks, whole, (96, 160), 0.3).scores) == 0


def test_the_part_of_the_image_is_cut_out() -> None:
    """Of a map of 64 x 96 padded pixels, of which an image fills 48 x 90."""
    filled = torch.zeros(64, 96)
    filled[:48, :90] = 1
    part = inside(filled)
    assert part[0, 0].tolist() == pytest.approx([0, 0, 90 / 96, 48 / 64])
    masks = torch.full((1, 64, 96), -9.0)
    masks[0, 12:24, 30:60] = 9
    found = instances(torch.tensor([[9.0, -9]]), masks, part, (96, 180), 0.5)
    assert found.boxes.tolist() == [[60, 24, 120, 48]]


def test_the_code_of_a_model_is_never_run(made, tmp_path: Path) -> None:
    folder, *_ = made(detr)
    ran = tmp_path / "ran"
    for kind in ("detr", "other"):
        mine = tmp_path / kind
        mine.mkdir()
        for file in Path(folder).iterdir():
            (mine / file.name).write_bytes(file.read_bytes())
        config = json.loads((mine / "config.json").read_text())
        (mine / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: pass\n")
        config |= {
            "model_type": kind,
            "auto_map": {"AutoConfig": "code.C", "AutoModelForObjectDetection": "code.C"},
        }
        (mine / "config.json").write_text(json.dumps(config))
    assert detector(f"hf:{tmp_path / 'detr'}", DetectorConfig()).classes == ("cat", "dog")
    with pytest.raises(UserError):
        detector(f"hf:{tmp_path / 'other'}", DetectorConfig())
    assert not ran.exists()


def test_weights_that_are_missing_are_not_drawn(made, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, *_ = made(yolos)
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state.pop("bbox_predictor.layers.0.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks bbox_predictor.layers.0.weight \(1 missing"):
        detector(f"hf:{tmp_path}", DetectorConfig())


@pytest.mark.parametrize(
    ("maker", "settings", "error"),
    [
        (owlv2, {}, "looks for what it is told, such as text="),
        (owlv2, {"text": ("cat",), "segments": "panoptic"}, "segments has no effect"),
        (
            owlv2,
            {"text": ("a b c d e f g h i j k l m n o p q",)},
            r"more words than hf:.* reads at once \(16",
        ),
        (grounding, {"text": ("a cat. a dog",)}, "ends phrases by full stops"),
        (grounding, {"text": ("cat",) * 12}, "reads 24 tokens at once"),
        (detr, {"text": ("cat",)}, "text has no effect"),
        (detr, {"names": ("cat",)}, "names has no effect"),
        (detr, {"classes": ("Cat",)}, "knows no 'Cat'; did you mean 'cat'"),
    ],
)
def test_keys_that_a_model_does_not_read(made, maker, settings: Any, error: str) -> None:
    folder, *_ = made(maker)
    with pytest.raises(ConfigError, match=error):
        detector(f"hf:{folder}", DetectorConfig(**settings))


@pytest.mark.parametrize("maker", [detr, mask2former])
def test_names_of_classes_are_those_of_outputs(made, maker, tmp_path: Path) -> None:
    folder = shutil.copytree(made(maker)[0], tmp_path / "shifted")
    about = json.loads((folder / "config.json").read_text())
    about["id2label"] = {str(int(k) + 1): name for k, name in about["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"id2label in its config.json names \d classes, 1 to \d; expected"):
        detector(f"hf:{folder}", DetectorConfig())


def test_mistakes_are_one_line(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tf.ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path / "vit")
    tf.DetrConfig(architectures=["DetrForSegmentation"]).save_pretrained(tmp_path / "segments")
    for name, error in (
        ("", "hf: names no model"),
        ("./none", "hf:./none: no folder ./none"),
        (
            f"{tmp_path}/vit",
            "is a ViTModel, which finds no objects here: known are classes for object detection",
        ),
        (f"{tmp_path}/segments", "is a DetrForSegmentation, which finds no objects here"),
        (f"{tmp_path}/vit?revison=a", "unknown option 'revison'; known: revision"),
        (f"{tmp_path}", "hf:.*config.json"),
    ):
        with pytest.raises(UserError, match=error) as caught:
            detector(f"hf:{name}", DetectorConfig())
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'foveola\[hf\]'"):
        detector("hf:facebook/detr-resnet-50", DetectorConfig())
