"""Every key of every recipe does something: another value changes what two steps of training leave behind.

A key that does nothing is said to be idle by an `unread()`, which is held here against training, or stands
below with the reason why weights do not show it. Recipes are made small; each key is tried in the first
recipe of its method in which it is idle, and in the first in which it is not; those of parts that know no
method, in the first recipe of all.
"""

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch

from foveola.config import ConfigError, KeyInfo, build, describe, merge, to_dict, unread
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.training import assemble as module
from foveola.training.assemble import assemble
from foveola.training.durations import plan
from foveola.training.recipe import RunConfig, nested, recipes, resolve, with_changes

SOURCE = "scenes:?size=32&count=32&objects=2-4"
LABELLED = f"{SOURCE}&background=class"  # what tasks learn from
UNSEEN = {  # keys that weights do not show, by the reason why
    "null is what the data have, tested with the detector": ("method.masks",),
    "names": ("recipe", "about", "data", "out", "method.classes"),
    "weights, tested with the runs that start from them": ("init",),
    "what was found in the data, tested with images of other channels": (
        *("model.channels", "init_channels", "pixels.range", "pixels.channels", "pixels.pages"),
        *("pixels.show", "views.color.normalise"),
    ),
    "how a run is kept and measured": (
        "log_every",
        "checkpoint_every",
        "keep",
        "keep_every",
        "transform",
        "data_changed",
    ),
    "measures only": (
        *("evaluate", "evaluate_every", "evaluate_train", "evaluate_test", "evaluations", "best"),
        *("stop_when_worse", "method.look", "method.score", "method.nms", "method.detections"),
    ),
    "how fast, not what": (
        "device",
        "compile",
        "checkpoint_activations",
        "loader.workers",
        "parallel",
        "sharding",
    ),
    "another order of the same sums, tested with the loop": ("accumulate",),
    "for bad images": ("loader.max_bad",),
    "of images that are not squares, tested with windows": ("views.rescale.side",),
    "a bound that few draws reach, tested with the sampler": ("views.blocks.min_context",),
    "of biases, which these parts do not have": (
        "optimizer.parts.predictor.bias_decay",
        "optimizer.parts.head.bias_decay",
    ),
    "needs a GPU or is slow on a CPU, tested with the loop": ("precision",),
    "of positions at sizes that no view here has; of the encoder that is kept": (
        "model.position_antialias",
        "model.position_offset",
    ),
}
BLIND = (  # beginnings of keys whose readers know no method
    *("seed", "duration", "batch_size", "loader.", "optimizer.lr", "optimizer.weight_decay"),
    *("optimizer.betas", "optimizer.clip", "views.color."),
)
SMALL = {
    "batch_size": 8,
    "precision": "fp32",
    "device": "cpu",
    "model": {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32},
    "views": {"global_size": 32, "local_size": 16},
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 0},
    "transform": None,
}
HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
NARROW = {"width": 16, "depth": 2, "heads": 2}
PARTS = {
    "capi": {"method.clustering.prototypes": 8, "method.predictor.depth": 2},
    "mae": {"method.decoder": NARROW},
    "ijepa": {"method.predictor": NARROW, "views.blocks": {"min_context": 1, "targets": 2}},
    "segmentation": {"method.look": {"size": None, "window": None, "stride": None}},
}
TASK_KEYS = ("method.", "views.rescale", "views.color")  # others are tried with what is not a task
OTHER: dict[str, Any] = {  # values that change much, where most change little in two steps of small views
    "duration": "12 epochs",
    "model.width": 32,
    "model.patch_size": 16,
    "model.image_size": 64,
    "views.global_size": 16,
    "views.local_size": 8,
    "views.objects.candidates": 1,
    "views.masking.largest_block": 0.1,
    "views.masking.smallest_block": 16,
    "loader.mask_canvas": 8,
    "loader.objects_noise": {"random": 1.0},
    "method.token.weight_by": "area",
    "optimizer.clip": 1e-3,
    "optimizer.parts": {"student": {"lr": 0.5}},
    "optimizer.freeze_last_layer": "80 %",
    "freeze": {"encoder": "all"},
    "train_blocks": 1,
    "lora": {"rank": 2},
}


def small(name: str) -> dict[str, Any]:
    config = resolve(name)
    method = config.method
    parts = PARTS.get(method.name, {})
    if method.name == "distillation":
        parts = {f"method.heads.{head}": HEAD for head in method.heads}
    own = {field.name for field in dataclasses.fields(RunConfig)}  # those of a loop are tested with it
    tree = {name: value for name, value in to_dict(config).items() if name in own}
    tree = merge(merge(tree, SMALL), nested(parts))
    vary(tree)
    tree["freeze"] = {}  # an encoder that rests in the first of two steps is where it began in both
    if tree["views"]["objects"]:
        tree["views"]["objects"]["min_visible"] = 0.9  # not every first box will do
    return tree


def vary(tree: dict[str, Any]) -> None:
    """Schedules that stay where they are get somewhere to go, so that their other keys count."""
    if {"value", "start", "end", "warmup"} <= tree.keys():
        for name in ("start", "end"):
            tree[name] = tree["value"] * 0.5 if tree[name] == tree["value"] else tree[name]
    for group in tree.values():
        if isinstance(group, dict):
            vary(group)


