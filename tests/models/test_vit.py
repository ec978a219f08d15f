"""The network token by token: who reads whom, mask tokens, positions, counts, initialisation."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from foveola.models.positions import resize_positions, sincos_positions
from foveola.models.vit import Inputs, VisionTransformer, ViTConfig

TINY = ViTConfig(width=24, depth=3, heads=3, patch_size=4, image_size=16, drop_path=0.0)


def vit(config: ViTConfig = TINY, seed: int = 0) -> VisionTransformer:
    """Larger weights than at the start of training, so that tokens have something to say to each other."""
    torch.manual_seed(seed)
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_images(batch: int = 2, size: int | tuple[int, int] = 16, seed: int = 0) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def naive(
    model: VisionTransformer, images: Tensor, objects: Tensor | None, masked: Tensor | None = None
) -> Tensor:
    """All tokens after the final norm, in float64, with a dense mask. Square images that fit the table."""
    config = model.config
    width, depth, heads = config.shape
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    patch, side = config.patch_size, config.image_size // config.patch_size
    batch = len(images)
    cells = images.double().unfold(2, patch, patch).unfold(3, patch, patch)  # B 3 rows columns p p
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(batch, side * side, -1)
    kernel = weights["patch_embed.proj.weight"].reshape(width, -1)
    x = cells @ kernel.T + weights["patch_embed.proj.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = norm(x, "patch_norm") if config.patch_norm else x
    if masked is not None:
        for b in range(batch):
            for n in range(side * side):
                if masked[b, n]:
                    x[b, n] = weights["mask_token"][0, 0]
    table = weights.get("pos_embed", torch.zeros(1, 1 + side * side, width))
    x = x + table[:, 1:]
    count = 1 if objects is None else objects.shape[1]
    token = weights["cls_token"] + table[:, :1]
    registers = config.registers
    parts = [token.expand(batch, count, width)]
    if registers:
        parts.append(weights["reg_token"].expand(batch, registers, width))
    x = torch.cat((*parts, x), dim=1)
    allowed = torch.ones(batch, x.shape[1], x.shape[1], dtype=torch.bool)
    if objects is not None:
        for b in range(batch):
            for m in range(count):
                allowed[b, m, :count] = torch.arange(count) == m
                if objects[b, m].any():
                    allowed[b, m, count + registers :] = objects[b, m]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for i in range(depth):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        query, key, value = (
            part.reshape(batch, -1, heads, width // heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        logits = query @ key.transpose(2, 3) / math.sqrt(width // heads)
        if config.relative_bias:
            rows = weights[f"{block}.attn.relative_position_bias_table"]
            for a in range(x.shape[1]):
                for b in range(x.shape[1]):
                    logits[:, :, a, b] += rows[row_of(a, b, count + registers, side)]
        mixed = logits.masked_fill(~allowed[:, None], -torch.inf).softmax(-1) @ value
        branch = linear(mixed.transpose(1, 2).reshape(batch, -1, width), f"{block}.attn.proj")
        x = x + branch * weights.get(f"{block}.ls1.gamma", torch.ones(width))
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.mlp.fc2") * weights.get(f"{block}.ls2.gamma", torch.ones(width))
    return norm(x, "norm") if config.final_norm == "tokens" else x


def row_of(i: int, j: int, special: int, side: int) -> int:
    """The row of the table of relative positions for token i that reads token j."""
    last = (2 * side - 1) ** 2 + 2
    if i < special or j < special:
        return last - (2 if j >= special else 1 if i >= special else 0)
    (a, b), (c, d) = divmod(i - special, side), divmod(j - special, side)
    return (a - c + side - 1) * (2 * side - 1) + (b - d + side - 1)


def tokens(model: VisionTransformer, *inputs: Tensor | None) -> Tensor:
    with torch.no_grad():
        features = model(*inputs)
    return torch.cat((features.objects, features.registers, features.patches), dim=1)


def some_objects(batch: int, count: int, patches: int = 16, seed: int = 1) -> Tensor:
    objects = torch.rand(batch, count, patches, generator=torch.Generator().manual_seed(seed)) < 0.4
    objects[0, 0] = False
    return objects


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"registers": 2},
        {"registers": 4, "layer_scale": 0.3},
        {"relative_bias": True, "positions": "none", "registers": 1},
        {"relative_bias": True, "patch_norm": True, "final_norm": "pooled"},
    ],
    ids=str,
)
def test_against_a_naive_network_with_a_dense_mask(count: int, extras: dict):
    model = vit(replace(TINY, **extras))
    images = random_images()
    objects = some_objects(2, count) if count else None
    masked = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.3
    for hidden in (None, masked):
        ours = tokens(model, images, Inputs(objects=objects, masked=hidden))
        assert (ours - naive(model, images, objects, hidden)).abs().max() < 2e-5


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("gradient", [True, False])
def test_an_all_true_mask_is_the_plain_class_token_bit_for_bit(registers: int, gradient: bool):
    for config, size in (
        (replace(TINY, registers=registers), 16),
        (ViTConfig(depth=2, image_size=96, registers=registers, drop_path=0.0), 96),
    ):
        model = vit(config).train(gradient)
        images = random_images(3, size)
        everything = torch.ones(3, 1, (size // config.patch_size) ** 2, dtype=torch.bool)
        with torch.set_grad_enabled(gradient):
            plain, masked = model(images), model(images, everything)
        assert torch.equal(plain.objects, masked.objects)
        assert torch.equal(plain.patches, masked.patches)
        assert torch.equal(plain.registers, masked.registers)


def test_an_empty_mask_reads_everything():
    model = vit()
    images, nothing = random_images(), torch.zeros(2, 1, 16, dtype=torch.bool)
    assert torch.equal(tokens(model, images, nothing), tokens(model, images))


def test_a_batch_of_different_masks_is_one_by_one():
    model = vit(replace(TINY, registers=1))
    images, objects = random_images(4), some_objects(4, 2)
    together = tokens(model, images, objects)
    for b in range(4):
        alone = tokens(model, images[b : b + 1], objects[b : b + 1])
        assert (alone - together[b : b + 1]).abs().max() < 1e-5


def test_patches_of_the_first_block_are_independent_of_the_masks():
    """From the second block on they depend on them, through the object token alone."""
    images = random_images()
    one, other = some_objects(2, 1, seed=1), some_objects(2, 1, seed=2)
    for depth, same in ((1, True), (2, False)):
        model = vit(replace(TINY, depth=depth))
        with torch.no_grad():
            first, second = model(images, one), model(images, other)
        assert torch.equal(first.patches[1], second.patches[1]) == same
        assert not torch.equal(first.objects[1], second.objects[1])


def hide_object_from_patches(model: VisionTransformer) -> None:
    """Patches ignore the object token's key."""
    for block in model.blocks:
        attention = block.attn

        def forward(
            x: Tensor, objects: int, readable: Tensor | None, rotation: None, grid: tuple, module=attention
        ) -> Tensor:
            query, key, value = module.heads_of(x)
            attend = nn.functional.scaled_dot_product_attention
            few = attend(query[:, :, :objects], key, value, attn_mask=readable)
            many = attend(query[:, :, objects:], key[:, :, objects:], value[:, :, objects:])
            return module.proj(torch.cat((few, many), dim=2).transpose(1, 2).flatten(2))

        attention.forward = forward


