"""Batches read ahead by processes (or a thread) that may hang, die, or find no shared memory.

What is asked for is a pure function of its step, so whatever happens to a reader, another one goes on at the
same step with the same batches.
"""

import errno
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from foveola.data.sample import DataError

SHARED = Path("/dev/shm")  # where Linux keeps what processes hand over to each other
POLL_SECONDS = 1.0  # a signal waits so long for its answer
HUNG_SECONDS = 60.0  # after so long it is said that nothing comes
JOIN_SECONDS = (
    1.0  # for the last read: torch may abort where a thread of it is left at exit; a hung one is left
)
RESTARTS = 3  # of the readers, at one step


class OutOfSharedMemory(Exception):  # noqa: N818 (what happened to one batch)
    """A worker has no room to hand its batch over."""


class Died(Exception):  # noqa: N818 (what happened to the readers)
    """A worker has ended before its work was done."""


@dataclass(frozen=True)
class Asker:
    """Who waits for batches: where to say what happens, and whether to go on waiting."""

    say: Callable[[str], None] = lambda _: None
    stop: Callable[[], bool] = lambda: False


def room(needed: int, workers: int, prefetch: int) -> tuple[int, int]:
    """Return how many workers may prepare how many batches each, of `needed` bytes, in the shared memory
    there is.

    `(workers, prefetch)` where all fit; less of both otherwise, down to (0, prefetch): read without workers.
    The processes that torchrun started on this machine share what there is.
    """
    if not workers or not SHARED.is_dir():
        return workers, prefetch
    free = shutil.disk_usage(SHARED).free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fitting = int(0.9 * free // needed) - 2  # besides the one in use and the one on its way
    if fitting >= workers * prefetch:
        return workers, prefetch
    return (min(workers, max(fitting, 0)), max(fitting // workers, 1)) if fitting > 0 else (0, prefetch)


def check_room(needed: int) -> None:
    """Raise OutOfSharedMemory where a batch of `needed` bytes cannot be handed over: torch would lose it."""
    if SHARED.is_dir() and shutil.disk_usage(SHARED).free < needed:
        raise OutOfSharedMemory


def read_ahead(
    items: Dataset, start: int, make: Callable[[int, bool], DataLoader | None], asker: Asker
) -> Generator[Any]:
    """Yield `items[start]`, `items[start + 1]`, ... for ever; ends when the asker says stop while it waits.

    `make(step, careful)` gives a DataLoader that counts from that step; None: a thread of this process reads.
    Workers that die are replaced by `careful` ones, which read one batch ahead: what a dead one had read is
    lost. DataError when they die again and again at one step. Errors of reading are raised.
    """
    step, deaths, alone, careful = start, 0, False, False
    while True:
        loader = None if alone else make(step, careful)
        reader = _Thread(items, step) if loader is None else _Processes(loader)
        try:
            while True:
                item = _waited(reader, asker)
                if item is _STOP:
                    return
                if isinstance(item, OutOfSharedMemory):
                    raise item
                yield item
                step, deaths = step + 1, 0
        except OutOfSharedMemory:
            alone = True
            asker.say(
                f"{SHARED} is full, through which workers hand over their batches: reading goes on without "
                "workers (docker run --shm-size=8g gives more)"
            )
        except Died as error:
            deaths, careful = deaths + 1, True
            if deaths > RESTARTS:
                raise DataError(
                    f"{error}, {deaths} times at step {step + 1}: perhaps for lack of memory (use fewer "
                    "loader.workers), or because of one image; loader.workers=0 shows which"
                ) from None
            asker.say(f"{error} while reading: workers begin anew at the same step, one batch ahead")
        finally:
            reader.close()


_STOP, _NOTHING = object(), object()


def _waited(reader: "_Processes | _Thread", asker: Asker) -> Any:
    began, warned = time.monotonic(), False
    while (item := reader.next(POLL_SECONDS)) is _NOTHING:
        if asker.stop():
            reader.give_up()
            return _STOP
        if not warned and time.monotonic() - began > HUNG_SECONDS:
            warned = True
            asker.say(
                f"no batch for {HUNG_SECONDS:.0f} s: the disk or network that images are read from does not "
                "answer; waiting on (a signal ends the run with a checkpoint)"
            )
    return item


class _Processes:
    """A DataLoader's workers, asked with a time limit."""

    def __init__(self, loader: DataLoader) -> None:
        child = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        self.batches: Any = iter(loader)
        if child is not None and threading.current_thread() is threading.main_thread():
            # When a worker dies, torch raises from a signal handler, in the middle of a step: we look.
            signal.signal(signal.SIGCHLD, child)

    def next(self, _: float) -> Any:
        try:
            return next(self.batches)
        except RuntimeError as error:
            if "DataLoader timed out" in str(error):
                return _NOTHING
            if "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
                raise Died(self._obituary()) from None
            raise
        except (OSError, EOFError) as error:  # in taking over what a worker holds: its own are values
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise Died(self._obituary()) from None

    def give_up(self) -> None:
        """End workers that may hang: to wait for each in turn would take longer than a signal leaves."""
        for worker in self.batches._workers:
            worker.terminate()

    def close(self) -> None:
        self.batches = None  # ends the workers now

    def _obituary(self) -> str:
        time.sleep(0.1)  # until it can be asked how it ended
        codes = [worker.exitcode for worker in self.batches._workers if worker.exitcode]
        by = (
            signal.strsignal(-codes[0])
            if codes and codes[0] < 0
            else f"exit code {codes[0] if codes else '?'}"
        )
        return f"a worker process ended ({by})"


class _Thread:
    """Reads one item after the other in a thread, so that signals are answered while it is blocked."""

    def __init__(self, items: Any, start: int) -> None:
        self.items, self.step = items, start
        self.asked, self.answers = queue.SimpleQueue(), queue.SimpleQueue()
        self.busy = False
        self.thread = threading.Thread(target=self._work, daemon=True, name="foveola-reader")
        self.thread.start()

    def next(self, seconds: float) -> Any:
        if not self.busy:
            self.asked.put(self.step)
            self.busy = True
        try:
            item = self.answers.get(timeout=seconds)
        except queue.Empty:
            return _NOTHING
        self.step, self.busy = self.step + 1, False
        if isinstance(item, _Raised):
            raise item.error
        return item

    def give_up(self) -> None:
        pass

    def close(self) -> None:
        self.asked.put(None)
        self.thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        while (step := self.asked.get()) is not None:
            try:
                answer = self.items[step]
            except Exception as error:
                answer = _Raised(error)
            self.answers.put(answer)


@dataclass(frozen=True)
class _Raised:
    error: Exception


def begin_worker(_: int) -> None:
    """Give a worker one thread, and let it ignore the signals at which the training process saves and leaves.

    Ctrl-C and a batch system's SIGTERM reach all processes of a group; a worker that died of it would take
    the last batches with it. Of SIGTERM, only the training process's own counts: it is how leftover workers
    end.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # A spawned worker would tear down the interpreter while a thread hands over a batch; torch then aborts.
    Finalize(None, os._exit, (0,), exitpriority=-100)
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":  # elsewhere a signal does not tell who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """Leave at the parent's SIGTERM; or without it, soon after it was killed, even while a read hangs."""
    while sys.platform == "linux" and parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
