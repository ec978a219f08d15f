"""State dicts of public checkpoints to our names: pure functions from dict to dict, no files, no networks."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from foveola.config import key
from foveola.zoo.capi import capi, capi_weights
from foveola.zoo.sizes import HEADS as PUBLISHED
from foveola.zoo.sizes import (
    MAE,
    MOCO,
    WRAPPERS,
    depth_of,
    mlp_ratio,
    patch_kernel,
    published_heads,
    size_of,
)

KNOWN = "DINO, iBOT, DINOv2, DINOv3, MAE, I-JEPA, CAPI, MoCo-v3, MSN, Mugs, DropPos and timm"
PREFIXES = ("module.", "backbone.", "encoder.", "_orig_mod.")
NETWORKS = (
    "teacher.",
    "student.",
    "base_encoder.",
    "momentum_encoder.",
)  # several in one dict, by preference
CLASSIFIER = ("head.weight", "head.bias")  # a classifier: the file is of supervised training
TRAINING = (  # what only training reads, at the top level
    *("head.", "head_dist.", "last_layer", "mlp.", "dino_head.", "ibot_head.", "instance_head."),
    *("local_group_head.", "group_head.", "relation_blocks.", "mem.", "fc.", "prototypes", "mask_pos_token"),
    *("decoder_", "predictor.", "local_cls_norm.", "rope_embed."),
)
OURS = (  # names of DINOv2, DINOv3 and iBOT to timm's, which are ours
    # DINOv2 trains blocks in chunks: the second number counts them.
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^(register|storage)_tokens$", "reg_token"),
    (r"^masked_embed$", "mask_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
NEEDED_TENSORS = (  # and the dimensions of each
    ("patch_embed.proj.weight", 4),
    ("blocks.0.attn.qkv.weight", 2),
    ("blocks.0.mlp.fc1.weight", 2),
    ("blocks.0.mlp.fc2.weight", 2),
    ("norm.weight", 1),
)
REASONS = (  # of networks that ours cannot express: what tells them, what to say
    (
        r"relative_position|rel_pos",
        "it has relative positions (BEiT, SimMIM, data2vec), which our ViT has not",
    ),
    (r"\.gamma_1$", "it is a BEiT or data2vec, whose blocks are not those of our ViT"),
    (r"\.q_bias$", "its attention has biases of queries and values apart (SimMIM, BEiT)"),
    (
        r"_flat_param|_fsdp",
        "it is a shard of sharded training (FSDP): make one file of all with its own code",
    ),
    (r"^fc_norm\.", "it is normalised after pooling (fc_norm), where our ViT has a norm of each token"),
    (r"^layers\.\d+\.blocks\.", "it is a Swin transformer, not a plain ViT"),
    (r"embeddings\.", "names like Hugging Face's: load the model's folder as hf:FOLDER"),
    (r"^(trunk|preprocessor)\.", "it is an AIM, not a plain ViT"),
    (r"\.attn\.(q|k)_norm\.", "it has norms of queries and keys, which our ViT has not"),
)
RESIZED = {"dino": {"position_offset": 0.1}, "timm": {"position_antialias": True}, "plain": {}}
PIXEL_STATISTICS: dict[str, dict[str, list[float]]] = {
    "imagenet": {},  # the default mean and deviation
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "sat493m": {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]},
}


@dataclass(frozen=True)
class FileConfig:
    """What a file of weights does not say, where its layout is not of a published model that does."""

    heads: int | None = key(None, "attention heads", at_least=1)
    norm_eps: float | None = key(None, "added to variances in norms, where it is not 1e-6", above=0)
    positions: Literal["dino", "timm", "plain"] | None = key(
        None, "how its table of positions is resized: dino (offset 0.1), timm (antialiased), plain"
    )
    preprocess: Literal["imagenet", "half", "sat493m"] | None = key(
        None, "mean and deviation of its pixels: imagenet, half (0.5), sat493m (DINOv3's of satellites)"
    )
    image_size: int | None = key(None, "pixels a side that are encoded, of images 8/7 as large", at_least=1)


UNSAID = FileConfig()


@dataclass(frozen=True)
class Backbone:
    """The tensors of one network by bare names, and what the file says of its origin."""

    tensors: dict[str, Any]
    labels: bool  # there is a classifier
    wrapped: bool  # in a dict `model`, as DeiT and MAE publish their files
    dinos: bool  # named `backbone` beside heads, as DINO and what is made of its code names it


def convert(checkpoint: dict[str, Any], said: FileConfig = UNSAID) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and settings of an encoder (a tree for EncoderConfig) from a public checkpoint.

    Args:
        said: what the user says of the file.

    Raises ValueError with one line that says what is missing, why the network cannot be had, or which setting
    must be said.
    """
    if state := capi_weights(checkpoint):
        for name in ("norm_eps", "positions"):
            if getattr(said, name) is not None:
                raise ValueError(f"{name} has no effect on CAPI's files, which say it")
        weights, settings = capi(state, said.heads)
        side, kind = 224, "imagenet"
    else:
        found = backbone_of(checkpoint)
        weights, shape = plain_vit(found, said)
        settings: dict[str, Any] = {"model": shape}
        if not shape["class_token"]:  # I-JEPA
            settings["pool"] = "average"
        # MAE, MoCo-v3 and I-JEPA are read at the size of their training, the others at 224 pixels.
        resized = shape.get("position_antialias") or shape.get("position_offset") or shape.get("positions")
        side = 224 if resized else shape["image_size"]
        _check_size(said, shape, found)
        kind = said.preprocess or _pixels_of(found)
    side = said.image_size or side
    settings["transform"] = {"resize": round(side * 8 / 7), "crop": side, **PIXEL_STATISTICS[kind]}
    return weights, settings


