"""`foveola visualize`: what encoders make of images, drawn to PNG files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveola import distributed
from foveola.config import UserError, build, kind_of
from foveola.data.shown import showing, shown_channels
from foveola.data.sources import Source, open_source
from foveola.drawing.sheet import Sheet, save_png
from foveola.figures import gallery
from foveola.figures.answers import answers_sheet
from foveola.figures.choice import image_numbers, pairs_of, points_of, samples_of
from foveola.figures.detections import DetectionsConfig, detections_sheet
from foveola.figures.pca import Basis, Maps, fit_basis
from foveola.figures.scores import channels_sheet, scores_sheet
from foveola.figures.settings import (
    AnswersConfig,
    AttentionConfig,
    ChannelsConfig,
    CorrespondenceConfig,
    DictionaryConfig,
    NeighboursConfig,
    ObjectsFigureConfig,
    PcaConfig,
    PositionsConfig,
    QueryConfig,
    ScoresConfig,
    SimilarityConfig,
)
from foveola.figures.tiles import encoders_by_name, images_of, shown_size
from foveola.files import check_writable
from foveola.models.encoder import Encoder
from foveola.models.seen import seen_by
from foveola.outside import Door
from foveola.zoo.load import load

# Other files of images, which are not written; a folder's name may have another dot.
OTHERS = (".jpg", ".jpeg", ".svg", ".pdf", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".eps")


@dataclass(frozen=True)
class Figure:
    """One kind of figure. docs/extend.md shows one of your own.

    Attributes:
        name: how it is asked for; it is written to `<name>.png`.
        config: a frozen dataclass of its keys, each with a default, with the base
            `foveola.figures.settings.SheetConfig`, or `ImagesConfig`.
        draw: makes the sheet, from encoders by name, the source of images, and the configuration.
        help: one line on what it shows.
        data: whether it needs images; without, the source is None.
        train: whether it also looks into training images, which `draw` gets as its fourth argument.
    """

    name: str
    config: type
    draw: Callable[..., Sheet]
    help: str
    data: bool = True
    train: bool = False


def visualize(
    kind: str | Figure,
    model: Encoder | str | Path | Sequence[str | Path] | Mapping[str, Encoder],
    data: Source | str | None = None,
    *,
    out: str | Path = "figures",
    train: Source | str | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> list[Path]:
    """Draw a figure to `out`, a folder (`out/<kind>.png`) or a file ending in .png.

    Args:
        kind: a name (`foveola visualize --help` lists them), an importable name such as
            `my_module:my_figure`, or a `Figure`.
        model: an `Encoder`, several by name, or what `foveola.load` takes (several as a list, or in one text
            with commas between). Several are columns side by side.
        data: a data string (opened with the split "test") or a source; not needed for positions.
        train: where neighbours are looked for; by default the split "train" of `data`.
        settings: keys of the kind's configuration, such as `count=4`, `joint=True`.

    Returns the paths of what it wrote. For arrays instead of files call `draw`, or the functions of
    `foveola.figures.gallery`. Raises UserError for unknown kinds and keys, bad values, and what an encoder
    or the data does not have.
    """
    out, figure, config = Path(out).expanduser(), find_figure(kind), configure(kind, settings)
    alone = out.suffix.lower() == ".png"
    if out.suffix.lower() in OTHERS and not out.is_dir():
        raise UserError(f"out={out}: expected a folder, or a file that ends in .png")
    path = out if alone else out / f"{figure.name}.png"
    check_writable(path.parent, "give another out=")
    sheet = draw(figure, model, data, train=train, device=device, **settings)
    written = [save_png(sheet.draw(config.cell), path)]
    if config.each:
        for number, row in enumerate(sheet.rows):
            for column, (head, image) in enumerate(zip(sheet.columns, row.tiles, strict=False)):
                name = f"{path.stem}-{number:03d}-{column}-{_slug(head)}.png"
                written.append(save_png(image, path.parent / name))
    return written


def draw(
    kind: str | Figure,
    model: Encoder | str | Path | Sequence[str | Path] | Mapping[str, Encoder],
    data: Source | str | None = None,
    *,
    train: Source | str | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Sheet:
    """Return the sheet that `visualize` writes: its tiles are arrays, at full size."""
    figure, config = find_figure(kind), configure(kind, settings)
    if data is None and figure.data:
        raise UserError(f"visualize {figure.name} needs data=, such as data=folder:/images or data=scenes:")
    source = open_source(data, "test") if isinstance(data, str) else data
    references = train
    if figure.train and (train is not None or isinstance(data, str)):
        references = open_source(str(train or data), "train") if not isinstance(train, Source) else train
    encoders = open_models(model, device)
    source = None if source is None else seen_by(list(encoders.values()), source)
    if isinstance(references, Source):
        references = seen_by(list(encoders.values()), references)
    more = (references or source,) if figure.train else ()
    (name, encoder), *others = encoders.items()
    with showing(shown_channels(source)):
        sheet = figure.draw(encoders if others else {"": encoder}, source, config, *more)
    if not isinstance(sheet, Sheet):
        raise UserError(
            f"{figure.name}: draw returns {kind_of(sheet)}, expected a foveola.drawing.sheet.Sheet"
        )
    return replace(sheet, title=f"{sheet.title}: {name}") if name and not others else sheet


def find_figure(kind: str | Figure) -> Figure:
    """Return a figure by its name, by an importable name (`my_package.my_module:my_figure`), or as it is.

    Names are those of `KINDS`, then those that packages announce in the group `foveola.figures`. Raises
    UserError for a name that nothing has, and for what is no figure.
    """
    found = DOOR.find(kind) if isinstance(kind, str) else kind
    asked = kind if isinstance(kind, str) else "visualize"
    if not isinstance(found, Figure):
        raise UserError(f"{asked}: expected a foveola.Figure, got {kind_of(found)}")
    if not is_dataclass(found.config) or not {"cell", "each"} <= {f.name for f in fields(found.config)}:
        raise UserError(f"{asked}: a figure needs a dataclass with the base SheetConfig as its config")
    if not re.fullmatch(r"[A-Za-z]\w*", found.name, re.ASCII):
        raise UserError(f"{asked}: the name {found.name!r} is needed in letters, digits and _, for its file")
    if found.name in FIGURES and found is not FIGURES[found.name]:
        raise UserError(f"{asked}: {found.name!r} is a figure of foveola; another one needs another name")
    return found


def configure(kind: str | Figure, settings: Mapping[str, Any]) -> Any:
    """Return the configuration of a figure. Raises UserError for unknown kinds and keys, and bad values."""
    return build(find_figure(kind).config, dict(settings))


def open_models(
    model: Encoder | str | Path | Sequence[str | Path] | Mapping[str, Encoder],
    device: str | torch.device | None = None,
) -> dict[str, Encoder]:
    """Return encoders by a short name each: the last part of their path that tells them apart."""
    if isinstance(model, Encoder | Mapping):
        return encoders_by_name(model)
    if isinstance(model, str | Path):
        model = [model] if Path(model).exists() else [part.strip() for part in str(model).split(",")]
    where = distributed.find_device(device)
    texts = [str(one).rstrip("/") for one in model]
    if not texts or not all(texts) or len(set(texts)) < len(texts):
        raise UserError(f"model: expected different models, got {', '.join(texts) or 'none'}")
    return {name: load(text, where) for name, text in zip(_short(texts), texts, strict=True)}


def _short(texts: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as tell them apart; `untrained:` and the like stay."""
    prefixes = [text[: text.rfind(":") + 1] for text in texts]
    paths = [
        [part for part in text[len(start) :].split("/") if part]
        for text, start in zip(texts, prefixes, strict=True)
    ]
    paths = [path[:-1] if path[-1:] == ["encoder"] and len(path) > 1 else path for path in paths]
    for parts in range(1, max(map(len, paths), default=1) + 1):
        names = [start + "/".join(path[-parts:]) for start, path in zip(prefixes, paths, strict=True)]
        if len(set(names)) == len(names):
            return names
    return list(texts)


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return "-".join(filter(None, kept.split("-"))) or "tile"


