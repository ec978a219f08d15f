"""Parts that rest: not a bit of them moves, and they cost no gradient; runs go on over the end of a phase."""

import dataclasses
import json

import pytest
import torch

import foveola
from foveola.config import ConfigError, build, merge
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.dryrun import dry_run
from foveola.training.recipe import RunConfig, nested, resolve
from foveola.training.run import pretrain

CPU = torch.device("cpu")
PROGRESS = Progress(0, 8, 4, 16)


def weights(state, prefix):
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    assert found
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def names(method, trained: bool) -> set[str]:
    return {name for name, p in method.named_parameters() if p.requires_grad == trained}


def test_what_rests_does_not_move_by_a_bit_and_then_learns(tiny, tmp_path, newest, interrupt_after, same):
    """An epoch is 4 steps: the encoder of steps 1 to 4 is that of the start, of student and teacher."""
    frozen = {"freeze": {"backbone": "1 epochs"}, "optimizer.weight_decay.value": 0.4}
    config = tiny(out=str(tmp_path / "run"), checkpoint_every="1 steps", accumulate=2, **frozen)
    start = assemble(config, PROGRESS, CPU).method.state_dict()
    pretrain(config)
    for step in range(1, 9):
        state = torch.load(tmp_path / f"run/checkpoints/step-{step:08d}/state.pt")["trainer"]
        method, averages = state["method"], state["optimizer"]
        for branch in ("student.backbone.", "teacher.backbone."):
            now, before = weights(method, branch), weights(start, branch)
            assert all(torch.equal(now[name], before[name]) for name in before) == (step <= 4), branch
        now = weights(method, "student.heads.main.mlp.")
        heads = weights(start, "student.heads.main.mlp.").items()
        assert any(torch.equal(now[name], before) for name, before in heads) == (step == 1)  # lr 0
        assert (len(averages) <= 8) == (step <= 4)  # the heads have eight tensors

    parts = dataclasses.replace(config, out=str(tmp_path / "parts"))
    for stop in (3, 1, 2, 0):  # within the phase, at its end, after it
        interrupt_after(stop)
        pretrain(parts)
    same(newest(tmp_path / "run")["trainer"], newest(tmp_path / "parts")["trainer"])


def test_what_rests_has_no_gradient_and_no_graph(tiny):
    config = tiny(freeze={"encoder": "2 steps", "heads.main": "1 steps"})
    with pytest.raises(
        ConfigError, match="freeze: nothing would learn in the first steps, as encoder, heads"
    ):
        assemble(config, PROGRESS, CPU)
    trainer = assemble(tiny(freeze={"encoder": "2 steps"}), PROGRESS, CPU)
    assert {name.split(".")[1] for name in names(trainer.method, True)} == {"heads"}
    seen = trainer.method.student.backbone(torch.randn(1, 3, 32, 32))
    assert not seen.patches.requires_grad
    assert not trainer.freezing.apply(dataclasses.replace(PROGRESS, step=1))
    assert trainer.freezing.apply(dataclasses.replace(PROGRESS, step=2))
    assert trainer.method.student.backbone(torch.randn(1, 3, 32, 32)).patches.requires_grad
    assert not any(p.requires_grad for p in trainer.method.teacher.parameters())


def test_frozen_for_good_is_frozen_to_the_end(tiny, tmp_path, newest):
    config = tiny(out=str(tmp_path), freeze={"encoder": "all"}, compile=False)
    start = assemble(config, PROGRESS, CPU).method.state_dict()
    state = newest(pretrain(config).folder)["trainer"]["method"]
    for branch in ("student.backbone.", "teacher.backbone."):
        for name, value in weights(start, branch).items():
            assert torch.equal(weights(state, branch)[name], value)


def test_the_last_blocks_alone_learn(tiny, tmp_path, newest):
    config = tiny(out=str(tmp_path), train_blocks=1, **{"model.depth": 3, "optimizer.layer_decay": 0.9})
    trainer = assemble(config, PROGRESS, CPU)
    start = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    free = {n for n in names(trainer.method, True) if n.startswith("student.backbone.")}
    assert free == {
        n for n in start if n.startswith(("student.backbone.blocks.2.", "student.backbone.norm."))
    }
    tokens, layout = trainer.method.student.backbone.prepare(torch.randn(1, 3, 32, 32))
    for block in trainer.method.student.backbone.blocks[:2]:
        tokens = block(tokens, layout.objects, layout.readable, layout.rotation)
    assert not tokens.requires_grad
    state = newest(pretrain(config).folder)["trainer"]["method"]
    for name, value in weights(start, "student.backbone.").items():
        moved = not torch.equal(weights(state, "student.backbone.")[name], value)
        assert moved == (f"student.backbone.{name}" in free), name
    with pytest.raises(ConfigError, match="train_blocks=3: the encoder has 3 blocks"):
        assemble(dataclasses.replace(config, train_blocks=3), PROGRESS, CPU)


