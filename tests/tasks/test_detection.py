"""The detector against torchvision's Mask R-CNN; what counts as nothing; odd batches; images of any size."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from foveola.drawing.boxes import color_of
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.schedules import Progress
from foveola.tasks.detection import (
    Detection,
    DetectionConfig,
    DetectionHead,
    check_cells,
    encoder_map,
    pasted,
)
from foveola.tasks.pyramid import ChannelNorm
from foveola.views.annotations import ViewInstances
from foveola.views.batch import Batch, Views, ViewsConfig

MODEL = ViTConfig(width=32, depth=2, heads=2, patch_size=16, image_size=64, drop_path=0.0)
CONFIG = DetectionConfig(
    classes=("a", "b", "c"),
    masks=True,
    channels=16,
    hidden=24,
    convolutions=2,
    score=0.01,
    detections=20,
    proposals=64,
)
SIZE = (128, 128)


def made(
    config: DetectionConfig = CONFIG, model: ViTConfig = MODEL
) -> tuple[VisionTransformer, DetectionHead]:
    torch.manual_seed(0)
    backbone, head = VisionTransformer(model), DetectionHead(config, model)
    with torch.no_grad():
        for parameter in (*backbone.parameters(), *head.parameters()):
            parameter += 0.02 * torch.randn_like(parameter)
    return backbone, head


def pixels(count: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def target(*boxes: tuple[float, float, float, float], size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    """Objects of classes 1, 2, 3, 1 ..., whose masks are the left half of their boxes."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[round(y0) : round(y1), round(x0) : round((x0 + x1) / 2)] = 1
    labels = torch.arange(len(boxes)) % 3 + 1
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": labels, "masks": masks}


def whole(count: int = 2) -> Tensor:
    return torch.tensor([0.0, 0, SIZE[1], SIZE[0]]).expand(count, 4)


class Trunk(nn.Module):
    """Encoder and pyramid as torchvision wants a backbone to be."""

    def __init__(self, backbone: nn.Module, head: DetectionHead) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.out_channels = backbone, head.pyramid, CONFIG.channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict(zip("0123p", self.pyramid(encoder_map(self.backbone, x)), strict=True))


def theirs(backbone: nn.Module, head: DetectionHead) -> MaskRCNN:
    """torchvision's Mask R-CNN with the same backbone and a copy of all other weights."""
    layers = [CONFIG.channels] * CONFIG.convolutions
    model = MaskRCNN(
        Trunk(backbone, head),
        min_size=SIZE[0], max_size=SIZE[0], image_mean=[0.0] * 3, image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_head=RPNHead(CONFIG.channels, 3, conv_depth=2),
        rpn_post_nms_top_n_train=1000,
        box_head=FastRCNNConvFCHead((CONFIG.channels, 7, 7), layers, [CONFIG.hidden], norm_layer=ChannelNorm),
        box_predictor=FastRCNNPredictor(CONFIG.hidden, 4),
        mask_head=MaskRCNNHeads(CONFIG.channels, layers, 1, norm_layer=ChannelNorm),
        mask_predictor=MaskRCNNPredictor(CONFIG.channels, CONFIG.channels, 4),
        box_batch_size_per_image=CONFIG.proposals,
        box_score_thresh=CONFIG.score, box_detections_per_img=CONFIG.detections,
    )  # fmt: skip
    model.rpn.load_state_dict(head.proposals.state_dict())
    model.roi_heads.load_state_dict(head.regions.state_dict())
    return model


def test_losses_and_gradients_are_torchvisions() -> None:
    backbone, head = made()
    other = theirs(backbone, head)
    targets = [target((10, 20, 60, 90), (70, 5, 128, 40)), target((0, 0, 128, 128))]
    torch.manual_seed(5)
    found = head.losses(encoder_map(backbone, pixels()), SIZE, whole(), targets, (None, None))
    sum(found.values()).backward()
    mine = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    # Its transform draws a size first.
    other.rpn.register_forward_pre_hook(lambda *_: torch.manual_seed(5) and None)
    expected = other(list(pixels()), targets)
    sum(expected.values()).backward()
    names = {
        "proposal": "loss_objectness", "proposal_box": "loss_rpn_box_reg",
        "class": "loss_classifier", "box": "loss_box_reg", "mask": "loss_mask",
    }  # fmt: skip
    assert found.keys() == names.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[names[name]])
        assert value > 0
    assert len(mine) > 20
    for name, p in backbone.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(mine[name], p.grad)


