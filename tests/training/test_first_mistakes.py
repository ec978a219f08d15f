"""Mistakes of range and channels end a run before anything is measured, built or written."""

from pathlib import Path

import numpy as np
import pytest
import torch

import foveola
from foveola.config import UserError
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.training import pixels, run
from tests.training.conftest import SMALL_MAE


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ("", {}, r"none of 6 images looked at can be read, such as 0\.npy \(5 channels, .*channels=all"),
        ("channels=7&range=0-4095", {}, r"0\.npy \(5 channel\(s\), where channels=7 says 7\)"),
        ("channels=1,6&range=0-4095", {}, "channel 6 is asked for, of 5"),
        ("channels=all&range=0-4095,0-1", {}, r"2 ranges of values, where it has 5 channel\(s\)"),
        ("channels=all&range=4095-0", {}, "needs a range such as 0-4095"),
        ("channels=all&range=0-4095", {"model.channels": 4}, "model.channels=4: images of .* have 5"),
        ("channels=all&range=0-4095", {"init_channels": "mean"}, "init_channels has no effect: there are no"),
        ("channels=all&range=0-4095", {"init": "I", "init_channels": "9,1,2"}, "want as many of the 5"),
        (
            "channels=1,2,3&range=0-4095",
            {"init": "I", "init_channels": "repeat"},
            "repeat has no effect",
        ),
        ("channels=all", {"views.color.normalise": "given"}, r"views.color.mean has 3 value\(s\)"),
    ],
)
def test_they_come_first(options: str, more: dict, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for i in range(6):
        np.save(f"data/{i}.npy", np.random.default_rng(i).integers(0, 4096, (32, 32, 5), np.uint16))
    shape = ViTConfig(width=24, depth=1, heads=2, patch_size=8, image_size=32)
    Encoder(EncoderConfig(shape, TransformConfig(32, 32))).save(Path("I"))
    monkeypatch.setattr(pixels, "channel_statistics", None)
    for name in ("plan", "assemble", "Evaluations"):
        monkeypatch.setattr(run, name, None)
    settings = SMALL_MAE | more
    if "init" in more:
        del settings["model"]
    with torch.random.fork_rng(), pytest.raises(UserError, match=message):
        foveola.pretrain("mae-tiny-tinyimagenet", data=f"folder:data?{options}", out="out", **settings)
    assert not Path("out").exists()
