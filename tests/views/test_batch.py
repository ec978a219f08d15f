"""Views of a batch: pixels and masks agree, every draw has its own stream, objects that are lost."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foveola.data.sample import Canvases
from foveola.geometry import sample
from foveola.views.batch import Batch, Streams, ViewsConfig, make_views
from foveola.views.color import ColorConfig
from foveola.views.objects import ObjectsConfig
from foveola.views.tokens import MaskingConfig

Make = Callable[..., Canvases]
Flat = Callable[[Batch], dict[str, Tensor]]

NO_COLOR = ColorConfig(
    jitter=0, grayscale=0, blur=(0, 0, 0), solarize=(0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1)
)
SMALL = ViewsConfig(
    global_size=32,
    local_size=16,
    local_count=2,
    local_scale=(0.05, 0.25),
    color=NO_COLOR,
    objects=ObjectsConfig(),
    masking=MaskingConfig(),
)
CORNER, MIDDLE = (0.0, 0.0, 0.25, 0.5), (0.25, 0.25, 0.75, 0.625)


def views_of(
    canvases: Canvases, config: ViewsConfig = SMALL, patch: int = 4, seed: int = 0, step: int = 0
) -> Batch:
    return make_views(canvases, config, patch, Streams(seed, step))


def overlap(low: Tensor, high: Tensor, start: float, end: float, flip: Tensor, patches: int) -> Tensor:
    """Fraction of each patch of an axis that [start, end] covers, for views [low, high]; [n, patches]."""
    u0, u1 = (start - low) / (high - low) * patches, (end - low) / (high - low) * patches
    u0, u1 = torch.where(flip, patches - u1, u0), torch.where(flip, patches - u0, u1)
    cells = torch.arange(patches, dtype=torch.float64)
    return (torch.minimum(u1[:, None], cells + 1) - torch.maximum(u0[:, None], cells)).clamp(min=0)


def test_image_and_mask_stay_aligned_in_a_thousand_views(canvases: Make):
    """A white square is where its mask says, in every view, with and without a flip."""
    square = (0.25, 0.375, 0.625, 0.75)
    config = replace(
        SMALL, global_count=20, local_count=0, masking=None, global_size=56, global_scale=(0.1, 1.0)
    )
    batch = views_of(
        canvases([[square]] * 50, aspects=[0.4 + 0.04 * i for i in range(50)], drawn=True), config, 7
    )
    boxes = batch.large.boxes.flatten(0, 1).double()
    flips = batch.large.flips.flatten()
    assert len(boxes) == 1000
    assert 400 < flips.sum() < 600

    # The patches: the formula of a rectangle in a crop, not the mask.
    none = torch.zeros_like(flips)
    across = overlap(boxes[:, 0], boxes[:, 2], square[0], square[2], flips, 8)
    down = overlap(boxes[:, 1], boxes[:, 3], square[1], square[3], none, 8)
    coverage = (down[:, :, None] * across[:, None, :]).flatten(1)
    assert batch.large.objects is not None
    marked = batch.large.objects[:, :, 0].flatten(0, 1)
    clear = (coverage - 1 / 256).abs() > 1e-4
    assert (marked == (coverage >= 1 / 256))[clear].all()

    # The pixels: white inside, black outside, but for a pixel and a canvas pixel around the edge.
    pixels = batch.large.pixels.flatten(0, 1)[:, 0].double()
    across = overlap(boxes[:, 0], boxes[:, 2], square[0], square[2], flips, 56)
    down = overlap(boxes[:, 1], boxes[:, 3], square[1], square[3], none, 56)
    grown = [square[0] - 2 / 64, square[1] - 2 / 64, square[2] + 2 / 64, square[3] + 2 / 64]
    wide = overlap(boxes[:, 0], boxes[:, 2], grown[0], grown[2], flips, 56)
    high = overlap(boxes[:, 1], boxes[:, 3], grown[1], grown[3], none, 56)
    away = 1 - torch.nn.functional.max_pool2d(
        ((high > 0)[:, :, None] & (wide > 0)[:, None, :]).double(), 5, stride=1, padding=2
    )
    shrunk = [square[0] + 2 / 64, square[1] + 2 / 64, square[2] - 2 / 64, square[3] - 2 / 64]
    wide = overlap(boxes[:, 0], boxes[:, 2], shrunk[0], shrunk[2], flips, 56)
    high = overlap(boxes[:, 1], boxes[:, 3], shrunk[1], shrunk[3], none, 56)
    outside = ((high == 1)[:, :, None] & (wide == 1)[:, None, :]).logical_not().double()
    inside = 1 - torch.nn.functional.max_pool2d(outside, 5, stride=1, padding=2)
    assert inside.sum() > 10_000
    assert away.sum() > 10_000
    assert pixels[inside.bool()].min() > 0.95
    assert pixels[away.bool()].max() < 0.05


def test_views_are_samples_of_the_canvas_at_their_boxes(canvases: Make):
    made = canvases([[CORNER], [MIDDLE], [None]])
    batch = views_of(made)
    pixels = made.images.float() / 255
    globals_ = sample(pixels, batch.large.boxes, batch.large.flips, 32).clamp(0, 1)
    assert torch.equal(batch.large.pixels, globals_)
    assert batch.small.boxes is not None
    locals_ = sample(pixels, batch.small.boxes, batch.small.flips, 16).clamp(0, 1)
    assert torch.equal(batch.small.pixels, locals_)
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.indices.tolist() == [100, 101, 102]


def test_a_step_is_a_function_of_seed_step_and_rank(canvases: Make, tensors: Flat):
    made = canvases([[CORNER], [MIDDLE]])
    one, again = views_of(made), views_of(made)
    for name, value in tensors(one).items():
        assert torch.equal(value, tensors(again)[name]), name
    for other in (Streams(1, 0), Streams(0, 1), Streams(0, 0, rank=1)):
        different = make_views(made, SMALL, 4, other)
        for name in ("large.boxes", "small.boxes", "large.pixels", "small.pixels"):
            assert not torch.equal(tensors(one)[name], tensors(different)[name]), name


def test_a_step_ignores_and_leaves_alone_the_global_generator(canvases: Make):
    made = canvases([[CORNER]])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = views_of(made, replace(SMALL, color=ColorConfig()))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(one.large.pixels, views_of(made, replace(SMALL, color=ColorConfig())).large.pixels)


def test_streams_differ_by_name_and_are_stable():
    streams = Streams(3, 5, 1)
    draws = {name: torch.rand(4, generator=streams(name)) for name in ("boxes", "flips", "color", "masks")}
    assert torch.equal(draws["boxes"], torch.rand(4, generator=Streams(3, 5, 1)("boxes")))
    assert len({tuple(d.tolist()) for d in draws.values()}) == 4
    # (seed, step) = (1, 23) and (12, 3) are different runs.
    assert Streams(1, 23)("a").initial_seed() != Streams(12, 3)("a").initial_seed()


class Recorder(Streams):
    """Streams that remember what was asked for."""

    def __init__(self) -> None:
        super().__init__(0, 0)
        self.names: list[str] = []

    def __call__(self, name: str) -> torch.Generator:
        self.names.append(name)
        return super().__call__(name)


def test_no_two_draws_share_a_stream(canvases: Make):
    """The same numbers for boxes and colours would tie them together, unseen."""
    recorder = Recorder()
    objects = ObjectsConfig(aware_local=True, attention_local=True)
    config = replace(SMALL, objects=objects, masking=MaskingConfig(local=True), color=ColorConfig())
    make_views(canvases([[CORNER], [MIDDLE]]), config, 4, recorder)
    assert len(recorder.names) == len(set(recorder.names)) >= 10


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"color": ColorConfig()}, ("boxes", "flips", "objects", "masked")),
        ({"masking": None}, ("boxes", "flips", "objects", "views")),
        ({"local_count": 0}, ("boxes", "flips", "objects", "masked", "views")),
        ({"local_count": 5}, ("boxes", "flips", "objects", "masked", "views")),
        ({"objects": None}, ("flips", "masked")),
        ({"objects": ObjectsConfig(attention=False)}, ("boxes", "flips", "masked", "views")),
        ({"flip": 0.0}, ("boxes", "masked")),
    ],
    ids=lambda value: next(iter(value)),
)
def test_switching_one_thing_does_not_shift_the_draws_of_others(
    canvases: Make, change: dict, same: tuple, tensors: Flat
):
    made = canvases([[CORNER], [MIDDLE], [None]])
    names = {
        "boxes": "large.boxes",
        "flips": "large.flips",
        "objects": "large.objects",
        "views": "large.pixels",
        "masked": "large.hidden_contents.mask",
    }
    before, after = tensors(views_of(made)), tensors(views_of(made, replace(SMALL, **change)))
    for name in same:
        assert torch.equal(before[names[name]], after[names[name]]), name


def test_changing_colour_leaves_local_boxes_alone_too(canvases: Make, tensors: Flat):
    made = canvases([[CORNER]])
    before, after = views_of(made), views_of(made, replace(SMALL, color=ColorConfig()))
    assert torch.equal(tensors(before)["small.boxes"], tensors(after)["small.boxes"])
    assert not torch.equal(tensors(before)["small.pixels"], tensors(after)["small.pixels"])


def test_flips_come_at_their_rate(canvases: Make):
    config = replace(SMALL, global_count=100, global_size=4, local_count=100, local_size=4, masking=None)
    batch = views_of(canvases([[None]] * 20), config)
    assert batch.large.flips.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert batch.small.flips is not None
    assert batch.small.flips.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert not torch.equal(batch.large.flips, batch.small.flips)
    assert not views_of(canvases([[None]]), replace(config, flip=0.0)).large.flips.any()
    assert views_of(canvases([[None]]), replace(config, flip=1.0)).large.flips.all()


def test_images_that_are_the_object_are_cropped_and_read_as_without_objects(canvases: Make, tensors: Flat):
    whole = canvases([[None]] * 4, aspects=[0.5, 1.0, 2.0, 3.0])
    odis, plain = views_of(whole), views_of(whole, replace(SMALL, objects=None))
    for name in (
        "large.pixels",
        "large.boxes",
        "large.flips",
        "small.pixels",
        "small.boxes",
        "large.hidden_contents.mask",
    ):
        assert torch.equal(tensors(odis)[name], tensors(plain)[name]), name
    assert plain.large.objects is None
    assert odis.large.objects is not None
    assert odis.large.objects.all()
    assert odis.facts["objects/first_try"] == 1
    assert odis.facts["objects/whole"] == 1


def test_local_views_do_not_depend_on_the_object(canvases: Make, tensors: Flat):
    """They are drawn from the whole image and read without a mask."""
    one, other = views_of(canvases([[CORNER]] * 3)), views_of(canvases([[MIDDLE]] * 3))
    assert one.small.objects is None
    assert torch.equal(tensors(one)["small.pixels"], tensors(other)["small.pixels"])
    assert torch.equal(tensors(one)["small.boxes"], tensors(other)["small.boxes"])
    assert not torch.equal(one.large.boxes, other.large.boxes)


def test_an_object_lost_in_one_view_becomes_the_whole_image_in_all(canvases: Make):
    """Without object-aware boxes, a corner of the image is often out of view."""
    config = replace(
        SMALL,
        global_scale=(0.25, 0.8),
        objects=ObjectsConfig(aware=False, attention_local=True),
        local_scale=(0.3, 0.4),
        local_count=1,
    )
    corner = (0.125, 0.125, 0.25, 0.25)
    batch = views_of(canvases([[corner, None]] * 64), config)
    assert batch.large.objects is not None
    assert batch.small.objects is not None
    boxes = batch.large.boxes
    seen = ((boxes[..., 0] < 0.24) & (boxes[..., 1] < 0.24)).all(dim=1)  # at least a part, in both views
    lost = ((boxes[..., 0] > 0.25) | (boxes[..., 1] > 0.25)).any(dim=1)
    assert seen.any()
    assert lost.any()
    assert batch.large.objects[lost, :, 0].all()
    assert not batch.large.objects[seen, :, 0].all(-1).any()
    assert batch.small.objects[lost, :, 0].all()
    assert batch.large.objects[:, :, 1].all()  # the second object is the image
    assert batch.facts["objects/lost"].item() * 2 * 64 == pytest.approx(lost.sum().item(), abs=2)
    # A local view without the object is read as a whole.
    local = batch.small.boxes
    assert local is not None
    gone = ((local[..., 0] > 0.25) | (local[..., 1] > 0.25))[:, 0]
    assert batch.small.objects[gone, 0, 0].all()
    here = ((local[..., 0] < 0.24) & (local[..., 1] < 0.24))[:, 0] & seen
    assert not batch.small.objects[here, 0, 0].all(-1).any()


def test_an_empty_mask_is_read_as_the_whole_image(canvases: Make):
    made = canvases([[CORNER], [CORNER]])
    made.object_masks[1] = 0
    batch = views_of(made)
    assert batch.large.objects is not None
    assert batch.large.objects[1].all()
    assert not batch.large.objects[0].all()
    assert batch.facts["objects/lost"] == 0.5
    assert batch.large.pixels.isfinite().all()


def test_an_object_of_one_pixel_is_seen_or_the_whole(canvases: Make):
    made = canvases([[(0.5, 0.5, 0.53125, 0.53125)]] * 32)
    batch = views_of(made)
    assert batch.large.objects is not None
    assert batch.large.objects.any(-1).all()
    count = batch.large.objects.sum(-1)
    assert ((count <= 4) | (count == 64)).all()
    assert (count <= 4).float().mean() > 0.9
    x0, y0, x1, y1 = batch.large.boxes.unbind(-1)
    held = (x0 < 0.53125) & (x1 > 0.5) & (y0 < 0.53125) & (y1 > 0.5)
    assert held.float().mean() > 0.9


def test_the_image_token_is_last_and_reads_everything(canvases: Make):
    made = canvases([[CORNER, MIDDLE]] * 2)
    plain = views_of(made)
    config = replace(SMALL, objects=ObjectsConfig(image_token=True, attention_local=True))
    batch = views_of(made, config)
    assert batch.large.objects is not None
    assert plain.large.objects is not None
    assert batch.small.objects is not None
    assert batch.large.objects.shape[2] == 3
    assert torch.equal(batch.large.objects[:, :, :2], plain.large.objects)
    assert batch.large.objects[:, :, 2].all()
    assert batch.small.objects.shape[2] == 3
    assert batch.small.objects[:, :, 2].all()


def test_masked_indices_are_the_masked_patches(canvases: Make, tensors: Flat):
    batch = views_of(canvases([[CORNER]] * 8))
    assert batch.large.hidden_contents.mask.any()
    rebuilt = torch.zeros(8 * 2 * 64, dtype=torch.bool)
    rebuilt[batch.large.hidden_contents.indices] = True
    assert torch.equal(rebuilt.view(8, 2, 64), batch.large.hidden_contents.mask)
    assert (batch.large.hidden_contents.indices.diff() > 0).all()
    assert batch.small.hidden_contents is None
    local = views_of(canvases([[CORNER]] * 8), replace(SMALL, masking=MaskingConfig(local=True)))
    assert local.small.hidden_contents is not None
    assert local.small.hidden_contents.mask.shape == (8, 2, 16)
    assert local.small.hidden_contents.mask.any()
    assert torch.equal(tensors(local)["large.hidden_contents.mask"], batch.large.hidden_contents.mask)


def test_only_the_first_global_view_is_the_first(canvases: Make, tensors: Flat):
    """Blur and solarise know first, other and local views."""
    color = replace(NO_COLOR, solarize=(0.0, 1.0, 0.0))
    config = replace(SMALL, global_count=3, color=color, masking=None)
    made = canvases([[CORNER]])
    plain, solarized = views_of(made, replace(config, color=NO_COLOR)), views_of(made, config)
    same = (plain.large.pixels == solarized.large.pixels).flatten(2).all(-1)[0]
    assert same.tolist() == [True, False, False]
    assert torch.equal(tensors(plain)["small.pixels"], tensors(solarized)["small.pixels"])


def test_sizes_must_be_whole_patches():
    with pytest.raises(
        ValueError, match=r"views\.global_size=32 is not a multiple of the patch size 14.*28 or 42"
    ):
        SMALL.check(14)
    with pytest.raises(ValueError, match=r"views\.local_size=16 .* patch size 32; try 32$"):
        SMALL.check(32)
    replace(SMALL, local_count=0).check(32)
    SMALL.check(8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_scale": (0.5, 0.4)},
        {"local_scale": (0.0, 0.4)},
        {"global_scale": (0.5, 1.1)},
        {"ratio": (2.0, 1.0)},
    ],
    ids=lambda value: next(iter(value)),
)
def test_impossible_ranges_are_refused(wrong: dict):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(SMALL, **wrong)


@pytest.mark.gpu
def test_a_step_is_the_same_on_a_gpu(canvases: Make, tensors: Flat):
    made = canvases([[CORNER], [MIDDLE], [None]])
    config = replace(SMALL, color=ColorConfig())
    cpu, gpu = tensors(views_of(made, config)), tensors(views_of(made.to("cuda"), config))
    for name, value in cpu.items():
        other = gpu[name].cpu()
        if value.is_floating_point():
            assert torch.allclose(value, other, atol=1e-4), name
        else:
            assert torch.equal(value, other), name
