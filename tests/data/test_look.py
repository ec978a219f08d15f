"""What a first look at a folder says: how deep its images are, and whether options have an effect."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.identity import identity_of
from foveola.data.sample import DataError
from foveola.data.sources import decode, notes_of, open_source


def deep(folder: Path, high: int, count: int = 3) -> Path:
    for number in range(count):
        folder.mkdir(exist_ok=True)
        values = np.linspace(0, high, 200).reshape(10, 20).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{number}.tif")
    return folder


def test_dark_sixteen_bits_are_said_with_the_key(tmp_path: Path):
    folder = deep(tmp_path / "d", 4000)
    Image.new("L", (20, 10)).save(folder / "plain.png")
    source = open_source(f"folder:{folder}")
    assert notes_of(source) == (
        f"folder:{folder}: 3 of 4 images looked at have more than 8 bits, with values from 0 to 4000: add "
        "range=0-4095, or range=container if they are meant to be dark",
    )
    bright = open_source(f"folder:{folder}?range=0-4000")
    assert notes_of(bright) == ()
    assert decode(bright[0].image).max() == 65535
    dark = open_source(f"folder:{folder}?range=container")
    assert notes_of(dark) == ()
    assert np.abs(decode(dark[0].image) / 257 - decode(source[0].image)).max() <= 0.5
    prints = {identity_of(s).digest for s in (source, bright, open_source(f"folder:{folder}?range=0-4095"))}
    assert len(prints) == 3  # other pixels, other data


def test_sixteen_bits_that_are_used_are_nothing_to_say(tmp_path: Path):
    assert notes_of(open_source(f"folder:{deep(tmp_path / 'd', 60000)}")) == ()


@pytest.mark.parametrize(("white", "notes"), [(4095, 0), (65535, 1)])
def test_a_pgm_that_states_its_range_is_not_dark(tmp_path: Path, white: int, notes: int):
    values = np.linspace(0, 4095, 200).reshape(10, 20).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 20 10 %d\n" % white + values.tobytes())
    assert len(notes_of(open_source(f"folder:{tmp_path}"))) == notes


def test_floating_point_values_are_said(tmp_path: Path):
    Image.fromarray(np.linspace(-1, 1.5, 200, dtype=np.float32).reshape(10, 20)).save(tmp_path / "a.tif")
    source = open_source(f"folder:{tmp_path}")
    assert notes_of(source)[0].endswith("values from -1 to 1.5: add range=-1-1.5")
    assert decode(open_source(f"folder:{tmp_path}?range=-1-1.5")[0].image).max() == 65535


def test_deep_images_without_a_value_that_can_be_read_are_nothing_to_say(tmp_path: Path):
    whole, folder = deep(tmp_path / "whole", 4000, 1), tmp_path / "odd"
    folder.mkdir()
    Image.fromarray(np.full((10, 20), np.nan, np.float32)).save(folder / "a.tif")
    (folder / "cut.tif").write_bytes((whole / "0.tif").read_bytes()[:-100])
    assert notes_of(open_source(f"folder:{folder}")) == ()


def test_a_range_without_effect_is_an_error(tmp_path: Path):
    Image.new("L", (20, 10)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="range= changes nothing, as no image has more than 8 bits"):
        open_source(f"folder:{tmp_path}?range=0-4095")


@pytest.mark.parametrize("text", ["4095", "9-3", "0-0", "a-b", "percentile:1-199", "0--5"])
def test_mistaken_ranges(tmp_path: Path, text: str):
    Image.new("L", (20, 10)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="needs a range such as"):
        open_source(f"folder:{tmp_path}?range={text}")


def test_pages_by_the_data_string(tmp_path: Path):
    pages = [Image.fromarray(np.full((10, 20), 50 * n, np.uint8)) for n in range(3)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    (tmp_path / "stack.tif").write_bytes(file.getvalue())
    assert decode(open_source(f"folder:{tmp_path}?pages=first")[0].image).max() == 0
    with pytest.raises(DataError, match="option 'pages=all' needs first"):
        open_source(f"folder:{tmp_path}?pages=all")


def test_pages_without_effect_are_an_error(tmp_path: Path):
    Image.new("L", (20, 10)).save(tmp_path / "one.tif")
    Image.new("L", (20, 10)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="pages=first changes nothing, as no image is a TIFF of several"):
        open_source(f"folder:{tmp_path}?pages=first")
