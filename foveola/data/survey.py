"""What the images of a data set are: sizes, channels, depth, copies, damage; and what to do about it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageStat

from foveola.data.decoding import Decoding
from foveola.data.formats import DAMAGED
from foveola.data.identity import hash_of
from foveola.data.levels import (
    ChannelLevels,
    ImageLevels,
    fitting,
    levels_row,
    levels_together,
    with_options,
)
from foveola.data.sample import BadImage, DataError
from foveola.data.shown import shown_image
from foveola.data.sources import Source, notes_of
from foveola.data.stored import in_memory, part_of, stored_facts

GREY_SIDE = 16  # pixels a side of the grey ones by which images are compared
SAME_LOOK = 0.98  # correlation of these from which on two images look the same
PAIRS_AT_ONCE = 2**22  # pairs of images that are compared at once
FLAT = 1.0  # levels of 255: channels whose deviation is below show nothing
LONG = 3.0  # sides of an image, longer to shorter, from which on squares lose much of it
NAMES_SHOWN = 5  # images that are named of each finding


@dataclass(frozen=True)
class ImageFacts:
    """One image as it was found. `why` is the reason for which it cannot be read; of the rest there is what
    its file says then.
    """

    name: str
    why: str = ""
    width: int = 0
    height: int = 0
    format: str = ""  # of its file; empty: pixels
    channels: int = 0
    bits: int = 8  # of a channel; 32: floating point
    pages: int = 1
    levels: ImageLevels | None = field(default=None, compare=False)
    turned: bool = False  # by EXIF
    profile: str = ""  # colour profile other than sRGB
    transparent: bool = False
    flat: bool = False
    grey: bool = False  # three channels that are the same
    label: int | None = None
    objects: int | None = None
    smallest: float | None = None  # fraction of the image that its smallest object takes
    content: bytes = b""  # hash of its file
    look: bytes = b""  # the image as a small grey one


@dataclass(frozen=True)
class Survey:
    """What was found in the images of a data set that were looked at.

    `shares` are numbers of images by a property; `sides` are percentiles of the shorter and longer side in
    pixels; `copies` and `alike` are groups of names, byte for byte the same or looking the same; `unreadable`
    are pairs of name and reason; `levels` are percentiles of the values of each channel, as they are stored;
    `advice` are sentences, the most important first.
    """

    name: str
    images: int
    looked: int
    shares: dict[str, dict[str, int]]
    sides: dict[str, list[float]]
    values: tuple[float, float] | None  # of images of more than 8 bits
    levels: list[ChannelLevels]
    classes: dict[str, int]
    objects: dict[str, float]
    unreadable: list[tuple[str, str]]
    copies: list[list[str]]
    alike: list[list[str]]
    advice: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Return what was found as names and values, for a table."""
        found = [("images", f"{self.images:,}, of which {self.looked:,} were looked at")]
        for side, (low, middle, high) in self.sides.items():
            found.append((f"{side} side", f"{middle:,.0f} pixels (5 % to 95 %: {low:,.0f} to {high:,.0f})"))
        for what, counts in self.shares.items():
            found.append((what, ", ".join(f"{kind} {count:,}" for kind, count in counts.items())))
        if self.values is not None:
            found.append(("values above 8 bits", f"{self.values[0]:g} to {self.values[1]:g}"))
        if self.levels:
            found.append(("0.5, 50, 99.5 %", levels_row(self.levels)))
        if self.classes:
            least, most = min(self.classes.values()), max(self.classes.values())
            found.append(("classes", f"{len(self.classes):,}, with {least:,} to {most:,} images looked at"))
        if self.objects:
            about = self.objects
            found.append(
                ("objects", f"{about['mean']:.1f} an image; {about['without']:,.0f} images have none")
            )
        for what, groups in (("copies", self.copies), ("look the same", self.alike)):
            if groups:
                found.append((what, f"{sum(map(len, groups)):,} images in {_count(len(groups), 'group')}"))
        if self.unreadable:
            found.append(("unreadable", f"{len(self.unreadable):,}"))
        return found

    def table(self) -> str:
        """Return what was found, and the advice, as text."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        lines = [self.name, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        for title, groups in (("copies", self.copies), ("look the same", self.alike)):
            lines += [f"  {title}: {_named(group)}" for group in groups[:NAMES_SHOWN]]
        lines += [f"  unreadable: {name}: {why}" for name, why in self.unreadable[:NAMES_SHOWN]]
        return "\n".join([*lines, *(f"- {text}" for text in self.advice)])

    def tree(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return asdict(self)


def survey(
    source: Source, images: int = 512, show: Callable[[Iterable[Any], int], Iterator[Any]] | None = None
) -> Survey:
    """Look at `images` images of a source, evenly spread (at all of a smaller one), and say what they are.

    Each file is read once; it is decoded once more where its values have more than 8 bits. `show(items,
    total)` may draw progress. Files that cannot be read are part of what is found.
    """
    chosen = np.unique(np.linspace(0, len(source) - 1, min(images, len(source))).astype(np.int64)).tolist()
    found = []
    for index in chosen if show is None else show(chosen, len(chosen)):
        found.append(_facts(source, index))
    return summarise(source, found)


# -- one image --------------------------------------------------------------------------------------------


def _facts(source: Source, index: int) -> ImageFacts:
    try:
        sample = source[index]
    except DataError as error:
        return ImageFacts(f"image {index}", str(error))
    image = pixels = None
    try:
        image = in_memory(sample.image)
        pixels = shown_image(image)
        stored = stored_facts(image, pixels)
    except (BadImage, *DAMAGED) as error:
        why = getattr(error, "strerror", None) or str(error)
        with suppress(BadImage, *DAMAGED):  # an image of other channels may lack a word of its data string
            return ImageFacts(sample.name, why, **({} if image is None else stored_facts(image, pixels)))
        return ImageFacts(sample.name, why)
    objects = sample.objects
    return ImageFacts(
        name=sample.name,
        width=pixels.shape[1],
        height=pixels.shape[0],
        flat=max(ImageStat.Stat(Image.fromarray(pixels)).stddev) < FLAT,
        label=sample.label,
        objects=None if not source.has_objects else 0 if objects is None else len(objects),
        smallest=None if objects is None else float(objects.areas.min()),
        content=hash_of(image) + part_of(image),
        look=small_grey(pixels),
        grey=bool(stored.get("channels", 3) >= 3 and (pixels == pixels[..., :1]).all()),
        **stored,
    )


def small_grey(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return an image as 16 x 16 grey pixels, each the mean of its part of the image."""
    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    return grey.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX).tobytes()


