"""Feature preservation: features stay where the starting encoder has them, in direction."""

from dataclasses import dataclass
from typing import Literal

import torch

from foveola.config import key
from foveola.losses import cosine_distance
from foveola.methods.method import Output
from foveola.methods.terms.gram import cosine_to_start, visible
from foveola.methods.terms.term import Seen, Term


@dataclass(frozen=True)
class PreservationTermConfig:
    """Cosine distances of tokens and of patches to the starting encoder's."""

    token: float = key(1.0, "weight of class or object tokens in the sum of losses", at_least=0)
    patch: float = key(1.0, "weight of patches in the sum of losses", at_least=0)
    tokens: Literal["visible", "all"] = key("visible", "patches that count: those not masked, or all")

    def __post_init__(self) -> None:
        if not self.token and not self.patch:
            raise ValueError("token=0.0 and patch=0.0 keep nothing")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {} if self.patch else {"tokens": "patch=0.0: patches do not count"}


class PreservationTerm(Term):
    """1 - cos of a feature of a large view and of what the starting encoder makes of the same view.

    Student and starting encoder are told the same: masks, objects, positions.
    """

    Config = PreservationTermConfig
    help = "features stay near the starting encoder's, in direction; needs init="
    config: PreservationTermConfig

    @staticmethod
    def reads_start(config: PreservationTermConfig) -> bool:
        return True

    def forward(self, seen: Seen) -> Output:
        assert seen.start is not None
        mine, theirs = seen.student.large, seen.start.large
        tokens = cosine_distance(mine.objects, theirs.objects).mean()
        patches = cosine_distance(mine.patches, theirs.patches)
        counted = None if self.config.tokens == "all" else visible(seen)
        weights = torch.ones_like(patches) if counted is None else counted.to(patches.dtype)
        patches = (patches * weights).sum() / weights.sum().clamp(min=1)
        losses = {"token": self.config.token * tokens, "patch": self.config.patch * patches}
        logs = {
            "token_cosine": cosine_to_start(mine.objects, theirs.objects),
            "patch_cosine": cosine_to_start(mine.patches, theirs.patches),
        }
        return Output({name: loss for name, loss in losses.items() if getattr(self.config, name)}, logs)
