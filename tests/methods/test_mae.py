"""MAE against a network written out in float64; what it sees, what it learns from; SimMIM; images."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveola.config import build
from foveola.losses import pixel_loss, pixel_targets
from foveola.methods.mae import Mae, MaeConfig
from foveola.methods.method import spread_and_rank
from foveola.models.embedding import patchify, unpatchify
from foveola.models.positions import fixed_positions
from foveola.models.vit import Inputs, ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, Selection, Views, ViewsConfig
from foveola.views.tokens import DroppingConfig, draw_drops

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0])
SIDE, GRID = 4, 5  # pixels of a patch, patches of a side
MODEL = ViTConfig(
    width=24,
    depth=2,
    heads=3,
    patch_size=SIDE,
    image_size=SIDE * GRID,
    positions="sincos",
    init="xavier",
    drop_path=0.0,
)
VIEWS = ViewsConfig(
    global_size=SIDE * GRID,
    global_count=1,
    local_count=0,
    dropping=DroppingConfig(shape="random", ratio=0.75, predict=1.0),
)
DECODER = {"kind": "self", "width": 16, "depth": 2, "heads": 2, "drop_path": 0.0}
PROGRESS = Progress(step=0, total_steps=100, steps_per_epoch=10, batch_size=3)


def mae(seed: int = 0, model: ViTConfig = MODEL, **settings: Any) -> Mae:
    """Weights, biases and norms are all moved off their initial values."""
    torch.manual_seed(seed)
    method = Mae(build(MaeConfig, {"decoder": DECODER} | settings), model, VIEWS)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return method.train()


def batch(images: int = 3, seed: int = 0, ratio: float = 0.75, predict: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    drops = DroppingConfig(shape="random", ratio=ratio, predict=predict)
    keep, wanted = draw_drops(drops, images, (GRID, GRID), generator)
    pixels = torch.randn(images, 1, 3, SIDE * GRID, SIDE * GRID, generator=generator)
    large = Views(
        pixels=pixels,
        boxes=WHOLE.expand(images, 1, 4),
        flips=torch.zeros(images, 1, dtype=torch.bool),
        positions=WHOLE.expand(images, 1, 4),
        selection=Selection(keep[:, None], wanted[:, None]),
    )
    facts = {}
    return Batch(large, None, torch.full((images,), -1), torch.arange(images), facts)


def predicting(drawn: Batch, patches: Tensor) -> Batch:
    """The batch with other patches to predict."""
    selection = dataclasses.replace(drawn.large.selection, predicted=patches)
    return dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, selection=selection))


def repainted(drawn: Batch, patches: Tensor, add: float = 5.0) -> Batch:
    """The batch with some patches [B, n] of each view painted over with noise."""
    views = drawn.large.pixels.clone()
    generator = torch.Generator().manual_seed(99)
    for index, row in enumerate(patches.tolist()):
        for patch in row:
            y, x = patch // GRID * SIDE, patch % GRID * SIDE
            noise = torch.randn(3, SIDE, SIDE, generator=generator)
            views[index, 0, :, y : y + SIDE, x : x + SIDE] += add * noise
    return dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, pixels=views))


def predictions(method: Mae, drawn: Batch) -> Tensor:
    assert drawn.large.selection is not None
    with torch.no_grad():
        return method.student(
            drawn.large.pixels[:, 0], drawn.large.selection.kept[:, 0], drawn.large.selection.predicted[:, 0]
        )[0]


# -- pixels -------------------------------------------------------------------------------------------------


def test_queries_keys_and_values_start_as_one_matrix():
    """Xavier over [3 D, D], as the official code: 1 / sqrt(2) of what it is over each of the three."""
    torch.manual_seed(0)
    model = dataclasses.replace(MODEL, width=240, heads=20, depth=1)
    decoder = DECODER | {"width": 120, "depth": 1, "heads": 10}
    student = Mae(build(MaeConfig, {"decoder": decoder}), model, VIEWS).student
    for network, width in ((student.backbone, 240), (student.decoder, 120)):
        bound = (6 / (4 * width)) ** 0.5
        for part in network.blocks[0].attn.qkv.weight.split(width):
            assert part.abs().max().item() == pytest.approx(bound, rel=1e-3)
            assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        bound = (6 / (2 * width)) ** 0.5
        assert network.blocks[0].attn.proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)


def test_patchify_and_back(plain: SimpleNamespace):
    images = torch.randn(2, 3, 12, 20)
    patches = patchify(images, 4)
    assert patches.shape == (2, 15, 48)
    assert torch.equal(unpatchify(patches, 4, (3, 5)), images)
    for patch in range(15):
        assert torch.equal(patches[1, patch].view(3, 4, 4), plain.pixels(images[1], patch, 4))
    again = torch.randn(2, 15, 48)
    assert torch.equal(patchify(unpatchify(again, 4, (3, 5)), 4), again)


def test_targets_are_each_patch_less_its_mean_over_its_deviation():
    pixels = 3 + 2 * torch.randn(2, 5, 48)
    targets = pixel_targets(pixels)
    for patch, target in zip(pixels.flatten(0, 1), targets.flatten(0, 1), strict=True):
        numbers = patch.double().tolist()
        mean = sum(numbers) / 48
        variance = sum((n - mean) ** 2 for n in numbers) / 47  # unbiased
        expected = torch.tensor([(n - mean) / (variance + 1e-6) ** 0.5 for n in numbers])
        assert (target - expected).abs().max() < 1e-5
    assert torch.equal(pixel_targets(torch.full((1, 1, 48), 0.5)), torch.zeros(1, 1, 48))  # no division by 0
    assert torch.equal(pixel_targets(pixels, normalised=False), pixels)
    assert pixel_targets(pixels.bfloat16()).dtype == torch.float32


def test_errors_by_hand():
    a, b = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    assert pixel_loss(a, b).item() == (1 + 0 + 9 + 4) / 4
    assert pixel_loss(a, b, "absolute").item() == (1 + 0 + 3 + 2) / 4


def test_positions_are_columns_first_and_of_the_published_frequencies(plain: SimpleNamespace):
    table = fixed_positions((3, 5), 16)[0].double()
    assert (table - plain.sines(3, 5, 16)).abs().max() < 1e-6
    square = table.view(3, 5, 16)
    assert torch.equal(square[0, :, :8], square[2, :, :8])  # these channels tell the column alone
    assert torch.equal(square[:, 1, 8:], square[:, 4, 8:])
    # On a grid twice as fine each patch lies between the places of its neighbours on the fitted one.
    fine = fixed_positions((4, 4), 16, (2, 2))[0].view(4, 4, 16).double()
    for column in range(4):
        place = (column + 0.5) / 2 - 0.5
        assert fine[0, column, 0].item() == pytest.approx(np.sin(place))
        assert fine[column, 0, 12].item() == pytest.approx(np.cos(place))


# -- the whole method ---------------------------------------------------------------------------------------


def naive(method: Mae, drawn: Batch, plain: SimpleNamespace, normalise: bool) -> float:
    """MAE in float64: mask tokens go back to their places, and the decoder reads the image row by row."""
    student = method.student.double()
    encoder, decoder = student.backbone, student.decoder
    outside, inside = plain.sines(GRID, GRID, 24), plain.sines(GRID, GRID, 16)
    assert drawn.large.selection.kept is not None
    total, count = 0.0, 0
    for index in range(len(drawn.large.selection.kept)):
        image, keep = drawn.large.pixels[index, 0].double(), drawn.large.selection.kept[index, 0].tolist()
        tokens = [encoder.cls_token[0, 0]]
        for patch in keep:
            kernels = (encoder.patch_embed.proj.weight * plain.pixels(image, patch, SIDE)).sum(dim=(1, 2, 3))
            tokens.append(kernels + encoder.patch_embed.proj.bias + outside[patch])
        code = plain.network(torch.stack(tokens), encoder) @ decoder.embed.weight.T + decoder.embed.bias
        places = [decoder.mask_token[0, 0]] * GRID**2
        for row, patch in enumerate(keep):
            places[patch] = code[1 + row]
        whole = torch.stack([code[0], *(token + inside[patch] for patch, token in enumerate(places))])
        pixels = plain.network(whole, decoder)[1:] @ student.head.weight.T + student.head.bias
        for patch in set(range(GRID**2)) - set(keep):
            target = plain.pixels(image, patch, SIDE).flatten()
            if normalise:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            total += (pixels[patch] - target).square().mean().item()
            count += 1
    assert count == len(drawn.large.selection.kept) * 18
    return total / count


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_that_of_a_network_written_out(plain: SimpleNamespace, normalise: bool):
    method, drawn = mae(normalise=normalise), batch()
    output = method(drawn, PROGRESS)
    assert output.losses.keys() == {"reconstruction"}
    with torch.no_grad():
        expected = naive(method, drawn, plain, normalise)
    assert output.losses["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


def test_kept_and_predicted_patches_are_a_partition():
    drawn = batch(images=50)
    assert drawn.large.selection is not None
    assert drawn.large.selection.kept.shape[2] == 25 - int(0.75 * 25)
    both = torch.cat((drawn.large.selection.kept, drawn.large.selection.predicted), dim=2)[:, 0]
    assert torch.equal(both.sort(dim=1).values, torch.arange(25).expand(50, -1))
    keep, predict = DroppingConfig(shape="random", ratio=0.75, predict=1.0).counts(196)
    assert (keep, predict) == (49, 147)  # ViT-B/16 at 224


def test_every_patch_is_kept_equally_often():
    from scipy.stats import chisquare

    keep = batch(images=4000).large.selection.kept
    assert keep is not None
    counts = np.bincount(keep.flatten().numpy(), minlength=25)
    assert chisquare(counts).pvalue > 1e-3


def test_predictions_come_from_kept_pixels_and_targets_from_the_others():
    method, drawn = mae(), batch()
    assert drawn.large.selection is not None
    before, loss = predictions(method, drawn), method(drawn, PROGRESS).losses["reconstruction"]
    # Pixels of removed patches reach no prediction; they are the target.
    hidden = repainted(drawn, drawn.large.selection.predicted[:, 0])
    assert torch.equal(predictions(method, hidden), before)
    assert not torch.equal(method(hidden, PROGRESS).losses["reconstruction"], loss)
    # Kept ones reach every prediction of their image, and no target.
    seen = repainted(drawn, drawn.large.selection.kept[:, 0, :1])
    assert (predictions(method, seen) - before).abs().amax(dim=2).min() > 0
    wanted = drawn.large.selection.predicted[:, 0, :, None]
    for normalise in (True, False):
        targets = [
            pixel_targets(patchify(b.large.pixels[:, 0], SIDE), normalise).gather(
                1, wanted.expand(-1, -1, 48)
            )
            for b in (drawn, seen)
        ]
        assert torch.equal(*targets)


def test_with_predictions_that_cannot_move_the_loss_is_deaf_to_kept_pixels():
    """A head of zeros: what is left is the mean square of targets, (n - 1) / n of normalised patches."""
    method, drawn = mae(), batch()
    assert drawn.large.selection is not None
    torch.nn.init.zeros_(method.student.head.weight)
    torch.nn.init.zeros_(method.student.head.bias)
    loss = method(drawn, PROGRESS).losses["reconstruction"]
    assert torch.equal(
        method(repainted(drawn, drawn.large.selection.kept[:, 0]), PROGRESS).losses["reconstruction"], loss
    )
    assert loss.item() == pytest.approx(47 / 48, rel=1e-4)
    # Normalised per patch: brightness and contrast of a removed patch are no target either.
    views = drawn.large.pixels.clone()
    for index, patch in enumerate(drawn.large.selection.predicted[:, 0, 0].tolist()):
        y, x = patch // GRID * SIDE, patch % GRID * SIDE
        views[index, 0, :, y : y + SIDE, x : x + SIDE] *= 3
        views[index, 0, :, y : y + SIDE, x : x + SIDE] += 7
    brighter = method(
        dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, pixels=views)), PROGRESS
    ).losses["reconstruction"]
    assert brighter.item() == pytest.approx(loss.item(), rel=1e-5)


def test_each_place_gets_its_own_prediction():
    """Asked in another order, or for some places of all, the decoder answers in that order."""
    method, drawn = mae(), batch()
    assert drawn.large.selection.predicted is not None
    found = predictions(method, drawn)
    assert (found[:, 1:] - found[:, :-1]).abs().amax(dim=2).min() > 1e-3
    order = torch.randperm(18, generator=torch.Generator().manual_seed(1))
    again = predictions(method, predicting(drawn, drawn.large.selection.predicted[:, :, order]))
    assert (again - found[:, order]).abs().max() < 1e-5


def test_identifiable_patches_are_put_back_in_their_places():
    """Every patch has a colour of its own, and a decoder whose blocks do nothing tells it from the place."""
    method, drawn = mae(normalise=False, decoder=DECODER | {"width": 32}), batch(images=4)
    colors = torch.linspace(-1, 1, 25)[:, None].expand(25, 48)
    views = unpatchify(colors.expand(4, 25, 48).contiguous(), SIDE, (GRID, GRID))[:, None]
    drawn = dataclasses.replace(drawn, large=dataclasses.replace(drawn.large, pixels=views))
    decoder, head = method.student.decoder, method.student.head
    with torch.no_grad():
        for block in decoder.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.zero_()
                last.bias.zero_()
        decoder.norm = nn.Identity()
        # Mask tokens leave the decoder as they came in: the head learns by least squares what is where.
        places = (decoder.mask_token + fixed_positions((GRID, GRID), 32))[0].double()
        head.weight.copy_((torch.linalg.pinv(places, rtol=1e-5) @ colors.double()).T)
        head.bias.zero_()
    assert drawn.large.selection.predicted is not None
    found = ((predictions(method, drawn).mean(dim=2) + 1) / 2 * 24).round().long()
    assert torch.equal(found, drawn.large.selection.predicted[:, 0])
    assert method(drawn, PROGRESS).losses["reconstruction"] < 1e-4
    sheet = method.figures()["reconstruction"]
    third = len(sheet) // 3
    assert np.abs(sheet[2 * third :].astype(int) - sheet[:third]).max() <= 2  # filled as it was


def test_everything_that_trains_gets_a_gradient():
    for settings in ({}, {"decoder": None, "normalise": False, "loss": "absolute"}):
        method = mae(**settings)
        method(batch(), PROGRESS).losses["reconstruction"].backward()
        trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in trained.values())  # or data-parallel training would wait
        assert not any("pos_embed" in name for name in trained)
        assert ("student.backbone.mask_token" in trained) == ("decoder" in settings)
    assert method.after_step(PROGRESS, 1e-3) == {}  # no teacher


def test_the_work_of_the_encoder_falls_with_the_share_that_is_kept():
    from torch.utils.flop_counter import FlopCounterMode

    encoder = mae().student.backbone
    images, work = torch.randn(2, 3, 40, 40), {}
    for kept in (100, 50, 25):
        keep = torch.arange(kept).expand(2, -1)
        with FlopCounterMode(display=False) as counter:
            encoder(images, Inputs(kept=keep))
        work[kept] = counter.get_total_flops()
    assert work[50] < 0.51 * work[100]
    assert work[25] < 0.26 * work[100]  # attention falls faster, the class token stays


def test_some_of_the_removed_patches_can_be_asked_for():
    method = mae()
    loss = method(batch(predict=0.5), PROGRESS).losses["reconstruction"]
    assert loss.isfinite()
    assert predictions(method, batch(predict=0.5)).shape == (3, 9, 48)


# -- SimMIM -------------------------------------------------------------------------------------------------


def simmim() -> Mae:
    return mae(decoder=None, normalise=False, loss="absolute")


def test_simmim_is_mask_tokens_in_the_encoder_and_absolute_errors(plain: SimpleNamespace):
    method, drawn = simmim(), batch(ratio=0.6)
    assert drawn.large.selection.kept is not None
    loss = method(drawn, PROGRESS).losses["reconstruction"].item()
    student = method.student.double()
    encoder, table = student.backbone, plain.sines(GRID, GRID, 24)
    errors = []
    for index in range(3):
        image, keep = (
            drawn.large.pixels[index, 0].double(),
            set(drawn.large.selection.kept[index, 0].tolist()),
        )
        tokens = [encoder.cls_token[0, 0]]
        for patch in range(25):
            kernels = (encoder.patch_embed.proj.weight * plain.pixels(image, patch, SIDE)).sum(dim=(1, 2, 3))
            content = kernels + encoder.patch_embed.proj.bias if patch in keep else encoder.mask_token[0, 0]
            tokens.append(content + table[patch])
        found = plain.network(torch.stack(tokens), encoder)[1:] @ student.head.weight.T + student.head.bias
        for patch in set(range(25)) - keep:
            errors.append((found[patch] - plain.pixels(image, patch, SIDE).flatten()).abs().mean().item())
    assert len(errors) == 3 * 15
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_simmim_hides_what_is_masked():
    method, drawn = simmim(), batch()
    assert drawn.large.selection.predicted is not None
    assert torch.equal(
        predictions(method, repainted(drawn, drawn.large.selection.predicted[:, 0])),
        predictions(method, drawn),
    )


# -- what one sees of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [True, False])
def test_images_show_the_view_what_was_kept_and_what_came_back(normalise):
    method, drawn = mae(normalise=normalise), batch(images=10)
    assert method.figures() == {}
    method(drawn, PROGRESS)
    sheet = method.figures()["reconstruction"]
    tile = SIDE * GRID + 2
    assert sheet.shape == (3 * tile, 8 * tile, 3)  # eight of the ten
    assert drawn.large.selection is not None
    found = predictions(method, drawn)
    mean, std = (np.array(c) for c in (VIEWS.color.mean, VIEWS.color.std))
    for index in (0, 5):
        rows = [sheet[r * tile : (r + 1) * tile, index * tile : (index + 1) * tile] for r in range(3)]
        for row in rows:
            assert (row[0] == 255).all()
            assert (row[:, -1] == 255).all()
        whole, kept, filled = (row[1:-1, 1:-1] for row in rows)
        image = drawn.large.pixels[index, 0].permute(1, 2, 0).numpy()
        assert np.abs(whole - np.clip((image * std + mean) * 255, 0, 255)).max() <= 0.51
        for patch in range(25):
            y, x = patch // GRID * SIDE, patch % GRID * SIDE
            cut = slice(y, y + SIDE), slice(x, x + SIDE)
            if patch in drawn.large.selection.kept[index, 0].tolist():
                assert (kept[cut] == whole[cut]).all()
                assert (filled[cut] == whole[cut]).all()
                continue
            assert np.abs(kept[cut] - mean * 255).max() <= 0.51
            asked = drawn.large.selection.predicted[index, 0].tolist().index(patch)
            pixels = found[index, asked].view(3, SIDE, SIDE).permute(1, 2, 0).numpy()
            if normalise:
                true = image[cut]
                pixels = pixels * np.sqrt(true.var(ddof=1) + 1e-6) + true.mean()
            assert np.abs(filled[cut] - np.clip((pixels * std + mean) * 255, 0, 255)).max() <= 0.51


def test_signals():
    features = mae()(batch(), PROGRESS).features
    assert features is not None
    spread, rank = spread_and_rank(features.detach())
    assert 1 < rank <= 3
    assert spread > 0


# -- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"dropping": None}, r"method\.name=mae needs dropped patches: set views\.dropping"),
        ({"local_count": 2}, r"views\.local_count=0"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        MaeConfig().check(dataclasses.replace(VIEWS, **views), MODEL)


def test_decoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"predictor: width=18 is not a multiple of heads=4"):
        build(MaeConfig, {"decoder": DECODER | {"width": 18, "heads": 4}}).check(VIEWS, MODEL)
    with pytest.raises(ValueError, match=r"needs a width that is a multiple of 4, not 18"):
        build(MaeConfig, {"decoder": DECODER | {"width": 18}}).check(VIEWS, MODEL)


def test_published_shapes():
    """ViT-B/16 with 8 x 512: encoder 85.8 M, decoder 25.2 M of blocks; 768 numbers a prediction."""
    model = ViTConfig(size="base", positions="sincos", init="xavier", drop_path=0.0)
    with torch.device("meta"):
        student = Mae(MaeConfig(), model, ViewsConfig()).student
    blocks = 12 * (12 * 768**2 + 13 * 768)
    trained = sum(p.numel() for p in student.backbone.parameters() if p.requires_grad)
    assert trained == blocks + 768 * 768 + 768 + 768 + 2 * 768  # patches, class token, last norm
    decoder = sum(p.numel() for p in student.decoder.parameters())
    assert decoder == 8 * (12 * 512**2 + 13 * 512) + 768 * 512 + 512 + 512 + 2 * 512
    assert student.head.weight.shape == (768, 512)
    assert student.backbone.pos_embed.shape == (1, 197, 768)
