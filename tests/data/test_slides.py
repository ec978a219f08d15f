"""Whole slides: a pyramid as Aperio's scanners write it, made with tifffile and read by OpenSlide."""

import sys
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveola import pack
from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.readers import read_header
from foveola.data.sample import BadImage, DataError
from foveola.data.sources import open_source

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("openslide")

GLASS = 240
TISSUE = slice(256, 768), slice(384, 896)  # rows and columns, of 1024 x 1536 pixels


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """0.25 microns a pixel; levels of 1, 4 and 16, without loss."""
    rng = np.random.default_rng(0)
    base = np.full((1024, 1536, 3), GLASS, np.uint8)
    base[TISSUE] = rng.integers(0, 40, (512, 512, 3)) + np.array((200, 60, 140))
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    about = "Aperio Image Library v11.2.1\r\n1536x1024 [0,0 1536x1024] (256x256)|AppMag = 40|MPP = 0.25"
    options = {"photometric": "rgb", "compression": "lzw", "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(base, description=about, tile=(256, 256), **options)
        file.write(base[::16, ::16], rowsperstrip=16, **options)  # the thumbnail
        for step in (4, 16):
            file.write(base[::step, ::step], subfiletype=1, description=about, tile=(256, 256), **options)
    return path, base


def test_levels_and_parts(slide):
    path, base = slide
    for number, step in enumerate((1, 4, 16)):
        reading = Decoding(level=number)
        assert read_header(path, reading).upright == (1536 // step, 1024 // step)
        assert np.array_equal(decode(ImageFile(path, reading)), base[::step, ::step])
    part = decode(ImageFile(path, Decoding(window=(300, 200, 556, 456))))
    assert np.array_equal(part, base[200:456, 300:556])
    with pytest.raises(BadImage, match=r"has 3 level\(s\), and level=3 is asked for"):
        decode(ImageFile(path, Decoding(level=3)))
    with pytest.raises(BadImage):
        decode(ImageFile(path.read_bytes(), Decoding()))


def test_microns_a_pixel(slide):
    path, base = slide
    exact = ImageFile(path, Decoding(mpp=1.0))
    assert np.array_equal(decode(exact), base[::4, ::4])
    reading = Decoding(mpp=0.5)  # no level has that: the finest is shrunk
    assert read_header(path, reading).upright == (768, 512)
    want = np.asarray(Image.fromarray(base).resize((768, 512), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(ImageFile(path, reading)), want)
    part = decode(ImageFile(path, Decoding(mpp=0.5, window=(100, 90, 356, 346))))
    assert np.array_equal(part, want[90:346, 100:356])
    with pytest.raises(BadImage, match=r"0\.25 microns a pixel, and mpp=0\.1 is finer"):
        decode(ImageFile(path, Decoding(mpp=0.1)))


def test_tiles_with_tissue_are_kept(slide):
    """Tiles of 128 pixels: 12 x 8, of which 4 x 4 are all tissue and the others all glass."""
    path, base = slide
    source: Any = open_source(f"folder:{path.parent}?tiles=128")
    assert len(source) == 16
    assert any("80 of 96 tiles of slides are left out" in note for note in source.notes)
    windows = [source.part(k)[2] for k in range(16)]
    assert windows[0] == (384, 256, 512, 384)
    for k, (x0, y0, x1, y1) in enumerate(windows):
        assert np.array_equal(decode(source[k].image), base[y0:y1, x0:x1])
    assert len(open_source(f"folder:{path.parent}?tiles=128&tissue=0")) == 96
    assert len(open_source(f"folder:{path.parent}?tiles=128&mpp=0.5")) == 6  # 3 x 2, of which 4 half
    with pytest.raises(DataError, match="tissue= changes nothing"):
        open_source("scenes:?count=2&tiles=64&tissue=0.1")
    # Tiles that lie across the border have a fraction of tissue, which the option is compared with.
    half: Any = open_source(f"folder:{path.parent}?tiles=256&overlap=128&tissue=0.6")
    quarter: Any = open_source(f"folder:{path.parent}?tiles=256&overlap=128&tissue=0.2")
    assert (len(half), len(quarter)) == (9, 25)


def test_without_the_library_the_extra_is_named(slide, monkeypatch):
    for module in ("openslide", "tiffslide"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"a whole slide needs openslide .*'foveola\[slides\]'"):
        decode(slide[0])


def test_slides_in_shards_are_refused_at_once_and_tiles_are_packed(slide, tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "cache"))
    path, base = slide
    with pytest.raises(DataError, match="read from a file of its own, in parts; `foveola pack") as caught:
        pack(f"folder:{path.parent}", tmp_path / "whole", progress=False)
    assert not isinstance(caught.value, BadImage)  # which would be counted, one by one
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(path, "a.svs")
    for query in ("", "?level=1", "?tiles=256"):
        with pytest.raises(DataError, match="read from a file of its own, in parts; `foveola pack") as caught:
            open_source(f"shards:{tmp_path}/0.tar{query}")
        assert not isinstance(caught.value, BadImage)
    made = pack(f"folder:{path.parent}?tiles=256", tmp_path / "tiles", format="png", progress=False)
    packed: Any = open_source(f"shards:{made.path}")
    assert packed.image_names()[0] == "a.svs#256,256"
    assert np.array_equal(decode(packed[0].image), base[256:512, 256:512])
