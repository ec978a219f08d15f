"""AdamW or SGD over named parameters: what decays, what learns at another rate, how gradients are clipped."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from foveola.config import ConfigError, key
from foveola.methods.method import Method
from foveola.schedules import Progress, Schedule
from foveola.training.freezing import networks_named
from foveola.training.sharding import cut_like, group_of, local_part, whole_norms

RULES = {"linear": (256, 1.0), "sqrt": (1024, 0.5), "none": (1, 0.0)}  # lr * (batch / reference) ** power


@dataclass(frozen=True)
class PartConfig:
    """How a part of a method learns that is not to learn as the rest does."""

    lr: float = key(1.0, "times the learning rate", above=0)
    schedule: Schedule | None = key(
        None, "learning rate of its own, as it is; null = the shared one", at_least=0
    )
    weight_decay: float | None = key(None, "constant weight decay; null = the shared one", at_least=0)
    bias_decay: float = key(0.0, "fraction of the weight decay for biases (CAPI's clusters: 1)", at_least=0)


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated. The defaults are those of iBOT's ViT-S."""

    kind: Literal["adamw", "sgd"] = key(
        "adamw", "AdamW, whose decay is apart from the gradient; SGD, whose decay is a part of it"
    )
    lr: Schedule = key(
        factory=lambda: Schedule(value=5e-4, start=0.0, end=1e-6, warmup="10 epochs", shape="cosine"),
        help="learning rate; its value is scaled by lr_rule, its start and end are not",
        at_least=0,
    )
    lr_rule: Literal["linear", "sqrt", "none"] = key(
        "linear", "lr x batch/256, lr x sqrt(batch/1024), or lr as it is"
    )
    weight_decay: Schedule = key(
        factory=lambda: Schedule(value=0.04, end=0.4, shape="cosine"), help="weight decay", at_least=0
    )
    betas: tuple[float, float] = key((0.9, 0.999), "betas of AdamW", at_least=0, below=1)
    momentum: float = key(0.9, "fraction of the last update in the next one, of SGD", at_least=0, below=1)
    nesterov: bool = key(False, "look a step of the momentum ahead (SGD in timm, so in Segmenter)")
    clip: float | None = key(3.0, "largest gradient norm; null = no clipping", above=0)
    clip_each: Literal["parameter", "module", "all"] = key(
        "parameter", "clip each tensor alone (DINO, iBOT), each network and head alone (DINOv2), or all"
    )
    layer_decay: float = key(1.0, "a block's learning rate over that of the next one", above=0, at_most=1)
    patch_embed_lr: float = key(1.0, "times the learning rate, for the patch embedding", above=0)
    norm_decay: float = key(0.0, "fraction of the weight decay that weights of norms get", at_least=0)
    parts: dict[str, PartConfig] = key(
        factory=dict, help="parts of the method that learn in their own way, by their names in --dry-run"
    )
    freeze_last_layer: str = key("1 epochs", "prototypes do not train for this long")

    def __post_init__(self) -> None:
        if self.kind == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov=true looks ahead by the momentum: it needs momentum above 0")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle = {} if self.clip else {"clip_each": "clip=null: gradients are not clipped"}
        if self.kind == "sgd":
            return idle | {"betas": "they are of kind=adamw"}
        return idle | dict.fromkeys(("momentum", "nesterov"), "it is of kind=sgd")

    def peak(self, batch_size: int) -> float:
        """Return the learning rate after warm-up for this (global) batch size."""
        reference, power = RULES[self.lr_rule]
        return self.lr.value * (batch_size / reference) ** power


