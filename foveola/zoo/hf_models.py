"""Hugging Face's vision transformers, and what is done to images for them, in our terms."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveola.config import UserError
from foveola.models.encoder import Encoder
from foveola.zoo.convert import FileConfig, bare, plain_vit
from foveola.zoo.foreign import Foreign, NotOursError, OpenedModel, import_library, one_line
from foveola.zoo.preprocess import transform_of
from foveola.zoo.wrap import wrap_library

MODEL_TYPES = ("vit", "vit_mae", "vit_msn", "ijepa", "dinov2", "dinov2_with_registers", "dinov3_vit")
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
TIMM_NAMES = (  # of transformers 4 and 5 to timm's, which are ours
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?(?:q_proj|query)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.)?(?:k_proj|key)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.)?(?:v_proj|value)\.", ".attn.v."),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)


def from_hf(
    name: str, revision: str | None = None, preprocess: str | None = None, size: int | None = None
) -> OpenedModel:
    """Return a model of Hugging Face's hub, or of a folder that `save_pretrained` wrote.

    Args:
        preprocess, size: how images are made (`preprocess.transform_of`); by default as the settings of its
            image processor say (`preprocessor_config.json`).

    What our ViT cannot express is wrapped. Code that comes with a model is never run. Raises UserError for
    models that are not found or not whole.
    """
    where = f"hf:{name}"
    transformers = import_library("transformers", "hf")
    found: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    try:
        config = transformers.AutoConfig.from_pretrained(name, **found)
    except Exception as error:  # of the library, of its hub, of the network: there is no list of them
        raise UserError(f"{where}: {one_line(error)}") from error
    options = {"add_pooling_layer": False} if config.model_type in ("vit", "ijepa") else {}
    speech = transformers.utils.logging
    loudness, bars = speech.get_verbosity(), speech.is_progress_bar_enabled()
    speech.set_verbosity_error()  # its report warns of heads that are left out; what is missing we say
    speech.disable_progress_bar()
    try:
        model, report = transformers.AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **found, **options
        )
    except Exception as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    finally:
        speech.set_verbosity(loudness)
        if bars:
            speech.enable_progress_bar()
    without = () if config.model_type in MODEL_TYPES else ("pooler.", "vision_model.pooler.")
    missing = [name for name in sorted(map(str, report["missing_keys"])) if not name.startswith(without)]
    if missing:
        raise UserError(f"{where} lacks {missing[0]} ({len(missing)} missing tensors)")
    transform = transform_of("hf", name, preprocess, size, lambda size: _transform(name, where, found, size))
    model = model.eval()
    pooled = len(missing) == len(report["missing_keys"])  # else its pooler is a fresh random layer

    def wrap(why: str) -> Encoder:
        return wrap_library(getattr(model, "vision_model", model), hf_features(pooled), where, transform, why)

    beside = tuple(sorted(map(str, report["unexpected_keys"])))
    return OpenedModel(lambda: from_hf_module(model, where, transform), wrap, beside)


def hf_features(pooled: bool) -> Callable[[Any, Tensor], tuple[Tensor, Tensor | None, int]]:
    """Return what reads a model of transformers: tokens or a map, its pooled vector, the number of special
    tokens. Without `pooled` its pooler is not asked.
    """

    def features(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None, int]:
        known = inspect.signature(model.forward).parameters
        options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}
        if getattr(model.config, "model_type", "") in ("beit", "data2vec-vision"):
            options = {}  # whose tables are resized without being asked
        found = model(pixel_values=images, **options)
        x, vector = found.last_hidden_state, getattr(found, "pooler_output", None)
        if vector is not None:
            vector = vector.flatten(1) if pooled else None
        if x.ndim == 4:
            return x, vector, 0
        patch = getattr(model.config, "patch_size", None)
        side = patch if isinstance(patch, int) else 1
        special = x.shape[1] - images.shape[2] // side * (images.shape[3] // side)
        return x, vector, max(special, 0)

    return features


def from_hf_module(model: Any, name: str, transform: dict[str, Any]) -> Foreign:
    """Return a module of transformers in our terms. Raises NotOursError for those that our ViT cannot
    express.
    """
    config = model.config
    kind = config.model_type
    if kind not in MODEL_TYPES:
        raise NotOursError(f"{name} is a {kind!r}; converted are {', '.join(MODEL_TYPES)}")
    rotary = kind == "dinov3_vit"
    gated = getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)
    _check(config, name, rotary, gated)
    try:
        weights, shape = plain_vit(
            bare(_plain_names(model.state_dict())), FileConfig(heads=config.num_attention_heads), rotary
        )
    except ValueError as error:
        raise NotOursError(f"{name}: {one_line(error)}") from error
    shape |= {
        "norm_eps": config.layer_norm_eps,
        "position_antialias": kind == "dinov2_with_registers",
        "position_offset": 0.0,
    }
    if rotary:
        shape |= {"positions": "rope", "rope": "dinov3"}
    settings = {
        "model": shape,
        "transform": transform,
        "pool": "token" if shape["class_token"] else "average",
    }
    patch = shape["patch_size"]

    def tokens(images: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if kind in ("vit", "vit_mae", "vit_msn", "ijepa"):
            options["interpolate_pos_encoding"] = True
        if kind == "vit_mae":  # nothing masked, and in order
            count = images.shape[2] // patch * (images.shape[3] // patch)
            model.config.mask_ratio = 0.0
            options["noise"] = torch.arange(count, dtype=torch.float32).repeat(len(images), 1)
        return model(images, **options).last_hidden_state

    return Foreign(weights, settings, tokens, ((3 * patch, 5 * patch),))


def _check(config: Any, name: str, rotary: bool, gated: bool) -> None:
    """Raise NotOursError for settings that our ViT has not; others show when outputs are compared."""
    expected = "silu" if rotary and gated else "gelu"
    if config.hidden_act != expected and not (gated and not rotary):  # DINOv2's gate is always silu
        raise NotOursError(f"{name} has MLPs with {config.hidden_act!r}, where our ViT has {expected!r}")
    if rotary and getattr(config, "rope_theta", 100.0) != 100.0:
        raise NotOursError(f"{name} has rotary positions of base {config.rope_theta}; known: 100")
    sides = config.image_size, config.patch_size
    if any(not isinstance(side, int) and len(set(side)) > 1 for side in sides):
        raise NotOursError(f"{name} has images or patches that are not square: {sides[0]}, {sides[1]}")


def plain_name(name: str) -> str:
    """Return a tensor's name in timm, where `attn.q`, `attn.k`, `attn.v`, `mlp.gate_proj`, `mlp.up_proj` are
    one.
    """
    for pattern, ours in TIMM_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by timm's names: one matrix for q, k and v, and one for gate and value.

    Where only some of q, k and v have a bias, the others' is zero.
    """
    plain = {plain_name(name): value for name, value in state.items()}
    if plain.get("reg_token") is not None and not plain["reg_token"].numel():
        del plain["reg_token"]
    for name in [name for name in plain if ".mlp.gate_proj." in name]:
        both = plain.pop(name), plain.pop(name.replace(".gate_proj.", ".up_proj."))
        plain[name.replace(".gate_proj.", ".fc1.")] = torch.cat(both)
    plain = {name.replace(".mlp.up_proj.", ".mlp.fc1."): value for name, value in plain.items()}
    for name in [name for name in plain if name.endswith(".attn.q.weight")]:
        block = name.removesuffix("q.weight")
        maps = [plain.pop(f"{block}{part}.weight") for part in "qkv"]
        biases = [plain.pop(f"{block}{part}.bias", None) for part in "qkv"]
        plain[f"{block}qkv.weight"] = torch.cat(maps)
        if any(bias is not None for bias in biases):
            zero = maps[0].new_zeros(len(maps[0]))
            plain[f"{block}qkv.bias"] = torch.cat([zero if bias is None else bias for bias in biases])
    return {name: value for name, value in plain.items() if not name.startswith("pooler.")}


