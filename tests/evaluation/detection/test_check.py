"""`check_masks`: images that meet by name, EXIF, masks of another size, and what is left out."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveola
from foveola.cli import main
from foveola.config import UserError
from foveola.data.coco import rle_of
from foveola.data.sample import DataError, Objects, full_mask
from foveola.evaluation.compare import compare
from foveola.evaluation.detection.check import check_masks
from foveola.evaluation.detection.truth import annotations_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
SIZE = (20, 30)  # rows, columns
SETTINGS: dict[str, Any] = {"progress": False, "workers": 0}


def masked(box: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def write(path: Path, images: dict[str, list[tuple]], masks: bool = True, scores: bool = True) -> Path:
    """Each image with (x0, y0, x1, y1, score)."""
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "thing"}]}
    for number, (name, some) in enumerate(images.items()):
        tree["images"].append({"id": number, "file_name": name, "width": SIZE[1], "height": SIZE[0]})
        for x0, y0, x1, y1, score in some:
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            box |= {"segmentation": rle_of(masked((x0, y0, x1, y1)))} if masks else {}
            box |= {"score": score} if scores else {}
            numbers = {"id": len(tree["annotations"]) + 1, "image_id": number, "category_id": 3}
            tree["annotations"].append(box | numbers)
    path.write_text(json.dumps(tree))
    return path


TRUE = {
    "a.png": [(0, 0, 10, 10, 1)],
    "in/b.png": [(5, 5, 15, 15, 1), (20, 0, 30, 20, 1)],
    "c.png": [],
    "d.png": [(0, 0, 30, 20, 1)],
}
FOUND = {
    "a.png": [(20, 10, 30, 20, 0.3), (0, 0, 10, 8, 0.9)],  # IoU 0.8, then nothing
    "b.png": [(20, 0, 30, 20, 0.5)],  # the file name alone
    "c.png": [(0, 0, 9, 9, 0.1)],
    "other.png": [(0, 0, 9, 9, 1.0)],
}


@pytest.fixture
def truth(tmp_path: Path) -> str:
    folder = tmp_path / "images"
    for k, name in enumerate(TRUE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1], (k, k, k)).save(folder / name)
    return f"coco:{folder}?annotations={write(tmp_path / 'true.json', TRUE)}"


def test_by_hand(truth: str, tmp_path: Path):
    """Three images in common with three objects, of which two are found by four proposals."""
    (tmp_path / "masks").mkdir()
    result = foveola.check_masks(write(tmp_path / "masks" / "objects.json", FOUND), truth, **SETTINGS)
    for kind in ("box", "mask"):
        assert result.metrics[f"{kind}_precision"] == pytest.approx(50)
        assert result.metrics[f"{kind}_recall"] == pytest.approx(200 / 3)
        assert result.metrics[f"{kind}_corloc"] == 100
        assert result.metrics[f"{kind}_best_iou"] == pytest.approx(100 * (0.8 + 0 + 1) / 3)
    assert result.metrics["images_without"] == 0
    assert result.data["test"]["objects"] == 3
    assert result.data["proposals"] == 4
    notes = "\n".join(result.notes)
    assert "1 images are left out, which are in coco:" in notes
    assert "d.png" in notes
    assert "objects.json alone: other.png" in notes
    assert "1 images have no annotated object" in notes
    kept = json.loads((tmp_path / "masks" / "results" / "masks_check.json").read_text())
    assert kept["metrics"] == result.metrics
    assert "box_corloc" in result.table()


def test_two_files_are_compared_by_rows(truth: str, tmp_path: Path):
    check_masks(write(tmp_path / "a.json", FOUND), truth, out=tmp_path / "a", **SETTINGS)
    none: dict[str, list] = {name: [] for name in FOUND}
    result = check_masks(write(tmp_path / "b.json", none), truth, out=tmp_path / "b", **SETTINGS)
    assert result.metrics["images_without"] == 100
    (both,) = compare([tmp_path / "a", tmp_path / "b"])
    line = next(line for line in both.table().splitlines() if line.startswith("box_recall "))
    assert "-66.67 [" in line


def test_boxes_alone_and_no_scores(truth: str, tmp_path: Path):
    """Without scores the order of the file counts: the first proposal of a.png is wrong then."""
    result = check_masks(write(tmp_path / "f.json", FOUND, masks=False, scores=False), truth, **SETTINGS)
    assert result.metrics["box_corloc"] == 50
    assert not any(name.startswith("mask") for name in result.metrics)
    assert any("no scores" in note for note in result.notes)
    assert any("boxes alone" in note for note in result.notes)


def test_exif_turns_what_was_found_on_stored_pixels(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying down, shown with 20 columns and 30 rows
    Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(folder / "t.jpg", exif=exif)
    found = write(tmp_path / "found.json", {"t.jpg": [(0, 0, 10, 20, 1.0)]})  # the left third as stored
    (tmp_path / "boxes.csv").write_text("t.jpg,0,0,20,10\n")  # which is the upper third when upright
    result = check_masks(found, f"folder:{folder}?boxes={tmp_path / 'boxes.csv'}", **SETTINGS)
    assert result.metrics["box_best_iou"] == pytest.approx(100)


def test_a_mask_of_another_size_is_drawn_at_that_of_its_image():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    objects = Objects.from_boxes(np.array([[2 / 6, 0.25, 5 / 6, 0.75]]), masks=[mask], areas=np.array([0.25]))
    (found,) = annotations_of(objects, 0, (20, 30), masks=True, crowd=False, classes=False)
    np.testing.assert_array_equal(full_mask(found["segmentation"]), np.kron(mask, np.ones((5, 5))) > 0)


def test_mistakes(truth: str, tmp_path: Path):
    other = write(tmp_path / "o.json", {"x.png": [], "y.png": []})
    with pytest.raises(DataError, match=r"none of its 2 images, such as x.png, is in coco:.*which has a.png"):
        check_masks(other, truth, **SETTINGS)
    found = write(tmp_path / "f.json", FOUND)
    with pytest.raises(DataError, match=r"has no objects to check against"):
        check_masks(found, f"folder:{tmp_path / 'images'}", **SETTINGS)
    with pytest.raises(DataError, match=r"none of the 1 images in common has an annotated object"):
        check_masks(write(tmp_path / "c.json", {"c.png": []}), truth, **SETTINGS)
    with pytest.raises(UserError, match=r"unknown key 'seeds'"):
        check_masks(found, truth, seeds=1, **SETTINGS)


def test_command(truth: str, tmp_path: Path, capsys):
    found = write(tmp_path / "f.json", FOUND)
    assert main(["masks", "check", f"annotations={found}", f"data={truth}", "workers=0", "resamples=0"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^box_precision +50.00 ", printed, re.MULTILINE)
    assert f"written to {tmp_path}/results/masks_check.json" in printed
    assert main(["masks", "check", f"annotations={found}"]) == 2
    assert "masks check needs data=" in capsys.readouterr().err
    assert main(["masks", "check", "--help"]) == 0
    assert "resamples" in capsys.readouterr().out
