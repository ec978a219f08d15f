"""Targets and losses against loops in float64, one process against two, properties of Sinkhorn."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveola.losses import (
    Centering,
    cross_view_loss,
    entropy,
    koleo_loss,
    mask_weights,
    masked_patch_loss,
    sinkhorn,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    a = torch.exp(logits.double() / temperature)
    for _ in range(iterations):
        for k in range(a.shape[1]):
            a[:, k] /= a[:, k].sum()
        for i in range(a.shape[0]):
            a[i] /= a[i].sum()
    return a


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum().log()


# Sinkhorn


@pytest.mark.parametrize(("rows", "prototypes"), [(12, 5), (5, 12), (1, 4), (8, 1)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_the_loop(rows: int, prototypes: int, iterations: int):
    logits = normal(rows, prototypes)
    ours = sinkhorn(logits, 0.3, iterations)
    assert (ours - naive_sinkhorn(logits, 0.3, iterations)).abs().max() < 1e-5
    assert (ours.sum(dim=1) - 1).abs().max() < 1e-5


def test_sinkhorn_does_not_overflow():
    """Logits over temperature of 1e3 and more; float64 stays exact where exp() of float32 is infinite."""
    logits = normal(20, 8)
    sharp = sinkhorn(logits * 15, 0.1)  # up to about 400: still finite in float64
    assert (sharp - naive_sinkhorn(logits * 15, 0.1)).abs().max() < 1e-4
    for scale in (1e3, 1e5):
        huge = sinkhorn(logits * scale, 1.0)
        assert huge.isfinite().all()
        assert (huge.sum(dim=1) - 1).abs().max() < 1e-5


def test_sinkhorn_uses_prototypes_alike():
    cosines = normal(512, 64) / 16
    columns = sinkhorn(cosines, 0.04).sum(dim=0) / (512 / 64)
    assert (columns - 1).abs().max() < 0.05
    sharp = normal(64, 16) * 3
    columns = sinkhorn(sharp, 1.0, iterations=50).sum(dim=0) / (64 / 16)
    assert (columns - 1).abs().max() < 0.01


def test_sinkhorn_of_equal_rows_is_uniform():
    targets = sinkhorn(normal(1, 7).expand(10, 7), 0.05)
    assert (targets - 1 / 7).abs().max() < 1e-6


def test_sinkhorn_ignores_constants_of_prototypes_but_not_of_samples():
    logits = normal(30, 6)
    before = sinkhorn(logits, 0.1)
    assert (sinkhorn(logits + 5, 0.1) - before).abs().max() < 1e-4
    assert (sinkhorn(logits + normal(1, 6, seed=1), 0.1) - before).abs().max() < 1e-4
    assert (sinkhorn(logits + normal(30, 1, seed=1), 0.1) - before).abs().max() > 1e-2


def test_sinkhorn_follows_permutations():
    logits, order = normal(20, 6), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sinkhorn(logits[order], 0.1), sinkhorn(logits, 0.1)[order], atol=1e-6)


def test_sinkhorn_with_fewer_rows_than_prototypes_stays_flat():
    """The entropy of a target is at least ln(K / M) at convergence."""
    targets = sinkhorn(normal(8, 64) * 5, 0.1, iterations=100)
    assert entropy(targets).min() >= math.log(64 / 8) - 0.02


def test_sinkhorn_of_no_rows_and_half_precision():
    assert sinkhorn(torch.zeros(0, 5), 0.1).shape == (0, 5)
    logits = normal(10, 5).bfloat16()
    assert torch.equal(sinkhorn(logits, 0.1), sinkhorn(logits.float(), 0.1))


RANKS = """
import torch
from foveola import distributed
from foveola.losses import Centering, sinkhorn

distributed.start("cpu")
rank = distributed.rank()
logits = 20 * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
for split in (5, 3, 0, 10):
    rows = logits[:split] if rank == 0 else logits[split:]
    ours, one = sinkhorn(rows, 0.5), None
    everything = distributed.gather_rows(ours)
    centering = Centering(6, 0.9)
    for _ in range(3):
        if len(rows):
            centering.update(rows.mean(dim=0), len(rows))
        centering.step()
    torch.save({"targets": everything, "center": centering.center}, f"OUT/{rank}-{split}.pt")
