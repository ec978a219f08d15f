"""What a run keeps of a step: its checkpoint, its encoder, and the encoders of earlier steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveola import distributed
from foveola.failures import told
from foveola.files import RunFolder
from foveola.models.encoder import Encoder
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

    def encoder(self, step: int) -> Encoder:
        """Return a copy of what was learned in so many steps."""
        return encoder_of(self.config, self.trainer.method, step).to(self.device)

    def begin(self, step: int) -> None:
        """Write the encoder of a run that was killed between its first checkpoint and its first encoder."""
        own = RunFolder(self.folder).encoder
        if distributed.on_main(lambda: own.config.exists()):
            return
        if distributed.is_main() or self.trainer.sharded:
            encoder = self.encoder(step)
            if distributed.is_main():
                encoder.save(own.path)

    def save(self, step: int) -> None:
        """Write a checkpoint and the encoder of a step. Raises UserError where there is no room for them."""
        main = distributed.is_main()
        if main or self.trainer.sharded:
            encoder, state = self.encoder(step), self._state(step)
            if main:
                with told(f"step {step} cannot be saved in {self.folder}"):
                    self._write(step, encoder, state)

    def rescue(self, step: int) -> bool:
        """Write them while other processes may be gone; return whether that can be.

        It cannot where the other processes have a part of the weights.
        """
        if self.trainer.sharded:
            return False
        self._write(step, self.encoder(step), self._state(step))
        return True

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "trainer": self.trainer.state_dict(),
            "world_size": distributed.world_size(),
            "student": student_names(self.trainer.method),
        }

    def _write(self, step: int, encoder: Encoder, state: dict[str, Any]) -> None:
        """First the encoder: killed in between, a run repeats some steps, and both are of one step again.

        But the first one only after its checkpoint: an encoder tells that there was one.
        """
        run = RunFolder(self.folder)
        first = not run.encoder.config.exists()
        if not first:
            encoder.save(run.encoder.path)
        if self.keep_every is not None and step % self.keep_every == 0:
            encoder.save(run.kept_encoder(step).path)
        checkpoint.save(self.folder, step, state, keep=self.config.keep, keep_every=self.keep_every)
        if first:
            encoder.save(run.encoder.path)
