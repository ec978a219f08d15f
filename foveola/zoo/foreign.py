"""A model of another library becomes an `Encoder` of ours, and its function stays the same.

A model is converted, not wrapped: object tokens, attention, layers and every protocol then work as for our
own. Both are compared on noise each time one is loaded.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola.config import UserError, build
from foveola.models.encoder import Encoder, EncoderConfig

TOLERANCE = 1e-3  # of the root mean square of outputs; rounding in float32 makes some 1e-5


class NotOursError(UserError):
    """A model computes something that our ViT does not."""


@dataclass(frozen=True)
class Foreign:
    """A model of another library in our terms."""

    weights: Mapping[str, Tensor]  # by our names
    settings: dict[str, Any]  # a tree for EncoderConfig
    tokens: Callable[[Tensor], Tensor]  # normalised images to [B, T, D]: class token, registers, patches
    sizes: tuple[tuple[int, int], ...] = field(default=())  # of images on which both are compared
    beside: tuple[str, ...] = ()  # names of what else is in its file


def adopt(foreign: Foreign, name: str) -> Encoder:
    """Return an encoder with the weights of `foreign`. Raises UserError unless it gives the same tokens."""
    settings = foreign.settings
    if (count := settings["model"].get("channels", 3)) != 3:  # of files, too
        settings = settings | {"transform": settings["transform"] | {"channels": str(count)}}
    encoder = Encoder(build(EncoderConfig, settings | {"origin": name}, where=name))
    encoder.fill({key: value.detach() for key, value in foreign.weights.items()}, Path(name))
    side = encoder.config.transform.crop
    for size in dict.fromkeys(((side, side), *foreign.sizes)):
        _compare(encoder, foreign, size, name)
    encoder.beside = foreign.beside
    return encoder


@dataclass(frozen=True)
class OpenedModel:
    """A model of another library: as ours where it can be converted, as a wrapped one otherwise."""

    convert: Callable[[], Foreign]  # raises NotOursError
    wrap: Callable[[str], Encoder]  # told why it is not converted
    beside: tuple[str, ...] = ()  # names of what else is in its file


def taken(opened: OpenedModel, name: str) -> Encoder:
    """Return an encoder of a model, converted if our ViT computes the same. Raises UserError."""
    try:
        return adopt(replace(opened.convert(), beside=opened.beside), name)
    except NotOursError as error:
        return opened.wrap(str(error).removeprefix(f"{name} ").removeprefix(f"{name}: "))


@torch.inference_mode()
def _compare(encoder: Encoder, foreign: Foreign, size: tuple[int, int], name: str) -> None:
    count = encoder.config.model.channels
    images = torch.randn(1, count, *size, generator=torch.Generator().manual_seed(0))
    theirs, features = foreign.tokens(images), encoder.backbone(images)
    ours = torch.cat((features.objects, features.registers, features.patches), dim=1)
    where = f"{name}: on an image of {size[0]} x {size[1]} pixels"
    if ours.shape != theirs.shape:
        raise NotOursError(
            f"{where} it gives {tuple(theirs.shape[1:])} numbers, converted {tuple(ours.shape[1:])}"
        )
    if not theirs.isfinite().all():
        raise UserError(f"{where} it gives numbers that are not finite")
    error, scale = (ours - theirs).abs().max().item(), theirs.square().mean().sqrt().item()
    if not error <= TOLERANCE * scale:
        raise NotOursError(
            f"{where} its converted network differs by {error:.2g} where outputs are about {scale:.2g}: "
            "it computes something that our ViT does not"
        )


def import_library(module: str, extra: str) -> Any:
    """Return an optional library. Raises UserError that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.split(".")[0]
        raise UserError(
            f"{extra}: models need {top} ({one_line(error)}); pip install 'foveola[{extra}]'"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the first line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
