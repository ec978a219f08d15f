"""Terms on tokens given by hand: which tokens they read, which pairs they form, what their targets follow."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from foveola.data.sample import Chosen
from foveola.logged import Averages
from foveola.losses import entropy, koleo_loss, sinkhorn
from foveola.methods import targets as module
from foveola.methods.targets import SAMPLE, TargetConfig, Targets
from foveola.methods.terms.patch import PatchTerm, PatchTermConfig
from foveola.methods.terms.spread import SpreadTerm, SpreadTermConfig
from foveola.methods.terms.term import Heads, Seen, Setting, Tokens
from foveola.methods.terms.token import TokenTerm, TokenTermConfig
from foveola.models.heads import HeadConfig, ProjectionHead
from foveola.models.vit import Features, VisionTransformer, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, Hidden, Views, ViewsConfig
from foveola.views.objects import ObjectsConfig

WIDTH, PROTOTYPES = 6, 5
CONSTANT = TargetConfig(temperature=Schedule(value=0.05))


def head(seed: int = 0) -> ProjectionHead:
    torch.manual_seed(seed)
    made = ProjectionHead(WIDTH, HeadConfig(prototypes=PROTOTYPES, hidden=8, bottleneck=4))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    return made


@dataclass(frozen=True)
class Given:
    """Tokens of four images: of two large views each, and perhaps of small ones."""

    objects: Tensor  # [4, 2, M, D]
    local_objects: Tensor | None  # [4, L, M2, D]
    patches: Tensor  # [4, 2, 5, D]

    def tokens(self) -> Tokens:
        large = features(self.objects, self.patches)
        if self.local_objects is None:
            return Tokens(large)
        return Tokens(
            large, features(self.local_objects, torch.zeros(*self.local_objects.shape[:2], 5, WIDTH))
        )


def features(objects: Tensor, patches: Tensor) -> Features:
    none = torch.zeros(len(objects) * objects.shape[1], 0, WIDTH)
    return Features(objects.flatten(0, 1), none, patches.flatten(0, 1), (1, 5))


def tokens(objects: int = 1, views: int = 2, local: tuple[int, int] | None = (3, 1), seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)
    return Given(
        objects=torch.randn(4, views, objects, WIDTH, generator=generator),
        local_objects=None if local is None else torch.randn(4, *local, WIDTH, generator=generator),
        patches=torch.randn(4, views, 5, WIDTH, generator=generator),
    )


NETWORK = ViTConfig(width=WIDTH, depth=1, heads=1, patch_size=4, image_size=4)


def seen(
    student: Given, teacher: Given, mask: Tensor | None = None, theirs: ProjectionHead | None = None
) -> Seen:
    """A step of these tokens, with the heads of seeds 1 and 2."""

    def views(count: int, hidden: Hidden | None = None) -> Views:
        boxes, flips = torch.zeros(4, count, 4), torch.zeros(4, count, dtype=torch.bool)
        return Views(torch.zeros(4, count, 3, 4, 4), boxes, flips, boxes, hidden_contents=hidden)

    hidden = None if mask is None else Hidden.of(mask, mask.device)
    large = views(student.objects.shape[1], hidden)
    small = None if student.local_objects is None else views(student.local_objects.shape[1])
    batch = Batch(large, small, torch.zeros(4).long(), torch.arange(4), {})
    heads = {"main": Heads(head(1), theirs or head(2))}
    return Seen(batch, student.tokens(), teacher.tokens(), heads, at(), VisionTransformer(NETWORK))


def setting(image_token: bool = False) -> Setting:
    views = ViewsConfig(objects=ObjectsConfig(image_token=True) if image_token else None)
    heads = {"main": HeadConfig(prototypes=PROTOTYPES, hidden=8, bottleneck=4)}
    return Setting("some", heads, views, NETWORK)


def at(step: int = 0) -> Progress:
    return Progress(step, total_steps=1000, steps_per_epoch=10, batch_size=4)


def token_loss(
    student: Given, teacher: Given, image_token: bool = False, config: TokenTermConfig | None = None
) -> Tensor:
    term = TokenTerm(config or TokenTermConfig(target=CONSTANT), setting(image_token))
    return term(seen(student, teacher)).losses["loss"]


def part(given: Given, objects: slice, local: slice | None = None) -> Given:
    own = (
        given.local_objects
        if local is None or given.local_objects is None
        else given.local_objects[:, :, local]
    )
    return Given(given.objects[:, :, objects], own, given.patches)


def targets_of(
    targets: Targets, logits: Tensor, progress: Progress, everyone: Tensor | None = None
) -> tuple[Tensor, dict[str, Averages]]:
    """All targets of these logits, and what is logged."""
    lazy = targets(logits, (torch.eye(PROTOTYPES), torch.ones(PROTOTYPES, 1)), progress, everyone)
    made = lazy[:]
    return made, lazy.logs()


def test_objects_form_their_own_pairs():
    """The loss of several objects is the mean of the losses of each; locals read as a whole pair with all."""
    student, teacher = tokens(3), tokens(3, seed=1)
    each = [token_loss(part(student, slice(m, m + 1)), part(teacher, slice(m, m + 1))) for m in range(3)]
    assert token_loss(student, teacher).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    # With masks on local views each object has its own there, too.
    student = tokens(3, local=(2, 3))
    each = [
        token_loss(part(student, slice(m, m + 1), slice(m, m + 1)), part(teacher, slice(m, m + 1)))
        for m in range(3)
    ]
    assert token_loss(student, teacher).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_objects_count_by_area_or_score_within_each_image():
    """Each image counts alike; within it, drawing one object by area and averaging gives the same."""
    student, teacher = tokens(3), tokens(3, seed=1)
    which = torch.tensor([[0, 1, 2], [1, 0, 1], [0, 0, 0], [2, 0, 1]])
    areas = torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.3, 0.1], [1.0, 1.0, 1.0], [0.2, 0.2, 0.4]])
    scores = torch.tensor([[0.9, 0.1, -2.0], [0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.5, 0.25, 0.25]])
    chosen = Chosen(which, areas, scores)

    def single(b: int, m: int) -> float:
        mine, theirs = part(student, slice(m, m + 1)), part(teacher, slice(m, m + 1))
        rows = [
            Given(*(x[b : b + 1].expand(4, *x.shape[1:]) for x in vars(g).values())) for g in (mine, theirs)
        ]
        return token_loss(*rows).item()

    for by, values in (("area", areas), ("score", scores)):
        total = 0.0
        for b in range(4):
            seen_once = {int(which[b, m]): m for m in range(3)}
            worth = {m: max(values[b, m].item(), 0.0) for m in seen_once.values()}
            if not sum(worth.values()):
                worth = dict.fromkeys(worth, 1.0)
            for m in range(3):
                first = seen_once[int(which[b, m])]
                times = which[b].tolist().count(int(which[b, m]))
                total += worth[first] / sum(worth.values()) / times * single(b, m) / 4
        config = TokenTermConfig(target=CONSTANT, weight_by=by)
        step = seen(student, teacher)
        step = dataclasses.replace(step, batch=dataclasses.replace(step.batch, chosen=chosen))
        loss = TokenTerm(config, setting())(step).losses["loss"]
        assert loss.item() == pytest.approx(total, rel=1e-5)


def test_objects_and_image_token_are_told_apart():
    student, teacher = tokens(3), tokens(3, seed=1)
    objects = token_loss(student, teacher, image_token=True)
    assert torch.equal(objects, token_loss(part(student, slice(0, 2)), part(teacher, slice(0, 2))))
    config = TokenTermConfig(token="image", target=CONSTANT)
    image = token_loss(student, teacher, image_token=True, config=config)
    assert torch.equal(image, token_loss(part(student, slice(2, 3)), part(teacher, slice(2, 3))))
    # Locals with masks carry their own image token, last.
    student = tokens(3, local=(2, 3))
    objects = token_loss(student, teacher, image_token=True)
    expected = token_loss(part(student, slice(0, 2), slice(0, 2)), part(teacher, slice(0, 2)))
    assert torch.equal(objects, expected)
    image = token_loss(student, teacher, image_token=True, config=config)
    assert torch.equal(image, token_loss(part(student, slice(2, 3), slice(2, 3)), part(teacher, slice(2, 3))))


def test_weights_scale_their_terms():
    student, teacher = tokens(), tokens(seed=1)
    one = token_loss(student, teacher)
    half = token_loss(student, teacher, config=TokenTermConfig(weight=0.5, target=CONSTANT))
    assert half.item() == pytest.approx(one.item() / 2)
    whole, quarter = (
        SpreadTerm(SpreadTermConfig(weight=weight), setting())(seen(student, teacher)).losses["loss"].item()
        for weight in (1.0, 0.25)
    )
    assert quarter == pytest.approx(whole / 4)


def test_the_temperature_of_students_and_teachers():
    student, teacher = tokens(), tokens(seed=1)
    config = TargetConfig(temperature=Schedule(value=0.2), student_temperature=0.5)
    loss = token_loss(student, teacher, config=TokenTermConfig(target=config))
    with torch.no_grad():
        targets = (head(2)(teacher.objects.flatten(0, 2)).double() / 0.2).softmax(-1).view(4, 2, -1)
        mine = torch.cat((student.objects, student.local_objects), dim=1)[:, :, 0]
        logs = (head(1)(mine.flatten(0, 1)).double() / 0.5).log_softmax(-1).view(4, 5, -1)
    pairs = [-(targets[:, t] * logs[:, s]).sum(-1).mean() for t in range(2) for s in range(5) if s != t]
    assert len(pairs) == 8
    assert loss.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)


def test_targets_follow_the_temperature_schedule_by_epoch():
    targets = Targets(TargetConfig(), PROTOTYPES)
    logits = torch.randn(3, PROTOTYPES)
    for step, temperature in ((0, 0.04), (9, 0.04), (10, 0.04 + 0.03 / 29), (290, 0.07), (900, 0.07)):
        made, _ = targets_of(targets, logits, at(step))
        assert (made - (logits / temperature).softmax(-1)).abs().max() < 1e-5


def test_targets_learn_the_mean_they_are_given():
    given, own = Targets(CONSTANT, PROTOTYPES), Targets(CONSTANT, PROTOTYPES)
    logits, others = torch.randn(8, PROTOTYPES), torch.randn(3, PROTOTYPES)
    targets_of(given, logits, at(), others)
    targets_of(own, logits, at())
    for targets, expected in ((given, others.mean(dim=0)), (own, logits.mean(dim=0))):
        targets.step()
        assert targets.centering is not None
        assert torch.allclose(targets.centering.center, 0.1 * expected, atol=1e-6)


def test_targets_of_no_rows_log_nothing_and_move_nothing():
    for kind in ("centering", "sinkhorn"):
        targets = Targets(TargetConfig(kind=kind), PROTOTYPES)
        made, logs = targets_of(targets, torch.zeros(0, PROTOTYPES), at())
        assert made.shape == (0, PROTOTYPES)
        assert not any(each.rows for each in logs.values())
        targets.step()
        assert targets.prototypes_used() == 0
    # Unless the centre learns from other patches.
    targets = Targets(CONSTANT, PROTOTYPES)
    targets_of(targets, torch.zeros(0, PROTOTYPES), at(), torch.ones(10, PROTOTYPES))
    targets.step()
    assert targets.centering is not None
    assert torch.allclose(targets.centering.center, torch.full((PROTOTYPES,), 0.1))


def test_prototypes_used_are_counted_over_an_epoch():
    targets = Targets(CONSTANT, PROTOTYPES)
    for step, favourite in ((0, 1), (5, 3), (9, 1)):
        targets_of(targets, torch.eye(PROTOTYPES)[[favourite]], at(step))
    assert targets.prototypes_used() == pytest.approx(2 / PROTOTYPES)
    targets_of(targets, torch.eye(PROTOTYPES)[[4]], at(10))
    assert targets.prototypes_used() == pytest.approx(1 / PROTOTYPES)


def test_collapse_shows_in_the_logs():
    targets = Targets(TargetConfig(kind="centering", temperature=Schedule(value=0.05)), PROTOTYPES)
    _, uniform = targets_of(targets, torch.zeros(6, PROTOTYPES), at())
    assert float(uniform["target_entropy"]) == pytest.approx(math.log(PROTOTYPES))
    assert float(uniform["kl_to_uniform"]) == pytest.approx(0, abs=1e-6)
    _, one_hot = targets_of(targets, 10 * torch.eye(PROTOTYPES)[[2]].expand(6, -1), at())
    assert float(one_hot["target_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(one_hot["kl_to_uniform"]) == pytest.approx(math.log(PROTOTYPES))
    _, spread = targets_of(targets, 10 * torch.eye(PROTOTYPES), at())
    assert float(spread["target_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(spread["kl_to_uniform"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["centering", "sinkhorn"])
def test_targets_made_in_parts_are_those_of_the_whole(
    kind: Literal["centering", "sinkhorn"], monkeypatch: pytest.MonkeyPatch
):
    """And what is logged of them, which of 1,000 rows is of every eighth."""
    monkeypatch.setattr(module, "rows_in_cache", lambda device, prototypes: 3)
    config = TargetConfig(kind=kind, temperature=Schedule(value=0.07))
    teacher, features = head(2).last_layer, torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    made = []
    for parts in ([slice(0, 1000)], [slice(0, 4), slice(4, 5), slice(5, 900), slice(900, 1000)]):
        targets = Targets(config, PROTOTYPES)
        if targets.centering is not None:
            targets.centering.center.copy_(torch.arange(PROTOTYPES) / 10)
        lazy = targets(features, (teacher.v, teacher.g), at())
        assert len(lazy) == 1000
        rows = torch.cat([lazy[part].clone() for part in parts])
        made.append((rows, lazy.logs(), targets.used.clone()))
    (whole, logs, used), (parted, logged, noted) = made
    assert float(logs["target_entropy"]) == pytest.approx(entropy(whole[::8]).mean().item(), rel=1e-5)
    assert (whole - parted).abs().max() < 1e-6
    assert {name: float(x) for name, x in logs.items()} == pytest.approx(
        {name: float(x) for name, x in logged.items()}, abs=1e-6
    )
    uniform = math.log(PROTOTYPES) - entropy(whole.double().mean(dim=0)).item()
    assert float(logs["kl_to_uniform"]) == pytest.approx(uniform, rel=1e-4)
    assert used.tolist() == noted.tolist() == [k in whole.argmax(dim=1) for k in range(PROTOTYPES)]
    with torch.no_grad():
        logits = teacher(features).double()
    if kind == "centering":
        expected = ((logits - torch.arange(PROTOTYPES) / 10) / 0.07).softmax(dim=1)
    else:
        expected = sinkhorn(logits, 0.07).double()
    assert (whole - expected).abs().max() < 1e-5


RANKS = """
import torch
from foveola import distributed
from foveola.losses import masked_patch_loss
from foveola.methods.targets import TargetConfig, Targets
from foveola.schedules import Progress

