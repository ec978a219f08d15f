"""A whole training step, ours and the official code's, in turns on a CPU: iBOT and CAPI with a ViT-S.

    git clone https://github.com/bytedance/ibot /code/ibot
    git clone https://github.com/facebookresearch/capi /code/capi
    python -m benchmarks.official_step [--ibot /code/ibot] [--capi /code/capi] [--steps 3] [key=value]

Networks, heads and losses are the official modules, put together as their training scripts do, in float32 and
without compilation; what they import must be installed. The scripts themselves want CUDA. Shapes are those of
our recipes. Theirs starts from views that are ready, ours makes its views from images. Times: core-seconds.
The official DINOv2 code cannot be measured here: its training asserts xFormers, which needs a GPU.
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

RECIPES = {"ibot": "ibot-vits16-in1k", "capi": "capi-vits14"}


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
    parser.add_argument("--capi", type=Path, help="checkout of facebookresearch/capi")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    distributed.init_process_group("gloo", rank=0, world_size=1)  # the official losses ask for its size
    print(f"{'method':<6} {'ours s/step':>12} {'official s/step':>15} {'ours / official':>15}", flush=True)
    for name, make in {"ibot": ibot, "capi": capi}.items():
        if folder := getattr(arguments, name):
            mine, config = ours(RECIPES[name], arguments.batch, flat(parse_overrides(arguments.words)))
            theirs = make(folder.resolve(), config, arguments.batch)
            print(in_turns(name, mine, theirs, arguments.steps), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
