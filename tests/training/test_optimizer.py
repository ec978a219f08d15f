"""Parameter groups, schedules, clipping, frozen prototypes, against naive code and torch's own optimizers."""

import copy
import math

import pytest
import torch
from torch import nn

from foveola.config import ConfigError
from foveola.methods.method import Method
from foveola.schedules import Progress, Schedule
from foveola.training.assemble import assemble
from foveola.training.optimizer import Optimizer, OptimizerConfig, PartConfig

PROGRESS = Progress(0, 20, 5, 64)


class Toy(Method):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 3))
        self.fixed = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.head = nn.ModuleDict({"last_layer": nn.Linear(3, 6, bias=False)})

    def forward(self, x):
        return self.head["last_layer"](self.norm(self.linear(x)) + self.pos_embed.mean(dim=1))

    def trained(self):
        return ()  # no encoder

    @property
    def backbone(self):
        raise NotImplementedError

    def prototypes(self):
        return list(self.head["last_layer"].parameters())


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
    groups = Optimizer(method, OptimizerConfig(), PROGRESS).inner.param_groups
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
    decays, others = optimizer.inner.param_groups
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
        optimizer.inner.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(ours.fixed, toy().fixed)


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_of_sgd_equal_a_naive_loop_and_torch(nesterov):
    """v <- 0.9 v + g + d w, w <- w - r v; Nesterov steps by g + d w + 0.9 v instead."""
    ours, theirs = toy(), toy()
    optimizer = optimizer_of(ours, kind="sgd", momentum=0.9, nesterov=nesterov)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.SGD(
        [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim <= 1]}],
        lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False,
    )  # fmt: skip
    naive = {name: (p.detach().double(), torch.zeros_like(p).double()) for name, p in optimizer.named.items()}
    for step in range(6):
        fill(ours, step)
        fill(theirs, step)
        values = optimizer.schedule(Progress(step, 20, 5, 64))
        for group, decay in zip(reference.param_groups, (values["weight_decay"], 0.0), strict=True):
            group["lr"], group["weight_decay"] = values["lr"], decay
        for name, p in optimizer.named.items():
            w, v = naive[name]
            gradient = p.grad.double() + (values["weight_decay"] if p.ndim > 1 else 0.0) * w
            v = 0.9 * v + gradient
            naive[name] = w - values["lr"] * (gradient + 0.9 * v if nesterov else v), v
        optimizer.inner.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
    for name, (w, _) in naive.items():
        torch.testing.assert_close(optimizer.named[name].detach().double(), w, rtol=1e-5, atol=1e-6, msg=name)


def test_keys_of_the_other_optimizer_are_idle():
    assert OptimizerConfig().unread().keys() == {"momentum", "nesterov"}
    assert OptimizerConfig(kind="sgd").unread().keys() == {"betas"}
    with pytest.raises(ValueError, match="nesterov=true looks ahead by the momentum"):
        OptimizerConfig(kind="sgd", momentum=0.0, nesterov=True)


