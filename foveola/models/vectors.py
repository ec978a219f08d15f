"""`Encoder.embed`: images of any sort, batch by batch, to one vector each."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from foveola.config import UserError, kind_of


def vectors_of(encoder: Any, images: Any, batch_size: int) -> Float32[np.ndarray, "n D"]:
    """Return what stands for each image, by an `Encoder`; the images are as `Encoder.embed` takes them.

    Raises UserError for no image, one that cannot be read, and tensors of other shapes.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: expected at least 1")
    training, parts = encoder.training, []
    encoder.eval()
    try:
        with torch.inference_mode():
            for pixels in _batches(encoder, images, batch_size):
                parts.append(encoder.tokens(pixels.to(encoder.device))[:, 0].float().cpu())
    finally:
        encoder.train(training)
    if not parts:
        raise UserError("images: expected at least one")
    return torch.cat(parts).numpy()


def _batches(encoder: Any, images: Any, batch_size: int) -> Iterator[Float[Tensor, "b ch H W"]]:
    """Normalised images, as many at once as are encoded together."""
    if isinstance(images, Tensor):
        whole = images[None] if images.ndim == 3 else images
        yield from (_pixels(encoder, part) for part in whole.split(batch_size))
    elif isinstance(images, list | tuple) or (isinstance(images, np.ndarray) and images.ndim == 4):
        for some in _several(images, batch_size):
            made = [
                _pixels(encoder, x[None])[0] if isinstance(x, Tensor) else encoder.transform(x) for x in some
            ]
            if other := [x for x in made if x.shape != made[0].shape]:
                sizes = list(made[0].shape), list(other[0].shape)
                raise UserError(f"images: tensors of one size are encoded together, got {sizes}")
            yield torch.stack(made)
    elif isinstance(images, Iterable) and not isinstance(images, str | bytes | np.ndarray):
        for batch in images:
            first = batch[0] if isinstance(batch, list | tuple) and batch else batch
            yield _pixels(encoder, first)
    else:
        yield encoder.transform(images)[None]


def _several(images: Any, count: int) -> Iterator[Any]:
    return (images[start : start + count] for start in range(0, len(images), count))


def _pixels(encoder: Any, batch: Any) -> Float[Tensor, "b ch H W"]:
    """A batch of tensors, normalised unless it was. Raises UserError for another shape or type."""
    if not isinstance(batch, Tensor):
        raise UserError(f"images: expected batches of tensors, got {kind_of(batch)}")
    patch, shape, channels = encoder.patch_size, list(batch.shape), encoder.config.model.channels
    if batch.ndim != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch or 0 in shape[2:]:
        raise UserError(
            f"images: expected [n, {channels}, H, W] in whole patches of {patch} pixels, got {shape}"
        )
    if batch.dtype not in (torch.uint8, torch.uint16) and not batch.is_floating_point():
        raise UserError(f"images: expected uint8 pixels or normalised floats, got {batch.dtype}")
    return encoder.normalise(batch) if not batch.is_floating_point() else batch.float()
