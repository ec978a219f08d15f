"""What a term of a distillation loss is: its keys, its loss, its state, and what it shows of itself.

A term sees what student and teacher made of a batch, their heads, and nothing of other terms. A new one is a
file with a configuration and a `Term`, and a line in `TERMS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import nn

from foveola.methods.method import Output
from foveola.models.heads import HeadConfig, ProjectionHead
from foveola.models.vit import Features, VisionTransformer, ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, ViewsConfig


class Heads(NamedTuple):
    """The two heads of one name."""

    student: ProjectionHead
    teacher: ProjectionHead


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a backbone made of the views of a batch: after its final norm, before any head.

    Features of C = B * V views, in the order of [B, V].
    """

    large: Features
    small: Features | None = None  # only the student sees them


@dataclass(frozen=True, eq=False)
class Seen:
    """What there is to compare in a step: tokens of the student, which learns, of the teacher, and more."""

    batch: Batch
    student: Tokens
    teacher: Tokens  # without gradient
    heads: Mapping[str, Heads]
    progress: Progress
    backbone: VisionTransformer  # the teacher's, for a term that keeps a copy of an earlier one
    # Of the starting weights, told of views what the student is told, without gradient; None unless a term
    # reads them (`Term.reads_start`).
    start: Tokens | None = None


@dataclass(frozen=True)
class Setting:
    """What a term is checked and built for."""

    name: str  # its key: method.NAME
    heads: Mapping[str, HeadConfig]
    views: ViewsConfig
    model: ViTConfig

    @property
    def image_token(self) -> bool:
        """Whether the last object token of each view reads all of it (`views.objects.image_token`)."""
        return self.views.objects is not None and self.views.objects.image_token

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of a large view."""
        side = self.views.global_size // self.model.patch_size
        return side, side


class Term(nn.Module, ABC):
    """One named part of a distillation loss. What a term lacks of these methods stays as it is here."""

    Config: ClassVar[type]  # a frozen dataclass of its keys
    help: ClassVar[str]  # what it is, in a line
    usual: ClassVar[bool] = False  # whether it is there unless a recipe sets its key to null

    def __init__(self, config: Any, setting: Setting) -> None:
        super().__init__()
        self.config, self.setting = config, setting

    @staticmethod
    def heads(config: Any) -> Collection[str]:
        """Return names of the heads that it projects tokens with."""
        return ()

    @staticmethod
    def reads_image_token(config: Any) -> bool:
        """Return whether it is about the token of the whole image, which `views.objects.image_token` adds."""
        return False

    @staticmethod
    def reads_start(config: Any) -> bool:
        """Return whether it compares with what the starting weights make of the large views: `Seen.start`."""
        return False

    @classmethod
    def check(cls, config: Any, setting: Setting) -> None:
        """Raise ValueError where views or network cannot serve it; called before anything is built."""

    @abstractmethod
    def forward(self, seen: Seen) -> Output:
        """Return its losses, weighted, and what to log; a loss of the name "loss" is logged by the term's
        name.
        """

    def step(self) -> None:
        """Update what follows the student, such as centres; called after each step of the optimizer."""

    def diagnose(self) -> dict[str, float]:
        """Return further numbers of all processes, each of which calls it when a step is logged."""
        return {}

    def gather(self) -> None:
        """Bring to the main process what each has of its own, as `Method.gather` does."""

    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return images of the last step that are worth a look, by name; called with each checkpoint."""
        return {}

    def prototypes(self) -> int:
        """Return prototypes behind its targets; 0 if its targets are no assignments."""
        return 0

    def check_batch(self, images: int, objects: int) -> None:
        """Raise ValueError where it has nothing to compare in the `images` that a process takes at once.

        `objects` of each image are trained on.
        """

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        """Return what is unwise about its configuration, one line each; arguments as of `Method.advice`."""
        return []