def _check_size(said: FileConfig, shape: dict[str, Any], found: Backbone) -> None:
    """Raise ValueError where positions would be resized in a way that the file does not tell."""
    dinos = found.dinos or {"mask_token", "masked_embed", "blocks.0.ls1.gamma"} & found.tensors.keys()
    asked = said.image_size not in (None, shape["image_size"])
    if asked and not dinos and shape.get("position_offset") and said.positions is None:
        raise ValueError(
            f"its positions are for {shape['image_size']} pixels, and a bare backbone does not say how they "
            f"are resized to {said.image_size}: add &positions=dino (DINO, iBOT, Mugs) or &positions=timm"
        )


def _pixels_of(found: Backbone) -> str:
    """Mean and deviation of its pixels by their name in PIXELS. Raises ValueError where they are unknown."""
    if "rope_embed.periods" in found.tensors and "local_cls_norm.weight" in found.tensors:
        if found.tensors["norm.weight"].numel() == 1024:
            return "sat493m"  # DINOv3's ViT-L has this norm for satellites only
        raise ValueError(  # of which both have it
            "DINOv3's largest network exists for two kinds of images: say ?preprocess=imagenet (LVD-1689M) "
            "or ?preprocess=sat493m"
        )
    if found.labels and not found.wrapped:
        raise ValueError(
            "its classifier does not say which pixels it saw: say ?preprocess=imagenet (DeiT, torchvision) "
            "or ?preprocess=half (timm's AugReg), or name its network as timm:NAME?pretrained=FILE"
        )
    return "imagenet"


