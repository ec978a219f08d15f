"""The feature pass: what it stores, what it skips, and what a kill costs."""

import dataclasses
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import UserError
from foveola.data.sample import Objects, Sample
from foveola.data.sources import decode, open_source
from foveola.evaluation.features import store as stored
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.encoding import CropsCut, FeatureReader, lowest_entropy, random_crop, weigh
from foveola.evaluation.features.need import FeedConfig, need
from foveola.evaluation.features.table import ExtractConfig, extract_tables
from foveola.evaluation.images import Images, choose_images
from foveola.models.predictor import PredictorConfig

CONFIG = FeedConfig(batch_size=5, workers=0, seed=3)
READING = ExtractConfig(batch_size=5, workers=0, seed=3)
CHANGES = {"limit": 7, "precision": "bf16", "store": "float16", "mask_canvas": 77, "min_coverage": 0.5}


@pytest.fixture
def images(list_source, make_sample):
    boxes = [[(20, 14, 56, 46)], None, [(0, 0, 10, 10), (60, 40, 70, 50)]]
    return list_source([make_sample(i, boxes[i % 3], label=i % 4) for i in range(13)], name="noise:")


def test_the_same_rows_as_without_a_store(encoder, images, tmp_path: Path) -> None:
    """Tokens with and without masks equal those of `extract_tables`, which the k-NN tests check."""
    tables, facts = extract_tables(encoder, images, (False, True), READING, progress=False)
    with Feed(encoder, tmp_path, progress=False) as feed:
        store = feed.open(images, CONFIG, need("token", "masked", "average", "patches", layers=2))
        for masked, table in zip((False, True), tables, strict=True):
            mine = store.table("masked" if masked else "token")
            for field in dataclasses.fields(table):
                torch.testing.assert_close(
                    getattr(mine, field.name), getattr(table, field.name), rtol=1e-4, atol=1e-5
                )
        assert {name: store.facts[name] for name in facts} == facts
        torch.testing.assert_close(store.take("patches").mean(dim=1), store.take("average"))
        assert store.take("token", layers=2).shape == (13, 2, 32)
        assert torch.equal(store.take("token", torch.tensor([4, 1]))[:, 0], store.take("token")[[4, 1], 0])


