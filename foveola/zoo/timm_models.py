"""timm's vision transformers, and what is done to images for them, in our terms."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveola.config import UserError
from foveola.models.encoder import Encoder
from foveola.zoo.convert import FileConfig, bare, plain_vit
from foveola.zoo.foreign import Foreign, NotOursError, OpenedModel, import_library, one_line
from foveola.zoo.preprocess import transform_of
from foveola.zoo.weights import read_weights
from foveola.zoo.wrap import wrap_library

TIMM_WRAPPERS = ("state_dict", "model")
EVA = (  # names of timm's Eva, which DINOv3 is there, to those of its ViT
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.fc1_g\.", ".mlp.gate."),
    (r"\.mlp\.fc1_x\.", ".mlp.value."),
)


def from_timm(
    name: str, pretrained: str = "true", preprocess: str | None = None, size: int | None = None
) -> OpenedModel:
    """Return a model of timm's by name or from a folder that timm wrote (`config.json` and weights).

    Args:
        pretrained: "true" for timm's own weights, "false" for random ones, or a file of weights
            in timm's names.
        preprocess, size: how images are made (`preprocess.transform_of`), timm's way by default.

    What our ViT cannot express is wrapped. Raises UserError for models that are not found.
    """
    timm = import_library("timm", "timm")
    folder = Path(name).is_dir()
    if folder and not (Path(name) / "config.json").is_file():
        raise UserError(f"timm:{name}: no config.json, so no folder of timm's")
    if folder and pretrained != "true":
        raise UserError(f"timm:{name}: pretrained={pretrained}: a folder brings its own weights")
    own = pretrained == "true"
    where = f"local-dir:{name}" if folder else name
    try:
        model = _created(timm, where, own, preprocess, size)
    except Exception as error:  # of the library, of its hub, of the network: there is no list of them
        raise UserError(f"timm:{name}: {one_line(error)}") from error
    if pretrained not in ("true", "false"):
        _fill(model, Path(pretrained), name)
    full = f"timm:{name}"
    model.eval()
    cfg = model.pretrained_cfg
    head = cfg.get("classifier") if own and cfg.get("num_classes") else None  # which timm leaves out
    beside = tuple(f"{head}.{part}" for part in ("weight", "bias")) if isinstance(head, str) else ()

    def wrap(why: str) -> Encoder:
        return wrap_library(model, timm_features, full, _made_of(model, full, preprocess, size), why)

    return OpenedModel(lambda: from_timm_module(model, full, preprocess, size), wrap, beside)


def _created(timm: Any, where: str, own: bool, preprocess: str | None, size: int | None) -> Any:
    """The model. Where images are not as timm has them, positions are resized to them, as for timm's other
    sizes; networks whose positions cannot be are made for the size, and others take any.
    """
    for other in ({"dynamic_img_size": True}, {"img_size": size}) if preprocess or size else ():
        try:
            if None not in other.values():
                return timm.create_model(where, pretrained=own, num_classes=0, **other)
        except TypeError:
            continue
    return timm.create_model(where, pretrained=own, num_classes=0)


def timm_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return what timm's model gives: tokens [B, T, D] or a map [B, D, h, w], its pooled vector, and the
    number of special tokens.
    """
    x = model.forward_features(images)
    if isinstance(x, tuple | list):
        raise UserError(f"{type(model).__name__} gives several features, which are not supported")
    pooled = model.forward_head(x, pre_logits=True)
    last = getattr(model, "output_fmt", "") == "NHWC" or x.shape[1] != model.num_features
    if x.ndim == 4 and last and x.shape[3] == model.num_features:
        x = x.movedim(3, 1)
    return x, pooled if pooled.ndim == 2 else None, getattr(model, "num_prefix_tokens", 0)


def from_timm_module(
    model: Any, name: str, preprocess: str | None = None, size: int | None = None
) -> Foreign:
    """Return a module of timm's in our terms. Raises NotOursError for those that our ViT cannot express."""
    rotary = _check(model, name)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    if rotary:
        state = _plain_names(state)
    try:
        weights, shape = plain_vit(bare(state), FileConfig(heads=model.blocks[0].attn.num_heads), rotary)
    except ValueError as error:
        raise NotOursError(f"{name}: {one_line(error)}") from error
    shape["norm_eps"] = model.blocks[0].norm1.eps
    if "position_antialias" not in shape and "relative_bias" not in shape:
        shape |= {"position_antialias": not rotary, "position_offset": 0.0}
    if rotary:
        shape |= {"positions": "rope", "rope": "dinov3"}
    settings = {
        "model": shape,
        "transform": _made_of(model, name, preprocess, size),
        "pool": "token" if model.global_pool == "token" else "average",
    }

    def tokens(images: Tensor) -> Tensor:
        return model.forward_features(images)

    return Foreign(weights, settings, tokens)


