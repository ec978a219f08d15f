"""Numbers to log of a whole step, whatever the parts and the processes in which it was taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, kind_of

# Names under which a run logs numbers of its own.
OWN_NUMBERS = (
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "seconds",
    "images_per_second",
    "data_wait",
    "bad_images",
)


@dataclass(frozen=True, eq=False)
class Averages:
    """A number that is made of means over the rows of a step, such as the entropy of their mean.

    `sums` are over the `rows` of one part of a step on one process; those of others are added, and `make`
    turns the means over all of them into the number. No rows make no number. Nothing here waits for a device.
    """

    sums: tuple[Tensor, ...]
    rows: int
    make: Callable[..., Tensor] = torch.clone

    def __add__(self, other: "Averages") -> "Averages":
        sums = tuple(mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True))
        return Averages(sums, self.rows + other.rows, self.make)

    def __float__(self) -> float:
        """Return the number of what was added up so far, on this process; NaN without rows."""
        return float(self.make(*(each / self.rows for each in self.sums))) if self.rows else float("nan")


def added(logs: Mapping[str, Averages], more: Mapping[str, Tensor | float | Averages]) -> dict[str, Averages]:
    """Return logs with those of one more part; a number is a mean, of as many rows as that of other parts.

    Raises UserError for what is no number, and for names that a run has numbers of its own for.
    """
    found = dict(logs)
    for name, value in more.items():
        if not isinstance(name, str) or not name or name in OWN_NUMBERS:
            raise UserError(
                f"a method logs a number as {name!r}: expected text, but none of {', '.join(OWN_NUMBERS)}, "
                "which are the run's own"
            )
        each = value if isinstance(value, Averages) else Averages((_number(name, value),), 1)
        found[name] = found[name] + each if name in found else each
    return found


def _number(name: str, value: Tensor | float) -> Tensor:
    """A number that is logged, as one that can be summed: true is 1."""
    if isinstance(value, bool | int | float):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.ndim or value.is_complex():
        shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
        raise UserError(
            f"what a method logs as {name!r} is {kind_of(value)}{shape}: expected a real number, a tensor "
            "without dimensions, or Averages"
        )
    value = value.detach()
    return value if value.is_floating_point() else value.double()


def root_of_variance(x: Float[Tensor, "rows *rest"]) -> Averages:
    """Return the root of the variance over all rows of a step, averaged over whatever a row is made of."""
    variance, mean = torch.var_mean(x.detach(), dim=0, correction=0)
    mean, rows = mean.double(), len(x)  # whose squares are subtracted from each other
    sums = (variance.mean() * rows, mean * rows, mean.square().mean() * rows)
    return Averages(sums, rows, _root)


def _root(within: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    return (within + square - mean.square().mean()).clamp(min=0).sqrt()


@torch.no_grad()
def of_all_processes(logs: Mapping[str, Averages], device: torch.device) -> dict[str, float]:
    """Return the numbers of all processes, each of which calls it; it waits for the device.

    What is logged is what the first process logs; others may lack some of it. Without rows on any process a
    number is left out.
    """
    shapes = {name: [tuple(total.shape) for total in each.sums] for name, each in logs.items()}
    shapes = distributed.broadcast_object(shapes)
    flat = []
    for name, wanted in shapes.items():
        own = logs.get(name, Averages(tuple(torch.zeros(shape) for shape in wanted), 0))
        sums = *own.sums, torch.tensor(float(own.rows))
        flat += [total.to(device, torch.float64).flatten() for total in sums]
    if not flat:
        return {}
    totals = distributed.all_reduce_sum(torch.cat(flat))
    parts = iter(totals.split([len(each) for each in flat]))
    found: dict[str, Tensor] = {}
    for name, wanted in shapes.items():
        sums, rows = [next(parts).view(shape) for shape in wanted], next(parts)[0]
        if name in logs:
            found[name] = torch.stack((logs[name].make(*(each / rows for each in sums)), rows))
    values = torch.stack([*found.values()]).tolist() if found else []
    return {name: value for name, (value, rows) in zip(found, values, strict=True) if rows}
