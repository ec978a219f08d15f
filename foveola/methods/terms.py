"""The terms of a distillation loss. Each owns its configuration, targets and loss, and knows no other term.

A term sees what student and teacher made of a batch (`Tokens`), their heads, and nothing else. Heads are
named, so that two terms may share one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from foveola.config import key
from foveola.cross_entropy import PrototypeWeights
from foveola.losses import cross_view_loss, koleo_loss, masked_patch_loss
from foveola.methods.method import Output
from foveola.methods.targets import TargetConfig, Targets
from foveola.models.heads import ProjectionHead
from foveola.schedules import Progress, Schedule


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a backbone made of the views of B pictures; post-norm, before any head."""

    objects: Float[Tensor, "B V M D"]  # object tokens of global views
    local_objects: Float[Tensor, "B L M2 D"] | None  # M2 = 1 where local views are read as a whole
    masked_patches: (
        Float[Tensor, "P D"] | None
    )  # patches that the student does not see, row-major in [B, V, N]
    patches: Float[Tensor, "n D"] | None = None  # all patches, where a term asks for them
    unplaced_patches: Float[Tensor, "U D"] | None = None  # patches of which the student lacks the position
    looked_at: Float[Tensor, "S N D"] | None = None  # all patches of the first views, without gradient


@dataclass(frozen=True)
class TokenTermConfig:
    """Object or class tokens across views. Defaults: DINO and iBOT."""

    weight: float = key(1.0, "of this term in the sum", at_least=0)
    head: str = key("main", "name of its head; terms that name the same one share it")
    token: Literal["object", "image"] = key(
        "object", "which tokens: the objects', or views.objects.image_token's"
    )
    target: TargetConfig = key(factory=TargetConfig, help="targets and temperatures")


