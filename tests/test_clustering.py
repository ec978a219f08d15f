"""Sinkhorn by position, and the clustering of patches, against loops in float64 and against autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from foveola.clustering import cluster, position_information
from foveola.losses import assignment_loss, entropy, sinkhorn

POSITIONS, IMAGES, WIDTH, CLUSTERS = 6, 10, 8, 5
TEMPERATURES = {"temperature": 0.06, "student_temperature": 0.12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    a = torch.exp(logits.double() / temperature)
    for _ in range(iterations):
        a = a / a.sum(dim=0, keepdim=True)
        a = a / a.sum(dim=1, keepdim=True)
    return a


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    patches = normalize(normal(POSITIONS, IMAGES, WIDTH, seed=seed), dim=-1)
    weight, bias = normal(CLUSTERS, WIDTH, seed=seed + 1), 0.1 * normal(CLUSTERS, seed=seed + 2)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.stack([torch.randperm(POSITIONS, generator=generator)[:2] for _ in range(IMAGES)], dim=1)
    return patches, weight, bias, wanted


def naive(patches: Tensor, weight: Tensor, bias: Tensor, by_position: bool) -> tuple[Tensor, Tensor]:
    """Assignments [N, B, K] and the loss, both in float64; the loss with gradient."""
    logits = linear(patches.double(), weight.double(), bias.double())
    if by_position:
        assigned = torch.stack([naive_sinkhorn(part.detach(), 0.06) for part in logits])
    else:
        assigned = naive_sinkhorn(logits.detach().flatten(0, 1), 0.06).view_as(logits)
    loss = -(assigned * (logits / 0.12).log_softmax(dim=-1)).sum(dim=-1).mean()
    return assigned, loss


def test_positions_are_problems_of_their_own():
    logits = normal(3, 7, 4)
    together = sinkhorn(logits, 0.2)
    for part, alone in zip(together, logits, strict=True):
        assert (part - naive_sinkhorn(alone, 0.2)).abs().max() < 1e-5
    assert (sinkhorn(logits[None], 0.2)[0] - together).abs().max() < 1e-6


def log_sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """In the log domain and float64: right for any range."""
    log = logits.double()
    for _ in range(iterations):
        log = log - log.logsumexp(dim=-2, keepdim=True)
        log = log - log.logsumexp(dim=-1, keepdim=True)
    return log.exp()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
def test_any_range_is_exact_in_float32(scale):
    """Logits over temperature of up to 4,000, where exp() of float32 ends at 88."""
    logits = scale * normal(4, 256, 16, seed=1)
    targets = sinkhorn(logits, 1.0)
    assert targets.isfinite().all()
    assert (targets - log_sinkhorn(logits)).abs().max() < (1e-4 if scale < 100 else 2e-3)
    assert (targets.sum(dim=-1) - 1).abs().max() < 1e-5


def test_columns_after_the_published_iterations():
    """Equal within 1 % for logits as at initialisation, within a factor for sharp ones."""
    for deviation, low, high in ((1.6, 0.98, 1.02), (5.0, 0.4, 2.5)):
        share = sinkhorn(deviation * normal(512, 64, seed=1), 1.0).sum(dim=0) * 64 / 512
        assert share.min() > low
        assert share.max() < high


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("chunk", [1, 2 * IMAGES * CLUSTERS, 2**20])
def test_clusters_are_the_loop(by_position, chunk):
    patches, weight, bias, wanted = problem()
    weight.requires_grad_()
    bias.requires_grad_()
    assigned, expected = naive(patches, weight, bias, by_position)
    slopes = torch.autograd.grad(3 * expected, (weight, bias))
    found = cluster(patches, weight, bias, wanted, **TEMPERATURES, by_position=by_position, chunk=chunk)
    (3 * found.loss).backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (weight.grad - slopes[0]).abs().max() < 1e-4
    assert (bias.grad - slopes[1]).abs().max() < 1e-4
    for slot in range(len(wanted)):
        for image in range(IMAGES):
            row = assigned[wanted[slot, image], image]
            assert (found.targets[slot, image] - row).abs().max() < 1e-4
    assert (found.usage - assigned.mean(dim=1)).abs().max() < 1e-4
    firsts = set(assigned.argmax(dim=-1).flatten().tolist())
    assert set(found.first.nonzero()[:, 0].tolist()) == firsts
    assert not any(t.requires_grad for t in (found.targets, found.usage))


def test_gradient_goes_to_centroids_only():
    patches, weight, bias, wanted = problem()
    patches.requires_grad_()
    weight.requires_grad_()
    found = cluster(patches, weight, bias, wanted, **TEMPERATURES)
    found.loss.backward()
    assert patches.grad is None
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        quiet = cluster(patches, weight, bias, wanted, **TEMPERATURES)
    assert quiet.loss.item() == found.loss.item()
    assert not quiet.loss.requires_grad


def test_the_loss_sharpens_the_clusters():
    """Descending it lowers the entropy of softmax(l / 0.12): patches and centroids come closer."""
    patches, weight, bias, wanted = problem()
    weight, bias = (0.1 * weight).requires_grad_(), bias.requires_grad_()
    before = None
    for _ in range(60):
        found = cluster(patches, weight, bias, wanted, **TEMPERATURES)
        before = before or found.loss.item()
        slopes = torch.autograd.grad(found.loss, (weight, bias))
        with torch.no_grad():
            for parameter, slope in zip((weight, bias), slopes, strict=True):
                parameter -= 0.1 * slope
    assert found.loss.item() < before - 0.1


def test_the_past_takes_part_in_balancing_only():
    patches, weight, bias, wanted = problem()
    past = normalize(normal(POSITIONS, 30, WIDTH, seed=9), dim=-1)
    found = cluster(patches, weight, bias, wanted, **TEMPERATURES, past=past, chunk=1)
    logits = linear(torch.cat((patches, past), dim=1).double(), weight.double(), bias.double())
    assigned = torch.stack([naive_sinkhorn(part, 0.06) for part in logits])[:, :IMAGES]
    assert (found.usage - assigned.mean(dim=1)).abs().max() < 1e-4
    mine = linear(patches.double(), weight.double(), bias.double()) / 0.12
    expected = -(assigned * mine.log_softmax(dim=-1)).sum(dim=-1).mean()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_few_images_stay_flat_and_a_past_sharpens_them():
    """B images cannot share K clusters with less than ln(K / B) nats."""
    weight = 3 * normal(64, WIDTH)
    patches = normalize(normal(4, 8, WIDTH), dim=-1)
    wanted = torch.zeros(1, 8, dtype=torch.int64)
    past = normalize(normal(4, 248, WIDTH, seed=5), dim=-1)
    flat = cluster(patches, weight, None, wanted, **TEMPERATURES, iterations=50)
    sharp = cluster(patches, weight, None, wanted, **TEMPERATURES, iterations=50, past=past)
    assert entropy(flat.targets).min() > math.log(64 / 8) - 0.02
    assert entropy(sharp.targets).mean() < 0.5 * entropy(flat.targets).mean()


def test_assignment_loss_is_the_loop():
    targets, predictions = normal(7, 5).softmax(dim=1), normal(7, 5, seed=1)
    rows = [
        -(t * (p / 0.12).log_softmax(dim=0)).sum()
        for t, p in zip(targets.double(), predictions.double(), strict=True)
    ]
    assert assignment_loss(targets, predictions, 0.12).item() == pytest.approx(sum(rows).item() / 7, rel=1e-5)


# positional collapse


def one_hot(labels: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(labels, count).float()


def test_position_information_of_known_cases():
    """None: 0. Each position its own cluster: ln N. Two halves with clusters of their own: ln 2."""
    tiny = 1e-6
    uniform = torch.full((8, 16), 1 / 16)
    assert position_information(uniform, uniform).abs() < 1e-6
    own = one_hot(torch.arange(8), 8)
    assert position_information(own, own, floor=tiny).item() == pytest.approx(math.log(8), rel=1e-5)
    halves = torch.zeros(8, 16)
    halves[:4, :8] = halves[4:, 8:] = 1 / 8
    assert position_information(halves, halves, floor=tiny).item() == pytest.approx(math.log(2), rel=1e-5)


def test_position_information_does_not_mistake_few_samples_for_it():
    """300 samples of 64 clusters at each place: the plain estimate says 0.1 nats where there are none."""
    generator = torch.Generator().manual_seed(0)
    seen, now = (
        one_hot(torch.randint(0, 64, (10, 300), generator=generator), 64).mean(dim=1) for _ in range(2)
    )
    plain = (now * (now / now.mean(dim=0)).clamp(min=1e-9).log()).sum(dim=1).mean()
    assert plain > 0.08
    assert position_information(seen, now) < 0.0


def test_standard_balancing_lets_positions_collapse_and_the_positional_one_does_not():
    """Features that tell the position and nothing else: the constructed case of CAPI, Section 3.1.

    The centroids learn for some steps. Balanced over all patches they come to stand for positions and the
    signal approaches ln N; at each position on its own the assignments stay uniform and it stays zero.
    """
    places = normalize(normal(8, 16), dim=-1)
    information = {}
    for by_position in (True, False):
        weight = normal(8, 16, seed=4).requires_grad_()
        seen = torch.full((8, 8), 1 / 8)
        for step in range(60):
            noise = 0.02 * normal(8, 32, 16, seed=100 + step)
            patches = normalize(places[:, None] + noise, dim=-1)
            wanted = torch.zeros(1, 32, dtype=torch.int64)
            found = cluster(patches, weight, None, wanted, **TEMPERATURES, by_position=by_position)
            (slope,) = torch.autograd.grad(found.loss, weight)
            with torch.no_grad():
                weight -= 0.5 * slope
            information[by_position] = position_information(seen, found.usage).item()
            seen.lerp_(found.usage, 0.1)
    assert abs(information[True]) < 0.05
    assert information[False] > 0.6 * math.log(8)


RANKS = """
import torch
from foveola import distributed
from foveola.clustering import cluster
from torch.nn.functional import normalize