def test_some_images_are_the_same_as_among_all(encoder, images, tmp_path: Path) -> None:
    with Feed(encoder, tmp_path, progress=False) as feed:
        every = feed.open(images, CONFIG, need("token"))
        some = feed.open(images, dataclasses.replace(CONFIG, limit=7), need("token"))
    assert len(some) == 7
    assert some.image_indices.tolist() == choose_images(13, 7, CONFIG.seed).tolist() != list(range(7))
    torch.testing.assert_close(
        some.take("token"), every.take("token")[some.image_indices], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(some.column("labels"), every.column("labels")[some.image_indices])


def test_files_written_anew_are_read_again(encoder, tmp_path: Path) -> None:
    """Names say nothing about pixels: neither after an edit, nor in another folder of the same names."""
    for folder, levels in (("a", 256), ("b", 100)):
        (tmp_path / folder).mkdir()
        for i in range(3):
            noise = np.random.default_rng(i).integers(0, levels, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / folder / f"{i}.png")

    def tokens(folder: str) -> torch.Tensor:
        source = open_source(f"folder:{tmp_path / folder}")
        with Feed(encoder, tmp_path / "cache", progress=False) as feed:
            return feed.open(source, CONFIG, need("token")).take("token")[:, -1]

    first = tokens("a")
    assert torch.equal(first, tokens("a"))
    other = tokens("b")
    assert (first - other).abs().max() > 1e-3
    (tmp_path / "b" / "1.png").replace(tmp_path / "a" / "1.png")
    torch.testing.assert_close(tokens("a"), torch.stack([first[0], other[1], first[2]]))


def test_a_file_of_the_same_size_written_anew_is_read_again(encoder, tmp_path: Path) -> None:
    """An edit that keeps name, size and even the time is seen: contents are what counts."""
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "0.bmp"

    def token(level: int) -> torch.Tensor:
        image = np.full((24, 24, 3), 40, dtype=np.uint8)
        image[:12] = level
        Image.fromarray(image).save(path)  # without compression: as many bytes for any content
        os.utime(path, ns=(10**18, 10**18))
        with Feed(encoder, tmp_path / "cache", progress=False) as feed:
            return feed.open(open_source(f"folder:{tmp_path / 'a'}"), CONFIG, need("token")).take("token")

    first = token(200)
    size = path.stat().st_size
    second = token(90)
    assert path.stat().st_size == size
    assert (first - second).abs().max() > 1e-3


def test_a_second_pass_computes_nothing_and_a_new_kind_only_itself(
    encoder, images, tmp_path: Path, monkeypatch
) -> None:
    with Feed(encoder, tmp_path, progress=False) as feed:
        first = feed.open(images, CONFIG, need("token"))
        before = first.take("token")
    assert first.facts["computed"] == 13
    asked = []
    plain = FeatureReader.__call__
    monkeypatch.setattr(
        FeatureReader, "__call__", lambda s, i, m, n: asked.append(n.features) or plain(s, i, m, n)
    )
    with Feed(encoder, tmp_path, progress=False) as feed:
        again = feed.open(images, CONFIG, need("token"))
        assert not asked
        assert again.facts["computed"] == 0
        assert torch.equal(again.take("token"), before)
        both = feed.open(images, CONFIG, need("average"))
        assert len(asked) == 3
        assert both.facts["computed"] == 13
        assert torch.equal(both.take("token"), before)


def test_masks_are_drawn_for_those_who_read_them(encoder, images, tmp_path: Path, monkeypatch) -> None:
    """And a later pass without them leaves what an earlier one said about them."""
    drawn, plain = [], Objects.draw
    monkeypatch.setattr(Objects, "draw", lambda *a: drawn.append(1) or plain(*a))
    with Feed(encoder, tmp_path, progress=False) as feed:
        bare = feed.open(images, CONFIG, need("token"))
        assert not drawn
        assert "rows_with_mask" not in bare.facts
        table = bare.table("token")
        assert not table.has_mask.any()
        assert (table.readable == 1).all()
        masked = feed.open(images, CONFIG, need("masked"))
        assert len(drawn) == 13
        assert masked.facts["rows_with_mask"] == 9 == int(masked.table("masked").has_mask.sum())
    with Feed(encoder, tmp_path, progress=False) as feed:
        feed.open(images, CONFIG, need("average"))
        assert feed.open(images, CONFIG, need("masked")).facts["rows_with_mask"] == 9
    assert len(drawn) == 13


@pytest.mark.parametrize(
    "change",
    ["encoder", "data", "limit", "precision", "store", "views", "mask_canvas", "min_coverage", "transform"],
)
def test_nothing_stale_is_read(encoder, images, tmp_path: Path, change) -> None:
    """Every part of the key makes a folder of its own."""
    with Feed(encoder, tmp_path, progress=False) as feed:
        first = feed.open(images, CONFIG, need("token"))
    config, views = CONFIG, 0
    if change == "encoder":
        encoder.backbone.blocks[0].attn.qkv.weight.mul_(1.01)
    elif change == "transform":
        transform = dataclasses.replace(encoder.config.transform, resize=36)
        encoder.config = dataclasses.replace(encoder.config, transform=transform)
    elif change == "data":
        images.samples.append(images.samples[0])
    elif change == "views":
        views = 1
    else:
        value = {"limit": 7, "precision": "bf16", "store": "float16", "mask_canvas": 77, "min_coverage": 0.5}[
            change
        ]
        config = dataclasses.replace(config, **{change: value})
    with Feed(encoder, tmp_path, progress=False) as feed:
        second = feed.open(images, config, need("token"), views)
    assert second.folder != first.folder
    assert second.facts["computed"] == len(second.chosen)


def test_a_killed_pass_goes_on(encoder, images, tmp_path: Path, monkeypatch) -> None:
    """Killed in the second batch: only that one is read again, and the result is the same."""
    with Feed(encoder, None, progress=False) as feed:
        whole = feed.open(images, CONFIG, need("token", "patches")).take("patches")
    monkeypatch.setattr(stored, "FLUSH_SECONDS", -1.0)
    plain, calls = FeatureReader.__call__, []

    def dies(self, images, masks, wanted):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, images, masks, wanted)

    monkeypatch.setattr(FeatureReader, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        Feed(encoder, tmp_path, progress=False).open(images, CONFIG, need("token", "patches"))
    assert calls == [5, 3, 5]  # a parcel of 8 images, five at a time
    monkeypatch.setattr(FeatureReader, "__call__", plain)
    store = Feed(encoder, tmp_path, progress=False).open(images, CONFIG, need("token", "patches"))
    assert store.facts["computed"] == 5
    assert torch.equal(store.take("patches"), whole)


def test_unreadable_images_are_left_out(encoder, list_source, make_sample, tmp_path: Path) -> None:
    samples = [make_sample(i, label=i) for i in range(120)]
    samples[50] = Sample(b"no image", "broken", None, 0)
    source = list_source(samples)
    for _ in range(2):
        store = Feed(encoder, tmp_path, progress=False).open(source, CONFIG, need("token"))
        assert len(store) == 119
        assert store.facts["unreadable_names"] == ["broken"]
        assert 50 not in store.image_indices
        assert torch.equal(store.image_indices, store.column("labels"))
    assert store.facts["computed"] == 0
    samples[51] = samples[50]
    with pytest.raises(UserError, match="2 of 120 images cannot be read, such as broken"):
        Feed(encoder, None, progress=False).open(source, CONFIG, need("token"))


def test_features_that_are_not_finite(encoder, images) -> None:
    encoder.backbone.norm.weight.fill_(1e6)
    half = dataclasses.replace(CONFIG, store="float16")
    with pytest.raises(UserError, match=r"not finite in float16 \(store=float32 holds more\).*image-0"):
        Feed(encoder, None, progress=False).open(images, half, need("token"))
    encoder.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"not finite \(first: image-0\): is the encoder damaged"):
        Feed(encoder, None, progress=False).open(images, CONFIG, need("token"))


