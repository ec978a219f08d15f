"""Files of scientists from training to export: DICOM, pages, GeoTIFF, floating point, many channels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveola
from foveola.config import build, merge, read_yaml
from foveola.data import look
from foveola.embedding.index import Index
from foveola.training.recipe import RunConfig
from foveola.training.run import pretrain
from tests.training.conftest import SMALL_MAE

SIDE, COUNT = 40, 6  # pixels; images of each of two classes


def dicom_file(path: Path, values: np.ndarray) -> None:
    pytest.importorskip("pydicom")
    from tests.data.test_dicom import dicom

    path.with_suffix(".dcm").write_bytes(dicom((values[..., 0] * 4095).astype(np.uint16), stored=12))


def stack_file(path: Path, values: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    pages = np.moveaxis(values[..., :4] * 50000, 2, 0).astype(np.uint16)
    tifffile.imwrite(path.with_suffix(".tif"), pages, photometric="minisblack")


def scene_file(path: Path, values: np.ndarray) -> None:
    pytest.importorskip("rasterio")
    from tests.data.test_geotiff import scene

    bands = np.moveaxis(values[..., :5] * 3000 + 1, 2, 0).astype(np.uint16)
    bands[:, :4] = 0  # a border that holds nothing
    scene(path.with_suffix(".tif"), bands, nodata=0)


def float_file(path: Path, values: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), values[..., :1].astype(np.float32))


def channels_file(path: Path, values: np.ndarray) -> None:
    np.savez(path.with_suffix(".npz"), (values * 4095).astype(np.uint16))


KINDS: dict[str, tuple[Callable[[Path, np.ndarray], None], str, int, str | None]] = {
    "DICOM of 12 bits": (dicom_file, "channels=1", 1, "file"),
    "a stack of pages of 16 bits": (stack_file, "pages=channels&channels=all&range=0-50000", 4, "0-50000"),
    "GeoTIFF of 5 bands with nodata": (scene_file, "channels=all&range=0-3001", 5, "0-3001"),
    "floating point": (float_file, "range=0-1", 3, "0-1"),
    "8 channels of 12 bits": (channels_file, "channels=all&range=0-4095", 8, "0-4095"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_files_to_an_export(kind: str, tmp_path: Path) -> None:
    write, options, channels, values = KINDS[kind]
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(2):
            (tmp_path / split / f"c{label}").mkdir(parents=True)
            for i in range(COUNT):
                made = random.uniform(0, 0.5, (SIDE, SIDE, 8))
                made[8:30, 8:30] += 0.5 * label
                write(tmp_path / split / f"c{label}" / f"{i}", made)
    train, test = (f"folder:{tmp_path / split}?{options}" for split in ("train", "test"))
    run = foveola.pretrain("mae-tiny-tinyimagenet", data=train, out=str(tmp_path / "run"), **SMALL_MAE)
    encoder = foveola.load(run.folder)
    assert (encoder.config.model.channels, encoder.config.transform.range) == (channels, values)
    assert (
        foveola.evaluate(run.folder, "knn", train=train, test=test, k=(3,), workers=0).metrics["top1_plain"]
        > 80
    )
    plain = f"folder:{tmp_path / 'test'}"  # the rest is what the encoder knows
    made = foveola.embed(run.folder, plain, out=tmp_path / "f.npz", workers=0, progress=False)
    features = Index.load(made.path, device="cpu").rows.feature
    paths = sorted(path for path in (tmp_path / "test").rglob("*.*"))
    np.testing.assert_allclose(encoder.embed(paths), features, atol=2e-6)
    for name in ("a.safetensors", "a.pt2"):
        again = foveola.load(foveola.export(encoder, tmp_path / name))
        np.testing.assert_allclose(again.embed(paths), features, atol=2e-6)


def wide_file(path: Path, values: np.ndarray) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path.with_suffix(".tif"), (values[..., 0] * 4095).astype(np.uint16).astype(np.uint32))


def plain_file(path: Path, values: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), (values[..., 0] * 4095).astype(np.uint16))


def test_numbers_do_not_change_with_the_container(tmp_path: Path) -> None:
    """12 bits in 16, in 32, and in DICOM: the same weights, k-NN, features and exported program."""
    found = []
    for number, write in enumerate((plain_file, wide_file, dicom_file)):
        folder, random = tmp_path / f"{number}", np.random.default_rng(0)
        for label in range(2):
            (folder / f"c{label}").mkdir(parents=True)
            for i in range(COUNT):
                write(folder / f"c{label}" / f"{i}", random.uniform(0, 0.5 + 0.5 * label, (SIDE, SIDE, 1)))
        data = f"folder:{folder}?range=0-4095&channels=1"
        out = str(tmp_path / f"run{number}")
        run = foveola.pretrain("mae-tiny-tinyimagenet", data=data, out=out, **SMALL_MAE)
        knn = foveola.evaluate(run.folder, "knn", train=data, test=data, k=(3,), workers=0, exclude_self=True)
        made = foveola.embed(run.folder, data, out=tmp_path / f"{number}.npz", workers=0, progress=False)
        program = torch.export.load(foveola.export(run.folder, tmp_path / f"{number}.pt2")).module()
        images = torch.arange(32 * 32, dtype=torch.float32).view(1, 1, 32, 32) * 4
        features = Index.load(made.path, device="cpu").rows.feature
        weights = run.encoder().state_dict()
        found.append((run.metrics["loss"], knn.metrics, features, program(images)["embedding"], weights))
    for loss, metrics, features, embedding, weights in found[1:]:
        assert (loss, metrics) == found[0][:2]
        assert np.array_equal(features, found[0][2])
        assert torch.equal(embedding, found[0][3])
        assert all(torch.equal(value, found[0][4][name]) for name, value in weights.items())


def test_ranges_that_were_measured_stay(
    tiny_tree: dict[str, Any], tmp_path: Path, interrupt_after: Any, newest: Any, monkeypatch: Any
) -> None:
    """An interrupted run has the weights of one that was not, even where another range would be measured."""
    random = np.random.default_rng(0)
    for channels in (1, 5):
        folder = tmp_path / f"{channels}"
        folder.mkdir()
        for i in range(32):
            np.save(folder / f"{i}.npy", random.integers(0, 3000 + 100 * i, (32, 32, channels), np.uint16))
        more = "" if channels == 1 else "&channels=all"
        data = f"folder:{folder}?range=percentile:1-99{more}"
        config = build(
            RunConfig, merge(tiny_tree, {"data": data, "evaluate_every": None, "duration": "4 steps"})
        )
        whole = pretrain(config, out=str(tmp_path / f"whole-{channels}"))
        interrupt_after(2)
        out = str(tmp_path / f"parts-{channels}")
        pretrain(config, out=out)
        interrupt_after(0)
        with monkeypatch.context() as patch:
            other = ((0.0, 9.0),) * channels
            patch.setattr(look, "percentile_ranges", lambda source, percentiles, other=other: other)
            run = pretrain(config, out=out)
        assert run.finished
        ours, theirs = (newest(each.folder)["trainer"]["method"] for each in (run, whole))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        kept = [read_yaml(each.folder / "config.yaml")["pixels"]["range"] for each in (run, whole)]
        assert kept[0] == kept[1] == run.encoder().config.transform.range
        assert kept[0].count("-") == (1 if channels == 1 else 5)
