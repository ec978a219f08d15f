"""Images that are in train and in test: found by contents, and never measured without a word."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from foveola.cli import main
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.evaluation.classification.knn import KnnConfig
from foveola.evaluation.evaluate import evaluate, evaluate_all
from foveola.evaluation.features.overlap import content_groups, overlap_of
from foveola.evaluation.features.table import extract_tables
from foveola.evaluation.images import choose_images

QUIET = {"workers": 0, "progress": False}


def fill(folder: Path, seeds: range, suffix: str = "bmp") -> Path:
    """Noise in two classes; BMP, so that all files have one size."""
    for seed in seeds:
        path = folder / ("even" if seed % 2 == 0 else "odd") / f"{seed:02d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 200 + 50 * (seed % 2), (40, 48, 3), np.uint8)
        Image.fromarray(noise).save(path)
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return fill(tmp_path / "train", range(24))


@pytest.fixture
def mixed(tmp_path: Path, train: Path) -> Path:
    """Eight images of train under other names, and six that it has not."""
    fill(tmp_path / "mixed", range(100, 106))
    for seed in range(8):
        side = "even" if seed % 2 == 0 else "odd"
        shutil.copyfile(train / side / f"{seed:02d}.bmp", tmp_path / "mixed" / side / f"z{seed}.bmp")
    return tmp_path / "mixed"


@pytest.mark.parametrize(
    ("protocol", "settings"),
    [
        ("knn", {"k": [3]}),
        ("linear", {"epochs": 1}),
        ("logistic", {}),
        ("attentive", {"epochs": 1}),
        ("abmilp", {"epochs": 1}),
        ("probes", {"epochs": 1}),
    ],
)
def test_every_protocol_that_learns_refuses(encoder, train, mixed, protocol, settings) -> None:
    for test, count in ((f"folder:{train}?limit=9", "9 of 9"), (f"folder:{mixed}", "8 of 14")):
        with pytest.raises(UserError, match=f"{protocol}: {count} test images are in train as well") as error:
            evaluate(encoder, protocol, train=f"folder:{train}", test=test, **QUIET, **settings)
        assert "\n" not in str(error.value)
        assert "overlap=drop" in str(error.value)
        assert ("exclude_self=true" in str(error.value)) == (protocol == "knn")
    assert "even/z0.bmp, even/z2.bmp, even/z4.bmp, ..." in str(error.value)


def test_the_remedy_that_the_error_names_works(encoder, train) -> None:
    """One folder, its halves: nothing is in both."""
    with pytest.raises(UserError, match=r"holdout=0\.2 in both data strings"):
        evaluate(encoder, "knn", train=f"folder:{train}", test=f"folder:{train}", **QUIET)
    spec = f"folder:{train}?holdout=0.2"
    result = evaluate(encoder, "knn", train=spec, test=spec, k=(1,), **QUIET)
    assert (result.data["train"]["rows"], result.data["test"]["rows"]) == (19, 5)


def test_halves_are_advised_where_they_can_help(encoder, train, mixed) -> None:
    shares = {"train": f"folder:{train}?holdout=0.2", "test": f"folder:{train}?holdout=0.5"}
    with pytest.raises(UserError, match="the same holdout= and seed= in both data strings"):
        evaluate(encoder, "knn", **shares, **QUIET)
    with pytest.raises(UserError, match="overlap=drop") as error:  # of two folders there are no halves
        evaluate(encoder, "knn", train=f"folder:{train}", test=f"folder:{mixed}", **QUIET)
    assert "holdout" not in str(error.value)


def test_a_copy_with_one_file_deleted(encoder, train, tmp_path) -> None:
    shutil.copytree(train, tmp_path / "copy")
    (tmp_path / "copy" / "odd" / "01.bmp").unlink()
    with pytest.raises(UserError, match="23 of 23 test images are in train"):
        evaluate(encoder, "knn", train=f"folder:{train}", test=f"folder:{tmp_path / 'copy'}", **QUIET)


def test_equal_names_and_sizes_are_no_overlap(encoder, train, tmp_path) -> None:
    """Frames of two cameras."""
    other = fill(tmp_path / "other", range(200, 224))
    for side in ("even", "odd"):
        for a, b in zip(sorted((other / side).iterdir()), sorted((train / side).iterdir()), strict=True):
            a.rename(a.with_name(b.name))
    result = evaluate(encoder, "knn", train=f"folder:{train}", test=f"folder:{other}", k=(3,), **QUIET)
    assert result.data["train"]["fingerprint"] != result.data["test"]["fingerprint"]
    with pytest.raises(UserError, match="exclude_self=true does nothing here: no test image is in train"):
        evaluate(encoder, "knn", train=f"folder:{train}", test=f"folder:{other}", exclude_self=True, **QUIET)


def test_drop_measures_the_others(encoder, train, mixed, tmp_path) -> None:
    """As if they had never been in the folder; and says how many there were."""
    both = {"train": f"folder:{train}", "k": (3,), "linear": {"epochs": 2}, **QUIET}
    names = ("knn", "linear")
    dropped = evaluate_all(encoder, names, test=f"folder:{mixed}", overlap="drop", **both)
    alone = evaluate_all(encoder, names, test=f"folder:{fill(tmp_path / 'new', range(100, 106))}", **both)
    for name in names:
        assert dropped[name].metrics == alone[name].metrics
        assert dropped[name].data["test"]["fingerprint"] == alone[name].data["test"]["fingerprint"]
        assert dropped[name].data["test"]["rows"] == 6
        assert dropped[name].notes[0].startswith("overlap=drop: 8 of 14 test images are in train as well")
        assert len(dropped[name].notes) == len(alone[name].notes) + 1
    with pytest.raises(UserError, match=r"24 of 24 .*: overlap=drop leaves nothing"):
        evaluate(encoder, "knn", train=f"folder:{train}", test=f"folder:{train}", overlap="drop", **QUIET)


def test_allow_says_it(encoder, train, mixed) -> None:
    result = evaluate(
        encoder, "knn", train=f"folder:{train}", test=f"folder:{mixed}", k=(1,), overlap="allow", **QUIET
    )
    assert result.data["test"]["rows"] == 14
    assert result.notes[0].startswith("overlap=allow: 8 of 14 test images are in train as well (such as even")


def test_exclude_self_leaves_out_the_image_not_the_row(encoder, train, mixed) -> None:
    """Against a loop over all pairs; the copies stand in another order and under other names."""
    shutil.copyfile(train / "odd" / "03.bmp", train / "odd" / "twin.bmp")
    sources = open_source(f"folder:{train}"), open_source(f"folder:{mixed}")
    result = evaluate(
        encoder, "knn", train=sources[0], test=sources[1], k=(1,), exclude_self=True, masks=False, **QUIET
    )
    assert result.notes[0].startswith("exclude_self: 8 of 14 test images are in train as well")
    config = KnnConfig(workers=0)
    tables = [extract_tables(encoder, s, (False,), config, progress=False)[0][0] for s in sources]
    references, query = (normalize(table.features.double(), dim=1) for table in tables)
    files = [[(s.root / s[i].name).read_bytes() for i in range(len(s))] for s in sources]
    right = 0
    for i, mine in enumerate(files[1]):
        others = [j for j, other in enumerate(files[0]) if other != mine]
        nearest = max(others, key=lambda j: float(query[i] @ references[j]))
        right += int(tables[0].labels[nearest] == tables[1].labels[i])
    assert result.metrics["top1_plain_k1"] == pytest.approx(100 * right / 14)
    plain = evaluate(encoder, "knn", train=sources[0], test=sources[1], k=(1,), overlap="allow", **QUIET)
    assert plain.metrics["top1_plain_k1"] >= 100 * 8 / 14 != result.metrics["top1_plain_k1"]


def test_rows_are_of_one_image_where_its_bytes_are(train, mixed) -> None:
    """With several rows of an image, and none of one that could not be read; against the files themselves."""
    sources = open_source(f"folder:{train}"), open_source(f"folder:{mixed}")
    config = KnnConfig(limit=12, seed=3)
    chosen = [choose_images(len(source), 12, 3) for source in sources]
    trained, tested = np.repeat(chosen[0][1:], 2), np.repeat(chosen[1][:-1], 3)
    of_train, of_test = content_groups(*sources, config, torch.tensor(trained), torch.tensor(tested))
    one, other = (
        [s.path(i).read_bytes() for i in rows.tolist()]
        for s, rows in zip(sources, (trained, tested), strict=True)
    )
    same = torch.tensor([[left == right for right in one] for left in other])
    assert torch.equal(of_test[:, None] == of_train, same)
    assert 0 < same.sum() < same.numel()


def test_only_what_is_read_counts(train) -> None:
    """`limit` and `seed` choose images of both sets."""
    source = open_source(f"folder:{train}")
    assert overlap_of(source, source, 5, 0).count == 5
    few = open_source(f"folder:{train}?limit=12&seed=1")
    read = overlap_of(source, few, 5, 3)
    assert len(read.chosen) == 5
    names = {source[i].name for i in overlap_of(source, source, 5, 3).chosen.tolist()}
    assert read.count == sum(few[i].name in names for i in read.chosen.tolist())


def test_dense_protocols_and_localisation_refuse(encoder, tmp_path) -> None:
    images, labels = fill(tmp_path / "images", range(6)), tmp_path / "labels"
    for side in ("even", "odd"):
        (labels / side).mkdir(parents=True)
        for path in (images / side).iterdir():
            Image.fromarray(np.eye(40, 48, dtype=np.uint8)).save(labels / side / f"{path.stem}.png")
    spec = f"masks:{images}?labels={labels}&classes=2"
    for name in ("dense_retrieval", "knn_segmentation", "logistic_segmentation", "linear_segmentation"):
        with pytest.raises(UserError, match=f"{name}: 4 of 4 test images are in train as well"):
            evaluate(encoder, name, train=spec, test=f"{spec}&limit=4", **QUIET)
    (tmp_path / "boxes.json").write_text(
        json.dumps({f"{'even' if i % 2 == 0 else 'odd'}/{i:02d}.bmp": [[4, 4, 30, 30]] for i in range(6)})
    )
    spec = f"folder:{images}?boxes={tmp_path / 'boxes.json'}"
    with pytest.raises(UserError, match="localisation: 6 of 6 test images are in train as well"):
        evaluate(encoder, "localisation", train=spec, test=spec, maps=("abmilp",), **QUIET)
    result = evaluate(encoder, "localisation", train=spec, test=spec, maps=("centre",), **QUIET)
    assert "train is not used: maps= has no abmilp" in result.notes


def test_on_the_command_line(encoder, train, mixed, tmp_path, capsys) -> None:
    encoder.save(tmp_path / "e")
    words = ["evaluate", "knn", f"model={tmp_path / 'e'}", f"train=folder:{train}", f"test=folder:{mixed}"]
    words += ["k=[3]", "workers=0", "device=cpu"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*words, "overlap=drp"]) == 2
    assert "overlap='drp': valid are refuse, drop, allow" in capsys.readouterr().err
    assert main([*words, "overlap=drop"]) == 0
    assert "note: overlap=drop: 8 of 14 test images" in capsys.readouterr().out


def test_a_source_of_ones_own(encoder, list_source, make_sample) -> None:
    samples = [make_sample(i, label=i % 2) for i in range(12)]
    train, test = list_source(samples[:8]), list_source(samples[6:])
    with pytest.raises(UserError, match=r"2 of 6 test images are in train as well .such as image-6, ima"):
        evaluate(encoder, "knn", train=train, test=test, k=(2,), **QUIET)
    with pytest.raises(UserError, match=r"overlap=drop: list: has no method keep\(indices\)"):
        evaluate(encoder, "knn", train=train, test=test, k=(2,), overlap="drop", **QUIET)
    assert torch.is_inference_mode_enabled() is False


def test_processes_that_see_other_data_are_named(run_ranks, tmp_path) -> None:
    fill(tmp_path / "0", range(8))
    fill(tmp_path / "1", range(1, 9))
    fill(tmp_path / "test", range(50, 54))
    code = f"""
import os
from foveola import distributed
from foveola.config import UserError
from foveola.evaluation.evaluate import evaluate
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

with distributed.joined("cpu"):
    model = ViTConfig(width=32, depth=1, heads=2, patch_size=8, image_size=32)
    encoder = Encoder(EncoderConfig(model, TransformConfig(40, 32)))
    data = "folder:{tmp_path}/" + os.environ["RANK"]
    try:
        evaluate(encoder, "knn", train=data, test="folder:{tmp_path}/test", workers=0, progress=False)
    except UserError as error:
        print(error)
"""
    for out in run_ranks(code):
        assert "process 1 sees other data than process 0" in out
