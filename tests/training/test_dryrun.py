"""`--dry-run`: every shipped recipe builds and takes two steps, made small in width, depth and pixels."""

import dataclasses
import json
import re

import pytest
from PIL import Image

from foveola.config import UserError, build, merge, to_dict
from foveola.data.sources import open_source
from foveola.training.auto.cost import memory_of, too_large
from foveola.training.dryrun import dry_run, try_images
from foveola.training.recipe import RunConfig, nested, recipes, resolve

SMALL = {
    "device": "cpu",
    "batch_size": 16,
    "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 16, "image_size": 32},
    "views": {"global_size": 32, "local_size": 16},
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 2},
    "transform": None,
    "precision": "fp32",
}
HEAD = {"prototypes": 48, "hidden": 32, "bottleneck": 16}
HEADS = {"method.heads.main": HEAD}
CAPI = {"model.patch_size": 4, "method.clustering.prototypes": 12}
NARROW = {"width": 16, "depth": 1, "heads": 2}
PARTS = {  # what else is made small, by method
    "distillation": HEADS,
    "capi": CAPI,
    "mae": {"model.patch_size": 4, "method.decoder": NARROW},
    "ijepa": {"model.patch_size": 4, "method.predictor": NARROW, "views.blocks.min_context": 6},
    "classification": {},
    "segmentation": {"data": "scenes:?size=32&count=64&background=class", "method.look.size": 32}
    | {"method.look.window": 32, "method.look.stride": 32},
    "detection": {"views.global_size": 64, "model.image_size": 64, "method.channels": 16},
}
LOSSES = {  # of methods whose terms do not depend on the recipe
    "mae": ["reconstruction"],
    "ijepa": ["prediction"],
    "classification": ["classification"],
    "segmentation": ["segmentation"],
    "detection": ["proposal", "proposal_box", "class", "box", "mask"],
}
FIELDS = ["recipe", "data", "parameters", "tokens per image", "batch", "steps", "learning rate"]
FIELDS += ["trial", "speed", "memory"]


