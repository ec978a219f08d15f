"""Maps equal what explicit attention matrices and sorted similarities say."""

import math

import numpy as np
import pytest
import torch

from foveola.config import UserError
from foveola.drawing.overlays import (
    HEAD_COLORS,
    brightness,
    cool_to_warm,
    heat,
    heat_bar,
    link,
    mark,
    outline,
    paint_heads,
)
from foveola.drawing.sheet import Row, Sheet
from foveola.figures.maps import (
    centre_of,
    correspondences,
    neighbours,
    object_attention,
    patch_under,
    query_attention,
    received_attention,
    similarity,
    strongest,
    token_attention,
)
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig


def small_encoder(registers: int = 0) -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=32, depth=2, heads=4, patch_size=8, image_size=32, registers=registers)
    return Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=32, crop=32)))


def attention_by_hand(encoder: Encoder, images: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
    """The last block's object row in float64, from the weights themselves; one object, no registers."""
    net = encoder.backbone.double()
    x, _ = net.embed(images.double())
    x = torch.cat(((net.cls_token + net.pos_embed[:, :1]).expand(len(x), -1, -1), x), dim=1)
    allowed = torch.ones(len(x), 17, 17, dtype=torch.bool)
    allowed[:, 0, 1:] = objects[:, 0]
    for block in net.blocks:
        q, k, v = block.attn.heads_of(block.norm1(x))
        weights = torch.zeros(len(x), 4, 17, 17, dtype=torch.float64)
        for b in range(len(x)):
            for head in range(4):
                for row in range(17):
                    logits = (k[b, head] @ q[b, head, row]) / np.sqrt(8)
                    logits[~allowed[b, row]] = -torch.inf
                    weights[b, head, row] = logits.softmax(dim=0)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return weights[:, :, 0, 1:].mean(dim=1)


def test_attention_equals_the_explicit_matrix_and_stays_on_the_object() -> None:
    encoder = small_encoder()
    images = torch.randn(2, 3, 32, 32)
    objects = torch.zeros(2, 1, 16, dtype=torch.bool)
    objects[0, 0, 3:7] = True
    objects[1, 0, 9] = True
    plain = encoder(images, objects).objects
    maps = object_attention(encoder, images, objects)
    assert maps.shape == (2, 1, 4, 4)
    torch.testing.assert_close(
        maps.flatten(1), attention_by_hand(encoder, images, objects).float(), atol=1e-5, rtol=0
    )
    assert (maps.flatten(2)[~objects] == 0).all()
    encoder.backbone.float()
    torch.testing.assert_close(encoder(images, objects).objects, plain, atol=1e-6, rtol=0)


def test_attention_leaves_out_registers_and_sums_to_less_than_one() -> None:
    maps = object_attention(small_encoder(registers=3), torch.randn(1, 3, 32, 48))
    assert maps.shape == (1, 1, 4, 6)
    assert 0.5 < maps.sum() < 1


def test_neighbours_are_sorted_by_cosine() -> None:
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(5, 7)), rng.normal(size=(20, 7))
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        references / np.linalg.norm(references, axis=1)[:, None]
    ).T
    found = neighbours(torch.from_numpy(queries), torch.from_numpy(references), 4)
    np.testing.assert_array_equal(found.numpy(), np.argsort(-cosine, axis=1)[:, :4])


def test_outline_darkens_the_rest_and_draws_the_border() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    mask = np.zeros((2, 2), bool)
    mask[0, 1] = True
    drawn = outline(image, mask, (255, 0, 0))
    assert (drawn[5, 2] == 90).all()
    assert (drawn[1, 5] == 200).all(), "inside stays"
    assert (drawn[0, 4:] == (255, 0, 0)).all(), "also where the object meets the image's edge"
    assert (drawn[3, 4:] == (255, 0, 0)).all()


def test_heat_is_brightest_at_the_largest_weight() -> None:
    weights = np.array([[0.0, 0.2], [0.1, 0.7]], np.float32)
    drawn = heat(np.zeros((4, 4, 3), np.uint8), weights).sum(axis=2)
    assert drawn[3, 3] == drawn.max() > drawn[0, 3] > drawn[0, 0]


