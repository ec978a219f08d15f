"""What a step of a configuration costs, by arithmetic: operations and memory of an image."""

from dataclasses import dataclass

from foveola.methods.capi import CapiConfig
from foveola.methods.distillation import DistillationConfig
from foveola.methods.ijepa import IJepaConfig
from foveola.methods.mae import MaeConfig
from foveola.models.heads import HeadConfig
from foveola.models.vit import ViTConfig
from foveola.training.auto.facts import Machine
from foveola.training.recipe import RunConfig
from foveola.views.batch import ViewsConfig

LEARNING, TEACHING = 3.0, 1.0  # times the work of a forward pass: with that of backward, or without
WIDE = 192  # channels from which on products take most of the time; half as many reach half of the speed
NUMBERS_HELD = (
    36.0  # numbers of the token width that a block keeps of each token for backward, MLP of ratio 4
)
BF16_ON_CPU = 0.8  # of the time of a step in float32: 0.63 to 0.88 were measured with 192 channels and more

MANY_PATCHES = 1024  # of a view, from which on attention takes a fifth of the work of a ViT-B and more
WINDOW = 14  # patches a side, as in ViTDet


@dataclass(frozen=True)
class Cost:
    """What one image of a step costs: operations, and bytes that are held until its backward pass is done."""

    flops: float
    activations: float


