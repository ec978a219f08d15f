from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveola.config import UserError
from foveola.data.sample import Objects, Sample
from foveola.evaluation.features.table import (
    ExtractConfig,
    RowsCut,
    extract,
    extract_tables,
    mask_modes,
    object_crop,
)
from foveola.evaluation.images import ImageRows, Images, choose_images, read_parcels
from foveola.models.encoder import TransformConfig
from foveola.progress import show

TRANSFORM = TransformConfig(resize=40, crop=32)
LOCAL = {"workers": 0}


def cut_of(transform: TransformConfig = TRANSFORM, patch: int = 8, **settings) -> RowsCut:
    return RowsCut(transform, patch, ExtractConfig(**LOCAL, **settings))


# -- the image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (37, 111), (40, 40), (20, 30), (900, 33)])
def test_images_equal_the_encoders_own_transform(encoder, list_source, make_sample, shape) -> None:
    sample = make_sample(0, height=shape[0], width=shape[1])
    image = cut_of()(sample, 0).images
    expected = encoder.transform(Image.fromarray(sample.image))
    difference = (encoder.normalise(image)[0] - expected).abs().max()
    assert difference <= 1.01 / 255 / 0.224  # one level


def square(height: int, width: int, box: tuple[int, int, int, int]) -> Sample:
    """A red square on black, with its box as the object."""
    x0, y0, x1, y1 = box
    image = np.zeros((height, width, 3), np.uint8)
    image[y0:y1, x0:x1, 0] = 255
    unit = np.array([[x0 / width, y0 / height, x1 / width, y1 / height]], np.float32)
    return Sample(image, "square", Objects(unit, (unit[:, 2] - unit[:, 0]) * (unit[:, 3] - unit[:, 1])))


@pytest.mark.parametrize("view", ["image", "object"])
def test_mask_and_image_are_cut_alike(list_source, view) -> None:
    """Wherever the crop puts a red square, the mask marks the patches that are red, and no black one."""
    rng, patch, seen = np.random.default_rng(0), 4, 0
    for _ in range(60):
        height, width = (int(n) for n in rng.integers(40, 160, 2))
        x0, y0 = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
        box = (x0, y0, x0 + int(rng.integers(8, 21)), y0 + int(rng.integers(8, 21)))
        sample = square(height, width, box)
        rows = cut_of(patch=patch, rows="objects", view=view)(sample, 0)
        red = rows.images[0, 0].float().div(255).unflatten(0, (8, patch)).unflatten(2, (8, patch))
        red = red.mean(dim=(1, 3)).flatten()
        if not rows.has_mask[0]:  # the crop lost it: no whole pixel may be red
            assert red.max() < 1 / patch**2
            continue
        seen += 1
        mask = rows.masks[0]
        assert (red[~mask] < 0.15).all()  # what bicubic resampling bleeds
        assert (red[mask] > 0).all() or (mask.sum() == 1)
        assert mask[red > 0.15].all()
    assert seen > 30