def test_light_is_a_multiple_of_uniform_attention_on_one_scale() -> None:
    """A quarter of uniform is dark, uniform is 1/3 of the way, sixteen times is the brightest."""
    assert brightness(np.full((3, 3), 1 / 9)) == pytest.approx(np.full((3, 3), 1 / 3))
    weights = np.full(64, 1.0)
    weights[0], weights[1:] = 16.0, 48 / 63  # their mean is 1
    assert brightness(weights)[0] == pytest.approx(1.0)
    assert brightness(np.array([0.0, 1.0, 1.0, 4.0, 0.5]))[[0, 3]] == pytest.approx(
        [0.0, math.log(4 * (4 / 6.5) / 0.25) / math.log(64)]
    )
    assert (brightness(np.zeros(4)) == 0).all()
    image = np.full((8, 8, 3), 120, np.uint8)
    even, peak = heat(image, np.full((2, 2), 0.25)), heat(image, np.array([[1.0, 1e-3], [1e-3, 1e-3]]))
    assert even.sum() < peak[:4, :4].sum() * 4, "uniform attention does not look like much attention"
    assert (even == heat(image, np.full((2, 2), 0.001))).all()


def test_bars_say_what_colours_mean() -> None:
    bar = heat_bar()
    shares = [share for share, _ in bar.marks]
    assert [text for _, text in bar.marks] == ["0.25x", "1x: uniform", "4x", "16x"]
    assert shares == pytest.approx([brightness_of(times) for times in (0.25, 1, 4, 16)])
    # The colour at a mark is that of a gray tile with so much attention.
    at = bar.colors[0, round(shares[2] * 120)].astype(int)
    weights = np.array([[4.0, *[2 / 5] * 5]])  # 4 times uniform: mean 1
    drawn = heat(np.full((1, 6, 3), 128, np.uint8), weights)[0, 0].astype(int)
    assert abs(at - drawn).max() <= 3
    sheet = Sheet("Title", ["a"], [Row("", [np.zeros((9, 9, 3), np.uint8)])], "note", bar)
    plain = Sheet("Title", ["a"], [Row("", [np.zeros((9, 9, 3), np.uint8)])], "note")
    below = sheet.draw()[len(plain.draw()) :]
    strip = below[6]
    assert (strip[8] == bar.colors[0, 0]).all()
    assert len(np.unique(strip[8:200], axis=0)) > 50


def brightness_of(times: float) -> float:
    return math.log(times / 0.25) / math.log(16 / 0.25)


def rows_by_hand(encoder: Encoder, images: torch.Tensor, block: int) -> torch.Tensor:
    """The whole attention matrix of a block, [B, heads, T, T], from weights; float64, nothing fused."""
    net = encoder.backbone.double()
    x, tokens = net.prepare(images.double())
    for index, layer in enumerate(net.blocks):
        q, k, v = layer.attn.heads_of(layer.norm1(x), tokens.rotation)
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(q.shape[-1] ** 0.5).exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if index == block:
            encoder.backbone.float()
            return weights.detach().float()
        x = x + layer.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.norm2(x))
    raise AssertionError


