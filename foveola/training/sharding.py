"""Weights, gradients and averages in parts, one on each process: FSDP2 of torch.distributed.

The blocks of every network, heads, prototypes and clusters are groups of their own, whose weights are whole
only while they compute; what is left of a method (embeddings, norms) is one more group, whole during a step.
A parameter is then a DTensor: what it is on this process is its local part.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foveola import distributed
from foveola.config import ConfigError, key
from foveola.methods.method import Method, Output
from foveola.state_files import is_cut

Parallel = Literal["ddp", "fsdp", "hsdp"]
T = TypeVar("T", bound=nn.Module)
SHARDED = "sharded"  # the dimension of the mesh along which a tensor is cut
COPIES = "copies"


@dataclass(frozen=True)
class ShardingConfig:
    """How weights are cut over processes, where they are (`parallel`)."""

    reshard: bool = key(
        True,
        "free the weights of a block after its forward pass, gather them again for backward: less memory",
    )
    gather: Literal["fp32", "bf16"] = key(
        "fp32", "precision in which weights of blocks travel; bf16, with precision=bf16, halves the traffic"
    )
    replicas: int | None = key(
        None, "copies of all weights, with parallel=hsdp; null = one on each machine", at_least=1
    )


def check_sharding(config: Any) -> None:
    """Raise ValueError where the settings of a run contradict how its weights are to be cut."""
    if config.sharding.gather == "bf16" and config.precision != "bf16":
        raise ValueError(f"sharding.gather=bf16 goes with precision=bf16, not {config.precision}")
    if config.parallel != "ddp" and config.lora is not None:
        raise ValueError(f"lora goes with parallel=ddp, not {config.parallel}: its updates are small")


def is_sharded(parallel: Parallel) -> bool:
    """Return whether weights are cut: asked for, and by several processes."""
    return parallel != "ddp" and distributed.world_size() > 1


def part_count(parallel: Parallel, config: ShardingConfig) -> int:
    """Return the number of parts into which each tensor is cut, 1 where it is whole.

    Raises ConfigError where the processes cannot be shared out among copies.
    """
    if not is_sharded(parallel):
        return 1
    world, copies = distributed.world_size(), 1
    if parallel == "hsdp":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        copies = max(world // here, 1) if config.replicas is None else config.replicas
        if world % copies:
            raise ConfigError(
                f"sharding.replicas={copies}: {world} processes cannot be shared by so many copies"
            )
    return world // copies


def shard(method: Method, parallel: Parallel, config: ShardingConfig, device: torch.device) -> None:
    """Cut the parameters of a method over the processes, in place, and move it to their devices.

    Every process has built the same method. Afterwards each holds its part of each parameter, along the first
    dimension or the one that `dimension_to_cut` finds; `requires_grad` stays. Optimizers are made
    afterwards. Raises ConfigError for parameters that are single numbers, which cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if scalars := [name for name, p in method.named_parameters() if not p.ndim]:
        raise ConfigError(f"parallel={parallel}: {scalars[0]} is a single number; give it a dimension of 1")
    world, parts = distributed.world_size(), part_count(parallel, config)
    if parallel == "hsdp":
        mesh = init_device_mesh(device.type, (world // parts, parts), mesh_dim_names=(COPIES, SHARDED))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=(SHARDED,))
    half = torch.bfloat16 if config.gather == "bf16" else None
    blocks = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    cut = functools.partial(_placement, parts=parts)
    for network in method.trained():
        for block in network.blocks:
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=config.reshard,
                shard_placement_fn=cut,
                mp_policy=blocks,
            )
    for unit in method.units():
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, shard_placement_fn=cut, mp_policy=whole)
        for name in getattr(unit, "entries", ()):
            register_fsdp_forward_method(unit, name)
    fully_shard(method, mesh=mesh, shard_placement_fn=cut, mp_policy=whole)


def dimension_to_cut(shape: Sequence[int], parts: int) -> int:
    """Return the dimension along which a tensor is cut: the first one, unless another suits better.

    FSDP fills the first dimension up to a multiple of the parts: a table of positions (1, patches, channels)
    over 512 processes would be gathered 512 times as large. Other dimensions must divide evenly. Where none
    does, or less than a tenth is filled up, it is the first one.
    """
    even = [dim for dim, size in enumerate(shape) if size and size % parts == 0]
    return even[-1] if even and filled_up(shape[0], parts) > 1.1 * shape[0] else 0