# -- the kinds ---------------------------------------------------------------------------------------------


def _pca(encoders: dict[str, Encoder], source: Source, config: PcaConfig) -> Sheet:
    samples = samples_of(source, image_numbers(source, config.count, config.images))
    basis = None
    if (config.basis or config.save_basis) and len(encoders) > 1:
        raise UserError("a basis belongs to one encoder: give one model= with basis and save_basis")
    if config.basis is not None:
        basis = Basis.load(config.basis)
    if config.save_basis is not None:
        encoder = next(iter(encoders.values()))
        maps = Maps(encoder, images_of(samples), shown_size(encoder, config.size), config.tile)
        basis = fit_basis(maps, config.foreground)
        basis.save(config.save_basis)
    return gallery.pca_sheet(
        encoders, samples, config.size, config.joint, config.foreground, basis, config.tile
    )


def _of_samples(sheet: Callable[..., Sheet], *names: str) -> Callable[..., Sheet]:
    """Call a function of `gallery` with samples and these keys of its configuration."""

    def run(encoders: dict[str, Encoder], source: Source, config: Any) -> Sheet:
        values = {name: getattr(config, name) for name in names}
        if "points" in values:
            values["points"] = points_of(values["points"])
        return sheet(
            encoders, samples_of(source, image_numbers(source, config.count, config.images)), **values
        )

    return run


