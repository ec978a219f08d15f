"""A pretraining run: assemble, train, checkpoint, evaluate, resume, stop on signals."""

import dataclasses
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from foveola import distributed
from foveola.config import ConfigError, build, dump_yaml, merge, read_yaml, to_dict
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.evaluation.protocol import evaluate
from foveola.methods import METHODS
from foveola.methods.method import Method
from foveola.models.encoder import Encoder, load
from foveola.schedules import Progress, Schedule, steps_of
from foveola.training import checkpoint
from foveola.training.log import Log
from foveola.training.loop import Trainer
from foveola.training.optimizer import Optimizer
from foveola.training.recipe import RunConfig, nested, resolve

# What may differ between a run and its continuation: where and how fast it runs, not what it computes.
FREE = ("out", "device", "loader.workers", "loader.prefetch", "log_every", "checkpoint_every", "keep", "keep_every",
        "evaluate_every", "evaluate_train", "evaluate_test", "evaluate", "checkpoint_activations")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished or stopped run."""

    folder: Path
    config: RunConfig
    step: int
    total_steps: int
    metrics: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def encoder(self) -> Encoder:
        return load(self.folder)


def pretrain(recipe: str | Path | RunConfig, **overrides: Any) -> Run:
    """Train as a recipe says, or go on with the run in its folder; returns when done or stopped by a signal.

    Args:
        recipe: name, YAML path, or a resolved configuration.
        overrides: any key of `RunConfig`; nested ones as dicts (`model={"size": "base"}`) or through
            `**{"model.size": "base"}`.
    """
    config = recipe if isinstance(recipe, RunConfig) else resolve(recipe, overrides)
    if isinstance(recipe, RunConfig) and overrides:
        config = build(RunConfig, merge(to_dict(config), nested(overrides)))
    device = distributed.start(config.device)
    try:
        return _Session(config, device).run()
    finally:
        distributed.stop()


class _Session:
    """One process's work on a run, between its start and the next interruption."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        world = distributed.world_size()
        part, rest = divmod(config.batch_size, world * config.accumulate)
        if rest or not part:
            raise ConfigError(
                f"batch_size={config.batch_size} cannot be shared by {world} processes x accumulate={config.accumulate}"
            )
        if config.data is None:
            hint = config.about.data or "folder:/my/pictures"
            raise ConfigError(f"recipe {config.recipe!r} needs data=..., for example data={hint}")
        self.source = open_source(config.data)
        self.steps_per_epoch = len(self.source) // config.batch_size
        if not self.steps_per_epoch:
            raise ConfigError(f"{config.data} has {len(self.source)} pictures: fewer than batch_size={config.batch_size}")
        self.part = part
        self.total_steps = self._steps(config.duration, 0)
        self.progress = Progress(0, self.total_steps, self.steps_per_epoch, config.batch_size)
        for schedule in _schedules(config):
            schedule.check(self.progress)
        self.trainer = assemble(config, self.progress, device)
        self.stopping = False

    def _steps(self, duration: str, total: int) -> int:
        return steps_of(
            duration, total_steps=total, steps_per_epoch=self.steps_per_epoch, batch_size=self.config.batch_size
        )

    def run(self) -> Run:
        config = self.config
        folder = distributed.broadcast_object(_folder(config) if distributed.is_main() else None)
        start = self._resume(folder)
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "config.yaml").exists():
                (folder / "config.yaml").write_text(_saved(config))
        distributed.barrier()
        if start >= self.total_steps:
            return Run(folder, config, start, self.total_steps, {})
        log = Log(folder, total_steps=self.total_steps, start_step=start, batch_size=config.batch_size)
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        try:
            step, metrics = self._train(folder, start, log)
        finally:
            log.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return Run(folder, config, step, self.total_steps, metrics)

    def _stop(self, number: int, frame: Any) -> None:
        if self.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopping = True

    def _resume(self, folder: Path) -> int:
        newest = checkpoint.newest(folder)
        if newest is None:
            return 0
        state = checkpoint.load(newest)
        self.trainer.load_state_dict(state["trainer"])
        return state["step"]

    def _train(self, folder: Path, start: int, log: Log) -> tuple[int, dict[str, float]]:
        config, total = self.config, self.total_steps
        every = max(1, self._steps(config.checkpoint_every, total))
        keep_every = self._steps(config.keep_every, total) if config.keep_every else None
        evaluate_every = max(1, self._steps(config.evaluate_every, total)) if config.evaluate_every else None
        loader = Loader(
            self.source,
            self.part,
            config.seed,
            config.loader,
            with_objects=config.views.objects is not None,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_step=start * config.accumulate,
            device=self.device,
        )
        batches = iter(loader)
        metrics: dict[str, float] = {}
        mark, waited, steps, bad = time.perf_counter(), 0.0, 0, 0
        step = start
        while step < total:
            progress = dataclasses.replace(self.progress, step=step)

            def take():
                nonlocal waited
                canvases = next(batches)
                waited += loader.wait_seconds
                return canvases

            values = self.trainer.step(progress, take)
            step, steps = step + 1, steps + 1
            stopping = self._agree_to_stop()
            if step % config.log_every == 0 or step == total or stopping:
                seconds = time.perf_counter() - mark
                metrics = {"epoch": step / self.steps_per_epoch}
                metrics |= {name: float(value) for name, value in values.items()} | self.trainer.method.diagnose()
                metrics["images_per_second"] = steps * config.batch_size / seconds
                metrics["data_wait"] = min(waited / seconds, 1.0)
                if loader.bad_count > bad:
                    bad = loader.bad_count
                    log.note(f"{bad} unreadable pictures so far, replaced by others: {', '.join(loader.bad_names[-3:])}")
                metrics["bad_pictures"] = float(loader.bad_count)
                log.step(step, metrics)
                mark, waited, steps = time.perf_counter(), 0.0, 0
            due = step % every == 0 or step == total or stopping
            if due and not self.trainer.bad_steps:
                self._save(folder, step, keep_every)
            if evaluate_every and (step % evaluate_every == 0 or step == total) and not stopping:
                log.step(step, self._evaluate())
            if stopping:
                log.note(f"stopped after step {step} of {total}; the same command goes on from there")
                break
        return step, metrics

    def _agree_to_stop(self) -> bool:
        """Whether any process was told to stop: all stop after the same step."""
        if distributed.world_size() == 1:
            return self.stopping
        flag = torch.tensor(float(self.stopping), device=self.device)
        return bool(distributed.all_reduce_max(flag))

    def _save(self, folder: Path, step: int, keep_every: int | None) -> None:
        if distributed.is_main():
            state = {"step": step, "trainer": self.trainer.state_dict()}
            checkpoint.save(folder, step, state, keep=self.config.keep, keep_every=keep_every)
            self._encoder().save(folder / "encoder")
        distributed.barrier()

    def _encoder(self) -> Encoder:
        config = self.config.encoder()
        encoder = Encoder(config)
        encoder.backbone.load_state_dict(self.trainer.method.backbone.state_dict())
        return encoder.to(self.device)

    def _evaluate(self) -> dict[str, float]:
        config = self.config
        train = config.evaluate_train or config.data
        settings = {k: v for k, v in to_dict(config.evaluate).items()}
        result = evaluate(self._encoder(), "knn", train=train, test=config.evaluate_test or train, **settings)
        return {f"knn/{name}": value for name, value in result.metrics.items()}


