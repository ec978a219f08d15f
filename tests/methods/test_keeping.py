"""Terms that keep what starting weights knew, Gram anchoring and preservation, against plain loops."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from foveola.config import ConfigError, build
from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.methods.method import Output, ema_update
from foveola.methods.terms.gram import GramTermConfig
from foveola.methods.terms.preservation import PreservationTermConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import Inputs, ViTConfig
from foveola.views.batch import ViewsConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.tokens import MaskingConfig

MODEL = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.0)
FIELD = replace(MODEL, positions="field", field_size=(5, 5))
HEADS = {"main": HeadConfig(prototypes=7, hidden=16, bottleneck=5)}


def made(objects=False, model=MODEL, **terms):
    """iBOT, or ODIS, that began from weights that are large enough to matter."""
    views = ViewsConfig(objects=ObjectsConfig(attention=True) if objects else None, masking=MaskingConfig())
    torch.manual_seed(0)
    method = Distillation(DistillationConfig(heads=HEADS, **terms), model, views)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in method.student.parameters():
            p += 0.2 * torch.randn(p.shape, generator=noise)
    ema_update(method.teacher, method.student, 0.0)
    method.begin()
    return method.train()


def moved(method):
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.student.backbone.parameters():
            p += 0.1 * torch.randn(p.shape, generator=noise)
    return method


def seen_by(network, batch):
    """Features of large views by a call of the network, told what a student is told."""
    large = batch.large
    objects = None if large.objects is None else large.objects.flatten(0, 1)
    hidden = Inputs(objects=objects, masked=large.hidden_contents.mask.flatten(0, 1))
    return network.eval()(large.pixels.flatten(0, 1), hidden)


def cosine(x, y) -> float:
    return (x.double() @ y.double() / (x.double().norm() * y.double().norm())).item()


def naive_gram(mine, theirs, counted) -> float:
    """Mean over views of the mean over pairs of counted patches; views without any do not count."""
    views = []
    for x, y, use in zip(mine, theirs, counted, strict=True):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if use[i] and use[j]]
        apart = [(cosine(x[i], x[j]) - cosine(y[i], y[j])) ** 2 for i, j in pairs]
        views += [sum(apart) / len(apart)] if apart else []
    return sum(views) / len(views)


@pytest.mark.parametrize("objects", [None, 2])
@pytest.mark.parametrize("tokens", ["visible", "all"])
def test_both_terms_equal_plain_loops(batch, progress, tokens, objects):
    gram, preservation = GramTermConfig(tokens=tokens), PreservationTermConfig(0.5, 3.0, tokens)
    method = moved(made(bool(objects), gram=gram, preservation=preservation))
    given = batch(objects=objects)
    given.large.hidden_contents.mask[1, 1] = True  # a view of which nothing is seen
    output = method(given, progress)
    with torch.no_grad():
        mine, theirs = (seen_by(deepcopy(n), given) for n in (method.student.backbone, method.start))
    hidden = given.large.hidden_contents.mask.flatten(0, 1)
    counted = torch.ones_like(hidden) if tokens == "all" else ~hidden
    expected = naive_gram(mine.patches, theirs.patches, counted)
    assert output.losses["gram"].item() == pytest.approx(2 * expected, rel=1e-4)
    rows = list(zip(mine.patches[counted], theirs.patches[counted], strict=True))
    patch = sum(1 - cosine(x, y) for x, y in rows) / len(rows)
    assert output.losses["preservation_patch"].item() == pytest.approx(3 * patch, rel=1e-4)
    token = [cosine(x, y) for x, y in zip(*(f.objects.flatten(0, 1) for f in (mine, theirs)), strict=True)]
    assert len(token) == 3 * 2 * (objects or 1)
    expected = 0.5 * (1 - sum(token) / len(token))
    assert output.losses["preservation_token"].item() == pytest.approx(expected, rel=1e-4)
    assert output.logs["preservation/token_cosine"].item() == pytest.approx(sum(token) / len(token), rel=1e-4)
    every = [cosine(x, y) for x, y in zip(*(f.patches.flatten(0, 1) for f in (mine, theirs)), strict=True)]
    for name in ("gram/cosine", "preservation/patch_cosine"):
        assert output.logs[name].item() == pytest.approx(sum(every) / len(every), rel=1e-4)


@pytest.mark.parametrize(
    ("objects", "model"), [(None, MODEL), (2, MODEL), (None, FIELD)], ids=["image", "objects", "field"]
)
def test_at_the_start_both_are_zero_and_pull_nowhere(batch, progress, objects, model):
    method = made(bool(objects), model, gram=GramTermConfig(), preservation=PreservationTermConfig())
    output = method(batch(objects=objects), progress)
    kept = {name: loss for name, loss in output.losses.items() if name not in ("token", "patch")}
    assert kept.keys() == {"gram", "preservation_token", "preservation_patch"}
    assert all(loss.item() == 0 for loss in kept.values())
    sum(kept.values()).backward()
    gradients = [p.grad for p in method.student.backbone.parameters() if p.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)


def test_there_is_one_start_for_both_and_it_stays(batch, progress):
    plain = made()
    assert plain.start is None
    method = made(gram=GramTermConfig(), preservation=PreservationTermConfig())
    assert {name.split(".")[0] for name in method.state_dict()} == {
        *("student", "teacher", "start", "token", "patch")
    }
    passes = []
    method.start.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    before = {name: value.clone() for name, value in method.start.state_dict().items()}
    alone, output = plain(batch(), progress), method(batch(), progress)
    assert passes == [False]
    assert all(torch.equal(alone.losses[name], output.losses[name]) for name in alone.losses)
    sum(output.losses.values()).backward()
    assert not any(p.requires_grad for p in method.start.parameters())
    moved(method)
    method.after_step(progress, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in method.start.state_dict().items())
    assert not method.train().start.training


def test_gradients_lead_back(batch, progress):
    method = moved(made(token=None, patch=None, gram=GramTermConfig(), preservation=PreservationTermConfig()))
    optimizer = torch.optim.Adam(method.student.backbone.parameters(), lr=1e-3)

    def total(output: Output) -> torch.Tensor:
        return torch.stack(list(output.losses.values())).sum()

    first = total(method(batch(), progress)).item()
    for _ in range(20):
        optimizer.zero_grad()
        total(method(batch(), progress)).backward()
        optimizer.step()
    assert 0 < total(method(batch(), progress)).item() < 0.5 * first


def test_what_cannot_be_is_refused():
    one = replace(MODEL, patch_size=16)
    config = DistillationConfig(patch=None, gram=GramTermConfig())
    with pytest.raises(ValueError, match=r"method\.gram compares patches of large views"):
        config.check(ViewsConfig(global_size=16, local_size=16), one)
    with pytest.raises(ConfigError, match="keep nothing"):
        build(DistillationConfig, {"preservation": {"token": 0.0, "patch": 0.0}})
