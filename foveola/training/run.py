"""A pretraining run: assemble, train, checkpoint, evaluate, resume, stop on signals."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from traceback import format_exception
from typing import Any

import torch
from torch import Tensor

from foveola import distributed
from foveola.config import ConfigError, UserError, to_dict
from foveola.data.ahead import Asker
from foveola.data.identity import saying
from foveola.data.loader import Loader
from foveola.data.sample import DataError
from foveola.data.shown import showing, shown_channels
from foveola.data.sources import OBJECT, Source, as_source
from foveola.data.stored import first_look
from foveola.failures import explain
from foveola.files import FIXED_TARGETS, WHOLE_STEPS, RunFolder
from foveola.logged import Averages, of_all_processes
from foveola.models.encoder import Encoder
from foveola.outside import library
from foveola.training import checkpoint, folder, same_data
from foveola.training.advice import advice, objects_line
from foveola.training.assemble import assemble, local_batch_size, untrained
from foveola.training.auto.plan import AUTO
from foveola.training.auto.request import request
from foveola.training.bootstrap import run_rounds
from foveola.training.callbacks import Callbacks
from foveola.training.durations import period, plan
from foveola.training.evaluations import Evaluations
from foveola.training.keeper import Keeper
from foveola.training.lengthen import lengthen, what_changes
from foveola.training.log import Log, surroundings
from foveola.training.loop import Diverged
from foveola.training.pixels import with_channels
from foveola.training.recipe import BootstrapConfig, RunConfig, nested, resolve, with_changes
from foveola.training.signals import Stop
from foveola.training.start import Start
from foveola.training.supply import Supply, loader_of, with_data
from foveola.training.watch import Watch, facts_of_run, warmup_of
from foveola.zoo.load import load

__all__ = ["Run", "pretrain", "untrained"]

# Keys whose value may be a source of the caller's own.
OWN_SOURCES = ("data", "evaluate_train", "evaluate_test", "evaluations.test.test")


@dataclass(frozen=True)
class Run:
    """A finished or stopped run."""

    folder: Path
    config: RunConfig = field(repr=False)
    step: int
    total_steps: int
    metrics: dict[str, float]  # of the last step that was logged; empty where this call took no step
    interrupted: bool = False  # by a signal, before its end

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def encoder(self) -> Encoder:
        return load(self.folder)

    def history(self) -> list[dict[str, float | None]]:
        """Return the metrics of every logged step, in order, as `metrics.jsonl` has them (None: was not
        finite).

        What was logged of one step in several lines, by training and by an evaluation, is laid together.
        """
        return RunFolder(self.folder).read_metrics()

    def frame(self) -> Any:
        """Return `history` as a pandas DataFrame, a line for each step. Raises UserError without pandas."""
        return library("pandas", "frames", "Run.frame()").DataFrame(self.history())


def pretrain(recipe: str | Path | RunConfig, *, callbacks: Sequence[Any] = (), **overrides: Any) -> Run:
    """Train as a recipe says, or go on with the run in its folder; returns when done or stopped by a signal.

    Args:
        recipe: name, YAML path, or a resolved configuration; "auto" plans one (`budget="2 hours"`).
        callbacks: objects with any of `on_step(step, metrics)`, `on_checkpoint(step, folder)` and
            `on_evaluation(step, result)` (docs/extend.md). They are called in the first process only; what
            one raises ends the run as any fault does, with a checkpoint.
        overrides: any key of `RunConfig`; nested ones as dicts (`model={"size": "base"}`) or through
            `**{"model.size": "base"}`. `data`, `evaluate_train` and `evaluate_test` may also be sources of
            the caller's own (docs/data.md); going on with the run then needs the same object again.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 end the step, write a checkpoint and return; the same call
    then goes on.
    Raises UserError for mistakes in the configuration and the data, and `Diverged`.
    """
    told_of = Callbacks(callbacks)
    sources: dict[str, Source] = {}
    for name in OWN_SOURCES:
        if not isinstance(value := overrides.get(name), str | None):
            source = as_source(value, "test" if name.endswith("test") else "train", name)
            overrides[name], sources[name] = f"{OBJECT}:{source.name}", source
    if recipe == AUTO:
        config = request(overrides, sources.get("data"))
    else:
        config = recipe if isinstance(recipe, RunConfig) else resolve(recipe, overrides)
    if isinstance(recipe, RunConfig) and overrides:
        config = with_changes(to_dict(config), nested(overrides))
    with distributed.joined(config.device) as device, saying(distributed.is_main()):
        if isinstance(config, BootstrapConfig):
            return run_rounds(config, device, lambda each: _Session(each, device, {}, told_of).run())
        return _Session(config, device, sources, told_of).run()


class _Session:
    """One process's work on a run, between its start and the next interruption."""

    def __init__(
        self, config: RunConfig, device: torch.device, sources: dict[str, Source], callbacks: Callbacks
    ) -> None:
        self.config, self.device, self.callbacks = config, device, callbacks
        if config.data is None:
            hint = config.about.data or "folder:/my/images"
            raise ConfigError(f"recipe {config.recipe!r} needs data=..., for example data={hint}")
        config.refuse_fresh()
        self.source = as_source(sources.get("data", config.data), "train", "data")
        model = with_channels(config, self.source).model  # before anything is measured
        self.start = Start(config.init, model, config.out, config.init_channels)
        self.config = config = with_data(config, self.source)
        self.progress = plan(config, len(self.source), distributed.world_size())
        self.part = local_batch_size(config)
        self.total = self.progress.total_steps
        self.every, self.keep_every = (
            period(config, name, self.progress) for name in ("checkpoint_every", "keep_every")
        )
        self.evaluations = Evaluations(config, self.progress, sources)
        self.trainer = assemble(config, self.progress, device, self.start.weights)
        self.keeper = Keeper(config, self.trainer, device, self.keep_every)
        self.folder, self.stop, self.shorter = Path(), Stop(), ""  # shorter: its duration so far, if another
        self.step, self.whole, self.tried = 0, True, -1  # tried: the last step that was to be saved
        self.bad_names: set[str] = set()
        self.changes: list[str] = []  # between the interruption of a run and its continuation

    # -- from start to end

    def run(self) -> Run:
        with ExitStack() as stack:
            self.folder = self.keeper.folder = self._claimed(stack)
            start = self.step = self.tried = self._resume()
            missed = self.evaluations.missed(self.folder, start)
            if not missed and (done := self.evaluations.ended(self.folder, start)):
                if distributed.is_main():
                    print(done, flush=True)
                return Run(self.folder, self.config, start, self.total, {})
            stack.enter_context(self.stop)
            log = stack.enter_context(
                Log(
                    self.folder,
                    total_steps=self.total,
                    start_step=start,
                    batch_size=self.config.batch_size,
                )
            )
            facts = facts_of_run(
                self.config, self.trainer.method, self.progress, len(self.source), distributed.world_size()
            )
            self.watch = Watch(facts, log.kept, warmup_of(self.config, self.progress))
            self._greet(log, start)
            try:
                for step in missed:
                    self._evaluate(step, log)
                metrics = {} if self.evaluations.worse else self._train(start, log)
            except Exception as error:
                raise self._ended(error, log) from error
            step = self.step
            self._farewell(log, step)
            interrupted = step < self.total and not self.evaluations.worse
        return Run(self.folder, self.config, step, self.total, metrics, interrupted)

    def _claimed(self, stack: ExitStack) -> Path:
        images = same_data.agreed(self.source)  # not beyond here: an inventory of a million files is large
        return distributed.on_main(lambda: self._claim(stack, images))

    def _claim(self, stack: ExitStack, images: same_data.RunImages) -> Path:
        path, note = folder.choose_folder(self.config, self.total, images)
        self.start.insist(path)
        stack.enter_context(folder.lock(path))
        self.changes += filter(None, (note, folder.begin(path, self.config, images)))
        self.shorter = lengthen(path, self.config)
        return path

    def _resume(self) -> int:
        """Load the newest whole checkpoint, if there is one; how many steps are done."""
        newest, damaged = distributed.on_main(lambda: checkpoint.newest_whole(self.folder))
        if newest is None:
            return 0
        state = self.keeper.read(newest)
        try:
            self.trainer.load_state_dict(state["trainer"])
            start = int(state["step"])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{newest} does not fit this version of foveola: {first}") from error
        if damaged:
            names = ", ".join(path.name for path in damaged)
            self.changes.append(
                f"damaged, so passed over: {names}; {newest.name} is the newest whole checkpoint"
            )
        processes = state.get("world_size", distributed.world_size())
        if processes != distributed.world_size():
            self.changes.append(
                f"{distributed.world_size()} processes instead of {processes}: other views from here on"
            )
        self.keeper.begin(start)
        return start

    def _greet(self, log: Log, start: int) -> None:
        what = f"going on after step {start}" if start else "training"
        length = f"{self.total - start} steps of {self.config.batch_size} images, out of {len(self.source)}"
        log.note(f"{what} in {self.folder}: {length}")
        log.note(surroundings(self.device), show=False)
        if targets := self.trainer.method.targets():
            counts = ", ".join(f"{name} {count}" for name, count in targets.items())
            log.note(f"prototypes of targets: {counts}", show=False)  # as the report reads it
        if self.config.method.fixed_targets:
            log.note(FIXED_TARGETS, show=False)
        log.note(WHOLE_STEPS, show=False)
        if self.shorter:
            now = dataclasses.replace(self.progress, step=start)
            log.note(what_changes(self.shorter, self.config, now, len(self.source)))
        for text in self.changes:
            log.note(text)
        if not start and self.start.weights is not None:
            self.start.keep(self.folder, self.keeper.encoder(0), log.note)
        wise = advice(self.config, self.trainer.method, self.progress, len(self.source))
        resting = [f"resting: {part}" for part in self.trainer.freezing.describe()]
        if self.config.parallel != "ddp" and not self.trainer.sharded:
            log.note(f"parallel={self.config.parallel}: this is one process, which has all weights")
        for text in (*resting, *wise, *first_look(self.source)):
            log.note(text)
        if self.config.views.objects is not None:
            log.note(f"objects: {objects_line(self.source)}")

    def _farewell(self, log: Log, step: int) -> None:
        for text in self.watch.summary() if step >= self.total else ():
            log.note(text)
        for text in self.evaluations.summary():
            log.note(text)
        if self.evaluations.worse:
            log.note(self.evaluations.worse)
        elif step < self.total:
            log.note(f"stopped after step {step} of {self.total}; the same command goes on from there")
        else:
            log.note(f"finished; encoder: {self.folder / 'encoder'}")

    # -- training

    def _train(self, start: int, log: Log) -> dict[str, float]:
        """Train from step `start` until the end or a signal; the metrics that were logged last."""
        config, trainer = self.config, self.trainer
        asker = Asker(log.warn, lambda: self.stop.requested)
        loader = loader_of(config, self.source, self.part, self.device, start, asker)
        supply = Supply(loader, config.accumulate, self.stop)
        steps, metrics = 0, {}
        seconds, began = 0.0, time.perf_counter()
        try:
            batches = supply.next()
            while batches is not None:
                self.whole = False
                progress = dataclasses.replace(self.progress, step=self.step)
                values = trainer.step(progress, iter(batches).__next__)
                self.step, steps, self.whole = self.step + 1, steps + 1, True
                step = self.step
                batches = supply.next() if step < self.total else None
                seconds, last = seconds + time.perf_counter() - began, batches is None
                if trainer.bad_steps and config.precision != "fp16":
                    log.note(f"step {trainer.bad_at}: gradients are not finite; the weights stay as they are")
                if last or step % config.log_every == 0:
                    metrics = self._metrics(step, values, supply.loader, log)
                    metrics["images_per_second"] = steps * config.batch_size / seconds
                    metrics["data_wait"] = min(supply.waited / seconds, 1.0)
                    log.step(step, metrics)
                    self.callbacks.on_step(step, metrics)
                    for text in self.watch.add(step, metrics):
                        log.note(text)
                    steps, seconds, supply.waited = 0, 0.0, 0.0
                evaluating = self.evaluations.due(step) and not (last and step < self.total)
                # A step without finite gradients has changed nothing: the checkpoint before it is as good.
                # With a loss scaler such steps are ordinary.
                healthy = not trainer.bad_steps or config.precision == "fp16"
                due = evaluating or self._is_due(self.every, step) or self._is_due(self.keep_every, step)
                if last or (due and healthy):
                    trainer.method.gather()
                    self._draw(step, log)
                    self._save(step, wait=last)
                    log.flush()
                if evaluating:
                    self._evaluate(step, log)
                    batches = None if self.stop.agreed() or self.evaluations.worse else batches
                began = time.perf_counter()
            if supply.failure is not None:
                raise supply.failure
        except Exception:
            with suppress(OSError):  # the disk may be the reason
                self._name_bad(supply.loader.bad_names, log, show=False)
            raise
        finally:
            supply.close()
        return metrics

    def _ended(self, error: Exception, log: Log) -> Exception:
        """The error to end with: in one line, with what is kept, after keeping the state between steps.

        A state in the middle of a step is not whole, and not kept. Written to log.txt by whatever process
        meets it; shown by whoever catches it.
        """
        reason = str(error) if isinstance(error, UserError) else explain(error)
        self.keeper.end()
        if self.whole and self.tried != self.step > 0 and distributed.is_main():
            try:
                self.keeper.rescue(self.step)
            except Exception as second:
                log.failure(f"step {self.step} could not be saved: {explain(second) or second}")
        newest = checkpoint.newest(self.folder)
        if isinstance(error, Diverged):
            remedy = f"{newest} is from before that" if newest else "there is no checkpoint from before that"
        else:
            remedy = (
                f"kept: {newest}, from where the same command goes on" if newest else "no checkpoint is kept"
            )
        text = f"{reason or repr(error)}; {remedy}"
        log.failure(text if isinstance(error, UserError) else f"{text}\n{''.join(format_exception(error))}")
        if reason is None:
            return error
        return type(error)(text) if isinstance(error, UserError) else UserError(text)

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.total)

    def _metrics(
        self, step: int, values: dict[str, Tensor | float | Averages], loader: Loader, log: Log
    ) -> dict[str, float]:
        """What the step gave, over all processes; unreadable images are named in the log."""
        logs = {
            name: value if isinstance(value, Averages) else Averages((_precise(value),), 1)
            for name, value in values.items()
        }
        bad = set().union(*distributed.gather_objects(loader.bad_names))
        self._name_bad(bad, log)
        if reason := loader.judge(0, 0, len(bad)):
            raise DataError(reason)
        return {
            "epoch": step / self.progress.steps_per_epoch,
            **of_all_processes(logs, self.device),
            **self.trainer.diagnose(),
            "bad_images": float(len(bad)),
        }

    def _name_bad(self, bad: set[str], log: Log, *, show: bool = True) -> None:
        if new := sorted(bad - self.bad_names):
            log.note(f"unreadable images, replaced by others: {', '.join(new)}", show=show)
            self.bad_names |= bad

    def _draw(self, step: int, log: Log) -> None:
        with showing(shown_channels(self.source)):
            figures = self.trainer.figures()
        for name, figure in figures.items():
            log.figure(step, name, figure, keep=self.config.keep, keep_every=self.keep_every)

    def _save(self, step: int, *, wait: bool) -> None:
        self.tried = step
        for whole in self.keeper.save(step, wait=wait):
            self.callbacks.on_checkpoint(whole, RunFolder(self.folder).checkpoint(whole))
        distributed.barrier()

    def _evaluate(self, step: int, log: Log) -> None:
        first = RunFolder(self.folder).saved_encoder(step).path  # of the start, of a run that has gone on
        encoder = self.keeper.encoder(step) if step == self.step else load(first, self.device)
        self.evaluations.run(encoder, step, self.folder, log, self.callbacks.on_evaluation)


def _precise(value: Tensor | float) -> Tensor:
    """Return a number as a tensor; one of Python, such as a learning rate, in its own precision."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
