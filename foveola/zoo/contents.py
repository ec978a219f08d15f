"""All tensors of a file of weights by their names there, and which of them are no part of its encoder."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from foveola.zoo.capi import capi_weights
from foveola.zoo.convert import TRAINING, backbone_of

CAPI_READ = re.compile(r"encoder\.blocks\.|decoder\.blocks\.0\.|patch_embed\.|registers$|mask_token$")


def tensors_in(state: dict[str, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts, with the names of the dicts before their own."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from tensors_in(value, f"{above}{name}.")
        elif isinstance(value, Tensor):
            yield f"{above}{name}", value


def beside_encoder(state: dict[str, Any], width: int) -> tuple[str, ...]:
    """Return names of the tensors of a file that are no part of its encoder, of `width` channels: heads,
    decoders, a second network, states of an optimizer.
    """
    if found := capi_weights(state):
        read = {id(value) for name, value in found.items() if CAPI_READ.match(name)}
    else:
        tensors = backbone_of(state).tensors
        # A decoder's mask token has the decoder's width.
        read = {
            id(value)
            for name, value in tensors.items()
            if not name.startswith(TRAINING) and (name != "mask_token" or value.shape[-1] == width)
        }
    return tuple(name for name, value in tensors_in(state) if id(value) not in read)
