"""Halves of a folder: disjoint, complete, alike in their classes, and stable."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.halves import held_out
from foveola.data.identity import identity_of, shared
from foveola.data.sample import DataError
from foveola.data.sources import open_source


def fill(folder: Path, counts: dict[str, int]) -> Path:
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng([number, len(label)]).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(folder / label / f"{number}.png")
    return folder


def names(spec: str, split: str) -> list[str]:
    source = open_source(spec, split)
    return [source[i].name for i in range(len(source))]


def test_halves_are_the_whole_and_each_class_gives_its_share(tmp_path: Path):
    root = fill(tmp_path / "d", {"a": 10, "bb": 20, "ccc": 1})
    spec = f"folder:{root}?holdout=0.2"
    train, test = names(spec, "train"), names(spec, "test")
    assert sorted(train + test) == sorted(names(f"folder:{root}", "train"))
    assert [sum(name.startswith(c) for name in test) for c in ("a/", "bb/", "ccc/")] == [2, 4, 0]
    a, b = open_source(spec, "train"), open_source(spec, "test")
    assert a.name == f"{spec}&split=train"
    assert not shared(identity_of(a).contents, identity_of(b).contents).any()
    assert a.classes == b.classes == ("a", "bb", "ccc")
    assert [b[i].label for i in range(len(b))] == [0, 0, 1, 1, 1, 1]
    assert names(f"{spec}&split=test", "train") == test != names(f"{spec}&seed=1", "test")
    assert set(names(f"{spec}&limit=3", "test")) < set(test)


def test_added_images_leave_the_others_in_their_half():
    files = [b"%d.jpg" % i for i in range(1000)]
    labels = np.arange(1000) % 5
    before = held_out(files[:990], labels[:990], 0.2, 0)
    after = held_out(files, labels, 0.2, 0)[:990]
    assert before.sum() == 198
    assert np.ptp(np.bincount(labels[:990][before])) <= 1
    assert (before != after).sum() <= 10


def test_the_order_of_files_does_not_count():
    files, labels = [b"%d.jpg" % i for i in range(60)], np.arange(60) % 3
    order = np.random.default_rng(0).permutation(60)
    held = held_out([files[i] for i in order], labels[order], 0.25, 4)
    assert np.array_equal(held, held_out(files, labels, 0.25, 4)[order])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("split=test", "split= needs holdout="),
        ("holdout=1.5", "needs a share such as 0.2"),
        ("holdout=0", "needs a share such as 0.2"),
        ("holdout=0.5", "holds out none"),
    ],
)
def test_mistakes(tmp_path: Path, query: str, message: str):
    root = fill(tmp_path / "d", {"a": 1, "bb": 1})
    with pytest.raises(DataError, match=message):
        open_source(f"folder:{root}?{query}")
