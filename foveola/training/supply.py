"""The batches of the next step, taken together and between steps, so that all ranks go on or all stop."""

import dataclasses
import time
from collections.abc import Generator

import torch

from foveola import distributed
from foveola.config import ConfigError, UserError
from foveola.data.ahead import Asker
from foveola.data.loader import Loader
from foveola.data.sample import Canvases, DataError, have_scores
from foveola.data.sources import Source
from foveola.failures import explain
from foveola.training.pixels import with_pixels
from foveola.training.recipe import RunConfig
from foveola.training.signals import Stop


def with_data(config: RunConfig, source: Source) -> RunConfig:
    """Return the same with what the data say to its method. Raises ConfigError where they lack what it
    reads.
    """
    method = config.method.with_data(source)
    if getattr(getattr(method, "token", None), "weight_by", None) == "score" and not have_scores(source):
        raise ConfigError(
            f"method.token.weight_by=score: objects of {source.name} have no scores, as those of "
            "`foveola masks` have; use area"
        )
    return with_pixels(dataclasses.replace(config, method=method), source)


def loader_of(
    config: RunConfig, source: Source, part: int, device: torch.device, start: int, asker: Asker
) -> Loader:
    """Return the loader of a run from a step on, which gives this process `part` images at a time."""
    return Loader(
        source,
        part,
        config.seed,
        config.loader,
        with_objects=config.views.objects is not None,
        annotations=config.method.annotations,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        accumulate=config.accumulate,
        start_step=start * config.accumulate,
        device=device,
        asker=asker,
    )


class Supply:
    """Batches of a loader, `accumulate` for each step. Every rank asks for the same steps.

    `waited` counts the seconds that batches were waited for. After `next` has given None, `failure` is why
    the run ends: None when a process was told to, otherwise an error.
    """

    def __init__(self, loader: Loader, accumulate: int, stop: Stop) -> None:
        self.loader, self.accumulate, self.stop = loader, accumulate, stop
        self.batches: Generator[Canvases] = iter(loader)
        self.waited = 0.0
        self.failure: Exception | None = None

    def next(self) -> list[Canvases] | None:
        """Return the batches of a step; None on all ranks where one got a signal to stop, or cannot go on."""
        taken, failure = [], None
        began = time.perf_counter()
        try:
            while len(taken) < self.accumulate and not self.stop.requested:
                if (canvases := next(self.batches, None)) is None:
                    break
                taken.append(canvases)
        except Exception as error:
            failure = error
        self.waited += time.perf_counter() - began
        stopped, self.failure = self._agree(failure)
        return None if stopped or self.failure is not None else taken

    def _agree(self, mine: Exception | None) -> tuple[bool, Exception | None]:
        """Whether any process got a signal to stop, and an error: of any process, or too many bad images."""
        facts = [float(mine is not None), float(self.stop.requested), self.loader.bad_count, self.loader.seen]
        # In float64 counts are exact. On the CPU: no process waits for its GPU here.
        sums = distributed.all_reduce_sum(torch.tensor(facts, dtype=torch.float64))
        failed, stopped, bad, seen = sums.tolist()
        if failed:
            words = None if mine is None else explain(mine) or str(mine)
            reasons = distributed.gather_objects(words)
            first = next(number for number, text in enumerate(reasons) if text is not None)
            return stopped > 0, mine or UserError(f"process {first}: {reasons[first]}")
        reason = self.loader.judge(int(bad), int(seen))
        # The example in it is one of this process: everybody says what the first does.
        return stopped > 0, DataError(distributed.broadcast_object(reason)) if reason else None

    def close(self) -> None:
        """End the workers."""
        self.batches.close()
