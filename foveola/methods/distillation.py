"""Self-distillation over several views: DINO, iBOT, ODIS and their mixtures.

A student sees all views (globals possibly masked), its moving average, the teacher, sees the global ones.
What they must agree on is a list of terms. The methods differ only in their recipes: which views, which
object masks, which terms.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from foveola.config import ConfigError, build, key, to_dict
from foveola.logged import Averages
from foveola.methods.method import Method, MethodConfig, Output, ema_update, freeze
from foveola.methods.terms import TERMS, Named, named
from foveola.methods.terms.term import Heads, Seen, Setting, Term, Tokens
from foveola.models.heads import HeadConfig, ProjectionHead
from foveola.models.starting import StartingWeights
from foveola.models.vit import Features, Inputs, VisionTransformer, ViTConfig
from foveola.schedules import Progress, Schedule
from foveola.views.batch import Batch, Views, ViewsConfig

ATTRIBUTES = (
    "student",
    "teacher",
    "start",
    "terms",
    "config",
    "has_field",
    "training",
)  # of a Distillation


@dataclass(frozen=True)
class _First(MethodConfig):
    name: Literal["distillation"] = key("distillation", "which method this is")
    heads: dict[str, HeadConfig] = key(
        factory=lambda: {"main": HeadConfig()}, help="projection heads by name"
    )


def _term_key(term: type[Term]) -> Any:
    return key(factory=term.Config, help=term.help) if term.usual else key(None, term.help)


if TYPE_CHECKING:
    _Terms = _First
else:  # a key for each term, in their order
    _Terms = make_dataclass(
        "_Terms",
        [(name, term.Config | None, _term_key(term)) for name, term in TERMS.items()],
        bases=(_First,),
        frozen=True,
    )


@dataclass(frozen=True)
class DistillationConfig(_Terms):
    """Terms and teacher; a term that is null costs nothing. Defaults: iBOT.

    Keys: `name`, `heads`, one of each term in `TERMS`, `momentum`, and one of each term from outside that a
    recipe names.
    """

    knows_field, needs_class_token = True, True
    known: ClassVar[Mapping[str, type[Term]]] = TERMS  # by their keys

    momentum: Schedule = key(
        factory=lambda: Schedule(value=0.996, end=1.0, shape="cosine"),
        help="EMA of the teacher",
        at_least=0,
        at_most=1,
    )

    @classmethod
    def of(cls, tree: dict[str, Any]) -> type["DistillationConfig"]:
        """Return this class, with a key for each term from outside that the tree names."""
        own = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in tree.items() if name not in own}
        return _with_terms(named(found))

    def __post_init__(self) -> None:
        if not self.terms():
            raise ValueError("all terms are null: nothing to learn")
        for name, term in self.terms().items():
            for head in self.known[name].heads(term):
                if head not in self.heads:
                    raise ValueError(f"{name}.head={head!r} is not among heads: {', '.join(self.heads)}")
        for name, head in self.heads.items():
            self._check_shared(name, head)

    def _check_shared(self, name: str, head: HeadConfig) -> None:
        if head.mlp_of is None:
            return
        used = self.used_heads()
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

    def terms(self) -> dict[str, Any]:
        """Return the configurations of the terms that are not null, by name, in the order of `known`."""
        found = {name: getattr(self, name, None) for name in self.known}
        return {name: term for name, term in found.items() if term is not None}

    @property
    def holding(self) -> list[str]:
        return [name for name, term in self.terms().items() if self.known[name].reads_start(term)]

    def used_heads(self) -> set[str]:
        """Return names of the heads that a term projects with."""
        return {head for name, term in self.terms().items() for head in self.known[name].heads(term)}

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        used = self.used_heads()
        return {f"heads.{name}": "no term names this head" for name in self.heads if name not in used}

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the terms."""
        if views.dropping is not None or views.blocks is not None:
            raise ValueError(
                "method.name=distillation drops no patches: views.dropping=null, views.blocks=null"
            )
        if not model.class_token:
            raise ValueError("method.name=distillation needs class tokens: model.class_token=true")
        for name, term in self.terms().items():
            self.known[name].check(term, Setting(name, self.heads, views, model))
        if views.position_masking is not None and model.positions in ("rope", "none"):
            raise ValueError(
                "views.position_masking hides what is added to patches: model.positions=field, or learned"
            )
        if views.placement is not None and model.positions != "field":
            raise ValueError(
                "views.placement moves views in a position field: set model.positions=field, "
                "or views.placement=null"
            )
        read = any(self.known[name].reads_image_token(term) for name, term in self.terms().items())
        if read != (views.objects is not None and views.objects.image_token):
            raise ValueError("a term with token=image and views.objects.image_token=true go together")


@cache
def _with_terms(terms: tuple[Named, ...]) -> type[DistillationConfig]:
    """The configuration of distillation with further terms; the same class for the same terms."""
    if not terms:
        return DistillationConfig
    taken = {*dir(Distillation), *dir(DistillationConfig), *ATTRIBUTES}
    for term in terms:
        if not term.key.isidentifier() or term.key in taken:
            raise ConfigError(f"{term.key}: a term of your own needs another key, a word that is not taken")
    return make_dataclass(
        "DistillationConfig",
        [(term.key, term.config | None, key(None, term.term.help)) for term in terms],
        bases=(DistillationConfig,),
        frozen=True,
        namespace={
            "known": {**TERMS, **{term.key: term.term for term in terms}},
            "__reduce__": lambda self: (_rebuilt, (to_dict(self),)),  # pickle finds no class made here
        },
    )


