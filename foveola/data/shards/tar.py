"""Tar files in the layout of WebDataset: members of one key, such as a/1.jpg, a/1.cls and a/1.json, that
follow each other are a sample.

Members are only looked at where they lie: nothing is unpacked, and what is no plain file is refused.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from foveola.data.listing import SUFFIXES, check_inside, printable
from foveola.data.sample import DataError
from foveola.data.shards.parts import PartBuilder, ShardColumns, ShardPart
from foveola.data.shards.schema import Label, label_of, listed_labels, objects_in, parse_sample, written_label
from foveola.data.shards.stores import COMPRESSED, Shard, Walked

_MOST = 2**24  # bytes of a header of tar, of a class, or of the JSON of a sample
_TAIL = 2**20  # bytes that may follow the end: tar fills its last record
_AHEAD, _AHEAD_REMOTE = 2**16, 2**20
_BLOCK = tarfile.BLOCKSIZE
IMAGE_SUFFIXES = frozenset(suffix[1:] for suffix in SUFFIXES)
LABEL_EXTENSION, ABOUT_EXTENSION, MAP_EXTENSION = (
    "cls",
    "json",
    "seg.png",
)  # extensions, where no option names others


class Member(NamedTuple):
    """A plain file in a tar file."""

    name: str  # path, below nothing
    key: str
    extension: str  # what follows the first dot of the file name, in small letters
    offset: int
    size: int


def index_tar(shard: Shard, columns: ShardColumns) -> ShardPart:
    """Return where the samples of a tar file lie. Raises DataError, in one line, for what is none or
    unsafe.
    """
    builder, keys = PartBuilder(), set[str]()
    for key, group in groupby(_members(shard), lambda member: member.key):
        where = f"{shard.path}: {key}"
        sample: dict[str, Member] = {}
        for member in group:
            if member.extension in sample:
                raise DataError(f"{shard.path}: {member.name} is there twice")
            sample[member.extension] = member
        if key in keys:
            raise DataError(f"{where} is there twice, apart: members of a sample follow each other")
        keys.add(key)
        _add(builder, shard, sample, columns, where)
    return builder.part()


def _add(
    builder: PartBuilder, shard: Shard, sample: dict[str, Member], columns: ShardColumns, where: str
) -> None:
    image = _image(sample, columns, where)
    if image is None:
        builder.without(next(iter(sample.values())).name)
        return
    about, tree = sample.get(ABOUT_EXTENSION), {}
    if about is not None:
        tree = parse_sample(_content(shard, about), f"{shard.path}: {about.name}")
    listed = [] if columns.objects == "-" else objects_in(tree, where)
    for each in listed:
        builder.number(label_of(each.get("label", each.get("category")), where))
    asked = columns.masks or columns.pixels
    label_map = sample.get(asked or MAP_EXTENSION)
    name = tree.get("name")
    if name is not None and not isinstance(name, str):
        raise DataError(f"{where}: name is text, not {str(name)[:40]!r}")
    builder.add(
        image.name if name is None else printable(name),
        (image.offset, image.size),
        (0, 0) if about is None else (about.offset, about.size),
        (0, 0) if label_map is None else (label_map.offset, label_map.size),
        label=_label(shard, sample, tree, columns, where),
        labels=listed_labels(tree["labels"], where) if tree.get("labels") is not None else None,
        annotated=bool(listed) or (columns.masks is not None and label_map is not None),
    )


def _image(sample: dict[str, Member], columns: ShardColumns, where: str) -> Member | None:
    if columns.image is not None:
        return sample.get(columns.image)
    taken = {columns.masks, columns.pixels}
    found = [name for name in sample if name in IMAGE_SUFFIXES and name not in taken]
    if len(found) > 1:
        raise DataError(
            f"{where} has {' and '.join(found)}: name the image with image={found[0]} (and a label map with "
            f"masks={found[1]} or pixels={found[1]})"
        )
    return sample[found[0]] if found else None


def _label(
    shard: Shard, sample: dict[str, Member], tree: dict[str, Any], columns: ShardColumns, where: str
) -> Label | None:
    if columns.label == "-":
        return None
    if columns.label == "folder":
        top, slash, _ = next(iter(sample.values())).name.partition("/")
        return top if slash else None
    member = sample.get(columns.label or LABEL_EXTENSION)
    if member is not None:
        return written_label(_content(shard, member), f"{shard.path}: {member.name}")
    return None if columns.label else label_of(tree.get("label"), where)


def _content(shard: Shard, member: Member) -> bytes:
    if member.size > _MOST:
        raise DataError(f"{shard.path}: {member.name} has {member.size} bytes, more than any such file")
    return shard.read(member.offset, member.size)


# -- members ------------------------------------------------------------------------------------------------


def _members(shard: Shard) -> Iterator[Member]:
    """The plain files of a tar file, in order; hidden ones and folders are left out."""
    _refuse_compressed(shard)
    walked = Walked(shard, _AHEAD_REMOTE if shard.remote else _AHEAD, _MOST)
    try:
        with tarfile.open(fileobj=walked, mode="r:", errorlevel=2) as tar:  # type: ignore[arg-type]
            while (found := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  (it would keep all of them)
                member = _checked(shard, found)
                if member is not None:
                    yield member
            end = tar.offset
    except (tarfile.TarError, OverflowError, ValueError, RecursionError) as error:
        raise DataError(f"{shard.path} is no whole tar file: {error}") from error
    _check_end(shard, end)


def _checked(shard: Shard, found: tarfile.TarInfo) -> Member | None:
    name = printable(posixpath.normpath(found.name)) if found.name else ""
    if found.isdir():
        return None
    if not found.isreg() or found.issparse():
        kinds = {
            tarfile.SYMTYPE: "a symbolic link",
            tarfile.LNKTYPE: "a hard link",
            tarfile.FIFOTYPE: "a pipe",
        }
        kind = (
            "a sparse file" if found.issparse() else kinds.get(found.type, "a device or of an unknown kind")
        )
        raise DataError(f"{shard.path}: {printable(found.name)} is {kind}; only plain files are read")
    check_inside(shard.path, [found.name])
    if found.size < 0 or found.offset_data + found.size > shard.size:
        raise DataError(
            f"{shard.path} is cut off: {name} has {found.size} bytes from {found.offset_data} "
            "on, the "
            f"file ends at {shard.size}"
        )
    folder, base = posixpath.split(name)
    if base.startswith(".") or name.startswith("__"):  # the latter tells something about the file itself
        return None
    stem, _, extension = base.partition(".")
    return Member(name, posixpath.join(folder, stem), extension.lower(), found.offset_data, found.size)


def _check_end(shard: Shard, end: int) -> None:
    """`tarfile` stops without a word at a damaged header: what follows the last member is zeros."""
    rest = shard.size - end
    if rest < _BLOCK:
        raise DataError(f"{shard.path} is cut off: it does not end as a tar file does")
    data = shard.read(end, min(rest, _TAIL))
    if data.count(0) != len(data) or rest > _TAIL:
        first = len(data) - len(data.lstrip(b"\0"))
        what = (
            "a damaged header" if first < _BLOCK else "more data behind its end (tar files that were joined?)"
        )
        raise DataError(f"{shard.path}: {what}, at {end + first}")


def _refuse_compressed(shard: Shard) -> None:
    start = shard.read(0, min(8, shard.size))
    for magic, remedy in COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{shard.path} is compressed: nothing can be read at random within, and images are "
                "compressed "
                f"themselves; decompress it ({remedy})"
            )
    if not shard.size:
        raise DataError(f"{shard.path} is empty")