@pytest.mark.parametrize(
    "how", ["shorter", "longer", "empty", "zeros", "one bit", "labels", "short labels", "no labels", "marks"]
)
def test_what_was_damaged_is_computed_again(encoder, images, tmp_path: Path, capsys, how: str) -> None:
    """A partial copy or a crash of the machine: numpy fills up a short file with zeros, and says nothing."""
    wanted = need("token", "patches")
    with Feed(encoder, tmp_path, progress=False) as feed:
        whole = feed.open(images, CONFIG, wanted)
        features, labels = whole.take("patches").clone(), whole.column("labels").clone()
    (folder,) = tmp_path.iterdir()
    name = "labels.npy" if "labels" in how else {"marks": "patches.done.npy"}.get(how, "patches.npy")
    data = bytearray((folder / name).read_bytes())
    if how in ("shorter", "short labels", "marks"):
        data = data[: len(data) * 2 // 3]
    elif how == "longer":
        data += bytes(16)
    elif how == "empty":
        data.clear()
    elif how == "zeros":
        data[-1000:] = bytes(1000)
    else:
        data[-1 if how == "one bit" else -8] ^= 1  # the label is a little-endian number of 8 bytes
    (folder / name).write_bytes(data)
    if how == "no labels":
        (folder / name).unlink()
    capsys.readouterr()
    with Feed(encoder, tmp_path, progress=False) as feed:
        again = feed.open(images, CONFIG, wanted)
        assert torch.equal(again.take("patches"), features)
        assert torch.equal(again.column("labels"), labels)
        alone = {"zeros": 1, "one bit": 1, "labels": 1}.get(how, 13)  # rows
        assert again.facts["computed"] == alone
    assert capsys.readouterr().err.count("computed again") == 1
    with Feed(encoder, tmp_path, progress=False) as feed:
        assert feed.open(images, CONFIG, wanted).facts["computed"] == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere files are sparse")
def test_the_disk_has_given_its_room_before_anything_is_computed(
    encoder, images, tmp_path: Path, monkeypatch
) -> None:
    """A disk that fills up under a memory map ends the process by SIGBUS, without a word."""
    seen: list[int] = []

    def stopped(self, mine, marks):
        file = (self.folder / "patches.npy").stat()
        seen.append(file.st_blocks * 512 - file.st_size)
        raise UserError("enough")

    monkeypatch.setattr(stored.Pass, "_compute", stopped)
    with Feed(encoder, tmp_path, progress=False) as feed, pytest.raises(UserError, match="enough"):
        feed.open(images, CONFIG, need("patches"))
    assert seen[0] >= 0


def test_temporary_features_of_killed_processes_go(encoder, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    here = platform.node()
    for host, process in ((here, ended.pid), (here, os.getpid()), ("elsewhere", ended.pid)):
        (tmp_path / f"foveola-features-{host}-{process}-x").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with Feed(encoder, progress=False) as feed:
        now = {path.name for path in tmp_path.iterdir()} - {feed.folder.name}
    assert before - now == {f"foveola-features-{here}-{ended.pid}-x"}


def test_a_temporary_folder_ends_with_the_feed(encoder, images) -> None:
    with Feed(encoder, None, progress=False) as feed:
        feed.open(images, CONFIG, need("token"))
        assert feed.folder.is_dir()
    assert not feed.folder.exists()


def test_kinds_by_hand(encoder, images) -> None:
    """Averages by attention against loops over the captured matrices."""
    kinds = ("token", "average", "attention", "lowest_entropy", "centre", "patches")
    with Feed(encoder, None, progress=False) as feed:
        store = feed.open(images, CONFIG, need(*kinds))
        rows = Images(images, np.arange(4), CropsCut(encoder.config.transform, 8, CONFIG, 0))[0].made
        seen = encoder.capture(encoder.normalise(rows.images), attention=True)
        for i in range(4):
            patches = seen.layers[-1].patches[i]
            heads = [row[-16:] / row[-16:].sum() for row in seen.objects[i, :, 0]]
            lowest = min(heads, key=lambda row: float(-(row * row.log()).sum()))
            mean = seen.objects[i, :, 0, -16:].mean(dim=0)
            central = seen.centre[i, :, -16:].mean(dim=0)
            for kind, row in (("attention", mean), ("lowest_entropy", lowest), ("centre", central)):
                expected = sum((row / row.sum())[j] * patches[j] for j in range(16))
                torch.testing.assert_close(store.take(kind)[i], expected, rtol=1e-3, atol=1e-4)
    rows = torch.tensor([[[0.2, 0.2, 0.2], [0.5, 0.01, 0.01]]])
    assert torch.allclose(lowest_entropy(rows), rows[:, 1] / 0.52)
    x = torch.arange(6.0).view(1, 3, 2)
    assert torch.equal(weigh(torch.tensor([[0.0, 3.0, 1.0]]), x), torch.tensor([[2.5, 3.5]]))


def test_another_encoders_attention(encoder, images, tmp_path: Path) -> None:
    """Its own weights give the class token's attention; other weights give something else."""
    encoder.save(tmp_path / "same")
    kind = f"external:{tmp_path / 'same'}"
    with Feed(encoder, None, progress=False) as feed:
        store = feed.open(images, CONFIG, need("attention", kind))
        torch.testing.assert_close(store.take(kind), store.take("attention"), rtol=1e-4, atol=1e-5)
    other = f"external:untrained:{tmp_path / 'same'}"
    with Feed(encoder, None, progress=False) as feed:
        store = feed.open(images, CONFIG, need("attention", other))
        assert (store.take(other) - store.take("attention")).abs().max() > 1e-3


def test_stored_attention_is_of_the_encoder_that_gave_it(encoder, images, tmp_path: Path) -> None:
    """Two encoders in one cache, and one that is replaced where it lies."""
    encoder.save(tmp_path / "same")
    kinds = f"external:{tmp_path / 'same'}", f"external:untrained:{tmp_path / 'same'}"

    def taken(kind: str) -> torch.Tensor:
        with Feed(encoder, tmp_path / "cache", progress=False) as feed:
            return feed.open(images, CONFIG, need("attention", kind)).take(kind)

    first, second = (taken(kind) for kind in kinds)
    assert (first - second).abs().max() > 1e-3
    for block in encoder.backbone.blocks:
        block.attn.qkv.weight.mul_(-1.5)
    encoder.save(tmp_path / "same")
    third = taken(kinds[0])
    with Feed(encoder, None, progress=False) as feed:
        torch.testing.assert_close(third, feed.open(images, CONFIG, need(kinds[0])).take(kinds[0]))


def test_predictor_pooling(encoder, images) -> None:
    from foveola.models.encoder import Encoder

    config = dataclasses.replace(encoder.config, predictor=PredictorConfig(depth=1))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = Encoder(config, encoder.backbone)
    with Feed(made, None, progress=False) as feed:
        store = feed.open(images, CONFIG, need("predictor"))
    tables, _ = extract_tables(made.pooled("predictor"), images, (False,), READING, progress=False)
    torch.testing.assert_close(store.take("predictor"), tables[0].features, rtol=1e-4, atol=1e-5)


def test_what_an_encoder_has_not(encoder, images) -> None:
    feed = Feed(encoder, None, progress=False)
    with pytest.raises(UserError, match="features=predictor: this encoder has token, average"):
        feed.want(images, CONFIG, need("predictor"))
    with pytest.raises(UserError, match="last 4 blocks: this encoder has 3"):
        feed.want(images, CONFIG, need("token", layers=4))
    with pytest.raises(UserError, match="unknown features 'tokens'; known: token, masked"):
        need("tokens")
    feed.close()


def test_crops_follow_seed_flip_and_object(encoder, list_source, tmp_path: Path) -> None:
    """An image whose left half is its object: masks of crops are where the bright pixels are."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48] = 250
    box = np.array([[0, 0, 0.5, 1]], np.float32)
    source = list_source([Sample(image, "half", Objects(boxes=box, areas=np.array([0.5], np.float32)), 0)])
    rows = CropsCut(encoder.config.transform, 8, CONFIG, 40)(source[0], 0)
    assert len(rows.images) == len(rows.labels) == 41
    bright = rows.images.float().mean(dim=1).unflatten(1, (4, 8)).unflatten(3, (4, 8)).amax(dim=(2, 4)) > 30
    seen = bright.flatten(1).any(dim=1)
    agree = (rows.masks == bright.flatten(1))[seen].float().mean()
    assert agree > 0.97
    assert 20 < int(seen.sum()) < 41
    assert rows.masks[~seen].all()
    assert not rows.has_mask[~seen].any()
    lefts = [bool(r.view(4, 4)[:, 0].all() and not r.all()) for r in rows.masks[1:]]
    rights = [bool(r.view(4, 4)[:, 3].all() and not r.all()) for r in rows.masks[1:]]
    assert sum(lefts) > 3
    assert sum(rights) > 3
    again = CropsCut(encoder.config.transform, 8, CONFIG, 40)(source[0], 0)
    assert torch.equal(again.images, rows.images)


def test_crops_of_dino_are_bilinear_and_the_evaluated_image_is_not(encoder, images, tmp_path) -> None:
    """torchvision's RandomResizedCrop, as DINO and iBOT call it; PIL says what bilinear is."""
    from PIL import Image

    from foveola.evaluation.classification.linear import Linear, LinearConfig

    wanted = Linear().wanted(LinearConfig(style="dino"), encoder)
    assert wanted.crops == "bilinear"
    assert {Linear().wanted(LinearConfig(style=style), encoder).crops for style in ("dinov2", "mae")} == {
        None
    }
    chosen, side = np.arange(3), encoder.config.transform.crop
    settings = (encoder.config.transform, 8, CONFIG, 2, False)
    cuts = CropsCut(*settings), CropsCut(*settings, "bilinear")
    plain, crops = (Images(images, chosen, cut)[0].made for cut in cuts)
    assert torch.equal(plain.images[::3], crops.images[::3])
    for index in range(3):
        image = decode(images[index].image)
        for view in (1, 2):
            rng = np.random.default_rng([CONFIG.seed, index, view])
            flipped = rng.random() < 0.5
            cut = Image.fromarray(image).crop(random_crop(*image.shape[:2], rng))
            made = np.asarray(cut.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            row = 3 * index + view
            found = crops.images[row].flip(-1) if flipped else crops.images[row]
            assert np.abs(found.numpy().astype(int) - made).max() <= 1
            assert not torch.equal(plain.images[row], crops.images[row])
    with Feed(encoder, tmp_path, progress=False) as feed:
        folders = {
            feed.open(images, CONFIG, dataclasses.replace(need("token"), crops=kernel), views).folder
            for kernel in (None, "bilinear")
            for views in (0, 1)
        }
    assert len(folders) == 3  # without crops their kernel is no matter


def test_random_crops_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    rng = np.random.default_rng(0)
    ours = np.array([random_crop(120, 200, rng) for _ in range(4000)], float)
    image = torch.zeros(3, 120, 200)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array(
            [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)], float
        )
    size = np.stack([ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], axis=1)
    assert (size > 0).all()
    assert ours[:, 2].max() <= 200
    assert ours[:, 3].max() <= 120
    np.testing.assert_allclose(size.mean(axis=0), theirs[:, 2:].mean(axis=0), rtol=0.03)
    np.testing.assert_allclose(size.std(axis=0), theirs[:, 2:].std(axis=0), rtol=0.05)
    np.testing.assert_allclose(ours[:, :2].mean(axis=0), theirs[:, [1, 0]].mean(axis=0), rtol=0.06)


def test_sampled_patches(encoder, images) -> None:
    with Feed(encoder, None, progress=False) as feed:
        store = feed.open(images, CONFIG, need("patches"))
        x, rows = store.sample_patches(50, seed=1)
        assert x.shape == (50, 32)
        assert (rows.diff() >= 0).all()
        assert len(rows.unique()) > 9
        patches = store.take("patches")
        assert all((patches[r] == v).all(dim=1).any() for v, r in zip(x, rows, strict=True))
        assert torch.equal(store.sample_patches(10**6, 0)[0], patches.flatten(0, 1))