def test_masks_reach_patches_only_through_the_object_token():
    model = vit()
    hide_object_from_patches(model)
    images = random_images()
    with torch.no_grad():
        first, second = model(images, some_objects(2, 1, seed=1)), model(images, some_objects(2, 1, seed=2))
    assert torch.equal(first.patches, second.patches)
    assert not torch.equal(first.objects[1], second.objects[1])


def test_background_reaches_the_object_only_through_its_patches():
    """One block: not at all. With patches that read nobody: at no depth."""
    objects = torch.zeros(1, 1, 16, dtype=torch.bool)
    objects[0, 0, [0, 1, 4, 5]] = True  # the upper left quarter
    before = random_images(1)
    after = before.clone()
    after[..., 8:, :] += 1
    after[..., :, 8:] += 1
    inside = before.clone()
    inside[..., :4, :4] += 1

    def token(model: VisionTransformer, images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images, objects).objects

    shallow = vit(replace(TINY, depth=1))
    assert torch.equal(token(shallow, before), token(shallow, after))
    assert not torch.equal(token(shallow, before), token(shallow, inside))
    deep = vit()
    assert not torch.equal(token(deep, before), token(deep, after))
    for block in deep.blocks:
        attention = block.attn

        def forward(
            x: Tensor, count: int, readable: Tensor | None, rotation: None, grid: tuple, module=attention
        ) -> Tensor:
            query, key, value = module.heads_of(x)
            few = nn.functional.scaled_dot_product_attention(
                query[:, :, :count], key, value, attn_mask=readable
            )
            return module.proj(torch.cat((few, value[:, :, count:]), dim=2).transpose(1, 2).flatten(2))

        attention.forward = forward
    assert torch.equal(token(deep, before), token(deep, after))


