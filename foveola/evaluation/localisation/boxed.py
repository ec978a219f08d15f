"""Images with their annotated boxes, both squashed to the unit square."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from foveola.data.sample import Sample
from foveola.data.sources import decode
from foveola.models.transform import TransformConfig, evaluation_view


class Boxed(NamedTuple):
    """Some images with their boxes."""

    image_indices: Int64[Tensor, "b"]
    images: Shaped[Tensor, "b ch S S"]
    boxes: tuple[Float32[np.ndarray, "_ 4"], ...]


class BoxedCut:
    """Makes `Boxed` of an image; one without boxes takes no part and is not decoded."""

    def __init__(self, transform: TransformConfig) -> None:
        self.transform = transform

    def __call__(self, sample: Sample, index: int) -> Boxed | None:
        """One image, squashed as `transform` says. Raises BadImage."""
        if sample.objects is None:
            return None
        view = evaluation_view(decode(sample.image), self.transform)
        return Boxed(torch.tensor([index]), view.pixels[None], (sample.objects.boxes,))
