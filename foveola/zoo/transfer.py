"""The weights of an encoder for a network of another shape, as far as its function can be kept.

Kernels of patches are resampled, tables of positions resized or made a field, registers, class tokens and
LayerScale added. Everything else must agree: a contradiction is an error.
"""

import dataclasses
from fnmatch import fnmatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveola.config import ConfigError
from foveola.models.blocks import EPS
from foveola.models.embedding import resized_kernel
from foveola.models.encoder import Encoder
from foveola.models.positions import PositionField, fixed_positions
from foveola.models.relative import resized_bias
from foveola.models.starting import Account
from foveola.models.vit import VisionTransformer, ViTConfig

# How a network trains and what it draws, which no weights tell.
FREE = (
    *("drop_path", "drop_path_rule", "drop_path_subset", "init", "position_init"),
    *("window", "global_blocks", "channels"),
)
SHAPE_KEYS = tuple(f.name for f in dataclasses.fields(ViTConfig) if f.name not in FREE)
ALIKE = (  # keys that must agree, whatever the positions are
    *("depth", "heads", "width", "mlp", "mlp_ratio", "norm", "norm_eps", "final_norm_affine", "bias"),
    *("final_norm", "patch_norm", "relative_bias"),
)
OF_POSITIONS = {  # keys that must agree where both networks have such positions
    "learned": ("position_antialias", "position_offset"),
    "field": ("field_size", "field_interpolation", "field_alignment"),
    "rope": ("rope",),
    "sincos": (),
    "none": (),
}
BECOMES = {  # kinds of positions that others can be made of
    "learned": ("learned", "sincos", "field"),
    "sincos": ("sincos", "learned"),
    "field": ("field", "learned", "sincos"),
    "rope": ("rope",),
    "none": ("none",),
}
USUAL_CHANNELS = "mean"  # what becomes of a patch embedding of other channels
SAME_TABLE = 2e-3  # half precision is good to 1e-3


def check(have: ViTConfig, want: ViTConfig, name: str) -> None:
    """Raise ConfigError, in one line, where weights of the shape `have` cannot be those of `want`.

    `name` is what the user calls the weights.
    """
    for key in (*ALIKE, *(OF_POSITIONS[want.positions] if want.positions == have.positions else ())):
        mine, theirs = _value(want, key), _value(have, key)
        if mine != theirs:
            raise ConfigError(f"model.{key}={mine}: the weights of init={name} have {theirs}")
    if have.positions not in BECOMES[want.positions]:
        kinds = " and ".join(sorted({have.positions, want.positions}))
        why = "" if "rope" not in kinds else ": rotary positions and those that are added are not mixed"
        raise ConfigError(
            f"model.positions={want.positions}: the weights of init={name} have {have.positions}{why}"
        )
    if want.positions == "sincos" and want.grid != have.grid:
        raise ConfigError(
            f"model.image_size={want.image_size}: a fixed table is not resized; the weights of init={name} "
            f"want {have.grid[0] * want.patch_size} with patches of {want.patch_size}"
        )
    if have.class_token and not want.class_token:
        raise ConfigError(
            f"model.class_token=false: the weights of init={name} have a class token, which patches read"
        )
    if want.registers < have.registers:
        raise ConfigError(
            f"model.registers={want.registers}: the weights of init={name} have {have.registers}, "
            "which patches read; more can be added, none taken away"
        )
    if (have.layer_scale is None) != (want.layer_scale is None) and want.layer_scale != 1.0:
        has = "have none" if have.layer_scale is None else "have it"
        more = "; 1.0 adds one that changes nothing" if have.layer_scale is None else ""
        raise ConfigError(f"model.layer_scale={want.layer_scale}: the weights of init={name} {has}{more}")


def has_fixed_table(backbone: VisionTransformer) -> bool:
    """Return whether its table of positions is that of MAE and I-JEPA, whether it trains or not."""
    config, table = backbone.config, backbone.pos_embed
    if config.positions not in ("learned", "sincos") or table is None or config.shape[0] % 4:
        return False
    token, patches = table.detach().split((int(config.class_token), table.shape[1] - config.class_token), 1)
    fixed = fixed_positions(config.grid, config.shape[0])
    return not token.any() and bool((patches - fixed).abs().max() <= SAME_TABLE)


def _value(config: ViTConfig, key: str) -> Any:
    if key in ("width", "depth", "heads"):
        return config.shape[("width", "depth", "heads").index(key)]
    value = getattr(config, key)
    return EPS[config.norm] if key == "norm_eps" and value is None else value


