"""The whole loss against loops over single views; DINO, iBOT and ODIS as one; the teacher."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.methods.method import ema_update, spread_and_rank
from foveola.methods.targets import TargetConfig
from foveola.methods.terms.patch import PatchTermConfig
from foveola.methods.terms.spread import SpreadTermConfig
from foveola.methods.terms.token import TokenTermConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import Inputs, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, Hidden, ViewsConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.tokens import MaskingConfig

MakeBatch = Callable[..., Batch]
MakeMethod = Callable[..., Distillation]

SINKHORN = TargetConfig(kind="sinkhorn", temperature=Schedule(value=0.05))
TWO_HEADS = {"main": HeadConfig(7, 16, 5), "patches": HeadConfig(9, 16, 5)}
OWN = {"patch": PatchTermConfig(head="patches")}
ONE_MLP = TWO_HEADS | {"patches": HeadConfig(9, 16, 5, mlp_of="main")}


def cross_entropy(target: Tensor, logits: Tensor) -> float:
    return -(target.double() * (logits.double() / 0.1).log_softmax(dim=-1)).sum().item()


def naive_targets(logits: Tensor, kind: str, temperature: float) -> Tensor:
    """Targets of the first step: the centre is zero."""
    if kind == "centering":
        return (logits.double() / temperature).softmax(dim=-1)
    a = (logits.double() / temperature).exp()
    for _ in range(3):
        a = a / a.sum(dim=0)
        a = a / a.sum(dim=1, keepdim=True)
    return a


@torch.no_grad()
def naive_losses(method: Distillation, batch: Batch, temperature: float) -> dict[str, float]:
    """One view of one image at a time, each token through its head on its own."""
    config, student, teacher = method.config, method.student, method.teacher
    images, views = batch.large.pixels.shape[:2]
    masks = batch.large.objects
    objects = 1 if masks is None else masks.shape[2]
    masked = None if batch.large.hidden_contents is None else batch.large.hidden_contents.mask

    def encode(network, view: Tensor, mask: Tensor | None, hidden: Tensor | None = None):
        inputs = Inputs(
            objects=None if mask is None else mask[None], masked=None if hidden is None else hidden[None]
        )
        return network.backbone(view[None], inputs)

    def one(values: Tensor | None, *index: int) -> Tensor | None:
        return None if values is None else values[index]

    losses = {}
    for name, term in (("token", config.token), ("image", config.image)):
        if term is None:
            continue
        slots = range(objects)
        if method.terms[name].setting.image_token:
            slots = [objects - 1] if term.token == "image" else range(objects - 1)
        theirs, mine = {}, {}
        for b in range(images):
            for v in range(views):
                view = batch.large.pixels[b, v]
                seen = encode(teacher, view, one(masks, b, v)).objects[0]
                hidden = encode(student, view, one(masks, b, v), one(masked, b, v)).objects[0]
                for m in slots:
                    theirs[b, v, m] = teacher.head(term.head)(seen[m : m + 1])[0]
                    mine[b, v, m] = student.head(term.head)(hidden[m : m + 1])[0]
            for v in range(0 if batch.small is None else batch.small.pixels.shape[1]):
                local = encode(student, batch.small.pixels[b, v], one(batch.small.objects, b, v)).objects[0]
                for m in slots:
                    own = m if len(local) > 1 else 0
                    mine[b, views + v, m] = student.head(term.head)(local[own : own + 1])[0]
        keys = sorted(theirs)
        rows = naive_targets(torch.stack([theirs[key] for key in keys]), term.target.kind, temperature)
        targets = dict(zip(keys, rows, strict=True))
        pairs = [
            cross_entropy(targets[b, t, m], mine[b, s, m])
            for (b, t, m) in keys
            for (b2, s, m2) in mine
            if (b, m) == (b2, m2) and s != t
        ]
        losses[name] = term.weight * sum(pairs) / len(pairs)
    if config.patch is not None:
        total, logits, predictions, owners = 0.0, [], [], []
        for b in range(images):
            for v in range(views):
                view, hidden = batch.large.pixels[b, v], masked[b, v]
                seen = encode(teacher, view, one(masks, b, v)).patches[0]
                guess = encode(student, view, one(masks, b, v), hidden).patches[0]
                for n in hidden.nonzero()[:, 0].tolist():
                    logits.append(teacher.head(config.patch.head)(seen[n : n + 1])[0])
                    predictions.append(student.head(config.patch.head)(guess[n : n + 1])[0])
                    owners.append(int(hidden.sum()))
        rows = naive_targets(torch.stack(logits), config.patch.target.kind, temperature)
        for target, guess, count in zip(rows, predictions, owners, strict=True):
            total += cross_entropy(target, guess) / count
        losses["patch"] = config.patch.weight * total / (images * views)
    if config.spread is not None:
        total = 0.0
        for v in range(views):
            rows = []
            for b in range(images):
                hidden = encode(
                    student,
                    batch.large.pixels[b, v],
                    one(masks, b, v),
                    one(masked, b, v),
                )
                rows += list(hidden.objects[0][: objects - method.terms["token"].setting.image_token])
            x = torch.nn.functional.normalize(torch.stack(rows).double(), dim=1)
            distances = torch.cdist(x, x) + 10 * torch.eye(len(x))
            total -= distances.min(dim=1).values.log().mean().item()
        losses["spread"] = config.spread.weight * total
    return losses


CASES: dict[str, tuple[dict, dict]] = {
    "DINO": ({"patch": None}, {"masking": False}),
    "DINO without locals": ({"patch": None}, {"masking": False, "local_count": 0}),
    "iBOT": ({}, {}),
    "iBOT of three globals": ({}, {"global_count": 3, "local_count": 1}),
    "iBOT with two heads": ({"heads": TWO_HEADS, "patch": PatchTermConfig(head="patches", weight=0.5)}, {}),
    "iBOT with two sets of prototypes": (
        {"heads": ONE_MLP, "patch": PatchTermConfig(head="patches", weight=0.5)},
        {},
    ),
    "iBOT with Sinkhorn": (
        {"token": TokenTermConfig(target=SINKHORN), "patch": PatchTermConfig(target=SINKHORN)},
        {},
    ),
    "ODIS": ({}, {"objects": 1}),
    "ODIS of three objects": ({}, {"objects": 3}),
    "ODIS with masks on locals": ({}, {"objects": 2, "local_objects": torch.rand(3, 3, 2, 4) < 0.6}),
    "ODIS with an image token": (
        {"image_token": True, "image": TokenTermConfig(token="image", weight=0.3)},
        {"objects": 3},
    ),
    "ODIS with an image token and masks on locals": (
        {"image_token": True, "image": TokenTermConfig(token="image")},
        {"objects": 2, "local_objects": torch.rand(3, 3, 2, 4) < 0.6},
    ),
    "everything": (
        {
            "heads": TWO_HEADS,
            "token": TokenTermConfig(target=SINKHORN, weight=0.7),
            "patch": PatchTermConfig(head="patches", target=TargetConfig(temperature=Schedule(value=0.05))),
            "spread": SpreadTermConfig(weight=0.2),
        },
        {"objects": 2},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_loops_over_single_views(name: str, method: MakeMethod, batch: MakeBatch):
    terms, views = CASES[name]
    if "image token" in name:  # the last object is the whole view
        views = dict(views)
        views["objects"] = torch.rand(3, 2, views["objects"], 16) < 0.5
        views["objects"][:, :, -1] = True
    made, drawn = method(masking=views.get("masking", True), **terms), batch(**views)
    # Epoch 15 of 30: half-way from 0.04 to 0.07 in steps of whole epochs.
    temperature = (
        0.05 if "token" in terms and terms["token"].target.kind == "sinkhorn" else 0.04 + 0.03 * 15 / 29
    )
    progress = Progress(step=155, total_steps=1000, steps_per_epoch=10, batch_size=3)
    output = made(drawn, progress)
    expected = naive_losses(made, drawn, temperature)
    assert output.losses.keys() == expected.keys()
    for term, value in expected.items():
        assert output.losses[term].item() == pytest.approx(value, rel=2e-5), term


def gradients(
    made: Distillation, drawn: Batch, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    made.zero_grad()
    losses = made(drawn, progress).losses
    torch.stack(list(losses.values())).sum().backward()
    return losses, {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def test_odis_of_whole_images_is_ibot_bit_for_bit(method: MakeMethod, batch: MakeBatch, progress: Progress):
    plain = batch()
    whole = replace(plain, large=replace(plain.large, objects=torch.ones(3, 2, 1, 16, dtype=torch.bool)))
    ibot, odis = method(), method()
    one, one_gradients = gradients(ibot, plain, progress)
    other, other_gradients = gradients(odis, whole, progress)
    for name in ("token", "patch"):
        assert torch.equal(one[name], other[name])
    # The masked attention kernel sums gradients in its own order.
    for name, gradient in one_gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-4, atol=1e-6), name
    restricted = method()(batch(objects=1), progress).losses
    assert not torch.equal(one["token"], restricted["token"])


@pytest.mark.parametrize("gone", ["patch", "spread", "token"])
def test_a_term_left_out_leaves_the_others_bit_for_bit(
    gone: str, method: MakeMethod, batch: MakeBatch, progress: Progress
):
    terms = {
        "token": TokenTermConfig(),
        "patch": PatchTermConfig(),
        "spread": SpreadTermConfig(),
    }
    full, less = method(**terms), method(**{**terms, gone: None})
    drawn = batch(objects=2)
    everything, rest = full(drawn, progress), less(drawn, progress)
    assert rest.losses.keys() == everything.losses.keys() - {gone}
    for name, loss in rest.losses.items():
        assert torch.equal(loss, everything.losses[name])
    assert not any(name.startswith(gone) for name in rest.logs)
    # The same start, too: a term that does not need a head of its own draws nothing.
    torch.manual_seed(0)
    first = Distillation(full.config, full.backbone.config, ViewsConfig(masking=MaskingConfig()))
    torch.manual_seed(0)
    second = Distillation(less.config, full.backbone.config, ViewsConfig(masking=MaskingConfig()))
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name)), name


def test_unused_heads_are_not_built(method: MakeMethod):
    assert list(method(heads=TWO_HEADS).student.heads) == ["main"]
    spread_only = method(token=None, patch=None, spread=SpreadTermConfig())
    assert len(spread_only.student.heads) == 0


def test_heads_with_one_mlp_have_prototypes_of_their_own(
    method: MakeMethod, batch: MakeBatch, progress: Progress
):
    """iBOT's separate heads: both terms teach the MLP, each its own prototypes; it is averaged once."""
    made = method(heads=ONE_MLP, **OWN)
    for branch in (made.student, made.teacher):
        assert branch.head("main").mlp is branch.head("patches").mlp
        assert branch.head("main").last_layer is not branch.head("patches").last_layer
    assert made.teacher.head("main").mlp is not made.student.head("main").mlp
    names = [
        name for name, _ in made.student.named_parameters() if "mlp.0.weight" in name and "heads" in name
    ]
    assert names == ["heads.main.mlp.0.weight"]
    drawn = batch()
    losses = made(drawn, progress).losses
    weight = made.student.head("main").mlp[0].weight
    parts = [torch.autograd.grad(losses[term], weight, retain_graph=True)[0] for term in ("token", "patch")]
    assert min(part.abs().max().item() for part in parts) > 0
    before = made.teacher.head("main").mlp[0].weight.clone()
    ema_update(made.teacher, made.student, 0.75)
    after = made.teacher.head("patches").mlp[0].weight
    assert torch.allclose(after, 0.75 * before + 0.25 * weight, atol=1e-7)