class TokenTerm(nn.Module):
    """The teacher's assignment of an object in one view, predicted by the student from each other view."""

    def __init__(self, config: TokenTermConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = Targets(config.target, prototypes)

    def forward(
        self,
        student: Tokens,
        teacher: Tokens,
        student_head: ProjectionHead,
        teacher_head: ProjectionHead,
        image_token: bool,
        progress: Progress,
    ) -> Output:
        mine = self._select(student.objects, image_token)
        if student.local_objects is not None:
            local = student.local_objects
            local = self._select(local, image_token and local.shape[2] > 1)
            mine = torch.cat((mine, local.expand(-1, -1, mine.shape[2], -1)), dim=1)
        theirs = self._select(teacher.objects, image_token)
        # [B, V, M, D] -> [B * M, V, D]: each object of a picture has its own pairs of views.
        mine, theirs = (t.transpose(1, 2).flatten(0, 1) for t in (mine, theirs))
        with torch.no_grad():
            features = teacher_head.project(theirs.flatten(0, 1))
            targets = self.targets(features, _prototypes(teacher_head), progress)
        predictions = student_head.project(mine.flatten(0, 1)).unflatten(0, mine.shape[:2])
        temperature = self.config.target.student_temperature
        loss = cross_view_loss(targets, predictions, temperature, _prototypes(student_head))
        return Output({"loss": self.config.weight * loss}, targets.logs())

    def _select(self, tokens: Float[Tensor, "B V M D"], image_token: bool) -> Float[Tensor, "B V M2 D"]:
        if not image_token:
            return tokens
        return tokens[:, :, -1:] if self.config.token == "image" else tokens[:, :, :-1]


@dataclass(frozen=True)
class PatchTermConfig:
    """Masked patches of the same view. Defaults: iBOT."""

    weight: float = key(1.0, "of this term in the sum", at_least=0)
    head: str = key("main", "name of its head; terms that name the same one share it")
    center: Literal["masked", "all"] = key(
        "masked", "teacher patches whose mean is the centre; iBOT's code takes all"
    )
    target: TargetConfig = key(factory=TargetConfig, help="targets and temperatures")

    def unread(self) -> dict[str, str]:
        """Keys that nothing reads with these settings, and why."""
        return {} if self.target.kind == "centering" else {"center": "target.kind=sinkhorn has no centre"}


class PatchTerm(nn.Module):
    """The teacher's assignment of a patch that the student does not see, predicted in its place."""

    def __init__(self, config: PatchTermConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = Targets(config.target, prototypes)

    def forward(
        self,
        student: Tokens,
        teacher: Tokens,
        student_head: ProjectionHead,
        teacher_head: ProjectionHead,
        weights: Float[Tensor, "P"],
        progress: Progress,
    ) -> Output:
        assert student.masked_patches is not None
        assert teacher.masked_patches is not None
        return _patches(
            self.config.weight,
            self.targets,
            student_head,
            teacher_head,
            student.masked_patches,
            teacher.masked_patches,
            weights,
            progress,
            everyone=teacher.patches,
        )


def _patches(
    weight: float,
    target: Targets,
    student_head: ProjectionHead,
    teacher_head: ProjectionHead,
    mine: Float[Tensor, "n D"],
    theirs: Float[Tensor, "n D"],
    weights: Float[Tensor, "n"],
    progress: Progress,
    everyone: Float[Tensor, "m D"] | None = None,
) -> Output:
    """The teacher's assignment of each patch, predicted by the student's patch in its place."""
    with torch.no_grad():
        centred = None if everyone is None else teacher_head.project(everyone)
        targets = target(teacher_head.project(theirs), _prototypes(teacher_head), progress, centred)
    predictions, temperature = student_head.project(mine), target.config.student_temperature
    loss = masked_patch_loss(targets, predictions, weights, temperature, _prototypes(student_head))
    return Output({"loss": weight * loss}, targets.logs())


def _prototypes(head: ProjectionHead) -> PrototypeWeights:
    return head.last_layer.v, head.last_layer.g


@dataclass(frozen=True)
class PositionTermConfig:
    """Masked positions of the same view. Defaults: the position field paper."""

    weight: float = key(1.0, "of this term in the sum", at_least=0)
    head: str = key("positions", "name of its head; terms that name the same one share it")
    target: TargetConfig = key(
        factory=lambda: TargetConfig(temperature=Schedule(value=0.04)), help="targets and temperatures"
    )


class PositionTerm(nn.Module):
    """The teacher's assignment of a patch, predicted by a student that sees the patch but not where it is.

    The target is of the patch with its position, so position is predicted in feature space (Section 3.3).
    """

    def __init__(self, config: PositionTermConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.targets = Targets(config.target, prototypes)

    def forward(
        self,
        student: Tokens,
        teacher: Tokens,
        student_head: ProjectionHead,
        teacher_head: ProjectionHead,
        weights: Float[Tensor, "U"],
        progress: Progress,
    ) -> Output:
        assert student.unplaced_patches is not None
        assert teacher.unplaced_patches is not None
        return _patches(
            self.config.weight,
            self.targets,
            student_head,
            teacher_head,
            student.unplaced_patches,
            teacher.unplaced_patches,
            weights,
            progress,
        )

    @torch.no_grad()
    def guesses(
        self,
        student: Float[Tensor, "S N D"],
        teacher: Float[Tensor, "S N D"],
        student_head: ProjectionHead,
        teacher_head: ProjectionHead,
    ) -> Int64[Tensor, "S N"]:
        """For each patch of the student's the patch of the teacher's same view that is most like it.

        Compared as unit vectors before the prototypes. Where the student lacks the position, this is where it
        takes the patch to be.
        """
        mine, theirs = (
            head.project(x.float().flatten(0, 1)).view(*x.shape[:2], -1)
            for head, x in ((student_head, student), (teacher_head, teacher))
        )
        return (mine @ theirs.mT).argmax(dim=2)


def errors_of_places(
    guesses: Int64[Tensor, "S N"], unplaced: Bool[Tensor, "S N"], columns: int
) -> tuple[float, float]:
    """(share found, mean distance in patches) of guessed places of unplaced patches; NaN if there is none."""
    true = torch.arange(guesses.shape[1], device=guesses.device).expand_as(guesses)[unplaced]
    guessed = guesses[unplaced]
    rows = (true // columns - guessed // columns).float()
    distance = torch.hypot(rows, (true % columns - guessed % columns).float())
    return (true == guessed).float().mean().item(), distance.mean().item()


def sheet_of_places(
    pictures: Float[Tensor, "S 3 H W"],
    guesses: Int64[Tensor, "S N"],
    unplaced: Bool[Tensor, "S N"],
    grid: tuple[int, int],
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Pictures in [0, 1] in columns; below each where its unplaced patches are, and where they were guessed.

    A place is a colour: red grows to the right, green downwards, blue to the top left. Other patches are
    dark.
    """
    rows, columns = grid
    index = torch.arange(rows * columns, device=guesses.device).expand_as(guesses)
    tiles = [pictures]
    for places in (index, guesses):
        y, x = (places // columns / max(rows - 1, 1)), (places % columns / max(columns - 1, 1))
        colors = torch.stack((x, y, 1 - (x + y) / 2), dim=1).unflatten(2, grid)
        shown = unplaced.unflatten(1, grid)[:, None]
        colors, shown = (interpolate(t.float(), pictures.shape[2:], mode="nearest") for t in (colors, shown))
        tiles.append(torch.where(shown > 0, colors, 0.3 * pictures))
    pixels = (torch.stack(tiles) * 255).round().clamp(0, 255).byte()  # [3, S, 3, H, W]
    sheet = pad(pixels, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return sheet.cpu().numpy()


@dataclass(frozen=True)
class SpreadTermConfig:
    """KoLeo on the student's object tokens before the head. Defaults: DINOv2."""

    weight: float = key(0.1, "of this term in the sum", at_least=0)


class SpreadTerm(nn.Module):
    """Keeps the features of different pictures apart: KoLeo for each global view on its own, summed."""

    def __init__(self, config: SpreadTermConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, student: Tokens, image_token: bool) -> Output:
        objects = student.objects[:, :, :-1] if image_token else student.objects
        views = objects.unbind(dim=1)
        loss = torch.stack([koleo_loss(view.flatten(0, 1)) for view in views]).sum()
        return Output({"loss": self.config.weight * loss})
