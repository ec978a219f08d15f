"""I-JEPA: predict what the teacher makes of blocks of the image from a context that lies around them.

The student encodes the context; a narrow predictor tells the features of each block apart from the others.
The teacher, the student's moving average, encodes the whole image. There are no augmented views, no class
token and no clusters: nothing but the teacher's slowness keeps features from collapsing.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import layer_norm, mse_loss
from torch.nn.init import trunc_normal_, zeros_

from foveola.config import key
from foveola.logged import root_of_variance
from foveola.losses import huber_loss
from foveola.methods.method import (
    Method,
    MethodConfig,
    Output,
    check_single_view,
    ema_update,
    freeze,
)
from foveola.models.blocks import initialise
from foveola.models.positions import take_rows
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.starting import StartingWeights
from foveola.models.vit import Inputs, VisionTransformer, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, ViewsConfig

FAST_MOMENTUM = 0.9  # a momentum below which the teacher is the student of some steps ago


@dataclass(frozen=True)
class IJepaConfig(MethodConfig):
    """Settings of I-JEPA. The defaults are those of its ViT-B."""

    name: Literal["ijepa"] = key("ijepa", "which method this is")
    predictor: PredictorConfig = key(
        factory=lambda: PredictorConfig(kind="self", width=384, depth=6, heads=12, drop_path=0.0),
        help="from the context to the blocks",
    )
    loss: Literal["huber", "squared"] = key("huber", "error of features: the code's, or the paper's")
    momentum: Schedule = key(
        factory=lambda: Schedule(value=0.996, end=1.0, shape="linear"),
        help="EMA of the teacher",
        at_least=0,
        at_most=1,
    )

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the method."""
        self.predictor.network(model)
        if views.blocks is None and views.dropping is None:
            raise ValueError(
                "method.name=ijepa needs blocks to predict: set views.blocks (or views.dropping)"
            )
        check_single_view(self.name, views)

    @property
    def pool(self) -> Literal["average"]:
        """The mean patch."""
        return "average"


class Student(nn.Module):
    """Encoder, predictor, and the linear map to the encoder's width."""

    def __init__(self, config: PredictorConfig, model: ViTConfig) -> None:
        super().__init__()
        self.backbone = VisionTransformer(model)
        # Never used: data-parallel training would wait for its gradient.
        self.backbone.mask_token.requires_grad_(False)
        if model.init == "normal":  # the official code draws the patch embedding as its linear layers
            patches = self.backbone.patch_embed.proj
            trunc_normal_(patches.weight, std=0.02)
            if patches.bias is not None:
                zeros_(patches.bias)
        self.predictor = Predictor(config, model)
        self.head = nn.Linear(self.predictor.width, model.shape[0])
        initialise(self.head, model.init)

    def forward(
        self,
        images: Float[Tensor, "B ch H W"],
        keep: Int64[Tensor, "B K"],
        wanted: Int64[Tensor, "B Q"],
        groups: int,
    ) -> Float[Tensor, "B Q D"]:
        """Return features of the wanted patches, which are `groups` blocks of equal size."""
        return self.head(self.predictor(self.backbone(images, Inputs(kept=keep)), wanted, keep, groups))


class IJepa(Method):
    """Student and teacher."""

    Config = IJepaConfig

    def __init__(self, config: IJepaConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Student(config.predictor, model)
        self.teacher = freeze(deepcopy(self.student.backbone))
        self.groups = 1 if views.blocks is None else views.blocks.targets

    def train(self, mode: bool = True) -> "IJepa":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, keep, wanted = batch.large.selected()
        with torch.no_grad():
            patches = self.teacher(images).patches.float()
            targets = take_rows(layer_norm(patches, patches.shape[-1:]), wanted)
        predictions = self.student(images, keep, wanted, self.groups)
        if self.config.loss == "huber":
            loss = huber_loss(predictions, targets)
        else:
            loss = mse_loss(predictions.float(), targets)
        # Deviations of the teacher's patches before the LayerNorm that makes targets of them: over all
        # patches, and over images at one position; there, features that tell only the position have none.
        overall, content = root_of_variance(patches.flatten(0, 1)), root_of_variance(patches)
        logs = {"targets/std": overall, "targets/content_std": content, **batch.facts}
        return Output({"prediction": loss}, logs, patches.mean(dim=1))

    @torch.no_grad()
    def after_step(self, progress: Progress, lr: float) -> dict[str, float]:
        momentum = self.config.momentum.at(progress)
        ema_update(self.teacher, self.student.backbone, momentum)
        return {"momentum": momentum}

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        momentum = self.config.momentum.value
        if momentum >= FAST_MOMENTUM:
            return []
        return [
            f"method.momentum.value={momentum}: nothing but a slow teacher keeps the features of I-JEPA from "
            "collapsing, and this one follows the student at once; the published one is 0.996"
        ]

    @property
    def backbone(self) -> VisionTransformer:
        return self.teacher

    def trained(self) -> Iterable[VisionTransformer]:
        return (self.student.backbone, self.teacher)

    def start_from(self, start: StartingWeights) -> None:
        super().start_from(start)
        start.move("predictor", self.student.predictor)
        start.move("head", self.student.head)

    def networks(self) -> dict[str, nn.Module]:
        student = self.student
        return {"encoder": student.backbone, "predictor": student.predictor, "head": student.head}
