"""Masked patches of the same view (iBOT)."""

from dataclasses import dataclass
from typing import Literal

from foveola.config import key
from foveola.methods.method import Output
from foveola.methods.targets import TargetConfig
from foveola.methods.terms.assignment import AssignmentTerm, check_masked_ratio
from foveola.methods.terms.term import Seen, Setting


@dataclass(frozen=True)
class PatchTermConfig:
    """Masked patches of the same view. Defaults: iBOT."""

    weight: float = key(1.0, "weight of this term in the sum of losses", at_least=0)
    head: str = key("main", "name of the term's head; terms that name the same head share it")
    center: Literal["masked", "all"] = key(
        "masked", "teacher patches whose mean is the centre; iBOT's code takes all"
    )
    target: TargetConfig = key(factory=TargetConfig, help="targets and temperatures")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {} if self.target.kind == "centering" else {"center": "target.kind=sinkhorn has no centre"}


class PatchTerm(AssignmentTerm):
    """The teacher's assignment of a patch that the student does not see, predicted in its place."""

    Config, usual = PatchTermConfig, True
    help = "masked patches of the same view"
    config: PatchTermConfig

    @classmethod
    def check(cls, config: PatchTermConfig, setting: Setting) -> None:
        masking, positions, name = setting.views.masking, setting.views.position_masking, setting.name
        if masking is None:
            raise ValueError(f"method.{name} needs masked patches: set views.masking, or method.{name}=null")
        why = None
        if not masking.probability:
            why = "views.masking.probability=0.0"
        elif positions is not None and positions.share == 1:
            why = "views.position_masking.share=1.0 leaves no image for views.masking"
        check_masked_ratio(setting, masking.ratio, why)

    def forward(self, seen: Seen) -> Output:
        hidden = seen.batch.large.hidden_contents
        assert hidden is not None
        everyone = seen.teacher.large.patches.flatten(0, 1) if self.config.center == "all" else None
        return self.predict(seen, hidden, everyone)

    def rows(self, objects: int) -> float:
        views, (rows, columns) = self.setting.views, self.setting.grid
        masking, positions = views.masking, views.position_masking
        if masking is None:
            return 0.0
        left = 1.0 if positions is None else 1 - positions.share
        return views.global_count * rows * columns * left * masking.probability * sum(masking.ratio) / 2

    def check_batch(self, images: int, objects: int) -> None:
        views, name = self.setting.views, self.setting.name
        masking, count = views.masking, images * views.global_count
        if masking is not None and masking.stratified and not int(masking.probability * count):
            raise ValueError(
                f"method.{name} never sees a masked patch with {images} images at once: a larger batch_size, "
                f"a larger views.masking.probability and ratio, or method.{name}=null"
            )
