"""Ways of pretraining, by name: each a module that turns a batch into named losses.

Nothing here calls backward, opens a file or knows another process.
"""

from typing import Any

from foveola.config import UserError
from foveola.methods.capi import Capi
from foveola.methods.distillation import Distillation
from foveola.methods.ijepa import IJepa
from foveola.methods.mae import Mae
from foveola.methods.method import Method, MethodConfig
from foveola.outside import Door, check_class

# Tasks by importable names: they are methods, too, but stand above this room.
METHODS: dict[str, type[Method] | str] = {
    "distillation": Distillation,
    "capi": Capi,
    "mae": Mae,
    "ijepa": IJepa,
    "classification": "foveola.tasks.classification:Classification",
    "segmentation": "foveola.tasks.segmentation:Segmentation",
    "detection": "foveola.tasks.detection:Detection",
}
DOOR = Door("method", "foveola.methods", METHODS, "my_module:MyMethod")


def find_method(name: str) -> type[Method]:
    """Return a method by its name, or by an importable name (`my_package.my_module:MyMethod`).

    Names are those of `METHODS`, then those that packages announce in the group `foveola.methods`. Raises
    UserError for a name that nothing has, and for what is no method.
    """
    found = DOOR.find(name)
    check_class(found, Method, name, "method")
    if not issubclass(found.Config, MethodConfig):
        raise UserError(f"{name}: {found.Config.__name__} needs the base foveola.MethodConfig")
    return found


def config_class(tree: dict[str, Any]) -> type[MethodConfig]:
    """Return the class of the configuration of the method that a tree names, with the keys that it asks
    for.
    """
    return find_method(str(tree.get("name"))).Config.of(tree)
