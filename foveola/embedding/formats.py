"""Files of features: Parquet, NumPy and Zarr, written part by part and read whole."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from foveola import files
from foveola.config import UserError, nearest
from foveola.embedding.parts import FileParts
from foveola.embedding.rows import FeatureRows
from foveola.outside import library

_ABOUT = "foveola"  # where a file keeps what it says about itself, as JSON
_TEXT = ("name", "label")
_BOX = ("x0", "y0", "x1", "y1")  # columns of the box in a file
_DTYPES = {"label_index": "<i8", "image_index": "<i8", "object": "<i8", "width": "<i4", "height": "<i4"}
_DTYPES |= {"masked": "|b1", "readable": "<f4"} | dict.fromkeys(_BOX, "<f4")


class FileColumns(NamedTuple):
    """Types and sizes of all columns of a file, known before it is written."""

    rows: int
    dtypes: dict[str, np.dtype]  # by name, in the order of the file
    shape: tuple[int, ...]  # of the feature of a row


def columns_of(parts: FileParts) -> FileColumns:
    """Return the columns of the file that is made of parts."""
    counts, widths = [], dict.fromkeys(_TEXT, 1)
    for name in _TEXT:
        for text in parts.column(name):
            widths[name] = max(widths[name], text.dtype.itemsize // 4)
            counts.append(len(text))
    feature = next(parts.column("feature"))
    dtypes = {name: np.dtype(f"<U{width}") for name, width in widths.items()}
    dtypes |= {name: np.dtype(dtype) for name, dtype in _DTYPES.items()} | {"feature": feature.dtype}
    return FileColumns(sum(counts) // len(_TEXT), dtypes, feature.shape[1:])


def column_of(rows: FeatureRows, name: str) -> np.ndarray:
    """Return a column of a file, by its name there."""
    return rows.box[:, _BOX.index(name)] if name in _BOX else getattr(rows, name)


def rows_from(columns: dict[str, np.ndarray]) -> FeatureRows:
    """Return rows from the columns of a file by name."""
    box = np.stack([columns[name] for name in _BOX], axis=1)
    return FeatureRows(**{name: box if name == "box" else columns[name] for name in FeatureRows._fields})


# -- NumPy ---------------------------------------------------------------------------------------------------


def _write_npz(path: Path, parts: FileParts, columns: FileColumns, about: str) -> None:
    """An archive as `np.savez` writes it, of arrays that are never whole in memory."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def add(name: str, dtype: np.dtype, shape: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for array in arrays:
                    file.write(np.ascontiguousarray(array, dtype=dtype).tobytes())

        for name, dtype in columns.dtypes.items():
            shape = (columns.rows, *(columns.shape if name == "feature" else ()))
            own = "box" if name in _BOX else name
            arrays = (a[:, _BOX.index(name)] if name in _BOX else a for a in parts.column(own))
            add(name, dtype, shape, arrays)
        text = np.array(about)
        add(_ABOUT, text.dtype, (), [text])


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name != _ABOUT}


def _about_npz(path: Path) -> str:
    with np.load(path, allow_pickle=False) as archive:
        return str(archive[_ABOUT])


# -- Parquet -------------------------------------------------------------------------------------------------


def _write_parquet(path: Path, parts: FileParts, columns: FileColumns, about: str) -> None:
    arrow = _arrow()
    wide = int(np.prod(columns.shape))
    types = {
        name: arrow.string()
        if name in _TEXT
        else arrow.list_(arrow.from_numpy_dtype(dtype), wide)
        if name == "feature"
        else arrow.from_numpy_dtype(dtype)
        for name, dtype in columns.dtypes.items()
    }
    schema = arrow.schema(list(types.items()), metadata={_ABOUT: about})
    settings = {"use_dictionary": list(_TEXT), "compression": dict.fromkeys(types, "snappy")}
    settings["compression"]["feature"] = "none"  # numbers of networks do not shrink
    with library("pyarrow.parquet", "embed", "Parquet").ParquetWriter(path, schema, **settings) as writer:
        for rows in parts:
            arrays = []
            for name, dtype in columns.dtypes.items():
                values = column_of(rows, name)
                if name == "feature":
                    arrays.append(arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), wide))
                elif name in _TEXT:
                    texts = [text or None if name == "label" else text for text in values.tolist()]
                    arrays.append(arrow.array(texts, arrow.string()))
                else:
                    arrays.append(arrow.array(np.ascontiguousarray(values, dtype=dtype)))
            if len(rows.name):
                writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))


def _about_parquet(path: Path) -> str:
    schema = library("pyarrow.parquet", "embed", "Parquet").read_schema(path)
    return (schema.metadata or {})[_ABOUT.encode()].decode()


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    """Read row group by row group: the features are in memory once."""
    with library("pyarrow.parquet", "embed", "Parquet").ParquetFile(path) as file:
        count, start = file.metadata.num_rows, 0
        found: dict[str, Any] = {name: [] for name in file.schema_arrow.names if name != "feature"}
        feature = np.zeros((0, 0), np.float32)
        for batch in file.iter_batches():
            for name, values in found.items():
                values.append(_numpy_of(batch.column(name), name))
            part = batch.column("feature").flatten().to_numpy(zero_copy_only=False)
            part = part.reshape(batch.num_rows, -1)
            if not start:
                feature = np.empty((count, part.shape[1]), part.dtype)
            feature[start : start + len(part)] = part
            start += len(part)
    columns = {name: np.concatenate(values) for name, values in found.items() if values}
    return {**columns, "feature": feature}


