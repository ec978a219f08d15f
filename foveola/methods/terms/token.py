"""Object or class tokens across views (DINO, ODIS)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from foveola.config import key
from foveola.cross_entropy import PrototypeWeights
from foveola.losses import cross_view_loss
from foveola.methods.method import Output
from foveola.methods.targets import TargetConfig, TeacherTargets
from foveola.methods.terms.assignment import AssignmentTerm
from foveola.methods.terms.term import Seen, Setting
from foveola.views.objects import object_weights


@dataclass(frozen=True)
class TokenTermConfig:
    """Object or class tokens across views. Defaults: DINO and iBOT."""

    weight: float = key(1.0, "weight of this term in the sum of losses", at_least=0)
    head: str = key("main", "name of the term's head; terms that name the same head share it")
    token: Literal["object", "image"] = key(
        "object", "tokens of the term: the objects', or views.objects.image_token's"
    )
    weight_by: Literal["area", "score"] | None = key(
        None,
        "weight of each of several objects of an image: its area, or its score; null = equal weights",
    )
    target: TargetConfig = key(factory=TargetConfig, help="targets and temperatures")


class TokenTerm(AssignmentTerm):
    """The teacher's assignment of an object in one view, predicted by the student from each other view."""

    Config, usual = TokenTermConfig, True
    help = "object or class tokens across views"
    config: TokenTermConfig

    @staticmethod
    def reads_image_token(config: TokenTermConfig) -> bool:
        return config.token == "image"

    @classmethod
    def check(cls, config: TokenTermConfig, setting: Setting) -> None:
        if setting.views.global_count + setting.views.local_count < 2:
            raise ValueError(
                "token terms compare different views: views.global_count + views.local_count must be >= 2"
            )
        objects = setting.views.objects
        if config.weight_by is not None and (
            config.token == "image" or objects is None or not objects.attention
        ):
            raise ValueError(
                f"method.{setting.name}.weight_by={config.weight_by}: needs tokens of several objects: "
                "token=object, views.objects.attention=true"
            )

    def forward(self, seen: Seen) -> Output:
        student, teacher = seen.heads[self.config.head]
        views = seen.batch.large.pixels.shape[:2]
        mine = self._select(seen.student.large.objects.unflatten(0, views), self.setting.image_token)
        if seen.student.small is not None and seen.batch.small is not None:
            local = seen.student.small.objects.unflatten(0, seen.batch.small.pixels.shape[:2])
            local = self._select(local, self.setting.image_token and local.shape[2] > 1)
            mine = torch.cat((mine, local.expand(-1, -1, mine.shape[2], -1)), dim=1)
        theirs = self._select(seen.teacher.large.objects.unflatten(0, views), self.setting.image_token)
        # [B, V, M, D] -> [B * M, V, D]: each object of an image has its own pairs of views.
        mine, theirs = (t.transpose(1, 2).flatten(0, 1) for t in (mine, theirs))
        with torch.no_grad():
            features = teacher.project(theirs.flatten(0, 1))
        predictions = student.project(mine.flatten(0, 1)).unflatten(0, mine.shape[:2])
        temperature = self.config.target.student_temperature
        image_weights = None
        if self.config.weight_by is not None:
            assert seen.batch.chosen is not None  # the loader gives it wherever there are objects
            image_weights = object_weights(seen.batch.chosen, self.config.weight_by).flatten()

        def compare(targets: TeacherTargets, predicted: Tensor, prototypes: PrototypeWeights) -> Tensor:
            return cross_view_loss(targets, predicted, temperature, prototypes, image_weights)

        return self.compared(seen, features, predictions, compare)

    def _select(self, tokens: Float[Tensor, "B V M D"], image_token: bool) -> Float[Tensor, "B V M2 D"]:
        if not image_token:
            return tokens
        return tokens[:, :, -1:] if self.config.token == "image" else tokens[:, :, :-1]

    def rows(self, objects: int) -> float:
        return self.setting.views.global_count * (objects if self.config.token == "object" else 1)


class ImageTerm(TokenTerm):
    """A second token term, about the token of the whole image beside those of objects."""

    usual = False
    help = "a second token term, for views.objects.image_token (ODIS Table 5)"

    @classmethod
    def check(cls, config: TokenTermConfig, setting: Setting) -> None:
        if config.token != "image":
            raise ValueError(
                f"method.{setting.name}.token must be 'image': the object tokens have the term 'token'"
            )
        super().check(config, setting)