def test_the_teacher_starts_as_the_student_and_gets_no_gradient(batch: MakeBatch, progress: Progress):
    torch.manual_seed(0)
    model = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.5)
    made = Distillation(
        DistillationConfig(heads=TWO_HEADS), model, ViewsConfig(masking=MaskingConfig())
    ).train()
    for name, parameter in made.teacher.named_parameters():
        assert torch.equal(parameter, made.student.get_parameter(name))
        assert not parameter.requires_grad
    images = batch().large.pixels.flatten(0, 1)
    made.eval()
    assert torch.equal(made.teacher.backbone(images).objects, made.student.backbone(images).objects)
    made.train()
    assert not made.teacher.training
    assert not any(module.training for module in made.teacher.modules())
    assert made.student.backbone.training
    _, found = gradients(made, batch(objects=1), progress)
    assert all(name.startswith("student.") for name in found)
    assert all(parameter.grad is None for parameter in made.teacher.parameters())


def test_every_trained_parameter_gets_a_gradient(method: MakeMethod, batch: MakeBatch, progress: Progress):
    """What never does, does not ask for one: data-parallel training would wait for it."""
    for masking, terms in ((True, {}), (False, {"patch": None})):
        made = method(masking=masking, **terms)
        _, found = gradients(made, batch(objects=1, masking=masking), progress)
        trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
        assert found.keys() == trained
        assert ("student.backbone.mask_token" in trained) == masking
    assert (found["student.backbone.cls_token"] != 0).any()


