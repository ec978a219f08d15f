"""Predictors: from the tokens of the kept patches to what stands where the encoder saw nothing."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.init import normal_, trunc_normal_

from foveola.config import key
from foveola.models.blocks import Block, CrossBlock, initialise, make_norm
from foveola.models.embedding import token_rotation
from foveola.models.positions import (
    Rope,
    fixed_positions,
    resize_positions,
    take_rows,
)
from foveola.models.vit import Features, ViTConfig


@dataclass(frozen=True)
class PredictorConfig:
    """Shape of the predictor; norms, biases, positions and MLP are the encoder's. Defaults: CAPI."""

    kind: Literal["cross", "self"] = key(
        "cross", "mask tokens attend to the encoder's output only, or to it and to each other (MAE, I-JEPA)"
    )
    width: int | None = key(None, "token width; null = the encoder's", at_least=1, at_most=2**16)
    depth: int | None = key(None, "blocks; null = half the encoder's", at_least=1, at_most=1000)
    heads: int | None = key(
        None, "attention heads; null = as wide as the encoder's", at_least=1, at_most=2**12
    )
    drop_path: float | None = key(None, "stochastic depth; null = the encoder's", at_least=0, below=1)

    def network(self, encoder: ViTConfig) -> ViTConfig:
        """Return the predictor's blocks as the configuration of a network. Raises ValueError where that is
        none.
        """
        width, depth, heads = encoder.shape
        mine = self.width or width
        try:
            return dataclasses.replace(
                encoder,
                width=mine,
                depth=self.depth or max(depth // 2, 1),
                heads=self.heads or max(mine * heads // width, 1),
                drop_path=encoder.drop_path if self.drop_path is None else self.drop_path,
            )
        except ValueError as error:
            raise ValueError(f"predictor: {error}") from error


class Predictor(nn.Module):
    """Mask tokens, which differ in their positions alone, that read the encoder's tokens.

    `cross`: blocks of cross-attention and MLP. A prediction depends on no other, so any position may be asked
    for (CAPI, Section 3.2). `self`: ordinary blocks over [encoder's tokens, mask tokens] (CAPI, Table 1a).
    With fixed positions the encoder's tokens are first mapped to the predictor's width and get the positions
    of that width, too: the decoder of MAE and the predictor of I-JEPA.
    """

    pos_embed: Tensor | None

    def __init__(self, config: PredictorConfig, encoder: ViTConfig) -> None:
        super().__init__()
        network = config.network(encoder)
        width, depth, heads = network.shape
        outside = encoder.shape[0]
        self.config, self.encoder = config, encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        fixed = encoder.positions == "sincos"
        if fixed:
            table = fixed_positions(encoder.grid, width)
            self.register_buffer("pos_embed", table, persistent=False)
        elif encoder.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, encoder.grid[0] * encoder.grid[1], width))
        else:
            self.pos_embed = None
        self.rope = Rope(width // heads, encoder.rope) if encoder.positions == "rope" else None
        self.embed: nn.Module = nn.Identity()
        if config.kind == "self" and (fixed or width != outside):
            self.embed = nn.Linear(outside, width, bias=encoder.bias)
        shapes = [network.block(i) for i in range(depth)]
        self.blocks = nn.ModuleList(
            CrossBlock(shape, outside) if config.kind == "cross" else Block(shape) for shape in shapes
        )
        self.norm = make_norm(encoder.norm, width, encoder.final_norm_affine)
        initialise(self, encoder.init)
        normal_(self.mask_token, std=0.02)
        if isinstance(self.pos_embed, nn.Parameter):
            trunc_normal_(self.pos_embed, std=0.02)

    @property
    def width(self) -> int:
        return self.mask_token.shape[2]

    def forward(
        self,
        context: Features,
        targets: Int64[Tensor, "B P"] | None = None,
        keep: Int64[Tensor, "B K"] | None = None,
        groups: int = 1,
    ) -> Float[Tensor, "B P D"]:
        """Predict the patches at `targets` (None: at every position of the grid), after the final norm.

        `context` is what the encoder made of the patches `keep` (None: of all). Targets are `groups` of equal
        size, one after the other: mask tokens of one do not see those of another (I-JEPA's blocks).
        """
        tokens = torch.cat((context.objects, context.registers, context.patches), dim=1)
        if targets is None:
            count = context.grid[0] * context.grid[1]
            targets = torch.arange(count, device=tokens.device).expand(tokens.shape[0], -1)
        x = self.mask_token.expand(*targets.shape, -1).to(tokens.dtype)
        rotation = coordinates = None
        if self.rope is not None:
            objects, registers = context.objects.shape[1], context.registers.shape[1]
            rotation = token_rotation(self.rope, context.grid, keep, objects, registers)
            coordinates = self.rope(take_rows(self.rope.coordinates(context.grid), targets))
        table = None
        if self.pos_embed is not None:
            fixed, antialias = self.encoder.positions == "sincos", self.encoder.position_antialias
            table = resize_positions(self.pos_embed, context.grid, antialias, fixed)
            x = x + take_rows(table, targets).to(x.dtype)
        if self.config.kind == "cross":
            for block in self.blocks:
                x = block(x, tokens, coordinates, rotation)
            return self.norm(x)
        tokens = self.embed(tokens)
        if table is not None and self.encoder.positions == "sincos":
            where = table if keep is None else take_rows(table, keep)
            special, patches = tokens.split((tokens.shape[1] - where.shape[1], where.shape[1]), dim=1)
            tokens = torch.cat((special, patches + where.to(patches.dtype)), dim=1)
        together = None
        if rotation is not None and coordinates is not None:
            together = torch.cat((rotation.expand(coordinates.shape[0], -1, -1, -1), coordinates), dim=2)
        return self._among_themselves(tokens, x, together, groups)

    def _among_themselves(
        self, tokens: Tensor, x: Tensor, rotation: Tensor | None, groups: int
    ) -> Float[Tensor, "B P D"]:
        """Blocks over tokens and the mask tokens of one group at a time, as sequences of their own."""
        images, length = tokens.shape[0], tokens.shape[1]
        parts = x.unflatten(1, (groups, -1))
        count = parts.shape[2]
        x = torch.cat((tokens.to(x.dtype)[:, None].expand(-1, groups, -1, -1), parts), dim=2).flatten(0, 1)
        if rotation is not None and groups > 1:
            shared, own = rotation.split((length, groups * count), dim=2)
            own = own.unflatten(2, (groups, count)).movedim(2, 1)
            rotation = torch.cat((shared[:, None].expand(-1, groups, -1, -1, -1), own), dim=3).flatten(0, 1)
        for block in self.blocks:
            x = block(x, 0, None, rotation)
        return self.norm(x[:, -count:]).unflatten(0, (images, groups)).flatten(1, 2)
