"""A term from outside, as docs/extend.md shows it: by importable name, by entry point, as a class."""

import importlib
import math
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from foveola import outside
from foveola.cli import main
from foveola.config import ConfigError, build, dump_yaml, merge, read_yaml, to_dict
from foveola.data.sample import Chosen
from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import Inputs, ViTConfig
from foveola.schedules import Progress
from foveola.training.recipe import resolve
from foveola.training.run import pretrain
from foveola.views.batch import ViewsConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.tokens import MaskingConfig

NAME = "mean_patch_of_docs:MeanPatch"
MODEL = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.0)
HEADS = {"main": HeadConfig(prototypes=7, hidden=16, bottleneck=5)}
RECIPE = {
    "data": "scenes:?size=32&count=32",
    "duration": "4 steps",
    "batch_size": 8,
    "device": "cpu",
    "model": {"width": 24, "depth": 2, "heads": 3, "patch_size": 8, "image_size": 32},
    "views": {"global_size": 32, "local_count": 0, "masking": {}},
    "method": {"heads": {"main": {"prototypes": 16, "hidden": 16, "bottleneck": 8}}},
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 0},
    "optimizer": {"freeze_last_layer": "0 steps", "lr": {"warmup": "1 steps"}},
    "checkpoint_every": "2 steps",
    "log_every": 1,
}


@pytest.fixture
def module(tmp_path: Path, example_of_docs) -> Any:
    example_of_docs("MeanPatch", "mean_patch_of_docs")
    (tmp_path / "small.yaml").write_text(dump_yaml(RECIPE))
    return importlib.import_module("mean_patch_of_docs")


def configured(**method: Any) -> DistillationConfig:
    tree = {"heads": to_dict(HEADS), **method}
    return build(DistillationConfig.of(tree), tree)


def test_its_loss_is_that_of_a_loop_and_changes_no_other(module, batch):
    views = ViewsConfig(masking=MaskingConfig())
    methods = []
    for config in (configured(), configured(mean={"name": NAME, "weight": 0.5})):
        torch.manual_seed(0)
        methods.append(Distillation(config, MODEL, views).train())
    plain, method = methods
    made, progress = batch(seed=0), Progress(0, 10, 5, 3)
    alone, output = plain(made, progress), method(made, progress)
    assert set(output.losses) == {"token", "patch", "mean"}
    assert all(torch.equal(alone.losses[name], output.losses[name]) for name in alone.losses)
    pixels = made.large.pixels
    mask = made.large.hidden_contents.mask
    cosines = []
    for image in range(len(pixels)):
        for one in range(2):
            for other in range(2):
                seen = Inputs(masked=mask[image, one][None])
                x = method.student.backbone(pixels[image, one][None], seen).patches[0].mean(0)
                y = method.backbone(pixels[image, other][None]).patches[0].mean(0)
                cosines.append((x @ y / (x.norm() * y.norm())).item())
    assert output.losses["mean"].item() == pytest.approx(-0.5 * sum(cosines) / len(cosines), rel=1e-4)
    assert output.logs["mean/alike"].item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-4)


def test_the_command_line_knows_it_and_it_resumes(module, tmp_path, capsys):
    recipe, out = str(tmp_path / "small.yaml"), tmp_path / "run"
    words = ["pretrain", recipe, f"method.mean.name={NAME}", "method.mean.weight=0.5", f"out={out}"]
    assert main([*words, "--help"]) == 0
    assert re.search(r"method\.mean\.weight +0\.5 +float >= 0 +.*of this term", capsys.readouterr().out)
    assert main(words) == 0
    assert read_yaml(out / "config.yaml")["method"]["mean"] == {"weight": 0.5, "name": NAME}
    assert main([*words, "method.mean.weight=0.6"]) == 2
    assert "its method.mean.weight is 0.5, not 0.6" in capsys.readouterr().err
    assert pretrain(str(out / "config.yaml"), out=str(out)).step == 4
    off = resolve(out / "config.yaml", ["method.mean=null"])
    assert off.method == resolve(recipe).method
    assert type(off.method) is DistillationConfig


