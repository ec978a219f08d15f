"""One training step: what it does to the weights, in parts, in other precisions, and when it goes wrong."""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator

import pytest
import torch

from foveola.config import dump_yaml
from foveola.data.loader import Loader
from foveola.data.sample import Canvases
from foveola.data.sources import open_source
from foveola.methods.distillation import Distillation
from foveola.methods.method import Output
from foveola.schedules import Progress
from foveola.training import loop
from foveola.training.assemble import assemble
from foveola.training.durations import plan
from foveola.training.loop import Diverged, Trainer
from foveola.training.recipe import RunConfig
from foveola.views.batch import Streams, make_views

CPU = torch.device("cpu")


def begin(config: RunConfig) -> tuple[Trainer, Progress, Iterator[Canvases]]:
    source = open_source(config.data)
    progress = plan(config, len(source))
    loader = Loader(
        source,
        config.batch_size // config.accumulate,
        config.seed,
        config.loader,
        with_objects=True,
        accumulate=config.accumulate,
    )
    return assemble(config, progress, CPU), progress, iter(loader)


def train(config: RunConfig, steps: int) -> tuple[Trainer, list[dict]]:
    trainer, progress, batches = begin(config)
    values = [
        trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches)) for step in range(steps)
    ]
    return trainer, values


def student(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.method.named_parameters() if name.startswith("student.")}


def farthest(a: Trainer, b: Trainer) -> float:
    """Largest difference of any weight, of student and teacher, and of the centres."""
    ours, theirs = a.method.state_dict(), b.method.state_dict()
    names = [name for name, value in ours.items() if value.is_floating_point()]
    return max((ours[name] - theirs[name]).abs().max().item() for name in names)


# -- what a step is ------------------------------------------------------------------------------------------


def test_a_step_is_forward_backward_clip_adamw_and_ema(tiny):
    """Against the same written out with autograd, a naive clip and torch's AdamW, for three steps."""
    config = tiny(**{"optimizer.clip": 0.5, "optimizer.freeze_last_layer": "0 steps"})
    trainer, progress, batches = begin(config)
    other = assemble(config, progress, CPU).method
    assert isinstance(other, Distillation)
    trained = [p for p in other.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim > 1]}, {"params": [p for p in trained if p.ndim < 2]}],
        foreach=False,
    )
    for step in range(3):
        now = dataclasses.replace(progress, step=step)
        canvases = next(batches)
        values = trainer.step(now, lambda canvases=canvases: canvases)
        streams = Streams(config.seed, step)
        batch = make_views(canvases, config.views, 8, streams)
        torch.manual_seed(streams("network").initial_seed())  # drop path
        loss = sum(other(batch, now).losses.values())
        loss.backward()
        for p in trained:
            p.grad *= min(1.0, 0.5 / (p.grad.norm().item() + 1e-6))
        for group, decay in zip(reference.param_groups, (values["weight_decay"], 0.0), strict=True):
            group["lr"], group["weight_decay"] = values["lr"], decay
        reference.step()
        reference.zero_grad()
        m = config.method.momentum.at(now)
        with torch.no_grad():
            pairs = zip(other.teacher.parameters(), other.student.parameters(), strict=True)
            for t, s in pairs:
                t.copy_(m * t + (1 - m) * s)
        for term in (other.token, other.patch):
            term.targets.step()
        assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
        assert values["loss"].item() == pytest.approx(
            sum(v.item() for name, v in values.items() if name.startswith("loss/")), rel=1e-6
        )
        assert values["momentum"] == m
    ours, theirs = trainer.method.state_dict(), other.state_dict()
    for name in ours:
        a, b = ours[name], theirs[name]
        if name.endswith("qkv.bias"):  # the key's has no gradient but rounding, which AdamW blows up
            a, b = (torch.cat((x[:32], x[64:])) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6, msg=name)


def test_prototypes_rest_while_frozen_and_the_teacher_has_no_gradient(tiny):
    trainer, progress, batches = begin(tiny())
    start = student(trainer)
    prototypes = {name: p.clone() for name, p in start.items() if ".last_layer." in name}
    other = start["student.backbone.blocks.0.attn.qkv.weight"].clone()
    assert len(prototypes) == 2
    for step in range(4):  # frozen for 2 steps; at the first one the learning rate is 0
        trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
        moved = [not torch.equal(student(trainer)[name], p) for name, p in prototypes.items()]
        assert moved == [step >= 2] * 2
        assert (step == 0) == torch.equal(
            student(trainer)["student.backbone.blocks.0.attn.qkv.weight"], other
        )
        assert all(p.grad is None for p in trainer.method.parameters())


