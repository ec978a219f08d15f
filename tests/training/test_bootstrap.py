"""Rounds of finding objects and training on them: what each is made of, kills anywhere, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import ConfigError, build, merge, read_yaml
from foveola.data.coco import rle_of
from foveola.data.scenes import Scenes
from foveola.proposals.discover import Discoverer
from foveola.training.bootstrap import object_changes, round_config
from foveola.training.dryrun import dry_run
from foveola.training.recipe import BootstrapConfig, RunConfig, resolve, run_config
from foveola.training.run import pretrain
from foveola.zoo.load import load

IMAGES = 24
SHORT = {
    "rounds": 2,
    "recipe": "loop",
    "duration": "3 steps",
    "first_duration": "2 steps",
    "batch_size": 8,
    "checkpoint_every": "1 steps",
    "discover": {"method": "tokencut", "image_size": 64},
    "filter": {"max_objects": 2},
    "method": {"patch": None},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    scenes = Scenes(size=32, count=IMAGES, objects=(1, 3))
    for index in range(IMAGES):
        Image.fromarray(np.asarray(scenes[index].image)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def loop(tiny_tree: dict[str, Any], images: Path) -> Callable[..., RunConfig]:
    def make(**changes: Any) -> RunConfig:
        return run_config(merge(merge(tiny_tree, SHORT), {"data": f"folder:{images}"} | changes))

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    from tests.training.conftest import TINY

    folder = tmp_path_factory.mktemp("loop") / "out"
    tree = merge(merge(TINY, SHORT), {"data": f"folder:{images}", "out": str(folder)})
    assert pretrain(run_config(tree)).finished
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).state_dict())


def same(a: Path, b: Path) -> bool:
    mine, theirs = weights(a), weights(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def lines(folder: Path) -> list[str]:
    return [line.partition("  ")[2] for line in (folder / "rounds" / "log.txt").read_text().splitlines()]


def test_each_round_is_a_run_on_the_objects_that_the_one_before_it_finds(
    finished: Path, images: Path
) -> None:
    first, second, last = (finished / part for part in ("rounds/round-0", "rounds/round-1", "."))
    trees = [read_yaml(folder / "config.yaml") for folder in (first, second, last)]
    assert [tree["data"] for tree in trees] == [
        f"folder:{images}",
        f"folder:{images}?annotations={finished}/masks/round-1/objects.json",
        f"folder:{images}?annotations={finished}/masks/round-2/objects.json",
    ]
    assert [tree["init"] for tree in trees] == [None, str(first), str(second)]
    assert [tree["duration"] for tree in trees] == ["2 steps", "3 steps", "3 steps"]
    assert [tree["seed"] for tree in trees] == [0, 1, 2]
    assert trees[0]["views"]["objects"] is None
    assert trees[1]["views"]["objects"] is not None
    assert not same(second, last)
    for number, folder in enumerate((first, second), start=1):
        found = json.loads((finished / f"masks/round-{number}/objects.json").read_text())
        encoder = load(folder)
        want = Discoverer(encoder, build(BootstrapConfig, SHORT | {"views": {"objects": {}}}).discover)
        for image in found["images"][:4]:
            pixels = np.asarray(Image.open(images / image["file_name"]).convert("RGB"))
            [proposals] = want.propose([pixels])
            mine = [each for each in found["annotations"] if each["image_id"] == image["id"]]
            assert [each["segmentation"] for each in mine] == [rle_of(mask) for mask in proposals.masks][:2]


def test_the_log_counts_the_objects_of_each_round_and_how_they_differ(finished: Path) -> None:
    said = lines(finished)
    assert said[0].startswith("round 0: the recipe without objects on the same images")
    assert said[-1].startswith("finished: 2 rounds")
    for number in (1, 2):
        found = json.loads((finished / f"masks/round-{number}/objects.json").read_text())
        owners = {each["image_id"] for each in found["annotations"]}
        text = f"round {number}: {len(found['annotations'])} objects in {IMAGES} images, "
        text += f"{IMAGES - len(owners)} of them without any"
        assert said[number].startswith(text)
    assert "mean best IoU" not in said[1]
    assert "mean best IoU" in said[2]


def test_how_objects_differ_is_said_of_masks(tmp_path: Path) -> None:
    def write(name: str, found: dict[str, list[tuple[int, int]]]) -> Path:
        tree: dict[str, Any] = {"images": [], "annotations": []}
        for number, (image, columns) in enumerate(found.items()):
            tree["images"].append({"id": number, "file_name": image, "width": 10, "height": 4})
            for start, end in columns:
                mask = np.zeros((4, 10), bool)
                mask[:, start:end] = True
                tree["annotations"].append({"image_id": number, "segmentation": rle_of(mask)})
        (tmp_path / name).write_text(json.dumps(tree))
        return tmp_path / name

    old = write("old", {"a": [(0, 4), (6, 10)], "b": [], "c": [(0, 2)], "d": [(0, 10)]})
    new = write("new", {"a": [(2, 6), (0, 4)], "b": [(1, 2)], "c": [], "d": [(0, 5)]})
    # a: 2 of 6 columns, and 1; d: 5 of 10.
    text = object_changes(old, new)
    assert text.startswith(f"mean best IoU {(2 / 6 + 1 + 0.5) / 3:.2f} with those of the round before")
    assert text.endswith("1 images have some now and had none, 1 have none any more")


def test_a_finished_loop_is_left_alone(finished: Path, loop: Callable[..., RunConfig], capfd: Any) -> None:
    kept = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    again = pretrain(loop(out=str(finished)))
    assert again.finished
    assert again.folder == finished
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == kept
    with pytest.raises(ConfigError, match=r"holds another loop \(its rounds is 2, not 3\).*init="):
        pretrain(loop(out=str(finished), rounds=3))
    with pytest.raises(ConfigError, match=r"its discover.method is 'tokencut', not 'lost'"):
        pretrain(loop(out=str(finished), discover={"method": "lost"}))


def test_a_loop_that_is_killed_everywhere_goes_on_to_the_same_end(
    finished: Path,
    tmp_path: Path,
    loop: Callable[..., RunConfig],
    interrupt_after: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    interrupt_after(1)  # in round 0
    assert pretrain(loop(out=str(out))).step == 1
    interrupt_after(0)
    propose, seen = Discoverer.propose, []

    def killed(self: Discoverer, some: Any) -> Any:
        seen.append(some)
        if len(seen) == 2:  # the first batch is on the disk
            raise KeyboardInterrupt
        return propose(self, some)

    monkeypatch.setattr(Discoverer, "propose", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(loop(out=str(out)))
    assert (out / "masks" / "round-1" / "objects.unfinished").exists()
    interrupt_after(2)  # in round 1
    assert not pretrain(loop(out=str(out))).finished
    interrupt_after(2)  # the last step of round 1 is left, and the first of round 2
    last = pretrain(loop(out=str(out)))
    assert (last.folder, last.step) == (out, 1)
    interrupt_after(0)
    assert pretrain(loop(out=str(out))).finished
    assert same(out, finished)
    assert lines(out) == [line.replace(str(finished), str(out)) for line in lines(finished)]
    for number in (1, 2):
        mine, whole = (folder / f"masks/round-{number}/objects.json" for folder in (out, finished))
        kept = [json.loads(path.read_text())["annotations"] for path in (mine, whole)]
        assert kept[0] == kept[1]


def test_init_gives_the_first_features_and_restart_every_start(finished: Path, tmp_path: Path) -> None:
    start = str(finished / "rounds" / "round-0")
    out = tmp_path / "out"
    config = run_config({**read_yaml(finished / "rounds" / "config.yaml"), "init": start, "restart": True})
    assert isinstance(config, BootstrapConfig)
    pretrain(config, out=str(out))
    trees = [read_yaml(folder / "config.yaml") for folder in (out / "rounds" / "round-1", out)]
    assert [tree["init"] for tree in trees] == [start, start]
    assert [tree["seed"] for tree in trees] == [0, 0]
    assert not (out / "rounds" / "round-0").exists()
    mine, theirs = (f / "masks/round-1/objects.json" for f in (out, finished))
    assert json.loads(mine.read_text())["annotations"] == json.loads(theirs.read_text())["annotations"]


def test_what_a_loop_cannot_be_is_refused(tmp_path: Path, loop: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match=r"has objects already: train on them.*odis-small"):
        pretrain(loop(data="scenes:?size=32&count=24", out=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match=r"needs data=\.\.\., for example data=folder:/my/images"):
        pretrain(loop(data=None, out=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match=r"set views.objects=\{\}"):
        loop(views={"objects": None})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no rounds: choose another out="):
        pretrain(loop(out=str(tmp_path / "full")))
    assert loop(init="weights").unread()["first_duration"].startswith("init gives features")
    assert not (tmp_path / "a").exists()


def test_rounds_make_a_loop_of_any_recipe_with_objects() -> None:
    loop, plain = resolve("odis-bootstrap"), resolve("odis-small")
    assert isinstance(loop, BootstrapConfig)
    assert not isinstance(plain, BootstrapConfig)
    assert loop.method == plain.method
    assert loop.views == plain.views
    other = resolve("odis-tiny-tinyimagenet", ["rounds=3", "discover.method=lost", "filter.min_area=0.1"])
    assert isinstance(other, BootstrapConfig)
    assert (other.rounds, other.discover.method, other.filter.min_area) == (3, "lost", 0.1)


def test_dry_run_says_what_each_round_costs(loop: Callable[..., RunConfig]) -> None:
    text = dry_run(loop())
    first, each = text.split("\n\n")
    assert first.startswith("round 0, without objects\n")
    assert each.startswith("rounds 1 to 2, each\n")
    assert "found by tokencut in about " in each
    assert "objects" not in first.partition("\n")[2].replace("objects/", "")
    assert each.count("images/s") == 1


def test_the_round_without_objects_has_nothing_about_objects(loop: Callable[..., RunConfig]) -> None:
    target = {"temperature": {"value": 0.07}}
    config = loop(
        method={
            "token": {"weight_by": "score", "target": target},
            "image": {"token": "image", "target": target},
        },
        views={"objects": {"image_token": True}},
        loader={"objects_per_image": 2, "objects_noise": {"jitter": 0.1}},
    )
    assert isinstance(config, BootstrapConfig)
    first, second = (round_config(config, number, None, None) for number in (0, 1))
    assert first.views.objects is None
    assert first.loader.objects_noise is None
    assert getattr(first.method, "image") is None  # noqa: B009
    assert first.method.token.weight_by is None
    assert second.method == config.method
