"""State dicts of public checkpoints to our names: pure functions from dict to dict, no files, no networks."""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from foveola.config import key
from foveola.zoo.capi import capi, capi_weights
from foveola.zoo.relatives import AIM_HEAD, aim, beit, relative_shape
from foveola.zoo.sizes import HEADS as PUBLISHED
from foveola.zoo.sizes import WRAPPERS, depth_of, mlp_ratio, patch_kernel, published_heads, size_of
from foveola.zoo.tables import sines, table_of

KNOWN = (
    "DINO, iBOT, DINOv2, DINOv3, MAE, I-JEPA, CAPI, MoCo-v3, MSN, Mugs, DropPos, CrIBo, SelfPatch, SimMIM, "
    "BEiT, BEiT-v2, data2vec, AIM, AIMv2 and timm"
)
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
    *("decoder_", "decoder.", "predictor.", "local_cls_norm.", "rope_embed.", "lm_head.", "cls_pt_"),
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
)
REASONS = (  # of networks that ours cannot express: what tells them, what to say
    (
        r"^modality_encoders\.",
        "it is a data2vec 2.0, whose blocks are normalised after each branch: wrap its own code, python:",
    ),
    (r"rel_pos_[hw]$", "it has relative positions by rows and columns (SAM), which our ViT has not"),
    (
        r"_flat_param|_fsdp",
        "it is a shard of sharded training (FSDP): make one file of all with its own code",
    ),
    (r"^layers\.\d+\.blocks\.", "it is a Swin transformer, not a plain ViT"),
    (r"embeddings\.", "names like Hugging Face's: load the model's folder as hf:FOLDER"),
    (r"\.attn\.(q|k)_norm\.", "it has norms of queries and keys, which our ViT has not"),
)
PIXEL_STATISTICS: dict[str, dict[str, list[float]]] = {
    "imagenet": {},  # the default mean and deviation
    "half": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "clip": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    "sat493m": {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]},
}


