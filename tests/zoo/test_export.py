"""Exported encoders give the same in the libraries they are written for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foveola import cli
from foveola.config import UserError
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig, load
from foveola.models.vit import ViTConfig
from foveola.zoo.export import export

PLAIN = ViTConfig(width=48, depth=2, heads=3, patch_size=8, image_size=64, drop_path=0.0)
TRANSFORM = TransformConfig(resize=73, crop=64, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
MODELS = {
    "plain": PLAIN,
    "DINO, resized": replace(PLAIN, image_size=48, position_offset=0.1),
    "registers": replace(PLAIN, registers=3),
    "LayerScale": replace(PLAIN, layer_scale=0.1),
    "gated, registers": replace(PLAIN, registers=2, layer_scale=0.1, mlp="swiglu"),
    "sines": replace(PLAIN, positions="sincos"),
    "field": replace(PLAIN, positions="field", field_size=(5, 7)),
    "no class token": replace(PLAIN, class_token=False),
}


def encoder(config: ViTConfig, **options: Any) -> Encoder:
    torch.manual_seed(0)
    pool = "token" if config.class_token else "average"
    made = Encoder(EncoderConfig(**({"model": config, "transform": TRANSFORM, "pool": pool} | options)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("library", ["timm", "hf"])
def test_there_and_back(library: str, name: str, tmp_path: Path):
    pytest.importorskip({"timm": "timm", "hf": "transformers"}[library], reason=f"{library} is not installed")
    made = encoder(MODELS[name])
    back = load(f"{library}:{export(made, tmp_path / 'out', library)}")
    images = torch.randn(2, 3, 64, 64)
    for part in ("objects", "registers", "patches"):
        assert torch.allclose(getattr(back(images), part), getattr(made(images), part), atol=1e-4)
    assert back.config.transform == made.config.transform
    assert back.config.pool == made.config.pool


def test_timm_itself_loads_it(tmp_path: Path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    made = encoder(MODELS["gated, registers"])
    model = timm.create_model(f"local-dir:{export(made, tmp_path / 'out')}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(images), made(images).objects[:, 0], atol=1e-4)


def test_a_file_of_tensors_is_ours_again(tmp_path: Path):
    made = encoder(ViTConfig(size="tiny", depth=1, patch_size=8, image_size=64, drop_path=0.0))
    back = load(export(made, tmp_path / "weights.pth", "torch"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(back(images).objects, made(images).objects, atol=1e-5)


def test_squashed_pictures(tmp_path: Path):
    made = encoder(PLAIN, transform=replace(TRANSFORM, resize=64, squash=True, interpolation="bilinear"))
    for library, module in (("timm", "timm"), ("hf", "transformers")):
        pytest.importorskip(module, reason=f"{module} is not installed")
        back = load(f"{library}:{export(made, tmp_path / library, library)}")
        assert back.config.transform == made.config.transform


@pytest.mark.parametrize(
    ("config", "library", "message"),
    [
        (replace(PLAIN, positions="rope"), "timm", "rotary positions"),
        (replace(PLAIN, norm="rms"), "torch", "norm=rms"),
        (replace(PLAIN, norm_eps=1e-3), "timm", "norm_eps=0.001"),
        (replace(PLAIN, class_token=False, registers=2), "hf", "no network without class token"),
        (replace(PLAIN, layer_scale=0.1, mlp_ratio=2.5), "hf", "whole mlp_ratio only, not 2.5"),
    ],
)
def test_what_they_do_not_express(config: ViTConfig, library: str, message: str, tmp_path: Path):
    if library != "torch":
        pytest.importorskip({"timm": "timm", "hf": "transformers"}[library], reason="it is not installed")
    with pytest.raises(UserError, match=message):
        export(encoder(config), tmp_path / "out", library)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = encoder(PLAIN).save(tmp_path / "encoder")
    out = tmp_path / "weights.pth"
    assert cli.main(["export", str(folder), f"out={out}", "format=torch"]) == 0
    assert str(out) in capsys.readouterr().out
    for arguments, message in (
        ([str(folder), f"out={out}", "format=torch"], "exists"),
        ([str(folder)], "needs out="),
        ([str(folder), "out=x", "fromat=hf"], "unknown key 'fromat'"),
        ([str(folder), f"out={tmp_path}/new", "format=onnx"], "expected timm, hf, torch"),
        (["out=x"], "which model"),
    ):
        assert cli.main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["export", "--help"]) == 0
    assert "tensors by timm's names" in capsys.readouterr().out
    assert load_file(folder / "model.safetensors").keys() >= torch.load(out, weights_only=True).keys()
