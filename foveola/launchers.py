"""Who started this process beside which others: torchrun, srun, mpirun, or `gpus=8` of a command itself.

torch.distributed reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which
torchrun sets. What other launchers tell their tasks is put into these words here.
"""

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from foveola.config import UserError

ALONE = "tasks that are meant to be independent set WORLD_SIZE=1"
PORTS = range(20_000, 32_000)  # below those that Linux gives to outgoing connections
PORT = 29_500  # torchrun's own default
STOPPED = "FOVEOLA_STOPPED_EXIT"  # exit code of a run that was stopped before its end, instead of 0
SHUTDOWN_SECONDS = 600  # for a checkpoint, after a signal
STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # of which a run makes a checkpoint


def join_tasks(environment: MutableMapping[str, str]) -> None:
    """Set the variables of torch.distributed where srun or mpirun started several tasks.

    Nothing changes under torchrun, or where WORLD_SIZE is set. Raises UserError for tasks that cannot find
    each other: each would do the whole work alone.
    """
    if "WORLD_SIZE" in environment:
        return
    # In a job of Slurm, mpirun starts its daemons by srun, whose words its tasks then see as well.
    for read in (_open_mpi, _hydra, _slurm):
        variables = read(environment)
        if variables is not None:
            for name, value in variables.items():
                environment.setdefault(name, value)
            return
    if int(environment.get("PMIX_RANK", "0") or 0) > 0:
        raise UserError(
            f"PMIX_RANK={environment['PMIX_RANK']}: a launcher started several tasks, but not how many: set "
            f"RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start with torchrun; {ALONE}"
        )


