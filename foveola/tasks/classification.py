"""Classification of images, by their mean patch, their class token, or a query of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, one_hot
from torch.nn.init import trunc_normal_, zeros_

from foveola import distributed
from foveola.config import UserError, key
from foveola.methods.method import Output
from foveola.models.encoder import Encoder
from foveola.models.starting import StartingWeights
from foveola.models.transform import evaluation_view
from foveola.models.vit import Features, Inputs, VisionTransformer, ViTConfig
from foveola.schedules import Progress
from foveola.tasks.augment import Augment, AugmentConfig
from foveola.tasks.task import Classes, Image, TaskConfig, TaskHead, TaskMethod, check_annotated_views
from foveola.views.batch import Batch, ViewsConfig

ASKED_FOR_LABELS = 200  # images that are asked for their labels before a run begins
CLASSIFIED_TOGETHER = 64  # images that are classified at once


@dataclass(frozen=True)
class ClassificationConfig(TaskConfig):
    """Defaults: the head of MAE's fine-tuning."""

    protocol = "classify"

    name: Literal["classification"] = key("classification", "which method this is")
    reads: Literal["average", "token", "attention"] = key(
        "average",
        "what the linear layer reads: the mean patch through a norm, the class token, or what a learned "
        "query reads from the patches",
    )
    query_heads: int = key(12, "reads=attention: parts into which the query is cut", at_least=1)
    several: bool = key(
        False, "an image may have several classes, or none: those that a list names, or those of its objects"
    )
    augment: AugmentConfig = key(factory=AugmentConfig, help="augmentation besides that of views")

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the task."""
        check_annotated_views(self.name, views)
        if self.several and (self.augment.mixes or self.augment.smoothing):
            raise ValueError(
                "method.several=true: images of several classes are not mixed, nor their labels smoothed: "
                "method.augment.mixup=0 method.augment.cutmix=0 method.augment.smoothing=0"
            )
        if self.reads == "token" and not model.class_token:
            raise ValueError("method.reads=token: this network has no class token")
        width = model.shape[0]
        if self.reads == "attention" and width % self.query_heads:
            raise ValueError(f"method.query_heads={self.query_heads} does not divide the width {width}")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {} if self.reads == "attention" else {"query_heads": f"reads={self.reads} has no query"}

    @property
    def annotations(self) -> Literal["labels", "classes"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What of annotations the loader reads."""
        return "classes" if self.several else "labels"

    def with_data(self, source: Any) -> "ClassificationConfig":
        """Return the same with the classes of the data. Raises UserError for data whose images have no
        labels.
        """
        found = super().with_data(source)
        assert isinstance(found, ClassificationConfig)
        step = max(len(source) // ASKED_FOR_LABELS, 1)
        if not self.several and all(source[i].label is None for i in range(0, len(source), step)):
            raise UserError(
                f"data: {source.name} has no labels on its images, which classification learns; "
                "method.several=true learns the classes of their objects"
            )
        return found

    @property
    def pool(self) -> Literal["token", "average"]:
        """What stands for an image in the encoder that is kept beside the head."""
        return "token" if self.reads == "token" else "average"


class ClassificationHead(TaskHead):
    """Maps the tokens of an image to a logit for each class.

    `average`: LayerNorm of the mean of the last block's patches, in place of the encoder's final norm, as in
    MAE's fine-tuning. `token`: the class token after the final norm. `attention`: softmax over the patches of
    the products of a learned query with their keys, for each of its parts, and the mean of their values by
    it.
    """

    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, model: ViTConfig) -> None:
        super().__init__(config, model)
        width = model.shape[0]
        self.norm = nn.LayerNorm(width, eps=1e-6) if config.reads == "average" else None
        self.query = self.keys = self.values = None
        if config.reads == "attention":
            self.query = nn.Parameter(torch.empty(width))
            # A bias of the keys would add the same to all scores of a part, and change nothing.
            self.keys, self.values = nn.Linear(width, width, bias=False), nn.Linear(width, width)
            for weights in (self.query, self.keys.weight, self.values.weight):
                trunc_normal_(weights, std=0.02)
            zeros_(self.values.bias)
        self.linear = nn.Linear(width, len(config.names))
        trunc_normal_(self.linear.weight, std=2e-5)  # so the first answer is that nothing is known (MAE)
        zeros_(self.linear.bias)

    def forward(self, features: Features) -> Float[Tensor, "B C"]:
        """Return logits. With `reads=average` patches are those before the final norm: see `inputs`."""
        if self.norm is not None:
            pooled = self.norm(features.patches.mean(dim=1))
        elif self.query is not None:
            pooled = self._asked(features.patches)
        else:
            pooled = features.objects[:, 0]
        return self.linear(pooled).float()

    def _asked(self, patches: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        assert self.query is not None
        assert self.keys is not None
        assert self.values is not None
        parts = self.config.query_heads
        query = self.query.unflatten(0, (parts, -1))
        keys, values = (each(patches).unflatten(2, (parts, -1)) for each in (self.keys, self.values))
        scores = torch.einsum("hd,bnhd->bhn", query, keys) / query.shape[1] ** 0.5
        return torch.einsum("bhn,bnhd->bhd", scores.softmax(dim=-1), values).flatten(1)

    def logits(self, backbone: VisionTransformer, images: Float[Tensor, "B ch H W"]) -> Float[Tensor, "B C"]:
        """Return logits of normalised images."""
        return self(backbone(images, Inputs(final_norm=self.config.reads != "average")))

    @torch.no_grad()
    def predict(self, encoder: Encoder, images: Sequence[Image]) -> list[Classes]:
        """Return the scores of each image, in the view that evaluations see: resized, the centre cut out."""
        found: list[Classes] = []
        for start in range(0, len(images), CLASSIFIED_TOGETHER):
            block = images[start : start + CLASSIFIED_TOGETHER]
            views = torch.stack([evaluation_view(image, encoder.config.transform).pixels for image in block])
            logits = self.logits(encoder.backbone, encoder.normalise(views.to(encoder.device)))
            scores = logits.sigmoid() if self.config.several else logits.softmax(dim=1)
            found += [Classes(self.classes, each) for each in scores.cpu()]
        return found


class Classification(TaskMethod):
    """An encoder and a linear layer learn the labels of images: end-to-end fine-tuning (MAE, Appendix A.1).

    The loss is the cross-entropy with the fractions of classes that smoothing and mixing leave, over all
    labelled images of all processes; where an image may have several classes, the mean over classes of the
    binary cross-entropy of each. With a frozen encoder it is a linear (or attentive) probe on augmented
    images.
    """

    Config = ClassificationConfig
    Head = ClassificationHead

    @property
    def task_head(self) -> ClassificationHead:
        head = self.student.task_head
        assert isinstance(head, ClassificationHead)
        return head

    def __init__(self, config: ClassificationConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__(config, model, views)
        self.augment = Augment(config.augment, views)
        self.seen: list[Tensor] = []  # rows that were right, and all of them, since the last look
        if config.reads == "average":  # the head's norm stands in for it, so nothing reads it
            self.student.backbone.norm.requires_grad_(False)

    def start_from(self, start: StartingWeights) -> None:
        """Take over encoder and head; a fresh head begins with the norm of the mean, of weights with one."""
        super().start_from(start)
        norm, learned = self.task_head.norm, self.student.backbone.fc_norm
        if start.classes != self.task_head.classes and norm is not None and isinstance(learned, nn.LayerNorm):
            norm.load_state_dict(learned.state_dict())

    def forward(self, batch: Batch, progress: Progress) -> Output:
        head = self.task_head
        images, several = batch.large.pixels[:, 0], head.config.several
        if several:
            assert batch.classes is not None
            soft_labels, known = (
                batch.classes.to(images.dtype),
                torch.ones_like(batch.labels, dtype=torch.bool),
            )
        else:
            known = batch.labels >= 0
            soft_labels = one_hot(batch.labels.clamp(min=0), len(head.classes)).to(images) * known[:, None]
        images, soft_labels = self.augment(images, soft_labels)
        logits = head.logits(self.student.backbone, images)
        with torch.autocast(logits.device.type, enabled=False):
            if several:
                losses = binary_cross_entropy_with_logits(logits, soft_labels, reduction="none").mean(dim=1)
                weight = known.sum().to(losses)
            else:
                losses, weight = -(soft_labels * log_softmax(logits, dim=1)).sum(dim=1), soft_labels.sum()
            # Gradients are averaged over processes, of which each has its own number of labelled images.
            weight = distributed.all_reduce_sum(weight).clamp(min=1e-6)
            loss = losses.sum() * distributed.world_size() / weight
        with torch.no_grad():
            alike = ((logits > 0) == (soft_labels > 0.5)).float().mean(dim=1)
            first = (logits.argmax(dim=1) == soft_labels.argmax(dim=1)).float()
            self.seen.append(torch.stack((((alike if several else first) * known).sum(), known.sum())))
        return Output({"classification": loss}, dict(batch.facts))

    def diagnose(self) -> dict[str, float]:
        """Return the fraction of training views since the last call whose largest class was found; where they
        may have several, the fraction of their classes that are rightly there or not there.
        """
        if not self.seen:
            return {}
        right, count = distributed.all_reduce_sum(torch.stack(self.seen).sum(dim=0)).tolist()
        self.seen = []
        return {"accuracy": right / max(count, 1)}
