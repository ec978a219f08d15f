"""What protocols share that measure the head of a fine-tuned encoder on whole test images."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch

from foveola.config import UserError
from foveola.evaluation.images import (
    PARCEL,
    Batches,
    ChosenConfig,
    Images,
    choose_images,
    facts_of_bad,
    identity_for,
    slice_of_rank,
)
from foveola.evaluation.protocol import At
from foveola.models.encoder import Encoder
from foveola.tasks.task import TaskHead

H = TypeVar("H", bound=TaskHead)
B = TypeVar("B")


def head_for(encoder: Encoder, kind: type[H], protocol: str, does: str, instead: str) -> H:
    """Return the head of an encoder.

    `does` is what such heads are fine-tuned to do, `instead` what measures encoders without one. Raises
    UserError where there is no head, or one for another task.
    """
    if not isinstance(encoder.head, kind):
        what = "no head" if encoder.head is None else f"a head for {encoder.head.config.name}"
        raise UserError(
            f"{protocol} asks a head that was fine-tuned to {does}; this encoder has {what} ({instead})"
        )
    return encoder.head


class HeadImages(Generic[B]):
    """Iterates over the chosen images of the test data in batches, of each process a part of them.

    `cut` makes of a sample what is asked, as of `evaluation.images.Images`; `protocol` names the progress.
    """

    def __init__(
        self, at: At, config: ChosenConfig, cut: Callable[..., Any], protocol: str, parcel: int = PARCEL
    ) -> None:
        self.at, self.config = at, config
        self.chosen = choose_images(len(at.test), config.limit, config.seed)
        images = Images(at.test, self.chosen[slice_of_rank(len(self.chosen))], cut, parcel)
        self.batches: Batches[B] = Batches(images, config, f"{protocol} {at.test.name}", at.progress)

    def __iter__(self) -> Iterator[B]:
        return iter(self.batches)

    def reduced(self) -> AbstractContextManager:
        """Return the context of the arithmetic in which the head is asked."""
        device = self.at.encoder.device.type
        return torch.autocast(device, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def facts(self) -> dict[str, Any]:
        """Return which images were asked for, and which of them no process could read; after the last batch.

        Raises UserError where these are too many. All processes call it.
        """
        bad = facts_of_bad(self.batches.gathered_bad(), len(self.chosen), self.at.test)
        digest = identity_for(self.at.test, self.config).digest
        return {"name": self.at.test.name, "fingerprint": digest, **bad, "images": len(self.chosen)}