@pytest.mark.parametrize("part", ["encoder", "clustering", "student"])
def test_parts_of_a_method_that_calls_its_encoder_otherwise(part):
    config = resolve("capi-tiny-tinyimagenet", {"freeze": {part: "1 steps"}, "model.depth": 1})
    trainer = assemble(config, PROGRESS, CPU)
    own = {"encoder": "student.backbone."}.get(part, f"{part}.")
    rest = {
        n
        for n in names(trainer.method, False)
        if not n.startswith("teacher.") and "backbone.mask_token" not in n
    }
    rest -= {"student.predictor.mask_token"} if part == "encoder" else set()
    assert rest == {n for n in trainer.optimizer.named if n.startswith(own)}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ({"encoderr": "1 epochs"}, r"freeze: .* no 'encoderr', but .*did you mean 'encoder'"),
        ({"encoder": "1 epoch s"}, r"freeze\.encoder: not a duration: '1 epoch s'"),
        ({"encoder": "all", "heads": "all"}, "freeze: nothing would learn"),
    ],
)
def test_phases_that_cannot_be_are_one_line(tiny, tmp_path, freeze, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(tiny(out=str(tmp_path / "run"), freeze=freeze))


def test_a_part_of_before_is_understood(tiny):
    """Runs named the submodule `student` before the parts of a method had names of their own."""
    config = tiny(**{"optimizer.parts": {"student": {"lr": 0.5}}})
    groups = assemble(config, PROGRESS, CPU).optimizer.inner.param_groups
    assert {group["part"] for group in groups} == {"student"}


RANKS = """
import hashlib, json, os, sys, torch
torch.set_num_threads(1)
from foveola.config import build
from foveola.training import run
from foveola.training.recipe import RunConfig

made, assemble = [], run.assemble
run.assemble = lambda *a: made.append(assemble(*a)) or made[-1]
run.pretrain(build(RunConfig, json.loads(TREE)))
state = {k: v for k, v in sorted(made[-1].method.state_dict().items()) if not k.endswith("used")}
digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values()))
weights = {k: v.tolist() for k, v in state.items() if "backbone.norm" in k or "mlp.0.bias" in k}
print(json.dumps([digest.hexdigest(), weights]))
sys.stdout.flush()
os._exit(0)
"""


def test_two_processes_average_what_learns(tiny_tree, plain_tree, tiny, tmp_path, run_ranks, newest):
    """Without random views two processes are one with the whole batch, before and after a phase ends."""
    tree = merge(merge(tiny_tree, plain_tree), {"freeze": {"encoder": "3 steps"}, "duration": "6 steps"})
    tree = merge(tree, {"accumulate": 2})
    code = f"TREE = {json.dumps(json.dumps(tree | {'out': str(tmp_path / 'two')}))}\n{RANKS}"
    first, second = map(json.loads, run_ranks(code))
    assert first == second
    one = pretrain(
        tiny(plain_tree, freeze={"encoder": "3 steps"}, duration="6 steps", out=str(tmp_path / "1"))
    )
    state = newest(one.folder)["trainer"]["method"]
    assert first[1]
    for name, values in first[1].items():
        assert torch.tensor(values) == pytest.approx(state[name], rel=1e-3, abs=1e-6), name


# -- low-rank updates ----------------------------------------------------------------------------------------

LORA = {
    "lora": {"rank": 2},
    "freeze": {"encoder": "2 steps"},
    "optimizer.parts": {"encoder": {"lr": 100.0}},
    "checkpoint_activations": True,
}
MAE = {
    "method": {"name": "mae", "decoder": {"kind": "self", "width": 16, "depth": 1, "heads": 2}},
    "model": {"positions": "sincos", "init": "xavier", "drop_path": 0.0},
    "optimizer": {"freeze_last_layer": "0 steps", "layer_decay": 0.7},
    "views": {
        "global_count": 1,
        "local_count": 0,
        "masking": None,
        "objects": None,
        "dropping": {"shape": "random", "ratio": 0.5, "predict": 1.0},
    },
}


@pytest.mark.parametrize("recipe", ["distillation", "mae"])
def test_a_run_of_low_rank_updates_keeps_an_ordinary_encoder(
    tiny, tiny_tree, tmp_path, newest, interrupt_after, same, recipe
):
    """Interrupted within the phase and after it; what is written is base + scale * B A of the checkpoint."""
    base = tiny_tree if recipe == "distillation" else merge(tiny_tree | {"method": {}}, MAE)

    def config(out: str) -> RunConfig:
        return build(RunConfig, merge(base, nested(LORA | {"out": str(tmp_path / out)})))

    whole = pretrain(config("whole"))
    for stop in (1, 3, 0):
        interrupt_after(stop)
        parts = pretrain(config("parts"))
    state = newest(whole.folder)["trainer"]
    same(state, newest(parts.folder)["trainer"])

    student = {k.removeprefix("student.backbone."): v for k, v in state["method"].items()}
    a, b = (student[f"blocks.1.mlp.fc2.lora_{x}"] for x in "ab")
    assert b.abs().max() > 0
    expected = student["blocks.1.mlp.fc2.weight"] + 8 * b @ a
    of_student = foveola.load(f"{whole.folder}?which=student").backbone.state_dict()
    assert of_student["blocks.1.mlp.fc2.weight"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
    kept = foveola.load(whole.folder).backbone.state_dict()
    assert not any("lora" in name for name in kept)
    if recipe == "mae":  # there is no teacher
        assert all(torch.equal(kept[name], value) for name, value in of_student.items())
    start = assemble(config("start"), PROGRESS, CPU).method.state_dict()
    prefix = "student.backbone." if recipe == "mae" else "teacher.backbone."
    for name, value in kept.items():
        layer = name.removesuffix(".weight").rpartition(".")[2]
        linear = (
            name.startswith("blocks.")
            and not name.endswith("bias")
            and layer in ("qkv", "proj", "fc1", "fc2")
        )
        learned = linear or (name == "mask_token" and recipe != "mae")
        assert torch.equal(value, start[f"{prefix}{name}"]) != learned, name


def test_a_dry_run_says_what_learns(tiny):
    """By hand, of two blocks of width 32: r (in + out) of each layer, and the token for masked patches."""
    said = dict(line.split("  ", 1) for line in dry_run(tiny(lora={"rank": 2})).splitlines())
    adapters = 2 * 2 * ((32 + 96) + (32 + 32) + 2 * (32 + 128))
    assert said["parameters"].strip().startswith(f"encoder {adapters + 32:,}, heads ")
    resting = "encoder but for updates of rank 2 of qkv, proj, mlp"
    assert next(value.strip() for name, value in said.items() if name == "resting") == resting
    blocks = {"freeze": {"heads.main": "1 epochs"}, "train_blocks": 1}
    said = dict(line.split("  ", 1) for line in dry_run(tiny(**blocks)).splitlines())
    own = 2 * 2 * 32 + (3 * 32 * 32 + 96) + (32 * 32 + 32) + (2 * 4 * 32 * 32 + 128 + 32) + 2 * 32
    assert said["parameters"].strip().startswith(f"encoder {own:,}, heads ")
    assert said["resting"].strip() == "heads.main for 4 steps; encoder but for its last block"


def test_what_learns_is_said_once(tiny):
    with pytest.raises(ConfigError, match=r"lora and train_blocks both say what learns"):
        tiny(lora={}, train_blocks=1)
    with pytest.raises(ConfigError, match=r"lora\.rank has no effect: freeze\.encoder=all"):
        resolve("demo", {"freeze": {"encoder": "all"}, "lora.rank": 4})


# -- recipes that go on from trained weights -----------------------------------------------------------------


def test_a_run_without_the_weights_that_it_is_made_for_is_refused(tiny, tmp_path):
    data = {"data": "scenes:?size=32&count=64", "out": str(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"method\.gram, method\.preservation keep .* init=hf:facebook/dinov2-small"
    ):
        pretrain("dinov2-vits14-adapt", **data)
    with pytest.raises(ConfigError, match=r"'mae-vits16-adapt' goes on from trained weights: it needs init="):
        pretrain("mae-vits16-adapt", **data)
    with pytest.raises(ConfigError, match=r"method\.gram keeps .* needs init=.*; or method\.gram=null"):
        pretrain(tiny(out=str(tmp_path), **{"method.gram": {}}))
    assert not list(tmp_path.iterdir())
    assert resolve("dinov2-vits14-adapt").method.holding == ["gram", "preservation"]