def test_batches_without_a_masked_patch(method: MakeMethod, batch: MakeBatch, progress: Progress):
    for target in (TargetConfig(), SINKHORN):
        made = method(patch=PatchTermConfig(target=target))
        drawn, nothing = batch(), torch.zeros(3, 2, 16, dtype=torch.bool)
        nothing = Hidden.of(nothing, nothing.device)
        drawn = replace(drawn, large=replace(drawn.large, hidden_contents=nothing))
        losses, found = gradients(made, drawn, progress)
        assert losses["patch"].item() == 0
        assert all(gradient.isfinite().all() for gradient in found.values())
        made.after_step(progress, 1e-3)


def test_the_centre_moves_after_the_step_and_is_never_averaged(
    method: MakeMethod, batch: MakeBatch, progress: Progress
):
    made, drawn = method(), batch()
    first = made(drawn, progress).losses
    assert torch.equal(made(drawn, progress).losses["token"], first["token"])
    assert (made.token.targets.centering.center == 0).all()
    with torch.no_grad():
        seen = made.teacher.backbone(drawn.large.pixels.flatten(0, 1))
        logits = made.teacher.head("main")(seen.objects[:, 0]).double()
        patches = made.teacher.head("main")(
            seen.patches.flatten(0, 1)[drawn.large.hidden_contents.indices]
        ).double()
    made.after_step(progress, 1e-3)
    # Two batches before a step count as one, of their mean.
    assert torch.allclose(made.token.targets.centering.center.double(), 0.1 * logits.mean(0), atol=1e-6)
    assert torch.allclose(made.patch.targets.centering.center.double(), 0.1 * patches.mean(0), atol=1e-6)
    assert not torch.equal(made(drawn, progress).losses["token"], first["token"])


