"""Tar files of samples: that they are the same data as their images in a folder, and what is refused."""

import io
import json
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from pycocotools import mask as coco

from foveola.data import sizes
from foveola.data.identity import identity_of
from foveola.data.inventory import inventory_of
from foveola.data.loader import Loader, LoaderConfig
from foveola.data.readers import read_header
from foveola.data.sample import BadImage, DataError, full_mask
from foveola.data.shards.index import ShardIndex
from foveola.data.shards.stores import braced
from foveola.data.sources import decode, open_source

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def image_bytes(seed: int, size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of two classes."""
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, (24, 16 + number)))
    return tmp_path / "images"


def write_tar(path: Path, files: Files | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sharded(folder: Path, out: Path, a_file: int = 5) -> Path:
    """The images of a folder in shards that webdataset writes."""
    source: Any = open_source(f"folder:{folder}")
    out.mkdir()
    with webdataset.ShardWriter(str(out / "%03d.tar"), maxcount=a_file, verbose=0) as writer:  # type: ignore[attr-defined]
        for index in range(len(source)):
            sample = source[index]
            key = sample.name.removesuffix(".png")
            writer.write({"__key__": key, "png": source.data(index), "cls": sample.label})
    (out / "foveola.json").write_text(json.dumps({"classes": source.classes}))
    return out


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    return sharded(folder, tmp_path / "shards")


@pytest.mark.parametrize(
    "query", ["", "limit=5&seed=3", "holdout=0.3&split=test", "holdout=0.3&split=train&limit=4"]
)
def test_shards_are_the_same_data_as_a_folder(folder, shards, query):
    plain: Any = open_source(f"folder:{folder}?{query}")
    packed: Any = open_source(f"shards:{shards}?{query}")
    assert packed.image_names() == plain.image_names()
    assert packed.classes == plain.classes
    for index in range(len(plain)):
        assert packed[index].label == plain[index].label
        assert (decode(packed[index].image) == decode(plain[index].image)).all()
    one, other = identity_of(plain), identity_of(packed)
    assert one.digest == other.digest
    assert (one.contents == other.contents).all()
    assert identity_of(packed, np.array([1])).digest == identity_of(plain, np.array([1])).digest
    before, after = (inventory_of(each, np.arange(len(each)), one.contents) for each in (plain, packed))
    assert before.names == after.names
    assert (before.sizes == after.sizes).all()
    assert (before.hashes == after.hashes).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_with_any_workers_ranks_and_beginnings(folder, shards, workers):
    def batches(data: str, workers: int, rank: int, start: int) -> list[Any]:
        config = LoaderConfig(canvas=32, workers=workers, prefetch=1)
        source = open_source(data)
        loader = Loader(source, 2, 7, config, with_objects=False, rank=rank, world_size=2, start_step=start)
        stream = iter(loader)
        found = [next(stream) for _ in range(5 - start)]  # beyond an epoch of 3 steps
        stream.close()
        return found

    for rank in (0, 1):
        plain = batches(f"folder:{folder}", 0, rank, 0)
        packed = [
            *batches(f"shards:{shards}", workers, rank, 0)[:2],
            *batches(f"shards:{shards}", workers, rank, 2),
        ]
        for one, other in zip(plain, packed, strict=True):
            for a, b in zip(one.tensors(), other.tensors(), strict=True):
                assert torch.equal(a, b)


def test_the_index_is_made_once_and_mapped(shards, cache, monkeypatch):
    first = open_source(f"shards:{shards}")
    monkeypatch.setattr("tarfile.open", None)  # it is not made again
    again: Any = open_source(f"shards:{shards}")
    assert again.image_names() == first.image_names()  # type: ignore[attr-defined]
    assert isinstance(again.held.index.array("places"), np.memmap)
    assert len(pickle.dumps(again.held.index)) < 3000  # the name of a folder goes to workers, not arrays
    copied = pickle.loads(pickle.dumps(again))
    assert copied.image_names() == again.image_names()
    assert (decode(copied[3].image) == decode(again[3].image)).all()


def test_sizes_of_images_that_are_cut_are_read_once(folder, shards, monkeypatch):
    (folder / "b" / "03.png").write_bytes(b"no image")
    plain: Any = open_source(f"folder:{folder}?tiles=8&overlap=3")
    packed = sharded(folder, shards.parent / "damaged")
    names = open_source(f"shards:{packed}?tiles=8&overlap=3").image_names()  # type: ignore[attr-defined]
    assert names == plain.image_names()
    looked: list[str] = []
    read = sizes.read_header
    monkeypatch.setattr(sizes, "read_header", lambda *args: looked.append("") or read(*args))
    for query in ("tiles=8&overlap=3", "tiles=16", "holdout=0.3&split=train&tiles=8"):
        again: Any = open_source(f"shards:{packed}?{query}")
        there = "b/03.png" in again.image_names()
        assert len(looked) == there  # the damaged one alone, which may have been mended
        looked.clear()
    assert (again.sizes[:, 0] > 0).sum() == len(again.sizes) - there


def test_an_index_that_was_ended_goes_on(shards, cache, monkeypatch):
    from foveola.data.shards import index as module

    seen: list[str] = []
    plain = module._index_one

    def some(indexer: Any, shard: Any, *rest: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(shard.name)
        plain(indexer, shard, *rest)

    monkeypatch.setattr(module, "_index_one", some)
    with pytest.raises(KeyboardInterrupt):
        open_source(f"shards:{shards}")
    rest: list[str] = []
    monkeypatch.setattr(module, "_index_one", lambda *args: (rest.append(args[1].name), plain(*args)))
    assert len(open_source(f"shards:{shards}")) == 12
    assert sorted(seen + rest) == ["000.tar", "001.tar", "002.tar"]


def test_a_damaged_index_is_made_again(shards, cache):
    source: Any = open_source(f"shards:{shards}")
    where = source.held.index.folder
    (where / "set.json").write_text("{")
    assert len(open_source(f"shards:{shards}")) == 12
    (where / "names").unlink()
    assert len(open_source(f"shards:{shards}")) == 12


def test_processes_share_the_indexing(shards, monkeypatch):
    monkeypatch.setattr("foveola.data.shards.index.WORTH_PROCESSES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert len(open_source(f"shards:{shards}")) == 12


def test_no_cache_that_can_be_written_costs_time_alone(shards, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "file"))
    assert len(open_source(f"shards:{shards}")) == 12
    assert "FOVEOLA_CACHE names another folder" in capsys.readouterr().err


def test_patterns_name_files(shards):
    assert len(open_source(f"shards:{shards}/{{000..001}}.tar")) == 10
    assert len(open_source(f"shards:{shards}/00*.tar?label=-")) == 12
    assert len(open_source(f"shards:{shards}/002.tar")) == 2
    assert [*braced("a{08..10}{x,y}b{c}")] == [f"a{n}{x}b{{c}}" for n in ("08", "09", "10") for x in "xy"]
    with pytest.raises(DataError, match=r"no file or folder .*/003.tar; did you mean"):
        open_source(f"shards:{shards}/{{002..003}}.tar")
    with pytest.raises(DataError, match=r"names more than"):
        open_source(f"shards:{shards}/{{0..99999999}}.tar")


def test_a_shard_that_changes_is_noticed_in_one_line(shards):
    source = open_source(f"shards:{shards}")
    before = decode(source[0].image)
    path = shards / "000.tar"
    data = bytearray(path.read_bytes())
    stretch: Any = source[0].image
    data[stretch.start : stretch.start + stretch.size] = bytes(stretch.size)
    with path.open("r+b") as file:  # in place, as a copy of others would be written
        file.write(data)
    with pytest.raises(DataError, match=r"000.tar: was changed since it was indexed") as caught:
        decode(source[0].image)
    assert not isinstance(caught.value, BadImage)  # which would count as one image
    assert "\n" not in str(caught.value)
    again = open_source(f"shards:{shards}")  # looks at what is there now
    with pytest.raises(BadImage):
        decode(again[0].image)
    assert before.shape == (16, 24, 3)


# -- what a sample says -------------------------------------------------------------------------------------


def opened(tmp_path: Path, files: Files | list[tuple[str, bytes]], query: str = "") -> Any:
    return open_source(f"shards:{write_tar(tmp_path / 'x.tar', files)}{query}")


def test_objects_of_the_json_are_read(tmp_path):
    """Box in the unit square, COCO's bbox, RLE of both kinds, polygons, crowds, several labels."""
    mask = np.zeros((16, 24), np.uint8)
    mask[4:9, 3:12] = 1
    rle: Any = coco.encode(np.asfortranarray(mask))
    tree = {
        "width": 24,
        "height": 16,
        "labels": ["cat", "dog"],
        "objects": [
            {"box": [0.125, 0.25, 0.5, 0.75], "label": "dog", "score": 0.5},
            {"bbox": [3, 4, 9, 5], "label": "cat", "score": 0.25,
             "segmentation": {"size": [16, 24], "counts": rle["counts"].decode()}},
            {"bbox": [0, 0, 6, 4], "category": "cat", "iscrowd": 1, "score": 1.0, "area": 12},
            {"bbox": [6, 8, 6, 4], "score": 1.0, "label": None,
             "segmentation": [[6, 8, 12, 8, 12, 12, 6, 12]]},
        ],
    }  # fmt: skip
    files = {"a.png": image_bytes(0), "a.json": json.dumps(tree).encode(), "b.png": image_bytes(1)}
    source = opened(tmp_path, files)
    assert source.classes == ("cat", "dog")
    sample = source[0]
    assert sample.labels == (0, 1)
    assert sample.label is None
    assert sample.objects.boxes.tolist() == pytest.approx(
        np.array([[0.125, 0.25, 0.5, 0.75], [0.125, 0.25, 0.5, 9 / 16], [0.25, 0.5, 0.5, 0.75]])
    )
    assert sample.objects.labels.tolist() == [1, 0, -1]
    assert sample.objects.areas.tolist() == pytest.approx([0.1875, 45 / 384, 24 / 384])
    assert sample.objects.scores.tolist() == [0.5, 0.25, 1.0]
    assert (full_mask(sample.objects.masks[1]) == mask).all()
    assert full_mask(sample.objects.masks[2]).sum() == 24
    assert sample.crowds.areas.tolist() == pytest.approx([12 / 384])
    assert source[1].objects is None
    assert source.with_objects() == 1
    assert opened(tmp_path, files, "?objects=-").has_objects is False


def test_an_object_without_a_label_has_that_of_its_image(tmp_path):
    tree = json.dumps({"objects": [{"box": [0, 0, 0.5, 0.5]}]}).encode()
    sample = opened(tmp_path, {"a.png": image_bytes(0), "a.json": tree, "a.cls": b"3\n"})[0]
    assert (sample.label, sample.objects.labels.tolist()) == (3, [3])


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ([{"bbox": [0, 0, 4, 4], "category_id": 3}], "category_id"),
        ([{"box": [0, 0, 4, 4]}], "unit square"),
        ([{"label": 1}], "bbox"),
        ([{"bbox": [50, 0, 4, 4]}], "outside"),
        ([{"bbox": [0, 0, 4, 4], "segmentation": {"size": [16, 24], "counts": [5]}}], "add up"),
    ],
)
def test_objects_that_cannot_be_are_refused_when_most_are(tmp_path, objects, reason):
    files = {"a.png": image_bytes(0), "a.json": json.dumps({"objects": objects}).encode()}
    with pytest.raises(DataError, match=reason):
        opened(tmp_path, files)


