"""Data sets by their contents: what tells them apart, what does not, and what reading them once costs."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data import identity
from foveola.data.identity import Table, identity_of, looked_at_once, shared, tables
from foveola.data.sample import Objects, Sample
from foveola.data.sources import open_source


def frame(path: Path, seed: int) -> Path:
    """A BMP of noise: all have the same size on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        frame(tmp_path / "a" / ("x" if i % 2 else "y") / f"{i}.bmp", i)
    return tmp_path / "a"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read; all are taken to be old enough to be kept."""
    names: list[str] = []
    plain = identity._hash_file
    monkeypatch.setattr(identity, "_hash_file", lambda path: names.append(Path(path).name) or plain(path))
    monkeypatch.setattr(identity, "SETTLED", -1e6)
    return names


def digest(spec: str) -> str:
    return identity_of(open_source(spec)).digest


def test_contents_are_hashes_of_the_files(folder: Path) -> None:
    found = identity_of(open_source(f"folder:{folder}"))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.bmp"))
    wanted = [hashlib.sha256((folder / file).read_bytes()).digest()[:16] for file in files]
    assert found.contents.tobytes() == b"".join(wanted)
    assert found.digest.startswith("content:")


def test_neither_places_nor_names_nor_times_count(folder: Path, tmp_path: Path) -> None:
    before = digest(f"folder:{folder}")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert digest(f"folder:{tmp_path / 'copy'}") == before
    (tmp_path / "copy" / "x" / "1.bmp").rename(tmp_path / "copy" / "x" / "0.bmp")
    assert digest(f"folder:{tmp_path / 'copy'}") == before
    (tmp_path / "copy" / "x").rename(tmp_path / "copy" / "w")  # a class by another name
    assert digest(f"folder:{tmp_path / 'copy'}") != before


def test_a_file_written_anew_is_seen_though_name_size_and_time_agree(folder: Path, read) -> None:
    os.utime(folder / "x" / "1.bmp", ns=(10**18, 10**18))
    before = digest(f"folder:{folder}")
    frame(folder / "x" / "1.bmp", 100)
    os.utime(folder / "x" / "1.bmp", ns=(10**18, 10**18))
    assert digest(f"folder:{folder}") != before
    frame(folder / "x" / "1.bmp", 1)
    assert digest(f"folder:{folder}") == before


def test_files_are_read_once(folder: Path, tmp_path: Path, read) -> None:
    before = digest(f"folder:{folder}")
    assert len(read) == 6
    assert digest(f"folder:{folder}") == before
    assert len(read) == 6
    frame(folder / "x" / "9.bmp", 9)
    frame(folder / "y" / "0.bmp", 10)
    assert digest(f"folder:{folder}") != before
    assert sorted(read[6:]) == ["0.bmp", "9.bmp"]
    limited = open_source(f"folder:{folder}?limit=3")
    shutil.rmtree(tables())
    assert shared(identity_of(limited).contents, identity_of(open_source(f"folder:{folder}")).contents).all()
    assert len(read) == 8 + 7, "three of the limited set, then the other four"


def test_what_may_still_change_within_its_time_stamp_is_not_kept(folder: Path, read, monkeypatch) -> None:
    monkeypatch.setattr(identity, "SETTLED", 1e6)
    assert digest(f"folder:{folder}") == digest(f"folder:{folder}")
    assert len(read) == 12


@pytest.mark.parametrize("harm", ["torn", "flipped", "folder", "nowhere"])
def test_a_table_that_is_damaged_or_cannot_be_written_only_costs_time(
    folder: Path, read, harm: str, monkeypatch, tmp_path: Path
) -> None:
    before = digest(f"folder:{folder}")
    table = Table(folder).path
    data = bytearray(table.read_bytes())
    if harm == "torn":
        table.write_bytes(data[:-40])
    elif harm == "flipped":
        data[-1] ^= 1
        table.write_bytes(data)
    elif harm == "folder":
        table.unlink()
        table.mkdir()
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "file"))
    assert digest(f"folder:{folder}") == before
    assert len(read) == 12
    assert not list(tables().glob(".*")) if tables().is_dir() else True


def test_two_tables_of_one_folder_are_merged(folder: Path) -> None:
    first, second = Table(folder), Table(folder)
    keys = np.array([bytes([i]) * 16 for i in (3, 1, 2, 1)], identity.HASH)
    first.add(keys[:2], keys[:2])
    first.save()
    second.add(keys[2:], keys[2:])
    second.save()
    found = np.zeros(4, identity.HASH)
    unknown = np.array([b"\3" * 16, b"\4" * 16, b"", b"\2" * 16], identity.HASH)
    assert Table(folder).fill(found, unknown).tolist() == [1]
    assert found.tolist() == [b"\3" * 16, b"", b"", b"\2" * 16]


def test_a_file_that_is_missing_is_nobodys_twin(folder: Path) -> None:
    source, other = open_source(f"folder:{folder}"), open_source(f"folder:{folder}")
    (folder / "x" / "1.bmp").unlink()
    (folder / "x" / "3.bmp").unlink()
    both = shared(identity_of(source).contents, identity_of(other).contents)
    assert both.tolist() == [False, False, True, True, True, True]


def test_within_looked_at_once_each_source_is(folder: Path, read, monkeypatch) -> None:
    monkeypatch.setattr(identity, "SETTLED", 1e6)
    source, other = open_source(f"folder:{folder}"), open_source(f"folder:{folder}")
    with looked_at_once():
        assert identity_of(source) is identity_of(source, np.arange(6))
        with looked_at_once():
            identity_of(source)
        assert len(read) == 6
        assert identity_of(source, np.array([1])).digest != identity_of(other).digest
    assert len(read) == 13
    identity_of(source)
    assert len(read) == 19


# -- annotations -------------------------------------------------------------------------------------------


def test_boxes_of_imagenets_xml(tmp_path: Path) -> None:
    frame(tmp_path / "in" / "val" / "n01440764" / "a.bmp", 0)
    xml = tmp_path / "xml" / "n01440764" / "a.xml"
    xml.parent.mkdir(parents=True)
    spec = f"imagenet:{tmp_path / 'in'}?boxes={tmp_path / 'xml'}&split=test"
    text = (
        "<annotation><size><width>32</width><height>24</height></size><object><bndbox>"
        "<xmin>{}</xmin><ymin>2</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>"
    )
    found = []
    for left in (1, 2, 1):
        xml.write_text(text.format(left))
        found.append(digest(spec))
    assert found[0] == found[2] != found[1]
    assert digest(f"imagenet:{tmp_path / 'in'}?split=test") not in found


def test_polygons_and_rle_of_coco(tmp_path: Path) -> None:
    frame(tmp_path / "c" / "a.bmp", 0)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "area": 100}
    polygon, other = [2, 2, 12, 2, 12, 12], [2, 2, 12, 12, 2, 12]
    found = []
    for mask in (None, [polygon], [other], {"size": [24, 32], "counts": [50, 10, 708]}, [polygon]):
        tree = {
            "images": [{"id": 1, "file_name": "a.bmp", "width": 32, "height": 24}],
            "categories": [{"id": 1, "name": "thing"}],
            "annotations": [annotation if mask is None else annotation | {"segmentation": mask}],
        }
        (tmp_path / "i.json").write_text(json.dumps(tree))
        found.append(digest(f"coco:{tmp_path / 'c'}?annotations={tmp_path / 'i.json'}"))
    assert found[1] == found[4]
    assert len(set(found)) == 4


@pytest.mark.parametrize("kind", ["folder:{}?masks={}", "masks:{}?labels={}&classes=3&absent=allow"])
def test_label_maps(kind: str, tmp_path: Path) -> None:
    frame(tmp_path / "p" / "a.bmp", 0)
    (tmp_path / "m").mkdir()
    found = []
    for value in (1, 2, 1):
        Image.fromarray(np.full((24, 32), value, np.uint8)).save(tmp_path / "m" / "a.png")
        found.append(digest(kind.format(tmp_path / "p", tmp_path / "m")))
    assert found[0] == found[2] != found[1]
    ignoring = kind.format(tmp_path / "p", tmp_path / "m") + "&ignore=7"
    assert digest(ignoring) != found[2]


def test_answers_of_a_source_of_ones_own() -> None:
    class Own:
        name, classes, has_objects = "own", ("a", "b"), False

        def __init__(self, right: list[int]) -> None:
            self.right = right

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Sample:
            return Sample(np.zeros((16, 16, 3), np.uint8), "0", None, 0)

        def answers(self, index: int) -> list[int]:
            return self.right

    found = [identity_of(Own(right)).digest for right in ([0], [0, 1], [0])]
    assert found[0] == found[2] != found[1]


def test_answers_and_labels_of_imagenets_test_sets(tmp_path: Path) -> None:
    frame(tmp_path / "in" / "val" / "n01440764" / "ILSVRC2012_val_00000001.bmp", 0)
    found = []
    for right in ([0], [1], [0, 1]):
        (tmp_path / "real.json").write_text(json.dumps([right]))
        found.append(digest(f"imagenet-real:{tmp_path / 'in'}?labels={tmp_path / 'real.json'}"))
    assert len(set(found)) == 3


# -- other sources -----------------------------------------------------------------------------------------


class Own:
    """A source of somebody's own, without a word on what it is."""

    name, classes, has_objects = "own:", ("a", "b"), True

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def test_a_source_of_ones_own_is_gone_through(folder: Path) -> None:
    files = sorted(folder.rglob("*.bmp"))
    pixels = np.zeros((9, 9, 3), np.uint8)
    box = Objects(np.array([[0, 0, 0.5, 1]], np.float32), np.array([0.5], np.float32))
    moved = Objects(np.array([[0, 0, 0.6, 1]], np.float32), np.array([0.5], np.float32))
    mask = np.zeros((9, 9), bool)
    masked = Objects(box.boxes, box.areas, None, (mask,))
    samples = [*(Sample(file, file.name) for file in files), Sample(files[0].read_bytes(), "b")]
    contents = identity_of(Own(samples)).contents
    assert contents[:6].tolist() == identity_of(open_source(f"folder:{folder}")).contents.tolist()
    assert contents[6] == contents[0]
    other = pixels.copy()
    other[4, 4, 1] = 1
    kinds = [
        Sample(pixels, "a"),
        Sample(other, "a"),
        Sample(pixels, "a", None, 0),
        Sample(pixels, "a", None, 1),
        Sample(pixels, "a", box),
        Sample(pixels, "a", moved),
        Sample(pixels, "a", masked),
        Sample(pixels, "a", Objects(box.boxes, box.areas, None, (~mask,))),
        Sample(pixels.reshape(3, 27, 3), "a"),
    ]
    assert len({identity_of(Own([sample])).digest for sample in kinds}) == len(kinds)
    assert identity_of(Own([Sample(pixels.copy(), "z")])).digest == identity_of(Own(kinds[:1])).digest


def test_scenes_are_their_parameters() -> None:
    few, many = (identity_of(open_source(f"scenes:?count={count}")).contents for count in (4, 9))
    assert shared(many, few).tolist() == [True] * 4 + [False] * 5
    for change in ("seed=1", "size=48", "objects=2-3", "split=test"):
        assert not shared(identity_of(open_source(f"scenes:?count=4&{change}")).contents, many).any()
