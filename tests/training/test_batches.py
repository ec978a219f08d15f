"""A batch on one process, on several, and in parts: what takes the same step, and what sees another batch."""

import json
from itertools import chain, combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from foveola.data.order import epoch_order, order_of_rank
from tests.training.conftest import HEADS, SMALL

TRAIN = """
import dataclasses, importlib.util, json, sys
import torch
from foveola import distributed
from foveola.data.ahead import Asker
from foveola.data.loader import Loader
from foveola.data.sources import open_source
from foveola.logged import Averages, of_all_processes
from foveola.training import loop
from foveola.training.assemble import assemble, local_batch_size
from foveola.training.durations import plan
from foveola.training.recipe import resolve
from foveola.training.supply import loader_of, with_data
from foveola.views.batch import Streams, make_views

torch.set_num_threads(1)
CPU = torch.device("cpu")
spec = importlib.util.spec_from_file_location("shared", "CONFTEST")
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)


def train(recipe, changes, parts, steps):
    config = resolve(recipe, changes | {"accumulate": parts})
    source = open_source(config.data)
    config = with_data(config, source)
    world = distributed.world_size()
    progress = plan(config, len(source), world)
    trainer, share = assemble(config, progress, CPU), local_batch_size(config)
    batches = iter(loader_of(config, source, share, CPU, 0, Asker()))
    read = {"with_objects": config.views.objects is not None, "annotations": config.method.annotations}
    everyone = iter(Loader(source, config.batch_size, config.seed, config.loader, **read))
    losses, logged = [], []
    for step in range(steps):
        canvases = next(everyone)
        whole = make_views(canvases, config.views, config.model.patch_size, Streams(config.seed, step))

        def views(part_of_them, config, patch_size, streams):  # those of one process that takes all at once
            seed, part, rank = streams.origin
            first = (part % parts * world + rank) * share
            mine = slice(first, first + share)
            assert torch.equal(part_of_them.indices, canvases.indices[mine])
            return shared.part_of(whole, mine)

        loop.make_views = views
        found = trainer.step(dataclasses.replace(progress, step=step), lambda: next(batches))
        logs = {
            name: value if isinstance(value, Averages) else Averages((torch.as_tensor(value),), 1)
            for name, value in found.items()
        }
        logs = of_all_processes(logs, CPU) | trainer.diagnose()
        losses.append(distributed.all_reduce_mean(torch.as_tensor(found["loss"])).item())
        logged.append({name: logs[name] for name in sorted(logs)} if distributed.is_main() else None)
    state = {name: p.detach() for name, p in trainer.method.named_parameters()}
    logged = distributed.broadcast_object(logged)
    return losses, state | {name: b for name, b in trainer.method.named_buffers() if "center" in name}, logged


distributed.start("cpu")
world = distributed.world_size()
for name, recipe, changes, splits, steps in json.loads(sys.argv[1]):
    for processes, parts in splits:
        if processes == world:
            found = train(recipe, changes, parts, steps)
            if distributed.rank() == world - 1:  # whose statistics are not those of the first
                torch.save(found, f"{sys.argv[2]}/{name}-{world}-{parts}.pt")
distributed.stop()
"""
DISTILLED = SMALL | {
    "method.heads": {"main": HEADS},
    "optimizer.freeze_last_layer": "0 steps",
    "views.local_size": 16,
    "views.local_count": 2,
    "method.spread": None,
}
CENTRED = DISTILLED | {"method.token.target.kind": "centering"}
THREE = CENTRED | {
    "method.heads": dict.fromkeys(("main", "patches", "positions"), HEADS),
    "method.patch.target.kind": "centering",
    "method.position.target.kind": "centering",
}
CAPI = SMALL | {
    "method.clustering.prototypes": 24,
    "model": {k: v for k, v in SMALL["model"].items() if k != "image_size"},
}
# (processes, parts) of a batch of 8 images.
ANY = [[(1, 1), (2, 1), (2, 2)]]
BY_PARTS = [[(1, 1), (2, 1)], [(1, 2), (2, 2)]]
BY_ROWS = [[(1, 1)], [(1, 2), (2, 1)], [(1, 4), (2, 2)]]
# What takes one and the same step: the splits of each list do, and no two of different lists.
METHODS = {
    "dino": ("dino-tiny-tinyimagenet", CENTRED, ANY),
    "mixture": ("odis-posfield-tiny-tinyimagenet", THREE, ANY),
    "mae": ("mae-tiny-tinyimagenet", SMALL, ANY),
    "ijepa": ("ijepa-tiny-tinyimagenet", SMALL, ANY),
    "classify": ("classify-small", SMALL, ANY),
    "sinkhorn": ("ibot-tiny-tinyimagenet", DISTILLED, BY_PARTS),
    "capi": ("capi-tiny-tinyimagenet", CAPI, BY_PARTS),
    "capi-all": ("capi-tiny-tinyimagenet", CAPI | {"method.clustering.balance": "all"}, BY_PARTS),
    "queue": ("capi-tiny-tinyimagenet", CAPI | {"method.clustering.queue": 8}, BY_PARTS),
    "koleo": ("dino-tiny-tinyimagenet", CENTRED | {"method.spread": {"weight": 0.1}}, BY_ROWS),
}
STEPS = 2  # the second reads what the first left: centres, past patches


