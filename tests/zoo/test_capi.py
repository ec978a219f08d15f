"""CAPI checkpoints in the layout of the released files, and pooling by their predictor."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm

from foveola.config import UserError
from foveola.zoo.load import load

WIDTH, HEADS, REGISTERS, PATCH = 192, 3, 16, 14  # ViT-Ti: the smallest known width


def random(*shape: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def released(depth: int = 2, decoder: int = 2) -> dict[str, Tensor]:
    """A state dict with the names and shapes of the released models."""
    state = {
        "mask_token": random(1, WIDTH, seed=1),
        "registers": random(1, REGISTERS, WIDTH, seed=2),
        "patch_embed.weight": random(WIDTH, 3, PATCH, PATCH, seed=3),
        "patch_embed.bias": random(WIDTH, seed=4),
    }
    seed = 5
    for part, count in (("encoder", depth), ("decoder", decoder)):
        for i in range(count):
            block = f"{part}.blocks.{i}"
            for name, shape in (
                ("residual1.norm.weight", (WIDTH,)),
                ("residual1.fn.q_proj.weight", (WIDTH, WIDTH)),
                ("residual1.fn.k_proj.weight", (WIDTH, WIDTH)),
                ("residual1.fn.v_proj.weight", (WIDTH, WIDTH)),
                ("residual1.fn.proj.weight", (WIDTH, WIDTH)),
                ("residual1.fn.rope.freqs", (2, WIDTH // HEADS)),
                ("residual2.norm.weight", (WIDTH,)),
                ("residual2.fn.fc1.weight", (4 * WIDTH, WIDTH)),
                ("residual2.fn.fc2.weight", (WIDTH, 4 * WIDTH)),
            ):
                state[f"{block}.{name}"] = random(*shape, seed=seed) + ("norm" in name)
                seed += 1
    return state


def turned(x: Tensor, places: Tensor) -> Tensor:
    """The released rotary positions of [heads, T, 64], channel by channel."""
    out, half, quarter = torch.empty_like(x), 32, 16
    for j in range(half):
        angle = 2 * math.pi * 7 * (7e-4 / 7) ** ((j % quarter) / (quarter - 1))
        row, column = places[:, 0] * angle, places[:, 1] * angle
        a, b = x[..., j], x[..., j + half]
        out[..., j] = a * row.cos() - b * row.sin()
        out[..., j + half] = b * column.cos() + a * column.sin()
    return out


def block(
    state: dict, name: str, x: Tensor, places: Tensor, context: Tensor | None, around: Tensor
) -> Tensor:
    """One block of one image in float64; `context` None: itself."""
    y = rms_norm(x, (WIDTH,), state[f"{name}.residual1.norm.weight"], 1e-5)
    source = y if context is None else context
    q, k, v = (
        (inputs @ state[f"{name}.residual1.fn.{part}_proj.weight"].T).view(-1, HEADS, 64).transpose(0, 1)
        for part, inputs in (("q", y), ("k", source), ("v", source))
    )
    logits = turned(q, places) @ turned(k, around).mT / 8
    mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x = x + mixed @ state[f"{name}.residual1.fn.proj.weight"].T
    y = rms_norm(x, (WIDTH,), state[f"{name}.residual2.norm.weight"], 1e-5)
    hidden = gelu(y @ state[f"{name}.residual2.fn.fc1.weight"].T)
    return x + hidden @ state[f"{name}.residual2.fn.fc2.weight"].T


def by_hand(state: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [16, D] and the mean of the first decoder block's outputs [D] for a 56 x 56 image."""
    state = {name: value.double() for name, value in state.items()}
    cuts = image.double().view(3, 4, PATCH, 4, PATCH).permute(1, 3, 0, 2, 4).reshape(16, -1)
    patches = cuts @ state["patch_embed.weight"].flatten(1).T + state["patch_embed.bias"]
    grid = torch.tensor([[i / 3, j / 3] for i in range(4) for j in range(4)], dtype=torch.float64)
    c = torch.arange(4, dtype=torch.float64) / 4
    nought, one = torch.zeros(4).double(), torch.ones(4).double()
    sides = [(c, nought), (one, c), (1 - c, one), (nought, 1 - c)]
    places = torch.cat([*(torch.stack(side, dim=1) for side in sides), grid])
    x = torch.cat((state["registers"][0], patches))
    for i in range(2):
        x = block(state, f"encoder.blocks.{i}", x, places, None, places)
    x = rms_norm(x, (WIDTH,), None, 1e-5)
    asked = block(state, "decoder.blocks.0", state["mask_token"].expand(16, -1), grid, x, places)
    return x[REGISTERS:], rms_norm(asked, (WIDTH,), None, 1e-5).mean(dim=0)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_files_load_and_give_what_their_formulas_say(tmp_path, prefix):
    state = released()
    torch.save({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "capi.pth")
    encoder = load(f"{tmp_path}/capi.pth?heads={HEADS}")
    image = torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(0))
    patches, pooled = by_hand(state, image)
    features = encoder(image[None])
    assert (features.patches[0] - patches).abs().max() < 1e-3
    assert (features.objects[0, 0] - pooled).abs().max() < 1e-3
    assert features.registers.shape == (1, 16, WIDTH)
    average = encoder.pooled("average")(image[None]).objects[0, 0]
    assert (average - patches.mean(dim=0)).abs().max() < 1e-3
    assert encoder.config.pool == "predictor"
    assert (encoder.patch_size, encoder.config.model.rope) == (14, "capi")
    saved = load(encoder.save(tmp_path / "saved"))
    assert torch.equal(saved(image[None]).objects, features.objects)
    assert saved.fingerprint() != encoder.pooled("average").fingerprint()


def test_objects_are_means_over_their_patches(tmp_path):
    torch.save(released(), tmp_path / "capi.pth")
    encoder = load(f"{tmp_path}/capi.pth?heads={HEADS}").pooled("average")
    images = torch.randn(2, 3, 56, 56)
    objects = torch.rand(2, 3, 16) < 0.4
    objects[0, 0] = False  # reads everything
    features = encoder(images, objects)
    assert features.objects.shape == (2, 3, WIDTH)
    for b in range(2):
        for m in range(3):
            chosen = objects[b, m] if objects[b, m].any() else torch.ones(16, dtype=torch.bool)
            assert (features.objects[b, m] - features.patches[b, chosen].mean(0)).abs().max() < 1e-5


def test_torn_files_and_pools_that_are_not_there_are_refused(tmp_path):
    state = released()
    del state["decoder.blocks.0.residual1.fn.k_proj.weight"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(UserError, match=r"not a whole CAPI checkpoint: no decoder\.blocks\.0\.residual1"):
        load(f"{tmp_path}/torn.pth?heads={HEADS}")
    torch.save(released(), tmp_path / "capi.pth")
    with pytest.raises(UserError, match="pool=token: this encoder has average, predictor"):
        load(f"{tmp_path}/capi.pth?heads={HEADS}").pooled("token")
