"""What a method is to the training loop: a module that turns a batch into named losses; a teacher's EMA."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveola.config import key
from foveola.logged import Averages
from foveola.models.lora import merged
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.starting import StartingWeights
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, ViewsConfig

M = TypeVar("M", bound=nn.Module)


@dataclass(eq=False)
class Output:
    """Scalar losses, to be summed, and what else is worth logging.

    What is logged is of a whole step: a scalar is the mean of those of all parts and processes, `Averages`
    are of the rows of all. `features` [rows, D] stand for images: their spread and rank are logged.
    """

    losses: dict[str, Tensor]
    logs: Mapping[str, Tensor | float | Averages] = field(default_factory=dict)
    features: Tensor | None = None


@dataclass(frozen=True)
class MethodConfig:
    """The keys of a method, and what follows from them before it is built; each inherits this one."""

    name: str = key("", "which method this is")

    knows_field: ClassVar[bool] = False  # whether it tells the network positions of views: positions=field
    needs_class_token: ClassVar[bool] = False  # weights without one then get a fresh one
    # What of annotations the loader reads for it; None: of a method that learns without.
    annotations: ClassVar[Literal["labels", "classes", "label_maps", "instances"] | None] = None
    # Whether what it predicts never moves, such as pixels, so that its loss can be read as progress.
    fixed_targets: ClassVar[bool] = False

    @classmethod
    def of(cls, tree: dict[str, Any]) -> "type[MethodConfig]":
        """Return the class that has the keys of this tree: this one, unless keys can be had from
        elsewhere.
        """
        return cls

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the method."""

    def with_data(self, source: Any) -> "MethodConfig":
        """Return the same with what the data say, such as their classes; called before anything is built."""
        return self

    @property
    def holding(self) -> list[str]:
        """Keys of what compares with the starting weights, so that fresh ones make no sense."""
        return []

    @property
    def pool(self) -> Literal["token", "average", "predictor"]:
        """What stands for an image in the encoder that is kept: the class token, unless a method says so."""
        return "token"

    @property
    def saved_predictor(self) -> PredictorConfig | None:
        """The predictor whose first block pools features, where `pool` is "predictor" (CAPI)."""
        return None


class Method(nn.Module, ABC):
    """One way of pretraining. Owns student, teacher, heads, temperatures; knows no optimiser and no file.

    It is built as `method(config, model, views)`, from its `Config`, the `ViTConfig` and the `ViewsConfig` of
    a run. The loop needs `forward`, `backbone` and `trained`; what a method lacks of the rest stays as it is
    here. Nothing else of it is looked at: the names of its submodules are its own.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig  # a frozen dataclass of its keys

    def begin(self) -> None:
        """Note what there is to note of the starting weights; called once, when they are there.

        Of a run that goes on, a checkpoint then replaces what was noted.
        """

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress) -> Output:
        """Compute the losses of a batch; updates nothing but running statistics."""

    def after_step(self, progress: Progress, lr: float) -> dict[str, float]:
        """Update what follows the student (teacher, centres), after each optimiser step; scalars to log.

        `lr` is the learning rate of that step.
        """
        return {}

    def diagnose(self) -> dict[str, float]:
        """Return further numbers, since the last call or of the last step; called when a step is logged.

        All processes call it, and return what is of all of them.
        """
        return {}

    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return images of the last step that are worth a look, by name; called with each checkpoint."""
        return {}

    def gather(self) -> None:
        """Bring to the main process what each has of its own and the next step reads; called by all of them
        before the state is kept.
        """

    @property
    @abstractmethod
    def backbone(self) -> VisionTransformer:
        """The network to keep."""

    @property
    def predictor(self) -> Predictor | None:
        """The part of a predictor to keep with it, where one pools features (CAPI)."""
        return None

    @property
    def task_head(self) -> nn.Module | None:
        """The head of a task, to keep with the encoder; None for a method that has none."""
        return None

    def targets(self) -> dict[str, int]:
        """Return prototypes behind each kind of targets, by the name under which it logs `target_entropy`."""
        return {}

    def check_batch(self, images: int, objects: int) -> None:
        """Raise ValueError where a term has nothing to compare in the `images` that a process takes at once.

        `objects` of each image are trained on.
        """

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        """Return what is unwise about this configuration, one line each.

        Args:
            batch_size: images that are taken at once, over all processes: of a step, its part.
            images: how many there are, if known.
            objects: how many of each image are trained on.
        """
        return []

    @abstractmethod
    def trained(self) -> Iterable[VisionTransformer]:
        """Return the networks that see images in training, a teacher included; they compile and
        checkpoint.
        """

    @property
    def student_backbone(self) -> VisionTransformer:
        """The network that learns; without a teacher it is `backbone`.

        It is the first of `trained` that learns; where all are frozen for the moment, the first.
        """
        networks = list(self.trained())
        return next(filter(learns, networks), networks[0])

    @property
    def student_predictor(self) -> Predictor | None:
        """What `predictor` is the teacher of; it may have further blocks."""
        return self.predictor

    def start_from(self, start: StartingWeights) -> None:
        """Take over starting weights: every network of `trained` gets those of the encoder.

        A method that also takes heads or a predictor from them inherits this, and calls `start.move` for
        each. What it leaves alone stays as it was drawn.
        """
        names = {id(module): name for name, module in self.named_modules()}
        for network in self.trained():
            start.fill(network, names.get(id(network), ""))

    def units(self) -> list[nn.Module]:
        """Return modules, besides the blocks of `trained`, that alone read their weights, while they are
        called: where weights are in parts, these are whole just then (`parallel=fsdp`).

        What else they are called by than `forward` they name as `entries`. Here: blocks of predictors.
        """
        predictors = [module for module in self.modules() if isinstance(module, Predictor) and learns(module)]
        return [block for predictor in predictors for block in predictor.blocks]

    def networks(self) -> dict[str, nn.Module]:
        """Return the parts that learn, by name: `--dry-run` counts them, `clip_each=module` clips each alone.

        A name may have a part after a dot ("heads.main"), which `--dry-run` sums up.
        """
        return {name: child for name, child in self.named_children() if learns(child)}

    def layers(self) -> list[list[nn.Parameter]]:
        """Return parameters of the encoder that learns by depth, what embeds first; for
        `optimizer.layer_decay`.
        """
        found = [network.layers() for network in self.trained() if learns(network)]
        return [[p for layer in same for p in layer] for same in zip(*found, strict=True)]

    def prototypes(self) -> list[nn.Parameter]:
        """Return parameters that `optimizer.freeze_last_layer` holds at first; none by default."""
        return []


