"""The four dense protocols as they are called: by name, on data strings, with a result on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.config import UserError
from foveola.evaluation.evaluate import evaluate, evaluate_all
from foveola.evaluation.features import store as stored
from foveola.evaluation.features.encoding import FeatureReader
from foveola.evaluation.protocol import find_protocol
from foveola.evaluation.result import Result

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
from foveola.evaluation.evaluate import evaluate, evaluate_all
with distributed.joined("cpu") as device:
    options = dict(train={data!r}, test={data!r}, device=device, progress=False, workers=0)
    own = {settings!r}
    results = evaluate_all({encoder!r}, list(own), **options, **own)
    results["alone"] = evaluate({encoder!r}, "knn_segmentation", **options, **own["knn_segmentation"])
    for name, result in results.items():
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
def test_result_on_disk_repeats_itself(name, encoder, camvid, check_scores, tmp_path):
    options = {"train": camvid, "test": camvid, "progress": False, "workers": 0, **SETTINGS[name]}
    result = evaluate(encoder, name, out=tmp_path / "run", **options)
    assert Result.read(tmp_path / "run" / "results" / f"{name}.json") == result
    tree = json.loads((tmp_path / "run" / "results" / f"{name}.json").read_text())
    assert tree["settings"]["seed"] == 0
    assert (tree["data"]["train"]["images"], tree["data"]["test"]["images"]) == (6, 5)
    assert tree["data"]["class_iou"]["sky"] is not None
    assert tree["data"]["class_iou"]["bicyclist"] is None  # neither true nor predicted
    assert 0 < result.metrics["miou_low"] <= result.metrics["miou"] <= result.metrics["miou_high"] <= 100
    assert any("has 6 images, the official set 367" in note for note in result.notes)
    assert "miou" in result.table()
    again = evaluate(encoder, name, **options)
    assert again.metrics == result.metrics
    assert again.scores == result.scores
    check_scores(result)


def test_two_processes_get_what_one_gets(encoder, camvid, tmp_path, run_ranks):
    encoder.save(tmp_path / "encoder")
    for printed in run_ranks(RANKS.format(encoder=str(tmp_path / "encoder"), data=camvid, settings=SETTINGS)):
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith("[")]
        assert [name for name, *_ in lines] == [*SETTINGS, "alone"]
        for name, metrics, facts in lines:
            name = "knn_segmentation" if name == "alone" else name
            options = {"train": camvid, "test": camvid, "progress": False, "workers": 0, **SETTINGS[name]}
            alone = evaluate(tmp_path / "encoder", name, device="cpu", **options)
            assert facts.pop("computed", 5) == 5
            assert {key: facts[key] for key in facts if key != "pass_seconds"} == alone.data["test"]
            assert metrics == pytest.approx(alone.metrics, abs=0.5)  # batches of other sizes round otherwise


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each call of the encoder had."""
    counts, plain = [], FeatureReader.__call__
    monkeypatch.setattr(
        FeatureReader, "__call__", lambda s, i, m, n: counts.append(len(i)) or plain(s, i, m, n)
    )
    return counts


def test_one_pass_for_all_gives_what_each_gets_alone(encoder, camvid, encoded, tmp_path):
    """The numbers bit for bit, from one encoding of each image; later calls read them from the folder."""
    options = {"train": camvid, "test": camvid, "progress": False, "workers": 0}
    alone = {name: evaluate(encoder, name, **options, **own) for name, own in SETTINGS.items()}
    assert (
        sum(encoded) == 4 * (6 + 5) + 3
    )  # and once more every second image, for a reference set of these alone
    encoded.clear()
    together = evaluate_all(encoder, list(SETTINGS), cache=tmp_path, **options, **SETTINGS)
    assert sum(encoded) == 6 + 5
    for name in SETTINGS:
        assert together[name].metrics == alone[name].metrics
        assert together[name].data["class_iou"] == alone[name].data["class_iou"]
        assert (together[name].chosen, together[name].grid) == (alone[name].chosen, alone[name].grid)
        stored = together[name].data["test"]
        assert {key: stored[key] for key in alone[name].data["test"]} == alone[name].data["test"]
    assert "pass over test: 5 images in" in together["dense_retrieval"].table()
    encoded.clear()
    for name, own in SETTINGS.items():
        assert evaluate(encoder, name, cache=tmp_path, **options, **own).metrics == alone[name].metrics
    assert not encoded
    some = {"limit": 4, "k": (1, 3), **options}
    stored = evaluate(encoder, "knn_segmentation", cache=tmp_path, **some)
    assert stored.metrics == evaluate(encoder, "knn_segmentation", **some).metrics
    encoded.clear()
    evaluate(encoder, "knn_segmentation", cache=tmp_path, image_size=48, **options, k=(1,))
    assert sum(encoded) == 6 + 5
    assert (
        sorted(json.loads(p.read_text())["side"] for p in tmp_path.glob("*/key.json")) == [32] * 4 + [48] * 2
    )