@torch.no_grad()
def test_detections_are_torchvisions() -> None:
    backbone, head = made()
    other = theirs(backbone, head).eval()
    backbone.eval()
    head.eval()
    for image, expected in zip(pixels(), other(list(pixels())), strict=True):
        found = head.detect(encoder_map(backbone, image[None]), SIZE, SIZE)
        assert len(found["boxes"]) == CONFIG.detections
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(found[name], expected[name])
        masks = pasted(found["masks"], found["boxes"], *SIZE)
        assert torch.equal(masks, expected["masks"][:, 0] > 0.5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"score": 0.0}, {"masks": False}, {"detections": 3}, {"score": 0.99}])
def test_an_answer_without_branches_is_that_of_torchvision(changes: dict[str, Any]) -> None:
    """As a program of torch.export has it; of images that do not fill the view, one of them of one pixel."""
    backbone, head = made(replace(CONFIG, **changes))
    head.eval()
    for rows, columns in ((128, 128), (128, 70), (33, 128), (1, 1)):
        view = torch.zeros(1, 3, *SIZE)
        view[:, :, :rows, :columns] = pixels(1)[:, :, :rows, :columns]
        expected = head.detect(encoder_map(backbone.eval(), view), SIZE, (rows, columns))
        found = head.traced(backbone, pixels(1), torch.tensor([rows, columns]))
        assert len(found["boxes"]) == len(expected["boxes"])
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-6)
        assert torch.equal(found["labels"] + 1, expected["labels"])
        assert ("masks" in found) == ("masks" in expected)
        if "masks" in found:
            torch.testing.assert_close(found["masks"], expected["masks"][:, 0], rtol=0, atol=1e-5)


def test_patches_of_14_pixels() -> None:
    """Anchors are centred on cells of 3.5 to 56 pixels, and a box is read from where it is."""
    model = replace(MODEL, patch_size=14, image_size=56)
    _, head = made(model=model)
    maps = head.pyramid(torch.randn(1, 32, 8, 8))
    anchors = head.proposals.anchors(maps)
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(-1, 3, 2)
    expected = [
        (x * stride, y * stride)
        for stride in (3.5, 7, 14, 28, 56)
        for y in range(round(112 / stride))
        for x in range(round(112 / stride))
    ]
    torch.testing.assert_close(centres, torch.tensor(expected)[:, None].expand(-1, 3, -1))
    ramp = [
        torch.arange(112 / s)[None, None, None].expand(1, 1, round(112 / s), -1) * s + s / 2
        for s in (3.5, 7, 14, 28)
    ]
    box = torch.tensor([[21.0, 14, 70, 63]])
    read = head.regions.box_roi_pool({str(k): m for k, m in enumerate(ramp)}, [box], [(112, 112)])
    # Cells of the box are 7 pixels wide; RoIAlign takes the centre of a cell of the map for its corner.
    torch.testing.assert_close(read[0, 0], (21 + 7 * (torch.arange(7) + 0.5) + 1.75).expand(7, 7))


# -- what counts as nothing ----------------------------------------------------------------------------------


def test_nothing_is_proposed_beyond_the_image() -> None:
    backbone, head = made()
    inside = torch.tensor([[0.0, 0, 50, 33], [40, 10, 128, 128]])
    maps = head.pyramid(encoder_map(backbone, pixels()))
    boxes, (_, _, anchors, there) = head.proposals.propose(maps, SIZE, inside)
    for some, (x0, y0, x1, y1), inner in zip(boxes, inside.tolist(), there, strict=True):
        assert len(some)
        assert (some[:, :2] >= torch.tensor([x0, y0])).all()
        assert (some[:, 2:] <= torch.tensor([x1, y1])).all()
        for anchor, counted in zip(anchors.tolist(), inner.tolist(), strict=True):
            x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
            assert counted == (x0 <= x < x1 and y0 <= y < y1)


