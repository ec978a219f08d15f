"""`--dry-run`: build everything, take two steps, and say what the run will be and cost."""

import dataclasses
import resource
import sys
import time

import numpy as np
import torch

from foveola import distributed
from foveola.config import UserError
from foveola.data.decode import decode
from foveola.data.identity import saying
from foveola.data.loader import Loader
from foveola.data.sample import BadImage
from foveola.data.sources import PixelSource, Source, open_source, read_label_map, why_bad
from foveola.data.stored import first_look
from foveola.data.values import ImagePixels
from foveola.failures import explain
from foveola.proposals.discover import discoverer
from foveola.schedules import Progress
from foveola.training.advice import advice, objects_line
from foveola.training.assemble import assemble, blueprint, local_batch_size, room_of, untrained
from foveola.training.auto.cost import too_large
from foveola.training.bootstrap import data_of, round_config
from foveola.training.durations import plan
from foveola.training.loop import Trainer
from foveola.training.pixels import with_channels, with_pixels
from foveola.training.recipe import BootstrapConfig, RunConfig
from foveola.training.start import Start
from foveola.training.supply import with_data
from foveola.views.blocks import draw_blocks
from foveola.zoo.load import load

LOOKED_AT = 200  # images that are read to find unreadable ones, spread evenly over the data
LOOK_SECONDS = 5.0  # after which no further one is read
NAMED = 5  # unreadable images that are named
CPU_BATCH = 8  # images of a trial step on a CPU: enough to see the speed, few enough to wait for


def dry_run(config: RunConfig) -> str:
    """Build the run, take two steps on its data (or on `scenes:`), and describe it; nothing is written.

    Speed and memory are measured on the second step, on this machine, with the batch that the report names;
    with several processes they are those of one of them.
    """
    with distributed.joined(config.device) as device, saying(distributed.is_main()):
        if isinstance(config, BootstrapConfig):
            return _describe_rounds(config, device)
        return _describe(config, device)


def _describe_rounds(config: BootstrapConfig, device: torch.device) -> str:
    """Each kind of round: what its training is and costs, and how long its objects take to find."""
    source = open_source(data_of(config))
    parts = []
    if config.init is None:
        parts.append("round 0, without objects\n" + _describe(round_config(config, 0, None, None), device))
    training = round_config(config, 1, None, config.init)
    encoder = untrained(with_pixels(training, source)) if config.init is None else load(config.init)
    finder = discoverer(encoder, config.discover, device)
    source = finder.sees(source)
    chosen = np.linspace(0, len(source) - 1, min(finder.batch_size, len(source))).round().astype(int)
    images = [pixels for index in chosen.tolist() if (pixels := _pixels(source, index)) is not None]
    seconds = 0.0
    for _ in range(2 * bool(images)):  # the first one warms up
        start = time.perf_counter()
        finder.propose(images)
        _wait(device)
        seconds = time.perf_counter() - start
    took = _duration(seconds * len(source) / max(len(images), 1))
    objects = f"found by {config.discover.method} in about {took} (reading images not counted)"
    which = "round 1" if config.rounds == 1 else f"rounds 1 to {config.rounds}, each"
    return "\n\n".join([*parts, f"{which}\n{_describe(training, device, objects)}"])


def _pixels(source: Source, index: int) -> ImagePixels | None:
    try:
        return decode(source[index].image)
    except (BadImage, OSError):
        return None


