"""What is drawn, how often, and for which view; hue against the standard library. Parity: tests/parity."""

import colorsys
from dataclasses import replace

import pytest
import torch

from foveola.views.color import ColorConfig, ColorDraw, _hue, apply, draw_colors

PLAIN = ColorConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def drawn(kind: int, count: int = 2000, config: ColorConfig | None = None) -> ColorDraw:
    return draw_colors(
        config or ColorConfig(), torch.full((count,), kind), torch.Generator().manual_seed(kind)
    )


def fixed(order: list[int], factors: list[float], gray: bool = False, solarize: bool = False) -> ColorDraw:
    return ColorDraw(
        torch.tensor([order]),
        torch.tensor([factors], dtype=torch.float32),
        torch.tensor([gray]),
        torch.tensor([solarize]),
        torch.zeros(1),
    )


@pytest.mark.parametrize(("kind", "blur", "solarize"), [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_published_probabilities(kind: int, blur: float, solarize: float):
    """Jitter 0.8, gray 0.2; blur 1, 0.1, 0.5 and solarise 0, 0.2, 0 of first, other and local views."""
    draws = drawn(kind)
    jittered = (draws.order < 4).all(dim=1)
    assert torch.equal(jittered, (draws.order < 4).any(dim=1))
    shares = {
        "jitter": (jittered, 0.8),
        "gray": (draws.gray, 0.2),
        "blur": (draws.blur > 0, blur),
        "solarize": (draws.solarize, solarize),
    }
    for name, (happened, probability) in shares.items():
        share = happened.float().mean().item()
        if probability in (0, 1):
            assert share == probability, name
        else:
            assert share == pytest.approx(
                probability, abs=4 * (probability * (1 - probability) / 2000) ** 0.5
            ), name


def test_ranges_and_uniformity_of_factors_and_blur():
    draws = drawn(0)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        values = draws.factors[:, column]
        assert low <= values.min().item() <= low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) <= values.max().item() <= high + 1e-6
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.04 * (high - low))
    assert 0.1 <= draws.blur.min() < 0.12
    assert 1.98 < draws.blur.max() <= 2.0
    assert draws.blur.mean().item() == pytest.approx(1.05, abs=0.06)


def test_all_orders_are_equally_likely():
    draws = drawn(0, 4000)
    orders, counts = draws.order[draws.order[:, 0] < 4].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(24, 4))
    assert (counts - counts.sum() / 24).abs().max() < 5 * (counts.sum() / 24).sqrt()


def test_what_is_drawn_for_a_view_is_independent_of_the_rest_of_it():
    draws = drawn(1)
    columns = torch.stack(
        [
            (draws.order[:, 0] < 4).float(),
            draws.gray.float(),
            draws.solarize.float(),
            (draws.blur > 0).float(),
        ]
        + [draws.factors[:, i] for i in range(4)]
    )
    correlation = torch.corrcoef(columns) - torch.eye(8)
    assert correlation.abs().max() < 0.1


def test_switching_one_operation_off_leaves_the_draws_of_others():
    config = replace(ColorConfig(), grayscale=0.0, blur=(0.0, 0.0, 0.0), hue=0.0)
    before, after = drawn(1), drawn(1, config=config)
    assert torch.equal(before.order, after.order)
    assert torch.equal(before.solarize, after.solarize)
    assert torch.equal(before.factors[:, :3], after.factors[:, :3])
    assert not after.gray.any()
    assert (after.factors[:, 3] == 0).all()


def test_hue_is_a_turn_of_the_colour_circle():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 5, 5, generator=generator)
    for shift in (-0.5, -0.1, 0.0, 0.07, 0.4):
        turned = apply(image.clone(), fixed([3, 4, 4, 4], [1, 1, 1, shift]), PLAIN)[0]
        for pixel, result in zip(image[0].flatten(1).T.tolist(), turned.flatten(1).T, strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
            expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
            assert (result - torch.tensor(expected)).abs().max() < 1e-5


def test_a_gray_image_stays_gray_and_a_constant_one_constant():
    constant = torch.full((1, 3, 4, 4), 0.4)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [4, 4, 4, 4]):
        out = apply(constant.clone(), fixed(order, [1.0, 1.3, 1.2, 0.08]), PLAIN)
        assert (out - 0.4).abs().max() < 1e-5
    noise = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4).clone()
    out = apply(noise, fixed([0, 1, 2, 3], [0.7, 1.3, 1.2, 0.08]), PLAIN)
    assert (out - out.mean(dim=1, keepdim=True)).abs().max() < 1e-5


def test_overshoot_is_clipped_before_anything_else():
    image = torch.tensor([-0.2, 0.5, 1.3]).view(1, 3, 1, 1)
    out = apply(image.clone(), fixed([0, 4, 4, 4], [0.5, 1, 1, 0]), PLAIN)
    assert out.flatten().tolist() == pytest.approx([0, 0.25, 0.5])
    clipped = apply(image.clone(), fixed([4, 4, 4, 4], [1, 1, 1, 0]), PLAIN)
    assert clipped.flatten().tolist() == [0, 0.5, 1]


