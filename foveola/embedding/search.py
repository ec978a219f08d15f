"""`foveola.search`: what is most alike to images, or to an object in one, in a file of features."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from jaxtyping import Shaped
from PIL import Image

from foveola import distributed, files
from foveola.config import UserError, build, kind_of
from foveola.data.decode import UNRANGED, decode, pixels_of
from foveola.data.decoding import Decoding
from foveola.data.sample import Objects, Sample
from foveola.data.shown import rgb_of, shown_channels, shown_image
from foveola.data.sources import Source, as_source, why_bad
from foveola.data.suited import suited
from foveola.data.values import ImagePixels
from foveola.drawing.overlays import box_outlines
from foveola.drawing.sheet import Pixels, Row, Sheet, save_png, shrunk
from foveola.embedding.index import Index
from foveola.embedding.rows import WHOLE, EmbedConfig, Embedding, FeatureRows
from foveola.evaluation.images import PARCEL
from foveola.evaluation.result import aligned
from foveola.failures import explained
from foveola.models.encoder import Encoder
from foveola.models.seen import seen_by
from foveola.models.transform import resize
from foveola.outside import library
from foveola.zoo.load import load

MARK = (255, 220, 0)
SHOWN_SIDE = 224  # pixels of the longer side of a tile


@dataclass
class QueryImages:
    """Images of the caller's own as a source, each perhaps with the box that is asked about."""

    samples: list[Sample]
    channels: int = 3
    name: str = "query"
    classes: tuple[str, ...] | None = None

    @property
    def has_objects(self) -> bool:
        return any(sample.objects is not None for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What was found for each query, nearest first."""

    queries: tuple[dict[str, Any], ...]  # name, box in the unit square, whether it was read with a mask
    hits: tuple[tuple[dict[str, Any], ...], ...]  # similarity, and what `Index.describe` says
    about: dict[str, Any]  # the index: file, encoder, data, method
    query_images: tuple[ImagePixels, ...]  # the images of the queries as they were read, small

    def table(self) -> str:
        """Return aligned plain text: a line for each query, and one for each of its hits."""
        lines = []
        for query, hits in zip(self.queries, self.hits, strict=True):
            about_box = query["masked"] or tuple(query["box"]) != WHOLE
            box = f", box {_box_text(query)}" if about_box else ""
            lines.append(f"{query['name']}{box}")
            head = ("", "cosine", "name", "label", "object", "box")
            cells = [
                (
                    str(rank),
                    f"{hit['similarity']:.4f}",
                    hit["name"],
                    hit["label"] or "-",
                    "-" if hit["object"] < 0 else str(hit["object"]),
                    _box_text(hit),
                )
                for rank, hit in enumerate(hits, start=1)
            ]
            lines += [f"  {line}" for line in aligned([head, *cells], {2, 3, 4, 5})]
        notes = [self.about["note"]] if self.about.get("note") else []
        return "\n".join([*lines, *notes])

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        found = [{**query, "hits": list(hits)} for query, hits in zip(self.queries, self.hits, strict=True)]
        return {"index": self.about, "queries": found}

    def frame(self) -> Any:
        """Return a pandas DataFrame with a line for each hit. Raises UserError without pandas."""
        lines = [
            {"query": query["name"], "rank": rank, **hit}
            for query, hits in zip(self.queries, self.hits, strict=True)
            for rank, hit in enumerate(hits, start=1)
        ]
        return library("pandas", "frames", "SearchResult.frame()").DataFrame(lines)

    def sheet(self, data: Source | str | None = None) -> Sheet:
        """Return the queries and what was found for them as images, with the boxes of objects and patches.

        `data` are the images of the index; by default those that it names. Raises UserError where these
        are not those images.
        """
        source = _images_of(self.about, data, self.query_images[0].shape[2])
        rows, shown = [], shown_channels(source)
        for query, pixels, hits in zip(self.queries, self.query_images, self.hits, strict=True):
            tiles, captions = [_boxed(rgb_of(pixels, shown), query["box"])], ["query"]
            for hit in hits:
                tiles.append(_boxed(shrunk(_pixels_of_hit(source, hit), SHOWN_SIDE), hit["box"]))
                captions.append(f"{hit['similarity']:.3f} {hit['label'] or ''}".rstrip())
            rows.append(Row(query["name"], tiles, captions))
        count = max(map(len, self.hits), default=0)
        columns = ["query", *(f"nearest {i + 1}" for i in range(count))]
        note = f"By cosine of features ({self.about['features']}) of {self.about['model']}."
        return Sheet("Most alike", columns, rows, note)

    def save(self, out: str | Path, data: Source | str | None = None) -> Path:
        """Write the result to a file that ends in `.json`, or the sheet to one that ends in `.png`."""
        path = check_result_name(out)
        if path.suffix == ".json":
            return files.write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        return save_png(self.sheet(data).draw(), path)


def search(
    index: Index | str | Path,
    query: Any,
    *,
    box: Sequence[float] | None = None,
    top: int = 10,
    model: Encoder | str | Path | None = None,
    method: str = "exact",
    device: str | None = None,
    progress: bool = False,
) -> SearchResult:
    """Encode images as an index was encoded, and return the rows that are most alike, by cosine.

    Args:
        index: a file that `foveola.embed` wrote, or an `Index` of one.
        query: an image (a path, bytes, a PIL image, an array [H, W, 3] of uint8), several in a list, a data
            string, or a source. Of a data set with objects each object is a query where the index has
            objects.
        box: x0, y0, x1, y1 in pixels of the upright image: the object there is asked for, as the objects of
            the index were read; of an index of images by a token that reads its patches alone, as in training
            and evaluations; of an index of patches by their mean.
        top: rows to return for each query.
        model: the encoder of the index; by default the one that the index names.
        method: as of `Index.search`.
        device: as of `foveola.embed`.

    Raises UserError for an encoder that is not that of the index, images that cannot be read, a box outside
    of what the encoder sees, and an index of patches without a box.
    """
    opened = index if isinstance(index, Index) else Index.load(index, device)
    if not opened.about:
        raise UserError(
            "this index does not say which encoder made it: encode the query yourself, and ask Index.search"
        )
    source, rows = encode_query(
        opened, query, box, lambda: _encoder_of(opened, model, device), progress=progress
    )
    found = opened.search(rows.feature.reshape(len(rows.name), -1), top, method=method, progress=progress)
    hits = tuple(
        tuple({"similarity": float(s), **opened.describe(i)} for s, i in zip(*pair, strict=True))
        for pair in zip(found.similarities, found.indices, strict=True)
    )
    facts = opened.about
    about = {name: facts[name] for name in ("model", "features", "data", "settings")}
    about |= {"path": str(opened.path or ""), "encoder": facts["encoder"]["fingerprint"], "method": method}
    if method == "hnsw" and opened.graph is not None:
        about["recall"] = opened.graph.recall
        about["note"] = (
            f"note: the graph finds {100 * opened.graph.recall:.1f} % of the exact 10 nearest rows"
        )
    queries = tuple(
        {"name": str(n), "box": b.astype(float).tolist(), "masked": bool(m)}
        for n, b, m in zip(rows.name, rows.box, rows.masked, strict=True)
    )
    query_images = tuple(_small(decode(source[int(i)].image)) for i in rows.image_index)
    return SearchResult(queries, hits, about, query_images)


def encode_query(
    index: Index,
    query: Any,
    box: Sequence[float] | None,
    encoder: Callable[[], Encoder],
    progress: bool = False,
) -> tuple[Source, FeatureRows]:
    """Return queries as a source, and their rows as `search` encodes them for this index.

    `encoder` gives the one of the index, and is asked once the query is known to be one. Arguments and errors
    are those of `search`.
    """
    used = encoder()
    source = seen_by([used], _source_of(query, box, index, used))
    config = _asking(index, source, box)
    rows = _encoded(used, source, config, progress)
    if box is not None and config.masks is not False and not rows.masked.all():
        raise UserError(f"box={_plain_box(box)} lies outside of the square of the image that is encoded")
    return source, rows


def check_result_name(out: str | Path) -> Path:
    """Return the path of a result. Raises UserError unless it ends in .json or .png."""
    path = Path(out).expanduser()
    if path.suffix not in (".json", ".png"):
        raise UserError(f"out={out}: expected a name that ends in .json or .png")
    return path


# -- what is asked -------------------------------------------------------------------------------------------


def _source_of(query: Any, box: Sequence[float] | None, index: Index, encoder: Encoder) -> Source:
    """The queries as a source: of images of the caller's own, or a data set."""
    several = list(query) if isinstance(query, list | tuple) else [query]
    if len(several) == 1 and not _is_image(several[0]):
        if box is not None:
            raise UserError("box= is of one image, not of a data set")
        return as_source(several[0], "test", "query")
    if not several:
        raise UserError("query: expected at least one image")
    if box is not None and len(several) > 1:
        raise UserError(f"box= is of one image, not of {len(several)}")
    samples, reading = [], _reading_of(index, encoder)
    for number, each in enumerate(several, start=1):
        pixels, objects = _pixels(each, reading, encoder.config.model.channels), None
        if box is not None:
            height, width = pixels.shape[:2]
            objects = _object_at(box, width, height)
        name = str(each) if isinstance(each, str | Path) else getattr(each, "name", f"image {number}")
        samples.append(Sample(pixels, name, objects))
    return QueryImages(samples, encoder.config.model.channels)


def _reading_of(index: Index, encoder: Encoder) -> Decoding:
    """How images are read, as those of the index were."""
    usual, data = encoder.config.transform.decoding, index.about["data"]
    if data.get("reading") is not None:
        return Decoding.of(**data["reading"])
    values = dict(parse_qsl(data["name"].partition("?")[2])).get("range")  # of files of earlier versions
    if values is None or values.startswith("percentile:"):  # measured: as the encoder knows it
        return usual
    return replace(usual, **UNRANGED | Decoding.values(values))


def _pixels(image: Any, reading: Decoding, channels: int) -> Shaped[np.ndarray, "H W C"]:
    """Pixels of an image; those of a sample are what its data make of it. Raises UserError."""
    pixels = decode(image.image) if isinstance(image, Sample) else pixels_of(image, None, reading)
    if pixels.shape[2] != channels:
        raise UserError(
            f"{kind_of(image)}: {pixels.shape[2]} channel(s), but the encoder of the index sees {channels}"
        )
    return pixels


def _is_image(query: Any) -> bool:
    """Whether this is one image, rather than a data string or a source."""
    if isinstance(query, str):
        there = Path(query).expanduser()
        return there.is_file() or not (":" in query or there.is_dir())
    return isinstance(query, Path | bytes | np.ndarray | Image.Image | Sample)


def _object_at(box: Sequence[float], width: int, height: int) -> Objects:
    """The object of a box in pixels. Raises UserError for one that is none, or is not in the image."""
    numbers = [n for n in box if isinstance(n, int | float) and not isinstance(n, bool)]
    if len(numbers) != len(box) or len(box) != 4:
        raise UserError(f"box={_plain_box(box)}: expected x0,y0,x1,y1 in pixels")
    x0, y0, x1, y1 = numbers
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"box={_plain_box(box)}: expected x0 < x1 <= {width} and y0 < y1 <= {height}, the pixels of the "
            "image"
        )
    found = Objects.from_boxes(np.array([numbers], np.float64) / [width, height, width, height])
    assert found is not None
    return found


