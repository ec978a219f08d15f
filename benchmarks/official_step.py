"""A whole training step, ours and the official code's, in turns on a CPU: iBOT, DINOv2 and CAPI with a ViT-S.

    git clone https://github.com/bytedance/ibot /code/ibot
    git clone https://github.com/facebookresearch/dinov2 /code/dinov2
    git clone https://github.com/facebookresearch/capi /code/capi
    python -m benchmarks.official_step [--ibot /code/ibot] [--dinov2 /code/dinov2] [--capi /code/capi]
        [--steps 3] [--batch 4] [--threads 1] [key=value]

Networks, heads and losses are the official modules, put together as their training scripts do, in float32 and
without compilation; what they import must be installed. The scripts themselves want CUDA. Shapes are those of
our recipes. Theirs starts from views that are ready, ours makes its views from images. Times: core-seconds;
with more threads those of the clock. DINOv2's training asserts xFormers, which needs a GPU, for views of both
sizes in one pass: here each size has its own pass, and attention is what its modules do without xFormers.
"""

import argparse
import ast
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from benchmarks.lightly_step import Once, in_turns, ours, trained
from foveola.config import parse_overrides
from foveola.training.recipe import RunConfig
from foveola.trees import flat

RECIPES = {"ibot": "ibot-vits16-in1k", "dinov2": "dinov2-vits16-in1k", "capi": "capi-vits14"}


