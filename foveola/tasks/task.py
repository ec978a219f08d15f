"""What a task is to the training loop and to users: a method with annotations as targets, and its head."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor, nn

from foveola.config import ConfigError, UserError, build, key
from foveola.methods import config_class, find_method
from foveola.methods.method import Method, MethodConfig
from foveola.models.encoder import Encoder
from foveola.models.starting import StartingWeights
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.views.batch import ViewsConfig

Image = Shaped[np.ndarray, "_ _ ch"]
STUDENT_HEAD = "student.task_head."  # how the names of a head's tensors begin in a `TaskMethod`


@dataclass(frozen=True, eq=False)
class Classes:
    """What a classifier says of an image: a score in [0, 1] for each class.

    Scores sum to one where an image has one class; where it may have several, each stands for itself.
    """

    names: tuple[str, ...]
    scores: Float[Tensor, "C"]

    @property
    def best(self) -> str:
        """The name of the class of highest score."""
        return self.names[int(self.scores.argmax())]


@dataclass(frozen=True, eq=False)
class LabelMap:
    """What a segmenter says of an image: the index of a class in `names` for each of its pixels."""

    names: tuple[str, ...]
    classes: UInt8[Tensor, "H W"]


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector says of an image: objects, best first.

    Boxes are (x0, y0, x1, y1) in pixels of the image, labels are indices in `names`, scores lie in [0, 1].
    """

    names: tuple[str, ...]
    boxes: Float[Tensor, "K 4"]
    labels: Int64[Tensor, "K"]
    scores: Float[Tensor, "K"]
    masks: Bool[Tensor, "K H W"] | None = None


@dataclass(frozen=True)
class TaskConfig(MethodConfig):
    """The keys that every task has."""

    classes: tuple[str, ...] | None = key(
        None, "names of the classes, in the order of the head's outputs; null = those of the data"
    )

    fixed_targets = True
    protocol: ClassVar[str] = ""  # the protocol that measures it on `finetune test=`

    def with_data(self, source: Any) -> "TaskConfig":
        """Return the same with the classes of the data, which its annotations count by.

        Raises ConfigError where other classes are asked for, and UserError for data without classes.
        """
        found = source.classes
        if not found:
            raise UserError(
                f"data: {source.name} names no classes, which method.name={self.name} learns; docs/data.md "
                "says which data have them"
            )
        if self.classes is not None and tuple(self.classes) != tuple(found):
            raise ConfigError(
                f"method.classes is {_few(self.classes)}, but data {source.name} has {_few(found)}: "
                "leave it out"
            )
        return replace(self, classes=tuple(found))

    @property
    def names(self) -> tuple[str, ...]:
        """The classes. Raises ConfigError before they are known."""
        if self.classes is None:
            raise ConfigError(f"method.name={self.name} needs data=, whose classes it learns")
        return self.classes


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


class TaskHead(nn.Module, ABC):
    """The head of a task, which reads an encoder. It is kept beside the encoder, as head.safetensors.

    It is built as `head(config, model)`, from the configuration of its task and the shape of the encoder.
    """

    def __init__(self, config: TaskConfig, model: ViTConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of its outputs."""
        return self.config.names

    @abstractmethod
    def predict(self, encoder: Encoder, images: Sequence[Image]) -> list[Any]:
        """Return what it says of images of any size: `Classes`, a `LabelMap`, or `Detections` of each.

        The answer for an image does not depend on the others. `encoder` is the one on which the head stands.
        """


class TaskStudent(nn.Module):
    """An encoder that learns, and the head on it."""

    def __init__(self, backbone: VisionTransformer, head: TaskHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.task_head = head


class TaskMethod(Method):
    """A method with annotations as targets: one network that learns, no teacher.

    A subclass names its `Head` and gives `forward`. `Config.annotations` says what the loader reads.
    """

    Config = TaskConfig
    Head: ClassVar[type[TaskHead]]

    def __init__(self, config: TaskConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.config = config
        backbone = VisionTransformer(model)
        # Nothing is masked: data-parallel training would wait for its gradient.
        backbone.mask_token.requires_grad_(False)
        self.student = TaskStudent(backbone, self.Head(config, model))

    @property
    def backbone(self) -> VisionTransformer:
        return self.student.backbone

    @property
    def task_head(self) -> TaskHead:
        return self.student.task_head

    def trained(self) -> Iterable[VisionTransformer]:
        return (self.student.backbone,)

    def start_from(self, start: StartingWeights) -> None:
        """Take over the encoder, and a head for the same classes where there is one."""
        super().start_from(start)
        if start.classes in ((), self.task_head.classes):
            start.move("task_head", self.task_head)
        else:
            start.account.fresh["task_head"] = "that of the weights is for other classes"

    def networks(self) -> dict[str, nn.Module]:
        return {"encoder": self.student.backbone, "head": self.student.task_head}


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Set a module to inference, and back to training afterwards where it was."""
    learning = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in learning:
            each.training = True


def check_annotated_views(name: str, views: ViewsConfig) -> None:
    """Raise ValueError for views of which a task makes no use: local ones, masks, object tokens."""
    unused = {
        "views.local_count=0": views.local_count,
        "views.masking=null": views.masking,
        "views.position_masking=null": views.position_masking,
        "views.dropping=null": views.dropping,
        "views.blocks=null": views.blocks,
        "views.objects=null": views.objects,
    }
    wrong = [remedy for remedy, value in unused.items() if value not in (None, 0)]
    if views.global_count != 1:
        wrong.insert(0, "views.global_count=1")
    if wrong:
        raise ValueError(f"method.name={name} looks at one view of an image, whole: set {' '.join(wrong)}")


def make_head(tree: dict[str, Any], model: ViTConfig, where: Path) -> TaskHead:
    """Return a head with fresh weights, from the configuration that was kept with it.

    Raises UserError for one that no task has.
    """
    method = find_method(str(tree.get("name")))
    if not issubclass(method, TaskMethod):
        raise UserError(f"{where}: {tree.get('name')!r} is no task, so it has no head")
    config = build(config_class(tree), tree, where=str(where))
    assert isinstance(config, TaskConfig)
    return method.Head(config, model)


def filled_head(head: TaskHead, state: dict[str, Tensor], where: Path) -> TaskHead:
    """Return a head, frozen, with the tensors that were read at `where`. Raises UserError where they do not
    fit.
    """
    own = {name: value.shape for name, value in head.state_dict().items()}
    if own != {name: value.shape for name, value in state.items()}:
        raise UserError(f"{where} does not hold a head for {head.config.name} of {len(head.classes)} classes")
    head.load_state_dict(state)
    return head.requires_grad_(False).eval()
