"""Exported encoders give the same in the libraries they are written for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foveola import cli
from foveola.config import UserError
from foveola.exporting.export import export
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.predictor import PredictorConfig
from foveola.models.vit import ViTConfig
from foveola.zoo.load import load

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
    "no biases": replace(PLAIN, bias=False, final_norm_affine=False),
    "DINOv3": replace(PLAIN, positions="rope", rope="dinov3", norm_eps=1e-5, registers=2, layer_scale=0.1),
    "DINOv3, gated, other eps": replace(PLAIN, positions="rope", rope="dinov3", mlp="swiglu"),
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
        assert torch.allclose(getattr(back(images), part), getattr(made(images), part), atol=1e-5)
    assert back.config.transform == made.config.transform
    assert back.config.pool == made.config.pool


def test_timm_itself_loads_it(tmp_path: Path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    made = encoder(MODELS["gated, registers"])
    model = timm.create_model(f"local-dir:{export(made, tmp_path / 'out')}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(model(images), made(images).objects[:, 0], atol=1e-4)


CAPI = replace(
    PLAIN,
    positions="rope",
    rope="capi",
    norm="rms",
    bias=False,
    final_norm_affine=False,
    class_token=False,
    registers=4,
)
ROTARY = {
    "rotary": replace(PLAIN, positions="rope"),
    "CAPI": CAPI,
}


@pytest.mark.parametrize("name", [*MODELS, *ROTARY])
def test_a_file_of_tensors_is_ours_again(name: str, tmp_path: Path):
    options = {"predictor": PredictorConfig(depth=1), "pool": "predictor"} if name == "CAPI" else {}
    made = encoder((MODELS | ROTARY)[name], **options)
    images = torch.randn(2, 3, 64, 48)
    for out in ("weights.pth", "weights.safetensors"):
        back = load(export(made, tmp_path / out))
        assert back.config == made.config
        assert back.fingerprint() == made.fingerprint()
        for part in ("objects", "registers", "patches"):
            assert torch.equal(getattr(back(images), part), getattr(made(images), part))
    with pytest.raises(UserError, match=r"says all of itself: load it without \?heads=3"):
        load(f"{tmp_path}/weights.pth?heads=3")


def test_a_damaged_file_of_tensors_is_refused(tmp_path: Path):
    whole = torch.load(export(encoder(PLAIN), tmp_path / "weights.pth", "torch"), weights_only=True)
    for change, message in (
        ({"foveola": "{"}, "its settings are no JSON"),
        ({"foveola": "[" * 100_000}, "its settings are no JSON"),
        ({"foveola": "3"}, "lacks settings or tensors"),
        ({"state_dict": 3}, "lacks settings or tensors"),
        ({"foveola": whole["foveola"].replace('"depth": 2', '"depth": 3')}, r"lacks blocks\.2"),
        ({"foveola": whole["foveola"].replace('"depth": 2', '"depth": 100000000')}, "depth: .*1000"),
    ):
        torch.save(whole | change, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=message) as error:
            load(tmp_path / "wrong.pth")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_files_can_be_read_by_others_and_failures_leave_nothing(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip({"timm": "timm", "hf": "transformers"}[library], reason="it is not installed")
    (tmp_path / "other").touch()
    out = export(encoder(PLAIN), tmp_path / "out", library)
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "other").stat().st_mode}
    other = encoder(replace(PLAIN, norm_eps=0.5))
    monkeypatch.setattr("foveola.exporting.export.load_library", lambda name: other)
    with pytest.raises(UserError, match="gives other objects"):
        export(encoder(PLAIN), tmp_path / "again", library)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_squashed_images(tmp_path: Path):
    made = encoder(PLAIN, transform=replace(TRANSFORM, resize=64, squash=True, interpolation="bilinear"))
    for library, module in (("timm", "timm"), ("hf", "transformers")):
        pytest.importorskip(module, reason=f"{module} is not installed")
        back = load(f"{library}:{export(made, tmp_path / library, library)}")
        assert back.config.transform == made.config.transform


@pytest.mark.parametrize(
    ("config", "library", "message"),
    [
        (
            replace(PLAIN, positions="rope"),
            "timm",
            r"rotary positions that turn by \(row, column\) in 0 to 1, .*: timm has DINOv3's alone; format=",
        ),
        (
            CAPI,
            "hf",
            r"rotary positions that turn no pair .*\(CAPI's code\).*transformers has DINOv3's",
        ),
        (
            replace(MODELS["DINOv3"], class_token=False),
            "hf",
            "no class token, which transformers's",
        ),
        (replace(MODELS["DINOv3"], norm_eps=1e-4), "timm", "1e-6 or 1e-5 of DINOv3's network"),
        (replace(PLAIN, window=2, global_blocks=1), "hf", "windows of patches, which transformers's plain"),
        (replace(PLAIN, norm="rms"), "timm", "norm=rms, which timm's ViTs lack"),
        (replace(PLAIN, norm_eps=1e-3), "timm", "norm_eps=0.001"),
        (replace(PLAIN, class_token=False, registers=2), "hf", "no network without class token"),
        (replace(PLAIN, layer_scale=0.1, mlp_ratio=2.5), "hf", "whole mlp_ratio only, not 2.5"),
    ],
)
def test_what_they_do_not_express(config: ViTConfig, library: str, message: str, tmp_path: Path):
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
        ([str(folder), f"out={tmp_path}/w.safetensors", "format=torch"], f"out={tmp_path}/w.pth"),
        ([str(folder)], "needs out="),
        ([str(folder), "out=x", "fromat=hf"], "unknown key 'fromat'; did you mean 'format'?"),
        ([str(folder), f"out={tmp_path}/new", "format=onxx"], "safetensors; did you mean onnx?"),
        ([str(folder), f"out={tmp_path}/n.onnx", "format=hf"], "and format=hf writes a folder as out="),
        (
            [str(folder), f"out={tmp_path}/n.pth", "objects=true"],
            "objects=true has no effect on",
        ),
        ([str(folder), f"out={tmp_path}/n.pth", "licence=mit"], "licence= is for the model card"),
        (["out=x"], "which model"),
    ):
        assert cli.main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["export", "--help"]) == 0
    assert "safetensors, torch: for foveola.load" in capsys.readouterr().out
    state = torch.load(out, weights_only=True)["state_dict"]
    assert load_file(folder / "model.safetensors").keys() == state.keys()


def test_a_model_with_options_is_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("timm", reason="timm is not installed")
    out = tmp_path / "weights.pth"
    assert cli.main(["export", "timm:test_vit?pretrained=false", f"out={out}", "format=torch"]) == 0
    assert load(out).config.origin == "timm:test_vit?pretrained=false"
    assert cli.main(["export", str(tmp_path / "no.pth?heads=2"), f"out={tmp_path}/x"]) == 2
    assert "no model at" in capsys.readouterr().err
