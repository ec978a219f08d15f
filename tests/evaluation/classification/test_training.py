"""Optimizers of stacked probes against torch's, a naive LARS, and the schedules' published values."""

import math

import pytest
import torch

from foveola.evaluation.classification.training import (
    AdamW,
    Lars,
    Sgd,
    closed_warm_cosine,
    cosine,
    cosine_by_epoch,
    warm_cosine,
)

RATES, DECAYS = (0.3, 0.01, 0.1), (0.0, 0.05, 0.01)


def stacks(seed: int = 0) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Parameters of three probes (a matrix and a bias), and gradients of five steps."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4, 5), (3, 4))
    parameters = [torch.randn(*shape, generator=generator) for shape in shapes]
    return parameters, [[torch.randn(*s, generator=generator) for s in shapes] for _ in range(5)]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_stack_is_torchs_optimizer_for_each_probe(kind) -> None:
    parameters, steps = stacks()
    alone = []
    for g in range(3):
        mine = [p[g].clone().requires_grad_() for p in parameters]
        groups = [
            {"params": mine[:1], "weight_decay": DECAYS[g]},
            {"params": mine[1:], "weight_decay": DECAYS[g] if kind == "sgd" else 0.0},
        ]
        optimizer = (
            torch.optim.SGD(groups, lr=RATES[g], momentum=0.9)
            if kind == "sgd"
            else torch.optim.AdamW(groups, lr=RATES[g], betas=(0.9, 0.95))
        )
        for i, gradients in enumerate(steps):
            for p, gradient in zip(mine, gradients, strict=True):
                p.grad = gradient[g].clone()
            for group in optimizer.param_groups:
                group["lr"] = RATES[g] * (0.5 + i)
            optimizer.step()
        alone.append(mine)
    stacked = (Sgd if kind == "sgd" else AdamW)(parameters, torch.tensor(RATES), torch.tensor(DECAYS))
    for i, gradients in enumerate(steps):
        stacked.step(gradients, 0.5 + i)
    for g in range(3):
        for p, q in zip(parameters, alone[g], strict=True):
            torch.testing.assert_close(p[g], q.detach(), rtol=1e-5, atol=1e-6)


def test_lars_is_a_naive_loop() -> None:
    """float64, entry by entry: trust ratio and decay for the matrix, neither for the bias."""
    parameters, steps = stacks(1)
    expected = [[p[g].double().tolist() for p in parameters] for g in range(3)]
    stacked = Lars(parameters, torch.tensor(RATES), torch.tensor(DECAYS))
    for gradients in steps:
        stacked.step(gradients, 0.7)
    for g in range(3):
        matrix, bias = expected[g]
        m_matrix, m_bias = [[0.0] * 5 for _ in range(4)], [0.0] * 4
        for step in steps:
            grad = [
                [float(v) + DECAYS[g] * w for v, w in zip(*rows, strict=True)]
                for rows in zip(step[0][g], matrix, strict=True)
            ]
            p_norm = math.sqrt(sum(w * w for row in matrix for w in row))
            g_norm = math.sqrt(sum(v * v for row in grad for v in row))
            q = 0.001 * p_norm / g_norm
            for i in range(4):
                for j in range(5):
                    m_matrix[i][j] = 0.9 * m_matrix[i][j] + q * grad[i][j]
                    matrix[i][j] -= 0.7 * RATES[g] * m_matrix[i][j]
                m_bias[i] = 0.9 * m_bias[i] + float(step[1][g][i])
                bias[i] -= 0.7 * RATES[g] * m_bias[i]
        torch.testing.assert_close(
            parameters[0][g].double(), torch.tensor(matrix, dtype=torch.float64), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            parameters[1][g].double(), torch.tensor(bias, dtype=torch.float64), rtol=1e-5, atol=1e-5
        )


def test_lars_by_hand() -> None:
    """|p| = 5 and |g| = 2 give a ratio of 0.0025; where a norm is 0 the gradient is taken as it is."""
    p, zero = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 2.0]], [[0.0, 2.0]]])
    Lars([p], torch.tensor([1.0, 1.0])).step([zero], 1.0)
    torch.testing.assert_close(p, torch.tensor([[[3.0, 4.0 - 0.0025 * 2]], [[0.0, -2.0]]]))


def test_schedules_have_the_published_values() -> None:
    mae = warm_cosine(90, 10)  # in epochs, of a peak of 6.4
    for epoch, rate in ((0, 0), (5, 3.2), (10, 6.4), (30, 5.463), (50, 3.2), (70, 0.937), (89, 0.00247)):
        assert 6.4 * mae(epoch) == pytest.approx(rate, rel=2e-3)
    capi = closed_warm_cosine(12500, 1250)
    for step, value in ((0, 0.0), (625, 0.5004), (1249, 1.0), (1250, 1.0), (6875, 0.49993), (12499, 0.0)):
        assert capi(step) == pytest.approx(value, abs=6e-5)
    dino = cosine_by_epoch(100 * 7, 7)
    for epoch, value in ((0, 1.0), (50, 0.5), (99, 0.000247)):
        assert dino(7 * epoch) == dino(7 * epoch + 6) == pytest.approx(value, rel=2e-3)
    assert cosine(12500)(6250) == pytest.approx(0.5)
    assert 0 < cosine(12500)(12499) < 1e-7
