"""Wrapped networks: what they give, what protocols make of it, and what is refused."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foveola
from foveola.config import UserError
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.models.wrapped import ImageTokens
from foveola.training.start import read_start
from foveola.zoo.load import load

TRANSFORM = TransformConfig(resize=32, crop=32)
SCENES = "scenes:?size=48&count=24&objects=1-2"


class Convolution(nn.Module):
    """A map of features of 8 x 8 pixels each."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, width, 8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).relu()


class Pooling(Convolution):
    """The same with a special token, and a maximum that stands for an image."""

    def forward(self, images: Tensor) -> Any:
        x = super().forward(images)
        tokens = torch.cat((torch.zeros(len(x), 1, x.shape[1]), x.flatten(2).mT), dim=1)
        return ImageTokens(tokens, (x.shape[2], x.shape[3]), x.amax(dim=(2, 3)))


def images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_a_map_becomes_patches_and_their_mean():
    module = Convolution()
    encoder = foveola.wrap(module, "mine", TRANSFORM)
    features = encoder(images())
    expected = module(images())
    assert features.grid == (4, 4) == encoder.grid
    for row in range(4):
        for column in range(4):
            assert torch.equal(features.patches[:, 4 * row + column], expected[:, :, row, column])
    torch.testing.assert_close(features.objects[:, 0], expected.mean(dim=(2, 3)))
    assert (encoder.config.pool, encoder.patch_size, encoder.width) == ("average", 8, 12)
    half = torch.zeros(2, 1, 16, dtype=torch.bool)
    half[..., :8] = True
    torch.testing.assert_close(encoder.tokens(images(), half)[:, 0], expected[:, :, :2].mean(dim=(2, 3)))
    assert encoder(images(1, 24, 40)).grid == (3, 5)


def test_a_pooled_vector_stands_for_an_image():
    module = Pooling()
    encoder = foveola.wrap(module, "mine", TRANSFORM)
    assert torch.equal(encoder(images()).objects[:, 0], module(images()).pooled)
    assert torch.equal(encoder(images()).patches, module(images()).tokens[:, 1:])
    average = encoder.pooled("average")
    torch.testing.assert_close(average(images()).objects[:, 0], module(images()).tokens[:, 1:].mean(dim=1))
    half = torch.ones(2, 1, 16, dtype=torch.bool)
    with pytest.raises(
        UserError, match=r"reads an object alone \(pool=average takes means\) .*mine is wrapped"
    ):
        encoder.tokens(images(), half)
    assert average.tokens(images(), half).shape == (2, 1, 12)


def test_fingerprints_are_of_weights_and_names():
    first = foveola.wrap(Convolution(), "mine", TRANSFORM)
    assert first.fingerprint() == foveola.wrap(Convolution(), "mine", TRANSFORM).fingerprint()
    other = Convolution()
    other.conv.bias.data[0] += 1e-3
    assert first.fingerprint() != foveola.wrap(other, "mine", TRANSFORM).fingerprint()
    assert first.fingerprint() != foveola.wrap(Convolution(), "yours", TRANSFORM).fingerprint()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda e, folder: e.attention(images()), "attention"),
        (lambda e, folder: e.capture(images(), attention=True), "attention"),
        (lambda e, folder: e.layers(images(), 2), "output of an earlier block"),
        (lambda e, folder: e.visit(images(), lambda *_: None), "attention"),
        (lambda e, folder: e.save(folder), "an encoder folder"),
        (lambda e, folder: foveola.export(e, folder / "x.pth", "torch"), "export"),
        (lambda e, folder: foveola.analyze_attention(e, SCENES), "attention"),
        (lambda e, folder: foveola.evaluate(e, "localisation", test=SCENES), "attention"),
        (lambda e, folder: foveola.visualize("attention", e, SCENES, out=folder), "needs the inside"),
        (lambda e, folder: foveola.visualize("positions", e, SCENES, out=folder), "pos_field"),
    ],
)
def test_the_inside_is_refused_in_one_line(use, message: str, tmp_path: Path):
    encoder = foveola.wrap(Pooling(), "mine", TRANSFORM, "it is a convolution")
    with pytest.raises(UserError, match=message) as error:
        use(encoder, tmp_path)
    assert "mine is wrapped (it is a convolution)" in str(error.value)
    assert "\n" not in str(error.value)


PROTOCOLS: dict[str, dict[str, Any]] = {
    "knn": {"k": (3,)},
    "logistic": {},
    "label_free": {"pool": "average"},
    "retrieval": {"pool": "average"},
    "linear": {"epochs": 1},
    "attentive": {"epochs": 1},
    "abmilp": {"epochs": 1},
}


@pytest.mark.parametrize("kind", [Convolution, Pooling])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_that_need_features_alone(protocol: str, kind, capsys):
    encoder = foveola.wrap(kind(), "mine", TRANSFORM)
    views = protocol in ("label_free", "retrieval")
    data = {"test": SCENES} if views else {"train": SCENES + "&seed=1", "test": SCENES}
    more = PROTOCOLS[protocol] | {"progress": False, "overlap": "allow"}
    result = foveola.evaluate(encoder, protocol, **data, **more)
    assert result.metrics
    assert result.encoder == encoder.fingerprint()


