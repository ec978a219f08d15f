"""Images of several classes: what is read, the loss, average precision against scikit-learn, a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import UserError
from foveola.data.loader import Loader, LoaderConfig
from foveola.data.sources import open_source
from foveola.evaluation.classification.several import average_precisions, mean_average_precision
from foveola.evaluation.evaluate import evaluate
from foveola.tasks.classification import Classification, ClassificationConfig
from foveola.training.finetune import finetune
from foveola.zoo.load import load
from tests.tasks.test_classification import MODEL, VIEWS, batch_of, drawn, progress

LINES = ("a.png,red", "b.png,green", "c.png,red,green", "d.png")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve images, each of a colour, of the other, of both, or of none, and the list that says so."""
    folder = tmp_path_factory.mktemp("listed")
    rng, lines = np.random.default_rng(0), []
    for i in range(12):
        line = LINES[i % 4].split(",")
        pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        pixels[..., 0] += 180 * ("red" in line)
        pixels[..., 1] += 180 * ("green" in line)
        Image.fromarray(pixels).save(folder / f"{i}{line[0]}")
        lines.append(",".join([f"{i}{line[0]}", *line[1:]]))
    (folder / "list.csv").write_text("\n".join(lines))
    return f"listed:{folder}?files={folder}/list.csv&several=true"


def test_lists_name_none_one_or_several(listed: str):
    source = open_source(listed)
    assert source.classes == ("green", "red")
    assert [source[i].labels for i in range(4)] == [(1,), (0,), (1, 0), ()]
    assert source[2].all_classes() == {0, 1}
    assert open_source(f"{listed}&limit=5")[0].labels is not None
    loader = Loader(
        source, 4, 0, LoaderConfig(workers=0, canvas=40), with_objects=False, annotations="classes"
    )
    batch = next(iter(loader))
    assert batch.classes is not None
    for row, index in zip(batch.classes.tolist(), batch.indices.tolist(), strict=True):
        assert {c for c in range(2) if row[c]} == set(source[index].labels or ())


def test_what_an_image_has_is_part_of_the_identity(listed: str, tmp_path: Path):
    source = open_source(listed)
    root = listed.removeprefix("listed:").split("?")[0]
    text = Path(root, "list.csv").read_text().replace("3d.png", "3d.png,red")
    (tmp_path / "other.csv").write_text(text)
    other = open_source(f"listed:{root}?files={tmp_path}/other.csv&several=true")
    assert source.identity().digest != other.identity().digest


def test_the_loss_is_the_mean_over_classes_and_images():
    config = ClassificationConfig(classes=("x", "y", "z"), several=True)
    task = drawn(Classification(config, MODEL, VIEWS)).eval()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    truth = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    batch = batch_of(pixels, [-1, -1, -1])
    object.__setattr__(batch, "classes", truth)
    loss = task(batch, progress()).losses["classification"].item()
    with torch.no_grad():
        chance = task.task_head.logits(task.backbone, pixels).double().sigmoid()
    each = [
        -(p.log() if t else (1 - p).log()).item()
        for p, t in zip(chance.flatten(), truth.flatten(), strict=True)
    ]
    assert loss == pytest.approx(sum(each) / 9, rel=1e-5)
    right = ((chance > 0.5) == truth).double().mean().item()
    assert task.diagnose()["accuracy"] == pytest.approx(right)


def test_average_precision_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(60, 7, generator=generator) * 3).round() / 3  # with ties
    right = torch.rand(60, 7, generator=generator) < 0.3
    found = average_precisions(scores, right)
    weights = np.random.default_rng(0).integers(0, 3, 60).astype(np.float64)
    weighted = average_precisions(scores, right, weights)
    for c in range(7):
        truth, score = right[:, c].numpy(), scores[:, c].numpy()
        assert found[c] == pytest.approx(metrics.average_precision_score(truth, score))
        wanted = metrics.average_precision_score(truth, score, sample_weight=weights)
        assert weighted[c] == pytest.approx(wanted)


def test_a_class_that_no_image_has_is_left_out():
    scores = torch.tensor([[0.9, 0.5], [0.1, 0.4], [0.8, 0.3]])
    right = torch.tensor([[True, False], [False, False], [False, False]])
    assert mean_average_precision(scores, right)[0] == 1
    right[:, 0] = torch.tensor([False, False, True])  # second of two
    assert mean_average_precision(scores, right)[0] == 0.5
    with pytest.raises(ValueError, match="no image"):
        mean_average_precision(scores, torch.zeros_like(right))


def test_a_run_learns_all_classes_of_an_image(listed: str, small: Callable, tmp_path: Path):
    settings = small(duration="60 steps", checkpoint_every="60 steps", log_every=20, method={"several": True})
    settings["evaluations"] = {"test": {"overlap": "allow"}}  # whether it can learn at all
    run = finetune("classify-small", data=listed, test=listed, out=str(tmp_path / "run"), **settings)
    found = evaluate(str(run.folder), "classify", test=listed, workers=0, progress=False)
    assert found.metrics["map"] > 95
    assert found.metrics["map_low"] <= found.metrics["map"] <= found.metrics["map_high"]
    encoder, source = load(run.folder), open_source(listed)
    scores = torch.stack([encoder.predict(source[i].image).scores for i in range(12)])
    right = torch.tensor([[c in (source[i].labels or ()) for c in range(2)] for i in range(12)])
    assert 100 * mean_average_precision(scores, right)[0] == pytest.approx(found.metrics["map"])
    assert load(f"{run.folder}?step=best").head is not None


def test_objects_are_classes_of_their_image(small: Callable, tmp_path: Path):
    scenes = "scenes:?size=32&count=12&objects=2-3"
    settings = small(duration="1 steps", method={"several": True})
    run = finetune("classify-small", data=scenes, out=str(tmp_path / "run"), **settings)
    assert load(run.folder).head.classes == open_source(scenes).classes
    found = evaluate(str(run.folder), "classify", test=scenes, workers=0, progress=False)
    assert 0 < found.metrics["map"] <= 100


def test_mistakes(listed: str, colors: str, small: Callable, tmp_path: Path):
    mixed = small(data=listed, method={"several": True, "augment": {"mixup": 0.8}})
    with pytest.raises(UserError, match="not mixed"):
        finetune("classify-small", out=str(tmp_path / "run"), **mixed)
    with pytest.raises(UserError, match="neither several classes of images nor objects"):
        finetune("classify-small", out=str(tmp_path / "run"), **small(data=colors, method={"several": True}))
    with pytest.raises(UserError, match="has no labels on its images"):
        finetune("classify-small", out=str(tmp_path / "run"), **small(data=listed))
    (tmp_path / "bad.csv").write_text("0a.png,purple")
    (tmp_path / "names.txt").write_text("red\ngreen")
    root = listed.removeprefix("listed:").split("?")[0]
    with pytest.raises(UserError, match="purple"):
        open_source(f"listed:{root}?files={tmp_path}/bad.csv&several=true&classes={tmp_path}/names.txt")
