"""What an encoder makes of one image, laid over it: features as colours, attention, likeness to a patch."""

from dataclasses import dataclass

import numpy as np
import torch

from foveola.config import UserError
from foveola.data.values import ImagePixels
from foveola.drawing.overlays import cool_to_warm
from foveola.drawing.sheet import Pixels
from foveola.figures.dense import patch_map
from foveola.figures.maps import query_attention, received_attention, similarity, token_attention
from foveola.figures.pca import pca_images
from foveola.figures.tiles import as_encoded, encoded, light, shown_size
from foveola.models.encoder import Encoder

LAYERS = ("pca", "attention", "reads", "similarity")


@dataclass(frozen=True, eq=False)
class Layer:
    """An image of the whole image's shape, and a sentence that says how to read it."""

    pixels: Pixels
    note: str


def layer(
    encoder: Encoder, image: ImagePixels, what: str, point: tuple[float, float] = (0.5, 0.5), head: int = 0
) -> Layer:
    """Return a layer of an image that is encoded as figures show it: whole, at twice the encoder's side.

    Args:
        what: "pca": components of the patches as colours; "attention": what the class token reads (without
            one: what all patches read); "reads": what the patch under `point` reads; "similarity": the cosine
            of all patches with that one.
        head: of the attention, from 1; 0 = the mean of all.

    Raises UserError for what the encoder has not.
    """
    if what == "pca":
        (colors,) = pca_images(encoder, [image], size=shown_size(encoder, None))
        return Layer(
            colors, "Patches of one colour are alike: red, green and blue are their first components."
        )
    if what == "similarity":
        cosines = similarity(patch_map(encoder, image, shown_size(encoder, None)), point)
        low = float(cosines.min())
        note = f"Cosine with the patch under the dot, from {low:.2f} (blue) to 1 (red)."
        return Layer(cool_to_warm(cosines, low, 1.0), note)
    if what not in LAYERS:
        raise UserError(f"unknown layer {what!r}; known: {', '.join(LAYERS)}")
    images = encoded(encoder, image, None)
    if what == "reads":
        weights, whose = query_attention(encoder, images, torch.tensor([point]))[0], "the patch under the dot"
    elif encoder.config.model.class_token or encoder.wrapped:
        encoder.check_inside("its attention")
        weights, whose = token_attention(encoder, images)[0, 0], "the class token"
    else:
        weights, whose = received_attention(encoder, images)[0], "all patches (there is no class token)"
    if not 0 <= head <= len(weights):
        raise UserError(f"head={head}: expected 0 for all, or 1 to {len(weights)}")
    one = weights.mean(dim=0) if head == 0 else weights[head - 1]
    tile, peak = light(as_encoded(encoder, image, None), one)
    heads = "all heads" if head == 0 else f"head {head}"
    return Layer(np.ascontiguousarray(tile), f"Light: what {whose} of the last block reads, {heads}; {peak}.")


def heads_of(encoder: Encoder) -> int:
    """Return how many heads a block has; 0 where attention cannot be read."""
    return 0 if encoder.wrapped else encoder.config.model.shape[2]
