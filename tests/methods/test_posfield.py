"""Masked positions: the term against a loop, its switches, mixtures with other methods, training."""

import json
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import foveola
from foveola.config import ConfigError
from foveola.data.sample import Canvases
from foveola.data.sources import open_source
from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.methods.targets import TargetConfig
from foveola.methods.terms.patch import PatchTermConfig
from foveola.methods.terms.position import PositionTermConfig, guess_sheet, position_errors
from foveola.methods.terms.spread import SpreadTermConfig
from foveola.methods.terms.term import Heads
from foveola.models.heads import HeadConfig
from foveola.models.plain import as_plain
from foveola.models.vit import Inputs, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.training.recipe import resolve
from foveola.views.batch import Batch, Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.placement import PlacementConfig
from foveola.views.position_masks import PositionMaskingConfig
from foveola.views.tokens import MaskingConfig

MODEL = ViTConfig(
    width=24,
    depth=2,
    heads=3,
    patch_size=4,
    image_size=16,
    drop_path=0.0,
    positions="field",
    field_size=(6, 6),
)
VIEWS = ViewsConfig(
    global_size=16,
    local_size=8,
    local_count=2,
    color=ColorConfig(),
    masking=MaskingConfig(probability=1.0, stratified=True, smallest_block=1),
    placement=PlacementConfig(),
    position_masking=PositionMaskingConfig(),
)
HEADS = {
    name: HeadConfig(prototypes=k, hidden=16, bottleneck=5)
    for name, k in {"main": 7, "patches": 8, "positions": 9}.items()
}
TERMS = {
    "heads": HEADS,
    "patch": PatchTermConfig(head="patches"),
    "position": PositionTermConfig(),
    "spread": SpreadTermConfig(),
}


def images(count: int = 6, size: int = 24) -> Canvases:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(count, 1, 12, 12, dtype=torch.uint8)
    masks[:, :, 3:9, 2:8] = 255
    return Canvases(
        images=torch.randint(0, 256, (count, 3, size, size), generator=generator).byte(),
        extents=torch.full((count, 2), size),
        aspects=torch.full((count,), 4 / 3),
        object_masks=masks,
        whole=torch.zeros(count, 1, dtype=torch.bool),
        object_labels=torch.full((count, 1), -1),
        labels=torch.full((count,), -1),
        indices=torch.arange(count),
    )


def batch_of(views: ViewsConfig = VIEWS, step: int = 0) -> Batch:
    return make_views(images(), views, 4, Streams(0, step))


def build(
    views: ViewsConfig = VIEWS, model: ViTConfig = MODEL, terms: dict | None = None, noise: float = 0.2
) -> Distillation:
    """A method whose student and teacher differ; equal parameters whatever else there is."""
    torch.manual_seed(0)
    config = DistillationConfig(**(TERMS if terms is None else terms))
    config.check(views, model)
    method = Distillation(config, model, views)
    with torch.no_grad():
        for name, parameter in sorted(method.named_parameters()):
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            if not name.endswith(".g"):
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return method.train()