def test_maps_tell_objects_or_classes(tmp_path):
    values = np.zeros((16, 24), np.uint8)
    values[2:6, 3:9], values[10:12] = 1, 2
    data = io.BytesIO()
    Image.fromarray(values).save(data, "PNG")
    files = {"a.jpg": image_bytes(0, kind="JPEG"), "a.png": data.getvalue()}
    with pytest.raises(DataError, match=r"has jpg and png: name the image with image=jpg"):
        opened(tmp_path, files)
    objects = opened(tmp_path, files, "?image=jpg&masks=png")[0].objects
    assert [full_mask(mask).sum() for mask in objects.masks] == [24, 48]
    pixels = opened(tmp_path, files, "?image=jpg&pixels=png&classes=3")
    assert (pixels.label_map(0) == values).all()
    assert pixels.classes == ("0", "1", "2")
    with pytest.raises(DataError, match="pixels= needs classes="):
        opened(tmp_path, files, "?image=jpg&pixels=png")
    with pytest.raises(DataError, match=r"no sample has seg.png"):
        opened(tmp_path, files, "?image=jpg&pixels=seg.png&classes=3")


def test_classes_are_numbers_words_or_named(tmp_path):
    a, b = image_bytes(0), image_bytes(1)
    files = {"a.png": a, "a.cls": b"owl", "b.png": b, "b.cls": b"ant"}
    assert opened(tmp_path, files).classes == ("ant", "owl")
    assert [opened(tmp_path, files)[i].label for i in (0, 1)] == [1, 0]
    names = tmp_path / "names.txt"
    names.write_text("owl\nbee\nant\n")
    assert [opened(tmp_path, files, f"?classes={names}")[i].label for i in (0, 1)] == [0, 2]
    names.write_text("owls\nbee\nant\n")
    with pytest.raises(DataError, match="has a class 'owl', which is none of 3 names; did you mean 'owls'"):
        opened(tmp_path, files, f"?classes={names}")
    files["b.cls"] = b"4"
    with pytest.raises(DataError, match=r"numbers \(up to 4\) and text \(such as 'owl'"):
        opened(tmp_path, files)
    files["a.cls"] = b"1"
    assert opened(tmp_path, files).classes == tuple("01234")
    with pytest.raises(DataError, match="has a class 4, but 3 classes"):
        opened(tmp_path, files, "?classes=3")
    assert opened(tmp_path, files, "?label=-").classes is None
    files["a.cls"] = b"999999999"
    with pytest.raises(DataError, match="label=- leaves them out"):
        opened(tmp_path, files)