def _made_of(model: Any, name: str, preprocess: str | None, size: int | None) -> dict[str, Any]:
    """What is done to images, as a tree for TransformConfig."""
    return transform_of(
        "timm", name.removeprefix("timm:"), preprocess, size, lambda size: _transform(model, name, size)
    )


def _check(model: Any, name: str) -> bool:
    """Whether positions are rotary. Raises NotOursError for what is known to be beyond our ViT.

    What has tensors of its own is found by their names, and all else by comparing outputs.
    """
    eva = import_library("timm.models.eva", "timm")
    vit = import_library("timm.models.vision_transformer", "timm")
    kind = type(model).__name__
    relative = isinstance(model, import_library("timm.models.beit", "timm").Beit)
    if type(model) not in (vit.VisionTransformer, eva.Eva) and not relative:
        raise NotOursError(f"{name} is a {kind}, not a plain VisionTransformer or a DINOv3")
    rotary = isinstance(model, eva.Eva)
    if rotary and type(model.rope).__name__ != "RotaryEmbeddingDinoV3":
        raise NotOursError(f"{name} is an Eva with other positions than DINOv3's, which are not supported")
    last = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    if not isinstance(last, nn.LayerNorm):
        raise NotOursError(f"{name} is normalised by another norm, where our ViT has a LayerNorm")
    if not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity):
        raise NotOursError(f"{name} has a norm before its first block (norm_pre), which our ViT has not")
    if model.global_pool not in ("token", "avg"):
        raise NotOursError(f"{name} pools by {model.global_pool!r}; known: token, avg")
    eps = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) > 1:
        raise NotOursError(f"{name} has norms of several eps ({', '.join(map(str, sorted(eps)))})")
    for block in model.blocks:
        activation = getattr(getattr(block, "mlp", None), "act", None)
        exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
        if not exact and not isinstance(activation, nn.SiLU):
            raise NotOursError(f"{name} has MLPs with {activation}, where our ViT has the exact GELU")
    return rotary


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Eva's tensors by the names of timm's ViT: one matrix makes gate and value."""
    for pattern, plain in EVA:
        state = {re.sub(pattern, plain, name): value for name, value in state.items()}
    for name in [name for name in state if ".mlp.gate." in name]:
        both = state.pop(name), state.pop(name.replace(".gate.", ".value."))
        state[name.replace(".gate.", ".fc1.")] = torch.cat(both)
    return state


def _transform(model: Any, name: str, size: int | None = None) -> dict[str, Any]:
    """What timm does to images for this model, or for those of `size`; a tree for TransformConfig."""
    data = import_library("timm.data", "timm").resolve_model_data_config(model)
    _, height, width = data["input_size"]
    height, width = (size, size) if size else (height, width)
    mode, kernel = data["crop_mode"], data["interpolation"]
    if height != width:
        raise UserError(f"{name} takes images of {height} x {width} pixels, which are not square")
    if mode not in ("center", "squash") or kernel not in ("bicubic", "bilinear"):
        raise UserError(
            f"{name}: its images are made by crop_mode={mode}, interpolation={kernel}; "
            "known: center and squash, bicubic and bilinear"
        )
    return {
        "resize": math.floor(height / data["crop_pct"]),
        "crop": height,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "interpolation": kernel,
        "squash": mode == "squash",
    }


def _fill(model: Any, path: Path, name: str) -> None:
    """Weights of a file in timm's names. Raises UserError where they are not the model's."""
    if not path.is_file():
        raise UserError(f"timm:{name}: pretrained={path}: expected true, false or a file of weights")
    state: Any = read_weights(path)
    while wrapper := next((w for w in TIMM_WRAPPERS if isinstance(state.get(w), dict)), None):
        state = state[wrapper]
    state = {key.removeprefix("module."): value for key, value in state.items() if hasattr(value, "shape")}
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    own = model.state_dict()
    for what, names in (("lacks", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        if names:
            raise UserError(f"{path} {what} {min(names)} of timm's {name} ({len(names)} such tensors)")
    for key, value in own.items():
        if state[key].shape != value.shape:
            found, expected = tuple(state[key].shape), tuple(value.shape)
            raise UserError(f"{path}: {key} is {found}, expected {expected} of timm's {name}")
    model.load_state_dict(state)
