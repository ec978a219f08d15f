"""The built-in dataset: cluttered scenes of real product photos, with exact masks, classes and identities.

A scene is a textured background with a few products of Fashion-MNIST on it: tinted, scaled, mirrored,
overlapping and partly outside the image. It is a function of (seed, split, index) alone. Colours, positions,
sizes and backgrounds are drawn without a look at the class, so that only the shape and texture of a product
tell what it is. Products of the test split never appear in the training split.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from foveola.data.identity import HASH, Identity, hash_of
from foveola.data.sample import IGNORE, DataError, Objects, Sample

CLASSES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
VERSION = 1  # of the drawing: raise it with any change that changes a pixel
STOCK = 28  # pixels a side of a product photo
SCALES = (0.35, 0.8)  # side of a product's frame in the image's; products fill 10 % to 95 % of their frame
OUTSIDE = 0.2  # at most this fraction of a product's width and height lies outside the image
MIN_VISIBLE = 0.25  # an object of which less is seen is not placed; fraction of its whole silhouette
MIN_PIXELS = 8
MOST_SCENES = 100_000_000  # scenes: an epoch draws an order of all
SHADOW = 0.5  # of the light that a shadow takes away, at most
PLACEMENT_TRIES = 8  # positions tried at one size before the product is made smaller
SHRINKS = 5

Colour = Float32[np.ndarray, "3"]
Plane = Float32[np.ndarray, "S S"]


@dataclass(frozen=True, eq=False)
class Stock:
    """Product photos of a split: grey 1..255 inside, 0 outside; `rows` are those of the official file."""

    images: UInt8[np.ndarray, "N 28 28"]
    labels: UInt8[np.ndarray, "N"]
    rows: np.ndarray
    frames: Int64[np.ndarray, "N 4"]  # y0, y1, x0, x1: the smallest frame around the silhouette
    digest: str


@dataclass(frozen=True, eq=False)
class Placed:
    """A product at (top, left), perhaps partly outside the image; grey is multiplied by opacity."""

    item: int
    top: int
    left: int
    grey: Float32[np.ndarray, "h w"]
    opacity: Float32[np.ndarray, "h w"]


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything about one scene. `items` are the products shown, as positions in the stock of the split.

    `owner` is -1 on the background and k where object k is the topmost that covers at least half of the
    pixel.
    """

    image: UInt8[np.ndarray, "S S 3"]
    objects: Objects
    items: Int64[np.ndarray, "K"]
    owner: Int64[np.ndarray, "S S"]


@lru_cache(maxsize=2)
def load_stock(split: Literal["train", "test"]) -> Stock:
    """Read the product photos of a split from the package."""
    path = Path(__file__).with_name("fashion") / f"{split}.npz"
    with np.load(path) as file:
        images, labels, rows = file["images"], file["labels"], file["rows"]
    filled = images > 0
    tall, wide = filled.any(2), filled.any(1)
    frames = [
        tall.argmax(1),
        STOCK - tall[:, ::-1].argmax(1),
        wide.argmax(1),
        STOCK - wide[:, ::-1].argmax(1),
    ]
    digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    return Stock(images, labels, rows, np.stack(frames, 1).astype(np.int64), digest)