def test_anchors_in_padding_and_crowds_are_no_examples() -> None:
    """By a loop over anchors: 1 for those of the object, 0 for background that counts, -1 for the others."""
    _, head = made()
    maps = head.pyramid(torch.zeros(1, 32, 8, 8))
    frame = torch.tensor([0.0, 0, 100, 80])
    _, made_of = head.proposals.propose(maps, SIZE, frame[None])
    anchors, there = made_of[2], made_of[3][0]
    crowd = torch.zeros(SIZE, dtype=torch.bool)
    crowd[:, 50:] = True
    plain, _ = head.proposals._assign(anchors, there, frame, target((10, 10, 42, 42)), None)
    labels, matched = head.proposals._assign(anchors, there, frame, target((10, 10, 42, 42)), crowd)
    hidden = 0
    for k, (x0, y0, x1, y1) in enumerate(anchors.tolist()):
        if not there[k]:
            assert plain[k] == labels[k] == -1
            continue
        u0, u1, v0, v1 = max(x0, 0), min(x1, 100), max(y0, 0), min(y1, 80)
        share = max(u1 - max(u0, 50), 0) / (u1 - u0)
        hidden += share > 0.5
        assert labels[k] == (-1 if plain[k] == 0 and share > 0.5 else plain[k])
        assert v1 > v0
    assert hidden > 50
    assert (labels == 1).any()
    assert (labels == 0).any()
    assert torch.equal(
        matched[labels == 1], torch.tensor([[10.0, 10, 42, 42]]).expand(int((labels == 1).sum()), 4)
    )


def test_pixels_of_a_crowd_teach_nothing_about_background() -> None:
    """All of the view is crowd: nothing is learned of proposals or classes but what its object says."""
    backbone, head = made()
    everything = torch.ones(SIZE, dtype=torch.bool)
    losses = head.losses(encoder_map(backbone, pixels(1)), SIZE, whole(1), [target()], (everything,))
    assert {name: float(value.detach()) for name, value in losses.items()} == {
        "proposal": 0, "proposal_box": 0, "class": 0
    }  # fmt: skip
    with_object = head.losses(
        encoder_map(backbone, pixels(1)), SIZE, whole(1), [target((20, 20, 90, 90))], (everything,)
    )
    assert all(value > 0 for value in with_object.values())


class Instances(NamedTuple):
    """As the views of a batch have them."""

    view: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None


def method(**changes: Any) -> Detection:
    views = ViewsConfig(global_size=128, global_count=1, local_count=0)
    return Detection(replace(CONFIG, **changes), MODEL, views)


@pytest.mark.parametrize("masks", [True, False])
def test_targets_of_views(masks) -> None:
    """Of six instances in three views two are objects; one is crowd, one has no class, two are slivers."""
    boxes = torch.tensor(
        [[0.0, 0, 9, 9], [4, 4, 12, 8], [0, 0, 16, 2], [3, 3, 3.5, 9], [1, 1, 5, 5], [0, 0, 16, 0.2]]
    )
    labels, view = torch.tensor([2, 0, 1, 0, -1, 1]), torch.tensor([2, 0, 0, 2, 0, 2])
    crowd = torch.tensor([False, False, True, False, False, False])
    drawn = torch.zeros(6, 16, 16, dtype=torch.uint8)
    for k, (x0, y0, x1, y1) in enumerate(boxes.round().int().tolist()):
        drawn[k, y0:y1, x0:x1] = 1
    drawn[4] = 0
    drawn[4, 1, 1] = 1
    instances = Instances(view, boxes, labels, crowd, drawn if masks else None)
    targets, ignored = method(masks=masks).targets_of(instances, 3, (16, 16))
    assert [t["boxes"].tolist() for t in targets] == [[[4, 4, 12, 8]], [], [[0, 0, 9, 9]]]
    assert [t["labels"].tolist() for t in targets] == [[1], [], [3]]
    assert ignored[1] is None
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[0:2] = True
    expected[1, 1] = True
    if not masks:
        expected[1:5, 1:5] = True
    assert torch.equal(ignored[0], expected)
    if masks:
        assert torch.equal(targets[2]["masks"], drawn[:1])
    assert ("masks" in targets[1]) == masks