def other(info: KeyInfo) -> list[Any]:
    """Other values of a key, some of which may be invalid."""
    value, kind = info.value, info.type
    found = [OTHER[info.path]] if info.path in OTHER else []
    if isinstance(value, bool):
        found += [not value]
    elif isinstance(value, int):
        found += [value + 1, value * 2, value // 2]
    elif isinstance(value, float):
        found += [value * 0.5, value * 2, 0.3]
    elif isinstance(value, list) and "text" in kind:
        found += [["50 %"], ["60 %"]]
    elif isinstance(value, list):
        found += [[type(v)(v * factor) for v in value] for factor in (0.9, 0.5, 2)]
        found += [[value[0], *(v * 0.9 for v in value[1:])], [0.5 for _ in value]]
    elif isinstance(value, str) and value[:1].isdigit():  # a duration
        number, _, unit = value.partition(" ")
        found += [f"{float(number) * 0.5} {unit}", f"{float(number) + 20} {unit}"]
    elif isinstance(value, str):
        found += [*kind.split("|"), "nowhere"]
    elif value is None:
        found += [{}, 0.5, 3, 16, True]
    return [each for each in found if each != value and str(each).partition(" ")[0] != "0.0"]


@lru_cache
def canvases(loader: Any, objects: bool, annotations: Any, seed: int, batch: int) -> list[Any]:
    source = open_source(SOURCE if annotations is None else LABELLED)
    batches = iter(Loader(source, batch, seed, loader, with_objects=objects, annotations=annotations))
    return [next(batches) for _ in range(2)]


def train(config: RunConfig) -> Iterator[dict[str, torch.Tensor]]:
    """All state of a method after a step early in the run, and after one in the middle."""
    progress = plan(config, 32)
    config = dataclasses.replace(config, method=config.method.with_data(open_source(LABELLED)))
    trainer = assemble(config, progress, torch.device("cpu"))
    kinds = config.views.objects is not None, config.method.annotations
    ready = iter(canvases(config.loader, *kinds, config.seed, config.batch_size))
    for step in (1, progress.total_steps // 2 + 1):
        trainer.step(dataclasses.replace(progress, step=step), lambda: next(ready))
        state = trainer.method.state_dict()
        yield {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


@lru_cache  # takes seconds, which collection of the tests need not wait for
def keys() -> dict[str, list[tuple[KeyInfo, bool]]]:
    """What to try in each recipe: keys, and whether they are said to be idle there."""
    seen, found = set(), {}
    hidden = [path for paths in UNSEEN.values() for path in paths]
    for name in sorted(recipes(), key=lambda name: ("tinyimagenet" not in name, name)):
        config = build(RunConfig, small(name))
        idle = unread(config)
        for info in describe(config):
            if any(info.path == path or info.path.startswith(f"{path}.") for path in hidden):
                continue
            at = any(info.path == path or info.path.startswith(f"{path}.") for path in idle)
            blind = info.path.startswith(BLIND)
            if config.method.annotations is not None:
                blind = not info.path.startswith(TASK_KEYS)
            method = "" if blind else config.method.name
            if (mark := (method, info.path, at)) not in seen:
                seen.add(mark)
                found.setdefault(name, []).append((info, at))
    return found


def failures(name: str, tried: list[tuple[KeyInfo, bool]]) -> Iterator[str]:
    if not tried:
        return
    tree = small(name)
    before = list(train(build(RunConfig, tree)))
    for info, idle in tried:
        outcomes = set()
        for value in other(info):
            outcomes.add(outcome := judge(tree, nested({info.path: value}), before, idle))
            if outcome == "changes" or (idle and outcome == "nothing"):
                break
        if not outcomes:
            yield f"{info.path}={info.value!r}: no other value to try"
        elif idle and "changes" in outcomes:
            yield f"{info.path}={info.value!r}: said to be idle, and is not"
        elif not idle and "nothing" in outcomes and "changes" not in outcomes:
            yield f"{info.path}={info.value!r}: changes nothing"


def judge(
    tree: dict[str, Any], changes: dict[str, Any], before: list[dict[str, torch.Tensor]], idle: bool
) -> str:
    """What comes of a change: "refused", "nothing" or "changes"; an idle one must be refused to a user."""
    try:
        config = build(RunConfig, merge(tree, changes))
        same = all(
            equal(a, b) for a, b in zip(before, train(config), strict=False)
        )  # stops where one differs
        outcome = "nothing" if same else "changes"
    except ConfigError:
        return "refused"
    if idle and "size" not in changes.get("model", {}):  # size= resets what makes it idle
        with pytest.raises(ConfigError, match=" has no effect: "):
            with_changes(tree, changes)
    return outcome


@pytest.mark.parametrize("name", recipes())
def test_every_key_does_something(name, monkeypatch):
    # It builds everything once more.
    monkeypatch.setattr(module, "_check_memory", lambda frame, config, device: None)
    assert not list(failures(name, keys().get(name, [])))
