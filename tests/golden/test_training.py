"""The first losses of every method and mixture, and what a run keeps of its configuration."""

import dataclasses
import json

import pytest

from foveola.training.recipe import recipes, resolve
from foveola.training.run import pretrain

RECIPES = [*sorted(name for name in recipes() if name.endswith("-tiny-tinyimagenet")), "demo"]
STEPS = 5
KEPT = ("loss", "grad_norm", "lr", "weight_decay", "objects/", "blocks/")
# The steps after the first amplify what another processor, or another torch, rounds otherwise: losses by up
# to 8e-4 (KoLeo of ibot-tiny, torch 2.14 against 2.15), norms of gradients by more.
LATER = 2e-3
# The recipe's own networks, views, losses and schedules on few built-in images.
SMALL = {
    "data": "scenes:?size=64&count=64&objects=2-4",
    "duration": f"{STEPS} steps",
    "batch_size": 8,
    "checkpoint_every": f"{STEPS} steps",
    "keep_every": None,
    "device": "cpu",
    "log_every": 1,
    "loader.workers": 0,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_losses(recipe, golden, tmp_path):
    pretrain(recipe, out=tmp_path / "run", **SMALL)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    kept = [{k: v for k, v in line.items() if k.startswith(KEPT)} for line in lines]
    golden(f"train-{recipe}-first", kept[0], relative=2e-6)
    for line in kept[1:]:
        del line["grad_norm"]
    golden(f"train-{recipe}-later", kept[1:], relative=LATER)


def test_configuration_of_a_run(golden, tmp_path):
    """What config.yaml holds, key by key and in order: the demo's recipe names every group."""
    short = {"duration": "1 steps", "checkpoint_every": "1 steps"}
    run = pretrain("demo", out=tmp_path / "run", **SMALL | short)
    file = tmp_path / "run" / "config.yaml"
    golden("config-yaml", file.read_text().splitlines())
    assert resolve(file) == dataclasses.replace(run.config, out=None)