def _transform(name: str, where: str, found: dict[str, Any], side: int | None = None) -> dict[str, Any]:
    """What the model's image processor does, as a tree for TransformConfig, for images of `side` pixels."""
    transformers = import_library("transformers", "hf")
    try:
        own = transformers.AutoImageProcessor.from_pretrained(name, **found)
    except Exception as error:
        raise UserError(
            f"{where}: no settings of an image processor ({one_line(error)[:120]}); "
            "?preprocess=imagenet takes the usual ones"
        ) from error

    def extent(size: dict[str, Any], *names: str) -> int | None:
        values = {value for n in names if (value := size.get(n)) is not None}
        return int(values.pop()) if len(values) == 1 else None

    def of(name: str) -> dict[str, Any]:
        return dict(getattr(own, name, None) or {})

    shorter, squashed = extent(of("size"), "shortest_edge"), extent(of("size"), "height", "width")
    resize = shorter or squashed
    crop = extent(of("crop_size"), "height", "width") if getattr(own, "do_center_crop", False) else squashed
    kernel = RESAMPLE.get(int(own.resample)) if getattr(own, "resample", None) is not None else None
    scaled = (
        getattr(own, "do_rescale", True) and abs(getattr(own, "rescale_factor", 1 / 255) * 255 - 1) < 1e-4
    )
    if not (getattr(own, "do_resize", True) and resize and crop and kernel and scaled):
        raise UserError(
            f"{where}: its image processor does not resize to {{shortest_edge}} or {{height, width}} "
            "(bicubic or bilinear), crop a square and scale to [0, 1]; ?preprocess=imagenet takes the usual"
        )
    if side is not None:
        resize, crop = round(side * resize / crop), side
    normal = getattr(own, "do_normalize", True)
    return {
        "resize": resize,
        "crop": crop,
        "mean": list(own.image_mean) if normal else [0.0, 0.0, 0.0],
        "std": list(own.image_std) if normal else [1.0, 1.0, 1.0],
        "interpolation": kernel,
        "squash": shorter is None,
    }
