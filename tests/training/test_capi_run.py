"""Runs of CAPI: resume, the encoder that comes out, what the log says, and mistakes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import foveola
from foveola.config import ConfigError, UserError, build, merge
from foveola.evaluation.evaluate import evaluate
from foveola.training.dryrun import dry_run
from foveola.training.recipe import RunConfig, nested
from foveola.training.run import pretrain, untrained

CAPI: dict[str, Any] = {
    "recipe": "capi",
    "data": "scenes:?size=32&count=64",
    "duration": "2 epochs",  # 8 steps
    "batch_size": 16,
    "device": "cpu",
    "model": {
        "width": 32,
        "depth": 2,
        "heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "class_token": False,
        "registers": 4,
        "norm": "rms",
        "final_norm_affine": False,
        "bias": False,
        "positions": "rope",
        "init": "xavier",
        "drop_path": 0.2,
        "drop_path_rule": "constant",
        "drop_path_subset": True,
    },
    "views": {"global_size": 32, "global_count": 1, "local_count": 0, "dropping": {"predict": 0.3}},
    "method": {"name": "capi", "clustering": {"prototypes": 32, "queue": 24}},
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 0},
    "optimizer": {
        "lr": {"value": 2e-3, "start": 0.0, "end": 0.0, "warmup": "10 %", "shape": "cosine", "truncate": 0.8},
        "lr_rule": "none",
        "weight_decay": {"value": 0.1},
        "betas": [0.9, 0.95],
        "clip": 1.0,
        "clip_each": "module",
        "freeze_last_layer": "0 steps",
        "patch_embed_lr": 0.2,
        "norm_decay": 0.1,
        "parts": {"clustering": {"lr": 0.5, "weight_decay": 0.01}},
    },
    "evaluate": {"rows": "objects", "view": "object", "workers": 0, "limit": 24, "k": [5]},
    "log_every": 1,
    "checkpoint_every": "3 steps",
    "keep": 10,
}


def capi(**changes: Any) -> RunConfig:
    return build(RunConfig, merge(CAPI, nested(changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method.targets": "teacher_head", "method.head": "mlp", "method.clustering.queue": 0},
        {"accumulate": 2, "method.predictor": None},
    ],
    ids=["queue", "teacher-head", "fused"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_one_in_a_go(same_when_interrupted, changes):
    same_when_interrupted(capi(**changes))


def test_processes_go_on_with_their_own_past(stopped_ranks, tmp_path):
    """Of one process the checkpoint would have the images of half the queue."""
    folders = str(tmp_path / "whole"), str(tmp_path / "parts")
    runs = stopped_ranks([(CAPI, folders[0], 0), (CAPI, folders[1], 5), (CAPI, folders[1], 0)])
    whole, interrupted, last = runs[0]
    assert (whole[0], interrupted[0], last[0]) == (8, 5, 8)
    assert last[2] == whole[2]


def test_the_encoder_of_a_run(tmp_path, lines):
    """It pools by the predictor, as the teacher would; k-NN with and without masks for each pooling."""
    run = pretrain(capi(evaluate_every="8 steps"), out=str(tmp_path / "run"))
    encoder = foveola.load(run.folder)
    assert encoder.config.pools == ("average", "predictor")
    images = torch.randn(2, 3, 32, 32)
    features = encoder(images)
    assert encoder.predictor is not None
    expected = encoder.predictor(encoder.backbone(images)).mean(dim=1, keepdim=True)
    assert torch.allclose(features.objects, expected, atol=1e-6)
    numbers = {}
    for pool in ("average", "predictor"):
        data = {"train": CAPI["data"], "test": CAPI["data"]}
        settings = CAPI["evaluate"] | {"pool": pool}
        found = evaluate(run.folder, "knn", **data, progress=False, **settings)
        numbers[pool] = found.metrics
        assert found.settings["pool"] == pool
        assert found.metrics.keys() >= {"top1_plain", "top1_masks"}
    assert numbers["average"] != numbers["predictor"]
    last = lines(run.folder)[-1]
    assert last["knn/top1_masks"] == pytest.approx(numbers["predictor"]["top1_masks"])
    names = {name for line in lines(run.folder) for name in line}
    assert names >= {
        "loss/prediction",
        "loss/clustering",
        "clustering/target_entropy",
        "clustering/position_information",
        "clustering/prototypes_used",
        "feature_spread",
        "effective_rank",
    }
    momenta = [line["momentum"] for line in lines(run.folder) if "momentum" in line]
    rates = [line["lr"] for line in lines(run.folder) if "lr" in line]
    assert momenta == pytest.approx([1 - rate for rate in rates])
    fresh = untrained(capi())
    assert fresh.config == dataclasses.replace(encoder.config, step=None)
    assert not torch.equal(fresh(images).objects, features.objects)


def test_small_batches_are_advised(tmp_path):
    config = capi(**{"method.clustering.queue": 0, "duration": "1 steps"})
    run = pretrain(config, out=str(tmp_path / "run"))
    told = (run.folder / "log.txt").read_text()
    assert "each position shares out 32 clusters among 16 views" in told
    assert "0.69 of 3.47 nats" in told
    assert "shares out 32 clusters" in dry_run(config)
    assert "shares out" not in dry_run(capi())


def test_bf16_and_activation_checkpoints(tmp_path):
    run = pretrain(
        capi(precision="bf16", checkpoint_activations=True, duration="3 steps"), out=str(tmp_path / "run")
    )
    assert run.metrics["loss"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views.dropping.ratio": 1.0}, r"views\.dropping\.ratio: must be < 1"),
        ({"views.dropping.ratio": 0.01}, r"views\.dropping\.ratio=0\.01: no patch is dropped of the 16"),
        ({"views.dropping": None}, r"set views\.dropping"),
        ({"model.registers": 3}, r"model: .*registers=3 is not a multiple of 4"),
        (
            {"method.predictor.width": 30, "method.predictor.heads": 4},
            "predictor: width=30 is not a multiple",
        ),
        ({"method.name": "cpai"}, "did you mean 'capi'"),
        ({"method.clustering.balance": "positions"}, "did you mean 'position'"),
        ({"views.local_count": 2, "views.local_size": 16}, r"views\.local_count=0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        capi(**changes)


def test_parts_that_do_not_train_are_refused(tmp_path):
    with pytest.raises(UserError, match="has no 'clusters', but encoder, predictor, head, clustering"):
        pretrain(capi(**{"optimizer.parts.clusters.lr": 0.5}), out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"drops no patches: views\.dropping=null"):
        build(RunConfig, {"views": {"dropping": {}}})
    with pytest.raises(ConfigError, match="needs class tokens"):
        build(RunConfig, {"model": {"class_token": False}})
    assert not list(Path(tmp_path).glob("run/checkpoints/*"))