none = sinkhorn(logits[:0], 0.5)
assert none.shape == (0, 6)
centering.step()
distributed.stop()
"""


def test_two_processes_are_one(run_ranks: Callable[..., list[str]], tmp_path):
    """Also where they have different numbers of rows, or one of them none."""
    run_ranks(RANKS.replace("OUT", str(tmp_path)))
    logits = 20 * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    one = Centering(6, 0.9)
    for _ in range(3):
        one.update(logits.mean(dim=0), 10)
        one.step()
    for split in (5, 3, 0, 10):
        results = [torch.load(tmp_path / f"{rank}-{split}.pt") for rank in (0, 1)]
        assert torch.equal(results[0]["center"], results[1]["center"])
        assert (results[0]["targets"] - sinkhorn(logits, 0.5)).abs().max() < 1e-5
        assert (results[0]["center"] - one.center).abs().max() < 1e-4


# Centering


def test_centering_is_the_loop_with_the_centre_of_earlier_steps():
    centering = Centering(4, 0.9)
    center = torch.zeros(4, dtype=torch.float64)
    for step in range(5):
        logits = normal(6, 4, seed=step) + 2
        targets = centering(logits, 0.05)
        expected = ((logits.double() - center) / 0.05).softmax(dim=-1)
        assert (targets - expected).abs().max() < 1e-5
        centering.update(logits.mean(dim=0), 6)
        # What is collected does not count before the step.
        assert torch.equal(centering(logits, 0.05), targets)
        centering.step()
        center = 0.9 * center + 0.1 * logits.double().mean(dim=0)
        assert (centering.center - center).abs().max() < 1e-6


def test_accumulated_batches_count_as_one_step():
    one, parts = Centering(4, 0.9), Centering(4, 0.9)
    logits = normal(10, 4)
    one.update(logits.mean(dim=0), 10)
    parts.update(logits[:3].mean(dim=0), 3)
    parts.update(logits[3:].mean(dim=0), 7)
    one.step()
    parts.step()
    assert torch.allclose(one.center, parts.center, atol=1e-6)
    before = one.center.clone()
    one.step()  # nothing new
    assert torch.equal(one.center, before)


def test_a_converged_centre_gives_uniform_targets_and_forgets_constants():
    constant = normal(1, 5).expand(8, 5)
    centering, shifted = Centering(5, 0.9), Centering(5, 0.9)
    other = normal(8, 5, seed=1)
    for _ in range(300):
        centering.update(constant.mean(dim=0), 8)
        shifted.update((other + 3 * torch.arange(5)).mean(dim=0), 8)
        centering.step()
        shifted.step()
    assert (centering(constant, 0.04) - 0.2).abs().max() < 1e-4
    plain = Centering(5, 0.0)
    plain.update(other.mean(dim=0), 8)
    plain.step()
    assert (shifted(other + 3 * torch.arange(5), 0.07) - plain(other, 0.07)).abs().max() < 1e-3


def test_an_overflow_leaves_the_centre_alone():
    centering = Centering(3, 0.9)
    centering.update(torch.ones(3), 2)
    centering.step()
    before = centering.center.clone()
    for bad in (torch.inf, torch.nan):
        centering.update(torch.tensor([1.0, bad, 1.0]), 2)
        centering.step()
        assert torch.equal(centering.center, before)
    centering.update(torch.ones(3), 2)
    centering.step()
    assert centering.center.tolist() == pytest.approx([0.19] * 3)


def test_only_the_centre_is_saved():
    assert list(Centering(3, 0.9).state_dict()) == ["center"]


# Cross-view cross-entropy


def naive_cross_view(targets: Tensor, predictions: Tensor, temperature: float) -> tuple[float, int]:
    total, pairs = 0.0, set()
    batch, teachers, _ = targets.shape
    for t in range(teachers):
        for s in range(predictions.shape[1]):
            if s == t:
                continue
            pairs.add((t, s))
            for b in range(batch):
                student = log_softmax(predictions[b, s].double() / temperature)
                total -= sum((targets[b, t].double() * student).tolist())
    return total / (len(pairs) * batch), len(pairs)


@pytest.mark.parametrize(
    ("teachers", "students", "pairs"), [(2, 12, 22), (2, 10, 18), (2, 2, 2), (1, 3, 2), (3, 3, 6), (1, 2, 1)]
)
def test_cross_view_loss_is_the_loop_over_pairs(teachers: int, students: int, pairs: int):
    targets = normal(3, teachers, 7).softmax(dim=-1)
    predictions = normal(3, students, 7, seed=1)
    expected, counted = naive_cross_view(targets, predictions, 0.1)
    assert counted == pairs
    assert cross_view_loss(targets, predictions, 0.1).item() == pytest.approx(expected, rel=1e-5)


def test_images_may_count_differently_in_the_cross_view_loss():
    targets, predictions = normal(3, 2, 7).softmax(dim=-1), normal(3, 5, 7, seed=1)
    shares = torch.tensor([1.5, 0.0, 1.5])
    each = [naive_cross_view(targets[b : b + 1], predictions[b : b + 1], 0.1)[0] for b in range(3)]
    loss = cross_view_loss(targets, predictions, 0.1, image_weights=shares)
    assert loss.item() == pytest.approx((each[0] + each[2]) / 2, rel=1e-5)


def test_a_student_view_meets_only_the_other_teachers():
    targets = normal(2, 2, 5).softmax(dim=-1)
    predictions = normal(2, 4, 5, seed=1).requires_grad_()

    def gradient(targets: Tensor) -> Tensor:
        return torch.autograd.grad(cross_view_loss(targets, predictions, 0.1), predictions)[0]

    changed = targets.clone()
    changed[:, 0] = changed[:, 0].roll(1, dims=-1)
    before, after = gradient(targets), gradient(changed)
    assert torch.allclose(before[:, 0], after[:, 0], atol=1e-6)
    for student in (1, 2, 3):
        assert not torch.allclose(before[:, student], after[:, student])


def test_known_values():
    prototypes = 64
    targets = normal(4, 2, prototypes).softmax(dim=-1)
    uniform = torch.zeros(4, 6, prototypes)
    assert cross_view_loss(targets, uniform, 0.1).item() == pytest.approx(math.log(prototypes), rel=1e-6)
    one_hot = torch.nn.functional.one_hot(torch.tensor([3, 1]), prototypes).float()[:, None]
    assert cross_view_loss(one_hot.expand(2, 2, -1), 10 * one_hot.expand(2, 6, -1), 0.1).item() < 1e-3
    # Cross-entropy is entropy plus divergence: of a distribution with itself, its entropy.
    logits = normal(4, 1, prototypes)
    same = (logits / 0.1).softmax(dim=-1).expand(4, 2, prototypes)
    loss = cross_view_loss(same, logits.expand(4, 3, prototypes), 0.1)
    assert loss.item() == pytest.approx(entropy(same).mean().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(dtype: torch.dtype):
    """Cosines around one at a temperature of 0.1: half precision would be off in the third digit."""
    targets = (normal(4, 2, 300) * 3).softmax(dim=-1)
    predictions = normal(4, 5, 300, seed=1).to(dtype)
    expected, _ = naive_cross_view(targets, predictions, 0.1)
    flat, weights = targets.flatten(0, 1), torch.full((8,), 1 / 8)
    with torch.autocast("cpu", dtype):
        loss = cross_view_loss(targets, predictions, 0.1)
        patch = masked_patch_loss(flat, predictions[:, :2].flatten(0, 1), weights, 0.1)
    assert loss.dtype == patch.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=2e-6)
    rows = predictions[:, :2].flatten(0, 1).double() / 0.1
    own = -(flat.double() * rows.log_softmax(-1)).sum(-1).mean().item()
    assert patch.item() == pytest.approx(own, rel=2e-6)


def test_sharp_predictions_do_not_overflow():
    targets = normal(2, 2, 5).softmax(dim=-1)
    predictions = (1e4 * normal(2, 3, 5, seed=1)).requires_grad_()
    loss = cross_view_loss(targets, predictions, 0.1)
    loss.backward()
    assert loss.isfinite()
    assert predictions.grad is not None
    assert predictions.grad.isfinite().all()


# Masked patches


def test_masked_patch_loss_is_the_mean_over_views_of_means_over_their_masked_patches():
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(6, 9, generator=generator) < 0.4
    masked[2] = False
    masked[3] = torch.arange(9) == 4
    targets, predictions = normal(6, 9, 5).softmax(dim=-1), normal(6, 9, 5, seed=1)
    expected = 0.0
    for view in range(6):
        own = 0.0
        for n in range(9):
            if masked[view, n]:
                student = log_softmax(predictions[view, n].double() / 0.1)
                own -= sum((targets[view, n].double() * student).tolist())
        expected += own / max(int(masked[view].sum()), 1) / 6
    indices = masked.flatten().nonzero()[:, 0]
    weights = mask_weights(masked, indices)
    ours = masked_patch_loss(targets.flatten(0, 1)[indices], predictions.flatten(0, 1)[indices], weights, 0.1)
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    # Weights of a masked view sum to its fraction of the mean; an empty one's are not there.
    assert weights.sum().item() == pytest.approx(5 / 6)
    for view in range(6):
        own = weights[indices // 9 == view].sum().item()
        assert own == pytest.approx(1 / 6 if masked[view].any() else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_in_parts_are_those_of_float64(dtype: torch.dtype):
    """More rows than are taken at a time; a gradient times a loss scale does not underflow in float16."""
    rows, prototypes, scale = 40, 2**14, 1024.0
    targets = normal(rows, prototypes, seed=1).softmax(dim=1)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(2)) / rows
    predictions = (3 * normal(rows, prototypes)).to(dtype).requires_grad_()
    exact = predictions.detach().double().requires_grad_()
    expected = -(targets.double() * (exact / 0.1).log_softmax(dim=1)).sum(dim=1) @ weights.double()
    (expected * scale).backward()
    loss = masked_patch_loss(targets, predictions, weights, 0.1)
    (loss * scale).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert predictions.grad is not None
    assert exact.grad is not None
    assert predictions.grad.dtype == dtype
    step = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    assert torch.allclose(predictions.grad.double(), exact.grad, rtol=step, atol=1e-5)

    views = predictions.detach().view(4, 10, prototypes).requires_grad_()
    pairs = exact.detach().view(4, 10, prototypes).requires_grad_()
    teachers = targets[:8].view(4, 2, prototypes)
    log = (pairs / 0.1).log_softmax(dim=2)
    each = [-(teachers[:, t] * log[:, s]).sum(dim=1).mean() for t in range(2) for s in range(10) if s != t]
    expected = torch.stack(each).mean()
    (expected * scale).backward()
    loss = cross_view_loss(teachers, views, 0.1)
    (loss * scale).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert views.grad is not None
    assert pairs.grad is not None
    assert torch.allclose(views.grad.double(), pairs.grad, rtol=step, atol=1e-5)


def test_no_masked_patch_is_zero_with_a_gradient_of_zero():
    masked = torch.zeros(4, 9, dtype=torch.bool)
    weights = mask_weights(masked, torch.zeros(0, dtype=torch.int64))
    features = normal(3, 5).requires_grad_()
    loss = masked_patch_loss(torch.zeros(0, 5), features[:0], weights, 0.1)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert (features.grad == 0).all()


# KoLeo and entropy


def naive_koleo(x: Tensor, floor: float = 1e-6) -> Tensor:
    """By the definition, row by row and pair by pair, in float64; distances below the floor are constants."""
    unit = [row / row.pow(2).sum().sqrt() for row in x.double()]
    total = torch.zeros((), dtype=torch.float64)
    for i, one in enumerate(unit):
        squares = [(one - other).pow(2).sum() for j, other in enumerate(unit) if j != i]
        least = min(squares, key=lambda square: square.item())
        total = total - (least.sqrt().log() if least.item() > floor**2 else math.log(floor))
    return total / len(unit)


def koleo_gradients(features: Tensor) -> tuple[Tensor, Tensor]:
    """Ours, and that of the loop."""
    ours, loop = features.clone().requires_grad_(), features.double().requires_grad_()
    koleo_loss(ours).backward()
    naive_koleo(loop).backward()
    assert ours.grad is not None
    assert loop.grad is not None
    return ours.grad.double(), loop.grad


@pytest.mark.parametrize(("rows", "width"), [(2, 3), (20, 5), (64, 16)])
def test_koleo_is_the_loop(rows: int, width: int):
    features = normal(rows, width)
    assert koleo_loss(features).item() == pytest.approx(naive_koleo(features).item(), rel=1e-4, abs=1e-5)
    ours, loop = koleo_gradients(features)
    assert (ours - loop).abs().max() < 1e-5 * loop.abs().max()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    assert koleo_loss(features[order]).item() == pytest.approx(koleo_loss(features).item(), rel=1e-5)
    assert koleo_loss(features * 37).item() == pytest.approx(koleo_loss(features).item(), rel=1e-4)


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-5])
def test_koleo_finds_neighbours_that_dot_products_cannot_tell(apart: float):
    """Tokens of different images before training, with LayerScale: all distances alike, and tiny."""
    features = normal(1, 32) + apart * normal(12, 32, seed=1)
    rounding = 1e-6 / apart  # of float32 features of length 1, relative to their distances
    assert koleo_loss(features).item() == pytest.approx(naive_koleo(features).item(), abs=rounding)
    ours, loop = koleo_gradients(features)
    assert (ours - loop).norm() < rounding * loop.norm() + 1e-5 * loop.norm()


def test_koleo_of_orthonormal_features_is_minus_log_sqrt_2():
    assert koleo_loss(torch.eye(6)).item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_equal_rows_make_koleo_large_and_push_nothing(copies: int):
    features = normal(6, 4)
    features[:copies] = features[0] * torch.arange(1, copies + 1)[:, None]  # directions count, not lengths
    assert koleo_loss(features).item() == pytest.approx(naive_koleo(features).item(), rel=1e-5)
    assert koleo_loss(features).item() > koleo_loss(normal(6, 4)).item() + 13 * copies / 6 - 2
    # Which of the equal rows is another row's neighbour is open; what pushes that row is not.
    ours, loop = koleo_gradients(features)
    assert (ours - loop)[copies:].abs().max() < 1e-5
    # Alone they are each other's neighbours: nothing is pushed. Rows apart from them still are.
    alone = features[:copies].clone().requires_grad_()
    koleo_loss(alone).backward()
    assert alone.grad is not None
    assert not alone.grad.any()
    assert koleo_loss(alone).item() == pytest.approx(-math.log(1e-6), rel=1e-6)
    assert ours[copies:].abs().max() > 1e-3


@pytest.mark.parametrize("apart", [0.0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-3])
def test_the_gradient_of_koleo_is_bounded(apart: float):
    """At most 1 / floor for each neighbour of a unit vector, whatever the distance."""
    features = torch.nn.functional.normalize(normal(1, 8) + apart * normal(4, 8, seed=1)).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    # Each of 4 rows has its own term, and those of at most 3 others, in a mean over 4.
    assert features.grad.norm(dim=1).max() <= 1e6


def test_koleo_of_zeros_is_finite():
    features = torch.zeros(3, 4, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert not features.grad.any()


def test_koleo_pushes_neighbours_apart():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]).requires_grad_()
    koleo_loss(features).backward()
    assert features.grad is not None
    assert features.grad[0, 1] > 0  # descends away from the second row
    assert features.grad[1, 1] < 0


@pytest.mark.parametrize("rows", [0, 1])
def test_koleo_of_a_lonely_row_is_zero(rows: int):
    features = normal(rows, 4).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.item() == 0
    assert features.grad is not None
    assert not features.grad.any()


def test_koleo_is_float32_under_autocast():
    features = normal(32, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(features)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_koleo(features.detach()).item(), rel=1e-5)
    loss.backward()
    loop = features.detach().double().requires_grad_()
    naive_koleo(loop).backward()
    assert features.grad is not None
    assert loop.grad is not None
    # Rounded to bfloat16 only as the gradient of bfloat16 features.
    assert (features.grad.double() - loop.grad).abs().max() < 2**-7 * loop.grad.abs().max()


def test_entropy():
    assert entropy(torch.full((2, 8), 1 / 8)).tolist() == pytest.approx([math.log(8)] * 2)
    assert entropy(torch.eye(3)).tolist() == [0, 0, 0]
