"""Parquet files of images that `datasets` and pyarrow write: the same data as their images in a folder."""

import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from foveola.data.identity import identity_of
from foveola.data.sample import BadImage, DataError, full_mask
from foveola.data.shards import parquet as shards
from foveola.data.sources import decode, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "cache"))


def image_bytes(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    return tmp_path / "images"


def write(path: Path, columns: dict[str, list[Any]], a_group: int = 3) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=a_group)
    return f"parquet:{path}"


def test_what_datasets_writes_is_the_same_data_as_a_folder(folder, tmp_path):
    import datasets

    plain: Any = open_source(f"folder:{folder}?limit=7&seed=2")
    whole: Any = open_source(f"folder:{folder}")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    cells = [{"bytes": whole.data(i), "path": whole[i].name} for i in range(10)]
    rows = datasets.Dataset.from_dict({"img": cells, "kind": [whole[i].label for i in range(10)]}, features)
    for number in range(2):
        rows.shard(2, number, contiguous=True).to_parquet(str(tmp_path / f"{number}.parquet"), batch_size=2)
    packed: Any = open_source(f"parquet:{tmp_path}/{{0..1}}.parquet?limit=7&seed=2")
    assert packed.image_names() == plain.image_names()
    assert identity_of(packed).digest == identity_of(plain).digest
    for index in range(7):
        assert packed[index].label == plain[index].label
        assert (decode(packed[index].image) == decode(plain[index].image)).all()


def test_columns_of_bytes_words_names_and_objects(tmp_path):
    box = {"box": [0.0, 0.0, 0.5, 0.25], "label": "wing", "score": None}
    tree = {"width": 24, "height": 16, "objects": [{"bbox": [0, 0, 12, 4], "label": "wing"}]}
    columns: dict[str, list[Any]] = {
        "image": [image_bytes(n) for n in range(3)],
        "label": ["owl", None, "ant"],
        "file": ["x", "y", "z"],
        "objects": [[box], [], None],
        "lists": [{"bbox": [[0.0, 0.0, 12.0, 4.0]], "category": ["wing"]}, None, None],
        "text": [json.dumps(tree), "", None],
    }
    data = write(tmp_path / "a.parquet", columns, 2)
    for query in ("", "&objects=lists", "&objects=text"):
        source: Any = open_source(f"{data}?name=file{query}")
        assert source.image_names() == ["x", "y", "z"]
        assert source.classes == ("ant", "owl", "wing")
        assert [source[i].label for i in range(3)] == [1, None, 0]
        assert source[0].objects.boxes.tolist() == [[0, 0, 0.5, 0.25]]
        assert source[0].objects.labels.tolist() == [2]
        assert source[1].objects is None
        assert source[2].objects is None
    assert open_source(f"{data}?objects=-").has_objects is False
    assert open_source(data)[1].name == "row 1"


def test_columns_of_maps_and_of_several_classes(tmp_path):
    values = np.zeros((16, 24), np.uint8)
    values[2:6] = 1
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    columns = {"image": [image_bytes(0)], "map": [png.getvalue()], "labels": [["b", "a"]]}
    data = write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=r"2 columns of bytes \(image, map\); name the images with image="):
        open_source(data)
    source: Any = open_source(f"{data}?masks=map&label=labels")
    assert source[0].labels == (1, 0)
    assert full_mask(source[0].objects.masks[0]).sum() == 96
    pixels: Any = open_source(f"{data}?image=image&pixels=map&classes=2")
    assert (pixels.label_map(0) == values).all()


def test_row_groups_are_read_one_at_a_time_and_kept(tmp_path, monkeypatch):
    read: list[int] = []
    plain = shards._read_group
    monkeypatch.setattr(shards, "_read_group", lambda *args: (read.append(args[1]), plain(*args))[1])
    source = open_source(write(tmp_path / "a.parquet", {"image": [image_bytes(n) for n in range(9)]}))
    monkeypatch.setattr(shards, "_groups", shards._Groups())  # what a first look has read
    read.clear()
    for index in (7, 8, 0, 6):
        assert (decode(source[index].image) == decode(image_bytes(index))).all()
    assert read == [2, 0]  # four images of two groups


