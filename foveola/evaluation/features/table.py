"""Encoder x source -> rows of features: images or objects, with and without masks, in a fixed order."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from time import monotonic
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveola import distributed
from foveola.config import UserError
from foveola.data.identity import Identity, identity_of
from foveola.data.loader import begin_worker
from foveola.data.sample import BadImage
from foveola.data.segmentation import PixelSource
from foveola.data.sources import Source, decode
from foveola.evaluation.features.reading import PARCEL, ExtractConfig, Images, Rows, join
from foveola.models.encoder import Encoder

SAY_SECONDS = 60.0  # between two lines of progress where there is no terminal
MAX_BAD = 0.01  # share of unreadable images above which a number would not be what it says


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """R rows of features, on the CPU, in the order of the source (objects in the order of their image)."""

    features: Float32[Tensor, "R D"]
    labels: Int64[Tensor, "R"]  # -1: unknown
    image_indices: Int64[Tensor, "R"]  # index of the image in its source
    objects: Int64[Tensor, "R"]  # index of the object in its image; -1: the image, or all of its objects
    has_mask: Bool[Tensor, "R"]  # False: no annotation, or none of it visible, so the whole view is read
    readable: Float32[Tensor, "R"]  # share of the patches that the object token may read

    def select(self, rows: Tensor) -> "FeatureTable":
        """The rows given by a boolean mask or by indices."""
        return FeatureTable(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


# -- all images --------------------------------------------------------------------------------------------


def extract(
    encoder: Encoder,
    source: Source,
    *,
    masks: bool,
    config: ExtractConfig | None = None,
    progress: bool = True,
) -> FeatureTable:
    """Features of the rows of `source`: object tokens that read their object (`masks`), or class tokens."""
    tables, _ = extract_tables(encoder, source, (masks,), config or ExtractConfig(), progress=progress)
    return tables[0]


def extract_tables(
    encoder: Encoder, source: Source, masks: Sequence[bool], config: ExtractConfig, *, progress: bool = True
) -> tuple[tuple[FeatureTable, ...], dict[str, Any]]:
    """One table for each entry of `masks` from one reading of the images, and facts about the data.

    Every rank reads its share of the images and gets all rows. Memory is that of the tables, one batch, and
    what the workers hold ready. Each row is encoded on its own: an object's feature does not depend on its
    neighbours.

    Raises UserError when there is no row, when more than 1 % of the images cannot be read, and for features
    that are not finite.
    """
    encoder = encoder.pooled(config.pool)
    chosen = choose_images(len(source), config.limit, config.seed)
    dataset = Images(source, chosen[share(len(chosen))], encoder.config.transform, encoder.patch_size, config)
    features = [_Growing(len(dataset.chosen), encoder.width) for _ in masks]
    done, readable = [dataset.none()], [torch.zeros(0)]
    parcels = show(
        read_ahead(dataset, config.workers, config.batch_size),
        len(dataset),
        f"features of {source.name}",
        progress,
    )
    for batch in _batches(parcels, config.batch_size):
        for table, part in zip(features, _encode(encoder, batch, masks, config), strict=True):
            table.add(part)
        readable.append(batch.masks.float().mean(dim=1))
        done.append(batch.without_pixels())
    rows = join(done)._asdict()
    facts = facts_of_bad(distributed.gather_rows(rows["bad"]), len(chosen), source)
    columns = {
        name: distributed.gather_rows(rows[name])
        for name in ("labels", "image_indices", "objects", "has_mask")
    }
    columns["readable"] = distributed.gather_rows(torch.cat(readable))
    if not len(columns["labels"]):
        raise UserError(f"{source.name}: no {config.rows} in {len(chosen)} images")
    tables = tuple(FeatureTable(distributed.gather_rows(table.rows()), **columns) for table in features)
    for table in tables:
        check_finite(table.features, table.image_indices, source)
    facts |= {
        "rows": len(columns["labels"]),
        "rows_with_mask": int(columns["has_mask"].sum()),
        "rows_reading_everything": int((columns["readable"] == 1).sum()),
        "mean_readable": round(columns["readable"].double().mean().item(), 4),
    }
    return tables, {
        "name": source.name,
        "fingerprint": identity_of(source, chosen).digest,
        "images": len(chosen),
        **facts,
    }


class _Growing:
    """Rows appended to one block of memory: there is a second copy only while the block grows."""

    def __init__(self, expected: int, width: int) -> None:
        self.block, self.count = torch.empty(expected, width), 0

    def add(self, rows: Float32[Tensor, "n D"]) -> None:
        needed = self.count + len(rows)
        if needed > len(self.block):
            larger = torch.empty(max(needed, len(self.block) * 3 // 2), self.block.shape[1])
            larger[: self.count] = self.rows()
            self.block = larger
        self.block[self.count : needed] = rows
        self.count = needed

    def rows(self) -> Float32[Tensor, "n D"]:
        return self.block[: self.count]


def _batches(parcels: Iterator[Rows], size: int) -> Iterator[Rows]:
    """Parcels joined until they hold `size` rows: images with few rows wait for each other."""
    waiting: list[Rows] = []
    for parcel in parcels:
        waiting.append(parcel)
        if sum(len(part.labels) for part in waiting) >= size:
            yield join(waiting)
            waiting = []
    if waiting:
        yield join(waiting)


def _encode(
    encoder: Encoder, rows: Rows, masks: Sequence[bool], config: ExtractConfig
) -> list[Float32[Tensor, "R D"]]:
    every = torch.ones(len(rows.labels), dtype=torch.bool)
    plain = None
    if False in masks:  # the class token of an image is the same for all of its rows
        plain = _tokens_of(encoder, rows.images, None, config)[rows.image_of]
    masked = None
    if True in masks:
        # An object token that reads everything is the class token: where known, it is not computed again.
        new = every if plain is None else ~rows.masks.all(dim=1)
        masked = torch.zeros(len(every), encoder.width) if plain is None else plain.clone()
        masked[new] = _tokens_of(encoder, rows.images, rows.masks[new], config, rows.image_of[new])
    return [t for kind in masks if (t := masked if kind else plain) is not None]


def _tokens_of(
    encoder: Encoder,
    images: UInt8[Tensor, "V 3 S S2"],
    masks: Bool[Tensor, "R N"] | None,
    config: ExtractConfig,
    image_of: Int64[Tensor, "R"] | None = None,
) -> Float32[Tensor, "R D"]:
    """Object tokens (row r reads `masks[r]` of `images[image_of[r]]`); without masks, class tokens."""
    order = torch.arange(len(images)) if image_of is None else image_of
    parts = [torch.zeros(0, encoder.width)]
    for rows in torch.arange(len(order)).split(config.batch_size):
        pixels = encoder.normalise(images[order[rows]].to(encoder.device))
        parts.append(object_tokens(encoder, pixels, None if masks is None else masks[rows], config.precision))
    return torch.cat(parts)


@torch.inference_mode()
def object_tokens(
    encoder: Encoder, pixels: Float[Tensor, "B 3 H W"], masks: Bool[Tensor, "B N"] | None, precision: str
) -> Float32[Tensor, "B D"]:
    """One object token for each normalised image, float32 on the CPU; without masks the class token."""
    training = encoder.training
    encoder.eval()
    try:
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision == "bf16"):
            objects = None if masks is None else masks[:, None].to(encoder.device)
            return encoder.tokens(pixels.to(encoder.device), objects)[:, 0].float().cpu()
    finally:
        encoder.train(training)


# -- shares, order, trouble ----------------------------------------------------------------------------------


def choose_images(count: int, limit: int | None, seed: int) -> Int64[np.ndarray, "n"]:
    """All indices, or `limit` of them drawn without replacement by a generator of their own; ascending."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def identity_for(source: Source, config: Any) -> Identity:
    """The identity of the images that a protocol with these settings (`limit`, `seed`) reads of a source."""
    limit, seed = getattr(config, "limit", None), getattr(config, "seed", 0)
    return identity_of(source, choose_images(len(source), limit, seed))


