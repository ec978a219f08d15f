"""Parquet files with a column of images, as `datasets` writes them: row groups are read one at a time."""

import io
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from foveola.config import nearest
from foveola.data.listing import printable
from foveola.data.sample import BadImage, DataError
from foveola.data.shards.index import ShardIndex
from foveola.data.shards.parts import PartBuilder, ShardColumns, ShardPart
from foveola.data.shards.schema import label_of, objects_in, parse_sample
from foveola.data.shards.stores import Shard

_HELD = 2**28  # bytes of row groups that a process holds
LARGE_GROUP = 2**23  # bytes of a row group from which on reading one for an image is worth a word
LARGEST_GROUP = 2**33  # bytes of columns of a row group that are read at once
_LABEL, _OBJECTS = "label", "objects"  # columns, where no option names others


class Ranged(io.RawIOBase):
    """A file of which any part can be read, for pyarrow."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.position = shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.shard.size}[whence]
        self.position = base + offset
        return self.position

    def read(self, size: int = -1, /) -> bytes:
        rest = max(self.shard.size - self.position, 0)
        data = self.shard.read(self.position, rest if size is None or size < 0 else min(size, rest))
        self.position += len(data)
        return data


@lru_cache(maxsize=32)
def _file(shard: Shard) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError("parquet: needs the extra `datasets`: pip install 'foveola[datasets]'") from error
    try:
        return pq.ParquetFile(pyarrow.PythonFile(Ranged(shard), "r"), pre_buffer=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{shard.path} is no parquet file: {str(error).splitlines()[0]}") from error


def _read_group(shard: Shard, group: int, columns: list[str]) -> Any:
    import pyarrow

    file = _file(shard)
    about = file.metadata.row_group(group)
    size = sum(about.column(k).total_uncompressed_size for k in range(about.num_columns)
               if about.column(k).path_in_schema.split(".")[0] in columns)  # fmt: skip
    if size > LARGEST_GROUP:
        raise DataError(
            f"{shard.path}: {', '.join(columns)} of row group {group} have {size / 2**30:.1f} GiB, more than "
            "memory should be given for: write the file with smaller row groups"
        )
    try:
        return file.read_row_group(group, columns=columns, use_threads=False)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        if isinstance(error.__cause__ or error.__context__, DataError):
            raise (error.__cause__ or error.__context__) from None  # type: ignore[misc]
        raise DataError(
            f"{shard.path}: row group {group} cannot be read: {str(error).splitlines()[0]}"
        ) from error


# -- which columns ------------------------------------------------------------------------------------------


def hub_features(shard: Shard) -> dict[str, Any]:
    """Return what `datasets` wrote about the columns of a file; empty where another program wrote it."""
    text = (_file(shard).schema_arrow.metadata or {}).get(b"huggingface")
    try:
        found = json.loads(text)["info"]["features"] if text else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def find_columns(shard: Shard, requested: ShardColumns) -> ShardColumns:
    """Return the columns of a file by what was asked for, or else by kind and name. Raises DataError for one
    that is missing, or where several may be meant.
    """
    schema = _file(shard).schema_arrow
    kinds = {field.name: field.type for field in schema}
    features = hub_features(shard)
    for option, column in vars(requested).items():
        if column not in (None, "-") and column not in kinds:
            near = nearest(column, kinds)
            hint = f"did you mean {near!r}?" if near else f"it has {', '.join(kinds)}"
            raise DataError(f"parquet: {shard.path} has no column {column!r} for {option}=; {hint}")
    others = {requested.masks, requested.pixels}
    image = requested.image
    if image is None:
        fitting = [name for name, kind in kinds.items() if name not in others and _holds_files(kind)]
        if len(fitting) != 1:
            raise DataError(
                f"parquet: {shard.path} has {len(fitting)} columns of bytes "
                f"({', '.join(fitting) or 'none'}); name "
                f"the images with image=; columns: {', '.join(kinds)}"
            )
        (image,) = fitting
    elif not _holds_files(kinds[image]):
        raise DataError(f"parquet: column {image!r} of {shard.path} holds no bytes, but {kinds[image]}")
    label = requested.label
    if label is None:
        named = [name for name in kinds if "names" in (features.get(name) or ())]
        label = named[0] if len(named) == 1 else _LABEL if _LABEL in kinds else "-"
    objects = requested.objects or (_OBJECTS if _OBJECTS in kinds else "-")
    return ShardColumns(image, label, requested.pixels, requested.masks, objects, requested.name)


def class_names(shard: Shard, columns: ShardColumns) -> tuple[str, ...] | None:
    """Return the names of the classes of the column of labels, where the file says them."""
    found = hub_features(shard).get(str(columns.label))
    names = found.get("names") if isinstance(found, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _holds_files(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_files(kind.field("bytes").type)
    is_view = getattr(types, "is_binary_view", lambda kind: False)  # from pyarrow 16 on
    return types.is_binary(kind) or types.is_large_binary(kind) or is_view(kind)


# -- index --------------------------------------------------------------------------------------------------


def index_parquet(shard: Shard, columns: ShardColumns) -> ShardPart:
    """Return what is known of the rows of a file without its images. `columns` are those of
    `find_columns`.
    """
    builder = PartBuilder()
    file = _file(shard)
    kinds = {field.name: field.type for field in file.schema_arrow}
    for column in vars(columns).values():
        if column not in (None, "-") and column not in kinds:
            raise DataError(f"{shard.path} has no column {column!r}, which the first file of the set has")
    path = f"{columns.image}.path" if _has_path(kinds[columns.image]) and not columns.name else None
    wanted = [
        each for each in (columns.label, columns.name, columns.objects, path) if each not in (None, "-")
    ]
    number = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        table = _read_group(shard, group, wanted).to_pydict() if wanted else {}
        nothing = [None] * count
        names = table.get(columns.name, nothing)
        if path:
            names = [(cell or {}).get("path") for cell in table.get(columns.image, nothing)]
        rows = zip(table.get(columns.label, nothing), names, table.get(columns.objects, nothing), strict=True)
        for row, (label, name, objects) in enumerate(rows):
            where = f"{shard.path}, row {number}"
            listed = objects_in({"objects": cell_objects(objects, where)}, where)
            for each in listed:
                builder.number(label_of(each.get("label", each.get("category")), where))
            several = isinstance(label, list)
            builder.add(
                printable(str(name)) if name is not None else f"row {number}",
                (group, row),
                (group, 1) if listed else (0, 0),
                (group, 1) if columns.masks or columns.pixels else (0, 0),
                label=None if several or label == -1 else label_of(label, where),
                labels=[each for each in (label_of(x, where) for x in label) if each is not None]
                if several
                else None,
                annotated=bool(listed) or columns.masks is not None,
            )
            number += 1
    return builder.part()


def _has_path(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_struct(kind) and kind.get_field_index("path") >= 0


def cell_objects(cell: Any, where: str) -> Any:
    """Return the objects in a cell: JSON as text, or a list of structs, in which null is what is not said."""
    if isinstance(cell, str | bytes):
        if not cell:
            return None
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: objects are not JSON: {str(error).splitlines()[0]}") from None
        return cell.get("objects") if isinstance(cell, dict) and "objects" in cell else cell
    if isinstance(cell, list):
        return [_said(each) if isinstance(each, dict) else each for each in cell]
    return cell


def _said(each: dict[str, Any]) -> dict[str, Any]:
    return {key: part for key, part in each.items() if part is not None}


# -- cells --------------------------------------------------------------------------------------------------


class _Groups:
    """ShardColumns of row groups that were read last, up to a number of bytes."""

    def __init__(self) -> None:
        self.columns: OrderedDict[tuple[Shard, int, str], Any] = OrderedDict()
        self.size = 0
        self.lock = threading.Lock()

    def get(self, shard: Shard, group: int, column: str) -> Any:
        known = shard, group, column
        with self.lock:
            if known in self.columns:
                self.columns.move_to_end(known)
                return self.columns[known]
        found = _read_group(shard, group, [column])[column]
        with self.lock:
            if known not in self.columns:
                self.columns[known] = found
                self.size += found.nbytes
            while self.size > _HELD and len(self.columns) > 1:
                _, old = self.columns.popitem(last=False)
                self.size -= old.nbytes
        return found


_groups = _Groups()


@dataclass(frozen=True)
class Cell:
    """A cell of a column of files."""

    shard: Shard
    column: str
    group: int
    row: int

    def value(self) -> Any:
        """Return what it holds, as Python has it."""
        return _groups.get(self.shard, self.group, self.column)[self.row].as_py()

    def read_bytes(self) -> bytes:
        """Return its bytes. Raises BadImage where there are none: a path in a file is not followed."""
        found = self.value()
        found = found.get("bytes") if isinstance(found, dict) else found
        if not found:
            raise BadImage(f"no bytes in column {self.column}")
        return found


class ParquetHeld:
    """The images of parquet files."""

    exact = False

    def __init__(self, index: ShardIndex, columns: ShardColumns) -> None:
        self.index, self.columns = index, columns

    def _cell(self, row: int, column: str | None) -> Cell:
        group, inside = (int(self.index.array(name)[row]) for name in ("places", "sizes"))
        return Cell(self.index.shard(row), str(column), group, inside)

    def image(self, row: int) -> Cell:
        """Return where the image lies."""
        return self._cell(row, self.columns.image)

    def about(self, row: int) -> dict[str, Any]:
        """Return the objects of an image, as in the JSON of a sample."""
        if not self.index.array("about_sizes")[row]:
            return {}
        cell = self._cell(row, self.columns.objects).value()
        whole = parse_sample(cell.encode(), self.index.name(row)) if isinstance(cell, str) and cell else {}
        sides = {name: whole[name] for name in ("width", "height") if name in whole}
        return {"objects": cell_objects(cell, self.index.name(row)), **sides}

    def label_map(self, row: int) -> bytes:
        """Return the file of the label map of an image; none where it has none."""
        column = self.columns.masks or self.columns.pixels
        try:
            return self._cell(row, column).read_bytes() if column else b""
        except BadImage:
            return b""

    def bytes_of(self, rows: np.ndarray) -> np.ndarray:
        """Return about how many bytes each image has: the mean of all files."""
        whole = sum(shard.size for shard in self.index.shards)
        return np.full(len(rows), whole // max(len(self.index), 1), np.int64)

    def notes(self) -> tuple[str, ...]:
        """Return what reading at random costs, where that is much."""
        groups_of = self.index.array("places")
        groups = 1 + int(np.count_nonzero(np.diff(groups_of))) if len(groups_of) else 1
        size = sum(shard.size for shard in self.index.shards)
        if size <= _HELD or size / groups < LARGE_GROUP:
            return ()
        return (
            f"{len(self.index.shards)} parquet files of {size / 2**30:.1f} GiB in {groups:,} row groups: "
            "in random "
            f"order, {size / groups / 2**20:.0f} MiB are read for each image; `foveola pack` makes shards "
            "of them, "
            "of which each image is read alone",
        )
