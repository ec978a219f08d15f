"""Frames of videos that PyAV writes: which are taken, exact values, what is refused."""

import sys
import tarfile
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from foveola.data.decode import decode
from foveola.data.decoding import Decoding, ImageFile
from foveola.data.readers import read_header, values_in
from foveola.data.sample import BadImage, DataError
from foveola.data.sources import open_source

av = pytest.importorskip("av")

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (25, 32, 48, 3), dtype=np.uint8)
SMOOTH = np.kron(RNG.integers(0, 256, (25, 2, 3, 3), dtype=np.uint8), np.ones((1, 16, 16, 1), np.uint8))


def video(path, frames, codec="ffv1", pixels="bgr0", rate=10, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            kind = "rgb24" if frame.ndim == 3 else "gray16le"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=kind)))
        container.mux(stream.encode())
    return path


def test_every_third_frame_and_every_half_second(tmp_path):
    video(tmp_path / "a.mkv", FRAMES)
    source: Any = open_source(f"folder:{tmp_path}?every=3")
    assert source.image_names() == [f"a.mkv#{k}" for k in range(1, 10)]
    for k in (0, 5, 8, 1):
        assert np.array_equal(decode(source[k].image), FRAMES[3 * k])
    source: Any = open_source(f"folder:{tmp_path}?seconds=0.5&tiles=16")
    assert len(source) == 5 * 6
    assert source[3 * 6 + 4].name == "a.mkv#4,16,16"
    assert np.array_equal(decode(source[3 * 6 + 4].image), FRAMES[15, 16:, 16:32])


def test_frames_of_videos_in_shards_and_parquet(tmp_path):
    path = video(tmp_path / "a.mkv", FRAMES)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(path, "clips/a.mkv")
    rows = pyarrow.table({"video": [{"bytes": path.read_bytes(), "path": "clips/a.mkv"}]})
    parquet.write_table(rows, str(tmp_path / "0.parquet"))
    for kind in ("shards", "parquet"):
        source: Any = open_source(f"{kind}:{tmp_path}?every=3&tiles=32")
        assert source.image_names()[:3] == ["clips/a.mkv#1,0,0", "clips/a.mkv#1,16,0", "clips/a.mkv#2,0,0"]
        assert len(source) == 18
        for k in (0, 8, 5):
            assert np.array_equal(decode(source[2 * k + 1].image), FRAMES[3 * k, :, 16:])
        with pytest.raises(DataError, match="seconds=1 or every=30 in the data string makes images of its"):
            decode(open_source(f"{kind}:{tmp_path}")[0].image)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("a.mp4", "libx264", "yuv444p", {"crf": "1", "g": "10", "bf": "3"}),
        ("a.avi", "mjpeg", "yuvj444p", {}),
        ("a.webm", "libvpx-vp9", "yuv444p", {}),
    ],
)
def test_containers_with_frames_that_depend_on_others(tmp_path, name, codec, pixels, options):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = video(tmp_path / name, SMOOTH, codec, pixels, 30, **options)
    assert read_header(path, Decoding(every=3)).pages == 9
    for k in (0, 3, 8):
        got = decode(ImageFile(path, Decoding(every=3, page=k))).astype(int)
        errors = [np.abs(got - frame).mean() for frame in SMOOTH.astype(int)]
        assert int(np.argmin(errors)) == 3 * k


def test_grey_of_16_bits(tmp_path):
    words = RNG.integers(0, 65536, (5, 32, 48), dtype=np.uint16)
    path = video(tmp_path / "a.mkv", words, pixels="gray16le")
    assert np.array_equal(values_in(path, Decoding(every=2, page=1)).array[:, :, 0], words[2])


def test_what_is_refused(tmp_path):
    path = video(tmp_path / "a.mkv", FRAMES)
    with pytest.raises(BadImage, match=r"a video; seconds=1 or every=30"):
        decode(path)
    with pytest.raises(BadImage, match=r"no frame at 2\.700 seconds"):
        decode(ImageFile(path, Decoding(every=3, page=9)))
    with pytest.raises(BadImage):
        decode(ImageFile(path.read_bytes()[:300], Decoding(every=3)))
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{path}'\n")
    with pytest.raises(BadImage, match="not an image of a known kind"):
        decode(ImageFile(tmp_path / "list.mp4", Decoding(every=3)))
    for text, why in (("", "holds no images"), ("every=3&seconds=1", "give one"), ("seconds=0", "above 0")):
        with pytest.raises(DataError, match=why):
            open_source(f"folder:{tmp_path}?{text}")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    video(tmp_path / "a.mkv", FRAMES)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"video needs av .*; pip install 'foveola\[video\]'"):
        open_source(f"folder:{tmp_path}?every=3")