@pytest.fixture(scope="module")
def taken(run_ranks, tmp_path_factory):
    """Of each method and split, the loss of each step, and weights and centres after the last."""
    folder = tmp_path_factory.mktemp("steps")
    work = [(name, how, changes, [*chain(*alike)], STEPS) for name, (how, changes, alike) in METHODS.items()]
    code = TRAIN.replace("CONFTEST", str(Path(__file__).parents[1] / "methods" / "conftest.py"))
    for processes in (1, 2):
        run_ranks(code, processes, [json.dumps(work), str(folder)], timeout=280)
    return {path.stem: torch.load(path) for path in folder.iterdir()}


def farthest(one, other):
    """The largest difference of the losses of steps, and of any tensor over its largest number."""
    (losses, state, _), (others, theirs, _) = one, other
    assert state.keys() == theirs.keys()
    apart = [
        float((p - theirs[name]).abs().max() / p.abs().max().clamp(min=1e-3)) for name, p in state.items()
    ]
    return max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(losses, others, strict=True)), max(apart)


@pytest.mark.parametrize("name", METHODS)
def test_processes_and_parts_take_the_step_of_one_batch_as_far_as_statistics_allow(taken, name):
    """The views are those of one process: only the sums that a loss takes over a batch tell the splits apart.

    Sinkhorn-Knopp is of the images of all processes, and of a part; KoLeo is of what one process takes at
    once; all other losses are means over images, and a centre moves once by all of them.
    """
    groups = [[taken[f"{name}-{ranks}-{parts}"] for ranks, parts in alike] for alike in METHODS[name][2]]
    for first, *others in groups:
        for other in others:
            losses, state = farthest(first, other)
            assert losses < 5e-6
            assert state < 2e-6
    for (one, *_), (other, *_) in combinations(groups, 2):
        assert min(farthest(one, other)) > 1e-2


def logged_apart(one, other):
    """The number of a step that is logged most differently, by what is its size; which, and the two."""
    past = "clustering/position_information"  # by what the first process saw before
    apart = [("", 0.0, 0.0, 0.0)]
    for mine, theirs in zip(one[2], other[2], strict=True):
        assert mine.keys() == theirs.keys()
        apart += [
            (k, abs(mine[k] - theirs[k]) / max(abs(mine[k]), 0.1), mine[k], theirs[k])
            for k in mine
            if k != past
        ]
    return max(apart, key=lambda each: each[1])


@pytest.mark.parametrize("name", METHODS)
def test_what_is_logged_is_of_the_whole_step_whatever_the_split(taken, name):
    """Targets, features, objects and all: as of one process that takes all at once."""
    for alike in METHODS[name][2]:
        first, *others = (taken[f"{name}-{ranks}-{parts}"] for ranks, parts in alike)
        assert {"loss", "grad_norm", "lr"} < first[2][0].keys()
        for other in others:
            assert logged_apart(first, other)[1] < 1e-4, logged_apart(first, other)
    if name == "mixture":
        assert first[2][1].keys() > {
            "token/target_entropy", "patch/kl_to_uniform", "position/prototypes_used", "position/found",
            "objects/lost", "feature_spread", "effective_rank",
        }  # fmt: skip


def test_a_step_of_16_384_images_takes_the_same_ones_whatever_the_split():
    count, batch = 60_000, 2**14  # three steps an epoch: this is the last one of the second epoch
    order = epoch_order(0, 1, count)[2 * batch : 3 * batch]
    for processes, parts in ((1, 1), (1, 64), (64, 1), (8, 16), (512, 4)):
        shape = 3 * parts, processes, batch // (processes * parts)
        taken = [order_of_rank(0, 1, count, shape, rank)[2 * parts : 3 * parts] for rank in range(processes)]
        assert np.stack(taken, axis=1).flatten().tolist() == order.tolist()
