import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import special

from foveola.cli import main
from foveola.config import ConfigError, UserError, build
from foveola.data.sample import BadImage, Sample
from foveola.data.sources import open_source
from foveola.evaluation.compare import compare
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.features.table import ExtractConfig, extract
from foveola.evaluation.images import Images
from foveola.evaluation.protocol import At
from foveola.evaluation.views.feature_space import (
    Moments,
    alignments,
    first_fraction,
    mean_cosine,
    moments,
    nearest_other,
    rankme,
    rows_rankme,
    spread,
    uniformity,
)
from foveola.evaluation.views.label_free import LabelFree, LabelFreeConfig
from foveola.evaluation.views.other_views import image_views, watch
from foveola.evaluation.views.retrieval import (
    OBJECTS_TOGETHER,
    CanvasCut,
    Retrieval,
    RetrievalConfig,
    choose_targets,
    two_views,
)
from foveola.models.encoder import Encoder, Features


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units(x: torch.Tensor) -> list[list[float]]:
    return [[v / math.dist(row, [0] * len(row)) for v in row] for row in x.double().tolist()]


# -- known values --------------------------------------------------------------------------------------------


def test_features_that_are_all_the_same() -> None:
    same = normal(1, 9).expand(30, -1)
    assert rankme(moments(same).singular_values()).item() == pytest.approx(1, abs=1e-3)
    assert alignments(same, same).tolist() == [0] * 30
    assert uniformity(same) == pytest.approx(0, abs=1e-6)
    assert spread(same) == pytest.approx(0, abs=1e-6)
    assert mean_cosine(same) == pytest.approx(1)
    assert nearest_other(same).tolist() == pytest.approx([1.0] * 30)
    assert first_fraction(moments(same).variances()) == 100
    nothing = torch.zeros(5, 4)
    assert rankme(moments(nothing).singular_values()).item() == 0
    assert rows_rankme(nothing).item() == 0


def test_orthonormal_rows_have_full_rank() -> None:
    square = torch.linalg.qr(normal(12, 12)).Q
    for rows in (12, 7, 1):
        found = rankme(moments(square[:rows]).singular_values()).item()
        assert found == pytest.approx(rows, rel=1e-4)
        assert rows_rankme(square[:rows]).item() == pytest.approx(found)
        assert rows_rankme(3 * square[:rows]).item() == pytest.approx(found)  # of any length
    assert uniformity(square) == pytest.approx(-4)  # all at right angles: exp(-2 * 2)
    assert mean_cosine(square) == pytest.approx(0, abs=1e-6)
    assert alignments(square[:6], square[6:]).tolist() == pytest.approx([2.0] * 6)
    assert alignments(square, -square).tolist() == pytest.approx([4.0] * 12)


def test_uniformity_on_the_circle() -> None:
    """ln I0(4) - 4 for directions in the plane; equally spaced ones, their own pairs put back, come to it."""
    n = 3000
    angles = 2 * math.pi * torch.arange(n) / n
    found = uniformity(torch.stack((angles.cos(), angles.sin()), dim=1))
    with_own = ((n - 1) * math.exp(found) + 1) / n
    assert math.log(with_own) == pytest.approx(math.log(special.i0(4)) - 4, abs=1e-6)


def test_random_directions_fill_the_space() -> None:
    x = normal(4000, 64)
    assert spread(x) == pytest.approx(1, abs=0.02)
    assert abs(mean_cosine(x)) < 0.01
    assert uniformity(x) == pytest.approx(-4, abs=0.15)
    assert 60 < rankme(moments(x).singular_values()).item() < 64
    assert first_fraction(moments(x).variances()) < 3
    assert rankme(moments(x + 100).singular_values()).item() < 7  # not centred: the mean is a direction
    assert first_fraction(moments(x + 100).variances()) < 3  # centred


# -- against loops -------------------------------------------------------------------------------------------