def plain_vit(
    found: Backbone, said: FileConfig = UNSAID, rotary: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and shape of a plain ViT from the tensors of a public checkpoint.

    Blocks may have LayerScale and gated MLPs; there may be registers, and positions with or without rows for
    the class token and registers, which are then added to these. Heads of training and decoders are left out.

    Args:
        said: heads are told by the layout where they are not said, and then must be a published network's.
        rotary: there is no table of positions.

    Returns (state dict with our names, keyword arguments of ViTConfig). How positions are resized is told
    from what the file holds: as MAE's code does where the table is one of sines, as timm's where there is a
    classifier, registers, or LayerScale without mask token, as DINO's otherwise. Raises ValueError with one
    line that says what is missing.
    """
    tensors = {name: value for name, value in found.tensors.items() if not name.startswith(TRAINING)}
    periods = found.tensors.get("rope_embed.periods")
    named_gated = any(".mlp.w12." in name for name in tensors)
    named_registers = "register_tokens" in tensors
    weights = _dinov3(tensors) if periods is not None else tensors
    for pattern, ours in OURS:
        weights = {re.sub(pattern, ours, name): value for name, value in weights.items()}
    _check(weights, tensors, rotary or periods is not None)
    width, patch = patch_kernel(weights["patch_embed.proj.weight"], "patch_embed.proj.weight")
    shape: dict[str, Any] = {
        "depth": depth_of(weights),
        "patch_size": patch,
        "class_token": "cls_token" in weights,
        "drop_path": 0.0,
        **({} if said.norm_eps is None else {"norm_eps": said.norm_eps}),
        **_mlp_shape(weights, width, named_gated),
    }
    published = PUBLISHED
    if rotary or periods is not None:
        shape["image_size"] = 16 * patch  # which no table binds
        if said.positions is not None:
            raise ValueError("positions has no effect on rotary positions, which are not resized")
    else:
        published = _positions(weights, shape, width, named_registers or found.labels, said)
    shape["registers"] = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    heads = said.heads
    if periods is not None:
        heads = _dinov3_heads(periods, width, said)
        shape |= {"positions": "rope", "rope": "dinov3", "norm_eps": said.norm_eps or 1e-5}
    if heads is None:
        hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
        heads = published_heads((width, shape["depth"], hidden), published)
    shape |= size_of(width, heads)
    token = weights.get("mask_token")
    if token is None or token.numel() != width:  # a decoder's has the decoder's width
        token = weights["norm.weight"].new_zeros(width)
    weights["mask_token"] = token.reshape(1, 1, width)
    if "blocks.0.ls1.gamma" in weights:
        shape["layer_scale"] = 1e-5
    _no_biases(weights, width, shape["depth"])
    return weights, shape


def _positions(
    weights: dict[str, Any], shape: dict[str, Any], width: int, of_timm: bool, said: FileConfig
) -> dict[tuple[int, int, int], int]:
    """Say in `shape` how the table is resized; returns the published networks that have such a table."""
    side = _square_positions(weights, width)
    shape["image_size"] = side * shape["patch_size"]
    # timm drops the mask token, and writes class positions into the token where there are registers.
    scaled, masks = "blocks.0.ls1.gamma" in weights, "mask_token" in weights
    of_mae = shape["class_token"] and _is_fixed(weights["pos_embed"], side)
    of_moco = shape["class_token"] and _is_fixed(weights["pos_embed"], side, rows_first=True)
    if said.positions is not None:
        shape |= RESIZED[said.positions]
    elif of_timm or "reg_token" in weights or (scaled and not masks):
        shape["position_antialias"] = True
    elif shape["class_token"] and not of_mae and not of_moco:
        shape["position_offset"] = 0.1
    return MAE if of_mae else MOCO if of_moco else PUBLISHED


def _dinov3(tensors: dict[str, Any]) -> dict[str, Any]:
    """DINOv3's tensors by DINOv2's names: keys without bias by a mask, gate and value in two matrices."""
    import torch

    weights = {name: value for name, value in tensors.items() if not name.endswith(".bias_mask")}
    for name in [name for name in tensors if name.endswith(".attn.qkv.bias_mask")]:
        bias = name.removesuffix("_mask")
        # The mask is 0 where there is no bias, and whatever stands there then does not count.
        weights[bias] = torch.where(tensors[name] == 0, torch.zeros_like(tensors[bias]), tensors[bias])
    for name in [name for name in weights if ".mlp.w1." in name]:
        both = weights.pop(name), weights.pop(name.replace(".w1.", ".w2."))
        weights[name.replace(".w1.", ".fc1.")] = torch.cat(both)
    return weights


def _dinov3_heads(periods: Any, width: int, said: FileConfig) -> int:
    """Heads by the number of rotary frequencies of one. Raises ValueError for other frequencies than ours."""
    count = periods.numel()
    expected = [100.0 ** (k / count) for k in range(count)]
    found = periods.double().flatten().tolist()
    if any(not math.isclose(a, b, rel_tol=1e-2) for a, b in zip(found, expected, strict=True)):
        raise ValueError("its rotary positions have other periods than DINOv3's published networks")
    heads = width // (4 * count)
    if said.heads not in (None, heads):
        raise ValueError(f"heads={said.heads}: its rotary positions are of {heads}")
    return heads


def _check(weights: dict[str, Any], tensors: dict[str, Any], rotary: bool) -> None:
    """Raise ValueError unless all is there that tells the shape, with the reason where it is known."""
    for pattern, reason in REASONS:
        if name := next((name for name in sorted(tensors) if re.search(pattern, name)), None):
            raise ValueError(f"not a ViT that can be loaded ({name}): {reason}")
    needed = NEEDED_TENSORS if rotary else (*NEEDED_TENSORS, ("pos_embed", 3))
    for name, dimensions in needed:
        if name in weights and weights[name].ndim != dimensions:
            shape = tuple(weights[name].shape)
            raise ValueError(f"{name} is {shape}, expected a tensor of {dimensions} dimensions")
    if missing := next((name for name, _ in needed if name not in weights), None):
        names = ", ".join(sorted(tensors)[:3]) or "no tensors"
        hint = f"; known: {KNOWN}"
        if missing == "norm.weight" and "blocks.0.norm1.weight" in tensors:
            hint = "; it has no final norm (SelfPatch), where our ViT has one"
        raise ValueError(f"not a known ViT checkpoint: no {missing} (found {names} ...){hint}")


def backbone_of(checkpoint: dict[str, Any]) -> Backbone:
    """Return tensors of the backbone by bare names, the teacher's if there are two."""
    state: dict[str, Any] = checkpoint
    wrapped = False
    while wrapper := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None):
        state, wrapped = state[wrapper], wrapped or wrapper == "model"
    if isinstance(state.get("encoder"), dict):  # I-JEPA without its target encoder
        state = state["encoder"]
    # Both networks in one dict, as a model that holds them saves itself; MoCo evaluates its base encoder.
    for network in NETWORKS:
        own = {
            name.partition(network)[2]: value
            for name, value in state.items()
            if name.removeprefix(_prefix(name)).startswith(network)
        }
        if own:
            state = own
            break
    dinos = any("backbone." in _prefix(name) for name in state)
    if dinos:  # what else is there are heads, of any name
        state = {name: value for name, value in state.items() if "backbone." in _prefix(name)}
    tensors = {name.removeprefix(_prefix(name)): v for name, v in state.items() if hasattr(v, "shape")}
    return Backbone(tensors, all(name in tensors for name in CLASSIFIER), wrapped, dinos)


