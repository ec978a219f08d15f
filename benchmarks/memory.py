"""How much memory something takes: in a process of its own, so that nothing else counts."""

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def peak_mib() -> float:
    """Most memory that this process held, NaN where Linux does not tell.

    Not `ru_maxrss`, which a child inherits from its parent.
    """
    if not STATUS.exists():
        return math.nan
    line = next(s for s in STATUS.read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, of a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