def test_equal_to_naive_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveola.evaluation.views.feature_space.ROWS_AT_ONCE", 7)
    x, y = normal(23, 6) + 0.5, normal(23, 6, seed=1)
    u, v = units(x), units(y)
    n = len(u)
    assert alignments(x, y).tolist() == pytest.approx(
        [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for p, q in zip(u, v, strict=True)]
    )
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    kernel = sum(math.exp(-2 * math.dist(u[i], u[j]) ** 2) for i, j in pairs)
    assert uniformity(x) == pytest.approx(math.log(kernel / len(pairs)))
    cosine = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in u] for p in u]
    assert mean_cosine(x) == pytest.approx(sum(cosine[i][j] for i, j in pairs) / len(pairs))
    assert nearest_other(x).tolist() == pytest.approx(
        [max(c for j, c in enumerate(row) if j != i) for i, row in enumerate(cosine)]
    )
    means = [sum(row[d] for row in u) / n for d in range(6)]
    deviations = [math.sqrt(sum((row[d] - means[d]) ** 2 for row in u) / n) for d in range(6)]
    assert spread(x) == pytest.approx(sum(deviations) / 6 * math.sqrt(6))


@pytest.mark.parametrize("shape", [(40, 7), (5, 12), (2, 5, 9)])
def test_rankme_against_svd(shape) -> None:
    x = normal(*shape) * torch.logspace(0, 2, shape[-1])
    expected = []
    for matrix in x.reshape(-1, *shape[-2:]).double().numpy():
        s = np.linalg.svd(matrix, compute_uv=False)
        p = s / np.abs(s).sum() + 1e-7
        expected.append(math.exp(-sum(value * math.log(value) for value in p)))
    assert rows_rankme(x).flatten().tolist() == pytest.approx(expected, rel=1e-6)
    if x.ndim == 2:
        assert rankme(moments(x).singular_values()).item() == pytest.approx(expected[0], rel=1e-6)
        components = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), compute_uv=False) ** 2
        share = 100 * components[0] / components.sum()
        assert first_fraction(moments(x).variances()) == pytest.approx(share)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = normal(50, 5) + 3
    parts, other = Moments(5), Moments(5)
    parts.add(x[:13])
    parts.add(x[13:14])
    other.add(x[14:])
    joined = parts.plus(other)
    assert joined.count == 50
    assert joined.singular_values().tolist() == pytest.approx(moments(x).singular_values().tolist())
    assert joined.variances().tolist() == pytest.approx(moments(x).variances().tolist())


def test_pairs_need_two_rows() -> None:
    for function in (uniformity, nearest_other):
        with pytest.raises(ValueError, match="two rows"):
            function(torch.ones(1, 3))


# -- the pass ------------------------------------------------------------------------------------------------


@pytest.fixture
def noise(list_source, make_sample):
    """40 images of noise, every second one with two objects."""
    boxes = [(10, 10, 50, 40), (40, 5, 75, 55)]
    return list_source([make_sample(i, boxes if i % 2 else None) for i in range(40)], name="noise:")


def run(encoder, source, **settings):
    config = LabelFreeConfig(**{"workers": 0, "limit": 40, **settings})
    return LabelFree().measure(At(encoder, None, source, progress=False), config)


def test_one_pass_sees_what_others_see(encoder, noise) -> None:
    """Evaluation views as of k-NN, views of objects as of `retrieval`, and views of images beside them."""
    config = LabelFreeConfig(workers=0, limit=40)
    targets = choose_targets(noise, 40, 0.0, 0)
    seen, patches, bad = watch(encoder, noise, targets, config, progress=False)
    assert bad == []
    assert seen.image_indices.tolist() == [target.image for target in targets]
    table = extract(encoder, noise, masks=False, config=ExtractConfig(workers=0), progress=False)
    assert seen.features == pytest.approx(table.features[seen.image_indices], abs=1e-5)
    assert patches.count == 40 * 16
    assert patches.sum / 16 == pytest.approx(seen.averages.double().sum(dim=0), rel=1e-5)
    assert seen.owners.tolist() == [target.image for target in targets if target.object >= 0]
    cut = CanvasCut(config.canvas, config.mask_canvas, encoder.config.transform, plain=True)
    drawn = Images(noise, np.array(targets), cut, OBJECTS_TOGETHER)[0].made
    canvases, plain = drawn.canvases(), torch.stack(drawn.plain)
    views = image_views(canvases, encoder, config, 0)
    for view in range(2):
        tokens = encoder(views[:, view]).objects[:, 0]
        assert seen.views[:32, view] == pytest.approx(tokens, abs=1e-5)
    crops, masks = two_views(canvases, encoder, RetrievalConfig(), 0)
    there = ~canvases.whole[:, 0]
    expected = encoder(crops[there, 1], masks[there, 1][:, None]).objects[:, 0]
    assert seen.objects[: len(expected), 1, 1] == pytest.approx(expected, abs=1e-5)
    patches_of = encoder(encoder.normalise(plain)).patches
    assert seen.within[:32] == pytest.approx(rows_rankme(patches_of), rel=1e-5)


