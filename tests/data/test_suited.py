"""Data as an encoder was trained on them, whatever kind of source they are: the options of a data string."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import foveola
from foveola.data.decode import decode
from foveola.data.decoding import Decoding
from foveola.data.sample import DataError
from foveola.data.sources import open_source
from foveola.data.suited import suited

TOLD = "range=0-3000&channels=4,2,1&show=3,2,1"


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images of five channels as files, in shards, as tiles, and with objects that a file gives to them."""
    root, random = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    (root / "files").mkdir()
    for i in range(3):
        np.save(root / "files" / f"{i}.npy", random.integers(0, 4000, (40, 48, 5), np.uint16))
    foveola.pack(f"folder:{root}/files", root / "shards", progress=False)
    objects = {
        "images": [{"id": 1, "file_name": "1.npy", "width": 48, "height": 40}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": 0}],
    }
    (root / "objects.json").write_text(json.dumps(objects))
    return {
        "folder": f"folder:{root}/files",
        "shards": f"shards:{root}/shards",
        "tiles": f"folder:{root}/files?tiles=16",
        "given": f"folder:{root}/files?annotations={root}/objects.json",
    }


def of(options: str) -> Decoding:
    named = dict(part.split("=") for part in options.split("&"))
    return Decoding.of(named.get("range"), named.get("channels"), None, named.get("show"))


def with_more(string: str, options: str) -> str:
    return f"{string}{'&' if '?' in string else '?'}{options}"


@pytest.mark.parametrize("kind", ["folder", "shards", "tiles", "given"])
def test_what_nobody_said_is_as_the_encoder_reads(kind: str, strings: dict[str, str]) -> None:
    plain = open_source(strings[kind])
    read, told = suited(plain, of(TOLD), 3), open_source(with_more(strings[kind], TOLD))
    assert (read.channels, read.depth) == (told.channels, told.depth) == (3, 16)
    for index in {0, len(told) // 2, len(told) - 1}:
        mine, theirs = read[index], told[index]
        assert np.array_equal(decode(mine.image), decode(theirs.image))
        assert mine.image.reading.shown == theirs.image.reading.shown == (2, 1, 0)
        assert (mine.objects is None) == (theirs.objects is None)
    assert read.identity().digest == told.identity().digest
    assert plain.reading == Decoding()  # it is left as it was
    own = open_source(with_more(strings[kind], "range=0-4000&channels=5,1,2"))
    assert np.array_equal(decode(suited(own, of(TOLD), 3)[0].image), decode(own[0].image))
    with pytest.raises(DataError, match=r"images of 5 channel\(s\), but the encoder sees 3"):
        suited(open_source(with_more(strings[kind], "range=0-4000&channels=all")), of(TOLD), 3)


def test_images_that_are_no_files_stay_as_they_are() -> None:
    scenes = open_source("scenes:?size=32&count=2&tiles=16")
    assert np.array_equal(suited(scenes, of("range=0-3000"), 3)[0].image, scenes[0].image)


def test_pages_that_are_images_stay_so(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((20, 20), 1000 * i, np.uint16)) for i in range(1, 4)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    read = suited(open_source(f"folder:{tmp_path}?pages=each"), Decoding.of("0-3000", "1", "first"), 1)
    assert [int(decode(read[i].image).mean()) for i in range(3)] == [21845, 43690, 65535]
