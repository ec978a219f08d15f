"""The Vision Transformer: images in, `Features` out. Parameter names are timm's.

Tokens stand in the order [object tokens, registers, patches]. An object token is the class token; given
object masks there is one for each object, all from the same parameter, each reading only its object's
patches. Patches and registers read everything, so with several object tokens a patch sees each of them as one
further token. A network without class token has patches and registers only.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.init import normal_, trunc_normal_, xavier_uniform_, zeros_
from torch.utils.checkpoint import checkpoint

from foveola.models.attention import readable_tokens
from foveola.models.blocks import Block, initialise, make_norm
from foveola.models.embedding import PatchEmbed, token_rotation
from foveola.models.positions import (
    PositionField,
    Rope,
    fixed_positions,
    resize_positions,
    sincos_positions,
    take_rows,
)
from foveola.models.shape import ViTConfig
from foveola.models.tokens import NOTHING, Features, Inputs, TokenLayout


class VisionTransformer(nn.Module):
    """ViT with object tokens, mask tokens, registers and a choice of the patches it sees."""

    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    pos_embed: Tensor | None
    pos_mask_token: nn.Parameter | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, depth, heads = config.shape
        self.config = config
        self.checkpoint_activations = False
        self.patch_embed = PatchEmbed(config.patch_size, width, config.seen_channels)
        self.patch_norm = make_norm(config.norm, width, eps=config.norm_eps) if config.patch_norm else None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.positions == "sincos":
            table = fixed_positions(config.grid, width)
            # A class token stands nowhere: its row is zero.
            none = table.new_zeros(1, int(config.class_token), width)
            self.register_buffer("pos_embed", torch.cat((none, table), dim=1))
        elif config.positions == "learned":
            entries = config.grid[0] * config.grid[1] + config.class_token
            self.pos_embed = nn.Parameter(torch.zeros(1, entries, width))
        elif config.positions == "field" and config.class_token:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1, width))  # the class token's
        else:
            self.pos_embed = None
        self.pos_field = None
        if config.positions == "field":
            self.pos_field = PositionField(
                config.field_size, width, config.field_interpolation, config.field_alignment
            )
        self.register_parameter("pos_mask_token", None)
        self.rope = Rope(width // heads, config.rope) if config.positions == "rope" else None
        self.blocks = nn.ModuleList(Block(config.block(i)) for i in range(depth))
        last = make_norm(config.norm, width, config.final_norm_affine, config.norm_eps)
        self.norm = last if config.final_norm == "tokens" else nn.Identity()
        self.fc_norm = last if config.final_norm == "pooled" else nn.Identity()  # timm's name
        # It is for whoever pools. No method does, and data-parallel training would wait for its gradient.
        self.fc_norm.requires_grad_(False)
        self.reset()

    def reset(self) -> None:
        """Draw fresh weights. `normal`: as DINO and iBOT, mask token zero; `xavier`: as MAE and CAPI."""
        initialise(self, self.config.init)
        xavier = self.config.init == "xavier"
        self.patch_embed.proj.reset_parameters()
        if xavier:
            xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        if isinstance(self.pos_embed, nn.Parameter):
            trunc_normal_(self.pos_embed, std=0.02)
            if self.config.position_init == "sincos" and self.pos_field is None:
                with torch.no_grad():
                    table = sincos_positions(self.config.grid, self.config.shape[0], amplitude=0.5)
                    self.pos_embed[:, self.config.class_token :] = table
        if self.pos_field is not None:
            self.pos_field.reset(self.config.grid if self.config.position_init == "sincos" else None)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if xavier:
            normal_(self.mask_token, std=0.02)
        else:
            zeros_(self.mask_token)
        if self.reg_token is not None:
            normal_(self.reg_token, std=0.02 if xavier else 1e-6)

    def layers(self) -> list[list[nn.Parameter]]:
        """Return parameters by depth: those of all that embeds, then those of each block.

        The final norm is in none: what is after the last block learns at the full rate.
        """
        blocks = [list(block.parameters()) for block in self.blocks]
        later = {id(p) for part in (self.blocks, self.norm, self.fc_norm) for p in part.parameters()}
        return [[p for p in self.parameters() if id(p) not in later], *blocks]

    def learn_position_mask(self) -> None:
        """Add the token that stands in for the positions of `unplaced` patches; a student needs it alone."""
        token = torch.zeros_like(self.mask_token)
        self.pos_mask_token = nn.Parameter(
            token if self.config.init == "normal" else normal_(token, std=0.02)
        )

    def forward(
        self, images: Float[Tensor, "B ch H W"], inputs: Inputs | Bool[Tensor, "B M N"] | None = None
    ) -> Features:
        """Encode images whose sides are multiples of the patch size.

        `inputs` is what else there is to know of them; a tensor alone is `Inputs(objects=...)`. Raises
        ValueError for sides that are no multiples, for objects where there is no class token, positions where
        there is no field, and unplaced patches where there is no such token.
        """
        x, tokens = self.prepare(images, inputs)
        for block in self.blocks:
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, *tokens.reading, use_reentrant=False)
            else:
                x = block(x, *tokens.reading)
        return self.finish(x, tokens, not isinstance(inputs, Inputs) or inputs.final_norm)

    def prepare(
        self, images: Float[Tensor, "B ch H W"], inputs: Inputs | Bool[Tensor, "B M N"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], TokenLayout]:
        """Return what enters the first block, and what every block needs to know about it; as `forward`."""
        inputs = inputs if isinstance(inputs, Inputs) else Inputs(objects=inputs)
        objects, kept = inputs.objects, inputs.kept
        if objects is not None and self.cls_token is None:
            raise ValueError("this network has no class token, so no object tokens")
        x, grid = self.embed(images, inputs)
        if kept is not None and (self.config.window is not None or self.config.relative_bias):
            raise ValueError("windows and relative positions are of all patches: none can be dropped")
        if kept is not None and objects is not None:
            objects = objects.gather(2, kept[:, None].expand(-1, objects.shape[1], -1))
        count = int(self.config.class_token) if objects is None else objects.shape[1]
        registers = self.config.registers
        special = []
        if self.cls_token is not None:
            # The first entry of the position table belongs to the class token; registers have none.
            token = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
            special.append(token.expand(x.shape[0], count, -1))
        if self.reg_token is not None:
            special.append(self.reg_token.expand(x.shape[0], -1, -1))
        x = torch.cat((*(s.to(x.dtype) for s in special), x), dim=1)
        readable = None if objects is None else readable_tokens(objects, registers)
        rotation = None if self.rope is None else token_rotation(self.rope, grid, kept, count, registers)
        return x, TokenLayout(count, registers, grid, readable, rotation)

    def finish(self, x: Float[Tensor, "B T D"], tokens: TokenLayout, final_norm: bool = True) -> Features:
        """Return the output of a block as `Features`, through the final norm unless `final_norm` is false."""
        x = self.norm(x) if final_norm else x
        special = (tokens.objects, tokens.registers)
        objects, registers, patches = x.split((*special, x.shape[1] - sum(special)), dim=1)
        return Features(objects, registers, patches, tokens.grid)

    def embed(
        self, images: Float[Tensor, "B ch H W"], inputs: Inputs = NOTHING
    ) -> tuple[Float[Tensor, "B N2 D"], tuple[int, int]]:
        """Return tokens of the kept patches, with added positions, and the (rows, columns) of all."""
        patch = self.config.patch_size
        height, width = map(torch.sym_int, images.shape[-2:])  # of torch.jit.trace tensors, else as they are
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"images of {height} x {width} pixels are not made of whole {patch} x {patch} patches"
            )
        grid = (height // patch, width // patch)
        masked, kept = inputs.masked, inputs.kept
        x = self.patch_embed(images, kept)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if masked is not None:
            masked = masked if kept is None else masked.gather(1, kept)
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        positions = self.positions(grid, inputs)
        if positions is not None:
            x = x + (positions if kept is None else take_rows(positions, kept)).to(x.dtype)
        return x, grid

    def positions(self, grid: tuple[int, int], inputs: Inputs = NOTHING) -> Float[Tensor, "#B N D"] | None:
        """Return what is added to the patches of views; None with rotary positions, or none."""
        unplaced = inputs.unplaced
        positions = None
        if self.pos_field is not None:
            positions = self.pos_field(grid, inputs.positions, inputs.flips)
        elif inputs.positions is not None or inputs.flips is not None:
            raise ValueError("this network has no position field in which views could be placed")
        elif self.pos_embed is not None:
            table, fixed = self.pos_embed[:, self.config.class_token :], self.config.positions == "sincos"
            positions = resize_positions(
                table, grid, self.config.position_antialias, fixed, self.config.position_offset
            )
        if unplaced is None:
            return positions
        if self.pos_mask_token is None or positions is None:
            raise ValueError("this network has no token for patches without position")
        return torch.where(unplaced[..., None], self.pos_mask_token, positions)
