"""Batches of canvases: decoded in workers, in an order given by (seed, epoch, position, rank) alone.

One item of the underlying DataLoader is one whole batch, named by its step. So the order does not depend on
the number of workers, any step can be computed alone, and resuming means to begin to count at another step.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from foveola.config import key
from foveola.data.ahead import (
    POLL_SECONDS,
    Asker,
    OutOfSharedMemory,
    begin_worker,
    check_room,
    read_ahead,
    room,
)
from foveola.data.annotated import (
    Annotations,
    Read,
    check_alike,
    check_annotated,
    class_table,
    stack_label_maps,
)
from foveola.data.chosen import ObjectRows
from foveola.data.decode import Scratch, decode, to_canvas
from foveola.data.decoding import channels_of, source_depth
from foveola.data.noise import NoiseConfig, check_noise, make_noisy
from foveola.data.order import order_of_rank
from foveola.data.sample import BadImage, Canvases, DataError, Instances, ObjectChoice, Objects, have_masks
from foveola.data.sources import Source, read_label_map
from foveola.failures import explain

OBJECTS, STAND_IN = 1, 2  # tell the random streams of one seed apart, and from that of the order
STAND_INS = 20  # images tried in place of a bad one
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before reading again, where nothing at all could be read
BEYOND_DOUBT = 4.0  # standard deviations: a run asks thousands of times whether too many are bad
MANY_INSTANCES = 100  # of an image, where shared memory is shared out; COCO's have 93 at most


@dataclass(frozen=True)
class LoaderConfig:
    """How images become batches of canvases."""

    canvas: int = key(
        512,
        "pixels a side of the square that holds an image; a longer side is shrunk to it",
        at_least=8,
        at_most=2**13,
    )
    mask_canvas: int = key(
        128,
        "pixels a side of the square that object masks are drawn on; an instance has one over its own box",
        at_least=8,
        at_most=2**13,
    )
    objects_per_image: int = key(1, "objects drawn from each image", at_least=1, at_most=1000)
    choose: ObjectChoice = key(
        "area", "how objects are drawn: with probability by area, uniformly, or the largest"
    )
    objects_noise: NoiseConfig | None = key(
        None, "objects are made wrong on purpose, to see what that costs; null = as they are annotated"
    )
    workers: int = key(2, "processes that decode; 0: in the training process", at_least=0, at_most=1000)
    prefetch: int = key(4, "batches that each worker prepares ahead", at_least=1, at_most=1000)
    max_bad: float = key(
        0.01,
        "fraction of unreadable images above which training stops (when the count leaves no doubt)",
        at_least=0,
        at_most=1,
    )
    start: Literal["auto", "fork", "forkserver", "spawn"] = key(
        "auto",
        "how workers start; auto: fork on Linux, where they share the file list; else as the system does",
    )

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        return {} if self.workers else dict.fromkeys(("prefetch", "start"), "workers=0")


class Loader:
    """Endless batches of a source, from `start_step` on. `batch_size` is that of one rank.

    `annotations` are what a task learns from: labels of images, label maps (uint8 classes), or instances. An
    image without any is an empty one: without instances, or all IGNORE.
    An epoch is `steps_per_epoch` batches of all ranks, in whole groups of `accumulate`, which train together;
    what does not fill the last group is left out (others each epoch). A bad image is replaced by another,
    counted in `bad_count` of `seen`, and named in `bad_names` (reason included); `judge` says whether there
    are too many. `wait_seconds` is how long the last batch kept the caller waiting. What happens to the
    reading is said through `asker`; iteration ends when it says stop while batches are waited for.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        config: LoaderConfig | None = None,
        *,
        with_objects: bool,
        annotations: Annotations | None = None,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start_step: int = 0,
        device: torch.device | str = "cpu",
        asker: Asker | None = None,
    ) -> None:
        check_annotated(source, annotations)
        config = LoaderConfig() if config is None else config
        if with_objects:
            check_noise(source, config.objects_noise)
        self.steps_per_epoch = accumulate * (len(source) // (accumulate * batch_size * world_size))
        if not self.steps_per_epoch:
            whole = accumulate * batch_size * world_size
            raise DataError(
                f"{source.name}: {len(source)} images do not fill one batch of {whole}"
                + (f" ({world_size} processes x {batch_size})" if world_size > 1 else "")
                + "; use a smaller batch size or more images"
            )
        self.source, self.config, self.device = source, config, torch.device(device)
        self.asker = asker or Asker()
        self.batch_size, self.start_step = batch_size, start_step
        self.batches = _Batches(source, batch_size, seed, config, with_objects, annotations, rank, world_size)
        self.batches.steps_per_epoch = self.steps_per_epoch
        self.bad_count, self.seen, self.bad_names, self.wait_seconds = 0, 0, set[str](), 0.0

    def __iter__(self) -> Generator[Canvases]:
        batches = read_ahead(self.batches, self.start_step, self._maker(), self.asker)
        try:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, DataError):
                    raise batch
                canvases, bad = batch
                if self.device.type != "cpu":
                    canvases = canvases.to(self.device)
                self.seen += len(canvases)
                self.bad_count += len(bad)
                self.bad_names.update(bad)
                self.wait_seconds = time.perf_counter() - began
                yield canvases
        finally:
            batches.close()

    def judge(self, bad: int, seen: int, different: int = 0) -> str:
        """Return why to stop, given `bad` of `seen` images of all ranks and `different` ones among them; or
        "".

        The fraction among all is above `max_bad` when more different images are bad than it allows, which is
        certain, or when the lower end of Wilson's interval of the fraction in those seen is above it.
        """
        limit = self.config.max_bad
        if different > limit * len(self.source):
            what = f"{different} of all {len(self.source)}"
        elif too_many(bad, seen, limit):
            what = f"{bad} of {seen}"
        else:
            return ""
        example = f"; such as {min(self.bad_names)}" if self.bad_names else ""
        return (
            f"{self.source.name}: {what} images cannot be read, "
            f"more than loader.max_bad={limit:g} allows{example}"
        )

    def _maker(self) -> Callable[[int, bool], DataLoader | None]:
        """What gives the DataLoader from a step on, with as many workers as shared memory has room for."""
        config = self.config
        size, workers, prefetch = self.batches.room_of(self.start_step, config.workers, config.prefetch)
        if (workers, prefetch) != (config.workers, config.prefetch):
            self.asker.say(
                f"/dev/shm has too little room for loader.workers={config.workers} x "
                f"loader.prefetch={config.prefetch} batches of {size / 2**20:.0f} MiB each: "
                f"{workers} x {prefetch} instead, which may be slower (docker run --shm-size=8g gives more)"
            )

        def make(step: int, careful: bool) -> DataLoader | None:
            return self._dataloader(step, workers, 1 if careful else prefetch) if workers else None

        return make

    def _dataloader(self, step: int, workers: int, prefetch: int) -> DataLoader:
        start = self.config.start
        if start == "auto" and sys.platform == "linux":
            start = "fork"
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=_Steps(step),
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            num_workers=workers,
            prefetch_factor=prefetch,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # workers are seeded from it; without one, from the global generator
            multiprocessing_context=None if start == "auto" else start,
            timeout=POLL_SECONDS,
        )


