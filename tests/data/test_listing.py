"""What lies below a folder: each image once, nothing left out without a word, no name that breaks a run."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.listing import check_inside, find_images, find_names, printable
from foveola.data.sample import DataError
from foveola.data.sources import notes_of, open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "d" / name)
    return tmp_path / "d"


def test_links_upwards_end(folder: Path):
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "up").symlink_to("..")
    (folder / "b" / "here").symlink_to(".")
    found = find_images(folder)
    assert found.files == ["a/1.png", "b/2.png"]
    assert found.notes == (f"{folder}: 3 links to folders that are read anyway are left out",)


def test_a_folder_is_known_by_its_own_path_not_by_a_link_before_it(folder: Path):
    (folder / "0").symlink_to(folder / "b")
    assert find_images(folder).files == ["a/1.png", "b/2.png"]


def test_links_to_folders_elsewhere_are_followed_once_each(folder: Path, tmp_path: Path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "y").symlink_to(folder / "a")
    (tmp_path / "links" / "x").symlink_to(folder)
    assert find_images(tmp_path / "links").files == ["x/a/1.png", "x/b/2.png"]


def test_other_files_are_counted_by_suffix(folder: Path):
    for name in ("a/x.XYZ", "b/y.xyz", "b/z.mp4", "README", ".hidden.dcm"):
        (folder / name).touch()
    source = open_source(f"folder:{folder}")
    assert notes_of(source) == (
        f"{folder}: files of other kinds are left out: 2 .xyz, 1 .mp4, 1 without a suffix",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_cannot_be_listed(folder: Path):
    (folder / "b").chmod(0)
    try:
        with pytest.raises(DataError, match=r"/b cannot be listed: Permission denied"):
            find_images(folder)
    finally:
        (folder / "b").chmod(0o755)


def test_a_folder_whose_listing_fails(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.scandir

    def scandir(path: str):
        if path.endswith("/b"):
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"/b cannot be listed: Input/output error"):
        find_images(folder)


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "..", "a\\..\\..\\x.jpg", "x\0.jpg"]
)
def test_names_that_leave_the_folder(name: str):
    with pytest.raises(DataError, match=r"list.json: names .* which is not below the folder"):
        check_inside(Path("list.json"), ["a/fine.jpg", name])


def test_names_inside_the_folder():
    check_inside(Path("list.json"), ["a.jpg", "a/../b.jpg", "..a.jpg", "./c.jpg", "a//d.jpg"])


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path):
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(raw)).write_bytes(b"broken")
    name = open_source(f"folder:{tmp_path}")[0].name
    assert name == "caf\\udce9.png"
    assert printable("café") == "café"
    assert find_names([name], [name, "a/b.png"]) == {name: 0}  # as an annotation file has it
    assert find_names(["a\\b.png"], [name, "a/b.png"]) == {"a\\b.png": 1}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("boxes.csv", "folder:{folder}?boxes={file}"),
        ("files.txt", "listed:{folder}?files={file}"),
        ("files.txt", "coco:{folder}?annotations={coco}&files={file}"),
        ("ImageSets/Main/train.txt", "voc-objects:{folder}?split=train"),
        ("words.txt", "tinyimagenet:{folder}?split=train"),
    ],
)
def test_lists_that_are_not_utf8_are_named(tmp_path: Path, folder: Path, name: str, source: str):
    (folder / "Annotations").mkdir()
    file, coco = folder / name, tmp_path / "coco.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"a/1.png,0,0,5,5\nb/\xe4.png,0,0,5,5\n")  # Latin-1
    images = [{"id": 1, "file_name": "a/1.png", "width": 9, "height": 9}]
    coco.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    with pytest.raises(DataError, match=rf"{file} is no text in UTF-8 \(byte 18\)"):
        open_source(source.format(folder=folder, file=file, coco=coco))
