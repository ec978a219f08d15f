"""Same-object retrieval: is the other crop of an object, in other colours, found among those of others?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad

from foveola import distributed
from foveola.config import UserError, again, key
from foveola.data.identity import Identity, identity_of
from foveola.data.sample import BadImage, Canvases, Sample
from foveola.data.sources import Source, decode, why_bad
from foveola.evaluation.features.table import check_finite, mask_modes, object_tokens
from foveola.evaluation.images import Batches, Images, ReadingConfig, slice_of_rank
from foveola.evaluation.metrics import interval, partner_ranks, recall_at
from foveola.evaluation.paired import packed
from foveola.evaluation.protocol import At, Metric, Outcome, Protocol
from foveola.models.encoder import Encoder
from foveola.models.transform import TransformConfig, evaluation_view, resize
from foveola.views.batch import Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig

OBJECTS_TOGETHER = (
    32  # objects whose views are drawn together; a constant, so that no setting of speed changes a view
)


@dataclass(frozen=True)
class OtherViewsConfig(ReadingConfig):
    """Settings of two views of an image or of an object in it, and of reading them."""

    recall: int = key(5, "rank up to which `recall` counts", at_least=1)
    scale: tuple[float, float] = key(
        (0.25, 1.0), "fraction of the image's area that a view covers", above=0, at_most=1
    )
    min_visible: float = key(
        0.0, "fraction of the object that its view must hold; 0 = more than nothing", at_least=0, at_most=1
    )
    color: ColorConfig = key(ColorConfig(), "colours of the views; mean and std are the encoder's")
    batch_size: int = key(64, "views encoded at once", at_least=1)
    seed: int = key(
        0,
        "seed of the choice of images and objects, of crops and colours",
        at_least=0,
        at_most=2**64 - 1,
    )
    canvas: int = key(
        512,
        "pixels a side of the square that holds an image to cut views from; a longer side is shrunk to it",
        at_least=8,
    )
    pool: Literal["token", "average", "predictor"] | None = key(
        None, "what stands for an image or object: its token, or the mean of its patches or predictions"
    )
    mask_canvas: int = key(128, "pixels a side on which masks are drawn", at_least=1)
    min_coverage: float = again(ObjectsConfig, "min_coverage", ObjectsConfig.min_coverage)

    def __post_init__(self) -> None:
        if self.scale[0] > self.scale[1]:
            raise ValueError("scale: needs low <= high")


@dataclass(frozen=True)
class RetrievalConfig(OtherViewsConfig):
    """Settings of `retrieval`."""

    objects: int = key(1000, "objects to find, at most one an image while images last", at_least=2)
    masks: Literal["both"] | bool = key(
        "both",
        "object tokens read only their object's patches: true, false, both; discover, detect or segment: "
        "both, of the object that this finds in each image (docs/evaluation/encoding.md)",
    )
    min_area: float = key(
        0.0, "objects smaller than this fraction of their image are not used", at_least=0, below=1
    )


class Target(NamedTuple):
    """One object to find: its image in the source, and its number there (-1: the whole image)."""

    image: int
    object: int


def choose_targets(source: Source, count: int, min_area: float, seed: int) -> list[Target]:
    """Draw objects: one of each image in random order, then a second one of each, until there are `count`.

    An image without annotation is one object. Deterministic in `seed`; reads no pixel.
    """
    chosen: list[Target] = []
    left: list[tuple[int, list[int]]] = []
    for image in np.random.default_rng((seed, 0)).permutation(len(source)).tolist():
        try:
            objects = source[image].objects
        except BadImage:  # found again, and counted, where the image is read
            objects = None
        large = [-1] if objects is None else np.flatnonzero(objects.areas >= min_area).tolist()
        if len(large):
            order = np.random.default_rng((seed, 1, image)).permutation(large).tolist()
            chosen.append(Target(image, order[0]))
            left.append((image, order[1:]))
        if len(chosen) == count:
            return chosen
    while any(rest for _, rest in left):
        for image, rest in left:
            if rest:
                chosen.append(Target(image, rest.pop(0)))
            if len(chosen) == count:
                return chosen
    return chosen


def identity_of_targets(source: Source, targets: Sequence[Target]) -> Identity:
    """Return the identity of the images that hold these objects."""
    return identity_of(source, np.unique([target.image for target in targets]))


class Drawn(NamedTuple):
    """Targets, each drawn on a canvas of a size of its own, with the mask of its object."""

    indices: Int64[Tensor, "n"]
    images: tuple[Shaped[Tensor, "ch _ _"], ...]
    aspects: Float32[Tensor, "n"]  # width / height of the true images
    masks: UInt8[Tensor, "n s s"]
    whole: Bool[Tensor, "n"]  # whether the object is the whole image
    plain: tuple[Shaped[Tensor, "ch S S"], ...]  # their images as they are evaluated, where asked for

    def canvases(self) -> Canvases:
        """Return all of them as `Canvases` of one object each."""
        extents = torch.tensor([image.shape[1:] for image in self.images])
        high, wide = extents.amax(dim=0).tolist()
        unknown = torch.full((len(self.images),), -1)
        return Canvases(
            images=torch.stack(
                [pad(image, (0, wide - image.shape[2], 0, high - image.shape[1])) for image in self.images]
            ),
            extents=extents,
            aspects=self.aspects,
            object_masks=self.masks[:, None],
            whole=self.whole[:, None],
            object_labels=unknown[:, None],
            labels=unknown,
            indices=self.indices,
        )


class CanvasCut:
    """Draws a target on a canvas; with `plain` also its image as it is evaluated, decoded once for both."""

    def __init__(
        self, canvas: int, mask_canvas: int, transform: TransformConfig, plain: bool = False
    ) -> None:
        self.canvas, self.mask_canvas, self.transform, self.plain = canvas, mask_canvas, transform, plain

    def __call__(self, sample: Sample, index: int, number: int) -> Drawn:
        """Object `number` of an image (-1: the whole image). Raises BadImage."""
        image = decode(sample.image)
        height, width = (min(side, self.canvas) for side in image.shape[:2])
        whole = sample.objects is None or number < 0
        if sample.objects is None or number < 0:
            mask = torch.full((self.mask_canvas, self.mask_canvas), 255, dtype=torch.uint8)
        else:
            mask = torch.from_numpy(sample.objects.draw(number, self.mask_canvas))
        return Drawn(
            indices=torch.tensor([index]),
            images=(resize(image, height, width, self.transform.interpolation),),
            aspects=torch.tensor([image.shape[1] / image.shape[0]], dtype=torch.float32),
            masks=mask[None],
            whole=torch.tensor([whole]),
            plain=(evaluation_view(image, self.transform).pixels,) if self.plain else (),
        )


def drawn_targets(
    source: Source, targets: Sequence[Target], cut: CanvasCut, config: OtherViewsConfig, progress: bool
) -> tuple[range, Batches[Drawn]]:
    """Return this rank's part of the targets, in whole parcels, and the number of each parcel among all.

    Views are a pure function of a parcel and its number, so they are the same for any number of ranks.
    """
    every = range(-(-len(targets) // OBJECTS_TOGETHER))
    mine = every[slice_of_rank(len(every))]
    own = np.array(
        targets[mine.start * OBJECTS_TOGETHER : mine.stop * OBJECTS_TOGETHER], dtype=np.int64
    ).reshape(-1, 2)
    return mine, Batches(
        Images(source, own, cut, OBJECTS_TOGETHER), config, f"views of {source.name}", progress
    )


def views_config(encoder: Encoder, config: OtherViewsConfig) -> ViewsConfig:
    """Return two crops of the encoder's size in two colours, normalised for it."""
    transform = encoder.config.transform
    return ViewsConfig(
        global_size=transform.crop,
        global_count=2,
        global_scale=config.scale,
        local_count=0,
        color=replace(config.color, mean=transform.mean, std=transform.std),
    )


