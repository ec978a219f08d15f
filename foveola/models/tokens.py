"""What goes into a ViT besides pixels, what comes out of it, and how its tokens stand."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class Features:
    """The tokens of B images, after the final norm unless `Inputs` asks for others.

    It is a pytree of its three tensors, so that `torch.vmap`, `torch.export` and `tree_map` go through it.
    """

    objects: Float[Tensor, "B M D"]  # M = 0 without class token
    registers: Float[Tensor, "B R D"]
    patches: Float[Tensor, "B N D"]  # of the kept patches only, in their order, where some were dropped
    grid: tuple[int, int]


def _tensors_of(features: Features) -> tuple[list[Tensor], tuple[int, int]]:
    return [features.objects, features.registers, features.patches], features.grid


def _features_of(tensors: Any, grid: tuple[int, int]) -> Features:
    """Features again; what stands for a tensor while a pytree is mapped need not be one."""
    made = object.__new__(Features)
    for name, value in zip(("objects", "registers", "patches", "grid"), (*tensors, grid), strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    Features,
    _tensors_of,
    _features_of,
    serialized_type_name="foveola.Features",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """What a network gets besides the pixels of B images of N patches; None: as usual."""

    # Patches that each object token may read; None: one token, the class token, reads all. An object without
    # patches reads everything.
    objects: Bool[Tensor, "B M N"] | None = None
    masked: Bool[Tensor, "B N"] | None = None  # replaced by the mask token before positions are added
    kept: Int64[Tensor, "B K"] | None = None  # by index; the others are dropped and cost nothing
    positions: Float[Tensor, "B 4"] | None = None  # (x0, y0, x1, y1) in the position field; None: all of it
    flips: Bool[Tensor, "B"] | None = None  # views that are mirrored, so read the field from right to left
    unplaced: Bool[Tensor, "B N"] | None = None  # have a learned token for position: `learn_position_mask`
    final_norm: bool = True  # False: the output of the last block as it is, for a norm after pooling


NOTHING = Inputs()


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """What the blocks need to know about their tokens: [object tokens, registers, patches]."""

    objects: int
    registers: int
    grid: tuple[int, int]
    readable: Bool[Tensor, "B 1 M T"] | None
    rotation: Float[Tensor, "#B 2 T d"] | None

    @property
    def reading(self) -> tuple[int, Tensor | None, Tensor | None, tuple[int, int]]:
        """What `Block.forward` gets besides the tokens."""
        return self.objects, self.readable, self.rotation, self.grid