def test_a_module_by_its_importable_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "from torch import nn\nnetwork = nn.Conv2d(3, 5, 16, stride=16)\nclass Made(nn.Conv2d):\n"
    text += "    def __init__(self):\n        super().__init__(3, 5, 16, stride=16)\nnumber = 3\n"
    (tmp_path / "module_of_mine.py").write_text(text + "def broken():\n    raise ValueError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    encoder = load("python:module_of_mine:Made?image_size=64&preprocess=half")
    assert (encoder.grid, encoder.config.transform.mean[0], encoder.width) == ((4, 4), 0.5, 5)
    assert (
        encoder.fingerprint()
        == load("python:module_of_mine:Made?image_size=64&preprocess=half").fingerprint()
    )
    assert load("python:module_of_mine:network").grid == (14, 14)
    for name, message in (
        ("python:module_of_mine", "expected python:my_module:my_encoder"),
        ("python:module_of_mine:Mad", "did you mean 'Made'"),
        ("python:module_of_mine:number", "not a torch module"),
        ("python:module_of_mine:broken", "fails when made: ValueError: no"),
        ("python:module_of_mine:Made?size=3", "unknown option 'size'"),
        ("python:module_of_mine:Made?image_size=60", "do not fill it with squares"),
        ("python:module_of_mine:Made?preprocess=x", "expected imagenet, half"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)
    del sys.modules["module_of_mine"]


class Wrong(nn.Module):
    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: Tensor) -> Any:
        return self.found(images) if callable(self.found) else self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.zeros(1, 5), r"gives a Tensor of shape \(1, 5\): expected a map"),
        (ImageTokens(torch.zeros(1, 3, 5), (2, 2)), "grid of 2 x 2 patches"),
        (ImageTokens(torch.zeros(1, 4, 5), (2, 2), torch.zeros(1, 6)), "the same width"),
        (torch.full((1, 2, 2, 2), torch.nan), "not finite"),
        (torch.zeros(1, 2, 2, 4), "2 x 4 patches .* do not fill it"),
        (lambda x: 1 / 0, "fails on an image of 32 x 32 pixels: division by zero"),
    ],
)
def test_modules_that_do_not_keep_the_contract(found, message: str):
    with pytest.raises(UserError, match=message):
        foveola.wrap(Wrong(found), "mine", TRANSFORM)


# -- libraries -----------------------------------------------------------------------------------------------

TIMM = {  # name, options of timm, special tokens, whether a pooled vector stands for an image
    "convnext_atto": ({}, 0, True),
    "resnet10t": ({}, 0, True),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1), "embed_dim": 24, "num_heads": (1, 2)}, 0, True),
    "vit_base_patch16_clip_224": ({"depth": 1, "embed_dim": 48, "num_heads": 3}, 1, True),
    "vit_base_patch16_siglip_224": ({"depth": 1, "embed_dim": 48, "num_heads": 3}, 0, True),
    "eva02_tiny_patch14_224": ({"depth": 1}, 1, True),
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name: str, tmp_path: Path):
    timm = pytest.importorskip("timm")
    options, special, pooled = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=options, safe_serialization=True)
    size = "?image_size=64" if name == "resnet10t" else ""  # 176 pixels are no whole cells of 32
    encoder = load(f"timm:{tmp_path}{size}")
    side = encoder.config.transform.crop
    with torch.no_grad():
        x = images(1, side, side)
        found, pool = (
            model.forward_features(x),
            model.forward_head(model.forward_features(x), pre_logits=True),
        )
    if found.ndim == 4:
        found = found.flatten(1, 2) if found.shape[3] == model.num_features else found.flatten(2).mT
    torch.testing.assert_close(encoder(x).patches, found[:, special:])
    assert encoder.wrapped
    if pooled:
        torch.testing.assert_close(encoder(x).objects[:, 0], pool)
    data = timm.data.resolve_model_data_config(model)
    assert encoder.config.transform.mean == data["mean"]
    assert size or side == data["input_size"][1]
    with pytest.raises(UserError, match="is wrapped"):
        encoder.attention(x)


HF: dict[str, tuple[str, dict[str, Any], int]] = {
    "CLIP": ("CLIPVision", {}, 1),
    "SigLIP": ("SiglipVision", {}, 0),
    "ConvNeXt": ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 0),
    "ResNet": ("ResNet", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}, 0),
    "Swin": ("Swin", {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}, 0),
    "AIMv2": ("Aimv2Vision", {}, 0),
}