def share(count: int) -> slice:
    """The contiguous share of this rank of `count` items: shares in rank order are the whole in order."""
    rank, world = distributed.rank(), distributed.world_size()
    return slice(rank * count // world, (rank + 1) * count // world)


def mask_kinds(masks: str | bool, train: Source | None, test: Source) -> tuple[tuple[bool, ...], list[str]]:
    """Which tables the setting `masks` asks for, plain first, given what the data can provide; and notes."""
    if masks is False:
        return (False,), []
    if not test.has_objects:
        if masks is True:
            raise UserError(f"masks=true, but {test.name} has neither boxes nor masks")
        return (False,), [f"{test.name} has neither boxes nor masks: whole images alone are read"]
    notes = []
    if train is not None and not train.has_objects:
        notes.append(f"{train.name} has neither boxes nor masks: its features are of whole images")
    return ((False, True) if masks == "both" else (True,)), notes


def read_ahead(dataset: Dataset, workers: int, batch_size: int = 0) -> Iterator[Any]:
    """Items of a dataset in order, made by worker processes. Leaves the global random state alone.

    The items are parcels of images, of which batches of `batch_size` are encoded: workers read two batches
    ahead, so that none of them stands idle while one is encoded.
    """
    workers = min(workers, len(dataset))  # type: ignore[arg-type]
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, -(-2 * batch_size // (PARCEL * workers))) if workers else None,
        collate_fn=_packed if workers else _as_is,
        worker_init_fn=begin_worker,
        generator=torch.Generator().manual_seed(0),
    )
    for item in loader:
        yield Rows(*map(_tensor, item)) if isinstance(item, list) else item


def _packed(item: Any) -> Any:
    """Rows with their small tensors as arrays: each tensor that leaves a worker costs a millisecond."""
    return [x.numpy() if x.nbytes < 2**20 else x for x in item] if isinstance(item, Rows) else item


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def _as_is(item: Any) -> Any:
    return item


def show(items: Any, total: int, label: str, progress: bool) -> Iterator[Any]:
    """Iterate with a progress bar on standard error; without a terminal, with a line there every minute."""
    if not progress or not distributed.is_main():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, label, total, console=console, transient=True)
        return
    began = said = monotonic()
    for done, item in enumerate(items):
        if monotonic() - said >= SAY_SECONDS:
            said = monotonic()
            print(f"{label}: {done} of {total} in {(said - began) / 60:.0f} min", file=sys.stderr, flush=True)
        yield item