def test_a_step_depends_on_the_seed_alone(tiny):
    one, _ = train(tiny(), 3)
    torch.manual_seed(12345)
    torch.rand(7)
    two, _ = train(tiny(), 3)
    three, _ = train(tiny(seed=1), 3)
    assert farthest(one, two) == 0
    assert farthest(one, three) > 0


# -- in parts ------------------------------------------------------------------------------------------------


def test_two_parts_equal_one_where_the_loss_is_a_mean(tiny, plain_tree):
    """Without random views, and with centering, whose statistics are means too, into the second epoch.

    An epoch of 3 steps leaves 8 images over: a part, which must not begin a step.
    """
    data = "scenes:?size=32&count=56"
    whole, one = train(tiny(plain_tree, data=data), 5)
    parts, two = train(tiny(plain_tree, data=data, accumulate=2), 5)
    for a, b in zip(one, two, strict=True):
        assert a["loss"].item() == pytest.approx(b["loss"].item(), rel=1e-5)
        assert a["grad_norm"].item() == pytest.approx(b["grad_norm"].item(), rel=1e-4)
    # Whatever the loss, keys' biases have a gradient of zero but for rounding, which AdamW makes steps of.
    for trainer in (whole, parts):
        for name, value in trainer.method.state_dict().items():
            if name.endswith("qkv.bias"):
                value.unflatten(0, (3, -1))[1] = 0
    assert 0 < farthest(whole, parts) < 1e-6


def test_parts_of_a_step_have_views_of_their_own(tiny):
    """Those of the streams (seed, step x parts + part, rank): of the same images, parts see other crops."""
    config = tiny(accumulate=2)
    trainer, progress, batches = begin(config)
    canvases, seen = next(batches), []
    forward = trainer.method.forward

    def watched(batch, now):
        seen.append(batch.large.boxes)
        return forward(batch, now)

    trainer.method.forward = watched  # type: ignore[method-assign]
    for step in range(3):
        trainer.step(dataclasses.replace(progress, step=step), lambda: canvases)
    assert len(seen) == 6
    for number, boxes in enumerate(seen):
        expected = make_views(canvases, config.views, 8, Streams(config.seed, number)).large.boxes
        assert torch.equal(boxes, expected)
        assert all(not torch.equal(boxes, other) for other in seen[:number])


def test_two_parts_differ_from_one_part_alone(tiny, plain_tree):
    """The comparison above would see a part that is lost, or not divided."""
    whole, _ = train(tiny(plain_tree), 4)
    half, _ = train(tiny(plain_tree, batch_size=8), 4)
    assert farthest(whole, half) > 1e-4


def test_checkpointed_activations_give_the_same_weights(tiny):
    one, _ = train(tiny(), 3)
    two, _ = train(tiny(checkpoint_activations=True), 3)
    assert farthest(one, two) < 1e-7


# -- other precisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(tiny, precision):
    # Of another seed than 0, whose start has cosines that bfloat16 rounds by more than most.
    full, expected = train(tiny(seed=1), 3)
    half, values = train(tiny(seed=1, precision=precision), 3)
    assert all(p.dtype == torch.float32 for p in half.method.parameters())
    assert all(loss["loss"].dtype == torch.float32 for loss in values)
    assert values[0]["loss"].item() == pytest.approx(expected[0]["loss"].item(), rel=2e-3)
    assert farthest(full, half) > 0
    if precision == "bf16":  # fp16 leaves out steps until it has found its scale
        for a, b in zip(expected, values, strict=True):
            assert a["loss"].item() == pytest.approx(b["loss"].item(), rel=1e-2)
        assert farthest(full, half) < 0.01


def test_fp16_scales_the_loss_and_gives_up_late(tiny, monkeypatch):
    """An overflow is ordinary: the step is left out, the scale halves, and nothing else moves."""
    trainer, progress, batches = begin(tiny(precision="fp16"))
    trainer.step(dataclasses.replace(progress, step=1), lambda: next(batches))
    trainer.bad_steps = 0  # the first scale may have been too large, too
    scale, before = trainer.scaler.get_scale(), {k: v.clone() for k, v in trainer.method.state_dict().items()}
    spoil(monkeypatch, math.inf)
    for _ in range(5):
        trainer.step(dataclasses.replace(progress, step=2), lambda: next(batches))
    assert trainer.scaler.get_scale() == scale / 2**5
    after = trainer.method.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("used"))
    for _ in range(14):
        trainer.step(dataclasses.replace(progress, step=2), lambda: next(batches))
    with pytest.raises(Diverged):
        trainer.step(dataclasses.replace(progress, step=2), lambda: next(batches))


