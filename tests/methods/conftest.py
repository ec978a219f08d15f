"""Tiny batches of random views, and methods on them."""

import math
from collections.abc import Callable
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, Hidden, Views, ViewsConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.tokens import MaskingConfig

MODEL = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.0)
HEADS = {"main": HeadConfig(prototypes=7, hidden=16, bottleneck=5)}


def make_batch(
    images: int = 3,
    global_count: int = 2,
    local_count: int = 3,
    objects: Tensor | int | None = None,
    local_objects: Tensor | None = None,
    masking: bool = True,
    seed: int = 0,
) -> Batch:
    """Views of noise: 16 patches in global views, 4 in local ones. `objects`: masks, or how many of them."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(images, global_count, 3, 16, 16, generator=generator)
    local = torch.randn(images, local_count, 3, 8, 8, generator=generator)
    masked = torch.rand(images, global_count, 16, generator=generator) < 0.4
    masked[0, 0] = False
    if isinstance(objects, int):
        objects = torch.rand(images, global_count, objects, 16, generator=generator) < 0.5
    hidden = Hidden.of(masked, masked.device) if masking else None
    large = whole_views(views, objects=objects, hidden_contents=hidden)
    return whole_batch(large, whole_views(local, objects=local_objects) if local_count else None)


def whole_views(pixels: Tensor, **others: Any) -> Views:
    """Views of whole images, none of them flipped."""
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*pixels.shape[:2], 4)
    flips = torch.zeros(pixels.shape[:2], dtype=torch.bool)
    return Views(pixels, boxes, flips, boxes, **others)


def whole_batch(large: Views, small: Views | None = None, facts: dict[str, Tensor] | None = None) -> Batch:
    count = len(large.pixels)
    return Batch(large, small, torch.full((count,), -1), torch.arange(count), facts or {})


def part_of(batch: Batch, images: slice) -> Batch:
    """Some images of a batch, as another process has them."""

    def cut(group: Any) -> Any:
        if isinstance(group, Hidden):
            return Hidden.of(group.mask[images], group.mask.device)
        if isinstance(group, Tensor):
            return group[images]
        if is_dataclass(group):
            return type(group)(**{name: cut(value) for name, value in vars(group).items()})
        return group

    return cut(batch)


def make_method(
    seed: int = 0, image_token: bool = False, masking: bool = True, model: ViTConfig = MODEL, **terms
) -> Distillation:
    """iBOT by default. Student and teacher differ, and their weights are large enough to matter."""
    views = ViewsConfig(
        objects=ObjectsConfig(image_token=True) if image_token else None,
        masking=MaskingConfig() if masking else None,
    )
    torch.manual_seed(seed)
    method = Distillation(DistillationConfig(**{"heads": HEADS, **terms}), model, views)
    parameters = dict(method.named_parameters())
    with torch.no_grad():
        for index, name in enumerate(sorted(parameters)):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            if not name.endswith(".g"):
                parameters[name] += 0.2 * torch.randn(parameters[name].shape, generator=generator)
    return method.train()


def plain_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """LayerNorm written out."""
    apart = x - x.mean(dim=-1, keepdim=True)
    return apart / (apart.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def plain_network(x: Tensor, network: nn.Module) -> Tensor:
    """Pre-norm blocks of attention and MLP and the final norm, on tokens [T, D] of one sequence."""
    for block in network.blocks:
        y = plain_norm(x, block.norm1)
        parts = (y @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
        heads = []
        for q, k, v in zip(*(part.chunk(block.attn.heads, dim=1) for part in parts), strict=True):
            logits = q @ k.T / q.shape[1] ** 0.5
            heads.append((logits.exp() / logits.exp().sum(dim=1, keepdim=True)) @ v)
        x = x + torch.cat(heads, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias
        hidden = plain_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return plain_norm(x, network.norm)


def plain_sines(rows: int, columns: int, width: int) -> Tensor:
    """MAE's fixed positions by a loop: of the column in the first half of the channels, then of the row."""
    table = torch.zeros(rows * columns, width, dtype=torch.float64)
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for i in range(quarter):
                frequency = 10_000 ** (-i / quarter)
                values = (math.sin(column * frequency), math.cos(column * frequency))
                values += (math.sin(row * frequency), math.cos(row * frequency))
                for part, value in enumerate(values):
                    table[row * columns + column, part * quarter + i] = value
    return table


def plain_pixels(image: Tensor, patch: int, side: int) -> Tensor:
    """[3, side, side] pixels of one patch of an image, patches counted row by row."""
    columns = image.shape[2] // side
    top, left = patch // columns * side, patch % columns * side
    return image[:, top : top + side, left : left + side]


@pytest.fixture
def plain() -> SimpleNamespace:
    """Parts of a ViT written out in plain loops, for one image at a time."""
    return SimpleNamespace(norm=plain_norm, network=plain_network, sines=plain_sines, pixels=plain_pixels)


@pytest.fixture
def views() -> SimpleNamespace:
    """Batches by hand: `whole` views, a `batch` of such, some images of it."""
    return SimpleNamespace(whole=whole_views, batch=whole_batch, part=part_of)


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def method() -> Callable[..., Distillation]:
    return make_method


@pytest.fixture
def progress() -> Progress:
    return Progress(step=0, total_steps=1000, steps_per_epoch=10, batch_size=3)
