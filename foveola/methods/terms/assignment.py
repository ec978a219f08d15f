"""What terms have in common whose targets are a teacher's assignments of tokens to prototypes."""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveola.cross_entropy import PrototypeWeights
from foveola.losses import mask_weights, masked_patch_loss
from foveola.methods.method import Output
from foveola.methods.targets import Targets, TeacherTargets
from foveola.methods.terms.term import Seen, Setting, Term
from foveola.views.batch import Hidden


class AssignmentTerm(Term):
    """The student's head predicts which prototypes the teacher's head assigns to a token.

    Its configuration has `weight`, `head` and `target`.
    """

    def __init__(self, config: Any, setting: Setting) -> None:
        super().__init__(config, setting)
        self.targets = Targets(config.target, setting.heads[config.head].prototypes)

    @staticmethod
    def heads(config: Any) -> Collection[str]:
        return (config.head,)

    def step(self) -> None:
        self.targets.step()

    def gather(self) -> None:
        self.targets.gather()

    def diagnose(self) -> dict[str, float]:
        return {"prototypes_used": self.targets.prototypes_used()}

    def prototypes(self) -> int:
        return self.setting.heads[self.config.head].prototypes

    @abstractmethod
    def rows(self, objects: int) -> float:
        """Return rows of targets that an image of so many objects gives, on average."""

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        count, name = self.prototypes(), self.setting.name
        where, rows = f"method.heads.{self.config.head}.prototypes", round(batch_size * self.rows(objects))
        if self.config.target.kind == "sinkhorn" and 0 < rows < count:
            least, most = math.log(count / rows), math.log(count)
            return [
                f"targets of {name} stay flat: Sinkhorn-Knopp shares out {count:,} prototypes among "
                f"about {rows:,} rows at once, so the entropy cannot fall below about {least:.2f} of "
                f"{most:.2f} nats; use a larger batch or {where}={2 ** (rows.bit_length() - 1)} or less"
            ]
        if images is not None and count > images:
            fewer = max(2 ** (max(images // 10, 1).bit_length() - 1), 2)
            return [
                f"targets of {name} may stay flat: {count:,} prototypes are more than the {images:,} "
                f"images (published recipes have at least 6 images for each); for example {where}={fewer}"
            ]
        return []

    def predict(self, seen: Seen, hidden: Hidden, everyone: Float[Tensor, "m D"] | None = None) -> Output:
        """Compare the teacher's assignments of the hidden patches of large views with those predicted
        in their place.

        Each view weighs the same, whatever it hides. The centre learns from `everyone`, if given.
        """
        mine, theirs = seen.heads[self.config.head]
        students, teachers = (
            tokens.large.patches.flatten(0, 1).index_select(0, hidden.indices)
            for tokens in (seen.student, seen.teacher)
        )
        weights = mask_weights(hidden.mask.flatten(0, 1), hidden.indices)
        with torch.no_grad():
            centred = None if everyone is None else theirs.project(everyone)
            features = theirs.project(teachers)
        temperature = self.config.target.student_temperature

        def compare(targets: TeacherTargets, predictions: Tensor, prototypes: PrototypeWeights) -> Tensor:
            return masked_patch_loss(targets, predictions, weights, temperature, prototypes)

        return self.compared(seen, features, mine.project(students), compare, centred)

    def compared(
        self,
        seen: Seen,
        features: Float[Tensor, "n P"],
        predictions: Float[Tensor, "*m P"],
        compare: Callable[[TeacherTargets, Tensor, PrototypeWeights], Tensor],
        everyone: Float[Tensor, "e P"] | None = None,
    ) -> Output:
        """Return the loss by `compare` of the targets that the teacher's prototypes make of its features, of
        predictions, and of the student's prototypes; both prototypes are whole meanwhile.

        The centre learns from `everyone`, if given. Features and predictions are projected.
        """
        student, teacher = (head.last_layer for head in seen.heads[self.config.head])
        found: list[Output] = []

        def with_teacher(*theirs: Tensor) -> Tensor:
            targets = self.targets(features, theirs, seen.progress, everyone)

            def with_student(v: Tensor, g: Tensor, predicted: Tensor) -> Tensor:
                return compare(targets, predicted, (v, g))

            loss = student.lend(with_student, predictions)
            found.append(Output({"loss": self.config.weight * loss}, targets.logs()))
            return loss.detach()  # nothing of the teacher's is needed again for a gradient

        teacher.lend(with_teacher)
        return found[0]


def check_masked_ratio(setting: Setting, ratio: tuple[float, float], why: str | None) -> None:
    """Raise ValueError where no patch is ever hidden: for the reason `why`, or as `ratio` is too small."""
    name, patches = setting.name, setting.grid[0] * setting.grid[1]
    if ratio[1] * patches < 1:
        why = f"a ratio of at most {ratio[1]} of {patches} patches is less than one"
    if why is not None:
        raise ValueError(f"method.{name} never sees a masked patch: {why}; or method.{name}=null")
