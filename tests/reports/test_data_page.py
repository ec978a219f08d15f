"""`foveola check`: what is found in images whose properties are known."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import foveola
from foveola.cli import main
from foveola.config import UserError
from foveola.data.survey import looks_like, survey


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
    Image.fromarray(np.full((60, 80, 3), 9, np.uint8)).save(dog / "flat.png")
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
        "colour files of grey images": 2,  # the flat one is grey, too
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
    near, far = [], []
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
        near.append((looks_like(pixels) ^ looks_like(other)).bit_count())
        far.append((looks_like(pixels) ^ looks_like(scene(seed + 1000))).bit_count())
    assert sum(bits <= 6 for bits in near) >= 38
    assert min(far) > 6


def test_the_hash_by_hand() -> None:
    rising = np.repeat(np.arange(9, dtype=np.uint8)[None, :, None] * 20, 8, 0).repeat(3, 2)
    assert looks_like(rising) == 2**64 - 1
    assert looks_like(rising[:, ::-1].copy()) == 0


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
