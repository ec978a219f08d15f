"""The mask AP that Mask R-CNN's masks allow at most: true masks, cut to true boxes, and pasted back.

    python -m benchmarks.mask_bound 'scenes:?size=64&count=16&objects=2-5' [--pixels 28 56]

Mask R-CNN says an object's outline on a grid of 28 x 28 pixels of its box. For small objects an IoU of 0.95,
which AP asks for, is a fraction of a pixel of the image, and no head reaches it.
"""

import argparse
from typing import Any

import numpy as np
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from foveola.data.sources import open_source
from foveola.evaluation.detection.average_precision import score
from foveola.evaluation.detection.detect import coco_results
from foveola.evaluation.detection.truth import annotations_of, data_set
from foveola.tasks.detection import pasted
from foveola.tasks.task import Detections


def bound(source: Any, side: int) -> dict[str, float]:
    """Return AP of masks, and AP at IoUs of 0.5 and 0.75, in percent."""
    names = tuple(source.classes or ())
    sizes, truth, found = {}, [], []
    for index in range(len(source)):
        sample = source[index]
        objects, (height, width) = sample.objects, sample.image.shape[:2]
        boxes = torch.from_numpy(objects.boxes).float() * torch.tensor([width, height] * 2)
        masks = torch.from_numpy(np.asarray(objects.masks) > 0).float()
        targets = project_masks_on_boxes(masks, boxes, torch.arange(len(masks)), side)
        shown = pasted(targets[:, None], boxes, height, width)
        labels = torch.from_numpy(objects.labels).long()
        prediction = Detections(names, boxes, labels, torch.ones(len(boxes)), shown)
        sizes[index] = (height, width)
        truth += annotations_of(objects, index, (height, width), masks=True, crowd=False)
        found += coco_results(prediction, index, {k: k for k in range(len(names))}, masks=True)
    summary = score(data_set(sizes, truth, names), found, "mask").summary
    return {name: 100 * summary[name] for name in ("ap", "ap50", "ap75")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="data string of images with masks, such as 'coco:/data/coco'")
    parser.add_argument("--split", default="train")
    parser.add_argument("--pixels", type=int, nargs="+", default=[28, 56])
    arguments = parser.parse_args()
    source = open_source(arguments.data, arguments.split)
    for side in arguments.pixels:
        reached = bound(source, side)
        print(f"{side} x {side}: " + "  ".join(f"{name} {value:.1f}" for name, value in reached.items()))


if __name__ == "__main__":
    main()
