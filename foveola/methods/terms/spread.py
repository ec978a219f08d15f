"""KoLeo: features of different images are kept apart (DINOv2)."""

from dataclasses import dataclass

import torch

from foveola.config import key
from foveola.losses import koleo_loss
from foveola.methods.method import Output
from foveola.methods.terms.term import Seen, Term


@dataclass(frozen=True)
class SpreadTermConfig:
    """KoLeo on the student's object tokens before the head. Defaults: DINOv2."""

    weight: float = key(0.1, "weight of this term in the sum of losses", at_least=0)


class SpreadTerm(Term):
    """Keeps the features of different images apart: KoLeo for each large view on its own, summed."""

    Config = SpreadTermConfig
    help = "KoLeo"
    config: SpreadTermConfig

    def forward(self, seen: Seen) -> Output:
        objects = seen.student.large.objects.unflatten(0, seen.batch.large.pixels.shape[:2])
        if self.setting.image_token:
            objects = objects[:, :, :-1]
        loss = torch.stack([koleo_loss(view.flatten(0, 1)) for view in objects.unbind(dim=1)]).sum()
        return Output({"loss": self.config.weight * loss})

    def check_batch(self, images: int, objects: int) -> None:
        if images * objects < 2:
            name = self.setting.name
            raise ValueError(
                f"method.{name} (KoLeo) compares the images that a process takes at once, which is one here: "
                f"a larger batch_size, a smaller accumulate, or method.{name}=null"
            )