@pytest.mark.parametrize(("least", "count"), [(None, 9), (0.1, 9), (0.2, 8), (0.3, 6), (0.51, 4)])
def test_a_patch_is_read_from_the_share_that_the_object_covers(list_source, least, count) -> None:
    """Of 2.5 x 2.25 patches four are covered whole, two by half, two by a quarter, one by an eighth."""
    sample = square(32, 32, (0, 0, 20, 18))
    whole = TransformConfig(resize=32, crop=32)
    rows = cut_of(whole, min_coverage=least, mask_canvas=32)(sample, 0)
    assert int(rows.masks.sum()) == count
    tiny = square(32, 32, (9, 9, 10, 10))
    rows = cut_of(whole, min_coverage=least, mask_canvas=32)(tiny, 0)
    assert rows.masks[0].nonzero().tolist() == [[5]]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch) -> None:
    assert list(show(range(3), 3, "things", progress=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ""  # less than a minute
    monkeypatch.setattr("foveola.progress.SAY_SECONDS", 0.0)
    assert list(show(range(3), 3, "things", progress=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    list(show(range(3), 3, "things", progress=True))
    assert capsys.readouterr().err.splitlines()[2] == "things: 2 of 3 in 0 min"


def test_mirrored_boxes_give_mirrored_masks(list_source, make_sample) -> None:
    rng = np.random.default_rng(1)
    for seed in range(40):
        height, width = (int(n) for n in rng.integers(16, 120, 2) * 2)
        x0, y0 = rng.uniform(0, width - 9), rng.uniform(0, height - 9)
        x1, y1 = x0 + rng.uniform(1, width - x0), y0 + rng.uniform(1, height - y0)
        # An even surplus on both sides of the crop, so that the centre crop is itself symmetric.
        here = make_sample(seed, [(x0, y0, x1, y1)], height, width)
        there = make_sample(seed, [(width - x1, y0, width - x0, y1)], height, width)
        surplus = round(width * 40 / min(height, width)) - 32
        if surplus % 2:
            continue
        a, b = (cut_of(patch=4)(s, 0) for s in (here, there))
        assert torch.equal(a.masks.view(8, 8).flip(1), b.masks.view(8, 8))
        assert torch.equal(a.has_mask, b.has_mask)


def test_any_pixel_rule(list_source, make_sample) -> None:
    """Images of 256 x 256 at 16-pixel patches: the crop begins at pixel 16."""
    transform = TransformConfig(resize=256, crop=224)

    def marked(box: tuple[float, float, float, float]) -> list[tuple[int, int]]:
        sample = make_sample(0, [box], 256, 256)
        rows = cut_of(transform, 16)(sample, 0)
        assert rows.has_mask[0]
        return [tuple(cell) for cell in rows.masks.view(14, 14).nonzero().tolist()]

    assert marked((16 + 35, 16 + 20, 16 + 36, 16 + 21)) == [(1, 2)]  # one pixel
    assert marked((16 + 16, 16, 16 + 32, 240)) == [(row, 1) for row in range(14)]  # exactly one column
    assert marked((16 + 15, 16, 16 + 33, 240)) == [(row, column) for row in range(14) for column in (0, 1, 2)]
    assert marked((16 + 40.3, 16 + 40.3, 16 + 40.5, 16 + 40.5)) == [(2, 2)]  # less than a pixel


def test_edges_between_patches_do_not_leak_for_images_of_odd_sizes(list_source, make_sample) -> None:
    """A box that ends exactly on the edge of a patch of the resized image marks nothing beyond it."""
    transform = TransformConfig(resize=256, crop=224)
    for width, height in [(500, 375), (333, 500), (1000, 257)]:
        scale = 256 / min(width, height)
        resized = [max(256, round(side * scale)) for side in (width, height)]
        left, top = ((side - 224) // 2 for side in resized)
        box = [left + 32, top + 48, left + 96, top + 80]
        unscaled = [
            v * full / made for v, full, made in zip(box, [width, height] * 2, resized * 2, strict=True)
        ]
        sample = make_sample(0, [tuple(unscaled)], height, width)
        mask = cut_of(transform, 16)(sample, 0).masks.view(14, 14)
        expected = torch.zeros(14, 14, dtype=torch.bool)
        expected[3:5, 2:6] = True
        assert torch.equal(mask, expected)


def test_images_read_the_union_of_their_objects(list_source, make_sample) -> None:
    boxes = [(20, 20, 30, 30), (44, 36, 60, 52), (22, 40, 26, 44)]
    together = make_sample(0, boxes)
    union = cut_of()(together, 0)
    single = [make_sample(0, [box]) for box in boxes]
    masks = torch.cat([cut_of()(s, 0).masks for s in single])
    assert union.masks.shape[0] == 1
    assert torch.equal(union.masks[0], masks.any(dim=0))
    assert 0 < union.masks.sum() < union.masks.numel()


def test_images_without_visible_objects_are_read_whole(list_source, make_sample) -> None:
    """No annotation, or an object that the centre crop removes."""
    outside = make_sample(0, [(0, 0, 4, 60)], height=60, width=120)
    for sample in (outside, make_sample(1)):
        for rows in ("images", "objects"):
            read = cut_of(rows=rows)(sample, 0)
            assert read.masks.all()
            assert not read.has_mask.any()
            assert len(read.labels) == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_masks_of_every_kind_follow_the_image(list_source) -> None:
    """A disc as pixels, as RLE and as a polygon gives the same patches, all of them inside its box's."""
    from pycocotools import mask as coco

    rows, columns = np.mgrid[:90, :120]
    disc = (columns - 70) ** 2 + (rows - 40) ** 2 < 20**2
    angle = np.linspace(0, 2 * np.pi, 200)
    polygon = np.stack([70 + 20 * np.cos(angle), 40 + 20 * np.sin(angle)], axis=1).ravel().tolist()
    box = np.array([[50 / 120, 20 / 90, 90 / 120, 60 / 90]], np.float32)
    image = np.zeros((90, 120, 3), np.uint8)
    kinds = [disc, coco.encode(np.asfortranarray(disc)), {"size": [90, 120], "polygons": [polygon]}, None]
    read = []
    for mask in kinds:
        objects = Objects(box, np.array([0.1], np.float32), masks=(mask,))
        sample = Sample(image, "disc", objects)
        read.append(cut_of(patch=4)(sample, 0).masks[0])
    assert torch.equal(read[0], read[1])
    assert (read[0] ^ read[2]).sum() <= 2  # the polygon's outline is rasterised by another rule
    assert (read[0] & ~read[3]).sum() == 0
    assert read[0].sum() < read[3].sum()  # the box has corners


# -- crops around objects ------------------------------------------------------------------------------------


def test_object_crops_are_squares_in_the_image() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        height, width = (int(n) for n in rng.integers(8, 300, 2))
        corners = np.sort(rng.uniform(0, 1, (2, 2)), axis=0).astype(np.float32)
        box = np.concatenate((corners[0], corners[1]))
        context = float(rng.uniform(0, 2))
        x0, y0, x1, y1 = object_crop(box, height, width, context)
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        true = box.astype(np.float64) * (width, height, width, height)
        side = max(1, round((1 + context) * max(true[2] - true[0], true[3] - true[1])))
        assert (x1 - x0, y1 - y0) == (min(side, width), min(side, height))
        # holds the object, up to rounding to pixels
        assert x0 <= true[0] + 1
        assert x1 >= true[2] - 1
        assert y0 <= true[1] + 1
        assert y1 >= true[3] - 1


def test_object_crop_by_hand() -> None:
    def crop(x0: float, y0: float, x1: float, y1: float, context: float) -> tuple[int, int, int, int]:
        return object_crop(np.array([x0, y0, x1, y1], np.float32), 100, 200, context)

    assert crop(0.4, 0.4, 0.5, 0.6, 0.5) == (75, 35, 105, 65)  # 20 x 20 pixels at (90, 50), side 30
    assert crop(0.0, 0.0, 0.1, 0.2, 0.5) == (0, 0, 30, 30)  # moved into the image
    assert crop(0.95, 0.9, 1.0, 1.0, 1.0) == (180, 80, 200, 100)
    assert crop(0.2, 0.2, 0.8, 0.8, 0.5) == (
        10,
        0,
        190,
        100,
    )  # 120 x 60, side 180: the image is only 100 high


def test_object_views_show_the_crop(list_source, make_sample) -> None:
    sample = make_sample(3, [(10, 10, 26, 22), (40, 30, 60, 50)], labels=[4, 5])
    read = cut_of(rows="objects", view="object", context=0.25)(sample, 7)
    assert read.image_of.tolist() == [0, 1]
    assert read.labels.tolist() == [4, 5]
    assert read.objects.tolist() == [0, 1]
    assert read.image_indices.tolist() == [7, 7]
    for image, box in zip(read.images, sample.objects.boxes, strict=True):
        crop = object_crop(box, 60, 80, 0.25)
        expected = Image.fromarray(sample.image).crop(crop).resize((32, 32), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1)
        assert (image.int() - expected.int()).abs().max() <= 1
    # 16 of 20 pixels across and 12 down: the object overlaps every column of patches
    assert read.masks[0].view(4, 4).all(dim=0).sum() == 4


# -- features ------------------------------------------------------------------------------------------------


@pytest.fixture
def varied(list_source, make_sample):
    """Images with 3, 0 (annotated as none), 1 and 2 objects, of several shapes."""
    return list_source(
        [
            make_sample(0, [(20, 10, 40, 30), (30, 20, 60, 50), (12, 40, 20, 48)], label=1, labels=[3, 1, 2]),
            make_sample(1, None, 50, 50, label=0),
            make_sample(2, [(30, 5, 50, 90)], 100, 70, label=2, labels=[0]),
            make_sample(3, [(22, 22, 30, 30), (45, 30, 58, 44)], label=3, labels=[2, 2]),
        ]
    )


@pytest.mark.parametrize(
    "settings", [{"rows": "images"}, {"rows": "objects"}, {"rows": "objects", "view": "object"}]
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_equal_one_row_at_a_time(encoder, varied, settings, batch_size) -> None:
    config = ExtractConfig(batch_size=batch_size, **LOCAL, **settings)
    (plain, masked), facts = extract_tables(encoder, varied, (False, True), config, progress=False)
    reader = cut_of(**settings)
    place = 0
    for index, sample in enumerate(varied.samples):
        read = reader(sample, index)
        for row in range(len(read.labels)):
            pixels = encoder.normalise(read.images[read.image_of[row]][None])
            alone = encoder(pixels, read.masks[row][None, None]).objects[:, 0]
            whole = encoder(pixels).objects[:, 0]
            torch.testing.assert_close(masked.features[place][None], alone, atol=2e-5, rtol=0)
            torch.testing.assert_close(plain.features[place][None], whole, atol=2e-5, rtol=0)
            if not read.masks[row].all():
                assert (alone - whole).abs().max() > 1e-3
            assert masked.image_indices[place] == index
            assert masked.readable[place] == read.masks[row].float().mean()
            place += 1
    assert place == len(plain.features) == len(masked.features) == facts["rows"]
    only = extract(encoder, varied, masks=True, config=config, progress=False)
    torch.testing.assert_close(only.features, masked.features, atol=2e-5, rtol=0)


def test_rows_and_labels(encoder, varied) -> None:
    images = extract(encoder, varied, masks=False, config=ExtractConfig(**LOCAL), progress=False)
    assert images.labels.tolist() == [1, 0, 2, 3]
    assert images.objects.tolist() == [-1] * 4
    assert images.has_mask.tolist() == [True, False, True, True]
    config = ExtractConfig(rows="objects", **LOCAL)
    objects = extract(encoder, varied, masks=True, config=config, progress=False)
    assert objects.labels.tolist() == [
        3,
        1,
        2,
        0,
        0,
        2,
        2,
    ]  # an image without annotation keeps its own label
    assert objects.image_indices.tolist() == [0, 0, 0, 1, 2, 3, 3]
    assert objects.objects.tolist() == [0, 1, 2, -1, 0, 0, 1]
    assert objects.features.dtype == torch.float32
    some = objects.select(objects.labels == 2)
    assert some.image_indices.tolist() == [0, 3, 3]


def test_what_leaves_a_worker_arrives_as_it_was(list_source, make_sample) -> None:
    """Small tensors travel as arrays, those of a megabyte and more as they are; nothing is lost."""
    source = list_source([make_sample(i, [(10, 10, 40, 40)], label=i) for i in range(11)])
    for side in (32, 256):
        images = Images(source, np.arange(len(source)), cut_of(TransformConfig(resize=side, crop=side)))
        for batch_size in (1, 64):
            for mine, there in zip(read_parcels(images, 0), read_parcels(images, 1, batch_size), strict=True):
                assert (there.bad, there.problem) == ((), "")
                for name, expected, found in zip(ImageRows._fields, mine.made, there.made, strict=True):
                    assert expected.dtype == found.dtype, name
                    assert torch.equal(expected, found), name
                there.made.labels.add_(1)  # its own memory, which may be written to


def test_workers_and_parcels_change_nothing(encoder, list_source, make_sample) -> None:
    source = list_source([make_sample(i, [(20, 10, 20 + i, 30)], label=i) for i in range(1, 21)])
    alone = extract(encoder, source, masks=True, config=ExtractConfig(workers=0), progress=False)
    before = torch.get_rng_state()
    shared = extract(encoder, source, masks=True, config=ExtractConfig(workers=2), progress=False)
    assert torch.equal(torch.get_rng_state(), before)  # training goes on as if nothing had been measured
    assert torch.equal(alone.features, shared.features)
    assert shared.labels.tolist() == list(range(1, 21))


def test_limit_draws_by_seed() -> None:
    assert choose_images(5, None, 0).tolist() == choose_images(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    some = choose_images(1000, 50, 1)
    assert len(set(some.tolist())) == 50
    assert (np.diff(some) > 0).all()
    assert some.tolist() == choose_images(1000, 50, 1).tolist() != choose_images(1000, 50, 2).tolist()


def test_unreadable_images_are_counted_and_too_many_are_an_error(
    encoder, list_source, make_sample, tmp_path: Path
) -> None:
    broken = Sample(tmp_path / "missing.jpg", "missing.jpg", None, 0)
    good = [make_sample(i, height=16, width=16, label=i) for i in range(150)]
    config = ExtractConfig(**LOCAL)
    (table,), facts = extract_tables(
        encoder, list_source([*good[:70], broken, *good[70:]]), (False,), config, progress=False
    )
    assert facts["unreadable"] == 1
    assert facts["unreadable_names"] == ["missing.jpg"]
    assert table.image_indices.tolist() == [i for i in range(151) if i != 70]
    with pytest.raises(UserError, match=r"1 of 4 images cannot be read, such as missing\.jpg \(No such"):
        extract(encoder, list_source([broken, *good[:3]]), masks=False, config=config, progress=False)


def test_features_that_are_not_finite_are_an_error(encoder, list_source, make_sample) -> None:
    encoder.backbone.norm.weight[3] = torch.nan
    with pytest.raises(
        UserError, match=r"features of 2 of 2 rows of list: are not finite \(first: image-5\)"
    ):
        extract(
            encoder,
            list_source([make_sample(5), make_sample(6)]),
            masks=False,
            config=ExtractConfig(**LOCAL),
            progress=False,
        )


def test_training_mode_is_put_back_and_not_used(encoder, list_source, make_sample) -> None:
    source = list_source([make_sample(0), make_sample(1)])
    expected = extract(encoder, source, masks=False, config=ExtractConfig(**LOCAL), progress=False)
    encoder.train()
    again = extract(encoder, source, masks=False, config=ExtractConfig(**LOCAL), progress=False)
    assert encoder.training
    assert torch.equal(expected.features, again.features)  # no stochastic depth


def test_bf16_is_close(encoder, varied) -> None:
    exact = extract(encoder, varied, masks=True, config=ExtractConfig(**LOCAL), progress=False)
    rough = extract(
        encoder, varied, masks=True, config=ExtractConfig(precision="bf16", **LOCAL), progress=False
    )
    cosine = torch.nn.functional.cosine_similarity(exact.features, rough.features)
    assert rough.features.dtype == torch.float32
    assert not torch.equal(exact.features, rough.features)
    assert cosine.min() > 0.98


def test_what_masks_can_be_had(list_source, make_sample, encoder) -> None:
    bare, boxed = list_source([make_sample(0)]), list_source([make_sample(0, [(0, 0, 9, 9)])])
    assert mask_modes("both", boxed, boxed, encoder, None) == ((False, True), [])
    assert mask_modes(True, boxed, boxed, encoder, None) == ((True,), [])
    assert mask_modes(False, boxed, boxed, encoder, None) == ((False,), [])
    assert mask_modes("both", bare, bare, encoder, None)[0] == (False,)
    assert "whole images" in mask_modes("both", bare, boxed, encoder, None)[1][0]
    with pytest.raises(UserError, match="neither boxes nor masks"):
        mask_modes(True, boxed, bare, encoder, None)


def test_ranks_share_the_images_and_keep_their_order(run_ranks) -> None:
    code = """
import torch
from foveola import distributed
from foveola.evaluation.features.table import extract
from foveola.evaluation.features.table import ExtractConfig
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.data.sources import open_source
torch.manual_seed(0)
model = ViTConfig(width=16, depth=1, heads=1, patch_size=8, image_size=32)
encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=36, crop=32)))
source = open_source("scenes:?count=11", "test")
config = ExtractConfig(rows="objects", workers=0)
alone = extract(encoder, source, masks=True, config=config, progress=False)
distributed.start("cpu")
shared = extract(encoder, source, masks=True, config=config, progress=False)
for name in ("labels", "image_indices", "objects", "has_mask", "readable"):
    assert torch.equal(getattr(alone, name), getattr(shared, name)), name
torch.testing.assert_close(alone.features, shared.features, atol=1e-5, rtol=0)
print(len(shared.labels))
distributed.stop()
"""
    outputs = run_ranks(code, ranks=3)
    assert len(set(outputs)) == 1
    assert int(outputs[0]) > 11
