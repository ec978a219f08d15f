"""I-JEPA against a network written out in float64; who sees what, who learns, what tells collapse."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from foveola.config import build
from foveola.losses import huber_loss
from foveola.methods.ijepa import IJepa, IJepaConfig
from foveola.methods.method import spread_and_rank
from foveola.models.vit import ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, Selection, Views, ViewsConfig
from foveola.views.blocks import BlocksConfig, draw_blocks
from foveola.views.tokens import DroppingConfig, draw_drops

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])
SIDE, GRID = 4, 6  # pixels of a patch, patches of a side
MODEL = ViTConfig(
    width=24,
    depth=2,
    heads=3,
    patch_size=SIDE,
    image_size=SIDE * GRID,
    class_token=False,
    positions="sincos",
    drop_path=0.0,
)
BLOCKS = BlocksConfig(targets=3, min_context=4)
VIEWS = ViewsConfig(global_size=SIDE * GRID, global_count=1, local_count=0, blocks=BLOCKS)
PREDICTOR = {"kind": "self", "width": 16, "depth": 2, "heads": 2, "drop_path": 0.0}
PROGRESS = Progress(step=0, total_steps=100, steps_per_epoch=10, batch_size=4)


def ijepa(seed: int = 0, model: ViTConfig = MODEL, views: ViewsConfig = VIEWS, **settings: Any) -> IJepa:
    """Student and teacher differ, and no weight, bias or norm is at its initial value."""
    torch.manual_seed(seed)
    method = IJepa(build(IJepaConfig, {"predictor": PREDICTOR} | settings), model, views)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return method.train()


def batch(images: int = 4, seed: int = 0, drops: tuple[Tensor, Tensor] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    keep, wanted = drops or draw_blocks(BLOCKS, images, (GRID, GRID), generator)
    pixels = torch.randn(images, 1, 3, SIDE * GRID, SIDE * GRID, generator=generator)
    large = Views(
        pixels=pixels,
        boxes=WHOLE.expand(images, 1, 4),
        flips=torch.zeros(images, 1, dtype=torch.bool),
        positions=WHOLE.expand(images, 1, 4),
        selection=Selection(keep[:, None], wanted[:, None]),
    )
    facts = {"blocks/context": torch.tensor(float(keep.shape[1]))}
    return Batch(large, None, torch.full((images,), -1), torch.arange(images), facts)


def predicting(drawn: Batch, patches: Tensor) -> Batch:
    """The batch with other patches to predict."""
    selection = dataclasses.replace(drawn.large.selection, predicted=patches)
    return dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, selection=selection))


@torch.no_grad()
def predictions(method: IJepa, drawn: Batch, groups: int | None = None) -> Tensor:
    assert drawn.large.selection is not None
    images, keep, wanted = (
        drawn.large.pixels[:, 0],
        drawn.large.selection.kept[:, 0],
        drawn.large.selection.predicted[:, 0],
    )
    return method.student(images, keep, wanted, groups or method.groups)


# -- the whole method ----------------------------------------------------------------------------------------


def naive(method: IJepa, drawn: Batch, plain: SimpleNamespace) -> Tensor:
    """Errors in float64: each block on its own, as one sequence of context and mask tokens."""
    student, teacher = copy.deepcopy(method.student).double(), copy.deepcopy(method.teacher).double()
    predictor = student.predictor
    outside, inside = plain.sines(GRID, GRID, 24), plain.sines(GRID, GRID, 16)
    assert drawn.large.selection is not None

    def encode(network: torch.nn.Module, image: Tensor, patches: list[int]) -> Tensor:
        tokens = []
        for patch in patches:
            kernels = (network.patch_embed.proj.weight * plain.pixels(image, patch, SIDE)).sum(dim=(1, 2, 3))
            tokens.append(kernels + network.patch_embed.proj.bias + outside[patch])
        return plain.network(torch.stack(tokens), network)

    errors = []
    for index in range(len(drawn.large.selection.kept)):
        image, keep = drawn.large.pixels[index, 0].double(), drawn.large.selection.kept[index, 0].tolist()
        code = encode(student.backbone, image, keep) @ predictor.embed.weight.T + predictor.embed.bias
        context = torch.stack([code[row] + inside[patch] for row, patch in enumerate(keep)])
        whole = encode(teacher, image, list(range(GRID**2)))
        for block in drawn.large.selection.predicted[index, 0].view(BLOCKS.targets, -1).tolist():
            asked = torch.stack([predictor.mask_token[0, 0] + inside[patch] for patch in block])
            found = plain.network(torch.cat((context, asked)), predictor)[len(keep) :]
            found = found @ student.head.weight.T + student.head.bias
            for row, patch in enumerate(block):
                apart = whole[patch] - whole[patch].mean()
                errors.append(found[row] - apart / (apart.square().mean() + 1e-5).sqrt())
    return torch.stack(errors)


def test_the_patch_embedding_starts_as_linear_layers_do():
    torch.manual_seed(0)
    model = dataclasses.replace(MODEL, width=240, heads=20, patch_size=16, image_size=64)
    views = dataclasses.replace(VIEWS, global_size=64)
    method = IJepa(build(IJepaConfig, {"predictor": PREDICTOR}), model, views)
    for network in (method.student.backbone, method.teacher):
        patches = network.patch_embed.proj
        assert patches.weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert (
            patches.weight.abs().max() > 0.05
        )  # not the uniform default, which ends at 1 / sqrt(768) = 0.036
        assert (patches.bias == 0).all()


def test_the_loss_is_that_of_a_network_written_out(plain: SimpleNamespace):
    drawn = batch()
    assert drawn.large.selection.predicted is not None
    for loss in ("huber", "squared"):
        method = ijepa(loss=loss)
        with torch.no_grad():
            errors = naive(method, drawn, plain).abs()
        output = method(drawn, PROGRESS)
        assert output.losses.keys() == {"prediction"}
        assert len(errors) == drawn.large.selection.predicted.numel()
        small, large = 0.5 * errors**2, errors - 0.5
        expected = torch.where(errors < 1, small, large) if loss == "huber" else errors**2
        assert (errors < 1).any()
        assert (errors > 1).any()
        assert output.losses["prediction"].item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_huber_by_hand():
    found = huber_loss(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 0.0]]))
    assert found.item() == (0.5**2 / 2 + (3 - 0.5)) / 2
    halved = huber_loss(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 0.0]]), beta=2.0)
    assert halved.item() == (0.5**2 / 4 + (3 - 1)) / 2


def test_targets_have_no_scale_and_no_weights():
    """LayerNorm without parameters: the teacher's last norm may be scaled and shifted as a whole."""
    method, drawn = ijepa(), batch()
    before = method(drawn, PROGRESS).losses["prediction"].item()
    with torch.no_grad():
        method.teacher.norm.weight *= 10
        method.teacher.norm.bias *= 10
        method.teacher.norm.bias += 3
    assert method(drawn, PROGRESS).losses["prediction"].item() == pytest.approx(before, rel=1e-4)


