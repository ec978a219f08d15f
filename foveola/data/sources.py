"""Where samples come from, and the data strings that name it: `kind:/path?key=value&...`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from urllib.parse import unquote

import numpy as np
from jaxtyping import UInt8

from foveola.config import UserError, kind_of, nearest, path_hint
from foveola.data.decode import decode
from foveola.data.decoding import Decoding
from foveola.data.given import GivenObjects
from foveola.data.hub import open_hub
from foveola.data.imagenet import (
    open_imagenet_a,
    open_imagenet_real,
    open_imagenet_v2,
    open_listed,
    open_objectnet,
)
from foveola.data.layouts import open_coco, open_folder, open_imagenet, open_tiny_imagenet
from foveola.data.look import look
from foveola.data.options import (
    at_least_one,
    existing_folder,
    existing_path,
    fraction,
    fraction_or_none,
    one_of,
    positive,
    split_name,
    tile_size,
    true_or_false,
    whole_number,
    whole_numbers,
    whole_range,
)
from foveola.data.parts import Cutting, cut_into_parts, names_parts
from foveola.data.sample import IGNORE, BadImage, DataError, Sample
from foveola.data.scenes import open_scenes
from foveola.data.segmentation import (
    PixelSource,
    open_ade20k,
    open_camvid,
    open_cityscapes,
    open_coco_stuff,
    open_masks,
    open_voc,
)
from foveola.data.shards.opening import open_parquet, open_shards
from foveola.data.shown import with_components
from foveola.data.voc import ignored_flags, open_voc_objects
from foveola.outside import announced, imported, is_importable

__all__ = ["BadImage", "DataError", "PixelSource", "Source", "decode", "open_source"]

Split = Literal["train", "test"]
SOURCE_ENTRY_POINTS = "foveola.sources"  # of entry points
OBJECT = "python"  # kind of the names under which configurations mention a caller's own source
SOURCE_MEMBERS = ("name", "classes", "has_objects", "__len__", "__getitem__")  # by a source


@runtime_checkable
class Source(Protocol):
    """Samples by index. Picklable and cheap to hand to workers: no open files, no lists of objects.

    A source may also say what it is: `identity(chosen=None) -> foveola.data.identity.Identity`, of all images
    or of those of some indices. Without that method, every sample is gone through to find out.
    """

    @property
    def name(self) -> str:
        """The data string, with every option that matters."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the labels of images and objects, if there are any."""
        ...

    @property
    def has_objects(self) -> bool:
        """Whether objects are annotated at all."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """A sample, its image not yet decoded. BadImage (with the name) when not even that can be had."""
        ...


def notes_of(source: Any) -> tuple[str, ...]:
    """Return what a source says about its data that whoever uses them should know; nothing of a source
    without.
    """
    return tuple(getattr(source, "notes", ()))


def open_source(spec: str, split: Split = "train") -> Source:
    """Open a data string; docs/data.md describes each kind.

    `split` chooses between the halves of kinds that have them (docs/data.md), unless the string
    says `split=`. Raises DataError, on one line, for an unknown kind or option, and for files that are
    missing or wrong.
    """
    kind, colon, rest = spec.partition(":")
    path, _, query = rest.partition("?")
    if kind not in KINDS and (found := _from_outside(kind, path)) is not None:
        return _open_own(spec, *found, query, split)
    if not colon or kind not in KINDS:
        raise DataError(_unknown_kind(spec, kind))
    opener, own = KINDS[kind]
    allowed = dict(own)
    allowed |= {} if kind == "scenes" else {"limit": at_least_one, "seed": whole_number}
    allowed |= {} if kind == "scenes" else READINGS
    allowed |= CUTTINGS
    allowed |= MOVING if kind in ("folder", "shards", "parquet") else {}
    allowed |= {"holdout": fraction, "split": split_name} if kind in WITHOUT_HALVES else {}
    allowed.setdefault("annotations", existing_path)
    options = _parse_options(kind, query, allowed)
    given = None if "annotations" in own else options.pop("annotations", None)
    cutting = Cutting(**{name: options.pop(name) for name in CUTTINGS if name in options})
    if kind == "scenes":
        if path:
            raise DataError(f"scenes: is built in and has no path, but was given {path!r}")
        return _in_parts(opener(options.pop("split", split), **options), cutting, given)
    if given is not None and (others := {"boxes", "masks"} & options.keys()):
        raise DataError(f"{kind}: takes {min(others)}= or annotations=, not both")
    if not path:
        raise DataError(f"{kind}: needs a folder, as in {kind}:/path")
    root = Path(unquote(path)).expanduser()
    if kind not in NO_FOLDER and not root.is_dir():
        raise DataError(f"{kind}: {_no_folder(root)}")
    limit, seed = options.pop("limit", None), options.pop("seed", 0)
    reading = Decoding()
    for name in (*READINGS, *MOVING):
        reading = replace(reading, **options.pop(name, {}))
    if reading.every is not None and reading.seconds is not None:
        raise DataError(f"{kind}: every= and seconds= both say which frames of videos are taken: give one")
    if reading.moving and kind == "folder":
        options["videos"] = True
    if "split" in own:
        options.setdefault("split", split)
        spec += "" if "split=" in query else f"{'&' if query else '?'}split={options['split']}"
    half = options.pop("split", split) if kind in WITHOUT_HALVES else split
    holdout = options.pop("holdout", None)
    if holdout is not None:
        spec += "" if "split=" in query else f"&split={half}"
    elif kind in WITHOUT_HALVES and "split=" in query:
        raise DataError(f"{kind}: split= needs holdout=, the fraction of the images that are for test")
    source = opener(spec, unquote(path) if kind in NO_FOLDER else root, **options)
    if reading != Decoding():
        source.read_as(reading)
    of_parts = given is not None and names_parts(given)
    source = with_objects(source, None if of_parts else given)
    look(source)  # at all of it: each part of one folder is read alike
    if holdout is not None:
        source.hold_out(holdout, seed, half)
    source = with_components(_in_parts(source, cutting, given if of_parts else None))
    if limit is not None:
        source.limit(limit, seed)
    return source


def _in_parts(source: Any, cutting: Cutting, annotations: Path | None) -> Any:
    """A source cut into parts, where something says so; with objects that a file gives to the parts."""
    reading = getattr(source, "reading", Decoding())
    if reading.page == "each":
        source.read_as(replace(reading, page=None))
        cutting = replace(cutting, pages=True)
    cutting.check()
    of_file = reading.moving or reading.level is not None or reading.mpp is not None
    if cutting != Cutting() or of_file:
        source = cut_into_parts(source, cutting)
    return with_objects(source, annotations)


def with_objects(source: Any, annotations: str | Path | None) -> Any:
    """Return a source with the objects of a COCO file in place of its own, as `annotations=` of a data string
    gives them; None leaves it as it is. Raises DataError for a file that does not fit.
    """
    return source if annotations is None else GivenObjects(source, Path(annotations).expanduser())


def _from_outside(kind: str, path: str) -> tuple[Any, dict[str, str]] | None:
    """What opens a data string that is none of ours, and the options that it has before the question mark.

    An entry point of the group `foveola.sources` is a kind of its own, and gets what follows the colon as
    `path`; `my_package.my_module:open` is the function itself.
    """
    if kind in (own := announced(SOURCE_ENTRY_POINTS)):
        return imported(own[kind].value), {"path": unquote(path)} if path else {}
    name = f"{kind}:{path}"
    if kind == OBJECT or not is_importable(name) or ("." not in kind and not find_spec(kind)):
        return None
    return imported(name), {}


def _open_own(spec: str, opener: Any, options: dict[str, str], query: str, split: Split) -> Source:
    """A source of somebody else's function, which gets each option as text, and `split` if it has that."""
    if not callable(opener):
        raise DataError(f"{spec}: expected a function that returns a source, got {kind_of(opener)}")
    known = signature(opener).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known.values())
    names = [*known] if not takes_all else [part.partition("=")[0] for part in query.split("&") if part]
    readers: Mapping[str, Callable[[str], Any]] = {"annotations": existing_path} | dict.fromkeys(names, str)
    given = _parse_options(spec.partition("?")[0], query, readers)
    annotations = None if "annotations" in names else given.pop("annotations", None)
    options |= given
    if "split" in known:
        options.setdefault("split", split)
    lacking = [name for name, each in known.items() if each.default is each.empty and name not in options]
    lacking = [n for n in lacking if known[n].kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    if lacking:
        raise DataError(f"{spec} needs the option {lacking[0]}=")
    try:
        opened = opener(**options)
    except UserError:
        raise
    except Exception as error:  # whatever the function does
        raise DataError(f"{spec} cannot be opened: {type(error).__name__}: {error}") from error
    return with_objects(as_source(opened, split, spec), annotations)


def as_source(data: Any, split: Split, what: str) -> Source:
    """Return a data string opened, or a source of the caller's own as it is.

    Raises DataError, which begins with `what` (the name of an argument), for an object that is no source.
    """
    if isinstance(data, str):
        return open_source(data, split)
    if lacks := [name for name in SOURCE_MEMBERS if not hasattr(data, name)]:
        raise DataError(
            f"{what}: expected a data string or a source, got {kind_of(data)}, which has no "
            f"{', '.join(lacks)}; docs/data.md shows a source of your own"
        )
    if not len(data):
        raise DataError(f"{what}: {data.name} is empty")
    try:
        first = data[0]
    except BadImage:
        return data
    if not isinstance(first, Sample):
        raise DataError(f"{what}: {data.name}[0] is {kind_of(first)}, expected a foveola.Sample")
    return data


def _no_folder(root: Path) -> str:
    if root.exists():
        return f"{root} is a file, but a folder is needed"
    return f"no folder {root}{path_hint(root)}"


def _unknown_kind(spec: str, kind: str) -> str:
    if kind == OBJECT:
        return f"{spec} was an object of Python, which no data string can open: pass it again, as data="
    valid = ", ".join(f"{name}:" for name in KINDS)
    if spec and Path(spec.partition("?")[0]).expanduser().is_dir():
        return f"data {spec!r} needs a kind in front; did you mean folder:{spec}?"
    if is_importable(f"{kind}:x") and Path(*kind.split(".")).with_suffix(".py").is_file():
        return f"unknown data {spec!r}; PYTHONPATH=. lets Python find the module {kind} of this folder"
    near = nearest(kind, KINDS)
    return f"unknown data {spec!r}" + (f"; did you mean {near}:?" if near else f"; valid kinds: {valid}")


def _parse_options(kind: str, query: str, allowed: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, equals, text = part.partition("=")
        if name not in allowed:
            near = nearest(name, allowed)
            hint = f"did you mean {near}?" if near else f"valid: {', '.join(allowed) or 'none'}"
            raise DataError(f"{kind}: has no option {name!r}; {hint}")
        try:
            if not equals or name in options:
                raise ValueError("a value, once")
            options[name] = allowed[name](unquote(text))
        except ValueError as error:
            raise DataError(f"{kind}: option {part!r} needs {error}") from None
    return options


# Kinds without halves of their own, which holdout= makes.
WITHOUT_HALVES = ("folder", "coco", "masks", "listed", "shards", "parquet")
_MEMBERS = ("image", "label", "pixels", "masks", "objects")  # of a sample in shards
NO_FOLDER = ("hf", "shards", "parquet")  # what follows the colon may be no folder of this machine
LABEL_MAP_KEYS: Mapping[str, Callable[[str], Any]] = {
    "ignore": whole_number,
    "values": whole_numbers,
    "absent": lambda text: bool(one_of("allow")(text)),
}
KINDS: dict[str, tuple[Callable[..., Any], Mapping[str, Callable[[str], Any]]]] = {
    "scenes": (
        open_scenes,
        {
            "size": whole_number,
            "count": whole_number,
            "seed": whole_number,
            "objects": whole_range,
            "split": split_name,
            "background": one_of("class", "ignore"),
        },
    ),
    "folder": (open_folder, {"boxes": existing_path, "masks": existing_folder, "ignore": whole_number}),
    "tinyimagenet": (open_tiny_imagenet, {"split": split_name}),
    "imagenet": (open_imagenet, {"boxes": existing_folder, "split": split_name}),
    "coco": (open_coco, {"annotations": existing_path, "files": existing_path}),
    "masks": (open_masks, {"labels": existing_folder, "classes": str, **LABEL_MAP_KEYS}),
    "voc": (open_voc, {"split": one_of("train", "trainaug", "val", "test")}),
    "voc-objects": (
        open_voc_objects,
        {"split": one_of("train", "val", "trainval", "test"), "ignore": ignored_flags},
    ),
    "ade20k": (open_ade20k, {"split": split_name}),
    "cityscapes": (open_cityscapes, {"split": split_name}),
    "cocostuff": (open_coco_stuff, {"labels": existing_folder, "classes": str}),
    "camvid": (open_camvid, {"split": one_of("train", "val", "test")}),
    "imagenetv2": (open_imagenet_v2, {}),
    "imagenet-a": (open_imagenet_a, {}),
    "imagenet-real": (open_imagenet_real, {"labels": existing_path}),
    "objectnet": (open_objectnet, {"border": whole_number}),
    "listed": (open_listed, {"files": existing_path, "classes": str, "several": true_or_false}),
    "hf": (
        open_hub,
        dict.fromkeys(("split", "config", "image", "label", "pixels", "classes"), str)
        | {"streaming": true_or_false}
        | LABEL_MAP_KEYS,
    ),
    "shards": (open_shards, dict.fromkeys((*_MEMBERS, "classes", "cache"), str) | LABEL_MAP_KEYS),
    "parquet": (open_parquet, dict.fromkeys((*_MEMBERS, "name", "classes", "cache"), str) | LABEL_MAP_KEYS),
}

MOVING: Mapping[str, Callable[[str], Any]] = {
    "every": lambda text: {"every": at_least_one(text)},
    "seconds": lambda text: {"seconds": positive(text)},
}
CUTTINGS: Mapping[str, Callable[[str], Any]] = {
    "tiles": tile_size,
    "overlap": whole_number,
    "tissue": fraction_or_none,
}
READINGS: Mapping[str, Callable[[str], Any]] = {
    "range": Decoding.values,
    "pages": Decoding.paged,
    "channels": Decoding.chosen,
    "level": lambda text: {"level": whole_number(text)},
    "mpp": lambda text: {"mpp": float(positive(text))},
    "show": Decoding.seen,
}


def image_name(source: Source, index: int) -> str:
    """Return the name of an image that cannot be read, perhaps not even asked for."""
    try:
        return source[index].name
    except (BadImage, OSError) as error:
        return str(error)


def why_bad(source: Any, index: int) -> str:
    """Return the name of an image that cannot be used, and the reason: of its file, or of what
    annotates it.
    """
    name = image_name(source, index)
    try:
        pixels = decode(source[index].image)
        if isinstance(source, PixelSource):
            read_label_map(source, index, pixels.shape[:2])
    except (BadImage, OSError) as error:
        return str(error) if str(error).startswith(name) else f"{name} ({error})"
    return name


def read_label_map(source: Any, index: int, shape: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """Return the label map of an image of `shape` (rows, columns).

    Raises BadImage for one that cannot be read, holds a value of no class, or is of another shape: such an
    image is counted, named and replaced as other bad ones are.
    """
    try:
        found = source.label_map(index)
    except BadImage:
        raise
    except DataError as error:
        raise BadImage(str(error)) from error
    if found.shape != shape:
        (h, w), (lh, lw) = shape, found.shape
        raise BadImage(f"is {w}x{h} pixels, its label map {lw}x{lh}")
    wrong = (found >= len(source.classes)) & (found != IGNORE)
    if wrong.any():
        raise BadImage(
            f"its label map holds {found[wrong][0]}, which is none of {len(source.classes)} classes"
        )
    return found