@pytest.mark.parametrize("name", HF)
def test_networks_of_transformers(name: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    kind, options, special = HF[name]
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 64}
    usual = {} if "depths" in options else shape | {"patch_size": 8}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**({"image_size": 32} | usual | options))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    encoder = load(f"hf:{tmp_path}?preprocess=imagenet&image_size=32")
    with torch.no_grad():
        found = model(pixel_values=images())
    x = found.last_hidden_state
    x = x.flatten(2).mT if x.ndim == 4 else x
    torch.testing.assert_close(encoder(images()).patches, x[:, special:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(images()).objects[:, 0], found.pooler_output.flatten(1))


class Reading(nn.Module):
    """A block of a ViT of ours as somebody else's module: its tokens, and its attention by hand."""

    def __init__(self, encoder, registers: int) -> None:
        super().__init__()
        self.network, self.registers = encoder.backbone, registers

    def forward(self, x: Tensor) -> foveola.ImageTokens:
        found = self.network(x)
        tokens = torch.cat((found.objects, found.registers, found.patches), dim=1)
        hidden, layout = self.network.prepare(x)
        for block in self.network.blocks[:-1]:
            hidden = block(hidden, *layout.reading)
        block = self.network.blocks[-1]
        query, key, _ = block.attn.qkv(block.norm1(hidden)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        return foveola.ImageTokens(tokens, found.grid, found.objects[:, 0], weights)


def test_attention_that_a_module_gives_is_read_as_that_of_our_own(tmp_path: Path):
    """Rows, analysis and protocols of attention are those of the same network, converted."""
    torch.manual_seed(1)
    shape = ViTConfig(width=12, depth=2, heads=2, patch_size=8, image_size=32, registers=3, drop_path=0.0)
    ours = Encoder(EncoderConfig(shape, TRANSFORM)).eval()
    for parameter in ours.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    wrapped = foveola.wrap(Reading(ours, 3), "mine", TRANSFORM)
    mine, theirs = (each.attention(images(2, 32, 48)) for each in (ours, wrapped))
    assert (theirs.special, theirs.grid, theirs.shape) == (mine.special, mine.grid, mine.shape)
    torch.testing.assert_close(theirs.objects(), mine.objects())
    torch.testing.assert_close(theirs.centre(), mine.centre())
    torch.testing.assert_close(theirs.received(), mine.received())
    some = torch.tensor([[0, 5], [7, 1]])
    torch.testing.assert_close(theirs.patches(some), mine.patches(some))
    settings = {"progress": False, "workers": 0}
    both = [foveola.evaluate(e, "localisation", test=SCENES, **settings).metrics for e in (ours, wrapped)]
    assert both[1] == pytest.approx(both[0], rel=1e-4)
    found = [foveola.analyze_attention(e, SCENES).encoders[0].heads["class_entropy"] for e in (ours, wrapped)]
    np.testing.assert_allclose(found[1].mean[0], found[0].mean[-1], rtol=1e-4)
    with pytest.raises(UserError, match="gives the weights of its attention alone"):
        theirs.keys()
    with pytest.raises(UserError, match="block=1 needs the inside"):
        wrapped.attention(images(), block=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t._replace(attention=t.attention.log()), "not fractions of 1"),
        (lambda t: t._replace(attention=t.attention * 2), "not fractions of 1"),
        (
            lambda t: t._replace(tokens=t.tokens[:, 1:], attention=torch.full((1, 2, 16, 16), 1 / 16)),
            "no special token",
        ),
    ],
)
def test_attention_that_is_none_is_refused(change, message: str):
    class Wrong(Pooling):
        def forward(self, x: Tensor) -> foveola.ImageTokens:
            given = super().forward(x)
            weights = torch.full((len(x), 2, *2 * given.tokens.shape[1:2]), 1 / given.tokens.shape[1])
            fields = {"tokens": given.tokens, "pooled": given.pooled, "attention": weights}
            fields = change(SimpleNamespace(**fields, _replace=lambda **new: fields | new))
            return foveola.ImageTokens(grid=given.grid, **fields)

    with pytest.raises(UserError, match=message):
        foveola.wrap(Wrong(), "mine", TRANSFORM)


def test_training_does_not_begin_with_a_wrapped_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "another_of_mine.py").write_text("from torch import nn\nnetwork = nn.Conv2d(3, 5, 16, 16)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="training from it needs the inside of a ViT"):
        read_start("python:another_of_mine:network", ViTConfig())


@pytest.mark.parametrize("kind", ["pca", "similarity", "correspondences", "dictionary"])
def test_figures_of_patches_are_drawn(kind: str, tmp_path: Path):
    encoder = foveola.wrap(Convolution(), "mine", TRANSFORM)
    count = {"images": "0,1"} if kind == "correspondences" else {"count": 2}
    (path,) = foveola.visualize(kind, encoder, "scenes:?size=64&count=8", out=tmp_path, **count)
    assert path.stat().st_size > 1000


def test_protocols_of_label_maps_read_patches():
    data = "scenes:?size=64&count=12&background=class"
    encoder = foveola.wrap(Convolution(), "mine", TRANSFORM)
    settings = {"overlap": "allow", "progress": False, "workers": 0}
    found = foveola.evaluate(encoder, "knn_segmentation", train=data, test=data, k=(3,), **settings)
    assert 0 < found.metrics["miou"] <= 100
