"""Whether a device gives the right numbers: against the CPU, in other precisions, compiled, and resumed."""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_steps import Step, forget, trainer_of
from benchmarks.step import canvases
from foveola.losses import koleo_loss, masked_patch_loss, sinkhorn
from foveola.schedules import Progress
from foveola.training.loop import Trainer
from foveola.views.batch import Streams, make_views

RECIPE = "odis-dinov2-tiny-tinyimagenet"  # Sinkhorn, KoLeo, two heads, objects
PLAIN = (("model.drop_path", 0.0), ("model.depth", 2))  # devices and compiled code drop other images
BATCH = 16


def checks(root: Path) -> dict[str, Callable[[torch.device], str]]:
    """Return checks by name: each says what it found, and raises AssertionError for wrong numbers."""
    return {
        "tests for GPUs": lambda device: _tests(root, device),
        "losses": _losses,
        "views": _views,
        "step against the CPU": _against_cpu,
        "bf16 and fp16": _precisions,
        "compiled": _compiled,
        "resumed": _resumed,
    }


def _tests(root: Path, device: torch.device) -> str:
    """The tests marked gpu, where there are tests, pytest and a GPU."""
    files = (
        "test_benchmarks.py",
        "test_cross_entropy.py",
        "evaluation/classification/test_knn.py",
        "views/test_batch.py",
    )
    paths = [str(root / "tests" / name) for name in (*files, "data/test_loader.py")]
    if device.type != "cuda" or not all(map(Path.exists, map(Path, paths))):
        return "left out: no GPU, or no tests here"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=150, check=False)
    last = (ran.stdout.strip() or ran.stderr.strip()).splitlines()[-1]
    if "No module named pytest" in ran.stderr:
        return "left out: pytest is not installed"
    assert ran.returncode == 0, last
    return last


def farthest(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def _losses(device: torch.device) -> str:
    """Sinkhorn, KoLeo, and cross-entropy with its gradients, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    features, v = (torch.randn(n, 64, generator=generator) for n in (96, 512))
    targets = torch.randn(96, 512, generator=generator).softmax(dim=1)
    weights = torch.rand(96, generator=generator)
    unit = torch.nn.functional.normalize(v, dim=1)

    def naive() -> list[Tensor]:
        x, p = features.double().requires_grad_(), unit.double().requires_grad_()
        loss = (-(targets.double() * (x @ p.T / 0.1).log_softmax(dim=1)).sum(dim=1) * weights).sum()
        loss.backward()
        assert x.grad is not None
        return [loss.detach(), x.grad]

    x = features.clone().to(device).requires_grad_()
    lengths = torch.ones(512, 1, device=device)
    loss = masked_patch_loss(targets.to(device), x, weights.to(device), 0.1, (v.to(device), lengths))
    loss.backward()
    assert x.grad is not None
    found = [farthest(ours, theirs) for ours, theirs in zip((loss, x.grad), naive(), strict=True)]
    logits = 4 * torch.randn(64, 128, generator=generator)
    matrix = (logits.double() / 0.1).exp()
    for _ in range(3):
        matrix = matrix / matrix.sum(dim=0)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    found += [farthest(sinkhorn(logits.to(device), 0.1), matrix)]
    found += [farthest(koleo_loss(features.to(device)), koleo_loss(features))]
    # TF32 keeps 10 bits of a product, as training on a GPU does; Sinkhorn and KoLeo are whole float32.
    assert max(found[:2]) < 5e-3, found
    assert max(found[2:]) < 1e-4, found
    return f"largest relative difference {max(found):.1e}"


def _views(device: torch.device) -> str:
    trainer, _ = trainer_of(Step("", RECIPE, BATCH), BATCH, torch.device("cpu"))
    images, patch = canvases(BATCH, torch.device("cpu")), trainer.method.backbone.config.patch_size
    here = make_views(images, trainer.views, patch, Streams(0, 1))
    there = make_views(images.to(device), trainer.views, patch, Streams(0, 1))
    assert torch.equal(here.large.boxes, there.large.boxes.cpu())
    apart = farthest(there.large.pixels, here.large.pixels)
    assert apart < 0.02, apart  # a pixel on the edge of solarisation may fall to either side
    return f"boxes equal, pixels differ by {apart:.1e}"


def _train(trainer: Trainer, device: torch.device, steps: range) -> list[float]:
    images = canvases(BATCH, torch.device("cpu")).to(device)
    start = Progress(0, 1000, 100, BATCH)
    losses = [trainer.step(dataclasses.replace(start, step=step), lambda: images)["loss"] for step in steps]
    return [float(loss) for loss in losses]


def _begin(device: torch.device, compiled: str = "", **changes: object) -> Trainer:
    step = Step("", RECIPE, BATCH, compiled, (*PLAIN, ("precision", "fp32"), *changes.items()))
    return trainer_of(step, BATCH, device)[0]


def _close(ours: list[float], theirs: list[float], share: float) -> str:
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    assert apart < share, f"losses {ours} and {theirs}"
    return f"losses differ by {apart:.1e}"


def _against_cpu(device: torch.device) -> str:
    losses = [_train(_begin(each), each, range(3)) for each in (device, torch.device("cpu"))]
    return _close(*losses, share=5e-3)


def _precisions(device: torch.device) -> str:
    full = _train(_begin(device), device, range(3))
    said = []
    for precision in ("bf16", "fp16"):
        half = _train(_begin(device, precision=precision), device, range(3))
        said.append(f"{precision}: {_close(half[:1], full[:1], 2e-2)}")
    return "; ".join(said)


def _compiled(device: torch.device) -> str:
    plain = _train(_begin(device), device, range(2))
    try:
        return _close(_train(_begin(device, "default"), device, range(2)), plain, 5e-3)
    finally:
        forget(device)


def _resumed(device: torch.device) -> str:
    """Two steps, a checkpoint and two more in another trainer, against four."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = _begin(device)
        _train(whole, device, range(4))
        first, second = _begin(device), _begin(device)
        _train(first, device, range(2))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        _train(second, device, range(2, 4))
    finally:
        torch.use_deterministic_algorithms(deterministic)
    pairs = zip(whole.method.state_dict().values(), second.method.state_dict().values(), strict=True)
    apart = max(farthest(a.float(), b.float()) for a, b in pairs if a.numel())
    assert apart < 1e-4, apart
    return "bit for bit" if apart == 0 else f"weights differ by {apart:.1e}: some kernels add in any order"
