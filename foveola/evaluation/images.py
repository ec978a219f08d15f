"""The one reader of evaluations: which images are read, how, and what becomes of those that cannot be.

A protocol gives a source, the images chosen of it, and a cut, which makes of a sample what the protocol
encodes. `Images` applies it in worker processes; `Batches` joins what they send, counts the images that
cannot be read, and shows progress. The configurations are those from which the protocols' own inherit.

Most cuts make `ImageRows`: views, and the patch masks of what is read in them. A mask follows the image's own
geometry: a view is a box in the unit square of the image, and the object mask is resampled at that box.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveola import distributed
from foveola.config import UserError, again, key
from foveola.data.ahead import begin_worker
from foveola.data.decoding import channels_of, source_depth
from foveola.data.identity import Identity, identity_of
from foveola.data.sample import BadImage, DataError, Objects, Sample
from foveola.data.sources import Source, image_name, why_bad
from foveola.geometry import covered_patches
from foveola.geometry import sample as resample
from foveola.models.transform import Box, TransformConfig, View
from foveola.progress import show

PARCEL = 8  # images that travel together from a worker
MAX_BAD = 0.01  # fraction of unreadable images above which a number would not be what it says

T = TypeVar("T")


@dataclass(frozen=True)
class ReadingConfig:
    """How images are read and encoded."""

    batch_size: int = key(64, "images encoded at once", at_least=1)
    workers: int = key(2, "processes that read images; 0 = none besides this one", at_least=0)
    seed: int = key(0, "seed of every random choice", at_least=0, at_most=2**64 - 1)
    precision: Literal["fp32", "bf16"] = key(
        "fp32", "arithmetic of the encoder; features are float32 in any case"
    )


@dataclass(frozen=True)
class ChosenConfig(ReadingConfig):
    """The same, of a part of the images."""

    limit: int | None = key(
        None, "use at most this many images of each set, drawn by seed; null = all", at_least=1
    )


@dataclass(frozen=True)
class MaskedConfig(ChosenConfig):
    """The same, of images with the patch masks of their objects."""

    mask_canvas: int | None = key(
        None,
        "pixels a side on which masks are drawn; null = the encoder's resize, below 256 up to twice that",
        at_least=1,
    )
    min_coverage: float | None = key(
        None,
        "fraction of a patch that an object must cover for its token to read it; null = half a pixel",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True)
class SquashedConfig(ChosenConfig):
    """The same, of images squashed to squares, of which patches are kept."""

    image_size: int | None = key(
        None, "pixels a side to which images are squashed; null = the encoder's crop", at_least=8
    )
    limit: int | None = again(ChosenConfig, "limit", None, at_least=2)
    store: Literal["float32", "float16"] = key("float32", "number format of stored patch features")


# -- which images --------------------------------------------------------------------------------------------


def choose_images(count: int, limit: int | None, seed: int) -> Int64[np.ndarray, "n"]:
    """Return all indices, or `limit` of them drawn without replacement by a generator of their own;
    ascending.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def identity_for(source: Source, config: Any) -> Identity:
    """Return the identity of the images that a protocol with these settings (`limit`, `seed`) reads of a
    source.
    """
    limit, seed = getattr(config, "limit", None), getattr(config, "seed", 0)
    return identity_of(source, choose_images(len(source), limit, seed))


