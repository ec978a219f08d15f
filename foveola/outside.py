"""What comes from outside: objects by their importable names, and those that installed packages announce."""

import importlib
import re
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from foveola.config import UserError, nearest

NAME = re.compile(r"(?P<module>[A-Za-z_]\w*(\.\w+)*):(?P<path>[A-Za-z_]\w*(\.\w+)*)")


def is_importable(text: str) -> bool:
    """Whether the text has the form of an importable name: `my_package.my_module:MyClass`."""
    return NAME.fullmatch(text) is not None


def imported(text: str) -> Any:
    """The object with this importable name.

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
    """What installed packages announce in an entry point group, by name; the value is an importable name."""
    return {entry.name: entry for entry in entry_points(group=group)}