@torch.no_grad()
def transfer(
    encoder: Encoder, want: ViTConfig, name: str, channels: str = USUAL_CHANNELS
) -> tuple[dict[str, Tensor], Account]:
    """Return tensors for a `VisionTransformer(want)`, by its names, and the account of them.

    `channels` says what becomes of a patch embedding of other channels (`kernel_of_channels`).

    A tensor that is not among them stays as it was drawn, and so do registers beyond those that there are.
    Raises ConfigError where `check` does, for `channels` where there is nothing to change, and for a table
    of positions that is not the fixed one that is asked for.
    """
    have = encoder.config.model
    check(have, want, name)
    state = {key: value.clone() for key, value in encoder.backbone.state_dict().items()}
    account = Account()
    if not state["mask_token"].any():
        del state["mask_token"]
        account.fresh["mask_token"] = "there is none, or it is zero"
    kernel = "patch_embed.proj.weight"
    if want.seen_channels != have.channels:
        state[kernel] = kernel_of_channels(state[kernel], want.seen_channels, channels, name)
        how = f"of {have.channels} channels became {want.seen_channels} (init_channels={channels})"
        account.changed[kernel] = how
    elif channels != USUAL_CHANNELS:
        raise ConfigError(
            f"init_channels={channels} has no effect: the weights of init={name} have {have.channels} "
            "channel(s), as the data"
        )
    if want.patch_size != have.patch_size:
        state[kernel] = resized_kernel(state[kernel], want.patch_size)
        sizes = f"{have.patch_size} to {want.patch_size} pixels"
        remark = "" if want.patch_size > have.patch_size else ", as near as so few pixels allow"
        before = f"{account.changed[kernel]}, " if kernel in account.changed else ""
        account.changed[kernel] = f"{before}resampled from patches of {sizes} (pseudo-inverse{remark})"
    if have.positions not in ("rope", "none"):
        _add_positions(state, encoder.backbone, want, name, account)
    if have.relative_bias and want.grid != have.grid:
        for table in [name for name in state if name.endswith(".relative_position_bias_table")]:
            state[table] = resized_bias(state[table], have.grid, want.grid)
        sizes = " to ".join(" x ".join(map(str, grid)) for grid in (have.grid, want.grid))
        account.changed["blocks.*.attn.relative_position_bias_table"] = f"resized from {sizes} patches"
    _add_tokens(have, want, account)
    if want.layer_scale is not None and have.layer_scale is None:
        width, depth, _ = want.shape
        for branch in (f"blocks.{i}.ls{k}.gamma" for i in range(depth) for k in (1, 2)):
            state[branch] = torch.ones(width)
        account.changed["blocks.*.ls*.gamma"] = "added as 1, which is the same function"
    changed = {key for key in state for name in account.changed if fnmatch(key, name)}
    there = encoder.backbone.state_dict().keys() & state.keys() - changed
    account.taken = [key for key in state if key in there]
    return state, account


def kernel_of_channels(
    kernel: Float[Tensor, "D C P P"], count: int, how: str, name: str
) -> Float[Tensor, "D {count} P P"]:
    """Return the kernel of a patch embedding for `count` channels, made of one for C channels.

    `mean`: each channel gets the mean of the C kernels, times C / `count`.
    `repeat`: channel i gets the kernel i modulo C, over how often that one is taken (3 to 5 channels: the
    first and second kernel are halved, twice each); of fewer than C channels, the first kernels, times
    C / `count`.
    `4,3,2`: the first kernel goes to the fourth channel, the second to the third, ...; other channels get 0.

    Where all channels hold the same values (after mean and deviation), patches are embedded as by the old
    kernel from C such channels; but not by `repeat` of fewer than C, which leaves kernels out. Raises
    ConfigError.
    """
    have = kernel.shape[1]
    if how == "mean":
        return kernel.mean(dim=1, keepdim=True).expand(-1, count, -1, -1) * (have / count)
    if how == "repeat":
        turns = torch.arange(count) % have
        weight = kernel.new_tensor([1 / (turns == turn).sum().item() for turn in turns])
        lacking = have / len(turns.unique())  # of fewer channels than there are
        return kernel[:, turns] * (weight * lacking)[:, None, None]
    parts = [part.strip() for part in how.split(",")]
    rows = [int(part) if part.isdecimal() else 0 for part in parts]
    if len(rows) != have or not all(1 <= row <= count for row in rows) or len(set(rows)) != have:
        raise ConfigError(
            f"init_channels={how}: the weights of init={name} have {have} channels, which want as many of "
            f"the {count} of the data, counted from 1; or mean, or repeat"
        )
    made = kernel.new_zeros(len(kernel), count, *kernel.shape[2:])
    made[:, [row - 1 for row in rows]] = kernel
    return made


