"""What every command of `cli` shares: words of a command line, aligned columns, and an end by a signal."""

import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveola.config import KeyInfo, UserError, nearest
from foveola.model_names import is_there

DATA_STRING = re.compile(r"[a-z][a-z0-9-]+:")
_HOME = re.compile(r"(^|[=,:])~(?=/|$)")  # shells put the folder in its place in some of these words alone
_KEY = re.compile(r"[\w.-]+")
WIDEST = 36  # characters of a column after the first; a longer cell pushes the rest of its row


def split(arguments: list[str], flags: tuple[str, ...]) -> tuple[list[str], list[str], set[str]]:
    """Return words without and with `=`, and the flags given; empty words are left out, and ~ is a folder.

    A path that exists, such as runs/lr=0.1 or lr=0.1/run, is a name; ./lr=0.1 can be told from a key, too.
    """
    home = str(Path.home())
    arguments = [_HOME.sub(lambda found: found[1] + home, word) for word in arguments if word]
    given = {"--help" if word == "-h" else word for word in arguments if word.startswith("-")}
    for flag in sorted(given - {"--help", *flags}):
        if "=" in flag:
            raise UserError(f"keys take no dashes: write {flag.lstrip('-')}")
        near = nearest(flag, ("--help", *flags))
        raise UserError(f"unknown option {flag!r}; " + (f"did you mean {near!r}?" if near else "see --help"))
    words = [word for word in arguments if not word.startswith("-")]
    names = [word for word in words if _is_name(word)]
    return names, [word for word in words if not _is_name(word)], given


def _is_name(word: str) -> bool:
    key, equals, _ = word.partition("=")
    # No key holds a question mark: what follows it are options of a model or of data.
    return not equals or "?" in key or (("/" in word or not _KEY.fullmatch(key)) and is_there(word))


def only(names: list[str], what: str, usage: str) -> str:
    """Return the one word without `=`. Raises UserError for none, and for more, with the key that is likely
    meant.
    """
    if not names:
        raise UserError(f"which {what}? usage: {usage}")
    if len(names) > 1:
        raise unplaced(names[1], usage)
    return names[0]


def unplaced(word: str, usage: str) -> UserError:
    """Return the error for a word that has no place, with the key that is likely meant."""
    there = is_there(word.partition("?")[0])
    key = "model" if there else "data" if DATA_STRING.match(word) else None
    hint = "" if key is None else f": perhaps {key}={word}"
    return UserError(f"expected key=value, got {word!r}{hint}; usage: {usage}")


def named_by_key(
    names: list[str], overrides: list[str], key: str, usage: str, several: bool = False
) -> tuple[list[str], list[str]]:
    """Return names, and overrides without `key=`, whose value is a name where no word without `=` says it.

    With `several`, it holds names with commas. Raises UserError where both say it.
    """
    values = [word.partition("=")[2] for word in overrides if word.partition("=")[0] == key]
    if not values:
        return names, overrides
    if names:
        raise UserError(f"{names[0]!r} and {key}={values[-1]} say the same: give one; usage: {usage}")
    text = values[-1]
    if several and not is_there(text):
        found = [part.strip(" \"'") for part in text.strip("[]").split(",")]
    else:
        found = [text]
    return [each for each in found if each], [w for w in overrides if w.partition("=")[0] != key]


def placed(names: list[str], overrides: list[str], keys: Sequence[str], usage: str) -> list[str]:
    """Return overrides with words without `=` as values of these keys, in their order.

    Raises UserError for more of them, and for a key that is given, too.
    """
    given = {word.partition("=")[0] for word in overrides}
    for word, key in zip(names, keys, strict=False):
        if key in given:
            raise UserError(f"{word!r} would be {key}=, which is given, too; usage: {usage}")
    if len(names) > len(keys):
        raise unplaced(names[len(keys)], usage)
    return [*overrides, *(f"{key}={word}" for word, key in zip(names, keys, strict=False))]


def print_keys(keys: list[KeyInfo]) -> None:
    rows = [(info.path, cell_text(info.value), info.type, info.help) for info in keys]
    print_table([("key", "value", "type", "meaning"), *rows])


def cell_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(cell_text, value)) + "]" if isinstance(value, list) else str(value)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print aligned columns; the last one wraps within a terminal. In a file or a pipe one row is one
    line.
    """
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    widths = [first, *(min(width, WIDEST) for width in others)]
    indent = sum(widths) + 2 * len(widths)
    room = shutil.get_terminal_size().columns - indent if sys.stdout.isatty() else sys.maxsize
    for *cells, last in rows:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        lines = textwrap.wrap(last, max(room, 30)) or [""]
        print((start + ("\n" + " " * indent).join(lines)).rstrip())


def refuse(reason: str) -> int:
    """Print in one line why a command ends, and return its exit code; of several processes one prints it."""
    line = f"foveola: error: {' '.join(reason.split())}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from foveola.distributed import is_first_to_say  # torch, for which a mistake need not wait

        if not is_first_to_say(line):
            return 2
    print(line, file=sys.stderr)
    return 2


class Ended(BaseException):
    """A signal that ends the process: on the way out files are closed, and temporary folders removed."""


@contextmanager
def as_command() -> Iterator[None]:
    """Let signals end what runs within, and say warnings of this package in one line."""
    with ended_by_signals(), warnings_in_one_line():
        yield


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print warnings of this package in one line, as its errors are; others stay as Python has them."""
    with warnings.catch_warnings():
        plain = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
            if Path(filename).is_relative_to(Path(__file__).parent):
                sys.stderr.write(f"foveola: {message}\n")
            else:
                plain(message, category, filename, *where)

        warnings.showwarning = show
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind a command as Ctrl-C does. Training handles them itself: it saves."""

    def end(number: int, _: object) -> None:
        raise Ended(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
