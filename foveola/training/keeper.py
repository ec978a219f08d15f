"""What a run keeps of a step: its checkpoint, its encoder, and the encoders of earlier steps."""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from foveola import distributed
from foveola.config import UserError
from foveola.failures import explain, explained
from foveola.files import RunFolder
from foveola.models.encoder import Encoder
from foveola.state_files import CUT_PARTS, take_cut
from foveola.training import checkpoint
from foveola.training.assemble import encoder_of, student_names
from foveola.training.loop import Trainer
from foveola.training.recipe import RunConfig


@dataclass(eq=False)
class Keeper:
    """Writes what a trainer has learned into the folder of its run.

    Where weights are cut over processes, all of them call each method, as all have a part of them.
    """

    config: RunConfig
    trainer: Trainer
    device: torch.device
    keep_every: int | None
    folder: Path = Path()
    pending: tuple[int, Future] | None = None  # the step that is being written, and when it is done
    group: Any = None  # of processes

    def __post_init__(self) -> None:
        self.threads = ThreadPoolExecutor(1)

    def encoder(self, step: int) -> Encoder:
        """Return a copy of what was learned in so many steps."""
        return encoder_of(self.config, self.trainer.method, step).to(self.device)

    def read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint that is known to be whole; where weights are cut, each process reads its own."""
        models = self.trainer.models()
        return checkpoint.read_checkpoint(
            path, lambda where: models(where[1:]) if where[0] == "trainer" else None, checked=True
        )

    def begin(self, step: int) -> None:
        """Write the encoder of a run that was killed between its first checkpoint and its first encoder."""
        own = RunFolder(self.folder).encoder
        if distributed.on_main(lambda: own.config.exists()):
            return
        if distributed.is_main() or self.trainer.sharded:
            encoder = self.encoder(step)
            if distributed.is_main():
                encoder.save(own.path)

    def save(self, step: int, *, wait: bool) -> list[int]:
        """Write a checkpoint and the encoder of a step; return the steps of checkpoints that are whole now.

        What is cut is written while training goes on, unless it is to `wait`: its checkpoint is whole at the
        next call. Raises UserError where a checkpoint cannot be written, on all processes.
        """
        if self.trainer.sharded:
            done = self.settle()
            self._begin(step)
            return [*done, *self.settle()] if wait else done
        if distributed.is_main():
            with explained(f"step {step} cannot be saved in {self.folder}"):
                self._write(step, self.encoder(step), self._state(step))
        return [step]

    def settle(self) -> list[int]:
        """Wait for the checkpoint that is being written, if there is one; return its step."""
        if self.pending is None:
            return []
        (step, future), self.pending = self.pending, None
        failed = future.exception()
        reasons = distributed.gather_objects(None if failed is None else _reason(failed))
        if reason := next(filter(None, reasons), None):
            raise UserError(reason)
        return [step]

    def rescue(self, step: int) -> None:
        """Save a step on the main process alone, as others may be gone; not where they have parts of it."""
        if not self.trainer.sharded:
            self._write(step, self.encoder(step), self._state(step))

    def end(self) -> None:
        """Wait for what is being written, whatever becomes of it: an error is about to end the run."""
        if self.pending is not None:
            self.pending[1].exception()

    def _begin(self, step: int) -> None:
        """Let each process write its part of a checkpoint, in a thread of its own."""
        import torch.distributed.checkpoint as dcp

        if self.group is None:  # its own: what the threads say must not mix with what training says
            self.group = dist.new_group(backend="gloo", timeout=distributed.MEETING_PATIENCE)
        encoder = self.encoder(step)
        state, cut = take_cut(self._state(step))
        copies = {name: tensor.detach().clone() for name, tensor in cut.items()}
        what = f"step {step} cannot be saved in {self.folder}"

        def begin() -> Path:
            with explained(what):
                return checkpoint.begin_checkpoint(self.folder, step)

        writer = dcp.FileSystemWriter(distributed.on_main(begin) / CUT_PARTS)
        written: Any = dcp.async_save(copies, storage_writer=writer, process_group=self.group)
        if distributed.is_main():
            state = _copied(state)
            written = self.threads.submit(self._finish, written, what, step, encoder, state)
        self.pending = step, written

    def _finish(self, written: Future, what: str, step: int, encoder: Encoder, state: dict[str, Any]) -> None:
        """When all parts are written: what is whole, and the checkpoint takes its place."""
        try:
            with explained(what):
                written.result()
                self._write(step, encoder, state, begun=True)
        except BaseException:
            checkpoint.drop(self.folder, step)
            raise

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "trainer": self.trainer.state_dict(),
            "world_size": distributed.world_size(),
            "student": student_names(self.trainer.method),
        }

    def _write(self, step: int, encoder: Encoder, state: dict[str, Any], *, begun: bool = False) -> None:
        """First the encoder: killed in between, a run repeats some steps, and both are of one step again.

        But the first one only after its checkpoint: an encoder tells that there was one.
        """
        run = RunFolder(self.folder)
        first = not run.encoder.config.exists()
        if not first:
            encoder.save(run.encoder.path)
        if self.keep_every is not None and step % self.keep_every == 0:
            encoder.save(run.saved_encoder(step).path)
        write = checkpoint.finish if begun else checkpoint.save
        write(self.folder, step, state, keep=self.config.keep, keep_every=self.keep_every)
        if first:
            encoder.save(run.encoder.path)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else explain(error) or repr(error)  # pyright: ignore


def _copied(tree: Any) -> Any:
    """A tree of dicts and its tensors as they are now, on the CPU."""
    if isinstance(tree, dict):
        return {name: _copied(value) for name, value in tree.items()}
    return tree.detach().cpu().clone() if isinstance(tree, torch.Tensor) else copy.deepcopy(tree)