@dataclass(frozen=True)
class FileConfig:
    """What a file of weights does not say, where its layout is not of a published model that does."""

    heads: int | None = key(None, "attention heads", at_least=1)
    norm_eps: float | None = key(None, "added to variances in norms, where it is not 1e-6", above=0)
    positions: Literal["dino", "timm", "plain"] | None = key(
        None, "how the table of positions is resized: dino (offset 0.1), timm (antialiased), plain"
    )
    preprocess: Literal["imagenet", "half", "clip", "sat493m"] | None = key(
        None, "mean and deviation of its pixels: imagenet, half (0.5), clip, sat493m (DINOv3's of satellites)"
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


def convert(
    checkpoint: dict[str, Any], file_config: FileConfig = UNSAID
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and settings of an encoder (a tree for EncoderConfig) from a public checkpoint.

    Args:
        file_config: what the user says of the file.

    Raises ValueError with one line that says what is missing, why the network cannot be had, or which setting
    must be said.
    """
    if state := capi_weights(checkpoint):
        for name in ("norm_eps", "positions"):
            if getattr(file_config, name) is not None:
                raise ValueError(f"{name} has no effect on CAPI's files, which say it")
        weights, settings = capi(state, file_config.heads)
        side, kind = 224, "imagenet"
    else:
        found = backbone_of(checkpoint)
        weights, shape = plain_vit(found, file_config)
        settings: dict[str, Any] = {"model": shape}
        if not shape["class_token"] or _averages(found, shape):
            settings["pool"] = "average"
        # MAE, MoCo-v3 and I-JEPA are read at the size of their training, the others at 224 pixels.
        resized = shape.get("position_antialias") or shape.get("position_offset") or "rope" in shape
        side = 224 if resized else shape["image_size"]
        _check_size(file_config, shape, found)
        kind = file_config.preprocess or _pixels_of(found)
    if (count := weights["patch_embed.proj.weight"].shape[1]) != 3:
        where = "a folder of timm's or transformers' (timm:FOLDER, hf:FOLDER) does"
        raise ValueError(
            f"patch_embed.proj.weight sees {count} channel(s), and the file does not say their mean and "
            f"deviation; {where}"
        )
    side = file_config.image_size or side
    settings["transform"] = {"resize": round(side * 8 / 7), "crop": side, **PIXEL_STATISTICS[kind]}
    return weights, settings


def _averages(found: Backbone, shape: dict[str, Any]) -> bool:
    """Whether the mean of patches stands for an image, though there is a class token: no loss trained it."""
    of_v2 = any(name.startswith("cls_pt_") for name in found.tensors)  # BEiT-v2 trains it, BEiT does not
    return shape.get("final_norm") == "pooled" or (shape.get("relative_bias", False) and not of_v2)


def _check_size(file_config: FileConfig, shape: dict[str, Any], found: Backbone) -> None:
    """Raise ValueError where positions would be resized in a way that the file does not tell."""
    dinos = found.dinos or {"mask_token", "masked_embed", "blocks.0.ls1.gamma"} & found.tensors.keys()
    asked = file_config.image_size not in (None, shape["image_size"])
    if asked and not dinos and shape.get("position_offset") and file_config.positions is None:
        raise ValueError(
            f"its positions are for {shape['image_size']} pixels, and a bare backbone does not say how they "
            f"are resized to {file_config.image_size}: add &positions=dino (DINO, iBOT, Mugs) or "
            "&positions=timm"
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
    names = found.tensors.keys()
    ours = any(name.startswith(("cls_pt_", "decoder.")) for name in names)  # BEiT-v2 and SimMIM
    if any("relative_position_bias_table" in name for name in names) and not ours:
        raise ValueError(
            "BEiT and BEiT-v2 saw other pixels, and its tensors do not tell them apart: say "
            "?preprocess=imagenet (BEiT-v2, SimMIM) or ?preprocess=half (BEiT, data2vec)"
        )
    if any(name.endswith(".mlp.fc3.weight") for name in names):
        raise ValueError(
            "AIMv2 is evaluated with two kinds of pixels: say ?preprocess=imagenet (its authors' code) "
            "or ?preprocess=clip (its image processor)"
        )
    if found.labels and not found.wrapped:
        raise ValueError(
            "its classifier does not say which pixels it saw: say ?preprocess=imagenet (DeiT, torchvision) "
            "or ?preprocess=half (timm's AugReg), or name its network as timm:NAME?pretrained=FILE"
        )
    return "imagenet"


def plain_vit(
    found: Backbone, file_config: FileConfig = UNSAID, rotary: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights and shape of a plain ViT from the tensors of a public checkpoint.

    Blocks may have LayerScale and gated MLPs; there may be registers, and positions with or without rows for
    the class token and registers, which are then added to these. Heads of training and decoders are left out.

    Args:
        file_config: without `heads` these are told by the layout, which must then be a published network's.
        rotary: there is no table of positions.

    Returns (state dict with our names, keyword arguments of ViTConfig). How positions are resized is told
    from what the file holds: as MAE's code does where the table is one of sines, as timm's where there is a
    classifier, registers, or LayerScale without mask token, as DINO's otherwise. Raises ValueError with one
    line that says what is missing.
    """
    tensors = {name: value for name, value in found.tensors.items() if not name.startswith(TRAINING)}
    periods = found.tensors.get("rope_embed.periods")
    named_gated = any(".mlp.w12." in name for name in tensors)
    of_aim = "trunk.blocks.0.norm_1.weight" in tensors
    weights = _by_our_names(_dinov3(tensors) if periods is not None else tensors, of_aim)
    _check(weights, tensors)
    width, patch = patch_kernel(weights["patch_embed.proj.weight"], "patch_embed.proj.weight")
    zero = weights["patch_embed.proj.weight"].new_zeros
    shape: dict[str, Any] = {
        "depth": depth_of(weights),
        "patch_size": patch,
        "class_token": "cls_token" in weights,
        "drop_path": 0.0,
        "channels": weights["patch_embed.proj.weight"].shape[1],
        **({} if file_config.norm_eps is None else {"norm_eps": file_config.norm_eps}),
        **_mlp_shape(weights, width, named_gated),
    }
    heads, published = file_config.heads, PUBLISHED
    if rotary or periods is not None:
        shape["image_size"] = 16 * patch  # which no table binds
        if file_config.positions is not None:
            raise ValueError("positions has no effect on rotary positions, which are not resized")
    elif relative := relative_shape(weights):
        if heads not in (None, relative["heads"]):
            raise ValueError(f"heads={heads}: its tables of relative positions are of {relative['heads']}")
        heads = relative["heads"]
        shape |= _relative(weights, relative["side"] * patch, shape, file_config)
    elif of_aim and "pos_embed" not in weights:
        shape |= _sines_of_aim(weights, patch, file_config)
    elif "pos_embed" not in weights:
        raise ValueError(_unknown("pos_embed", tensors))
    else:
        of_timm = "register_tokens" in tensors or found.labels
        published = table_of(weights, shape, width, of_timm, file_config.positions)
    shape["registers"] = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if periods is not None:
        heads = _dinov3_heads(periods, width, file_config)
        shape |= {"positions": "rope", "rope": "dinov3", "norm_eps": file_config.norm_eps or 1e-5}
    if heads is None:
        hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
        heads = width // AIM_HEAD if of_aim else published_heads((width, shape["depth"], hidden), published)
    shape |= size_of(width, heads) | _norms(weights, of_aim)
    token = weights.get("mask_token")
    # A decoder's has the decoder's width.
    own = zero(width) if token is None or token.numel() != width else token
    weights["mask_token"] = own.reshape(1, 1, width)
    if "blocks.0.ls1.gamma" in weights:
        shape["layer_scale"] = 1e-5
    if of_aim and "blocks.0.attn.proj.bias" not in weights:
        shape["bias"] = False
    elif not any(name.endswith(".attn.qkv.bias") for name in weights):  # which is the same function
        weights |= {f"blocks.{i}.attn.qkv.bias": zero(3 * width) for i in range(shape["depth"])}
    return weights, shape


def _by_our_names(tensors: dict[str, Any], of_aim: bool) -> dict[str, Any]:
    weights = aim(tensors) if of_aim else tensors
    for pattern, ours in OURS:
        weights = {re.sub(pattern, ours, name): value for name, value in weights.items()}
    return beit(weights, depth_of(weights))


def _relative(
    weights: dict[str, Any], size: int, shape: dict[str, Any], file_config: FileConfig
) -> dict[str, Any]:
    """Keys of positions of a network with relative ones, beside which there may be absolute ones."""
    if "pos_embed" not in weights:
        if file_config.positions is not None:
            raise ValueError("positions has no effect on relative positions")
        return {"relative_bias": True, "positions": "none", "image_size": size}
    absolute = dict(shape)
    table_of(weights, absolute, weights["pos_embed"].shape[2], False, file_config.positions or "plain")
    if absolute["image_size"] != size:
        raise ValueError(f"pos_embed is of {absolute['image_size']} pixels, its relative ones of {size}")
    return absolute | {"relative_bias": True}


def _sines_of_aim(weights: dict[str, Any], patch: int, file_config: FileConfig) -> dict[str, Any]:
    """Keys of the fixed positions that AIM computes for the size of its images; adds them in place."""
    side = (file_config.image_size or 224) // patch
    width = weights["patch_embed.proj.weight"].shape[0]
    weights["pos_embed"] = sines(side, width)[None].float()
    return {"positions": "sincos", "image_size": side * patch}


def _norms(weights: dict[str, Any], of_aim: bool) -> dict[str, Any]:
    """Keys of norms: of what the last one is, and whether patches have one."""
    keys: dict[str, Any] = {}
    if of_aim:
        keys["patch_norm"] = "patch_norm.weight" in weights
        if "blocks.0.norm1.bias" not in weights:  # AIMv2
            keys["norm"] = "rms"
    if "fc_norm.weight" in weights:
        if "norm.weight" in weights:
            raise ValueError("it has norms of tokens and of their mean (norm, fc_norm): expected one of both")
        keys["final_norm"] = "pooled"
    elif "norm.weight" not in weights:
        if "cls_token" in weights:
            raise ValueError("not a known ViT checkpoint: no norm.weight, though it has a class token")
        keys["final_norm"] = "none"  # SelfPatch
    return keys


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


def _dinov3_heads(periods: Any, width: int, file_config: FileConfig) -> int:
    """Heads by the number of rotary frequencies of one. Raises ValueError for other frequencies than ours."""
    count = periods.numel()
    expected = [100.0 ** (k / count) for k in range(count)]
    found = periods.double().flatten().tolist()
    if any(not math.isclose(a, b, rel_tol=1e-2) for a, b in zip(found, expected, strict=True)):
        raise ValueError("its rotary positions have other periods than DINOv3's published networks")
    heads = width // (4 * count)
    if file_config.heads not in (None, heads):
        raise ValueError(f"heads={file_config.heads}: its rotary positions are of {heads}")
    return heads


def _check(weights: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raise ValueError unless all is there that tells the shape, with the reason where it is known."""
    for pattern, reason in REASONS:
        if name := next((name for name in sorted(tensors) if re.search(pattern, name)), None):
            raise ValueError(f"not a ViT that can be loaded ({name}): {reason}")
    if "pos_embed" in weights and weights["pos_embed"].ndim != 3:
        raise ValueError(f"pos_embed is {tuple(weights['pos_embed'].shape)}, expected 3 dimensions")
    for name, dimensions in NEEDED_TENSORS:
        if name not in weights:
            raise ValueError(_unknown(name, tensors))
        if weights[name].ndim != dimensions:
            shape = tuple(weights[name].shape)
            raise ValueError(f"{name} is {shape}, expected a tensor of {dimensions} dimensions")


def _unknown(missing: str, tensors: dict[str, Any]) -> str:
    names = ", ".join(sorted(tensors)[:3]) or "no tensors"
    return f"not a known ViT checkpoint: no {missing} (found {names} ...); known: {KNOWN}"


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