def _asking(index: Index, source: Source, box: Sequence[float] | None) -> EmbedConfig:
    """How queries are encoded: as the rows of the index, or, of a box, as an object of theirs would be."""
    settings = dict(index.about["settings"])
    config = build(EmbedConfig, settings | {"limit": None, "store": "float32", "workers": 0})
    if box is not None and config.rows == "objects":
        if config.masks is False and config.view == "image":
            raise UserError("box= has no effect: masks=false read the objects of this index as whole images")
        return config
    if box is not None:
        feature = "average" if config.rows == "patches" else config.features
        return replace(config, rows="objects", masks=True, features=feature)
    if config.rows == "patches":
        raise UserError("this index is of patches: box=x0,y0,x1,y1 says which patches of the query are meant")
    if not source.has_objects:  # whole images
        return replace(config, rows="images", masks=False, view="image")
    return config


def _encoder_of(index: Index, model: Encoder | str | Path | None, device: str | None) -> Encoder:
    """The encoder of the index. Raises UserError for another one."""
    about = index.about
    named = about["model"] if model is None else model
    if isinstance(named, Encoder):
        encoder, named = named, kind_of(named)
    else:
        hint = "; model= names the encoder of the index, if it is somewhere else" if model is None else ""
        try:
            encoder = load(named, distributed.find_device(device))
        except UserError as error:
            raise UserError(f"{error}{hint}") from error
    own = about["encoder"]["fingerprint"]
    if (found := encoder.fingerprint()) != own:
        raise UserError(
            f"the index was made by {about['model']} ({own}), but {named} is {found}: queries need the same "
            "encoder"
        )
    return encoder


