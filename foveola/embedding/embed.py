"""`foveola.embed`: the features of a data set in one file, by any number of processes, in spite of kills."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Int64

import foveola
from foveola import distributed, files
from foveola.config import UserError, build, refuse_unread, to_dict
from foveola.data.decoding import Decoding
from foveola.data.identity import identity_of, looked_at_once, say
from foveola.data.sources import Source, as_source, why_bad
from foveola.embedding.formats import format_of, header_of, write_features
from foveola.embedding.parts import FileParts, differing
from foveola.embedding.rows import EmbedConfig, Embedding
from foveola.evaluation.features.need import EXTERNAL
from foveola.evaluation.images import PARCEL, choose_images, slice_of_rank
from foveola.evaluation.stored import SPEED
from foveola.failures import explained
from foveola.models.encoder import Encoder
from foveola.models.seen import seen_by
from foveola.zoo.load import load

FILE_FORMAT = 1
PART_IMAGES = 256  # what a kill may cost
PART_BYTES = 2**26  # of the features of a part, which is in memory as a whole
BAD_SHOWN = 10  # unreadable images that are named with the reason


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote."""

    path: Path
    rows: int
    images: int  # that were asked for
    unreadable: tuple[str, ...]  # names and reasons of the first images that have no row
    unreadable_count: int
    about: dict[str, Any]  # what the file says about itself
    seconds: float
    computed: int  # images that this call encoded; the others were there

    def __str__(self) -> str:
        rows = self.about["settings"]["rows"]
        shape = " x ".join(map(str, self.about["shape"]))
        name = {"images": "images", "objects": "objects", "patches": "grids of patches"}[rows]
        lines = [
            f"{self.path}: {self.rows:,} {name}, features={self.about['features']} [{shape}], "
            f"{self.about['settings']['store']}, of {self.about['data']['name']}"
        ]
        if self.unreadable_count:
            more = ", ..." * (self.unreadable_count > len(self.unreadable))
            lines.append(
                f"{self.unreadable_count} of {self.images:,} images cannot be read and have no row: "
                + ", ".join(self.unreadable)
                + more
            )
        there = " (all of it was there)" if not self.computed else ""
        lines.append(f"{self.computed:,} images encoded in {self.seconds:.1f} s{there}")
        return "\n".join(lines)