def test_nothing_is_stored_that_nobody_shares(encoder, camvid, encoded, monkeypatch):
    monkeypatch.setattr(stored.Pass, "run", lambda self: pytest.fail("a pass that writes"))
    own = {"knn_segmentation": {"k": (1,)}, "linear_segmentation": {"image_size": 48, "steps": 2}}
    evaluate_all(encoder, list(own), train=camvid, test=camvid, progress=False, workers=0, **own)
    assert sum(encoded) == 2 * (6 + 5)


def test_a_killed_pass_of_patches_goes_on(encoder, camvid, tmp_path, monkeypatch):
    options = {"train": camvid, "test": camvid, "progress": False, "workers": 0, "batch_size": 4, "k": (1, 3)}
    whole = evaluate(encoder, "knn_segmentation", **options)
    monkeypatch.setattr(stored, "FLUSH_SECONDS", -1.0)
    plain, calls = FeatureReader.__call__, []

    def dies(self, images, masks, wanted):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, images, masks, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureReader, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(encoder, "knn_segmentation", cache=tmp_path, **options)
    assert calls == [4, 2, 4]  # all of train, then test
    result = evaluate(encoder, "knn_segmentation", cache=tmp_path, **options)
    assert result.metrics == whole.metrics
    assert (result.data["train"]["computed"], result.data["test"]["computed"]) == (0, 5)


def test_patches_that_do_not_fit_on_the_disk(encoder, camvid, tmp_path, monkeypatch):
    """16 patches of 32 numbers and 32 x 32 labels of 6 images."""
    usage = type("Usage", (), {"free": 6 * (16 * 32 * 4 + 32 * 32) - 1})
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda _: usage)
    options = {"train": camvid, "test": camvid, "progress": False, "workers": 0, "cache": tmp_path}
    with pytest.raises(
        UserError, match=r"features of camvid:.* need [0-9,]+ MiB in .* use limit=, store=float16"
    ):
        evaluate(encoder, "knn_segmentation", **options)
    usage.free += 1
    evaluate(encoder, "knn_segmentation", k=(1,), **options)


def test_a_bad_label_map_names_its_image_in_the_shared_pass(encoder, camvid, tmp_path):
    labels = np.zeros((10, 10), np.uint8)
    Image.fromarray(labels).save(Path(camvid.removeprefix("camvid:")) / "train" / "labels" / "3.png")
    options = {"train": camvid, "test": camvid, "progress": False, "cache": tmp_path}
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"3.png is 48x32 pixels, its label map 10x10$"):
            evaluate(encoder, "knn_segmentation", workers=workers, **options)


def test_a_damaged_label_map_is_not_reported_as_its_image(encoder, camvid):
    (Path(camvid.removeprefix("camvid:")) / "train" / "labels" / "3.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(
        UserError, match=r"cannot be read, such as .*3.png: its label map .*3.png cannot be read"
    ):
        evaluate(encoder, "knn_segmentation", train=camvid, test=camvid, workers=0, progress=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_data_without_pixel_labels(name, encoder, camvid, tmp_path):
    folder = f"folder:{camvid.removeprefix('camvid:')}/train/images"
    with pytest.raises(UserError, match=r"train: folder:.* has no label for each pixel; use masks:"):
        evaluate(encoder, name, train=folder, test=camvid)
    with pytest.raises(UserError, match="test is needed"):
        evaluate(encoder, name, train=camvid)
    assert find_protocol(name).train == "needed"