def test_a_centre_of_all_patches_is_the_mean_of_the_head_on_all_patches(
    method: MakeMethod, batch: MakeBatch, progress: Progress
):
    made, drawn = method(patch=PatchTermConfig(center="all")), batch(objects=1)
    plain = method()(drawn, progress).losses
    assert torch.equal(
        made(drawn, progress).losses["patch"], plain["patch"]
    )  # the first step has no centre yet
    with torch.no_grad():
        seen = made.teacher.backbone(drawn.large.pixels.flatten(0, 1), drawn.large.objects.flatten(0, 1))
        logits = made.teacher.head("main")(seen.patches.flatten(0, 1)).double()
    assert logits.shape[0] == 3 * 2 * 16
    made.after_step(progress, 1e-3)
    assert torch.allclose(made.patch.targets.centering.center.double(), 0.1 * logits.mean(0), atol=1e-6)


def test_the_average_of_weights(method: MakeMethod):
    made = method()
    before = {name: p.clone() for name, p in made.teacher.named_parameters()}
    student = dict(made.student.named_parameters())
    ema_update(made.teacher, made.student, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in made.teacher.named_parameters())
    for _ in range(2):
        ema_update(made.teacher, made.student, 0.5)
    for name, p in made.teacher.named_parameters():
        expected = 0.25 * before[name].double() + 0.75 * student[name].detach().double()
        assert (p - expected).abs().max() < 1e-6
    ema_update(made.teacher, made.student, 0.0)
    assert all(torch.equal(p, student[name]) for name, p in made.teacher.named_parameters())