@pytest.mark.parametrize(("registers", "block"), [(0, 1), (4, 0), (4, 1)])
def test_a_patch_reads_its_row_of_the_matrix(registers, block):
    encoder, images = small_encoder(registers), torch.randn(3, 3, 32, 48)
    points = torch.tensor([[0.0, 0.0], [0.99, 0.3], [0.4, 1.0]])
    patches = [0, 1 * 6 + 5, 3 * 6 + 2]
    matrix = rows_by_hand(encoder, images, block)
    maps = query_attention(encoder, images, points, block - 2)
    assert maps.shape == (3, 4, 4, 6)
    for image, patch in enumerate(patches):
        row = matrix[image, :, 1 + registers + patch, 1 + registers :]
        expected = row / row.sum(dim=1, keepdim=True)
        torch.testing.assert_close(maps[image].flatten(1), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(maps.sum(dim=(2, 3)), torch.ones(3, 4))


def test_heads_of_the_class_token_and_blocks_before_the_last():
    encoder, images = small_encoder(4), torch.randn(2, 3, 32, 32)
    for block in (0, 1):
        maps = token_attention(encoder, images, None, block)
        expected = rows_by_hand(encoder, images, block)[:, :, :1, 5:].transpose(1, 2)
        torch.testing.assert_close(maps.flatten(3), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("entries", [1, 2**25])
def test_what_everybody_looks_at_is_the_mean_of_all_rows(entries, monkeypatch):
    monkeypatch.setattr("foveola.models.capture.ATTENTION_AT_ONCE", entries)  # one row at a time, all at once
    encoder, images = small_encoder(4), torch.randn(2, 3, 32, 48)
    rows = rows_by_hand(encoder, images, 1)[:, :, 5:, 5:]
    expected = (rows / rows.sum(dim=-1, keepdim=True)).mean(dim=2)
    torch.testing.assert_close(received_attention(encoder, images).flatten(2), expected, atol=1e-6, rtol=1e-4)


def test_an_encoder_without_class_token_has_rows_of_patches_only():
    torch.manual_seed(0)
    model = ViTConfig(
        width=32, depth=2, heads=4, patch_size=8, image_size=32, class_token=False, positions="rope"
    )
    transform = TransformConfig(resize=32, crop=32)
    encoder = Encoder(EncoderConfig(model=model, transform=transform, pool="average"))
    images = torch.randn(1, 3, 32, 32)
    row = rows_by_hand(encoder, images, 1)[0, :, 10]
    maps = query_attention(encoder, images, torch.tensor([[0.6, 0.6]]))
    torch.testing.assert_close(maps[0].flatten(1), row, atol=1e-6, rtol=1e-4)
    with pytest.raises(UserError, match="no class token"):
        object_attention(encoder, images)
    for block in (2, -3):
        with pytest.raises(UserError, match=f"^block={block}: this encoder has 2 blocks"):
            query_attention(encoder, images, torch.zeros(1, 2), block)


@pytest.mark.parametrize("mass", [0.1, 0.6, 1.0])
def test_the_strongest_patches_hold_the_mass_and_no_fewer_would(mass):
    weights = torch.rand(4, 3, 5, 6) ** 4
    kept = strongest(weights, mass)
    flat, chosen = weights.flatten(2), kept.flatten(2)
    for i in range(4):
        for j in range(3):
            ordered = flat[i, j].double().sort(descending=True).values
            count = int(chosen[i, j].sum())
            total = ordered.sum()
            assert flat[i, j][chosen[i, j]].double().sum() >= mass * total - 1e-9
            assert ordered[: count - 1].sum() < mass * total, "one patch fewer, even the best, holds less"


def test_strongest_of_equal_and_of_no_weights():
    kept = strongest(torch.ones(2, 5), 0.6)
    assert kept.flatten().tolist() == [True] * 6 + [False] * 4
    assert not strongest(torch.zeros(2, 5)).any()
    single = torch.zeros(3, 3)
    single[1, 2] = 2.0
    assert strongest(single).nonzero().tolist() == [[1, 2]]


def test_similarity_is_the_cosine_with_the_patch_under_the_point():
    features = np.random.default_rng(0).normal(size=(3, 5, 7)) + 0.5
    cosines = similarity(features, (0.5, 0.99))
    one = features[2, 2]
    for i in range(3):
        for j in range(5):
            other = features[i, j]
            expected = one @ other / np.sqrt((one @ one) * (other @ other))
            assert cosines[i, j] == pytest.approx(expected, abs=1e-6)
    assert cosines[2, 2] == pytest.approx(1)
    assert np.isfinite(similarity(np.zeros((2, 2, 3)), (0, 0))).all()


def test_correspondences_of_a_shifted_image_are_the_shift(monkeypatch):
    features = np.random.default_rng(1).normal(size=(6, 9, 12))
    first, second = features[:, :7], features[1:, 2:]
    pairs = correspondences(first, second, 100)
    assert len(pairs.cosines) >= 5 * 5
    exact = pairs.cosines > 1 - 1e-6
    assert exact.sum() == 5 * 5, "the patches that are in both"
    np.testing.assert_array_equal(pairs.first[exact] - pairs.second[exact], [[1, 2]] * 25)
    assert (np.diff(pairs.cosines) <= 0).all()
    few = correspondences(first, second)
    assert len(few.cosines) == 12
    monkeypatch.setattr("foveola.figures.maps.COSINES_AT_ONCE", 1)
    again = correspondences(first, second, 100)
    both = [np.concatenate((p.first, p.second), axis=1).tolist() for p in (pairs, again)]
    assert sorted(both[0]) == sorted(both[1])


def test_correspondences_are_mutual():
    a, b = (np.random.default_rng(s).normal(size=(4, 5, 3)) for s in (2, 3))
    unit = [x.reshape(20, 3) / np.linalg.norm(x.reshape(20, 3), axis=1, keepdims=True) for x in (a, b)]
    cosines = unit[0] @ unit[1].T
    expected = [
        (cosines[i, j], divmod(i, 5), divmod(j, 5))
        for i in range(20)
        for j in range(20)
        if cosines[i].argmax() == j and cosines[:, j].argmax() == i
    ]
    expected.sort(reverse=True)
    pairs = correspondences(a, b, 100)
    assert [tuple(place) for place in pairs.first.tolist()] == [e[1] for e in expected]
    assert [tuple(place) for place in pairs.second.tolist()] == [e[2] for e in expected]


def test_points_lie_in_patches():
    assert patch_under((0.0, 0.0), (3, 4)) == (0, 0)
    assert patch_under((1.0, 1.0), (3, 4)) == (2, 3)
    assert patch_under((0.5, 0.34), (3, 4)) == (1, 2)
    assert centre_of((0.55, 0.34), (3, 4)) == (0.625, 0.5)


def test_heads_are_painted_where_they_look():
    image = np.full((8, 8, 3), 200, np.uint8)
    weights = np.zeros((2, 2, 2), np.float32)
    weights[0] = [[0.9, 0.0], [0.1, 0.0]]
    weights[1] = [[0.3, 0.0], [0.3, 0.4]]
    kept = weights > 0.2
    drawn = paint_heads(image, weights, kept)
    red, blue = np.array(HEAD_COLORS[0], float), np.array(HEAD_COLORS[1], float)

    def hue(pixel: np.ndarray) -> np.ndarray:
        return np.argsort(pixel.astype(int))

    assert (hue(drawn[0, 0]) == hue(red)).all(), "both keep it; the first has more of its attention there"
    assert (hue(drawn[6, 1]) == hue(blue)).all()
    assert (drawn[0, 6] == 80).all(), "nobody looks: dark gray"


def test_colours_of_cosines_and_dots():
    colors = cool_to_warm(np.array([[-1.0, 0.0, 1.0]]))
    assert colors[0, 0].argmax() == 2
    assert colors[0, 2].argmax() == 0
    assert np.ptp(colors[0, 1].astype(int)) < 10
    moved = cool_to_warm(np.array([[0.2, 0.6, 1.0]]), 0.2, 1.0)
    np.testing.assert_allclose(moved, colors.astype(int), atol=1)
    dotted = mark(np.zeros((90, 90, 3), np.uint8), (0.5, 0.2))
    assert tuple(dotted[18, 45]) == (255, 30, 30)
    assert not dotted[40:].any()
    linked = link(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 60, 3), np.uint8), *np.full((2, 1, 2), 0.5))
    assert linked.shape == (40, 104, 3)
    assert linked[20, 20].any()
    assert linked[20, 74].any()
    assert not linked[:10, :40].any()
