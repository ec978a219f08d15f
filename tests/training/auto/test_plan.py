"""Plans of `pretrain auto`: each builds and takes steps, keeps to what was said, and says why."""

import dataclasses
import itertools
import os

import pytest
import torch

from foveola.config import ConfigError
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.methods.capi import CapiConfig
from foveola.methods.distillation import DistillationConfig
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.auto import choices
from foveola.training.auto.cost import BF16_ON_CPU, cost_of, seconds_of
from foveola.training.auto.facts import (
    Budget,
    DataFacts,
    Machine,
    budget_of,
    cpu_has_bf16,
    look_at_data,
    look_at_machine,
)
from foveola.training.auto.plan import Plan, PlannedStart, plan_run
from foveola.training.recipe import resolve

CPU = Machine("cpu", "CPU with 2 cores", 1, 2, 24 * 2**30, 60e9, False)
GPU = Machine("cuda", "a GPU", 1, 16, 80 * 2**30, 250e12, True)
SMALL_GPU = dataclasses.replace(GPU, memory=8 * 2**30, flops=10e12)
GPUS = dataclasses.replace(GPU, processes=8)
SCENES = {"data": "scenes:?count=64&size=64"}


def facts(images: int = 2400, side: int = 64, objects: float = 0.0, **more: object) -> DataFacts:
    known = {
        "images": images,
        "side": side,
        "gray": False,
        "objects": objects,
        "labels": 0,
        "label_maps": False,
    }
    return DataFacts(**known | more)  # type: ignore[arg-type]


def plan_of(data: DataFacts, machine: Machine = CPU, budget: str = "1 hour", **given: object) -> Plan:
    return plan_run(data, machine, budget_of(budget, machine.processes), {**SCENES, **given})


IMAGES, MACHINES = (40, 200, 2400, 50_000, 1_000_000), (CPU, SMALL_GPU, GPU, GPUS)
TABLE = list(itertools.product(IMAGES, (0.0, 2.5), MACHINES, ("10 min", "1 day", "300 steps")))


@pytest.mark.parametrize(
    ("images", "objects", "machine", "budget"), TABLE[::7]
)  # each value meets each other
def test_every_plan_is_a_valid_run_within_its_limits(images, objects, machine, budget) -> None:
    plan = plan_of(facts(images, 400, objects), machine, budget)
    config = plan.config
    assert config.recipe == "auto"
    assert config.about.budget == budget
    assert config.batch_size <= images
    assert config.batch_size % (machine.processes * config.accumulate) == 0
    rows = config.views.global_count * config.batch_size // config.accumulate
    assert isinstance(config.method, DistillationConfig)
    assert config.method.heads["main"].prototypes <= max(rows, 2)
    assert (config.views.objects is not None) == bool(objects)
    assert config.precision == ("bf16" if machine.bf16 else "fp32")
    held = config.batch_size / machine.processes / config.accumulate * cost_of(config).activations
    assert held <= 0.7 * machine.memory
    seconds = config.batch_size * cost_of(config).flops / (machine.flops * machine.processes)
    steps = int(config.duration.removesuffix(" steps"))
    if budget == "300 steps":
        assert steps == 300
    else:
        assert steps * seconds <= {"10 min": 600, "1 day": 86_400}[budget]


@pytest.mark.parametrize(
    ("data", "machine"),
    [
        (facts(64), CPU),
        (facts(64, objects=3.0), CPU),
        (facts(64, label_maps=True), CPU),
        (facts(64, side=40), SMALL_GPU),
        (facts(64, gray=True), CPU),
    ],
)
def test_plans_take_steps(data, machine) -> None:
    given = {"precision": "fp32", "model.width": 32, "model.depth": 2, "model.heads": 2, "batch_size": 8}
    config = plan_of(data, machine, "8 steps", **given).config
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, workers=0))
    progress = Progress(0, 8, 8, 8)
    trainer = assemble(config, progress, torch.device("cpu"))
    source = open_source(SCENES["data"])
    loader = iter(Loader(source, 8, 0, config.loader, with_objects=config.views.objects is not None))
    for step in range(2):
        values = trainer.step(dataclasses.replace(progress, step=step), lambda: next(loader))
        assert torch.isfinite(torch.as_tensor(values["loss"]))


