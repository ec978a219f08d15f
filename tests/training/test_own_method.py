"""A method that somebody else wrote, SimSiam of docs/extend.md: all that is asked is in `Method`."""

import importlib
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import foveola
from foveola import outside
from foveola.cli import main
from foveola.config import ConfigError, UserError, describe, dump_yaml, merge, read_yaml
from foveola.reports.record import read_runs
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.dryrun import dry_run
from foveola.training.recipe import RunConfig, resolve
from foveola.training.run import pretrain

NAME = "simsiam_of_docs:SimSiam"
OTHERS = """
from dataclasses import dataclass
from simsiam_of_docs import SimSiam, SimSiamConfig
from foveola import Method, MethodConfig

class Half(Method):
    def trained(self): return ()

class Bare(SimSiam):
    Config = dict

@dataclass(frozen=True)
class OtherConfig:
    name: str = ""

class Other(SimSiam):
    Config = OtherConfig

class Forgot(SimSiam):
    class Config(MethodConfig):
        more: int = 3
"""


@pytest.fixture
def recipe(tmp_path: Path, example_of_docs, tiny_tree, plain_tree) -> str:
    """A recipe for another method, beside which Python finds the module of the page."""
    modules = example_of_docs("SimSiam", "simsiam_of_docs")
    (modules / "others_of_docs.py").write_text(OTHERS)
    tree = merge(merge(tiny_tree, plain_tree), {"about": {"method": "iBOT", "model": "small"}})
    tree["optimizer"]["freeze_last_layer"] = "0 steps"
    del tree["recipe"]
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tree))
    return str(tmp_path / "tiny.yaml")


def siam(recipe: str, **changes: Any) -> RunConfig:
    return resolve(recipe, {"method.name": NAME, "method.hidden": 8} | changes)


def test_it_dry_runs_by_the_names_of_its_parts(recipe):
    said = dict(re.split("  +", line, maxsplit=1) for line in dry_run(siam(recipe)).splitlines())
    d = 32
    block = 4 * d + 3 * d * d + 3 * d + d * d + d + 8 * d * d + 4 * d + d
    encoder = 2 * block + 2 * d + (16 + 1) * d + d + 3 * 64 * d + d
    assert said["parameters"] == f"network {encoder:,}, guess {8 * d + 8 + 8 * d + d:,}"
    assert said["tokens per image"] == "student 34"
    assert said["recipe"] == f"tiny ({NAME})"  # not what the recipe says of the method that it replaces


def test_it_resumes_bit_for_bit_and_its_encoder_needs_no_module(
    recipe, tmp_path, same, newest, lines, interrupt_after, capsys, monkeypatch
):
    words = ["pretrain", recipe, f"method.name={NAME}", "method.hidden=8"]
    assert main([*words, "--help"]) == 0
    assert "width of the hidden layer of the predictor" in capsys.readouterr().out
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    parts = [*words, f"out={tmp_path / 'parts'}"]
    for stop in (2, 3, 0):
        interrupt_after(stop)
        assert main(parts) == 0
    same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert read_yaml(tmp_path / "parts" / "config.yaml")["method"] == {"name": NAME, "hidden": 8}
    assert main([*parts, "method.hidden=9"]) == 2
    assert "its method.hidden is 8, not 9" in capsys.readouterr().err

    for module in ("simsiam_of_docs", "others_of_docs"):
        sys.modules.pop(module, None)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "modules" not in path])
    with pytest.raises(UserError, match="no module 'simsiam_of_docs'"):
        pretrain(recipe, out=str(tmp_path / "parts"), method={"name": NAME, "hidden": 8})
    encoder = foveola.load(tmp_path / "parts")
    assert encoder.backbone.config.shape == (32, 2, 2)
    trained = newest(tmp_path / "parts")["trainer"]["method"]
    assert torch.equal(encoder.backbone.norm.weight, trained["network.norm.weight"])
    foveola.export(tmp_path / "parts", tmp_path / "weights.pth", "torch")
    (record,) = read_runs([tmp_path / "parts"])
    assert (record.method, record.prototypes(), record.fixed_targets) == (NAME, {}, False)
    page = foveola.report(tmp_path / "parts", protocols="label_free", limit=8)
    assert NAME in Path(page).read_text()


