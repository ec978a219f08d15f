"""AdamW over named parameters: which decay, which learn at another rate, how gradients are clipped."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveola.config import key
from foveola.schedules import Progress, Schedule, steps_of

RULES = {"linear": (256, 1.0), "sqrt": (1024, 0.5), "none": (1, 0.0)}  # lr * (batch / reference) ** power


@dataclass(frozen=True)
class OptimizerConfig:
    """Defaults: iBOT ViT-S."""

    lr: Schedule = key(
        factory=lambda: Schedule(value=5e-4, start=0.0, end=1e-6, warmup="10 epochs", shape="cosine"),
        help="learning rate; its value is scaled by lr_rule, its start and end are not",
    )
    lr_rule: Literal["linear", "sqrt", "none"] = key(
        "linear", "lr x batch/256, lr x sqrt(batch/1024), or lr as it is"
    )
    weight_decay: Schedule = key(
        factory=lambda: Schedule(value=0.04, end=0.4, shape="cosine"), help="weight decay"
    )
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's", at_least=0, below=1)
    clip: float | None = key(3.0, "largest gradient norm; null = no clipping", above=0)
    clip_each: Literal["parameter", "all"] = key(
        "parameter", "clip each parameter tensor alone (DINO, iBOT) or all together"
    )
    freeze_last_layer: str = key("1 epochs", "prototypes do not train for this long")

    def peak(self, batch_size: int) -> float:
        """The learning rate after warm-up for this (global) batch size."""
        reference, power = RULES[self.lr_rule]
        return self.lr.value * (batch_size / reference) ** power


class Optimizer:
    """AdamW with its schedules. What has two or more dimensions decays (positions and tokens, too)."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, progress: Progress) -> None:
        self.config = config
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decays = [p for name, p in self.named.items() if p.ndim > 1]
        others = [p for name, p in self.named.items() if p.ndim <= 1]
        groups = [
            {"params": decays, "decays": True},
            {"params": others, "decays": False, "weight_decay": 0.0},
        ]
        fused = all(p.is_cuda for p in self.named.values())
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=fused, foreach=not fused)
        self.last_layers = [p for name, p in self.named.items() if ".last_layer." in name]
        peak = config.peak(progress.batch_size)
        self.lr = Schedule(**{**vars(config.lr), "value": peak})
        self.frozen_steps = steps_of(
            config.freeze_last_layer,
            total_steps=progress.total_steps,
            steps_per_epoch=progress.steps_per_epoch,
            batch_size=progress.batch_size,
        )

    def state_dict(self) -> dict[int, Any]:
        """What AdamW knows of each parameter. Rates and decays follow from the step: they are not state."""
        return self.adamw.state_dict()["state"]

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Take over the state of another optimizer of the same parameters, perhaps of another device."""
        self.adamw.load_state_dict({"state": state, "param_groups": self.adamw.state_dict()["param_groups"]})

    def schedule(self, progress: Progress) -> dict[str, float]:
        """Set this step's learning rate and weight decay; what was set."""
        lr, decay = self.lr.at(progress), self.config.weight_decay.at(progress)
        for group in self.adamw.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0
        return {"lr": lr, "weight_decay": decay}

    def clip(self) -> Tensor:
        """Clip gradients in place; the global norm before clipping. Not finite if any gradient is not."""
        gradients = [p.grad for p in self.named.values() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        total = torch.linalg.vector_norm(norms)
        if self.config.clip is not None:
            if self.config.clip_each == "parameter":
                factors = (self.config.clip / (norms + 1e-6)).clamp(max=1)
                torch._foreach_mul_(gradients, list(factors.unbind()))
            else:
                torch._foreach_mul_(gradients, (self.config.clip / (total + 1e-6)).clamp(max=1))
        return total

    def drop_frozen(self, progress: Progress) -> None:
        """Forget the gradients of prototypes while they are frozen: AdamW then leaves them, undecayed."""
        if progress.step < self.frozen_steps:
            for parameter in self.last_layers:
                parameter.grad = None