def test_what_the_user_says_stays_and_the_rest_follows_it() -> None:
    plan = plan_of(facts(), batch_size=16, **{"views.global_size": 32, "method.patch": None})
    assert plan.config.batch_size == 16
    assert plan.config.views.global_size == 32
    assert plan.config.method.heads["main"].prototypes == 32  # rows of two views of 16 images
    said = {line.key: line.reason for line in plan.lines}
    assert said["batch_size"] == said["views.global_size"] == "as you said"
    table = plan.table().splitlines()
    assert len(table) == len(plan.lines) + len(plan.expected)
    assert all(line.reason for line in plan.lines)


def test_few_images_are_said_to_be_few() -> None:
    text = plan_of(facts(200), GPU, "1 day").expected["expect"]
    assert text.startswith("200 images are far too few to train from nothing")
    assert "untrained" in text


def test_longer_budgets_train_larger_networks_for_longer() -> None:
    plans = [plan_of(facts(50_000, 224), GPU, budget).config for budget in ("1 min", "1 hour", "3 days")]
    sizes = [config.model.parameters for config in plans]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    steps = [int(config.duration.removesuffix(" steps")) for config in plans]
    assert steps[0] < steps[1]


def test_label_maps_are_for_patches() -> None:
    config = plan_of(facts(label_maps=True)).config
    assert isinstance(config.method, CapiConfig)
    assert config.method.clustering.prototypes <= config.batch_size


def test_gray_images_have_no_colours_to_shift() -> None:
    assert plan_of(facts(gray=True)).config.views.color.hue == 0
    assert plan_of(facts(gray=False)).config.views.color.hue > 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2 hours", 7200), ("30 min", 1800), ("1 GPU-day", 21_600), ("90 s", 90), ("1.5h", 5400)],
)
def test_a_budget_is_read(text, seconds) -> None:
    assert budget_of(text, 4).seconds == seconds


def test_a_budget_in_steps_and_a_wrong_one() -> None:
    assert budget_of("500 steps", 1) == Budget("500 steps", duration="500 steps")
    with pytest.raises(ConfigError, match="budget='soon': write '2 hours'"):
        budget_of("soon", 1)
    with pytest.raises(ConfigError, match="budget='0 hours'"):
        budget_of("0 hours", 1)


def test_data_are_looked_at(tmp_path) -> None:
    from PIL import Image

    for number in range(5):
        Image.new("L", (50, 40 + number), 10 * number).save(tmp_path / f"{number}.png")
    found = look_at_data(open_source(f"folder:{tmp_path}"))
    assert found == DataFacts(5, 42, True, 0.0, 0, False)
    scenes = look_at_data(open_source("scenes:?size=32&count=8&objects=3"))
    assert (scenes.images, scenes.side, scenes.gray) == (8, 32, False)
    assert scenes.objects == pytest.approx(3, abs=0.5)


def test_operations_of_an_image_are_counted() -> None:
    """By hand: student and teacher of two views of four patches and a class token, and a head."""
    config = resolve(
        "ibot-small",
        {
            "model": {"width": 32, "depth": 1, "heads": 2, "image_size": 16},
            "views": {"global_size": 16},
            "method": {
                "heads": {"main": {"hidden": 8, "bottleneck": 4, "layers": 2, "prototypes": 16}},
                "patch": None,
            },
            "batch_size": 2,
        },
    )
    width, tokens = 32, 5
    blocks = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    embed = 2 * tokens * 3 * 8**2 * width
    head = 2 * 2 * (32 * 8 + 8 * 4 + 4 * 16)  # two tokens
    assert cost_of(config).flops == pytest.approx(4 * 2 * (blocks + embed) + 4 * head)


def test_memory_is_met_by_parts() -> None:
    assert choices.choose_parts(64, 1, image=1.0, weights=0.0, memory=1000.0).value == 1
    assert choices.choose_parts(64, 1, image=10.0, weights=60.0, memory=400.0).value == 4  # 160 <= 220
    assert choices.choose_parts(12, 2, image=10.0, weights=0.0, memory=50.0).value == 2  # 3 of 6 fit


