"""What the data say of pixels: range, channels, pages, mean and deviation, found once and kept with a run."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from foveola.config import ConfigError, UserError, build, read_yaml, renewed
from foveola.data.decoding import Decoding, channels_of
from foveola.data.measure import channel_statistics
from foveola.data.sources import BadImage, DataError, Source, decode, why_bad
from foveola.files import RunFolder
from foveola.models.transform import PixelsConfig
from foveola.training.recipe import RunConfig
from foveola.views.color import ColorConfig

READABLE_LOOKS = 8  # images, one of which can be read at least


def with_channels(config: RunConfig, source: Source) -> RunConfig:
    """Return the same with as many channels as its data have. Nothing is measured, and nothing written.

    Raises DataError for data of which nothing can be read as their string says, and ConfigError where
    `model.channels` contradicts them.
    """
    refuse_unreadable(source)
    count = channels_of(source)
    if config.model.channels not in (count, 0):
        raise ConfigError(
            f"model.channels={config.model.channels}: images of {source.name} have {count}, as channels= in "
            "the data string says; without the key a network has those of its data"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, channels=count))


def with_pixels(config: RunConfig, source: Source) -> RunConfig:
    """Return the same with the channels and the range of its data, and mean and deviation of channels.

    A run that is there goes on with those that it began with. Raises as `with_channels`, and ConfigError
    where keys of colours contradict the data.
    """
    config = with_channels(config, source)
    count, saved = config.model.channels, _kept(config)
    reading = getattr(source, "reading", Decoding())
    if saved is not None and reading.percentiles is not None and saved[0].range is not None:
        reading = dataclasses.replace(reading, ranges=Decoding.values(saved[0].range)["ranges"])
        source.read_as(reading)  # type: ignore[attr-defined]
    color = config.views.color
    if color.normalise == "data" or (color.normalise == "auto" and len(color.mean) != count):
        known = None if saved is None else saved[1]
        mean, std = channel_statistics(source) if known is None else (known.mean, known.std)
        color = dataclasses.replace(color, normalise="given", mean=mean, std=std)
    elif color.normalise == "given" and len(color.mean) != count:
        raise ConfigError(
            f"views.color.mean has {len(color.mean)} value(s), and images of {source.name} {count} "
            "channel(s): views.color.normalise=data measures them"
        )
    transform = config.transform
    if transform is not None and color != config.views.color:
        transform = dataclasses.replace(transform, mean=color.mean, std=color.std)
    return dataclasses.replace(
        config,
        views=dataclasses.replace(config.views, color=color),
        transform=transform,
        pixels=PixelsConfig(**reading.options()),
    )


def refuse_unreadable(source: Source) -> None:
    """Raise DataError where no image of some, spread evenly, can be read as the data string says."""
    bad = []
    for index in np.linspace(0, len(source) - 1, min(READABLE_LOOKS, len(source))).astype(int).tolist():
        try:
            decode(source[index].image)
            return
        except (BadImage, OSError):
            bad.append(why_bad(source, index))
    raise DataError(f"{source.name}: none of {len(bad)} images looked at can be read, such as {bad[0]}")


def _kept(config: RunConfig) -> tuple[PixelsConfig, ColorConfig | None] | None:
    """What the run in `out` began with, if it is there and has the same data; colours if they were known."""
    saved = None if config.out is None else RunFolder(Path(config.out).expanduser()).config
    if saved is None or not saved.is_file():
        return None
    with suppress(UserError, KeyError, TypeError):
        tree: dict[str, Any] = renewed(read_yaml(saved))
        if tree["data"] == config.data:
            color = build(ColorConfig, tree["views"]["color"])
            return build(PixelsConfig, tree["pixels"]), color if color.normalise == "given" else None
    return None