def _add_tokens(have: ViTConfig, want: ViTConfig, account: Account) -> None:
    """Say which tokens are drawn anew; the registers that there are come before those that are added."""
    if want.class_token and not have.class_token:
        account.fresh["cls_token"] = "added: patches read it, so they begin near the file's and not at them"
    if added := want.registers - have.registers:
        why = f"{added} of {want.registers} added: patches read them, so they begin near the file's"
        account.fresh["reg_token"] = why


def _add_positions(
    state: dict[str, Tensor], backbone: VisionTransformer, want: ViTConfig, name: str, account: Account
) -> None:
    """Make positions of the wanted kind and size of those that there are, in place."""
    have = backbone.config
    same = want.positions == have.positions and want.class_token == have.class_token
    if same and (want.grid == have.grid or want.positions == "field"):
        return
    own = state.pop("pos_embed", None)  # the class token's position, and perhaps a table
    token = torch.zeros(1, 1, want.shape[0]) if own is None or not have.class_token else own[:, :1]
    token = token[:, : int(want.class_token)]
    values = state.pop("pos_field.values", None)
    if want.positions == "field":
        if want.class_token:
            state["pos_embed"] = token
        if values is not None:  # a class token was added
            state["pos_field.values"] = values
            return
        state["pos_field.values"], how = _nodes(backbone, want)
        account.changed["pos_embed"] = how
        return
    table = backbone.positions(want.grid)
    assert table is not None
    if want.positions == "sincos":
        if not has_fixed_table(backbone):
            raise ConfigError(
                f"model.positions=sincos: the weights of init={name} have a table that was trained, "
                "not the fixed one"
            )
        if have.positions == "learned":
            account.changed["pos_embed"] = "is the fixed table of sines, computed anew"
        state["pos_embed"] = torch.cat((token, fixed_positions(want.grid, want.shape[0])), dim=1)
        return
    state["pos_embed"] = torch.cat((token, table), dim=1)
    if want.grid != have.grid:
        sizes = " to ".join(" x ".join(map(str, grid)) for grid in (have.grid, want.grid))
        account.changed["pos_embed"] = f"resized from {sizes} positions"
    elif have.positions == "sincos":
        account.changed["pos_embed"] = "the fixed table, which trains from here on"
    elif have.positions == "field":
        account.changed["pos_field.values"] = (
            f"read where the whole image has {want.grid[0]} x {want.grid[1]} patches, as a table"
        )
    else:
        account.changed["pos_embed"] = "with a row of zeros for the class token that was added"


def _nodes(backbone: VisionTransformer, want: ViTConfig) -> tuple[Tensor, str]:
    """The nodes of a field from a table of positions, and how well they give it back."""
    have = backbone.config
    (rows, columns), side = want.field_size, have.grid[0]
    table = backbone.positions(have.grid)
    assert table is not None
    what = f"became the {rows} x {columns} nodes of the field, which give the table of {side} x {side}"
    if want.field_size == have.grid and want.field_alignment == "cells":
        return table.view(rows, columns, -1), f"{what} back"
    # The table as a field of its own: its entries are the centres of as many cells.
    field = PositionField(have.grid, want.shape[0], "bicubic", "cells")
    field.values.copy_(table.view_as(field.values))
    low = torch.zeros(2)
    if want.field_alignment == "corners":  # the first and last node are the borders
        low = -0.5 / (torch.tensor([columns, rows]) - 1)
    box = torch.cat((low, 1 - low))[None]
    nodes = field((rows, columns), box).view(rows, columns, -1)
    made = PositionField(want.field_size, want.shape[0], want.field_interpolation, want.field_alignment)
    made.values.copy_(nodes)
    error = (made(have.grid) - table).abs().max().item()
    scale = table.square().mean().sqrt().item()
    if error <= 1e-6 * scale:
        return nodes, f"{what} back"
    return nodes, f"{what} back up to {error:.2g} where its entries are about {scale:.2g}"
