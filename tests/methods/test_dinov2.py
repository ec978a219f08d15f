"""DINOv2: the whole loss against loops in float64, what the teacher sees, KoLeo by view and process."""

import copy
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

import foveola
from foveola.data.sources import open_source
from foveola.methods.distillation import Branch, Distillation
from foveola.methods.targets import TargetConfig
from foveola.methods.terms.patch import PatchTermConfig
from foveola.methods.terms.spread import SpreadTerm, SpreadTermConfig
from foveola.methods.terms.term import Seen, Setting, Tokens
from foveola.methods.terms.token import TokenTermConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import Features, Inputs, VisionTransformer, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, Hidden, Views, ViewsConfig

MakeBatch = Callable[..., Batch]
MakeMethod = Callable[..., Distillation]

MODEL = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.0, layer_scale=1e-5)
LARGE = replace(MODEL, mlp="swiglu", registers=4)  # what the larger models of the paper have
SHARED = {"main": HeadConfig(7, 16, 5, norm_last_layer=False)}
OWN = SHARED | {"patches": HeadConfig(9, 12, 4, norm_last_layer=False)}
TEMPERATURES = {"token": 0.05, "patch": 0.06}


def dinov2(kind: str, heads: dict[str, HeadConfig], patch_kind: str | None = None, **weights: float) -> dict:
    """Terms of DINOv2 with heads of 7 prototypes for tokens, and 9 for patches if they have their own."""
    kinds = {"token": kind, "patch": patch_kind or kind}
    target = {
        name: TargetConfig(kind=kinds[name], temperature=Schedule(value=TEMPERATURES[name])) for name in kinds
    }
    own = "patches" if "patches" in heads else "main"
    return {
        "heads": heads,
        "token": TokenTermConfig(target=target["token"], weight=weights.get("token", 1.0)),
        "patch": PatchTermConfig(target=target["patch"], head=own, weight=weights.get("patch", 1.0)),
        "spread": SpreadTermConfig(weight=weights.get("spread", 0.1)),
    }


# -- the loss, naively: every sum written out, all in float64 ------------------------------------------------


def naive_head(branch: Branch, name: str, x: Tensor) -> Tensor:
    """Logits of one token: three linear maps with exact GELU, a unit vector, prototypes of length g."""
    own = dict(branch.heads[name].named_parameters())
    for layer in (0, 2, 4):
        x = own[f"mlp.{layer}.weight"] @ x + own[f"mlp.{layer}.bias"]
        if layer < 4:
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = x / x.pow(2).sum().sqrt()
    v, g = own["last_layer.v"], own["last_layer.g"]
    return torch.stack([g[k, 0] * (v[k] @ x) / v[k].pow(2).sum().sqrt() for k in range(len(v))])


def naive_targets(logits: list[Tensor], config: TargetConfig, temperature: float, center: Tensor | None):
    rows = torch.stack(logits).detach()
    if config.kind == "centering":
        assert center is not None
        powers = torch.exp((rows - center.double()) / temperature)
        return powers / powers.sum(dim=1, keepdim=True)
    a = torch.exp(rows / temperature)
    for _ in range(3):
        for k in range(a.shape[1]):
            a[:, k] = a[:, k] / a[:, k].sum() / a.shape[1]
        for i in range(a.shape[0]):
            a[i] = a[i] / a[i].sum() / a.shape[0]
    return a * a.shape[0]


def naive_entropy(target: Tensor, logits: Tensor) -> Tensor:
    scaled = logits / 0.1
    return -(target * (scaled - scaled.exp().sum().log())).sum()


