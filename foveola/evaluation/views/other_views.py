"""The one pass of `label_free`: each image decoded once, encoded as it is and in other views."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from foveola import distributed
from foveola.config import key
from foveola.data.sample import Canvases
from foveola.data.sources import Source
from foveola.evaluation.features.table import check_finite, object_tokens
from foveola.evaluation.views.feature_space import Moments, rows_rankme
from foveola.evaluation.views.retrieval import (
    CanvasCut,
    OtherViewsConfig,
    Target,
    drawn_targets,
    two_views,
    views_config,
)
from foveola.models.encoder import Encoder
from foveola.views.batch import Streams, make_views


@dataclass(frozen=True)
class LabelFreeConfig(OtherViewsConfig):
    """Settings of `label_free`."""

    limit: int = key(1000, "use at most this many images, drawn by seed", at_least=2)
    objects: bool = key(True, "also find objects again in other crops, where the data have objects")
    duplicate: float = key(
        0.99, "cosine similarity from which two images count as duplicates", above=0, below=1
    )


# -- views --------------------------------------------------------------------------------------------------


def image_views(
    canvases: Canvases, encoder: Encoder, config: LabelFreeConfig, number: int
) -> Float[Tensor, "B 2 ch H W"]:
    """Return two crops in two colours of each image, as in pretraining without objects, normalised for
    `encoder`.

    They are a pure function of (seed, number of the parcel). A view of an object (`retrieval.two_views`) is
    the image's view where that holds the object.
    """
    views = views_config(encoder, config)
    moved = canvases.to(encoder.device)
    return make_views(moved, views, encoder.patch_size, Streams(config.seed, number)).large.pixels


class ViewFeatures(NamedTuple):
    """What the encoder says of n images, m of them with an object; float32 on the CPU."""

    image_indices: Int64[Tensor, "n"]
    features: Float32[Tensor, "n D"]  # of the evaluation view
    averages: Float32[Tensor, "n E"]  # of its patches
    within: Float64[Tensor, "n"]  # RankMe of its patches
    views: Float32[Tensor, "n 2 D"]
    owners: Int64[Tensor, "m"]  # the images of the objects
    objects: Float32[Tensor, "m 2 2 D"]  # (without mask, with mask) x two views

    def gathered(self) -> "ViewFeatures":
        """Return those of all processes."""
        return ViewFeatures(*(distributed.gather_rows(column) for column in self))


class Watcher:
    """Encodes parcels of images: evaluation view, two views, two views of the object."""

    def __init__(self, encoder: Encoder, source: Source, config: LabelFreeConfig) -> None:
        self.encoder, self.source, self.config = encoder, source, config
        self.with_objects = config.objects and source.has_objects
        self.patches = Moments(encoder.config.model.shape[0])

    def none(self) -> ViewFeatures:
        """Return nothing, in the right shapes."""
        width, numbers = self.encoder.width, torch.zeros(0, dtype=torch.int64)
        return ViewFeatures(
            image_indices=numbers,
            features=torch.zeros(0, width),
            averages=torch.zeros(0, self.encoder.config.model.shape[0]),
            within=torch.zeros(0, dtype=torch.float64),
            views=torch.zeros(0, 2, width),
            owners=numbers,
            objects=torch.zeros(0, 2, 2, width),
        )

    def __call__(self, canvases: Canvases, plain: Shaped[Tensor, "b ch S S"], number: int) -> ViewFeatures:
        """Everything about one parcel, the `number`-th of all."""
        views = image_views(canvases, self.encoder, self.config, number).flatten(0, 1)
        seen = self._plain(plain, canvases.indices)
        seen = seen._replace(views=self._tokens(views, None).unflatten(0, (len(plain), 2)))
        there = ~canvases.whole[:, 0]
        if not self.with_objects or not there.any():
            return seen
        views, masks = two_views(canvases, self.encoder, self.config, number)
        views, masks = views[there].flatten(0, 1), masks[there].flatten(0, 1)
        both = [self._tokens(views, readable).unflatten(0, (-1, 2)) for readable in (None, masks)]
        return seen._replace(owners=canvases.indices[there], objects=torch.stack(both, dim=1))

    @torch.inference_mode()
    def _plain(self, images: Shaped[Tensor, "b ch S S"], image_indices: Int64[Tensor, "b"]) -> ViewFeatures:
        encoder, size, parts = self.encoder.eval(), self.config.batch_size, []
        for block, shown in zip(images.split(size), image_indices.split(size), strict=True):
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                found = encoder(encoder.normalise(block.to(encoder.device)))
            patches = found.patches.float().cpu()
            check_finite(patches.flatten(1), shown, self.source)  # before sums and ranks of them
            self.patches.add(patches.flatten(0, 1))
            parts.append((found.objects[:, 0].float().cpu(), patches.mean(dim=1), rows_rankme(patches)))
        features, averages, within = (torch.cat(column) for column in zip(*parts, strict=True))
        return self.none()._replace(
            image_indices=image_indices, features=features, averages=averages, within=within
        )

    def _tokens(self, views: Tensor, masks: Tensor | None) -> Float32[Tensor, "b D"]:
        rows = torch.arange(len(views)).split(self.config.batch_size)
        parts = [
            object_tokens(
                self.encoder, views[at], None if masks is None else masks[at], self.config.precision
            )
            for at in rows
        ]
        return torch.cat(parts)


def watch(
    encoder: Encoder, source: Source, targets: Sequence[Target], config: LabelFreeConfig, progress: bool
) -> tuple[ViewFeatures, Moments, list[int]]:
    """Return the one pass over the images: what is seen, sums over all patches, and unreadable images."""
    cut = CanvasCut(config.canvas, config.mask_canvas, encoder.config.transform, plain=True)
    mine, batches = drawn_targets(source, targets, cut, config, progress)
    watcher = Watcher(encoder, source, config)
    seen = [watcher.none()]
    for index, drawn in batches.parcels():
        seen.append(watcher(drawn.canvases(), torch.stack(drawn.plain), mine[index]))
    joined = ViewFeatures(*(torch.cat(column) for column in zip(*seen, strict=True))).gathered()
    patches = reduce(Moments.plus, distributed.gather_objects(watcher.patches))
    return joined, patches, batches.gathered_bad().tolist()
