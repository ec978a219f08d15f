"""`foveola check`: what is found in images whose properties are known."""

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

import foveola
from foveola.cli import main
from foveola.config import UserError
from foveola.data import identity
from foveola.data.sample import BadImage, DataError, Sample
from foveola.data.survey import ImageFacts, alike_groups, small_grey, survey


def scene(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth noise: its halves and quarters differ, as those of photos do."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for label, seeds in {"cat": range(4), "dog": range(4, 6)}.items():
        (root / label).mkdir(parents=True)
        for seed in seeds:
            Image.fromarray(scene(seed)).save(root / label / f"{seed}.png")
    return root


def test_ordinary_images_are_counted(folder: Path) -> None:
    found = foveola.check_data(f"folder:{folder}", progress=False)
    assert (found.images, found.looked, found.advice) == (6, 6, [])
    assert found.shares == {"formats": {"PNG": 6}, "channels": {"colour": 6}, "bits": {"8": 6}}
    assert found.sides == {"shorter": [60, 60, 60], "longer": [80, 80, 80]}
    assert found.classes == {"cat": 4, "dog": 2}
    assert found.copies == found.alike == found.unreadable == []


def test_what_is_wrong_is_found_and_named(folder: Path) -> None:
    dog = folder / "dog"
    shutil.copy(folder / "cat" / "0.png", dog / "copy.png")
    Image.fromarray(scene(1)).resize((40, 30)).save(dog / "like.jpg", quality=60)
    (dog / "torn.png").write_bytes((folder / "cat" / "2.png").read_bytes()[:200])
    Image.fromarray(np.full((60, 80, 3), (9, 99, 199), np.uint8)).save(dog / "flat.png")
    Image.fromarray(scene(7, 20, 90)).save(dog / "long.png")
    Image.fromarray(scene(8)).convert("RGBA").save(dog / "clear.png")
    Image.fromarray(np.repeat(scene(9)[..., :1], 3, 2)).save(dog / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene(10)).save(dog / "turned.jpg", exif=exif)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(scene(11)).save(dog / "profile.jpg", icc_profile=lab)
    found = foveola.check_data(f"folder:{folder}", progress=False)
    assert found.copies == [["cat/0.png", "dog/copy.png"]]
    assert found.alike == [["cat/1.png", "dog/like.jpg"]]
    assert [name for name, _ in found.unreadable] == ["dog/torn.png"]
    assert found.shares["noted"] == {
        "turned by EXIF": 1,
        "transparent": 1,
        "one value everywhere": 1,
        "colour files of grey images": 1,
        "longer than 3 to 1": 1,
    }
    assert list(found.shares["profiles"].values()) == [1]
    said = " ".join(found.advice)
    for part in (
        "cannot be read: 1 image of 15",
        "copies of others, byte for byte: 1 image.",
        "look like others: 2 images.",
        "one value everywhere: 1 image.",
        "a colour profile such as",
        "transparent: 1 image.",
        "longer than 3 to 1: 1 image.",
    ):
        assert part in said
    assert "cat/0.png, dog/copy.png" in found.table()


def test_values_above_8_bits_are_found(folder: Path) -> None:
    deep = np.random.default_rng(0).integers(7, 4001, (60, 80)).astype(np.uint16)
    for name in "ab":
        deep[0, 0], deep[0, 1] = 7, 4000
        Image.fromarray(deep + (name == "b")).save(folder / "dog" / f"{name}.png")
    found = foveola.check_data(f"folder:{folder}", progress=False)
    assert found.values == (7, 4001)
    assert found.shares["bits"] == {"8": 6, "16": 2}
    assert any("add range=0-4095" in text for text in found.advice)


@pytest.mark.parametrize("change", ["jpeg", "half", "brighter"])
def test_what_looks_the_same_stays_near(change: str) -> None:
    facts = []
    for seed in range(40):
        pixels = scene(seed, 120, 160)
        image = Image.fromarray(pixels)
        if change == "jpeg":
            file = io.BytesIO()
            image.save(file, "jpeg", quality=40)
            other = np.asarray(Image.open(file))
        elif change == "half":
            other = np.asarray(image.resize((80, 60), Image.Resampling.BICUBIC))
        else:
            other = (pixels.astype(float) * 0.9 + 20).clip(0, 255).astype(np.uint8)
        facts += [ImageFacts(f"{seed}", look=small_grey(each)) for each in (pixels, other)]
    assert [[each.name for each in group] for group in alike_groups(facts)] == [
        [str(seed)] * 2 for seed in range(40)
    ]


def test_small_things_on_a_plain_ground_do_not_look_the_same() -> None:
    """Of cells and the like nearly all pixels are equal in all images: only where they differ counts."""
    facts = []
    for seed in range(60):
        image = Image.new("RGB", (112, 112))
        x, y = np.random.default_rng(seed).integers(0, 90, 2).tolist()
        ImageDraw.Draw(image).ellipse([x, y, x + 20, y + 20], fill=(200, 100, 50))
        facts.append(ImageFacts(f"{seed}", look=small_grey(np.asarray(image))))
    again = replace(facts[8], name="again")
    empty = [ImageFacts(f"empty {i}", look=bytes(256)) for i in range(2)]
    groups = alike_groups([*facts, *empty, again])
    assert sum(map(len, groups)) <= 4  # by chance two are in nearly the same place
    assert ["8", "again"] in [[each.name for each in group] for group in groups]


def test_images_that_look_the_same_one_after_the_other_are_one_group(monkeypatch) -> None:
    """Each is near the next alone; and blocks change nothing."""
    waves = [np.sin(np.arange(256) / 5 + step / 7) for step in range(30)]
    looks = [np.rint(127 + 100 * wave).astype(np.uint8).tobytes() for wave in waves]
    facts = [ImageFacts(str(i), look=look) for i, look in enumerate(looks)]
    near = np.corrcoef([np.frombuffer(look, np.uint8) for look in looks]) >= 0.98
    assert near[0].sum() == 2
    shuffled = [facts[i] for i in np.random.default_rng(0).permutation(30)]
    for compared in (2**22, 70):
        monkeypatch.setattr("foveola.data.survey.PAIRS_AT_ONCE", compared)
        assert sorted(map(len, alike_groups(shuffled))) == [30]
        assert [len(group) for group in alike_groups([*facts[:10], *facts[20:]])] == [10, 10]


def test_a_part_is_looked_at_evenly(folder: Path) -> None:
    source = foveola.open_source(f"folder:{folder}")
    assert survey(source, 3).looked == 3
    assert survey(source, 3).classes == {"cat": 2, "dog": 1}


def test_the_command_prints_and_writes(folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "cat" / "<b>&.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    assert main(["check", f"folder:{folder}", f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "7, of which 7 were looked at" in said
    tree = json.loads((tmp_path / "out" / "check.json").read_text())
    assert tree["copies"] == [["cat/0.png", "cat/<b>&.png"]]
    page = (tmp_path / "out" / "check.html").read_text()
    assert "cat/&lt;b&gt;&amp;.png" in page
    assert "<b>&" not in page
    assert page.count("<img") == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which data set?"),
        (["folder:/no/such"], "no folder /no/such"),
        (["scenes:", "image=3"], "unknown key 'image'"),
        (["scenes:", "images=0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys) -> None:
    assert main(["check", *words]) == 2
    assert said in capsys.readouterr().err


def test_objects_of_the_built_in_images() -> None:
    source = foveola.open_source("scenes:?size=32&count=20")
    found = foveola.check_data(source, progress=False)
    counts = [0 if (objects := source[i].objects) is None else len(objects) for i in range(20)]
    assert (found.objects["mean"], found.objects["without"]) == (np.mean(counts), counts.count(0))
    assert found.shares["formats"] == {"pixels": 20}


def test_data_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = foveola.check_data(f"folder:{tmp_path}", tmp_path / "out", progress=False)
    assert [name for name, _ in found.unreadable] == ["torn.png"]
    assert found.sides == {}
    with pytest.raises(UserError, match="nothing"):
        foveola.check_data("nothing:/here", progress=False)


@dataclass
class OwnSource:
    """A source of one's own, some of whose samples cannot be had."""

    samples: list[Sample | Exception]
    name: str = "own"
    classes: tuple[str, ...] | None = None
    has_objects: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if isinstance(sample, Exception):
            raise sample
        return sample


def test_samples_that_a_source_refuses_are_found_and_do_not_end_the_look(tmp_path: Path) -> None:
    good = Sample(scene(0), "good")
    refused = [BadImage("a: no such row"), DataError("b: its box lies outside")]
    missing = Sample(tmp_path / "missing.png", "missing.png")
    found = foveola.check_data(OwnSource([good, *refused, missing]), tmp_path / "out", progress=False)
    assert found.looked == 4
    assert found.unreadable == [
        ("image 1", "a: no such row"),
        ("image 2", "b: its box lies outside"),
        ("missing.png", "No such file or directory"),
    ]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["looked"] == 4


def test_odd_modes_are_what_they_are(tmp_path: Path) -> None:
    for number, mode in enumerate(("1", "P", "L", "LA", "RGBA")):
        Image.fromarray(scene(number)).convert(mode).save(tmp_path / f"{mode}.png")
    Image.fromarray(scene(9)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    frames = [Image.fromarray(scene(10 + i)) for i in range(3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    found = foveola.check_data(f"folder:{tmp_path}", progress=False)
    assert found.shares["channels"] == {"grey": 2, "four": 2, "colour": 2, "grey and alpha": 1}
    assert found.shares["bits"] == {"8": 6, "1": 1}
    assert found.shares["noted"]["transparent"] == 2
    assert found.unreadable == []


def test_each_file_is_read_once(folder: Path, monkeypatch) -> None:
    source, read = foveola.open_source(f"folder:{folder}"), []
    opened, hashed = Path.open, identity._hash_file
    monkeypatch.setattr(Path, "open", lambda path, *how: (read.append(path), opened(path, *how))[1])
    monkeypatch.setattr(identity, "_hash_file", lambda path: (read.append(path), hashed(path))[1])
    survey(source)
    assert len(read) == len(set(read)) == 6


def test_a_place_that_cannot_be_written_is_said_before_any_image_is_read(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("foveola.reports.data_page.survey", None)
    with pytest.raises(UserError, match="is a file where a folder belongs: give another out="):
        foveola.check_data("scenes:?count=2", tmp_path / "file", progress=False)


def bands(folder: Path, values: np.ndarray, name: str) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / f"{name}.npy", values)


def test_levels_of_channels_and_the_options_that_images_want(tmp_path: Path) -> None:
    """Five channels of 12 bits, not yet told to the data string: what to write, and with it nothing more."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 3000 + 200 * i, (40, 30, 5), np.uint16) for i in range(4)]
    for i, values in enumerate(images):
        bands(tmp_path / "bands", values, str(i))
    found = foveola.check_data(f"folder:{tmp_path / 'bands'}", tmp_path / "out", progress=False)
    assert len(found.unreadable) == 4
    wanted = f"folder:{tmp_path / 'bands'}?channels=all&range=0-4095"
    assert found.advice[0] == f"these images want channels=all and range=0-4095: write data='{wanted}'"
    assert not any("cannot be read" in text for text in found.advice)
    every = np.concatenate([each.reshape(-1, 5) for each in images])
    for k, level in enumerate(found.levels):
        assert (level.name, level.least, level.most) == (str(k + 1), every[:, k].min(), every[:, k].max())
        numbers = level.low, level.middle, level.high
        np.testing.assert_allclose(numbers, np.percentile(every[:, k], (0.5, 50, 99.5)), atol=0.02 * 3600)
    written = json.loads((tmp_path / "out" / "check.json").read_text())["levels"]
    assert [each["name"] for each in written] == list("12345")
    for text in (found.table(), (tmp_path / "out" / "check.html").read_text()):
        assert f"5: {found.levels[4].low:g}, {found.levels[4].middle:g}" in text
    again = foveola.check_data(wanted, progress=False)
    assert (again.unreadable, again.levels) == ([], found.levels)
    assert not any("these images want" in text for text in again.advice)


@pytest.mark.parametrize(
    ("values", "option"),
    [
        (np.array([0.0, 1.5]), "range=0-1.5"),
        (np.array([-1000, 3000], np.int16), "range=-1000-3000"),
        (np.array([0, 65535], np.uint16), None),  # they fill their container
        (np.r_[np.full(999, 100), 60000].astype(np.uint16), "range=percentile:0.5-99.5"),  # one outlier
    ],
)
def test_ranges_that_fit(values: np.ndarray, option: str | None, tmp_path: Path) -> None:
    pixels = np.resize(np.r_[values, np.arange(100) if len(values) > 2 else values], (40, 40, 1))
    bands(tmp_path / "a", pixels.astype(values.dtype), "a")
    found = foveola.check_data(f"folder:{tmp_path / 'a'}", progress=False)
    said = [text for text in found.advice if text.startswith("these images want")]
    assert len(said) == (option is not None)
    if option is not None:
        assert said == [f"these images want {option}: write data='{found.name}?{option}'"]
        assert foveola.check_data(f"{found.name}?{option}", progress=False).unreadable == []


def test_channels_of_other_ranges_want_percentiles(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, [100, 2000, 2000, 2000, 2000], (40, 40, 5)).astype(np.uint16)
    bands(tmp_path / "a", values, "a")
    found = foveola.check_data(f"folder:{tmp_path / 'a'}", progress=False)
    assert found.advice[0].startswith("these images want channels=all and range=percentile:0.5-99.5:")


def test_stacks_of_pages_are_said(tmp_path: Path) -> None:
    pages = [Image.fromarray(scene(seed)) for seed in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    found = foveola.check_data(f"folder:{tmp_path}", progress=False)
    assert found.advice[0].startswith("files of several pages: 1 image, such as a.tif with 3.")
    assert not any("cannot be read" in text for text in found.advice)