def _correspondences(encoders: dict[str, Encoder], source: Source, config: CorrespondenceConfig) -> Sheet:
    pairs = pairs_of(source, config.count, config.images)
    return gallery.correspondence_sheet(encoders, pairs, config.size, config.pairs, config.tile)


def _neighbours(
    encoders: dict[str, Encoder], source: Source, config: NeighboursConfig, references: Source
) -> Sheet:
    chosen = image_numbers(source, config.count, config.images)
    return gallery.neighbour_sheet(
        encoders, references, source, chosen, config.found, config.masks, config, True
    )


def _objects(encoders: dict[str, Encoder], source: Source, config: ObjectsFigureConfig) -> Sheet:
    samples = samples_of(source, image_numbers(source, config.count, config.images))
    how = config.size, config.block, config.objects, config.min_coverage
    return gallery.objects_sheet(encoders, samples, *how)


def _answers(encoders: dict[str, Encoder], source: Source, config: AnswersConfig) -> Sheet:
    if len(encoders) > 1:
        raise UserError("answers shows one fine-tuned encoder: give one model=")
    chosen = image_numbers(source, config.limit, config.images)
    return answers_sheet(next(iter(encoders.values())), source, chosen, config.worst, config.best)


def _positions(encoders: dict[str, Encoder], source: Source | None, config: PositionsConfig) -> Sheet:
    return gallery.position_sheet(encoders, config.some)


_OWN = (
    Figure("pca", PcaConfig, _pca, "principal components of patch features as red, green, blue"),
    Figure(
        "attention",
        AttentionConfig,
        _of_samples(gallery.attention_sheet, "size", "block", "mass", "heads", "min_coverage"),
        "what the class token reads, with and without an object's mask",
    ),
    Figure(
        "objects", ObjectsFigureConfig, _objects, "what each head of an object token reads inside its mask"
    ),
    Figure(
        "query",
        QueryConfig,
        _of_samples(gallery.query_sheet, "points", "size", "block", "heads"),
        "what the patch under a point reads",
    ),
    Figure(
        "similarity",
        SimilarityConfig,
        _of_samples(gallery.similarity_sheet, "points", "size", "tile"),
        "cosine of all patches with the one under a point",
    ),
    Figure(
        "correspondences",
        CorrespondenceConfig,
        _correspondences,
        "patches of two images that are each other's nearest",
    ),
    Figure(
        "neighbours",
        NeighboursConfig,
        _neighbours,
        "nearest images or objects, with and without masks",
        train=True,
    ),
    Figure("answers", AnswersConfig, _answers, "worst and best answers of the head of a fine-tuned encoder"),
    Figure(
        "scores",
        ScoresConfig,
        _of_samples(scores_sheet, "maps", "probe", "threshold", "block", "size"),
        "score maps of the ways to average patches, and boxes around what they light up",
    ),
    Figure(
        "channels",
        ChannelsConfig,
        _of_samples(channels_sheet, "size", "components", "joint", "tile"),
        "principal components of patch features, each by itself",
    ),
    Figure(
        "dictionary",
        DictionaryConfig,
        _of_samples(gallery.dictionary_sheet, "size", "components", "alpha", "joint", "tile"),
        "a sparse dictionary of patch features, a colour for each direction",
    ),
    Figure(
        "detections",
        DetectionsConfig,
        detections_sheet,
        "what fine-tuned detectors find, beside what is annotated; order=worst shows where they fail",
    ),
    Figure(
        "positions",
        PositionsConfig,
        _positions,
        "position embeddings, field or angles; needs no data",
        data=False,
    ),
)
FIGURES = {figure.name: figure for figure in _OWN}
DOOR = Door("kind", "foveola.figures", FIGURES, "my_module:my_figure")
