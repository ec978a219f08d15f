"""The images of a run are those that it began with: growth and exchange are refused, other places are not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.config import ConfigError, UserError, dump_yaml
from foveola.data.scenes import Scenes
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
    return "its data had 16 images, and have 24 now"


def shrunk(folder: Path) -> str:
    for number in range(4):
        (folder / f"{number:02d}.bmp").unlink()
    return "its data had 16 images, and have 12 now"


def replaced(folder: Path) -> str:
    draw(folder / "07.bmp", 99)
    return "its 16 images are not the same any more"


def reordered(folder: Path) -> str:
    (folder / "00.bmp").rename(folder / "99.bmp")
    return "its 16 images are not the same any more"


@pytest.mark.parametrize("how", [grown, shrunk, replaced, reordered])
def test_other_images_are_refused_or_allowed_with_a_word(
    tiny, images, tmp_path, interrupt_after, snapshot, how
):
    config = tiny(data=f"folder:{images}", out=str(tmp_path / "run"), **SMALL)
    interrupt_after(3)
    assert pretrain(config).step == 3
    says, before = how(images), snapshot(tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{says}.*choose another out=;.* data_changed=allow"):
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


def test_of_many_images_some_spread_over_all_are_read(monkeypatch):
    monkeypatch.setattr(same_data, "READ", 8)
    chosen: list[list[int]] = []

    class Counted(Scenes):
        def identity(self, chosen_=None):
            chosen.append(chosen_.tolist())
            return super().identity(chosen_)

    found = same_data.look(Counted(size=32, count=50))
    assert chosen == [[0, 7, 14, 21, 28, 35, 42, 49]]
    assert found.count == 50
    assert found != same_data.look(Counted(size=32, count=51))
    assert found != same_data.look(Counted(size=32, count=50, seed=1))


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
