"""The contact sheet: which images it shows, what it draws on them, and that its page needs nothing else."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

import foveola
from foveola.drawing.plots import COLORS
from foveola.proposals.sheet import numbers_of
from foveola.proposals.written import Summary

NAME = "<b>bad & long.png"


class Upper:
    """Finds the upper half of images that are not dark."""

    classes, batch_size = ("object",), 4

    def describe(self) -> dict:
        return {"kind": "upper", "<i>": None}

    def propose(self, images):
        found = []
        for image in images:
            mask = np.zeros((1, *image.shape[:2]), bool)
            mask[0, : image.shape[0] // 2] = image.mean() > 50
            box = np.array([[0, 0, image.shape[1], image.shape[0] // 2]], np.float32)
            found.append(foveola.Proposals(box, np.array([0.75], np.float32), np.zeros(1, np.int64), mask))
        return found


def test_images_with_what_was_found(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, grey in (("a.png", 200), ("dark.png", 0), (NAME, 200), ("large.png", 200)):
        side = 640 if name == "large.png" else 320
        Image.new("RGB", (side, side), (grey,) * 3).save(folder / name)
    (folder / "torn.png").write_bytes(b"no image")
    found = foveola.propose(Upper(), f"folder:{folder}", out=tmp_path / "out", progress=False)
    png, page = found.sheets
    pixels = np.asarray(Image.open(png).convert("RGB")).reshape(-1, 3)
    tinted = np.rint(0.6 * 200 + 0.4 * np.array([int(COLORS[0][k : k + 2], 16) for k in (1, 3, 5)]))
    share = (np.abs(pixels - tinted).max(1) <= 1).sum() / 200**2  # tiles have 200 pixels a side
    assert 1.2 < share < 1.5  # half of each of three images, but for frames and texts
    text = page.read_text(encoding="utf-8")
    assert text.count("<img ") == 4
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "<b>bad" not in text
    assert "&lt;b&gt;bad &amp; long.png" in text
    assert "<i>" not in text
    assert "torn.png: " in text
    assert "1 (25.0 %)" in text  # images without any
    none = foveola.propose(Upper(), f"folder:{folder}", out=tmp_path / "none", progress=False, sheet=0)
    assert none.sheets == ()
    assert {path.name for path in none.file.parent.iterdir()} == {"objects.json"}
    two = foveola.propose(Upper(), f"folder:{folder}", out=tmp_path / "none", progress=False, sheet=2)
    assert two.sheets[1].read_text(encoding="utf-8").count("<img ") == 2 - 1  # the last of them is torn


def test_numbers_of_all_images():
    facts = numbers_of(Summary([2, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], [1.0] * 4, [("a", "b")]))
    assert facts == [
        ("Images", "4"),
        ("Objects", "4, 1.00 in each image"),
        ("Images without any", "1 (25.0 %)"),
        ("An object covers", "25.0 % of its image; half of them 17.5 % to 32.5 %"),
        ("Unreadable images", "1"),
    ]
    assert numbers_of(Summary([0])) == [
        ("Images", "1"),
        ("Objects", "0, 0.00 in each image"),
        ("Images without any", "1 (100.0 %)"),
    ]
