"""Masked positions of the same view (position field)."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate, pad

from foveola import distributed
from foveola.config import key
from foveola.data.shown import drawn_rgb
from foveola.methods.method import Output
from foveola.methods.targets import TargetConfig
from foveola.methods.terms.assignment import AssignmentTerm, check_masked_ratio
from foveola.methods.terms.term import Heads, Seen, Setting
from foveola.schedules import Schedule

VIEWS_KEPT = 16  # large views of a step whose patches are kept to be looked at


@dataclass(frozen=True)
class PositionTermConfig:
    """Masked positions of the same view. Defaults: the position field paper."""

    weight: float = key(1.0, "weight of this term in the sum of losses", at_least=0)
    head: str = key("positions", "name of the term's head; terms that name the same head share it")
    target: TargetConfig = key(
        factory=lambda: TargetConfig(temperature=Schedule(value=0.04)), help="targets and temperatures"
    )


class Shown(NamedTuple):
    """What is kept of the first S large views of a step, to see later where patches were taken to be.

    They may be of several parts.
    """

    student: Float[Tensor, "S N D"]
    teacher: Float[Tensor, "S N D"]
    pixels: Float[Tensor, "S ch H W"]
    unplaced: Bool[Tensor, "S N"]


class PositionTerm(AssignmentTerm):
    """The teacher's assignment of a patch, predicted by a student that sees the patch but not where it is.

    The target is of the patch with its position, so position is predicted in feature space (Section 3.3).
    """

    Config = PositionTermConfig
    help = "masked positions of the same view"
    config: PositionTermConfig

    def __init__(self, config: PositionTermConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.shown: Shown | None = None
        self.shown_heads: Heads | None = None
        self.shown_step = -1

    @classmethod
    def check(cls, config: PositionTermConfig, setting: Setting) -> None:
        masking, name = setting.views.position_masking, setting.name
        if masking is None:
            raise ValueError(
                f"method.{name} needs masked positions: set views.position_masking, or method.{name}=null"
            )
        check_masked_ratio(
            setting, masking.ratio, None if masking.share else "views.position_masking.share=0.0"
        )

    def forward(self, seen: Seen) -> Output:
        large = seen.batch.large
        assert large.hidden_positions is not None
        self.shown_heads, before = seen.heads[self.config.head], self.shown
        of_views = (
            seen.student.large.patches.detach(),
            seen.teacher.large.patches,
            large.pixels.flatten(0, 1),
            large.hidden_positions.mask.flatten(0, 1),
        )
        if before is None or self.shown_step != seen.progress.step:
            self.shown = Shown(*(each[:VIEWS_KEPT].clone() for each in of_views))
        elif room := VIEWS_KEPT - len(before.pixels):
            pairs = zip(before, of_views, strict=True)
            self.shown = Shown(*(torch.cat((old, new[:room])) for old, new in pairs))
        self.shown_step = seen.progress.step
        return self.predict(seen, large.hidden_positions)

    def rows(self, objects: int) -> float:
        views, (rows, columns) = self.setting.views, self.setting.grid
        positions = views.position_masking
        if positions is None:
            return 0.0
        return views.global_count * rows * columns * positions.share * sum(positions.ratio) / 2

    def diagnose(self) -> dict[str, float]:
        logs = super().diagnose()
        errors = torch.zeros(3)
        if (guessed := self._guessed()) is not None:
            guesses, unplaced, _ = guessed
            count = int(unplaced.sum())
            errors = torch.tensor([*position_errors(guesses, unplaced, self.setting.grid[1]), 1.0]) * count
        found, distance, count = distributed.all_reduce_sum(errors).tolist()
        return logs | ({"found": found / count, "distance": distance / count} if count else {})

    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return where patches without position are, and where they were taken to be."""
        if (guessed := self._guessed()) is None:
            return {}
        guesses, unplaced, pixels = guessed
        color = self.setting.views.color
        mean, std = (torch.tensor(c, device=pixels.device)[:, None, None] for c in (color.mean, color.std))
        return {
            "positions": guess_sheet(
                drawn_rgb(pixels * std + mean) / 255, guesses, unplaced, self.setting.grid
            )
        }

    def _guessed(self) -> tuple[Int64[Tensor, "s N"], Bool[Tensor, "s N"], Float[Tensor, "s C H W"]] | None:
        """Guessed positions, unplaced patches and pixels of those of the kept views with such patches."""
        if self.shown is None or not (affected := self.shown.unplaced.any(dim=1)).any():
            return None
        assert self.shown_heads is not None
        guesses = self.guesses(self.shown.student, self.shown.teacher, self.shown_heads)
        return guesses[affected], self.shown.unplaced[affected], self.shown.pixels[affected]

    @torch.no_grad()
    def guesses(
        self, student: Float[Tensor, "S N D"], teacher: Float[Tensor, "S N D"], heads: Heads
    ) -> Int64[Tensor, "S N"]:
        """Return, for each patch of the student's, the patch of the teacher's same view that is most like it.

        Compared as unit vectors before the prototypes. Where the student lacks the position, this is where it
        takes the patch to be.
        """
        mine, theirs = (
            head.project(x.float().flatten(0, 1)).view(*x.shape[:2], -1)
            for head, x in zip(heads, (student, teacher), strict=True)
        )
        return (mine @ theirs.mT).argmax(dim=2)


def position_errors(
    guesses: Int64[Tensor, "S N"], unplaced: Bool[Tensor, "S N"], columns: int
) -> tuple[float, float]:
    """Return (fraction found, mean distance in patches) of guessed positions of unplaced patches; NaN if
    there is none.
    """
    true = torch.arange(guesses.shape[1], device=guesses.device).expand_as(guesses)[unplaced]
    guessed = guesses[unplaced]
    rows = (true // columns - guessed // columns).float()
    distance = torch.hypot(rows, (true % columns - guessed % columns).float())
    return (true == guessed).float().mean().item(), distance.mean().item()


def guess_sheet(
    images: Float[Tensor, "S ch H W"],
    guesses: Int64[Tensor, "S N"],
    unplaced: Bool[Tensor, "S N"],
    grid: tuple[int, int],
) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Return images in [0, 1] in columns; below each where its unplaced patches are, and where they were
    guessed.

    A position is a colour: red grows to the right, green downwards, blue to the top left. Other patches are
    dark.
    """
    rows, columns = grid
    index = torch.arange(rows * columns, device=guesses.device).expand_as(guesses)
    tiles = [images]
    for positions in (index, guesses):
        y, x = (positions // columns / max(rows - 1, 1)), (positions % columns / max(columns - 1, 1))
        colors = torch.stack((x, y, 1 - (x + y) / 2), dim=1).unflatten(2, grid)
        shown = unplaced.unflatten(1, grid)[:, None]
        colors, shown = (interpolate(t.float(), images.shape[2:], mode="nearest") for t in (colors, shown))
        tiles.append(torch.where(shown > 0, colors, 0.3 * images))
    pixels = (torch.stack(tiles) * 255).round().clamp(0, 255).byte()  # [3, S, 3, H, W]
    sheet = pad(pixels, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return sheet.cpu().numpy()
