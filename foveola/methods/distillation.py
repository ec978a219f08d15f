"""Self-distillation over several views: DINO, iBOT, ODIS and their mixtures.

A student sees all views (globals possibly masked), its moving average, the teacher, sees the global ones.
What they must agree on is a list of terms. The methods differ only in their recipes: which views, which
object masks, which terms.
"""

import math
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from foveola.config import key
from foveola.losses import mask_weights
from foveola.methods.method import Method, Output, ema_update, freeze, spread_and_rank
from foveola.methods.terms import (
    PatchTerm,
    PatchTermConfig,
    PositionTerm,
    PositionTermConfig,
    SpreadTerm,
    SpreadTermConfig,
    Tokens,
    TokenTerm,
    TokenTermConfig,
    errors_of_places,
    sheet_of_places,
)
from foveola.models.heads import HeadConfig, ProjectionHead
from foveola.models.vit import Features, VisionTransformer, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, Views, ViewsConfig

LOOKED_AT = 16  # global views of a step whose patches are kept to be looked at


@dataclass(frozen=True)
class DistillationConfig:
    """Terms and teacher; a term that is null costs nothing. Defaults: iBOT."""

    name: Literal["distillation"] = key("distillation", "which method this is")
    heads: dict[str, HeadConfig] = key(
        factory=lambda: {"main": HeadConfig()}, help="projection heads by name"
    )
    token: TokenTermConfig | None = key(factory=TokenTermConfig, help="object or class tokens across views")
    image: TokenTermConfig | None = key(
        None, "a second token term, for views.objects.image_token (ODIS Table 5)"
    )
    patch: PatchTermConfig | None = key(factory=PatchTermConfig, help="masked patches of the same view")
    position: PositionTermConfig | None = key(None, "masked positions of the same view")
    spread: SpreadTermConfig | None = key(None, "KoLeo")
    momentum: Schedule = key(
        factory=lambda: Schedule(value=0.996, end=1.0, shape="cosine"),
        help="EMA of the teacher",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        if not (self.terms() or self.spread):
            raise ValueError("all terms are null: nothing to learn")
        for name, term in self.terms().items():
            if term.head not in self.heads:
                raise ValueError(f"{name}.head={term.head!r} is not among heads: {', '.join(self.heads)}")
        for name, head in self.heads.items():
            self._check_shared(name, head)
        if self.image is not None and self.image.token != "image":
            raise ValueError("image.token must be 'image': the object tokens have the term 'token'")

    def _check_shared(self, name: str, head: HeadConfig) -> None:
        if head.mlp_of is None:
            return
        used = {term.head for term in self.terms().values()}
        own = [other for other, config in self.heads.items() if config.mlp_of is None and other in used]
        if head.mlp_of not in own:
            raise ValueError(
                f"heads.{name}.mlp_of={head.mlp_of!r} is no head of a term with an MLP of its own; "
                f"those are: {', '.join(own) or 'none'}"
            )
        for shape in ("hidden", "bottleneck", "layers"):
            theirs = getattr(self.heads[head.mlp_of], shape)
            if getattr(head, shape) != theirs:
                raise ValueError(
                    f"heads.{name}.{shape} is that of heads.{head.mlp_of}, whose MLP it uses: {theirs}"
                )

    def terms(self) -> dict[str, TokenTermConfig | PatchTermConfig | PositionTermConfig]:
        """The terms with a head and targets, by name, as far as there are any."""
        named = {"token": self.token, "image": self.image, "patch": self.patch, "position": self.position}
        return {name: term for name, term in named.items() if term is not None}

    def unread(self) -> dict[str, str]:
        """Keys that nothing reads with these settings, and why."""
        used = {term.head for term in self.terms().values()}
        return {f"heads.{name}": "no term names this head" for name in self.heads if name not in used}

    @property
    def pool(self) -> Literal["token"]:
        """What stands for a picture."""
        return "token"

    @property
    def predictor(self) -> None:
        """There is none."""

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views cannot serve the terms."""
        if views.dropping is not None or views.blocks is not None:
            raise ValueError(
                "method.name=distillation drops no patches: views.dropping=null, views.blocks=null"
            )
        if not model.class_token:
            raise ValueError("method.name=distillation needs class tokens: model.class_token=true")
        if self.patch is not None and views.masking is None:
            raise ValueError("method.patch needs masked patches: set views.masking, or method.patch=null")
        self._check_masks(views, (views.global_size // model.patch_size) ** 2)
        if self.position is not None and views.position_masking is None:
            raise ValueError(
                "method.position needs masked positions: set views.position_masking, or method.position=null"
            )
        if views.position_masking is not None and model.positions == "rope":
            raise ValueError(
                "views.position_masking hides what is added to patches: model.positions=field, or learned"
            )
        if views.placement is not None and model.positions != "field":
            raise ValueError(
                "views.placement moves views in a position field: set model.positions=field, "
                "or views.placement=null"
            )
        reads_image = any(t is not None and t.token == "image" for t in (self.token, self.image))
        if reads_image != (views.objects is not None and views.objects.image_token):
            raise ValueError("a term with token=image and views.objects.image_token=true go together")
        if views.global_count + views.local_count < 2 and (self.token or self.image):
            raise ValueError(
                "token terms compare different views: views.global_count + views.local_count must be >= 2"
            )

    def _check_masks(self, views: ViewsConfig, patches: int) -> None:
        """Raise ValueError for a term that would never see what it is about."""
        hidden = {"patch": views.masking, "position": views.position_masking}
        for name, masks in hidden.items():
            if getattr(self, name) is None or masks is None:
                continue
            why = None
            if masks.ratio[1] * patches < 1:
                why = f"a ratio of at most {masks.ratio[1]} of {patches} patches is less than one"
            elif name == "patch" and not masks.probability:
                why = "views.masking.probability=0.0"
            elif name == "position" and not masks.share:
                why = "views.position_masking.share=0.0"
            elif name == "patch" and views.position_masking is not None and views.position_masking.share == 1:
                why = "views.position_masking.share=1.0 leaves no image for views.masking"
            if why is not None:
                raise ValueError(f"method.{name} never sees a masked patch: {why}; or method.{name}=null")


class Branch(nn.Module):
    """A backbone and its heads: the student, or the teacher."""

    def __init__(self, model: ViTConfig, heads: dict[str, HeadConfig]) -> None:
        super().__init__()
        self.backbone = VisionTransformer(model)
        width = model.shape[0]
        own = {name: ProjectionHead(width, head) for name, head in heads.items() if head.mlp_of is None}
        self.heads = nn.ModuleDict(
            {
                name: own[name] if head.mlp_of is None else ProjectionHead(width, head, own[head.mlp_of].mlp)
                for name, head in heads.items()
            }
        )

    def head(self, name: str) -> ProjectionHead:
        head = self.heads[name]
        assert isinstance(head, ProjectionHead)
        return head


class Distillation(Method):
    """Student, teacher and terms."""

    def __init__(self, config: DistillationConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.config = config
        self.views = views
        self.image_token = views.objects is not None and views.objects.image_token
        used = {term.head for term in config.terms().values()}
        heads = {name: head for name, head in config.heads.items() if name in used}
        self.student = Branch(model, heads)
        self.teacher = freeze(deepcopy(self.student))
        if views.masking is None:  # never used: data-parallel training would wait for its gradient
            self.student.backbone.mask_token.requires_grad_(False)
        if views.position_masking is not None:
            self.student.backbone.learn_position_mask()
        self.token = TokenTerm(config.token, heads[config.token.head].prototypes) if config.token else None
        self.image = TokenTerm(config.image, heads[config.image.head].prototypes) if config.image else None
        self.patch = PatchTerm(config.patch, heads[config.patch.head].prototypes) if config.patch else None
        self.position = (
            PositionTerm(config.position, heads[config.position.head].prototypes) if config.position else None
        )
        self.spread = SpreadTerm(config.spread) if config.spread else None
        self.has_field = model.positions == "field"
        self.colors = views.color.mean, views.color.std
        self.seen: Tensor | None = None
        self.shown: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Output:
        with torch.no_grad():
            teacher = self._teach(batch)
        student = self._study(batch)
        outputs: dict[str, Output] = {}
        for name, term in (("token", self.token), ("image", self.image)):
            if term is not None:
                heads = self.student.head(term.config.head), self.teacher.head(term.config.head)
                outputs[name] = term(student, teacher, *heads, self.image_token, progress)
        if self.patch is not None:
            hidden = batch.large.hidden_contents
            assert hidden is not None
            weights = mask_weights(hidden.mask.flatten(0, 1), hidden.indices)
            heads = self.student.head(self.patch.config.head), self.teacher.head(self.patch.config.head)
            outputs["patch"] = self.patch(student, teacher, *heads, weights, progress)
        if self.position is not None:
            hidden = batch.large.hidden_positions
            assert hidden is not None
            weights = mask_weights(hidden.mask.flatten(0, 1), hidden.indices)
            heads = self.student.head(self.position.config.head), self.teacher.head(self.position.config.head)
            outputs["position"] = self.position(student, teacher, *heads, weights, progress)
            assert student.looked_at is not None
            assert teacher.looked_at is not None
            images, unplaced = (t.flatten(0, 1)[:LOOKED_AT] for t in (batch.large.pixels, hidden.mask))
            self.shown = student.looked_at, teacher.looked_at, images.clone(), unplaced
        if self.spread is not None:
            outputs["spread"] = self.spread(student, self.image_token)
        self.seen = teacher.objects.detach().flatten(0, 2)
        losses = {name: loss for name, out in outputs.items() for loss in out.losses.values()}
        logs = {f"{name}/{what}": value for name, out in outputs.items() for what, value in out.logs.items()}
        return Output(losses, logs | batch.facts)

    def _teach(self, batch: Batch) -> Tokens:
        """The teacher's tokens of the unmasked global views."""
        views = batch.large.pixels
        features = self.teacher.backbone(
            views.flatten(0, 1), _rows(batch.large.objects), **self._where(batch.large)
        )
        everything = self.patch is not None and self.patch.config.center == "all"
        return Tokens(
            objects=features.objects.unflatten(0, views.shape[:2]),
            local_objects=None,
            masked_patches=self._masked(features, batch),
            patches=features.patches.flatten(0, 1) if everything else None,
            unplaced_patches=self._unplaced(features, batch),
            looked_at=self._looked_at(features),
        )

    def _study(self, batch: Batch) -> Tokens:
        """The student's tokens of all views; those of global views come from masked input."""
        features = self._see(batch.large)
        local_objects = None
        if batch.small is not None:
            local_objects = self._see(batch.small).objects.unflatten(0, batch.small.pixels.shape[:2])
        return Tokens(
            objects=features.objects.unflatten(0, batch.large.pixels.shape[:2]),
            local_objects=local_objects,
            masked_patches=self._masked(features, batch),
            unplaced_patches=self._unplaced(features, batch),
            looked_at=self._looked_at(features),
        )

    def _see(self, views: Views) -> Features:
        """What the student makes of views, without what is hidden from it."""
        hidden, unplaced = views.hidden_contents, views.hidden_positions
        return self.student.backbone(
            views.pixels.flatten(0, 1),
            _rows(views.objects),
            None if hidden is None else _rows(hidden.mask),
            unplaced=None if unplaced is None else _rows(unplaced.mask),
            **self._where(views),
        )

    def _where(self, views: Views) -> dict[str, Tensor | None]:
        """Where views read their positions, for a network that has a field."""
        return {"places": _rows(views.positions), "flips": _rows(views.flips)} if self.has_field else {}

    def _unplaced(self, features: Features, batch: Batch) -> Float[Tensor, "U D"] | None:
        if self.position is None or batch.large.hidden_positions is None:
            return None
        return features.patches.flatten(0, 1).index_select(0, batch.large.hidden_positions.indices)

    def _looked_at(self, features: Features) -> Float[Tensor, "S N D"] | None:
        return None if self.position is None else features.patches[:LOOKED_AT].detach().clone()

    def _masked(self, features: Features, batch: Batch) -> Float[Tensor, "P D"] | None:
        if self.patch is None or batch.large.hidden_contents is None:
            return None
        return features.patches.flatten(0, 1).index_select(0, batch.large.hidden_contents.indices)

    @torch.no_grad()
    def after_step(self, progress: Progress, lr: float) -> dict[str, float]:
        momentum = self.config.momentum.at(progress)
        ema_update(self.teacher, self.student, momentum)
        for term in (self.token, self.image, self.patch, self.position):
            if term is not None:
                term.targets.step()
        return {"momentum": momentum}

    def diagnose(self) -> dict[str, float]:
        terms = {"token": self.token, "image": self.image, "patch": self.patch, "position": self.position}
        logs = {
            f"{name}/prototypes_used": t.targets.prototypes_used()
            for name, t in terms.items()
            if t is not None
        }
        if self.seen is not None:
            logs["feature_spread"], logs["effective_rank"] = spread_and_rank(self.seen)
        guessed = self._guesses()
        if guessed is not None:
            guesses, unplaced, _, grid = guessed
            logs["position/found"], logs["position/distance"] = errors_of_places(guesses, unplaced, grid[1])
        return logs

    def pictures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """The teacher's position field, and where patches without position are and were taken to be."""
        sheets: dict[str, UInt8[np.ndarray, "H W 3"]] = {}
        if self.backbone.pos_field is not None:
            sheets["position_field"] = self.backbone.pos_field.picture()
        guessed = self._guesses()
        if guessed is not None:
            guesses, unplaced, images, grid = guessed
            mean, std = (torch.tensor(c, device=images.device)[:, None, None] for c in self.colors)
            sheets["positions"] = sheet_of_places(images * std + mean, guesses, unplaced, grid)
        return sheets

    def _guesses(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]] | None:
        """Guessed places, unplaced patches and pictures of those of the kept views that have such patches."""
        if self.position is None or self.shown is None:
            return None
        student, teacher, images, unplaced = self.shown
        some = unplaced.any(dim=1)
        if not some.any():
            return None
        heads = self.student.head(self.position.config.head), self.teacher.head(self.position.config.head)
        guesses = self.position.guesses(student, teacher, *heads)
        side = self.backbone.config.patch_size
        grid = images.shape[2] // side, images.shape[3] // side
        return guesses[some], unplaced[some], images[some], grid

    def targets(self) -> dict[str, int]:
        return {
            name: self.student.head(term.head).last_layer.v.shape[0]
            for name, term in self.config.terms().items()
        }

    def check_batch(self, images: int, objects: int) -> None:
        if self.spread is not None and images * objects < 2:
            raise ValueError(
                "method.spread (KoLeo) compares the images that a process takes at once, which is one here: "
                "a larger batch_size, a smaller accumulate, or method.spread=null"
            )
        masking, count = self.views.masking, images * self.views.global_count
        none = masking is not None and masking.stratified and not int(masking.probability * count)
        if self.patch is not None and none:
            raise ValueError(
                f"method.patch never sees a masked patch with {images} images at once: a larger batch_size, "
                "a larger views.masking.probability and ratio, or method.patch=null"
            )

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        found = []
        for name, term in self.config.terms().items():
            count, where = self.targets()[name], f"method.heads.{term.head}.prototypes"
            rows = round(batch_size * self.rows(name, objects))
            if term.target.kind == "sinkhorn" and 0 < rows < count:
                least, most = math.log(count / rows), math.log(count)
                found.append(
                    f"targets of {name} stay flat: Sinkhorn-Knopp shares out {count:,} prototypes among "
                    f"about {rows:,} rows at once, so the entropy cannot fall below about {least:.2f} of "
                    f"{most:.2f} nats; use a larger batch or {where}={2 ** (rows.bit_length() - 1)} or less"
                )
            elif images is not None and count > images:
                fewer = max(2 ** (max(images // 10, 1).bit_length() - 1), 2)
                found.append(
                    f"targets of {name} may stay flat: {count:,} prototypes are more than the {images:,} "
                    f"images (published recipes have at least 6 images for each); for example {where}={fewer}"
                )
        return found

    def rows(self, name: str, objects: int) -> float:
        """Rows of targets that an image gives to a term, on average."""
        views = self.views
        if name in ("token", "image"):
            return views.global_count * (objects if name == "token" else 1)
        patches = views.global_count * (views.global_size // self.backbone.config.patch_size) ** 2
        positions = views.position_masking
        share = 0.0 if positions is None else positions.share
        if name == "position" and positions is not None:
            return patches * share * sum(positions.ratio) / 2
        masking = views.masking
        return (
            0.0 if masking is None else patches * (1 - share) * masking.probability * sum(masking.ratio) / 2
        )

    @property
    def backbone(self) -> VisionTransformer:
        assert isinstance(self.teacher, Branch)
        return self.teacher.backbone

    def trained(self) -> Iterable[VisionTransformer]:
        return (self.student.backbone, self.backbone)

    def networks(self) -> dict[str, nn.Module]:
        heads = {f"heads.{name}": head for name, head in self.student.heads.items()}
        return {"encoder": self.student.backbone, **heads}

    def prototypes(self) -> list[nn.Parameter]:
        return [p for name in self.student.heads for p in self.student.head(name).last_layer.parameters()]


def _rows(views: Tensor | None) -> Tensor | None:
    """[B, V, ...] to [B * V, ...]."""
    return None if views is None else views.flatten(0, 1)
