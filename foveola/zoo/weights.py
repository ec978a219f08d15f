"""Files of weights: read without running code from them, and without trust in what they say."""

import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveola.config import UserError, kind_of

CONFIG_BYTES = 2**20
SETTINGS = "foveola"  # beside the tensors of an exported encoder: its configuration as JSON
HEAD_SETTINGS = "foveola_head"  # and that of the head on it
NESTED = 8  # dicts in dicts; official files have 3


def read_weights(path: Path) -> dict[str, Any]:
    """Return the nested dict of tensors by name in a `.safetensors` or torch file; other things are left out.

    Never runs code from it. Raises UserError, in one line, for files that are damaged, are no dicts or hold
    themselves.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    # Official checkpoints also hold a command line, and learning rates as numpy numbers. Both are plain data.
    number = np.float64().__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    plain = [Namespace, np.dtype, type(np.dtype(np.float64)), *((number, name) for name in names)]
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            return _with_settings(dict(load_file(path)), metadata)
        with torch.serialization.safe_globals(plain):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's advice is to run what is in it
        raise UserError(
            f"{path} is no readable checkpoint: it is damaged, or holds objects that only its code could read"
        ) from error
    except (
        *(RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError, MemoryError, RecursionError),
        SafetensorError,
    ) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no readable checkpoint: {first[:200]}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds {kind_of(state)}, not a state dict")
    return _tensors(state, path, {})


def _with_settings(tensors: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    """Tensors; of a file that `export` wrote, what a file of torch would hold, by its `metadata`."""
    if SETTINGS not in metadata:
        return tensors
    head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    own = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    tree = {"state_dict": own, SETTINGS: metadata[SETTINGS]}
    if HEAD_SETTINGS in metadata:
        tree |= {"head_state_dict": head, HEAD_SETTINGS: metadata[HEAD_SETTINGS]}
    return tree


def read_config(path: Path) -> dict[str, Any]:
    """Return a `config.json` beside weights. Raises UserError, in one line, unless it holds an object."""
    try:
        if path.stat().st_size > CONFIG_BYTES:
            raise UserError(f"{path.parent} is damaged: {path.name} is larger than any configuration")
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.parent} is damaged: {path.name} is no JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path.parent} is damaged: {path.name} holds {kind_of(settings)}")
    return settings


def _tensors(
    state: dict[Any, Any], path: Path, done: dict[int, dict[str, Any]], depth: int = 1
) -> dict[str, Any]:
    """`done` are dicts by identity that were seen whole: a hostile file may hold one many times."""
    if depth > NESTED:
        raise UserError(f"{path} is no readable checkpoint: more than {NESTED} dicts in each other")
    if id(state) in done:
        return done[id(state)]
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(name, str) and (
            isinstance(value, torch.Tensor) or (name in (SETTINGS, HEAD_SETTINGS) and isinstance(value, str))
        ):
            tensors[name] = value
        elif isinstance(name, str) and isinstance(value, dict):
            tensors[name] = _tensors(value, path, done, depth + 1)
    done[id(state)] = tensors
    return tensors
