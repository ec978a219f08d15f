"""Files of weights as encoders, with what the user says of them behind a `?`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from foveola.config import ConfigError, UserError, build, parse_overrides
from foveola.models.encoder import Encoder, EncoderConfig, filled
from foveola.tasks.task import filled_head, make_head
from foveola.zoo.contents import beside_encoder
from foveola.zoo.convert import FileConfig, convert
from foveola.zoo.weights import HEAD_SETTINGS, SETTINGS, read_weights

LARGEST = 8192  # pixels a side that `image_size=` may ask for


def load_file(name: str) -> Encoder:
    """Return the encoder in a checkpoint file of a public ViT: `FILE` or `FILE?heads=12&image_size=448`.

    What the layout of the file does not tell must be said (`FileConfig`). Raises UserError, in one line, for
    files that are no ViT of ours, for unknown options, and for settings that have to be said.
    """
    path, query = split_options(name)
    state = read_weights(path)
    if isinstance(state.get(SETTINGS), str):
        if query:
            raise UserError(f"{name}: {path} says all of itself: load it without ?{query}")
        return _exported(state, path)
    options_of(name, query)
    try:
        file_config = build(FileConfig, parse_overrides(filter(None, query.split("&"))))
    except ConfigError as error:
        raise UserError(f"{name}: {error}") from error
    try:
        weights, settings = convert(state, file_config)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    encoder = filled(build(EncoderConfig, settings | {"origin": name}, where=str(path)), weights, path)
    encoder.beside = beside_encoder(state, encoder.config.model.shape[0])
    return encoder


def _exported(state: dict[str, Any], path: Path) -> Encoder:
    """An encoder, with its head, that `export` wrote with `format=torch` or `safetensors`."""
    try:
        settings, head = (json.loads(state.get(name, "null")) for name in (SETTINGS, HEAD_SETTINGS))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its settings are no JSON") from error
    weights = state.get("state_dict")
    if not isinstance(settings, dict) or not isinstance(weights, dict):
        raise UserError(f"{path} is damaged: it lacks settings or tensors")
    encoder = filled(build(EncoderConfig, settings, where=str(path)), weights, path)
    if isinstance(head, dict) and isinstance(own := state.get("head_state_dict"), dict):
        encoder.head = filled_head(make_head(head, encoder.config.model, path), own, path)
    return encoder


def options_of(name: str, query: str) -> dict[str, str]:
    """Return what stands behind the `?` of a model's name. Raises UserError for an option that is given
    twice.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"{name}: {twice} is given more than once")
    return options


def split_options(name: str) -> tuple[Path, str]:
    """Return the path, and what stands behind its `?`; a file whose name holds one is taken as it is."""
    if Path(name).exists():
        return Path(name), ""
    path, _, query = name.partition("?")
    return Path(path), query