def cost_of(config: RunConfig) -> Cost:
    """Return what one image costs. Counted: products of matrices of networks and heads, nothing else."""
    model, views = config.model, config.views
    patches = (views.global_size // model.patch_size) ** 2
    extra = int(model.class_token) + model.registers
    large = views.global_count * (patches + extra)
    numbers = 2.0 if config.precision in ("bf16", "fp16") else 4.0
    width, depth, _ = model.shape
    method = config.method
    if isinstance(method, DistillationConfig):
        side = views.local_size // model.patch_size
        small = views.local_count * (side**2 + extra)
        student = _vit(model, patches + extra) * views.global_count
        taught = student + (_vit(model, side**2 + extra) * views.local_count if small else 0.0)
        heads = _heads(method, config, patches)
        flops = LEARNING * taught + TEACHING * student + (LEARNING + TEACHING) * heads
        tokens = large + small
    elif isinstance(method, CapiConfig | IJepaConfig):
        kept, predicted = _selected(views, patches)
        learned = _vit(model, kept + extra) + _predictor(method, model, kept + extra, predicted)
        flops = views.global_count * (LEARNING * learned + TEACHING * _vit(model, patches + extra))
        tokens = views.global_count * (kept + extra + predicted)
    elif isinstance(method, MaeConfig):
        kept, predicted = _selected(views, patches)
        learned = _vit(model, kept + extra) + _predictor(method, model, kept + extra, predicted)
        flops = LEARNING * views.global_count * learned
        tokens = views.global_count * (kept + extra + predicted)
    else:  # a method from outside: as if its network learned from all views
        flops, tokens = LEARNING * _vit(model, patches + extra) * views.global_count, large
    return Cost(flops, tokens * width * depth * NUMBERS_HELD * numbers)


def seconds_of(config: RunConfig, flops: float) -> float:
    """Return about how many seconds an image takes, where a wide network reaches `flops` a second."""
    return cost_of(config).flops / (flops * min(1, config.model.shape[0] / WIDE))


def seconds_on(config: RunConfig, machine: Machine) -> float:
    """Return about how many seconds an image takes on all processes together."""
    seconds = seconds_of(config, machine.flops * machine.processes)
    # The speed of a GPU is that of the precision it is faster in, the speed of a CPU that of float32.
    halves = machine.bf16 and config.precision == "bf16" and config.model.shape[0] >= WIDE
    return seconds * (BF16_ON_CPU if machine.device == "cpu" and halves else 1.0)


def weights_of(config: RunConfig) -> float:
    """Return about how many bytes weights, gradients and averages of the optimizer take."""
    numbers = config.model.parameters
    if isinstance(config.method, DistillationConfig):
        width = config.model.shape[0]
        numbers += sum(_head_size(config.method.heads[name], width) for name in config.method.used_heads())
    alone = isinstance(config.method, MaeConfig) or config.method.annotations is not None
    teacher = 0.0 if alone else 1.0
    return numbers * 4 * (4 + teacher)


def memory_of(config: RunConfig, images: float) -> float:
    """Return about how many bytes a step needs that takes so many images at once."""
    held = cost_of(config).activations
    if config.checkpoint_activations:  # what enters each block, and all that one of them keeps
        held *= 1 / NUMBERS_HELD + 1 / config.model.shape[1]
    return weights_of(config) + images * held


def too_large(config: RunConfig, images: float, room: float, where: str) -> str:
    """Return what to say of a step of so many images at once that needs more than `room` bytes, and what
    helps; "" where it needs less.

    Heads of tasks are not counted. Windows are named where a view has many patches and all read all.
    """
    if (needed := memory_of(config, images)) <= room:
        return ""
    model, views = config.model, config.views
    patches = (views.global_size // model.patch_size) ** 2
    whole = views.dropping is None and views.blocks is None and not model.relative_bias
    ways = []
    if not config.checkpoint_activations:
        ways.append("checkpoint_activations=true (a third more work)")
    if patches >= MANY_PATCHES and model.window is None and whole:
        ways.append(
            f"model.window={WINDOW} (of {patches:,} patches most blocks read {WINDOW**2}: less work, and "
            "less memory where attention is not fused)"
        )
    if images > 1:
        ways.append("a larger accumulate")
    ways.append("a smaller views.global_size or model.size")
    return (
        f"a step of {images:g} images at once needs about {needed / 2**30:.0f} GiB by arithmetic, and "
        f"{where} has {room / 2**30:.0f}: {', '.join(ways)}"
    )


def _vit(model: ViTConfig, tokens: float) -> float:
    width, depth, _ = model.shape
    return _blocks(width, depth, tokens, model.mlp_ratio) + 2 * tokens * 3 * model.patch_size**2 * width


def _blocks(width: int, depth: int, tokens: float, ratio: float = 4.0) -> float:
    return depth * (2 * tokens * (4 + 2 * ratio) * width**2 + 4 * tokens**2 * width)


def _selected(views: ViewsConfig, patches: int) -> tuple[float, float]:
    """Patches that a student gets and that it predicts, of one view."""
    if views.dropping is not None:
        return views.dropping.counts(patches)
    return 0.6 * patches, 0.6 * patches  # blocks of I-JEPA, whose number each batch draws


def _predictor(
    method: CapiConfig | MaeConfig | IJepaConfig, model: ViTConfig, kept: float, predicted: float
) -> float:
    config = method.decoder if isinstance(method, MaeConfig) else method.predictor
    if config is None:
        return 0.0
    width, depth, _ = config.network(model).shape
    return _blocks(width, depth, kept + predicted)


def _heads(method: DistillationConfig, config: RunConfig, patches: int) -> float:
    """Return what heads cost for one image: its tokens, and the patches that are hidden on average."""
    views, width = config.views, config.model.shape[0]
    rows = dict.fromkeys(method.used_heads(), 0.0)
    for name, term in method.terms().items():
        masks = views.masking
        hidden = 0.0 if masks is None else masks.probability * sum(masks.ratio) / 2 * patches
        count = float(views.global_count + views.local_count)
        if name in ("patch", "position"):
            count = views.global_count * hidden
        for head in method.known[name].heads(term):
            rows[head] += count
    return sum(2 * count * _head_size(method.heads[name], width) for name, count in rows.items())


def _head_size(head: HeadConfig, width: int) -> float:
    inner = max(head.layers - 2, 0) * head.hidden**2
    return width * head.hidden + inner + head.hidden * head.bottleneck + head.bottleneck * head.prototypes