def _numpy_of(column: Any, name: str) -> np.ndarray:
    if name in _TEXT:
        return np.array([text or "" for text in column.to_pylist()], dtype=np.str_)
    return column.to_numpy(zero_copy_only=False)


def _arrow() -> Any:
    return library("pyarrow", "embed", "Parquet")


# -- Zarr ----------------------------------------------------------------------------------------------------


def _write_zarr(path: Path, parts: FileParts, columns: FileColumns, about: str) -> None:
    """A group of arrays of the second format, which all versions of the library read."""
    group = library("zarr", "embed", "Zarr").open_group(path, mode="w", zarr_format=2)
    largest = max(len(part) for part in parts.column("object"))
    for name, dtype in columns.dtypes.items():
        inner, own = (columns.shape if name == "feature" else ()), "box" if name in _BOX else name
        shape, start = (columns.rows, *inner), 0
        array = group.create_array(name, shape=shape, dtype=dtype, chunks=(max(largest, 1), *inner))
        for part in parts.column(own):
            values = part[:, _BOX.index(name)] if name in _BOX else part
            if len(values):
                array[start : start + len(values)] = values.astype(dtype)
            start += len(values)
    group.attrs[_ABOUT] = json.loads(about)


def _read_zarr(path: Path) -> dict[str, np.ndarray]:
    group = library("zarr", "embed", "Zarr").open_group(path, mode="r")
    return {name: np.asarray(array[:]) for name, array in group.arrays()}


def _about_zarr(path: Path) -> str:
    group = library("zarr", "embed", "Zarr").open_group(path, mode="r")
    return json.dumps(group.attrs.asdict()[_ABOUT])


# -- all -----------------------------------------------------------------------------------------------------


class _Format(NamedTuple):
    library: str  # that reads and writes it
    write: Callable[[Path, FileParts, FileColumns, str], None]
    read: Callable[[Path], dict[str, np.ndarray]]
    about: Callable[[Path], str]


_FORMATS = {
    ".parquet": _Format("pyarrow", _write_parquet, _read_parquet, _about_parquet),
    ".npz": _Format("numpy", _write_npz, _read_npz, _about_npz),
    ".zarr": _Format("zarr", _write_zarr, _read_zarr, _about_zarr),
}


def format_of(path: Path) -> _Format:
    """Return how a file is written and read, by its name. Raises UserError for other names, and for a library
    that is missing.
    """
    end = path.suffix.lower()
    if end not in _FORMATS:
        near = nearest(end, _FORMATS)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"{path}: expected a name that ends in {', '.join(_FORMATS)}{hint}")
    library(_FORMATS[end].library, "embed", end)
    return _FORMATS[end]


def write_features(path: Path, parts: FileParts, about: dict[str, Any]) -> dict[str, Any]:
    """Make the file of its parts, whole or not there; returns what it says about itself.

    Raises UserError where there is no row.
    """
    made, columns = format_of(path), columns_of(parts)
    if not columns.rows:
        raise UserError(f"{about['data']['name']}: no image that can be read, so there is no row")
    about = {**about, "count": columns.rows}
    text = json.dumps(about, sort_keys=True)
    unnamed = parts.folder / path.name  # what a kill leaves there is written over, or goes with the parts
    if path.suffix.lower() == ".zarr":
        made.write(unnamed, parts, columns, text)
    else:
        with files.whole(unnamed) as part:
            made.write(part, parts, columns, text)
    unnamed.rename(path)
    return json.loads(text)


def header_of(path: Path) -> dict[str, Any]:
    """Return what a file of `embed` says about itself. Raises UserError for one that is missing, damaged, or
    of somebody else.
    """
    if not path.exists():
        raise UserError(f"no file of features {path}; foveola embed writes one")
    with _ours(path):
        about = json.loads(format_of(path).about(path))
        if not {"shape", "settings", "encoder", "data"} <= set(about):
            raise ValueError("it does not say how it was made")
    return about


def read_features(path: str | Path) -> tuple[FeatureRows, dict[str, Any]]:
    """Return all rows of a file of `embed`, and what it says about itself. Raises as `header_of`."""
    path = Path(path).expanduser()
    about = header_of(path)
    with _ours(path):
        rows = rows_from(format_of(path).read(path))
        return rows._replace(feature=rows.feature.reshape(-1, *about["shape"])), about


@contextmanager
def _ours(path: Path) -> Iterator[None]:
    """Say in one line what any of the libraries makes of a damaged file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no file of foveola embed ({type(error).__name__}: {reason})") from error