def test_metrics_are_those_of_what_is_seen(encoder, noise, check_scores) -> None:
    config = LabelFreeConfig(workers=0, limit=40, recall=3, duplicate=0.9)
    seen, patches, _ = watch(encoder, noise, choose_targets(noise, 40, 0.0, 0), config, progress=False)
    outcome = run(encoder, noise, recall=3, duplicate=0.9)
    metrics = outcome.metrics
    check_scores(outcome, LabelFree.metrics)
    first, second = seen.views.unbind(dim=1)
    assert metrics["alignment"] == pytest.approx(alignments(first, second).mean().item())
    assert metrics["uniformity"] == pytest.approx((uniformity(first) + uniformity(second)) / 2)
    assert metrics["rankme_image"] == pytest.approx(rows_rankme(seen.features).item(), rel=1e-5)
    assert metrics["rankme_average"] == pytest.approx(rows_rankme(seen.averages).item(), rel=1e-5)
    assert metrics["rankme_patches"] == pytest.approx(rankme(patches.singular_values()).item())
    assert metrics["rankme_within"] == pytest.approx(seen.within.mean().item())
    nearest = nearest_other(seen.features)
    assert metrics["duplicates"] == pytest.approx(100 * (nearest >= 0.9).double().mean().item())
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (first, second)]
    both = unit[0] @ unit[1].T
    hits = [int(row.argmax()) == i for m in (both, both.T) for i, row in enumerate(m)]
    assert metrics["rank1_views"] == pytest.approx(100 * np.mean(hits))
    assert metrics["chance_rank1_views"] == 2.5
    assert metrics["chance_recall3_objects"] == 15
    for name in ("alignment", "rank1_views", "rankme_within", "duplicates", "rank1_objects_masks"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    averaged = run(encoder, noise, pool="average").metrics
    assert averaged["rankme_image"] == pytest.approx(metrics["rankme_average"], rel=1e-5)
    assert "rankme_average" not in averaged


def test_object_numbers_are_those_of_retrieval(encoder, list_source, make_sample) -> None:
    boxes = [(10, 10, 50, 40)]
    source = list_source([make_sample(i, boxes) for i in range(33)], name="objects:")
    metrics = run(encoder, source).metrics
    config = RetrievalConfig(objects=33, workers=0)
    expected = Retrieval().measure(At(encoder, None, source, progress=False), config).metrics
    for kind in ("plain", "masks"):
        for name in ("rank1", "recall5"):
            assert metrics[f"{name}_objects_{kind}"] == pytest.approx(expected[f"{name}_{kind}"])


def test_speed_changes_nothing_and_the_seed_does(encoder, noise) -> None:
    expected = run(encoder, noise)
    for settings in ({"batch_size": 7}, {"workers": 2}):
        found = run(encoder, noise, **settings)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert run(encoder, noise, seed=1).metrics["alignment"] != pytest.approx(expected.metrics["alignment"])
    few = run(encoder, noise, limit=12)
    assert few.data["test"]["rows"] == 12
    assert few.notes[0] == "rankme_image of 12 images is at most 12"


class Blind(Encoder):
    """Says the same of everything."""

    def forward(self, images: torch.Tensor, objects: torch.Tensor | None = None) -> Features:
        one = torch.arange(1.0, 33.0).expand(len(images), 16, 32)
        return Features(one[:, :1], one[:, :0], one, (4, 4))


class Pixels(Encoder):
    """Knows an image by its mean colour."""

    def forward(self, images: torch.Tensor, objects: torch.Tensor | None = None) -> Features:
        colour = torch.zeros(len(images), 16, 32)
        colour[..., :3] = torch.nn.functional.avg_pool2d(images, 8).flatten(2).mT
        return Features(colour.mean(dim=1, keepdim=True), colour[:, :0], colour, (4, 4))


def test_collapse_shows(encoder, noise) -> None:
    outcome = run(Blind(encoder.config), noise)
    metrics = outcome.metrics
    for name in ("rankme_image", "rankme_average", "rankme_patches", "rankme_within"):
        assert metrics[name] == pytest.approx(1, abs=1e-3)
    assert metrics["duplicates"] == metrics["first_component_image"] == 100
    assert metrics["alignment"] == metrics["rank1_views"] == metrics["rank1_objects_plain"] == 0
    assert metrics["uniformity"] == pytest.approx(0, abs=1e-6)
    assert "collapsed, or all around one large mean" in outcome.notes[1]


def test_who_knows_colours_finds_views_again(encoder, list_source) -> None:
    samples = []
    for i in range(30):
        image = np.zeros((40, 40, 3), np.uint8) + np.array(
            [255 * (i % 3) // 2, 255 * (i // 3 % 3) // 2, 25 * (i // 9)], np.uint8
        )
        samples.append(Sample(image, str(i)))
    source = list_source(samples, name="colours:")
    still = LabelFreeConfig().color
    still = dataclasses.replace(still, jitter=0.0, grayscale=0.0, solarize=(0.0, 0.0, 0.0))
    pixels = Pixels(encoder.config)
    found = run(pixels, source, color=still).metrics
    assert found["rank1_views"] > 90
    assert found["alignment"] < 0.01
    assert not [name for name in found if "objects" in name]
    assert run(pixels, source).metrics["alignment"] > 10 * found["alignment"]
    notes = run(pixels, source).notes
    assert "colours: has neither boxes nor masks: only numbers of images are given" in notes
    assert len(run(pixels, source, objects=False).notes) == 1


# -- mistakes and output -------------------------------------------------------------------------------------


def test_mistakes_are_said_in_a_line(encoder, noise, make_sample) -> None:
    for wrong in ({"scale": [0.5, 0.2]}, {"limit": 1}, {"duplicate": 1.0}, {"color": {"hue": 2}}):
        with pytest.raises(ConfigError):
            build(LabelFreeConfig, wrong)
    noise.samples = noise.samples[:1]
    with pytest.raises(UserError, match="noise:: 1 images, at least 2 are needed"):
        run(encoder, noise)
    noise.samples = [make_sample(i) for i in range(4)]
    encoder.backbone.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        run(encoder, noise)


def test_bad_images_are_counted(encoder, noise, make_sample, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveola.evaluation.views import retrieval

    known = retrieval.decode

    def decode(image):
        if image.shape[0] == 61:
            raise BadImage("damaged")
        return known(image)

    monkeypatch.setattr(retrieval, "decode", decode)
    noise.samples[3] = make_sample(3, height=61)
    with pytest.raises(UserError, match="1 of 40 images cannot be read, such as image-3"):
        run(encoder, noise)
    noise.samples = [noise.samples[i % 40 if i % 40 != 3 or i == 3 else 0] for i in range(100)]
    facts = run(encoder, noise, limit=100, objects=False).data["test"]
    assert (facts["images"], facts["rows"], facts["unreadable"]) == (100, 99, 1)


def test_command_line_and_side_by_side(encoder, tmp_path, capsys) -> None:
    encoder.save(tmp_path / "run" / "encoder")
    words = f"model={tmp_path / 'run'} test=scenes:?count=30 workers=0".split()
    assert main(["evaluate", "label_free", *words]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "results" / "label_free.json").read_text())
    metrics = result["metrics"]
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    low, high = metrics["alignment_low"], metrics["alignment_high"]
    assert lines["alignment"] == [
        "alignment",
        f"{metrics['alignment']:.2f}",
        f"[{low:.2f},",
        f"{high:.2f}]",
    ]
    assert lines["rankme_image"][1] == f"{metrics['rankme_image']:.2f}"
    evaluate(
        f"untrained:{tmp_path / 'run'}",
        "label_free",
        test=open_source("scenes:?count=30", "test"),
        out=tmp_path / "other",
        workers=0,
        progress=False,
    )
    table = compare([tmp_path / "run", tmp_path / "other"])[0].table()
    marked = {line.split()[0] for line in table.splitlines() if "*" in line}
    assert marked <= {name for name in metrics if name.startswith(("rank1", "recall"))}
    assert not [name for name in marked if name.startswith(("rankme", "alignment", "uniformity"))]
