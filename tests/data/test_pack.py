"""`foveola pack`: what comes back from shards is what went into them."""

import errno
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveola import pack
from foveola.cli import main
from foveola.config import UserError
from foveola.data.identity import identity_of
from foveola.data.sample import DataError, Objects, full_mask
from foveola.data.shards.pack import PackedShards
from foveola.data.sources import decode, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "cache"))


def save(path: Path, seed: int, size: tuple[int, int], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names with dots, spaces and one stem, an image that EXIF turns, and a damaged one."""
    root = tmp_path / "images"
    save(root / "a" / "1.final.jpg", 0, (40, 24))
    save(root / "a" / "1_final.jpg", 1, (40, 24))
    save(root / "a" / "b.c" / "x y.JPEG", 2, (24, 40), format="JPEG")
    save(root / "b" / "same.jpg", 3, (30, 20))
    save(root / "b" / "same.png", 4, (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "b" / "turned.jpg", 5, (40, 24), exif=exif)
    (root / "b" / "z.jpg").write_bytes(b"\xff\xd8 nothing")
    return root


def same(a: Objects | None, b: Objects | None) -> bool:
    if a is None or b is None:
        return a is b
    fields = ("boxes", "areas", "labels", "scores")
    equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)
    masks = zip(a.masks or [None] * len(a), b.masks or [None] * len(b), strict=True)
    return equal and all(
        (x is y) if x is None or y is None else (full_mask(x) == full_mask(y)).all() for x, y in masks
    )


def test_original_files_come_back_with_names_labels_and_identity(folder, tmp_path):
    made = pack(f"folder:{folder}", tmp_path / "out", size="1KB", progress=False, processes=2)
    assert (made.samples, made.left_out) == (7, ())
    assert made.shards > 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".tar") == ["foveola.json"]
    plain: Any = open_source(f"folder:{folder}")
    packed: Any = open_source(f"shards:{tmp_path}/out")
    assert packed.image_names() == plain.image_names()
    assert identity_of(packed).digest == identity_of(plain).digest
    assert [packed.data(i) for i in range(7)] == [plain.data(i) for i in range(7)]
    assert [packed[i].label for i in range(7)] == [plain[i].label for i in range(7)]


def test_the_command_takes_how_many_processes_write(folder, tmp_path, capsys, monkeypatch):
    """The number is a key of its own: no launcher starts this command several times."""
    pool = "foveola.data.shards.pack.ProcessPoolExecutor"
    monkeypatch.setattr(pool, lambda *_: pytest.fail("one process is enough"))
    words = ["pack", f"folder:{folder}", f"out={tmp_path / 'out'}", "size=1KB"]
    assert main([*words, "processes=0"]) == 2
    assert "processes: must be >= 1, got 0" in capsys.readouterr().err
    assert main([*words, "gpus=1"]) == 2
    assert "pack runs in one process: leave out gpus=1" in capsys.readouterr().err
    assert main([*words, "processes=1"]) == 0
    assert "7 samples" in capsys.readouterr().out


def test_objects_of_coco_come_back_exactly(folder, tmp_path):
    rle = {"size": [24, 40], "counts": [100, 50, 810]}
    tree = {
        "images": [
            {"id": 1, "file_name": "a/1.final.jpg", "width": 40, "height": 24},
            {"id": 2, "file_name": "b/turned.jpg", "width": 24, "height": 40},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [3.3, 4.1, 9.7, 5.3], "area": 33.3,
             "score": 0.7},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [2, 1, 20, 21], "segmentation": rle,
             "score": 0.1},
            {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 0, 7, 7], "iscrowd": 1, "score": 1,
             "segmentation": [[0, 0, 7, 0, 7, 7]]},
            {"id": 4, "image_id": 2, "category_id": 2, "bbox": [1.1, 2.2, 3.3, 4.4], "score": 0.3},
        ],
        "categories": [{"id": 2, "name": "wing"}, {"id": 7, "name": "beak"}],
    }  # fmt: skip
    (tmp_path / "objects.json").write_text(json.dumps(tree))
    data = f"folder:{folder}?annotations={tmp_path}/objects.json"
    pack(data, tmp_path / "out", progress=False)
    plain, packed = open_source(data), open_source(f"shards:{tmp_path}/out")
    assert packed.classes == plain.classes
    for index in range(len(plain)):
        a, b = plain[index], packed[index]
        assert same(a.objects, b.objects), a.name
        assert same(a.crowds, b.crowds), a.name
    assert packed[0].objects is not None
    assert packed[5].objects is not None


def test_scenes_come_back_with_pixels_masks_and_label_maps(tmp_path):
    plain: Any = open_source("scenes:?size=32&count=6&background=class")
    pack("scenes:?size=32&count=6&background=class", tmp_path / "out", format="png", progress=False)
    packed: Any = open_source(f"shards:{tmp_path}/out")
    assert packed.classes == plain.classes
    assert packed.image_names() == [plain[i].name for i in range(6)]
    for index in range(6):
        assert (decode(packed[index].image) == decode(plain[index].image)).all()
        assert same(packed[index].objects, plain[index].objects)
        assert packed[index].label == plain[index].label
        assert (packed.label_map(index) == plain.label_map(index)).all()


@pytest.mark.parametrize(
    ("channels", "dtype", "options"), [(5, np.uint16, "?range=container&channels=all"), (3, np.uint8, "")]
)
def test_arrays_hold_any_channels_and_depth(tmp_path, channels, dtype, options):
    (tmp_path / "in").mkdir()
    top = np.iinfo(dtype).max
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, top, (48, 64, channels), dtype, endpoint=True)
        np.save(tmp_path / "in" / f"{k}.npy", pixels)
    spec = f"folder:{tmp_path}/in{options}{'&' if options else '?'}tiles=32&overlap=8"
    with pytest.raises(DataError, match="write pixels as they are read: format=jpeg"):
        pack(spec, tmp_path / "out", progress=False)
    if channels > 3:
        with pytest.raises(DataError, match="need format=npz"):
            pack(spec, tmp_path / "out", format="webp", progress=False)
    made = pack(spec, tmp_path / "out", format="npz", progress=False)
    assert str(made).endswith(f"data string: shards:{tmp_path}/out{options}")
    parts: Any = open_source(spec)
    packed: Any = open_source(f"shards:{tmp_path}/out{options}")
    assert packed.image_names() == parts.image_names()
    for k in range(len(parts)):
        pixels, whole = decode(packed[k].image), np.load(tmp_path / "in" / f"{k // 6}.npy")
        y, x = (0, 16)[k % 6 // 3], (0, 24, 32)[k % 3]
        assert pixels.dtype == dtype
        assert (pixels == whole[y : y + 32, x : x + 32]).all()
    small = pack(spec, tmp_path / "small", format="npz", canvas=16, progress=False)
    packed = open_source(f"shards:{small.path}{small.options}")
    assert decode(packed[0].image).shape == (16, 16, channels)
    shrunk = Image.fromarray(decode(parts[1].image)[:, :, 1].astype(np.float32))
    shrunk = np.asarray(shrunk.resize((16, 16), Image.Resampling.BICUBIC)).clip(0, top)
    assert np.abs(decode(packed[1].image)[:, :, 1] - shrunk).max() <= 1 + 2e-4 * top


def test_a_folder_may_be_called_like_a_pattern(folder, tmp_path):
    made = pack(f"folder:{folder}", tmp_path / "a b?[c]{d,e} 5%", size="0.5KB", progress=False)
    packed: Any = open_source(str(made).rpartition("data string: ")[2])
    assert (len(packed), packed.classes) == (7, ("a", "b"))


def test_files_that_state_their_range_come_back_whatever_they_are_called(tmp_path):
    examples = pytest.importorskip("pydicom.examples")
    (tmp_path / "in").mkdir()
    for name in ("IM0001", "0002", "c.dcm"):
        shutil.copy(examples.get_path("ct"), tmp_path / "in" / name)
    plain: Any = open_source(f"folder:{tmp_path}/in")
    made = pack(f"folder:{tmp_path}/in", tmp_path / "out", progress=False)
    packed: Any = open_source(f"shards:{made.path}")
    assert packed.image_names() == plain.image_names() == ["0002", "IM0001", "c.dcm"]
    assert packed.depth == plain.depth == 16
    for k in range(3):
        assert (decode(packed[k].image) == decode(plain[k].image)).all()
    assert identity_of(packed).digest == identity_of(plain).digest


@pytest.mark.parametrize(
    ("size", "text"), [(999, "1.00 KB"), (2_500_000, "2.50 MB"), (3_210_000_000, "3.21 GB")]
)
def test_sizes_are_said_in_a_unit_that_shows_them(tmp_path, size, text):
    assert f"7 samples in 1 shard, {text}" in str(PackedShards(tmp_path, 7, 1, size, ()))


@pytest.mark.parametrize(("form", "off"), [("png", 0), ("jpeg", 60), ("webp", 60)])
def test_images_are_shrunk_and_written_anew(tmp_path, form, off):
    smooth = Image.fromarray(np.uint8(np.add.outer(np.arange(60), np.arange(90))[..., None].repeat(3, 2)))
    (tmp_path / "in").mkdir()
    smooth.save(tmp_path / "in" / "a.png")
    smooth.resize((15, 10)).save(tmp_path / "in" / "b.png")
    pack(f"folder:{tmp_path}/in", tmp_path / "out", format=form, canvas=20, progress=False)
    packed: Any = open_source(f"shards:{tmp_path}/out")
    assert packed.image_names() == ["a.png", "b.png"]
    wanted = np.asarray(smooth.resize((30, 20), Image.Resampling.BICUBIC)).astype(int)
    found = decode(packed[0].image).astype(int)
    assert found.shape == (20, 30, 3)
    assert abs(found - wanted).max() <= off / 10
    assert decode(packed[1].image).shape == (10, 15, 3)
    if form == "png":  # nothing had to change
        assert packed.data(1) == (tmp_path / "in" / "b.png").read_bytes()


def test_what_was_ended_goes_on_and_is_the_same(folder, tmp_path, monkeypatch):
    from foveola.data.shards import pack as module

    pack(f"folder:{folder}", tmp_path / "whole", size="1KB", progress=False, processes=1)
    plain, written = module._write_shard, list[Path]()

    def some(config: Any, path: Path, *ends: int) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        plain(config, path, *ends)

    monkeypatch.setattr(module, "_write_shard", some)
    with pytest.raises(KeyboardInterrupt):
        pack(f"folder:{folder}", tmp_path / "out", size="1KB", progress=False, processes=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="was begun with other data or settings"):
        pack(f"folder:{folder}?limit=5", tmp_path / "out", size="1KB", progress=False)
    monkeypatch.setattr(module, "_write_shard", lambda c, p, *e: (written.append(p), plain(c, p, *e)))
    pack(f"folder:{folder}", tmp_path / "out", size="1KB", progress=False, processes=1)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert len({*written}) == len(written) == len(names) - 1
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_names_the_folder_that_was_asked_for_and_costs_no_shard(folder, tmp_path, monkeypatch):
    link, add, added = tmp_path / "link", tarfile.TarFile.addfile, list[str]()
    link.symlink_to(tmp_path / "disk" / "out")
    (tmp_path / "disk").mkdir()

    def full(self: tarfile.TarFile, info: tarfile.TarInfo, data: Any) -> None:
        if len(added) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        added.append(info.name)
        add(self, info, data)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(OSError, match="No space") as found:
            pack(f"folder:{folder}", link, size="1KB", progress=False, processes=1, max_bad=0.5)
    assert Path(found.value.filename).parent == link
    pack(f"folder:{folder}", link, size="1KB", progress=False, processes=1, max_bad=0.5)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert len(open_source(f"shards:{link}")) == 7
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file where a folder belongs"):
        pack(f"folder:{folder}", tmp_path / "file" / "out", progress=False)


def test_what_cannot_be_packed_is_said_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"1 of 7 images cannot be read, more than max_bad=0.01"):
        pack(f"folder:{folder}", tmp_path / "png", format="png", progress=False)
    assert not (tmp_path / "png").exists()
    shutil.rmtree(tmp_path / ".png.packing")
    made = pack(f"folder:{folder}", tmp_path / "png", format="png", max_bad=0.5, progress=False)
    assert len(made.left_out) == 1
    assert "images cannot be read and are left out" in str(made)
    for settings, reason in (
        ({}, "exists: name a new folder"),
        ({"size": "lots"}, "expected a number with KB, MB or GB"),
        ({"canvas": 64}, "canvas= needs format="),
        ({"formt": "png"}, "format"),
    ):
        with pytest.raises(UserError, match=reason):
            pack(f"folder:{folder}", tmp_path / "png", progress=False, **settings)
    data = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(data, "PNG")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(data.getvalue())
    with pytest.raises(UserError, match="write them into the data string of the shards"):
        pack(f"folder:{tmp_path}/deep?range=0-4095", tmp_path / "out", progress=False)
