"""Recipes as files: those that come with the package, one's own, and what each is based on."""

from copy import deepcopy
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from foveola.config import ConfigError, nearest, path_hint, read_yaml, renewed
from foveola.files import RunFolder


@cache
def shipped() -> list[str]:
    """Return the names of the recipes that come with the package."""
    files = (resources.files("foveola") / "recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


@cache
def _tree_of(name: str) -> dict[str, Any]:
    """The file of a shipped recipe, read once: each is the base of others."""
    with resources.as_file(resources.files("foveola") / "recipes" / f"{name}.yaml") as path:
        return renewed(read_yaml(path))


def layers_of(recipe: str, above: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return the tree of a recipe, by name or path, after that of its `base:` if it names one, over which
    it is laid.

    Raises ConfigError for a recipe that is not there, and for bases in a circle.
    """
    if recipe in above:
        raise ConfigError(f"{above[0]}: its base leads back to {recipe}")
    if recipe.endswith((".yaml", ".yml")):
        tree, name = renewed(read_yaml(recipe)), Path(recipe).stem
    elif recipe in shipped():
        tree, name = deepcopy(_tree_of(recipe)), recipe
    else:
        raise ConfigError(_unknown_recipe(recipe))
    base = tree.pop("base", None)
    tree = {"recipe": name} | tree
    if base is None:
        return [tree]
    if str(base).endswith((".yaml", ".yml")):  # beside the file that names it
        base = Path(recipe).parent / str(base)
    return [*layers_of(str(base), (*above, recipe)), tree]


def _unknown_recipe(recipe: str) -> str:
    if RunFolder(Path(recipe)).is_run():
        return (
            f"{recipe} is a run folder; to go on with it: foveola pretrain {recipe}/config.yaml out={recipe}"
        )
    near = nearest(recipe, shipped())
    if near is None and (path := path_hint(recipe)):
        return f"unknown recipe {recipe!r}{path}"
    hint = f"did you mean {near!r}?" if near else "`foveola recipes` lists them; a path must end in .yaml"
    return f"unknown recipe {recipe!r}; {hint}"