def too_many(bad: int, seen: int, allowed: float) -> bool:
    """Return whether the fraction of bad ones is above `allowed` beyond doubt: the lower end of Wilson's
    interval.
    """
    if not bad:
        return False
    fraction, z2 = bad / seen, BEYOND_DOUBT**2
    spread = math.sqrt(z2 * (fraction * (1 - fraction) + z2 / (4 * seen)) / seen)
    return (fraction + z2 / (2 * seen) - spread) / (1 + z2 / seen) > allowed


class _Steps(Sampler[int]):
    """A sampler that counts steps for ever."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


class _Batches(Dataset):
    """Step -> the batch of this rank, and the names of its bad images. Picklable, stateless.

    An error of the data or the machine is returned: raised in a worker, its message would be buried in a
    traceback.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        config: LoaderConfig,
        with_objects: bool,
        annotations: Annotations | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.source, self.batch_size, self.seed, self.config = source, batch_size, seed, config
        self.with_objects, self.rank, self.world_size = with_objects, rank, world_size
        self.label_maps, self.instances = annotations == "label_maps", annotations == "instances"
        self.classes = annotations == "classes"
        # Decided once, so that it depends on no batch and no rank.
        self.instance_mask = config.mask_canvas if self.instances and have_masks(source) else None
        self.steps_per_epoch = len(source) // (batch_size * world_size)

    def __getitem__(self, step: int) -> tuple[Canvases, list[str]] | DataError | OutOfSharedMemory:
        try:
            batch = self.batch(step)
            if get_worker_info() is not None:
                check_room(batch[0].nbytes)
            return batch
        except (DataError, OutOfSharedMemory) as error:
            return error
        except Exception as error:
            if (reason := explain(error)) is None:
                raise
            return DataError(f"{self.source.name} cannot be read: {reason}")

    def room_of(self, step: int, workers: int, prefetch: int) -> tuple[int, int, int]:
        """Bytes of a batch, and how many workers may prepare how many: `room` for the largest that may come.

        Where that does not fit, the batch of `step` tells how large they are.
        """
        config = self.config
        channels = channels_of(self.source) * source_depth(self.source) // 8
        pixels = (
            channels + self.label_maps
        ) * config.canvas**2 + config.objects_per_image * config.mask_canvas**2
        pixels += MANY_INSTANCES * (self.instance_mask or 0) ** 2
        size = self.batch_size * pixels
        if room(size, workers, prefetch) != (workers, prefetch):
            found = self[step]
            size = size if isinstance(found, Exception) else found[0].nbytes
        return size, *room(size, workers, prefetch)

    def batch(self, step: int) -> tuple[Canvases, list[str]]:
        """The canvases of one step."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        shape = self.steps_per_epoch, self.world_size, self.batch_size
        order = order_of_rank(self.seed, epoch, len(self.source), shape, self.rank)[step_of_epoch]

        B, canvas = self.batch_size, self.config.canvas
        # Channels last, as decoders give them.
        dtype = torch.uint16 if source_depth(self.source) == 16 else torch.uint8
        images = torch.zeros((B, canvas, canvas, channels_of(self.source)), dtype=dtype).permute(0, 3, 1, 2)
        extents = torch.empty((B, 2), dtype=torch.int64)
        aspects, labels = torch.empty(B), torch.full((B,), -1)
        objects = ObjectRows(B, self.config.objects_per_image, self.config.mask_canvas)
        indices = torch.from_numpy(order.copy())
        bad: list[str] = []
        maps, found, samples = [], [], []
        scratch = Scratch()
        for row in range(B):
            read = self._read(epoch, int(order[row]), scratch, bad)
            sample, pixels = read.sample, read.pixels
            samples.append(sample)
            maps.append(read.label_map)
            found.append((sample.objects, sample.crowds))
            image = to_canvas(pixels, canvas)
            extents[row] = torch.tensor(image.shape[1:])
            images[row, :, : image.shape[1], : image.shape[2]] = image
            aspects[row] = pixels.shape[1] / pixels.shape[0]
            indices[row] = read.index
            if sample.label is not None:
                labels[row] = sample.label
            if self.with_objects and (known := self._objects(read)) is not None:
                rng = np.random.default_rng([self.seed, OBJECTS, epoch, read.index])
                objects.fill(row, known, rng, self.config.choose)
        rows, columns = extents.amax(dim=0).tolist()  # what no image of the batch reaches is left out
        batch = Canvases(
            images[:, :, :rows, :columns].contiguous(memory_format=torch.channels_last),
            extents,
            aspects,
            objects.masks,
            objects.whole,
            objects.labels,
            labels,
            indices,
            chosen=objects.chosen,
            skipped=len(bad),
            label_maps=stack_label_maps(maps, extents.tolist()) if self.label_maps else None,
            instances=Instances.of(found, self.instance_mask) if self.instances else None,
            classes=class_table(samples, len(self.source.classes or ())) if self.classes else None,
        )
        return batch, bad

    def _objects(self, read: Read) -> Objects | None:
        noise = self.config.objects_noise
        if noise is None or not noise.active:
            return read.sample.objects
        return make_noisy(read.sample.objects, self.source, read.index, self.seed, noise)

    def _read(self, epoch: int, index: int, scratch: Scratch, bad: list[str]) -> Read:
        """An image, or its stand-in: drawn from (seed, epoch, index), so always the same.

        Where nothing can be read because the system says so (a disk or network that is away), all of it is
        tried again after a pause, so that what was away for a moment changes nothing.
        """
        failed: dict[str, bool] = {}  # name and reason -> whether it is the system's
        for pause in (*PAUSES, None):
            failed.clear()
            found = self._first_of(epoch, index, scratch, failed)
            of_system = any(failed.values())
            if found is not None and of_system and (itself := self._try(index, scratch, {})) is not None:
                return itself  # its disk came back while stand-ins were tried
            if found is not None:
                bad += failed
                return found
            if pause is None or not of_system:
                break
            time.sleep(pause)
        raise DataError(f"{self.source.name}: {STAND_INS} images cannot be read, such as {[*failed][-1]}")

    def _first_of(self, epoch: int, index: int, scratch: Scratch, failed: dict[str, bool]) -> Read | None:
        if (found := self._try(index, scratch, failed)) is not None:
            return found
        stand_ins = np.random.default_rng([self.seed, STAND_IN, epoch, index])
        for _ in range(STAND_INS):
            other = int(stand_ins.integers(len(self.source)))
            if (found := self._try(other, scratch, failed)) is not None:
                return found
        return None

    def _try(self, index: int, scratch: Scratch, failed: dict[str, bool]) -> Read | None:
        name = f"image {index}"
        try:
            sample = self.source[index]
            name = sample.name
            pixels = decode(sample.image, scratch)
            check_alike(self.source, pixels)
            labels = read_label_map(self.source, index, pixels.shape[:2]) if self.label_maps else None
            return Read(index, sample, pixels, labels)
        except (BadImage, OSError) as error:
            cause = error.__cause__ if isinstance(error, BadImage) else error
            failed[f"{name} ({error})"] = isinstance(cause, OSError) and cause.errno is not None
            return None


def _as_it_is(batch: Any) -> Any:
    return batch
