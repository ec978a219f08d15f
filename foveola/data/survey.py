"""What the images of a data set are: sizes, channels, depth, copies, damage; and what to do about it."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageStat

from foveola.data.decoding import Decoding, ImageFile, StoredFile
from foveola.data.formats import ALPHA, DAMAGED, channel_names, open_image
from foveola.data.identity import hash_of
from foveola.data.readers import contents, read_header, reader_of, values_in
from foveola.data.sample import BadImage, DataError
from foveola.data.shown import shown_image
from foveola.data.sources import Source, notes_of

GREY_SIDE = 16  # pixels a side of the grey ones by which images are compared
SAME_LOOK = 0.98  # correlation of these from which on two images look the same
PAIRS_AT_ONCE = 2**22  # pairs of images that are compared at once
FLAT = 1.0  # levels of 255: channels whose deviation is below show nothing
LONG = 3.0  # sides of an image, longer to shorter, from which on squares lose much of it
NAMES_SHOWN = 5  # images that are named of each finding


@dataclass(frozen=True)
class ImageFacts:
    """One image as it was found. `why` is the reason for which it cannot be read; the rest is empty then."""

    name: str
    why: str = ""
    width: int = 0
    height: int = 0
    format: str = ""  # of its file; empty: pixels
    channels: int = 0
    bits: int = 8  # of a channel; 32: floating point
    low: float | None = None  # values of images of more than 8 bits
    high: float | None = None
    turned: bool = False  # by EXIF
    profile: str = ""  # colour profile other than sRGB
    transparent: bool = False
    flat: bool = False
    grey: bool = False  # three channels that are the same
    label: int | None = None
    objects: int | None = None
    smallest: float | None = None  # share of the image that its smallest object takes
    content: bytes = b""  # hash of its file
    look: bytes = b""  # the image as a small grey one


@dataclass(frozen=True)
class Survey:
    """What was found in the images of a data set that were looked at.

    `shares` are numbers of images by a property; `sides` are percentiles of the shorter and longer side in
    pixels; `copies` and `alike` are groups of names, byte for byte the same or looking the same; `unreadable`
    are pairs of name and reason; `advice` are sentences, the most important first.
    """

    name: str
    images: int
    looked: int
    shares: dict[str, dict[str, int]]
    sides: dict[str, list[float]]
    values: tuple[float, float] | None
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
    try:
        image = _in_memory(sample.image)
        pixels = shown_image(image)
        stored = _stored(image)
    except (BadImage, *DAMAGED) as error:
        return ImageFacts(sample.name, getattr(error, "strerror", None) or str(error))
    objects = sample.objects
    return ImageFacts(
        name=sample.name,
        width=pixels.shape[1],
        height=pixels.shape[0],
        flat=max(ImageStat.Stat(Image.fromarray(pixels)).stddev) < FLAT,
        label=sample.label,
        objects=None if not source.has_objects else 0 if objects is None else len(objects),
        smallest=None if objects is None else float(objects.areas.min()),
        content=hash_of(image) + _part(image),
        look=small_grey(pixels),
        grey=bool(stored.get("channels", 3) >= 3 and (pixels == pixels[..., :1]).all()),
        **stored,
    )


def _in_memory(image: Any) -> Any:
    """The image of a sample, with the bytes of its file in place of the path."""
    if isinstance(image, ImageFile):
        return replace(image, data=_in_memory(image.data))
    return contents(image) if isinstance(image, StoredFile | bytes) else image


def _part(image: Any) -> bytes:
    """What tells one part of a file from others."""
    reading = image.reading if isinstance(image, ImageFile) else Decoding()
    return b"" if reading.window is None and reading.page is None else f"{reading}".encode()


def _stored(image: Any) -> dict[str, Any]:
    """What the file of an image says of itself; of pixels there is nothing to say."""
    reading = image.reading if isinstance(image, ImageFile) else Decoding()
    image = image.data if isinstance(image, ImageFile) else image
    if not isinstance(image, bytes | Path):
        return {"channels": image.shape[2]}
    header = read_header(image, reading)
    found: dict[str, Any] = {
        "channels": header.channels,
        "bits": header.bits,
        "turned": header.orientation != 1,
    }
    if header.bits > 8:
        with suppress(BadImage):  # it is decoded to 8 bits, but of its values nothing is known
            values = values_in(image, reading).array
            if (finite := values[np.isfinite(values)]).size:
                found |= {"low": float(finite.min()), "high": float(finite.max())}
    reader = reader_of(image, reading)
    if reader is not None:
        return found | {"format": reader.suffixes[0][1:].upper()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = open_image(image.read_bytes() if isinstance(image, Path) else image)
        return found | {
            "format": opened.format or "",
            "channels": {"P": 3, "PA": 4}.get(opened.mode, len(opened.getbands())),
            "bits": 1 if opened.mode == "1" else found["bits"],
            "profile": _profile(opened),
            "transparent": ALPHA in channel_names(opened),
        }


def _profile(image: Image.Image) -> str:
    """The name of the colour profile of a file where it is not sRGB; empty without one."""
    raw = image.info.get("icc_profile")
    if not raw:
        return ""
    from io import BytesIO

    from PIL import ImageCms

    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(BytesIO(raw))).strip()
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return "damaged"
    return "" if "srgb" in name.lower().replace(" ", "") or "gray" in name.lower() else name[:60] or "unnamed"


def small_grey(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return an image as 16 x 16 grey pixels, each the mean of its part of the image."""
    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    return grey.resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX).tobytes()


# -- all of them ------------------------------------------------------------------------------------------


def summarise(source: Source, found: Sequence[ImageFacts]) -> Survey:
    """Put the facts of images together, with what to do about them."""
    readable = [each for each in found if not each.why]
    sides = np.array([(each.width, each.height) for each in readable], np.float64).reshape(-1, 2)
    deep = [each for each in readable if each.low is not None and each.high is not None]
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
        values=(min(e.low for e in deep), max(e.high for e in deep)) if deep else None,  # type: ignore[type-var]
        classes={names[k] if k < len(names) else str(k): n for k, n in sorted(labels.items())},
        objects=_objects(readable),
        unreadable=[(each.name, each.why) for each in found if each.why],
        copies=[[each.name for each in group] for group in copies],
        alike=[[each.name for each in group] for group in alike],
    )
    survey_of.advice.extend(_advice(survey_of, readable, source))
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
    yield from notes_of(source)
    if about.unreadable:
        yield (
            f"cannot be read: {_count(len(about.unreadable))} of {about.looked:,}. Training takes others "
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
