"""A term that somebody else wrote, anchored to an earlier teacher: a class, a line in `TERMS`, a key."""

from copy import deepcopy
from dataclasses import dataclass, make_dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from foveola.config import ConfigError, build, key, to_dict
from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.methods.method import Output
from foveola.methods.terms import TERMS
from foveola.methods.terms.term import Setting, Term
from foveola.models.heads import HeadConfig
from foveola.models.vit import Inputs, ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import ViewsConfig
from foveola.views.tokens import MaskingConfig

MODEL = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.0)
HEADS = {"main": HeadConfig(prototypes=7, hidden=16, bottleneck=5)}


@dataclass(frozen=True)
class LikenessConfig:
    weight: float = key(2.0, "weight of this term in the sum of losses", at_least=0)
    every: int = key(2, "steps after which the anchor is taken anew", at_least=1)


class LikenessTerm(Term):
    """Keeps which patches of a view are alike as an earlier teacher had it."""

    Config, help = LikenessConfig, "likeness of patches as of an earlier teacher (DINOv3)"

    def __init__(self, config: LikenessConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.anchor: torch.nn.Module | None = None

    @classmethod
    def check(cls, config: LikenessConfig, setting: Setting) -> None:
        if setting.grid == (1, 1):
            raise ValueError(f"method.{setting.name} compares patches: large views have one")

    def forward(self, seen) -> Output:
        if self.anchor is None or self.steps % self.config.every == 0:
            object.__setattr__(self, "anchor", deepcopy(seen.backbone))  # no module: it is not saved
        with torch.no_grad():
            before = self.anchor(seen.batch.large.pixels.flatten(0, 1)).patches
        mine, theirs = (x @ x.mT for x in (normalize(p, dim=2) for p in (seen.student.large.patches, before)))
        return Output({"loss": self.config.weight * mse_loss(mine, theirs)}, {"alike": mine.mean().detach()})

    def step(self) -> None:
        self.steps += 1


@pytest.fixture
def with_likeness(monkeypatch):
    """The configuration of distillation as it is with the line `"likeness": LikenessTerm` in TERMS."""
    monkeypatch.setitem(TERMS, "likeness", LikenessTerm)
    field = ("likeness", LikenessConfig | None, key(None, LikenessTerm.help))
    return make_dataclass("WithLikeness", [field], bases=(DistillationConfig,), frozen=True)


def naive(mine: Tensor, theirs: Tensor) -> float:
    """Mean over views and pairs of patches of the squared difference of cosines, by loops."""
    total, count = 0.0, 0
    for a, b in zip(mine.double(), theirs.double(), strict=True):
        for i in range(len(a)):
            for j in range(len(a)):
                cosines = [(x[i] @ x[j] / (x[i].norm() * x[j].norm())).item() for x in (a, b)]
                total, count = total + (cosines[0] - cosines[1]) ** 2, count + 1
    return total / count


def test_it_is_added_and_holds_on_to_an_earlier_teacher(with_likeness, batch):
    views = ViewsConfig(masking=MaskingConfig())
    torch.manual_seed(0)
    plain = Distillation(DistillationConfig(heads=HEADS), MODEL, views)
    torch.manual_seed(0)
    method = Distillation(with_likeness(heads=HEADS, likeness=LikenessConfig()), MODEL, views)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p, q in zip(method.student.parameters(), plain.student.parameters(), strict=True):
            p += 0.2 * torch.randn(p.shape, generator=noise)
            q.copy_(p)
    plain.train(), method.train()
    first = deepcopy(method.backbone)
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.5)
    for step in range(2):
        progress, made = Progress(step, 10, 5, 3), batch(seed=step)
        output = method(made, progress)
        pixels = made.large.pixels.flatten(0, 1)
        mine = method.student.backbone(pixels, masked(made)).patches
        expected = 2.0 * naive(mine.detach(), first(pixels).patches.detach())  # the anchor of step 0 in both
        assert output.losses["likeness"].item() == pytest.approx(expected, rel=1e-4)
        assert expected > 0
        assert set(output.losses) == {"token", "patch", "likeness"}
        assert "likeness/alike" in output.logs
        if step == 0:  # without it nothing else differs
            alone = plain(made, progress)
            assert all(torch.equal(alone.losses[name], output.losses[name]) for name in alone.losses)
        optimizer.zero_grad()
        sum(output.losses.values()).backward()
        optimizer.step()
        method.after_step(progress, 0.5)
    assert not torch.equal(first.patch_embed.proj.weight, method.backbone.patch_embed.proj.weight)
    assert int(method.state_dict()["likeness.steps"]) == 2  # its state is in checkpoints


def masked(made):
    return Inputs(masked=made.large.hidden_contents.mask.flatten(0, 1))


def test_its_keys_are_strict_and_it_can_refuse(with_likeness):
    config = build(with_likeness, {"likeness": {"weight": 0.5}})
    assert config.likeness == LikenessConfig(weight=0.5)
    assert to_dict(config)["likeness"] == {"weight": 0.5, "every": 2}
    with pytest.raises(ConfigError, match=r"likeness\.wight"):
        build(with_likeness, {"likeness": {"wight": 0.5}})
    with pytest.raises(ConfigError, match="every"):
        build(with_likeness, {"likeness": {"every": 0}})
    one = replace(MODEL, patch_size=16)
    with pytest.raises(ValueError, match=r"method\.likeness compares patches"):
        with_likeness(patch=None, likeness=LikenessConfig()).check(
            ViewsConfig(global_size=16, local_size=16), one
        )
