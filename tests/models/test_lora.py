"""Low-rank updates: merged they are what they are applied, and they start as nothing."""

from copy import deepcopy

import pytest
import torch

from foveola.config import ConfigError, build
from foveola.methods.method import ema_update
from foveola.models.lora import LoraConfig, LoraLinear, add_adapters, merged
from foveola.models.vit import Inputs, VisionTransformer, ViTConfig

MODEL = ViTConfig(width=24, depth=3, heads=3, patch_size=4, image_size=16, drop_path=0.0, layer_scale=0.5)


def adapted(config=LoraConfig(rank=3, alpha=5.0), seed: int = 0, moved: bool = True, model=MODEL):  # noqa: B008
    """A network in float64, and the same before it was adapted; updates that are not zero, if `moved`."""
    torch.manual_seed(0)
    plain = VisionTransformer(model).double().eval()
    network = deepcopy(plain)
    add_adapters(network, config, torch.Generator().manual_seed(seed))
    if moved:
        noise = torch.Generator().manual_seed(7)
        for name, p in network.named_parameters():
            if name.endswith("lora_b"):
                p.data = torch.randn(p.shape, generator=noise, dtype=p.dtype)
    return network, plain


def features(network):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    objects = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    found = network(images, Inputs(objects=objects))
    return torch.cat((found.objects, found.patches), dim=1)


def test_one_layer_is_what_a_loop_gives():
    torch.manual_seed(0)
    base = torch.nn.Linear(4, 3).double()
    layer = LoraLinear(base, 2, 6.0, torch.Generator().manual_seed(0))
    layer.lora_b.data = torch.randn(3, 2).double()
    x = torch.randn(5, 4).double()
    out = layer(x)
    for n in range(5):
        for o in range(3):
            low = [sum(layer.lora_a[r, i] * x[n, i] for i in range(4)) for r in range(2)]
            own = base.bias[o] + sum(base.weight[o, i] * x[n, i] for i in range(4))
            expected = own + 3.0 * sum(layer.lora_b[o, r] * low[r] for r in range(2))
            assert out[n, o].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("targets", [("qkv",), ("proj", "mlp"), ("qkv", "proj", "mlp")])
def test_merged_equals_applied(targets, mlp):
    model = ViTConfig(**{**vars(MODEL), "mlp": mlp})
    network, plain = adapted(LoraConfig(rank=3, alpha=5.0, targets=targets), model=model)
    assert not torch.allclose(features(network), features(plain), atol=1e-2)
    state = merged(network.state_dict())
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(features(plain), features(network), rtol=1e-10, atol=1e-10)
    half = deepcopy(network).float()
    single = VisionTransformer(model).eval()
    single.load_state_dict(merged(half.state_dict()))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(single(images).patches, half(images).patches, rtol=1e-5, atol=1e-5)


def test_updates_start_as_nothing_and_alone_learn():
    network, plain = adapted(moved=False)
    assert torch.equal(features(network), features(plain))
    free = {name for name, p in network.named_parameters() if p.requires_grad}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    own = {f"blocks.{i}.{layer}.lora_{x}" for i in range(3) for layer in layers for x in "ab"}
    assert free == own | {"mask_token"}
    last, _ = adapted(LoraConfig(rank=2, targets=("qkv",), blocks=1))
    assert {n for n, p in last.named_parameters() if p.requires_grad} == {
        "blocks.2.attn.qkv.lora_a",
        "blocks.2.attn.qkv.lora_b",
    }
    bound = 24**-0.5
    assert 0.9 * bound < network.blocks[0].attn.qkv.lora_a.abs().max() <= bound


def test_draws_follow_from_the_seed():
    first, again, other = (adapted(seed=seed, moved=False)[0].state_dict() for seed in (0, 0, 1))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) != name.endswith("lora_a"), name


def test_the_teacher_averages_merged_weights():
    network, teacher = adapted()
    before = deepcopy(teacher.state_dict())
    ema_update(teacher, network, 0.75)
    student = dict(network.named_parameters())
    for name, value in teacher.state_dict().items():
        update = 0.0
        if f"{name.removesuffix('weight')}lora_a" in student:
            a, b = (student[f"{name.removesuffix('weight')}lora_{x}"] for x in "ab")
            update = 5.0 / 3 * sum(b[:, [r]] * a[[r]] for r in range(3))
        expected = 0.75 * before[name] + 0.25 * (student[name] + update)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": []}, "some of qkv, proj, mlp, each once"),
        ({"targets": ["qkv", "qkv"]}, "each once"),
        ({"targets": ["fc1"]}, "targets"),
        ({"rank": 0}, "rank"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        build(LoraConfig, keys)


def test_what_does_not_fit_the_network_is_refused():
    with pytest.raises(ConfigError, match=r"lora\.rank=24 is not low"):
        adapted(LoraConfig(rank=24))
    with pytest.raises(ConfigError, match=r"lora\.blocks=4: the encoder has 3 blocks"):
        adapted(LoraConfig(blocks=4))
