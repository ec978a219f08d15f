"""The terms of a distillation loss, by the key that switches each on: `method.token`, `method.patch`, ...

This is the only list of them: configuration, losses, logs, figures and advice follow from it, in its order.
Terms from outside are named by a recipe: `method.KEY.name=my_module:MyTerm`, or `method.KEY` alone for one
that an installed package announces.
"""

from dataclasses import make_dataclass
from functools import cache
from typing import Any, NamedTuple

from foveola.config import UserError, key
from foveola.methods.terms.gram import GramTerm
from foveola.methods.terms.patch import PatchTerm
from foveola.methods.terms.position import PositionTerm
from foveola.methods.terms.preservation import PreservationTerm
from foveola.methods.terms.spread import SpreadTerm
from foveola.methods.terms.term import Term
from foveola.methods.terms.token import ImageTerm, TokenTerm
from foveola.outside import Door, check_class

TERMS: dict[str, type[Term]] = {
    "token": TokenTerm,
    "image": ImageTerm,
    "patch": PatchTerm,
    "position": PositionTerm,
    "spread": SpreadTerm,
    "gram": GramTerm,
    "preservation": PreservationTerm,
}
DOOR = Door("term", "foveola.terms", TERMS, "my_module:MyTerm")


class Named(NamedTuple):
    """A term from outside: its key in a recipe, its class, and the class of its configuration."""

    key: str
    term: type[Term]
    config: type


def named(trees: dict[str, Any]) -> tuple[Named, ...]:
    """Return the terms from outside among the groups of a recipe that are no keys of distillation, by key.

    One has a `name` among its keys, or its key is announced by a package. Raises UserError for a name that
    nothing has, and for what is no term.
    """
    found = []
    for each, tree in trees.items():
        name = tree.get("name") if isinstance(tree, dict) else None
        if name is None and each not in DOOR.others():
            continue  # an unknown key, which is for the configuration to refuse
        try:
            term = DOOR.find(each if name is None else str(name))
            check_class(term, Term, str(name or each), "term")
        except UserError as error:
            raise UserError(f"{each}: {error}") from error
        found.append(Named(each, term, term.Config if name is None else _with_name(term.Config)))
    return tuple(found)


@cache
def _with_name(config: type) -> type:
    """The keys of a term, and the name by which a recipe finds it."""
    name = ("name", str, key("", "which term this is"))
    return make_dataclass(config.__name__, [name], bases=(config,), frozen=True)