def two_views(
    canvases: Canvases, encoder: Encoder, config: OtherViewsConfig, number: int
) -> tuple[Float[Tensor, "B 2 ch H W"], Bool[Tensor, "B 2 N"]]:
    """Return two object-aware crops in two colours of each target, normalised for `encoder`, with their patch
    masks.

    `number` is the parcel's number among all of the evaluation: views are a pure function of (seed, number).
    """
    objects = ObjectsConfig(min_visible=config.min_visible, min_coverage=config.min_coverage)
    views = replace(views_config(encoder, config), objects=objects)
    streams = Streams(config.seed, number)
    made = make_views(canvases.to(encoder.device), views, encoder.patch_size, streams).large
    if made.objects is None:
        raise RuntimeError("object-aware views came without objects")
    return made.pixels, made.objects[:, :, 0]


class Retrieval(Protocol):
    """Ranks the other crop of each object among one crop of every object, from both sides.

    Numbers, in percent, for `plain` (class token of the view) and `masks` (object token): `rank1_*` with its
    95 % bootstrap interval over images (`_low`, `_high`), `recall5_*`; `chance_rank1` and `chance_recall5`.
    """

    name = "retrieval"
    title = "same-object retrieval"
    help = "find the other crop of an object among crops of other objects"
    Config = RetrievalConfig
    metrics = (
        Metric("rank1_*", "same-object retrieval rank-1 ({})", "higher", chance="chance_rank1", main=True),
        Metric("recall*_*", "same-object retrieval recall@{} ({})", "higher", chance="chance_recall{}"),
        Metric("chance_rank1", "same-object retrieval: chance rank-1"),
        Metric("chance_recall*", "same-object retrieval: chance recall{}"),
    )

    def measure(self, at: At, config: RetrievalConfig) -> Outcome:
        """Encode two views of each object, and rank one among those of all."""
        encoder, test = at.encoder.pooled(config.pool), at.test
        modes, notes = mask_modes(config.masks, None, test, encoder, None)
        targets = choose_targets(test, config.objects, config.min_area, config.seed)
        if len(targets) < 2:
            raise UserError(f"{test.name}: {len(targets)} objects to find, at least 2 are needed")
        began = perf_counter()
        features, image_indices, bad = _embed(encoder, test, targets, modes, config, at.progress)
        if len(bad) > 0.01 * len(targets):
            raise UserError(
                f"{test.name}: {len(bad)} of {len(targets)} images cannot be read, such as "
                + why_bad(test, bad[0])
            )
        count = len(image_indices)
        if count < config.objects:
            notes.append(f"{test.name} gives {count} objects instead of {config.objects}")
        k = min(config.recall, count)
        metrics, scores = {}, {}
        for index, masked in enumerate(modes):
            name = "masks" if masked else "plain"
            first, second = features[:, index, 0], features[:, index, 1]
            check_finite(features[:, index].flatten(0, 1), image_indices.repeat_interleave(2), test)
            ranks = torch.cat((partner_ranks(first, second), partner_ranks(second, first)))
            owners = image_indices.repeat(2)
            low, high = interval(ranks == 0, owners, seed=config.seed)
            scores |= {
                f"rank1_{name}": packed(ranks == 0, owners),
                f"recall{k}_{name}": packed(ranks < k, owners),
            }
            metrics |= {
                f"rank1_{name}": recall_at(ranks, 1),
                f"rank1_{name}_low": 100 * low,
                f"rank1_{name}_high": 100 * high,
                f"recall{k}_{name}": recall_at(ranks, k),
            }
        metrics |= {"chance_rank1": 100 / count, f"chance_recall{k}": 100 * k / count}
        facts: dict[str, Any] = {
            "name": test.name,
            "fingerprint": identity_of_targets(test, targets).digest,
            "objects": count,
            "images": len(image_indices.unique()),
            "unreadable": len(bad),
        }
        data = {"test": facts, "extract_seconds": round(perf_counter() - began, 2)}
        return Outcome(metrics, data, tuple(notes), scores=scores)