@looked_at_once()
def embed(
    model: Encoder | str | Path,
    data: Source | str,
    *,
    out: str | Path,
    device: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Embedded:
    """Write the features of images, objects or patches to one file. All ranks call it.

    The rows are what evaluations read, by the same reader and the same passes of the encoder. A call that was
    interrupted goes on where it stopped, with any number of processes, and the file has the same bytes then;
    it is whole or not there.

    Args:
        model: an `Encoder`, or what `foveola.load` takes.
        data: a data string or a source. Labels, boxes and masks go into the file where it has them.
        out: a file that ends in `.parquet` (pandas, datasets), `.npz` (NumPy) or `.zarr`. It must not be
            there, unless this very call wrote it.
        device: where a model that is loaded runs; by default a GPU if there is one.
        settings: keys of `EmbedConfig`, such as `rows="objects"`, `features="token+average"`.

    Raises UserError for bad settings, features that the encoder has not, objects that the data have not,
    features that are not finite, other work under the same name, a full disk, and a library that is missing.
    """
    began, path = perf_counter(), Path(out).expanduser()
    config = build(EmbedConfig, settings)
    refuse_unread(config, settings)
    format_of(path)
    distributed.on_main(lambda: files.check_writable(path.parent, "give another out="))
    say(progress and distributed.is_main())
    source = as_source(data, "test", "data")
    encoder = model if isinstance(model, Encoder) else load(model, distributed.find_device(device))
    source = seen_by([encoder], source)
    embedding = Embedding(encoder, source, config, progress=progress)
    chosen = choose_images(len(source), config.limit, config.seed)
    about = distributed.on_main(lambda: _about(model, encoder, embedding, chosen))
    size = _part_images(embedding)
    parts = FileParts(path, work_of(about) | {"size of parts": size}, -(-len(chosen) // size))
    with explained(f"{path} cannot be written"):
        known = distributed.on_main(lambda: _prepare(path, parts, about, embedding, chosen))
        computed = 0
        if known is None:
            computed = _compute(embedding, parts, chosen, size)
            known = distributed.on_main(lambda: _finish(path, parts, about, source, chosen))
    return Embedded(
        path=path,
        rows=known["count"],
        images=len(chosen),
        unreadable=tuple(known["data"]["unreadable_names"]),
        unreadable_count=known["data"]["unreadable"],
        about=known,
        seconds=round(perf_counter() - began, 2),
        computed=computed,
    )


def work_of(about: dict[str, Any]) -> dict[str, Any]:
    """Return what tells one piece of work from another, of what a file says about itself."""
    return {
        "format": about["format"],
        "encoder": about["encoder"]["fingerprint"],
        "transform": about["transform"],
        "data set": [about["data"]["name"], about["data"]["identity"]],
        **{f"{name}=": value for name, value in about["settings"].items()},
        "features=": about["features"],
        "encoder beside": about["beside"],
    }


def _about(
    model: Any, encoder: Encoder, embedding: Embedding, chosen: Int64[np.ndarray, "n"]
) -> dict[str, Any]:
    source, config, own = embedding.source, embedding.config, encoder.config
    reading = getattr(source, "reading", None)
    beside = [name for name, _ in embedding.parts if name.startswith(EXTERNAL)]
    return {
        "format": FILE_FORMAT,
        "foveola": foveola.__version__,
        "model": own.origin if isinstance(model, Encoder) else str(model),
        "encoder": {
            "fingerprint": encoder.fingerprint(),
            "origin": own.origin,
            "step": own.step,
            "patch_size": encoder.patch_size,
        },
        "transform": to_dict(embedding.encoder.config.transform),
        "data": {
            "name": source.name,
            "identity": identity_of(source, chosen).digest,
            "images": len(chosen),
            "reading": reading.options() if isinstance(reading, Decoding) else None,
        },
        "settings": {name: value for name, value in to_dict(config).items() if name not in SPEED},
        "features": embedding.features,
        "masks": embedding.masked,
        "shape": list(embedding.shape),
        "beside": {name: embedding.reader.other(name).fingerprint() for name in beside},
    }


def _part_images(embedding: Embedding) -> int:
    """Images of a part: whole parcels, and not too much memory where they are grids of patches."""
    own = int(np.prod(embedding.shape)) * np.dtype(embedding.config.store).itemsize
    return max(PARCEL, min(PART_IMAGES, PART_BYTES // own) // PARCEL * PARCEL)


def _prepare(
    path: Path,
    parts: FileParts,
    about: dict[str, Any],
    embedding: Embedding,
    chosen: Int64[np.ndarray, "n"],
) -> dict[str, Any] | None:
    """What the file says about itself where it is there; otherwise the folder of parts is made."""
    if path.exists():
        known = header_of(path)
        if other := differing(work_of(known), work_of(about)):
            raise UserError(
                f"{path} is there, and of other work (another {other}): remove it, or give another out="
            )
        if parts.folder.exists():  # a kill came between its name and the end
            parts.remove()
        return known
    if embedding.config.rows != "objects":
        size = len(chosen) * int(np.prod(embedding.shape)) * np.dtype(embedding.config.store).itemsize
        free = shutil.disk_usage(_existing(path.parent)).free
        if 2 * size > free and not parts.folder.exists():
            raise UserError(
                f"features of {embedding.source.name} need {2 * size / 2**20:,.0f} MiB in {path.parent} "
                f"while they are written, which has {free / 2**20:,.0f}; use limit=, store=float16, or "
                "another out="
            )
    parts.prepare()
    return None


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def _compute(embedding: Embedding, parts: FileParts, chosen: Int64[np.ndarray, "n"], size: int) -> int:
    """Write the parts that are missing, each rank a part of them; returns how many images that were."""
    if not all(distributed.gather_objects(parts.is_here())):
        raise UserError(f"{parts.folder} is not on all machines: give out= a folder that all processes reach")
    missing = parts.missing()
    distributed.barrier()  # all ranks must share out the same ones
    mine = missing[slice_of_rank(len(missing))]
    images = [chosen[number * size : (number + 1) * size] for number in mine]
    problem = ""
    try:
        if mine:
            for number, rows in embedding.read(np.concatenate(images), size):
                parts.write(mine[number], rows)
    except UserError as error:
        problem = str(error)
    for found in distributed.gather_objects(problem):  # a rank that gave up must not leave others waiting
        if found:
            raise UserError(found)
    return sum(distributed.gather_objects(sum(map(len, images))))


def _finish(
    path: Path, parts: FileParts, about: dict[str, Any], source: Source, chosen: Int64[np.ndarray, "n"]
) -> dict[str, Any]:
    read = np.concatenate(list(parts.column("image_index")))
    bad = np.setdiff1d(chosen, read).tolist()
    names = [why_bad(source, index) for index in bad[:BAD_SHOWN]]
    data = about["data"] | {"unreadable": len(bad), "unreadable_names": names}
    known = write_features(path, parts, about | {"data": data})
    parts.remove()
    return known