def test_folders_in_a_tar_file_are_classes_where_asked_for(folder, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, "./" + path.relative_to(folder).as_posix())
    packed = open_source(f"shards:{tmp_path}/x.tar?label=folder")
    assert identity_of(packed).digest == identity_of(open_source(f"folder:{folder}")).digest


def test_names_that_are_in_several_files_begin_with_that_of_the_file(tmp_path):
    for number, name in enumerate("xy"):
        write_tar(tmp_path / f"{name}.tar", {"1.png": image_bytes(number)})
    source: Any = open_source(f"shards:{tmp_path}")
    assert source.image_names() == ["x/1.png", "y/1.png"]
    assert source[1].name == "y/1.png"


def test_hidden_members_and_samples_without_an_image_are_left_out(tmp_path):
    files = {"__meta__/a.json": b"{}", "._a.png": b"", "a.png": image_bytes(0), "b.txt": b"a dog"}
    source = opened(tmp_path, files)
    assert source.image_names() == ["a.png"]
    assert any("1 samples without an image are left out, such as b.txt" in note for note in source.notes)


def test_a_coco_file_gives_objects_to_shards(shards, tmp_path):
    tree = {
        "images": [{"id": 1, "file_name": "a/02.png", "width": 24, "height": 18}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 12, 9]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "objects.json").write_text(json.dumps(tree))
    source = open_source(f"shards:{shards}?annotations={tmp_path}/objects.json")
    assert source[1].objects is not None
    assert source[1].objects.boxes.tolist() == [[0, 0, 0.5, 0.5]]
    assert source[0].objects is None


