"""Parameter groups, schedules, clipping and frozen prototypes, against naive code and torch's own AdamW."""

import copy
import math

import pytest
import torch
from torch import nn

from foveola.schedules import Progress, Schedule
from foveola.training.assemble import assemble
from foveola.training.optimizer import Optimizer, OptimizerConfig

PROGRESS = Progress(0, 20, 5, 64)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 3))
        self.fixed = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.head = nn.ModuleDict({"last_layer": nn.Linear(3, 6, bias=False)})

    def forward(self, x):
        return self.head["last_layer"](self.norm(self.linear(x)) + self.pos_embed.mean(dim=1))


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy()


def fill(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


def optimizer_of(model: nn.Module, **changes) -> Optimizer:
    lr = Schedule(value=0.01, start=0.0, end=1e-4, warmup="4 steps", shape="cosine")
    decay = Schedule(value=0.04, end=0.4, shape="cosine")
    settings = {
        "lr": lr,
        "weight_decay": decay,
        "lr_rule": "none",
        "clip": None,
        "freeze_last_layer": "0 steps",
    }
    return Optimizer(model, OptimizerConfig(**(settings | changes)), PROGRESS)


# -- groups --------------------------------------------------------------------------------------------------


def test_each_trainable_parameter_is_in_one_group_by_the_rule(tiny):
    method = assemble(tiny(), PROGRESS, torch.device("cpu")).method
    groups = Optimizer(method, OptimizerConfig(), PROGRESS).adamw.param_groups
    where: dict[int, list[bool]] = {}
    for group in groups:
        for p in group["params"]:
            where.setdefault(id(p), []).append(group["decay"])
    trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert len(where) == len(trainable)
    assert all(len(where[id(p)]) == 1 for p in trainable.values())
    assert not any(name.startswith("teacher.") for name in trainable)
    decays = {name.removeprefix("student.") for name, p in trainable.items() if where[id(p)] == [True]}
    # DINO and iBOT: everything but biases and vectors; position table, tokens and the [K, 1] lengths decay.
    tokens = ("cls_token", "mask_token", "pos_embed", "patch_embed.proj.weight")
    assert {f"backbone.{name}" for name in tokens} <= decays
    assert {"backbone.blocks.1.mlp.fc1.weight", "backbone.blocks.0.attn.qkv.weight"} <= decays
    assert {"heads.main.last_layer.v", "heads.main.last_layer.g", "heads.main.mlp.0.weight"} <= decays
    rest = {name.removeprefix("student.") for name in trainable} - decays
    assert {"backbone.norm.weight", "backbone.norm.bias", "backbone.blocks.0.attn.qkv.bias"} <= rest
    assert all(name.endswith("bias") or "norm" in name for name in rest)


def test_only_the_decaying_group_follows_the_decay_schedule():
    model = toy()
    optimizer = optimizer_of(model)
    decays, others = optimizer.adamw.param_groups
    for step in range(20):
        values = optimizer.schedule(Progress(step, 20, 5, 64))
        warm = 0.01 * step / 3
        cosine = 1e-4 + 0.5 * (0.01 - 1e-4) * (1 + math.cos(math.pi * (step - 4) / 16))
        lr = warm if step < 4 else cosine
        decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * step / 20))
        assert values == {"lr": pytest.approx(lr), "weight_decay": pytest.approx(decay)}
        assert decays["lr"] == others["lr"] == values["lr"]
        assert (decays["weight_decay"], others["weight_decay"]) == (values["weight_decay"], 0)


@pytest.mark.parametrize(
    ("rule", "batch", "peak"), [("linear", 1024, 4.0), ("sqrt", 2048, 2**0.5), ("none", 7, 1)]
)
def test_the_rules_that_scale_the_learning_rate(rule, batch, peak):
    config = OptimizerConfig(
        lr=Schedule(value=0.5, start=0.1, end=0.2, warmup="1 steps", shape="cosine"), lr_rule=rule
    )
    assert config.peak(batch) == pytest.approx(0.5 * peak)
    optimizer = Optimizer(toy(), config, Progress(0, 20, 5, batch))
    # The value is scaled, start and end are not.
    assert optimizer.schedule(Progress(0, 20, 5, batch))["lr"] == pytest.approx(0.1)
    assert optimizer.schedule(Progress(1, 20, 5, batch))["lr"] == pytest.approx(0.5 * peak)
    assert optimizer.schedule(Progress(20, 20, 5, batch))["lr"] == pytest.approx(0.2)


