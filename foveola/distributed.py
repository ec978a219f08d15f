"""Several processes as one: who am I, and sums, means and rows over all of us. The identity on one process.

Every function is called by all ranks, in the same order. Results carry no gradient and, with one process, may
share memory with their argument: do not write into them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from foveola.config import UserError
from foveola.failures import explain
from foveola.launchers import join_tasks

T = TypeVar("T")
# Rank 0 may be evaluating or writing for long while the others wait for it. Processes that died are not
# waited for: connections to them break, and launchers end the others.
MEETING_PATIENCE = timedelta(hours=6)
STORE_SECONDS = timedelta(seconds=5)  # to reach the store of torchrun


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the index of this process among all, 0 with one process."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and talks to the user."""
    return rank() == 0


def find_device(device: str | torch.device | None = None, local: int = 0) -> torch.device:
    """Return `cpu`, `cuda` (that of index `local`), `cuda:1`; None and `auto`: a GPU if there is one.

    Raises UserError when there is no such device.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"no such device: {str(device)!r}; known: auto, cpu, cuda, cuda:0, ...") from error
    if chosen.type == "cuda":
        index = local if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise UserError(f"no GPU with index {index}: this machine shows {torch.cuda.device_count()}")
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(
            f"device={str(device)!r} is not supported: foveola computes on cpu and cuda; write device=cpu"
        )
    return chosen


def start(device: str) -> torch.device:
    """Join the processes that torchrun, srun or mpirun started, if any did; returns this process's device.

    `device` is "cpu", "cuda" (this process's own GPU), "cuda:1", or "auto" (a GPU if there is
    one). Reads RANK, WORLD_SIZE and LOCAL_RANK, or what srun and mpirun say in their own words
    (`foveola.launchers`). Raises UserError when there is no such device, when the environment names only some
    of the variables, and for tasks that cannot find each other.
    """
    join_tasks(os.environ)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if "SLURM_PROCID" in os.environ and torch.cuda.device_count() == 1:
        local = 0  # of the GPUs of a machine, srun shows each task its own alone
    chosen = find_device(device, local)
    if chosen.type == "cuda":
        index = local if chosen.index is None else chosen.index
        if size > 1 and chosen.index is not None:
            raise UserError(f"several processes cannot share {device!r}; write device=cuda")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if size > 1 and not _active():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"WORLD_SIZE={size}, but {', '.join(missing)} not set; start with torchrun")
        # What is on a CPU stays there: to agree on going on, once a step, no process waits for its GPU.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=MEETING_PATIENCE)
    return chosen


def stop() -> None:
    """Leave the group of processes; nothing happens where there is none."""
    if _active():
        dist.destroy_process_group()


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """`start` and, at the end, `stop`; a group that the caller had joined before stays."""
    before = _active()
    chosen = start(device)
    try:
        yield chosen
    finally:
        if not before:
            stop()


def _travelling(tensor: Tensor) -> Tensor:
    """A contiguous copy without gradient, on the device that the backend can reach: its own, unless whoever
    made the group of processes made one of NCCL alone.
    """
    device = torch.device("cuda") if dist.get_backend() == "nccl" else tensor.device
    return tensor.detach().to(device, copy=True).contiguous()


def _all_reduce(tensor: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return tensor.detach()
    total = _travelling(tensor)
    dist.all_reduce(total, operation)
    return total.to(tensor.device)


def all_reduce_sum(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the elementwise sum over the processes."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the elementwise maximum over the processes."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def all_reduce_mean(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the elementwise mean over the processes, each counting the same."""
    return all_reduce_sum(tensor) / world_size()


def gather_rows(tensor: Shaped[Tensor, "rows *rest"]) -> Shaped[Tensor, "all_rows *rest"]:
    """Return the rows of all processes in rank order. Row counts may differ (and be zero), `rest` may not."""
    if world_size() == 1:
        return tensor.detach()
    rows = _travelling(torch.tensor([tensor.shape[0]], device=tensor.device))
    counts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(counts, rows)
    largest = int(max(counts))
    mine = _travelling(tensor)
    padded = mine.new_zeros(largest, *mine.shape[1:])
    padded[: mine.shape[0]] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)]).to(tensor.device)


def is_first_to_say(text: str) -> bool:
    """Return whether no other process of the same start of torchrun has asked this of the same text.

    It needs no group of processes, which an error may have ended: torchrun's own store counts. Where that
    cannot be reached, every process is the first.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=STORE_SECONDS)
        return store.add(f"foveola/said/{attempt}/{text}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1)).item()  # needs no device argument, unlike dist.barrier under NCCL


def broadcast_object(value: Any) -> Any:
    """Return the picklable `value` of rank 0; what the other ranks pass is ignored."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the tensor of rank 0; of what the other ranks pass only shape and type count."""
    if world_size() == 1:
        return tensor.detach()
    found = _travelling(tensor)
    dist.broadcast(found, 0)
    return found.to(tensor.device)


def gather_objects(value: T) -> list[T]:
    """Return the picklable values of all processes, in rank order."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def on_main(work: Callable[[], T]) -> T:
    """Return what `work` returns on the main process, on all of them. A UserError, too, is raised on all.

    So is a fault of the machine (a full disk, a lack of memory), as a UserError.
    """
    outcome: Any = None
    if is_main():
        try:
            outcome = work()
        except UserError as error:
            outcome = error
        except Exception as error:
            if world_size() == 1 or (reason := explain(error)) is None:
                raise
            outcome = UserError(reason)
    outcome = broadcast_object(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome
