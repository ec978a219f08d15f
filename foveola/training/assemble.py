"""A configuration to networks, optimiser and trainer, from its seed."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from foveola import distributed
from foveola.config import ConfigError
from foveola.methods import METHODS
from foveola.methods.method import Method
from foveola.models.encoder import Encoder
from foveola.models.vit import VisionTransformer
from foveola.schedules import Progress
from foveola.training.loop import Trainer
from foveola.training.optimizer import Optimizer
from foveola.training.recipe import RunConfig


def share(config: RunConfig) -> int:
    """Pictures that a process takes at once: its share of the batch, in `accumulate` parts."""
    world = distributed.world_size()
    part, rest = divmod(config.batch_size, world * config.accumulate)
    if rest:
        raise ConfigError(
            f"batch_size={config.batch_size} cannot be shared by "
            f"{world} process{'es' * (world > 1)} x accumulate={config.accumulate}"
        )
    return part


def assemble(config: RunConfig, progress: Progress, device: torch.device) -> Trainer:
    """Networks, optimiser and views of a run, from its seed."""
    method = _method(config).to(device).train()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for network in method.trained():
        assert isinstance(network, VisionTransformer)
        network.checkpoint_activations = config.checkpoint_activations
        if config.compile:
            network.compile()
    wrapped: nn.Module = method
    if distributed.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        # Buffers are statistics, which methods reduce themselves. The option was renamed in torch 2.15.
        options = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        sync: dict[str, Any] = {name: False}
        wrapped = DistributedDataParallel(method, device_ids=ids, **sync)
    optimizer = Optimizer(method, config.optimizer, progress)
    return Trainer(
        method, wrapped, optimizer, config.views, config.precision, config.accumulate, config.seed, device
    )


def untrained(config: RunConfig) -> Encoder:
    """The encoder that a run begins with: same shape, same seed, no step taken."""
    method = _method(config)
    return Encoder(config.encoder(), method.backbone, method.predictor)


def _method(config: RunConfig) -> Method:
    torch.manual_seed(config.seed)
    return METHODS[config.method.name](config.method, config.model, config.views)
