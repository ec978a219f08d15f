"""Runs of segmentation: they go on bit for bit where they stopped."""

import pytest

from foveola.config import merge
from foveola.training.finetune import finetune
from foveola.training.recipe import nested

TINY = {
    "data": "scenes:?size=32&count=32&objects=2-3&background=class",
    "duration": "5 steps",
    "batch_size": 8,
    "device": "cpu",
    "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 32, "drop_path": 0.1},
    "views": {"global_size": 32},
    "loader": {"canvas": 32, "workers": 0},
    "log_every": 1,
    "checkpoint_every": "3 steps",
    "keep": 10,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"method.decoder.kind": "mask", "optimizer.kind": "sgd"},
        {"method.decoder.batch_norm": True, "freeze": {"encoder": "all"}, "optimizer.layer_decay": 1.0},
    ],
    ids=["mask, sgd", "frozen, batch norm"],
)
def test_an_interrupted_run_ends_bit_for_bit_as_one_in_a_go(
    tmp_path, same, newest, lines, interrupt_after, changes
):
    asked = merge(TINY, nested(changes))
    whole = finetune("segment-small", **asked, out=str(tmp_path / "whole"))
    interrupt_after(2)
    assert not finetune("segment-small", **asked, out=str(tmp_path / "parts")).finished
    interrupt_after(0)
    last = finetune("segment-small", **asked, out=str(tmp_path / "parts"))
    assert last.finished
    same(newest(whole.folder), newest(last.folder))
    assert lines(whole.folder) == lines(last.folder)