def test_a_note_says_what_reading_at_random_costs(tmp_path, monkeypatch):
    monkeypatch.setattr("foveola.data.shards.parquet._HELD", 1)
    monkeypatch.setattr("foveola.data.shards.parquet.LARGE_GROUP", 1)
    source: Any = open_source(write(tmp_path / "a.parquet", {"image": [image_bytes(n) for n in range(9)]}))
    assert "in 3 row groups" in source.notes[0]
    assert "foveola pack" in source.notes[0]


def test_what_cannot_be_read_is_said_in_one_line(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(DataError, match=r"bad.parquet is no parquet file") as caught:
        open_source(f"parquet:{tmp_path}/bad.parquet")
    assert "\n" not in str(caught.value)
    data = write(tmp_path / "a.parquet", {"image": [image_bytes(0)], "label": [0.5]})
    with pytest.raises(DataError, match="a label is a whole number"):
        open_source(data)
    with pytest.raises(DataError, match=r"no column 'lable' for label=; did you mean 'label'"):
        open_source(f"{data}?lable=x".replace("?lable=x", "?label=lable"))
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_bytes(1))
    cells = [{"bytes": None, "path": str(secret)}, {"bytes": image_bytes(0), "path": "x"}]
    source = open_source(write(tmp_path / "b.parquet", {"image": cells}))
    with pytest.raises(BadImage, match="no bytes in column image"):
        decode(source[0].image)


def test_odd_columns_are_none_of_images_or_labels_and_large_groups_are_not_read(tmp_path, monkeypatch):
    for cells in ([{"bytes": 3}], [{"bytes": "text"}], [[image_bytes(0)]], [1.5]):
        with pytest.raises(DataError, match=r"0 columns of bytes \(none\)"):
            open_source(write(tmp_path / "a.parquet", {"image": cells}))
    for label in (True, float("nan"), 2**40, {"a": 1}, date(2020, 1, 1)):
        with pytest.raises(DataError, match="row 0: a label is a whole number from 0 on, or text"):
            open_source(write(tmp_path / "a.parquet", {"image": [image_bytes(0)], "label": [label]}))
    for objects in (5, "[" * 10**5, [1, 2], "{"):
        with pytest.raises(DataError, match=r"row 0: objects (are not JSON|is a list of objects)"):
            open_source(write(tmp_path / "a.parquet", {"image": [image_bytes(0)], "objects": [objects]}))
    view = pyarrow.table({"image": pyarrow.array([image_bytes(0)], pyarrow.binary_view())})
    features = {"info": {"features": {"label": {"names": ["a"]}, "image": None}}}  # no such column
    view = view.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pyarrow.parquet.write_table(view, str(tmp_path / "view.parquet"))
    source = open_source(f"parquet:{tmp_path}/view.parquet")
    assert (decode(source[0].image) == decode(image_bytes(0))).all()
    monkeypatch.setattr(shards, "LARGEST_GROUP", 100)
    monkeypatch.setattr(shards, "_groups", shards._Groups())
    with pytest.raises(DataError, match=r"image of row group 0 have .* more than memory should"):
        decode(source[0].image)


def test_a_file_that_changes_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    source = open_source(write(path, {"image": [image_bytes(n) for n in range(9)]}))
    write(path, {"image": [image_bytes(n) for n in range(5)]})
    monkeypatch.setattr(shards, "_groups", shards._Groups())
    with pytest.raises(DataError, match="was changed since it was indexed"):
        decode(source[8].image)


def test_streams_of_the_hub_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(DataError, match=r"parquet:hf://datasets/a/b/\*\*/\*.parquet"):
        open_source("hf:a/b?streaming=true")
    with pytest.raises(DataError, match=f"parquet:{tmp_path} reads parquet files"):
        open_source(f"hf:{tmp_path}?streaming=true")
