"""The four dense protocols as they are called: by name, on data strings, with a result on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.config import UserError
from foveola.evaluation.protocol import PROTOCOLS, Result, evaluate

COLOURS = np.zeros((12, 3), np.uint8)
COLOURS[:3] = [[220, 30, 30], [30, 220, 30], [30, 30, 220]]
SETTINGS = {
    "dense_retrieval": {"k": (3, 5), "memory": 60, "subsample": (1, 2)},
    "knn_segmentation": {"k": (1, 3)},
    "logistic_segmentation": {"c": (1e-3, 1.0)},
    "linear_segmentation": {"rates": (1e-3, 1e-2), "steps": 60, "train_batch": 4},
}
RANKS = """
import json
from foveola import distributed
from foveola.evaluation.protocol import evaluate
with distributed.joined("cpu") as device:
    for name, settings in {settings!r}.items():
        options = dict(train={data!r}, test={data!r}, device=device, progress=False, workers=0)
        result = evaluate({encoder!r}, name, **options, **settings)
        print(json.dumps([name, result.metrics, result.data["test"]]))
"""


@pytest.fixture
def camvid(tmp_path: Path) -> str:
    """CamVid in miniature: areas of flat colour, which is the class; 11 is void."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for part in ("images", "labels"):
            (tmp_path / "camvid" / split / part).mkdir(parents=True)
        for number in range(count):
            labels = np.repeat(np.repeat(rng.integers(0, 3, (4, 4)), 8, 0), 12, 1).astype(np.uint8)
            labels[:, -5:] = 11
            Image.fromarray(COLOURS[labels]).save(tmp_path / "camvid" / split / "images" / f"{number}.png")
            Image.fromarray(labels).save(tmp_path / "camvid" / split / "labels" / f"{number}.png")
    return f"camvid:{tmp_path / 'camvid'}"


@pytest.mark.parametrize("name", SETTINGS)
def test_result_on_disk_repeats_itself(name, encoder, camvid, tmp_path):
    options = {"train": camvid, "test": camvid, "progress": False, "workers": 0, **SETTINGS[name]}
    result = evaluate(encoder, name, out=tmp_path / "run", **options)
    assert Result.read(tmp_path / "run" / "results" / f"{name}.json") == result
    tree = json.loads((tmp_path / "run" / "results" / f"{name}.json").read_text())
    assert tree["settings"]["seed"] == 0
    assert (tree["data"]["train"]["pictures"], tree["data"]["test"]["pictures"]) == (6, 5)
    assert tree["data"]["class_iou"]["sky"] is not None
    assert tree["data"]["class_iou"]["bicyclist"] is None  # neither true nor predicted
    assert 0 < result.metrics["miou_low"] <= result.metrics["miou"] <= result.metrics["miou_high"] <= 100
    assert any("has 6 pictures, the official set 367" in note for note in result.notes)
    assert "miou" in result.table()
    again = evaluate(encoder, name, **options)
    assert again.metrics == result.metrics


def test_two_processes_get_what_one_gets(encoder, camvid, tmp_path, run_ranks):
    encoder.save(tmp_path / "encoder")
    for printed in run_ranks(RANKS.format(encoder=str(tmp_path / "encoder"), data=camvid, settings=SETTINGS)):
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
        assert [name for name, *_ in lines] == list(SETTINGS)
        for name, metrics, facts in lines:
            options = {"train": camvid, "test": camvid, "progress": False, "workers": 0, **SETTINGS[name]}
            alone = evaluate(tmp_path / "encoder", name, device="cpu", **options)
            assert facts == alone.data["test"]
            assert metrics == pytest.approx(alone.metrics, abs=0.5)  # batches of other sizes round otherwise


@pytest.mark.parametrize("name", SETTINGS)
def test_data_without_pixel_labels(name, encoder, camvid, tmp_path):
    folder = f"folder:{camvid.removeprefix('camvid:')}/test/images"
    with pytest.raises(UserError, match=r"train: folder:.* has no label for each pixel; use masks:"):
        evaluate(encoder, name, train=folder, test=camvid)
    with pytest.raises(UserError, match="test is needed"):
        evaluate(encoder, name, train=camvid)
    assert PROTOCOLS[name].needs_train