def slice_of_rank(count: int) -> slice:
    """Return the contiguous part of this rank of `count` items: parts in rank order are the whole in
    order.
    """
    rank, world = distributed.rank(), distributed.world_size()
    return slice(rank * count // world, (rank + 1) * count // world)


class Part:
    """The images `chosen` of a source, as a source of their own.

    Args:
        classes: whether their classes have names, those of the source.
    """

    def __init__(self, source: Source, chosen: Int64[np.ndarray, "n"], classes: bool = True) -> None:
        self.source, self.chosen = source, chosen
        self.name, self.has_objects = source.name, source.has_objects
        self.classes = source.classes if classes else None
        self.channels, self.depth = channels_of(source), source_depth(source)
        if hasattr(source, "reading"):
            self.reading = source.reading  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.chosen[index])]

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return the identity of these images, or of a part of them, in the source."""
        return identity_of(self.source, self.chosen if chosen is None else self.chosen[chosen])


# -- reading -------------------------------------------------------------------------------------------------


class Parcel(NamedTuple):
    """Some images as a worker makes them."""

    made: Any  # columns of what the cut makes of those that could be read; None for none
    bad: tuple[int, ...]  # indices of those that could not
    problem: str  # why the data cannot be used at all; empty where they can


class Images(Dataset):
    """Images of a source in parcels, each as a cut makes it, decoded once and answered in order.

    Args:
        chosen: indices in the source; or rows of numbers of which the first is the index. An array, or
            anything that has a length and gives an array for a slice.
        cut: gets a sample and its row of `chosen`. It gives a named tuple of columns (tensors, tuples, or
            dicts of them, with one entry for each row), or None for an image that takes no part. It raises
            BadImage for one that cannot be read, which is counted, and DataError for data that cannot be
            used. Workers get a copy of it, so it must be possible to pickle it.
        parcel: images that travel together from a worker.
    """

    def __init__(self, source: Any, chosen: Any, cut: Callable[..., Any], parcel: int = PARCEL) -> None:
        self.source, self.chosen, self.cut, self.parcel = source, chosen, cut, parcel

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.parcel)

    def __getitem__(self, number: int) -> Parcel:
        parts, bad = [], []
        for entry in self.chosen[number * self.parcel : (number + 1) * self.parcel]:
            index, *others = entry.reshape(-1).tolist()
            try:  # damaged annotations show when a sample is asked for
                made = self.cut(self.source[index], index, *others)
            except BadImage:
                bad.append(index)
            except DataError as error:  # which would lose its message on the way out of a worker
                return Parcel(None, tuple(bad), str(error))
            else:
                parts += [] if made is None else [made]
        return Parcel(join(parts) if parts else None, tuple(bad), "")


class Batches(Generic[T]):
    """Iterates over what the cut makes of images, joined to batches, in the order of the images.

    A batch has `config.batch_size` rows at least (those of the first column), but for the last one. `bad` are
    the images so far that could not be read, and `waited` the seconds in which they were waited for. Raises
    DataError for data that cannot be used.
    """

    def __init__(self, images: Images, config: ReadingConfig, label: str, progress: bool = True) -> None:
        self.images, self.config, self.label, self.progress = images, config, label, progress
        self.bad: list[int] = []
        self.waited = 0.0

    def __iter__(self) -> Iterator[T]:
        waiting: list[Any] = []
        for _, made in self.parcels():
            waiting.append(made)
            if sum(len(part[0]) for part in waiting) >= self.config.batch_size:
                yield join(waiting)
                waiting = []
        if waiting:
            yield join(waiting)

    def parcels(self) -> Iterator[tuple[int, T]]:
        """Yield the number of each parcel and what is made of it; none of one without a readable image."""
        ahead = read_parcels(self.images, self.config.workers, self.config.batch_size)
        shown = show(ahead, len(self.images), self.label, self.progress)
        began = perf_counter()
        for number, parcel in enumerate(shown):
            self.waited += perf_counter() - began
            if parcel.problem:
                raise DataError(parcel.problem)
            self.bad += parcel.bad
            if parcel.made is not None:
                yield number, parcel.made
            began = perf_counter()

    def gathered_bad(self) -> Int64[Tensor, "b"]:
        """Return the images of all processes that could not be read."""
        return distributed.gather_rows(torch.tensor(self.bad, dtype=torch.int64))


def join(parts: Sequence[Any]) -> Any:
    """Return several named tuples of columns, at least one, as one."""
    return type(parts[0])(*(_joined(column) for column in zip(*parts, strict=True)))


def _joined(column: Sequence[Any]) -> Any:
    if isinstance(column[0], dict):
        return {name: _joined([part[name] for part in column]) for name in column[0]}
    return torch.cat(list(column)) if isinstance(column[0], Tensor) else tuple(chain(*column))


def read_parcels(images: Images, workers: int, batch_size: int = 0) -> Iterator[Parcel]:
    """Yield parcels in order, made by worker processes. Leaves the global random state alone.

    Batches of `batch_size` are encoded: workers read two batches ahead, so that none of them stands idle
    while one is encoded.
    """
    workers = min(workers, len(images))
    loader = DataLoader(
        images,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * batch_size // (images.parcel * workers))) if workers else None,
        collate_fn=_packed if workers else _as_is,
        worker_init_fn=begin_worker,
        generator=torch.Generator().manual_seed(0),
    )
    for parcel in loader:
        yield _unpacked(parcel) if workers else parcel


class _Small(NamedTuple):
    """A small tensor on its way from a worker: as an array, as each tensor costs a millisecond."""

    array: np.ndarray


def _packed(item: Any) -> Any:
    if isinstance(item, Tensor):
        return _Small(item.numpy()) if item.nbytes < 2**20 else item
    return _each(item, _packed)


def _unpacked(item: Any) -> Any:
    return torch.from_numpy(item.array) if isinstance(item, _Small) else _each(item, _unpacked)


def _each(item: Any, change: Callable[[Any], Any]) -> Any:
    """A tree of tuples and dicts with every leaf changed."""
    if isinstance(item, dict):
        return {name: change(value) for name, value in item.items()}
    if isinstance(item, tuple):
        parts = [change(value) for value in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return item


def _as_is(item: Any) -> Any:
    return item


def facts_of_bad(bad: Int64[Tensor, "b"], count: int, source: Source) -> dict[str, Any]:
    """Count and name images that could not be read; too many are an error."""
    names = [image_name(source, int(index)) for index in bad[:10]]
    if len(bad) > MAX_BAD * count:
        raise UserError(
            f"{source.name}: {len(bad)} of {count} images cannot be read, such as "
            + why_bad(source, int(bad[0]))
        )
    return {"unreadable": len(bad), "unreadable_names": names}


# -- rows of images ------------------------------------------------------------------------------------------


class ImageRows(NamedTuple):
    """The rows of a batch of images, as a worker makes them: V views, R rows."""

    image_indices: Int64[Tensor, "R"]
    objects: Int64[Tensor, "R"]
    labels: Int64[Tensor, "R"]
    masks: Bool[Tensor, "R N"]  # the patches that its object token may read
    has_mask: Bool[Tensor, "R"]
    images: Shaped[Tensor, "V ch S S2"]
    rows: Int64[Tensor, "V"]  # how many rows see each view, one after the other
    maps: UInt8[Tensor, "V2 H W"] = torch.zeros(0, 0, 0, dtype=torch.uint8)  # classes of pixels, if asked for

    @property
    def image_of(self) -> Int64[Tensor, "R"]:
        """The view that a row sees."""
        return torch.arange(len(self.rows)).repeat_interleave(self.rows)


class PatchMasks:
    """The rule from the masks of objects to the patches that their token may read."""

    def __init__(self, transform: TransformConfig, patch_size: int, config: MaskedConfig) -> None:
        self.grid = (transform.crop // patch_size, transform.crop // patch_size)
        half = 0.5 / patch_size**2  # of a pixel
        self.min_coverage = half if config.min_coverage is None else config.min_coverage
        self.canvas = config.mask_canvas or max(transform.resize, min(2 * transform.resize, 256))

    def __call__(
        self, objects: Objects | None, target: tuple[int, ...], box: Box
    ) -> Bool[Tensor, "N"] | None:
        """Patches of a view that the objects `target` cover from `min_coverage` on, or None for no object.

        An object that covers less than that of every patch (a tiny one) keeps the patch that it covers most.
        """
        if objects is None or not target:
            return None
        canvas, near = np.zeros((self.canvas, self.canvas), np.uint8), np.zeros(self.grid, bool)
        for j in target:
            canvas = np.maximum(canvas, objects.draw(j, self.canvas))
            near |= touched(objects.boxes[j], box, self.grid)
        field = torch.from_numpy(canvas)[None, None].float() / 255
        coverage = resample(field, torch.tensor([[box]]), None, self.grid, kernel="area")[0, 0, 0]
        # A canvas cell on the edge of an object spreads it over the whole cell, perhaps into the next patch.
        coverage = torch.where(torch.from_numpy(near), coverage, 0.0)
        mask = covered_patches(coverage, self.min_coverage, keep_most=True)
        return mask if mask.any() else None


def rows_of(
    sample: Sample,
    index: int,
    views: list[View],
    masks: list[Bool[Tensor, "N"] | None],
    grid: tuple[int, int],
) -> ImageRows:
    """Return the rows of an image with its label: as many as `masks`, one for each view or all of the only
    view.
    """
    whole, count = torch.ones(grid[0] * grid[1], dtype=torch.bool), len(masks)
    return ImageRows(
        image_indices=torch.full((count,), index),
        objects=torch.full((count,), -1),
        labels=torch.full((count,), -1 if sample.label is None else sample.label),
        masks=torch.stack([whole if mask is None else mask for mask in masks]),
        has_mask=torch.tensor([mask is not None for mask in masks]),
        images=torch.stack([view.pixels for view in views]),
        rows=torch.full((len(views),), count // len(views)),
    )


def touched(inner: Float32[np.ndarray, "4"], outer: Box, grid: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Return which cells of a grid over the box `outer` the box `inner` overlaps."""
    x0, y0, x1, y1 = inner.tolist()
    rows = _overlapped((y0, y1), (outer[1], outer[3]), grid[0])
    return np.outer(rows, _overlapped((x0, x1), (outer[0], outer[2]), grid[1]))


def _overlapped(
    inner: tuple[float, float], outer: tuple[float, float], cells: int
) -> Bool[np.ndarray, "cells"]:
    edges = outer[0] + (outer[1] - outer[0]) * np.arange(cells + 1) / cells
    overlap = np.minimum(inner[1], edges[1:]) - np.maximum(inner[0], edges[:-1])
    return overlap > 1e-6  # touching is not overlapping
