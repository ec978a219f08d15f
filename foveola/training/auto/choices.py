"""The decisions of a plan, one function each: a value and the reason in a sentence."""

import math
from typing import Any, NamedTuple

from foveola.config import ConfigError
from foveola.health import SHORT
from foveola.training.auto.cost import WIDE
from foveola.training.auto.facts import DataFacts, Machine

MODELS = {  # of a plan that trains from nothing: shape, and the images seen from which on it is worth it
    "micro": ({"width": 96, "depth": 4, "heads": 3}, 0),
    "tiny": ({"size": "tiny"}, 300_000),
    "small": ({"size": "small"}, 3_000_000),
    "base": ({"size": "base"}, 50_000_000),
}
FEWEST = {"micro": 0, "tiny": 0, "small": 10_000, "base": 200_000}  # images that fill so many weights
EPOCHS = {"scratch": 800, "adapt": 100}  # passes beyond which the same images teach little that is new
VIEW_SIZES = {32: 4, 64: 8, 96: 8, 128: 16, 224: 16}  # pixels of a view, and of a patch, from nothing
FEWEST_PATCHES = 7  # a side of a view for starting weights, which saw 16 and more
PLANNED_METHODS = ("distillation", "capi", "mae")
VERY_FEW, FEW = 500, 20_000  # images
WORKERS = 8  # of a process; more seldom help


class Decision(NamedTuple):
    """What was decided, and why."""

    value: Any
    reason: str


def choose_method(data: DataFacts, token: bool | None, method: str | None = None) -> Decision:
    """Return the family of recipes: odis, ibot, dinov2, capi, mae.

    Args:
        token: whether the starting weights have a class token; None where training starts from nothing.
        method: `method.name`, where the user gave it.

    Raises ConfigError for a method that no plan is made for.
    """
    if method is not None and method not in PLANNED_METHODS:
        known = ", ".join(PLANNED_METHODS)
        raise ConfigError(f"method.name={method}: auto plans {known}; name a recipe for others")
    if method in ("capi", "mae"):
        return Decision(method, "as you said")
    if method and token is False:
        return Decision("dinov2", "as you said; the class token is fresh")
    if token is False:
        return Decision("capi", "the starting weights have no class token, which distillation needs")
    if data.objects:
        return Decision("odis", f"{data.objects:.1f} objects are annotated in an image: views follow them")
    if data.label_maps and not method:
        return Decision("capi", "labels are label maps: features of patches count, which CAPI is about")
    if token:
        return Decision("dinov2", "no objects are annotated: image and patches, as the weights were trained")
    return Decision("ibot", "no objects are annotated: image and masked patches")


def choose_precision(machine: Machine, width: int = WIDE) -> Decision:
    """Return the precision of a network with so many channels, which matter to a CPU alone."""
    if not machine.bf16:
        return Decision("fp32", machine.name)
    if machine.device == "cpu" and width < WIDE:
        return Decision("fp32", f"with {width} channels a CPU gains little by bf16, or loses")
    return Decision("bf16", f"{machine.name} computes faster in it")