def filled_up(size: int, parts: int) -> int:
    """Return the least multiple of the parts that is not below a size."""
    return -(-size // parts) * parts


def _placement(parameter: nn.Parameter, parts: int) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(dimension_to_cut(parameter.shape, parts))


def can_be_filled(method: nn.Module) -> bool:
    """Return whether all tensors of a method are parameters and buffers, each of one module alone."""
    owners: dict[int, set[int]] = {}
    for module in method.modules():
        if any(isinstance(value, Tensor) for value in vars(module).values()):
            return False
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            owners.setdefault(id(tensor), set()).add(id(module))
    return all(len(each) == 1 for each in owners.values())


@torch.no_grad()
def fill(method: Method, device: torch.device, build: Callable[[], Method]) -> None:
    """Give a method that is cut, and was made on no device, the numbers of the one that `build` makes.

    Only the main process builds it; the others have one whole tensor of it at a time. All call this.
    """
    whole: dict[str, Tensor] = {}
    distributed.on_main(lambda: whole.update(_tensors(build())))
    method.to_empty(device=device)
    for name, own in _tensors(method).items():
        full = whole.pop(name, None)
        full = torch.empty(own.shape, dtype=own.dtype) if full is None else full.detach()
        full = distributed.broadcast(full.to(device))
        local_part(own).copy_(local_part(cut_like(full, own)))


def _tensors(method: nn.Module) -> dict[str, Tensor]:
    return {**dict(method.named_parameters()), **dict(method.named_buffers())}


@contextmanager
def local_gradients(method: nn.Module) -> Iterator[None]:
    """Let gradients of a method that is cut stay whole on each process while this lasts, and add up there."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(method, FSDPModule)
    method.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        method.set_requires_gradient_sync(True)


@contextmanager
def seen_whole(method: Method) -> Iterator[None]:
    """Gather what a method that is cut has beside its blocks, on each process, while this lasts.

    Processes need not call the same of it then, nor as often.
    """
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(method, FSDPModule)
    units = [unit for unit in method.units() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    for group in (method, *units):
        group.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
        for group in (method, *units):
            group.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: a view of its part, all of one that is not cut."""
    return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[operator]


def group_of(tensor: Tensor) -> dist.ProcessGroup | None:
    """Return the processes that have the parts of a tensor; None of one that is not cut."""
    return tensor.device_mesh[SHARDED].get_group() if is_cut(tensor) else None  # type: ignore[attr-defined]


def whole_norms(norms: Float[Tensor, "n"], group: dist.ProcessGroup | None) -> Float[Tensor, "n"]:
    """Return the norms of n tensors from those of their parts on this process; of whole tensors they are."""
    if group is None:
        return norms
    squares = norms.square()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def whole_tensors(tree: Any) -> Any:
    """Return dicts, lists and tuples of tensors with whole tensors in place of cut ones, one after another.

    All processes call it with the same tree and have all of the result; a tensor that was whole is the same.
    """
    return _mapped(tree, lambda tensor: tensor.full_tensor() if is_cut(tensor) else tensor)


def cut_like(full: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor, which all processes have, cut as `tensor` is; as it is where that is whole."""
    if not is_cut(tensor) or is_cut(full) or full.shape != tensor.shape:
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(tensor.device)
    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]


def whole_copy(module: T) -> T:
    """Return a copy of a module with whole parameters; all processes call it."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        if is_cut(p):
            memo[id(p)] = nn.Parameter(p.full_tensor(), requires_grad=p.requires_grad)  # type: ignore[operator]
    return copy.deepcopy(module, memo)


def _mapped(tree: Any, function: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: _mapped(value, function) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, function) for value in tree)
    return tree


# FSDP finds the tensors that a method returns, through which backward begins, as leaves of a tree.
pytree.register_pytree_node(
    Output,
    lambda output: ([output.losses, output.logs, output.features], None),
    lambda parts, _: Output(*parts),
)
