"""The shape of a Vision Transformer, as its users choose it."""

from dataclasses import dataclass
from typing import Literal

from foveola.config import key
from foveola.models.blocks import BlockShape
from foveola.models.windows import global_blocks

SIZES = {  # width, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),
}
PARAMETERS = 1e11  # 15 times the largest published network of this kind; more is a mistake


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the network. Defaults: ViT-S/16 as in DINO and iBOT."""

    size: Literal["tiny", "small", "base", "large", "huge", "giant"] = key(
        "small", "width, depth and heads by name"
    )
    width: int | None = key(None, "token width instead of the size's", at_least=1, at_most=2**16)
    depth: int | None = key(None, "blocks instead of the size's", at_least=1, at_most=1000)
    heads: int | None = key(None, "attention heads instead of the size's", at_least=1, at_most=2**12)
    patch_size: int = key(16, "pixels a side of a patch", at_least=1, at_most=2**10)
    image_size: int = key(
        224, "image side that fits the position table without resizing", at_least=1, at_most=2**13
    )
    channels: int = key(3, "channels of images; 0, of a run = those of its data", at_least=0, at_most=2**10)
    mlp: Literal["gelu", "swiglu"] = key("gelu", "plain MLP, or the gated one of large DINOv2 models")
    mlp_ratio: float = key(4.0, "hidden width of the MLP over the token width", above=0, at_most=64)
    class_token: bool = key(True, "whether there are class (object) tokens; CAPI has none")
    registers: int = key(0, "learnable extra tokens that no loss reads", at_least=0, at_most=2**12)
    norm: Literal["layer", "rms"] = key("layer", "LayerNorm, or RMSNorm (CAPI)")
    norm_eps: float | None = key(
        None, "added to variances in norms; null = 1e-6 of LayerNorm, 1e-5 of RMSNorm", above=0
    )
    final_norm_affine: bool = key(True, "whether the last norm has weights of its own")
    final_norm: Literal["tokens", "pooled", "none"] = key(
        "tokens", "what the last norm normalises: each token, the mean of the patches (fc_norm), or nothing"
    )
    patch_norm: bool = key(False, "a norm of embedded patches before their positions are added (AIM)")
    bias: bool = key(True, "biases in attention and MLP")
    drop_path: float = key(0.1, "stochastic depth in training: rate of the last block", at_least=0, below=1)
    drop_path_rule: Literal["linear", "constant"] = key(
        "linear", "the rate rises from 0 over the blocks, or is the same in all"
    )
    drop_path_subset: bool = key(
        False, "drop a fixed fraction of images and skip their work (DINOv2, CAPI), not each by chance"
    )
    positions: Literal["learned", "sincos", "rope", "field", "none"] = key(
        "learned",
        "added to patches: a table that trains or is fixed (MAE, I-JEPA), or a field; or rotary (CAPI), none",
    )
    relative_bias: bool = key(
        False, "tables of biases of attention by relative position, one a block (BEiT, SimMIM)"
    )
    field_size: tuple[int, int] = key(
        (50, 50), "rows and columns of positions=field", at_least=2, at_most=2**12
    )
    field_interpolation: Literal["linear", "bicubic"] = key(
        "linear", "interpolation between the nodes of the field"
    )
    field_alignment: Literal["cells", "corners"] = key(
        "cells", "nodes of the field are centres of cells, as pixels are, or reach the image's borders"
    )
    position_antialias: bool = key(
        False, "antialias when resizing positions: timm does, DINO and iBOT do not"
    )
    position_offset: float = key(
        0.0, "added to the side when resizing positions: 0.1 in DINO, iBOT and DINOv2's weights", at_least=0
    )
    position_init: Literal["random", "sincos"] = key(
        "random", "start positions from noise of 0.02 (DINO), or from sines"
    )
    rope: Literal["axial", "capi", "dinov3"] = key(
        "axial", "rotary positions as meant, or as in the code behind CAPI's or DINOv3's released weights"
    )
    layer_scale: float | None = key(
        None, "initial per-channel scale of each residual branch; null = none", above=0
    )
    window: int | None = key(
        None,
        "patches a side of windows within which patches read each other; null = they read all",
        at_least=1,
    )
    global_blocks: int = key(4, "blocks without windows, the last one of as many equal parts", at_least=1)
    init: Literal["normal", "xavier"] = key(
        "normal", "fresh weights: truncated normal of 0.02 (DINO), or Xavier uniform (MAE, CAPI)"
    )

    def __post_init__(self) -> None:
        width, depth, heads = self.shape
        if self.parameters > PARAMETERS:
            raise ValueError(
                f"width={width}, depth={depth}, patch_size={self.patch_size}, image_size={self.image_size} "
                f"make a network of {self.parameters:.0e} parameters, beyond any machine"
            )
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        if self.window is not None and self.global_blocks > depth:
            raise ValueError(f"global_blocks={self.global_blocks} of depth={depth} blocks")
        if self.window is not None and self.relative_bias:
            raise ValueError("window and relative_bias cannot be had together: set one to null, false")
        if self.positions == "sincos" and width % 4:
            raise ValueError(f"positions=sincos needs a width that is a multiple of 4, not {width}")
        if self.position_offset and self.position_antialias:
            raise ValueError("position_offset and position_antialias cannot be had together")
        if self.positions == "rope":
            if width // heads % 4:
                raise ValueError(f"positions=rope needs heads of 4, 8, 12 ... channels, not {width // heads}")
            if self.registers % 4 and self.rope != "dinov3":
                raise ValueError(
                    f"positions=rope places registers on four sides: registers={self.registers} "
                    "is not a multiple of 4"
                )

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle: dict[str, str] = {}
        if self.width and self.depth and self.heads:
            idle["size"] = "width, depth and heads are all given; set those that `size` is to give to null"
        if not self.drop_path:
            idle |= dict.fromkeys(("drop_path_rule", "drop_path_subset"), "drop_path=0.0 drops no path")
        if self.window is None:
            idle["global_blocks"] = "window=null: all blocks read everything"
        where = f"positions={self.positions}"
        if self.positions != "field":
            field = ("field_size", "field_interpolation", "field_alignment")
            idle |= dict.fromkeys(field, f"{where} has no field")
        if self.positions != "rope":
            idle["rope"] = f"{where} does not rotate"
        if self.positions not in ("learned", "field"):
            idle["position_init"] = f"{where} has nothing to start"
        if self.positions != "learned":
            idle["position_offset"] = f"{where} has no table that is resized so"
        if self.positions not in ("learned", "sincos"):
            idle["position_antialias"] = f"{where} has no table that is resized"
            fits = self.positions in ("rope", "none") or self.position_init == "random"
            if fits and not self.relative_bias:
                idle["image_size"] = f"{where} fits images of any size"
        if self.final_norm == "none":
            idle["final_norm_affine"] = "final_norm=none"
        return idle

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches that fit the position table."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def shape(self) -> tuple[int, int, int]:
        """(width, depth, heads)."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @property
    def seen_channels(self) -> int:
        """Channels of images: 3 while nobody has looked at the data."""
        return self.channels or 3

    @property
    def parameters(self) -> float:
        """About how many numbers train: blocks, patch embedding, positions, tokens."""
        width, depth, _ = self.shape
        field = self.field_size[0] * self.field_size[1] if self.positions == "field" else 0
        entries = self.image_size**2 / self.patch_size**2 + self.registers + field
        return (
            depth * (4 + 2 * self.mlp_ratio) * width**2
            + (self.seen_channels * self.patch_size**2 + entries) * width
        )

    def block(self, index: int) -> BlockShape:
        """Return what the block of this index is made of."""
        width, depth, heads = self.shape
        fraction = 1.0 if self.drop_path_rule == "constant" else index / max(depth - 1, 1)
        return BlockShape(
            width=width,
            heads=heads,
            hidden=int(width * self.mlp_ratio),
            norm=self.norm,
            norm_eps=self.norm_eps,
            mlp=self.mlp,
            bias=self.bias,
            layer_scale=self.layer_scale,
            drop_path=self.drop_path * fraction,
            drop_subset=self.drop_path_subset,
            relative=self.grid if self.relative_bias else None,
            window=None if index in global_blocks(depth, self.global_blocks) else self.window,
        )
