"""Runs of MAE and I-JEPA: resume, the encoder that comes out, the log and its images, dry run, mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import foveola
from foveola.config import ConfigError, build, merge
from foveola.files import FIXED_TARGETS
from foveola.reports.record import read_runs
from foveola.training import checkpoint
from foveola.training.dryrun import dry_run
from foveola.training.recipe import RunConfig, nested
from foveola.training.run import pretrain

PLAIN_COLOR = {"jitter": 0.0, "grayscale": 0.0, "blur": [0.0] * 3, "solarize": [0.0] * 3}
COMMON: dict[str, Any] = {
    "data": "scenes:?size=32&count=64",
    "duration": "2 epochs",  # 8 steps
    "batch_size": 16,
    "device": "cpu",
    "model": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "patch_size": 4,
        "image_size": 32,
        "positions": "sincos",
        "drop_path": 0.1,
    },
    "views": {"global_size": 32, "global_count": 1, "local_count": 0, "color": PLAIN_COLOR},
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 0},
    "optimizer": {
        "lr": {"value": 2e-3, "start": 0.0, "end": 0.0, "warmup": "10 %", "shape": "cosine"},
        "lr_rule": "none",
        "clip": None,
        "freeze_last_layer": "0 steps",
    },
    "evaluate": {"rows": "objects", "view": "object", "workers": 0, "limit": 24, "k": [5]},
    "log_every": 1,
    "checkpoint_every": "3 steps",
    "keep": 10,
}
SMALL = {"kind": "self", "width": 16, "depth": 1, "heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {
        "model": {"init": "xavier"},
        "views": {"dropping": {"shape": "random", "ratio": 0.75, "predict": 1.0}},
        "method": {"name": "mae", "decoder": SMALL},
    },
    "simmim": {
        "views": {"dropping": {"shape": "random", "ratio": 0.6, "predict": 1.0}},
        "method": {"name": "mae", "decoder": None, "normalise": False, "loss": "absolute"},
    },
    "ijepa": {
        "model": {"class_token": False},
        "views": {"blocks": {"min_context": 6}},
        "method": {"name": "ijepa", "predictor": SMALL, "momentum": {"value": 0.9}},
    },
    "ijepa-published": {
        "model": {"class_token": False},
        "views": {"blocks": {"min_context": 6, "published": True}},
        "method": {"name": "ijepa", "predictor": SMALL, "loss": "squared"},
    },
}


def config(name: str, **changes: Any) -> RunConfig:
    return build(RunConfig, merge(merge(COMMON | {"recipe": name}, METHODS[name]), nested(changes)))


def test_the_methods_are_what_they_are_called():
    """A reminder that overrides of `merge` reach: every tree above names a method of its own."""
    names = {name: config(name).method.name for name in METHODS}
    assert names == {"mae": "mae", "simmim": "mae", "ijepa": "ijepa", "ijepa-published": "ijepa"}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mae", {}), ("simmim", {}), ("ijepa", {}), ("ijepa-published", {"accumulate": 2})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupted_run_ends_bit_for_bit_as_one_in_a_go(same_when_interrupted, name, changes):
    folders = same_when_interrupted(config(name, **changes))
    drawn = sorted(path.name for path in (folders[0] / "figures").glob("*"))
    assert bool(drawn) == (name in ("mae", "simmim"))
    for each in drawn:  # the interrupted run has further ones, of the steps where it stopped
        ours, theirs = ((folder / "figures" / each).read_bytes() for folder in folders)
        assert ours == theirs


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_of_a_run_and_what_its_log_says(tmp_path, lines, name):
    run = pretrain(config(name, evaluate_every="8 steps"), out=str(tmp_path / "run"))
    encoder = foveola.load(run.folder)
    assert encoder.config.pool == "average"
    assert encoder.predictor is None
    images = torch.randn(2, 3, 32, 32)
    features = encoder(images)
    assert torch.allclose(features.objects, features.patches.mean(dim=1, keepdim=True), atol=1e-6)
    assert encoder(torch.randn(1, 3, 40, 24)).grid == (10, 6)  # other sizes: positions are computed
    state = torch.load(checkpoint.newest(run.folder) / "state.pt", weights_only=True)["trainer"]["method"]
    network = "teacher." if name.startswith("ijepa") else "student.backbone."
    for weight, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, state[network + weight]), weight
    told = {key for line in lines(run.folder) for key in line}
    assert told >= {"feature_spread", "effective_rank", "knn/top1_masks"}
    if name.startswith("ijepa"):
        assert told >= {"loss/prediction", "momentum", "targets/std", "targets/content_std"}
        assert told >= {"blocks/context", "blocks/target"}
    else:
        assert told >= {"loss/reconstruction"}
        assert "momentum" not in told
    assert read_runs([run.folder])[0].fixed_targets == (not name.startswith("ijepa"))
    assert (FIXED_TARGETS in (run.folder / "log.txt").read_text()) == (not name.startswith("ijepa"))
    losses = [line["loss"] for line in lines(run.folder) if "loss" in line]
    assert all(np.isfinite(losses))


def test_images_come_with_checkpoints(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pretrain(config("mae"), out=str(tmp_path / "run"))
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    images = events.Images("reconstruction")
    assert [image.step for image in images] == [3, 6, 8]
    for step in (3, 6, 8):
        sheet = np.asarray(Image.open(run.folder / "figures" / f"reconstruction-{step:08d}.png"))
        assert sheet.shape == (3 * 34, 8 * 34, 3)
        whole, kept, filled = sheet.reshape(3, 34, 8 * 34, 3).astype(float)
        grey = (np.abs(kept - kept[17, 17]) < 1).all(-1) | (np.abs(kept - 255 * 0.45) < 15).all(-1)
        assert grey.mean() > 0.6  # three quarters, less frames
        assert np.abs(filled - whole).mean() > 1  # nothing is learned yet


def test_learning_shows_in_the_loss(tmp_path, lines):
    """Sixty steps on sixteen scenes: the normalised loss, 1 without knowledge, falls well below."""
    fast = {"data": "scenes:?size=32&count=16", "duration": "60 steps", "checkpoint_every": "60 steps"}
    fast |= {"views.global_scale": [1.0, 1.0], "views.flip": 0.0, "log_every": 5}
    run = pretrain(config("mae", **fast, **{"model.drop_path": 0.0}), out=str(tmp_path / "run"))
    losses = [line["loss"] for line in lines(run.folder)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["mae", "ijepa"])
def test_bf16_and_activation_checkpoints(tmp_path, name):
    changes = {"precision": "bf16", "checkpoint_activations": True, "duration": "3 steps"}
    assert pretrain(config(name, **changes), out=str(tmp_path / "run")).metrics["loss"] > 0


def test_a_dry_run_names_parts_and_tokens():
    def rows(name: str) -> dict[str, str]:
        return dict(line.split("  ", 1) for line in dry_run(config(name)).splitlines())

    mae, simmim, ijepa = ({k: v.strip() for k, v in rows(n).items()} for n in ("mae", "simmim", "ijepa"))
    assert mae["tokens per image"] == "student 17, predicted 48"  # 16 of 64, a class token; no teacher
    assert "decoder" in mae["parameters"]
    assert "teacher" not in mae["parameters"]
    assert simmim["tokens per image"] == "student 65, predicted 38"  # mask tokens are tokens
    assert "decoder" not in simmim["parameters"]
    assert ijepa["tokens per image"].startswith("student about ")
    assert ijepa["tokens per image"].endswith("teacher 64")
    assert "predictor" in ijepa["parameters"]
    for said, loss in ((mae, "reconstruction"), (simmim, "reconstruction"), (ijepa, "prediction")):
        assert f"losses {loss} " in said["trial"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mae", {"views.dropping.ratio": 1.0}, r"views\.dropping\.ratio: must be < 1"),
        (
            "mae",
            {"views.dropping.ratio": 0.01},
            r"views\.dropping\.ratio=0\.01: no patch is dropped of the 64",
        ),
        ("mae", {"views.dropping": None}, r"method\.name=mae needs dropped patches: set views\.dropping"),
        ("mae", {"views.local_count": 2, "views.local_size": 16}, r"views\.local_count=0"),
        (
            "mae",
            {"views.objects": {}},
            r"method\.name=mae has no object tokens: views\.objects\.attention=false",
        ),
        ("mae", {"method.decoder.width": 18}, r"predictor: positions=sincos needs a width .* of 4, not 18"),
        ("mae", {"method.decodr": None}, "did you mean 'method.decoder'"),
        ("mae", {"method.loss": "squarred"}, "did you mean 'squared'"),
        ("mae", {"model.width": 30}, r"positions=sincos needs a width that is a multiple of 4, not 30"),
        ("ijepa", {"views.blocks": None}, r"method\.name=ijepa needs blocks to predict: set views\.blocks"),
        ("ijepa", {"views.blocks.min_context": 60}, r"views\.blocks\.min_context=60: of a 8 x 8 grid only"),
        ("ijepa", {"views.dropping": {}}, "dropping and blocks both choose what the student gets"),
        ("ijepa", {"views.masking": {}}, r"views\.masking=null"),
        ("ijepa", {"method.name": "ijpea"}, "did you mean 'ijepa'"),
        ("ijepa", {"views.blocks.target_scale": [0.2, 0.1]}, r"target_scale: needs low <= high"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(name, **changes)


def test_blocks_are_for_methods_that_predict_them():
    with pytest.raises(ConfigError, match=r"drops no patches: views\.dropping=null, views\.blocks=null"):
        build(RunConfig, {"views": {"blocks": {}}})


def test_a_run_of_another_sampler_is_another_run(tmp_path):
    pretrain(config("ijepa", duration="1 steps", checkpoint_every="1 steps"), out=str(tmp_path / "run"))
    other = config(
        "ijepa", duration="1 steps", checkpoint_every="1 steps", **{"views.blocks.published": True}
    )
    with pytest.raises(ConfigError, match=r"another run .*views\.blocks\.published"):
        pretrain(other, out=str(tmp_path / "run"))
    assert Path(tmp_path / "run" / "encoder" / "config.json").exists()