def _rebuilt(tree: dict[str, Any]) -> DistillationConfig:
    return build(DistillationConfig.of(tree), tree)


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
    """Student, teacher and terms. Each term is the submodule of its name."""

    Config = DistillationConfig

    def __init__(self, config: DistillationConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.config = config
        used = config.used_heads()
        self.student = Branch(model, {name: head for name, head in config.heads.items() if name in used})
        self.teacher = freeze(deepcopy(self.student))
        if views.masking is None:  # never used: data-parallel training would wait for its gradient
            self.student.backbone.mask_token.requires_grad_(False)
        if views.position_masking is not None:
            self.student.backbone.learn_position_mask()
        self.terms: dict[str, Term] = {}
        for name, term in config.terms().items():
            self.terms[name] = config.known[name](term, Setting(name, config.heads, views, model))
            self.register_module(name, self.terms[name])
        self.has_field = model.positions == "field"
        self.start: VisionTransformer | None = None

    def begin(self) -> None:
        """Keep a frozen copy of the student's backbone where a term asks for it: one for all of them."""
        if self.config.holding:
            self.start = freeze(deepcopy(self.student.backbone))

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        for frozen in filter(None, (self.teacher, self.start)):
            frozen.eval()
        return self

    def forward(self, batch: Batch, progress: Progress) -> Output:
        with torch.no_grad():
            teacher = self._teach(batch)
            start = None if self.start is None else Tokens(self._see(batch.large, self.start))
        seen = Seen(batch, self._study(batch), teacher, self._heads(), progress, self.backbone, start)
        losses: dict[str, Tensor] = {}
        logs: dict[str, Tensor | Averages] = {}
        for name, term in self.terms.items():
            output = term(seen)
            for what, loss in output.losses.items():
                losses[name if what == "loss" else f"{name}_{what}"] = loss
            logs |= {f"{name}/{what}": value for what, value in output.logs.items()}
        return Output(losses, {**logs, **batch.facts}, teacher.large.objects.flatten(0, 1))

    def _teach(self, batch: Batch) -> Tokens:
        """The teacher's tokens of the large views, of which nothing is hidden."""
        return Tokens(self.teacher.backbone(batch.large.pixels.flatten(0, 1), self._inputs(batch.large)))

    def _study(self, batch: Batch) -> Tokens:
        """The student's tokens of all views, without what is hidden from it."""
        student = self.student.backbone
        large = self._see(batch.large, student)
        return Tokens(large, None if batch.small is None else self._see(batch.small, student))

    def _see(self, views: Views, network: VisionTransformer) -> Features:
        hidden, unplaced = views.hidden_contents, views.hidden_positions
        inputs = dataclasses.replace(
            self._inputs(views),
            masked=None if hidden is None else hidden.mask.flatten(0, 1),
            unplaced=None if unplaced is None else unplaced.mask.flatten(0, 1),
        )
        return network(views.pixels.flatten(0, 1), inputs)

    def _inputs(self, views: Views) -> Inputs:
        """What student and teacher read besides pixels: objects, and positions, if there is a field."""
        return Inputs(
            objects=None if views.objects is None else views.objects.flatten(0, 1),
            positions=views.positions.flatten(0, 1) if self.has_field else None,
            flips=views.flips.flatten(0, 1) if self.has_field else None,
        )

    def _heads(self) -> dict[str, Heads]:
        return {name: Heads(self.student.head(name), self.teacher.head(name)) for name in self.student.heads}

    @torch.no_grad()
    def after_step(self, progress: Progress, lr: float) -> dict[str, float]:
        momentum = self.config.momentum.at(progress)
        ema_update(self.teacher, self.student, momentum)
        for term in self.terms.values():
            term.step()
        return {"momentum": momentum}

    def diagnose(self) -> dict[str, float]:
        return {
            f"{name}/{what}": value
            for name, term in self.terms.items()
            for what, value in term.diagnose().items()
        }

    def gather(self) -> None:
        for term in self.terms.values():
            term.gather()

    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return the teacher's position field, if there is one, and the figures of the terms."""
        field = self.backbone.pos_field
        found = {} if field is None else {"position_field": field.image()}
        for term in self.terms.values():
            found |= term.figures()
        return found

    def targets(self) -> dict[str, int]:
        return {name: count for name, term in self.terms.items() if (count := term.prototypes())}

    def check_batch(self, images: int, objects: int) -> None:
        for term in self.terms.values():
            term.check_batch(images, objects)

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        return [text for term in self.terms.values() for text in term.advice(batch_size, images, objects)]

    @property
    def backbone(self) -> VisionTransformer:
        assert isinstance(self.teacher, Branch)
        return self.teacher.backbone

    def trained(self) -> Iterable[VisionTransformer]:
        return (self.student.backbone, self.backbone, *filter(None, (self.start,)))

    def units(self) -> list[nn.Module]:
        assert isinstance(self.teacher, Branch)
        heads = [branch.head(name) for branch in (self.student, self.teacher) for name in self.student.heads]
        return [*dict.fromkeys(part for head in heads for part in (head.mlp, head.last_layer))]

    def start_from(self, start: StartingWeights) -> None:
        super().start_from(start)
        for name in self.student.heads:
            terms = [
                term for term, config in self.config.terms().items() if name in self.terms[term].heads(config)
            ]
            start.move(
                f"heads.{name}",
                self.student.head(name),
                self.teacher.head(name),
                [f"head_of.{term}" for term in terms],
            )

    def networks(self) -> dict[str, nn.Module]:
        heads = {f"heads.{name}": head for name, head in self.student.heads.items()}
        return {"encoder": self.student.backbone, **heads, **self.terms}

    def prototypes(self) -> list[nn.Parameter]:
        return [p for name in self.student.heads for p in self.student.head(name).last_layer.parameters()]
