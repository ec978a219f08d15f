"""Where samples come from, and the data strings that name it: `kind:/path?key=value&...`."""

from typing import Literal, Protocol, runtime_checkable

from foveola.config import nearest
from foveola.data.decode import BadImage, decode
from foveola.data.sample import DataError, Sample
from foveola.data.scenes import Scenes

__all__ = ["BadImage", "DataError", "Source", "decode", "open_source"]

Split = Literal["train", "test"]


@runtime_checkable
class Source(Protocol):
    """Samples by index. Picklable and cheap to hand to workers: no open files, no lists of objects."""

    @property
    def name(self) -> str:
        """The data string, with every option that matters."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels, if there are any."""
        ...

    @property
    def has_objects(self) -> bool:
        """Whether objects are annotated at all."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def fingerprint(self) -> str:
        """Changes when the data would."""
        ...


def open_source(spec: str, split: Split = "train") -> Source:
    """temporary: scenes only"""
    kind, _, rest = spec.partition(":")
    if kind != "scenes":
        raise DataError(f"unknown data {spec!r}" + str(nearest(kind, ["scenes"])))
    options = dict(part.split("=", 1) for part in rest.partition("?")[2].split("&") if part)
    split = options.pop("split", split)
    low, _, high = options.pop("objects", "2-5").partition("-")
    return Scenes(split, objects=(int(low), int(high or low)), **{k: int(v) for k, v in options.items()})
