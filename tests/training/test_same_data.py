"""The images of a run are those that it began with: growth and exchange are refused, other places are not."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.config import ConfigError, UserError, dump_yaml
from foveola.data import identity
from foveola.data.identity import identity_of
from foveola.data.scenes import Scenes
from foveola.data.sources import open_source
from foveola.training import same_data
from foveola.training.run import pretrain

SMALL = {"batch_size": 8, "duration": "6 steps", "checkpoint_every": "2 steps"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(16):
        draw(folder / f"{number:02d}.bmp", number)
    return folder


def draw(path: Path, seed: int) -> None:
    """Every file of the same size, whatever is drawn."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def grown(folder: Path) -> str:
    for number in range(16, 24):
        draw(folder / f"{number}.bmp", number)
    return "its data had 16 images, and have 24 now (8 added (16.bmp, 17.bmp, 18.bmp, ...))"


def shrunk(folder: Path) -> str:
    for number in range(4):
        (folder / f"{number:02d}.bmp").unlink()
    return "its data had 16 images, and have 12 now (4 removed (00.bmp, 01.bmp, 02.bmp, ...))"


def replaced(folder: Path) -> str:
    draw(folder / "07.bmp", 99)
    return "its 16 images are not the same any more (1 replaced (07.bmp))"


def reordered(folder: Path) -> str:
    (folder / "00.bmp").rename(folder / "99.bmp")
    return "its 16 images are not the same any more (1 renamed (00.bmp to 99.bmp))"