# -- who sees what -------------------------------------------------------------------------------------------


def test_the_teacher_sees_everything_and_the_student_the_context():
    method, drawn = ijepa(), batch()
    seen: list[tuple[Tensor, Any]] = []
    for network in (method.teacher, method.student.backbone):
        network.register_forward_hook(
            lambda module, args, out: seen.append((out.patches, args[1].kept if args[1:] else None))
        )
    method(drawn, PROGRESS)
    (teacher, nothing), (student, keep) = seen
    assert drawn.large.selection.kept is not None
    assert teacher.shape[1] == GRID**2
    assert nothing is None
    assert student.shape[1] == drawn.large.selection.kept.shape[2]
    assert torch.equal(keep, drawn.large.selection.kept[:, 0])


def test_predictions_come_from_the_context_alone():
    method, drawn = ijepa(), batch()
    assert drawn.large.selection is not None
    before, loss = predictions(method, drawn), method(drawn, PROGRESS).losses["prediction"]
    views = drawn.large.pixels.clone()
    for index in range(4):
        context = drawn.large.selection.kept[index, 0].tolist()
        for patch in set(range(GRID**2)) - set(context):
            y, x = patch // GRID * SIDE, patch % GRID * SIDE
            views[index, 0, :, y : y + SIDE, x : x + SIDE] += torch.randn(3, SIDE, SIDE)
    hidden = dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, pixels=views))
    assert torch.equal(predictions(method, hidden), before)
    assert not torch.equal(method(hidden, PROGRESS).losses["prediction"], loss)  # the targets are others


