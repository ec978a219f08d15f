"""What a step of ViTDet costs: seconds of its parts, and memory with and without activation checkpointing.

    python -m benchmarks.finetune_cost [--size tiny] [--side 1024] [--memory]

One image with ten objects, forward and backward, in float32 on one core of a CPU (seconds are those of the
process, whatever else the machine does); each in a process of its own. On a GPU run
`foveola finetune vitdet-vits16-coco --dry-run`, which says speed and memory of the real step.
"""

import argparse
from dataclasses import replace
from time import process_time

import torch
from torch import Tensor

from benchmarks.memory import in_a_process, peak_mib
from foveola.models.shape import ViTConfig
from foveola.tasks.detection import Detection, DetectionConfig, encoder_map
from foveola.views.batch import ViewsConfig

OBJECTS = 10


def method(size: str, side: int, window: int | None = None) -> Detection:
    """Return ViTDet with 80 classes on a network of this size."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = DetectionConfig(classes=tuple(f"class {k}" for k in range(80)), masks=True)
    model = replace(ViTConfig(), size=size, drop_path=0.1, window=window)
    return Detection(config, model, ViewsConfig(global_size=side, global_count=1, local_count=0)).train()


def target(side: int) -> dict[str, Tensor]:
    """Return objects of many sizes, with masks."""
    drawn = torch.Generator().manual_seed(0)
    size = side * torch.rand(OBJECTS, 2, generator=drawn).clamp(0.05) ** 2
    corner = (side - size) * torch.rand(OBJECTS, 2, generator=drawn)
    boxes = torch.cat((corner, corner + size), dim=1)
    masks = torch.zeros(OBJECTS, side, side, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return {"boxes": boxes, "labels": 1 + torch.arange(OBJECTS), "masks": masks}


def seconds(size: str, side: int, window: int | None = None) -> dict[str, float]:
    """Return seconds of the parts of a step: encoder and heads, forward and backward."""
    made = method(size, side, window)
    pixels, inside = torch.randn(1, 3, side, side), torch.tensor([[0.0, 0, side, side]])
    began = process_time()
    features = encoder_map(made.backbone, pixels)
    encoded = process_time()
    cut = features.detach().requires_grad_()
    losses = made.task_head.losses(cut, (side, side), inside, [target(side)], [None])
    torch.stack(list(losses.values())).sum().backward()
    back = process_time()
    features.backward(cut.grad)
    done = process_time()
    return {"encoder": encoded - began + done - back, "heads": back - encoded}


def memory(size: str, side: int, checkpoints: bool) -> tuple[float, float]:
    """Return the most MiB that this process holds in a step, beyond what it holds before: until the encoder
    has gone forward, and in all.
    """
    made = method(size, side)
    made.backbone.checkpoint_activations = checkpoints
    pixels, inside = torch.randn(1, 3, side, side), torch.tensor([[0.0, 0, side, side]])
    before = peak_mib()
    features = encoder_map(made.backbone, pixels)
    forward = peak_mib() - before
    losses = made.task_head.losses(features, (side, side), inside, [target(side)], [None])
    torch.stack(list(losses.values())).sum().backward()
    return forward, peak_mib() - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--memory", action="store_true", help="memory alone")
    given = parser.parse_args()
    for window in () if given.memory else (None, 14):
        parts = in_a_process(seconds, given.size, given.side, window)
        total = sum(parts.values())
        named = "all blocks read everything" if window is None else f"windows of {window}, 4 global blocks"
        shares = ", ".join(f"{name} {s:.1f} s ({s / total:.0%})" for name, s in parts.items())
        print(f"ViT-{given.size}/16 at {given.side} pixels, {named}: {total:.1f} s an image: {shares}")
    for checkpoints in (False, True):
        forward, whole = (mib / 1024 for mib in in_a_process(memory, given.size, given.side, checkpoints))
        print(
            f"checkpoint_activations={str(checkpoints).lower()}: {whole:.2f} GiB an image, "
            f"{forward:.2f} once the encoder has gone forward",
            flush=True,
        )


if __name__ == "__main__":
    main()