def naive_koleo(rows: list[Tensor]) -> Tensor:
    unit = [row / row.pow(2).sum().sqrt() for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for i, one in enumerate(unit):
        apart = [(one - other).pow(2).sum().sqrt() for j, other in enumerate(unit) if j != i]
        total = total - min(apart, key=lambda d: d.item()).log()
    return total / len(unit)


def naive_dinov2(method: Distillation, batch: Batch) -> dict[str, Tensor]:
    """Local and global class tokens, patches, KoLeo; the order and the factors of DINOv2's code.

    One view of one image at a time through the network, one token at a time through the heads; `method` is
    in float64.
    """
    config, student, teacher = method.config, method.student, method.teacher
    assert isinstance(teacher, Branch)
    assert config.token is not None
    assert config.patch is not None
    assert config.spread is not None
    assert batch.small.pixels is not None
    assert batch.large.hidden_contents.mask is not None
    images, views = batch.large.pixels.shape[:2]
    locals_ = batch.small.pixels.shape[1]
    crops = [(b, v) for b in range(images) for v in range(views)]
    mine, small, theirs = {}, {}, {}
    for b, v in crops:
        image = batch.large.pixels[b, v][None].double()
        mine[b, v] = student.backbone(image, Inputs(masked=batch.large.hidden_contents.mask[b, v][None]))
        with torch.no_grad():
            theirs[b, v] = teacher.backbone(image)
    for b in range(images):
        for v in range(locals_):
            small[b, v] = student.backbone(batch.small.pixels[b, v][None].double()).objects[0, 0]

    def center(term) -> Tensor | None:
        return None if term.targets.centering is None else term.targets.centering.center

    # Class tokens: the targets of all crops of the batch are made together.
    name, losses = config.token.head, {}
    logits = [naive_head(teacher, name, theirs[crop].objects[0, 0]) for crop in crops]
    rows = naive_targets(logits, config.token.target, TEMPERATURES["token"], center(method.token))
    target = dict(zip(crops, rows, strict=True))
    terms = views * locals_ + views * (views - 1)
    local = torch.zeros((), dtype=torch.float64)
    for b in range(images):
        for v in range(locals_):
            guess = naive_head(student, name, small[b, v])
            for t in range(views):
                local = local + naive_entropy(target[b, t], guess) / images
    swapped = torch.zeros((), dtype=torch.float64)
    for b, v in crops:
        guess = naive_head(student, name, mine[b, v].objects[0, 0])
        for t in range(views):
            if t != v:
                swapped = swapped + naive_entropy(target[b, t], guess) / images
    losses["token"] = config.token.weight * (local / terms + swapped / terms)
    # Patches: masked positions of all crops together, each weighing one over the masked ones of its crop.
    name = config.patch.head
    positions = [
        (crop, n) for crop in crops for n in batch.large.hidden_contents.mask[crop].nonzero()[:, 0].tolist()
    ]
    logits = [naive_head(teacher, name, theirs[crop].patches[0, n]) for crop, n in positions]
    rows = naive_targets(logits, config.patch.target, TEMPERATURES["patch"], center(method.patch))
    total = torch.zeros((), dtype=torch.float64)
    for (crop, n), row in zip(positions, rows, strict=True):
        guess = naive_head(student, name, mine[crop].patches[0, n])
        total = total + naive_entropy(row, guess) / batch.large.hidden_contents.mask[crop].sum()
    losses["patch"] = config.patch.weight * total / len(crops)
    # KoLeo: the student's class tokens after the norm, before the head, view by view.
    spread = sum(naive_koleo([mine[b, v].objects[0, 0] for b in range(images)]) for v in range(views))
    losses["spread"] = config.spread.weight * spread
    return losses


CASES = {
    "as for ImageNet-1k: centering, one shared head": dinov2("centering", SHARED),
    "as for large data: Sinkhorn, two heads": dinov2("sinkhorn", OWN),
    "centering, two heads": dinov2("centering", OWN, token=0.3, patch=2.0, spread=0.7),
    "Sinkhorn of tokens, centring of patches": dinov2("sinkhorn", OWN, "centering", patch=0.5),
    "centring of tokens, Sinkhorn of patches, one head": dinov2("centering", SHARED, "sinkhorn"),
}


def with_centers(method: Distillation) -> Distillation:
    """Centres of a run under way, and prototypes that have changed their lengths."""
    with torch.no_grad():
        for seed, term in enumerate((method.token, method.patch)):
            if term is not None and term.targets.centering is not None:
                center = term.targets.centering.center
                center.copy_(0.1 * torch.randn(len(center), generator=torch.Generator().manual_seed(seed)))
        for name, p in method.named_parameters():
            if name.endswith(".g"):
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return method


def total_gradients(losses: dict[str, Tensor], method: Distillation) -> dict[str, Tensor]:
    torch.stack(list(losses.values())).sum().backward()
    return {name: p.grad.double() for name, p in method.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model", [MODEL, LARGE], ids=["plain", "SwiGLU and registers"])
@pytest.mark.parametrize("case", CASES)
def test_the_whole_loss_and_its_gradient_are_those_of_the_loop(
    case: str, model: ViTConfig, method: MakeMethod, batch: MakeBatch, progress: Progress
):
    made = with_centers(method(model=model, **CASES[case]))
    naive = copy.deepcopy(made).double()
    drawn = batch(images=4, local_count=8)
    ours, expected = made(drawn, progress).losses, naive_dinov2(naive, drawn)
    assert ours.keys() == expected.keys() == {"token", "patch", "spread"}
    for name, loss in expected.items():
        assert ours[name].item() == pytest.approx(loss.item(), rel=2e-5, abs=2e-6), name
    found, looped = total_gradients(ours, made), total_gradients(expected, naive)
    assert found.keys() == looped.keys()
    size = torch.stack([g.norm() for g in looped.values()]).norm()
    for name, gradient in looped.items():
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * size, name
    assert all(p.grad is None for p in made.teacher.parameters())


def test_of_18_pairs_16_are_local(
    method: MakeMethod, batch: MakeBatch, views: SimpleNamespace, progress: Progress
):
    """All pairs weigh the same, so each local view adds its two pairs to the two between global views."""
    made, drawn = with_centers(method(model=MODEL, **dinov2("centering", SHARED))), batch(local_count=8)

    def token(*locals_: int) -> float:
        small = views.whole(drawn.small.pixels[:, list(locals_)]) if locals_ else None
        chosen = replace(drawn, small=small)
        return made(chosen, progress).losses["token"].item()

    swapped = 2 * token()
    local = sum(4 * token(i) - swapped for i in range(8))
    assert token(*range(8)) == pytest.approx((swapped + local) / 18, rel=1e-5)


# -- heads ---------------------------------------------------------------------------------------------------


def test_own_heads_learn_from_their_own_term_alone(method: MakeMethod, batch: MakeBatch, progress: Progress):
    made, drawn = method(model=MODEL, **dinov2("sinkhorn", OWN)), batch(images=4)
    losses = made(drawn, progress).losses
    for term, head, other in (("token", "main", "patches"), ("patch", "patches", "main")):
        made.zero_grad()
        losses[term].backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.any() for p in made.student.head(head).parameters())
        assert all(p.grad is None for p in made.student.head(other).parameters())
    made.zero_grad()
    losses["spread"].backward()  # before any head
    assert not any(p.grad is not None for p in made.student.heads.parameters())
    assert made.teacher.heads.keys() == {"main", "patches"}  # type: ignore[union-attr]
    made.after_step(progress, 1e-3)
    assert made.token is not None
    assert made.token.targets.centering is None  # Sinkhorn keeps no state


def test_own_heads_have_centres_of_their_own(method: MakeMethod, batch: MakeBatch, progress: Progress):
    made = method(model=MODEL, **dinov2("centering", OWN))
    made(batch(images=4), progress)
    made.after_step(progress, 1e-3)
    centers = [term.targets.centering.center for term in (made.token, made.patch)]
    assert [len(c) for c in centers] == [7, 9]
    assert all(c.any() for c in centers)


# -- the teacher sees whole images -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["centering", "sinkhorn"])
def test_the_teachers_input_is_never_masked(
    kind: str, method: MakeMethod, batch: MakeBatch, progress: Progress, monkeypatch: pytest.MonkeyPatch
):
    made, drawn = method(model=MODEL, **dinov2(kind, OWN)), batch(images=4)
    seen: dict[str, list] = {"teacher": [], "student": []}
    for name in seen:
        backbone = getattr(made, name).backbone
        embed = backbone.embed

        def record(images, inputs, name=name, embed=embed):
            seen[name].append((tuple(images.shape), inputs.masked))
            return embed(images, inputs)

        monkeypatch.setattr(backbone, "embed", record)
    made.eval()
    first = made._teach(drawn)
    made.train()
    output = made(drawn, progress)
    assert seen["teacher"] == [((8, 3, 16, 16), None)] * 2
    assert [shape for shape, _ in seen["student"]] == [(8, 3, 16, 16), (12, 3, 8, 8)]
    assert torch.equal(seen["student"][0][1], drawn.large.hidden_contents.mask.flatten(0, 1))
    assert seen["student"][1][1] is None  # nor are local views
    # A token that would spoil whatever reads it.
    with torch.no_grad():
        made.teacher.backbone.mask_token.fill_(torch.nan)
    again = made(drawn, progress)
    for name, loss in output.losses.items():
        assert torch.equal(again.losses[name], loss)
    for name, value in output.logs.items():
        assert float(again.logs[name]) == float(value), name
    # Masks choose which patches are targets, not what they are.
    whole = made.teacher.backbone(drawn.large.pixels.flatten(0, 1))
    assert torch.equal(first.large.objects, whole.objects)
    assert torch.equal(first.large.patches, whole.patches)
    with torch.no_grad():
        made.student.backbone.mask_token.fill_(torch.nan)
    assert made(drawn, progress).losses["patch"].isnan()


# -- KoLeo ---------------------------------------------------------------------------------------------------


def koleo(objects: Tensor) -> Tensor:
    """The weighted KoLeo term of tokens [B, V, M, D] of large views."""
    count, views = objects.shape[:2]
    none = objects.new_zeros(count * views, 0, objects.shape[-1])
    student = Tokens(Features(objects.flatten(0, 1), none, none, (0, 0)))
    boxes, flips = torch.zeros(count, views, 4), torch.zeros(count, views, dtype=torch.bool)
    large = Views(torch.zeros(count, views, 3, 16, 16), boxes, flips, boxes)
    batch = Batch(large, None, torch.zeros(count).long(), torch.arange(count), {})
    progress = Progress(0, total_steps=10, steps_per_epoch=10, batch_size=count)
    term = SpreadTerm(SpreadTermConfig(weight=0.1), Setting("spread", {}, ViewsConfig(), MODEL))
    return term(Seen(batch, student, student, {}, progress, VisionTransformer(MODEL))).losses["loss"]


def test_koleo_of_a_view_knows_no_other_view():
    generator = torch.Generator().manual_seed(0)
    objects = torch.randn(6, 2, 1, 5, generator=generator).requires_grad_()
    loss = koleo(objects)
    rows = objects.detach().double()[:, :, 0]
    expected = 0.1 * sum(naive_koleo(list(rows[:, v])) for v in range(2))
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    (before,) = torch.autograd.grad(loss, objects)
    # The second view of an image becomes equal to its first: the nearest of all, were views mixed.
    changed = torch.cat((objects[:, :1], objects[:, :1]), dim=1).detach().requires_grad_()
    other = koleo(changed)
    assert other.item() == pytest.approx(0.2 * float(naive_koleo(list(rows[:, 0]))), rel=1e-5)
    (after,) = torch.autograd.grad(other, changed)
    assert torch.equal(before[:, 0], after[:, 0])


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_one_image_or_equal_images_do_no_harm(
    precision: torch.dtype | None, method: MakeMethod, batch: MakeBatch, progress: Progress
):
    made = method(model=MODEL, **dinov2("sinkhorn", OWN))
    one = batch(images=1)
    one = replace(
        one, large=replace(one.large, hidden_contents=Hidden(torch.ones(1, 2, 16).bool(), torch.arange(32)))
    )
    four = batch(images=4)
    mask = four.large.hidden_contents.mask[1:2].expand(4, -1, -1)
    large = replace(
        four.large,
        pixels=four.large.pixels[:1].expand(4, -1, -1, -1, -1),
        hidden_contents=Hidden.of(mask, mask.device),
    )
    same = replace(four, large=large)
    for drawn, zero in ((one, True), (same, False)):
        made.zero_grad()
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            losses = made(drawn, progress).losses
        assert (losses["spread"].item() == 0) == zero
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad.isfinite().all() for p in made.student.parameters() if p.grad is not None)


