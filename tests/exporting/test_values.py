"""Programs of encoders with a range take the values that files hold: the encoder reads the same files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveola.exporting.export import export
from foveola.exporting.program import write_program
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.zoo.load import load

SIDE = 32

CASES: dict[str, tuple[str, type, float, float]] = {  # range, kind of numbers, the least and the largest
    "12 bits": ("0-4095", np.uint16, 0, 4095),
    "signed": ("-1000-3000", np.int16, -1400, 3500),
    "floating point": ("0.25-0.75", np.float32, 0.2, 0.8),
    "each its own": ("0-4095,0-1023,100-200,0-10,0-65535", np.uint16, 0, 1000),
    "all of 16 bits": ("container", np.uint16, 0, 65535),
}


def encoder_of(values: str) -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=16, depth=2, heads=2, patch_size=8, image_size=SIDE, channels=5)
    statistics = {"mean": (0.1, 0.3, 0.5, 0.4, 0.2), "std": (0.25, 0.2, 0.3, 0.1, 0.25)}
    transform = TransformConfig(resize=SIDE, crop=SIDE, range=values, channels="5", **statistics)
    return Encoder(EncoderConfig(model=model, transform=transform))


def written(case: str, folder: Path) -> tuple[Encoder, list[Path], np.ndarray]:
    """An encoder, files, and what they hold, [n, C, H, W]."""
    values, kind, low, high = CASES[case]
    random, paths, held = np.random.default_rng(0), [], []
    for number in range(3):
        paths.append(folder / f"{number}.npy")
        held.append(random.uniform(low, high, (SIDE, SIDE, 5)).astype(kind))
        np.save(paths[-1], held[-1])
    return encoder_of(values), paths, np.stack(held).transpose(0, 3, 1, 2).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_values_of_files_go_in_as_they_are(case: str, tmp_path: Path) -> None:
    encoder, paths, images = written(case, tmp_path)
    wanted = encoder(torch.stack([encoder.transform(path) for path in paths]))
    path = export(encoder, tmp_path / "a.pt2")
    found = torch.export.load(path).module()(torch.from_numpy(images))
    for name, tensor in (("embedding", wanted.objects[:, 0]), ("patches", wanted.patches)):
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    back = load(path)
    assert back.fingerprint() == encoder.fingerprint()
    assert np.array_equal(back.embed(paths), encoder.embed(paths))


@pytest.mark.parametrize("case", ["12 bits", "each its own"])
def test_so_they_do_with_onnxruntime(case: str, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    runtime = pytest.importorskip("onnxruntime")
    encoder, paths, images = written(case, tmp_path)
    wanted = encoder(torch.stack([encoder.transform(path) for path in paths]))
    path = export(encoder, tmp_path / "a.onnx")
    session = runtime.InferenceSession(str(path))
    embedding, patches = session.run(["embedding", "patches"], {"images": images})
    np.testing.assert_allclose(embedding, wanted.objects[:, 0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(patches, wanted.patches, rtol=0, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map["images"]
    assert said.startswith(
        "float32 [batch, 5, height, width], 5 channels, values as files have them, from 0 "
    )
    back = load(path)
    np.testing.assert_allclose(back.embed(paths), encoder.embed(paths), rtol=0, atol=1e-4)


def test_files_of_earlier_versions_take_8_bits_and_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    encoder, paths, _ = written("12 bits", tmp_path)
    with monkeypatch.context() as earlier:
        earlier.setattr(TransformConfig, "value_ranges", None)
        files = [export(encoder, tmp_path / name) for name in ("a.onnx", "a.pt2")]
    for path, close in zip(files, (0.05, 1e-6), strict=True):  # of 8 bits: 1 / 510 of the range, over the std
        back = load(path)
        np.testing.assert_allclose(back.embed(paths), encoder.embed(paths), rtol=0, atol=close)


def test_what_the_files_state_is_said_and_other_scales_differ(tmp_path: Path) -> None:
    said = write_program(encoder_of("file"), tmp_path / "a.pt2")["images"]
    assert "fractions of the range that each file states, from 0 to 65535" in said
    encoder, _, images = written("12 bits", tmp_path)
    run = torch.export.load(export(encoder, tmp_path / "b.pt2")).module()
    whole, shares = (run(torch.from_numpy(each))["embedding"] for each in (images, images / 4095 * 255))
    assert not torch.allclose(whole, shares, atol=1e-2)


def test_a_folder_of_another_library_says_that_it_takes_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = ViTConfig(width=16, depth=1, heads=2, patch_size=8, image_size=SIDE)
    rgb = EncoderConfig(model=model, transform=TransformConfig(resize=SIDE, crop=SIDE, range="0-4095"))
    folder = export(Encoder(rgb), tmp_path / "timm", "timm")
    assert "# image: the range of the encoder" in (folder / "README.md").read_text()
    folder = export(encoder_of("0-4095"), tmp_path / "many", "timm")
    assert "# images: [B, 5, 32, 32] in [0, 1] of their range," in (folder / "README.md").read_text()


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("library", ["timm", "hf"])
@pytest.mark.parametrize("kind", ["plain", "registers", "DINOv3"])
def test_libraries_take_other_channels(kind: str, library: str, channels: int, tmp_path: Path) -> None:
    """The same features in timm and transformers, of the same normalised images."""
    module = pytest.importorskip({"timm": "timm", "hf": "transformers"}[library])
    more: dict[str, Any] = {"registers": {"registers": 2, "layer_scale": 0.1}, "plain": {}}.get(kind) or {}
    if kind == "DINOv3":
        more = {"positions": "rope", "rope": "dinov3", "norm_eps": 1e-5, "registers": 2, "layer_scale": 0.1}
    torch.manual_seed(0)
    model = ViTConfig(width=48, depth=2, heads=3, patch_size=8, image_size=SIDE, channels=channels, **more)
    mean, std = (0.1, 0.3, 0.5, 0.4, 0.2)[:channels], (0.25, 0.2, 0.3, 0.1, 0.25)[:channels]
    transform = TransformConfig(resize=SIDE, crop=SIDE, mean=mean, std=std, channels=str(channels))
    encoder = Encoder(EncoderConfig(model=model, transform=transform))
    out = export(encoder, tmp_path / "out", library)
    files = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, channels), np.uint8)
    images = torch.stack([encoder.transform(each) for each in files])
    wanted = encoder(images)
    if library == "timm":
        theirs = module.create_model(f"local-dir:{out}", pretrained=True).eval()
        with torch.no_grad():
            tokens = theirs.forward_features(images)
    else:
        theirs = module.AutoModel.from_pretrained(out)
        read = module.AutoImageProcessor.from_pretrained(out)
        given = read(list(files), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(given, images, rtol=0, atol=1e-5)
        with torch.no_grad():
            tokens = theirs(given).last_hidden_state
    skipped = 1 + wanted.registers.shape[1]
    torch.testing.assert_close(tokens[:, 0], wanted.objects[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens[:, skipped:], wanted.patches, rtol=0, atol=1e-5)
    back = load(f"{library}:{out}")
    assert back.config.transform == transform
    np.testing.assert_allclose(back.embed(list(files)), encoder.embed(list(files)), rtol=0, atol=1e-5)
    said = (out / "README.md").read_text()
    ways = {"timm": f"# images: [B, {channels}, 32, 32] in [0, 1],", "hf": f"[H, W, {channels}], 0 to 255"}
    assert ways[library] in said