@pytest.mark.parametrize("how", [grown, shrunk, replaced, reordered])
def test_other_images_are_refused_or_allowed_with_a_word(
    tiny, images, tmp_path, interrupt_after, snapshot, how
):
    config = tiny(data=f"folder:{images}", out=str(tmp_path / "run"), **SMALL)
    interrupt_after(3)
    assert pretrain(config).step == 3
    says, before = how(images), snapshot(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{re.escape(says)}.*choose another out=;.* data_changed=allow"):
        pretrain(config)
    assert snapshot(tmp_path / "run") == before
    interrupt_after(1)
    allowed = tiny(data=f"folder:{images}", out=str(tmp_path / "run"), data_changed="allow", **SMALL)
    assert pretrain(allowed).step == 4
    text = (tmp_path / "run" / "log.txt").read_text()
    assert text.count(f"data_changed=allow: {says}") == 1
    # From there on these are the images of the run.
    interrupt_after(0)
    assert pretrain(config).finished
    assert (tmp_path / "run" / "log.txt").read_text().count("data_changed") == 1


def test_what_changed_is_said_with_names(images: Path):
    """Of every kind of change at once; and of annotations alone."""
    source = open_source(f"folder:{images}")
    before = same_data.images_of_run(source)
    draw(images / "05.bmp", 98)
    (images / "06.bmp").unlink()
    (images / "07.bmp").unlink()
    (images / "07.bmp").symlink_to("nowhere")
    (images / "owls").mkdir()
    (images / "08.bmp").rename(images / "owls" / "08.bmp")
    draw(images / "77.bmp", 97)
    draw(images / "78.bmp", 96)
    found = same_data.changed(before, same_data.images_of_run(open_source(f"folder:{images}")))
    assert found.what == (
        "its data had 16 images, and have 17 now (2 added (77.bmp, 78.bmp), 1 removed (06.bmp), "
        "1 replaced (05.bmp), 1 renamed (08.bmp to owls/08.bmp), 1 cannot be read any more (07.bmp))"
    )
    boxed = images.parent / "boxes.csv"
    boxed.write_text("01.bmp,1,1,9,9\n")
    with_boxes = same_data.images_of_run(open_source(f"folder:{images}?boxes={boxed}"))
    found = same_data.changed(same_data.images_of_run(open_source(f"folder:{images}")), with_boxes)
    assert found.what == (
        "its 17 images are not the same any more (not the images, but their order, labels or annotations)"
    )


@pytest.fixture
def sampled(images: Path, monkeypatch) -> Path:
    """Of 16 images 4 are read: 00, 05, 10 and 15. All files are old, so that their hashes are kept."""
    monkeypatch.setattr(same_data, "READ", 4)
    for path in images.iterdir():
        os.utime(path, (10**9, 10**9))
    monkeypatch.setattr(identity, "SETTLED", -1e6)
    return images


def look_at(folder: Path) -> same_data.RunImages:
    return same_data.images_of_run(open_source(f"folder:{folder}"))


def test_of_many_images_the_sizes_of_all_are_compared(sampled: Path):
    before = look_at(sampled)
    (sampled / "07.bmp").write_bytes((sampled / "07.bmp").read_bytes() + b"\0")
    os.utime(sampled / "07.bmp", (10**9, 10**9))
    now = look_at(sampled)
    assert before.contents == now.contents
    assert not before.agrees(now)
    wanted = "its 16 images are not the same any more (1 replaced (07.bmp))"
    assert same_data.changed(before, now).what == wanted


def test_of_many_images_those_with_another_time_are_read_where_a_hash_was_kept(sampled: Path):
    identity_of(open_source(f"folder:{sampled}?limit=12"))  # an evaluation read most of them
    before = look_at(sampled)
    assert before.inventory is not None
    names = [name.decode() for name in before.inventory.names]
    known = {name for name, found in zip(names, before.inventory.hashes, strict=True) if found}
    assert 12 <= len(known) < 16
    hidden = known - {"00.bmp", "05.bmp", "10.bmp", "15.bmp"}
    victim, touched, unknown = min(hidden), max(hidden), min(set(names) - known)
    draw(sampled / victim, 99)
    for name in (victim, touched, unknown):
        os.utime(sampled / name, (10**9 + 1, 10**9 + 1))
    now = look_at(sampled)
    assert before.agrees(now)
    found = same_data.changed(before, now)
    assert found.what == f"its 16 images are not the same any more (1 replaced ({victim}))"
    draw(sampled / victim, int(victim[:2]))  # as it was
    found = same_data.changed(before, look_at(sampled))
    assert found.what == ""
    assert found.perhaps.startswith("1 of 16 images have other times or names than when the run began")
    assert found.perhaps.endswith(f"whether they were replaced is not known ({unknown})")


def test_of_many_images_names_do_not_count(sampled: Path):
    """As with few images: what is read has the same contents, all files the same sizes, in the same order."""
    before = look_at(sampled)
    for path in sorted(sampled.glob("*.bmp")):
        path.rename(path.with_name(f"x{path.name}"))
    now = look_at(sampled)
    assert before.agrees(now)
    found = same_data.changed(before, now)
    assert found.what == ""
    assert "12 of 16 images have other times or names" in found.perhaps  # four were read: they are renamed


def test_of_many_images_moved_elsewhere_nothing_is_said_while_their_times_are_kept(sampled: Path):
    before = look_at(sampled)
    sampled.rename(sampled.with_name("moved"))
    assert same_data.changed(before, look_at(sampled.with_name("moved"))) == same_data.DataChange()


def test_the_inventory_is_kept_and_a_run_without_one_goes_on(images: Path, tmp_path: Path):
    now = look_at(images)
    same_data.save_run_images(tmp_path / "run", now)
    back = same_data.load_run_images(tmp_path / "run")
    assert back == now
    assert back.inventory is not None
    assert now.inventory is not None
    assert back.inventory.names == now.inventory.names
    for part in ("sizes", "times", "hashes"):
        assert np.array_equal(getattr(back.inventory, part), getattr(now.inventory, part))
    # A folder of an earlier version has neither sizes nor an inventory; it gets both.
    old = {"count": now.count, "contents": now.contents}
    (tmp_path / "run" / "data.json").write_text(json.dumps(old))
    (tmp_path / "run" / "data.npz").write_bytes(b"PK\3\4 torn")
    assert same_data.are_of(tmp_path / "run", now)
    assert same_data.note_change(tmp_path / "run", now, allowed=False) is None
    again = same_data.load_run_images(tmp_path / "run")
    assert again == now
    assert again.inventory is not None
    (tmp_path / "run" / "data.npz").unlink()
    (images / "00.bmp").unlink()
    with pytest.raises(ConfigError, match=r"had 16 images, and have 15 now\. For a run of"):
        same_data.note_change(tmp_path / "run", look_at(images), allowed=False)


def test_images_without_names_are_told_by_their_contents():
    before, now = (same_data.images_of_run(Scenes(size=32, count=count)) for count in (12, 14))
    what = same_data.changed(before, now).what
    assert what == "its data had 12 images, and have 14 now (2 added (image 12, image 13))"


def test_a_finished_run_is_not_taken_up_again_when_the_folder_has_grown(tiny, images, tmp_path, snapshot):
    config = tiny(data=f"folder:{images}", out=str(tmp_path / "run"), **SMALL | {"duration": "3 epochs"})
    assert pretrain(config).step == 6
    grown(images)
    before = snapshot(tmp_path / "run")
    with pytest.raises(ConfigError, match="its data had 16 images, and have 24 now"):
        pretrain(config)
    assert snapshot(tmp_path / "run") == before


def test_the_same_images_at_another_place_go_on(
    tiny, images, tmp_path, interrupt_after, same, newest, monkeypatch
):
    whole = pretrain(tiny(data=f"folder:{images}", out=str(tmp_path / "whole"), **SMALL))
    interrupt_after(2)
    assert pretrain(tiny(data=f"folder:{images}", out=str(tmp_path / "run"), **SMALL)).step == 2
    monkeypatch.chdir(tmp_path)
    images.rename(tmp_path / "moved")
    for data, step in (("folder:moved", 4), (f"folder:{tmp_path}/moved/", 6)):  # relative, and with a slash
        interrupt_after(2)
        assert pretrain(tiny(data=data, out=str(tmp_path / "run"), **SMALL)).step == step
    same(newest(whole.folder), newest(tmp_path / "run"))
    # Other images at another place are another run.
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    replaced(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"holds another run \(its data is '.*', not 'folder:other'\)"):
        pretrain(tiny(data="folder:other", out=str(tmp_path / "run"), **SMALL))


def test_without_out_a_run_goes_on_where_its_images_moved_and_begins_anew_with_others(
    tiny, images, tmp_path, interrupt_after, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    interrupt_after(2)
    first = pretrain(tiny(data=f"folder:{images}", **SMALL))
    shutil.copytree(images, tmp_path / "copy")
    interrupt_after(2)
    again = pretrain(tiny(data="folder:copy", **SMALL))
    assert (again.folder, again.step) == (first.folder, 4)
    replaced(tmp_path / "copy")
    interrupt_after(1)
    other = pretrain(tiny(data="folder:copy", **SMALL))
    assert other.folder != first.folder
    assert other.step == 1


def test_without_out_a_folder_that_has_grown_gets_a_run_of_its_own_once_the_old_one_is_finished(
    tiny, images, tmp_path, interrupt_after, snapshot, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny(data=f"folder:{images}", **SMALL | {"duration": "2 epochs"})
    interrupt_after(3)
    old = pretrain(config)
    assert old.step == 3
    grown(images)
    with pytest.raises(ConfigError, match=r"8 added .*choose another out=;.* data_changed=allow"):
        pretrain(config)  # not finished: whether it goes on with the others is to be said
    for number in range(16, 24):
        (images / f"{number}.bmp").unlink()
    interrupt_after(0)
    assert pretrain(config).step == 4
    says, before = grown(images), snapshot(old.folder)
    new = pretrain(config)
    assert new.folder != old.folder
    assert new.step == new.total_steps == 6
    assert snapshot(old.folder) == before
    log = (new.folder / "log.txt").read_text()
    assert f"{old.folder} is finished, and {says}: this is a run of its own" in log
    with pytest.raises(ConfigError, match="8 added"):
        pretrain(config, out=str(old.folder))


def test_of_many_images_some_spread_over_all_are_read(monkeypatch):
    monkeypatch.setattr(same_data, "READ", 8)
    chosen: list[list[int]] = []

    class Counted(Scenes):
        def identity(self, chosen_=None):
            chosen.append(chosen_.tolist())
            return super().identity(chosen_)

    found = same_data.images_of_run(Counted(size=32, count=50))
    assert chosen == [[0, 7, 14, 21, 28, 35, 42, 49]]
    assert found.count == 50
    assert found != same_data.images_of_run(Counted(size=32, count=51))
    assert found != same_data.images_of_run(Counted(size=32, count=50, seed=1))


OF_TWO = """
import os
from foveola.config import UserError
from foveola.training.run import pretrain
try:
    pretrain({recipe!r}, out={out!r}, data="folder:{root}/of-" + os.environ["RANK"])
except UserError as error:
    print(error)
"""


def test_processes_that_see_other_data_end_together(tiny, images, tmp_path, run_ranks):
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tiny(**SMALL)))
    for rank in range(2):
        shutil.copytree(images, tmp_path / f"of-{rank}")
    code = OF_TWO.format(recipe=str(tmp_path / "tiny.yaml"), out=str(tmp_path / "run"), root=tmp_path)
    replaced(tmp_path / "of-1")
    for said in run_ranks(code):
        assert said.startswith("process 1 finds 16 images in ")
        assert " of other contents or in another order: all processes must see the same data" in said
    assert not (tmp_path / "run").exists()


def test_a_source_that_one_process_cannot_read_is_said(monkeypatch):
    monkeypatch.setattr(same_data, "_attempt", lambda source: "gone")
    monkeypatch.setattr(same_data.distributed, "gather_objects", lambda mine: [mine, "the disk is gone"])
    with pytest.raises(UserError, match=r"process 1 cannot read scenes:.*: the disk is gone"):
        same_data.agreed(Scenes(size=32, count=8))


# A config.yaml as the version before wrote it: keys that came later are missing, the canvas is its default.
OF_BEFORE = """
recipe: tiny
data: {data}
out: null
seed: 0
duration: 6 steps
batch_size: 8
accumulate: 1
precision: fp32
device: cpu
model: {{size: small, width: 32, depth: 2, heads: 2, patch_size: 8, image_size: 32, drop_path: 0.2}}
method:
  name: distillation
  heads:
    main: {{prototypes: 32, hidden: 32, bottleneck: 16, layers: 3, norm_last_layer: false}}
  token: {{head: main, target: {target}}}
  patch: {{head: main, target: {target}}}
  spread: {{weight: 0.1}}
views: {{global_size: 32, local_size: 16, local_count: 2, masking: {{}}, objects: {{}}}}
loader:
  {{canvas: 256, mask_canvas: 32, objects_per_image: 1, choose: area, workers: 0, prefetch: 4, max_bad: 0.01,
    start: auto}}
optimizer:
  lr: {{value: 0.001, start: 0.0, end: 1.0e-05, warmup: 2 steps, shape: cosine}}
  lr_rule: none
  clip: 3.0
  clip_each: parameter
  parts: {{}}
  freeze_last_layer: 2 steps
log_every: 1
checkpoint_every: 2 steps
keep: 10
"""
TARGET_OF_BEFORE = (
    "{temperature: {value: 0.07, start: 0.04, end: null, warmup: 1 epochs, shape: constant, per_epoch: true}}"
)


def test_a_run_of_the_version_before_goes_on_and_says_what_differs(tiny, images, tmp_path, interrupt_after):
    run = tmp_path / "run"
    config = tiny(data=f"folder:{images}", out=str(run), **SMALL, **{"loader.canvas": 256})
    interrupt_after(3)
    assert pretrain(config).step == 3
    # It noted neither images nor processes.
    (run / "data.json").unlink()
    (run / "config.yaml").write_text(OF_BEFORE.format(data=f"folder:{images}", target=TARGET_OF_BEFORE))
    # Its default of then is not that of today, and is not changed without a word.
    with pytest.raises(ConfigError, match=r"its loader\.canvas is 256, not 512"):
        pretrain(tiny(data=f"folder:{images}", out=str(run), **SMALL, **{"loader.canvas": 512}))
    interrupt_after(1)
    assert pretrain(run / "config.yaml", out=str(run)).step == 4
    text = (run / "log.txt").read_text()
    assert text.count("begun by an earlier version") == 1
    assert "from here on images keep their aspect" in text
    assert json.loads((run / "data.json").read_text())["count"] == 16
    interrupt_after(0)
    assert pretrain(run / "config.yaml", out=str(run)).finished
    assert (run / "log.txt").read_text().count("begun by an earlier version") == 1
