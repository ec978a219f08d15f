"""Views in the position field: inside it, moved together, of the areas that were asked for."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveola.data.sample import Canvases
from foveola.views.batch import Batch, Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.placement import PlacementConfig, draw_areas, place_views

Make = Callable[..., Canvases]
Flat = Callable[[Batch], dict[str, Tensor]]
VIEWS = ViewsConfig(global_size=32, local_size=16, local_count=3, color=ColorConfig())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_boxes(count: int, views: int, seed: int = 1) -> Tensor:
    corners = torch.rand(count, views, 2, 2, generator=generator(seed)).sort(dim=2).values
    corners[:, :, 1] = torch.maximum(corners[:, :, 1], corners[:, :, 0] + 0.01).clamp(max=1)
    corners[:, :, 0] = torch.minimum(corners[:, :, 0], corners[:, :, 1] - 0.01)
    return corners.flatten(2)


@pytest.mark.parametrize("around", ["views", "image"])
def test_100_000_images_stay_inside_and_keep_their_geometry(around: str):
    boxes = some_boxes(100_000, 4)
    placed = place_views(PlacementConfig(around=around), boxes, generator())
    assert placed.dtype == torch.float32
    assert placed.min() >= 0
    assert placed.max() <= 1
    # One factor and one shift per image explain all 4 x 4 coordinates.
    before, after = (t.double().unflatten(2, (2, 2)).flatten(1, 2) for t in (boxes, placed))  # [B, 8, 2]
    wide = before.amax(dim=1) - before.amin(dim=1)
    factor = (after.amax(dim=1) - after.amin(dim=1)) / wide
    torch.testing.assert_close(factor[:, 0], factor[:, 1], rtol=1e-4, atol=1e-5)
    shift = after.amin(dim=1, keepdim=True) - factor[:, None] * before.amin(dim=1, keepdim=True)
    error = (after - factor[:, None] * before - shift).abs().max()
    assert float(error) < 3e-7


def test_the_rectangle_around_the_views_has_the_drawn_area():
    boxes, config = some_boxes(5000, 3), PlacementConfig()
    placed = place_views(config, boxes, generator())
    areas = draw_areas(config, 5000, generator())
    low, high = boxes[..., :2].amin(dim=1), boxes[..., 2:].amax(dim=1)
    sides = (high - low).double()
    limit = torch.minimum(areas, sides.prod(dim=1) / sides.amax(dim=1) ** 2)  # as large as its shape allows
    found = (placed[..., 2:].amax(dim=1) - placed[..., :2].amin(dim=1)).double().prod(dim=1)
    torch.testing.assert_close(found, limit, rtol=1e-4, atol=1e-5)
    assert 0.5 < float((limit == areas).double().mean()) < 1


def test_the_whole_image_has_the_drawn_area_and_a_uniform_place():
    from scipy.stats import kstest

    whole, config = torch.tensor([[[0.0, 0, 1, 1]]]).expand(20_000, 1, 4), PlacementConfig(around="image")
    placed = place_views(config, whole, generator()).double()
    x0, y0, x1, y1 = placed[:, 0].unbind(dim=1)
    torch.testing.assert_close(
        (x1 - x0) * (y1 - y0), draw_areas(config, 20_000, generator()), rtol=1e-4, atol=1e-6
    )
    for low, high in ((x0, x1), (y0, y1)):
        assert kstest((low / (1 - (high - low))).numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack((x0 / (1 - x1 + x0), y0 / (1 - y1 + y0))))[0, 1])) < 0.03
    # One image's box is that of the views in it.
    boxes = some_boxes(20_000, 2)
    r = (x1 - x0)[:, None, None]
    expected = r * boxes + torch.stack((x0, y0, x0, y0), dim=1)[:, None]
    torch.testing.assert_close(place_views(config, boxes, generator()).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "law"),
    [
        (PlacementConfig(), ("beta", (2, 5, 0.2, 0.8))),
        (PlacementConfig(beta=(1, 3), area=(0.1, 0.5)), ("beta", (1, 3, 0.1, 0.4))),
        (PlacementConfig(beta=(4, 1)), ("beta", (4, 1, 0.2, 0.8))),
        (PlacementConfig(distribution="uniform"), ("uniform", (0.2, 0.8))),
    ],
)
def test_areas_follow_their_distribution(config: PlacementConfig, law: tuple):
    from scipy.stats import kstest

    areas = draw_areas(config, 100_000, generator())
    assert kstest(areas.numpy(), law[0], law[1]).pvalue > 1e-3


def test_a_constant_area_of_one_leaves_images_where_they_are():
    boxes = some_boxes(100, 4)
    config = PlacementConfig(around="image", distribution="constant")
    assert torch.equal(place_views(config, boxes, generator()), boxes)
    small = place_views(replace(config, area=(0.2, 0.25)), boxes, generator())
    torch.testing.assert_close(small[..., 2:] - small[..., :2], (boxes[..., 2:] - boxes[..., :2]) / 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"area": (0.5, 0.2)}, "area: needs low <= high")],
)
def test_impossible_settings_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PlacementConfig(**wrong)


# -- in a batch ----------------------------------------------------------------------------------------------


def test_local_views_move_with_the_global_ones(canvases: Make):
    batch = make_views(canvases([[None]] * 6), replace(VIEWS, placement=PlacementConfig()), 4, Streams(0, 0))
    assert batch.large.positions.shape == (6, 2, 4)
    assert batch.small.positions.shape == (6, 3, 4)
    boxes = torch.cat((batch.large.boxes, batch.small.boxes), dim=1)
    places = torch.cat((batch.large.positions, batch.small.positions), dim=1)
    for n in range(6):
        factor = (places[n, :, 2] - places[n, :, 0]) / (boxes[n, :, 2] - boxes[n, :, 0])
        torch.testing.assert_close(factor, factor[:1].expand(5), rtol=1e-4, atol=1e-5)
        shift = places[n, :, :2] - factor[:, None] * boxes[n, :, :2]
        torch.testing.assert_close(shift, shift[:1].expand(5, 2), rtol=0, atol=1e-4)


def test_moving_views_changes_nothing_but_their_places(canvases: Make, tensors: Flat):
    made = canvases([[None]] * 4)
    before = make_views(made, VIEWS, 4, Streams(0, 0))
    after = make_views(made, replace(VIEWS, placement=PlacementConfig()), 4, Streams(0, 0))
    assert before.large.positions is before.large.boxes
    assert before.small.positions is before.small.boxes
    assert len(tensors(before)) >= 10
    for name, value in tensors(before).items():
        if not name.endswith("positions"):
            assert torch.equal(value, tensors(after)[name]), name
    assert not torch.equal(after.large.positions, after.large.boxes)
    none = make_views(made, replace(VIEWS, local_count=0, placement=PlacementConfig()), 4, Streams(0, 0))
    assert none.small is None
    assert none.large.positions.shape == (4, 2, 4)


def test_a_step_is_a_function_of_its_number(canvases: Make):
    made, config = canvases([[None]] * 4), replace(VIEWS, placement=PlacementConfig())
    one, same, other = (make_views(made, config, 4, Streams(0, step)) for step in (3, 3, 4))
    assert torch.equal(one.large.positions, same.large.positions)
    assert not torch.equal(one.large.positions, other.large.positions)
