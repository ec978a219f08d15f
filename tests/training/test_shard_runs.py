"""Runs on tiles and on shards, of 5 channels and 12 bits: the weights of a run on the files in their folder,
interrupted, with workers and in two processes.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foveola
from foveola.config import build, merge
from foveola.training.recipe import RunConfig
from foveola.training.run import pretrain

CHANGES: dict[str, Any] = {
    "views": {"objects": None, "color": {"normalise": "data"}},
    "evaluate_every": None,
    "batch_size": 8,
    "duration": "8 steps",  # an epoch has 6
    "checkpoint_every": "3 steps",
}
SCENES = "range=0-4095&channels=all&tiles=32&overlap=8"


@pytest.fixture(scope="module")
def strings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same 48 tiles, of four scenes in a folder, of the scenes in shards, and each a file in shards."""
    root, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    (root / "files").mkdir()
    for number in range(4):
        np.save(root / "files" / f"{number}.npy", random.integers(0, 4096, (80, 104, 5), np.uint16))
    foveola.pack(f"folder:{root}/files", root / "shards", size="200KB", progress=False)
    tiles = foveola.pack(f"folder:{root}/files?{SCENES}", root / "tiles", format="npz", size="100KB",
                         processes=1, progress=False)  # fmt: skip
    assert (tiles.samples, tiles.shards > 2) == (48, True)
    return {
        "folder": f"folder:{root}/files?{SCENES}",
        "scenes": f"shards:{root}/shards?{SCENES}",
        "tiles": f"shards:{root}/tiles{tiles.options}",
    }


def settings(tree: dict[str, Any], data: str, workers: int = 0) -> dict[str, Any]:
    return merge(tree, CHANGES | {"data": data, "loader": {"workers": workers, "prefetch": 1}})


def test_runs_that_were_interrupted_have_the_weights_of_one_on_the_folder(
    strings, tiny_tree, tmp_path, interrupt_after, lines, newest
):
    whole = pretrain(build(RunConfig, settings(tiny_tree, strings["folder"])), out=str(tmp_path / "whole"))
    theirs = newest(whole.folder)["trainer"]["method"]
    for kind, stops in {"folder": (4, 0), "scenes": (4, 3, 0), "tiles": (7, 0)}.items():
        for stop, workers in zip(stops, (2, 0, 1), strict=False):
            interrupt_after(stop)
            config = build(RunConfig, settings(tiny_tree, strings[kind], workers))
            run = pretrain(config, out=str(tmp_path / kind))
        assert (run.step, run.finished) == (8, True)
        ours = newest(run.folder)["trainer"]["method"]
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert [line["loss"] for line in lines(run.folder)] == [line["loss"] for line in lines(whole.folder)]
        assert run.encoder().config.model.channels == 5


def test_two_processes_on_shards_resume_as_on_the_folder(strings, tiny_tree, tmp_path, stopped_ranks):
    whole, parts, tiles = (str(tmp_path / name) for name in ("whole", "parts", "tiles"))
    shards = settings(deepcopy(tiny_tree), strings["scenes"], 2)
    first, second = stopped_ranks([
        (settings(deepcopy(tiny_tree), strings["folder"]), whole, 0),
        (shards, parts, 5),
        (shards, parts, 0),
        (settings(deepcopy(tiny_tree), strings["tiles"], 1), tiles, 0),
    ])  # fmt: skip
    assert first == second
    assert [step for step, *_ in first] == [8, 5, 8, 8]
    assert first[0][2] == first[2][2] == first[3][2]
    assert Path(parts, "metrics.jsonl").is_file()
