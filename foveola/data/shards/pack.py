"""Any data to tar files of samples: whole or not there, in spite of kills, by several processes."""

import fcntl
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from foveola import files
from foveola.config import UserError, build, key, to_dict
from foveola.data.decoding import RGB, Decoding, ImageFile, channels_of, source_depth
from foveola.data.identity import hash_of
from foveola.data.inventory import inventory_of
from foveola.data.listing import printable
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.shards.index import run_all
from foveola.data.shards.opening import BESIDE
from foveola.data.shards.writing import members_of, sample_key
from foveola.data.sources import Source, as_source

_PROBES = 32  # samples that tell how large one is
NAMED_LEFT_OUT = 1000  # samples left out that the file beside shards names
SIZE = re.compile(r"\d{1,9}(\.\d{1,9})?(KB|MB|GB)")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
TAR_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class PackConfig:
    """How data become shards."""

    size: str = key("1GB", "approximate size of a shard, in KB, MB or GB")
    format: Literal["original", "jpeg", "webp", "png", "npz"] = key(
        "original",
        "format of the images; original: the bytes of the files. A file that has the format "
        "already and fits stays. npz: any "
        "channels and depth, without loss",
    )
    quality: int = key(90, "quality of jpeg and webp", at_least=1, at_most=100)
    canvas: int | None = key(
        None,
        "pixels to which the shorter side is shrunk, if it is longer; null: images keep their size",
        at_least=8,
    )
    processes: int | None = key(None, "processes that write shards; null: one for each core", at_least=1)
    max_bad: float = key(
        0.01, "fraction of unreadable images above which nothing is packed", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        if not SIZE.fullmatch(self.size) or not self.bytes:
            raise ValueError(f"size={self.size}: expected a number with KB, MB or GB, such as 500MB")
        if self.canvas is not None and self.format == "original":
            raise ValueError("canvas= needs format=jpeg, webp, png or npz, which write images anew")

    @property
    def bytes(self) -> int:
        """The size of a shard."""
        return int(float(self.size[:-2]) * _UNITS[self.size[-2:]])


@dataclass(frozen=True)
class PackedShards:
    """What `pack` wrote."""

    path: Path
    samples: int
    shards: int
    bytes: int
    left_out: tuple[str, ...]  # names and reasons
    options: str = ""  # of the data string, without which pixels are not what they were

    def __str__(self) -> str:
        unit = next((name for name in ("GB", "MB") if self.bytes >= _UNITS[name]), "KB")
        size = f"{self.bytes / _UNITS[unit]:.2f} {unit}"
        shards = f"{self.shards:,} shard{'s' * (self.shards != 1)}"
        lines = [f"{self.path}: {self.samples:,} sample{'s' * (self.samples != 1)} in {shards}, {size}"]
        if self.left_out:
            lines.append(
                f"{len(self.left_out)} images cannot be read and are left out, such as {self.left_out[0]}"
            )
        path = str(self.path).replace("%", "%25").replace("?", "%3F")
        return "\n".join([*lines, f"data string: shards:{path}{self.options}"])


def pack(data: Source | str, out: str | Path, *, progress: bool = True, **settings: Any) -> PackedShards:
    """Write the samples of data, in their order, as tar files to a new folder `out`; docs/shards.md.

    Images, names, labels, objects with masks and crowds, and label maps come back as they were from
    `shards:OUT`. The folder is whole or not there; a call that was ended goes on with the next shard when it
    is made again. Raises UserError for settings that cannot be, and where more than `max_bad` of the images
    cannot be read.
    """
    config = build(PackConfig, settings)
    source = as_source(data, "train", "data")
    _check(source, config)
    out = Path(out).expanduser()
    if out.exists():
        raise UserError(f"out={out} exists: name a new folder, or remove it")
    files.check_writable(out.parent, "give another out=")
    to = files.link_target(out)
    building = to.with_name(f".{to.name}.packing")
    with files.naming(out, building):
        count, samples, left_out = _pack(source, config, building, progress)
        building.replace(to)
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    return PackedShards(out, samples, count, size, tuple(left_out), _options(source, config))


def _pack(source: Any, config: PackConfig, building: Path, progress: bool) -> tuple[int, int, list[str]]:
    """Write shards to a folder, whole when this returns: how many, of how many samples, without which."""
    building.mkdir(parents=True, exist_ok=True)
    with _alone(building):
        plan = _plan(building, source, config)
        ranges = [
            (start, min(start + plan["a_shard"], len(source)))
            for start in range(0, len(source), plan["a_shard"])
        ]
        digits = max(6, len(str(len(ranges))))
        paths = [building / f"{number:0{digits}d}.tar" for number in range(len(ranges))]
        work = [
            (path, *ends) for path, ends in zip(paths, ranges, strict=True) if not _receipt(path).is_file()
        ]
        _write_all(source, config, work, progress)
        receipts = [json.loads(_receipt(path).read_text(encoding="utf-8")) for path in paths]
        left_out = [name for each in receipts for name in each["left_out"]]
        samples = sum(each["samples"] for each in receipts)
        if len(left_out) > config.max_bad * len(source) or not samples:
            raise DataError(
                f"{source.name}: {len(left_out)} of {len(source)} images cannot be read, more than "
                f"max_bad={config.max_bad:g} allows, such as {left_out[0]}"
            )
        _finish(building, source, config, samples, left_out)
    for path in paths:
        _receipt(path).unlink()
    (building / "plan.json").unlink()
    (building / ".lock").unlink()
    return len(paths), samples, left_out


def _check(source: Any, config: PackConfig) -> None:
    if hasattr(source, "answers"):
        raise DataError(f"{source.name}: has several right answers for an image, which shards cannot hold")
    image = _first(source).image
    if (
        config.format == "original"
        and isinstance(image, ImageFile)
        and replace(image.reading, deep=False) != Decoding()  # `deep`: the files say their range
    ):
        raise DataError(
            f"{source.name}: range=, channels=, pages=, tiles= and the like say how files are read, and "
            "format=original keeps files: write them into the data string of the shards, or write pixels as "
            "they are read: format=jpeg, webp or png of 8-bit RGB, format=npz of all"
        )


def _options(source: Any, config: PackConfig) -> str:
    """What the data string of arrays says, where their channels or depth are not the usual ones."""
    if config.format != "npz":
        return ""
    deep, several = source_depth(source) > 8, channels_of(source) != RGB
    found = ["range=container"] * deep + ["channels=all"] * several
    return "?" + "&".join(found) if found else ""


def _first(source: Any) -> Sample:
    for index in range(len(source)):
        try:
            return source[index]
        except (BadImage, OSError):
            continue
    raise DataError(f"{source.name}: no image can be read")


def _finish(building: Path, source: Any, config: PackConfig, samples: int, left_out: list[str]) -> None:
    about = {
        "classes": None if source.classes is None else list(source.classes),
        "pixels": hasattr(source, "label_map"),
        "samples": samples,
        "from": source.name,
        "settings": to_dict(config),
        "left_out": left_out[:NAMED_LEFT_OUT],
    }
    files.write_text(building / BESIDE, json.dumps(about, indent=1) + "\n")


@contextmanager
def _alone(building: Path) -> Iterator[None]:
    with (building / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {building}: wait for it, or end it") from None
        except OSError:  # file systems without locks
            pass
        yield


def _plan(building: Path, source: Any, config: PackConfig) -> dict[str, Any]:
    """How many samples a shard has: kept, so that a later call goes on with the same."""
    nothing = np.zeros(0, np.int64)
    stated = inventory_of(source, nothing, np.zeros(0, "S16"))
    names = getattr(source, "image_names", list)()
    about = [
        hash_of("\0".join(names).encode("utf-8", "backslashreplace")),
        hash_of(stated.sizes),
        hash_of(stated.times),
    ]
    settings = {
        name: value for name, value in to_dict(config).items() if name not in ("processes", "max_bad")
    }
    plan = {"data": source.name, "images": len(source), "files": b"".join(about).hex(), "settings": settings}
    path = building / "plan.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {name: kept.get(name) for name in plan} != plan:
            raise UserError(f"{building} was begun with other data or settings: remove it to begin anew")
        return kept
    sizes = []
    for index in np.unique(np.linspace(0, len(source) - 1, _PROBES).astype(np.int64)).tolist():
        try:
            members = _members(source, config, index, set())
        except (BadImage, OSError):
            continue
        sizes.append(sum(TAR_BLOCK * (1 + -(-len(data) // TAR_BLOCK)) for data in members.values()))
    plan["a_shard"] = max(1, int(config.bytes / np.mean(sizes))) if sizes else len(source)
    files.write_text(path, json.dumps(plan))
    return plan


# -- shards -------------------------------------------------------------------------------------------------


def _receipt(path: Path) -> Path:
    return path.with_suffix(".done")


_source: Any = None  # of a process that writes shards: it has it from its parent, not by pickling


def _begin(source: Any) -> None:
    global _source
    _source = source


def _write_all(source: Any, config: PackConfig, work: list[tuple[Path, int, int]], progress: bool) -> None:
    _begin(source)
    count = min(config.processes or os.cpu_count() or 1, len(work))
    tasks = [partial(_write_shard, config, *each) for each in work]
    pool = None
    if count > 1 and os.uname().sysname == "Linux":
        pool = ProcessPoolExecutor(count, get_context("fork"), _begin, (source,))
    run_all(pool, tasks, "pack" if progress else None, "packed was ended; its finished shards are kept")


def _write_shard(config: PackConfig, path: Path, start: int, end: int) -> None:
    """Write samples `start` to `end`, and then the receipt that says that they are whole."""
    left_out, keys = [], set[str]()
    with files.whole(path) as part, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for index in range(start, end):
            try:
                members = _members(_source, config, index, keys)
            except (BadImage, OSError) as error:
                left_out.append(f"image {index} ({error})")
                continue
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    receipt = {"samples": end - start - len(left_out), "left_out": left_out}
    files.write_text(_receipt(path), json.dumps(receipt))


def _members(source: Any, config: PackConfig, index: int, keys: set[str]) -> dict[str, bytes]:
    """The members of a sample, whose key none of `keys` is; it is added to them."""
    key = sample_key(printable(source[index].name))
    key = key if key not in keys else f"{key}_{index}"
    keys.add(key)
    return members_of(source, index, key, config.format, config.quality, config.canvas)