def bare(tensors: dict[str, Any]) -> Backbone:
    """Return a backbone of a library, whose settings are known otherwise."""
    return Backbone(tensors, labels=False, wrapped=True, dinos=False)


def _prefix(name: str) -> str:
    """What wrappers put before a name."""
    rest = name
    while prefix := next((p for p in PREFIXES if rest.startswith(p)), None):
        rest = rest.removeprefix(prefix)
    return name.removesuffix(rest)


def _no_biases(weights: dict[str, Any], width: int, depth: int) -> None:
    """Zero biases for projections that have none in any block, which is the same function; in place."""
    zero = weights["norm.weight"].new_zeros
    if not any(name.endswith(".attn.qkv.bias") for name in weights):
        weights |= {f"blocks.{i}.attn.qkv.bias": zero(3 * width) for i in range(depth)}


def _mlp_shape(weights: dict[str, Any], width: int, named_gated: bool) -> dict[str, Any]:
    """Kind and ratio of the MLP, by what its two maps are made for: a gated one makes two of each channel."""
    up, inner = (
        weights[f"blocks.0.mlp.{name}.weight"].shape[axis] for name, axis in (("fc1", 0), ("fc2", 1))
    )
    if up == inner and not named_gated:
        return {"mlp_ratio": mlp_ratio(up, width)}
    if up == 2 * inner:
        if inner % 8:
            raise ValueError(f"a gated MLP of {inner} channels, which is no multiple of 8, is not supported")
        return {"mlp": "swiglu", "mlp_ratio": 1.5 * inner / width}
    kind = "a gated MLP" if named_gated else "an MLP"
    raise ValueError(f"blocks.0.mlp makes {up} channels and takes {inner}, which is not {kind}")


def _square_positions(weights: dict[str, Any], width: int) -> int:
    """Give pos_embed one row for the class token, if any, and a square for patches, in place; its side.

    timm also has tables without rows for class token and registers (`no_embed_class`), and with rows for all
    of them. A row of a token that needs none is zero; registers take theirs over.
    """
    table = weights["pos_embed"]
    registers = weights["reg_token"].reshape(1, -1, width) if "reg_token" in weights else None
    count = 0 if registers is None else registers.shape[1]
    entries, token = table.shape[1], int("cls_token" in weights)
    for rows in (token, 0, token + count):
        side = round(max(entries - rows, 0) ** 0.5)
        if side and side * side == entries - rows:
            break
    else:
        if not token and round((entries - 1) ** 0.5) ** 2 == entries - 1:
            raise ValueError("not a known ViT checkpoint: no cls_token, of which pos_embed has a row")
        raise ValueError(f"pos_embed has {entries} entries: expected a square, or a square and a class token")
    if rows == 0 and token:
        weights["pos_embed"] = table.new_zeros(1, 1 + entries, table.shape[2])
        weights["pos_embed"][:, 1:] = table
    if registers is not None:
        weights["reg_token"] = registers
        if rows > token:
            weights["reg_token"] = registers + table[:, token:rows]
            weights["pos_embed"] = table[:, [*range(token), *range(rows, entries)]]
    return side


def _is_fixed(table: Any, side: int, rows_first: bool = False) -> bool:
    """Whether positions, behind the class token's, are those of MAE, which are not trained; or MoCo-v3's."""
    import torch

    width = table.shape[2]
    if width % 4 or table[:, :1].any():
        return False
    places = torch.arange(side, dtype=torch.float64)
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = places[:, None] * frequencies
    waves = torch.cat((waves.sin(), waves.cos()), dim=1)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    both = torch.cat((rows, columns) if rows_first else (columns, rows), dim=1)
    return bool((table[0, 1:].double() - both).abs().max() < 2e-3)  # half precision is good to 1e-3
