"""Data sets of Hugging Face, made and saved here: nothing is fetched."""

import io
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil

from foveola.data.hub import HubPixels
from foveola.data.identity import identity_of, shared
from foveola.data.sample import BadImage, DataError
from foveola.data.segmentation import IGNORE, PixelSource
from foveola.data.sources import Source, decode, open_source

datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def images(count: int = 4) -> list[Pil.Image]:
    rng = np.random.default_rng(0)
    return [Pil.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)) for _ in range(count)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two splits with a column of images, of classes, of whole numbers, of text, and of label maps."""
    maps = [Pil.fromarray(np.full((16, 24), value, np.uint8)) for value in (0, 1, 9, 1)]
    columns = {
        "img": images(),
        "species": [1, 0, 1, 2],
        "number": [0, 5, 5, 0],
        "word": ["owl", "wren", "owl", "crow"],
        "segments": maps,
    }
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "species": datasets.ClassLabel(names=["crow", "owl", "wren"]),
            "number": datasets.Value("int64"),
            "word": datasets.Value("string"),
            "segments": datasets.Image(),
        }
    )
    made = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": made, "test": made.select([0, 1])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_to_disk(saved: Path):
    source = open_source(f"hf:{saved}?image=img")
    assert isinstance(source, Source)
    assert (len(source), source.classes) == (4, ("crow", "owl", "wren"))  # the only column of classes
    assert [source[i].label for i in range(4)] == [1, 0, 1, 2]
    for index, image in enumerate(images()):
        np.testing.assert_array_equal(decode(source[index].image), np.array(image))
    assert len(open_source(f"hf:{saved}?image=img", "test")) == 2
    again = pickle.loads(pickle.dumps(source))
    assert (
        identity_of(again).digest
        == identity_of(source).digest
        == identity_of(open_source(f"hf:{saved}?image=img")).digest
    )
    assert again[2].label == 1
    limited = open_source(f"hf:{saved}?image=img&limit=3")
    assert len(limited) == 3
    assert identity_of(limited).digest != identity_of(source).digest


def test_labels_of_other_kinds(saved: Path):
    by_number = open_source(f"hf:{saved}?image=img&label=number")
    assert by_number.classes == ("0", "1", "2", "3", "4", "5")
    assert by_number[1].label == 5
    by_word = open_source(f"hf:{saved}?image=img&label=word")
    assert by_word.classes == ("crow", "owl", "wren")
    assert [by_word[i].label for i in range(4)] == [1, 2, 1, 0]
    assert open_source(f"hf:{saved}?image=img&label=-")[0].label is None


def test_label_maps(saved: Path):
    source = open_source(f"hf:{saved}?image=img&pixels=segments&classes=2&ignore=9")
    assert isinstance(source, PixelSource)
    assert isinstance(source, HubPixels)
    assert [int(source.label_map(i)[0, 0]) for i in range(4)] == [0, 1, IGNORE, 1]
    assert source.label_map(0).shape == decode(source[0].image).shape[:2]
    other = open_source(f"hf:{saved}?image=img&pixels=segments&classes=2")
    assert isinstance(other, HubPixels)
    with pytest.raises(DataError, match="row 2: holds the value 9, which is no class"):
        other.label_map(2)
    assert identity_of(other).digest != identity_of(source).digest


def encoded(image: Pil.Image, kind: str, orientation: int = 1) -> bytes:
    exif = Pil.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


def test_label_maps_turn_with_their_images(tmp_path: Path):
    """By 90 degrees the sizes tell; what they tell decides for 180 degrees."""
    image = np.zeros((16, 24, 3), np.uint8)
    image[2:7, 3:9] = 255
    segments = Pil.fromarray((image[:, :, 0] > 0).astype(np.uint8))
    columns = {
        "img": [{"bytes": encoded(Pil.fromarray(image), "PNG", o), "path": None} for o in (3, 6, 1)],
        "segments": [segments] * 3,
    }
    features = datasets.Features({"img": datasets.Image(), "segments": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "turned")
    source = open_source(f"hf:{tmp_path / 'turned'}?image=img&pixels=segments&classes=2")
    assert isinstance(source, HubPixels)
    for index in range(3):
        assert np.array_equal(source.label_map(index), decode(source[index].image)[:, :, 0] > 0)
    assert "EXIF turns 1 of 3 images looked at" in source.notes[0]
    assert "pixels as they are stored, as those of others are" in source.notes[0]


def test_folder_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        Pil.new("RGB", (16, 16), colour).save(tmp_path / "data" / "train" / name / "a.png")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = open_source(f"hf:{tmp_path / 'data'}")
    assert source.classes == ("cat", "dog")
    assert [source[i].label for i in range(2)] == [0, 1]
    assert decode(source[1].image)[0, 0].tolist() == [0, 0, 255]


def test_mistakes(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for query, match in (
        ("", "has 2 columns of kind Image; name one with image="),
        ("?image=imgs", "no column 'imgs'; did you mean 'img'?"),
        ("?image=word", "column 'word' of .* is of kind Value, not Image"),
        ("?image=img&label=specie", "no column 'specie'; did you mean 'species'?"),
        ("?image=img&split=dev", "has no split 'dev'; it has train, test"),
        ("?image=img&pixels=segments", "pixels= needs classes="),
        ("?image=img&pixels=segments&classes=999", "999 classes; from 1 to 254"),
    ):
        with pytest.raises(DataError, match=match):
            open_source(f"hf:{saved}{query}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^hf: cannot load .*empty, split train: "):
        open_source(f"hf:{tmp_path / 'empty'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the extra `datasets`: pip install 'foveola\[datasets\]'"):
        open_source(f"hf:{saved}?image=img")


def test_a_row_without_a_image(tmp_path: Path):
    features = datasets.Features({"image": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": [images(1)[0], None]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}")
    with pytest.raises(BadImage, match="row 1: no image in column image"):
        source[1]


def save_set(path: Path, seeds: list[int], labels: list[int]) -> Path:
    """A set of noise with labels, saved to disk."""
    noise = [np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8) for seed in seeds]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": [Pil.fromarray(pixels) for pixels in noise], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(path)
    return path


def test_contents_of_cells_tell_sets_apart(tmp_path: Path):
    """Equal columns, labels and numbers of rows say nothing about pixels."""
    specs = {
        name: f"hf:{save_set(tmp_path / name, seeds, [0, 1, 0])}"
        for name, seeds in {"a": [1, 2, 3], "again": [1, 2, 3], "b": [4, 5, 6], "half": [1, 2, 9]}.items()
    }
    found = {name: identity_of(open_source(spec)) for name, spec in specs.items()}
    assert found["a"].digest == found["again"].digest
    assert len({each.digest for each in found.values()}) == 3
    assert shared(found["half"].contents, found["a"].contents).tolist() == [True, True, False]
    labels = identity_of(open_source(f"hf:{save_set(tmp_path / 'l', [1, 2, 3], [1, 1, 0])}"))
    assert labels.digest != found["a"].digest


def test_the_same_file_in_a_folder_and_in_a_cell(tmp_path: Path):
    source = open_source(f"hf:{save_set(tmp_path / 'set', [1, 2], [0, 1])}")
    (tmp_path / "folder").mkdir()
    cell = source[1].image
    assert isinstance(cell, bytes)
    (tmp_path / "folder" / "x.png").write_bytes(cell)
    files = identity_of(open_source(f"folder:{tmp_path / 'folder'}"))
    assert shared(identity_of(source).contents, files.contents).tolist() == [False, True]


def test_a_range_of_deep_cells(tmp_path: Path):
    """As of files: dark ones are said with the key, and a range makes other pixels, so other data."""
    values = np.linspace(0, 4095, 600).reshape(20, 30).astype(np.uint16)
    cell = io.BytesIO()
    Pil.fromarray(values).save(cell, "PNG")
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": cell.getvalue(), "path": None}] * 3
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(tmp_path)
    dark, bright = open_source(f"hf:{tmp_path}"), open_source(f"hf:{tmp_path}?range=0-4095")
    assert (
        "3 of 3 images looked at have more than 8 bits, with values from 0 to 4095: add range=0-4095"
        in str(dark.notes)
    )
    assert bright.notes == ()
    assert np.array_equal(decode(bright[1].image)[:, :, 0], np.rint(values * (65535 / 4095)))
    assert decode(dark[1].image).max() <= 16
    assert identity_of(dark).digest != identity_of(bright).digest
    with pytest.raises(DataError, match="needs a range such as 0-4095"):
        open_source(f"hf:{tmp_path}?range=9-3")
    with pytest.raises(DataError, match="pages=first changes nothing"):
        open_source(f"hf:{tmp_path}?pages=first")