def test_masked_patches_do_not_leak_their_pixels():
    model = vit()
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, [3, 7]] = True
    before = random_images(1)
    after = before.clone()
    after[..., 0:4, 12:16] += 5  # patch 3
    after[..., 4:8, 12:16] -= 5  # patch 7
    assert torch.equal(
        tokens(model, before, Inputs(masked=masked)), tokens(model, after, Inputs(masked=masked))
    )
    assert not torch.equal(tokens(model, before), tokens(model, after))
    # Positions are added to the mask token: two masked patches differ.
    x = tokens(model, before, Inputs(masked=masked))[0, 1:]
    assert not torch.allclose(x[3], x[7])
    # And the mask token learns as soon as there is a mask.
    for hidden, learns in ((masked, True), (torch.zeros_like(masked), False)):
        model.zero_grad()
        model(before, Inputs(masked=hidden)).objects.sum().backward()
        assert model.mask_token.grad is not None
        assert (model.mask_token.grad != 0).any() == learns


def test_kept_patches_alone_are_processed():
    """The same as an image in which patches may not read the others; with all kept, the same as without."""
    model = vit()
    images, objects = random_images(), some_objects(2, 2)
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(b)) for b in range(2)])
    with torch.no_grad():
        full = model(images, objects)
        shuffled = model(images, Inputs(objects=objects, kept=order))
        part = model(images, Inputs(objects=objects, kept=order[:, :6]))
    assert torch.allclose(shuffled.objects, full.objects, atol=1e-5)
    rows = order[..., None].expand(-1, -1, 24)
    assert torch.allclose(shuffled.patches, full.patches.gather(1, rows), atol=1e-5)
    assert part.patches.shape == (2, 6, 24)
    # Patches dropped one by one, by hand: through the blocks without them.
    x, _ = model.embed(images)
    kept = torch.stack([x[b, order[b, :6]] for b in range(2)])
    chosen = torch.stack([objects[b][:, order[b, :6]] for b in range(2)])
    from foveola.models.attention import readable_tokens

    x = torch.cat(((model.cls_token + model.pos_embed[:, :1]).expand(2, 2, -1), kept), dim=1)
    with torch.no_grad():
        for block in model.blocks:
            x = block(x, 2, readable_tokens(chosen, 0))
        assert torch.allclose(model.norm(x)[:, 2:], part.patches, atol=1e-6)


def test_tokens_come_in_their_order_and_registers_are_extra():
    model = vit(replace(TINY, registers=3))
    with torch.no_grad():
        features = model(random_images(2, (16, 24)))
    assert features.objects.shape == (2, 1, 24)
    assert features.registers.shape == (2, 3, 24)
    assert features.patches.shape == (2, 24, 24)
    assert features.grid == (4, 6)


@pytest.mark.parametrize("size", [(15, 16), (16, 18), (0, 16), (2, 2)])
def test_images_that_are_not_whole_patches_are_refused(size: tuple[int, int]):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels are not made of whole 4 x 4 patches"):
        vit()(random_images(1, size))


# As published, at patch 16 with a class token; ours has a mask token more.
@pytest.mark.parametrize(
    ("size", "count", "width"),
    [("small", 21_665_664, 384), ("base", 85_798_656, 768), ("large", 303_301_632, 1024)],
)
def test_parameter_counts(size: str, count: int, width: int):
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(size=size))
    assert sum(p.numel() for p in model.parameters()) - width == count


