"""Images to features: the views of an image, what an encoder makes of a batch, and a source batch by batch.

The views are the evaluation view, and random crops for augmented probes. What is computed here is stored by
`store`, or used at once by `stream` and by those who read everything once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.config import UserError
from foveola.data.sample import Sample
from foveola.data.sources import Source, decode
from foveola.evaluation.features.need import ATTENTION, EXTERNAL, FeedConfig, Need, check_features
from foveola.evaluation.images import Batches, ImageRows, Images, MaskedConfig, PatchMasks, rows_of
from foveola.evaluation.segmentation.labelled import LabelledCut
from foveola.models.encoder import Encoder
from foveola.models.transform import TransformConfig, crop_view, evaluation_view
from foveola.zoo.load import load

# -- views ---------------------------------------------------------------------------------------------------


class CropsCut:
    """Makes 1 + `views` rows of an image: the evaluation view, then random crops, half of them flipped.

    Called with numbers besides the index, it makes the rows of these alone: 0 is the evaluation view.

    A crop is a random-resized crop (area 0.08 to 1 of the image, ratio 3/4 to 4/3) resized to the encoder's
    crop by `interpolation` (None = as the encoder resizes). It depends on (seed, image, number of the crop)
    alone. Object masks follow crop and flip; where an object is not in the crop, its token reads everything.
    Without `masks` none are drawn, which is half of the work on small images.
    """

    def __init__(
        self,
        transform: TransformConfig,
        patch_size: int,
        config: MaskedConfig,
        views: int,
        masks: bool = True,
        interpolation: Literal["bicubic", "bilinear"] | None = None,
    ) -> None:
        self.transform, self.seed, self.views, self.masked = transform, config.seed, views, masks
        self.masks = PatchMasks(transform, patch_size, config)
        self.interpolation: Literal["bicubic", "bilinear"] | None = interpolation

    def __call__(self, sample: Sample, index: int, *numbers: int) -> ImageRows:
        """All rows of one image, or those of the given numbers. Raises BadImage."""
        image, objects = decode(sample.image), sample.objects if self.masked else None
        every = tuple(range(0 if objects is None else len(objects)))
        views, masks = [], []
        for number in numbers or range(1 + self.views):
            if not number:
                view, flipped = evaluation_view(image, self.transform), False
            else:
                rng = np.random.default_rng([self.seed, index, number])
                flipped = rng.random() < 0.5
                corners = random_crop(image.shape[0], image.shape[1], rng)
                view = crop_view(image, corners, self.transform, self.interpolation)
            mask = self.masks(objects, every, view.box)
            if flipped:
                view = view._replace(pixels=view.pixels.flip(-1))
                mask = None if mask is None else mask.view(self.masks.grid).flip(-1).flatten()
            views.append(view)
            masks.append(mask)
        return rows_of(sample, index, views, masks, self.masks.grid)


def random_crop(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Return whole pixels (x0, y0, x1, y1): area uniform, ratio log-uniform; after ten tries the largest.

    The distribution of torchvision's `RandomResizedCrop`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


# -- features of a batch -------------------------------------------------------------------------------------


class FeatureReader:
    """Computes the features of images; holds the other encoders that `external:` features need.

    Features are put on `device`; by default on the CPU.
    """

    def __init__(self, encoder: Encoder, precision: str, device: torch.device | str = "cpu") -> None:
        self.encoder, self.precision, self.device = encoder, precision, device
        self.others: dict[str, Encoder] = {}

    def other(self, feature: str) -> Encoder:
        """Return the encoder of an `external:` feature. Raises UserError for one that has no class
        token or no grid.
        """
        if feature not in self.others:
            encoder = load(feature.removeprefix(EXTERNAL), self.encoder.device)
            check_features(encoder, ("attention",), 1)
            self.others[feature] = encoder
        return self.others[feature]

    @torch.inference_mode()
    def __call__(
        self, images: Shaped[Tensor, "b ch S S"], masks: Bool[Tensor, "b N"], wanted: Need
    ) -> dict[str, Float32[Tensor, "b ..."]]:
        """Return the features that are wanted, float32; all but `masked` without regard to masks."""
        encoder, features = self.encoder.eval(), wanted.features
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            moved = images.to(encoder.device)
            pixels = encoder.normalise(moved)
            found: dict[str, Tensor] = {}
            later = 0 if wanted.block is None else encoder.config.model.shape[1] - 1 - wanted.block
            block = -1 if wanted.block is None else wanted.block
            attention = bool(features & set(ATTENTION))
            plain = encoder.capture(pixels, wanted.layers + later, attention=attention, block=block)
            layers = plain.layers[: wanted.layers]
            last = layers[-1]
            tokens = [layer.objects[:, 0] for layer in layers if layer.objects.shape[1]]
            if "masked" in features:
                plain_tokens = torch.stack(tokens, dim=1).float()
                found["masked"] = self._masked(pixels, masks, plain_tokens, wanted.layers, later)
            if "token" in features:
                found["token"] = torch.stack(tokens, dim=1)
            patches = last.patches.float()
            found |= {"average": encoder.backbone.fc_norm(patches.mean(dim=1)), "patches": patches}
            if "predictor" in features:
                found["predictor"] = encoder.predictions(last).float().mean(dim=1)
            count = patches.shape[1]
            if plain.attention is not None:
                if features & set(ATTENTION[:2]):
                    rows = plain.attention.objects()[:, :, 0, -count:]
                    found["attention"] = weigh(rows.mean(dim=1), patches)
                    found["lowest_entropy"] = weigh(lowest_entropy(rows), patches)
                found["centre"] = weigh(plain.attention.centre()[:, :, -count:].mean(dim=1), patches)
            for feature in (feature for feature in features if feature.startswith(EXTERNAL)):
                found[feature] = weigh(self._foreign(feature, moved, last.grid), patches)
        return {feature: found[feature].float().to(self.device) for feature in features}

    def _masked(self, pixels: Tensor, masks: Tensor, plain: Tensor, layers: int, later: int) -> Tensor:
        """Object tokens; one that reads everything is the class token, and not computed again."""
        new = ~masks.all(dim=1)
        tokens = plain.clone()
        if new.any():
            objects = masks[new][:, None].to(pixels.device)
            outputs = self.encoder.layers(pixels[new.to(pixels.device)], layers + later, objects)[:layers]
            tokens[new.to(tokens.device)] = torch.stack([o.objects[:, 0] for o in outputs], dim=1).float()
        return tokens

    def _foreign(self, feature: str, images: Tensor, grid: tuple[int, int]) -> Float[Tensor, "b N"]:
        other = self.other(feature).eval()
        other.check_side(images.shape[-1], "images", feature)
        seen = other.attention(other.normalise(images))
        rows, columns = seen.grid
        maps = seen.objects()[:, :, 0, seen.special :].mean(dim=1).view(-1, 1, rows, columns)
        if (rows, columns) != grid:
            maps = interpolate(maps, grid, mode="bilinear", antialias=True).clamp_(min=0)
        return maps.flatten(1)


def weigh(weights: Float[Tensor, "b N"], patches: Float[Tensor, "b N D"]) -> Float[Tensor, "b D"]:
    """Return patches averaged with the weights, which need not sum to one."""
    return torch.einsum("bn,bnd->bd", weights / weights.sum(dim=1, keepdim=True), patches)


def lowest_entropy(rows: Float[Tensor, "b heads N"]) -> Float[Tensor, "b N"]:
    """Return, of each image, the row of the head whose distribution over the patches has the lowest
    entropy.
    """
    probabilities = rows / rows.sum(dim=2, keepdim=True)
    best = torch.special.entr(probabilities).sum(dim=2).argmin(dim=1)
    return probabilities[torch.arange(len(probabilities), device=probabilities.device), best]


# -- a source, batch by batch --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features of p images, in `wide` views each, on the CPU."""

    image_indices: Int64[Tensor, "p"]  # index in the source
    features: dict[str, Tensor]  # by name [p, wide, ...]; `maps` are uint8, the others float32
    # `labels`; with `masked` features also `has_mask` and `readable` of the first view.
    columns: dict[str, Tensor]


