"""ONNX files: onnxruntime gives the network's numbers; what differs or is of others is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import foveola
from foveola.config import UserError
from foveola.exporting import onnx_file
from foveola.exporting.export import export
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.predictor import PredictorConfig
from foveola.models.shape import ViTConfig
from foveola.zoo.load import load

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def encoder_of(pool: Any, **shape: Any) -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=24, depth=1, heads=2, patch_size=8, image_size=32, **shape)
    predictor = PredictorConfig(depth=1) if pool == "predictor" else None
    made = Encoder(EncoderConfig(model, TransformConfig(36, 32), pool=pool, predictor=predictor))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


@pytest.fixture(scope="module")
def capi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Path]:
    """An encoder as CAPI's, and a folder with its ONNX file."""
    shape = {"positions": "rope", "rope": "capi", "registers": 4, "norm": "rms", "bias": False}
    encoder = encoder_of("predictor", class_token=False, final_norm_affine=False, **shape)
    return encoder, export(encoder, tmp_path_factory.mktemp("onnx") / "capi", "onnx", licence="mit")


def noise(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_a_rotary_encoder_with_its_predictor_at_any_size(capi: tuple[Encoder, Path]):
    encoder, folder = capi
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.onnx"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    for count, height, width in ((1, 32, 32), (4, 24, 64)):
        images = noise(count, 3, height, width)
        embedding, patches = session.run(["embedding", "patches"], {"images": images.numpy()})
        features = encoder(encoder.normalise(images))
        np.testing.assert_allclose(embedding, features.objects[:, 0], rtol=0, atol=1e-4)
        np.testing.assert_allclose(patches, features.patches, rtol=0, atol=1e-4)
    said = session.get_modelmeta().custom_metadata_map
    assert said["resized"].startswith("the shorter side to 36 pixels (bicubic, antialiased)")
    about = json.loads(said["foveola"])
    assert about["opset"] == 20
    assert about["transform"]["mean"] == list(encoder.config.transform.mean)


def test_it_is_an_encoder_of_features_again_with_the_same_k_nn(capi: tuple[Encoder, Path]):
    encoder, folder = capi
    back = load(folder)
    assert back.config.transform == encoder.config.transform
    images = encoder.normalise(noise(3, 3, 32, 32))
    torch.testing.assert_close(back(images).objects, encoder(images).objects, rtol=0, atol=1e-4)
    torch.testing.assert_close(back(images).patches, encoder(images).patches, rtol=0, atol=1e-4)
    data = {"train": "scenes:?size=40&count=24", "test": "scenes:?size=40&count=16&split=test"}
    settings: dict[str, Any] = {"masks": False, "workers": 0, "progress": False}
    found, wanted = (foveola.evaluate(each, "knn", **data, **settings) for each in (back, encoder))
    assert found.metrics.keys() == wanted.metrics.keys()
    for name, value in wanted.metrics.items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    with pytest.raises(UserError, match="wrapped"):
        export(back, folder.parent / "again.onnx")


def test_masks_are_a_second_input_and_a_difference_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder, out = encoder_of("token", registers=2, position_offset=0.1), tmp_path / "masks.onnx"
    export(encoder, out, objects=True)
    session = onnxruntime.InferenceSession(str(out))
    masks, images = np.random.default_rng(0).random((2, 3, 6, 4)) < 0.3, noise(2, 3, 48, 32)
    (found,) = session.run(["objects"], {"images": images.numpy(), "masks": masks})
    wanted = encoder.tokens(encoder.normalise(images), torch.from_numpy(masks).flatten(2))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert not np.allclose(found[0, 0], found[0, 1], atol=1e-3)
    with pytest.raises(UserError, match="has masks as a second input"):
        load(out)

    class Off:
        def run(self, names: Any, given: Any) -> list[np.ndarray]:
            return [each + 3e-4 * np.abs(each).max() for each in session.run(names, given)]

    traced = onnx_file.trace(encoder, True)
    monkeypatch.setattr(onnx_file, "trace", lambda *_: traced)
    file = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), save=lambda path, **_: Path(path).touch()
    )
    monkeypatch.setattr(onnx_file.torch.onnx, "export", lambda *_, **__: file)
    monkeypatch.setattr(onnx_file, "onnx_session", lambda path: Off())
    with pytest.raises(
        UserError, match="the ONNX file gives other numbers than the network: embedding differs"
    ):
        export(encoder, tmp_path / "other.onnx", objects=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.onnx"]


def test_files_of_others_and_damaged_ones_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    (tmp_path / "damaged.onnx").write_bytes(b"ONNX")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", [value], [other])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "other.onnx")
    for name, message in (("damaged", "no readable ONNX file"), ("other", "that foveola did not write")):
        with pytest.raises(UserError, match=message) as error:
            load(tmp_path / f"{name}.onnx")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"load it without \?heads=2"):
        load(f"{tmp_path}/other.onnx?heads=2")
    monkeypatch.setattr(onnx_file, "ONNX_BYTES", 100)
    with pytest.raises(UserError, match=r"an ONNX file holds 2 GB, .*: format=program"):
        export(encoder_of("token"), tmp_path / "large.onnx")