distributed.start("cpu")
rank = distributed.rank()
generator = torch.Generator().manual_seed(0)
patches = normalize(torch.randn(4, 10, 8, generator=generator), dim=-1)
weight = torch.randn(6, 8, generator=generator)
mine = slice(0, 5) if rank == 0 else slice(5, 10)
wanted = torch.arange(4)[:, None].expand(4, 5)
found = {}
for by_position in (True, False):
    made = cluster(patches[:, mine], weight, None, wanted, temperature=0.06, student_temperature=0.12,
                   by_position=by_position, chunk=40)
    found[by_position] = (made.targets, made.loss)
torch.save(found, f"OUT/{rank}.pt")
distributed.stop()
"""


def test_two_processes_are_one(run_ranks: Callable[..., list[str]], tmp_path):
    run_ranks(RANKS.replace("OUT", str(tmp_path)))
    generator = torch.Generator().manual_seed(0)
    patches = normalize(torch.randn(4, 10, 8, generator=generator), dim=-1)
    weight = torch.randn(6, 8, generator=generator)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for by_position in (True, False):
        wanted = torch.arange(4)[:, None].expand(4, 10)
        whole = cluster(patches, weight, None, wanted, **TEMPERATURES, by_position=by_position)
        together = torch.cat([part[by_position][0] for part in parts], dim=1)
        assert (together - whole.targets).abs().max() < 1e-5
        losses = [part[by_position][1].item() for part in parts]
        assert sum(losses) / 2 == pytest.approx(whole.loss.item(), rel=1e-5)
