"""`masks=discover`: the same numbers as of data that have these very objects; what is kept, and refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveola.config import ConfigError, UserError
from foveola.data.sample import Objects, Sample
from foveola.evaluation import inferred
from foveola.evaluation.compare import compare
from foveola.evaluation.evaluate import evaluate, evaluate_all
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.proposals.proposal import Proposals

SIDE, COUNT = 16, 12


def box_of(image: np.ndarray) -> tuple[int, int, int, int] | None:
    """Where the fake finds an object: it depends on the first pixel, which also says that there is none."""
    first = int(image[0, 0, 0])
    if first % 4 == 3:
        return None
    x, y = first % 8, (first // 8) % 8
    return x, y, x + 8, y + 8


class Fake:
    """Finds an object, and one more that is less sure."""

    classes = ("object",)
    batch_size = 4

    def __init__(self) -> None:
        self.seen = 0

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake"}

    def propose(self, images: Any, /) -> list[Proposals]:
        self.seen += len(images)
        return [self._of(image) for image in images]

    def _of(self, image: np.ndarray) -> Proposals:
        box = box_of(image)
        boxes = [] if box is None else [(0, 0, 3, 3), box]
        masks = np.zeros((len(boxes), SIDE, SIDE), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
            mask[y0:y1, x0:x1] = True
        scores = np.array([0.2, 0.7][: len(boxes)], np.float32)
        some = np.array(boxes, np.float32).reshape(-1, 4)
        return Proposals(some, scores, np.zeros(len(boxes), np.int64), masks)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(inferred.MasksBy, "proposer", lambda *_: made)
    return made


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = ViTConfig(width=32, depth=2, heads=2, patch_size=4, image_size=SIDE)
    made = Encoder(EncoderConfig(model=config, transform=TransformConfig(resize=SIDE, crop=SIDE)))
    rng = np.random.default_rng(0)
    for _, weight in sorted(made.backbone.state_dict().items()):
        weight.copy_(torch.from_numpy(rng.normal(0, 0.3, weight.shape)))
    return made


@pytest.fixture
def sets(list_source) -> dict[str, Any]:
    """Train and test, each with and without the objects that the fake will find."""
    made = {}
    for split, seed in (("train", 1), ("test", 2)):
        rng = np.random.default_rng(seed)
        plain, true = [], []
        for k in range(COUNT):
            image = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
            box = box_of(image)
            label = k % 3
            plain.append(Sample(image, f"{split}/{k}.png", None, label))
            found = None
            if box is not None:
                x0, y0, x1, y1 = box
                mask = np.zeros((SIDE, SIDE), bool)
                mask[y0:y1, x0:x1] = True
                corners = np.array([box], np.float32) / SIDE
                found = Objects.from_boxes(corners, np.array([label]), [mask], np.array([0.25]))
            true.append(replace(plain[-1], objects=found))
        classes = ("a", "b", "c")
        made[split] = list_source(plain, f"list:{split}", classes)
        made[f"true_{split}"] = list_source(true, f"list:{split}", classes)
    assert 0 < sum(sample.objects is None for sample in made["true_test"].samples) < COUNT
    return made


SETTINGS: dict[str, Any] = {"progress": False, "workers": 0}


def test_numbers_are_those_of_data_with_these_objects(encoder, sets, fake, tmp_path):
    settings = {**SETTINGS, "k": (3,), "cache": tmp_path, "test": None}
    for more in ({}, {"rows": "objects"}):
        some = settings | more
        true = evaluate(encoder, "knn", **some | {"train": sets["true_train"], "test": sets["true_test"]})
        found = evaluate(
            encoder, "knn", **some | {"train": sets["train"], "test": sets["test"]}, masks="discover"
        )
        plain = evaluate(encoder, "knn", **some | {"train": sets["train"], "test": sets["test"]})
        assert found.metrics == true.metrics
        assert found.metrics.keys() > plain.metrics.keys() or more
        without = sum(sample.objects is None for sample in sets["true_test"].samples)
        assert found.data["masks"]["test"] == {"images": COUNT, "without": without}
        assert found.data["masks"]["by"] == {"kind": "fake"}
        assert found.settings["masks_by"] == {"kind": "discover"}
        assert found.data["test"]["fingerprint"] == plain.data["test"]["fingerprint"]
        assert found.data["test"]["name"] == "list:test"
        assert any(f"none is found in {without} of {COUNT}" in note for note in found.notes)


def test_what_is_prompted_by_objects_knows_no_classes_of_them(encoder, sets, fake, monkeypatch):
    """An object has the class of its image, whatever that of the box is."""
    asked = []

    def of_classes(classes):
        asked.append(classes)
        return fake

    fake.prompts, fake.of_classes = True, of_classes
    monkeypatch.setattr(Fake, "propose", lambda self, images, objects: [self._of(image) for image in images])
    sources = {"train": sets["true_train"], "test": sets["true_test"]}
    true = evaluate(encoder, "knn", **SETTINGS, **sources, k=(3,), rows="objects")
    found = evaluate(encoder, "knn", **SETTINGS, **sources, k=(3,), rows="objects", masks="segment")
    assert asked == [(), ()]
    assert found.metrics == true.metrics


def test_what_was_found_is_kept(encoder, sets, fake, tmp_path):
    data = {"train": sets["train"], "test": sets["test"]}
    settings = {**SETTINGS, "k": (3,), "masks": "discover", "cache": tmp_path}
    first = evaluate(encoder, "knn", **data, **settings)
    assert fake.seen == 2 * COUNT
    assert evaluate(encoder, "knn", **data, **settings).metrics == first.metrics
    assert fake.seen == 2 * COUNT
    assert len(list(Path(tmp_path).glob("objects/*/objects.json"))) == 2
    assert not list(Path(tmp_path).rglob("objects.png"))
    assert evaluate(encoder, "knn", **data, **settings, discover={"workers": 0}).metrics == first.metrics
    assert fake.seen == 2 * COUNT
    evaluate(encoder, "knn", **data, **settings, limit=5)  # of each set, and no image more
    assert fake.seen == 2 * COUNT + 2 * 5
    evaluate(encoder, "knn", **data, **settings | {"cache": None})
    assert fake.seen == 4 * COUNT + 2 * 5


def test_protocols_without_a_shared_pass(encoder, sets, fake):
    several = ["retrieval", "label_free", "localisation"]
    settings = {**SETTINGS, "retrieval": {"objects": 8}}
    maps = {"localisation": {"maps": ("attention",)}}
    true = evaluate_all(encoder, several, test=sets["true_test"], **settings, **maps)
    found = evaluate_all(encoder, several[:2], test=sets["test"], masks="discover", **settings)
    for name in several[:2]:
        assert found[name].metrics == true[name].metrics
    mixed = evaluate_all(encoder, several, test=sets["true_test"], masks="discover", **settings, **maps)
    assert mixed["localisation"].metrics == true["localisation"].metrics  # against the objects of the data
    assert "masks" not in mixed["localisation"].data
    assert mixed["retrieval"].metrics == true["retrieval"].metrics


@pytest.mark.parametrize(
    ("protocol", "more"), [("linear", {"epochs": 2, "lr": (0.01,)}), ("logistic", {"c": (1.0,)})]
)
def test_probes_read_object_tokens(encoder, sets, fake, protocol, more):
    settings = {**SETTINGS, **more, "holdout": 0.0}
    true = {"train": sets["true_train"], "test": sets["true_test"], "masks": True}
    found = {"train": sets["train"], "test": sets["test"], "masks": "discover"}
    own, others = (evaluate(encoder, protocol, **settings, **data) for data in (true, found))
    assert own.metrics == others.metrics
    assert others.settings["masks"] is True


def test_two_encoders_that_find_their_own_objects_are_compared(encoder, sets, fake, monkeypatch, tmp_path):
    data = {"train": sets["train"], "test": sets["test"]}
    settings = {**SETTINGS, "k": (3,), "masks": "discover"}
    evaluate(encoder, "knn", **data, **settings, out=tmp_path / "a")
    monkeypatch.setattr(Fake, "_of", lambda self, image: Proposals(*_none()))
    evaluate(encoder, "knn", **data, **settings, out=tmp_path / "b")
    (both,) = compare([tmp_path / "a", tmp_path / "b"])
    line = next(line for line in both.table().splitlines() if line.startswith("top1_masks "))
    assert "[" in line.split("second")[-1]
    evaluate(encoder, "knn", **data, **settings, discover={"batch_size": 2, "sheet": 1}, out=tmp_path / "d")
    assert compare([tmp_path / "a", tmp_path / "d"])
    for name in ("old", "new"):  # of one name, but not of the same weights
        monkeypatch.setattr(Fake, "describe", lambda self, name=name: {"kind": "fake", "weights": name})
        detect = {"masks": "detect", "detect": {"model": "onnx:a.onnx"}}
        evaluate(encoder, "knn", **data, **{**settings, **detect}, out=tmp_path / name)
    with pytest.raises(UserError, match=r"masks_by = .*'weights': 'old'"):
        compare([tmp_path / "old", tmp_path / "new"])
    evaluate(encoder, "knn", **data, **{**settings, "masks": "both"}, out=tmp_path / "c")
    with pytest.raises(UserError, match="masks_by"):
        compare([tmp_path / "a", tmp_path / "c"])


def _none() -> tuple[Any, ...]:
    some = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
    return (*some, np.zeros((0, SIDE, SIDE), bool))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "discover", "rows": "images", "pool": "average", "image_size": None, "x": 1}, "x"),
        ({"masks": "detect"}, r"masks=detect needs detect.model=: what finds the objects"),
        ({"masks": "discover", "discover": {"taus": 1}}, r"unknown key 'taus'; did you mean 'tau'\?"),
        ({"masks": "discover", "discover": {"k": 5}}, r"k has no effect: it is for method=lost"),
        ({"masks": "found"}, r"masks: expected both or true\|false, got 'found'"),
        ({"discover": {"tau": 0.1}}, r"discover. has no effect: its keys are for masks=discover"),
    ],
)
def test_refusals(encoder, sets, settings, message):
    with pytest.raises((UserError, ConfigError), match=message):
        evaluate(encoder, "knn", train=sets["train"], test=sets["test"], **SETTINGS, **settings)


def test_a_protocol_that_reads_no_objects_is_said(encoder, sets):
    with pytest.raises(UserError, match=r"masks=discover has no effect: logistic with these settings"):
        evaluate(
            encoder,
            "logistic",
            train=sets["train"],
            test=sets["test"],
            masks="discover",
            features="average",
            **SETTINGS,
        )
    with pytest.raises(UserError, match=r"masks=discover has no effect: localisation"):
        evaluate(encoder, "localisation", test=sets["true_test"], masks="discover", **SETTINGS)