def learns(module: nn.Module) -> bool:
    """Return whether any parameter of it trains."""
    return any(p.requires_grad for p in module.parameters())


def check_single_view(name: str, views: ViewsConfig) -> None:
    """Raise ValueError for views, masks and object tokens that masked prediction in one view does not use."""
    if views.local_count or views.masking is not None:
        raise ValueError(
            f"method.name={name} uses neither local views nor masks: views.local_count=0, views.masking=null"
        )
    if views.objects is not None and (views.objects.attention or views.objects.image_token):
        raise ValueError(
            f"method.name={name} has no object tokens: views.objects.attention=false, "
            "views.objects.image_token=false"
        )


def freeze(module: M) -> M:
    """Return a teacher: no gradient ever, and never in training mode (no stochastic depth)."""
    module.requires_grad_(False)
    return module.eval()


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set theta_t <- m theta_t + (1 - m) theta_s for all parameters, in their own (float32) precision.

    Updates of low rank count as part of what they update: the teacher has none of its own.
    """
    pairs = merged({**dict(student.named_parameters()), **dict(student.named_buffers())})
    old: list[Tensor] = [parameter.detach() for parameter in teacher.parameters()]
    new: list[Tensor] = [pairs[name].detach() for name, _ in teacher.named_parameters()]
    torch._foreach_lerp_(old, new, 1 - momentum)


@torch.no_grad()
def spread_and_rank(features: Float[Tensor, "n D"]) -> tuple[float, float]:
    """Return collapse signals of unit-length features.

    Spread: standard deviation per dimension times sqrt(D); about 1 for features in all directions, 0 for one
    point. Effective rank: exponential of the entropy of the normalised singular values (RankMe); at most
    min(n, D). Both are NaN where a feature is not finite: that training diverged is for the loop to say.
    """
    x = normalize(features.float(), dim=1)
    if not bool(x.isfinite().all()):
        return float("nan"), float("nan")
    spread = x.std(dim=0, correction=0).mean() * x.shape[1] ** 0.5
    if x.shape[0] > x.shape[1]:  # of many rows, what costs as much as their products alone
        x = x.double()
        singular = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    else:
        singular = torch.linalg.svdvals(x)
    fraction = singular / singular.sum()
    return spread.item(), torch.special.entr(fraction).sum().exp().item()
