"""What a run says while it trains: metrics.jsonl, log.txt, tensorboard, and a progress bar or plain lines."""

import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

import foveola
from foveola import distributed, files

SHOWN = ("epoch", "loss", "lr")  # besides each loss, on the line of a training step
LINE_SECONDS = 10.0  # at least this long between plain lines where there is no terminal


class Log:
    """The log of one run folder, from `start_step` (steps already done) to `total_steps`.

    Opening it drops what an interrupted run wrote after `start_step`, so a resumed log has every step once.
    Only the main process writes; on the others every call does nothing. Use it as a context, or `close` it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        start_step: int,
        batch_size: int,
        terminal: bool | None = None,
    ) -> None:
        """`batch_size` is the global one; `terminal` says whether to draw a progress bar (None: find out)."""
        self.kept: list[dict] = []  # the lines of the run so far, where it goes on
        self._folder = folder
        self._active, self._bar = distributed.is_main(), None
        if not self._active:
            return
        self._total, self._batch_size = total_steps, batch_size
        folder.mkdir(parents=True, exist_ok=True)
        run = files.RunFolder(folder)
        self._path = run.metrics
        self._figures = run.figures
        kept, odd = _truncate(self._path, start_step)
        self.kept = kept
        self._lines = self._path.open("a", encoding="utf-8")
        self._board = _open_board(run.tensorboard, start_step)
        self._seconds_before = max((line.get("seconds") or 0.0 for line in kept), default=0.0)
        self._started = self._last_time = time.perf_counter()
        self._last_step, self._last_line = start_step, -math.inf
        self._speed = 0.0
        terminal = sys.stderr.isatty() if terminal is None else terminal
        self._bar, self._task = _open_bar(total_steps, start_step) if terminal else (None, None)
        if odd:
            self.note(
                f"{self._path}: {len(odd)} lines that hold no metrics are left out, "
                f"the first of them line {odd[0]}"
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(self, step: int, metrics: dict[str, float], shown: Collection[str] = SHOWN) -> None:
        """Write the metrics after `step` steps. A value that is not finite becomes null in metrics.jsonl.

        Adds `seconds`: time spent on this run so far, the parts before interruptions included. May be called
        again for the same step, for example with the metrics of an evaluation. Losses and what is `shown`
        are printed, too.
        """
        if not self._active:
            return
        now = time.perf_counter()
        line: dict[str, Any] = {"step": step}
        line |= {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        line.setdefault("seconds", round(self._seconds_before + now - self._started, 3))
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if step > self._last_step:
            self._speed = (step - self._last_step) / max(now - self._last_time, 1e-9)
            self._last_step, self._last_time = step, now
        self._show(step, metrics, shown, now)

    def figure(
        self,
        step: int,
        name: str,
        array: UInt8[np.ndarray, "H W 3"],
        keep: int = 2,
        keep_every: int | None = None,
    ) -> None:
        """Put a figure into tensorboard, and into the run folder as `figures/<name>-<step>.png`.

        As with checkpoints, the newest `keep` files of a name stay, and those of each `keep_every` steps.
        """
        if not self._active:
            return
        from PIL import Image

        self._board.add_image(name, array, step, dataformats="HWC")
        with files.whole(self._figures / f"{name}-{step:08d}.png") as part:
            Image.fromarray(array).save(part, "PNG")
        numbered = re.compile(re.escape(name) + r"-(\d{8,})\.png", re.ASCII)
        found = [
            (int(match[1]), path)
            for path in self._figures.iterdir()
            if (match := numbered.fullmatch(path.name))
        ]
        for at, path in sorted(found)[:-keep]:
            if keep_every is None or at % keep_every:
                path.unlink(missing_ok=True)

    def note(self, text: str, *, show: bool = True) -> None:
        """Say something once: with its time in log.txt and, if `show`, on the terminal."""
        if not self._active:
            return
        self._write(text)
        if show:
            self._print(text)

    def warn(self, text: str) -> None:
        """Say something as `note` does, from whatever process it concerns: one that reads another's disk,
        say.
        """
        if distributed.world_size() > 1:
            text = f"process {distributed.rank()}: {text}"
        self._write(text)
        self._print(text)

    def failure(self, text: str) -> None:
        """Write why the run ends into log.txt, from whatever process. Never an error: the disk may be why."""
        if distributed.world_size() > 1:
            text = f"process {distributed.rank()}: {text}"
        with suppress(OSError):
            self._write(text)

    def flush(self) -> None:
        """Bring what tensorboard holds back to the disk: with each checkpoint, so that a kill loses none."""
        if self._active:
            self._board.flush()

    def _write(self, text: str) -> None:
        with files.RunFolder(self._folder).log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._active:
            self._active = False
            self._lines.close()
            self._board.close()
            if self._bar is not None:
                with suppress(OSError):  # the terminal may be closed
                    self._bar.stop()

    def _show(self, step: int, metrics: dict[str, float], shown: Collection[str], now: float) -> None:
        rate = metrics.get("images_per_second", self._speed * self._batch_size)
        waiting = f"{metrics['data_wait']:.0%} waiting for data" if "data_wait" in metrics else ""
        if self._bar is not None:
            loss = f"loss {metrics['loss']:.4g}" if "loss" in metrics else ""
            says = "  ".join(filter(None, [loss, f"{rate:.4g} images/s", waiting]))
            # An evaluation's metrics, without a loss, leave the bar's words as they are.
            words = {"says": says} if loss or not metrics else {}
            self._bar.update(self._task, completed=step, **words)
            return
        if now - self._last_line < LINE_SECONDS and step < self._total:
            return
        self._last_line = now
        numbers = [
            f"{name} {value:.4g}"
            for name, value in metrics.items()
            if name in shown or name.startswith("loss/")
        ]
        parts = [f"step {step}/{self._total}", *numbers]
        if step:  # the start is measured before there is a speed
            eta = _duration((self._total - step) / self._speed) if self._speed else "?"
            parts += [f"{rate:.4g} images/s", waiting, f"{eta} left"]
        self._print("  ".join(filter(None, parts)))

    def _print(self, text: str) -> None:
        with suppress(OSError):  # the terminal may be closed
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)


def surroundings(device: torch.device) -> str:
    """Return what a run is made with, on one line: versions, processes and their device, machine."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    world = distributed.world_size()
    return (
        f"foveola {foveola.__version__}, torch {torch.__version__}, python {platform.python_version()}; "
        f"{world} process{'es' * (world > 1)} on {device.type}, {kind}; "
        f"{platform.system()} {platform.machine()}"
    )


def _truncate(path: Path, step: int) -> tuple[list[dict], list[int]]:
    """Keep the whole lines of `path` up to `step`, atomically; returns them, and the numbers of odd ones.

    The last line may be torn by an interruption, which is nothing to tell of.
    """
    if not path.exists():
        return [], []
    before = path.read_text(encoding="utf-8", errors="replace")
    texts, kept, odd = before.splitlines(), [], []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not all(value is None or isinstance(value, int | float) for value in line.values()):
                raise ValueError
            if line["step"] <= step:
                kept.append(line)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            odd += [number] if number < len(texts) else []
    whole = "".join(json.dumps(line) + "\n" for line in kept)
    if whole != before:
        files.write_text(path, whole)
    return kept, odd


def _open_board(folder: Path, start_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step makes tensorboard forget what the interrupted run wrote from this step on
    return SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=20)


def _open_bar(total: int, start: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[says]}"),
        console=Console(stderr=True),
        speed_estimate_period=300,
    )
    task = bar.add_task("", total=total, completed=start, says="")
    bar.start()
    return bar, task


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
