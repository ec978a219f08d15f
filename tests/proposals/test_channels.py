"""Objects in images of five channels and 12 bits: by what an encoder of them sees, and by models of RGB."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import foveola
from foveola.config import UserError, merge, read_yaml
from foveola.data.instances import read_instances
from foveola.files import LoopFolder
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.proposals.discover import DiscoverConfig, discoverer
from foveola.training.dryrun import dry_run
from foveola.training.recipe import run_config
from tests.training.conftest import TINY

CHANNELS, TOP = 5, 4095
QUIET: dict[str, Any] = {"workers": 0, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with a square that the last two channels alone show."""
    made, random = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for i in range(8):
        values = random.integers(0, 600, (48, 48, CHANNELS), np.uint16)
        values[8:32, 16:40, 3:] = TOP - 100
        np.save(made / f"{i}.npy", values)
    return made


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ViTConfig(width=24, depth=1, heads=2, patch_size=8, image_size=48, channels=CHANNELS)
        usual = {"mean": (0.2,) * CHANNELS, "std": (0.3,) * CHANNELS, "channels": str(CHANNELS)}
        return Encoder(EncoderConfig(shape, TransformConfig(48, 48, range=f"0-{TOP}", **usual)))


class Seen:
    """A proposer of RGB that keeps what it was given."""

    classes, batch_size = ("object",), 3

    def __init__(self) -> None:
        self.images: list[np.ndarray] = []

    def describe(self) -> dict[str, Any]:
        return {"kind": "seen"}

    def propose(self, images: Any) -> list[foveola.Proposals]:
        self.images += images
        found = foveola.Proposals(
            np.array([[0, 0, 9, 9]], np.float32), np.ones(1, np.float32), np.zeros(1, int)
        )
        return [found] * len(images)


@pytest.mark.parametrize("refine", ["none", "grabcut"])
def test_features_are_of_what_their_encoder_sees(refine: Any, folder: Path, encoder: Encoder, tmp_path: Path):
    if refine == "grabcut":
        pytest.importorskip("cv2")
    (tmp_path / "encoder").mkdir()
    model = str(encoder.save(tmp_path / "encoder"))
    found = foveola.propose(
        "discover", f"folder:{folder}", model, out=tmp_path / "out", refine=refine, **QUIET
    )
    paths = sorted(folder.iterdir())
    finder = discoverer(encoder, DiscoverConfig(refine=refine))
    wanted = finder.propose([encoder.read(path) for path in paths])
    assert found.summary.counts == [len(each) for each in wanted]
    assert sum(found.summary.counts)
    assert all(sheet.stat().st_size > 1000 for sheet in found.sheets)
    assert len(found.sheets) == 2


def test_models_of_rgb_are_shown_three_channels(folder: Path, tmp_path: Path):
    data = f"folder:{folder}?channels=all&range=0-{TOP}"
    with pytest.raises(UserError, match=r"images of 5 channels, and .* sees RGB: show= in the data string"):
        foveola.propose(Seen(), data, out=tmp_path / "no", **QUIET)
    assert not (tmp_path / "no").exists()
    seen = Seen()
    foveola.propose(seen, f"{data}&show=5,1,2", out=tmp_path / "out", **QUIET)
    for path, image in zip(sorted(folder.iterdir()), seen.images, strict=True):
        wanted = np.load(path)[..., [4, 0, 1]] * (255 / TOP)
        assert image.dtype == np.uint8
        assert np.abs(image - wanted).max() <= 0.51  # rounded to 16 bits, then to 8


def test_grey_of_16_bits_is_rgb_to_them(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, TOP, (20, 24), np.uint16)
    (tmp_path / "data").mkdir()
    Image.fromarray(values).save(tmp_path / "data" / "a.png")
    for options in (f"range=0-{TOP}", f"range=0-{TOP}&channels=1"):
        seen = Seen()
        foveola.propose(
            seen, f"folder:{tmp_path / 'data'}?{options}", out=tmp_path / options, sheet=0, **QUIET
        )
        assert (seen.images[0].shape, seen.images[0].dtype) == ((20, 24, 3), np.uint8)
        assert np.abs(seen.images[0] - values[..., None] * (255 / TOP)).max() <= 0.51


def test_a_loop_of_rounds(folder: Path, tmp_path: Path):
    tree = {
        "data": f"folder:{folder}?channels=all&range=percentile:0-100",
        "out": str(tmp_path / "loop"),
        "rounds": 1,
        "duration": "1 steps",
        "batch_size": 4,
        "loader": {"canvas": 48, "workers": 0},
        "views": {"global_size": 48, "local_count": 0},
        "model": {"image_size": 48},
        "discover": {"tau": 0.0},
    }
    config = run_config(merge(TINY, tree))
    assert "found by maskcut" in dry_run(config)
    run = foveola.pretrain(config)
    kept = read_yaml(run.folder / "config.yaml")
    assert kept["model"]["channels"] == CHANNELS
    found = read_instances(LoopFolder(tmp_path / "loop").objects(1))
    assert len(found.files) == 8
    assert foveola.load(run.folder).embed(sorted(folder.iterdir())).shape == (8, 32)


def test_a_loop_whose_first_features_see_other_channels_ends_before_any_work(folder: Path, tmp_path: Path):
    model = ViTConfig(width=32, depth=1, heads=2, patch_size=16, image_size=48)
    encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=48, crop=48)))
    (tmp_path / "rgb").mkdir()
    tree = {
        "data": f"folder:{folder}?channels=all&range=0-{TOP}",
        "init": str(encoder.save(tmp_path / "rgb")),
        "out": str(tmp_path / "loop"),
        "rounds": 1,
    }
    with pytest.raises(UserError, match=r"images of 5 channel\(s\), but the encoder sees 3"):
        foveola.pretrain(run_config(merge(TINY, tree)))
    assert not (tmp_path / "loop").exists()
