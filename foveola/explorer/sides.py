"""What the page compares: one or two encoders, each with its files of features, by what their rows are."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from foveola import distributed
from foveola.config import UserError, key, to_dict
from foveola.data.decoding import Decoding
from foveola.data.identity import identity_of, tables
from foveola.data.sample import BadImage
from foveola.data.sources import Source, as_source
from foveola.data.suited import suited
from foveola.embedding.embed import embed
from foveola.embedding.formats import format_of
from foveola.embedding.index import Index
from foveola.evaluation.images import ChosenConfig, choose_images
from foveola.files import RunFolder
from foveola.models.encoder import Encoder
from foveola.models.seen import seen_by
from foveola.zoo.load import load

FEATURE_FILES = (".parquet", ".npz", ".zarr")
NAMES_COMPARED = 64  # rows of a file whose names are compared with those of the data
# What the rows of a file are, and how `foveola.embed` is asked for them.
ROW_KINDS: dict[str, dict[str, Any]] = {
    "images": {"rows": "images"},
    "objects": {"rows": "objects", "masks": True},
    "crops": {"rows": "objects", "masks": False, "view": "object"},
    "patches": {"rows": "patches", "store": "float16"},
}
GIVEN = "given features have settings of their own"


@dataclass(frozen=True)
class ExploreConfig(ChosenConfig):
    """What is computed of an encoder before the page opens, and how its maps are made."""

    features: str | None = key(
        None, "feature of images and objects, as in foveola embed; null = the encoder's own pooling"
    )
    image_size: int | None = key(
        None, "pixels a side of the square that is encoded; null = the encoder's crop", at_least=1
    )
    patches: int = key(500, "images whose patches can be found; 0 = none", at_least=0)
    map: Literal["auto", "umap", "pca"] = key("auto", "how maps are made; auto = umap where it is installed")


@dataclass(eq=False)
class Side:
    """An encoder with what can be found of it.

    Attributes:
        encoder: None where there are features alone; `why` says the reason.
        indices: files of features by kind: images, objects (read by their masks), crops (objects cut out),
            patches.
        lacking: reasons for kinds that are not there.
    """

    name: str
    fingerprint: str
    encoder: Encoder | None = None
    why: str = ""
    indices: dict[str, Index] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)

    def index(self, kind: str) -> Index:
        """Return the features of a kind. Raises UserError, with the reason, where there are none."""
        if kind not in self.indices:
            raise UserError(self.lacking.get(kind, f"{self.name} has no features of {kind}"))
        return self.indices[kind]

    def need(self) -> Encoder:
        """Return the encoder. Raises UserError, with the reason, where there is none."""
        if self.encoder is None:
            raise UserError(self.why)
        return self.encoder

    def sized(self, kind: str) -> Encoder:
        """Return the encoder at the image size of the features of a kind."""
        side = self.index(kind).about["settings"]["image_size"]
        return self.need() if side is None else self.need().sized(side, "image_size")


def sides_of(
    names: Sequence[Any],
    data: Source | str | None,
    settings: dict[str, Any],
    config: ExploreConfig,
    *,
    device: str | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> tuple[list[Side], Source]:
    """Return one or two sides and the source of their images.

    Args:
        names: files of features (those of one encoder are one side), or what `foveola.load` takes.
        data: as of `explore`; None = what the first file of features names.
        settings: what was asked for of `config`, for messages.

    Raises UserError for more than two encoders, two files of the same kind, features of other data, and keys
    that change nothing.
    """
    stored = [name for name in names if _is_features(name)]
    models = [name for name in names if not _is_features(name)]
    if not names:
        raise UserError("nothing to explore: name a run, an encoder, or a file of foveola embed")
    if idle := [name for name in settings if name != "map" and not models]:
        raise UserError(f"{idle[0]}= has no effect: {GIVEN}")
    if data is None and models:
        raise UserError("data= is needed: the images that the encoder is to look at")
    sides: dict[str, Side] = {}
    for path in stored:
        _add(sides, Index.load(path, device))
    if data is None:
        data = next(iter(next(iter(sides.values())).indices.values())).about["data"]["name"]
    for side in sides.values():
        _load_of_features(side, device)
    found = {id(model): _encoder(model, device) for model in models}
    source = _as_read(as_source(data, "test", "data"), sides.values(), found.values())
    for model in models:
        made = _embedded(model, found[id(model)], source, config, cache, progress)
        other = sides.setdefault(made.fingerprint, made)
        if other is not made:
            raise UserError(f"{made.name} and {other.name} are the same encoder: name one of them")
    if len(sides) > 2:
        raise UserError(f"{len(sides)} encoders, but two at most stand side by side")
    shown = list(sides.values())
    for side in shown:
        _check_data(side, source)
    _check_same(shown)
    return shown, source


def _encoder(model: Any, device: str | None) -> Encoder:
    return model if isinstance(model, Encoder) else load(model, distributed.find_device(device))


def _as_read(source: Source, sides: Iterable[Side], encoders: Iterable[Encoder]) -> Source:
    """The source in the range and channels of the encoders, or of features whose encoder is not there."""
    known = [*(side.encoder for side in sides if side.encoder is not None), *encoders]
    if known:
        return seen_by(known, source)
    about = next(iter(next(iter(sides)).indices.values())).about
    reading = about["data"].get("reading")
    if reading is None:
        return source
    return suited(source, Decoding.of(**reading), len(about["transform"]["mean"]))


def _is_features(name: Any) -> bool:
    return isinstance(name, str | Path) and Path(str(name)).suffix.lower() in FEATURE_FILES


def kind_of_index(about: dict[str, Any]) -> str:
    """Return what the rows of a file are, of what it says about itself."""
    rows = about["settings"]["rows"]
    return "crops" if rows == "objects" and not about["masks"] else rows


def _add(sides: dict[str, Side], index: Index) -> None:
    about = index.about
    own, kind = about["encoder"]["fingerprint"], kind_of_index(about)
    side = sides.setdefault(own, Side(str(about["model"]), own))
    if kind in side.indices:
        raise UserError(
            f"{side.indices[kind].path} and {index.path} are both {kind} of one encoder: name one"
        )
    side.indices[kind] = index
    side.lacking = {
        other: f"there is no file of {other}: foveola embed {_words(ROW_KINDS[other])} makes one"
        for other in ROW_KINDS
        if other not in side.indices
    }


def _words(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in settings.items() if name != "store")


def _load_of_features(side: Side, device: str | None) -> None:
    """Load the encoder that made features, where it still is what it was."""
    try:
        found = load(side.name, distributed.find_device(device))
    except UserError as error:
        side.why = f"There are features alone: their encoder {side.name} cannot be loaded ({error})."
        return
    if found.fingerprint() != side.fingerprint:
        side.why = f"There are features alone: they were made by another {side.name} ({side.fingerprint})."
        return
    side.encoder = found


def _embedded(
    model: Any,
    encoder: Encoder,
    source: Source,
    config: ExploreConfig,
    cache: str | Path | None,
    progress: bool,
) -> Side:
    """A side with features of all kinds that the data and the encoder have; what was made is kept."""
    name = encoder.config.origin or "encoder" if isinstance(model, Encoder) else str(model)
    side, folder = Side(name, encoder.fingerprint(), encoder), _kept_in(model, cache)
    common: dict[str, Any] = {
        n: getattr(config, n) for n in ("batch_size", "workers", "precision", "image_size", "limit")
    }
    common |= {} if config.limit is None else {"seed": config.seed}
    for kind, asked in ROW_KINDS.items():
        own: dict[str, Any] = {} if kind == "patches" else {"features": config.features}
        settings: dict[str, Any] = common | asked | own
        if kind in ("objects", "crops") and not source.has_objects:
            side.lacking[kind] = "the data have no boxes or masks: there are no objects to find"
            continue
        if kind == "patches":
            if not config.patches:
                side.lacking[kind] = "patches=0: patches= says of how many images they are to be found"
                continue
            settings |= {"limit": min(config.patches, config.limit or config.patches), "seed": config.seed}
        chosen = choose_images(len(source), settings["limit"], config.seed)
        about = [side.fingerprint, source.name, identity_of(source, chosen).digest, _work(settings)]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        path = folder / f"{kind}-{digest}.npz"
        try:
            embed(encoder, source, out=path, progress=progress, **settings)
        except UserError as error:
            if kind == "images":
                raise
            side.lacking[kind] = f"{name} gives no {kind}: {error}"
            continue
        side.indices[kind] = Index.load(path, str(encoder.device))
    return side


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    speed = ("batch_size", "workers")
    return {name: to_dict(value) for name, value in settings.items() if name not in speed}


def _kept_in(model: Any, cache: str | Path | None) -> Path:
    """The folder of the features of an encoder: asked for, that of its run, or the user's cache."""
    if cache is not None:
        return Path(cache).expanduser()
    if isinstance(model, str | Path):
        run = RunFolder(Path(str(model).partition("?")[0]).expanduser())
        if run.is_run() and os.access(run.path, os.W_OK):
            return run.path / "explore"
    return tables().parent / "explore"