# -- all of them ------------------------------------------------------------------------------------------


def summarise(source: Source, found: Sequence[ImageFacts]) -> Survey:
    """Put the facts of images together, with what to do about them."""
    readable = [each for each in found if not each.why]
    sides = np.array([(each.width, each.height) for each in readable], np.float64).reshape(-1, 2)
    known = [each.levels for each in found if each.levels is not None]
    deep = [each.ends for each in known if each.bits > 8]
    copies = _groups(readable)
    spare = {id(each) for group in copies for each in group[1:]}
    alike = alike_groups([each for each in readable if id(each) not in spare and not each.flat])
    labels = Counter(each.label for each in readable if each.label is not None)
    names = source.classes or ()
    survey_of = Survey(
        name=source.name,
        images=len(source),
        looked=len(found),
        shares=_shares(readable),
        sides=_sides(sides),
        values=(min(e.min() for e in deep).item(), max(e.max() for e in deep).item()) if deep else None,
        levels=levels_together(known)[1],
        classes={names[k] if k < len(names) else str(k): n for k, n in sorted(labels.items())},
        objects=_objects(readable),
        unreadable=[(each.name, each.why) for each in found if each.why],
        copies=[[each.name for each in group] for group in copies],
        alike=[[each.name for each in group] for group in alike],
    )
    survey_of.advice.extend(_advice(survey_of, found, source))
    return survey_of


def _shares(found: Sequence[ImageFacts]) -> dict[str, dict[str, int]]:
    kinds = {1: "grey", 2: "grey and alpha", 3: "colour", 4: "four"}
    counts = {
        "formats": Counter(each.format or "pixels" for each in found),
        "channels": Counter(kinds.get(each.channels, str(each.channels)) for each in found),
        "bits": Counter({32: "floating point"}.get(each.bits, str(each.bits)) for each in found),
        "profiles": Counter(each.profile for each in found if each.profile),
        "noted": Counter(
            name
            for each in found
            for name, is_so in (
                ("turned by EXIF", each.turned),
                ("transparent", each.transparent),
                ("one value everywhere", each.flat),
                ("colour files of grey images", each.grey),
                ("longer than 3 to 1", max(each.width, each.height) > LONG * min(each.width, each.height)),
            )
            if is_so
        ),
    }
    return {name: dict(counter.most_common()) for name, counter in counts.items() if counter}


def _sides(sizes: Float[np.ndarray, "n 2"]) -> dict[str, list[float]]:
    if not len(sizes):
        return {}
    both = {"shorter": sizes.min(1), "longer": sizes.max(1)}
    return {side: np.percentile(values, (5, 50, 95)).round(1).tolist() for side, values in both.items()}


