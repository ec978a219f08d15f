"""`analyze_attention`: several encoders over one reading of the images, batch by batch, into running means.

Nothing of an image is kept but its share in the means, so memory does not grow with their number.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from foveola import distributed
from foveola.config import UserError, build, to_dict
from foveola.data.identity import identity_of
from foveola.data.sample import BadImage
from foveola.data.sources import Source, decode, notes_of, open_source
from foveola.evaluation.attention.reader import (
    AnalysisConfig,
    AttentionReader,
    Geometry,
    VectorGroup,
    group_readers,
)
from foveola.evaluation.attention.result import AttentionAnalysis, Moments
from foveola.evaluation.features.reading import PARCEL
from foveola.evaluation.features.table import choose_images, facts_of_bad, read_ahead, share, show
from foveola.evaluation.result import versions
from foveola.failures import told
from foveola.models.encoder import Encoder
from foveola.models.transform import TransformConfig, square
from foveola.zoo.load import UNTRAINED, load


def analyze_attention(
    models: Encoder | str | Path | Sequence[Encoder | str | Path] | Mapping[str, Encoder | str | Path],
    data: Source | str,
    *,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings: Any,
) -> AttentionAnalysis:
    """Statistics of the attention of every block and head of some encoders, averaged over images.

    Args:
        models: what `foveola.load` takes, or `Encoder`s; one, several, or several by name.
        data: a data string, opened with the split of tests, or a source. Neither labels nor objects are used.
        out: folder for `attention.json` and `attention.csv`; None = nothing is written.
        device: where models that are loaded run; by default a GPU if there is one.
        settings: keys of `AnalysisConfig`, such as `limit=200`, `size=480`.

    Statistics are those of `attention.HEAD_STATISTICS` and `BLOCK_STATISTICS` (docs/analysis.md), in nats,
    pixels and shares of one. An encoder without class token or registers has none of theirs (NaN). Under
    torchrun every process analyses its share of the images, and all get the result.

    Raises UserError for bad settings, models and data, for sizes that are no whole patches, when more than
    1 % of the images cannot be read, and for encoders whose attention is not finite.
    """
    config, began = build(AnalysisConfig, settings), perf_counter()
    source = open_source(data, "test") if isinstance(data, str) else data
    at = distributed.find_device(device)
    readers = [AttentionReader(name, _open(model, at), config) for name, model in _named(models).items()]
    groups = group_readers(readers)
    folder = None if out is None else distributed.on_main(lambda: _folder(Path(out)))
    about = _run(readers, groups, source, config, progress)
    analysis = AttentionAnalysis(
        encoders=tuple(reader.result() for reader in readers),
        vectors=tuple(group.result() for group in groups),
        data=about,
        settings=to_dict(config),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(perf_counter() - began, 2),
        notes=(*_notes(readers), *notes_of(source)),
    )
    if folder is not None and distributed.is_main():
        analysis.save(folder)
    return analysis


def _run(
    readers: list[AttentionReader],
    groups: list[VectorGroup],
    source: Source,
    config: AnalysisConfig,
    progress: bool,
) -> dict[str, Any]:
    """Show all images to all readers, and each rank's means to the others; returns facts about the data."""
    chosen = choose_images(len(source), config.limit, config.seed)
    geometries = tuple(dict.fromkeys(reader.geometry for reader in readers))
    squares = Squares(source, chosen[share(len(chosen))], geometries)
    bad, problem = torch.zeros(0, dtype=torch.int64), ""
    try:
        for number, (images, unread) in enumerate(_batches(squares, config, source, progress)):
            bad = torch.cat((bad, unread))
            if not len(images[geometries[0]]):
                continue
            for reader in readers:
                reader.read(images[reader.geometry], number, source.name)
            for group in groups:
                group.add()
    except UserError as error:
        problem = str(error)
    for found in distributed.gather_objects(problem):  # a rank that gave up must not leave others waiting
        if found:
            raise UserError(found)
    facts = facts_of_bad(distributed.gather_rows(bad), len(chosen), source)
    for part in (*readers, *groups):
        for moments in part.moments():
            _gather(moments)
    analysed = readers[0].heads.count
    if not analysed:
        raise UserError(f"{source.name}: no images")
    about = {"name": source.name, "fingerprint": identity_of(source, chosen).digest, "images": len(chosen)}
    return about | facts | {"analysed": analysed}


def _folder(path: Path) -> Path:
    """The folder, made where it is missing, before anything is computed."""
    with told(f"out={path}: no folder can be made there"):
        path.mkdir(parents=True, exist_ok=True)
    return path


# -- which encoders ------------------------------------------------------------------------------------------


