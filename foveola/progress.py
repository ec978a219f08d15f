"""How far a long loop is: a bar on a terminal, and a line every minute elsewhere."""

import sys
from collections.abc import Iterator
from time import monotonic
from typing import Any

from foveola import distributed

SAY_SECONDS = 60.0  # between two lines of progress where there is no terminal


def show(items: Any, total: int, label: str, progress: bool) -> Iterator[Any]:
    """Iterate with a progress bar on standard error; without a terminal, with a line there every minute."""
    if not progress or not distributed.is_main():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, label, total, console=console, transient=True)
        return
    began = said = monotonic()
    for done, item in enumerate(items):
        if monotonic() - said >= SAY_SECONDS:
            said = monotonic()
            print(f"{label}: {done} of {total} in {(said - began) / 60:.0f} min", file=sys.stderr, flush=True)
        yield item