BATCHES = {
    "no object at all": ([target(), target()], [None, None]),
    "one image without": ([target(), target((10, 10, 100, 90))], [None, None]),
    "on the borders": ([target((0, 0, 128, 20)), target((64, 64, 128, 128))], [None, None]),
    "all crowd": ([target(), target()], [torch.ones(SIZE, dtype=torch.bool)] * 2),
    "300 objects": (
        [
            target(
                *(
                    (4.0 * (k % 30), 12.0 * (k // 30), 4.0 * (k % 30) + 8, 12.0 * (k // 30) + 11)
                    for k in range(300)
                )
            ),
            target(),
        ],
        [None, None],
    ),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, masks=False), replace(CONFIG, classes=("only",))])
def test_every_batch_gives_finite_losses_and_a_gradient_to_all_that_learns(name, config) -> None:
    """Data-parallel training waits for the gradient of every weight."""
    trained = Detection(config, MODEL, ViewsConfig(global_size=128, global_count=1, local_count=0))
    targets, ignored = BATCHES[name]
    targets = [dict(each) for each in targets]
    for each in targets:
        each["labels"] = each["labels"].clamp(max=len(config.names))
    features = encoder_map(trained.backbone, pixels())
    losses = trained.task_head.losses(features, SIZE, whole(), targets, ignored)
    sum(losses.values()).backward()
    assert all(bool(value.isfinite()) for value in losses.values())
    for weight, p in trained.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, weight
            assert bool(p.grad.isfinite().all()), weight
    assert not trained.backbone.norm.weight.requires_grad
    assert ("mask" in losses) == (bool(config.masks) and name != "all crowd")


# -- images --------------------------------------------------------------------------------------------------


def encoder_with(head: DetectionHead, backbone: VisionTransformer) -> Encoder:
    encoder = Encoder(EncoderConfig(MODEL, TransformConfig(146, 128)), backbone)
    head.requires_grad_(False).eval()
    encoder.head = head
    return encoder


def test_an_image_is_seen_alone_and_answers_are_in_its_pixels(monkeypatch) -> None:
    """Of an image of 60 x 200 the view holds 38 x 128 pixels; boxes and masks come back on 60 x 200."""
    backbone, head = made()
    encoder = encoder_with(head, backbone)
    seen = []

    def detect(features: Tensor, size: tuple[int, int], image: tuple[int, int]) -> dict[str, Tensor]:
        seen.append((size, image))
        left = torch.zeros(1, 1, 28, 28)
        left[..., :14] = 1
        return {
            "boxes": torch.tensor([[64.0, 0, 128, 38]]), "labels": torch.tensor([2]),
            "scores": torch.tensor([0.5]), "masks": left,
        }  # fmt: skip

    monkeypatch.setattr(head, "detect", detect)
    (found,) = head.predict(encoder, [np.zeros((60, 200, 3), np.uint8)])
    assert seen == [((128, 128), (38, 128))]
    torch.testing.assert_close(found.boxes, torch.tensor([[100.0, 0, 200, 60]]))
    assert (found.names, found.labels.tolist()) == (("a", "b", "c"), [1])
    assert found.masks.shape == (1, 60, 200)
    assert not found.masks[0, :, :98].any()
    assert found.masks[0, 2:58, 104:148].all()
    assert not found.masks[0, :, 152:].any()