def test_it_is_one_configuration_however_it_is_named(module, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "small.yaml"
    text = resolve(recipe, [f"method.mean.name={NAME}"])
    assert resolve(recipe, {"method": {"mean": {"name": module.MeanPatch}}}) == text
    assert pickle.loads(pickle.dumps(text)) == deepcopy(text) == text
    entry = EntryPoint("mean", NAME, "foveola.terms")
    monkeypatch.setattr(outside, "entry_points", lambda group: [entry] * (group == entry.group))
    assert main(["pretrain", str(recipe), "--help"]) == 0
    assert "installed: method.mean={}" in capsys.readouterr().out
    told = resolve(recipe, ["method.mean.weight=2"])
    assert told.method.terms()["mean"] == module.MeanPatchConfig(2.0)
    assert to_dict(told)["method"]["mean"] == {"weight": 2.0}
    assert set(resolve(recipe, ["method.mean=null"]).method.terms()) == {"token", "patch"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"mean": {"name": "mean"}},
            r"method: mean: unknown term 'mean'; known: .*one of your own: my_module",
        ),
        ({"mean": {"name": "mean_patch_of_docs:Mean"}}, "has no 'Mean'"),
        ({"mean": {"name": "mean_patch_of_docs:MeanPatchConfig"}}, r"no term: .* base foveola\.Term"),
        ({"mean": {"name": NAME, "wight": 1}}, r"unknown key 'method\.mean\.wight'; did you mean .*weight'"),
        ({"mean": {"name": NAME, "weight": -1}}, r"method\.mean\.weight: must be >= 0"),
        ({"mean": {"weight": 1}}, r"unknown key 'method\.mean'"),
        ({"mean": None}, r"unknown key 'method\.mean'"),
        ({"student": {"name": NAME}}, "student: a term of your own needs another key"),
        ({"forward": {"name": NAME}}, "needs another key"),
        ({"a-b": {"name": NAME}}, "needs another key, a word"),
    ],
)
def test_mistakes_are_one_line(module, tmp_path, method, message):
    with pytest.raises(ConfigError, match=message) as found:
        resolve(tmp_path / "small.yaml", {"method": method})
    assert "\n" not in str(found.value)


def test_a_recipe_may_build_on_one_that_has_it(module, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"base: small.yaml\nmethod: {{mean: {{name: '{NAME}', weight: 3}}, patch: null}}\n"
    )
    (tmp_path / "off.yaml").write_text("base: mine.yaml\nmethod: {mean: null}\n")
    assert set(resolve(tmp_path / "mine.yaml").method.terms()) == {"token", "mean"}
    assert set(resolve(tmp_path / "off.yaml").method.terms()) == {"token"}
    changed = resolve(tmp_path / "mine.yaml", ["method.mean.weight=4"]).method
    assert to_dict(changed)["mean"] == {"weight": 4.0, "name": NAME}
    assert merge(to_dict(changed), {})["patch"] is None


def test_objects_are_told_from_others_and_not_from_themselves(example_of_docs, batch):
    """InfoNCE by loops. Image 0 has its first object twice: no sum has both."""
    example_of_docs("Contrast", "contrast_of_docs")
    importlib.import_module("contrast_of_docs")
    views = ViewsConfig(local_count=0, masking=None, objects=ObjectsConfig(attention=True))
    tree = {"name": "contrast_of_docs:Contrast", "weight": 0.5, "temperature": 0.3}
    torch.manual_seed(0)
    method = Distillation(configured(contrast=tree, patch=None), MODEL, views).train()
    which = torch.tensor([[0, 0], [2, 1], [0, 1]])
    chosen = Chosen(which, torch.ones(3, 2), torch.ones(3, 2))
    made = replace(batch(seed=0, objects=2, local_count=0, masking=False), chosen=chosen)
    loss = method(made, Progress(0, 10, 5, 3)).losses["contrast"]
    tokens = []
    for network in (method.student.backbone, method.backbone):
        seen = Inputs(objects=made.large.objects.flatten(0, 1))
        found = network(made.large.pixels.flatten(0, 1), seen).objects.detach().double()
        tokens.append((found / found.norm(dim=-1, keepdim=True)).unflatten(0, (3, 2)))  # [B, V, M, D]
    student, teacher = tokens
    total = []
    for one, other in ((0, 1), (1, 0)):
        for b in range(3):
            for m in range(2):
                pairs = {
                    (c, k): (student[b, one, m] @ teacher[c, other, k]).item() / 0.3
                    for c in range(3)
                    for k in range(2)
                    if (c, k) == (b, m) or (c, which[c, k].item()) != (b, which[b, m].item())
                }
                total.append(math.log(sum(map(math.exp, pairs.values()))) - pairs[b, m])
    assert len(total) == 12
    assert loss.item() == pytest.approx(0.5 * sum(total) / 12, rel=1e-5)