@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"registers": 2, "layer_scale": 1e-5, "position_init": "sincos"},
        {"relative_bias": True, "patch_norm": True, "final_norm": "pooled"},
    ],
    ids=str,
)
def test_every_parameter_is_initialised(extras: dict):
    model = VisionTransformer(replace(TINY, **extras))
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.reset()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name


def test_initialisation_is_that_of_dino():
    model = VisionTransformer(ViTConfig(depth=2, registers=4, layer_scale=1e-5))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name == "mask_token":
            assert (parameter == 0).all()
        elif name == "reg_token":
            assert 0 < parameter.std() < 2e-6
        elif "gamma" in name:
            assert (parameter == 1e-5).all()
        elif "patch_embed" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    kernel = model.patch_embed.proj.weight  # torch's own: uniform up to 1 / sqrt(fan in)
    assert kernel.abs().max().item() == pytest.approx(768**-0.5, rel=0.01)


def test_layer_norms_divide_by_a_variance_plus_1e6():
    eps = {module.eps for module in VisionTransformer(TINY).modules() if isinstance(module, nn.LayerNorm)}
    assert eps == {1e-6}


def test_positions_that_fit_are_themselves():
    table = torch.randn(1, 16, 8)
    assert resize_positions(table, (4, 4)) is table
    small = resize_positions(torch.randn(1, 196, 8), (6, 6))
    assert small.shape == (1, 36, 8)
    assert small.isfinite().all()


@pytest.mark.parametrize("antialias", [True, False])
def test_resized_positions_keep_rows_and_columns_apart(antialias: bool):
    rows = torch.linspace(-1, 1, 8)[:, None].expand(8, 8)
    table = torch.stack((rows, rows.T), dim=-1).reshape(1, 64, 2)
    wide = resize_positions(table, (8, 16), antialias).view(8, 16, 2)
    assert (wide[:, :, 0] - wide[:, :1, 0]).abs().max() < 1e-5
    assert (wide[:, :, 1] - wide[:1, :, 1]).abs().max() < 1e-5
    assert (wide[:, 1:, 1] > wide[:, :-1, 1]).all()


def test_position_gradients_reach_the_table_through_a_resize():
    model = vit()
    model(random_images(1, (24, 8))).objects.sum().backward()
    assert model.pos_embed.grad is not None
    assert (model.pos_embed.grad != 0).any(dim=-1).all()


def test_sincos_positions_by_a_loop():
    table = sincos_positions((3, 5), 8, amplitude=0.5)[0].double()
    for row in range(3):
        for column in range(5):
            waves = []
            for place in (column, row):
                angles = [place * 100 ** -(k / 2) for k in range(2)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            expected = 0.5 * torch.tensor(waves, dtype=torch.float64)
            assert (table[row * 5 + column] - expected).abs().max() < 1e-6
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions((2, 2), 6)


def test_drop_path_drops_whole_branches_of_images_and_keeps_the_expectation():
    torch.manual_seed(0)
    block = VisionTransformer(replace(TINY, depth=2, drop_path=0.3)).blocks[1]
    branch = torch.randn(4000, 2, 3)
    dropped = block.residual(torch.zeros_like(branch), lambda _: branch)
    alive = (dropped != 0).flatten(1).any(1)
    assert alive.float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(dropped[~alive], torch.zeros_like(dropped[~alive]))
    assert torch.allclose(dropped[alive], branch[alive] / 0.7)
    assert torch.equal(block.eval().residual(torch.zeros_like(branch), lambda _: branch), branch)


def test_drop_path_rises_linearly_from_zero():
    model = VisionTransformer(replace(TINY, depth=5, drop_path=0.2))
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    train, evaluate = model.train(), vit(replace(TINY, drop_path=0.5))
    ones = torch.ones(3, 1, 1)
    assert train.blocks[0].residual(0 * ones, lambda _: ones).tolist() == ones.tolist()
    assert torch.equal(tokens(evaluate, random_images()), tokens(evaluate, random_images()))


def test_activation_checkpointing_changes_nothing():
    model = vit().train()
    images, objects = random_images(), some_objects(2, 2)
    gradients = []
    for switch in (False, True):
        model.zero_grad()
        model.checkpoint_activations = switch
        model(images, objects).objects.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"image_size": 18}], ids=str)
def test_impossible_shapes_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="is not a multiple of"):
        replace(TINY, **wrong)
