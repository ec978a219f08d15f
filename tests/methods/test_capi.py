"""CAPI as a whole: who sees what, who learns from what, the variants of the ablations, the queue."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from foveola import distributed
from foveola.config import ConfigError, build
from foveola.losses import sinkhorn
from foveola.methods.capi import Capi, CapiConfig
from foveola.methods.method import spread_and_rank
from foveola.models.vit import Inputs, ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, Selection, Views, ViewsConfig
from foveola.views.tokens import DroppingConfig, draw_drops

MODEL = ViTConfig(
    width=24,
    depth=2,
    heads=2,
    patch_size=4,
    image_size=16,
    class_token=False,
    registers=4,
    norm="rms",
    final_norm_affine=False,
    bias=False,
    positions="rope",
    init="xavier",
    drop_path=0.0,
)
VIEWS = ViewsConfig(
    global_size=16, global_count=1, local_count=0, dropping=DroppingConfig(ratio=0.6, predict=0.4)
)
PROGRESS = Progress(step=0, total_steps=100, steps_per_epoch=10, batch_size=6)


def capi(seed: int = 0, model: ViTConfig = MODEL, **settings: Any) -> Capi:
    tree = {"clustering": {"prototypes": 7}, "mlp": {"hidden": 16, "bottleneck": 8}} | settings
    torch.manual_seed(seed)
    return Capi(build(CapiConfig, tree), model, VIEWS).train()


def batch(images: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    keep, predict = draw_drops(VIEWS.dropping or DroppingConfig(), images, (4, 4), generator)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(images, 1, 4)
    large = Views(
        pixels=torch.randn(images, 1, 3, 16, 16, generator=generator),
        boxes=whole,
        flips=torch.zeros(images, 1, dtype=torch.bool),
        positions=whole,
        selection=Selection(keep[:, None], predict[:, None]),
    )
    return Batch(large, None, torch.full((images,), -1), torch.arange(images), {})


def grads(method: Capi, prefix: str) -> float:
    found = [
        p.grad.abs().sum()
        for n, p in method.named_parameters()
        if n.startswith(prefix) and p.grad is not None
    ]
    return float(sum(found))


def test_the_losses_are_the_loop():
    method, drawn = capi(), batch()
    output = method(drawn, PROGRESS)
    assert method.clustering is not None
    with torch.no_grad():
        patches = normalize(method.teacher.backbone(drawn.large.pixels[:, 0]).patches, dim=-1)
        logits = linear(patches, method.clustering.weight, method.clustering.bias)
        context = method.student.backbone(
            drawn.large.pixels[:, 0], Inputs(kept=drawn.large.selection.kept[:, 0])
        )
        asked = method.student.predictor(
            context, drawn.large.selection.predicted[:, 0], drawn.large.selection.kept[:, 0]
        )
        weight = normalize(method.student.head.v, dim=1)
    rows, everything = [], []
    for position in range(16):
        assigned = sinkhorn(logits[:, position], 0.06)
        everything += list(-(assigned * (logits[:, position] / 0.12).log_softmax(1)).sum(1))
        for image in range(6):
            for slot in (drawn.large.selection.predicted[image, 0] == position).nonzero()[:, 0].tolist():
                scores = weight @ normalize(asked[image, slot], dim=0)
                rows.append(-(assigned[image] * (scores / 0.12).log_softmax(0)).sum())
    assert output.losses["clustering"].item() == pytest.approx(
        torch.stack(everything).mean().item(), rel=1e-4
    )
    assert output.losses["prediction"].item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)
    assert len(rows) == 6 * 3


def test_each_loss_teaches_its_own_part():
    for name, learns, rests in (
        ("clustering", "clustering.", "student."),
        ("prediction", "student.", "clustering."),
    ):
        method = capi()
        method(batch(), PROGRESS).losses[name].backward()
        assert grads(method, learns) > 0
        assert grads(method, rests) == 0
        assert grads(method, "teacher.") == 0
    method = capi()
    sum(method(batch(), PROGRESS).losses.values()).backward()
    unused = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # data-parallel training would wait for them
    assert not any(p.requires_grad for p in method.teacher.parameters())


def test_the_teacher_sees_everything_and_the_student_what_is_kept():
    method, drawn = capi(), batch()
    seen: list[tuple[Tensor, Any]] = []
    for network in (method.teacher.backbone, method.student.backbone):
        network.register_forward_hook(
            lambda module, args, out: seen.append((out.patches, args[1].kept if args[1:] else None))
        )
    method(drawn, PROGRESS)
    (teacher, nothing), (student, keep) = seen
    assert teacher.shape[1] == 16
    assert nothing is None
    assert student.shape[1] == drawn.large.selection.kept.shape[2] == 7
    assert torch.equal(keep, drawn.large.selection.kept[:, 0])
    for image in range(6):
        assert not set(drawn.large.selection.kept[image, 0].tolist()) & set(
            drawn.large.selection.predicted[image, 0].tolist()
        )


def test_the_teacher_follows_one_minus_the_learning_rate():
    method = capi()
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.1)
    before = {n: p.clone() for n, p in method.teacher.named_parameters()}
    assert method.after_step(PROGRESS, 2e-3) == {"momentum": 1 - 2e-3}
    for name, p in method.teacher.named_parameters():
        expected = (1 - 2e-3) * before[name] + 2e-3 * method.student.get_parameter(name)
        assert (p - expected).abs().max() < 1e-6
    assert any(n.startswith("predictor.blocks.0.") for n in before)
    scheduled = capi(momentum={"value": 0.9})
    assert scheduled.after_step(PROGRESS, 2e-3) == {"momentum": 0.9}


@pytest.mark.parametrize(
    "settings",
    [
        {"head": "mlp"},
        {"targets": "teacher_head", "head": "mlp"},
        {"targets": "features"},
        {"predictor": None},
        {"predictor": {"kind": "self"}},
        {"predictor": {"width": 36}},
        {"predictor": {"width": 36}, "targets": "features"},
        {"clustering": {"prototypes": 7, "balance": "all"}},
        {"targets": "teacher_head", "head": "mlp", "clustering": {"prototypes": 7, "balance": "all"}},
    ],
    ids=str,
)
def test_the_variants_of_the_ablations_learn(settings):
    """Tables 1a, 1c, 1f and 1i: a fixed batch is fitted, everything that trains gets a gradient."""
    method, drawn = capi(**settings), batch()
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    first = None
    for _ in range(30):
        losses = method(drawn, PROGRESS).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        first = first or losses["prediction"].item()
    assert losses["prediction"].item() < first - 0.05 * abs(first)


def test_regression_is_huber_on_normalised_patches():
    method, drawn = capi(targets="features"), batch()
    with torch.no_grad():
        patches = method.teacher.backbone(drawn.large.pixels[:, 0]).patches
        context = method.student.backbone(
            drawn.large.pixels[:, 0], Inputs(kept=drawn.large.selection.kept[:, 0])
        )
        asked = method.student.predictor(
            context, drawn.large.selection.predicted[:, 0], drawn.large.selection.kept[:, 0]
        )
    total = []
    for image in range(6):
        for slot, position in enumerate(drawn.large.selection.predicted[image, 0].tolist()):
            gap = (asked[image, slot] - layer_norm(patches[image, position], (24,))).double().abs()
            total.append(torch.where(gap < 1, gap**2 / 2, gap - 0.5))
    loss = method(drawn, PROGRESS).losses["prediction"].item()
    assert loss == pytest.approx(torch.stack(total).mean().item(), rel=1e-5)


def test_the_fused_variant_hides_what_is_not_kept():
    method, drawn = capi(predictor=None), batch()
    before = method(drawn, PROGRESS).losses["prediction"].item()
    views = drawn.large.pixels.clone()
    for image in range(6):
        for patch in set(range(16)) - set(drawn.large.selection.kept[image, 0].tolist()):
            views[image, 0, :, 4 * (patch // 4) :, 4 * (patch % 4) :][:, :4, :4] += 5
    with torch.no_grad():
        hidden = method._predict(
            views[:, 0], drawn.large.selection.kept[:, 0], drawn.large.selection.predicted[:, 0]
        )
        shown = method._predict(
            drawn.large.pixels[:, 0], drawn.large.selection.kept[:, 0], drawn.large.selection.predicted[:, 0]
        )
    assert torch.equal(hidden, shown)
    assert math.isfinite(before)
    assert method.predictor is None


def test_signals_and_advice():
    method = capi()
    output = method(batch(), PROGRESS)
    logs = output.logs
    assert 0 < float(logs["clustering/target_entropy"]) < math.log(7)
    assert 0 <= float(logs["clustering/kl_to_uniform"]) < 0.5
    assert abs(float(logs["clustering/position_information"])) < 1e-5  # the first batch has no past
    told = method.diagnose()
    assert 0 < told["clustering/prototypes_used"] <= 1
    assert output.features is not None
    assert spread_and_rank(output.features)[1] > 1
    assert method.advice(7) == []
    (advice,) = method.advice(2)
    assert f"{math.log(3.5):.2f} of {math.log(7):.2f} nats" in advice
    assert "method.clustering.queue=5" in advice
    assert capi(clustering={"prototypes": 7, "queue": 5}).advice(2) == []
    assert capi(clustering={"prototypes": 7, "balance": "all"}).advice(2) == []
    # iBOT's targets keep no past images: a queue neither helps nor is advised.
    head = {"targets": "teacher_head", "head": "mlp"}
    (advice,) = capi(clustering={"prototypes": 7, "queue": 5}, **head).advice(2)
    assert f"{math.log(3.5):.2f} of {math.log(7):.2f} nats" in advice
    assert "queue" not in advice


def test_the_queue_holds_the_newest_images_and_survives_saving():
    method = capi(clustering={"prototypes": 7, "queue": 8})
    assert method.clustering is not None
    assert method.clustering.past is not None
    drawn = [batch(seed=s) for s in range(3)]
    expected = torch.zeros(16, 0, 24)
    for each in drawn:
        with torch.no_grad():
            patches = normalize(method.teacher.backbone(each.large.pixels[:, 0]).patches, dim=-1)
        expected = torch.cat((patches.transpose(0, 1), expected), dim=1)[:, :8]
        method(each, PROGRESS)
    assert method.clustering.filled == 8
    assert torch.allclose(method.clustering.past, expected, atol=1e-6)
    other = capi(seed=1, clustering={"prototypes": 7, "queue": 8})
    other.load_state_dict(method.state_dict())
    a, b = (m(batch(seed=9), PROGRESS).losses["clustering"] for m in (method, other))
    assert torch.equal(a, b)


def test_a_queue_has_a_part_for_each_process(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert capi(clustering={"prototypes": 7, "queue": 4}).clustering.past.shape[1] == 1
    with pytest.raises(ConfigError, match=r"queue=3 is cut over 4 processes: at least as many, or 0"):
        capi(clustering={"prototypes": 7, "queue": 3})


def test_another_number_of_processes_goes_on_with_the_past_of_all(monkeypatch):
    """The past of two processes is that of one with all their images, and the other way round."""

    def remember(world: int, rank: int) -> Capi:
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        return capi(clustering={"prototypes": 7, "queue": 8})

    def rows(*methods: Capi) -> Tensor:
        """What stands in the pasts, in an order that does not depend on who has it."""
        found = [m.clustering.past[:, : m.clustering.filled] for m in methods]
        assert len({each.shape for each in found}) == 1  # as many images on each process
        return torch.cat(found, dim=1).flatten(0, 1).sum(dim=-1).sort().values

    unit = normalize(torch.randn(2, 16, 4, 24, generator=torch.Generator().manual_seed(0)), dim=-1)
    one, two = remember(1, 0), [remember(2, rank) for rank in (0, 1)]
    for step in range(2):
        one.clustering._remember(unit[step])
        for rank, each in enumerate(two):
            each.clustering._remember(unit[step, :, 2 * rank : 2 * rank + 2])
    assert torch.allclose(rows(one), rows(*two))
    pasts = [each.clustering.past.transpose(0, 1) for each in two]
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "gather_rows", lambda own: torch.cat(pasts))
    monkeypatch.setattr(distributed, "all_reduce_max", lambda own: own)
    two[0].gather()
    kept = {"one": one.state_dict(), "two": two[0].state_dict()}
    for name, state in kept.items():
        for world in (1, 2, 4):
            made = [remember(world, rank) for rank in range(world)]
            for rank, each in enumerate(made):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                each.load_state_dict(state)
            assert torch.allclose(rows(*made), rows(one)), (name, world)
    two[0].clustering._remember(unit[0, :, :2])  # what was joined was of the step before
    assert two[0].state_dict()["clustering.past"].shape == (16, 4, 24)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"dropping": None}, "set views.dropping"),
        ({"local_count": 2}, r"views\.local_count=0"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        CapiConfig().check(dataclasses.replace(VIEWS, **views), MODEL)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs head=mlp"):
        CapiConfig(targets="teacher_head")
