"""CAE's attentive probe against the same thing written plainly, and as it is called."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from foveola.config import UserError
from foveola.evaluation.classification.cae import CaeGrid
from foveola.evaluation.evaluate import evaluate

WIDTH, CLASSES, PATCHES, ROWS = 12, 5, 7, 20


class Plain(nn.Module):
    """Nothing folded: three LayerNorms and maps, heads one by one, an output map, BatchNorm, a classifier."""

    def __init__(self, heads: int, width: int = WIDTH) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(width))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.query_map, self.value_map, self.out_map = (nn.Linear(width, width) for _ in range(3))
        self.key_map = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens):
        q = self.query_map(self.query_norm(self.query))
        k, v = self.key_map(self.key_norm(tokens)), self.value_map(self.value_norm(tokens))
        outs = []
        for one in torch.arange(len(self.query)).chunk(self.heads):
            scores = (k[..., one] @ q[one]) / len(one) ** 0.5
            outs.append((scores.softmax(dim=1)[..., None] * v[..., one]).sum(dim=1))
        return self.head(self.norm(self.out_map(torch.cat(outs, dim=1))))


def twin(grid: CaeGrid, probe: int, heads: int) -> Plain:
    """A plain probe that starts like one of the grid, in float64."""
    module, p = Plain(heads), {name: value[probe] for name, value in grid.trained.items()}
    state = {"query": p["query"], "head.weight": p["head"], "head.bias": p["bias"]}
    for name in ("query", "value", "out"):
        state |= {f"{name}_map.weight": p[f"{name}_map"], f"{name}_map.bias": p[f"{name}_bias"]}
    state["key_map.weight"] = p["key_map"]
    assert not module.load_state_dict(state, strict=False).unexpected_keys
    return module.double()


def data(batches: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        x = {
            "token": torch.randn(ROWS, 2, WIDTH, generator=g),
            "patches": 1 + 3 * torch.randn(ROWS, PATCHES, WIDTH, generator=g),
        }
        yield x, torch.randint(CLASSES, (ROWS,), generator=g)


def joined(x):
    """What a probe reads: the class token of the last block, and the patches."""
    return torch.cat((x["token"][:, 1:], x["patches"]), dim=1).double()


@pytest.mark.parametrize("heads", [1, 3])
def test_folded_probes_train_like_plain_ones(heads, monkeypatch) -> None:
    """BatchNorm over 8, 8 and 4 images, gradients of all 20, torch's SGD; in parts that change nothing."""
    monkeypatch.setattr("foveola.evaluation.classification.cae.CAE_SCORES_AT_ONCE", 3 * heads * WIDTH * 2)
    rates = torch.tensor([0.3, 0.05])
    grid = CaeGrid(rates, WIDTH, CLASSES, heads=heads, norm_batch=8)
    plain = [twin(grid, g, heads) for g in range(2)]
    alone = CaeGrid(rates[1:], WIDTH, CLASSES, heads=heads, norm_batch=8)
    for g, module in enumerate(plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=float(rates[g]), momentum=0.9)
        for step, (x, y) in enumerate(data(4)):
            parts = zip(joined(x).split(8), y.split(8), strict=True)
            loss = sum(cross_entropy(module(part), some, reduction="sum") for part, some in parts) / ROWS
            optimizer.zero_grad()
            loss.backward()
            assert module.key_norm.bias.grad.abs().max() < 1e-12  # the same for all tokens
            for group in optimizer.param_groups:
                group["lr"] = float(rates[g]) * (1 - 0.2 * step)
            optimizer.step()
    for step, (x, y) in enumerate(data(4)):
        grid.step(x, y, 1 - 0.2 * step)
        alone.step(x, y, 1 - 0.2 * step)
    x, _ = next(data(1, seed=9))
    for g, module in enumerate(plain):
        module.eval()
        torch.testing.assert_close(grid.logits(x)[g].double(), module(joined(x)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(grid.trained["query"][g].double(), module.query, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grid.logits(x)[1], alone.logits(x)[0], rtol=1e-4, atol=1e-5)
    assert plain[0].query.abs().max() > 0.005  # a query of zeros is left with the first step


def test_first_step_reads_all_tokens_alike() -> None:
    """A query of zeros; then what is learned reads the class token as one more token, in any order."""
    grid = CaeGrid(torch.tensor([0.5]), WIDTH, CLASSES, heads=3)
    x, y = next(data(1))
    assert torch.allclose(grid.weights(x), torch.full((1, 3, ROWS, 1 + PATCHES), 1 / (1 + PATCHES)))
    for x, y in data(5):
        grid.step(x, y, 1.0)
    grid.trained["query_map"] *= 100  # much further
    weights = grid.weights(x)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(1, 3, ROWS))
    assert weights.std() > 0.01
    other = {"token": x["token"], "patches": x["patches"].flip(1)}
    torch.testing.assert_close(grid.logits(other), grid.logits(x), rtol=1e-4, atol=1e-5)
    other["token"] = x["token"] * torch.tensor([1.0, -1.0])[:, None]
    assert (grid.logits(other) - grid.logits(x)).abs().max() > 1e-3
    assert grid.logits({"patches": x["patches"]}).shape == (1, ROWS, CLASSES)


@pytest.mark.parametrize(("width", "before"), [(384, 593_664), (768, 2_366_976), (1280, 6_566_400)])
def test_number_of_parameters(width, before) -> None:
    """4 d^2 + 10 d before the classifier, with any number of heads."""
    for heads in (1, width // 64):
        grid = CaeGrid(torch.tensor([0.1]), width, CLASSES, heads=heads)
        assert grid.parameters_each == before + CLASSES * (width + 1)
    assert sum(p.numel() for p in Plain(1).parameters()) == 4 * WIDTH**2 + 10 * WIDTH + CLASSES * (WIDTH + 1)


def test_as_it_is_called(encoder, list_source, make_sample) -> None:
    def labelled(first: int, count: int, name: str):
        samples = [make_sample(first + i, label=i % 3) for i in range(count)]
        for sample in samples:
            sample.image[10:50, 20:60] = 20 + 100 * sample.label
        return list_source(samples, name=name)

    sources = {
        "train": labelled(0, 60, "a:"),
        "test": labelled(900, 30, "b:"),
        "progress": False,
        "workers": 0,
    }
    short = {"style": "cae", "heads": (None, 4), "lr": (0.05, 0.2), "epochs": 40, "batch": 16}
    result = evaluate(encoder, "attentive", **sources, **short)
    assert min(result.metrics["top1_cae"], result.metrics["top1_cae_4"]) > 80
    assert result.chosen["cae_4"]["heads"] == 4
    assert result.chosen["cae"]["parameters"] == 4 * 32**2 + 10 * 32 + 3 * 33
    assert "cae: batches of 16 images" in result.notes
    for settings, message in [
        ({"heads": (12,)}, "heads=12 do not divide the width of the patches, 32; 8 or 16 do"),
        ({"weight_decay": (0.1,)}, "weight_decay: style=cae has none"),
        ({"epochs": 1, "iterations": 1}, "epochs and iterations: give one of them"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluate(encoder, "attentive", style="cae", **sources, **settings)