def test_the_momentum_follows_its_schedule(method: MakeMethod, batch: MakeBatch):
    made = method(momentum=Schedule(value=0.9, end=1.0, shape="cosine"))
    before = {name: p.clone() for name, p in made.teacher.named_parameters()}
    logged = made.after_step(Progress(step=500, total_steps=1000, steps_per_epoch=10, batch_size=3), 1e-3)
    assert logged["momentum"] == pytest.approx(0.95)
    for name, p in made.teacher.named_parameters():
        expected = 0.95 * before[name] + 0.05 * made.student.get_parameter(name)
        assert torch.allclose(p, expected, atol=1e-6)


def test_signals_of_collapse(method: MakeMethod, batch: MakeBatch, progress: Progress):
    made, drawn = method(), batch()
    output = made(drawn, progress)
    logs, features = output.logs, output.features
    with torch.no_grad():
        seen = made.teacher.backbone(drawn.large.pixels.flatten(0, 1)).objects[:, 0]
        targets = (made.teacher.head("main")(seen).double() / 0.04).softmax(dim=-1)
    own = -(targets * targets.clamp(min=1e-300).log()).sum(dim=1).mean().item()
    assert float(logs["token/target_entropy"]) == pytest.approx(own, rel=1e-4)
    mean = targets.mean(dim=0)
    divergence = (mean * (mean * 7).log()).sum().item()  # of the mean target from the uniform distribution
    assert float(logs["token/kl_to_uniform"]) == pytest.approx(divergence, rel=1e-4, abs=1e-6)
    found = made.diagnose()
    assert found["token/prototypes_used"] == pytest.approx(len(targets.argmax(dim=1).unique()) / 7)
    assert features is not None
    assert torch.equal(features, seen)
    # A new epoch counts from the start.
    made(drawn, Progress(step=10, total_steps=1000, steps_per_epoch=10, batch_size=3))
    assert made.diagnose()["token/prototypes_used"] == found["token/prototypes_used"]


