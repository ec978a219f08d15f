"""Classification: heads and losses against plain sums and timm's networks, and runs from start to end."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveola.config import ConfigError, UserError, merge
from foveola.data.sources import open_source
from foveola.evaluation.classification.classify import confusions
from foveola.evaluation.evaluate import evaluate
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.shape import ViTConfig
from foveola.models.starting import StartingWeights
from foveola.models.tokens import Features
from foveola.models.vit import VisionTransformer
from foveola.schedules import Progress
from foveola.tasks.augment import Augment, AugmentConfig, rectangle
from foveola.tasks.classification import Classification, ClassificationConfig, ClassificationHead
from foveola.training import checkpoint
from foveola.training.finetune import finetune
from foveola.training.run import pretrain
from foveola.views.batch import Batch, Views, ViewsConfig
from foveola.zoo.load import load
from tests.tasks.conftest import CLASSES, SMALL, colored

MODEL = ViTConfig(width=12, depth=2, heads=2, patch_size=8, image_size=32, drop_path=0.0)
VIEWS = ViewsConfig(global_size=32, global_count=1, local_count=0)
NAMES = ("a", "b", "c")


def drawn(module: torch.nn.Module, seed: int = 0) -> Any:
    """Weights that are no longer those of a start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def features(images: int = 2, patches: int = 5, width: int = 12) -> Features:
    generator = torch.Generator().manual_seed(3)
    objects, rest = torch.randn(images, 1, width, generator=generator), torch.zeros(images, 0, width)
    return Features(objects, rest, torch.randn(images, patches, width, generator=generator), (1, patches))


def batch_of(pixels: Tensor, labels: list[int]) -> Batch:
    count = len(pixels)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, 1, 4)
    flips = torch.zeros(count, 1, dtype=torch.bool)
    views = Views(pixels=pixels[:, None], boxes=boxes, flips=flips, positions=boxes)
    return Batch(views, None, torch.tensor(labels), torch.arange(count), {})


def progress() -> Progress:
    return Progress(step=0, total_steps=10, steps_per_epoch=5, batch_size=4)


# -- heads ---------------------------------------------------------------------------------------------------


def test_the_mean_patch_goes_through_a_norm_and_a_linear_layer():
    head = drawn(ClassificationHead(ClassificationConfig(classes=NAMES), MODEL))
    seen = features()
    logits = head(seen)
    for b in range(2):
        mean = [sum(seen.patches[b, n, d].item() for n in range(5)) / 5 for d in range(12)]
        centre = sum(mean) / 12
        deviation = math.sqrt(sum((x - centre) ** 2 for x in mean) / 12 + 1e-6)
        normed = [
            (x - centre) / deviation * head.norm.weight[d].item() + head.norm.bias[d].item()
            for d, x in enumerate(mean)
        ]
        for c in range(3):
            wanted = (
                sum(head.linear.weight[c, d].item() * normed[d] for d in range(12))
                + head.linear.bias[c].item()
            )
            assert logits[b, c].item() == pytest.approx(wanted, abs=1e-5)