def _named(models: Any) -> dict[str, Encoder | str | Path]:
    """Encoders by names that tell them apart: the ends of their paths where those differ."""
    if isinstance(models, Mapping):
        named = {str(name): model for name, model in models.items()}
    else:
        several = [models] if isinstance(models, Encoder | str | Path) else list(models)
        full = [
            model.config.origin or "encoder" if isinstance(model, Encoder) else str(model)
            for model in several
        ]
        full = [  # encoders may well come from files of one name
            f"{name} {number}" if isinstance(model, Encoder) and full.count(name) > 1 else name
            for number, (name, model) in enumerate(zip(full, several, strict=True), start=1)
        ]
        short = [_short(name) for name in full]
        names = short if len(set(short)) == len(short) else full
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"model: {name} is given twice")
        named = dict(zip(names, several, strict=True))
    if not named:
        raise UserError("model: expected at least one encoder")
    return named


def _short(name: str) -> str:
    start = UNTRAINED if name.startswith(UNTRAINED) else ""
    rest = name.removeprefix(start)
    return name if ":" in rest else start + (Path(rest).name or rest)


def _open(model: Encoder | str | Path, device: torch.device) -> Encoder:
    return model.eval() if isinstance(model, Encoder) else load(model, device).eval()


# -- reading -------------------------------------------------------------------------------------------------


class Squares(Dataset):
    """Parcels of images, each decoded once and cut for every geometry; and those that cannot be read."""

    def __init__(
        self, source: Source, chosen: Int64[np.ndarray, "n"], geometries: tuple[Geometry, ...]
    ) -> None:
        self.source, self.chosen, self.geometries = source, chosen, geometries

    def __len__(self) -> int:
        return -(-len(self.chosen) // PARCEL)

    def __getitem__(self, parcel: int) -> tuple[dict[Geometry, UInt8[Tensor, "k 3 S S"]], Int64[Tensor, "b"]]:
        images: dict[Geometry, list[Tensor]] = {geometry: [] for geometry in self.geometries}
        bad = []
        for index in self.chosen[parcel * PARCEL : (parcel + 1) * PARCEL].tolist():
            try:
                image = decode(self.source[index].image)
            except BadImage:
                bad.append(index)
                continue
            for geometry, made in images.items():
                made.append(cut(image, geometry))
        stacked = {
            geometry: torch.stack(made) if made else torch.zeros(0, 3, geometry[1], geometry[1]).byte()
            for geometry, made in images.items()
        }
        return stacked, torch.tensor(bad, dtype=torch.int64)


def cut(image: UInt8[np.ndarray, "H W 3"], geometry: Geometry) -> UInt8[Tensor, "3 S S"]:
    """The centre of an image, as an encoder sees it before normalisation."""
    size, crop, interpolation, squash = geometry
    kind = "bicubic" if interpolation == "bicubic" else "bilinear"
    transform = TransformConfig(resize=size, crop=crop, squash=squash, interpolation=kind)
    return square(image, transform)


def _batches(
    squares: Squares, config: AnalysisConfig, source: Source, progress: bool
) -> Iterator[tuple[dict[Geometry, Tensor], Int64[Tensor, "b"]]]:
    waiting: list[dict[Geometry, Tensor]] = []
    bad = [torch.zeros(0, dtype=torch.int64)]
    left = len(squares)
    parcels = show(read_ahead(squares, config.workers), len(squares), f"attention on {source.name}", progress)
    for images, unread in parcels:
        waiting.append(images)
        bad.append(unread)
        left -= 1
        if not left or sum(len(next(iter(part.values()))) for part in waiting) >= config.batch_size:
            joined = {name: torch.cat([part[name] for part in waiting]) for name in squares.geometries}
            yield joined, torch.cat(bad)
            waiting, bad = [], bad[:1]


# -- the end -------------------------------------------------------------------------------------------------


def _gather(moments: Moments) -> None:
    """Over all ranks, in their order: all get the same."""
    parts = distributed.gather_objects((moments.count, moments.mean, moments.squares))
    if len(parts) > 1:
        whole = Moments(*moments.mean.shape)
        for count, mean, squares in parts:
            other = Moments()
            other.count, other.mean, other.squares = count, mean, squares
            whole.merge(other)
        moments.count, moments.mean, moments.squares = whole.count, whole.mean, whole.squares


def _notes(readers: list[AttentionReader]) -> tuple[str, ...]:
    notes = [
        f"{reader.name} has no class token: its statistics are null; the mean of its patches is the uniform "
        f"aggregation, of entropy ln {reader.layout.patches}"
        for reader in readers
        if not reader.layout.class_token
    ]
    if len(group_readers(readers)) > 1:
        notes.append("encoders see different patches: vectors are compared within groups of the same grid")
    return tuple(notes)