# -- what is refused ----------------------------------------------------------------------------------------


def special(kind: bytes, name: str = "a.png") -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)

    return add


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (special(tarfile.REGTYPE, "/etc/a.png"), "not below the folder"),
        (special(tarfile.REGTYPE, "a/../../b.png"), "not below the folder"),
        (special(tarfile.SYMTYPE), "is a symbolic link"),
        (special(tarfile.LNKTYPE), "is a hard link"),
        (special(tarfile.FIFOTYPE), "is a pipe"),
        (special(tarfile.CHRTYPE), "is a device or of an unknown kind"),
        (special(tarfile.BLKTYPE), "is a device or of an unknown kind"),
    ],
)
def test_unsafe_members_are_refused(tmp_path, add, reason):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar)
    with pytest.raises(DataError, match=reason):
        open_source(f"shards:{tmp_path}/x.tar")


def test_a_huge_size_that_a_header_declares_is_refused(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    (tmp_path / "x.tar").write_bytes(info.tobuf() + bytes(2048))
    with pytest.raises(DataError, match=r"is cut off|no whole tar file"):
        open_source(f"shards:{tmp_path}/x.tar")
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**32  # a header of pax that fills memory
    path = tmp_path / "y.tar"
    with path.open("wb") as file:
        file.write(info.tobuf())
        file.truncate(2**32 + 2048)  # sparse
    with pytest.raises(DataError, match=r"a header of \d+ bytes at 512"):
        open_source(f"shards:{path}")


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"size": "99999999999"}, "is cut off: a.png has 99999999999 bytes"),
        ({"size": "-5"}, "is cut off: a.png has -5 bytes"),
        ({"path": "../../b.png"}, "not below the folder"),
        ({"comment": "x" * 2**25}, "a header of 33554"),
    ],
)
def test_what_extended_headers_declare_is_held_against_the_file(tmp_path, headers, reason):
    info = tarfile.TarInfo("a.png")
    info.size, info.pax_headers = 512, headers
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + b"x" * 512 + b"\0" * 1024)
    with pytest.raises(DataError, match=reason):
        open_source(f"shards:{tmp_path}/x.tar")


