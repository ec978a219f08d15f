"""CAPI: predict the teacher's cluster assignments of patches that the student never got.

The student encodes a part of the image; a predictor asks it for some of the other patches. The teacher, its
moving average, encodes the whole image, and an online clustering of its patches gives the targets. There is
one view and no class token.
"""

import dataclasses
import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize, smooth_l1_loss
from torch.nn.init import trunc_normal_

from foveola.clustering import Clusters
from foveola.config import key
from foveola.losses import assignment_loss, sinkhorn
from foveola.methods.clusters import Clustering, ClusteringConfig
from foveola.methods.method import (
    Method,
    MethodConfig,
    Output,
    check_single_view,
    ema_update,
    freeze,
)
from foveola.models.heads import HeadConfig, ProjectionHead, Prototypes
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.starting import StartingWeights
from foveola.models.vit import Inputs, VisionTransformer, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, ViewsConfig


@dataclass(frozen=True)
class CapiConfig(MethodConfig):
    """Defaults: CAPI. The other targets, heads and predictors are those of the paper's Tables 1a and 1c."""

    name: Literal["capi"] = key("capi", "which method this is")
    predictor: PredictorConfig | None = key(
        factory=PredictorConfig,
        help="from kept to missing patches; null = mask tokens in the encoder (fused)",
    )
    targets: Literal["clusters", "teacher_head", "features"] = key(
        "clusters", "an online clustering, a head that follows the student's (iBOT), or patches (I-JEPA)"
    )
    head: Literal["linear", "mlp"] = key("linear", "head from predictions to clusters")
    mlp: HeadConfig = key(factory=HeadConfig, help="head=mlp; its prototypes are those of the clustering")
    clustering: ClusteringConfig = key(factory=ClusteringConfig, help="how patches become targets")
    momentum: Schedule | None = key(
        None, "EMA of the teacher; null = 1 - learning rate", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        if self.mlp.mlp_of is not None:
            raise ValueError("mlp.mlp_of: there is one head")
        if self.targets == "teacher_head" and self.head == "linear":
            raise ValueError("targets=teacher_head needs head=mlp")

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the method."""
        if self.predictor is not None:
            self.predictor.network(model)
        if views.dropping is None:
            raise ValueError("method.name=capi needs dropped patches: set views.dropping")
        check_single_view(self.name, views)

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        if self.targets == "features":
            return dict.fromkeys(("clustering", "head", "mlp"), "targets=features has no clusters")
        idle = {"mlp.prototypes": "those of the clustering count"}
        if self.head == "linear":
            idle = {"mlp": "head=linear"}
        if self.targets == "teacher_head":
            idle["clustering.queue"] = "targets=teacher_head keeps no past images"
        return idle

    @property
    def pool(self) -> Literal["average", "predictor"]:
        """What best stands for an image (CAPI, Table 5)."""
        return "average" if self.predictor is None else "predictor"

    @property
    def saved_predictor(self) -> PredictorConfig | None:
        """The predictor, whose first block pools features."""
        return self.predictor


class CapiNetworks(nn.Module):
    """A backbone, a predictor and a head, as far as there are any: the student, or what the teacher needs."""

    def __init__(
        self, backbone: VisionTransformer, predictor: Predictor | None, head: nn.Module | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if predictor is not None:
            self.predictor = predictor
        if head is not None:
            self.head = head


class UnitPrototypes(Prototypes):
    """Prototypes of vectors of any length, which start as CAPI's other linear layers of this kind."""

    def reset(self) -> None:
        trunc_normal_(self.v, std=0.02)

    def forward(self, h: Float[Tensor, "*n D"]) -> Float[Tensor, "*n K"]:
        return super().forward(normalize(h.float(), dim=-1).to(h.dtype))


class Capi(Method):
    """Student, predictor, teacher and clustering."""

    Config = CapiConfig

    def __init__(self, config: CapiConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.config, self.views = config, views.global_count
        width = model.shape[0]
        backbone = VisionTransformer(model)
        predictor = None if config.predictor is None else Predictor(config.predictor, model)
        out = width if predictor is None else predictor.width
        head = self._head(config, out, width)
        self.student = CapiNetworks(backbone, predictor, head)
        # The teacher keeps the first block of the predictor: it pools features later (CAPI, Table 5).
        first = None
        if config.predictor is not None and predictor is not None:
            first = Predictor(dataclasses.replace(config.predictor, depth=1), model)
            first.load_state_dict({name: predictor.state_dict()[name] for name in first.state_dict()})
        copied = deepcopy(head) if config.targets == "teacher_head" else None
        self.teacher = freeze(CapiNetworks(deepcopy(backbone), first, copied))
        if predictor is not None:  # never used: data-parallel training would wait for its gradient
            backbone.mask_token.requires_grad_(False)
        self.clustering = None
        if config.targets != "features":
            patches = (views.global_size // model.patch_size) ** 2
            trained = config.targets == "clusters"
            self.clustering = Clustering(config.clustering, width, patches, trained)

    @staticmethod
    def _head(config: CapiConfig, out: int, width: int) -> nn.Module:
        if config.targets == "features":
            return nn.Identity() if out == width else nn.Linear(out, width)
        count = config.clustering.prototypes
        if config.head == "linear":
            return UnitPrototypes(out, count, trainable_length=True)
        return ProjectionHead(out, dataclasses.replace(config.mlp, prototypes=count))

    def train(self, mode: bool = True) -> "Capi":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, keep, predict = batch.large.selected()
        with torch.no_grad():
            teacher = self.teacher.backbone(images).patches
        features = teacher.mean(dim=1)
        predictions = self.student.head(self._predict(images, keep, predict).transpose(0, 1).flatten(0, 1))
        if self.clustering is None:
            wanted = predict[..., None].expand(-1, -1, teacher.shape[2])
            goal = layer_norm(teacher.float(), teacher.shape[-1:]).gather(1, wanted)
            loss = smooth_l1_loss(predictions.float(), goal.transpose(0, 1).flatten(0, 1))
            return Output({"prediction": loss}, batch.facts, features)
        losses: dict[str, Tensor] = {}
        if self.config.targets == "clusters":
            clusters = self.clustering(teacher, predict)
            losses["clustering"] = clusters.loss
        else:
            clusters = self._by_teacher_head(teacher, predict)
        temperature = self.config.clustering.student_temperature
        losses["prediction"] = assignment_loss(clusters.targets.flatten(0, 1), predictions, temperature)
        logs = self.clustering.watch(clusters, progress)
        return Output(losses, {f"clustering/{k}": v for k, v in logs.items()} | batch.facts, features)

    def _predict(self, images: Tensor, keep: Tensor, predict: Tensor) -> Float[Tensor, "B Q D"]:
        """What the student thinks stands at the predicted patches."""
        student = self.student
        if self.config.predictor is not None:
            return student.predictor(student.backbone(images, Inputs(kept=keep)), predict, keep)
        patches = self.teacher.backbone.config
        count = (images.shape[-1] // patches.patch_size) ** 2
        masked = torch.ones(len(keep), count, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
        found = student.backbone(images, Inputs(masked=masked)).patches
        return found.gather(1, predict[..., None].expand(-1, -1, found.shape[2]))

    @torch.no_grad()
    def _by_teacher_head(self, patches: Float[Tensor, "B N D"], wanted: Int64[Tensor, "B Q"]) -> Clusters:
        """iBOT's targets: the teacher's copy of the student's head gives the logits."""
        assert self.clustering is not None
        config = self.config.clustering
        logits = self.teacher.head(patches.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, len(patches)))
        if config.balance == "position":
            assigned = sinkhorn(logits, config.temperature, config.iterations)
        else:
            assigned = sinkhorn(logits.flatten(0, 1), config.temperature, config.iterations).view_as(logits)
        return Clusters(
            loss=assigned.new_zeros(()),
            targets=assigned[wanted.T, torch.arange(len(patches), device=wanted.device)],
            usage=assigned.mean(dim=1),
            first=torch.zeros_like(self.clustering.used).index_fill_(0, assigned.argmax(-1).flatten(), True),
        )

    @torch.no_grad()
    def after_step(self, progress: Progress, lr: float) -> dict[str, float]:
        momentum = 1 - lr if self.config.momentum is None else self.config.momentum.at(progress)
        ema_update(self.teacher, self.student, momentum)
        if self.clustering is not None:
            self.clustering.step()
        return {"momentum": momentum}

    def diagnose(self) -> dict[str, float]:
        if self.clustering is None:
            return {}
        return {"clustering/prototypes_used": self.clustering.prototypes_used()}

    def gather(self) -> None:
        if self.clustering is not None:
            self.clustering.gather()

    def targets(self) -> dict[str, int]:
        return {} if self.clustering is None else {"clustering": self.config.clustering.prototypes}

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        config, queued = self.config.clustering, self.config.targets == "clusters"
        rows, clusters = self.views * batch_size, config.prototypes
        queue = f"method.clustering.queue={clusters - rows}, " if queued else ""
        rows += config.queue if queued else 0
        if self.clustering is None or config.balance == "all" or rows >= clusters:
            return []
        least, most = math.log(clusters / rows), math.log(clusters)
        return [
            f"targets stay flat: each position shares out {clusters} clusters among {rows} views, so the "
            f"entropy cannot fall below {least:.2f} of {most:.2f} nats; use a larger batch, "
            f"method.clustering.prototypes={rows} or less, {queue}or method.clustering.balance=all"
        ]

    @property
    def backbone(self) -> VisionTransformer:
        return self.teacher.backbone

    @property
    def predictor(self) -> Predictor | None:
        return None if self.config.predictor is None else self.teacher.predictor

    @property
    def student_predictor(self) -> Predictor | None:
        return None if self.config.predictor is None else self.student.predictor

    def trained(self) -> Iterable[VisionTransformer]:
        return (self.student.backbone, self.teacher.backbone)

    def units(self) -> list[nn.Module]:
        parts = [self.student.head]
        if self.config.targets == "teacher_head":
            parts.append(self.teacher.head)
        if self.config.targets == "clusters" and self.clustering is not None:
            parts.append(self.clustering)
        return [*super().units(), *(part for part in parts if any(True for _ in part.parameters()))]

    def start_from(self, start: StartingWeights) -> None:
        super().start_from(start)
        student, teacher = self.student, self.teacher
        if self.config.predictor is not None:
            start.move("predictor", student.predictor, teacher.predictor)
        if any(True for _ in student.head.parameters()):
            start.move("head", student.head, getattr(teacher, "head", None))
        if self.config.targets == "clusters" and self.clustering is not None:
            start.move("clustering", self.clustering)

    def networks(self) -> dict[str, nn.Module]:
        student = self.student
        parts: dict[str, nn.Module] = {"encoder": student.backbone}
        if self.config.predictor is not None:
            parts["predictor"] = student.predictor
        parts["head"] = student.head
        # Some targets have no clusters: an empty part, so that a recipe may say how it would learn.
        return parts | {"clustering": nn.Identity() if self.clustering is None else self.clustering}

    def prototypes(self) -> list[nn.Parameter]:
        if self.clustering is None:
            return []
        head = self.student.head
        return list((head.last_layer if isinstance(head, ProjectionHead) else head).parameters())
