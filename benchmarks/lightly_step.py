"""A whole training step, ours and one put together of lightly's modules, in turns: iBOT, MAE, CAPI.

    pip install lightly timm
    python -m benchmarks.lightly_step [--steps 3] [--batch 4] [--threads 1] [--methods ibot,capi] [key=value]

lightly 1.6 gives modules, not recipes; a step is put together as its documentation does: a ViT of timm, its
heads and losses, AdamW, and `update_momentum` for the teacher. Networks, views, heads and what is predicted
have the sizes of our recipes (ViT-S). Ours includes making all views from images of 500 x 375; lightly's
starts from views that are ready. Times are core-seconds, with more threads seconds of the clock, medians over
steps; key=value changes our recipes.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_steps import Step, config_of, trainer_of
from benchmarks.step import canvases, seconds
from foveola.config import parse_overrides
from foveola.data.sample import Canvases
from foveola.schedules import Progress
from foveola.training.loop import Trainer
from foveola.training.recipe import RunConfig
from foveola.trees import flat

RECIPES = {"ibot": "ibot-vits16-in1k", "mae": "mae-vits16-in1k", "capi": "capi-vits14"}
CPU = torch.device("cpu")
Once = Callable[[], Any]


def ours(recipe: str, batch: int, changes: dict[str, Any]) -> tuple[Once, RunConfig]:
    """A step of a recipe in the middle of a run, and its configuration."""
    step = Step(recipe, recipe, batch, changes=tuple(changes.items()))
    trainer, progress = trainer_of(step, batch, CPU)
    return steps_of(trainer, progress, canvases(batch, CPU)), config_of(step, batch, CPU)


def steps_of(trainer: Trainer, progress: Progress, images: Canvases) -> Once:
    """One step more each time, of the same images."""
    number = progress.step

    def once() -> None:
        nonlocal number
        number += 1
        trainer.step(dataclasses.replace(progress, step=number), lambda: images)

    return once


def vit(config: RunConfig, drop_path: float) -> Any:
    """timm's ViT-S of the same patches and registers, in lightly's wrapper."""
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=config.views.global_size,
        patch_size=config.model.patch_size,
        embed_dim=384,
        depth=12,
        num_heads=6,
        reg_tokens=config.model.registers,
        num_classes=0,
        drop_path_rate=drop_path,
        dynamic_img_size=config.views.local_count > 0,
    )
    return MaskedVisionTransformerTIMM(network)


def trained(networks: nn.ModuleList, loss: Callable[[], Tensor], after: Once = lambda: None) -> Once:
    """A step of AdamW on these networks, clipped as ours."""
    weights = [weight for weight in networks.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 3.0)
        optimizer.step()
        after()

    return once


def ibot(config: RunConfig, batch: int) -> Once:
    """DINO on class tokens and iBOT on hidden patches through one head of 8,192 prototypes."""
    from lightly.loss import DINOLoss, IBOTPatchLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import random_block_mask, update_momentum

    side, count = config.views.global_size, config.views.local_count
    cells = side // config.model.patch_size
    student, teacher = (
        nn.ModuleList([vit(config, drop_path), DINOProjectionHead(384, output_dim=8192)])
        for drop_path in (config.model.drop_path, 0.0)
    )
    teacher.requires_grad_(False)
    backbone: Any
    slow: Any
    backbone, head, slow, slow_head = (each for network in (student, teacher) for each in network)
    tokens, patches = DINOLoss(output_dim=8192), IBOTPatchLoss(output_dim=8192)
    large = torch.randn(2 * batch, 3, side, side)
    small = torch.randn(count * batch, 3, config.views.local_size, config.views.local_size)

    def loss() -> Tensor:
        mask = random_block_mask((2 * batch, cells, cells))
        every = torch.cat([torch.zeros(2 * batch, 1, dtype=torch.bool), mask.flatten(1)], 1)
        with torch.no_grad():
            seen = slow.encode(large)
            wanted = slow_head(seen[:, 0]).chunk(2), slow_head(seen[every])
        found = backbone.encode(large, mask=every)
        others = head(backbone.encode(small)[:, 0]).chunk(count)
        token = tokens(list(wanted[0]), [*head(found[:, 0]).chunk(2), *others])
        return token + patches(wanted[1], head(found[every]), mask)

    def after() -> None:
        for mine, theirs in zip(student, teacher, strict=True):
            update_momentum(mine, theirs, 0.996)

    return trained(student, loss, after)


def mae(config: RunConfig, batch: int) -> Once:
    """A quarter of the patches, a decoder of 8 x 512, normalised pixels of the others."""
    from lightly.models.modules import MAEDecoderTIMM
    from lightly.models.utils import get_at_index, patchify, random_token_mask, repeat_token, set_at_index

    side, patch = config.views.global_size, config.model.patch_size
    cells = (side // patch) ** 2
    decoder: Any = MAEDecoderTIMM(cells, patch, embed_dim=384, decoder_embed_dim=512)
    encoder = vit(config, 0.0)
    images = torch.randn(batch, 3, side, side)

    def loss() -> Tensor:
        kept, hidden = random_token_mask((batch, cells + 1), mask_ratio=0.75)
        seen = decoder.embed(encoder.encode(images, idx_keep=kept))
        every = set_at_index(repeat_token(decoder.mask_token, (batch, cells + 1)), kept, seen.type_as(seen))
        found = decoder.predict(get_at_index(decoder.decode(every), hidden))
        target = get_at_index(patchify(images, patch), hidden - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(found, target)

    return trained(nn.ModuleList([encoder, decoder]), loss)


def capi(config: RunConfig, batch: int) -> Once:
    """Cluster assignments of dropped patches by a cross-attention predictor; clusters learned online."""
    from lightly.loss import CAPILoss
    from lightly.models.modules import CAPIPredictorTIMM
    from lightly.models.modules.heads import CAPIProjectionHead
    from lightly.models.utils import random_token_mask, update_momentum

    method: Any = config.method
    side, dropping = config.views.global_size, config.views.dropping
    cells, clusters = side // config.model.patch_size, method.clustering.prototypes
    assert dropping is not None
    first = 1 + config.model.registers
    student = vit(config, config.model.drop_path)
    predictor = CAPIPredictorTIMM(384, cells, depth=method.predictor.depth or 12, num_heads=6)
    networks = nn.ModuleList(
        [
            student,
            predictor,
            CAPIProjectionHead(384, clusters, bias=True, weight_norm=True),
            CAPIProjectionHead(384, clusters, bias=True),
        ]
    )
    teacher, entropy = vit(config, 0.0).requires_grad_(False), CAPILoss()
    images = torch.randn(batch, 3, side, side)
    asked = round(dropping.predict * round(dropping.ratio * cells**2))

    def loss() -> Tensor:
        kept, dropped = random_token_mask((batch, cells**2), dropping.ratio, mask_class_token=True)
        dropped = dropped[:, torch.randperm(dropped.shape[1])[:asked]]
        with torch.no_grad():
            wanted = teacher.encode(images)[:, first:]
        logits = networks[3](wanted)
        prefix = torch.arange(first).expand(batch, first)
        seen = student.encode(images, idx_keep=torch.cat([prefix, kept + first], 1))[:, first:]
        found = networks[2](predictor(seen, kept, dropped))
        return entropy(logits, logits) + entropy(logits, found, dropped)

    return trained(networks, loss, lambda: update_momentum(student, teacher, 0.999))


def in_turns(name: str, mine: Once, theirs: Once, steps: int) -> str:
    """Return a line of the table: seconds of two steps in turns, medians; the range of their ratio.

    With one thread these are core-seconds, in which other programs do not count, else those of the clock.
    """
    times: list[list[float]] = [[], []]
    for step in range(steps + 1):
        for kept, once in zip(times, (mine, theirs), strict=True):
            start = time.perf_counter()
            taken = seconds(once, CPU)
            taken = taken if torch.get_num_threads() == 1 else time.perf_counter() - start
            if step:  # the first warms up
                kept.append(taken)
    a, b = map(statistics.median, times)
    pairs = sorted(x / y for x, y in zip(*times, strict=True))
    return f"{name:<6} {a:>12.2f} {b:>15.2f} {a / b:>8.2f} ({pairs[0]:.2f} to {pairs[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="key=value of our recipes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default=",".join(RECIPES))
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    changes = flat(parse_overrides(arguments.words))
    print(f"{'method':<6} {'ours s/step':>12} {'lightly s/step':>15} {'ours / lightly':>15}", flush=True)
    for name in arguments.methods.split(","):
        mine, config = ours(RECIPES[name], arguments.batch, changes)
        theirs = {"ibot": ibot, "mae": mae, "capi": capi}[name](config, arguments.batch)
        print(in_turns(name, mine, theirs, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
