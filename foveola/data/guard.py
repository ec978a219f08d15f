"""What all readers of files share: libraries of extras, what these raise on damaged files, and sizes that are
too large.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from foveola.config import UserError
from foveola.data.sample import BadImage, DataError
from foveola.outside import library

MAX_PIXELS = 178_956_970  # PIL's limit, for all kinds: damaged headers ask for anything
MAX_BYTES = 2**31  # of the values that are decoded at once


def extra(module: str, name: str, what: str) -> Any:
    """Return the library that reads a kind of file. Raises DataError, which names the extra: where it is
    missing, no such file can be read at all.
    """
    try:
        return library(module, name, what)
    except UserError as error:
        raise DataError(str(error)) from error


def silence(logger: str) -> None:
    """Keep a library from logging what foveola reports itself, or what a user need not know."""
    found = logging.getLogger(logger)
    if found.level < logging.CRITICAL:  # to set a level again empties what all loggers have found out
        found.setLevel(logging.CRITICAL)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a library raises on a file (`what`: its kind) into BadImage of one line; DataError goes
    through.

    Warnings of libraries, which are about metadata, are left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except MemoryError as error:
        raise BadImage(f"a {what} that asks for more memory than there is") from error
    except OSError as error:
        if error.errno is not None and error.strerror:
            raise BadImage(error.strerror) from error
        raise BadImage(_line(what, error)) from error
    except Exception as error:  # the libraries promise nothing about damaged files
        raise BadImage(_line(what, error)) from error


def check_pixels(width: int, height: int, channels: int = 1, bytes_each: int = 1) -> None:
    """Raise BadImage for more pixels, or more bytes of values, than memory should be given for."""
    if min(width, height, channels) <= 0:
        raise BadImage(f"{width}x{height} pixels of {channels} channel(s)")
    if width * height > MAX_PIXELS or width * height * channels * bytes_each > MAX_BYTES:
        raise BadImage(
            f"{width}x{height} pixels of {channels} channel(s) are more than memory should be given for; "
            "tiles=512 in the data string cuts images into parts"
        )


def _line(what: str, error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    first = " ".join(line.strip() for line in lines) if first.endswith(":") else first
    return f"a damaged {what}: {first}"