def test_blocks_are_predicted_apart_from_each_other():
    """Moving one block changes no prediction of the others; in one sequence it would."""
    method, drawn = ijepa(), batch()
    assert drawn.large.selection.predicted is not None
    size = drawn.large.selection.predicted.shape[2] // BLOCKS.targets
    moved = drawn.large.selection.predicted.clone()
    moved[..., :size] = moved[..., size : 2 * size].flip(2)
    other = predicting(drawn, moved)
    before, after = predictions(method, drawn), predictions(method, other)
    assert torch.equal(before[:, size:], after[:, size:])
    assert (before[:, :size] - after[:, :size]).abs().amax(dim=2).max() > 1e-3
    # The same places, asked for in another order, get the same predictions in that order.
    assert (after[:, :size].flip(1) - before[:, size : 2 * size]).abs().max() < 1e-5
    together = predictions(method, drawn, groups=1), predictions(method, other, groups=1)
    assert (together[0][:, size:] - together[1][:, size:]).abs().max() > 1e-4
    # Within a block they do see each other.
    swapped = drawn.large.selection.predicted.clone()
    swapped[..., 0] = swapped[..., size]
    after = predictions(method, predicting(drawn, swapped))
    assert (after[:, 1:size] - before[:, 1:size]).abs().max() > 1e-5


def test_each_image_is_predicted_from_itself():
    method, drawn = ijepa(), batch()
    views = drawn.large.pixels.clone()
    views[2] += torch.randn_like(views[2])
    before, after = (
        predictions(method, dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, pixels=v)))
        for v in (drawn.large.pixels, views)
    )
    changed = (before - after).abs().amax(dim=(1, 2)) > 0
    assert changed.tolist() == [False, False, True, False]


def test_context_and_targets_are_disjoint_and_as_many_in_every_image():
    for seed in range(20):
        drawn = batch(images=8, seed=seed)
        assert drawn.large.selection.kept is not None
        assert drawn.large.selection.predicted is not None
        for index in range(8):
            context, targets = (
                set(t[index, 0].tolist())
                for t in (drawn.large.selection.kept, drawn.large.selection.predicted)
            )
            assert not context & targets
            assert len(context) == drawn.large.selection.kept.shape[2] > BLOCKS.min_context
        assert drawn.large.selection.predicted.shape[2] % BLOCKS.targets == 0


# -- who learns ----------------------------------------------------------------------------------------------


def test_the_student_learns_and_the_teacher_follows():
    method, drawn = ijepa(), batch()
    method(drawn, PROGRESS).losses["prediction"].backward()
    for name, parameter in method.named_parameters():
        learns = not name.startswith("teacher.") and name != "student.backbone.mask_token"
        assert parameter.requires_grad == (parameter.grad is not None) == learns, name
    before = copy.deepcopy(method.teacher.state_dict())
    assert method.after_step(PROGRESS, 1e-3) == {"momentum": 0.996}
    for name, parameter in method.teacher.named_parameters():
        expected = 0.996 * before[name] + 0.004 * method.student.backbone.get_parameter(name)
        assert (parameter - expected).abs().max() < 1e-6
    assert method.backbone is method.teacher
    assert not method.teacher.training


def test_momentum_rises_in_a_straight_line():
    method = ijepa()
    for step in (0, 25, 50, 75):
        told = method.after_step(dataclasses.replace(PROGRESS, step=step), 1e-3)["momentum"]
        assert told == pytest.approx(0.996 + 0.004 * step / 100, abs=5e-5)


def test_student_and_teacher_begin_as_one():
    torch.manual_seed(0)
    method = IJepa(build(IJepaConfig, {"predictor": PREDICTOR}), MODEL, VIEWS)
    for name, parameter in method.teacher.named_parameters():
        assert torch.equal(parameter, method.student.backbone.get_parameter(name))


def test_a_fixed_batch_is_fitted_without_collapse():
    torch.manual_seed(0)
    method, drawn = IJepa(build(IJepaConfig, {"predictor": PREDICTOR}), MODEL, VIEWS).train(), batch()
    optimizer = torch.optim.AdamW((p for p in method.parameters() if p.requires_grad), lr=3e-3)
    losses, logs = [], {}
    for _ in range(60):
        output = method(drawn, PROGRESS)
        losses.append(output.losses["prediction"].item())
        logs = output.logs
        optimizer.zero_grad()
        output.losses["prediction"].backward()
        optimizer.step()
        method.after_step(PROGRESS, 3e-3)
    assert losses[-1] < 0.6 * losses[0]
    assert float(logs["targets/content_std"]) > 0.05


# -- signals -------------------------------------------------------------------------------------------------


