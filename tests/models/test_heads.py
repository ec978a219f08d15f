"""Projection heads: counts, unit vectors, weight-normalised prototypes, initialisation."""

import math

import pytest
import torch
from torch import nn

from foveola.models.heads import HeadConfig, ProjectionHead, Prototypes

TINY = HeadConfig(prototypes=11, hidden=16, bottleneck=6)


def head(config: HeadConfig = TINY, width: int = 8) -> ProjectionHead:
    torch.manual_seed(0)
    made = ProjectionHead(width, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("prototypes", [65536, 8192])
def test_parameter_count(prototypes: int):
    """5,509,376 + 256 K for a width of 384, and K lengths."""
    with torch.device("meta"):
        made = ProjectionHead(384, HeadConfig(prototypes=prototypes))
    count = sum(p.numel() for p in made.parameters())
    assert count - made.last_layer.g.numel() == 5_509_376 + 256 * prototypes
    assert made.last_layer.g.numel() == prototypes


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_against_a_loop_in_float64(norm_last_layer: bool):
    made = head(HeadConfig(prototypes=11, hidden=16, bottleneck=6, norm_last_layer=norm_last_layer))
    x = torch.randn(5, 8)
    ours = made(x)
    h = x.double()
    linears = [layer for layer in made.mlp if isinstance(layer, nn.Linear)]
    assert len(linears) == 3
    for i, layer in enumerate(linears):
        h = h @ layer.weight.double().T + layer.bias.double()
        if i < 2:
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    h = h / h.norm(dim=1, keepdim=True)
    for n in range(5):
        for k in range(11):
            v, g = made.last_layer.v[k].double(), made.last_layer.g[k].double().item()
            assert ours[n, k].item() == pytest.approx(g * (v @ h[n]).item() / v.norm().item(), abs=1e-5)


def test_logits_are_cosines_where_lengths_are_one():
    made = head()
    assert not made.last_layer.g.requires_grad
    assert made(100 * torch.randn(200, 8)).abs().max() <= 1 + 1e-5
    assert (made.project(torch.randn(50, 8)).norm(dim=1) - 1).abs().max() < 1e-5


def test_scales_of_bottleneck_and_prototypes_do_not_matter():
    made, x = head(), torch.randn(5, 8)
    before = made(x)
    with torch.no_grad():
        made.mlp[-1].weight *= 7
        made.mlp[-1].bias *= 7
        made.last_layer.v *= torch.linspace(0.1, 9, 11)[:, None]
    assert torch.allclose(made(x), before, atol=1e-6)


def test_prototypes_match_the_weight_norm_of_torch():
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(6, 11, bias=False))
    ours = Prototypes(6, 11, trainable_length=True)
    with torch.no_grad():
        ours.v.copy_(reference.parametrizations.weight.original1)
        ours.g.copy_(reference.parametrizations.weight.original0)
    h = torch.randn(4, 6)
    assert torch.allclose(ours(h), reference(h), atol=1e-6)


def test_lengths_train_only_if_asked():
    for norm_last_layer in (True, False):
        made = head(HeadConfig(prototypes=11, hidden=16, bottleneck=6, norm_last_layer=norm_last_layer))
        made(torch.randn(3, 8)).square().sum().backward()
        assert (made.last_layer.g.grad is None) == norm_last_layer
        assert made.last_layer.v.grad is not None


def test_every_parameter_is_initialised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        nn.Linear, "reset_parameters", lambda self: [p.data.fill_(torch.nan) for p in self.parameters()]
    )
    torch.manual_seed(0)
    made = ProjectionHead(384, HeadConfig(prototypes=500, hidden=300))
    for name, parameter in made.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif name.endswith(".g"):
            assert (parameter == 1).all()
        elif name.endswith(".v"):  # uniform as torch's linear layers: within 1/16 for 256 numbers
            assert parameter.abs().max().item() == pytest.approx(1 / 16, rel=1e-3)
            assert parameter.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_the_number_of_layers():
    for layers, linears in ((1, 1), (2, 2), (4, 4)):
        made = head(HeadConfig(prototypes=4, hidden=16, bottleneck=6, layers=layers))
        assert [type(layer).__name__ for layer in made.mlp] == (["Linear", "GELU"] * linears)[:-1]
        assert made(torch.randn(2, 8)).shape == (2, 4)


def test_no_rows_are_fine():
    assert head()(torch.zeros(0, 8)).shape == (0, 11)


def test_a_vanishing_bottleneck_is_finite_also_in_half_precision():
    made = ProjectionHead(8, TINY)
    assert made(torch.zeros(2, 8)).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.zeros(2, 8)).isfinite().all()
        rows = made.project(torch.randn(9, 8)).float().norm(dim=1)
    assert (rows - 1).abs().max() < 0.01
