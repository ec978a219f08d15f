"""Commands, a file each, by its name: it parses words, calls the Python API and prints what that returns.

A file has `USAGE`, its lines in `foveola --help`, and `main(arguments)`; importing it costs nothing. Logic
that the Python API lacks does not live here.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def names() -> list[str]:
    """Return the commands that have a file here."""
    return [info.name for info in iter_modules(__path__)]


def command(name: str) -> ModuleType:
    """Return the file of a command that has one."""
    return import_module(f"{__name__}.{name}")
