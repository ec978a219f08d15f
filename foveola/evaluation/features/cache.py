"""One feature pass for several protocols, kept in memory-mapped files.

A `Feed` belongs to one encoder. Protocols say what they need of a source (`want`), and the first `open`
computes all of it from one reading of the images, or finds it on the disk. Probes train on its `batches`.
"""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from torch import Tensor

from foveola import distributed
from foveola.data.sources import Source
from foveola.evaluation.features.encoding import FeedConfig
from foveola.evaluation.features.names import EXTERNAL, FeatureReader, Need, check_kinds
from foveola.evaluation.features.passes import COLUMNS, READ, Pass
from foveola.evaluation.features.table import FeatureTable
from foveola.evaluation.images import choose_images, identity_for
from foveola.models.encoder import Encoder

__all__ = ["Columns", "Feed", "FeedConfig", "Need", "Order", "Store", "batches"]

FeatureBatch = tuple[Mapping[str, Tensor], Int64[Tensor, "b"]]
PRELOAD = 2**31  # bytes of features up to which they are kept on the device; beyond, read batch by batch

Where = tuple[str, FeedConfig, int, int | None, str | None, int | None, int | None]


class Store:
    """The features of one source: `take` reads rows, whole arrays are never in memory."""

    def __init__(
        self, folder: Path, chosen: Int64[np.ndarray, "n"], names: dict[str, str], facts: dict[str, Any]
    ) -> None:
        self.folder, self.chosen, self.names, self.facts = folder, chosen, names, facts
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names.values()}
        self.columns = {name: np.load(folder / f"{name}.npy") for name in COLUMNS}
        marks = [np.load(folder / f"{name}.done.npy") for name in names.values()]
        self.rows = torch.from_numpy(np.flatnonzero(np.all([mark == READ for mark in marks], axis=0)))

    def __len__(self) -> int:
        return len(self.rows)

    def take(
        self, kind: str, rows: Int64[Tensor, "b"] | slice = slice(None), view: int = 0, layers: int = 1
    ) -> Float32[Tensor, "b ..."]:
        """Return features of readable images: [b, layers, D] of tokens, [b, N, D] of patches, else [b, D].

        `view` 0 is the evaluation view, 1 and up are the random crops.
        """
        index = self.rows[rows].numpy()
        array = self.arrays[self.names[kind]]
        whole = len(index) == len(array) and len(index) > 0 and index[0] == 0
        block = array[:, view] if whole and bool((np.diff(index) == 1).all()) else array[index, view]
        if kind in ("token", "masked"):
            block = block[:, -layers:]
        return torch.from_numpy(np.ascontiguousarray(block).astype(np.float32))

    def maps(self, rows: Int64[Tensor, "b"]) -> UInt8[Tensor, "b S S"]:
        """Return label maps of readable images, of a store of squashed ones."""
        return torch.from_numpy(self.arrays[self.names["maps"]][self.rows[rows].numpy(), 0])

    def column(self, name: str) -> Shaped[Tensor, "n"]:
        """Return `labels` (-1: unknown), or with kind `masked` `has_mask`, `readable`, of the readable
        images.
        """
        return torch.from_numpy(self.columns[name])[self.rows]

    @property
    def image_indices(self) -> Int64[Tensor, "n"]:
        """Index of each readable image in its source."""
        return torch.from_numpy(self.chosen)[self.rows]

    def table(self, kind: str) -> FeatureTable:
        """Return one vector of an image, of tokens that of the last block, as the table that `extract`
        gives.
        """
        features, masked = self.take(kind), "masked" in self.names
        return FeatureTable(
            features=features[:, -1] if features.ndim == 3 else features,
            labels=self.column("labels"),
            image_indices=self.image_indices,
            objects=torch.full((len(self),), -1),
            has_mask=self.column("has_mask") if masked else torch.zeros(len(self), dtype=torch.bool),
            readable=self.column("readable") if masked else torch.ones(len(self)),
        )

    def sample_patches(self, count: int, seed: int) -> tuple[Float32[Tensor, "m D"], Int64[Tensor, "m"]]:
        """Return `count` patches (all, if there are no more) drawn by seed, and the row of each,
        ascending.
        """
        per = self.arrays[self.names["patches"]].shape[2]
        drawn = choose_images(len(self) * per, count, seed)
        rows, places = drawn // per, drawn % per
        block = self.arrays[self.names["patches"]][self.rows.numpy()[rows], 0, places]
        return torch.from_numpy(block.astype(np.float32)), torch.from_numpy(rows)


