"""Images of 16 bits, and of other channels than RGB: by every way the features that evaluations store."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import foveola
from foveola.data.decode import decode
from foveola.data.shown import shown_image
from foveola.data.sources import open_source
from foveola.embedding.search import encode_query
from foveola.evaluation.features.table import ExtractConfig, extract
from foveola.explorer.session import Session
from foveola.explorer.sides import ExploreConfig, sides_of
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.seen import seen_by
from foveola.models.transform import evaluation_view
from foveola.models.vit import ViTConfig
from foveola.proposals import own_models

COUNT, TOP = 6, 4095  # images; the high end of their range


class Deep(NamedTuple):
    """12 bits in 16: a folder of files, their values, and an encoder of such images."""

    folder: Path
    values: list[np.ndarray]
    encoder: Encoder
    features: np.ndarray  # that an evaluation stores

    @property
    def paths(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture(scope="module", params=[1, 5])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    channels, folder = request.param, tmp_path_factory.mktemp("deep")
    values = [np.random.default_rng(i).integers(0, TOP, (24, 28, channels), np.uint16) for i in range(COUNT)]
    for i, each in enumerate(values):
        np.save(folder / f"{i}.npy", each)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ViTConfig(width=24, depth=1, heads=3, patch_size=4, image_size=16, channels=channels)
        usual = {"mean": (0.4,) * channels, "std": (0.3,) * channels, "channels": str(channels)}
        encoder = Encoder(EncoderConfig(shape, TransformConfig(20, 16, range=f"0-{TOP}", **usual)))
    table = extract(
        encoder,
        seen_by([encoder], open_source(f"folder:{folder}?channels=all")),
        masks=False,
        config=ExtractConfig(workers=0),
        progress=False,
    )
    return Deep(folder, values, encoder, table.features.numpy())


def same(found: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


def test_from_python(deep: Deep) -> None:
    encoder, values = deep.encoder, deep.values
    source = seen_by([encoder], open_source(f"folder:{deep.folder}?channels=all"))
    ways = {
        "paths": deep.paths,
        "text": [str(path) for path in deep.paths],
        "bytes": [path.read_bytes() for path in deep.paths],
        "values": values,
        "values in 32 bits": [each.astype(np.int32) for each in values],
        "values as floating point": [each.astype(np.float32) for each in values],
        "images of a source": [source[i].image for i in range(COUNT)],
        "tensors": torch.stack([encoder.transform(each) for each in values]),
    }
    if values[0].shape[2] == 1:
        ways["PIL images"] = [Image.fromarray(each[:, :, 0]) for each in values]
    for name, images in ways.items():
        assert np.abs(encoder.embed(images) - deep.features).max() < 2e-6, name
    cut = [evaluation_view(decode(source[i].image), encoder.config.transform).pixels for i in range(COUNT)]
    assert cut[0].dtype == torch.uint16  # fractions of the range: nothing is applied again
    same(encoder.embed(torch.stack(cut)), deep.features)
    same(encoder.embed(DataLoader(cut, batch_size=4)), deep.features)


def test_pixels_that_are_taken_for_values_are_warned_of(deep: Deep) -> None:
    with pytest.warns(UserWarning, match="100% of .* are beyond range=0-4095, .*: arrays hold values as"):
        deep.encoder.transform(np.full((24, 28, deep.values[0].shape[2]), 65535, np.uint16))


def test_from_files(deep: Deep, tmp_path: Path) -> None:
    """What `embed` writes, and queries of `search` against it: each image is its own nearest neighbour."""
    encoder, data = deep.encoder, f"folder:{deep.folder}"
    made = foveola.embed(encoder, data, out=tmp_path / "f.npz", workers=0, device="cpu", progress=False)
    index = foveola.Index.load(made.path, device="cpu")
    same(index.rows.feature, deep.features)
    for query in (data, deep.paths, [path.read_bytes() for path in deep.paths], deep.values):
        rows = encode_query(index, query, None, lambda: encoder)[1]
        same(rows.feature, deep.features)


def test_queries_are_read_as_the_index(deep: Deep, tmp_path: Path) -> None:
    """Its own range, measured in its data, not that of the encoder."""
    data = f"folder:{deep.folder}?channels=all&range=percentile:10-90"
    made = foveola.embed(deep.encoder, data, out=tmp_path / "f.npz", workers=0, progress=False)
    index = foveola.Index.load(made.path, device="cpu")
    assert np.abs(index.rows.feature - deep.features).max() > 1e-3
    rows = encode_query(index, deep.values, None, lambda: deep.encoder)[1]
    same(rows.feature, index.rows.feature)


def test_a_sheet_shows_what_was_found_as_the_query(deep: Deep, tmp_path: Path) -> None:
    """In the range and the colours of the data of the index, of which its data string says nothing."""
    shown = "pca" if deep.values[0].shape[2] > 1 else None
    config = deep.encoder.config
    encoder = Encoder(replace(config, transform=replace(config.transform, show=shown)), deep.encoder.backbone)
    data = f"folder:{deep.folder}"
    made = foveola.embed(encoder, data, out=tmp_path / "f.npz", workers=0, device="cpu", progress=False)
    source = seen_by([encoder], open_source(data))
    wanted = [shown_image(sample.image) for sample in source]
    assert len(np.unique(wanted[0])) > 200  # not nearly black
    for queries in (deep.paths, data):
        found = foveola.search(made.path, queries, top=1, model=encoder)
        for row, pixels in zip(found.sheet(data).rows, wanted, strict=True):
            query, hit = row.tiles
            assert np.array_equal(query, pixels)
            assert np.array_equal(hit, pixels)


def test_in_the_explorer(deep: Deep, tmp_path: Path) -> None:
    """A box that is the whole image, encoded anew, is what is stored of the image."""
    config = ExploreConfig(workers=0, map="pca")
    sides, source = sides_of(
        [deep.encoder], f"folder:{deep.folder}", {}, config, cache=tmp_path, progress=False
    )
    same(sides[0].indices["images"].rows.feature, deep.features)
    question = {"image": 2, "box": [0, 0, 1, 1], "find": "images", "masked": False, "own": True, "top": 1}
    session = Session(sides, source)
    (found,) = session.ask(question)
    assert (found["hits"][0]["image_index"], found["hits"][0]["similarity"]) == (2, 1.0)
    assert Image.open(BytesIO(session.thumbnail(2))).size == (28, 24)
    assert "image" in session.layer(0, 2, "similarity", (0.5, 0.5), 0)


def test_detectors_of_ours_get_pixels_as_predictions_do(deep: Deep, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[np.ndarray]] = []

    class Head:
        classes, config = ("a",), SimpleNamespace(name="detection", score=0.1)

        def predict(self, encoder: Encoder, images: list[np.ndarray]) -> list[Any]:
            seen.append(images)
            nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0)}
            nothing |= {"labels": torch.zeros(0, dtype=torch.int64), "masks": None}
            return [SimpleNamespace(**nothing) for _ in images]

    encoder = Encoder(deep.encoder.config, deep.encoder.backbone)
    encoder.head = Head()
    monkeypatch.setattr(encoder, "fingerprint", lambda: "")
    monkeypatch.setattr(own_models, "load", lambda model, device: encoder)
    encoder.predict(deep.paths)
    source = seen_by([encoder], open_source(f"folder:{deep.folder}?channels=all"))
    own_models.open_own("x", None, "cpu").find([decode(source[i].image) for i in range(COUNT)], 0.5)
    assert all(np.array_equal(a, b) for a, b in zip(*seen, strict=True))