class Optimizer:
    """AdamW or SGD with its schedules. What has two or more dimensions decays (positions and tokens, too).

    `inner` is torch's own. With gradient g, rate r and decay d, SGD moves by r v, v <- momentum v + g + d w.
    """

    def __init__(self, model: Method, config: OptimizerConfig, progress: Progress) -> None:
        self.config = config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rates = _rates(model, config)
        parts = _parts(model, config)
        norms = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None
        }
        groups: dict[tuple, dict[str, Any]] = {}
        for name, p in self.named.items():
            part = parts.get(id(p))
            decay = 1.0 if p.ndim > 1 else config.norm_decay if id(p) in norms else 0.0
            if part is not None and name.endswith("bias"):
                decay = config.parts[part].bias_decay
            # The group of what decays comes first, as it always has: checkpoints count parameters by group.
            settings = (part or "", decay != 1.0, decay, rates.get(id(p), 1.0))
            groups.setdefault(settings, {"params": [], "part": part, "decay": decay, "rate": settings[3]})
            groups[settings]["params"].append(p)
        ordered = [groups[settings] for settings in sorted(groups)]
        devices = {p.device.type for p in self.named.values()}
        self.group = group_of(next(iter(self.named.values())))
        # One kernel for all of it; on a CPU it takes a fifth of the time. Of SGD torch has none for parts.
        fused = devices <= {"cuda", "cpu"} and not (config.kind == "sgd" and self.group is not None)
        self.skips_alone = devices == {"cuda"} and fused
        self.inner = _inner(config, ordered, fused=fused)
        self.networks: dict[int, str] = {}
        for name, part in model.networks().items():  # what two parts share is of the first
            for p in part.parameters():
                self.networks.setdefault(id(p), name)
        self.last_layers = model.prototypes()
        peak = config.peak(progress.batch_size)
        self.lr = Schedule(**{**vars(config.lr), "value": peak})
        self.frozen_steps = progress.steps_of(config.freeze_last_layer)
        if self.frozen_steps and not self.last_layers:
            raise ConfigError(
                f"optimizer.freeze_last_layer={config.freeze_last_layer!r}: this method has no prototypes to "
                "freeze; write optimizer.freeze_last_layer='0 steps'"
            )

    def state_dict(self) -> dict[int, Any]:
        """Return what torch's optimizer knows of each parameter. Rates and decays follow from the step:
        they are not state.
        """
        return self.inner.state_dict()["state"]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters in the order in which `state_dict` counts them."""
        return [p for group in self.inner.param_groups for p in group["params"]]

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Take over the state of another optimizer of the same parameters, perhaps of another device."""
        own = self.parameters()
        cut = {
            i: {name: cut_like(v, own[i]) if isinstance(v, Tensor) else v for name, v in known.items()}
            for i, known in state.items()
        }
        self.inner.load_state_dict({"state": cut, "param_groups": self.inner.state_dict()["param_groups"]})

    def schedule(self, progress: Progress) -> dict[str, float]:
        """Set this step's learning rate and weight decay; what was set."""
        lr, decay = self.lr.at(progress), self.config.weight_decay.at(progress)
        for group in self.inner.param_groups:
            part = PartConfig() if group["part"] is None else self.config.parts[group["part"]]
            own = lr if part.schedule is None else part.schedule.at(progress)
            group["lr"] = own * part.lr * group["rate"]
            group["weight_decay"] = group["decay"] * (
                decay if part.weight_decay is None else part.weight_decay
            )
        return {"lr": lr, "weight_decay": decay}

    def clip(self) -> Tensor:
        """Clip gradients in place and return the global norm before clipping. Not finite if any gradient
        is not.
        """
        gradients = [local_part(p.grad) for p in self.named.values() if p.grad is not None]
        norms = whole_norms(torch.stack(torch._foreach_norm(gradients)), self.group)
        total = torch.linalg.vector_norm(norms)
        if self.config.clip is not None:
            if self.config.clip_each == "module":
                names = [self.networks.get(id(p), "") for p in self.named.values() if p.grad is not None]
                modules = sorted(set(names))
                where = torch.tensor([modules.index(name) for name in names])
                where = where.to(norms.device, non_blocking=True)
                squares = norms.new_zeros(len(modules)).index_add_(0, where, norms**2)
                norms = squares.sqrt()[where]
            elif self.config.clip_each == "all":
                norms = total.expand(len(norms))
            factors = (self.config.clip / (norms + 1e-6)).clamp(max=1)
            torch._foreach_mul_(gradients, list(factors.unbind()))
        return total

    def step(self, scaler: torch.amp.GradScaler, finite: Bool[Tensor, ""]) -> None:
        """Move the parameters; on a GPU only where gradients are `finite`, which its kernels ask: nothing
        waits for the answer.
        """
        if self.skips_alone and not scaler.is_enabled():  # a loss scaler tells it by itself
            self.inner.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
            self.inner.found_inf = 1 - finite.float()  # pyright: ignore[reportAttributeAccessIssue]
        if self.config.kind == "sgd" and self.config.momentum:
            self._begin_momentum()
        scaler.step(self.inner)

    def _begin_momentum(self) -> None:
        """Give zero momentum to what gets its first gradient, which is what it begins with in any case.

        The one kernel takes tensors that all have momentum, or none: what rested before has none yet.
        """
        for p in self.named.values():
            if p.grad is not None and self.inner.state[p].get("momentum_buffer") is None:
                self.inner.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def drop_frozen(self, progress: Progress) -> None:
        """Forget the gradients of prototypes while they are frozen: they then stay, undecayed."""
        if progress.step < self.frozen_steps:
            for parameter in self.last_layers:
                parameter.grad = None


def _inner(config: OptimizerConfig, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
    """Torch's optimizer of these groups."""
    if config.kind == "sgd":
        return torch.optim.SGD(
            groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=fused, foreach=not fused
        )
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused, foreach=not fused)


def _parts(method: Method, config: OptimizerConfig) -> dict[int, str]:
    """The name in `config.parts` of each parameter that one of them has, by its id.

    What two parts share is of the first that is named; one without trained parameters is no mistake: a
    variant of the method lacks them.
    """
    found: dict[int, str] = {}
    for part in config.parts:
        for network in networks_named(method, part, "optimizer.parts"):
            for p in network.parameters():
                found.setdefault(id(p), part)
    return found


def _rates(method: Method, config: OptimizerConfig) -> dict[int, float]:
    """Factor of the learning rate of each parameter of an encoder, by its id: for its depth, and for patches.

    The layer i of n, what embeds being the first, gets layer_decay ** (n - i).
    """
    layers = method.layers()
    if config.layer_decay != 1 and not layers:
        raise ConfigError(
            f"optimizer.layer_decay={config.layer_decay:g}: this method names no layers that learn; "
            "write optimizer.layer_decay=1.0"
        )
    patches = {id(p) for network in method.trained() for p in network.patch_embed.parameters()}
    return {
        id(p): (config.patch_embed_lr if id(p) in patches else 1.0) * config.layer_decay ** (len(layers) - i)
        for i, layer in enumerate(layers)
        for p in layer
    }