def _encoded(encoder: Encoder, source: Source, config: EmbedConfig, progress: bool) -> FeatureRows:
    embedding = Embedding(encoder, source, config, progress=progress)
    every = np.arange(len(source))
    ((_, rows),) = embedding.read(every, -(-len(every) // PARCEL) * PARCEL)
    if bad := np.setdiff1d(every, rows.image_index).tolist():
        raise UserError(f"query: {len(bad)} images cannot be read, such as {why_bad(source, bad[0])}")
    return rows


# -- what is shown -------------------------------------------------------------------------------------------


def _images_of(about: dict[str, Any], data: Source | str | None, channels: int) -> Source:
    """The images of the index, read as they were when it was made."""
    try:
        source = as_source(about["data"]["name"] if data is None else data, "test", "data")
        reading = about["data"].get("reading")
        return source if reading is None else suited(source, Decoding.of(**reading), channels)
    except UserError as error:
        hint = "" if data is not None else "; data= names the images of the index, if they are somewhere else"
        raise UserError(f"{error}{hint}") from error


def _pixels_of_hit(source: Source, hit: dict[str, Any]) -> Pixels:
    index, name = hit["image_index"], hit["name"]
    found = source[index].name if index < len(source) else "none"
    if found != name:
        raise UserError(f"{source.name}: image {index} is {found}, in the index {name}: these are other data")
    with explained(f"{name} cannot be shown"):
        return shown_image(source[index].image)


def _small(pixels: ImagePixels) -> ImagePixels:
    """Pixels of any channels and depth, whose longer side has that of a tile at most."""
    scale = SHOWN_SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    rows, columns = (max(round(side * scale), 1) for side in pixels.shape[:2])
    return resize(pixels, rows, columns).permute(1, 2, 0).numpy()


def _boxed(pixels: Pixels, box: Sequence[float]) -> Pixels:
    if tuple(box) == WHOLE:
        return pixels
    return box_outlines(pixels, [(np.array(box), MARK)])


def _box_text(found: dict[str, Any]) -> str:
    return ", ".join(f"{number:.3f}" for number in found["box"])


def _plain_box(box: Any) -> str:
    return ",".join(map(str, box)) if isinstance(box, list | tuple) else str(box)