def modules_of(folder: Path, *names: str) -> list[ModuleType]:
    """Import modules of a checkout whose names, such as `utils`, may be those of another checkout as well."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            path = getattr(sys.modules[name], "__file__", None) or ""
            if path.startswith(str(folder)):
                del sys.modules[name]


def class_of(path: Path, name: str) -> Any:
    """Return a class that a script defines, without running the script: it imports what training needs."""
    (found,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == name
    )
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": functional, "np": np, "dist": distributed}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    return names[name]


def ibot(folder: Path, config: RunConfig, batch: int) -> Once:
    """A step of main_ibot.py: one head of 8,192 prototypes on every token of every view."""
    vision, heads = modules_of(folder, "models.vision_transformer", "models.head")
    side, count = config.views.global_size, config.views.local_count
    cells = side // config.model.patch_size

    def network(drop_path: float, masked: bool) -> nn.ModuleList:
        drops = {"drop_path_rate": drop_path, "return_all_tokens": True, "masked_im_modeling": masked}
        head = heads.iBOTHead(384, 8192, patch_out_dim=8192, norm_last_layer=True, shared_head=True)
        return nn.ModuleList([vision.vit_small(patch_size=config.model.patch_size, **drops), head])

    student, teacher = network(config.model.drop_path, True), network(0.0, False).requires_grad_(False)
    backbone: Any = student[0]
    losses = class_of(folder / "main_ibot.py", "iBOTLoss")(
        8192, 8192, 2, count, 0.04, 0.04, 0.04, 0.07, 30, 800
    )
    large = torch.randn(2 * batch, 3, side, side)
    small = torch.randn(count * batch, 3, config.views.local_size, config.views.local_size)

    def loss() -> Tensor:
        masks = torch.rand(2 * batch, cells, cells) < 0.15  # the mean; its loss reads every patch in any case
        with torch.no_grad():
            wanted = teacher[1](teacher[0](large))
        found = student[1](backbone(large, mask=masks))
        backbone.masked_im_modeling = False
        others = student[1](backbone(small))[0]
        backbone.masked_im_modeling = True
        return losses(found, wanted, others, masks.chunk(2), 0)["loss"]

    def after() -> None:
        mine = dict(student.named_parameters())
        with torch.no_grad():
            for name, slow in teacher.named_parameters():
                slow.data.mul_(0.996).add_(0.004 * mine[name].detach().data)

    return trained(student, loss, after)


def dinov2(folder: Path, config: RunConfig, batch: int) -> Once:
    """A step of ssl_meta_arch.py: one head on the tokens that the losses read, centring, KoLeo."""
    names = ("models.vision_transformer", "layers", "loss")
    vision, layers, losses = modules_of(folder, *(f"dinov2.{name}" for name in names))
    method: Any = config.method
    prototypes = method.heads["main"].prototypes
    side, count = config.views.global_size, config.views.local_count
    cells = (side // config.model.patch_size) ** 2

    def network(drop_path: float) -> nn.ModuleList:
        drops = {"drop_path_rate": drop_path, "drop_path_uniform": True, "init_values": 1e-5}
        vit = vision.vit_small(config.model.patch_size, img_size=config.model.image_size, **drops)
        return nn.ModuleList([vit, layers.DINOHead(384, prototypes)])

    student, teacher = network(config.model.drop_path), network(0.0).requires_grad_(False)
    tokens, patches, koleo = losses.DINOLoss(prototypes), losses.iBOTPatchLoss(prototypes), losses.KoLeoLoss()
    large = torch.randn(2 * batch, 3, side, side)
    small = torch.randn(count * batch, 3, config.views.local_size, config.views.local_size)
    masked = round(0.3 * cells)  # of every other image, as DINOv2 masks on average

    def loss() -> Tensor:
        order = torch.rand(batch, cells).argsort(1)[:, :masked]
        masks = torch.zeros(2 * batch, cells, dtype=torch.bool)
        masks[::2].scatter_(1, order, True)
        hidden = masks.flatten().nonzero().flatten()
        with torch.no_grad():
            slow = teacher[0](large, is_training=True)
            crossed = torch.cat(slow["x_norm_clstoken"].chunk(2)[::-1])
            seen = teacher[1](torch.cat([crossed, slow["x_norm_patchtokens"].flatten(0, 1)[hidden]]))
            wanted = tokens.softmax_center_teacher(seen[: 2 * batch], 0.07).view(2, batch, -1)
            tokens.update_center(seen[: 2 * batch])
            targets = patches.softmax_center_teacher(seen[None, 2 * batch :], 0.07)[0]
            patches.update_center(seen[None, 2 * batch :])
        found = student[0](large, masks=masks, is_training=True)
        others = student[0](small, is_training=True)["x_norm_clstoken"]
        classes, guessed = found["x_norm_clstoken"], found["x_norm_patchtokens"].flatten(0, 1)[hidden]
        parts = len(others), len(classes), len(guessed)
        far, near, inner = student[1](torch.cat([others, classes, guessed])).split(parts)
        pairs = 2 + 2 * count
        token = tokens(far.chunk(count), wanted) + 2 * tokens([near], [wanted.flatten(0, 1)])
        spread = sum(koleo(part) for part in classes.chunk(2))
        patch = patches.forward_masked(inner, targets, student_masks_flat=masks, n_masked_patches=len(inner))
        return token / pairs + 0.1 * spread + patch

    def after() -> None:
        with torch.no_grad():
            slow, fast = ([weight.data for weight in network.parameters()] for network in (teacher, student))
            torch._foreach_mul_(slow, 0.992)
            torch._foreach_add_(slow, fast, alpha=0.008)

    return trained(student, loss, after)


def capi(folder: Path, config: RunConfig, batch: int) -> Once:
    """A step of train_capi.py: predictor and clusters, positionwise Sinkhorn-Knopp, two losses."""
    (model,) = modules_of(folder, "model")
    method: Any = config.method
    side, dropping = config.views.global_size, config.views.dropping
    assert dropping is not None
    cells, clusters = (side // config.model.patch_size) ** 2, method.clustering.prototypes
    settings = {
        "transformers_kwargs": {
            "embed_dim": 384,
            "drop_path_rate": config.model.drop_path,
            "block_kwargs": {"attn_kwargs": {"num_heads": 6}},
        },
        "encoder_kwargs": {"depth": 12},
        "decoder_kwargs": {"depth": method.predictor.depth or 12},
    }
    student, teacher = (model.EncoderDecoder(**settings).init_weights() for _ in range(2))
    teacher.eval().requires_grad_(False)
    head, slow_head = (model.L2NormLinear(384, clusters) for _ in range(2))
    kwargs = {"bias": True, "n_sk_iter": 3, "target_temp": 0.06, "pred_temp": 0.12}
    clustering = model.OnlineClustering(384, clusters, **kwargs)
    images = torch.randn(batch, 3, side, side)
    dropped = round(dropping.ratio * cells)
    asked = round(dropping.predict * dropped)
    starts = torch.arange(batch)[:, None] * cells

    def loss() -> Tensor:
        order = torch.rand(batch, cells).argsort(1)
        predict, visible = ((starts + part).flatten() for part in (order[:, :asked], order[:, dropped:]))
        with torch.no_grad():
            patches, _ = teacher.forward_pretrain(images)
        targets, clustered = clustering(patches.transpose(0, 1))
        targets = targets.transpose(0, 1).reshape(batch * cells, -1).index_select(0, predict)
        _, predictions = student.forward_pretrain(images, visible, predict, do_prediction=True)
        logits = functional.log_softmax(head(predictions).float() / 0.12, dim=-1)
        return -(targets.float() * logits).sum(-1).mean() + clustered

    def after() -> None:
        fast, slow = ([*a.parameters(), *b.parameters()] for a, b in ((student, head), (teacher, slow_head)))
        with torch.no_grad():
            torch._foreach_mul_(slow, 0.999)
            torch._foreach_add_(slow, fast, alpha=0.001)

    return trained(nn.ModuleList([student, head, clustering]), loss, after)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="key=value of our recipes")
    parser.add_argument("--ibot", type=Path, help="checkout of bytedance/ibot")
    parser.add_argument("--dinov2", type=Path, help="checkout of facebookresearch/dinov2")
    parser.add_argument("--capi", type=Path, help="checkout of facebookresearch/capi")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    distributed.init_process_group("gloo", rank=0, world_size=1)  # the official losses ask for its size
    print(f"{'method':<6} {'ours s/step':>12} {'official s/step':>15} {'ours / official':>15}", flush=True)
    for name, make in {"ibot": ibot, "dinov2": dinov2, "capi": capi}.items():
        if folder := getattr(arguments, name):
            mine, config = ours(RECIPES[name], arguments.batch, flat(parse_overrides(arguments.words)))
            theirs = make(folder.resolve(), config, arguments.batch)
            print(in_turns(name, mine, theirs, arguments.steps), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
