"""The position field: against loops, against cutting an image of its values, and in a network."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from foveola.geometry import sample
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.plain import as_plain
from foveola.models.positions import PositionField
from foveola.models.vit import Inputs, VisionTransformer, ViTConfig
from foveola.zoo.load import load

KINDS = list(itertools.product(["linear", "bicubic"], ["cells", "corners"]))
MODEL = ViTConfig(
    width=24,
    depth=2,
    heads=3,
    patch_size=4,
    image_size=16,
    drop_path=0.0,
    positions="field",
    field_size=(7, 9),
)


def field(
    size: tuple[int, int] = (7, 9), width: int = 5, interpolation: str = "linear", alignment: str = "cells"
) -> PositionField:
    made = PositionField(size, width, interpolation, alignment)
    torch.manual_seed(0)
    with torch.no_grad():
        made.values.copy_(torch.randn(*size, width))
    return made


def some_boxes(count: int, seed: int = 0, least: float = 0.05) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    corners[:, 1] = torch.minimum(torch.maximum(corners[:, 1], corners[:, 0] + least), torch.tensor(1.0))
    corners[:, 0] = torch.minimum(corners[:, 0], corners[:, 1] - least)
    return corners.flatten(1)


def kernel(x: float, kind: str) -> float:
    x = abs(x)
    if kind == "linear":
        return max(1 - x, 0)
    a = -0.5
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0


def naive(made: PositionField, grid: tuple[int, int], box: Tensor, flip: bool) -> Tensor:
    """Patch by patch, node by node, in float64."""
    values = made.values.detach().double()
    rows, columns, width = values.shape
    x0, y0, x1, y1 = box.double().tolist()
    out = torch.zeros(grid[0] * grid[1], width, dtype=torch.float64)
    for i, j in itertools.product(range(grid[0]), range(grid[1])):
        across = (j + 0.5) / grid[1]
        x = x0 + (x1 - x0) * (1 - across if flip else across)
        y = y0 + (y1 - y0) * (i + 0.5) / grid[0]
        total = 0.0
        for r, c in itertools.product(range(rows), range(columns)):
            if made.alignment == "cells":
                at = (r + 0.5) / rows, (c + 0.5) / columns
                scale = rows, columns
            else:
                at = r / (rows - 1), c / (columns - 1)
                scale = rows - 1, columns - 1
            weight = kernel((y - at[0]) * scale[0], made.interpolation)
            weight *= kernel((x - at[1]) * scale[1], made.interpolation)
            out[i * grid[1] + j] += weight * values[r, c]
            total += weight
        out[i * grid[1] + j] /= total
    return out


@pytest.mark.parametrize(("interpolation", "alignment"), KINDS)
def test_against_a_loop_over_patches_and_nodes(interpolation: str, alignment: str):
    made = field(interpolation=interpolation, alignment=alignment)
    boxes = torch.cat((some_boxes(6), torch.tensor([[0.0, 0, 1, 1], [0, 0, 0.1, 0.08], [0.93, 0.9, 1, 1]])))
    flips = torch.arange(9) % 2 == 1
    for grid in ((3, 4), (14, 11)):
        found = made(grid, boxes, flips)
        for n, box in enumerate(boxes):
            expected = naive(made, grid, box, bool(flips[n])).float()
            torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("interpolation", ["linear", "bicubic"])
def test_as_many_patches_of_the_whole_image_read_the_field_itself(interpolation: str):
    for size in ((7, 9), (50, 50), (19, 19)):
        made = field(size, interpolation=interpolation)
        assert torch.equal(made(size)[0], made.values.flatten(0, 1))
        whole, flips = torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([True])
        assert torch.equal(made(size, whole, flips)[0], made.values.flip(1).flatten(0, 1))


def test_half_a_image_reads_the_interpolated_half():
    made = field((4, 4), 1)
    v = made.values[..., 0].detach()
    left = made((4, 4), torch.tensor([[0.0, 0, 0.5, 1]]))[0, :, 0].view(4, 4)
    # Columns of 1/8: centres at 1/16, 3/16 ..., nodes at 1/8, 3/8: outside, between 3 : 1, 1 : 3, ...
    expected = [v[:, 0], 0.75 * v[:, 0] + 0.25 * v[:, 1], 0.25 * v[:, 0] + 0.75 * v[:, 1]]
    expected.append(0.75 * v[:, 1] + 0.25 * v[:, 2])
    torch.testing.assert_close(left, torch.stack(expected, dim=1))
    # The same half in as many patches as it has nodes: the nodes.
    torch.testing.assert_close(made((4, 2), torch.tensor([[0.0, 0, 0.5, 1]]))[0, :, 0].view(4, 2), v[:, :2])


@pytest.mark.parametrize("interpolation", ["linear", "bicubic"])
def test_boxes_and_flips_are_those_of_cutting_a_image_of_the_field(interpolation: str):
    """Wherever cutting does not shrink, so that antialiasing widens nothing."""
    made = field(interpolation=interpolation)
    image = made.values.detach().permute(2, 0, 1)[None]
    boxes, flips = some_boxes(8)[None], torch.tensor([[False, True] * 4])
    cut = sample(image, boxes, flips, (12, 10), interpolation)[0]
    read = made((12, 10), boxes[0], flips[0])
    torch.testing.assert_close(read, cut.flatten(2).mT, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("interpolation", "alignment"), KINDS)
def test_a_field_of_coordinates_tells_where_patches_are(interpolation: str, alignment: str):
    made = PositionField((11, 13), 2, interpolation, alignment)
    y, x = (
        (torch.arange(n) + 0.5) / n if alignment == "cells" else torch.linspace(0, 1, n) for n in (11, 13)
    )
    with torch.no_grad():
        made.values.copy_(torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=2).flip(2))
    boxes = 0.2 + 0.6 * some_boxes(20)  # away from the border, beyond whose last nodes nothing is known
    flips = torch.arange(20) % 2 == 0
    read = made((5, 6), boxes, flips).unflatten(1, (5, 6))
    for n, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        for i, j in itertools.product(range(5), range(6)):
            across = (5.5 - j if flips[n] else j + 0.5) / 6
            expected = (x0 + (x1 - x0) * across, y0 + (y1 - y0) * (i + 0.5) / 5)
            assert read[n, i, j].tolist() == pytest.approx(expected, abs=1e-5)


def test_overlapping_views_read_the_same_at_the_same_place():
    made = field()
    wide = made((4, 8), torch.tensor([[0.1, 0.2, 0.9, 0.8]]))[0].view(4, 8, -1)
    inner = made((4, 4), torch.tensor([[0.3, 0.2, 0.7, 0.8]]), torch.tensor([True]))[0].view(4, 4, -1)
    torch.testing.assert_close(inner.flip(1), wide[:, 2:6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("interpolation", "alignment"), KINDS)
def test_gradients_in_float64(interpolation: str, alignment: str):
    made = PositionField((4, 5), 2, interpolation, alignment).double()
    boxes, flips = some_boxes(3).double(), torch.tensor([True, False, True])
    values = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)

    def read(values: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"values": values}, ((3, 2), boxes, flips))

    assert torch.autograd.gradcheck(read, (values,))


def test_gradients_reach_only_the_nodes_around_a_view():
    made = field((10, 10), 3)
    box = torch.tensor([[0.31, 0.52, 0.48, 0.69]])  # nodes at 0.05, 0.15, ...
    made((5, 5), box).sum().backward()
    touched = made.values.grad.abs().sum(dim=2) > 0
    expected = torch.zeros(10, 10, dtype=torch.bool)
    # Centres from x = 0.327 to 0.463, so nodes 0.25 to 0.55; from y = 0.537 to 0.673, so nodes 0.45 to 0.75.
    expected[4:8, 2:6] = True
    assert torch.equal(touched, expected)


def test_half_precision_leaves_positions_alone():
    made = field()
    boxes = some_boxes(3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = made((6, 6), boxes)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, made((6, 6), boxes))


@pytest.mark.parametrize("alignment", ["cells", "corners"])
def test_a_field_may_start_from_the_sines_of_a_table(alignment: str):
    config = replace(MODEL, position_init="sincos", field_size=(40, 40), field_alignment=alignment)
    table = VisionTransformer(replace(config, positions="learned")).pos_embed[:, 1:]
    read = VisionTransformer(config).positions((4, 4))
    assert (read - table).abs().max() < 0.02  # between nodes
    own = replace(config, field_size=(4, 4), field_alignment="cells")
    torch.testing.assert_close(VisionTransformer(own).positions((4, 4)), table)


def test_the_image_of_a_field_shows_its_principal_components():
    made = PositionField((8, 6), 10)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 6), indexing="ij")
    directions = torch.linalg.qr(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        made.values.copy_(3 * x[..., None] * directions[:, 0] + y[..., None] * directions[:, 1])
    image = made.image(80)
    assert image.shape == (80, 60, 3)
    assert image.dtype == np.uint8
    small = image[::10, ::10].astype(int)
    red, green = small[..., 0], small[..., 1]
    assert (red == red[:1]).all()  # of x alone, and all the way
    steps = np.diff(red[0])
    assert (steps > 0).all() or (steps < 0).all()
    assert {red.min(), red.max()} == {0, 255}
    assert (np.abs(green - green[:, :1]) <= 1).all()  # of y alone
    assert (np.abs(np.diff(green[:, 0])) > 20).all()
    assert PositionField((5, 5), 2).image().shape == (
        200,
        200,
        3,
    )  # all zero, and fewer than three channels


# -- in a network --------------------------------------------------------------------------------------------


def network(config: ViTConfig = MODEL) -> VisionTransformer:
    torch.manual_seed(0)
    made = VisionTransformer(config)
    made.learn_position_mask()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made.eval()


def test_tokens_are_patches_and_what_the_field_holds_at_their_centres():
    made, images = network(), torch.randn(3, 3, 16, 16)
    boxes, flips = some_boxes(3), torch.tensor([False, True, False])
    unplaced = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    masked = ~unplaced & (torch.arange(16) % 3 == 0)
    found, grid = made.embed(images, Inputs(masked=masked, positions=boxes, flips=flips, unplaced=unplaced))
    assert grid == (4, 4)
    content = made.patch_embed(images)
    for n in range(3):
        positions = naive(made.pos_field, (4, 4), boxes[n], bool(flips[n])).float()
        for k in range(16):
            what = made.mask_token[0, 0] if masked[n, k] else content[n, k]
            where = made.pos_mask_token[0, 0] if unplaced[n, k] else positions[k]
            torch.testing.assert_close(found[n, k], what + where, rtol=1e-4, atol=1e-4)


def test_an_unplaced_patch_has_lost_where_it_was():
    """Moving the view moves the positions of its patches, but not of one that has none."""
    made, images = network(), torch.randn(1, 3, 16, 16)
    here, there = torch.tensor([[0.0, 0, 0.5, 0.5]]), torch.tensor([[0.5, 0.4, 1, 1]])
    unplaced = torch.zeros(1, 16, dtype=torch.bool)
    unplaced[0, 5] = True
    a, _ = made.embed(images, Inputs(positions=here, unplaced=unplaced))
    b, _ = made.embed(images, Inputs(positions=there, unplaced=unplaced))
    same = (a == b).all(dim=2)
    assert torch.equal(same, unplaced)


def test_kept_patches_keep_their_positions():
    made, images = network(), torch.randn(2, 3, 16, 16)
    keep = torch.tensor([[3, 7, 9], [0, 15, 4]])
    boxes = some_boxes(2)
    all_of_them, _ = made.embed(images, Inputs(positions=boxes))
    some, _ = made.embed(images, Inputs(kept=keep, positions=boxes))
    torch.testing.assert_close(some, torch.stack([all_of_them[n, keep[n]] for n in range(2)]))


def test_gradients_reach_the_field_and_the_position_mask():
    made = network()
    unplaced = torch.arange(16)[None] < 4
    made(torch.randn(1, 3, 16, 16), Inputs(unplaced=unplaced)).patches.square().sum().backward()
    assert made.pos_field.values.grad.abs().sum() > 0
    assert made.pos_mask_token.grad.abs().sum() > 0


def test_what_a_network_lacks_is_said():
    plain = VisionTransformer(replace(MODEL, positions="learned"))
    images = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="no position field"):
        plain(images, Inputs(positions=torch.tensor([[0.0, 0, 1, 1]])))
    with pytest.raises(ValueError, match="no token for patches without position"):
        plain(images, Inputs(unplaced=torch.ones(1, 16, dtype=torch.bool)))
    rotary = VisionTransformer(replace(MODEL, positions="rope", width=48))
    rotary.learn_position_mask()
    with pytest.raises(ValueError, match="no token for patches without position"):
        rotary(images, Inputs(unplaced=torch.ones(1, 16, dtype=torch.bool)))


def test_position_masks_work_on_learned_tables_too():
    made = network(replace(MODEL, positions="learned"))
    images = torch.randn(1, 3, 16, 16)
    unplaced = torch.arange(16)[None] == 2
    found, _ = made.embed(images, Inputs(unplaced=unplaced))
    expected = made.patch_embed(images) + made.pos_embed[:, 1:]
    expected[0, 2] = made.patch_embed(images)[0, 2] + made.pos_mask_token[0, 0]
    torch.testing.assert_close(found, expected)


# -- what users keep -----------------------------------------------------------------------------------------


def encoder(**changes) -> Encoder:
    model = replace(MODEL, registers=2, **changes)
    pool = "token" if model.class_token else "average"
    config = EncoderConfig(model, TransformConfig(resize=28, crop=24), pool=pool)
    torch.manual_seed(0)
    made = Encoder(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def test_an_encoder_with_a_field_is_saved_and_loaded(tmp_path: Path):
    made, images = encoder(), torch.randn(2, 3, 24, 32)
    made.save(tmp_path)
    after = load(tmp_path)
    assert after.fingerprint() == made.fingerprint()
    assert torch.equal(after(images).patches, made(images).patches)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("alignment", ["cells", "corners"])
def test_a_plain_encoder_has_a_table_and_the_same_outputs(class_token: bool, alignment: str, tmp_path: Path):
    made = encoder(class_token=class_token, field_alignment=alignment)
    plain = as_plain(made)
    images, objects = torch.randn(2, 3, 24, 24), torch.rand(2, 3, 36) < 0.4
    for inputs in ((images,), (images, objects)):
        before, after = made(*inputs), plain(*inputs)
        for name in ("objects", "registers", "patches"):
            assert torch.equal(getattr(before, name), getattr(after, name)), name
    weights = plain.weights()
    assert weights["pos_embed"].shape == (1, 36 + class_token, 24)
    assert not [name for name in weights if "field" in name]
    plain.save(tmp_path)
    assert torch.equal(load(tmp_path)(images).patches, made(images).patches)
    large = torch.randn(1, 3, 40, 40)
    assert torch.equal(as_plain(made, 40)(large).patches, made(large).patches)
    assert as_plain(plain) is plain
    with pytest.raises(ValueError, match="image_size=30 is not a multiple of patch_size=4"):
        as_plain(made, 30)


def test_sizes_without_a_table_are_close_to_it():
    """A smooth field of 50 x 50 read at another size, and a table of it that is resized."""
    made = encoder(field_size=(50, 50), position_init="sincos")
    made.backbone.pos_field.reset((6, 6))
    table = as_plain(made).backbone.positions((9, 9))
    read = made.backbone.positions((9, 9))
    error = (table - read).square().mean().sqrt() / read.square().mean().sqrt()
    assert 0 < float(error) < 0.15