distributed.start("cpu")
generator = torch.Generator().manual_seed(0)
features, mine, v = (torch.randn(n, 4, generator=generator) for n in (9, 9, 5))
rows = slice(0, 9 if distributed.rank() == 0 else 0)
v.requires_grad_()
prototypes = v, torch.ones(5, 1)
for kind in ("sinkhorn", "centering"):
    targets = Targets(TargetConfig(kind=kind), 5)
    lazy = targets(features[rows], (v.detach(), prototypes[1]), Progress(0, 10, 10, 4))
    loss = masked_patch_loss(lazy, mine[rows], torch.ones(9)[rows] / 9, 0.1, prototypes)
    targets.step()
    gradient = torch.autograd.grad(loss, v)[0]
    counts = {name: each.rows for name, each in lazy.logs().items()}
    found = loss.item(), gradient, counts, targets.state_dict()
    torch.save(found, f"OUT/{distributed.rank()}-{kind}.pt")
distributed.stop()
"""


def test_a_process_without_masked_patches_takes_part(run_ranks: Callable[..., list[str]], tmp_path: Path):
    """It waits for nobody and nobody for it; its gradient is zero, and its centre follows the others'."""
    run_ranks(RANKS.replace("OUT", str(tmp_path)))
    for kind in ("sinkhorn", "centering"):
        (loss, gradient, logs, state), (none, zero, nothing, followed) = (
            torch.load(tmp_path / f"{rank}-{kind}.pt") for rank in (0, 1)
        )
        assert loss > 0
        assert gradient.abs().max() > 0
        assert logs == {"target_entropy": 9, "kl_to_uniform": 9}
        assert none == 0
        assert (zero == 0).all()
        assert nothing == dict.fromkeys(logs, 0)
        if kind == "centering":
            assert torch.equal(followed["centering.center"], state["centering.center"])
            assert state["centering.center"].abs().max() > 0


