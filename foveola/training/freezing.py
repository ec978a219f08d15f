"""Which parts of a method rest: for a while at first, or for the whole run."""

from torch import nn

from foveola.config import ConfigError, nearest
from foveola.methods.method import Method, learns
from foveola.schedules import Progress

ALL = "all"  # as a duration: the whole run


class Freezing:
    """Parts that rest until a step. All rests begin with the run, so what learns only grows.

    A parameter that rests needs no gradient: none is computed or kept, and the optimizer leaves it as it is.
    """

    def __init__(self, method: Method, phases: dict[str, str], progress: Progress) -> None:
        self.until = {part: phase_steps(duration, progress) for part, duration in phases.items()}
        self.total = progress.total_steps
        self.resting: dict[nn.Parameter, int] = {}  # and the first step in which each learns
        for part, steps in self.until.items():
            for network in networks_named(method, part, "freeze"):
                for p in network.parameters():
                    if p.requires_grad:
                        self.resting[p] = max(self.resting.get(p, 0), steps)
        if self.resting and all(self.resting.get(p) for p in method.parameters() if p.requires_grad):
            parts = ", ".join(self.until)
            raise ConfigError(
                f"freeze: nothing would learn in the first steps, as {parts} is all there is; "
                f"let one of {', '.join(method.networks())} learn"
            )

    def apply(self, progress: Progress) -> bool:
        """Let rest what rests in this step, and learn what learns; return whether that is a change."""
        changed = False
        for p, first in self.resting.items():
            changed |= p.requires_grad != (progress.step >= first)
            p.requires_grad_(progress.step >= first)
        return changed

    def ends(self, p: nn.Parameter) -> bool:
        """Return whether a parameter learns at any time of the run."""
        return self.resting.get(p, 0) < self.total

    def describe(self) -> list[str]:
        """Return what rests, and for how long, one phrase for each part."""
        return [
            part if steps >= self.total else f"{part} for {steps:,} step{'s' * (steps != 1)}"
            for part, steps in self.until.items()
            if steps
        ]


def phase_steps(duration: str, progress: Progress) -> int:
    """Return the steps of a phase that begins with the run: a duration, or "all"."""
    return progress.steps_of("100 %" if duration.strip() == ALL else duration)


def networks_named(method: Method, part: str, where: str) -> list[nn.Module]:
    """Return the networks that a key means by a part of a method.

    Parts have their names in `Method.networks`; "heads" is all of "heads.main", "heads.patch". "encoder" (or
    "backbone") is what sees images and learns, whatever a method calls it. What runs of an earlier version
    call a part is a submodule of its name. Raises ConfigError, which begins with `where`, for any other.
    """
    networks = method.networks()
    for name in (part, "encoder") if part == "backbone" else (part,):
        if found := [network for each, network in networks.items() if f"{each}.".startswith(f"{name}.")]:
            return found
    if part in ("encoder", "backbone") and (seeing := [each for each in method.trained() if learns(each)]):
        return [*seeing]
    former = dict(method.named_children()).get(part)
    if former is not None and learns(former):
        return [former]
    near = nearest(part, [*networks, "encoder"])
    hint = f" (did you mean {near!r}?)" if near else ""
    raise ConfigError(f"{where}: this method has no {part!r}, but {', '.join(networks)}{hint}")


def keep_last_blocks(method: Method, count: int) -> None:
    """Let the last `count` blocks of the encoder and its final norm learn, and nothing else of it.

    Everything that stands before them rests, tokens, positions and patch embedding too, so that no gradient
    goes through it. Raises ConfigError where the encoder does not have more blocks than that.
    """
    for network in [each for each in method.trained() if learns(each)]:
        blocks = len(network.blocks)
        if count >= blocks:
            raise ConfigError(
                f"train_blocks={count}: the encoder has {blocks} blocks; fewer of them, or null for all of it"
            )
        free = {id(p) for part in (*network.blocks[-count:], network.norm) for p in part.parameters()}
        for p in network.parameters():
            p.requires_grad_(p.requires_grad and id(p) in free)