def _slurm(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Tasks of one job step (srun)."""
    size = _count(variables, "SLURM_STEP_NUM_TASKS")
    if size < 2:
        return None
    try:
        rank, local = int(variables["SLURM_PROCID"]), int(variables["SLURM_LOCALID"])
        nodes = variables.get("SLURM_STEP_NODELIST") or variables["SLURM_JOB_NODELIST"]
        here = _of_node(variables["SLURM_STEP_TASKS_PER_NODE"], int(variables["SLURM_NODEID"]))
        job, step = int(variables["SLURM_JOB_ID"]), int(variables.get("SLURM_STEP_ID", "0"))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"srun started {size} tasks, and each would do the whole work alone, as {error} is missing or no "
            f"number: start them with srun itself, or with torchrun; {ALONE}"
        ) from None
    port = PORTS[(job * 7 + step) % len(PORTS)]
    return _words(rank, size, local, here, first_host(nodes), port)


def _open_mpi(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Tasks of Open MPI (mpirun)."""
    size = _count(variables, "OMPI_COMM_WORLD_SIZE")
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return None if size < 2 else _mpi(variables, "mpirun", size, names)


def _hydra(variables: Mapping[str, str]) -> dict[str, str] | None:
    """Tasks of MPICH or Intel MPI (mpiexec)."""
    size = _count(variables, "PMI_SIZE")
    names = ("PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    by_srun = (
        names[1] not in variables and _count(variables, "SLURM_STEP_NUM_TASKS") == size
    )  # srun --mpi=pmi2
    return None if size < 2 or by_srun else _mpi(variables, "mpiexec", size, names)


def _mpi(
    variables: Mapping[str, str], launcher: str, size: int, names: tuple[str, str, str]
) -> dict[str, str]:
    try:
        rank, local, here = (int(variables[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{launcher} started {size} tasks, and each would do the whole work alone, as {error} is missing "
            f"or no number: set RANK, WORLD_SIZE and LOCAL_RANK, or start with torchrun; {ALONE}"
        ) from None
    if here < size and "MASTER_ADDR" not in variables:
        raise UserError(
            f"{launcher} started {size} tasks on several machines, which do not know the first one: "
            "give its address to all of them as MASTER_ADDR (and a free port of it as MASTER_PORT)"
        )
    space = variables.get("PMIX_NAMESPACE") or variables.get("OMPI_MCA_ess_base_jobid")
    port = PORT if space is None else PORTS[sum(map(ord, space)) * 31 % len(PORTS)]
    return _words(rank, size, local, here, "127.0.0.1", port)


def _words(rank: int, size: int, local: int, here: int, address: str, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _count(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name, "")
    return int(text) if text.isdigit() else 0


def first_host(nodes: str) -> str:
    """Return the first host of a list in Slurm's notation: `node003` of `node[003-006,9],login1`."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    if head is None:
        raise UserError(f"the list of nodes {nodes!r} names no host")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head.group())


def _of_node(text: str, node: int) -> int:
    """How many tasks a node has, of `4(x2),3`: four on each of two, three on the last. Raises ValueError."""
    for part in text.split(","):
        count, _, times = part.partition("(x")
        node -= int(times.rstrip(")")) if times else 1
        if node < 0:
            return int(count)
    raise ValueError(text)


# -- processes of our own ---------------------------------------------------------------------------------


def split_processes(words: list[str]) -> tuple[list[str], str | None]:
    """Return the words of a command without `gpus=` or `processes=`, and which of them it had.

    Raises UserError where both are there, or one of them twice.
    """
    options = [word for word in words if word.startswith(("gpus=", "processes="))]
    if len(options) > 1:
        raise UserError(f"{options[0]} and {options[1]}: one of them is enough")
    return [word for word in words if word not in options], options[0] if options else None


def count_of(option: str, visible: Callable[[], int]) -> int:
    """Return how many processes `gpus=8`, `gpus=all` or `processes=2` means, of `visible()` GPUs.

    Raises UserError for what is no number, for more GPUs than there are, and for `gpus=all` without any.
    """
    key, _, text = option.partition("=")
    if key == "processes":
        if not text.isdigit() or not int(text):
            raise UserError(f"processes={text}: expected a whole number of processes on this machine")
        return int(text)
    if text != "all" and (not text.isdigit() or not int(text)):
        raise UserError(f"gpus={text}: expected the number of GPUs of this machine to use, or all")
    there = visible()
    if not there:
        raise UserError(f"gpus={text}: this machine shows no GPU; processes=2 device=cpu starts two on CPUs")
    if text != "all" and int(text) > there:
        raise UserError(f"gpus={text}: this machine shows {there}")
    return there if text == "all" else int(text)


def machines(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return how one task a machine of srun meets the others, as fields of torch's `LaunchConfig`.

    Alone, a free port of this machine. Raises UserError where a launcher has started several tasks a machine,
    or tasks that torchrun connects already.
    """
    if "RANK" in variables or "WORLD_SIZE" in variables:
        raise UserError(
            "gpus= starts processes itself: leave it out under torchrun (RANK or WORLD_SIZE is set)"
        )
    met = dict(variables)
    join_tasks(met)
    size = int(met.get("WORLD_SIZE", "1"))
    alone = {"min_nodes": 1, "max_nodes": 1, "rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0"}
    if size == 1:
        return alone
    if met["LOCAL_WORLD_SIZE"] != "1":
        raise UserError(
            f"gpus= starts processes itself, but {met['LOCAL_WORLD_SIZE']} tasks were started here: start "
            "one task a machine (srun --ntasks-per-node=1), or leave out gpus="
        )
    endpoint = f"{met['MASTER_ADDR']}:{met['MASTER_PORT']}"
    together = {"min_nodes": size, "max_nodes": size, "rdzv_backend": "static", "rdzv_endpoint": endpoint}
    return together | {"rdzv_configs": {"rank": int(met["RANK"]), "timeout": 900}}


def own_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _own_state_kept() -> Iterator[None]:
    """Let variables of the environment, and what signals do here, be afterwards as they were before."""
    variables = dict(os.environ)
    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(variables)


def start_processes(words: list[str], option: str, stopped: int | None = None) -> int:
    """Run a command in several processes of this machine by torch's elastic launcher; returns the exit code.

    Where one of them ends with an error, the others are ended as well, and its exit code is returned. What
    went wrong has been said by the process itself. `stopped` is the exit code of a run that a signal stopped
    before its end; None: what the environment says, or 0.
    """
    with _own_state_kept():
        return _start(words, option, stopped)


def _start(words: list[str], option: str, stopped: int | None) -> int:
    meeting = machines(os.environ)
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = count_of(option, torch.cuda.device_count)
    for name in ("agent.server.api", "multiprocessing.api"):  # our processes say themselves why they end
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        os.environ.pop(name, None)  # of the tasks outside, which have met by now
    if stopped is not None:
        os.environ[STOPPED] = str(stopped)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, own_cores() // count)))
    known = {field.name for field in fields(LaunchConfig)}  # those of earlier torch lack some
    patient = {"shutdown_timeout": SHUTDOWN_SECONDS, "signals_to_handle": ",".join(STOPPING)}
    meeting |= {name: value for name, value in patient.items() if name in known}
    config = LaunchConfig(nproc_per_node=count, max_restarts=0, run_id="foveola", **meeting)
    try:
        elastic_launch(config, sys.executable)("-m", "foveola.cli", *words)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = first.exitcode
        if code < 0:
            print(f"foveola: error: a process was ended by signal {-code}", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0