RANKS = """
import importlib.util

import torch
from foveola import distributed
from foveola.schedules import Progress


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shared, mine = load("shared", "FOLDER/conftest.py"), load("mine", "FOLDER/test_dinov2.py")
distributed.start("cpu")
rank = distributed.rank()
for kind in ("centering", "sinkhorn"):
    for split in (3, 5):
        method = shared.make_method(model=mine.MODEL, **mine.dinov2(kind, mine.OWN))
        mine_of_them = slice(0, split) if rank == 0 else slice(split, 6)
        batch = shared.part_of(shared.make_batch(images=6), mine_of_them)
        losses = method(batch, Progress(0, 100, 10, 6)).losses
        torch.stack(list(losses.values())).sum().backward()
        mean = {n: distributed.all_reduce_mean(p.grad) for n, p in method.student.named_parameters()}
        torch.save(({n: l.item() for n, l in losses.items()}, mean), f"OUT/{kind}-{split}-{rank}.pt")
distributed.stop()
"""


def test_of_two_processes_targets_are_shared_and_neighbours_are_not(
    run_ranks: Callable[..., list[str]],
    tmp_path: Path,
    method: MakeMethod,
    batch: MakeBatch,
    views: SimpleNamespace,
    progress: Progress,
):
    """Sinkhorn takes the tokens of all processes; KoLeo looks for neighbours among a process's own."""
    folder = str(Path(__file__).parent)
    run_ranks(RANKS.replace("FOLDER", folder).replace("OUT", str(tmp_path)))
    drawn = batch(images=6)
    for kind in ("centering", "sinkhorn"):
        made = method(model=MODEL, **dinov2(kind, OWN))
        whole = made(drawn, progress).losses
        for split in (3, 5):
            results = [torch.load(tmp_path / f"{kind}-{split}-{rank}.pt") for rank in (0, 1)]
            bounds = slice(0, split), slice(split, 6)
            halves = [made(views.part(drawn, b), progress).losses["spread"] for b in bounds]
            for (found, _), half in zip(results, halves, strict=True):
                assert found["spread"] == pytest.approx(half.item(), rel=1e-4)
            if split == 5:  # one process has a single image: no neighbour, no push
                assert results[1][0]["spread"] == 0
                shares = (5 / 6, 1 / 6)
                for name in ("token", "patch"):  # means over images, so they add up to the whole
                    total = sum(s * r[0][name] for s, r in zip(shares, results, strict=True))
                    assert total == pytest.approx(whole[name].item(), rel=1e-4), (kind, name)
                continue
            # What the gradients' mean over processes is the gradient of.
            made.zero_grad()
            joint = made(drawn, progress).losses
            (joint["token"] + joint["patch"] + (halves[0] + halves[1]) / 2).backward()
            for name, p in made.student.named_parameters():
                assert p.grad is not None
                for _, mean in results:
                    assert (mean[name] - p.grad).norm() < 1e-3 * p.grad.norm() + 1e-5, name


# -- it trains -----------------------------------------------------------------------------------------------


SMALL = {  # 16 prototypes for 64 tokens, and images that are hardly changed: it learns within some steps
    "duration": "60 steps",
    "batch_size": 8,
    "device": "cpu",
    "log_every": 1,
    "model.width": 48,
    "model.depth": 2,
    "model.image_size": 32,
    "model.registers": 4,
    "model.mlp": "swiglu",
    "model.layer_scale": 1e-5,
    "model.drop_path": 0.1,
    "model.drop_path_rule": "constant",
    "model.drop_path_subset": True,
    "views.global_size": 32,
    "views.global_scale": [0.6, 1.0],
    "views.local_size": 16,
    "views.local_count": 2,
    "views.color.jitter": 0.0,
    "views.color.grayscale": 0.0,
    "views.color.blur": [0.0, 0.0, 0.0],
    "views.color.solarize": [0.0, 0.0, 0.0],
    "method.heads.main": {"prototypes": 16, "hidden": 32, "bottleneck": 16},
    "method.heads.patches": {"prototypes": 16, "hidden": 32, "bottleneck": 16},
    "loader.workers": 0,
    "checkpoint_every": "1000 steps",
}


def train(out: Path, data: str, precision: str) -> list[dict[str, float]]:
    foveola.pretrain("dinov2-tiny-tinyimagenet", data=data, out=str(out), precision=precision, **SMALL)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [step for step in steps if "loss" in step]


