"""A configuration to networks, optimiser and trainer, from its seed."""

import dataclasses
import math
import os
from typing import Any

import torch

from foveola import distributed
from foveola.config import ConfigError
from foveola.methods import find_method
from foveola.methods.method import Method, learns
from foveola.models.encoder import Encoder
from foveola.models.lora import add_adapters, merged
from foveola.models.starting import StartingWeights
from foveola.schedules import Progress
from foveola.training.freezing import Freezing, keep_last_blocks
from foveola.training.loop import Trainer
from foveola.training.optimizer import Optimizer
from foveola.training.recipe import RunConfig
from foveola.training.sharding import (
    can_be_filled,
    fill,
    is_sharded,
    part_count,
    shard,
    whole_copy,
    whole_tensors,
)
from foveola.views.batch import Streams


def local_batch_size(config: RunConfig) -> int:
    """Return images that a process takes at once: its part of the batch, in `accumulate` parts."""
    world = distributed.world_size()
    part, rest = divmod(config.batch_size, world * config.accumulate)
    if rest:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by "
            f"{world} process{'es' * (world > 1)} x accumulate={config.accumulate}"
        )
    return part


def assemble(
    config: RunConfig, progress: Progress, device: torch.device, start: StartingWeights | None = None
) -> Trainer:
    """Return networks, optimiser and views of a run, from its seed, and from `start` where it is given."""
    frame = _frame(config)
    _check_memory(frame, config, device)
    sharded = is_sharded(config.parallel)
    filled = sharded and can_be_filled(frame)  # else every process builds all of it, and keeps its part
    method = frame if filled else _built(config, start)
    for network in method.trained():
        network.checkpoint_activations = config.checkpoint_activations
        if config.compile and not sharded:
            network.compile()
        for block in network.blocks if config.compile and sharded else ():
            block.compile()  # a graph cannot reach over the gathering of weights
    if sharded:
        shard(method, config.parallel, config.sharding, device)
    if filled:
        fill(method, device, lambda: _built(config, start))
    method.to(device).train()
    try:
        method.check_batch(local_batch_size(config), config.loader.objects_per_image)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    optimizer = Optimizer(method, config.optimizer, progress)
    freezing = Freezing(method, config.freeze, progress)
    freezing.apply(progress)
    return Trainer(
        method,
        freezing,
        optimizer,
        config.views,
        config.precision,
        config.accumulate,
        config.seed,
        device,
        sharded,
    )


def untrained(config: RunConfig) -> Encoder:
    """Return the encoder that a run begins with: same shape, same seed, no step taken."""
    method = _method(config)
    return Encoder(config.encoder(), method.backbone, method.predictor)


def encoder_of(config: RunConfig, method: Method, step: int) -> Encoder:
    """Return a copy of what a method has learned in so many steps, as it is kept.

    Where weights are cut over processes, all of them call it, and each has the whole.
    """
    encoder = Encoder(dataclasses.replace(config.encoder(), step=step))
    encoder.backbone.load_state_dict(merged(whole_tensors(method.backbone.state_dict())))
    if encoder.predictor is not None and method.predictor is not None:
        encoder.predictor.load_state_dict(whole_tensors(method.predictor.state_dict()))
    if method.task_head is not None:
        encoder.head = whole_copy(method.task_head).requires_grad_(False).eval()
    return encoder


def student_names(method: Method) -> dict[str, str]:
    """Return how the names of the student's tensors begin in a method: `RUN?which=student` reads them."""
    parts = {"backbone": method.student_backbone, "predictor": method.student_predictor}
    return {
        part: f"{name}."
        for part, network in parts.items()
        for name, each in method.named_modules()
        if each is network
    }


def blueprint(config: RunConfig) -> Method:
    """Return the networks of a method as it is built, all of which learn that it trains, without memory."""
    with torch.device("meta"):
        return _build(config)


def _frame(config: RunConfig) -> Method:
    """The networks of a run, with what is to learn of them, on no device."""
    method = blueprint(config)
    with torch.device("meta"):
        _restrict(method, config)
    return method


def _built(config: RunConfig, start: StartingWeights | None) -> Method:
    method = _method(config)
    if start is not None:
        method.start_from(start)
    _restrict(method, config)
    return method


def _check_memory(method: Method, config: RunConfig, device: torch.device) -> None:
    """Raise ConfigError for networks that cannot fit, before anything is allocated for them."""
    # A weight that trains has a gradient and two averages of AdamW beside it, or one of SGD.
    copies = 4 if config.optimizer.kind == "adamw" else 3
    numbers = sum(p.numel() * (copies if p.requires_grad else 1) for p in method.parameters())
    parts = part_count(config.parallel, config.sharding)
    needed = 4 * (numbers / parts + sum(b.numel() for b in method.buffers()))
    if needed > (room := room_of(device)):
        raise ConfigError(
            f"weights, gradients and averages of the networks need {needed / 2**30:,.0f} GiB, and {device} "
            f"has {room / 2**30:,.1f}: make them smaller (model.size, prototypes, hidden widths)"
        )


def room_of(device: torch.device) -> float:
    """Return bytes of memory of a device, of a CPU those of the machine; infinity where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _method(config: RunConfig) -> Method:
    torch.manual_seed(config.seed)
    return _build(config)


def _build(config: RunConfig) -> Method:
    make: Any = find_method(config.method.name)
    return make(config.method, config.model, config.views)


def _restrict(method: Method, config: RunConfig) -> None:
    """Once the starting weights are there: note them, and let only what is to learn of the encoder learn."""
    method.begin()
    if config.train_blocks is not None:
        keep_last_blocks(method, config.train_blocks)
    if config.lora is not None:
        drawn = Streams(config.seed, 0)("lora")
        for network in [each for each in method.trained() if learns(each)]:
            add_adapters(network, config.lora, drawn)
