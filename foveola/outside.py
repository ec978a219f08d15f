"""What comes from outside: objects by their importable names, and those that installed packages announce."""

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from foveola.config import UserError, nearest

NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(\.\w+)*):(?P<path>[A-Za-z_]\w*(\.\w+)*)")


def is_importable(text: str) -> bool:
    """Return whether the text has the form of an importable name: `my_package.my_module:MyClass`."""
    return NAME.fullmatch(text) is not None


def imported(text: str) -> Any:
    """Return the object with this importable name.

    Raises UserError where the module cannot be imported, or has no such object.
    """
    match = NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{text!r} is no importable name, such as my_package.my_module:MyClass")
    module, path = match["module"], match["path"]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = "; PYTHONPATH=. finds modules in this folder" if module.startswith(f"{error.name}") else ""
        raise UserError(f"{text}: there is no module {error.name!r}{where}") from error
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"{text}: {module} fails when imported: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            near = nearest(name, [each for each in vars(found) if not each.startswith("_")])
            hint = f"; did you mean {near!r}?" if near else ""
            raise UserError(f"{text}: {module} has no {name!r}{hint}")
        found = getattr(found, name)
    return found


def announced(group: str) -> dict[str, EntryPoint]:
    """Return what installed packages announce in an entry point group, by name; the value is an importable
    name.
    """
    return {entry.name: entry for entry in entry_points(group=group)}


def name_of(found: type) -> str:
    """Return the importable name of a class. Raises UserError for one that no name leads to, such as a local
    one.
    """
    name = f"{found.__module__}:{found.__qualname__}"
    here: Any = sys.modules.get(found.__module__)
    for part in found.__qualname__.split("."):
        here = getattr(here, part, None)
    if here is not found:
        raise UserError(
            f"{name} cannot be imported, which going on with a run needs: define it at the top of a module"
        )
    return name


@dataclass(frozen=True)
class Door:
    """Where things of one sort are found by name: foveola's own, then importable ones, then announced ones.

    Attributes:
        what: one of these things in a word, for messages.
        group: the entry point group in which installed packages announce theirs.
        own: foveola's own, by name; a text is an importable name.
        example: an importable name, for messages.
    """

    what: str
    group: str
    own: Mapping[str, Any]
    example: str

    def find(self, name: str) -> Any:
        """Return what has this name. Raises UserError where nothing has it, or where it cannot be
        imported.
        """
        if name in self.own:
            found = self.own[name]
            return imported(found) if isinstance(found, str) else found
        if is_importable(name):
            return imported(name)
        others = announced(self.group)
        if name in others:
            return imported(others[name].value)
        near = nearest(name, [*self.own, *others])
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join([*self.own, *others])}"
        raise UserError(f"unknown {self.what} {name!r}; {hint} (one of your own: {self.example})")

    def names(self) -> list[str]:
        """Return all names without a colon that lead to something."""
        return list(dict.fromkeys([*self.own, *announced(self.group)]))

    def others(self) -> list[str]:
        """Return names that installed packages announce."""
        return [name for name in self.names() if name not in self.own]


def check_class(found: Any, base: type, name: str, what: str) -> None:
    """Raise UserError unless this is a whole subclass of `base` with a frozen dataclass as its `Config`."""
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{name} is no {what}: a class with the base foveola.{base.__name__} is needed")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(f"{name}: a {what} needs {', '.join(missing)}")
    config = getattr(found, "Config", None)
    if not (isinstance(config, type) and is_dataclass(config) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise UserError(f"{name}: a {what} needs a frozen dataclass as Config")
    if vars(config).get("__annotations__") and "__dataclass_fields__" not in vars(config):
        raise UserError(f"{name}: {config.__name__} needs @dataclass(frozen=True)")


def library(module: str, extra: str, what: str) -> Any:
    """Return an optional library. Raises UserError, which says what needs it and which extra has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.split('.')[0]} ({error}); pip install 'foveola[{extra}]'"
        ) from error
