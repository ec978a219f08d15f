"""The pass over images with label maps: patch features beside the labels of their pixels, batch by batch.

An image and its map are squashed to one square (antialiased; nearest), so that patch and labels cover the
same part of the image. What learns from patches keeps a bounded number of them (`collect`); what is measured
streams by, from the encoder or from a store that several protocols share.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, Int64, UInt8
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, again, key
from foveola.data.identity import identity_of
from foveola.data.segmentation import IGNORE, PixelSource
from foveola.evaluation.features.cache import Feed, feeding
from foveola.evaluation.features.encoding import Encoding, checked
from foveola.evaluation.features.need import Need
from foveola.evaluation.images import SquashedConfig, choose_images, facts_of_bad, slice_of_rank
from foveola.evaluation.protocol import At, Needs, Outcome, Protocol, Reading
from foveola.models.encoder import Encoder

ROWS = 16384  # patches whose labels are counted at a time


@dataclass(frozen=True)
class DenseConfig(SquashedConfig):
    """How images become patches."""

    batch_size: int = again(SquashedConfig, "batch_size", 16)


@dataclass(frozen=True)
class ComparedConfig(DenseConfig):
    """The same, and which pixels are compared with the truth."""

    evaluate_at: Literal["input", "image"] = key(
        "input", "pixels that are compared: of the squashed image (open-hummingbird), or of the original"
    )


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """Patches of a batch of images, on the CPU. N = h w patches of Q = p p pixels; S = h p."""

    features: Float32[Tensor, "b N D"]
    maps: UInt8[Tensor, "b S S"]  # classes, or IGNORE
    originals: tuple[UInt8[Tensor, "H W"], ...]  # maps in the image's own size, where asked for
    image_indices: Int64[Tensor, "b"]

    @property
    def truth(self) -> tuple[UInt8[Tensor, "H W"], ...]:
        """The maps with which predictions are compared: the originals, where they were asked for."""
        return self.originals or tuple(self.maps)


@dataclass(frozen=True, eq=False)
class PatchTable:
    """R patches, on the CPU: features, the classes of their Q pixels, the image each is from."""

    features: Float[Tensor, "R D"]
    pixels: UInt8[Tensor, "R Q"]
    image_indices: Int64[Tensor, "R"]

    def select(self, rows: Tensor) -> "PatchTable":
        """Return the rows given by a boolean mask or by indices."""
        return PatchTable(self.features[rows], self.pixels[rows], self.image_indices[rows])


# -- labels of patches ------------------------------------------------------------------------------------


def patch_pixels(maps: UInt8[Tensor, "b S S"], patch: int) -> UInt8[Tensor, "b N Q"]:
    """Return the pixels of each patch, patches and the pixels in each row by row."""
    b, side = maps.shape[:2]
    grid = side // patch
    return maps.reshape(b, grid, patch, grid, patch).transpose(2, 3).reshape(b, grid * grid, patch * patch)


def label_counts(pixels: UInt8[Tensor, "R Q"], classes: int) -> Int16[Tensor, "R {classes}+1"]:
    """Return how many pixels of each patch have each class; the last column: none."""
    counts = torch.zeros(len(pixels), classes + 1, dtype=torch.int16)
    one = torch.ones((), dtype=torch.int16)
    for into, part in zip(counts.split(ROWS), pixels.split(ROWS), strict=True):
        index = part.long().clamp_(max=classes)
        into.scatter_add_(1, index, one.expand(index.shape))
    return counts


def patch_modes(counts: Int16[Tensor, "R C1"]) -> Int64[Tensor, "R"]:
    """Return the most frequent label of each patch, the smallest of equals; C (one past the last class) for
    none.
    """
    return counts.argmax(dim=1)


def choose_rows(
    counts: Int16[Tensor, "N C1"], keep: int, how: Literal["rare", "uniform"], rng: np.random.Generator
) -> Int64[Tensor, "n"]:
    """`keep` patches of one image (all, if there are no more), ascending. Patches without a class never.

    "rare" (open-hummingbird): the smallest of U(0, 1) times the sum, over the classes in a patch, of how many
    patches of the image hold that class. So patches of one rare class are kept more often.
    """
    has = counts[:, :-1] > 0
    rows = torch.nonzero(has.any(dim=1)).flatten()
    if len(rows) <= keep:
        return rows
    scores = torch.from_numpy(rng.random(len(counts)))[rows]
    if how == "rare":
        scores = scores * (has.double() @ has.sum(dim=0).double())[rows]
    return rows[scores.argsort(stable=True)[:keep]].sort().values


# -- the pass ---------------------------------------------------------------------------------------------


def wanted_of(config: DenseConfig, encoder: Encoder) -> Need:
    """Return what of an image the dense protocols read. Raises UserError for a size that is no whole
    patches.
    """
    side = config.image_size or encoder.config.transform.crop
    encoder.check_side(side, "image_size")
    return Need(frozenset({"patches", "maps"}), side=side)


class DenseProtocol(Protocol):
    """What protocols of segmentation share: they learn from label maps, and read all patches once."""

    train = "needed"

    def measure(self, at: At, config: Any) -> Outcome:
        """Return the numbers. Raises UserError unless both sources have pixel labels of the same classes."""
        return self.segment(at, pixel_classes(at.train, at.test), config)

    @abstractmethod
    def segment(self, at: At, classes: tuple[str, ...], config: Any) -> Outcome:
        """Return what is measured on the label maps of `at.test` after learning from those of `at.train`."""

    def needs(self, config: Any, encoder: Encoder) -> Needs:
        """Return the need of patches and label maps of squashed images."""
        read = (Reading(wanted_of(config, encoder), once=True),)
        return Needs(read, read)


class DensePass:
    """Iterates over the batches of this rank's part of `chosen` images; then `facts` of what was read.

    With a `feed` patches and maps are read from its store, which it computes where they are missing; without,
    they are computed and forgotten, batch by batch. `chosen` are some of the images of `config.limit`.

    Raises UserError for features that are not finite, DataError for a map of another size than its image.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: PixelSource,
        config: DenseConfig,
        chosen: Int64[np.ndarray, "n"] | None = None,
        *,
        originals: bool = False,
        void: int = IGNORE,
        progress: bool = True,
        feed: Feed | None = None,
    ) -> None:
        self.need = wanted_of(config, encoder)
        self.side = self.need.side or 0
        self.grid = self.side // encoder.patch_size
        self.encoder, self.source, self.config = encoder, source, config
        self.progress, self.feed, self.originals = progress, feed, originals
        self.chosen = choose_images(len(source), config.limit, config.seed) if chosen is None else chosen
        self.mine = self.chosen[slice_of_rank(len(self.chosen))]
        self.void = void  # what pixels of no class become
        self.bad: list[int] = []  # of this rank's part
        self.spent: dict[str, Any] = {}  # what the store says about the pass

    def __iter__(self) -> Iterator[DenseBatch]:
        for patches, maps, image_indices in (
            self._computed() if self.feed is None else self._stored(self.feed)
        ):
            read = image_indices.tolist() if self.originals else []
            originals = tuple(torch.from_numpy(self.source.label_map(index)) for index in read)
            yield DenseBatch(patches, maps.masked_fill(maps == IGNORE, self.void), originals, image_indices)

    def _computed(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        encoding = Encoding(
            self.encoder, self.source, feeding(self.config), self.need, progress=self.progress
        )
        for found in encoding.batches(self.mine):
            patches = checked(found.features["patches"], self.config.store, found.image_indices, self.source)
            yield patches[:, 0].float(), found.features["maps"][:, 0], found.image_indices
        self.bad += encoding.bad

    def _stored(self, feed: Feed) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        store = feed.open(self.source, self.config, self.need)
        self.spent = {name: store.facts[name] for name in ("computed", "pass_seconds")}
        rows = torch.from_numpy(np.flatnonzero(np.isin(store.image_indices.numpy(), self.mine)))
        self.bad = np.setdiff1d(self.mine, store.image_indices.numpy()).tolist()
        for block in rows.split(self.config.batch_size):
            yield store.take("patches", block), store.maps(block), store.image_indices[block]

    @classmethod
    def compared(cls, at: At, config: ComparedConfig) -> "DensePass":
        """Return the pass over the test images, with the pixels that `evaluate_at` says."""
        originals = config.evaluate_at == "image"
        return cls(at.encoder, at.test, config, originals=originals, progress=at.progress, feed=at.feed)

    def facts(self) -> dict[str, Any]:
        """Return facts about the data, after the pass; every rank calls it. UserError for too many bad
        images.
        """
        bad = distributed.gather_rows(torch.tensor(self.bad, dtype=torch.int64))
        return {
            "name": self.source.name,
            "fingerprint": identity_of(self.source, self.chosen).digest,
            "images": len(self.chosen),
            "rows": (len(self.chosen) - len(bad)) * self.grid**2,
            **facts_of_bad(bad, len(self.chosen), self.source),
            **self.spent,
        }


def collect(
    passing: DensePass, classes: int, memory: int | None, how: Literal["rare", "uniform"], seed: int
) -> PatchTable:
    """Return patches that have a class, at most `memory` in all: the same number of each image, as
    `choose_rows`.

    Every rank gets all rows, in the order of the images. Which patches of an image are kept depends on
    seed and image alone. Raises UserError where no patch has a class.
    """
    every = passing.grid**2
    keep = every if memory is None else min(every, memory // max(1, len(passing.chosen)))
    if not keep:
        raise UserError(f"memory={memory} patches of {len(passing.chosen)} images: less than one of each")
    dtype = getattr(torch, passing.config.store)
    room = len(passing.mine) * keep
    features = torch.empty(room, passing.encoder.config.model.shape[0], dtype=dtype)
    pixels = torch.empty(room, passing.encoder.patch_size**2, dtype=torch.uint8)
    image_indices, count = torch.empty(room, dtype=torch.int64), 0
    for batch in passing:
        for x, labels, index in zip(
            batch.features,
            patch_pixels(batch.maps, passing.encoder.patch_size),
            batch.image_indices,
            strict=True,
        ):
            rng = np.random.default_rng([seed, int(index)])
            rows = choose_rows(label_counts(labels, classes), keep, how, rng)
            into = slice(count, count + len(rows))
            features[into], pixels[into], image_indices[into] = x[rows].to(dtype), labels[rows], index
            count += len(rows)
    gathered = (distributed.gather_rows(part[:count]) for part in (features, pixels, image_indices))
    table = PatchTable(*gathered)
    if not len(table.image_indices):
        raise UserError(f"{passing.source.name}: no patch of {len(passing.chosen)} images has a class")
    return table


def pixel_classes(train: Any, test: Any) -> tuple[str, ...]:
    """Return the classes of both sources. Raises UserError unless they label pixels with the same ones."""
    for which, source in (("train", train), ("test", test)):
        if not isinstance(source, PixelSource):
            raise UserError(
                f"{which}: {source.name} has no label for each pixel; use masks:, voc:, ade20k: and so on"
            )
    if train.classes != test.classes:
        both = f"{len(train.classes)} classes of {train.name} and {len(test.classes)} of {test.name}"
        raise UserError(f"train and test need the same classes in the same order, unlike {both}")
    return train.classes
