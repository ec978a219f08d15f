"""Tiny batches of random views, and methods on them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveola.methods.distillation import Distillation, DistillationConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, ViewsConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.tokens import MaskingConfig

MODEL = ViTConfig(width=24, depth=2, heads=3, patch_size=4, image_size=16, drop_path=0.0)
HEADS = {"main": HeadConfig(prototypes=7, hidden=16, bottleneck=5)}


def make_batch(
    pictures: int = 3,
    global_count: int = 2,
    local_count: int = 3,
    objects: Tensor | int | None = None,
    local_objects: Tensor | None = None,
    masking: bool = True,
    seed: int = 0,
) -> Batch:
    """Views of noise: 16 patches in global views, 4 in local ones. `objects`: masks, or how many of them."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(pictures, global_count, 3, 16, 16, generator=generator)
    local = torch.randn(pictures, local_count, 3, 8, 8, generator=generator)
    masked = torch.rand(pictures, global_count, 16, generator=generator) < 0.4
    masked[0, 0] = False
    if isinstance(objects, int):
        objects = torch.rand(pictures, global_count, objects, 16, generator=generator) < 0.5
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0])
    return Batch(
        global_views=views,
        global_boxes=boxes.expand(pictures, global_count, 4),
        global_flips=torch.zeros(pictures, global_count, dtype=torch.bool),
        global_objects=objects,
        local_views=local if local_count else None,
        local_boxes=boxes.expand(pictures, local_count, 4) if local_count else None,
        local_flips=torch.zeros(pictures, local_count, dtype=torch.bool) if local_count else None,
        local_objects=local_objects,
        masked=masked if masking else None,
        masked_indices=masked.flatten().nonzero()[:, 0] if masking else None,
        local_masked=None,
        keep=None,
        predict=None,
        labels=torch.full((pictures,), -1),
        indices=torch.arange(pictures),
        facts={},
    )


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


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def method() -> Callable[..., Distillation]:
    return make_method


@pytest.fixture
def progress() -> Progress:
    return Progress(step=0, total_steps=1000, steps_per_epoch=10, batch_size=3)