def test_control_characters_of_names_and_classes_reach_no_terminal(tmp_path):
    source = opened(
        tmp_path, {"a\x1b[31m/b\nc.png": image_bytes(0), "a\x1b[31m/b\nc.cls": "an\now\x9bl".encode()}
    )
    assert source.image_names() == [r"a\x1b[31m/b\x0ac.png"]
    assert source.classes == (r"an\x0aow\x9bl",)


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png",
                        "GNU.sparse.realsize": "99999999999"}  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info.size = 512
        tar.addfile(info, io.BytesIO(b"1\n0\n5\n".ljust(512, b"\0")))
    with pytest.raises(DataError, match="is a sparse file"):
        open_source(f"shards:{tmp_path}/x.tar")


def test_archives_that_are_not_whole_are_refused(shards):
    path = shards / "002.tar"
    data = path.read_bytes()
    end = data.rstrip(b"\0")
    for cut in (len(end) - 600, len(end) - 1000, 700, 100, 0):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"cut off|no whole tar|is empty"):
            open_source(f"shards:{shards}")
    damaged = bytearray(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        damaged[tar.getmembers()[2].offset + 150] ^= 1  # the checksum of a header in the middle
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="a damaged header, at"):
        open_source(f"shards:{shards}")
    path.write_bytes(data + data)
    with pytest.raises(DataError, match="data behind its end"):
        open_source(f"shards:{shards}")
    path.write_bytes(b"this is no tar file " * 100)
    with pytest.raises(DataError, match="no whole tar file"):
        open_source(f"shards:{shards}")