# -- the term ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["centering", "sinkhorn"])
def test_the_loss_is_a_loop_over_single_views(kind: str, progress: Progress):
    target = TargetConfig(kind=kind, temperature=Schedule(value=0.05), student_temperature=0.2)
    terms = TERMS | {"position": PositionTermConfig(weight=1.5, target=target)}
    method, batch = build(terms=terms), batch_of()
    center = torch.randn(9)
    if kind == "centering":
        method.position.targets.centering.center.copy_(center)
    found = method(batch, progress).losses["position"]

    student, teacher = method.student, method.teacher
    rows, logits, weights = [], [], []
    for b in range(6):
        for v in range(2):
            view, place = batch.large.pixels[b, v][None], batch.large.positions[b, v][None]
            flip, unplaced = batch.large.flips[b, v][None], batch.large.hidden_positions.mask[b, v][None]
            theirs = teacher.backbone(view, Inputs(positions=place, flips=flip)).patches[0]
            mine = student.backbone(
                view,
                Inputs(
                    masked=batch.large.hidden_contents.mask[b, v][None],
                    positions=place,
                    flips=flip,
                    unplaced=unplaced,
                ),
            ).patches[0]
            for n in unplaced[0].nonzero()[:, 0].tolist():
                rows.append(teacher.head("positions")(theirs[n][None])[0].double().detach())
                logits.append(student.head("positions")(mine[n][None])[0].double() / 0.2)
                weights.append(1 / int(unplaced.sum()) / 12)
    assert len(rows) > 10
    scores = torch.stack(rows) / 0.05
    if kind == "centering":
        targets = torch.softmax(scores - center.double() / 0.05, dim=1)
    else:
        targets = torch.exp(scores - scores.max())
        for _ in range(3):
            targets = targets / targets.sum(dim=0) / 9
            targets = targets / targets.sum(dim=1, keepdim=True) / len(rows)
        targets = targets * len(rows)
    total = sum(
        -w * (t * torch.log_softmax(x, dim=0)).sum() for w, t, x in zip(weights, targets, logits, strict=True)
    )
    assert found.item() == pytest.approx(1.5 * total.item(), rel=1e-4)


def test_only_the_student_loses_positions_and_only_in_global_views(
    monkeypatch: pytest.MonkeyPatch, progress: Progress
):
    method, batch = build(), batch_of()
    seen: list[tuple[str, Inputs]] = []
    for name in ("student", "teacher"):
        network = getattr(method, name).backbone
        plain = network.forward

        def spy(images, inputs, name=name, plain=plain):
            seen.append((name, inputs))
            return plain(images, inputs)

        monkeypatch.setattr(network, "forward", spy)
    method(batch, progress)
    (_, there), (_, here), (_, local) = seen
    assert [name for name, _ in seen] == ["teacher", "student", "student"]
    assert there.masked is None
    assert there.unplaced is None
    assert torch.equal(here.unplaced, batch.large.hidden_positions.mask.flatten(0, 1))
    assert torch.equal(here.masked, batch.large.hidden_contents.mask.flatten(0, 1))
    assert local.unplaced is None
    assert local.masked is None
    # Teacher and student read the same places.
    for call in (there, here):
        assert torch.equal(call.positions, batch.large.positions.flatten(0, 1))
        assert torch.equal(call.flips, batch.large.flips.flatten(0, 1))
    assert torch.equal(local.positions, batch.small.positions.flatten(0, 1))
    assert torch.equal(local.flips, batch.small.flips.flatten(0, 1))


def test_the_teacher_never_learns_what_a_position_mask_is():
    method = build()
    names = {name for name, _ in method.teacher.named_parameters()}
    assert "backbone.pos_mask_token" not in names
    assert "backbone.pos_field.values" in names
    before = method.teacher.backbone.pos_field.values.clone()
    method.after_step(Progress(0, 100, 10, 6), 1e-3)
    moved = method.teacher.backbone.pos_field.values
    expected = 0.996 * before + 0.004 * method.student.backbone.pos_field.values
    torch.testing.assert_close(moved, expected)


def test_the_term_reaches_its_head_the_mask_and_the_field(progress: Progress):
    method, batch = build(), batch_of()
    losses = method(batch, progress).losses
    losses["position"].backward(retain_graph=True)
    for name, p in method.student.named_parameters():
        if "heads.main" in name or "heads.patches" in name:
            assert p.grad is None or not p.grad.any(), name
    for name in ("backbone.pos_mask_token", "backbone.pos_field.values", "heads.positions.last_layer.v"):
        assert method.student.get_parameter(name).grad.abs().sum() > 0, name
    torch.stack(list(losses.values())).sum().backward()
    for name, p in method.student.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.isfinite().all()), name


def test_views_without_position_masks_leave_a_zero_loss(progress: Progress):
    views = replace(VIEWS, position_masking=PositionMaskingConfig(share=1e-9))
    method = build(views)
    losses = method(batch_of(views), progress).losses
    assert losses["position"].item() == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in method.student.parameters() if p.requires_grad)
    assert method.figures().keys() == {"position_field"}
    assert "position/found" not in method.diagnose()


# -- switches ------------------------------------------------------------------------------------------------