def _describe(config: RunConfig, device: torch.device, objects: str | None = None) -> str:
    source = open_source(config.data or "scenes:")
    start = Start(config.init, with_channels(config, source).model, channels=config.init_channels)
    start.insist()
    config = with_data(config, source)
    # Without data the length of an epoch is not known, nor whether schedules fit into the run.
    images = len(source) if config.data else 100 * config.batch_size
    progress = plan(config, images, distributed.world_size())
    part = local_batch_size(config)
    batch = min(part, len(source), CPU_BATCH if device.type == "cpu" else part)
    trainer = assemble(config, progress, device, start.weights)
    trainer.accumulate = 1
    large = too_large(config, part, room_of(device), str(device))
    try:
        losses, seconds, memory = _try(config, trainer, source, batch, progress, device)
    except (MemoryError, RuntimeError) as error:
        if not large or (reason := explain(error)) is None:
            raise
        raise UserError(f"{reason}; {large}") from error
    rows = {
        "recipe": f"{config.recipe} ({config.about.method or config.method.name})",
        "data": f"{source.name}: {len(source):,} images"
        + ("" if config.data else " (built in, as there is no data=)"),
        **({"objects": objects or objects_line(source)} if config.data and config.views.objects else {}),
        **({"readable": try_images(source, config.method.annotations)} if config.data else {}),
        **({} if start.weights is None else {"starting weights": start.weights.name}),
        "parameters": _parameters(trainer),
        **({"resting": resting} if (resting := "; ".join(_resting(config, trainer))) else {}),
        "tokens per image": _tokens(config, part),
        "batch": f"{config.batch_size} images: {distributed.world_size()} process(es) x "
        f"{config.accumulate} part(s) x {part}",
        "steps": _steps(config, progress),
        "learning rate": f"{config.optimizer.peak(config.batch_size):.4g} after {config.optimizer.lr.warmup}",
        "trial": f"two steps of {batch} images on {device} in {config.precision}; losses {losses}",
        "speed": _speed(config, progress, batch / seconds),
        "memory": memory,
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    if start.weights is not None:
        lines += [f"{'start':<{width}}  {text}" for text in start.weights.close().lines()]
    lines += [f"{'note':<{width}}  {text}" for text in first_look(source)]
    lines += [f"{'advice':<{width}}  {large}"] if large else []
    if config.data:  # without, neither images nor steps are known
        foreseen = advice(config, trainer.method, progress, images)
        lines += [f"{'advice':<{width}}  {text}" for text in foreseen]
    return "\n".join(lines)


def _try(
    config: RunConfig, trainer: Trainer, source: Source, batch: int, progress: Progress, device: torch.device
) -> tuple[str, float, str]:
    """Losses of the second of two steps, its seconds, and the memory that it took."""
    settings = dataclasses.replace(config.loader, workers=0)
    with_objects = config.views.objects is not None
    loader = Loader(
        source,
        batch,
        config.seed,
        settings,
        with_objects=with_objects,
        annotations=config.method.annotations,
        device=device,
    )
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
    terms = {name.removeprefix("loss/"): float(v) for name, v in values.items() if name.startswith("loss/")}
    return ", ".join(f"{name} {v:.3f}" for name, v in terms.items()), seconds, _memory(device)


def try_images(source: Source, annotations: str | None = None, seconds: float = LOOK_SECONDS) -> str:
    """Return how many images of a sample of at most 200 can be read, with the names of those that cannot.

    Their label maps are read, too, where a method learns from those.

    They are spread evenly over the source, and read in an order that stays so where `seconds` end it early.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).round().astype(int))
    until, read, failed = time.monotonic() + seconds, 0, []
    for index in np.random.default_rng(0).permutation(chosen).tolist():
        if read and time.monotonic() >= until:
            break
        read += 1
        try:
            pixels = decode(source[index].image)
            if annotations == "label_maps" and isinstance(source, PixelSource):
                read_label_map(source, index, pixels.shape[:2])
        except (BadImage, OSError):
            failed.append(index)
    if not failed:
        return f"all of {read:,} images, spread evenly over {len(source):,}"
    names = "; ".join(why_bad(source, index) for index in sorted(failed)[:NAMED])
    more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    good = f"{read - len(failed):,} of {read:,} images, spread evenly over {len(source):,}"
    return f"{good}; not: {names}{more}"


def _parameters(trainer: Trainer) -> str:
    """Numbers that train at any time of the run by part, such as encoder and heads."""
    counts: dict[str, int] = {}
    left = {id(p) for p in trainer.optimizer.named.values() if trainer.freezing.ends(p)}
    for name, part in trainer.method.networks().items():
        kind = name.partition(".")[0]
        own = {id(p): p.numel() for p in part.parameters() if id(p) in left}
        counts[kind] = counts.get(kind, 0) + sum(own.values())
        left -= own.keys()  # what two heads share counts once
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)


def _resting(config: RunConfig, trainer: Trainer) -> list[str]:
    """What rests, a phrase for each."""
    count, named = config.train_blocks, trainer.freezing.describe()
    if count is not None:
        named.append("encoder but for its last " + ("block" if count == 1 else f"{count} blocks"))
    if config.lora is not None:
        named.append(
            f"encoder but for updates of rank {config.lora.rank} of {', '.join(config.lora.targets)}"
        )
    return named


def _tokens(config: RunConfig, part: int) -> str:
    """Tokens that the networks go through for each of `part` images that are taken at once."""
    views, model, method = config.views, config.model, blueprint(config)
    extra = model.class_token + model.registers
    patches = (views.global_size // model.patch_size) ** 2
    locals_ = views.local_count * ((views.local_size // model.patch_size) ** 2 + extra)
    teacher = views.global_count * (patches + extra)
    teaches = any(not any(p.requires_grad for p in network.parameters()) for network in method.trained())
    taught = f", teacher {teacher:,}" if teaches else ""
    if views.dropping is None and views.blocks is None:
        return f"student {teacher + locals_:,}{taught}"
    about, kept, predicted = "", 0, 0
    if views.dropping is not None:
        kept, predicted = views.dropping.counts(patches)
    if views.blocks is not None:  # as many as the batch allows: the mean of some
        about, side = "about ", views.global_size // model.patch_size
        generator = torch.Generator().manual_seed(config.seed)
        drawn = [
            draw_blocks(views.blocks, part * views.global_count, (side, side), generator) for _ in range(16)
        ]
        kept, predicted = (round(sum(d[i].shape[1] for d in drawn) / len(drawn)) for i in range(2))
    if any(network.mask_token.requires_grad for network in method.trained()):
        about, kept = "", patches  # the encoder reads mask tokens in place of what is dropped
    student, asked = views.global_count * (kept + extra), views.global_count * predicted
    return f"student {about}{student:,}, predicted {about}{asked:,}{taught}"


def _steps(config: RunConfig, progress: Progress) -> str:
    if config.data is None:
        return f"{config.duration}; with data= their number is known"
    total, epoch = progress.total_steps, progress.steps_per_epoch
    return f"{total:,} ({epoch:,} an epoch, {total / epoch:.4g} epochs)"


def _speed(config: RunConfig, progress: Progress, rate: float) -> str:
    speed = f"{rate:.3g} images/s on one such device"
    if config.data is None:
        return speed
    return f"{speed}, so {_duration(progress.total_steps * config.batch_size / rate)} in all"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at most on {device}"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * unit / 2**30:.2f} GiB at most in this process"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours" if seconds < 96 * 3600 else f"{seconds / 86400:.0f} days"