def test_spread_is_taken_before_the_targets_are_normalised():
    """Constant features, and features that tell the place alone, look healthy only after the LayerNorm."""
    method, drawn = ijepa(), batch()
    with torch.no_grad():
        patches = method.teacher(drawn.large.pixels[:, 0]).patches.double()
    logs = method(drawn, PROGRESS).logs
    assert logs["blocks/context"] == drawn.large.selection.kept.shape[2]
    rows = patches.reshape(-1, 24)
    overall = (rows - rows.mean(0)).square().mean().sqrt()
    content = (patches - patches.mean(0)).square().mean().sqrt()
    assert float(logs["targets/std"]) == pytest.approx(overall.item(), rel=1e-5)
    assert float(logs["targets/content_std"]) == pytest.approx(content.item(), rel=1e-5)
    with torch.no_grad():
        method.teacher.patch_embed.proj.weight.zero_()  # blind: what is left is the place
    logs = method(drawn, PROGRESS).logs
    assert float(logs["targets/std"]) > 0.1
    assert float(logs["targets/content_std"]) < 1e-5
    with torch.no_grad():
        method.teacher.norm.weight.zero_()
    logs = method(drawn, PROGRESS).logs
    assert float(logs["targets/std"]) < 1e-5


def test_diagnosis():
    method = ijepa()
    features = method(batch(), PROGRESS).features
    assert features is not None
    spread, rank = spread_and_rank(features)
    assert spread > 0
    assert 1 < rank <= 4
    assert method.figures() == {}


# -- other views and predictors ------------------------------------------------------------------------------


def test_dropped_patches_are_one_block():
    """Other masks of the comparison in the paper (Table 6): random patches, or what is around a rectangle."""
    views = ViewsConfig(
        global_size=SIDE * GRID, global_count=1, local_count=0, dropping=DroppingConfig(predict=0.5)
    )
    assert views.dropping is not None
    method = ijepa(views=views)
    drops = draw_drops(views.dropping, 4, (GRID, GRID), torch.Generator().manual_seed(0))
    drawn = batch(drops=drops)
    assert method.groups == 1
    assert method(drawn, PROGRESS).losses["prediction"].isfinite()
    assert torch.equal(predictions(method, drawn), predictions(method, drawn, groups=1))


@pytest.mark.parametrize(
    ("model", "predictor"),
    [
        ({"class_token": True, "registers": 2}, {}),
        ({"positions": "rope", "registers": 4}, {"heads": 2}),
        ({"positions": "learned"}, {}),
        ({}, {"kind": "cross"}),
    ],
    ids=str,
)
def test_blocks_stay_apart_in_other_networks(model, predictor):
    method = ijepa(model=dataclasses.replace(MODEL, **model), predictor=PREDICTOR | predictor)
    drawn = batch()
    assert drawn.large.selection.predicted is not None
    size = drawn.large.selection.predicted.shape[2] // BLOCKS.targets
    alone = [
        predictions(method, predicting(drawn, block), groups=1)
        for block in drawn.large.selection.predicted.split(size, dim=2)
    ]
    assert (predictions(method, drawn) - torch.cat(alone, dim=1)).abs().max() < 1e-5
    method(drawn, PROGRESS).losses["prediction"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"blocks": None}, r"method\.name=ijepa needs blocks to predict: set views\.blocks"),
        ({"local_count": 2}, r"views\.local_count=0"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        IJepaConfig().check(dataclasses.replace(VIEWS, **views), MODEL)


def test_predictors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"predictor: width=18 is not a multiple of heads=4"):
        build(IJepaConfig, {"predictor": PREDICTOR | {"width": 18, "heads": 4}}).check(VIEWS, MODEL)


def test_published_shapes():
    """ViT-H/14: an encoder of 32 x 1280 without class token, a predictor of 12 x 384 with heads of 24."""
    model = ViTConfig(size="huge", patch_size=14, class_token=False, positions="sincos", drop_path=0.0)
    config = build(IJepaConfig, {"predictor": {"kind": "self", "width": 384, "depth": 12, "heads": 16}})
    with torch.device("meta"):
        student = IJepa(config, model, ViewsConfig(blocks=BlocksConfig())).student
    predictor = sum(p.numel() for p in student.predictor.parameters())
    assert predictor == 12 * (12 * 384**2 + 13 * 384) + 1280 * 384 + 384 + 384 + 2 * 384
    assert student.head.weight.shape == (1280, 384)
    trained = sum(p.numel() for p in student.backbone.parameters() if p.requires_grad)
    assert trained == 32 * (12 * 1280**2 + 13 * 1280) + 588 * 1280 + 1280 + 2 * 1280
    assert student.backbone.pos_embed.shape == (1, 256, 1280)
