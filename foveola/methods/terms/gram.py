"""Gram anchoring: which patches of a view are alike stays as in the starting encoder (DINOv3)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from foveola.config import key
from foveola.losses import cosine_distance, gram_loss
from foveola.methods.method import Output
from foveola.methods.terms.term import Seen, Setting, Term


@dataclass(frozen=True)
class GramTermConfig:
    """Cosines of all pairs of patches. Defaults: DINOv3's weight."""

    weight: float = key(2.0, "weight of this term in the sum of losses", at_least=0)
    tokens: Literal["visible", "all"] = key(
        "visible", "patches that count: those not masked, or all (DINOv3)"
    )


class GramTerm(Term):
    """Cosines between the patches of a large view, held where the starting encoder has them.

    Features may move as long as they move together: what is asked for is which patches are alike.
    """

    Config = GramTermConfig
    help = "patches stay as alike as in the starting encoder (Gram anchoring); needs init="
    config: GramTermConfig

    @staticmethod
    def reads_start(config: GramTermConfig) -> bool:
        return True

    @classmethod
    def check(cls, config: GramTermConfig, setting: Setting) -> None:
        if setting.grid == (1, 1):
            raise ValueError(f"method.{setting.name} compares patches of large views, and they have one")

    def forward(self, seen: Seen) -> Output:
        assert seen.start is not None
        mine, theirs = seen.student.large.patches, seen.start.large.patches
        counted = None if self.config.tokens == "all" else visible(seen)
        loss = gram_loss(mine, theirs, counted)
        return Output({"loss": self.config.weight * loss}, {"cosine": cosine_to_start(mine, theirs)})


def visible(seen: Seen) -> Bool[Tensor, "C N"] | None:
    """Return which patches of large views the student sees the contents of; None: all."""
    hidden = seen.batch.large.hidden_contents
    return None if hidden is None else ~hidden.mask.flatten(0, 1)


@torch.no_grad()
def cosine_to_start(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean cosine of features to those that the starting encoder has in their place."""
    return 1 - cosine_distance(mine, theirs).mean()