def choose_view(data: DataFacts, machine: Machine, patch: int | None) -> Decision:
    """Return (pixels of a view, pixels of a patch); `patch` is that of the starting weights, if any."""
    largest = 224 if machine.device == "cuda" else 112 if patch is not None else 64
    why = f"images have {data.side} pixels a side"
    if machine.device == "cpu" and data.side > largest:
        why += "; more are slow on a CPU"
    if patch is not None:
        grid = max(min(data.side, largest) // patch, FEWEST_PATCHES)
        if grid * patch > data.side:
            why += f"; starting weights want at least {grid} patches a side, so they are enlarged"
        return Decision((grid * patch, patch), why)
    side = max([side for side in VIEW_SIZES if side <= min(data.side, largest)] or [min(VIEW_SIZES)])
    return Decision((side, VIEW_SIZES[side]), why)


def choose_batch(data: DataFacts, machine: Machine, method: str) -> Decision:
    """Return images of a step, before memory is looked at."""
    cheap = method in ("capi", "mae")  # whose encoder reads a part of the patches
    wanted = {"cuda": 512 if cheap else 256, "cpu": 128 if cheap else 64}[machine.device]
    wanted = min(wanted * (machine.processes if machine.device == "cuda" else 1), 2048)
    bound = 2 ** int(math.log2(max(data.images / 4, 1)))
    batch = max(min(wanted, bound), machine.processes, 2)
    batch -= batch % machine.processes
    if batch < wanted:
        return Decision(batch, f"{data.images:,} images: at least four steps in a pass over them")
    return Decision(batch, "targets are shared out within a batch; more gains little for such data")


def choose_parts(batch: int, processes: int, image: float, weights: float, memory: float) -> Decision:
    """Return `accumulate`: parts in which a process computes its images, so that they fit into its memory.

    Args:
        image: bytes that an image needs until its backward pass is done.
        weights: bytes of weights, gradients and averages.
        memory: bytes of the device, of which 70 % are planned with.
    """
    room, local = 0.7 * memory - weights, batch // processes
    fitting = (parts for parts in range(1, local + 1) if local % parts == 0 and local / parts * image <= room)
    parts, there = next(fitting, local), memory / 2**30
    if parts == 1:
        needed = (weights + local * image) / 2**30
        return Decision(1, f"about {needed:.1f} GiB of {there:.0f} GiB are needed")
    return Decision(parts, f"{local} images at once need {local * image / 2**30:.0f} GiB of {there:.0f}")


def choose_prototypes(rows: int, images: int) -> Decision:
    """Return prototypes for Sinkhorn-Knopp among `rows`: no more than these, and fewer than images."""
    count = 2 ** int(math.log2(max(min(rows, images // 2, 8192), 2)))
    return Decision(count, f"Sinkhorn-Knopp shares out {rows:,} rows at once, of {images:,} images")


def choose_momentum(steps: int) -> Decision:
    """Return the first momentum of the teacher: it looks back over a thirtieth of the run."""
    value = round(min(max(1 - 30 / max(steps, 1), 0.9), 0.996), 4)
    return Decision(value, f"the teacher follows within about {1 / (1 - value):.0f} of {steps:,} steps")


def choose_rate(width: int, batch: int) -> Decision:
    """Return the learning rate of AdamW from nothing: falling with width, rising with the batch's root."""
    value = min(2e-3 * (96 / width) ** 0.75 * math.sqrt(batch / 64), 4e-3)
    return Decision(float(f"{value:.2g}"), f"for {width} channels and batches of {batch}")


def choose_workers(machine: Machine) -> Decision:
    """Return processes that decode images."""
    return Decision(min(max(machine.cores - 1, 1), WORKERS), f"{machine.cores} cores for each process")


def choose_length(
    seconds: float | None, step_seconds: float, data: DataFacts, batch: int, adapting: bool
) -> Decision:
    """Return steps that fit the budget, no more than there is to learn from so many images."""
    epoch = max(data.images // batch, 1)
    epochs = EPOCHS["adapt" if adapting else "scratch"]
    epochs = max(round(epochs * min(1, 100_000 / data.images)), 20)
    limit = max(epochs * epoch, 200)
    passes = f"{limit / epoch:,.0f} passes over {data.images:,} images"
    if seconds is None:
        return Decision(limit, f"{passes}; longer runs add little")
    fitting = max(int(0.9 * seconds / step_seconds), 1)
    if fitting < limit:
        return Decision(fitting, f"fits the budget: {fitting / epoch:.3g} passes over {data.images:,} images")
    return Decision(limit, f"{passes} are enough; the budget allows more")


def often(steps: int, times: int, least: float) -> int:
    """Return steps between what is done `times` in a run, no fewer than `least`, if the run has so many."""
    return max(steps // times, min(round(least), steps), 1)


def expectation(data: DataFacts, adapting: bool, seen: int) -> str:
    """Return in one sentence what a plan can be hoped to give."""
    many = f"{data.images:,} images"
    if data.images < VERY_FEW:
        if adapting:
            return (
                f"{many} are very few: little or nothing beyond the starting weights; use these as they are "
                "unless the measurements show a gain"
            )
        return (
            f"{many} are far too few to train from nothing: features hardly better than those of an "
            "untrained network; start from public weights (init=), or use these as they are"
        )
    if adapting:
        return f"{many}: some points where they differ from photos of the web, else little; measure it"
    if data.images < FEW:
        return (
            f"{many} from nothing: better than an untrained network, worse than public weights on all that "
            "is like photos; for these write init=NAME, for example init=hf:facebook/dinov2-small"
        )
    if seen < 1_000_000:
        return f"{seen:,} images seen in all: a beginning; a larger budget helps most"
    return f"{many} from nothing: worth it where public weights know little of such images; compare them"


def choose_local(side: int, patch: int) -> int:
    """Return pixels of a local view: 3/7 of a large one, as in DINO, in whole patches, and at least two."""
    return max(round(side * 3 / 7 / patch), 2) * patch


def too_short(steps: int, step_seconds: float) -> str:
    """Return a warning about a budget that is too short; "" where it is long enough."""
    if steps >= SHORT:
        return ""
    return (
        f"{steps:,} steps are few: below {SHORT} a run shows that it works, hardly more; try "
        f"budget='{duration_text(1.2 * SHORT * step_seconds)}'"
    )


def duration_text(seconds: float) -> str:
    """Return seconds in the unit that people would say."""
    for name, unit in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} seconds"
