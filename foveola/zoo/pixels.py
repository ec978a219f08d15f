"""Pixels themselves as features, `pixels:?size=64&patch=8`: what every encoder must beat."""

from typing import Any

import torch

from foveola.config import UserError, build, nearest
from foveola.models.encoder import Encoder, EncoderConfig
from foveola.zoo.files import options_of

DEFAULTS = {"size": 32, "patch": 32}
LARGEST_PATCH = 64  # pixels a side of a patch: 2.4 GB


def pixel_encoder(name: str) -> Encoder:
    """Return an encoder that hands on each patch as its 3 p^2 normalised pixels, divided by their root mean
    square.

    Of an image that is one patch (the default, 32 of 32 pixels) the feature is the whole image; with
    smaller patches they are features for dense protocols, and what stands for an image is their mean. It is
    a ViT of one block that adds nothing, without class token, so all protocols take it. Raises UserError for
    other options than `size` and `patch`, for patches above 64 pixels, and where they do not
    fill the image.
    """
    options: dict[str, int] = dict(DEFAULTS)
    for key, value in options_of(name, name.partition(":")[2].removeprefix("?")).items():
        if key not in options:
            near = nearest(key, options)
            raise UserError(f"{name}: unknown option {key!r}; did you mean {near or 'size or patch'!r}?")
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{name}: {key} must be a number of pixels, such as {DEFAULTS[key]}")
        options[key] = int(value)
    size, patch = options["size"], options["patch"]
    if size % patch:
        raise UserError(f"{name}: size={size} is not a multiple of patch={patch}")
    width = 3 * patch**2
    if patch > LARGEST_PATCH:  # the block that adds nothing has 4 width^2 numbers
        raise UserError(
            f"{name}: patches of {patch} pixels a side have {width:,} numbers, more than a network can be "
            f"made for: at most {LARGEST_PATCH}; for an image in one patch "
            f"size={LARGEST_PATCH}&patch={LARGEST_PATCH} shrinks it"
        )
    settings: dict[str, Any] = {
        "model": {
            "width": width,
            "depth": 1,
            "heads": 1,
            "mlp_ratio": 1 / width,
            "patch_size": patch,
            "image_size": size,
            "class_token": False,
            "norm": "rms",
            "final_norm_affine": False,
            "drop_path": 0.0,
        },
        "transform": {"resize": size, "crop": size},
        "pool": "average",
        "origin": name,
    }
    encoder = Encoder(build(EncoderConfig, settings, where=name))
    network = encoder.backbone
    with torch.no_grad():
        network.patch_embed.proj.weight.copy_(torch.eye(width).view(width, 3, patch, patch))
        for key, weight in network.named_parameters():
            if key == "pos_embed" or ".attn.proj." in key or ".mlp.fc2." in key:
                weight.zero_()
        assert network.patch_embed.proj.bias is not None
        network.patch_embed.proj.bias.zero_()
    return encoder
