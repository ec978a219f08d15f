"""Low-rank updates of linear layers (LoRA): W + (alpha / rank) B A, of which A and B alone learn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from foveola.config import ConfigError, key
from foveola.models.vit import VisionTransformer

UPDATED = {"qkv": ("attn.qkv",), "proj": ("attn.proj",), "mlp": ("mlp.fc1", "mlp.fc2")}  # in a block


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates in place of the encoder's own weights."""

    rank: int = key(8, "rows of A, columns of B", at_least=1, at_most=2**12)
    alpha: float = key(16.0, "updates are alpha / rank times B A", above=0)
    targets: tuple[Literal["qkv", "proj", "mlp"], ...] = key(
        ("qkv", "proj", "mlp"), "linear layers of a block that are updated"
    )
    blocks: int | None = key(None, "so many last blocks are updated; null = all", at_least=1)

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets={list(self.targets)}: some of {', '.join(UPDATED)}, each once")


class LoraLinear(nn.Linear):
    """A linear layer with the weight and bias of another, and an update of low rank that starts at zero.

    As in the official code A is uniform in +-1 / sqrt(in), and B is zero (LoRA, Section 4.1).
    """

    lora_scale: Tensor

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        drawn = torch.rand(rank, self.in_features, generator=generator, device="cpu")
        down = (2 * drawn - 1) * self.in_features**-0.5
        self.lora_a = nn.Parameter(down.to(base.weight))
        self.lora_b = nn.Parameter(base.weight.new_zeros(self.out_features, rank))
        self.register_buffer("lora_scale", torch.tensor(alpha / rank, device=base.weight.device))

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return super().forward(input) + self.lora_scale * linear(linear(input, self.lora_a), self.lora_b)


def add_adapters(network: VisionTransformer, config: LoraConfig, generator: torch.Generator) -> None:
    """Update the linear layers of a network at low rank; nothing else of it learns from here on.

    Where all blocks are updated, tokens for what is masked still learn, if they did; before the first block
    that is updated there is no gradient. Raises ConfigError for more blocks than there are, and for a rank
    that is not low.
    """
    count = len(network.blocks) if config.blocks is None else config.blocks
    if count > len(network.blocks):
        raise ConfigError(f"lora.blocks={count}: the encoder has {len(network.blocks)} blocks")
    masks = [p for p in (network.mask_token, network.pos_mask_token) if p is not None and p.requires_grad]
    network.requires_grad_(False)
    for p in masks if config.blocks is None else ():
        p.requires_grad_(True)
    for block in network.blocks[-count:]:
        for layer in (layer for target in config.targets for layer in UPDATED[target]):
            owner, _, name = layer.rpartition(".")
            module = block.get_submodule(owner)
            base = module.get_submodule(name)
            assert isinstance(base, nn.Linear)
            if config.rank >= (bound := min(base.in_features, base.out_features)):
                raise ConfigError(f"lora.rank={config.rank} is not low: {layer} has {bound} rows or columns")
            setattr(module, name, LoraLinear(base, config.rank, config.alpha, generator))


@torch.no_grad()
def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a network, or of several, with updates of low rank added to what they update.

    The names are those of the network without updates. One that has none is returned as it is.
    """
    found = {name: value for name, value in state.items() if not _own(name)}
    for name in state:
        if name.rpartition(".")[2] == "lora_scale":
            where = name.removesuffix("lora_scale")
            update = state[name] * (state[f"{where}lora_b"] @ state[f"{where}lora_a"])
            found[f"{where}weight"] = found[f"{where}weight"] + update
    return found


def _own(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_a", "lora_b", "lora_scale")
