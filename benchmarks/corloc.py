"""CorLoc of objects from features: the share of images whose first box has IoU >= 0.5 with a true box.

    python -m benchmarks.corloc DATA MODEL [images] [pixels]

One pass over images drawn by seed 0, with `pixels` on the longer side; all cuts see the same features. 95 %
intervals over images (Wilson). `centred box`: the box around the centre of the image whose share of each
side, of 56, is the best on these very images. `any`: one of up to three objects of MaskCut does.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from foveola.data.sources import decode, open_source
from foveola.evaluation.metrics import interval
from foveola.models.transform import fit_to_patches
from foveola.proposals.cuts import CutObjects, brightest, centred, lost, maskcut, tokencut
from foveola.zoo.load import load

Cut = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], CutObjects]  # of keys, patches, attention

CUTS: dict[str, Cut] = {
    "tokencut, keys, centre=false": lambda k, p, a, g: tokencut(k, g),
    "tokencut, patches, centre=false": lambda k, p, a, g: tokencut(p, g),
    "tokencut, keys": lambda k, p, a, g: tokencut(centred(k), g),
    "tokencut, patches": lambda k, p, a, g: tokencut(centred(p), g),
    "maskcut, patches, centre=false": lambda k, p, a, g: maskcut(p, g),
    "maskcut, keys": lambda k, p, a, g: maskcut(centred(k), g),
    "maskcut, patches": lambda k, p, a, g: maskcut(centred(p), g),
    "lost, keys": lambda k, p, a, g: lost(centred(k), g),
    "lost, patches": lambda k, p, a, g: lost(centred(p), g),
    "attention": lambda k, p, a, g: brightest(a, p, g),
    "attention, share=0.8": lambda k, p, a, g: brightest(a, p, g, 0.8),
}
SIDES = 56


def best_iou(box: np.ndarray, truth: np.ndarray) -> float:
    """Return the best IoU of a box [4] with boxes [k, 4]."""
    shared = (np.minimum(box[2:], truth[:, 2:]) - np.maximum(box[:2], truth[:, :2])).clip(0).prod(axis=1)
    whole = (box[2:] - box[:2]).prod() + (truth[:, 2:] - truth[:, :2]).prod(axis=1) - shared
    return float((shared / whole).max())


def boxes_of(masks: np.ndarray) -> list[np.ndarray]:
    """Return the boxes of masks [K, h, w], but for empty ones, in the unit square."""
    found = []
    for mask in masks[masks.any(axis=(1, 2))]:
        y, x = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        sides = np.array([mask.shape[1], mask.shape[0]] * 2)
        found.append(np.array([x[0], y[0], x[-1] + 1, y[-1] + 1]) / sides)
    return found


def line(name: str, hits: np.ndarray) -> str:
    """Return a row of the table."""
    low, high = interval(torch.from_numpy(hits))
    return f"{name:36s} {100 * hits.mean():5.1f}  ({100 * low:.1f} to {100 * high:.1f})"


@torch.inference_mode()
def main(data: str, model: str, count: int = 200, side: int | None = None) -> None:
    """Print the table."""
    encoder, source = load(model), open_source(data, "test")
    found: dict[str, list[float]] = {name: [] for name in [*CUTS, "maskcut, patches: any"]}
    squares = []
    for index in np.random.default_rng(0).permutation(len(source)):
        sample = source[int(index)]
        if sample.objects is None:
            continue
        truth = sample.objects.boxes.astype(np.float64)
        small = fit_to_patches(decode(sample.image), encoder.config.transform, encoder.patch_size, side)
        seen = encoder.capture(encoder.normalise(small[None].to(encoder.device)), attention=True)
        features, attention = seen.layers[-1], seen.attention
        assert attention is not None
        read = attention.objects()[:, :, 0, attention.special :].mean(dim=1)
        for name, cut in CUTS.items():
            masks = cut(attention.keys(), features.patches, read, features.grid).masks[0]
            boxes = boxes_of(masks.view(-1, *features.grid).cpu().numpy())
            ious = [best_iou(box, truth) for box in boxes]
            found[name].append((ious or [0.0])[0])
            if name == "maskcut, patches":
                found["maskcut, patches: any"].append(max(ious, default=0.0))
        shares = np.arange(1, SIDES + 1) / SIDES
        squares.append([best_iou(np.array([0.5 - s / 2] * 2 + [0.5 + s / 2] * 2), truth) for s in shares])
        if len(squares) == count:
            break
    hits = np.array(squares) >= 0.5
    print(f"{len(squares)} images of {data}, {side or encoder.config.transform.crop} pixels, {model}")
    for name, values in found.items():
        print(line(name, np.array(values) >= 0.5))
    best = int(hits.mean(axis=0).argmax())
    print(line(f"centred box of {(best + 1) / SIDES:.2f}", hits[:, best]))
    print(line("the whole image", hits[:, -1]))


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*given[:2], *(int(one) for one in given[2:]))
