"""Objects from images to proposals: coloured blocks whose boxes are known, and images of every odd kind."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foveola
from foveola.config import ConfigError, UserError, build
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.proposals.cuts import maskcut
from foveola.proposals.discover import DiscoverConfig, Discoverer, discoverer
from foveola.proposals.refine import enlarged

PLAIN: dict[str, Any] = {}  # edges at patches


class Colours(nn.Module):
    """The mean colour of each 8 x 8 patch, as a direction."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 8)


def colours(**changes: Any) -> Discoverer:
    encoder = foveola.wrap(
        Colours(), "colours", TransformConfig(resize=96, crop=96, mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    return discoverer(encoder, DiscoverConfig(**(PLAIN | changes)))


def vit(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    settings = {"width": 24, "depth": 3, "heads": 2, "patch_size": 8, "image_size": 32} | changes
    pool = "token" if settings.get("class_token", True) else "average"
    return Encoder(EncoderConfig(ViTConfig(**settings), TransformConfig(resize=32, crop=32), pool=pool))


def scene(height: int = 96, width: int = 96, *blocks: tuple[int, int, int, int, str]) -> np.ndarray:
    """Green ground with red and blue blocks (x0, y0, x1, y1, colour)."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 1] = 255
    for x0, y0, x1, y1, colour in blocks:
        image[y0:y1, x0:x1] = {"red": (255, 0, 0), "blue": (0, 0, 255)}[colour]
    return image


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_blocks_are_found_where_they_are():
    blocks = (8, 16, 40, 48, "red"), (56, 56, 80, 88, "blue")
    found = colours().propose([scene(96, 96, *blocks)])[0]
    assert sorted(found.boxes.tolist()) == [[8, 16, 40, 48], [56, 56, 80, 88]]
    assert found.masks is not None
    assert found.masks.sum() == 32 * 32 + 24 * 32
    assert found.labels.tolist() == [0, 0]
    # Pairs of one block are alike (1). Colours are (1, -1, -1) / sqrt 3 and so on: products are -1/3.
    (plain,) = colours(centre=False).propose([scene(96, 96, *blocks)])
    np.testing.assert_array_equal(plain.boxes[np.argsort(plain.boxes[:, 0])], [blocks[0][:4], blocks[1][:4]])
    np.testing.assert_allclose(plain.scores, 2 / 3, atol=1e-6)
    (single,) = colours(method="tokencut").propose([scene(96, 96, blocks[0])])
    assert single.boxes.tolist() == [[8, 16, 40, 48]]


@pytest.mark.parametrize(("height", "width", "factor"), [(48, 96, 1), (192, 96, 2), (480, 960, 10)])
def test_boxes_are_in_the_pixels_of_the_image(height: int, width: int, factor: int):
    """Any aspect ratio and size: a longer side has 96 pixels when it is encoded."""
    factor = max(height, width) // 96
    box = [8 * factor, 8 * factor, 32 * factor, 24 * factor]
    found = colours(method="tokencut").propose([scene(height, width, (*box, "red"))])[0]
    assert found.boxes.tolist() == [box]
    assert found.masks is not None
    assert found.masks.shape == (1, height, width)


def test_images_of_several_sizes_in_one_call_are_what_they_are_alone():
    images = [scene(96, 96, (8, 8, 40, 40, "red")), noise(40, 70), scene(96, 48, (8, 8, 24, 24, "blue"))]
    images += [noise(64, 64, 1), scene(), scene(96, 96, (48, 0, 72, 40, "red"))]
    for model in (colours(batch_size=2), discoverer(vit(), DiscoverConfig(image_size=64, **PLAIN))):
        together = model.propose(images)
        for image, found in zip(images, together, strict=True):
            (alone,) = model.propose([image])
            np.testing.assert_array_equal(found.boxes, alone.boxes)
            np.testing.assert_array_equal(found.masks, alone.masks)
            np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-5)


@pytest.mark.parametrize("method", ["maskcut", "tokencut", "lost", "attention"])
def test_odd_images_have_defined_results(method: str):
    """One colour, below a patch, a line, and thousands of pixels: objects inside the image, or none."""
    proposer = discoverer(vit(), DiscoverConfig(method=method, image_size=64, **PLAIN))
    images = [np.full((50, 40, 3), 7, np.uint8), noise(1, 1), noise(3, 5), noise(1, 300), noise(4000, 60)]
    found = proposer.propose(images)
    assert [len(found[0]), len(found[1])] == [0, 0]
    for image, own in zip(images, found, strict=True):
        assert own.masks is not None
        assert own.masks.shape == (len(own), *image.shape[:2])
        assert own.masks.any(axis=(1, 2)).all()
        assert (own.boxes[:, :2] >= 0).all()
        assert (own.boxes[:, 2:] <= image.shape[1::-1]).all()
        assert (own.boxes[:, 2:] > own.boxes[:, :2]).all()


def test_features_are_those_that_are_asked_for():
    """Masks from keys and patches of a block, computed here from the network itself."""
    encoder = vit()
    image = noise(64, 64)
    pixels = encoder.normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
    keys = encoder.attention(pixels, block=1).keys()
    patches = encoder.layers(pixels, 2)[0].patches
    for features, expected in (("keys", keys), ("patches", patches)):
        found = discoverer(
            encoder, DiscoverConfig(features=features, block=1, image_size=64, tau=0.9, centre=False, **PLAIN)
        ).propose([image])[0]
        masks = maskcut(expected, (8, 8), 0.9).masks[0]
        masks = masks[masks.any(dim=1)].view(-1, 8, 8).numpy()
        assert found.masks is not None
        assert len(masks) > 1
        assert {m.tobytes() for m in found.masks} == {m.tobytes() for m in enlarged(masks, (64, 64))}


def test_attention_is_that_of_the_class_token():
    encoder, image = vit(), noise(64, 64)
    pixels = encoder.normalise(torch.from_numpy(image).permute(2, 0, 1)[None])
    read = encoder.attention(pixels).objects()[0, :, 0, 1:].mean(dim=0)
    (found,) = discoverer(
        encoder, DiscoverConfig(method="attention", image_size=64, share=0.05, **PLAIN)
    ).propose([image])
    assert found.masks is not None
    y, x = np.argwhere(found.masks[0])[0]
    bright = (read > read.quantile(0.9)).view(8, 8)
    assert bright[y // 8, x // 8]


def test_work_is_told_from_other_work_by_what_it_depends_on():
    encoder = vit()
    plain = discoverer(encoder, DiscoverConfig(image_size=64)).describe()
    assert plain["kind"] == "discover"
    assert plain["tau"] == 0.15
    assert plain["encoder"] == encoder.fingerprint()
    assert "k" not in plain
    assert discoverer(encoder, DiscoverConfig(image_size=64, batch_size=3)).describe() == plain
    for changes in (
        {"tau": 0.2},
        {"features": "keys"},
        {"centre": False},
        {"objects": 2},
        {"block": 0},
        {"method": "lost"},
    ):
        other = discoverer(encoder, DiscoverConfig(image_size=64, **changes)).describe()
        assert other != plain, changes
    assert discoverer(vit(width=48), DiscoverConfig(image_size=64)).describe() != plain


def test_what_cannot_be_is_refused():
    wrapped = colours().encoder
    for changes, message in (
        ({"features": "keys"}, "features=keys needs the inside of a ViT"),
        ({"method": "attention"}, "method=attention needs the inside"),
        ({"block": -2}, "block=-2 needs the inside"),
        ({"image_size": 3}, "image_size=3: a patch of this encoder has 8 pixels"),
        ({"image_size": 520}, "image_size=520 makes 65 x 65 patches.* image_size=512 or less"),
    ):
        with pytest.raises(UserError, match=message):
            discoverer(wrapped, DiscoverConfig(**changes))
    with pytest.raises(UserError, match="no class token"):
        discoverer(vit(class_token=False), DiscoverConfig(method="attention"))
    with pytest.raises(UserError, match="block=5: this encoder has 3 blocks"):
        discoverer(vit(), DiscoverConfig(block=5))
    with pytest.raises(ConfigError, match=r"method: .*tokencut"):
        build(DiscoverConfig, {"method": "tokcut"})
    broken = vit()
    broken.backbone.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        discoverer(broken).propose([noise(40, 40)])


def test_edges_are_refined_on_what_was_encoded():
    pytest.importorskip("cv2")
    image = scene(192, 192, (37, 50, 115, 121, "red"))
    coarse, sharp = (colours(method="tokencut", refine=how) for how in ("none", "grabcut"))
    plain, fine = coarse.propose([image])[0], sharp.propose([image])[0]
    assert plain.masks is not None
    assert fine.masks is not None
    assert np.abs(plain.boxes - [[37, 50, 115, 121]]).max() > 4  # multiples of 16 pixels
    assert np.abs(fine.boxes - [[37, 50, 115, 121]]).max() <= 2  # pixels of what was encoded
    truth = (image[..., 0] > 0).sum()
    assert abs(fine.masks.sum() / truth - 1) < 0.1 < abs(plain.masks.sum() / truth - 1)
