"""Images with their annotated boxes, both squashed to the unit square."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from foveola.data.sample import BadImage
from foveola.data.sources import Source, decode
from foveola.evaluation.features.reading import PARCEL
from foveola.models.transform import resize


class Parcel(NamedTuple):
    """Some images as a worker makes them."""

    images: UInt8[Tensor, "b 3 S S"]
    boxes: tuple[Float32[np.ndarray, "_ 4"], ...]
    image_indices: Int64[Tensor, "b"]
    bad: tuple[int, ...]  # images that cannot be read
    bare: int  # images without a box


class BoxedImages(Dataset):
    """Parcels of images squashed to squares, with their boxes; images without boxes are not decoded."""

    def __init__(
        self, source: Source, chosen: Int64[np.ndarray, "n"], side: int, kind: Literal["bicubic", "bilinear"]
    ) -> None:
        self.source, self.chosen, self.side = source, chosen, side
        self.kind: Literal["bicubic", "bilinear"] = kind

    def __len__(self) -> int:
        return -(-len(self.chosen) // PARCEL)

    def __getitem__(self, parcel: int) -> Parcel:
        images, boxes, image_indices, bad, bare = [], [], [], [], 0
        for index in self.chosen[parcel * PARCEL : (parcel + 1) * PARCEL].tolist():
            try:
                sample = self.source[index]
                if sample.objects is None:
                    bare += 1
                    continue
                image = resize(decode(sample.image), self.side, self.side, self.kind)
            except BadImage:
                bad.append(index)
                continue
            images.append(image)
            boxes.append(sample.objects.boxes)
            image_indices.append(index)
        none = torch.zeros(0, 3, self.side, self.side, dtype=torch.uint8)
        stacked = torch.stack(images) if images else none
        return Parcel(stacked, tuple(boxes), torch.tensor(image_indices, dtype=torch.int64), tuple(bad), bare)
