"""Data as an encoder was trained on them: its range, channels, pages, unless their string says others."""

from copy import copy
from dataclasses import replace
from typing import Any

from foveola.data.decoding import Decoding, channels_of
from foveola.data.sample import DataError
from foveola.data.shown import with_components


def suited(source: Any, usual: Decoding, channels: int) -> Any:
    """Return a source whose files are read as `usual` says, in what its data string says nothing of.

    Raises DataError for images of other channels than the encoder sees.
    """
    own = getattr(source, "reading", None)
    if isinstance(own, Decoding) and hasattr(source, "read_as"):
        reading = own
        if not own.ranged:
            named = {"ranges": usual.ranges, "container": usual.container, "deep": usual.deep or own.deep}
            reading = replace(reading, **named)
        if own.channels is None:
            reading = replace(reading, channels=usual.channels)
        if own.page is None:
            reading = replace(reading, page=usual.page)
        if own.shown is None:
            reading = replace(reading, shown=usual.shown)
        if reading != own:
            source = copy(source)
            source.read_as(reading)
            with_components(source)
    if channels_of(source) != channels:
        raise DataError(
            f"{source.name}: images of {channels_of(source)} channel(s), but the encoder sees {channels}; "
            "channels= in the data string chooses some"
        )
    return source
