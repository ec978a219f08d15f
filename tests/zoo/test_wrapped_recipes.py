"""Recipes of docs/encoders.md for networks that are wrapped: LOCA, data2vec."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveola
from foveola.zoo.load import load

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
PATCH, SIDE, WIDTH, HEADS, DEPTH = 8, 4, 12, 3, 2
SCENES = "scenes:?size=48&count=24&objects=1-2"


def loca_arrays() -> dict[str, np.ndarray]:
    """Random parameters by LOCA's names (scenic), the ones that its encoder lacks among them."""
    random, inner = np.random.default_rng(0), WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "ToTokenSequence_0/embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "ToTokenSequence_0/embedding/bias": (WIDTH,),
        "ToTokenSequence_0/posembed_input": (1, SIDE, SIDE, WIDTH),
        "encoder_norm/scale": (WIDTH,),
        "encoder_norm/bias": (WIDTH,),
        "cross_attention_block/MlpBlock_0/Dense_0/bias": (24,),
        "position_predictor/kernel": (WIDTH, SIDE**2),
    }
    for i in range(DEPTH):
        block = f"encoderblock_{i}"
        for norm in (0, 1):
            shapes |= {f"{block}/LayerNorm_{norm}/{kind}": (WIDTH,) for kind in ("scale", "bias")}
        for which in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_0/{which}/kernel"] = (WIDTH, HEADS, inner)
            shapes[f"{block}/MultiHeadDotProductAttention_0/{which}/bias"] = (HEADS, inner)
        shapes[f"{block}/MultiHeadDotProductAttention_0/out/kernel"] = (HEADS, inner, WIDTH)
        shapes[f"{block}/MultiHeadDotProductAttention_0/out/bias"] = (WIDTH,)
        for dense, (rows, columns) in enumerate(((WIDTH, 24), (24, WIDTH))):
            shapes[f"{block}/MlpBlock_0/Dense_{dense}/kernel"] = (rows, columns)
            shapes[f"{block}/MlpBlock_0/Dense_{dense}/bias"] = (columns,)
    return {name: (0.3 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def loca_in_float64(found: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """The tokens [N, D] of an image [H, W, 3], written down as flax computes them."""
    p = {name: array.astype(np.float64) for name, array in found.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * p[f"{name}/scale"] + p[f"{name}/bias"]

    tokens = []
    for row in range(SIDE):
        for column in range(SIDE):
            patch = image[PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
            token = np.einsum("hwc,hwcd->d", patch, p["ToTokenSequence_0/embedding/kernel"])
            place = p["ToTokenSequence_0/posembed_input"][0, row, column]
            tokens.append(token + p["ToTokenSequence_0/embedding/bias"] + place)
    x = np.stack(tokens)
    for i in range(DEPTH):
        block = f"encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            np.einsum("nd,dhe->hne", y, p[f"{attention}/{w}/kernel"]) + p[f"{attention}/{w}/bias"][:, None]
            for w in ("query", "key", "value")
        )
        score = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(WIDTH // HEADS))
        read = score / score.sum(-1, keepdims=True) @ v
        x = x + np.einsum("hne,hed->nd", read, p[f"{attention}/out/kernel"]) + p[f"{attention}/out/bias"]
        y = norm(x, f"{block}/LayerNorm_1")
        y = y @ p[f"{block}/MlpBlock_0/Dense_0/kernel"] + p[f"{block}/MlpBlock_0/Dense_0/bias"]
        y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + y @ p[f"{block}/MlpBlock_0/Dense_1/kernel"] + p[f"{block}/MlpBlock_0/Dense_1/bias"]
    return norm(x, "encoder_norm")


def test_the_recipe_of_loca_is_its_function_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("timm")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "class Loca" in block)
    (tmp_path / "loca_of_docs.py").write_text(code)
    found: dict[str, Any] = loca_arrays()
    np.savez(tmp_path / "loca.npz", **found)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    encoder = load(f"python:loca_of_docs:loca?image_size={PATCH * SIDE}")
    images = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(0))
    features = encoder(images)
    assert features.grid == (SIDE, SIDE)
    for image, patches in zip(images, features.patches, strict=True):
        expected = loca_in_float64(found, image.permute(1, 2, 0).double().numpy())
        np.testing.assert_allclose(patches.numpy(), expected, atol=3e-6)
    more = {"progress": False, "overlap": "allow"}
    for protocol, metric, settings in (("knn", "top1_plain", {}), ("linear", "top1_linear", {"epochs": 1})):
        made = foveola.evaluate(encoder, protocol, train=f"{SCENES}&seed=1", test=SCENES, **settings, **more)
        assert 0 <= made.metrics[metric] <= 100


def test_data2vec_of_transformers_is_converted_or_wrapped_with_its_numbers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Data2VecVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=24,
        image_size=PATCH * SIDE, patch_size=PATCH, use_relative_position_bias=True,
    )  # fmt: skip
    network = transformers.Data2VecVisionModel(config).eval()
    network.save_pretrained(tmp_path / "data2vec")
    encoder = load(f"hf:{tmp_path / 'data2vec'}?preprocess=imagenet")
    images = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(pixel_values=images).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(images).patches, expected, rtol=1e-4, atol=1e-5)
    more = {"progress": False, "overlap": "allow"}
    made = foveola.evaluate(encoder, "knn", train=f"{SCENES}&seed=1", test=SCENES, **more)
    assert 0 <= made.metrics["top1_plain"] <= 100