def _objects(found: Sequence[ImageFacts]) -> dict[str, float]:
    counts = [each.objects for each in found if each.objects is not None]
    if not counts:
        return {}
    smallest = [each.smallest for each in found if each.smallest is not None]
    about = {"mean": float(np.mean(counts)), "without": float(counts.count(0))}
    return about | ({"median_smallest_area": float(np.median(smallest))} if smallest else {})


def _groups(found: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    """Images whose files are the same, byte for byte."""
    by_content: dict[bytes, list[ImageFacts]] = {}
    for each in found:
        if each.content:
            by_content.setdefault(each.content, []).append(each)
    return [group for group in by_content.values() if len(group) > 1]


def alike_groups(found: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    """Return groups of images that look the same: the small grey one of each correlates by 0.98 at least with
    that of another of its group.

    So neither size, compression nor a change of brightness or contrast counts.
    """
    if len(found) < 2:
        return []
    levels = np.frombuffer(b"".join(each.look for each in found), np.uint8).reshape(len(found), -1)
    centred = levels - levels.mean(axis=1, dtype=np.float32, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-6)
    group, block = np.arange(len(found)), max(1, PAIRS_AT_ONCE // len(found))
    for first in range(0, len(found), block):
        for near in unit[first : first + block] @ unit.T >= SAME_LOOK:
            joined = group[near]
            if len(joined) and joined.min() != joined.max():
                group[np.isin(group, joined)] = joined.min()
    sizes = Counter(group.tolist())
    return [[found[i] for i in np.flatnonzero(group == g).tolist()] for g, n in sizes.items() if n > 1]


def _advice(about: Survey, found: Sequence[ImageFacts], source: Source) -> Iterator[str]:
    reading = getattr(source, "reading", Decoding())
    options = fitting([each.levels for each in found if each.levels is not None], reading)
    if options:
        wanted = " and ".join(f"{name}={text}" for name, text in options.items())
        yield f"these images want {wanted}: write data='{with_options(source.name, options)}'"
    stacks = [each for each in found if each.why and each.pages > 1] if reading.page is None else []
    if stacks:
        yield (
            f"files of several pages: {_count(len(stacks))}, such as {stacks[0].name} with "
            f"{stacks[0].pages}. pages=channels makes them channels of one image, pages=each an image "
            "of each, pages=first takes the first"
        )
    yield from notes_of(source)
    spoilt = [each for each in found if each.why and each.levels is None and each not in stacks]
    if spoilt:
        yield (
            f"cannot be read: {_count(len(spoilt))} of {about.looked:,}. Training takes others "
            "instead, and stops where there are many (loader.max_bad); remove or mend them"
        )
    if about.copies:
        yield (
            f"copies of others, byte for byte: {_count(sum(len(group) - 1 for group in about.copies))}. A "
            "random split would put copies of one image into train and test; holdout= keeps them together"
        )
    if about.alike:
        yield (
            f"look like others: {_count(sum(map(len, about.alike)))}. Where these are frames or crops of one "
            "scene, split train and test by scene, not by image"
        )
    if profiles := about.shares.get("profiles"):
        name = next(iter(profiles))
        yield f"a colour profile such as {name}: {_count(sum(profiles.values()))}. Profiles are not applied"
    noted = about.shares.get("noted", {})
    for what, then in (
        ("one value everywhere", "Nothing can be learned from them"),
        ("transparent", "What is behind them is taken to be white"),
        ("longer than 3 to 1", "Evaluations cut the centre out of them"),
    ):
        if noted.get(what):
            yield f"{what}: {_count(noted[what])}. {then}"
    yield from _advice_on_labels(about)


def _advice_on_labels(about: Survey) -> Iterator[str]:
    counts = list(about.classes.values())
    if len(counts) > 1 and max(counts) >= 10 * min(counts):
        yield (
            f"{_count(max(counts))} of the largest class, {_count(min(counts))} of the smallest were looked "
            "at: top-1 tells of large classes mostly; look at the numbers of each class, too"
        )
    if about.objects:
        if 2 * about.objects["without"] >= about.looked:
            yield "most images have no object: ODIS then learns from whole images mostly"
        small = about.objects.get("median_smallest_area", 1.0)
        if small < (16 / 224) ** 2:
            yield (
                f"the smallest object takes {100 * small:.2f} % of the image at most in half of the images: "
                "less than a patch of 16 pixels at 224. Larger views (views.global_size) or smaller patches "
                "show it"
            )


def _count(number: int, what: str = "image") -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _named(group: Sequence[str]) -> str:
    more = len(group) - NAMES_SHOWN
    return ", ".join(group[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
