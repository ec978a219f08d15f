"""What a teacher's tokens ask of the student: soft assignments to prototypes, and the signals of collapse."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.functional import linear

from foveola import distributed
from foveola.config import key
from foveola.cross_entropy import (
    PrototypeWeights,
    first_choice,
    multiply,
    precision,
    room_for,
    rows_in_cache,
    scales_of,
)
from foveola.logged import Averages
from foveola.losses import Centering, entropy, sinkhorn
from foveola.schedules import Progress, Schedule

# Rows whose entropy is logged, evenly spread: of thousands of rows it costs as much as their targets.
SAMPLE = 128


@dataclass(frozen=True)
class TargetConfig:
    """How teacher logits become targets. Defaults: DINO and iBOT."""

    kind: Literal["centering", "sinkhorn"] = key(
        "centering", "running mean of logits, or Sinkhorn-Knopp over the batch"
    )
    temperature: Schedule = key(
        factory=lambda: Schedule(value=0.07, start=0.04, warmup="30 epochs", per_epoch=True),
        help="teacher temperature",
        above=0,
    )
    student_temperature: float = key(0.1, "temperature of predictions", above=0)
    momentum: float = key(0.9, "momentum of the running mean of logits", at_least=0, at_most=1)
    iterations: int = key(3, "iterations of Sinkhorn-Knopp", at_least=1, at_most=1000)

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        if self.kind == "sinkhorn":
            return {"momentum": "kind=sinkhorn has no running mean"}
        return {"iterations": "kind=centering does not iterate"}


class Targets(nn.Module):
    """Teacher logits to targets, and the signals by which collapse shows."""

    used: Tensor

    def __init__(self, config: TargetConfig, prototypes: int) -> None:
        super().__init__()
        self.config = config
        self.centering = Centering(prototypes, config.momentum) if config.kind == "centering" else None
        self.register_buffer("used", torch.zeros(prototypes, dtype=torch.bool))
        self.epoch = -1

    @torch.no_grad()
    def forward(
        self,
        features: Float[Tensor, "n P"],
        prototypes: PrototypeWeights,
        progress: Progress,
        everyone: Float[Tensor, "m P"] | None = None,
    ) -> "TeacherTargets":
        """Return targets of n rows, from what the teacher's head projects and its prototypes.

        The centre learns the mean logits of `everyone` instead of those of `features`, if given.
        """
        if self.centering is not None:
            counted = features if everyone is None else everyone
            if len(counted):
                # Logits are linear in the features: their mean needs the prototypes only once.
                with torch.autocast(features.device.type, enabled=False):
                    mean = prototypes[0] @ counted.float().mean(dim=0)
                self.centering.update(mean * scales_of(prototypes), len(counted))
        # Once an epoch, at its first step: a run resumed within an epoch keeps what the checkpoint held.
        if progress.step % progress.steps_per_epoch == 0 and int(progress.epoch) != self.epoch:
            self.epoch = int(progress.epoch)
            self.used.zero_()
        return TeacherTargets(self, features, prototypes, self.config.temperature.at(progress))

    def step(self) -> None:
        if self.centering is not None:
            self.centering.step()

    def gather(self) -> None:
        """Let each process know the first choices of all."""
        self.used |= distributed.all_reduce_max(self.used.to(torch.uint8)).bool()

    def prototypes_used(self) -> float:
        """Return the fraction of prototypes that were the first choice of a row of any process since the
        epoch began; all processes call it.
        """
        self.gather()
        return self.used.float().mean().item()


class TeacherTargets:
    """Targets of n rows as a loss reads them (`cross_entropy.Rows`), and what shows of them in the logs.

    Sinkhorn-Knopp needs all rows at once. Centred ones are made when they are asked for, and stand where
    those before them stood, so that no more than some rows of logits are in memory at a time.
    """

    def __init__(
        self,
        owner: Targets,
        features: Float[Tensor, "n P"],
        prototypes: PrototypeWeights,
        temperature: float,
    ) -> None:
        self.owner, self.features, self.temperature = owner, features, temperature
        self.v, self.scales = prototypes[0].to(precision(features)), scales_of(prototypes)
        self.all: Tensor | None = None
        self.sum = torch.zeros_like(self.scales)
        self.entropies: list[Tensor] = []
        # Now, and not when it is asked for: ranks without rows, who never ask, take part in its sums, too.
        if owner.centering is None:
            logits = linear(features, self.v) * self.scales
            self.all = sinkhorn(logits, temperature, owner.config.iterations)

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Float32[Tensor, "b K"]:
        start, stop, _ = rows.indices(len(self))
        if self.all is not None:
            made = self.all[rows]
        else:
            room = room_for("targets", stop - start, len(self.v), self.features.device)
            made = multiply(self.features[rows], self.v, room)
        stride = max(-(-len(self) // SAMPLE), 1)
        for part in made.split(rows_in_cache(made.device, made.shape[1])):
            if self.owner.centering is not None:
                part.copy_(self.owner.centering(part * self.scales, self.temperature))
            self.owner.used.index_fill_(0, first_choice(part), True)
            self.sum += part.sum(dim=0)
            self.entropies.append(entropy(part[-start % stride :: stride]))
            start += len(part)
        return made

    def logs(self) -> dict[str, Averages]:
        """Return the logs of the rows that were asked for."""
        rows = len(self)
        entropies = torch.cat(self.entropies).mean() * rows if rows else self.sum.new_zeros(())
        return {
            "target_entropy": Averages((entropies,), rows),
            "kl_to_uniform": Averages((self.sum,), rows, kl_to_uniform),
        }


def kl_to_uniform(shares: Float[Tensor, "K"]) -> Float[Tensor, ""]:
    """Return how far a distribution over prototypes is from all of them alike, in nats: 0 to log K."""
    return math.log(len(shares)) - entropy(shares)
