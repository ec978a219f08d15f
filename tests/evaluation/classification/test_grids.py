"""Probes of a grid: each as if it were alone, and each as an ordinary module would train it."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from foveola.config import UserError
from foveola.evaluation.classification.abmilp import AbmilpGrid
from foveola.evaluation.classification.attentive import AttentiveGrid
from foveola.evaluation.classification.linear import (
    BatchNorm,
    LinearGrid,
    joined_features,
    need_of,
    split_features,
)

WIDTH, CLASSES, PATCHES = 12, 5, 7


def data(batches: int = 4, rows: int = 20, seed: int = 0):
    """Batches of tokens of two blocks, averages and patches, with labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            {
                "token": torch.randn(rows, 2, WIDTH, generator=g),
                "average": torch.randn(rows, WIDTH, generator=g),
                "patches": torch.randn(rows, PATCHES, WIDTH, generator=g),
            },
            torch.randint(CLASSES, (rows,), generator=g),
        )
        for _ in range(batches)
    ]


RATES = torch.tensor([0.5, 0.01, 0.1])
MAKERS = {
    "linear": lambda rates, **k: LinearGrid("token2+average", rates, 3 * WIDTH, CLASSES, **k),
    "lars": lambda rates, **k: LinearGrid(
        "average", rates, WIDTH, CLASSES, optimizer="lars", norm=True, norm_batch=8, truncated=True, **k
    ),
    "attentive": lambda rates, **k: AttentiveGrid(rates, rates / 10, WIDTH, CLASSES, heads=3, **k),
    "abmilp": lambda rates, **k: AbmilpGrid(
        rates, WIDTH, CLASSES, depth=2, activation="gelu", norm_batch=8, **k
    ),
    "abmilp_heads": lambda rates, **k: AbmilpGrid(rates, WIDTH, CLASSES, heads=3, **k),
    "abmilp_attention": lambda rates, **k: AbmilpGrid(
        rates, WIDTH, CLASSES, attention=True, optimizer="sgd", **k
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_probe_of_a_grid_is_the_same_probe_alone(name) -> None:
    together = MAKERS[name](RATES)
    alone = [MAKERS[name](rate[None]) for rate in RATES]
    for i, (x, y) in enumerate(data()):
        for grid in (together, *alone):
            grid.step(x, y, 1 - 0.2 * i)
    x, _ = data(1, seed=9)[0]
    for g, grid in enumerate(alone):
        torch.testing.assert_close(together.logits(x)[g], grid.logits(x)[0], rtol=1e-4, atol=1e-5)
        assert together.settings[g] == grid.settings[0]
    assert (together.logits(x)[0] - together.logits(x)[1]).abs().max() > 1e-3


def test_linear_is_torchs_linear_layer() -> None:
    grid = LinearGrid("token2", RATES, 2 * WIDTH, CLASSES, seed=3)
    layers = []
    for rate in RATES.tolist():
        layer = nn.Linear(2 * WIDTH, CLASSES)
        layer.weight.data.copy_(grid.weight[0])
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        for x, y in data():
            loss = cross_entropy(layer(x["token"].flatten(1)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        layers.append(layer)
    assert grid.weight[0].std() == pytest.approx(0.01, rel=0.2)
    for x, y in data():
        grid.step(x, y, 1.0)
    for g, layer in enumerate(layers):
        torch.testing.assert_close(grid.weight[g], layer.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grid.bias[g], layer.bias.data, rtol=1e-4, atol=1e-6)


def test_batch_norm_is_torchs() -> None:
    ours, theirs = (
        BatchNorm(2, WIDTH, torch.device("cpu")),
        [nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False) for _ in range(2)],
    )
    for x, _ in data():
        pair = torch.stack((x["average"], 3 * x["token"][:, 0] + 1))
        expected = torch.stack([bn(part) for bn, part in zip(theirs, pair, strict=True)])
        torch.testing.assert_close(ours.train(pair), expected, rtol=1e-4, atol=1e-5)
    for g, bn in enumerate(theirs):
        bn.eval()
        torch.testing.assert_close(ours.test(pair)[g], bn(pair[g]), rtol=1e-4, atol=1e-5)
    assert torch.equal(BatchNorm(1, 3, torch.device("cpu")).train(torch.ones(1, 1, 3)), torch.zeros(1, 1, 3))


def test_lars_probe_with_parts_of_a_batch() -> None:
    """BatchNorm of 8, 8 and 4 rows, gradients averaged over all 20, then naive LARS."""
    grid = MAKERS["lars"](RATES[:1])
    norm, weight, bias = (
        nn.BatchNorm1d(WIDTH, eps=1e-6, affine=False),
        grid.weight[0].clone(),
        torch.zeros(CLASSES),
    )
    v, u = torch.zeros_like(weight), torch.zeros_like(bias)
    for x, y in data():
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        parts = zip(x["average"].split(8), y.split(8), strict=True)
        loss = (
            sum(cross_entropy(norm(part) @ w.T + b, labels, reduction="sum") for part, labels in parts) / 20
        )
        dw, db = torch.autograd.grad(loss, (w, b))
        v = 0.9 * v + 0.001 * weight.norm() / dw.norm() * dw
        u = 0.9 * u + db
        weight, bias = weight - 0.5 * v, bias - 0.5 * u
        grid.step(x, y, 1.0)
    torch.testing.assert_close(grid.weight[0], weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grid.bias[0], bias, rtol=1e-4, atol=1e-6)


class Attentive(nn.Module):
    """The probe as CAPI describes it: the query, one map to keys and values with bias, a classifier."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(WIDTH))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        b, n, d = x.shape
        k, v = self.kv(x).view(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q = self.query.view(1, self.heads, 1, -1).expand(b, -1, -1, -1)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(out.transpose(1, 2).flatten(1))


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_attentive_probe_is_the_unfolded_module(heads, monkeypatch) -> None:
    """Trained by torch's AdamW with the paper's groups; the bias of the keys gets no gradient, and counts."""
    monkeypatch.setattr(
        "foveola.evaluation.classification.attentive.SCORES_AT_ONCE", 40 * heads * PATCHES
    )  # in parts of the batch
    grid = AttentiveGrid(RATES[1:] / 10, torch.tensor([0.05, 0.5]), WIDTH, CLASSES, heads=heads)
    for g in range(2):
        module = Attentive(heads)
        with torch.no_grad():
            module.query.copy_(grid.query[g])
            module.kv.weight.copy_(torch.cat((grid.keys[g], grid.values[g])))
            module.head.weight.copy_(grid.head[g])
            module.kv.bias.zero_()
            module.head.bias.zero_()
        decayed = [module.query, module.kv.weight, module.head.weight]
        groups = [
            {"params": decayed, "weight_decay": [0.05, 0.5][g]},
            {"params": [module.kv.bias, module.head.bias], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=float(RATES[1 + g] / 10), betas=(0.9, 0.95), eps=1e-8)
        mine = AttentiveGrid(
            RATES[1 + g : 2 + g] / 10, torch.tensor([[0.05, 0.5][g]]), WIDTH, CLASSES, heads=heads
        )
        for x, y in data():
            loss = cross_entropy(module(x["patches"]), y)
            optimizer.zero_grad()
            loss.backward()
            assert module.kv.bias.grad[:WIDTH].abs().max() < 1e-7
            module.kv.bias.grad[:WIDTH] = 0  # rounding noise, which Adam would blow up
            optimizer.step()
            mine.step(x, y, 1.0)
        torch.testing.assert_close(mine.logits(x)[0], module(x["patches"]).detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.query[0], module.query.detach(), rtol=1e-3, atol=1e-5)
        assert sum(p.numel() for p in module.parameters()) == mine.parameters_each
        assert mine.parameters_each == 2 * WIDTH**2 + (3 + CLASSES) * WIDTH + CLASSES


def test_attentive_probe_ignores_the_order_of_patches_and_refuses_heads() -> None:
    grid = MAKERS["attentive"](RATES)
    x, _ = data(1)[0]
    shuffled = {
        "patches": x["patches"][:, torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))]
    }
    torch.testing.assert_close(grid.logits(x), grid.logits(shuffled), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="heads=5 do not divide the width of the patches, 12"):
        AttentiveGrid(RATES, RATES, WIDTH, CLASSES, heads=5)


@pytest.mark.parametrize(("depth", "activation"), [(1, "relu"), (2, "gelu"), (3, "tanh"), (4, "relu")])
def test_abmilp_is_a_naive_loop(depth, activation) -> None:
    grid = AbmilpGrid(RATES, WIDTH, CLASSES, depth=depth, activation=activation)
    x, y = data(1)[0]
    grid.step(x, y, 1.0)
    act = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}[activation]
    weights = grid.weights(x["patches"])
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, 20))
    logits = grid.logits(x)
    for g in range(3):
        for b in range(4):
            scores = []
            for patch in x["patches"][b]:
                hidden = patch
                for layer in range(depth):
                    hidden = act(hidden) if layer else hidden
                    hidden = grid.trained[2 * layer][g] @ hidden + grid.trained[2 * layer + 1][g]
                scores.append(float(hidden))
            shares = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
            torch.testing.assert_close(weights[g, b], torch.tensor(shares), rtol=1e-4, atol=1e-6)
            z = sum(a * patch for a, patch in zip(shares, x["patches"][b], strict=True))
            z = (z - grid.norm.mean[g, 0]) / (grid.norm.variance[g, 0] + 1e-6).sqrt()
            expected = grid.trained[2 * depth][g] @ z + grid.trained[2 * depth + 1][g]
            torch.testing.assert_close(logits[g, b], expected, rtol=1e-3, atol=1e-5)
    classifier = CLASSES * (WIDTH + 1)
    assert grid.parameters_each - classifier == (depth - 1) * (WIDTH**2 + WIDTH) + WIDTH + 1


def test_abmilp_with_attention_is_a_naive_loop() -> None:
    grid = MAKERS["abmilp_attention"](RATES)
    x, y = data(1)[0]
    assert torch.equal(grid.trained[-1], torch.zeros(3, 1))
    plain = AbmilpGrid(RATES, WIDTH, CLASSES)
    torch.testing.assert_close(grid.weights(x["patches"]), plain.weights(x["patches"]))  # gamma starts from 0
    grid.step(x, y, 1.0)
    g, b, p = 0, 2, grid.trained
    assert p[-1].abs().min() > 0
    q, k, v = ([p[i][g] @ t + p[i + 1][g] for t in x["patches"][b]] for i in (4, 6, 8))
    tokens = []
    for i, t in enumerate(x["patches"][b]):
        shares = torch.stack([q[i] @ other / WIDTH**0.5 for other in k]).softmax(dim=0)
        tokens.append(t + p[-1][g] * sum(s * value for s, value in zip(shares, v, strict=True)))
    scores = torch.stack([(p[0][g] @ t + p[1][g])[0] for t in tokens])
    torch.testing.assert_close(grid.weights(x["patches"])[g, b], scores.softmax(dim=0), rtol=1e-4, atol=1e-6)
    assert grid.parameters_each == 3 * (WIDTH**2 + WIDTH) + 1 + WIDTH + 1 + CLASSES * (WIDTH + 1)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(("heads", "depth"), [(1, 1), (4, 1), (3, 2), (WIDTH, 1)])
def test_heads_of_abmilp_are_a_naive_loop(heads, depth, attention) -> None:
    """In float64: each head has scores of its own, which average its own D / H channels."""
    about = {"heads": heads, "depth": depth, "attention": attention, "optimizer": "sgd"}
    grid = AbmilpGrid(RATES, WIDTH, CLASSES, **about)
    for x, y in data(3):
        grid.step(x, y, 1.0)
    logits, maps, weights = grid.logits(x), grid.maps(x["patches"]), grid.weights(x["patches"])
    size = WIDTH // heads
    for g, b in ((0, 3), (2, 11)):
        p = [each[g].double() for each in grid.trained]
        tokens = [patch.double() for patch in x["patches"][b]]
        if attention:
            q, k, v = ([p[2 * depth + i] @ t + p[2 * depth + i + 1] for t in tokens] for i in (2, 4, 6))
            read = []
            for query in q:
                shares = torch.stack([query @ other / WIDTH**0.5 for other in k]).softmax(dim=0)
                read.append(sum(share * value for share, value in zip(shares, v, strict=True)))
            tokens = [t + p[-1] * r for t, r in zip(tokens, read, strict=True)]
        pooled, expected = [], []
        for head in range(heads):
            scores = []
            for t in tokens:
                hidden = t
                for layer in range(depth):
                    hidden = p[2 * layer] @ (torch.relu(hidden) if layer else hidden) + p[2 * layer + 1]
                scores.append(math.exp(hidden[head]))
            shares = [score / sum(scores) for score in scores]
            expected.append(shares)
            for c in range(head * size, (head + 1) * size):
                pooled.append(sum(share * float(t[c]) for share, t in zip(shares, tokens, strict=True)))
        z = torch.tensor(pooled, dtype=torch.float64) - grid.norm.mean[g, 0]
        z = z / (grid.norm.variance[g, 0].double() + 1e-6).sqrt()
        own = p[2 * depth] @ z + p[2 * depth + 1]
        torch.testing.assert_close(logits[g, b].double(), own, rtol=1e-3, atol=1e-5)
        found = torch.tensor(expected)
        torch.testing.assert_close(maps[g, b], found, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights[g, b], found.mean(dim=0), rtol=1e-4, atol=1e-6)
    if heads > 1:
        assert (maps[:, :, 0] - maps[:, :, 1]).abs().max() > 1e-3
    before = (depth - 1) * (WIDTH**2 + WIDTH) + heads * (WIDTH + 1) + CLASSES * (WIDTH + 1)
    assert grid.parameters_each == before + attention * (3 * (WIDTH**2 + WIDTH) + 1)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(UserError, match="heads=5 do not divide the width of the patches, 12; 4 or 6 do"):
        AbmilpGrid(RATES, WIDTH, CLASSES, heads=5)


def test_abmilp_is_the_average_where_scores_are_alike() -> None:
    """Zero scores average; a bias of the scores, and the order of the patches, change nothing."""
    grid = AbmilpGrid(RATES, WIDTH, CLASSES)
    x, _ = data(1)[0]
    before = grid.logits(x)
    grid.trained[1].add_(3.0)
    torch.testing.assert_close(grid.logits(x), before, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grid.logits({"patches": x["patches"].flip(1)}), before, rtol=1e-4, atol=1e-6)
    grid.trained[0].zero_()
    torch.testing.assert_close(grid.weights(x["patches"]), torch.full((3, 20, PATCHES), 1 / PATCHES))


def test_features_of_linear_probes() -> None:
    assert split_features("token4+average") == [("token", 4), ("average", 1)]
    assert split_features("external:/a+b/c") == [("external:/a+b/c", 1)]
    wanted = need_of(("token", "token4+average"), masks=True)
    assert wanted.features == {"masked", "average"}
    assert wanted.layers == 4
    x, _ = data(1)[0]
    both = joined_features(x, "token2+average")
    assert torch.equal(both, torch.cat((x["token"][:, 0], x["token"][:, 1], x["average"]), dim=1))
    assert torch.equal(joined_features(x, "token"), x["token"][:, 1])
    for features, message in (
        ("patches", "a linear probe reads one vector"),
        ("tokn", "unknown features 'tokn'"),
    ):
        with pytest.raises(UserError, match=message):
            split_features(features)


def test_parts_of_a_batch_change_nothing(monkeypatch) -> None:
    for name in ("abmilp", "abmilp_heads", "abmilp_attention", "attentive"):
        grids = []
        for entries in (2**27, 1):
            monkeypatch.setattr("foveola.evaluation.classification.abmilp.HIDDEN_AT_ONCE", entries)
            monkeypatch.setattr("foveola.evaluation.classification.attentive.SCORES_AT_ONCE", entries)
            grid = MAKERS[name](RATES)
            for x, y in data():
                grid.step(x, y, 1.0)
            grids.append(grid)
        torch.testing.assert_close(grids[0].logits(x), grids[1].logits(x), rtol=1e-3, atol=1e-4)
