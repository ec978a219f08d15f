"""Projection heads: an MLP to a unit sphere, then similarities to prototypes (DINO, iBOT, DINOv2, ODIS)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from torch.nn.init import trunc_normal_, uniform_, zeros_

from foveola.config import key


@dataclass(frozen=True)
class HeadConfig:
    """How a projection head is built. The defaults are those of iBOT."""

    prototypes: int = key(8192, "number of prototypes, the rows of the last layer", at_least=2, at_most=2**24)
    hidden: int = key(2048, "width of the hidden layers", at_least=1, at_most=2**16)
    bottleneck: int = key(256, "width of the unit sphere in which prototypes live", at_least=1, at_most=2**16)
    layers: int = key(3, "linear layers before the prototypes", at_least=1, at_most=100)
    norm_last_layer: bool = key(True, "keep prototypes at length one (their lengths do not train)")
    mlp_of: str | None = key(
        None, "name of the head whose MLP this one uses, so that prototypes alone are its own; null = its own"
    )

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {"hidden": "a head of one layer has no hidden ones"} if self.layers == 1 else {}


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: logit_k = g_k <v_k / |v_k|, h>."""

    entries: ClassVar = ("lend",)  # besides `forward`, what may be called where weights are in parts

    def __init__(self, width: int, count: int, trainable_length: bool) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(count, width))
        self.g = nn.Parameter(torch.ones(count, 1), requires_grad=trainable_length)
        self.reset()

    def reset(self) -> None:
        """Start as linear layers of torch do, which the official codes leave alone: U(-a, a), a = 1 /
        sqrt(D).

        Directions alone count, but AdamW turns long vectors more slowly than short ones.
        """
        bound = self.v.shape[1] ** -0.5
        uniform_(self.v, -bound, bound)

    def forward(self, h: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        # The function behind torch's own weight_norm: with many prototypes five times as fast as g * v / |v|.
        return linear(h, torch._weight_norm(self.v, self.g, 0))

    def lend(self, use: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return what `use` makes of directions v, lengths g and inputs, which no gradient may read later.

        Where weights are in parts (`parallel=fsdp`), they are whole while it works.
        """
        return use(self.v, self.g, *inputs)


class ProjectionHead(nn.Module):
    """`project` to unit vectors, then `prototypes`; `forward` does both.

    `mlp` is that of another head where `config.mlp_of` names one: the same module.
    """

    def __init__(self, width: int, config: HeadConfig, mlp: nn.Sequential | None = None) -> None:
        super().__init__()
        self.mlp = self._mlp(width, config) if mlp is None else mlp
        self.last_layer = Prototypes(config.bottleneck, config.prototypes, not config.norm_last_layer)

    @staticmethod
    def _mlp(width: int, config: HeadConfig) -> nn.Sequential:
        widths = [width] + [config.hidden] * (config.layers - 1) + [config.bottleneck]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        mlp = nn.Sequential(*layers[:-1])
        for layer in mlp:
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                zeros_(layer.bias)
        return mlp

    def project(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n P"]:
        h = self.mlp(x)
        # Half precision cannot hold 1e-12; float32 keeps unit vectors of unit length.
        return normalize(h.float(), dim=-1).to(h.dtype)

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n K"]:
        return self.last_layer(self.project(x))
