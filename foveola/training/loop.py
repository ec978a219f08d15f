"""One training step from top to bottom: the only caller of backward, of the optimiser and of the EMA."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from foveola import distributed
from foveola.config import UserError, kind_of
from foveola.data.sample import Canvases
from foveola.logged import Averages, added
from foveola.methods.method import Method, Output, spread_and_rank
from foveola.schedules import Progress
from foveola.state_files import is_cut
from foveola.training.freezing import Freezing
from foveola.training.optimizer import Optimizer
from foveola.training.sharding import cut_like, local_gradients, seen_whole
from foveola.views.batch import Streams, ViewsConfig, make_views

PATIENCE = 3  # steps in a row with gradients that are not finite before giving up
Precision = Literal["fp32", "bf16", "fp16"]


class Diverged(UserError):  # noqa: N818 (what happened to a run, not an error in the code)
    """Gradients were not finite for several steps in a row."""


@dataclass(eq=False)
class Trainer:
    """Everything that changes while training. `wrapped` is the method, or DistributedDataParallel around it.

    Where the weights of a method are `sharded`, all processes ask for its state, and load it.
    """

    method: Method
    freezing: Freezing
    optimizer: Optimizer
    views: ViewsConfig
    precision: Precision
    accumulate: int
    seed: int
    device: torch.device
    sharded: bool = False

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.bad_steps, self.bad_at = 0, 0  # in a row until now; the number of the last one
        self.pending: tuple[Tensor, torch.cuda.Event | None, Progress] | None = None
        self.features: list[Tensor] = []  # of the last step, part by part
        self.wrapped = self._wrap()

    def _wrap(self, again: bool = False) -> nn.Module:
        """The method; on several processes one that averages the gradients of what learns now."""
        if distributed.world_size() == 1 or self.sharded:
            return self.method
        # Buffers are statistics, which methods reduce themselves. The option was renamed in torch 2.15.
        options = inspect.signature(DistributedDataParallel.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        # Once is enough: afterwards each process has statistics of its own, which must stay.
        settings: dict[str, Any] = {name: False, "init_sync": not again}
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.method, device_ids=ids, **settings)

    def step(self, progress: Progress, take: Callable[[], Canvases]) -> dict[str, Tensor | float | Averages]:
        """Train on `accumulate` batches; what to log of them, by name: of this process, but for what all
        have in common.
        """
        schedules = self.optimizer.schedule(progress)
        if self.freezing.apply(progress):
            del self.wrapped  # first, as it listens to the gradients that it was made for
            self.wrapped = self._wrap(again=True)
        losses: dict[str, Tensor] = {}
        logs: dict[str, Averages] = {}
        self.features = []
        for part in range(self.accumulate):
            canvases = take()
            streams = Streams(self.seed, progress.step * self.accumulate + part, distributed.rank())
            # Stochastic depth draws from the device's own generator.
            torch.manual_seed(streams("network").initial_seed())
            batch = make_views(canvases, self.views, self.method.backbone.config.patch_size, streams)
            last = part == self.accumulate - 1
            with nullcontext() if last else self._no_sync():
                with self._autocast():
                    output = _checked(self.wrapped(batch, progress))
                loss = torch.stack(list(output.losses.values())).sum() / self.accumulate
                self.scaler.scale(loss).backward()
            for name, value in output.losses.items():
                portion = value.detach() / self.accumulate
                losses[name] = losses[name] + portion if name in losses else portion
            logs = added(logs, output.logs)
            self.features += [] if output.features is None else [output.features.detach()]

        self.scaler.unscale_(self.optimizer.inner)
        norm = self.optimizer.clip()
        total = torch.stack(list(losses.values())).sum()
        # Gradients are the same on all ranks, so all ranks decide alike.
        finite = torch.isfinite(norm)
        after: dict[str, float] = {}
        # On a GPU the optimizer leaves a bad step out by itself, and the loop hears of it a step later: to
        # ask would mean to wait until the device has done all that it was told. The teacher of such a step
        # moves towards a student that stayed.
        if self.optimizer.skips_alone or bool(finite):
            self.optimizer.drop_frozen(progress)
            self.optimizer.step(self.scaler, finite)
            after = self.method.after_step(progress, schedules["lr"])
        self.scaler.update()
        self.optimizer.inner.zero_grad(set_to_none=True)
        before, self.pending = self.pending, _pending(finite, progress)
        self._count(before)
        if not self.optimizer.skips_alone:
            self.settle()
        named = {f"loss/{name}": value for name, value in losses.items()}
        return {"loss": total, **named, **schedules, **after, "grad_norm": norm, **logs}

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def _no_sync(self) -> AbstractContextManager:
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        if self.sharded:
            return local_gradients(self.method)
        return nullcontext()

    def diagnose(self) -> dict[str, float]:
        """Return the method's signals of collapse, and those of the features of the last step.

        All processes call it, and have all of them.
        """
        with seen_whole(self.method) if self.sharded else nullcontext():
            found = self.method.diagnose()
        if self.features:
            features = distributed.gather_rows(torch.cat(self.features))
            found["feature_spread"], found["effective_rank"] = spread_and_rank(features)
        return found

    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return the method's figures of the last step, on the main process."""
        if not (self.sharded or distributed.is_main()):
            return {}
        with seen_whole(self.method) if self.sharded else nullcontext():
            found = self.method.figures()
        return found if distributed.is_main() else {}

    def settle(self) -> None:
        """Count the last step among those whose gradients were finite or not; waits for it."""
        pending, self.pending = self.pending, None
        self._count(pending)

    def _count(self, pending: tuple[Tensor, torch.cuda.Event | None, Progress] | None) -> None:
        if pending is None:
            return
        finite, arrived, progress = pending
        if arrived is not None:
            arrived.synchronize()
        # With a loss scaler a step that overflows is ordinary: the scale halves until it does not.
        limit = 20 if self.scaler.is_enabled() else PATIENCE
        if bool(finite):
            self.bad_steps = 0
            return
        self.bad_steps, self.bad_at = self.bad_steps + 1, progress.step + 1
        if self.bad_steps >= limit:
            raise Diverged(
                f"gradients were not finite in {limit} steps in a row, up to step {self.bad_at}: "
                "try precision=bf16 or fp32, a lower optimizer.lr.value, or a longer optimizer.lr.warmup"
            )

    def state_dict(self) -> dict:
        """Return everything that a resumed run needs besides its configuration and step."""
        self.settle()
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "bad_steps": self.bad_steps,
        }

    def models(self) -> Callable[[tuple[str | int, ...]], Tensor | None]:
        """Return what tells, for a path in `state_dict`, a tensor that is cut as the one there is to be.

        It tells None where nothing is cut.
        """
        own = {name: value for name, value in self.method.state_dict().items() if is_cut(value)}
        parameters = self.optimizer.parameters() if self.sharded else []

        def model(where: tuple[str | int, ...]) -> Tensor | None:
            part, name = where[:2]
            if part == "method":
                return own.get(str(name))
            return parameters[int(name)] if part == "optimizer" and int(name) < len(parameters) else None

        return model

    def load_state_dict(self, state: dict) -> None:
        own = self.method.state_dict()
        self.method.load_state_dict(
            {
                name: cut_like(value, own[name]) if name in own else value
                for name, value in state["method"].items()
            }
        )
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.bad_steps, self.pending = state["bad_steps"], None


def _checked(output: Any) -> Output:
    """What a method gave, which may be one of a user's own. Raises UserError for what is no output."""
    if not isinstance(output, Output) or not output.losses:
        what = "no loss" if isinstance(output, Output) else kind_of(output)
        raise UserError(f"the forward of a method gives {what}: expected foveola.Output with a loss or more")
    for name, loss in output.losses.items():
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            shape = f" of {loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise UserError(
                f"the loss {name!r} of a method is {kind_of(loss)}{shape}: expected a tensor of floats "
                "without dimensions, such as a mean"
            )
    return output


def _pending(finite: Tensor, progress: Progress) -> tuple[Tensor, torch.cuda.Event | None, Progress]:
    """The answer of a step on its way to the CPU, and what tells that it is there (None: it is)."""
    if not finite.is_cuda:
        return finite, None, progress
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(finite, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return answer, arrived, progress