@pytest.mark.parametrize(("suffix", "mode"), [("gz", "w:gz"), ("bz2", "w:bz2"), ("xz", "w:xz")])
def test_compressed_archives_are_refused_with_the_remedy(tmp_path, suffix, mode):
    for name in (f"x.tar.{suffix}", "y.tar"):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(DataError, match=r"is compressed.*decompress it \((gzip|bzip2|xz) -d\)"):
            open_source(f"shards:{tmp_path / name}")
    (tmp_path / "y.tar").unlink()
    with pytest.raises(DataError, match=f"compressed ones, such as x.tar.{suffix}"):
        open_source(f"shards:{tmp_path}")


def test_a_key_or_a_member_that_is_there_twice_is_refused(tmp_path):
    a, b = image_bytes(0), image_bytes(1)
    with pytest.raises(DataError, match=r"a.png is there twice"):
        opened(tmp_path, [("a.png", a), ("a.png", b)])
    with pytest.raises(DataError, match=r": a is there twice, apart"):
        opened(tmp_path, [("a.png", a), ("b.png", b), ("a.cls", b"1")])


def test_long_names_and_pax_headers_are_read(tmp_path):
    name = "deep/" * 60 + "ä image.PNG"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(0))
            tar.addfile(info, io.BytesIO(image_bytes(0)))
        source: Any = open_source(f"shards:{tmp_path}/x.tar")
        assert source.image_names() == [name]
        assert decode(source[0].image).shape == (16, 24, 3)


def test_json_without_end_is_refused_and_an_array_is_not_unpacked_to_learn_its_size(tmp_path, monkeypatch):
    for depth in (b"[" * 10**5, b'{"objects": ' + b"[" * 10**5):
        with pytest.raises(DataError, match=r"a.json is not JSON: maximum recursion"):
            opened(tmp_path, {"a.png": image_bytes(0), "a.json": depth})
    bomb, header = io.BytesIO(), io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (30_000, 30_000)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("image.npy", header.getvalue())
    whole = bomb.getvalue()  # which says how large it is in two positions
    at = whole.rindex(b"PK\x01\x02")
    size = (len(header.getvalue()) + 900_000_000).to_bytes(4, "little")
    source = opened(tmp_path, {"a.npz": whole[: at + 24] + size + whole[at + 28 :]})
    monkeypatch.setattr(zipfile.ZipFile, "read", None)
    assert read_header(source.data(0)).upright == (30_000, 30_000)
    with pytest.raises(BadImage, match=r"30000x30000 pixels .* tiles=512"):
        decode(source[0].image)


def test_json_that_is_none_is_refused_and_other_json_left_alone(tmp_path):
    with pytest.raises(DataError, match=r"a.json is not JSON"):
        opened(tmp_path, {"a.png": image_bytes(0), "a.json": b"{"})
    source = opened(
        tmp_path, {"a.png": image_bytes(0), "a.json": b'{"caption": "a dog", "url": "x", "width": 99}'}
    )
    assert source[0].objects is None
    with pytest.raises(DataError, match="a label is a whole number from 0 on, or text"):
        opened(tmp_path, {"a.png": image_bytes(0), "a.json": b'{"label": 0.5}'})


# -- behind a URL -------------------------------------------------------------------------------------------


