"""Decoding: which values, channels and pages of a file are meant, as its data string says it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, Protocol, runtime_checkable

Range = tuple[float, float]  # the values that become 0 and all of the container
Window = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


@dataclass(frozen=True)
class ShownComponents:
    """Colours as weighted sums of channels that are in [0, 1]: a line of `weights` for each of red, green and
    blue, and what is added to it. They are measured once, so that equal colours of images mean the same.
    """

    weights: tuple[tuple[float, ...], ...]
    added: tuple[float, ...]


# Three channels, from 0, that are red, green and blue; or principal components of all of them: those that
# were measured, or ("pca") of whatever is shown at a time.
ShownAs = tuple[int, ...] | ShownComponents | Literal["pca"]

WHOLE_CONTAINER: Range = (0.0, 65535.0)  # of 16 bits
RGB = 3  # channels where nothing else is asked for
NUMBER = r"(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
LOW_HIGH = re.compile(f"{NUMBER}-{NUMBER}")


@dataclass(frozen=True, repr=False)
class Decoding:
    """How files become pixels where a data string says it.

    `ranges` are the values that become black and white: one for all channels, or one of each; none: those of
    16 bits are taken to fill them, unless the file itself states its range. `container` says that they do.
    `percentiles` are to be measured: a source puts ranges in their place. `page` of files of several (None:
    they are refused), from 0; "channels": each page is one; "each": each is an image of its own.
    `channels` are all, so many, or chosen ones,
    counted from 1 or by name; None: RGB, or grey as RGB. `window` is the part of the file that is read.
    `deep`: the files state their range, and pixels have 16 bits. Of whole slides `level` (0: the
    finest) or `mpp` (microns a pixel) is read. Of videos one frame is taken in `every` so many, or in so many
    `seconds`; `page` says which of these. `shown` are
    what of the channels people see as red, green and blue; which makes no other data.
    """

    ranges: tuple[Range, ...] = ()
    container: bool = False
    percentiles: Range | None = None
    page: int | Literal["channels", "each"] | None = None
    channels: int | Literal["all"] | tuple[int | str, ...] | None = None
    window: Window | None = None
    deep: bool = False
    shown: ShownAs | None = None
    level: int | None = None
    mpp: float | None = None
    every: int | None = None
    seconds: Fraction | None = None

    @property
    def moving(self) -> bool:
        """Whether frames of videos are images."""
        return self.every is not None or self.seconds is not None

    @property
    def ranged(self) -> bool:
        """Whether something else than the file says which values are black and white."""
        return bool(self.ranges) or self.container or self.percentiles is not None

    @property
    def depth(self) -> Literal[8, 16]:
        """Bits of pixels: 16 where a range is known, which 8 bits would cut into few levels."""
        return 16 if self.ranged or self.deep else 8

    @property
    def count(self) -> int:
        """Channels of pixels. Raises ValueError for `all`, before a source has looked how many there are."""
        if self.channels == "all":
            raise ValueError("nobody has looked how many channels there are")
        if isinstance(self.channels, tuple):
            return len(self.channels)
        return RGB if self.channels is None else int(self.channels)

    def at(self, window: Window) -> "Decoding":
        """Return the same for a part of the file."""
        return replace(self, window=window)

    def __repr__(self) -> str:
        """What tells these pixels from others: part of the identity of data, whose first names are kept."""
        low, high = self.ranges[0] if len(self.ranges) == 1 else (None, None)
        first = {"low": low, "high": high, "container": self.container, "first_page": self.page == 0}
        usual = {"percentiles": None, "page": None, "channels": None, "window": None, "deep": False}
        usual |= dict.fromkeys(("level", "mpp", "every", "seconds"))
        usual |= {} if len(self.ranges) == 1 else {"ranges": ()}
        later = {name: getattr(self, name) for name in usual if getattr(self, name) != usual[name]}
        if self.page == 0:
            del later["page"]
        return f"Decoding({', '.join(f'{name}={value}' for name, value in (first | later).items())})"

    @staticmethod
    def values(text: str) -> dict[str, Any]:
        """Return the fields that `range=` sets: `LOW-HIGH`, one for each channel with commas, `container`,
        `percentile:LOW-HIGH`, or `file`, where files state it.

        Raises ValueError.
        """
        if text == "container":
            return {"container": True}
        if text == "file":
            return {"deep": True}
        if text.startswith("percentile:"):
            found = LOW_HIGH.fullmatch(text.removeprefix("percentile:"))
            low, high = (float(end) for end in found.groups()) if found else (0.0, 0.0)
            if not 0 <= low < high <= 100:
                raise ValueError("a range such as percentile:0.5-99.5")
            return {"percentiles": (low, high)}
        ranges = []
        for part in text.split(","):
            found = LOW_HIGH.fullmatch(part)
            low, high = (float(end) for end in found.groups()) if found else (0.0, 0.0)
            if not low < high:
                raise ValueError("a range such as 0-4095 or -1000-3000, or container")
            ranges.append((low, high))
        return {"ranges": tuple(ranges)}

    @classmethod
    def of(
        cls, range: str | None, channels: str | None, pages: str | None, show: str | None = None
    ) -> "Decoding":
        """Return what these options of a data string say. Raises ValueError."""
        fields = {} if range is None else cls.values(range)
        fields |= {} if channels is None else cls.chosen(channels)
        fields |= {} if show is None else cls.seen(show)
        return cls(**fields, **({} if pages is None else cls.paged(pages)))

    def options(self) -> dict[str, str | None]:
        """Return the options of a data string that say it: `of(**options())` is the same."""
        numbers = [f"{low:.15g}-{high:.15g}" for low, high in self.ranges]
        text = ",".join(numbers) or ("container" if self.container else "file" if self.deep else None)
        if self.percentiles is not None and not numbers:
            text = "percentile:{:.15g}-{:.15g}".format(*self.percentiles)
        chosen = None if self.channels is None else str(self.channels)
        if isinstance(self.channels, tuple):
            chosen = ",".join(map(str, self.channels)) + ("," if len(self.channels) == 1 else "")
        page = str(self.page + 1) if isinstance(self.page, int) else self.page
        seen = "pca" if isinstance(self.shown, ShownComponents) else self.shown
        if isinstance(seen, tuple):
            seen = ",".join(str(channel + 1) for channel in seen)
        return {"range": text, "channels": chosen, "pages": page, "show": seen}

    @staticmethod
    def chosen(text: str) -> dict[str, Any]:
        """Return the fields that `channels=` sets: `all`, a number of them, or `4,3,2` and names with commas.

        Raises ValueError.
        """
        if text == "all":
            return {"channels": "all"}
        if "," not in text:
            if not text.isdecimal() or not 0 < len(text) < 4 or not int(text):
                raise ValueError("all, how many there are, or chosen ones such as 4,3,2 (of one: 2,)")
            return {"channels": None if int(text) == RGB else int(text)}
        parts = [part.strip() for part in text.split(",")]
        parts = parts[:-1] if parts[-1] == "" else parts
        if not all(parts) or "0" in parts:
            raise ValueError("channels counted from 1, or their names, such as 4,3,2")
        return {"channels": tuple(int(part) if part.isdecimal() else part for part in parts)}

    @staticmethod
    def seen(text: str) -> dict[str, Any]:
        """Return the fields that `show=` sets: three of the channels, counted from 1, or `pca`. Raises
        ValueError.
        """
        if text == "pca":
            return {"shown": "pca"}
        parts = text.split(",")
        if len(parts) != RGB or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError("three of the channels, counted from 1, such as 4,3,2, or pca")
        return {"shown": tuple(int(part) - 1 for part in parts)}

    @staticmethod
    def paged(text: str) -> dict[str, Any]:
        """Return the fields that `pages=` sets: `first`, `channels`, `each`, or one counted from 1. Raises
        ValueError.
        """
        if text in ("channels", "each"):
            return {"page": text}
        if text != "first" and (not text.isdecimal() or len(text) > 9 or not int(text)):
            raise ValueError("first, channels, each, or a page counted from 1")
        return {"page": 0 if text == "first" else int(text) - 1}


@runtime_checkable
class StoredFile(Protocol):
    """Where the bytes of a file lie: a path, or a part of a larger file."""

    def read_bytes(self) -> bytes:
        """Return them. Raises OSError, and BadImage where there are none."""
        ...


@dataclass(frozen=True)
class ImageFile:
    """A file, or the bytes of one, and how to read it."""

    data: StoredFile | bytes
    reading: Decoding


def why_not_shown(shown: ShownAs | None, channels: int) -> str | None:
    """Return why images of so many channels cannot be shown in this way; None where they can."""
    if shown is None:
        return None
    if not isinstance(shown, tuple):
        return None if channels >= RGB else f"show=pca needs three channels, and there are {channels}"
    last = max(map(int, shown)) + 1
    return None if last <= channels else f"show= asks for channel {last}, and there are {channels}"


def channels_of(source: Any) -> int:
    """Return how many channels images of a source have: `source.channels`, 3 where it does not say."""
    return int(getattr(source, "channels", RGB))


def source_depth(source: Any) -> int:
    """Return the bits of a channel of images of a source, 8 or 16: `source.depth`, 8 where it does not
    say.
    """
    return int(getattr(source, "depth", 8))


def picked(channels: Sequence[int | str], names: Sequence[str], count: int) -> list[int]:
    """Return the positions, from 0, of channels by number (from 1) or name among `count`. Raises
    ValueError.
    """
    found = []
    for channel in channels:
        if isinstance(channel, int):
            if channel > count:
                raise ValueError(f"channel {channel} is asked for, of {count}")
            found.append(channel - 1)
        elif channel in names:
            found.append(list(names).index(channel))
        else:
            known = f"they are {', '.join(names)}" if names else "channels of this file have no names"
            raise ValueError(f"channel {channel!r} is asked for: {known}")
    return found
