"""What can be asked of each kind of image: the keys of `foveola visualize KIND`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foveola.config import again, key
from foveola.evaluation.features.table import ExtractConfig
from foveola.figures.maps import MASS
from foveola.figures.nearest import REFERENCE_LIMIT
from foveola.figures.tiles import MIN_COVERAGE, TILE_SIDE


@dataclass(frozen=True)
class SheetConfig:
    """How a sheet is drawn."""

    cell: int = key(TILE_SIDE, "pixels a side of a tile in the sheet", at_least=32)
    each: bool = key(False, "also write every tile as a file of its own, at full size")


@dataclass(frozen=True)
class ImagesConfig(SheetConfig):
    """Keys that say which images are drawn, and how large."""

    count: int = key(8, "how many images to show, evenly over the data", at_least=1)
    images: tuple[int, ...] | int | str | None = key(
        None, "indices of the images in the data instead, as in '0,5,9'"
    )
    size: int | None = key(
        None, "pixels of the longer side as encoded; null = twice that of the encoder's transform", at_least=8
    )


@dataclass(frozen=True)
class DenseFigureConfig(ImagesConfig):
    tile: int | None = key(
        None,
        "pixels a side of overlapping tiles to encode; 0 = all at once; null = tiles above 4096 patches",
        at_least=0,
    )


@dataclass(frozen=True)
class PcaConfig(DenseFigureConfig):
    joint: bool = key(False, "one basis for all images, so that a colour means the same in all of them")
    foreground: bool = key(False, "components of foreground patches alone; the others are black (DINOv2)")
    basis: Path | None = key(None, "file of an earlier save_basis=, to repeat its colours exactly")
    save_basis: Path | None = key(None, "file to write the basis to; needs joint=true")

    def __post_init__(self) -> None:
        if self.save_basis is not None and not self.joint:
            raise ValueError("save_basis needs joint=true: there is one basis for each image otherwise")
        if self.basis is not None and (self.joint or self.foreground or self.save_basis is not None):
            raise ValueError("basis= has its components already; leave out joint, foreground and save_basis")


@dataclass(frozen=True)
class ChannelsConfig(DenseFigureConfig):
    components: int = key(8, "channels: principal components, each drawn by itself", at_least=1, at_most=64)
    joint: bool = key(True, "one basis for all images, so that a channel means the same in all of them")


@dataclass(frozen=True)
class ScoresConfig(ImagesConfig):
    maps: tuple[str, ...] | None = key(
        None,
        "maps as in localisation: attention, lowest_entropy, centre, heads, abmilp, pca; null = "
        "all there are",
    )
    probe: str | None = key(
        None, "an AbMILP probe, RUN/results/abmilp/probe.safetensors, for the map abmilp and its box"
    )
    threshold: float = key(
        0.5, "threshold of a map, scaled to [0, 1]; the largest part above it has a box", at_least=0, below=1
    )
    block: int = key(-1, "block whose attention is drawn; negative numbers count from the last")


@dataclass(frozen=True)
class DictionaryConfig(DenseFigureConfig):
    components: int = key(6, "directions, each with a colour", at_least=1, at_most=10)
    alpha: float = key(1.0, "weight of the sum of absolute codes; more makes them sparser", at_least=0)
    joint: bool = key(False, "one dictionary for all images")


@dataclass(frozen=True)
class AttentionConfig(ImagesConfig):
    block: int = key(-1, "block whose attention is drawn; negative numbers count from the last")
    mass: float = key(MASS, "fraction of a head's attention in its coloured patches", above=0, at_most=1)
    heads: bool = key(False, "also a column for each head")
    min_coverage: float = key(
        MIN_COVERAGE,
        "fraction of a patch that makes it the object's: its token may read it",
        above=0,
        at_most=1,
    )


@dataclass(frozen=True)
class ObjectsFigureConfig(ImagesConfig):
    block: int = again(AttentionConfig, "block", -1)
    objects: int = key(3, "largest number of objects of an image; the largest are shown", at_least=1)
    min_coverage: float = again(AttentionConfig, "min_coverage", MIN_COVERAGE)


@dataclass(frozen=True)
class QueryConfig(ImagesConfig):
    points: Any = key("0.5,0.5", "x,y in the unit square; several: '0.2,0.3;0.5,0.5'")
    block: int = again(AttentionConfig, "block", -1)
    heads: bool = again(AttentionConfig, "heads", False)


@dataclass(frozen=True)
class SimilarityConfig(DenseFigureConfig):
    points: Any = key("0.5,0.5", "x,y in the unit square; several: '0.2,0.3;0.5,0.5'")


@dataclass(frozen=True)
class CorrespondenceConfig(DenseFigureConfig):
    """Images are taken in pairs; those not named are paired with the next one of their class."""

    cell: int = key(360, "pixels a side of a tile in the sheet", at_least=32)
    count: int = key(4, "pairs to show, evenly over the data", at_least=1)
    pairs: int = key(12, "pairs of patches in each", at_least=1)


@dataclass(frozen=True)
class PositionsConfig(SheetConfig):
    cell: int = key(TILE_SIDE * 3 // 2, "pixels a side of a tile in the sheet", at_least=32)
    some: int = key(5, "positions a side whose maps of cosines are drawn", at_least=1, at_most=12)


@dataclass(frozen=True)
class AnswersConfig(SheetConfig):
    cell: int = key(TILE_SIDE * 5 // 4, "pixels a side of a tile in the sheet", at_least=32)
    worst: int = key(4, "how many of the worst predictions to show", at_least=0)
    best: int = key(4, "how many of the best predictions to show", at_least=0)
    limit: int = key(200, "images among which they are looked for, evenly over the data", at_least=1)
    images: tuple[int, ...] | int | str | None = key(
        None, "indices of the images in the data instead, as in '0,5,9'"
    )

    def __post_init__(self) -> None:
        if not self.worst + self.best:
            raise ValueError("worst=0 and best=0 show nothing")


@dataclass(frozen=True)
class NeighboursConfig(ExtractConfig):
    count: int = key(8, "how many query images, evenly over the data", at_least=1)
    images: tuple[int, ...] | int | str | None = key(
        None, "indices of the images in the data instead, as in '0,5,9'"
    )
    found: int = key(5, "neighbours of each query", at_least=1)
    masks: Literal["both"] | bool = key("both", "object tokens that read the objects, class tokens, or both")
    limit: int | None = key(
        REFERENCE_LIMIT, "use at most this many images of train=, drawn by seed", at_least=1
    )
    cell: int = key(TILE_SIDE, "pixels a side of a tile in the sheet", at_least=32)
    each: bool = key(False, "also write every tile as a file of its own, at full size")