class Encoding:
    """The images of a source in `1 + views` views, or squashed to `need.side`, encoded batch by batch.

    `seconds` says how long images were waited for, and how long they were encoded; `bad` are the images that
    could not be read.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: Any,
        config: FeedConfig,
        need: Need,
        views: int = 0,
        progress: bool = True,
    ) -> None:
        self.encoder, self.source, self.config, self.need = encoder, source, config, need
        self.views, self.progress = views, progress
        self.masked = "masked" in need.features  # otherwise no object mask is drawn
        self.bad: list[int] = []
        self.seconds = {"data_wait": 0.0, "encoder": 0.0}

    def batches(self, mine: Int64[np.ndarray, "t"]) -> Iterator[Encoded]:
        """Yield features of the images `mine`, in their order. Raises DataError for a label map of no use."""
        reader, training = FeatureReader(self.encoder, self.config.precision), self.encoder.training
        batches: Batches[ImageRows] = Batches(
            Images(self.source, mine, self._cut()),
            self.config,
            f"features of {self.source.name}",
            self.progress,
        )
        self.bad = batches.bad
        for rows in batches:
            self.seconds["data_wait"] = batches.waited
            began = perf_counter()
            images, masks, first = by_image(rows, self.views)
            features = self._encode(reader, images, masks)
            self.encoder.train(training)
            if "maps" in self.need.features:
                features["maps"] = rows.maps[:, None]
            self.seconds["encoder"] += perf_counter() - began
            columns = {"labels": rows.labels[first]}
            if self.masked:
                columns["has_mask"] = rows.has_mask[first]
                columns["readable"] = masks[:, 0].float().mean(dim=1)
            yield Encoded(rows.image_indices[first], features, columns)

    def _cut(self) -> CropsCut | LabelledCut:
        transform, patch = self.encoder.config.transform, self.encoder.patch_size
        if self.need.side is None:
            transform = transform.sized(self.need.size)
            return CropsCut(transform, patch, self.config, self.views, self.masked, self.need.crops)
        return LabelledCut(self.source, transform.squashed(self.need.side), patch)

    def _encode(self, reader: FeatureReader, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Features of p images in 1 + views views each, encoded `batch_size` at a time."""
        wanted = replace(self.need, features=self.need.features - {"maps"})
        flat, read = images.flatten(0, 1), masks.flatten(0, 1)
        size = self.config.batch_size
        parts = [reader(i, m, wanted) for i, m in zip(flat.split(size), read.split(size), strict=True)]
        joined = {feature: torch.cat([part[feature] for part in parts]) for feature in wanted.features}
        return {feature: x.unflatten(0, (len(images), 1 + self.views)) for feature, x in joined.items()}


def by_image(rows: ImageRows, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (images [p, 1 + views, ...], masks [p, 1 + views, N], first row of each of p images)."""
    wide = 1 + views
    count = len(rows.labels) // wide
    return (
        rows.images.view(count, wide, *rows.images.shape[1:]),
        rows.masks.view(count, wide, -1),
        torch.arange(count) * wide,
    )


def checked(x: Tensor, dtype: str, image_indices: Int64[Tensor, "p"], source: Source) -> Tensor:
    """Return features of p images as numbers of type `dtype`; label maps as they are.

    Raises UserError, naming an image, unless all are finite.
    """
    if not x.is_floating_point():
        return x
    stored = x.to(getattr(torch, dtype))
    broken = ~stored.flatten(1).isfinite().all(dim=1)
    if broken.any():
        name = source[int(image_indices[broken][0])].name
        large = " in float16 (store=float32 holds more)" if x.isfinite().all() else ""
        raise UserError(
            f"features of {int(broken.sum())} images of {source.name} are not finite{large} "
            f"(first: {name}): is the encoder damaged, or its training diverged?"
        )
    return stored
