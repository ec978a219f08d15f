"""The clusters of CAPI while it trains: centroids, patches of the past, and what was seen of positions."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize

from foveola import distributed
from foveola.clustering import Clusters, cluster, position_information
from foveola.config import ConfigError, key
from foveola.logged import Averages
from foveola.losses import entropy
from foveola.methods.targets import kl_to_uniform
from foveola.schedules import Progress


@dataclass(frozen=True)
class ClusteringConfig:
    """Assignments of patches to clusters. Defaults: CAPI."""

    prototypes: int = key(16384, "clusters", at_least=2, at_most=2**24)
    balance: Literal["position", "all"] = key(
        "position", "use all clusters alike at each position (no positional collapse), or over all patches"
    )
    temperature: float = key(0.06, "temperature of the logits that are balanced", above=0)
    student_temperature: float = key(
        0.12, "temperature of predictions, and of the loss of the clusters", above=0
    )
    iterations: int = key(3, "iterations of Sinkhorn-Knopp", at_least=1, at_most=1000)
    queue: int = key(
        0,
        "past images whose patches are balanced along, over all processes: for small batches",
        at_least=0,
        at_most=2**24,
    )


class Clustering(nn.Module):
    """Centroids, patches of the past, and what was seen of positions (CAPI, Section 3.1)."""

    past: Tensor | None
    seen: Tensor
    used: Tensor

    def __init__(self, config: ClusteringConfig, width: int, patches: int, trained: bool) -> None:
        super().__init__()
        self.config = config
        if trained:
            # Logits of unit vectors then have a deviation of 1, and those over 0.06 are sharp from the start.
            self.weight = nn.Parameter(torch.randn(config.prototypes, width))
            self.bias = nn.Parameter(torch.zeros(config.prototypes))
        count = config.queue // (processes := distributed.world_size())
        if trained and config.queue and not count:
            raise ConfigError(
                f"method.clustering.queue={config.queue} is cut over {processes} processes: "
                "at least as many, or 0"
            )
        self.register_buffer("past", torch.zeros(patches, count, width) if trained and count else None)
        self.register_buffer("seen", torch.full((patches, config.prototypes), 1 / config.prototypes))
        self.register_buffer("used", torch.zeros(config.prototypes, dtype=torch.bool))
        self.filled, self.epoch = 0, -1
        # Of the parts of a step: its number, their mean assignments at each position in sum, how many.
        self.usage: tuple[int, Tensor, int] | None = None
        self.joined: Tensor | None = None  # the past of all processes, on the main one, until the next step

    def forward(self, patches: Float[Tensor, "B N D"], wanted: Int64[Tensor, "B Q"]) -> Clusters:
        """Cluster the teacher's patches and return the assignments of the wanted ones."""
        config = self.config
        unit = normalize(patches.float(), dim=-1, eps=1e-7).transpose(0, 1).contiguous()
        clusters = cluster(
            unit,
            self.weight,
            self.bias,
            wanted.T,
            temperature=config.temperature,
            student_temperature=config.student_temperature,
            iterations=config.iterations,
            by_position=config.balance == "position",
            past=None if self.past is None or not self.filled else self.past[:, : self.filled],
        )
        if self.past is not None:
            self._remember(unit)
        return clusters

    @torch.no_grad()
    def _remember(self, unit: Float[Tensor, "N B D"]) -> None:
        """The newest patches first; the oldest fall out."""
        assert self.past is not None
        room = self.past.shape[1]
        newest = torch.cat((unit, self.past[:, : self.filled]), dim=1)[:, :room]
        self.filled, self.joined = newest.shape[1], None
        self.past[:, : self.filled] = newest

    def gather(self) -> None:
        """Join the past of all processes for a checkpoint, the newest first, and the clusters that they used;
        every process calls it.
        """
        self._join_used()
        if self.past is None or distributed.world_size() == 1:
            return
        rows = distributed.gather_rows(self.past[:, : self.filled].transpose(0, 1).cpu())
        if distributed.is_main():
            by_age = rows.unflatten(0, (distributed.world_size(), self.filled)).transpose(0, 1)
            self.joined = by_age.flatten(0, 1).transpose(0, 1).contiguous()

    def _join_used(self) -> None:
        self.used |= distributed.all_reduce_max(self.used.to(torch.uint8)).bool()

    def prototypes_used(self) -> float:
        """Return the fraction of prototypes that were the first choice of a patch since the epoch began;
        all processes call it.
        """
        self._join_used()
        return self.used.float().mean().item()

    @torch.no_grad()
    def watch(self, clusters: Clusters, progress: Progress) -> dict[str, Tensor | Averages]:
        """Note which prototypes are used and where; what to log of it."""
        if progress.step % progress.steps_per_epoch == 0 and int(progress.epoch) != self.epoch:
            self.epoch = int(progress.epoch)
            self.used.zero_()
        self.used |= clusters.first
        usage, parts = clusters.usage, 1
        if self.usage is not None and self.usage[0] == progress.step:
            usage, parts = self.usage[1] + usage, self.usage[2] + 1
        self.usage = progress.step, usage, parts
        return {
            "target_entropy": entropy(clusters.targets).mean(),
            "kl_to_uniform": Averages((clusters.usage.mean(dim=0),), 1, kl_to_uniform),
            # Of the images of all processes, by what the first saw before: to know what all saw would mean to
            # exchange as much as all positions have clusters at each step.
            "position_information": Averages((clusters.usage,), 1, partial(position_information, self.seen)),
        }

    @torch.no_grad()
    def step(self) -> None:
        """Note after a step which clusters were where."""
        if self.usage is not None:  # in a new tensor, as what is to be logged of the step reads the old one
            _, usage, parts = self.usage
            self.seen, self.usage = torch.lerp(self.seen, usage / parts, 0.02), None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.joined is not None:
            destination[f"{prefix}past"] = self.joined

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        """Take this process's part of the past of all, however many processes there were."""
        past, extra = (state_dict.get(f"{prefix}{name}") for name in ("past", "_extra_state"))
        if self.past is not None and past is not None and extra is not None:
            world = distributed.world_size()
            filled = min(extra["filled"] // world, self.past.shape[1])
            own = torch.zeros_like(self.past)
            own[:, :filled] = past[:, distributed.rank() : filled * world : world]
            state_dict |= {f"{prefix}past": own, f"{prefix}_extra_state": extra | {"filled": filled}}
        super()._load_from_state_dict(state_dict, prefix, *others)

    def get_extra_state(self) -> dict[str, int]:
        return {"filled": self.filled if self.joined is None else self.joined.shape[1], "epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.filled, self.epoch = state["filled"], state["epoch"]