def test_steps_equal_those_of_torch_adamw():
    """Two groups of torch's plain (not foreach) AdamW, moved by hand through the schedules."""
    ours, theirs = toy(), toy()
    optimizer = optimizer_of(ours)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1]}],
        betas=(0.9, 0.999),
        foreach=False,
    )
    for step in range(6):
        fill(ours, step)
        fill(theirs, step)
        values = optimizer.schedule(Progress(step, 20, 5, 64))
        for group, decay in zip(reference.param_groups, (values["weight_decay"], 0.0), strict=True):
            group["lr"], group["weight_decay"] = values["lr"], decay
        optimizer.adamw.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(ours.fixed, toy().fixed)


# -- clipping ------------------------------------------------------------------------------------------------


def naive_clip(gradients: list[torch.Tensor], limit: float, each: bool) -> list[torch.Tensor]:
    norms = [math.sqrt(sum(v * v for v in g.flatten().tolist())) for g in gradients]
    total = math.sqrt(sum(n * n for n in norms))
    return [
        g * min(1.0, limit / ((norm if each else total) + 1e-6))
        for g, norm in zip(gradients, norms, strict=True)
    ]


@pytest.mark.parametrize("each", ["parameter", "all"])
@pytest.mark.parametrize("limit", [0.3, 3.0])
def test_clipping_equals_a_naive_loop(each, limit):
    model = toy()
    fill(model, 3)
    model.linear.weight.grad.mul_(100)
    model.norm.weight.grad.mul_(1e-3)
    model.norm.bias.grad = None  # such as that of a part that was not used
    small = model.norm.weight.grad.clone()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = optimizer_of(model, clip=limit, clip_each=each).clip()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in before]).norm().item(), rel=1e-5)
    for got, expected in zip(after, naive_clip(before, limit, each == "parameter"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    if each == "parameter":  # a small gradient does not pay for a large one
        assert torch.equal(model.norm.weight.grad, small)


def test_without_a_limit_gradients_stay():
    model = toy()
    fill(model, 1)
    before = copy.deepcopy([p.grad for p in model.parameters()])
    optimizer_of(model, clip=None).clip()
    assert all(
        torch.equal(a.grad, b) for a, b in zip(model.parameters(), before, strict=True) if b is not None
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("each", ["parameter", "all"])
def test_the_norm_tells_of_a_gradient_that_is_not_finite(bad, each):
    model = toy()
    fill(model, 1)
    model.pos_embed.grad[0, 0, 0] = bad
    assert not torch.isfinite(optimizer_of(model, clip=1.0, clip_each=each).clip())


# -- frozen prototypes ---------------------------------------------------------------------------------------


def test_prototypes_are_bit_identical_while_frozen_and_move_afterwards():
    model = toy()
    optimizer = optimizer_of(model, freeze_last_layer="1 epochs")  # 5 steps
    frozen, others = model.head["last_layer"].weight, model.linear.weight
    start = frozen.clone()
    for step in range(8):
        before, other = frozen.clone(), others.clone()
        progress = Progress(step, 20, 5, 64)
        fill(model, step)
        optimizer.schedule(progress)
        optimizer.clip()
        optimizer.drop_frozen(progress)
        optimizer.adamw.step()
        optimizer.adamw.zero_grad(set_to_none=True)
        assert torch.equal(frozen, before) == (step < 5)  # not even decayed
        assert torch.equal(others, other) == (step == 0)  # whose learning rate is 0
    assert not torch.equal(frozen, start)


def test_state_moves_to_another_optimizer():
    ours, theirs = toy(), toy()
    first, second = optimizer_of(ours), optimizer_of(theirs)
    for step in range(3):
        fill(ours, step)
        first.schedule(Progress(step + 1, 20, 5, 64))
        first.adamw.step()
    theirs.load_state_dict(ours.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((ours, first), (theirs, second)):
        fill(model, 9)
        optimizer.schedule(Progress(4, 20, 5, 64))
        optimizer.adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
