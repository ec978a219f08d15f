"""`foveola.embed`: what is in the file is what evaluations read, and no kill changes it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import foveola
from foveola import cli
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.embedding.formats import read_features
from foveola.evaluation.classification.linear import joined_features
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.need import FeedConfig, need
from foveola.evaluation.features.table import ExtractConfig, extract
from foveola.evaluation.images import choose_images
from foveola.zoo.load import load

QUIET = {"workers": 0, "batch_size": 8, "progress": False}


@pytest.fixture
def write(photos, model, tmp_path: Path):
    """write(name, **settings): the rows and the header of a file that was written just now."""

    def made(name: str = "f.npz", **settings):
        foveola.embed(model, photos, out=tmp_path / name, **QUIET | settings)
        return read_features(tmp_path / name)

    return made


# -- what is in it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [False, True])
def test_features_of_objects_are_those_of_k_nn_bit_for_bit(write, photos, model, masks: bool) -> None:
    rows, about = write(rows="objects", masks=masks)
    source = open_source(photos, "test")
    config = ExtractConfig(rows="objects", workers=0, batch_size=8)
    table = extract(load(model), source, masks=masks, config=config, progress=False)
    assert np.array_equal(rows.feature, table.features.numpy())
    assert rows.image_index.tolist() == table.image_indices.tolist()
    assert rows.object.tolist() == table.objects.tolist()
    assert rows.label.tolist() == [source.classes[i] for i in table.labels.tolist()]
    assert set(rows.label) == {"eye", "ear"}
    assert rows.masked.tolist() == (table.has_mask & masks).tolist()
    expected = table.readable.numpy() if masks else np.ones(len(rows.name))
    np.testing.assert_allclose(rows.readable, expected)
    boxes = [source[i].objects.boxes[j] for i, j in zip(rows.image_index, rows.object, strict=True)]
    assert np.array_equal(rows.box, np.array(boxes))
    assert rows.name.tolist() == [source[i].name for i in rows.image_index]
    assert set(rows.width) == {48}
    assert set(rows.height) == {40}
    assert about["encoder"]["fingerprint"] == load(model).fingerprint()


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": "images"},
        {"rows": "images", "min_coverage": 0.6},
        {"rows": "objects", "view": "object", "context": 1.5, "mask_canvas": 300},
    ],
)
def test_every_setting_of_masks_and_views_is_that_of_k_nn(write, photos, model, settings) -> None:
    rows, _ = write(masks=True, **settings)
    config = ExtractConfig(workers=0, batch_size=8, **settings)
    table = extract(load(model), open_source(photos, "test"), masks=True, config=config, progress=False)
    assert np.array_equal(rows.feature, table.features.numpy())
    assert rows.masked.tolist() == table.has_mask.tolist()
    np.testing.assert_allclose(rows.readable, table.readable.numpy())
    assert (rows.readable < 1).any()


def test_a_limit_and_a_size_are_kept_to(write, photos, model) -> None:
    rows, about = write(limit=6, seed=3, image_size=24)
    assert rows.image_index.tolist() == choose_images(20, 6, 3).tolist()
    assert about["data"]["images"] == 6
    small, folder = load(model).sized(24, "image_size"), Path(photos.partition(":")[2].partition("?")[0])
    expected = small.embed([folder / name for name in rows.name])
    np.testing.assert_allclose(rows.feature, expected, atol=1e-5)


def test_features_of_images_are_those_of_probes_bit_for_bit(write, photos, model) -> None:
    rows, about = write(features="token2+average")
    with Feed(load(model), progress=False) as feed:
        store = feed.open(
            open_source(photos, "test"),
            FeedConfig(workers=0, batch_size=8),
            need("token", "average", "patches", layers=2),
        )
        kinds = {"token": store.take("token", layers=2), "average": store.take("average")}
        assert np.array_equal(rows.feature, joined_features(kinds, "token2+average").numpy())
        patches, of_patches = write("p.npz", rows="patches")
        assert np.array_equal(patches.feature.reshape(20, 16, 24), store.take("patches").numpy())
    assert about["shape"] == [72]
    assert of_patches["shape"] == [4, 4, 24]
    assert set(rows.label) == {"cats", "dogs"}
    # The centre 32 of 43 x 36 pixels: an offset of 5.5 is rounded to 6, as torchvision does.
    np.testing.assert_allclose(patches.box[0], [6 / 43, 2 / 36, 38 / 43, 34 / 36], atol=1e-6)


def test_averages_of_objects_are_means_over_their_patches(write, photos, model) -> None:
    """By hand: patches whose share under the object's box is more than nothing."""
    rows, _ = write(rows="objects", features="token+average")
    token, _ = write("t.npz", rows="objects")
    patches, _ = write("p.npz", rows="patches")
    np.testing.assert_allclose(rows.feature[:, :24], token.feature, atol=1e-5)
    compared = 0
    for r in range(len(rows.name)):
        grid, seen = patches.feature[rows.image_index[r]], patches.box[rows.image_index[r]]
        x0, x1 = (rows.box[r, [0, 2]] - seen[0]) / (seen[2] - seen[0]) * 4
        y0, y1 = (rows.box[r, [1, 3]] - seen[1]) / (seen[3] - seen[1]) * 4
        wide = [max(0.0, min(x1, x + 1) - max(x0, x)) for x in range(4)]
        high = [max(0.0, min(y1, y + 1) - max(y0, y)) for y in range(4)]
        shares = np.outer(high, wide)
        if ((shares > 0) & (np.abs(shares * 64 - 0.5) < 0.4)).any():  # a pixel more or less of the canvas
            continue
        cells = grid[shares * 64 > 0.5]
        np.testing.assert_allclose(rows.feature[r, 24:], np.mean(cells, axis=0), atol=1e-5)
        assert rows.readable[r] == pytest.approx(len(cells) / 16)
        compared += 1
    assert compared > 20


