"""Halves of a folder: disjoint, complete, alike in their classes, and stable."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.halves import halves_for_test
from foveola.data.identity import identity_of, shared
from foveola.data.sample import DataError
from foveola.data.sources import open_source


def fill(folder: Path, counts: dict[str, int]) -> Path:
    for label, count in counts.items():
        (folder / label).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng([*label.encode(), number]).integers(0, 255, (16, 16, 3), np.uint8)
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
    before = halves_for_test(files[:990], labels[:990], "abcde", 0.2, 0)
    after = halves_for_test(files, labels, "abcde", 0.2, 0)[:990]
    assert before.sum() == 198
    assert np.ptp(np.bincount(labels[:990][before])) <= 1
    assert (before != after).sum() <= 10


def test_the_order_of_files_does_not_count():
    files, labels = [b"%d.jpg" % i for i in range(60)], np.arange(60) % 3
    order = np.random.default_rng(0).permutation(60)
    held = halves_for_test([files[i] for i in order], labels[order], "abc", 0.25, 4)
    assert np.array_equal(held, halves_for_test(files, labels, "abc", 0.25, 4)[order])


def test_an_added_class_leaves_the_others_as_they_are():
    """Also where its number comes before theirs. Of each class one image at most is drawn anew."""
    files = [b"%d.jpg" % i for i in range(1000)]
    labels = np.arange(1000) % 50
    classes = [f"class {i:02d}" for i in range(50)]
    before = halves_for_test(files, labels, classes, 0.2, 0)
    more = [*files, *(b"new %d" % i for i in range(20))]
    after = halves_for_test(more, np.append(labels + 1, np.zeros(20, int)), ["added", *classes], 0.2, 0)
    assert after[1000:].sum() == 4
    assert (before != after[:1000]).sum() <= 2


def test_copies_of_an_image_are_in_one_half_and_count_once():
    """500 images in 5 classes; of the first 100 there are two copies, the second in other classes."""
    files = [b"%d" % i for i in range(500)]
    labels = np.arange(500) % 5
    held = halves_for_test(
        files + files[:100] + files[:100],
        np.concatenate([labels, labels[:100], (labels[:100] + 1) % 5]),
        "abcde",
        0.2,
        0,
    )
    assert np.array_equal(held[:100], held[500:600])
    assert np.array_equal(held[:100], held[600:])
    assert held[:500].sum() == 100
    # With labels in two classes an image is one of the first of them: 20 less of class 4 and more of class 0.
    of = np.minimum(labels, np.append((labels[:100] + 1) % 5, labels[100:]))
    assert np.bincount(of).tolist() == [120, 100, 100, 100, 80]
    assert np.bincount(of[held[:500]]).tolist() == [24, 20, 20, 20, 16]


def test_copies_in_a_folder_are_in_one_half(tmp_path: Path):
    root = fill(tmp_path / "d", {"a": 12, "bb": 12})
    for path in list((root / "a").iterdir()):
        shutil.copyfile(path, path.with_stem(f"copy-{path.stem}"))
    shutil.copyfile(root / "bb" / "3.png", root / "a" / "other-class.png")
    spec = f"folder:{root}?holdout=0.25"
    train, test = open_source(spec, "train"), open_source(spec, "test")
    assert (len(train) + len(test), len(set(identity_of(test).contents))) == (37, 6)
    assert not shared(identity_of(train).contents, identity_of(test).contents).any()
    # A name says nothing: renamed, each image stays in its half.
    before = sorted(identity_of(test).contents)
    for path in list(root.glob("*/*")):
        path.rename(path.with_stem(f"{sum(path.stem.encode()) * 7 % 10}-{path.stem}"))
    assert sorted(identity_of(open_source(spec, "test")).contents) == before


def test_files_that_cannot_be_read_are_drawn_by_their_names(tmp_path: Path):
    root = fill(tmp_path / "d", {"a": 10})
    for number in range(10):
        (root / "a" / f"{number}.png").unlink()
        (root / "a" / f"{number}.png").symlink_to("nowhere")
    spec = f"folder:{root}?holdout=0.2"
    train, test = (open_source(spec, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("split=test", "split= needs holdout="),
        ("holdout=1.5", "needs a fraction such as 0.2"),
        ("holdout=0", "needs a fraction such as 0.2"),
        ("holdout=0.5", "holds out none"),
    ],
)
def test_mistakes(tmp_path: Path, query: str, message: str):
    root = fill(tmp_path / "d", {"a": 1, "bb": 1})
    with pytest.raises(DataError, match=message):
        open_source(f"folder:{root}?{query}")