def _check_data(side: Side, source: Source) -> None:
    """Raise UserError unless a row is of an image that the source has at its index."""
    for index in side.indices.values():
        rows = index.rows
        for row in np.unique(np.linspace(0, len(rows.name) - 1, NAMES_COMPARED).astype(int)).tolist():
            image, name = int(rows.image_index[row]), str(rows.name[row])
            try:
                found = source[image].name if image < len(source) else "none"
            except BadImage as error:
                found = str(error)
            if found != name:
                raise UserError(
                    f"{index.path}: image {image} is {name}, in {source.name} it is {found}: these are "
                    "features of other data; data= names theirs"
                )


def _check_same(sides: list[Side]) -> None:
    """Raise UserError unless features of the same kind are of the same images and objects."""
    if len(sides) < 2:
        return
    for kind in ROW_KINDS:
        pair = [side.indices[kind] for side in sides if kind in side.indices]
        if len(pair) == 2:
            same = [
                np.array_equal(getattr(pair[0].rows, column), getattr(pair[1].rows, column))
                for column in ("name", "image_index", "object")
            ]
            if not all(same):
                raise UserError(
                    f"{pair[0].path} and {pair[1].path} differ in their rows: make both of the same data "
                    "and limit="
                )


def check_names(names: Sequence[Any]) -> None:
    """Raise UserError early for files of features that are missing, or need a library that is."""
    for name in names:
        if _is_features(name):
            format_of(Path(str(name)))