def test_a_query_reads_the_patches_part_by_part():
    config = ClassificationConfig(classes=NAMES, reads="attention", query_heads=3)
    head = drawn(ClassificationHead(config, MODEL)).double()
    patches = features().patches.double()
    logits = head(Features(features().objects.double(), features().registers, patches, (1, 5)))
    for b in range(2):
        pooled = []
        for part in range(3):
            own = slice(4 * part, 4 * part + 4)
            keys = [head.keys.weight[own] @ patches[b, n] for n in range(5)]
            scores = torch.stack([head.query[own] @ k for k in keys]) / 4**0.5
            weights = scores.exp() / scores.exp().sum()
            values = [head.values.weight[own] @ patches[b, n] + head.values.bias[own] for n in range(5)]
            pooled.append(sum(w * v for w, v in zip(weights, values, strict=True)))
        wanted = head.linear.weight @ torch.cat(pooled) + head.linear.bias
        torch.testing.assert_close(logits[b].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reads", ["average", "token"])
def test_logits_are_those_of_timm(reads: str):
    """Its classifiers of a class token and of a mean patch (`fc_norm`), with the same weights."""
    timm = pytest.importorskip("timm")
    pool = {"average": "avg", "token": "token"}[reads]
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    theirs = drawn(timm.models.VisionTransformer(**settings, num_classes=3, global_pool=pool)).eval()
    backbone = VisionTransformer(MODEL).eval()
    state = theirs.state_dict()
    backbone.load_state_dict({k: v for k, v in state.items() if k in backbone.state_dict()}, strict=False)
    head = ClassificationHead(ClassificationConfig(classes=NAMES, reads=reads), MODEL)
    names = {"linear.weight": "head.weight", "linear.bias": "head.bias"}
    names |= {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"} if reads == "average" else {}
    head.load_state_dict({ours: state[name] for ours, name in names.items()})
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(head.logits(backbone, images), theirs(images), rtol=0, atol=2e-5)


# -- loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_labelled_images():
    task = drawn(Classification(ClassificationConfig(classes=NAMES), MODEL, VIEWS)).eval()
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    output = task(batch_of(pixels, [2, -1, 0, 0]), progress())
    with torch.no_grad():
        logits = task.task_head.logits(task.backbone, pixels).double()
    wanted = [-(logits[i, c] - logits[i].exp().sum().log()).item() for i, c in ((0, 2), (2, 0), (3, 0))]
    assert output.losses["classification"].item() == pytest.approx(sum(wanted) / 3, rel=1e-5)
    right = sum(logits[i].argmax().item() == c for i, c in ((0, 2), (2, 0), (3, 0)))
    assert task.diagnose() == {"accuracy": pytest.approx(right / 3)}
    assert task.diagnose() == {}


def test_a_batch_without_labels_changes_nothing():
    task = drawn(Classification(ClassificationConfig(classes=NAMES), MODEL, VIEWS))
    output = task(batch_of(torch.zeros(2, 3, 32, 32), [-1, -1]), progress())
    output.losses["classification"].backward()
    assert output.losses["classification"].item() == 0
    assert all(p.grad is None or not p.grad.any() for p in task.parameters())


@pytest.mark.parametrize("final_norm", ["tokens", "pooled", "none"])
@pytest.mark.parametrize("reads", ["average", "token", "attention"])
def test_every_weight_that_learns_has_a_gradient(reads: str, final_norm: str):
    """Data-parallel training would wait for one that has none."""
    config = ClassificationConfig(classes=NAMES, reads=reads, query_heads=2)
    task = drawn(Classification(config, replace(MODEL, final_norm=final_norm), VIEWS))
    task(batch_of(torch.randn(3, 3, 32, 32), [0, 1, 2]), progress()).losses["classification"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


# -- augmentation --------------------------------------------------------------------------------------------


def test_smoothing_and_mixup_share_out_what_there_is():
    shares = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 8, 8)
    plain = Augment(AugmentConfig(smoothing=0.3), VIEWS)
    same, smooth = plain(images, shares)
    assert torch.equal(same, images)
    wanted = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(smooth, wanted)
    torch.manual_seed(0)
    mixed, parts = Augment(AugmentConfig(mixup=1.0), VIEWS)(images, shares)
    kept = parts[0, 0].item()  # the others have none of the first class, but for the one before the first
    assert 0 < kept < 1
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([2 * (1 - kept), kept, 1 + kept]))
    torch.testing.assert_close(parts[1], torch.tensor([1 - kept, 0.0, kept]))
    torch.testing.assert_close(parts[2], torch.tensor([0.0, 0.0, 1 - kept]))  # its own class is not known


def test_cutmix_gives_each_class_the_area_it_has():
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 16, 24)
    change, cut = Augment(AugmentConfig(cutmix=1.0), VIEWS), 0
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, shares = change(images, torch.eye(2))
        assert mixed[0].mean().item() == pytest.approx(shares[0, 1].item(), abs=1e-6)
        assert mixed[1].mean().item() == pytest.approx(shares[1, 1].item(), abs=1e-6)
        cut += 0 < shares[0, 1].item() < 1
    assert cut > 10