class Handler(SimpleHTTPRequestHandler):
    """Files with parts of them, as servers give them."""

    asked: list[tuple[str, str]]

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.asked.append((path.name, wanted or ""))
        if not path.is_file():
            return super().send_head()
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        if wanted:
            first, last = (int(end) if end else last for end in wanted.removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    asked: list[tuple[str, str]] = []
    handler = type("Serving", (Handler,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(shards))) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def test_shards_behind_a_url_are_the_same_data(folder, server):
    url, asked = server
    source: Any = open_source(f"shards:{url}/{{000..002}}.tar")
    assert identity_of(source).digest == identity_of(open_source(f"folder:{folder}")).digest
    asked.clear()
    stretch = source[3].image
    assert len(stretch.read_bytes()) == stretch.size
    assert asked == [("000.tar", f"bytes={stretch.start}-{stretch.start + stretch.size - 1}")]


def test_workers_read_behind_a_url(server, folder):
    url, _ = server
    found = []
    for data in (f"folder:{folder}", f"shards:{url}/{{000..002}}.tar"):
        config = LoaderConfig(canvas=32, workers=2, prefetch=1)
        stream = iter(Loader(open_source(data), 4, 0, config, with_objects=False))
        found.append([next(stream).images for _ in range(3)])
        stream.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_local_cache_asks_for_each_block_once(server, tmp_path):
    url, asked = server
    source: Any = open_source(f"shards:{url}/{{000..002}}.tar?cache={tmp_path}/kept")
    for index in (*range(12), *range(12)):
        decode(source[index].image)
    assert sorted(name for name, _ in asked if name.endswith("tar")) == ["000.tar", "001.tar", "002.tar"]


def test_a_shard_that_changes_behind_a_url_is_noticed(server, shards):
    url, _ = server
    open_source(f"shards:{url}/002.tar")
    from foveola.data.shards import stores

    source = open_source(f"shards:{url}/{{001..002}}.tar")
    stores._check_once.cache_clear()  # as in another process
    write_tar(shards / "002.tar", {"a/x.png": image_bytes(3)})
    with pytest.raises(DataError, match=r"002.tar: was changed since it was indexed"):
        decode(source[6].image)
    assert len(open_source(f"shards:{url}/002.tar?label=-")) == 1


def test_a_url_that_is_not_there_is_said_in_one_line(server):
    url, _ = server
    with pytest.raises(DataError, match=r"nothing.tar cannot be read: 404, message=") as caught:
        open_source(f"shards:{url}/nothing.tar")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"nothing.tar cannot be read: there is no such file"):
        open_source("shards:memory://nothing.tar")
    with pytest.raises(DataError, match=r"cannot be read: Cannot connect to host 127.0.0.1:9"):
        open_source("shards:http://127.0.0.1:9/x.tar")
    with pytest.raises(DataError, match="shards: gopher://x: "):
        open_source("shards:gopher://x")
    with pytest.raises(DataError, match="cache= is for what lies behind a URL"):
        open_source("shards:/tmp?cache=/tmp")


def test_a_pattern_asks_a_web_server_for_the_sizes_that_its_listing_lacks(server, folder):
    url, _ = server
    source = open_source(f"shards:{url}/*.tar")
    assert identity_of(source).digest == identity_of(open_source(f"folder:{folder}")).digest


def test_a_server_that_gives_no_parts_is_refused(shards):
    quiet = type("Whole", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: quiet(*a, directory=str(shards))) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        with pytest.raises(DataError, match=r"whole files alone, and no parts of them \(range requests\)"):
            open_source(f"shards:http://127.0.0.1:{found.server_port}/000.tar")
        found.shutdown()


def test_files_of_any_file_system_of_fsspec(shards, folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        for place in ("memory://bucket", "memory://bucket/*.tar"):
            packed = open_source(f"shards:{place}")
            assert packed.classes == ("a", "b")
            assert identity_of(packed).digest == identity_of(open_source(f"folder:{folder}")).digest
    finally:
        memory.rm("/bucket", recursive=True)


def test_the_parts_of_an_index_hold_no_objects(shards):
    """What a million images cost in memory is arrays alone."""
    index: ShardIndex = open_source(f"shards:{shards}").held.index  # type: ignore[attr-defined]
    assert all(isinstance(each, np.ndarray) for each in index.arrays.values())