@pytest.mark.parametrize("token", [True, False])
def test_a_plan_from_starting_weights_takes_their_shape_and_steps(tmp_path, token) -> None:
    model = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=64, class_token=token)
    config = EncoderConfig(model, TransformConfig(64, 64), pool="token" if token else "average")
    Encoder(config).save(tmp_path)
    start = PlannedStart(str(tmp_path), "as you said", config)
    given = {**SCENES, "init": str(tmp_path), "batch_size": 8, "loader.workers": 0}
    plan = plan_run(facts(64, labels=4), CPU, budget_of("8 steps", 1), given, start)
    made = plan.config
    assert made.model.shape == (32, 2, 2)
    assert made.views.global_size == 64
    assert made.views.local_count == 0
    assert made.stop_when_worse
    assert isinstance(made.method, DistillationConfig if token else CapiConfig)
    progress = Progress(0, 8, 8, 8)
    trainer = assemble(made, progress, torch.device("cpu"))
    loader = iter(Loader(open_source(SCENES["data"]), 8, 0, made.loader, with_objects=False))
    for step in range(2):
        values = trainer.step(dataclasses.replace(progress, step=step), lambda: next(loader))
        assert torch.isfinite(torch.as_tensor(values["loss"]))


def test_small_images_are_enlarged_for_starting_weights() -> None:
    (side, patch), why = choices.choose_view(facts(side=64), CPU, 14)
    assert (side, patch) == (98, 14)
    assert "enlarged" in why
    assert choices.choose_view(facts(side=500), GPU, 14).value == (224, 14)
    assert choices.choose_local(224, 14) == 98  # as DINO's 96 of 224


def test_too_little_time_is_said() -> None:
    assert "budget" not in plan_of(facts(), GPU, "1 hour").expected
    assert "steps are few" in plan_of(facts(), CPU, "20 s").expected["budget"]


def test_narrow_networks_reach_less_of_the_speed() -> None:
    half, wide = (plan_of(facts(), **{"model.width": width, "model.depth": 2}).config for width in (96, 384))
    assert seconds_of(half, 1e9) == pytest.approx(2 * cost_of(half).flops / 1e9)
    assert seconds_of(wide, 1e9) == pytest.approx(cost_of(wide).flops / 1e9)


def test_a_busy_machine_is_named_so(monkeypatch):
    cores = os.cpu_count() or 1
    monkeypatch.setattr(os, "getloadavg", lambda: (0.8 * cores, 0.0, 0.0))
    assert look_at_machine("cpu").name.endswith("cores (80% busy with other programs in the last minute)")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1 * cores, 9.0, 9.0))
    assert look_at_machine("cpu").name.endswith("cores")


def test_the_rate_from_nothing_is_that_of_the_small_recipes_at_their_size():
    small = resolve("ibot-small")
    rate = choices.choose_rate(small.model.shape[0], small.batch_size).value
    assert rate == pytest.approx(small.optimizer.lr.value, rel=0.2)
    assert choices.choose_rate(96, 64).value == small.optimizer.lr.value


HALVES = dataclasses.replace(CPU, bf16=True)


def test_a_cpu_computes_wide_networks_alone_in_bf16_where_it_has_it() -> None:
    wide = {"model.size": "small"}
    assert plan_of(facts(), HALVES).config.precision == "fp32"  # 96 channels
    assert plan_of(facts(), CPU, **wide).config.precision == "fp32"
    assert plan_of(facts(), HALVES, precision="fp32", **wide).config.precision == "fp32"
    plain, half = (plan_of(facts(), machine, "10 min", **wide).config for machine in (CPU, HALVES))
    assert half.precision == "bf16"
    steps = [int(config.duration.removesuffix(" steps")) for config in (plain, half)]
    assert steps[0] / steps[1] == pytest.approx(BF16_ON_CPU, abs=0.05)


@pytest.mark.parametrize(("machine", "size"), [(CPU, "small"), (HALVES, None)])
def test_no_time_is_promised_where_bf16_saves_none(machine, size) -> None:
    shape = {} if size is None else {"model.size": size}
    plans = [plan_of(facts(), machine, "10 min", precision=name, **shape) for name in ("fp32", "bf16")]
    assert plans[0].config.duration == plans[1].config.duration


def test_weights_may_travel_as_halves_where_a_gpu_computes_so() -> None:
    given = {"parallel": "fsdp", "sharding.gather": "bf16"}
    assert plan_of(facts(), GPUS, **given).config.precision == "bf16"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 clzero\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\n", False),
        ("Features\t: fp asimd\n", False),
    ],
)
def test_linux_tells_whether_a_cpu_has_bf16(tmp_path, told, expected) -> None:
    (tmp_path / "cpuinfo").write_text(told)
    assert cpu_has_bf16(tmp_path / "cpuinfo") == expected


def test_a_cpu_of_which_nothing_is_told_has_no_bf16(tmp_path) -> None:
    assert not cpu_has_bf16(tmp_path / "cpuinfo")
