"""The state of a run as files: one file of what is whole, and, beside it, those of tensors that are cut.

    state.pt    a tree of dicts: numbers, text and whole tensors
    parts/      tensors that processes had a part of (torch.distributed.checkpoint), where there are any

NOT: whether files are whole (foveola.files), or what a state means.
"""

import json
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola.config import UserError

STATE = "state.pt"
CUT_PARTS = "parts"
METADATA = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}
StatePlace = tuple[str | int, ...]  # the keys that lead to a tensor in a tree of dicts


def is_cut(tensor: Any) -> bool:
    """Return whether a process has only a part of a tensor (a DTensor, whose module takes long to import)."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def take_cut(tree: dict) -> tuple[dict, dict[str, Tensor]]:
    """Return a tree of dicts without its cut tensors, and these by names that say where they were."""
    cut: dict[str, Tensor] = {}

    def rest(branch: dict, where: StatePlace) -> dict:
        left = {}
        for name, value in branch.items():
            here = (*where, name)
            if is_cut(value):
                cut[json.dumps(here)] = value
            else:
                left[name] = rest(value, here) if isinstance(value, dict) else value
        return left

    return rest(tree, ()), cut


def read_state(
    folder: Path, like: Callable[[StatePlace], Tensor | None] = lambda where: None, *, mmap: bool = False
) -> Any:
    """Read the state in a folder, tensors on the CPU; those that were cut are whole, unless `like` says.

    Args:
        like: a tensor of the same shape, for a path in the tree; where it is cut, so is what is read: each
            process reads its own part.
        mmap: leave what is whole in the file until it is looked at.

    Raises OSError, RuntimeError and ValueError for files that are not there or not such, UserError for parts
    whose list is damaged, or names what might run code.
    """
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=mmap)
    if (folder / CUT_PARTS).is_dir() and isinstance(state, dict):
        for name, value in _read_parts(folder / CUT_PARTS, like).items():
            _put(state, json.loads(name), value)
    return state


def _read_parts(folder: Path, like: Callable[[StatePlace], Tensor | None]) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    _refuse_code(folder / ".metadata")
    reader = dcp.FileSystemReader(folder)
    found: dict[str, Tensor] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        model = like(tuple(json.loads(name)))
        if model is None or model.shape != about.size:  # pyright: ignore[reportAttributeAccessIssue]
            found[name] = torch.empty(about.size, dtype=about.properties.dtype)  # pyright: ignore
        else:
            found[name] = torch.empty_like(model.detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # it is not asked for
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


class _Plain(pickle.Unpickler):
    """Reads what torch pickles of cut tensors, and refuses every other name, so that no file runs code."""

    def find_class(self, module: str, name: str) -> Any:
        about, torch_type = f"{module}.{name}", getattr(torch, name, None)
        known = module in METADATA and name in METADATA[module]
        if known or (module == "torch" and isinstance(torch_type, torch.dtype)):
            return super().find_class(module, name)
        raise UserError(f"it names {about}, which is no part of cut tensors and might run code")


def _refuse_code(path: Path) -> None:
    """Raise UserError for a list of parts that is not one: torch itself would run what is in it."""
    with path.open("rb") as file:
        try:
            _Plain(file).load()
        except UserError as error:
            raise UserError(f"{path} is not read: {error}") from error
        except Exception as error:
            raise UserError(f"{path} is no list of the parts of cut tensors") from error


def _put(tree: dict, where: Sequence[str | int], value: Tensor) -> None:
    for name in where[:-1]:
        tree = tree.setdefault(name, {})
    tree[where[-1]] = value
