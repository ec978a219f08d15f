"""Runs that start from weights: their shapes, what is taken, what cannot be, and that nothing is lost."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveola.config import ConfigError, UserError
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.exporting.export import export
from foveola.files import RunFolder
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.training import checkpoint
from foveola.training.assemble import assemble
from foveola.training.dryrun import dry_run
from foveola.training.durations import plan
from foveola.training.recipe import RunConfig, resolve
from foveola.training.run import pretrain
from foveola.training.start import read_start
from foveola.zoo.load import load

CPU = torch.device("cpu")
SHAPE = ViTConfig(
    width=24, depth=2, heads=2, patch_size=8, image_size=32, registers=1, layer_scale=0.5, drop_path=0.0
)
TRANSFORM = TransformConfig(36, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
SOURCE = "scenes:?size=32&count=16&objects=2-3"
HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
NARROW = {"width": 16, "depth": 1, "heads": 2}
RECIPES: dict[str, dict[str, Any]] = {
    **{
        name: {"method.heads.main": HEAD}
        for name in ("dino-tiny-tinyimagenet", "ibot-tiny-tinyimagenet", "odis-tiny-tinyimagenet")
    },
    "dinov2-tiny-tinyimagenet": {"method.heads": {"main": HEAD, "patches": HEAD}},
    "posfield-tiny-tinyimagenet": {"method.heads": {"main": HEAD, "patches": HEAD, "positions": HEAD}},
    "capi-tiny-tinyimagenet": {"method.clustering.prototypes": 8, "method.predictor.depth": 1},
    "mae-tiny-tinyimagenet": {"method.decoder": NARROW},
    "ijepa-tiny-tinyimagenet": {"method.predictor": NARROW},
}
SMALL = {"data": SOURCE, "batch_size": 4, "device": "cpu", "loader.workers": 0, "duration": "2 steps"}


def network(config: ViTConfig = SHAPE, transform: TransformConfig = TRANSFORM, seed: int = 0) -> Encoder:
    """An encoder whose every part counts."""
    torch.manual_seed(seed)
    pool = "token" if config.class_token else "average"
    encoder = Encoder(EncoderConfig(config, transform, pool=pool))
    for value in encoder.backbone.state_dict().values():
        value += 0.1 * torch.randn_like(value)
    return encoder


@pytest.fixture(scope="module")
def of_hf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny DINOv2 with registers as Hugging Face keeps it."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("weights") / "hf"
    export(network(dataclasses.replace(SHAPE, position_antialias=True)), folder, "hf")
    return f"hf:{folder}"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """saved(positions="rope"): an encoder folder of such a shape."""

    def make(name: str = "weights", transform: TransformConfig = TRANSFORM, **changes: Any) -> str:
        config = dataclasses.replace(SHAPE, **changes)
        return str(network(config, transform).save(tmp_path / name))

    return make


def assembled(config: RunConfig) -> Any:
    """Trainer, and the weights that it started from."""
    start = read_start(str(config.init), config.model)
    return assemble(config, plan(config, 16), CPU, start), start


def batches(config: RunConfig) -> Iterator[Any]:
    with_objects = config.views.objects is not None
    return iter(Loader(open_source(SOURCE), config.batch_size, 0, config.loader, with_objects=with_objects))


def patches(backbone: VisionTransformer, images: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone.eval()(images).patches


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_starts_from_weights_and_takes_a_step(recipe: str, of_hf: str):
    config = resolve(recipe, {**SMALL, **RECIPES[recipe], "init": of_hf})
    assert config.model.shape == (24, 2, 2)
    assert config.model.class_token
    assert config.views.color.mean == config.encoder().transform.mean == TRANSFORM.mean
    assert config.views.color.std == config.encoder().transform.std == TRANSFORM.std
    assert config.model.drop_path == resolve(recipe).model.drop_path
    trainer, start = assembled(config)
    images, theirs = torch.randn(2, 3, 32, 32), load(of_hf)
    for network in trainer.method.trained():
        # A field of 4 x 4 nodes reads them with weights that are 0 and 1 but for rounding.
        close = 1e-5 if config.model.positions == "field" else 0.0
        assert (patches(network, images) - patches(theirs.backbone, images)).abs().max() <= close
    method = trainer.method.train()
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    trainer.step(plan(config, 16), batches(config).__next__)
    assert any(not torch.equal(value, before[name]) for name, value in method.named_parameters())
    told = "\n".join(start.close().lines())
    assert "taken as they are: " in told
    for name in theirs.backbone.state_dict():
        assert name.replace(".0.", ".*.").replace(".1.", ".*.") in told, name


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("dino", {"model.depth": 3}, r"^model.depth=3: the weights of init=\S+ have 2$"),
        ("dino", {"model.size": "base"}, r"^model.depth=12: the weights of init=\S+ have 2$"),
        ("dino", {"model.width": 32}, r"^model.width=32: the weights of init=\S+ have 24$"),
        ("dino", {"model.mlp": "swiglu"}, r"^model.mlp=swiglu: the weights of init=\S+ have gelu$"),
        ("dino", {"model.norm": "rms"}, r"^model.norm=rms: the weights"),
        ("dino", {"model.norm_eps": 1e-3}, r"^model.norm_eps=0.001: the weights of init=\S+ have 1e-06$"),
        ("dino", {"model.bias": False}, r"^model.bias=False: the weights"),
        ("mae", {"model.class_token": False}, r"^model.class_token=false: .* have a class token"),
        ("dino", {"model.registers": 0}, r"^model.registers=0: the weights of init=\S+ have 1, which"),
        ("dino", {"model.layer_scale": None}, r"^model.layer_scale=None: the weights of init=\S+ have it$"),
        (
            "dino",
            {"model.positions": "rope", "model.registers": 4},
            r"have learned: rotary positions .* are not mixed$",
        ),
        ("mae", {"model.positions": "sincos"}, r"^model.positions=sincos: .* table that was trained"),
        ("dino", {"model.position_offset": 0.1}, r"^model.position_offset=0.1: the weights"),
        ("dino", {"model.position_init": "sincos"}, r"^model.position_init has no effect: positions come"),
        (
            "dino",
            {"model.patch_size": 7, "views.global_size": 64},
            r"^views.global_size=64 is not a multiple of the patch size 7",
        ),
        ("dino", {"views.global_size": 60}, r"^views.global_size=60 is not a multiple of .* 8; try 56 or 64"),
    ],
)
def test_keys_that_contradict_the_weights(
    recipe: str, changes: dict[str, Any], message: str, saved: Callable[..., str]
):
    keys = {**SMALL, **changes, "init": saved()}
    with pytest.raises(ConfigError, match=message) as error:
        assembled(resolve(f"{recipe}-tiny-tinyimagenet", keys))
    assert "\n" not in str(error.value)


def test_a_key_of_the_weights_may_be_repeated(saved: Callable[..., str]):
    init = saved()
    keys = {"model.width": 24, "model.depth": 2, "model.norm_eps": 1e-6, "model.registers": 1}
    plain = resolve("dino-tiny-tinyimagenet", {**SMALL, "init": init})
    assert resolve("dino-tiny-tinyimagenet", {**SMALL, **keys, "init": init}).model.shape == plain.model.shape


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("weights=runs/x", r"^unknown key 'weights'; write init=runs/x, to start from weights$"),
        ("checkpoint=a.pth", r"^unknown key 'checkpoint'; write init=a.pth, to start from weights$"),
        ("teacher=a.pth", r"^unknown key 'teacher'; write init=a.pth, to start from weights$"),
        ("pretrained=x", r"^unknown key 'pretrained'; write init=x, to start from weights$"),
        ("model=hf:some/name", r"^model='hf:some/name'; write init=hf:some/name, to start from weights$"),
        ("init=/nowhere/x.pth", r"^init=/nowhere/x.pth: no model at /nowhere/x.pth: expected [^;]*$"),
    ],
)
def test_words_for_weights(word: str, message: str):
    with pytest.raises(UserError, match=message):
        resolve("ibot-vits16-in1k", [word])


def test_weights_that_are_none_are_one_line_before_anything_is_written(tmp_path: Path, saved):
    whole = Path(saved("whole"))
    cut = shutil.copytree(whole, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    swapped = shutil.copytree(whole, tmp_path / "swapped")
    shutil.copy(Path(saved("deep", depth=3)) / "model.safetensors", swapped)
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    for name in ("cut", "swapped", "foreign.pth"):
        out = tmp_path / "run"
        with pytest.raises(UserError, match=rf"^init=\S*{name}: ") as error:
            pretrain(
                "dino-tiny-tinyimagenet",
                init=str(tmp_path / name),
                out=str(out),
                **SMALL,
                **RECIPES["dino-tiny-tinyimagenet"],
            )
        assert "\n" not in str(error.value)
        assert not out.exists()


@pytest.mark.parametrize("recipe", ["ibot", "capi"])
def test_a_run_from_weights(recipe: str, tmp_path: Path, of_hf: str):
    """What is kept as step 0 is what was loaded; a run goes on without its weights, and ends the same."""
    name = f"{recipe}-tiny-tinyimagenet"
    weights = tmp_path / "weights"
    shutil.copytree(of_hf.removeprefix("hf:"), weights)
    keys = {**SMALL, **RECIPES[name], "init": f"hf:{weights}", "checkpoint_every": "1 steps", "keep": 9}
    run = pretrain(name, out=str(tmp_path / "whole"), **keys)
    folder = RunFolder(run.folder)
    begun = load(folder.saved_encoder(0).path)
    images = torch.randn(2, 3, 32, 32)
    theirs = load(of_hf)
    assert torch.equal(patches(begun.backbone, images), patches(theirs.backbone, images))
    assert not torch.equal(patches(load(run.folder).backbone, images), patches(theirs.backbone, images))
    log = folder.log.read_text()
    assert f"starting weights hf:{weights}: " in log
    assert "taken as they are: cls_token, reg_token" in log
    assert "fresh: " in log

    part = tmp_path / "part"
    shutil.copytree(run.folder, part)
    shutil.rmtree(RunFolder(part).checkpoint(2))
    shutil.rmtree(weights)
    ended = pretrain(name, out=str(part), **keys)
    assert ended.finished
    states = [checkpoint.read_checkpoint(checkpoint.newest(f))["trainer"] for f in (run.folder, part)]
    assert states[0]["method"].keys() == states[1]["method"].keys()
    for key, value in states[0]["method"].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, states[1]["method"][key]), key
    assert "taken as they are" not in RunFolder(part).log.read_text().split("going on after step 1")[1]
    # The saved configuration says all: it goes on without weights, too, and does not begin without them.
    assert pretrain(part / "config.yaml", out=str(part)).finished
    with pytest.raises(UserError, match=rf"^init=hf:{weights}: "):
        pretrain(part / "config.yaml", out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_run_whose_weights_are_gone_is_named(
    saved: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    init, keys = saved(), {**SMALL, **RECIPES["dino-tiny-tinyimagenet"]}
    run = pretrain("dino-tiny-tinyimagenet", init=init, **keys)
    shutil.rmtree(init)
    with pytest.raises(
        UserError, match=rf"{run.folder} began with it, .*: foveola pretrain {run.folder}/config"
    ):
        pretrain("dino-tiny-tinyimagenet", init=init, **keys)
    assert pretrain(run.folder / "config.yaml", out=str(run.folder)).finished


def test_a_dry_run_says_what_is_transferred(saved: Callable[..., str], tmp_path: Path):
    init = saved()
    config = resolve(
        "dino-tiny-tinyimagenet", {**SMALL, **RECIPES["dino-tiny-tinyimagenet"], "init": init, "data": None}
    )
    text = dry_run(config)
    assert f"starting weights  {init}" in text
    assert "fresh: heads.main (the file has none)" in text


def test_views_of_a_recipe_become_whole_patches(saved: Callable[..., str]):
    init = saved(patch_size=14, image_size=56, transform=TransformConfig(64, 56))
    with pytest.warns(
        UserWarning, match=r"views.local_size=98 instead of the recipe's 96: whole patches of 14"
    ):
        config = resolve("ibot-vits16-in1k", {"init": init})
    assert (config.views.global_size, config.views.local_size) == (224, 98)
    assert (config.model.patch_size, config.model.image_size) == (14, 56)
    with pytest.warns(UserWarning, match=r"views.global_size=70"):
        config = resolve("dino-tiny-tinyimagenet", {"init": init})
    assert (config.transform.resize, config.transform.crop) == (70, 70)
    with pytest.raises(ConfigError, match=r"views.local_size=96 is not a multiple .* 14; try 84 or 98"):
        resolve("ibot-vits16-in1k", {"init": init, "views.local_size": 96})


def test_what_a_recipe_says_beside_its_init_is_meant(saved: Callable[..., str], tmp_path: Path):
    init = saved()
    (tmp_path / "mine.yaml").write_text(
        f"base: dino-tiny-tinyimagenet\ninit: {init}\nmodel: {{registers: 3, drop_path: 0.2}}\n"
        "views: {color: {mean: [0.1, 0.1, 0.1]}}\n"
    )
    config = resolve(tmp_path / "mine.yaml")
    assert (config.model.registers, config.model.drop_path, config.model.width) == (3, 0.2, 24)
    assert config.views.color.mean == (0.1, 0.1, 0.1)
    assert config.views.color.std == TRANSFORM.std
    assert config.transform is not None
    assert config.transform.mean == (0.1, 0.1, 0.1)
    again = resolve(tmp_path / "mine.yaml", {"init": None})
    assert again.model.width == 96


def official(config: ViTConfig) -> dict[str, Tensor]:
    """The tensors of a network as such files hold them."""
    return {k: v for k, v in network(config).backbone.state_dict().items() if k != "mask_token"}


@pytest.mark.parametrize("kind", ["DINO", "I-JEPA", "timm's names", "torch", "timm", "RoPE"])
def test_starting_from_a_file_is_loading_it(kind: str, tmp_path: Path, saved: Callable[..., str]):
    """Student and teacher see an image as `foveola.load` does, whatever the weights are kept in."""
    plain = dataclasses.replace(SHAPE, registers=0, layer_scale=None)
    init, recipe = f"{tmp_path}/file.pth?heads=2", "ibot-tiny-tinyimagenet"
    if kind == "DINO":
        torch.save({"teacher": {f"backbone.{k}": v for k, v in official(plain).items()}}, init[:-8])
    elif kind == "I-JEPA":
        state = official(dataclasses.replace(plain, class_token=False))
        torch.save({"target_encoder": {f"module.{k}": v for k, v in state.items()}}, init[:-8])
        recipe = "ijepa-tiny-tinyimagenet"
    elif kind == "timm's names":
        torch.save(
            official(plain) | {"head.weight": torch.zeros(9, 24), "head.bias": torch.zeros(9)}, init[:-8]
        )
        init += "&preprocess=half"
    elif kind == "torch":
        init = str(export(saved(), tmp_path / "exported.pth", "torch"))
    elif kind == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
        init = f"timm:{export(saved(position_antialias=True), tmp_path / 'timm', 'timm')}"
    else:
        init, recipe = saved(positions="rope", registers=4), "capi-tiny-tinyimagenet"
    config = resolve(recipe, {**SMALL, **RECIPES[recipe], "init": init})
    trainer, start = assembled(config)
    theirs, images = load(init), torch.randn(2, 3, 48, 64)
    assert config.views.color.mean == theirs.config.transform.mean
    if kind == "timm's names":
        assert config.views.color.std == (0.5, 0.5, 0.5)
        assert start.close().unused == ["head.weight", "head.bias"]
    for each in trainer.method.trained():
        assert torch.equal(patches(each, images), patches(theirs.backbone, images))


def test_a_class_token_is_added_where_the_method_needs_one(saved: Callable[..., str]):
    init = saved(class_token=False)
    for recipe, there in (("dino-tiny-tinyimagenet", True), ("mae-tiny-tinyimagenet", False)):
        config = resolve(recipe, {**SMALL, **RECIPES[recipe], "init": init})
        assert config.model.class_token == there
        _, start = assembled(config)
        assert ("cls_token" in start.account.fresh) == there


def test_patches_and_positions_of_other_sizes(saved: Callable[..., str]):
    init, keys = saved(), {**SMALL, **RECIPES["dino-tiny-tinyimagenet"]}
    config = resolve("dino-tiny-tinyimagenet", {**keys, "init": init, "model.patch_size": 16})
    assert (config.model.patch_size, config.model.image_size) == (16, 64)  # the same table
    trainer, start = assembled(config)
    assert torch.equal(trainer.method.backbone.pos_embed, load(init).backbone.pos_embed)
    assert "resampled from patches of 8 to 16 pixels (pseudo-inverse)" in start.account.line()
    trainer.step(plan(config, 16), batches(config).__next__)
    config = resolve("dino-tiny-tinyimagenet", {**keys, "init": init, "model.image_size": 64})
    assert assembled(config)[0].method.backbone.pos_embed.shape == (1, 65, 24)


RANKS = """
import sys
import torch
from foveola import distributed
from foveola.training.recipe import resolve
from foveola.training.run import pretrain
run = pretrain("dino-tiny-tinyimagenet", init=sys.argv[1], out=sys.argv[2], data=sys.argv[3], batch_size=4,
    device="cpu", duration="2 steps", **{"loader.workers": 0, "method.heads.main.prototypes": 16})
print(run.finished)
"""


def test_two_processes_start_from_the_same_weights(saved: Callable[..., str], tmp_path: Path, run_ranks):
    init, out = saved(), tmp_path / "run"
    assert [text.splitlines()[-1] for text in run_ranks(RANKS, words=[init, str(out), SOURCE])] == [
        "True"
    ] * 2
    images = torch.randn(2, 3, 32, 32)
    begun = load(f"{out}?step=0")
    assert torch.equal(patches(begun.backbone, images), patches(load(init).backbone, images))
    assert RunFolder(out).log.read_text().count("starting weights, taken") == 1


def test_an_encoder_of_such_a_run_learns_and_is_frozen_as_any(saved: Callable[..., str], tmp_path: Path):
    keys = {**SMALL, **RECIPES["dino-tiny-tinyimagenet"], "duration": "1 steps"}
    run = pretrain("dino-tiny-tinyimagenet", init=saved(), out=str(tmp_path / "run"), **keys)
    images = torch.randn(2, 3, 64, 64)
    frozen = load(run.folder)
    assert not frozen(images).objects.requires_grad
    with torch.inference_mode():
        frozen(images)
    learning = load(run.folder, trainable=True)
    learning(images).objects.sum().backward()
    assert learning.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
