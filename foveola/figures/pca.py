"""Patch features as colours: their first principal components become red, green and blue (CAPI, Figure 7)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64

from foveola import files
from foveola.config import UserError
from foveola.data.values import ImagePixels
from foveola.drawing.sheet import Pixels
from foveola.figures.dense import OVERLAP, patch_map
from foveola.models.encoder import Encoder

RANGE = 2.3  # standard deviations that span a colour (CAPI's code)
FLAT_VARIANCE = 1e-12  # of the mean square of features: a variance below it is rounding
TIE = 1e-6  # a skewness below it is none
HELD = 2**28  # numbers of features that are held in memory (1 GiB); of more, images are encoded again

Chunks = Callable[[], Iterable[Float[np.ndarray, "_ D"]]]


@dataclass(frozen=True, eq=False)
class Basis:
    """k principal components: a feature f becomes components (f - mean) / scale.

    `scale` is the standard deviation of each component, in falling order, so all of them come out with
    variance 1 on what they were fitted to. A component without variance is zero, with scale 1. With a
    `divider`, patches of which divider . f <= threshold are background.
    """

    mean: Float64[np.ndarray, "D"]
    components: Float64[np.ndarray, "k D"]
    scale: Float64[np.ndarray, "k"]
    divider: Float64[np.ndarray, "D"] | None = None
    threshold: float = 0.0

    @classmethod
    def fit(cls, features: Float[np.ndarray, "*S D"], components: int = 3) -> "Basis":
        """Return the components of largest variance, by eigenvectors of the float64 covariance.

        Their signs, which are arbitrary, are such that the projections have a skewness of at least 0 (CAPI);
        where it is 0 (within 1e-6), the largest entry of the component is positive.
        """
        rows = features.reshape(-1, features.shape[-1])
        return cls.fit_chunks(lambda: (rows,), components)

    @classmethod
    def fit_chunks(cls, chunks: Chunks, components: int = 3) -> "Basis":
        """Do as `fit`, with rows in chunks, which are asked for twice; memory is that of a chunk and D
        x D.
        """
        count, mean, scatter, square = _moments(chunks())
        if components > len(mean):
            raise UserError(f"{components} components of features of {len(mean)} numbers")
        values, vectors = torch.linalg.eigh(torch.from_numpy(scatter / max(count - 1, 1)))
        values = values.numpy()[::-1][:components]
        vectors = np.ascontiguousarray(vectors.numpy()[:, ::-1][:, :components].T)
        there = values > FLAT_VARIANCE * square
        scale = np.where(there, np.sqrt(np.where(there, values, 1.0)), 1.0)
        basis = cls(mean, np.where(there[:, None], vectors, 0.0), scale)
        second, third = np.zeros(components), np.zeros(components)
        for rows in chunks():
            projected = basis.project(rows)
            second += (projected**2).sum(axis=0)
            third += (projected**3).sum(axis=0)
        skewness = third / count / np.maximum(second / count, FLAT_VARIANCE) ** 1.5
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=1)[:, None], axis=1)[:, 0]
        sign = np.where(np.where(np.abs(skewness) > TIE, skewness, largest) < 0, -1.0, 1.0)
        return replace(basis, components=basis.components * sign[:, None] + 0.0)

    def project(self, features: Float[np.ndarray, "*S D"]) -> Float64[np.ndarray, "*S k"]:
        """Return components of features, in standard deviations of what the basis was fitted to."""
        if features.shape[-1] != len(self.mean):
            raise UserError(
                f"a basis for features of {len(self.mean)} numbers, but these have {features.shape[-1]}"
            )
        return (features.astype(np.float64) - self.mean) @ self.components.T / self.scale

    def foreground(self, features: Float[np.ndarray, "*S D"]) -> Bool[np.ndarray, "*S"]:
        """Return patches on the side of the divider that counts as foreground; all of them without a
        divider.
        """
        if self.divider is None:
            return np.ones(features.shape[:-1], dtype=bool)
        return features.astype(np.float64) @ self.divider > self.threshold

    def save(self, path: str | Path) -> Path:
        """Write a `.safetensors` file of float64 tensors; `load` gives the same basis bit by bit."""
        from safetensors.numpy import save_file

        path = Path(path)
        tensors = {"mean": self.mean, "components": self.components, "scale": self.scale}
        if self.divider is not None:
            tensors |= {"divider": self.divider, "threshold": np.array([self.threshold])}
        with files.whole(path) as part:
            save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, part)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Basis":
        """Read what `save` wrote. Raises UserError for other files."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
            divider = tensors.get("divider")
            threshold = 0.0 if divider is None else float(tensors["threshold"][0])
            return cls(tensors["mean"], tensors["components"], tensors["scale"], divider, threshold)
        except OSError as error:
            raise UserError(f"basis={path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError) as error:
            raise UserError(f"basis={path} is no basis that was saved by foveola: {error}") from error


def _moments(
    chunks: Iterable[Float[np.ndarray, "_ D"]],
) -> tuple[int, Float64[np.ndarray, "D"], Float64[np.ndarray, "D D"], float]:
    """Count, mean, scatter around it, and mean square per number, merged chunk by chunk (Chan et al.)."""
    count, mean, scatter, square = 0, np.zeros(0), np.zeros((0, 0)), 0.0
    for chunk in chunks:
        rows = chunk.astype(np.float64)
        if not len(rows):
            continue
        if not np.isfinite(rows).all():
            raise UserError("features are not finite: is the encoder damaged, or its training diverged?")
        if not count:
            mean, scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
        own = rows.mean(axis=0)
        centred, shift, total = rows - own, own - mean, count + len(rows)
        scatter += centred.T @ centred + np.outer(shift, shift) * (count * len(rows) / total)
        mean = mean + shift * (len(rows) / total)
        square += (rows**2).sum()
        count = total
    if not count:
        raise UserError("no features to find principal components of")
    return count, mean, scatter, float(square) / (count * len(mean))


def pca_rgb(features: Float[np.ndarray, "*S D"], basis: Basis) -> Float32[np.ndarray, "*S 3"]:
    """Return colours in [0, 1]: red, green and blue are the first three components from -2.3 to 2.3
    deviations.

    All components are divided by their own deviation, then by that of the first (which is then 1), and
    clip((x + 2.3) / 4.6, 0, 1) is the colour (CAPI's code). Background of a basis with a divider is black.
    """
    projected = basis.project(features)[..., :3]
    missing = 3 - projected.shape[-1]
    if missing:
        projected = np.pad(projected, [(0, 0)] * (projected.ndim - 1) + [(0, missing)])
    colors = ((projected + RANGE) / (2 * RANGE)).clip(0, 1)
    return np.where(basis.foreground(features)[..., None], colors, 0).astype(np.float32)


def fit_basis(
    maps: Callable[[], Iterable[Float[np.ndarray, "_ _ D"]]], foreground: bool = False, components: int = 3
) -> Basis:
    """Return a basis of all patches of maps, or of their foreground alone.

    Foreground as in DINOv2 (Figure 1): the patches on one side of zero of the first component of all; the
    components are then those of these patches. Which side: the one to which fewer of the patches along the
    borders of the images belong, in relation to the patches that do not lie there; of equals the smaller
    side. Where the first component does not divide the patches, all are foreground.
    """

    def rows() -> Iterable[Float[np.ndarray, "_ D"]]:
        return (features.reshape(-1, features.shape[-1]) for features in maps())

    basis = Basis.fit_chunks(rows, max(components, 1))
    if not foreground:
        return basis
    counts = np.zeros((2, 2))  # [inside, border] x [negative, positive]
    for features in maps():
        positive = basis.project(features)[..., 0] > 0
        edge = np.ones(positive.shape, dtype=bool)
        edge[1:-1, 1:-1] = False
        for where, patches in enumerate((positive[~edge], positive[edge])):
            counts[where] += (~patches).sum(), patches.sum()
    if not counts.sum(axis=0).all():
        return basis
    inside, border = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    lead = inside[1] - border[1]
    side = 1.0 if lead > 0 or (lead == 0 and counts[:, 1].sum() <= counts[:, 0].sum()) else -1.0
    divider = side * basis.components[0]
    marked = replace(basis, divider=divider, threshold=float(divider @ basis.mean))
    kept = Basis.fit_chunks(lambda: (f[marked.foreground(f)] for f in maps()), components)
    return replace(kept, divider=divider, threshold=marked.threshold)


def pca_images(
    encoder: Encoder,
    images: Sequence[ImagePixels],
    joint: bool = False,
    size: int | None = None,
    foreground: bool = False,
    basis: Basis | None = None,
    tile: int | None = None,
    overlap: float = OVERLAP,
) -> list[Pixels]:
    """Return each image as the colours of its patches, one pixel a patch.

    Args:
        joint: one basis for all images, so that a colour means the same in each of them; otherwise each
            has its own (CAPI, Figure 12).
        size, tile, overlap: of `patch_map`.
        foreground: find components of foreground patches alone, and leave the rest black (see `fit_basis`).
        basis: of an earlier call (`fit_basis`, `Basis.load`) instead of a new one.

    With `joint` the features of all images are held up to 1 GiB; of more, images are encoded again.
    """
    maps = Maps(encoder, images, size, tile, overlap)
    if basis is None and joint:
        basis = fit_basis(maps, foreground)
    drawn = []
    for features in maps():
        own = fit_basis(lambda f=features: (f,), foreground) if basis is None else basis
        drawn.append(np.rint(255 * pca_rgb(features, own)).astype(np.uint8))
    return drawn


class Maps:
    """The patch maps of images, as often as they are asked for; held in memory where they fit."""

    def __init__(
        self,
        encoder: Encoder,
        images: Sequence[ImagePixels],
        size: int | None = None,
        tile: int | None = None,
        overlap: float = OVERLAP,
    ) -> None:
        self.encoder, self.images = encoder, images
        self.settings = (size, tile, overlap)
        self.held: dict[int, Float32[np.ndarray, "_ _ D"]] = {}
        self.numbers = 0

    def __call__(self) -> Iterable[Float32[np.ndarray, "_ _ D"]]:
        for index, image in enumerate(self.images):
            features = self.held.get(index)
            if features is None:
                features = patch_map(self.encoder, image, *self.settings)
                if self.numbers + features.size <= HELD:
                    self.held[index] = features
                    self.numbers += features.size
            yield features