def test_rectangles_have_the_area_that_they_should_away_from_the_border():
    torch.manual_seed(0)
    sizes = [rectangle(0.75, 100, 60) for _ in range(200)]
    whole = [(kept, ends) for kept, ends in sizes if ends[1] - ends[0] == 50 and ends[3] - ends[2] == 30]
    assert whole
    assert all(kept == pytest.approx(0.75) for kept, _ in whole)
    assert all(0 <= y0 <= y1 <= 100 and 0 <= x0 <= x1 <= 60 for _, (y0, y1, x0, x1) in sizes)


def test_random_operations_are_those_of_the_step_and_of_each_view():
    pytest.importorskip("torchvision")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(6, 3, 32, 32)
    change = Augment(AugmentConfig(randaugment=2, erasing=0.5), VIEWS)
    torch.manual_seed(5)
    first = change(images, torch.ones(6, 1))[0]
    torch.manual_seed(5)
    assert torch.equal(change(images, torch.ones(6, 1))[0], first)
    assert len({view.numpy().tobytes() for view in first}) > 3
    nothing = Augment(AugmentConfig(randaugment=1, magnitude=0.0, magnitude_std=0.0), VIEWS)
    assert (nothing(images, torch.ones(6, 1))[0] - images).abs().median() < 1 / 100


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(colors: str, other_colors: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned to tell three colours."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    settings: dict[str, Any] = {
        **SMALL,
        "duration": "40 steps",
        "checkpoint_every": "20 steps",
        "log_every": 10,
    }
    finetune("classify-small", data=colors, test=other_colors, out=str(out), **settings)
    return out


def test_it_learns_and_answers(finished: Path, other_colors: str):
    source = open_source(other_colors)
    encoder = load(finished)
    images = [source[i].image for i in range(len(source))]
    answers = encoder.predict(images)
    truth = [CLASSES[source[i].label or 0] for i in range(len(source))]
    assert [answer.best for answer in answers] == truth
    assert answers[0].names == CLASSES
    assert answers[3].scores.sum().item() == pytest.approx(1)
    alone = encoder.predict(images[3])
    torch.testing.assert_close(alone.scores, answers[3].scores, rtol=0, atol=1e-5)
    result = evaluate(str(finished), "classify", test=other_colors, workers=0, progress=False)
    assert result.metrics["top1"] == 100
    assert result.metrics["top1_low"] > 75
    best = load(f"{finished}?step=best")
    assert best.head is not None


def test_numbers_are_those_of_the_answers(finished: Path, colors: str):
    """After a head that is wrong on purpose, so that not all is right."""
    encoder = load(finished)
    with torch.no_grad():
        encoder.head.linear.bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    source = open_source(colors)
    right, by_class = [], {c: [] for c in range(3)}
    for i in range(len(source)):
        sample = source[i]
        hit = encoder.predict(sample.image).best == CLASSES[sample.label or 0]
        right.append(hit)
        by_class[sample.label].append(hit)
    found = evaluate(encoder, "classify", test=colors, workers=0, progress=False, batch_size=5).metrics
    assert found["top1"] == pytest.approx(100 * np.mean(right))
    assert found["mean_class"] == pytest.approx(100 * np.mean([np.mean(hits) for hits in by_class.values()]))
    assert found["top5"] == 100