def settings(optimizer: Optimizer, step: int) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of each parameter at a step."""
    optimizer.schedule(Progress(step, 20, 5, 64))
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.inner.param_groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in optimizer.named.items()}


def test_layer_wise_rates_by_hand(tiny):
    """DINOv2: 0.9 ** (L + 1 - id), id 0 for what embeds, i + 1 for block i; norm, heads 1; patches x 0.2."""
    config = tiny(**{"model.depth": 3, "model.registers": 2, "model.layer_scale": 1e-5})
    method = assemble(config, PROGRESS, torch.device("cpu")).method
    optimizer = optimizer_of(method, layer_decay=0.9, patch_embed_lr=0.2)
    found = {name: lr / 0.01 for name, (lr, _) in settings(optimizer, 3).items()}  # the end of the warm-up
    embedding = 0.6561  # 0.9 ** 4
    by_hand = {
        "student.backbone.cls_token": embedding,
        "student.backbone.reg_token": embedding,
        "student.backbone.mask_token": embedding,
        "student.backbone.pos_embed": embedding,
        "student.backbone.patch_embed.proj.weight": 0.2 * embedding,
        "student.backbone.patch_embed.proj.bias": 0.2 * embedding,
        "student.backbone.blocks.0.attn.qkv.weight": 0.729,
        "student.backbone.blocks.0.ls1.gamma": 0.729,
        "student.backbone.blocks.1.norm2.bias": 0.81,
        "student.backbone.blocks.2.mlp.fc2.weight": 0.9,
        "student.backbone.norm.weight": 1,
        "student.heads.main.mlp.0.weight": 1,
        "student.heads.main.last_layer.v": 1,
        "student.heads.main.last_layer.g": 1,
    }
    assert {name: found[name] for name in by_hand} == pytest.approx(by_hand)
    kinds = {round(rate, 6) for rate in found.values()}
    assert kinds == {round(rate, 6) for rate in by_hand.values()}
    # Also in the middle of the cosine, and each parameter once.
    later = settings(optimizer, 11)
    whole = later["student.backbone.norm.weight"][0]
    assert all(later[name][0] / whole == pytest.approx(rate) for name, rate in found.items())
    assert sum(len(group["params"]) for group in optimizer.inner.param_groups) == len(found)


def test_what_decays_in_dinov2(tiny):
    """All but biases, norms and LayerScale, whatever the layer; with norm_decay norms take their share."""
    config = tiny(**{"model.registers": 2, "model.layer_scale": 1e-5})
    method = assemble(config, PROGRESS, torch.device("cpu")).method
    plain = settings(optimizer_of(method, layer_decay=0.9), 0)
    assert {round(decay, 9) for _, decay in plain.values()} == {0, 0.04}
    for name, (_, decay) in plain.items():
        assert (decay == 0) == (name.endswith("bias") or "norm" in name or "gamma" in name), name
    shared = settings(optimizer_of(method, norm_decay=0.1), 0)
    for name, (_, decay) in shared.items():
        norm = "norm" in name and name.endswith("weight")
        assert decay == pytest.approx(0.004 if norm else plain[name][1]), name


def test_parts_learn_in_their_own_way():
    """By hand: half the rate with a decay of 0.01; a schedule of its own; the rest as it would be."""
    own = Schedule(value=0.3, end=0.1, shape="linear")
    parts = {
        "linear": PartConfig(lr=0.5, weight_decay=0.01, bias_decay=0.5),
        "head": PartConfig(lr=2.0, schedule=own),
        "norm": PartConfig(weight_decay=0.2),
    }
    optimizer = optimizer_of(toy(), parts=parts, norm_decay=0.1)
    at_12 = 1e-4 + 0.5 * (0.01 - 1e-4) * (1 + math.cos(math.pi * 8 / 16))
    decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + math.cos(math.pi * 12 / 20))
    expected = {
        "linear.weight": (0.5 * at_12, 0.01),
        "linear.bias": (0.5 * at_12, 0.5 * 0.01),
        "norm.weight": (at_12, 0.1 * 0.2),
        "norm.bias": (at_12, 0),
        "pos_embed": (at_12, decay),
        "head.last_layer.weight": (2 * (0.3 - 0.2 * 12 / 20), decay),
    }
    found = settings(optimizer, 12)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name
    assert optimizer.schedule(Progress(12, 20, 5, 64)) == pytest.approx({"lr": at_12, "weight_decay": decay})


def test_clusters_of_capi_decay_with_their_bias():
    """As in the official code, whose optimizer of the clusters gives all of them a decay of 0.01."""
    from foveola.training.recipe import resolve

    for recipe in ("capi-vitl14-in22k", "capi-tiny-tinyimagenet"):
        part = resolve(recipe).optimizer.parts["clustering"]
        assert (part.weight_decay, part.bias_decay) == (0.01, 1.0)


def test_a_part_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="this method has no 'hed', but linear, norm, head"):
        optimizer_of(toy(), parts={"hed": PartConfig()})
    from foveola.training.recipe import resolve

    config = resolve("capi-tiny-tinyimagenet", ["method.targets=features"])
    assemble(config, PROGRESS, torch.device("cpu"))  # a variant has nothing in the part clustering


def test_keys_that_find_nothing_in_a_method_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"layer_decay=0\.9: this method names no layers that learn"):
        optimizer_of(toy(), layer_decay=0.9)
    monkeypatch.setattr(Toy, "prototypes", Method.prototypes)
    with pytest.raises(ConfigError, match="freeze_last_layer='1 epochs': this method has no prototypes"):
        optimizer_of(toy(), freeze_last_layer="1 epochs")


def test_groups_of_layers_and_parts_survive_a_checkpoint(tiny):
    """State is kept by group and place: both must follow from the configuration alone."""
    changes = {"layer_decay": 0.9, "patch_embed_lr": 0.2, "norm_decay": 0.1}
    config = tiny(**{"model.depth": 3, "model.layer_scale": 1e-5})
    methods = [assemble(config, PROGRESS, torch.device("cpu")).method for _ in range(2)]
    first, second = (optimizer_of(method, **changes) for method in methods)
    for step in range(3):
        fill(methods[0], step)
        first.schedule(Progress(step + 1, 20, 5, 64))
        first.inner.step()
    methods[1].load_state_dict(methods[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for method, optimizer in zip(methods, (first, second), strict=True):
        fill(method, 9)
        optimizer.schedule(Progress(4, 20, 5, 64))
        optimizer.inner.step()
    for a, b in zip(methods[0].parameters(), methods[1].parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_modules_are_clipped_alone(tiny):
    """DINOv2: the backbone and each head by its own norm, a naive sum over its tensors."""
    heads = {name: {"prototypes": 8, "hidden": 8, "bottleneck": 4} for name in ("main", "patches")}
    config = tiny({"method": {"heads": heads, "patch": {"head": "patches"}}})
    method = assemble(config, PROGRESS, torch.device("cpu")).method
    fill(method, 4)
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    for name, p in named.items():
        p.grad.mul_(1e-3 if ".patches." in name else 10 if ".main." in name else 1)
    named["student.backbone.pos_embed"].grad = None
    members = {"student.backbone.": [], "student.heads.main.": [], "student.heads.patches.": []}
    for name, p in named.items():
        if p.grad is not None:
            next(own for start, own in members.items() if name.startswith(start)).append(
                (name, p.grad.clone())
            )
    total = optimizer_of(method, clip=3.0, clip_each="module").clip()
    norms = {}
    for start, own in members.items():
        norms[start] = math.sqrt(sum(v * v for _, g in own for v in g.double().flatten().tolist()))
        factor = min(1.0, 3.0 / (norms[start] + 1e-6))
        for name, before in own:
            torch.testing.assert_close(named[name].grad, before * factor, rtol=1e-5, atol=1e-8, msg=name)
    assert total.item() == pytest.approx(math.sqrt(sum(n * n for n in norms.values())), rel=1e-5)
    assert norms["student.heads.patches."] < 3 < norms["student.heads.main."]  # one pays, the other does not


def test_without_a_limit_gradients_stay():
    model = toy()
    fill(model, 1)
    before = copy.deepcopy([p.grad for p in model.parameters()])
    optimizer_of(model, clip=None).clip()
    assert all(
        torch.equal(a.grad, b) for a, b in zip(model.parameters(), before, strict=True) if b is not None
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("each", ["parameter", "module", "all"])
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
        optimizer.inner.step()
        optimizer.inner.zero_grad(set_to_none=True)
        assert torch.equal(frozen, before) == (step < 5)  # not even decayed
        assert torch.equal(others, other) == (step == 0)  # whose learning rate is 0
    assert not torch.equal(frozen, start)


@pytest.mark.parametrize("changes", [{}, {"kind": "sgd"}, {"kind": "sgd", "momentum": 0.0}])
def test_state_moves_to_another_optimizer(changes):
    ours, theirs = toy(), toy()
    first, second = optimizer_of(ours, **changes), optimizer_of(theirs, **changes)
    for step in range(3):
        fill(ours, step)
        first.schedule(Progress(step + 1, 20, 5, 64))
        first.inner.step()
    theirs.load_state_dict(ours.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((ours, first), (theirs, second)):
        fill(model, 9)
        optimizer.schedule(Progress(4, 20, 5, 64))
        optimizer.inner.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_takes_in_what_rested_before(momentum):
    """The first update of a part is that of a first step, as torch's plain loop over parameters has it."""
    ours, theirs = toy(), toy()
    optimizer = optimizer_of(ours, kind="sgd", momentum=momentum)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    reference = torch.optim.SGD(trained, lr=0.1, momentum=momentum, foreach=False)
    late = next(reversed(optimizer.named))
    for step in range(3):
        optimizer.schedule(Progress(step, 20, 5, 64))
        for group in (*optimizer.inner.param_groups, *reference.param_groups):
            group["lr"], group["weight_decay"] = 0.1, 0.0
        for model in (ours, theirs):
            fill(model, step)
            if not step:
                dict(model.named_parameters())[late].grad = None
        optimizer.step(torch.amp.GradScaler("cpu", enabled=False), torch.tensor(True))
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