def assemble(config: RunConfig, progress: Progress, device: torch.device) -> Trainer:
    """Networks, optimiser and views of a run, from its seed."""
    torch.manual_seed(config.seed)
    method: Method = METHODS[config.method.name](config.method, config.model, config.views).to(device).train()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for network in method.trained():
        network.checkpoint_activations = config.checkpoint_activations
        if config.compile:
            network.compile()
    wrapped: nn.Module = method
    if distributed.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(method, device_ids=ids, broadcast_buffers=False)
    optimizer = Optimizer(method, config.optimizer, progress)
    return Trainer(method, wrapped, optimizer, config.views, config.precision, config.accumulate, config.seed, device)


def _schedules(config: RunConfig) -> list[Schedule]:
    """All schedules of a run, wherever they stand."""
    found: list[Schedule] = []

    def visit(value: Any) -> None:
        if isinstance(value, Schedule):
            found.append(value)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                visit(getattr(value, field.name))

    visit(config)
    return found


def _saved(config: RunConfig) -> str:
    return dump_yaml(dataclasses.replace(config, out=None))


def _folder(config: RunConfig) -> Path:
    """The run's folder; checks that a run already there is this one."""
    if config.out is not None:
        folder = Path(config.out)
        if (folder / "config.yaml").exists():
            if (different := _difference(folder, config)) is not None:
                raise ConfigError(f"{folder} holds another run ({different}): choose another out=, or repeat its settings")
        elif folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty and holds no run: choose another out=")
        return folder
    name = config.recipe or "run"
    for folder in sorted(Path("runs").glob(f"{name}-*"), reverse=True):
        unfinished = (folder / "config.yaml").exists() and not (folder / "encoder" / "finished").exists()
        if unfinished and _difference(folder, config) is None:
            return folder
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _difference(folder: Path, config: RunConfig) -> str | None:
    """The first setting in which the run in `folder` differs from `config`, or None."""
    theirs, ours = _flat(read_yaml(folder / "config.yaml")), _flat(to_dict(config))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name) and not any(name == f or name.startswith(f + ".") for f in FREE):
            return f"its {name} is {theirs.get(name)!r}, not {ours.get(name)!r}"
    return None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def untrained(config: RunConfig) -> Encoder:
    """The encoder that a run begins with: same shape, same seed, no step taken."""
    torch.manual_seed(config.seed)
    method = METHODS[config.method.name](config.method, config.model, config.views)
    return Encoder(config.encoder(), method.backbone)