def test_spread_and_rank():
    generator = torch.Generator().manual_seed(0)
    everywhere = torch.randn(2000, 16, generator=generator)
    spread, rank = spread_and_rank(everywhere)
    assert spread == pytest.approx(1, abs=0.02)
    assert 15 < rank <= 16
    spread, rank = spread_and_rank(torch.ones(50, 16))
    assert spread == pytest.approx(0, abs=1e-5)
    assert rank == pytest.approx(1, abs=1e-3)
    two = torch.zeros(40, 16)
    two[:20, 0], two[20:, 5] = 3, 0.1
    assert spread_and_rank(two)[1] == pytest.approx(2, rel=1e-4)
    x = everywhere[:30].double().numpy()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    spread, rank = spread_and_rank(everywhere[:30])
    assert rank == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert spread == pytest.approx(x.std(axis=0).mean() * 4, rel=1e-4)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision(precision: torch.dtype, method: MakeMethod, batch: MakeBatch, progress: Progress):
    made, drawn = method(spread=SpreadTermConfig()), batch(objects=2)
    full = made(drawn, progress).losses
    with torch.autocast("cpu", precision):
        half = made(drawn, progress)
    for name, loss in half.losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[name].item(), rel=0.1), name
    torch.stack(list(half.losses.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.grad is not None)


RANKS = """
import importlib.util

import torch
from foveola import distributed
from foveola.methods.targets import TargetConfig
from foveola.methods.terms.patch import PatchTermConfig
from foveola.methods.terms.token import TokenTermConfig
from foveola.schedules import Progress, Schedule

spec = importlib.util.spec_from_file_location("shared", "CONFTEST")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
distributed.start("cpu")
for kind in ("centering", "sinkhorn"):
    target = TargetConfig(kind=kind, temperature=Schedule(value=0.05))
    method = shared.make_method(token=TokenTermConfig(target=target), patch=PatchTermConfig(target=target))
    batch = shared.make_batch(images=4, objects=2)
    if distributed.world_size() > 1:
        half = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
        batch = shared.part_of(batch, half)
    for step in range(3):
        progress = Progress(step, 100, 10, 4)
        method.zero_grad()
        losses = method(batch, progress).losses
        torch.stack(list(losses.values())).sum().backward()
        with torch.no_grad():
            for name, p in method.named_parameters():
                if p.grad is not None:
                    p -= 0.5 * distributed.all_reduce_mean(p.grad)
        method.after_step(progress, 1e-3)
    if distributed.is_main():
        torch.save(method.state_dict(), f"FOLDER/{kind}-{distributed.world_size()}.pt")
distributed.stop()
"""


def test_two_processes_of_half_the_batch_are_one(run_ranks: Callable[..., list[str]], tmp_path: Path):
    """Three steps of gradient descent: centres, Sinkhorn and the mean of gradients do not see the split."""
    code = RANKS.replace("FOLDER", str(tmp_path)).replace(
        "CONFTEST", str(Path(__file__).with_name("conftest.py"))
    )
    run_ranks(code)
    exec(compile(code, "one process", "exec"), {})
    for kind in ("centering", "sinkhorn"):
        one, two = (torch.load(tmp_path / f"{kind}-{ranks}.pt") for ranks in (1, 2))
        for name, value in one.items():
            if value.is_floating_point():
                assert torch.allclose(value, two[name], rtol=1e-3, atol=2e-4), name
        if kind == "centering":
            assert one["token.targets.centering.center"].abs().max() > 0.01


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token": None, "patch": None}, "all terms are null"),
        ({"token": TokenTermConfig(head="other")}, r"token\.head='other' is not among heads: main"),
        ({"patch": PatchTermConfig(head="other")}, r"patch\.head='other' is not among heads: main"),
        (
            {"heads": TWO_HEADS | {"patches": HeadConfig(mlp_of="mian")}, **OWN},
            "MLP of its own; those are: main",
        ),
        ({"heads": TWO_HEADS | {"patches": HeadConfig(mlp_of="patches")}, **OWN}, "its own; those are: main"),
        ({"heads": ONE_MLP | {"main": HeadConfig(mlp_of="patches")}, **OWN}, "its own; those are: none"),
        (
            {"heads": ONE_MLP, "token": None, **OWN},
            "no head of a term with an MLP of its own; those are: none",
        ),
        (
            {"heads": TWO_HEADS | {"patches": HeadConfig(mlp_of="main")}, **OWN},
            r"hidden is that of heads\.main.* 16",
        ),
    ],
)
def test_impossible_settings_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**wrong)


@pytest.mark.parametrize(
    ("terms", "views", "message"),
    [
        ({}, {}, r"method\.patch needs masked patches"),
        ({"patch": None}, {"global_count": 1, "local_count": 0}, "token terms compare different views"),
        ({"patch": None, "image": TokenTermConfig()}, {}, r"method\.image\.token must be 'image'"),
        ({"patch": None, "image": TokenTermConfig(token="image")}, {}, "go together"),
        ({"patch": None}, {"objects": ObjectsConfig(image_token=True)}, "go together"),
    ],
)
def test_views_that_cannot_serve_the_terms_are_refused(terms: dict, views: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**terms).check(ViewsConfig(**views), ViTConfig())