def check_healthy(steps: list[dict[str, float]]) -> None:
    assert len(steps) == 60
    highest = math.log(16)
    for step in steps:
        for name in ("loss", "loss/token", "loss/patch", "loss/spread", "grad_norm"):
            assert math.isfinite(step[name]), (step["step"], name)
        for term in ("token", "patch"):
            assert 0 < step[f"{term}/target_entropy"] <= highest + 1e-4
    # LayerScale starts with class tokens that are all alike: uniform targets, which it has to leave.
    assert steps[0]["token/target_entropy"] == pytest.approx(highest, abs=1e-3)
    last = {name: sum(step[name] for step in steps[-10:]) / 10 for name in steps[-1] if name != "event"}
    assert 0.2 * highest < last["token/target_entropy"] < 0.99 * highest
    assert 0.2 * highest < last["patch/target_entropy"] < 0.97 * highest
    assert last["loss/token"] < 0.995 * highest
    assert last["feature_spread"] > 0.5
    assert last["token/prototypes_used"] > 0.5


def test_sixty_steps_in_half_precision(tmp_path: Path):
    scenes = open_source("scenes:?size=32&count=64")
    (tmp_path / "data").mkdir()
    for i in range(64):  # painted once: painting takes longer than learning
        Image.fromarray(scenes[i].image).save(tmp_path / "data" / f"{i}.png")
    check_healthy(train(tmp_path / "run", f"folder:{tmp_path / 'data'}", "bf16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sixty_steps_on_real_images(precision: str, data_folder: Path, tmp_path: Path):
    with zipfile.ZipFile(data_folder / "tiny-imagenet-100-val.zip") as archive:
        archive.extractall(tmp_path / "data")
    images = next((tmp_path / "data").rglob("images"))
    check_healthy(train(tmp_path / "run", f"folder:{images}", precision))
