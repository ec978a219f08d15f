"""Logits that are never all in memory: losses and gradients against autograd in float64, and what is held."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foveola import cross_entropy as module
from foveola.cross_entropy import first_choice, multiply, room_for, scales_of
from foveola.losses import cross_view_loss, masked_patch_loss

WIDTH, PROTOTYPES, TEMPERATURE = 8, 96, 0.1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Asked:
    """Targets that are made when asked for, in memory that is used again."""

    def __init__(self, targets: Tensor) -> None:
        self.targets, self.room, self.rows = targets, torch.zeros_like(targets), list[int]()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: slice) -> Tensor:
        self.rows += range(*rows.indices(len(self)))
        made = self.targets[rows]
        self.room.fill_(torch.nan)
        return self.room[: len(made)].copy_(made)


def parts(prototypes: int = PROTOTYPES) -> tuple[Tensor, Tensor, Tensor]:
    """v and g of no common length, and the logits' naive weights."""
    v = (normal(prototypes, WIDTH, seed=1) * normal(prototypes, 1, seed=2).exp()).requires_grad_()
    g = (1 + 0.3 * normal(prototypes, 1, seed=3)).requires_grad_()
    return v, g, (g * v / v.norm(dim=1, keepdim=True)).double()


def naive(targets: Tensor, h: Tensor, weight: Tensor, weights: Tensor) -> Tensor:
    """Each row and pair by autograd in float64; targets [B, T, K], h [B, S, D]; T = S = 1: its own."""
    logs = (h.double() @ weight.T / TEMPERATURE).log_softmax(dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    own = targets.shape[1] == h.shape[1] == 1
    for t in range(targets.shape[1]):
        for s in range(h.shape[1]):
            if own or s != t:
                total = total - (targets[:, t].double() * logs[:, s]).sum(dim=1) @ weights.double()
    return total


def gradients(loss: Tensor, *of: Tensor, scale: float = 1.0) -> list[Tensor]:
    return [x.double() for x in torch.autograd.grad(loss * scale, of, retain_graph=True)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at a time, 256 in a product, and no memory of other tests: all parts have borders."""
    monkeypatch.setattr(module, "rows_in_cache", lambda device, prototypes: 2)
    monkeypatch.setattr(module, "_ROOMS", threading.local())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_masked_patches_with_prototypes_are_the_loop(scale: float):
    v, g, weight = parts()
    h = normal(301, WIDTH).requires_grad_()
    targets, weights = (3 * normal(301, PROTOTYPES, seed=4)).softmax(dim=1), normal(301, seed=5).abs() / 301
    asked = Asked(targets)
    loss = masked_patch_loss(asked, h, weights, TEMPERATURE, (v, g))
    expected = naive(targets[:, None], h[:, None], weight, weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert asked.rows == list(range(301))
    for ours, theirs in zip(
        gradients(loss, h, v, g, scale=scale), gradients(expected, h, v, g, scale=scale), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("teachers", "students"), [(2, 10), (2, 2), (1, 3), (3, 4)])
def test_views_with_prototypes_are_the_loop(teachers: int, students: int):
    v, g, weight = parts()
    h = normal(301, students, WIDTH).requires_grad_()
    targets = (3 * normal(301, teachers, PROTOTYPES, seed=4)).softmax(dim=2)
    asked = Asked(targets.flatten(0, 1))
    loss = cross_view_loss(asked, h, TEMPERATURE, (v, g))
    pairs = teachers * students - min(teachers, students)
    expected = naive(targets, h, weight, torch.full((301,), 1 / (301 * pairs)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert asked.rows == list(range(301 * teachers))
    assert torch.equal(cross_view_loss(targets, h, TEMPERATURE, (v, g)), loss)
    for ours, theirs in zip(gradients(loss, h, v, g), gradients(expected, h, v, g), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_products_and_no_more(dtype: torch.dtype):
    """The loss as of logits that autocast made, gradients near float64's; in float16 none underflows."""
    v, g, weight = parts()
    h = torch.nn.functional.normalize(normal(600, WIDTH), dim=1).requires_grad_()
    targets, weights = (3 * normal(600, PROTOTYPES, seed=4)).softmax(dim=1), torch.full((600,), 1e-7)
    with torch.autocast("cpu", dtype):
        loss = masked_patch_loss(targets, h, weights, TEMPERATURE, (v, g))
        whole = masked_patch_loss(targets, h @ (g * v / v.norm(dim=1, keepdim=True)).T, weights, TEMPERATURE)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(whole.item(), rel=1e-3)
    exact = naive(targets[:, None], h[:, None], weight, weights)
    for ours, theirs in zip(gradients(loss, h, v, g), gradients(exact, h, v, g), strict=True):
        assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()
        assert (ours != 0).all()


def test_what_needs_no_gradient_gets_none():
    v, g, _ = parts()
    h, targets = normal(5, WIDTH), normal(5, PROTOTYPES, seed=4).softmax(dim=1)
    weights = torch.full((5,), 0.2)
    h.requires_grad_()
    everything = masked_patch_loss(targets, h, weights, TEMPERATURE, (v, g))
    every = torch.autograd.grad(everything, (h, v, g))
    for place in range(3):
        mine = [x.detach().clone().requires_grad_(place == i) for i, x in enumerate((h, v, g))]
        loss = masked_patch_loss(targets, mine[0], weights, TEMPERATURE, (mine[1], mine[2]))
        assert torch.equal(loss, everything)
        loss.backward()
        for i, (one, expected) in enumerate(zip(mine, every, strict=True)):
            assert one.grad is None if i != place else torch.equal(one.grad, expected)
    with torch.no_grad():
        loss = masked_patch_loss(targets, h, weights, TEMPERATURE, (v, g))
    assert torch.equal(loss, everything)
    assert not loss.requires_grad


@pytest.mark.parametrize("rows", [4, 6, 10])
def test_other_numbers_of_targets_are_refused(rows: int):
    v, g, _ = parts()
    targets = normal(rows, PROTOTYPES).softmax(dim=1)
    with pytest.raises(ValueError, match=f"{rows} targets for 5 predictions"):
        masked_patch_loss(Asked(targets), normal(5, WIDTH), torch.full((5,), 0.2), TEMPERATURE, (v, g))
    if rows % 5:
        with pytest.raises(ValueError, match=f"{rows} targets for 5 images"):
            cross_view_loss(Asked(targets), normal(5, 3, WIDTH), TEMPERATURE, (v, g))


def test_room_made_in_inference_serves_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_ROOMS", threading.local())
    v, g, _ = parts()
    h, targets = normal(5, WIDTH), normal(5, PROTOTYPES, seed=4).softmax(dim=1)
    weights = torch.full((5,), 0.2)
    with torch.inference_mode():
        first = masked_patch_loss(targets, h, weights, TEMPERATURE, (v.detach(), g.detach())).item()
    loss = masked_patch_loss(targets, h.requires_grad_(), weights, TEMPERATURE, (v, g))
    loss.backward()
    assert loss.item() == first


def test_no_rows_give_gradients_of_zero():
    """Data-parallel training waits for them."""
    v, g, _ = parts()
    h = normal(3, WIDTH).requires_grad_()
    loss = masked_patch_loss(torch.zeros(0, PROTOTYPES), h[:0], torch.zeros(0), TEMPERATURE, (v, g))
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (h, v, g)):
        assert (gradient == 0).all()


def test_a_prototype_of_no_length_stays_finite():
    v, g, _ = parts()
    g = g.detach().clone()
    g[3] = 0
    g.requires_grad_()
    h, targets = normal(5, WIDTH), normal(5, PROTOTYPES, seed=4).softmax(dim=1)
    loss = masked_patch_loss(targets, h, torch.full((5,), 0.2), TEMPERATURE, (v, g))
    for gradient in torch.autograd.grad(loss, (v, g)):
        assert gradient.isfinite().all()


class Largest(TorchDispatchMode):
    """Most numbers that one tensor held."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.usefixtures("small")
def test_all_logits_are_never_in_memory_at_once():
    rows, prototypes = 4096, 1024
    v, g, _ = parts(prototypes)
    h = normal(rows, WIDTH).requires_grad_()
    chance = torch.full((1, prototypes), 1 / prototypes)

    class Uniform:
        def __len__(self) -> int:
            return rows

        def __getitem__(self, some: slice) -> Tensor:
            return chance.expand(some.stop - some.start, -1)

    with Largest() as held:
        masked_patch_loss(Uniform(), h, torch.full((rows,), 1 / rows), TEMPERATURE, (v, g)).backward()
    assert held.numbers == 256 * (prototypes + 64)
    with Largest() as held:
        masked_patch_loss(
            chance.expand(rows, -1), h @ v.T, torch.full((rows,), 1 / rows), TEMPERATURE
        ).backward()
    assert held.numbers >= rows * prototypes


@pytest.mark.parametrize("prototypes", [1, 7, 256, 1024, 1000])
def test_the_first_choice_is_that_of_argmax(prototypes: int):
    rows = normal(50, prototypes)
    assert torch.equal(first_choice(rows), rows.argmax(dim=1))
    assert first_choice(torch.full((2, prototypes), 0.5)).tolist() == [0, 0]
    assert first_choice(rows[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_products_are_those_of_a_linear_layer(dtype: torch.dtype | None):
    v, g, weight = parts()
    h = normal(9, WIDTH)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        ours = multiply(h, v.detach(), room_for("logits", 9, PROTOTYPES, h.device))
        assert torch.equal(ours, torch.nn.functional.linear(h, v).float())
    if dtype is None:
        assert (ours * scales_of((v, g)) - h.double() @ weight.T).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_a_gpu_gives_what_the_cpu_gives(half: bool):
    v, g, _ = parts(2048)
    h, targets = normal(5000, 3, WIDTH), (3 * normal(5000, 2, 2048, seed=4)).softmax(dim=2)

    def run(device: str) -> tuple[float, list[Tensor]]:
        here = [x.detach().to(device).requires_grad_() for x in (h, v, g)]
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = cross_view_loss(targets.to(device), here[0], TEMPERATURE, (here[1], here[2]))
        return loss.item(), [x.cpu() for x in torch.autograd.grad(loss, here)]

    cpu, gpu = run("cpu"), run("cuda")
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-3 if half else 1e-4)
    for ours, theirs in zip(gpu[1], cpu[1], strict=True):
        assert (ours - theirs).abs().max() < (0.03 if half else 5e-3) * theirs.abs().max()  # TF32