def _embed(
    encoder: Encoder,
    source: Source,
    targets: Sequence[Target],
    modes: Sequence[bool],
    config: RetrievalConfig,
    progress: bool,
) -> tuple[Float[Tensor, "n modes 2 D"], Int64[Tensor, "n"], list[int]]:
    """Features of both views of every target, their images, and the images that could not be read."""
    cut = CanvasCut(config.canvas, config.mask_canvas, encoder.config.transform)
    mine, batches = drawn_targets(source, targets, cut, config, progress)
    features = [torch.zeros(0, len(modes), 2, encoder.width)]
    image_indices = [torch.zeros(0, dtype=torch.int64)]
    for index, drawn in batches.parcels():
        canvases = drawn.canvases()
        views, masks = two_views(canvases, encoder, config, mine[index])
        views, masks = views.flatten(0, 1), masks.flatten(0, 1)
        tables = []
        for masked in modes:
            parts = [
                object_tokens(encoder, views[rows], masks[rows] if masked else None, config.precision)
                for rows in torch.arange(len(views)).split(config.batch_size)
            ]
            tables.append(torch.cat(parts).unflatten(0, (len(canvases), 2)))
        features.append(torch.stack(tables, dim=1))
        image_indices.append(canvases.indices)
    gathered = [distributed.gather_rows(torch.cat(parts)) for parts in (features, image_indices)]
    return gathered[0], gathered[1], batches.gathered_bad().tolist()
