"""Starting weights: tensors that networks begin with, and the account of where each of them came from.

A method fills its networks from them (`Method.start_from`); where the tensors are from is for the zoo to say.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foveola.models.vit import VisionTransformer

SIDES = ("student", "teacher")


@dataclass(eq=False)
class Account:
    """What became of the tensors of a file, and where those of a run come from, by name."""

    taken: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)  # and what was done to them
    fresh: dict[str, str] = field(default_factory=dict)  # and why
    unused: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return what a user wants to know at once."""
        parts = [f"{len(self.taken)} tensors as they are"]
        parts += [f"{name} {how}" for name, how in self.changed.items()]
        if self.fresh:
            parts.append(f"fresh: {', '.join(self.fresh)}")
        if self.unused:
            parts.append(f"{len(self.unused)} tensors of the file unused")
        return "; ".join(parts)

    def lines(self) -> list[str]:
        """Return all of it: every tensor is named, those that differ by a number alone as one."""
        found = [f"taken as they are: {together(self.taken)}"] if self.taken else []
        found += [f"changed: {name} {how}" for name, how in self.changed.items()]
        found += [f"fresh: {name} ({why})" for name, why in self.fresh.items()]
        return found + ([f"not used: {together(self.unused)}"] if self.unused else [])


def together(names: Iterable[str]) -> str:
    """Return names in their order, with `*` for the numbers in which they differ, and how many each is."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


@dataclass(eq=False)
class StartingWeights:
    """Weights of an encoder for networks of one shape, and what else of training was beside them."""

    name: str  # as the user gave it: init=
    backbone: dict[str, Tensor]  # by the names of a VisionTransformer; a tensor that is not here stays fresh
    # Heads, predictors and decoders by their names in a method, behind "student." or "teacher.".
    parts: dict[str, Tensor] = field(default_factory=dict)
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what each is made of in the file
    account: Account = field(default_factory=Account)
    classes: tuple[str, ...] = ()  # of a head for a task among the parts

    def __post_init__(self) -> None:
        self.filled: set[int] = set()  # parameters of parts; what two of them share is filled once

    @torch.no_grad()
    def fill(self, network: VisionTransformer, name: str = "") -> None:
        """Put the weights into a network; `name` is its own in the method, for what it alone has.

        Raises ValueError for a network of another shape.
        """
        own = network.state_dict()
        for key, value in self.backbone.items():
            mine = own.get(key)
            if mine is not None and key == "reg_token":  # those that are added come last
                mine = mine[:, : value.shape[1]]
            if mine is None or mine.shape != value.shape:
                raise ValueError(f"the starting weights do not fit a network of the method: {key}")
            mine.copy_(value)
        for key in own.keys() - self.backbone.keys():
            found = self.parts.get(f"{name}.{key}")
            if found is not None and found.shape == own[key].shape:
                own[key].copy_(found)
                self.account.fresh.pop(key, None)
                self._use(f"{name}.{key}")

    @torch.no_grad()
    def move(
        self, part: str, student: nn.Module, teacher: nn.Module | None = None, called: Iterable[str] = ()
    ) -> bool:
        """Fill a part whole, or not at all; `called` are its names in files where that is not `part`.

        The teacher's gets its own where the file holds both, and otherwise the same. Returns whether there
        was one that fits.
        """
        why = "the file has none"
        for name in (part, *called):
            sides = {side: found for side in SIDES if (found := self._part(f"{side}.{name}."))}
            if not sides:
                continue
            side = next(iter(sides))
            if misfit := self._misfit(student, sides[side]):
                why = misfit
                continue
            self._put(student, f"{side}.{name}", sides[side])
            if teacher is not None:
                side = "teacher" if "teacher" in sides else side
                self._put(teacher, f"{side}.{name}", sides[side])
            return True
        self.account.fresh[part] = why
        return False

    def close(self) -> Account:
        """Name what of the parts was not used; returns the account."""
        there = {name: None for part in self.parts for name in self.named.get(part, (part,))}
        known = {*self.account.taken, *self.account.unused}
        self.account.unused = [name for name in self.account.unused if name not in self.account.taken]
        self.account.unused += [name for name in there if name not in known]
        return self.account

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value for name, value in self.parts.items() if name.startswith(prefix)
        }

    def _put(self, module: nn.Module, name: str, state: dict[str, Tensor]) -> None:
        for key, parameter in module.named_parameters(remove_duplicate=False):
            parameter.copy_(state[key])
            self.filled.add(id(parameter))
            self._use(f"{name}.{key}")

    def _use(self, part: str) -> None:
        for name in self.named.get(part, (part,)):
            if name not in self.account.taken:
                self.account.taken.append(name)

    def _misfit(self, module: nn.Module, state: dict[str, Tensor]) -> str:
        """Why a part cannot be filled with these tensors; nothing if it can."""
        own = dict(module.named_parameters(remove_duplicate=False))
        fixed = {name for name, _ in module.named_buffers()}  # tables that are computed
        if missing := sorted(own.keys() - state.keys()):
            return f"the file's lacks {missing[0]}"
        if unknown := sorted(state.keys() - own.keys() - fixed):
            return f"the file's has {unknown[0]} besides"
        for name, value in own.items():
            if value.shape != state[name].shape:
                return f"{name} is {tuple(value.shape)}, the file's {tuple(state[name].shape)}"
            if id(value) in self.filled and not torch.equal(value, state[name].to(value)):
                return f"{name} is shared with another part, whose is another in the file"
        return ""
