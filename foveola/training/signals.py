"""Stopping after a step: signals are noted when they come, and answered when it suits."""

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import torch

from foveola import distributed

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
IMPATIENT = (
    1.0  # seconds after which a second Ctrl-C counts; torchrun passes on the one that workers got, too
)


class Stop:
    """A context in which signals that end a process are only noted; a second Ctrl-C ends it at once.

    They are SIGINT, SIGTERM, SIGHUP (a closed terminal), SIGUSR1 and SIGUSR2 (of batch systems). A signal
    that is ignored when it begins, as SIGHUP under nohup, stays so. In a thread other than the main one,
    where signals never come, it does nothing.
    """

    def __init__(self) -> None:
        self.requested, self._last = False, 0.0
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            self._previous = {
                number: signal.signal(number, self._note)
                for number in numbers
                if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self) -> bool:
        """Return whether any process got a signal to stop: the same on all, which stop after one step."""
        return bool(distributed.all_reduce_max(torch.tensor(float(self.requested))))

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            return  # a worker that has just been forked: it is told by this process
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._last > IMPATIENT:
            raise KeyboardInterrupt
        if not self.requested and distributed.is_main():
            # Not print, which the signal may have interrupted.
            with suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping after this step (Ctrl-C again: at once, without a checkpoint)\n")
        self.requested, self._last = True, now
