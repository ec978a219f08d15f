"""Options of data strings: from text to values. Each raises ValueError with what it needs."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from foveola.config import path_hint


def whole_number(text: str) -> int:
    """Return a whole number of 64 bits."""
    if not text.isdecimal() or len(text) > 18:  # 64 bits
        raise ValueError("a whole number")
    return int(text)


def positive(text: str) -> Fraction:
    """Return a number above 0, exactly: 0.5, 1/3."""
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0 or len(text) > 30:
        raise ValueError("a number above 0")
    return number


def fraction_or_none(text: str) -> float:
    """Return a fraction from 0 on, below 1."""
    return 0.0 if text in ("0", "0.0") else fraction(text)


def fraction(text: str) -> float:
    """Return a fraction between 0 and 1."""
    fraction = float(text) if text.replace(".", "", 1).isdecimal() else 0.0
    if not 0 < fraction < 1:
        raise ValueError("a fraction such as 0.2")
    return fraction


def tile_size(text: str) -> int:
    """Return the pixels a side of a tile: 8 at least, as of any image."""
    if whole_number(text) < 8 or len(text) > 5:
        raise ValueError("at least 8 pixels a side, such as 512")
    return int(text)


def at_least_one(text: str) -> int:
    """Return a whole number that is not 0."""
    if not whole_number(text):
        raise ValueError("at least 1")
    return int(text)


def split_name(text: str) -> str:
    """Return train or test."""
    if text not in ("train", "val", "test"):
        raise ValueError("train or test")
    return "train" if text == "train" else "test"


def one_of(*names: str) -> Callable[[str], str]:
    """Return a reader of options that are one of a list of words."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


def whole_range(text: str) -> tuple[int, int]:
    """Return both ends of a range of whole numbers."""
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise ValueError("a range such as 2-5")
    return int(low), int(high or low)


def true_or_false(text: str) -> bool:
    """Return whether it is true."""
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def existing_path(text: str) -> Path:
    """Return a path that exists."""
    path = Path(text).expanduser()
    if not path.exists():
        raise ValueError(f"a path that exists{path_hint(path)}")
    return path


def existing_folder(text: str) -> Path:
    """Return a folder that exists."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError(f"a folder that exists{path_hint(path)}")
    return path


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return whole numbers that commas separate."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ValueError("whole numbers such as 0,255")
    return tuple(map(int, parts))
