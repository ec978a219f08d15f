"""Data strings that somebody else's function opens: the example of docs/extend.md, and what is refused."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from foveola.config import UserError
from foveola.data import sources
from foveola.data.identity import identity_of
from foveola.data.sources import open_source


@pytest.fixture
def frames(tmp_path: Path, example_of_docs) -> tuple[str, np.ndarray]:
    """The data string of ten frames, for the module of the page, and the frames."""
    folder = example_of_docs("Frames", "frames_of_docs")
    (folder / "no_source_of_docs.py").write_text("def open(): return 3\nnumber = 3\n")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 12, 3), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", pixels)
    return f"frames_of_docs:open_frames?path={tmp_path / 'frames.npy'}&last=10", pixels


def test_the_example_of_the_page_opens_both_halves(frames):
    spec, pixels = frames
    train, test = (open_source(spec, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)
    assert np.array_equal(test[1].image, pixels[9])
    assert len(open_source(f"{spec}&split=test&first=5")) == 1
    assert identity_of(train).digest != identity_of(test).digest


def test_a_module_of_this_folder_that_python_does_not_find(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def open(): ...\n")
    with pytest.raises(UserError, match=r"PYTHONPATH=\. lets Python find the module mine of this folder"):
        open_source("mine:open?path=x")


def test_a_package_announces_a_kind_of_its_own(frames, monkeypatch):
    spec, pixels = frames
    entry = EntryPoint("frames", "frames_of_docs:open_frames", sources.SOURCE_ENTRY_POINTS)
    monkeypatch.setattr(
        sources, "announced", lambda group: {"frames": entry} if group == sources.SOURCE_ENTRY_POINTS else {}
    )
    path = re.search(r"path=([^&]*)", spec)
    assert path is not None
    found = open_source(f"frames:{path[1]}?last=5")
    assert len(found) == 4
    assert np.array_equal(found[3].image, pixels[3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("frames_of_docs:open_frames", r"needs the option path="),
        ("frames_of_docs:open_frames?path=x&lst=3", r"no option 'lst'; did you mean last\?"),
        ("frames_of_docs:open_frame?path=x", r"no 'open_frame'; did you mean 'open_frames'\?"),
        ("frames_of_doks.deep:open", r"no module 'frames_of_doks'"),
        ("no_source_of_docs:open", r"expected a data string or a source, got an int, which has no name"),
        ("no_source_of_docs:number", r"expected a function that returns a source, got an int"),
        ("frames_of_docs:open_frames?path=x&last=many", r"cannot be opened: ValueError: invalid literal"),
        ("foldr:images", r"did you mean folder:\?"),
    ],
)
def test_what_opens_nothing_is_one_line(frames, spec: str, message: str):
    with pytest.raises(UserError, match=message) as found:
        open_source(spec)
    assert "\n" not in str(found.value)