COMPILE = """
import dataclasses, sys, torch
from foveola.config import build, read_yaml
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.training.assemble import assemble
from foveola.training.durations import plan
from foveola.training.recipe import RunConfig

compile, backend = torch.nn.Module.compile, sys.argv[2]
torch.nn.Module.compile = lambda self: compile(self, backend=backend)
for compiled in (False, True):
    config = build(RunConfig, read_yaml(sys.argv[1]) | {"compile": compiled})
    source = open_source(config.data)
    progress = plan(config, len(source))
    trainer = assemble(config, progress, torch.device("cpu"))
    batches = iter(Loader(source, 16, 0, config.loader, with_objects=True))
    for step in range(2):
        values = trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
        print(values["loss"].item())
"""


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_network_gives_the_same_losses(tiny, tmp_path, run_ranks, backend):
    """In a process without the checks of shapes, which the compiler cannot read."""
    if backend == "inductor":
        if "FOVEOLA_SLOW" not in os.environ:
            pytest.skip("set FOVEOLA_SLOW=1 to run this: it takes minutes")
        if shutil.which("g++") is None and shutil.which("clang++") is None:
            pytest.skip("no C++ compiler")
    config = tiny(**{"model.drop_path": 0.0})  # compiled code draws other random numbers
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    words = [str(tmp_path / "config.yaml"), backend]
    (printed,) = run_ranks(COMPILE, ranks=1, words=words, timeout=280)
    *plain, third, fourth = map(float, printed.split())
    assert [third, fourth] == pytest.approx(plain, rel=1e-4)


# -- when it goes wrong --------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """From now on the losses are multiplied by this."""
    forward = Distillation.forward

    def spoiled(self, batch, progress):
        output = forward(self, batch, progress)
        return Output({name: loss * factor for name, loss in output.losses.items()}, output.logs)

    monkeypatch.setattr(Distillation, "forward", spoiled)


def test_steps_that_are_not_finite_change_nothing_and_the_third_is_an_error(tiny, monkeypatch):
    trainer, progress, batches = begin(tiny())
    trainer.step(dataclasses.replace(progress, step=1), lambda: next(batches))
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    with monkeypatch.context() as patch:
        spoil(patch, math.nan)
        for step in (2, 3):
            values = trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
            assert math.isnan(values["loss"])
    after = trainer.method.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.endswith("used"))
    # A good step in between starts the count again.
    trainer.step(dataclasses.replace(progress, step=4), lambda: next(batches))
    assert trainer.bad_steps == 0
    assert all(value.isfinite().all() for value in trainer.method.state_dict().values())
    spoil(monkeypatch, math.nan)
    for step in (5, 6):
        trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
    with pytest.raises(Diverged, match=r"not finite in 3 steps in a row, up to step 8: try"):
        trainer.step(dataclasses.replace(progress, step=7), lambda: next(batches))
    assert loop.PATIENCE == 3


def test_on_a_gpu_the_optimizer_leaves_bad_steps_out_and_the_loop_hears_of_them_a_step_later(
    tiny, monkeypatch
):
    trainer, progress, batches = begin(tiny())
    trainer.optimizer.skips_alone = True

    def steps(trainer: Trainer, *numbers: int) -> None:
        for number in numbers:
            trainer.step(dataclasses.replace(progress, step=number), lambda: next(batches))

    steps(trainer, 0, 1)
    before = {name: value.clone() for name, value in student(trainer).items()}
    with monkeypatch.context() as patch:
        spoil(patch, math.nan)
        steps(trainer, 2)
    assert all(torch.equal(before[name], value) for name, value in student(trainer).items())
    assert trainer.bad_steps == 0  # not known yet
    steps(trainer, 3)
    assert (trainer.bad_steps, trainer.bad_at) == (1, 3)
    assert trainer.state_dict()["bad_steps"] == 0  # a checkpoint waits for the last answer
    assert all(value.isfinite().all() for value in trainer.method.state_dict().values())
    with monkeypatch.context() as patch:
        spoil(patch, math.nan)
        steps(trainer, 4, 5, 6)
        assert trainer.bad_steps == 2
        with pytest.raises(Diverged, match="3 steps in a row, up to step 7: try"):
            trainer.settle()


def test_the_fused_optimizer_trains_as_the_plain_one_does(tiny):
    fused, progress, batches = begin(tiny())
    plain, _, _ = begin(tiny())
    old = plain.optimizer.inner
    assert isinstance(old, torch.optim.AdamW)
    assert old.defaults["fused"]
    groups = [{**group, "fused": False, "foreach": False} for group in old.param_groups]
    plain.optimizer.inner = torch.optim.AdamW(groups)
    for step in range(3):
        canvases = next(batches)
        for each in (plain, fused):
            each.step(dataclasses.replace(progress, step=step), lambda: canvases)  # noqa: B023
    assert farthest(plain, fused) < 0.02 * farthest(begin(tiny())[0], fused)
