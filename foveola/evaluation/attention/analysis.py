"""`analyze_attention`: several encoders over one reading of the images, batch by batch, into running means.

Nothing of an image is kept but what it adds to the means, so memory does not grow with their number.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from foveola import distributed
from foveola.config import UserError, build, to_dict
from foveola.data.identity import identity_of
from foveola.data.sample import Sample
from foveola.data.sources import Source, decode, notes_of, open_source
from foveola.evaluation.attention.reader import (
    AnalysisConfig,
    AttentionReader,
    Geometry,
    VectorGroup,
    group_readers,
)
from foveola.evaluation.attention.result import AttentionAnalysis, RunningMoments
from foveola.evaluation.images import Batches, Images, choose_images, facts_of_bad, slice_of_rank
from foveola.evaluation.result import versions
from foveola.failures import explained
from foveola.models.encoder import Encoder
from foveola.models.seen import seen_by
from foveola.models.transform import TransformConfig, evaluation_view
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
    """Return statistics of the attention of every block and head of encoders, averaged over images.

    Args:
        models: what `foveola.load` takes, or `Encoder`s; one, several, or several by name.
        data: a data string, opened with the split of tests, or a source. Neither labels nor objects are used.
        out: folder for `attention.json` and `attention.csv`; None = nothing is written.
        device: where models that are loaded run; by default a GPU if there is one.
        settings: keys of `AnalysisConfig`, such as `limit=200`, `size=480`.

    Statistics are those of `attention.HEAD_STATISTICS` and `BLOCK_STATISTICS` (docs/analysis.md), in nats,
    pixels and fractions of one. An encoder without class token or registers has none of theirs (NaN). Under
    torchrun every process analyses its part of the images, and all get the result.

    Raises UserError for bad settings, models and data, for sizes that are no whole patches, when more than
    1 % of the images cannot be read, and for encoders whose attention is not finite.
    """
    config, began = build(AnalysisConfig, settings), perf_counter()
    source = open_source(data, "test") if isinstance(data, str) else data
    at = distributed.find_device(device)
    readers = [AttentionReader(name, _open(model, at), config) for name, model in _named(models).items()]
    source = seen_by([reader.encoder for reader in readers], source)
    if unused := set(config.probe) - {reader.probe for reader in readers}:
        raise UserError(f"probe={min(unused)} was trained on none of these encoders")
    groups = group_readers(readers)
    folder = None if out is None else distributed.on_main(lambda: _folder(Path(out).expanduser()))
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
    images = Images(source, chosen[slice_of_rank(len(chosen))], SquaresCut(geometries))
    batches: Batches[Squares] = Batches(images, config, f"attention on {source.name}", progress)
    problem = ""
    try:
        for number, seen in enumerate(batches):
            for reader in readers:
                reader.read(seen.images[reader.geometry], number, source.name)
            for group in groups:
                group.add()
    except UserError as error:
        problem = str(error)
    for found in distributed.gather_objects(problem):  # a rank that gave up must not leave others waiting
        if found:
            raise UserError(found)
    facts = facts_of_bad(batches.gathered_bad(), len(chosen), source)
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
    with explained(f"out={path}: no folder can be made there"):
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


class Squares(NamedTuple):
    """Some images, each cut for every geometry."""

    image_indices: Int64[Tensor, "k"]
    images: dict[Geometry, Shaped[Tensor, "k ch S S"]]


class SquaresCut:
    """Cuts an image, decoded once, as encoders of several geometries see it before normalisation."""

    def __init__(self, geometries: tuple[Geometry, ...]) -> None:
        self.geometries = geometries

    def __call__(self, sample: Sample, index: int) -> Squares:
        """Return the views of one image. Raises BadImage."""
        image = decode(sample.image)
        return Squares(torch.tensor([index]), {each: cut(image, each)[None] for each in self.geometries})


def cut(image: Shaped[np.ndarray, "H W ch"], geometry: Geometry) -> Shaped[Tensor, "ch S S"]:
    """Return the centre of an image, as an encoder sees it before normalisation."""
    size, crop, interpolation, squash = geometry
    kind = "bicubic" if interpolation == "bicubic" else "bilinear"
    transform = TransformConfig(resize=size, crop=crop, squash=squash, interpolation=kind)
    return evaluation_view(image, transform).pixels


# -- the end -------------------------------------------------------------------------------------------------


def _gather(moments: RunningMoments) -> None:
    """Over all ranks, in their order: all get the same."""
    parts = distributed.gather_objects((moments.count, moments.mean, moments.squares))
    if len(parts) > 1:
        whole = RunningMoments(*moments.mean.shape)
        for count, mean, squares in parts:
            other = RunningMoments()
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