def test_a_step_that_is_too_large_says_what_helps(monkeypatch):
    """ViTDet at 1024 pixels: windows among the ways out, as long as they are not taken."""
    ways = {"checkpoint_activations=true", "model.window=14", "a larger accumulate"}
    config = resolve("vitdet-vitb16-coco", {"checkpoint_activations": False})
    said = too_large(config, 8, 16 * 2**30, "cuda:0")
    assert "8 images at once" in said
    assert "cuda:0 has 16" in said
    assert all(way in said for way in ways)
    assert too_large(config, 8, 2**42, "cuda:0") == ""
    taken = resolve("vitdet-vitb16-coco", {"model.window": 14})  # which has checkpoints
    assert not any(way in too_large(taken, 1, 2**30, "cpu") for way in ways)
    assert "model.window" not in too_large(resolve("mae-vitb16-in1k"), 64, 2**30, "cpu")  # it drops patches
    # Most of what is kept goes away with checkpoints, and windows are no answer for few patches.
    assert memory_of(replaced(config, True), 64) < 0.25 * memory_of(config, 64)
    monkeypatch.setattr("foveola.training.dryrun.room_of", lambda device: 2.0**20)
    text = dry_run(made("ibot-tiny-tinyimagenet", SMALL | HEADS | {"data": "scenes:?size=32&count=64"}))
    advice = [line for line in text.splitlines() if line.startswith("advice") and "by arithmetic" in line]
    assert len(advice) == 1
    assert "model.window" not in advice[0]

    def full(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("foveola.training.dryrun._try", full)
    with pytest.raises(UserError, match=r"out of memory: .*checkpoint_activations=true"):
        dry_run(made("ibot-tiny-tinyimagenet", SMALL | HEADS | {"data": "scenes:?size=32&count=64"}))


def replaced(config: RunConfig, checkpoints: bool) -> RunConfig:
    return dataclasses.replace(config, checkpoint_activations=checkpoints)


def made(recipe: str, changes: dict) -> RunConfig:
    """A recipe with changes, some of which mean nothing in it; of a loop, a round."""
    own = {field.name for field in dataclasses.fields(RunConfig)}
    tree = {name: value for name, value in to_dict(resolve(recipe)).items() if name in own}
    return build(RunConfig, merge(tree, nested(changes)))


def rows(text: str) -> dict[str, str]:
    return dict(re.split("  +", line, maxsplit=1) for line in text.splitlines())


@pytest.mark.parametrize("name", recipes())
def test_every_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = resolve(name).method.name
    small = nested(SMALL) | {"data": "scenes:?size=32&count=64"}
    parts = PARTS[method]
    if method == "distillation":
        parts = {f"method.heads.{head}": HEAD for head in resolve(name).method.heads}
    config = made(name, merge(small, nested(parts)))
    said = rows(dry_run(config))
    objects = ["objects"] * (config.views.objects is not None)
    resting = ["resting"] * bool(config.freeze)
    expected = [*FIELDS[:2], *objects, "readable", FIELDS[2], *resting, *FIELDS[3:], "advice"]
    assert list(said) == expected
    assert said["recipe"] == f"{name} ({recipes()[name].method})"
    assert said["data"].endswith("64 images")
    if method in LOSSES:
        assert sorted(re.findall(r"(\w+) \d+\.\d{3}", said["trial"])) == sorted(LOSSES[method])
        if method not in ("mae", "ijepa"):
            return
        if method == "mae":
            assert said["tokens per image"] == "student 17, predicted 48"
        else:
            counts = re.fullmatch(
                r"student about (\d+), predicted about (\d+), teacher 64", said["tokens per image"]
            )
            assert counts is not None
            assert 6 < int(counts[1]) < 40
            assert 4 * 8 < int(counts[2]) < 4 * 14
        return
    if method == "capi":
        assert re.findall(r"(\w+) \d+\.\d{3}", said["trial"]) == ["clustering", "prediction"]
        assert (
            said["tokens per image"]
            == f"student {23 + config.model.registers}, predicted {int(41 * config.views.dropping.predict)}, "
            + (f"teacher {64 + config.model.registers}")
        )
        return
    terms = ["token"] * (config.method.token is not None) + ["patch"] * (config.method.patch is not None)
    terms += ["position"] * (config.method.position is not None)
    terms += ["spread"] * (config.method.spread is not None)
    terms += ["gram"] * (config.method.gram is not None)
    terms += ["preservation_token", "preservation_patch"] * (config.method.preservation is not None)
    assert re.findall(r"(\w+) \d+\.\d{3}", said["trial"]) == terms
    assert not list(tmp_path.iterdir())  # nothing is written


def test_numbers_against_arithmetic():
    config = made(
        "ibot-vits16-in1k", SMALL | HEADS | {"data": "scenes:?size=32&count=70", "model.registers": 3}
    )
    said = rows(dry_run(config))
    # 2 x (4 patches + class token + 3 registers), and 10 x (1 + 1 + 3)
    assert said["tokens per image"] == "student 66, teacher 16"
    d, k = 32, 48
    block = 4 * d + 3 * d * d + 3 * d + d * d + d + 8 * d * d + 4 * d + d
    table = (4 + 1) * d
    encoder = 2 * block + table + d + d + 3 * d + (3 * 256 * d + d) + 2 * d
    heads = (32 * d + 32) + (32 * 32 + 32) + (32 * 16 + 16) + 16 * k + k
    assert said["parameters"] == f"encoder {encoder:,}, heads {heads:,}"
    assert said["steps"] == "3,200 (4 an epoch, 800 epochs)"
    assert said["learning rate"] == f"{5e-4 * 16 / 256:.4g} after 10 epochs"
    assert said["batch"] == "16 images: 1 process(es) x 1 part(s) x 16"
    rate, length = re.match(r"([\d.e+]+) images/s on one such device, so (.*) in all", said["speed"]).groups()
    number, unit = length.split()
    seconds = float(number) * {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}[unit]
    assert seconds == pytest.approx(3200 * 16 / float(rate), rel=0.35)


def test_without_data_the_built_in_images_stand_in():
    """How many steps an epoch has is not known then, and nothing can be foreseen."""
    config = made("ibot-vits16-in1k", SMALL | HEADS | {"duration": "3 epochs"})
    said = rows(dry_run(config))
    assert said["data"].startswith("scenes:")
    assert "built in, as there is no data=" in said["data"]
    assert said["steps"] == "3 epochs; with data= their number is known"
    assert "in all" not in said["speed"]
    assert "advice" not in said


def test_what_can_be_foreseen_is_said():
    changes = {"duration": "3 epochs", "data": "scenes:?size=32&count=64", "batch_size": 16}
    text = dry_run(made("odis-vits16-in1k", SMALL | HEADS | changes | {"views.objects.aware": False}))
    found = [line.removeprefix("advice").strip() for line in text.splitlines() if line.startswith("advice")]
    assert len(found) == 6
    assert found[0].startswith("64 images are few: below 1,000")
    assert found[1].startswith("12 steps are too few")
    where = "method.token.target.temperature.warmup '30 epochs'"
    assert found[2] == f"{where} is 120 steps, longer than the run of 12: it takes 30% of it"
    assert found[4].startswith("optimizer.lr.warmup '10 epochs' is 40 steps")
    assert found[-1].startswith("the teacher is slow for 12 steps: at the end it still has 97% of its first")
    assert rows(text)["objects"].startswith("annotated in scenes:")


def test_mistakes_show_before_anything_is_built():
    with pytest.raises(UserError, match="cannot be shared by 1 process x accumulate=3"):
        dry_run(made("demo", SMALL | HEADS | {"accumulate": 3}))
    with pytest.raises(UserError, match="no folder /nowhere"):
        dry_run(made("demo", SMALL | HEADS | {"data": "folder:/nowhere"}))
    with pytest.raises(UserError, match="duration: not a duration"):
        dry_run(made("demo", SMALL | HEADS | {"duration": "long"}))


def test_images_that_cannot_be_read_are_named(tmp_path):
    """1,000 files, of which the sample reads every fifth; the first and the last are always in it."""
    (tmp_path / "0000.png").write_bytes(b"torn")
    Image.new("RGB", (8, 8)).save(tmp_path / "0001.png")
    for number in range(2, 1000):
        (tmp_path / f"{number:04}.png").hardlink_to(tmp_path / "0001.png")
    source = open_source(f"folder:{tmp_path}")
    assert try_images(source).startswith("199 of 200 images, spread evenly over 1,000; not: 0000.png")
    (tmp_path / "0000.png").unlink()
    source = open_source(f"folder:{tmp_path}")
    assert try_images(source) == "all of 200 images, spread evenly over 999"
    assert try_images(source, seconds=0) == "all of 1 images, spread evenly over 999"
    for number in range(1, 9):
        (tmp_path / f"{number:04}.png").unlink()
    few = open_source(f"folder:{tmp_path}")
    for number in range(9, 16):
        (tmp_path / f"{number:04}.png").unlink()
        (tmp_path / f"{number:04}.png").write_bytes(b"torn")
    assert re.search(r"not: 0009\.png.*; 0014\.png.*", try_images(few))


def test_several_processes_each_try_their_share(run_ranks):
    tree = to_dict(made("ibot-vits16-in1k", SMALL | HEADS))
    code = f"""
import json, torch
torch.set_num_threads(1)
from foveola.config import build
from foveola.training.dryrun import dry_run, try_images
from foveola.training.recipe import RunConfig
print(dry_run(build(RunConfig, json.loads({json.dumps(json.dumps(tree))}))))
"""
    for out in run_ranks(code):
        assert rows(out)["batch"] == "16 images: 2 process(es) x 1 part(s) x 8"
