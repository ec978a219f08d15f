"""Which objects of each image of a batch are trained on, and their masks, filled image by image."""

import numpy as np
import torch

from foveola.data.sample import Chosen, ObjectChoice, Objects


class ObjectRows:
    """The M objects of each of B images; those of an image that is not filled are the image as a whole.

    `masks` [B, M, size, size] are covered fractions times 255, `whole` and `labels` are [B, M].
    """

    def __init__(self, images: int, objects: int, size: int) -> None:
        shape = images, objects
        self.masks = torch.full((*shape, size, size), 255, dtype=torch.uint8)
        self.whole = torch.ones(shape, dtype=torch.bool)
        self.labels = torch.full(shape, -1)
        self.chosen = Chosen(torch.zeros(shape, dtype=torch.int64), torch.ones(shape), torch.ones(shape))

    def fill(self, row: int, objects: Objects, rng: np.random.Generator, by: ObjectChoice) -> None:
        """Draw the objects of an image and their masks."""
        count, size = self.masks.shape[1:3]
        drawn = objects.choose(rng, count, by)
        masks = [objects.draw(int(index), size) for index in drawn]
        self.masks[row] = torch.from_numpy(np.stack(masks))
        self.whole[row] = False
        if objects.labels is not None:
            self.labels[row] = torch.from_numpy(objects.labels[drawn])
        self.chosen.which[row] = torch.from_numpy(drawn)
        self.chosen.areas[row] = torch.from_numpy(objects.areas[drawn])
        if objects.scores is not None:
            self.chosen.scores[row] = torch.from_numpy(objects.scores[drawn])
