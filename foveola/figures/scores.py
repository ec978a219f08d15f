"""Score maps of the ways to average patches, with boxes around what they light up; feature channels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from foveola.config import UserError
from foveola.data.sample import Sample
from foveola.drawing.overlays import box_outlines, cool_to_warm, lit, magnify
from foveola.drawing.sheet import Row, Sheet
from foveola.evaluation.classification.abmilp import load_weights
from foveola.evaluation.localisation.box_accuracy import locate
from foveola.evaluation.localisation.score_maps import MapReader, choose_maps
from foveola.figures.pca import Maps, fit_basis
from foveola.figures.tiles import Encoders, as_encoded, encoders_by_name, head_of, images_of, shown_size
from foveola.models.encoder import Encoder
from foveola.models.transform import fit_to_patches

TRUTH, OF_TOKEN, OF_ABMILP = (40, 90, 255), (235, 40, 40), (30, 170, 60)  # as in Figure 8 of the paper
COLOURS = {"attention": OF_TOKEN, "abmilp": OF_ABMILP}
CHANNEL_RANGE = 2.3  # standard deviations at which colours end (CAPI)


def scores_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    *,
    maps: tuple[str, ...] | None = None,
    probe: str | None = None,
    threshold: float = 0.5,
    block: int = -1,
    size: int | None = None,
) -> Sheet:
    """Return images with boxes, and the score maps by which their patches are averaged.

    Selective Aggregation, Figures 8 and 9.

    Args:
        maps: as of the protocol `localisation`; None = `attention`, `lowest_entropy`, `centre` as far as
            there are some, and `abmilp` with a probe.
        probe: the file of an AbMILP probe, which an evaluation by `abmilp` wrote; of one of the encoders.
        threshold: the boxes hold the largest part of `attention` (red) and `abmilp` (green) that is above it,
            on the map's own scale from 0 to 1. Annotated boxes are blue.
    """
    names, images = encoders_by_name(encoders), images_of(samples)
    first = next(iter(names.values()))
    weights = _weights_of(names, probe, block)
    columns = ["image"]
    bases = [as_encoded(first, image, size) for image in images]
    boxes: list[list[tuple[Any, tuple[int, int, int]]]] = [
        [] if sample.objects is None else [(box, TRUTH) for box in sample.objects.boxes] for sample in samples
    ]
    tiles: list[list[np.ndarray]] = [[] for _ in images]
    for name, encoder in names.items():
        chosen = choose_maps(encoder, maps, train=name in weights)
        reader = MapReader(encoder, chosen, block, "fp32")
        reader.weights = weights.get(name)
        columns += [head_of(name, kind.replace("_", " ")) for kind in chosen]
        for number, image in enumerate(images):
            found = _maps(reader, encoder, image, shown_size(encoder, size))
            for kind, score in zip(chosen, found, strict=True):
                shown = (score - score.min()) / (score.max() - score.min()).clamp(min=1e-12)
                tiles[number].append(lit(bases[number], shown.numpy()))
                if kind in COLOURS and name == next(iter(names)):
                    boxes[number].append((locate(score, threshold), COLOURS[kind]))
    rows = [
        Row("", [box_outlines(base, own), *mine]) for base, own, mine in zip(bases, boxes, tiles, strict=True)
    ]
    note = (
        f"Boxes: annotated (blue), around attention (red) and AbMILP (green) above {threshold:g} of a map. "
        "Light: a map on its own scale."
    )
    return Sheet("What patches are averaged by", columns, rows, note)


def _weights_of(names: dict[str, Encoder], probe: str | None, block: int) -> dict[str, Any]:
    """AbMILP's weights by the name of the encoder that they belong to."""
    if probe is None:
        return {}
    if block != -1:
        raise UserError("block: AbMILP reads the last block; leave out block= or probe=")
    for name, encoder in names.items():
        try:
            return {name: load_weights(probe, encoder)}
        except UserError:
            if len(names) == 1:
                raise
    raise UserError(f"probe={probe} was trained on none of these encoders")


def _maps(reader: MapReader, encoder: Encoder, image: np.ndarray, size: int) -> Float[Tensor, "M h w"]:
    pixels = fit_to_patches(image, encoder.config.transform, encoder.patch_size, size)
    return reader(pixels[None])[0]


def channels_sheet(
    encoders: Encoders,
    samples: Sequence[Sample],
    *,
    size: int | None = None,
    components: int = 8,
    joint: bool = True,
    tile: int | None = None,
) -> Sheet:
    """Return images, and each of the first principal components of their patches by itself (CAPI, Figure 13).

    Components are whitened: colours run from -2.3 (blue) to 2.3 (red) standard deviations. With `joint` all
    images have one basis.
    """
    names, images = encoders_by_name(encoders), images_of(samples)
    first = next(iter(names.values()))
    tiles = [[as_encoded(first, image, size)] for image in images]
    columns = ["image"]
    for name, encoder in names.items():
        columns += [head_of(name, f"channel {number}") for number in range(1, 1 + components)]
        maps = Maps(encoder, images, shown_size(encoder, size), tile)
        basis = fit_basis(maps, components=components) if joint else None
        for mine, features in zip(tiles, maps(), strict=True):
            own = fit_basis(lambda f=features: (f,), components=components) if basis is None else basis
            shape = mine[0].shape[:2]
            for values in np.moveaxis(own.project(features), -1, 0):
                mine.append(magnify(cool_to_warm(values, -CHANNEL_RANGE, CHANNEL_RANGE), *shape))
    how = "one basis for all images" if joint else "a basis for each image"
    note = f"Principal components of the patch features, whitened, {how}; from -2.3 (blue) to 2.3 (red)."
    return Sheet("Feature channels", columns, [Row("", mine) for mine in tiles], note)
