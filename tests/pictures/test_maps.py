"""Maps equal what explicit attention matrices and sorted similarities say."""

import numpy as np
import torch

from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.pictures.maps import heat, neighbours, object_attention, outline


def small_encoder(registers: int = 0) -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=32, depth=2, heads=4, patch_size=8, image_size=32, registers=registers)
    return Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=32, crop=32)))


def attention_by_hand(encoder: Encoder, images: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
    """The last block's object row in float64, from the weights themselves; one object, no registers."""
    net = encoder.backbone.double()
    x, _ = net.embed(images.double(), None)
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
    queries, bank = rng.normal(size=(5, 7)), rng.normal(size=(20, 7))
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        bank / np.linalg.norm(bank, axis=1)[:, None]
    ).T
    found = neighbours(torch.from_numpy(queries), torch.from_numpy(bank), 4)
    np.testing.assert_array_equal(found.numpy(), np.argsort(-cosine, axis=1)[:, :4])


def test_outline_darkens_the_rest_and_draws_the_border() -> None:
    picture = np.full((8, 8, 3), 200, np.uint8)
    mask = np.zeros((2, 2), bool)
    mask[0, 1] = True
    drawn = outline(picture, mask, (255, 0, 0))
    assert (drawn[5, 2] == 90).all()
    assert (drawn[1, 5] == 200).all(), "inside stays"
    assert (drawn[0, 4:] == (255, 0, 0)).all(), "also where the object meets the picture's edge"
    assert (drawn[3, 4:] == (255, 0, 0)).all()


def test_heat_is_brightest_at_the_largest_weight() -> None:
    weights = np.array([[0.0, 0.2], [0.1, 0.7]], np.float32)
    drawn = heat(np.zeros((4, 4, 3), np.uint8), weights).sum(axis=2)
    assert drawn[3, 3] == drawn.max() > drawn[0, 3] > drawn[0, 0]
