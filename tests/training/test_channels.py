"""Images of 8 channels and 12 bits, from files to numbers: what is kept of them, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveola
from foveola.config import UserError, read_yaml

TINY: dict[str, Any] = {
    "views": {"global_size": 32, "local_count": 0},
    "model": {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32},
    "loader": {"canvas": 40, "workers": 0},
    "batch_size": 8,
    "duration": "2 steps",
    "evaluate_every": None,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise; the square of an image is bright in the channel of its class."""
    folder, random = tmp_path_factory.mktemp("channels"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for label in range(2):
            (folder / split / f"c{label}").mkdir(parents=True)
            for i in range(count):
                values = random.integers(0, 3000, (40, 40, 8), np.uint16)
                values[10:30, 10:30, label] = 4000
                np.save(folder / split / f"c{label}" / f"{i}.npy", values)
    return folder


def string(folder: Path, more: str = "range=0-4095&channels=all") -> str:
    return f"folder:{folder}?{more}"


@pytest.mark.parametrize("recipe", ["dino-tiny-tinyimagenet", "mae-tiny-tinyimagenet"])
def test_from_files_to_a_number(recipe: str, data: Path, tmp_path: Path) -> None:
    run = foveola.pretrain(recipe, data=string(data / "train"), out=str(tmp_path / "run"), **TINY)
    encoder = foveola.load(run.folder)
    config = read_yaml(run.folder / "config.yaml")
    assert "values of channels (0.5 %, 50 %, 99.5 %): 1: " in (run.folder / "log.txt").read_text()
    assert (encoder.config.model.channels, config["model"]["channels"]) == (8, 8)
    every = np.concatenate([np.load(p).reshape(-1, 8) for p in sorted((data / "train").rglob("*.npy"))])
    np.testing.assert_allclose(config["views"]["color"]["mean"], (every / 4095).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(encoder.config.transform.std, (every / 4095).std(axis=0), rtol=1e-3)
    seen = [encoder.transform(data / "test" / "c1" / f"{i}.npy").mean(dim=(1, 2)) for i in range(6)]
    assert all(each[1] > each[0] for each in seen)  # the channel of its class is bright
    found = foveola.evaluate(
        run.folder, "knn", train=string(data / "train"), test=string(data / "test"), k=(3,), workers=0
    )
    assert found.metrics["top1_plain"] >= 80


def test_containers_change_nothing(data: Path, tmp_path: Path) -> None:
    """The same 12 bits in 16, in 32, and as floating point: the same weights after two steps."""
    weights: list[Any] = []
    for dtype in ("uint16", "int32", "float32"):
        folder = tmp_path / dtype
        for path in sorted((data / "train").rglob("*.npy")):
            (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
            np.save(folder / path.parent.name / path.name, np.load(path).astype(dtype))
        out = tmp_path / f"run-{dtype}"
        run = foveola.pretrain("dino-tiny-tinyimagenet", data=string(folder), out=str(out), **TINY)
        weights.append(foveola.load(run.folder).state_dict())
    for other in weights[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in weights[0].items())


def test_what_does_not_fit_is_refused_in_a_line(data: Path, tmp_path: Path) -> None:
    train = string(data / "train")
    for count in (3, 5):  # 3 is the usual number, but not where somebody wrote it
        tree: dict[str, Any] = TINY | {"model": {**TINY["model"], "channels": count}}
        with pytest.raises(UserError, match=rf"model\.channels={count}: images of .* have 8"):
            foveola.pretrain("dino-tiny-tinyimagenet", data=train, out=str(tmp_path / "a"), **tree)
    with pytest.raises(UserError, match="channels"):
        foveola.pretrain("dino-tiny-tinyimagenet", data=f"folder:{data}/train", out=str(tmp_path), **TINY)
    run = foveola.pretrain("dino-tiny-tinyimagenet", data=train, out=str(tmp_path / "run"), **TINY)
    encoder = foveola.load(run.folder)
    with pytest.raises(UserError, match=r"3 channel\(s\).*sees 8|channel"):
        encoder.transform(np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UserError, match="channel"):
        foveola.evaluate(
            run.folder, "knn", train="scenes:?size=40&count=8", test="scenes:?size=40&count=8&seed=1"
        )