def test_solarise_inverts_from_128_on():
    values = torch.tensor([0, 127, 128, 255]) / 255
    out = apply(
        values.view(1, 1, 1, 4).repeat(1, 3, 1, 1), fixed([4] * 4, [1, 1, 1, 0], solarize=True), PLAIN
    )
    assert out[0, 0, 0].mul(255).round().tolist() == [0, 127, 127, 0]


def test_gray_comes_after_jitter_and_before_solarise():
    image = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    out = apply(image.clone(), fixed([0, 4, 4, 4], [0.5, 1, 1, 0], gray=True), PLAIN)
    assert out.flatten().tolist() == pytest.approx([0.1495] * 3, abs=1e-4)
    image = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    out = apply(image.clone(), fixed([4] * 4, [1, 1, 1, 0], gray=True, solarize=True), PLAIN)
    assert out.flatten().tolist() == pytest.approx([1 - 0.587] * 3, abs=1e-4)


def test_each_view_gets_its_own():
    images = torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    draws = draw_colors(ColorConfig(), torch.arange(64) % 3, torch.Generator().manual_seed(2))
    together = apply(images.clone(), draws, ColorConfig())
    for i in range(64):
        one = ColorDraw(
            *(getattr(draws, name)[i : i + 1] for name in ("order", "factors", "gray", "solarize", "blur"))
        )
        assert torch.allclose(
            apply(images[i : i + 1].clone(), one, ColorConfig()), together[i : i + 1], atol=1e-6
        )


@pytest.mark.parametrize(
    "wrong",
    [{"blur": (1.1, 0, 0)}, {"solarize": (0, -0.1, 0)}, {"blur_sigma": (0.0, 1.0)}, {"std": (0.0, 1.0, 1.0)}],
)
def test_impossible_settings_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ColorConfig(**wrong)


def test_hue_of_nearly_black_pixels_is_finite():
    """A spread too small for its inverse (seen on Tiny ImageNet) must not become NaN."""
    x = torch.zeros(1, 3, 4, 4)
    x[:, 0] = 1e-40
    x[:, 1, 0] = 1e-30
    out = _hue(x.clone(), torch.full((1, 1, 1, 1), 0.1))
    assert out.isfinite().all()
    torch.testing.assert_close(out, x, atol=1e-6, rtol=0)


def test_lightness_is_added_first_and_moves_no_other_draw():
    kinds = torch.arange(60) % 3
    plain, lit = (
        draw_colors(config, kinds, torch.Generator().manual_seed(3))
        for config in (ColorConfig(jitter=0.5), ColorConfig(jitter=0.5, lightness=0.2))
    )
    for name in ("order", "factors", "gray", "solarize", "blur"):
        assert torch.equal(getattr(plain, name), getattr(lit, name)), name
    assert plain.lightness is None
    assert lit.lightness is not None
    jittered = (lit.order < 4).any(dim=1)
    assert torch.equal(lit.lightness != 0, jittered)  # all together, as is the default
    assert 0.15 < lit.lightness.abs().max() <= 0.2
    images = torch.rand(60, 3, 4, 5, generator=torch.Generator().manual_seed(4))
    config = ColorConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    brighter = (images + lit.lightness[:, None, None, None]).clamp(0, 1)
    expected = apply(brighter, replace(lit, lightness=None), config)
    assert torch.equal(apply(images.clone(), lit, config), expected)


def test_each_part_of_the_jitter_may_have_a_chance_of_its_own():
    """As mmseg distorts: of n views each part changes half, and each pair a quarter."""
    n = 4000
    config = ColorConfig(jitter=0.5, jitter_each=True, lightness=0.1)
    drawn = draw_colors(config, torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(0))
    parts = torch.stack(
        [(drawn.order == kind).sum(dim=1) for kind in range(4)] + [(drawn.lightness != 0).long()]
    )
    assert parts.max() == 1  # none twice
    shares = parts.double() @ parts.double().T / n
    expected = torch.full((5, 5), 0.25).fill_diagonal_(0.5)
    torch.testing.assert_close(shares.float(), expected, rtol=0, atol=0.03)
    places = torch.stack([(drawn.order == kind).sum(dim=0) for kind in range(4)]) / n
    torch.testing.assert_close(places, torch.full((4, 4), 0.125), rtol=0, atol=0.02)  # in any order


def test_keys_of_jitter_without_effect():
    assert {"lightness", "jitter_each"} <= ColorConfig(jitter=0.0).unread().keys()
    assert "jitter_each" in ColorConfig(jitter=1.0).unread()
    assert not {"lightness", "jitter_each"} & ColorConfig().unread().keys()