def facts_of_bad(bad: Int64[Tensor, "b"], count: int, source: Source) -> dict[str, Any]:
    """Count and name images that could not be read; too many are an error."""
    names = [_name_of(source, int(index)) for index in bad[:10]]
    if len(bad) > MAX_BAD * count:
        raise UserError(
            f"{source.name}: {len(bad)} of {count} images cannot be read, such as "
            + why_bad(source, int(bad[0]))
        )
    return {"unreadable": len(bad), "unreadable_names": names}


def _name_of(source: Source, index: int) -> str:
    """The name of an image that cannot be read, perhaps not even asked for."""
    try:
        return source[index].name
    except BadImage as error:
        return str(error)


def why_bad(source: Any, index: int) -> str:
    """The name of an image that cannot be used, and the reason: of its file, or of what annotates it."""
    name = _name_of(source, index)
    try:
        decode(source[index].image)
        if isinstance(source, PixelSource):
            source.label_map(index)
    except BadImage as error:
        return str(error) if str(error).startswith(name) else f"{name} ({error})"
    return name


def check_finite(features: Float32[Tensor, "R D"], image_indices: Int64[Tensor, "R"], source: Source) -> None:
    """Raise UserError, naming an image, unless every feature is finite."""
    broken = ~torch.cat([part.isfinite().all(dim=1) for part in features.split(65536)])
    if broken.any():
        name = source[int(image_indices[broken][0])].name
        raise UserError(
            f"features of {int(broken.sum())} of {len(features)} rows of {source.name} are not finite "
            f"(first: {name}): is the encoder damaged, or its training diverged?"
        )
