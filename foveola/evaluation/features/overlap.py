"""Images that are in train and in test: found by their contents; refused, left out, or said."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from foveola.config import UserError
from foveola.data.identity import identity_of, shared
from foveola.data.sources import WITHOUT_HALVES, Source
from foveola.evaluation.images import choose_images

POLICIES = ("refuse", "drop", "allow")  # what to do with them
SPLIT = [f"{kind}:" for kind in WITHOUT_HALVES]  # data strings that take holdout=
IMAGES_NAMED = 3  # images named in a message


@dataclass(frozen=True, eq=False)
class Overlap:
    """Which of the test images that a protocol reads are among its training images, byte for byte."""

    test: Source
    chosen: Int64[np.ndarray, "n"]  # the test images that are read
    found: Bool[np.ndarray, "n"]

    @property
    def count(self) -> int:
        return int(self.found.sum())

    def __str__(self) -> str:
        first = self.chosen[self.found][:IMAGES_NAMED].tolist()
        names = ", ".join(self.test[index].name for index in first) + ", ..." * (self.count > len(first))
        return f"{self.count} of {len(self.found)} test images are in train as well (such as {names})"


def overlap_of(train: Source, test: Source, limit: int | None, seed: int) -> Overlap:
    """Return what both hold of the images that a protocol with these settings reads."""
    learned = identity_of(train, choose_images(len(train), limit, seed))
    chosen = choose_images(len(test), limit, seed)
    return Overlap(test, chosen, shared(identity_of(test, chosen).contents, learned.contents))


def separate(
    name: str, config: Any, train: Source, test: Source, policy: str = "refuse", otherwise: str = ""
) -> tuple[Source, tuple[str, ...]]:
    """Return `test` as the protocol `name` may measure it, and notes on images that train holds as well.

    "refuse": raises UserError where there are such images; "drop": `test` without them; "allow": all of it.
    With `config.exclude_self` (k-NN) they stay: the rows of such an image do not vote on it, which needs that
    there is one. `otherwise`: remedies to name in the error instead of the usual ones.
    """
    overlap = overlap_of(train, test, getattr(config, "limit", None), getattr(config, "seed", 0))
    excluding = getattr(config, "exclude_self", None)
    if excluding and not overlap.count:
        raise UserError("exclude_self=true does nothing here: no test image is in train; leave it out")
    if not overlap.count:
        return test, ()
    if excluding:
        return test, (f"exclude_self: {overlap}; each was classified without its own rows",)
    if policy == "allow":
        return test, (f"overlap=allow: {overlap}: numbers are higher than on images never seen",)
    if policy == "refuse":
        own = "exclude_self=true leaves an image's own rows out of the vote, " if excluding is False else ""
        usual = f"{own}overlap=drop measures without them{_halves(train.name, test.name)}"
        raise UserError(f"{name}: {overlap}: {otherwise or usual}")
    if overlap.count == len(overlap.found):
        raise UserError(f"{name}: {overlap}: overlap=drop leaves nothing to measure")
    note = f"overlap=drop: {overlap}; they are left out"
    return _part(test, overlap.chosen[~overlap.found]), (note,)


def _halves(train: str, test: str) -> str:
    """What `holdout=` can do against an overlap of two data strings: only halves of one folder are apart."""
    if not test.startswith(tuple(SPLIT)) or train.partition("?")[0] != test.partition("?")[0]:
        return ""
    if "holdout=" in train and "holdout=" in test:
        return ", the same holdout= and seed= in both data strings keeps the halves apart"
    return ", holdout=0.2 in both data strings splits one"


def _part(source: Any, indices: Int64[np.ndarray, "n"]) -> Source:
    if not hasattr(source, "keep"):
        raise UserError(
            f"overlap=drop: {source.name} has no method keep(indices); leave its images out there"
        )
    part = copy.copy(source)
    part.keep(indices)
    return part


def content_groups(
    train: Source, test: Source, config: Any, trained: Int64[Tensor, "n"], tested: Int64[Tensor, "m"]
) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "m"]]:
    """Return numbers of the images of two tables (`trained`, `tested`: their indices), equal where contents
    are.
    """
    contents = []
    for source, images in ((train, trained), (test, tested)):
        chosen = choose_images(len(source), config.limit, config.seed)
        contents.append(identity_of(source, chosen).contents[np.searchsorted(chosen, images.numpy())])
    numbers = torch.from_numpy(np.unique(np.concatenate(contents), return_inverse=True)[1])
    return numbers[: len(trained)], numbers[len(trained) :]
