"""Modules of others as encoders of features alone: `python:my_module:my_encoder`, and `foveola.wrap`."""

from typing import Any

import torch
from torch import Tensor, nn

from foveola.config import UserError, build, nearest
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.wrapped import ImageTokens, Wrapped, looked_at
from foveola.outside import imported, is_importable
from foveola.zoo.convert import PIXEL_STATISTICS
from foveola.zoo.files import LARGEST, options_of

WRAP_OPTIONS = ("image_size", "preprocess")


def wrap(module: nn.Module, name: str, transform: TransformConfig | None = None, why: str = "") -> Encoder:
    """Return a frozen encoder of any module, for everything that needs features of images and patches alone.

    Args:
        module: normalised images [B, C, H, W], of as many channels as the transform's mean, to a map [B, D,
            h, w], or to `ImageTokens`. Patches must be squares that fill the image. Where it gives a pooled
            vector, that stands for an image; otherwise the mean of the patches does.
        name: what it is, in messages; with the weights it makes the encoder's fingerprint.
        transform: what is done to images; by default 256, 224, ImageNet's mean and deviation.
        why: why it is no ViT of ours, in refusals.

    Objects are means of their patches (`pool=average`). What needs the inside of a ViT (tokens that read an
    object alone, attention that the module does not give, earlier blocks, positions, training from it,
    export) ends in a UserError. Raises UserError for a module that does not keep the contract on an image of
    noise.
    """
    transform = transform or TransformConfig()
    module = module.eval().requires_grad_(False)
    config = looked_at(module, transform.crop, name, why, channels=len(transform.mean))
    pool = "token" if config.class_token else "average"
    return Encoder(EncoderConfig(config, transform, name, pool), Wrapped(config, module))


def load_python(name: str) -> Encoder:
    """Load `python:my_module:my_encoder`: a module, what makes one without arguments, or an `Encoder`.

    Of a module `?image_size=` says how large images are (224), and `?preprocess=` their mean and deviation:
    imagenet (default), half, clip. Raises UserError for anything else.
    """
    rest = name.partition(":")[2]
    path, _, query = rest.partition("?")
    options = options_of(name, query)
    if not is_importable(path):
        raise UserError(f"{name!r}: expected python:my_module:my_encoder")
    for option in options:
        if option not in WRAP_OPTIONS:
            near = nearest(option, WRAP_OPTIONS)
            known = f"did you mean {near!r}?" if near else f"known: {', '.join(WRAP_OPTIONS)}"
            raise UserError(f"{name}: unknown option {option!r}; {known}")
    found = imported(path)
    if not isinstance(found, nn.Module) and callable(found):
        found = _made(found, path)
    if isinstance(found, Encoder):
        if options:
            raise UserError(
                f"{name}: {path} is an Encoder, which says all of itself: load it without ?{query}"
            )
        return found
    if not isinstance(found, nn.Module):
        raise UserError(f"{name}: {path} is a {type(found).__name__}, not a torch module or what makes one")
    return wrap(found, f"python:{path}", _transform(name, options), "a module of your own")


def _made(make: Any, path: str) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return make()
    except Exception as error:  # of somebody else's code: there is no list of them
        raise UserError(f"python:{path} fails when made: {type(error).__name__}: {error}") from error


def _transform(name: str, options: dict[str, str]) -> TransformConfig:
    size, kind = options.get("image_size", "224"), options.get("preprocess", "imagenet")
    if not size.isdecimal() or not 0 < int(size) <= LARGEST:
        raise UserError(f"{name}: image_size must be pixels of a side, 1 to {LARGEST}, such as 224")
    if kind not in PIXEL_STATISTICS:
        raise UserError(f"{name}: preprocess={kind}: expected {', '.join(PIXEL_STATISTICS)}")
    geometry = {"resize": round(int(size) * 8 / 7), "crop": int(size)}
    return build(TransformConfig, geometry | PIXEL_STATISTICS[kind], where=name)


class OfLibrary(nn.Module):
    """A module of timm or transformers that keeps the contract of `wrap`.

    Special tokens stand first; a pooled vector of another width than the tokens is left out.
    """

    def __init__(self, module: nn.Module, features: Any) -> None:
        super().__init__()
        self.module, self.features = module, features

    def forward(self, images: Tensor) -> ImageTokens:
        """Return tokens, grid, and the library's own pooled vector."""
        tokens, pooled, special = self.features(self.module, images)
        if tokens.ndim == 4:  # [B, D, h, w]
            grid = tokens.shape[2], tokens.shape[3]
            tokens = tokens.flatten(2).mT
        else:
            grid = grid_of_count(tokens.shape[1] - special, images.shape[2], images.shape[3])
        if pooled is not None and pooled.shape != (len(tokens), tokens.shape[2]):
            pooled = None
        return ImageTokens(tokens, grid, pooled)


def grid_of_count(count: int, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of so many square patches of an image. Raises UserError where none fit."""
    rows = round((count * height / width) ** 0.5)
    if rows < 1 or count % rows:
        raise UserError(f"{count} patches are no grid of an image of {height} x {width} pixels")
    return rows, count // rows


def wrap_library(module: nn.Module, features: Any, name: str, transform: dict[str, Any], why: str) -> Encoder:
    """Return a wrapped module of a library; `features(module, images)` gives (tokens [B, T, D] or a map
    [B, D, h, w], a pooled vector or None, the number of special tokens).
    """
    return wrap(OfLibrary(module, features), name, build(TransformConfig, transform, where=name), why)