def test_an_interrupted_run_ends_as_if_it_never_was(colors: str, small: Callable, tmp_path: Path):
    augment = {"randaugment": 1, "erasing": 0.3, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
    settings = small(data=colors, method={"augment": augment})

    class Stop:
        def on_checkpoint(self, step: int, folder: Path) -> None:
            if step == 2:
                raise UserError("enough")

    whole = finetune("classify-small", out=str(tmp_path / "whole"), **settings)
    with pytest.raises(UserError, match="enough"):
        finetune("classify-small", out=str(tmp_path / "cut"), callbacks=[Stop()], **settings)
    again = finetune("classify-small", out=str(tmp_path / "cut"), **settings)
    assert again.step == whole.step == 6
    first, second = (
        checkpoint.read_checkpoint(tmp_path / n / "checkpoints" / "step-00000006") for n in ("whole", "cut")
    )
    for name, value in first["trainer"]["method"].items():
        assert torch.equal(value, second["trainer"]["method"][name]), name
    one, two = (load(tmp_path / name) for name in ("whole", "cut"))
    assert one.fingerprint() == two.fingerprint()


def test_it_starts_from_a_run_with_or_without_a_head(
    finished: Path, colors: str, small: Callable, tmp_path: Path
):
    zero = small(data=colors, duration="1 steps", optimizer={"lr": {"value": 1e-12, "end": 0.0}})
    same = finetune("classify-small", init=str(finished), out=str(tmp_path / "same"), **zero)
    begun = load(f"{same.folder}?step=0")
    assert begun.fingerprint() == load(finished).fingerprint()
    other = colored(tmp_path / "other", 4, ("left", "right", "up"))
    fresh = finetune(
        "classify-small",
        init=str(finished),
        out=str(tmp_path / "fresh"),
        **zero | {"data": f"folder:{other}"},
    )
    assert "task_head (that of the weights is for other classes)" in (fresh.folder / "log.txt").read_text()
    before, after = load(finished), load(f"{fresh.folder}?step=0")
    assert torch.equal(before.backbone.blocks[0].mlp.fc1.weight, after.backbone.blocks[0].mlp.fc1.weight)
    assert after.head.classes == ("left", "right", "up")


def test_a_pretrained_run_is_a_start_and_loses_nothing(colors: str, small: Callable, tmp_path: Path):
    mae = small(data=colors, duration="1 steps", batch_size=6)
    run = pretrain("mae-tiny-tinyimagenet", out=str(tmp_path / "mae"), **mae)
    tuned = finetune(
        "classify-small",
        init=str(run.folder),
        out=str(tmp_path / "tuned"),
        **small(data=colors, duration="1 steps"),
    )
    assert load(tuned.folder).config.pool == "average"
    assert "fresh: task_head" in (tuned.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"data": "flat"}, "names no classes"),
        ({"method": {"classes": ["red", "green", "blue"]}}, "leave it out"),
        ({"method": {"reads": "token"}, "model": {"class_token": False}}, "has no class token"),
        ({"method": {"reads": "attention", "query_heads": 5}}, "query_heads=5 does not divide the width 24"),
        ({"views": {"local_count": 2}}, "views.local_count=0"),
        ({"views": {"global_count": 2}}, "views.global_count=1"),
        ({"views": {"masking": {}}}, "views.masking=null"),
        ({"method": {"augment": {"magnitude": 3.0}}}, "magnitude"),
    ],
)
def test_mistakes_are_one_line(
    colors: str, small: Callable, tmp_path: Path, change: dict[str, Any], error: str
):
    settings = merge(small(data=colors), change)
    if settings["data"] == "flat":
        settings["data"] = f"{colors}/red"
    with pytest.raises(UserError, match=error) as caught:
        finetune("classify-small", out=str(tmp_path / "run"), **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_heads_are_asked_for_what_they_learned(finished: Path, other_colors: str, tmp_path: Path):
    encoder = load(finished)
    plain = Encoder(encoder.config, encoder.backbone)
    with pytest.raises(UserError, match="no head that answers"):
        plain.predict(np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UserError, match="this encoder has no head"):
        evaluate(plain, "classify", test=other_colors, progress=False)
    with pytest.raises(ConfigError, match="learns without annotations"):
        finetune("ibot-small", data=other_colors)
    strange = colored(tmp_path / "strange", 2, ("x", "y", "z"))
    with pytest.raises(UserError, match="the head and test share no class"):
        evaluate(encoder, "classify", test=f"folder:{strange}", workers=0, progress=False)


def test_a_damaged_head_is_one_line(finished: Path, tmp_path: Path):
    folder = load(finished).save(tmp_path / "copy")
    weights = folder / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load(folder)
    (folder / "head.json").write_text('{"name": "mae"}')
    with pytest.raises(UserError, match="no task"):
        load(folder)


def test_the_fingerprint_knows_the_head(finished: Path):
    encoder = load(finished)
    before = encoder.fingerprint()
    with torch.no_grad():
        encoder.head.linear.bias += 1
    assert encoder.fingerprint() != before


def test_objects_of_an_image_do_not_disturb_its_label():
    source = open_source("scenes:?count=12")
    assert source[0].objects is not None
    assert source.classes is not None
    encoder = Encoder(EncoderConfig(MODEL, TransformConfig(crop=32, resize=32), pool="average"))
    encoder.head = ClassificationHead(ClassificationConfig(classes=source.classes), MODEL)
    with torch.no_grad():
        encoder.head.linear.bias[3] = 4.0
    found = evaluate(encoder, "classify", test=source, workers=0, progress=False).metrics
    labels = [source[i].label for i in range(12)]
    assert found["top1"] == pytest.approx(100 * labels.count(3) / 12)


def test_a_student_has_its_head(finished: Path, other_colors: str):
    """A task has no teacher: the student of the newest checkpoint is the encoder that the run keeps."""
    student, kept = load(f"{finished}?which=student"), load(finished)
    assert student.fingerprint() == kept.fingerprint()
    assert load(f"{finished}?which=student&step=20").fingerprint() != kept.fingerprint()


def test_a_norm_of_the_mean_goes_on_in_the_head():
    """Weights fine-tuned by MAE have one, which is what the head would have to learn again."""
    model = replace(MODEL, final_norm="pooled")
    weights = drawn(VisionTransformer(model)).state_dict()
    task = Classification(ClassificationConfig(classes=NAMES), model, VIEWS)
    task.start_from(StartingWeights("weights", weights))
    assert torch.equal(task.task_head.norm.weight, weights["fc_norm.weight"])
    assert torch.equal(task.task_head.norm.bias, weights["fc_norm.bias"])


def test_classes_that_the_head_lacks_count_one_by_one(finished: Path, tmp_path: Path):
    """Three classes of four, of which the head knows one: the mean over classes is a third at most."""
    others = colored(tmp_path / "others", 2, ("cyan", "mauve", "red"), seed=2)
    found = evaluate(str(finished), "classify", test=f"folder:{others}", workers=0, progress=False)
    assert found.metrics["top1"] == pytest.approx(100 / 3)
    assert found.metrics["mean_class"] == pytest.approx(100 / 3)
    assert found.data["test"]["confusions"] == []


def test_another_right_answer_is_no_confusion():
    labels, said = torch.tensor([0, 1, 1, -1]), torch.tensor([1, 2, 2, 0])
    right = torch.tensor([True, False, False, False])  # the first has several right answers
    assert confusions(labels, said, right, NAMES) == [("b", "c", 2)]


def test_a_head_is_not_measured_on_what_it_learns_from(colors: str, small: Callable, tmp_path: Path):
    settings, often = small(data=colors, duration="1 steps"), {"test": {"every": "1 steps"}}
    with pytest.raises(UserError, match=r"18 of 18 test images are in train as well .*overlap=allow"):
        finetune("classify-small", test=colors, out=str(tmp_path / "run"), evaluations=often, **settings)
    assert not (tmp_path / "run").exists()
    meant = {"test": {"overlap": "allow", "every": "1 steps"}}
    run = finetune("classify-small", test=colors, out=str(tmp_path / "run"), evaluations=meant, **settings)
    assert run.finished
    idle = {"free": {"protocol": "label_free", "every": "1 steps", "overlap": "allow"}}
    with pytest.raises(UserError, match="label_free learns from nothing"):
        finetune("classify-small", out=str(tmp_path / "other"), evaluations=idle, **settings)
