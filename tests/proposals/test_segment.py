"""SAM and SAM 2 with random weights in the layout of the hub, against transformers' pipeline and passes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.config import ConfigError, UserError, build, refuse_unread
from foveola.data.sample import Objects, Sample
from foveola.proposals.run import propose
from foveola.proposals.segment import Segmenter, SegmenterConfig, segmenter

DECODER = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER |= {"iou_head_depth": 2, "iou_head_hidden_dim": 16}
PROMPTS = {"hidden_size": 16, "image_size": 64, "mask_input_channels": 4}
SQUARE = {"height": 64, "width": 64}
LOW = {"height": 16, "width": 16}


def sam() -> tuple[Any, Any]:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision |= {"image_size": 64, "patch_size": 8, "output_channels": 16, "global_attn_indexes": [0]}
    vision |= {"window_size": 4, "num_pos_feats": 8}
    config = tf.SamConfig(
        vision_config=vision,
        prompt_encoder_config={**PROMPTS, "patch_size": 8},
        mask_decoder_config=DECODER,
    )
    images = tf.SamImageProcessor(
        size={"longest_edge": 64}, pad_size=SQUARE, mask_size={"longest_edge": 16}, mask_pad_size=LOW
    )
    return tf.SamModel(config), tf.SamProcessor(images)


def sam2() -> tuple[Any, Any]:
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64]}
    backbone |= {"blocks_per_stage": [1] * 4, "embed_dim_per_stage": [8, 16, 32, 64]}
    backbone |= {"num_attention_heads": 1, "num_attention_heads_per_stage": [1] * 4}
    vision = {"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 16}
    vision |= {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    config = tf.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={**PROMPTS, "patch_size": 16},
        mask_decoder_config=DECODER,
    )
    return tf.Sam2Model(config), tf.Sam2Processor(tf.Sam2ImageProcessor(size=SQUARE, mask_size=LOW))


Made = tuple[str, Any, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Made]:
    """made(maker): the folder of a model, the model, its processor; each is made once."""
    known: dict[str, Made] = {}
    root = tmp_path_factory.mktemp("hub")

    def make(maker: Callable[[], tuple[Any, Any]]) -> Made:
        name = maker.__name__
        if name not in known:
            torch.manual_seed(0)
            model, processor = maker()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.2 * torch.randn_like(parameter)
            tf.utils.logging.disable_progress_bar()
            model.save_pretrained(root / name)
            processor.save_pretrained(root / name)
            tf.utils.logging.enable_progress_bar()
            known[name] = (f"hf:{root / name}", model.eval(), processor)
        return known[name]

    return make


def noise(height: int, width: int) -> Any:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height)))


def objects(*boxes: tuple[float, float, float, float]) -> Objects:
    return Objects.from_boxes(np.array(boxes, np.float32))


@pytest.mark.parametrize(("maker", "size"), [(sam, (60, 90)), (sam, (70, 30)), (sam2, (50, 50))])
def test_automatic_masks_are_those_of_the_pipeline(made, maker, size: tuple[int, int]) -> None:
    """For SAM 2 on squares: elsewhere the pipeline scales points as if images were not squashed."""
    folder, model, processor = made(maker)
    image = noise(*size)
    pipeline = tf.pipeline("mask-generation", model=model, image_processor=processor.image_processor)
    settings: dict[str, Any] = {
        "pred_iou_thresh": 0.05,
        "stability_score_thresh": 0.1,
        "stability_score_offset": 0.01,
        "crops_nms_thresh": 1.0,
    }
    theirs = pipeline(Image.fromarray(image), points_per_crop=5, points_per_batch=7, **settings)
    config = SegmenterConfig(
        points_per_side=5, score=0.05, stability=0.1, stability_offset=0.01, nms=1.0, prompts_at_once=9
    )
    (found,) = segmenter(folder, config).propose([image])
    assert found.masks is not None
    assert len(found) == len(theirs["masks"]) > 1
    scores = theirs["scores"].numpy()
    np.testing.assert_allclose(found.scores, np.sort(scores)[::-1], atol=1e-5)
    for row, index in enumerate(np.argsort(-scores, kind="stable")):
        mask = np.asarray(theirs["masks"][index])
        assert (found.masks[row] != mask).mean() < 1e-3
        y, x = found.masks[row].nonzero()
        assert found.boxes[row].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize("maker", [sam, sam2])
@torch.no_grad()
def test_masks_of_boxes_are_those_of_the_model(made, maker) -> None:
    folder, model, processor = made(maker)
    images = [noise(40, 90), noise(70, 30), noise(40, 90)]
    given = [objects((0.1, 0.2, 0.5, 0.9), (0, 0, 1, 1)), None, objects((0.5, 0.25, 0.9, 0.75))]
    proposer = segmenter(folder, SegmenterConfig(prompt="boxes", prompts_at_once=1))
    assert proposer.prompts
    assert proposer.classes == ("object",)
    found = proposer.propose(images, given)
    assert [len(each) for each in found] == [2, 0, 1]
    assert found[1].masks is not None
    assert found[1].masks.shape == (0, 70, 30)
    for image, each, known in zip(images, found, given, strict=True):
        if known is None:
            continue
        boxes = (known.boxes * np.array([90, 40] * 2)).tolist()
        inputs = processor(images=Image.fromarray(image), input_boxes=[boxes], return_tensors="pt")
        outputs = model(**inputs, multimask_output=False)
        extra = [inputs[k] for k in ("original_sizes", "reshaped_input_sizes") if k in inputs]
        (masks,) = processor.post_process_masks(outputs.pred_masks, *extra)
        scores = outputs.iou_scores[0, :, 0]
        order = scores.argsort(descending=True)
        assert each.labels.tolist() == [0] * len(known)
        np.testing.assert_allclose(each.scores, scores[order], atol=1e-5)
        assert each.masks is not None
        assert (each.masks != masks[order, 0].numpy()).mean() < 1e-3


class Named(list[Sample]):
    """A source with classes."""

    name, classes, has_objects = "named", ("ant", "bee", "cat"), True


@torch.no_grad()
def test_masks_of_boxes_have_the_classes_of_the_data(made, tmp_path: Path) -> None:
    """Each box is cut to another mask and score; labels stay with theirs, also beyond the first pass."""
    boxes = [(0.0, 0.0, 0.3, 0.3), (0.5, 0.5, 0.9, 1.0), (0.1, 0.6, 0.3, 0.9)]
    labels = [np.array([2, -1, 0]), np.array([1, 0, 2])]
    some = [Objects.from_boxes(np.array(boxes, np.float32), each) for each in labels]
    config = SegmenterConfig(prompt="boxes", prompts_at_once=2)
    plain = segmenter(made(sam)[0], config)
    named = plain.of_classes(("ant", "bee", "cat"))
    assert named.classes == ("ant", "bee", "cat", "object")
    assert named.describe() == plain.describe()
    image = noise(40, 90)
    alone = [plain.propose([image], [objects(box)])[0] for box in boxes]
    for each, known in zip(named.propose([image, image], some), labels, strict=True):
        wanted = {round(float(one.scores[0]), 4): k % 4 for one, k in zip(alone, known, strict=True)}
        assert {round(float(s), 4): int(k) for s, k in zip(each.scores, each.labels, strict=True)} == wanted

    def classes_of(*found: Objects) -> tuple[list[str], set[int]]:
        source = Named([Sample(image, f"{k}.png", each) for k, each in enumerate(found)])
        out = tmp_path / str(len(found))
        known = propose(plain, source, out=out, progress=False, sheet=0, duplicate_iou=None)
        tree = json.loads(known.file.read_text())
        return [each["name"] for each in tree["categories"]], {k["category_id"] for k in tree["annotations"]}

    assert classes_of(*some) == (["ant", "bee", "cat", "object"], {1, 2, 3, 4})
    assert classes_of(some[1]) == (["ant", "bee", "cat"], {1, 2, 3})


def finds(self: Any, image_embeddings: Any, **prompts: Tensor) -> Any:
    """A network that cuts the bright rectangle where a point lies on it, and the inside of a box."""
    low = interpolate(image_embeddings[None, None], (16, 16), mode="area")[0, 0]
    if "input_points" in prompts:
        points = prompts["input_points"][0, :, 0].long().clamp(0, 63)
        hit = image_embeddings[points[:, 1], points[:, 0]] > 0
        masks = low.expand(len(points), 3, 16, 16).clone()
        scores = torch.where(hit, 0.95, 0.5)[:, None].expand(-1, 3)
    else:
        cells = 4 * torch.arange(16) + 2
        x0, y0, x1, y1 = prompts["input_boxes"][0, :, :, None].unbind(1)
        columns, rows = (x0 <= cells) & (cells < x1), (y0 <= cells) & (cells < y1)
        masks = torch.where((rows[:, :, None] & columns[:, None])[:, None], 20.0, -20.0)
        scores = torch.full((len(masks), 1), 0.7)
    return SimpleNamespace(iou_scores=scores[None], pred_masks=masks[None])


@pytest.mark.parametrize("maker", [sam, sam2])
@pytest.mark.parametrize(
    ("size", "box"),
    [((80, 200), (40, 20, 120, 60)), ((200, 80), (20, 140, 60, 190)), ((64, 64), (8, 8, 40, 24))],
)
def test_masks_lie_where_things_are(
    made, maker, size: Any, box: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Points and boxes reach what they point at, and masks their pixels, in images of any shape."""
    folder, model, _ = made(maker)
    bright = lambda self, pixels: 10 * pixels[0].mean(0)  # noqa: E731
    monkeypatch.setattr(type(model), "get_image_embeddings", bright)
    monkeypatch.setattr(type(model), "forward", finds)
    image = np.zeros((*size, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    (found,) = segmenter(folder, SegmenterConfig(points_per_side=16, stability=0.5)).propose([image])
    assert len(found) == 1  # of many points that hit it
    cell = max(size) / 16
    np.testing.assert_allclose(found.boxes, [box], atol=cell)
    truth = image[..., 0] > 0
    assert (found.masks[0] & truth).sum() / (found.masks[0] | truth).sum() > 0.7
    known = objects(tuple(np.array(box) / ([size[1], size[0]] * 2)))
    (cut,) = segmenter(folder, SegmenterConfig(prompt="boxes")).propose([image], [known])
    np.testing.assert_allclose(cut.boxes, [box], atol=cell)
    dark = np.zeros((*size, 3), np.uint8)
    (none,) = segmenter(folder, SegmenterConfig(points_per_side=4)).propose([dark])
    assert len(none) == 0
    assert none.masks is not None
    assert none.masks.shape == (0, *size)


def test_stability_is_of_the_area(made) -> None:
    """A mask that grows from 4 to 9 pixels between +1 and -1 has 4/9."""
    _, model, processor = made(sam)
    logits = torch.full((1, 5, 5), -5.0)
    logits[0, :3, :3] = -0.5
    logits[0, 1:3, 1:3] = 2
    for least, kept in ((4 / 9 - 0.01, 1), (4 / 9 + 0.01, 0)):
        proposer = Segmenter(model, processor, SegmenterConfig(stability=least), "m")
        cut = proposer._kept(torch.ones(1), torch.zeros(1, dtype=torch.int64), logits)
        assert len(cut.scores) == kept
        assert cut.boxes.tolist() == [[1, 1, 3, 3]] * kept


def test_work_is_told_apart(made) -> None:
    folder, *_ = made(sam)
    points = segmenter(folder, SegmenterConfig()).describe()
    assert points == {
        "kind": "segment",
        "model": folder,
        "weights": points["weights"],
        "prompt": "points",
        "points_per_side": 32,
        "score": 0.88,
        "stability": 0.95,
        "stability_offset": 1.0,
        "nms": 0.7,
    }
    boxes = segmenter(folder, SegmenterConfig(prompt="boxes")).describe()
    assert boxes == {
        **{name: points[name] for name in ("kind", "model", "weights")},
        "prompt": "boxes",
        "score": 0,
    }


def test_mistakes_are_one_line(made, tmp_path: Path) -> None:
    folder, *_ = made(sam)
    tf.ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    for model, error in (
        (f"hf:{tmp_path}", "is a ViTModel: segmenters are SamModel and Sam2Model"),
        ("sam_vit_b.pth", "expected hf:NAME or hf:FOLDER, such as hf:facebook/sam-vit-base"),
        ("hf:/none", "hf:/none: no folder /none"),
    ):
        with pytest.raises(UserError, match=error):
            segmenter(model, SegmenterConfig())
    settings = {"prompt": "boxes", "nms": 0.5}
    with pytest.raises(ConfigError, match=r"nms has no effect: each box has its one mask"):
        refuse_unread(build(SegmenterConfig, settings), settings)
    with pytest.raises(UserError, match="is asked by boxes"):
        segmenter(folder, SegmenterConfig(prompt="boxes")).propose([noise(8, 8)])
