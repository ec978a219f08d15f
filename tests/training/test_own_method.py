"""A method that somebody else wrote: the contract of `Method` is all that the loop asks of it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from foveola.config import ConfigError, key
from foveola.methods import METHODS
from foveola.methods.method import Method, Output
from foveola.models.vit import VisionTransformer
from foveola.schedules import Progress
from foveola.training.assemble import assemble
from foveola.training.dryrun import dry_run
from foveola.training.run import pretrain


@dataclass(frozen=True)
class SiamConfig:
    name: str = key("distillation", "stands in for the method of that name")
    pool: str = key("token", "what stands for an image")
    predictor: None = None

    def check(self, views, model) -> None:
        pass


class Siam(Method):
    """SimSiam: no teacher, no heads by name, no prototypes; the encoder is called `net`."""

    def __init__(self, config, model, views) -> None:
        super().__init__()
        self.net = VisionTransformer(model)
        self.net.mask_token.requires_grad_(False)
        width = model.shape[0]
        self.guess = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width))

    def forward(self, batch, progress) -> Output:
        found = self.net(batch.large.pixels.flatten(0, 1)).objects[:, 0]
        first, second = found.unflatten(0, (-1, 2)).unbind(1)
        pairs = [(self.guess(first), second.detach()), (self.guess(second), first.detach())]
        return Output({"alike": -torch.stack([cosine_similarity(*pair).mean() for pair in pairs]).mean()})

    @property
    def backbone(self) -> VisionTransformer:
        return self.net

    def trained(self):
        return (self.net,)


@pytest.fixture
def siam(tiny, plain_tree, monkeypatch):
    def make(**changes):
        config = tiny(plain_tree, **{"optimizer.freeze_last_layer": "0 steps"} | changes)
        object.__setattr__(config, "method", SiamConfig())
        return config

    monkeypatch.setitem(METHODS, "distillation", Siam)
    return make


def test_it_dry_runs_and_trains(siam, tmp_path):
    said = dict(line.split("  ", 1) for line in dry_run(siam()).splitlines())
    said = {name.strip(): text.strip() for name, text in said.items()}
    d = 32
    block = 4 * d + 3 * d * d + 3 * d + d * d + d + 8 * d * d + 4 * d + d
    encoder = 2 * block + 2 * d + (16 + 1) * d + d + 3 * 64 * d + d
    assert said["parameters"] == f"net {encoder:,}, guess {8 * d + 8 + 8 * d + d:,}"
    assert said["tokens per image"] == "student 34"
    run = pretrain(siam(duration="3 steps", out=str(tmp_path / "run")))
    assert run.finished
    assert run.metrics["loss/alike"] == run.metrics["loss"]
    assert run.encoder().backbone.config.shape == (32, 2, 2)


def test_its_layers_learn_at_their_own_rates_and_it_has_no_prototypes(siam):
    progress = Progress(0, 8, 4, 16)
    trainer = assemble(siam(**{"optimizer.layer_decay": 0.5}), progress, torch.device("cpu"))
    trainer.optimizer.schedule(Progress(1, 8, 4, 16))
    rates = {id(p): g["lr"] for g in trainer.optimizer.adamw.param_groups for p in g["params"]}
    net = trainer.method.backbone
    found = [rates[id(p)] / 1e-3 for p in (net.cls_token, net.blocks[0].norm1.bias, net.blocks[1].norm1.bias)]
    assert [*found, rates[id(net.norm.bias)] / 1e-3] == pytest.approx([0.125, 0.25, 0.5, 1.0])
    with pytest.raises(ConfigError, match="no prototypes to freeze"):
        assemble(siam(**{"optimizer.freeze_last_layer": "1 epochs"}), progress, torch.device("cpu"))
