"""The terms of a distillation loss, by the key that switches each on: `method.token`, `method.patch`, ...

This is the only list of them: configuration, losses, logs, figures and advice follow from it, in its order.
"""

from foveola.methods.terms.patch import PatchTerm
from foveola.methods.terms.position import PositionTerm
from foveola.methods.terms.spread import SpreadTerm
from foveola.methods.terms.term import Term
from foveola.methods.terms.token import ImageTerm, TokenTerm

TERMS: dict[str, type[Term]] = {
    "token": TokenTerm,
    "image": ImageTerm,
    "patch": PatchTerm,
    "position": PositionTerm,
    "spread": SpreadTerm,
}