class Feed:
    """Stores of one encoder's features. Every rank makes the same calls. Close it, or use it in `with`.

    Args:
        folder: where stores are kept, a subfolder for each (encoder, data, settings); None: a temporary
            folder that ends with the feed. Several machines need one that all of them reach.
    """

    def __init__(self, encoder: Encoder, folder: str | Path | None = None, *, progress: bool = True) -> None:
        self.encoder, self.progress = encoder, progress
        self.temporary = folder is None
        if folder is None:
            folder = distributed.on_main(_temporary)
        self.folder = Path(str(folder)).expanduser()
        self.fingerprint = encoder.fingerprint()
        self.wanted: dict[Where, Need] = {}
        self.stores: dict[Where, Store] = {}

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove a temporary folder."""
        self.stores.clear()
        if self.temporary and distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def want(self, source: Source, config: Any, need: Need, views: int = 0) -> None:
        """Say before the first `open` what will be read, so that one pass gives all of it."""
        check_kinds(self.encoder, need.kinds, need.layers)
        where = where_of(source, config, need, views)
        self.wanted[where] = self.wanted[where] | need if where in self.wanted else need

    def open(self, source: Source, config: Any, need: Need, views: int = 0) -> Store:
        """Return the store with what is needed (and wanted so far), computed where it is missing.

        Raises UserError for features that the encoder has not, too little disk, unreadable images (more
        than 1 %), features that are not finite, and a damaged folder.
        """
        self.want(source, config, need, views)
        where = where_of(source, config, need, views)
        need = self.wanted[where]
        store = self.stores.get(where)
        names = self._names(need, config.precision)
        if store is None or not set(names.values()) <= set(store.names.values()):
            parts = (need, names, views, self.folder)
            config, progress = feeding(config), self.progress
            passing = Pass(self.encoder, self.fingerprint, source, config, *parts, progress=progress)
            facts = passing.run()
            store = self.stores[where] = Store(passing.folder, passing.chosen, names, facts)
        return store

    def _names(self, need: Need, precision: str) -> dict[str, str]:
        reader, names = FeatureReader(self.encoder, precision), {}
        for kind in sorted(need.kinds):
            if kind.startswith(EXTERNAL):
                names[kind] = "external-" + reader.other(kind).fingerprint()
            else:
                names[kind] = f"{kind}-{need.layers}" if kind in ("token", "masked") else kind
        return names


def _temporary() -> str:
    """A new temporary folder; those of processes of this machine that were killed are removed."""
    stem = f"foveola-features-{platform.node()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{stem}*"):
        process = left.name.removeprefix(stem).partition("-")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{stem}{os.getpid()}-")


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":
        return True  # asking there would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def where_of(source: Source, config: Any, need: Need, views: int = 0) -> Where:
    """Return what two protocols must have in common to read one store: data, settings, crops, and
    geometry.
    """
    return (
        identity_for(source, config).digest,
        replace(feeding(config), batch_size=1, workers=0),
        views,
        need.side,
        need.crops if views else None,
        need.size,
        need.block,
    )


def feeding(config: Any) -> FeedConfig:
    """Return the part of a protocol's settings that says how features are made; not how fast."""
    names = [field.name for field in fields(FeedConfig) if hasattr(config, field.name)]
    return FeedConfig(**{name: getattr(config, name) for name in names})


# -- stored features by batch --------------------------------------------------------------------------------


class Order:
    """Which of `rows` rows are in the batch of a step: a function of (seed, step) alone.

    Each epoch has a permutation of its own. Rows that fill no batch sit the epoch out.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed = rows, min(batch, rows), seed
        self.steps = per_epoch(rows, self.batch)
        self.epoch, self.permutation = -1, np.zeros(0, np.int64)

    def __call__(self, step: int) -> tuple[int, Int64[np.ndarray, "b"]]:
        """Return the epoch of a step, and its rows in ascending order, in which they are read faster."""
        epoch, place = divmod(step, self.steps)
        if epoch != self.epoch:
            self.epoch = epoch
            self.permutation = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return epoch, np.sort(self.permutation[place * self.batch : (place + 1) * self.batch])


def per_epoch(rows: int, batch: int) -> int:
    """Return whole batches of an epoch, at least one."""
    return max(1, rows // batch)


class Columns:
    """Kinds of features of some rows of a store, on the device if they are few enough, else read as asked."""

    def __init__(
        self, store: Store, rows: Int64[Tensor, "r"], wanted: Need, device: torch.device, views: int = 0
    ) -> None:
        self.store, self.rows, self.wanted, self.device = store, rows, wanted, device
        self.kept: dict[tuple[str, int], Tensor] = {}
        every = range(1, 1 + views) if views else (0,)
        size = sum(
            4 * len(rows) * store.take(kind, slice(1), layers=wanted.layers)[0].numel()
            for kind in wanted.kinds
        )
        if size * len(every) <= PRELOAD:
            for kind in wanted.kinds:
                for view in every:
                    self.kept[kind, view] = store.take(kind, rows, view, wanted.layers).to(device)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, at: Int64[Tensor, "b"], view: int = 0) -> dict[str, Float[Tensor, "b ..."]]:
        """Return features of the rows with the indices `at`."""
        if self.kept:
            there = at.to(self.device)
            return {kind: self.kept[kind, view][there] for kind in self.wanted.kinds}
        rows = self.rows[at]
        return {
            kind: self.store.take(kind, rows, view, self.wanted.layers).to(self.device)
            for kind in self.wanted.kinds
        }


def batches(
    columns: Columns, labels: Int64[Tensor, "r"], batch: int, steps: int, seed: int, views: int
) -> Iterator[FeatureBatch]:
    """Yield batches of stored features, in an `Order`; with crops, those of the epoch in turn."""
    labels, order = labels.to(columns.device), Order(len(columns), batch, seed)
    for step in range(steps):
        epoch, rows = order(step)
        at = torch.from_numpy(rows)
        yield columns.take(at, 1 + epoch % views if views else 0), labels[at.to(labels.device)]
