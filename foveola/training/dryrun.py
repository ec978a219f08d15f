"""`--dry-run`: build everything, take two steps, and say what the run will be and cost."""

import dataclasses
import resource
import sys
import time

import torch

from foveola import distributed
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.methods.distillation import Distillation
from foveola.models.vit import VisionTransformer
from foveola.schedules import Progress, steps_of
from foveola.training.recipe import RunConfig
from foveola.training.run import assemble

CPU_BATCH = 8  # pictures of a trial step on a CPU: enough to see the speed, few enough to wait for


def dry_run(config: RunConfig) -> str:
    """Build the run, take two steps on its data (or on `scenes:`), and describe it; nothing is written.

    Speed and memory are measured on the second step, on this machine, with the batch that the report names.
    """
    device = distributed.start(config.device)
    try:
        return _describe(config, device)
    finally:
        distributed.stop()


def _describe(config: RunConfig, device: torch.device) -> str:
    data = config.data or "scenes:"
    source = open_source(data)
    share = max(config.batch_size // (config.accumulate * distributed.world_size()), 1)
    batch = min(share, len(source), CPU_BATCH if device.type == "cpu" else share)
    steps_per_epoch = max(len(source) // config.batch_size, 1)
    units = {"steps_per_epoch": steps_per_epoch, "batch_size": config.batch_size}
    total = steps_of(config.duration, total_steps=None, **units)
    progress = Progress(0, total, steps_per_epoch, config.batch_size)
    trainer = assemble(dataclasses.replace(config, accumulate=1), progress, device)
    settings = dataclasses.replace(config.loader, workers=0)
    loader = Loader(source, batch, config.seed, settings, with_objects=config.views.objects is not None, device=device)
    batches = iter(loader)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, values = 0.0, {}
    for step in range(2):
        _wait(device)
        start = time.perf_counter()
        values = trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
        _wait(device)
        seconds = time.perf_counter() - start

    views, patch = config.views, config.model.patch_size
    globals_ = views.global_count * ((views.global_size // patch) ** 2 + 1 + config.model.registers)
    locals_ = views.local_count * ((views.local_size // patch) ** 2 + 1 + config.model.registers)
    losses = ", ".join(f"{name.removeprefix('loss/')} {float(v):.3f}" for name, v in values.items() if "loss/" in name)
    rows = {
        "recipe": f"{config.recipe} ({config.about.method or config.method.name})",
        "data": f"{data}: {len(source):,} pictures" + ("" if config.data else " (no data= given: built-in pictures)"),
        "parameters": _parameters(trainer.method),
        "tokens per picture": f"student {globals_ + locals_:,}, teacher {globals_:,}",
        "batch": f"{config.batch_size} over {distributed.world_size()} process(es) x {config.accumulate} part(s)",
        "steps": f"{total:,} ({steps_per_epoch:,} an epoch, {total / steps_per_epoch:.4g} epochs)",
        "learning rate": f"{config.optimizer.peak(config.batch_size):.4g} after {config.optimizer.lr.warmup}",
        "trial": f"two steps of {batch} pictures on {device} in {config.precision}; losses {losses}",
        "speed": f"{batch / seconds:.3g} pictures/s, so about {_duration(total * config.batch_size * seconds / batch)}"
        + " in all on one such device",
        "memory": _memory(device),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _parameters(method: torch.nn.Module) -> str:
    assert isinstance(method, Distillation)
    backbone: VisionTransformer = method.student.backbone
    count = sum(p.numel() for p in backbone.parameters())
    heads = sum(p.numel() for p in method.student.heads.parameters())
    return f"encoder {count:,}, heads {heads:,}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at most on {device}"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB at most in this process"


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 96 * 3600 else f"{seconds / 86400:.0f} days"
