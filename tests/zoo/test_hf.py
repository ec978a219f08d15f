"""Hugging Face's models give what they give in transformers; their preprocessing is theirs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveola.config import UserError
from foveola.models.encoder import Encoder
from foveola.zoo.load import load


def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", {}),
    "ViT without biases of q, k and v": ("ViT", {"qkv_bias": False}),
    "DINO's eps": ("ViT", {"layer_norm_eps": 1e-3}),
    "MAE": ("ViTMAE", {}),
    "MSN": ("ViTMSN", {}),
    "I-JEPA": ("IJepa", {}),
    "DINOv2": ("Dinov2", {}),
    "DINOv2, gated": ("Dinov2", {"use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "DINOv3": ("DINOv3ViT", {"num_register_tokens": 3}),
    "DINOv3, gated": ("DINOv3ViT", {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"}),
}


def create(kind: str, **options: Any) -> Any:
    """A small network, with weights large enough for every part to count."""
    library = transformers()
    torch.manual_seed(0)
    config = getattr(library, f"{kind}Config")(**SMALL | options)
    model = getattr(library, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save(model: Any, folder: Path, **settings: Any) -> str:
    """As `save_pretrained` writes it, with an image processor; the name to load it by."""
    model.save_pretrained(folder)
    kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(kind | settings))
    return f"hf:{folder}"


def outputs(model: Any, images: Tensor) -> Tensor:
    options = {}
    if model.config.model_type in ("vit", "vit_mae", "vit_msn", "ijepa"):
        options["interpolate_pos_encoding"] = True
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        options["noise"] = (
            torch.arange(images.shape[2] * images.shape[3] // 64).float().expand(len(images), -1)
        )
    with torch.no_grad():
        return model(images, **options).last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_transformers(name: str, tmp_path: Path):
    kind, options = MODELS[name]
    model = create(kind, **options)
    encoder = load(save(model, tmp_path))
    config = encoder.config
    token, registers = int(config.model.class_token), config.model.registers
    assert registers == options.get("num_register_tokens", 0)
    assert config.pool == ("token" if name != "I-JEPA" else "average")
    for size in ((64, 64), (40, 24), (72, 96)):
        images = torch.randn(2, 3, *size)
        theirs, ours = outputs(model, images), encoder(images)
        assert theirs.std() > 0.1
        assert (ours.patches - theirs[:, token + registers :]).abs().max() < 1e-4
        assert torch.allclose(ours.registers, theirs[:, token : token + registers], atol=1e-4)
        pooled = theirs[:, 0] if token else theirs.mean(dim=1)
        assert (ours.objects[:, 0] - pooled).abs().max() < 1e-4
    saved = load(encoder.save(tmp_path / "ours"))
    assert torch.equal(saved(images).objects, ours.objects)
    if token:
        objects = torch.ones(2, 1, 108, dtype=torch.bool)
        assert torch.equal(encoder(images, objects).objects, ours.objects)
        objects[:, :, 5:] = False
        assert (encoder(images, objects).objects - ours.objects).abs().max() > 1e-3


def test_a_classifier_is_loaded_without_its_head(tmp_path: Path):
    library = transformers()
    model = library.ViTForImageClassification(library.ViTConfig(**SMALL, num_labels=5)).eval()
    encoder = load(save(model, tmp_path))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(encoder(images).objects, model.vit(images).last_hidden_state[:, :1], atol=1e-4)


PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "squash": (
        {},
        {"resize": 64, "crop": 64, "squash": True, "interpolation": "bilinear", "mean": (0.5,) * 3},
    ),
    "crop": (
        {
            "image_processor_type": "BitImageProcessor",
            "size": {"shortest_edge": 72},
            "crop_size": {"height": 64, "width": 64},
            "resample": 3,
            "do_center_crop": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        {
            "resize": 72,
            "crop": 64,
            "squash": False,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
        },
    ),
    "as it is": ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_is_that_of_the_model(name: str, tmp_path: Path):
    import numpy as np

    settings, expected = PROCESSORS[name]
    encoder = load(save(create("ViT"), tmp_path, **settings))
    transform = encoder.config.transform
    assert {key: getattr(transform, key) for key in expected} == expected
    processor = transformers().AutoImageProcessor.from_pretrained(tmp_path)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 9), (144, 108), mode="bicubic")
    image = (smooth[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    assert (encoder.transform(image) - theirs).abs().max() < 0.03 / min(transform.std)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lanczos": ({"resample": 1}, r"preprocess=imagenet takes the usual"),
    "not square": ({"size": {"height": 64, "width": 32}}, r"preprocess=imagenet takes the usual"),
    "not scaled": ({"do_rescale": False}, r"preprocess=imagenet takes the usual"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_preprocessing_is_refused_or_replaced_on_request(name: str, tmp_path: Path):
    settings, message = WRONG[name]
    spec = save(create("ViT", image_size=224), tmp_path, **settings)
    with pytest.raises(UserError, match=message):
        load(spec)
    transform = load(f"{spec}?preprocess=imagenet").config.transform
    assert (transform.resize, transform.crop, transform.mean[0]) == (256, 224, 0.485)


def test_a_folder_without_preprocessing(tmp_path: Path):
    create("ViT", image_size=224).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no settings of an image processor") as error:
        load(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)
    assert isinstance(load(f"hf:{tmp_path}?preprocess=imagenet"), Encoder)


def test_torn_files_and_missing_tensors(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    spec = save(create("Dinov2"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in state if name.endswith("norm2.weight"))
    save_file(
        {name: v for name, v in state.items() if name != gone},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"lacks .*norm2.weight \(1 missing"):
        load(spec)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError) as error:
        load(spec)
    assert "\n" not in str(error.value)


WRAPPED: dict[str, tuple[str, dict[str, Any], str]] = {
    "DeiT": ("DeiT", {}, "is a 'deit'; converted are vit, vit_mae"),
    "quick GELU": ("ViT", {"hidden_act": "quick_gelu"}, "MLPs with 'quick_gelu', where our ViT has 'gelu'"),
    "a gate of tanh": ("DINOv3ViT", {"use_gated_mlp": True, "hidden_act": "tanh"}, "MLPs with 'tanh'"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_not_our_vit_is_wrapped(name: str, tmp_path: Path):
    kind, options, message = WRAPPED[name]
    model = create(kind, **options)
    encoder = load(save(model, tmp_path))
    images = torch.randn(1, 3, 64, 64)
    assert encoder.wrapped
    assert torch.equal(encoder(images).patches, outputs(model, images)[:, -64:])
    with pytest.raises(UserError, match=message) as error:
        encoder.attention(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("?preprocess=none", "expected own, official, imagenet"),
        ("?revison=main", "did you mean 'revision'"),
        ("/nowhere", "no folder"),
    ],
)
def test_wrong_names(options: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        load(f"hf:{tmp_path}{options}")


def test_an_empty_folder(tmp_path: Path):
    transformers()
    with pytest.raises(UserError) as error:
        load(f"hf:{tmp_path}")
    assert "\n" not in str(error.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"need transformers .*pip install 'foveola\[hf\]'"):
        load(f"hf:{tmp_path}")


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names as transformers 4 has them in a ViT."""
    old: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                old[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = third
            continue
        for ours, theirs in (
            ("blocks.", "encoder.layer."),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("cls_token", "embeddings.cls_token"),
        ):
            name = name.replace(ours, theirs)
        old["layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name] = value
    return old


def test_names_of_transformers_4():
    from foveola.models.vit import VisionTransformer, ViTConfig
    from foveola.zoo.hf_models import _plain_names

    state = dict(VisionTransformer(ViTConfig(width=48, depth=2, heads=3, image_size=64)).state_dict())
    del state["mask_token"]
    found = _plain_names(old_names(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
