"""timm's vision transformers, and what is done to images for them, in our terms."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveola.config import UserError
from foveola.zoo.convert import FileConfig, bare, plain_vit
from foveola.zoo.foreign import Foreign, import_library, one_line
from foveola.zoo.preprocess import transform_of
from foveola.zoo.weights import read_weights

TIMM_WRAPPERS = ("state_dict", "model")
EVA = (  # names of timm's Eva, which DINOv3 is there, to those of its ViT
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.mlp\.fc1_g\.", ".mlp.gate."),
    (r"\.mlp\.fc1_x\.", ".mlp.value."),
)


def from_timm(
    name: str, pretrained: str = "true", preprocess: str | None = None, size: int | None = None
) -> Foreign:
    """Return a model of timm's by name or from a folder that timm wrote (`config.json` and weights).

    Args:
        pretrained: "true" for timm's own weights, "false" for random ones, or a file of weights
            in timm's names.
        preprocess, size: how images are made (`preprocess.transform_of`), timm's way by default.

    Raises UserError for models that are not found, and for those that our ViT cannot express.
    """
    timm = import_library("timm", "timm")
    folder = Path(name).is_dir()
    if folder and not (Path(name) / "config.json").is_file():
        raise UserError(f"timm:{name}: no config.json, so no folder of timm's")
    if folder and pretrained != "true":
        raise UserError(f"timm:{name}: pretrained={pretrained}: a folder brings its own weights")
    own = pretrained == "true"
    try:
        # Where images are not as timm has them, positions are resized to them, as for timm's other sizes.
        other: dict[str, Any] = {"dynamic_img_size": True} if preprocess or size else {}
        where = f"local-dir:{name}" if folder else name
        model = timm.create_model(where, pretrained=own, num_classes=0, **other)
    except Exception as error:  # of the library, of its hub, of the network: there is no list of them
        raise UserError(f"timm:{name}: {one_line(error)}") from error
    if pretrained not in ("true", "false"):
        _fill(model, Path(pretrained), name)
    foreign = from_timm_module(model.eval(), f"timm:{name}", preprocess, size)
    cfg = model.pretrained_cfg
    head = cfg.get("classifier") if own and cfg.get("num_classes") else None  # which timm leaves out
    beside = tuple(f"{head}.{part}" for part in ("weight", "bias")) if isinstance(head, str) else ()
    return dataclasses.replace(foreign, beside=beside)


def from_timm_module(
    model: Any, name: str, preprocess: str | None = None, size: int | None = None
) -> Foreign:
    """Return a module of timm's in our terms. Raises UserError for those that our ViT cannot express."""
    rotary = _check(model, name)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    if rotary:
        state = _plain_names(state)
    try:
        weights, shape = plain_vit(bare(state), FileConfig(heads=model.blocks[0].attn.num_heads), rotary)
    except ValueError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    shape |= {"norm_eps": model.norm.eps, "position_antialias": not rotary, "position_offset": 0.0}
    if rotary:
        shape |= {"positions": "rope", "rope": "dinov3"}
    settings = {
        "model": shape,
        "transform": transform_of(
            "timm", name.removeprefix("timm:"), preprocess, size, lambda size: _transform(model, name, size)
        ),
        "pool": "token" if model.global_pool == "token" else "average",
    }

    def tokens(images: Tensor) -> Tensor:
        return model.forward_features(images)

    return Foreign(weights, settings, tokens)


def _check(model: Any, name: str) -> bool:
    """Whether positions are rotary. Raises UserError for what is known to be beyond our ViT.

    What has tensors of its own is found by their names, and all else by comparing outputs.
    """
    eva = import_library("timm.models.eva", "timm")
    vit = import_library("timm.models.vision_transformer", "timm")
    kind = type(model).__name__
    if type(model) not in (vit.VisionTransformer, eva.Eva):
        raise UserError(f"{name} is a {kind}, not a plain VisionTransformer or a DINOv3")
    rotary = isinstance(model, eva.Eva)
    if rotary and type(model.rope).__name__ != "RotaryEmbeddingDinoV3":
        raise UserError(f"{name} is an Eva with other positions than DINOv3's, which are not supported")
    if not isinstance(model.norm, nn.LayerNorm):
        what = "after pooling (fc_norm)" if isinstance(model.norm, nn.Identity) else "by another norm"
        raise UserError(f"{name} is normalised {what}, where our ViT has a LayerNorm")
    if not isinstance(model.norm_pre, nn.Identity):
        raise UserError(f"{name} has a norm before its first block (norm_pre), which our ViT has not")
    if model.global_pool not in ("token", "avg"):
        raise UserError(f"{name} pools by {model.global_pool!r}; known: token, avg")
    eps = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(eps) > 1:
        raise UserError(f"{name} has norms of several eps ({', '.join(map(str, sorted(eps)))})")
    for block in model.blocks:
        activation = getattr(getattr(block, "mlp", None), "act", None)
        exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
        if not exact and not isinstance(activation, nn.SiLU):
            raise UserError(f"{name} has MLPs with {activation}, where our ViT has the exact GELU")
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