def test_its_loss_is_that_of_a_loop(recipe):
    trainer = assemble(siam(recipe), Progress(0, 8, 4, 16), torch.device("cpu"))
    method, pixels = trainer.method, torch.randn(3, 2, 3, 32, 32)
    batch = type("Batch", (), {"large": type("Views", (), {"pixels": pixels})})
    (loss,) = method(batch, Progress(0, 8, 4, 16)).losses.values()
    total = 0.0
    for image in pixels:
        tokens = [method.network(view[None]).objects[0, 0] for view in image]
        for one, other in ((0, 1), (1, 0)):
            total -= cosine_similarity(method.guess(tokens[one]), tokens[other], dim=0).item() / 6
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_its_parts_and_layers_learn_at_their_own_rates_and_it_has_no_prototypes(recipe):
    progress = Progress(0, 8, 4, 16)
    changes = {"optimizer.layer_decay": 0.5, "optimizer.parts": {"guess": {"lr": 3.0}}}
    trainer = assemble(siam(recipe, **changes), progress, torch.device("cpu"))
    trainer.optimizer.schedule(Progress(1, 8, 4, 16))
    rates = {id(p): g["lr"] for g in trainer.optimizer.inner.param_groups for p in g["params"]}
    net = trainer.method.backbone
    found = [rates[id(p)] / 1e-3 for p in (net.cls_token, net.blocks[0].norm1.bias, net.blocks[1].norm1.bias)]
    assert [*found, rates[id(net.norm.bias)] / 1e-3] == pytest.approx([0.125, 0.25, 0.5, 1.0])
    assert [rates[id(p)] for p in trainer.method.guess.parameters()] == pytest.approx([3e-3] * 4)
    with pytest.raises(ConfigError, match="no prototypes to freeze"):
        assemble(siam(recipe, **{"optimizer.freeze_last_layer": "1 epochs"}), progress, torch.device("cpu"))
    with pytest.raises(ConfigError, match="this method has no 'heads', but network, guess"):
        assemble(siam(recipe, **{"optimizer.parts": {"heads": {}}}), progress, torch.device("cpu"))


def test_as_an_object_and_by_an_entry_point(recipe, monkeypatch):
    module = importlib.import_module("simsiam_of_docs")
    config = resolve(recipe, {"method": {"name": module.SimSiam, "hidden": 8}})
    assert config == siam(recipe)
    assert [each.path for each in describe(config.method, "method")] == ["method.name", "method.hidden"]
    with pytest.raises(UserError, match="define it at the top of a module"):
        resolve(recipe, {"method.name": type("Local", (module.SimSiam,), {})})
    entry = EntryPoint("simsiam", NAME, "foveola.methods")
    monkeypatch.setattr(outside, "entry_points", lambda group: [entry] * (group == entry.group))
    config = resolve(recipe, ["method.name=simsiam", "method.hidden=8"])
    assert config.method == module.SimSiamConfig("simsiam", 8)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "simsiam"}, "method: unknown method 'simsiam'; known: distillation, capi, mae, ijepa, "),
        ({"name": "distilation"}, r"did you mean 'distillation'\? \(one of your own: my_module:MyMethod\)"),
        ({"name": "simsiam_of_docs:SimSam"}, "method: .* has no 'SimSam'; did you mean 'SimSiam'"),
        ({"name": "simsiam_of_doks:SimSiam"}, r"there is no module 'simsiam_of_doks'; PYTHONPATH=\."),
        (
            {"name": "simsiam_of_docs:SimSiamConfig"},
            r"is no method: a class with the base foveola\.Method is",
        ),
        ({"name": "others_of_docs:Half"}, "a method needs backbone, forward"),
        ({"name": "others_of_docs:Bare"}, "a method needs a frozen dataclass as Config"),
        ({"name": "others_of_docs:Other"}, r"OtherConfig needs the base foveola\.MethodConfig"),
        ({"name": "others_of_docs:Forgot"}, r"Config needs @dataclass\(frozen=True\)"),
        ({"name": NAME, "hiden": 3}, r"unknown key 'method\.hiden'; did you mean 'method\.hidden'"),
        ({"name": NAME, "hidden": 0}, r"method\.hidden: must be >= 1, got 0"),
        ({"name": 3}, "unknown method '3'"),
        (3, r"method: expected a group of keys, one of them name, got 3"),
    ],
)
def test_mistakes_are_one_line(recipe, method, message):
    with pytest.raises(ConfigError, match=message) as found:
        resolve(recipe, {"method": method})
    assert "\n" not in str(found.value)


def test_its_check_and_what_it_does_not_know_are_refused(recipe):
    with pytest.raises(ConfigError, match=r"SimSiam: views\.global_count=2"):
        siam(recipe, **{"views.local_count": 2})
    with pytest.raises(ConfigError, match="knows no position field"):
        siam(recipe, **{"model.positions": "field"})


def test_it_starts_from_weights(recipe: str, tmp_path: Path):
    """Nothing is asked of a method for that: the networks that see images get them."""
    first = pretrain(recipe, method={"name": NAME}, duration="2 steps", out=str(tmp_path / "first"))
    second = pretrain(
        recipe,
        method={"name": NAME},
        out=str(tmp_path / "second"),
        duration="2 steps",
        init=str(first.folder),
    )
    mine = foveola.load(f"{second.folder}?step=0").backbone.state_dict()
    for name, value in first.encoder().backbone.state_dict().items():
        assert torch.equal(mine[name], value), name