def test_other_batches_change_no_more_than_rounding(write) -> None:
    first, second = write("a.npz")[0], write("b.npz", batch_size=3, workers=1)[0]
    np.testing.assert_allclose(first.feature, second.feature, atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


# -- read by others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["float32", "float16"])
def test_every_format_reads_back_by_its_own_library(photos, model, tmp_path, store: str) -> None:
    datasets, zarr = pytest.importorskip("datasets"), pytest.importorskip("zarr")
    for end in ("npz", "parquet", "zarr"):
        foveola.embed(model, photos, out=tmp_path / f"f.{end}", rows="objects", store=store, **QUIET)
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        plain = {name: arrays[name] for name in arrays.files}
    assert plain["feature"].dtype == store
    about = json.loads(str(plain.pop("foveola")))

    frame = pd.read_parquet(tmp_path / "f.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "f.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    ).with_format("numpy")
    group = zarr.open_group(tmp_path / "f.zarr", mode="r")
    assert group.attrs["foveola"] == about
    assert list(frame.columns) == list(plain) == list(loaded.column_names)
    for name, values in plain.items():
        of_frame = np.stack(frame[name]) if name == "feature" else frame[name].fillna("").to_numpy()
        assert np.array_equal(of_frame, values), name
        assert np.array_equal(np.array(loaded[:][name]), values), name
        assert np.array_equal(group[name][:], values), name
    for end in ("npz", "parquet", "zarr"):
        rows, own = read_features(tmp_path / f"f.{end}")
        assert own == about
        assert rows.feature.dtype == store
        assert np.array_equal(rows.feature, plain["feature"])
        assert np.array_equal(rows.box[:, 2], plain["x1"])


# -- kills, ranks --------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from foveola.embedding import embed as own, parts
(model, data, out), settings = sys.argv[1:], dict(rows="objects", workers=0, progress=False)
own.PART_IMAGES = 8
number = {"write": 0}

def killed(where, after):
    if os.fork():
        _, code = os.wait()
        assert os.waitstatus_to_exitcode(code) == -signal.SIGKILL, code
        assert not os.path.exists(out)
        return
    savez = parts.np.savez
    def half(file, **arrays):
        number["write"] += 1
        if number["write"] == after:
            file.write(b"PK half of it")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        savez(file, **arrays)
    def never(*arguments, **named):
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "part":
        parts.np.savez = half
    else:
        import pyarrow.parquet
        pyarrow.parquet.ParquetWriter.write_table = never
    own.embed(model, data, out=out, **settings)
    os._exit(0)

killed("part", 2)
killed("part", 2)
killed("file", 0)
print(own.embed(model, data, out=out, **settings).computed)
"""


def test_a_killed_one_goes_on_and_has_the_same_bytes(photos, model, tmp_path, run_ranks, monkeypatch) -> None:
    """Killed in the middle of the second part, of the third, and of the file itself."""
    out = tmp_path / "killed.parquet"
    (printed,) = run_ranks(KILLED, ranks=1, words=[str(model), photos, str(out)])
    assert printed.split() == ["0"]  # the three parts were there
    monkeypatch.setattr("foveola.embedding.embed.PART_IMAGES", 8)
    foveola.embed(model, photos, out=tmp_path / "whole.parquet", rows="objects", workers=0, progress=False)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.par*")) == ["killed.parquet", "whole.parquet"]


RANKS = """
import sys
from foveola import cli
from foveola.embedding import embed as own
own.PART_IMAGES = 8
sys.exit(cli.main(["embed", *sys.argv[1:]]))
"""


def test_two_ranks_write_the_bytes_of_one(photos, model, tmp_path, run_ranks, monkeypatch) -> None:
    settings = ["workers=0", "device=cpu", "store=float16"]
    words = [f"model={model}", f"data={photos}", f"out={tmp_path / 'two.npz'}", *settings]
    first, second = run_ranks(RANKS, ranks=2, words=words)
    assert "20 images encoded" in first
    assert second == ""
    monkeypatch.setattr("foveola.embedding.embed.PART_IMAGES", 8)
    foveola.embed(model, photos, out=tmp_path / "one.npz", workers=0, store="float16", progress=False)
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_done_is_done_and_other_work_is_refused(photos, model, tmp_path, monkeypatch) -> None:
    out = tmp_path / "f.npz"
    assert foveola.embed(model, photos, out=out, **QUIET).computed == 20
    before = out.stat().st_mtime_ns
    assert foveola.embed(model, photos, out=out, **QUIET | {"batch_size": 4}).computed == 0
    assert out.stat().st_mtime_ns == before
    for settings, what in (({"features": "average"}, "features="), ({"store": "float16"}, "store=")):
        with pytest.raises(UserError, match=rf"npz is there, and of other work \(another {what}\): remove"):
            foveola.embed(model, photos, out=out, **QUIET | settings)
    with pytest.raises(UserError, match=r"of other work \(another encoder\)"):
        foveola.embed("pixels:?size=32&patch=8", photos, out=out, features="average", **QUIET)

    def broken(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveola.embedding.parts.np.savez", broken)
    with pytest.raises(UserError, match=r"g\.npz cannot be written: .*No space left"):
        foveola.embed(model, photos, out=tmp_path / "g.npz", **QUIET)
    with pytest.raises(UserError, match=r"g\.npz\.parts has parts of other work \(another rows=\)"):
        foveola.embed(model, photos, out=tmp_path / "g.npz", rows="patches", **QUIET)
    assert not (tmp_path / "g.npz").exists()


def test_what_a_kill_or_a_disk_leaves_of_the_parts(photos, model, tmp_path, monkeypatch) -> None:
    """A folder without its `work.json` is begun anew; a part that is cut short is named."""
    out, folder = tmp_path / "f.npz", tmp_path / "f.npz.parts"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("foveola.embedding.embed._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            foveola.embed(model, photos, out=out, **QUIET)
    part = folder / "part-000000.npz"
    whole = part.read_bytes()
    for damaged in (whole[:700], whole[:100] + bytes(50) + whole[150:], b""):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match=r"part-000000\.npz is damaged .*: remove it, and give the same"):
            foveola.embed(model, photos, out=out, **QUIET)
    part.unlink()
    assert foveola.embed(model, photos, out=out, **QUIET).computed == 20


# -- trouble -------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_and_have_no_row(model, tmp_path, capsys) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((40, 40, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no image")
    out = tmp_path / "f.npz"
    words = [f"model={model}", f"data=folder:{folder}", f"out={out}", "workers=0", "device=cpu"]
    assert cli.main(["embed", *words]) == 0
    said = capsys.readouterr().out
    assert "3 images, features=token [24], float32" in said
    assert "1 of 4 images cannot be read and have no row: 1.png (" in said
    rows, about = read_features(out)
    assert rows.name.tolist() == ["0.png", "2.png", "3.png"]
    assert rows.label.tolist() == ["", "", ""]
    assert about["data"]["unreadable"] == 1
    for i in (0, 2, 3):
        (folder / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image that can be read"):
        foveola.embed(model, f"folder:{folder}", out=tmp_path / "none.npz", **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "f.csv"}, "f.csv: expected a name that ends in .parquet, .npz, .zarr"),
        ({"out": "f.parqet"}, "did you mean .parquet?"),
        ({"rows": "patchs"}, "rows: expected one of images, objects, patches"),
        ({"rows": "patches", "features": "token"}, "rows=patches are patches: leave out features=token"),
        ({"features": "tokens"}, "unknown features 'tokens'"),
        ({"features": "token9"}, "features of the last 9 blocks: this encoder has 3"),
        ({"features": "predictor"}, "features=predictor: this encoder has token, average"),
        ({"rows": "objects", "features": "centre"}, "features=centre of the patches of an object: valid are"),
        ({"view": "object"}, "view=object needs rows=objects"),
        ({"context": 0.2}, "context has no effect: it is for view=object"),
        ({"seed": 3}, "seed has no effect: it draws the images that limit= leaves"),
        ({"min_coverage": 0.5}, "min_coverage has no effect: no mask is read"),
        ({"image_size": 33}, "image_size=33 is not a multiple of the patch size 8"),
        ({"data": "scenes:?count=2", "limit": 0}, "limit: must be >= 1"),
    ],
)
def test_mistakes_are_said_before_anything_is_made(photos, model, tmp_path, settings, message) -> None:
    given = {"model": model, "data": photos, "out": "f.npz"} | QUIET | settings
    given["out"] = tmp_path / given["out"]
    with pytest.raises(UserError) as error:
        foveola.embed(given.pop("model"), given.pop("data"), **given)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_data_without_objects(model, photos, tmp_path) -> None:
    plain = photos.partition("?")[0]
    for settings in ({"rows": "objects"}, {"masks": True}):
        with pytest.raises(UserError, match="has neither boxes nor masks"):
            foveola.embed(model, plain, out=tmp_path / "f.npz", **QUIET | settings)


def test_damaged_and_foreign_files(tmp_path) -> None:
    np.savez(tmp_path / "foreign.npz", feature=np.zeros((3, 2)))
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    pd.DataFrame({"feature": [[1.0]]}).to_parquet(tmp_path / "foreign.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    (tmp_path / "damaged.zarr").mkdir()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f"{path.name} is no file of foveola embed"):
            read_features(path)
    with pytest.raises(UserError, match="no file of features"):
        read_features(tmp_path / "none.npz")


def test_a_missing_library_names_its_extra(monkeypatch, model, photos, tmp_path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(UserError, match=r"\.zarr needs zarr .*; pip install 'foveola\[embed\]'"):
        foveola.embed(model, photos, out=tmp_path / "f.zarr", **QUIET)


def test_the_encoder_is_left_as_it_was(model, photos, tmp_path) -> None:
    encoder = load(model, trainable=True)
    foveola.embed(encoder, photos, out=tmp_path / "f.npz", rows="objects", features="token2", **QUIET)
    assert encoder.training
    assert torch.is_grad_enabled()


# -- the same in Python --------------------------------------------------------------------------------------


def test_an_encoder_embeds_what_the_file_has_in_every_form(write, photos, model) -> None:
    rows, _ = write()
    encoder, folder = load(model), Path(photos.partition(":")[2].partition("?")[0])
    paths = [folder / name for name in rows.name]
    found = encoder.embed(paths, batch_size=8)
    assert np.array_equal(found, encoder.embed([str(path) for path in paths], batch_size=8))
    np.testing.assert_allclose(found, rows.feature, atol=1e-5)
    assert found.dtype == np.float32
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths[:3]]
    normalised = torch.stack([encoder.transform(array) for array in arrays])
    levels = torch.stack([open_view(array, encoder) for array in arrays])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(levels, torch.arange(3)), batch_size=2
    )
    for images in (arrays, np.stack(arrays), normalised, levels, list(levels), loader, iter([normalised])):
        np.testing.assert_allclose(encoder.embed(images), found[:3], atol=1e-5)
    np.testing.assert_allclose(encoder.embed(arrays[1]), found[1:2], atol=1e-5)
    np.testing.assert_allclose(encoder.embed(paths[1]), found[1:2], atol=1e-5)
    average = encoder.pooled("average").embed(normalised)
    np.testing.assert_allclose(average, encoder(normalised).patches.mean(dim=1), atol=1e-5)


def open_view(image: np.ndarray, encoder) -> torch.Tensor:
    from foveola.models.transform import evaluation_view

    return evaluation_view(image, encoder.config.transform).pixels


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: expected at least one"),
        (torch.zeros(2, 3, 33, 32), r"in whole patches of 8 pixels, got \[2, 3, 33, 32\]"),
        (torch.zeros(2, 1, 32, 32), r"expected \[n, 3, H, W\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "expected uint8 pixels or normalised floats"),
        ("nowhere.png", "nowhere.png"),
        (iter(["a.png"]), "expected batches of tensors, got"),
        ([torch.zeros(3, 32, 32), torch.zeros(3, 32, 40)], r"of one size are encoded together, got .*32, 40"),
        (3, "int"),
    ],
)
def test_what_an_encoder_cannot_embed(model, images, message) -> None:
    with pytest.raises(UserError, match=message):
        load(model).embed(images)
    with pytest.raises(UserError, match="batch_size=0: expected at least 1"):
        load(model).embed(images, batch_size=0)