class Scenes:
    """`scenes:?size=64&count=20000&seed=0&objects=2-5`: `count` scenes of `size` pixels a side.

    Scene labels are the class of the object of which most is seen.
    """

    has_objects = True
    classes: tuple[str, ...] = CLASSES

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        size: int = 64,
        count: int = 20000,
        seed: int = 0,
        objects: tuple[int, int] = (2, 5),
    ) -> None:
        if not 32 <= size <= 1024:
            raise DataError(f"scenes: size={size} must be from 32 to 1024 pixels")
        if not 1 <= objects[0] <= objects[1] <= 9:
            raise DataError(
                f"scenes: objects={objects[0]}-{objects[1]} must be a range within 1-9, such as 2-5"
            )
        if not 1 <= count <= MOST_SCENES or seed < 0:
            raise DataError(
                f"scenes: count={count} must be from 1 to {MOST_SCENES} and seed={seed} at least 0"
            )
        self.split, self.size, self.count, self.seed, self.objects = split, size, count, seed, objects
        self.name = (
            f"scenes:?size={size}&count={count}&seed={seed}&objects={objects[0]}-{objects[1]}&split={split}"
        )

    @property
    def stock(self) -> Stock:
        """The products that these scenes draw from; not kept, so that a source is cheap to hand around."""
        return load_stock(self.split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        labels = scene.objects.labels
        assert labels is not None
        label = int(labels[scene.objects.areas.argmax()])
        return Sample(scene.image, self._image_name(index), scene.objects, label)

    def image_names(self) -> list[str]:
        """Return what the scenes are called, in order."""
        return [self._image_name(index) for index in range(self.count)]

    def _image_name(self, index: int) -> str:
        return f"scenes/{self.split}/{index}"

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return the identity of scenes, which are what their parameters say: one of the same parameters and
        index is the same image.
        """
        own = f"{VERSION} {self.stock.digest} {self.split} {self.size} {self.seed} {self.objects}"
        indices = range(self.count) if chosen is None else chosen.tolist()
        return Identity.of(np.array([hash_of(f"scene {own} {i}".encode()) for i in indices], HASH), own)

    def scene(self, index: int) -> Scene:
        """Draw one scene."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, 0 if self.split == "train" else 1, index])
        canvas = background(rng, self.size)
        wanted = int(rng.integers(self.objects[0], self.objects[1] + 1))
        placed, owner = self._arrange(rng, wanted)
        tints = zip(_colours(rng, len(placed), low=0.45), _colours(rng, len(placed), high=0.45), strict=True)
        for thing, (light, dark) in zip(placed, tints, strict=True):
            _paint(rng, canvas, thing, light, dark)
        canvas *= _lighting(rng, self.size)
        canvas += np.float32(rng.uniform(0, 0.03)) * rng.standard_normal(canvas.shape, np.float32)
        image = (canvas * 255 + 0.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        items = np.array([thing.item for thing in placed])
        masks = [owner == k for k in range(len(placed))]
        objects = Objects(
            boxes=np.stack([_box(mask) for mask in masks]),
            areas=np.array([mask.mean() for mask in masks], np.float32),
            labels=self.stock.labels[items].astype(np.int64),
            masks=tuple(masks),
        )
        return Scene(image, objects, items, owner)

    def _arrange(
        self, rng: np.random.Generator, wanted: int
    ) -> tuple[list[Placed], Int64[np.ndarray, "S S"]]:
        """Place products on each other, back to front, so that enough of each is seen in the end.

        A position that hides too much of an earlier product is drawn again; after `PLACEMENT_TRIES` the
        product gets smaller, and one that never fits is left out (the first always fits). No product appears
        twice in one scene.
        """
        stock = self.stock
        owner = np.full((self.size, self.size), -1)
        placed: list[Placed] = []
        seen: list[int] = []  # pixels of each product that are visible, and the least that have to be
        least: list[float] = []
        for item in rng.choice(len(stock.images), wanted, replace=False):
            scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** rng.random()
            mirrored = bool(rng.random() < 0.5)
            spots = rng.random((SHRINKS, PLACEMENT_TRIES, 2))
            for shrink in range(SHRINKS):
                grey, opacity = _resize(stock, int(item), scale * self.size * 0.85**shrink, mirrored)
                solid = opacity >= 0.5
                needed = [*least, max(MIN_VISIBLE * np.count_nonzero(solid), MIN_PIXELS)]
                for spot in spots[shrink]:
                    top, left = (_start(self.size, n, at) for n, at in zip(solid.shape, spot, strict=True))
                    window, inside = _window(self.size, top, left, solid.shape)
                    under = owner[window][solid[inside]]
                    hidden = np.bincount(under + 1, minlength=len(placed) + 1)[1:]
                    left_over = [*(n - m for n, m in zip(seen, hidden, strict=True)), len(under)]
                    if all(n >= m for n, m in zip(left_over, needed, strict=True)):
                        break
                else:
                    continue
                owner[window][solid[inside]] = len(placed)
                placed.append(Placed(int(item), top, left, grey, opacity))
                seen, least = left_over, needed
                break
        return placed, owner


class PixelScenes(Scenes):
    """Scenes with a class for every pixel: `scenes:?background=class` and `background=ignore`.

    The background is the class 0, before those of the products, or it has none (IGNORE).
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        split: Literal["train", "test"] = "train",
        background: Literal["class", "ignore"] = "class",
        **options: Any,
    ) -> None:
        super().__init__(split, **options)
        self.first = 1 if background == "class" else 0  # class of the first kind of products
        self.classes = ("background", *CLASSES) if self.first else CLASSES
        self.name += f"&background={background}"

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        assert sample.objects is not None
        assert sample.objects.labels is not None
        assert sample.label is not None
        objects = replace(sample.objects, labels=sample.objects.labels + self.first)
        return replace(sample, objects=objects, label=sample.label + self.first)

    def label_map(self, index: int) -> UInt8[np.ndarray, "S S"]:
        """Return the class of the topmost product that covers at least half of each pixel."""
        scene = self.scene(index)
        assert scene.objects.labels is not None
        background = 0 if self.first else IGNORE
        return np.append(scene.objects.labels + self.first, background).astype(np.uint8)[scene.owner]

    def identity(self, chosen: Int64[np.ndarray, "n"] | None = None) -> Identity:
        """Return the identity of the scenes, and of what their pixels are called."""
        plain = super().identity(chosen)
        return Identity.of(plain.contents, plain.digest, self.classes)


def open_scenes(split: Literal["train", "test"], background: str | None = None, **options: Any) -> Scenes:
    """Return scenes; with a class for every pixel where `background` says what that is: class, ignore."""
    if background is None:
        return Scenes(split, **options)
    return PixelScenes(split, "class" if background == "class" else "ignore", **options)


# -- one product ------------------------------------------------------------------------------------------


def _resize(
    stock: Stock, item: int, side: float, mirrored: bool
) -> tuple[Float32[np.ndarray, "h w"], Float32[np.ndarray, "h w"]]:
    """Grey (times opacity) and opacity of a product, cut to its frame; `side` pixels make 28 of the photo."""
    y0, y1, x0, x1 = stock.frames[item]
    cut = stock.images[item, y0:y1, x0:x1]
    down = linear_weights(int(y1 - y0), max(round(side * (y1 - y0) / STOCK), 2))
    across = linear_weights(int(x1 - x0), max(round(side * (x1 - x0) / STOCK), 2))
    if mirrored:
        across = across[::-1]
    grey = down @ (cut * np.float32(1 / 255)) @ across.T
    return grey, down @ (cut > 0).astype(np.float32) @ across.T


def _start(size: int, extent: int, at: float) -> int:
    """Where a product of `extent` pixels begins; `at` in [0, 1) runs over all allowed positions."""
    first, last = -OUTSIDE * extent, size - (1 - OUTSIDE) * extent
    return round(first + at * (last - first))


def _window(
    size: int, top: int, left: int, shape: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The part of the image that a product's window covers, and the same part within the window."""
    rows = slice(max(top, 0), min(top + shape[0], size))
    columns = slice(max(left, 0), min(left + shape[1], size))
    inside = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
    return (rows, columns), inside


def _paint(
    rng: np.random.Generator, canvas: Float32[np.ndarray, "3 S S"], thing: Placed, light: Colour, dark: Colour
) -> None:
    """Lay a product, tinted from `dark` to `light`, and its soft shadow on the canvas, in place."""
    size = canvas.shape[1]
    drop = rng.integers(0, max(size // 24, 1) + 1, 2)
    (rows, columns), inside = _window(
        size, thing.top + int(drop[0]), thing.left + int(drop[1]), thing.grey.shape
    )
    canvas[:, rows, columns] *= 1 - np.float32(rng.uniform(0, SHADOW)) * thing.opacity[inside]
    (rows, columns), inside = _window(size, thing.top, thing.left, thing.grey.shape)
    grey, opacity = thing.grey[inside], thing.opacity[inside]
    part = canvas[:, rows, columns]
    part *= 1 - opacity
    part += grey * (light - dark)[:, None, None] + opacity * dark[:, None, None]


def _box(mask: Bool[np.ndarray, "S S"]) -> Float32[np.ndarray, "4"]:
    """The smallest box around a mask that is not empty, in the unit square."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float32) / len(mask)


# -- colours and backgrounds ------------------------------------------------------------------------------


def _colours(
    rng: np.random.Generator, count: int, low: float = 0.0, high: float = 1.0
) -> Float32[np.ndarray, "count 3"]:
    """Any hue and saturation (greyish ones are common, as in shops), with values between `low` and `high`."""
    hue, saturation, value = rng.random((3, count, 1))
    saturation, value = saturation**1.5, low + (high - low) * value
    turn = (np.array([5, 3, 1]) + hue * 6) % 6
    return (value - value * saturation * np.minimum(turn, 4 - turn).clip(0, 1)).astype(np.float32)


def background(rng: np.random.Generator, size: int) -> Float32[np.ndarray, "3 S S"]:
    """Return a texture between two colours: clouds of two sizes, and on most images stripes or checks."""
    pattern = rng.uniform(0.1, 0.5) * _clouds(rng, size, 2, 6) + rng.uniform(0, 0.3) * _clouds(
        rng, size, 6, 20
    )
    kind = rng.integers(3)
    if kind:
        strength = rng.uniform(0.1, 0.8)
        pattern += strength * (
            _stripes(rng, size) * _stripes(rng, size) if kind == 2 else _stripes(rng, size)
        )
    first, second = _colours(rng, 2)[:, :, None, None]
    return first + (pattern + np.float32(rng.uniform(0.2, 0.8))).clip(0, 1) * (second - first)


def _clouds(rng: np.random.Generator, size: int, low: int, high: int) -> Plane:
    """Smooth noise of unit strength, from a grid of `low` to `high` cells a side."""
    cells = int(rng.integers(low, high + 1))
    weights = linear_weights(cells, size)
    return weights @ rng.normal(0, 1, (cells, cells)).astype(np.float32) @ weights.T


def _stripes(rng: np.random.Generator, size: int) -> Plane:
    """Waves from -1 to 1 in any direction, 2 to 12 across the image, from soft to hard-edged."""
    angle, waves, phase = rng.uniform(0, np.pi), rng.uniform(2, 12), rng.uniform(0, 2 * np.pi)
    at = np.linspace(0, 2 * np.pi * waves, size)
    turn = np.sin(at[:, None] * np.sin(angle) + at * np.cos(angle) + phase)
    return (turn * rng.uniform(1, 4)).clip(-1, 1).astype(np.float32)


def _lighting(rng: np.random.Generator, size: int) -> Plane:
    """Light that falls off evenly to one side, by at most 30 % either way."""
    at = np.linspace(-1, 1, size, dtype=np.float32)
    slope = rng.uniform(-0.15, 0.15, 2).astype(np.float32)
    return 1 + at[:, None] * slope[0] + at * slope[1]


@lru_cache(maxsize=4096)
def linear_weights(inputs: int, outputs: int) -> Float32[np.ndarray, "outputs inputs"]:
    """Return antialiased linear interpolation along one side; rows sum to 1."""
    scale = inputs / outputs
    reach = max(scale, 1.0)
    centres = (np.arange(outputs)[:, None] + 0.5) * scale
    weights = (1 - np.abs(np.arange(inputs) + 0.5 - centres) / reach).clip(0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