def test_a_figure_shows_objects_and_what_the_head_finds(monkeypatch) -> None:
    """Views of an image in their upper 96 rows; the mask of a found object ends where its image does."""
    trained = method().train()
    assert trained.figures() == {}
    instances = ViewInstances(
        torch.tensor([0, 4]), torch.tensor([[10.0, 10, 60, 60], [0, 0, 9, 9]]), torch.tensor([1, 0]),
        torch.tensor([False, False]), torch.ones(2, 128, 128, dtype=torch.uint8),
    )  # fmt: skip
    boxes = torch.tensor([0, 0, 1, 4 / 3]).expand(5, 1, 4)
    flips, none = torch.zeros(5, 1, dtype=torch.bool), torch.zeros(5, dtype=torch.int64)
    views = Views(torch.zeros(5, 1, 3, 128, 128), boxes, flips, boxes, instances=instances)
    trained(Batch(views, None, none, none, {}), Progress(0, 1, 1, 5))
    seen = []

    def detect(features: Tensor, size: tuple[int, int], image: tuple[int, int]) -> dict[str, Tensor]:
        seen.append((tuple(features.shape), size, image, trained.task_head.training))
        return {
            "boxes": torch.tensor([[0.0, 0, 128, 96], [0, 0, 64, 64]]), "labels": torch.tensor([3, 1]),
            "scores": torch.tensor([0.9, 0.4]), "masks": torch.ones(2, 1, 28, 28),
        }  # fmt: skip

    monkeypatch.setattr(trained.task_head, "detect", detect)
    sheet = trained.figures()["detections"]
    assert seen == [((1, 32, 8, 8), (128, 128), (96, 128), False)] * 4
    assert trained.task_head.training
    assert sheet.shape == (2 * (3 * 128 + 4), 4 * (3 * 128 + 4), 3)  # tiles of three times their size
    plain = np.rint(255 * np.array(ViewsConfig().color.mean))

    def blended(name: str) -> np.ndarray:
        return np.rint(0.6 * plain + 0.4 * np.array(color_of(name)))

    truth, found = sheet[:388], sheet[388:]
    assert np.abs(truth[2 + 3 * 100, 2 + 3 * 100] - blended("b")).max() <= 1
    assert np.abs(truth[2 + 3 * 100, 388 + 2 + 3 * 100] - plain).max() <= 1  # the second has no object
    for column in range(4):
        below = 388 * column + 2 + 3 * 100
        assert np.abs(found[2 + 3 * 90, below] - blended("c")).max() <= 1
        assert np.abs(found[2 + 3 * 110, below] - plain).max() <= 1
        assert tuple(found[2 + 3 * 50, 388 * column + 2]) == color_of("c")  # the edge of the box
        assert tuple(found[2 + 3 * 50, 388 * column + 2 + 3 * 63]) != color_of("a")  # below the score


def test_answers_do_not_depend_on_other_images() -> None:
    backbone, head = made()
    encoder = encoder_with(head, backbone)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((90, 128), (200, 40), (31, 33))]
    together = head.predict(encoder, images)
    for image, found in zip(images, together, strict=True):
        (alone,) = head.predict(encoder, [image])
        assert torch.equal(alone.boxes, found.boxes)
        assert torch.equal(alone.masks, found.masks)
        assert len(found.boxes)
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= image.shape[1] + 1e-3).all()
        assert (found.boxes[:, 3] <= image.shape[0] + 1e-3).all()


def test_a_detector_without_masks_gives_none() -> None:
    backbone, head = made(replace(CONFIG, masks=False))
    (found,) = head.predict(encoder_with(head, backbone), [np.zeros((64, 64, 3), np.uint8)])
    assert found.masks is None
    assert not any("mask" in name for name in head.state_dict())
    assert "boxes" in method(masks=False).advice(1)[0]
    assert method().advice(1) == []


def test_sizes_are_made_of_whole_cells() -> None:
    check_cells(1024, 16, "views.global_size")
    check_cells(1008, 14, "views.global_size")
    with pytest.raises(ValueError, match=r"global_size=1022 is not a multiple of 28.*try 1008 or 1036"):
        check_cells(1022, 14, "views.global_size")
    with pytest.raises(ValueError, match=r"method\.image_size=48 is not a multiple of 32"):
        replace(CONFIG, image_size=48).check(
            ViewsConfig(global_size=64, global_count=1, local_count=0), MODEL
        )