def run(method: Distillation, views: ViewsConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = method(batch_of(views), Progress(0, 1000, 10, 6)).losses
    torch.stack([loss for name, loss in losses.items() if name != "position"]).sum().backward()
    return losses, {name: p.grad for name, p in method.student.named_parameters() if p.grad is not None}


def same(one: tuple, other: tuple) -> None:
    for a, b in zip(one, other, strict=True):
        shared = a.keys() & b.keys()
        assert {"token", "patch", "spread"} <= shared or "backbone.cls_token" in shared
        for name in shared:
            assert torch.equal(a[name], b[name]), name


def test_without_the_term_the_others_are_the_same_bit_for_bit():
    without = {name: value for name, value in TERMS.items() if name != "position"}
    same(run(build(), VIEWS), run(build(terms=without), VIEWS))


def test_without_anyone_chosen_it_is_the_plain_method_bit_for_bit():
    nobody = replace(VIEWS, position_masking=PositionMaskingConfig(share=1e-9))
    plain = replace(VIEWS, position_masking=None)
    without = {name: value for name, value in TERMS.items() if name != "position"}
    same(run(build(nobody), nobody), run(build(plain, terms=without), plain))


def test_unmoved_views_stand_at_their_boxes_bit_for_bit():
    still = replace(VIEWS, placement=PlacementConfig(around="image", distribution="constant"))
    same(run(build(still), still), run(build(replace(VIEWS, placement=None)), replace(VIEWS, placement=None)))


def test_without_a_field_places_change_nothing():
    """A learned table with all the switches off is DINOv2, whatever the batch says of places."""
    table = replace(MODEL, positions="learned")
    plain = replace(VIEWS, placement=None, position_masking=None)
    without = {name: value for name, value in TERMS.items() if name != "position"}
    batch = batch_of(plain)
    placed = replace(
        batch,
        large=replace(batch.large, positions=batch.large.boxes / 2),
        small=replace(batch.small, positions=batch.small.boxes / 2),
    )
    losses = [build(plain, table, without)(b, Progress(0, 1000, 10, 6)).losses for b in (batch, placed)]
    for name in losses[0]:
        assert torch.equal(losses[0][name], losses[1][name]), name


# -- mixtures ------------------------------------------------------------------------------------------------

SINKHORN = {"position": PositionTermConfig(target=TargetConfig(kind="sinkhorn"))}
MIXTURES = {
    "field alone": (replace(VIEWS, placement=None, position_masking=None), MODEL, {"position": None}),
    "field, moved": (replace(VIEWS, position_masking=None), MODEL, {"position": None}),
    "masked positions of a table": (replace(VIEWS, placement=None), replace(MODEL, positions="learned"), {}),
    "iBOT": (VIEWS, MODEL, {"spread": None, "patch": PatchTermConfig(head="main")}),
    "DINO": (replace(VIEWS, masking=None), MODEL, {"patch": None, "spread": None}),
    "positions alone": (
        replace(VIEWS, masking=None),
        MODEL,
        {"patch": None, "spread": None, "token": None},
    ),
    "one head": (VIEWS, MODEL, {"position": PositionTermConfig(head="main")}),
    "ODIS": (replace(VIEWS, objects=ObjectsConfig(min_coverage=0.01)), MODEL, {}),
    "ODIS, Sinkhorn": (
        replace(VIEWS, objects=ObjectsConfig(attention_local=True, min_coverage=0.01)),
        replace(MODEL, registers=4, layer_scale=1e-5, mlp="swiglu"),
        SINKHORN,
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_learn(name: str):
    views, model, terms = MIXTURES[name]
    method = build(views, model, TERMS | terms, noise=0.0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for step in range(12):
        losses = method(batch_of(views, step % 2), Progress(step, 1000, 10, 6)).losses
        total = torch.stack(list(losses.values())).sum()
        assert total.isfinite(), losses
        total.backward()
        for parameter, p in method.student.named_parameters():
            assert not p.requires_grad or p.grad is not None, parameter
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(step, 1000, 10, 6), 2e-3)
        history.append(total.item())
    if name != "positions alone":  # nothing to go by: in the paper, too, it fails (Table 5b)
        assert sum(history[-2:]) < sum(history[:2])  # of the same two batches
    assert math.isfinite(method.diagnose().get("position/distance", 0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views.position_masking": None}, r"method\.position needs masked positions"),
        ({"model.positions": "learned"}, r"views\.placement moves views in a position field"),
        (
            {"model.positions": "rope", "model.width": 96, "views.placement": None},
            r"views\.position_masking hides what is added to patches",
        ),
        ({"method.position.head": "place"}, r"position\.head='place' is not among heads: main"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve("posfield-tiny-tinyimagenet", changes)


@pytest.mark.parametrize(
    "change", ["model.positions=field", "views.placement={}", "views.position_masking={}"]
)
@pytest.mark.parametrize(
    "recipe", ["capi-tiny-tinyimagenet", "mae-tiny-tinyimagenet", "ijepa-tiny-tinyimagenet"]
)
def test_other_methods_know_no_field(recipe: str, change: str):
    with pytest.raises(ConfigError, match="knows no position field"):
        resolve(recipe, [change])


# -- images ------------------------------------------------------------------------------------------------


def test_guesses_are_the_most_similar_patches_of_the_teacher(progress: Progress):
    method, batch = build(), batch_of()
    method(batch, progress)
    student, teacher, images, unplaced = method.position.shown
    heads = method.position.shown_heads
    assert torch.equal(images, batch.large.pixels.flatten(0, 1))
    assert heads == (method.student.head("positions"), method.teacher.head("positions"))
    guesses = method.position.guesses(student, teacher, heads)
    for s in range(12):
        mine, theirs = heads[0].project(student[s]).detach(), heads[1].project(teacher[s])
        for n in range(16):
            similar = [float(mine[n] @ theirs[m]) for m in range(16)]
            assert similar[int(guesses[s, n])] == pytest.approx(max(similar), abs=1e-6)
    # A student that is the teacher and sees everything finds each patch where it is.
    assert torch.equal(
        method.position.guesses(teacher, teacher, Heads(heads[1], heads[1])), torch.arange(16).expand(12, 16)
    )
    found, distance = position_errors(guesses, unplaced, 4)
    logs = method.diagnose()
    assert logs["position/found"] == pytest.approx(found)
    assert logs["position/distance"] == pytest.approx(distance)


def test_errors_of_places_by_hand():
    guesses = torch.tensor([[0, 1, 2, 0, 4, 5]])  # of 2 x 3 patches
    unplaced = torch.tensor([[True, False, False, True, False, True]])
    found, distance = position_errors(guesses, unplaced, 3)
    assert found == pytest.approx(2 / 3)
    assert distance == pytest.approx(1 / 3)  # the fourth patch, (1, 0), was taken for (0, 0)
    unplaced[0, 4], guesses[0, 4] = True, 0
    assert position_errors(guesses, unplaced, 3)[1] == pytest.approx((1 + 2**0.5) / 4)


def test_a_sheet_shows_true_and_guessed_places():
    images = torch.full((2, 3, 8, 8), 0.5)
    guesses = torch.tensor([[3, 1, 2, 3], [0, 1, 2, 0]])  # of 2 x 2 patches
    unplaced = torch.tensor([[True, False, False, False], [False, False, False, True]])
    sheet = guess_sheet(images, guesses, unplaced, (2, 2))
    assert sheet.shape == (30, 20, 3)
    assert sheet.dtype == np.uint8
    rows = [sheet[1 + 10 * r : 9 + 10 * r] for r in range(3)]
    assert (rows[0][:, 1:9] == 128).all()
    top_left, bottom_right, dark = [0, 0, 255], [255, 255, 0], [38, 38, 38]
    assert rows[1][0, 1].tolist() == top_left
    assert rows[2][0, 1].tolist() == bottom_right  # guessed at the other end
    assert rows[1][0, 6].tolist() == rows[2][7, 1].tolist() == dark
    assert rows[1][7, 18].tolist() == bottom_right
    assert rows[2][7, 18].tolist() == top_left


# -- it trains -----------------------------------------------------------------------------------------------

SMALL = {
    "duration": "40 steps",
    "batch_size": 8,
    "device": "cpu",
    "log_every": 1,
    "model.width": 48,
    "model.depth": 2,
    "model.image_size": 32,
    "views.global_size": 32,
    "views.global_scale": [0.6, 1.0],
    "views.local_size": 16,
    "views.local_count": 2,
    "views.color.jitter": 0.0,
    "views.color.grayscale": 0.0,
    "views.color.blur": [0.0, 0.0, 0.0],
    "views.color.solarize": [0.0, 0.0, 0.0],
    "loader.workers": 0,
    "transform": {"resize": 32, "crop": 32},
    "checkpoint_every": "40 steps",
}
SMALL |= {
    f"method.heads.{name}": {"prototypes": 16, "hidden": 32, "bottleneck": 16}
    for name in ("main", "patches", "positions")
}


def train(recipe: str, out: Path, data: str, precision: str) -> list[dict[str, float]]:
    foveola.pretrain(recipe, data=data, out=str(out), precision=precision, **SMALL)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [step for step in steps if "loss" in step]


def check_run(steps: list[dict[str, float]], out: Path) -> None:
    assert len(steps) == 40
    for step in steps:
        for name in ("token", "patch", "position", "spread"):
            assert math.isfinite(step[f"loss/{name}"]), (step["step"], name)
        for name in ("token", "patch", "position"):
            assert 0 < step[f"{name}/target_entropy"] <= math.log(16) + 1e-4
    last = {
        name: sum(step[name] for step in steps[-10:]) / 10 for name in ("loss", "position/target_entropy")
    }
    assert last["loss"] < steps[0]["loss"]
    assert 0.1 < last["position/target_entropy"] < 0.99 * math.log(16)
    sheets = sorted(path.name.rpartition("-")[0] for path in (out / "figures").iterdir())
    assert {"position_field", "positions"} <= set(sheets)
    encoder = foveola.load(out)
    images = torch.randn(2, 3, 32, 32)
    assert "pos_field.values" in encoder.weights()
    assert "pos_mask_token" not in encoder.weights()
    assert torch.equal(as_plain(encoder)(images).patches, encoder(images).patches)


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Scenes painted once: painting takes longer than learning."""
    scenes, folder = open_source("scenes:?size=32&count=64"), tmp_path_factory.mktemp("scenes")
    for i in range(64):
        Image.fromarray(scenes[i].image).save(folder / f"{i}.png")
    return f"folder:{folder}"


def test_forty_steps_in_half_precision(painted: str, tmp_path: Path):
    check_run(train("posfield-tiny-tinyimagenet", tmp_path, painted, "bf16"), tmp_path)


def test_forty_steps_with_objects(tmp_path: Path):
    steps = train("odis-posfield-tiny-tinyimagenet", tmp_path, "scenes:?size=32&count=64", "fp32")
    check_run(steps, tmp_path)
    assert 0 < steps[-1]["objects/patches"] < 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_forty_steps_on_real_images(precision: str, data_folder: Path, tmp_path: Path):
    with zipfile.ZipFile(data_folder / "tiny-imagenet-100-val.zip") as archive:
        archive.extractall(tmp_path / "data")
    found = next((tmp_path / "data").rglob("images"))
    check_run(
        train("posfield-tiny-tinyimagenet", tmp_path / "run", f"folder:{found}", precision), tmp_path / "run"
    )


def test_a_resumed_run_is_the_uninterrupted_one(painted: str, tmp_path: Path):
    settings = SMALL | {"duration": "6 steps", "checkpoint_every": "3 steps", "keep": 5}
    for name in ("whole", "parts"):
        foveola.pretrain("posfield-tiny-tinyimagenet", data=painted, out=str(tmp_path / name), **settings)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000006")
    foveola.pretrain("posfield-tiny-tinyimagenet", data=painted, out=str(tmp_path / "parts"), **settings)
    whole, parts = (foveola.load(tmp_path / name) for name in ("whole", "parts"))
    assert whole.fingerprint() == parts.fingerprint()