@pytest.mark.parametrize("count", [7, SAMPLE, SAMPLE + 1, 1000])
def test_the_entropy_logged_is_of_rows_evenly_spread(count: int):
    """All of them while they are few; the targets themselves are of every row in any case."""
    logits = torch.randn(count, PROTOTYPES, generator=torch.Generator().manual_seed(count))
    targets, logs = targets_of(Targets(CONSTANT, PROTOTYPES), logits, at())
    assert len(targets) == count
    entropies = -torch.xlogy(targets.double(), targets.double()).sum(dim=1)
    stride = next(s for s in range(1, count + 1) if len(range(0, count, s)) <= SAMPLE)
    assert float(logs["target_entropy"]) == pytest.approx(entropies[::stride].mean().item(), rel=1e-5)
    assert stride == 1 or abs(float(logs["target_entropy"]) - entropies.mean().item()) > 1e-6
    mean = targets.double().mean(dim=0)
    uniform = math.log(PROTOTYPES) + torch.xlogy(mean, mean).sum().item()
    assert float(logs["kl_to_uniform"]) == pytest.approx(uniform, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("center", ["masked", "all"])
def test_masked_patches_are_predicted_in_their_place(center: str):
    """The mean over views of the mean over their masked patches; views without any count as zero."""
    student, teacher = tokens(), tokens(seed=1)
    mask = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[0, 0] = False
    term = PatchTerm(PatchTermConfig(weight=2.0, center=center, target=CONSTANT), setting())
    output = term(seen(student, teacher, mask))
    loss, rows = 0.0, []
    with torch.no_grad():
        for b in range(4):
            for v in range(2):
                rows += [
                    head(2)(teacher.patches[b, v, n][None])
                    for n in range(5)
                    if center == "all" or mask[b, v, n]
                ]
                for n in mask[b, v].nonzero()[:, 0].tolist():
                    target = (head(2)(teacher.patches[b, v, n][None]).double() / 0.05).softmax(-1)
                    guess = (head(1)(student.patches[b, v, n][None]).double() / 0.1).log_softmax(-1)
                    loss -= (target * guess).sum().item() / int(mask[b, v].sum()) / 8
    assert output.losses["loss"].item() == pytest.approx(2 * loss, rel=1e-5)
    term.step()
    assert term.targets.centering is not None
    assert torch.allclose(term.targets.centering.center, 0.1 * torch.cat(rows).mean(dim=0), atol=1e-6)


def test_nothing_flows_into_the_teacher():
    student, teacher = tokens(), tokens(seed=1)
    teacher.objects.requires_grad_()
    theirs = head(2)
    term = TokenTerm(TokenTermConfig(target=CONSTANT), setting())
    student.objects.requires_grad_()
    term(seen(student, teacher, theirs=theirs)).losses["loss"].backward()
    assert student.objects.grad is not None
    assert teacher.objects.grad is None
    assert all(parameter.grad is None for parameter in theirs.parameters())


def test_spread_is_koleo_of_each_global_view_without_the_image_token():
    student = tokens(objects=3)
    for image_token, count in ((False, 3), (True, 2)):
        rows = [student.objects[:, v, :count].reshape(-1, WIDTH) for v in range(2)]
        expected = 0.1 * sum(koleo_loss(r).item() for r in rows)
        term = SpreadTerm(SpreadTermConfig(), setting(image_token))
        loss = term(seen(student, student)).losses["loss"]
        assert loss.item() == pytest.approx(expected, rel=1e-5)
