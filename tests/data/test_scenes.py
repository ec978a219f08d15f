"""The built-in scenes: what they promise, checked on the images themselves."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from foveola.data import scenes
from foveola.data.identity import identity_of
from foveola.data.scenes import MIN_PIXELS, MIN_VISIBLE, Scenes, linear_weights, load_stock


@pytest.fixture(autouse=True)
def painted_each_time(monkeypatch):
    """Not once for all tests, as elsewhere."""
    monkeypatch.setattr(Scenes, "scene", Scenes.scene.__wrapped__)


def test_a_scene_is_a_function_of_seed_split_and_index():
    first, again = Scenes(size=48).scene(7), Scenes(size=48).scene(7)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.objects.boxes, again.objects.boxes)
    others = [Scenes(size=48).scene(8), Scenes(size=48, seed=1).scene(7), Scenes("test", size=48).scene(7)]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_a_scene_does_not_depend_on_process_or_random_state():
    code = (
        "import numpy, hashlib; numpy.random.seed(3); from foveola.data.scenes import Scenes;"
        "print(hashlib.sha256(Scenes(size=32).scene(5).image.tobytes()).hexdigest())"
    )
    here = hashlib.sha256(Scenes(size=32).scene(5).image.tobytes()).hexdigest()
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == here


def test_test_products_are_never_in_train():
    train, test = load_stock("train"), load_stock("test")
    digests = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in digests for image in test.images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_stock_is_balanced_and_cut_out(split):
    stock = load_stock(split)
    assert len(set(np.bincount(stock.labels, minlength=10).tolist())) == 1
    for image, (y0, y1, x0, x1) in zip(stock.images[::50], stock.frames[::50], strict=True):
        filled = image > 0
        assert filled[y0:y1, x0:x1].sum() == filled.sum() > 50
        assert filled[y0].any()
        assert filled[y1 - 1].any()
        assert filled[:, x0].any()
        assert filled[:, x1 - 1].any()


@pytest.mark.parametrize("size", [32, 48, 64, 97, 160])
def test_objects_are_visible_and_consistent(size):
    source = Scenes(size=size)
    for index in range(25):
        scene = source.scene(index)
        objects = scene.objects
        assert scene.image.shape == (size, size, 3)
        assert 2 <= len(objects) <= 5
        assert len(set(scene.items.tolist())) == len(objects)
        assert objects.labels is not None
        assert objects.masks is not None
        assert objects.labels.tolist() == source.stock.labels[scene.items].tolist()
        for k, mask in enumerate(objects.masks):
            assert np.array_equal(mask, scene.owner == k)
            assert mask.sum() >= MIN_PIXELS
            assert objects.areas[k] == pytest.approx(mask.mean())
            x0, y0, x1, y1 = np.rint(objects.boxes[k] * size).astype(int)
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
        assert sum(mask.astype(int) for mask in objects.masks).max() == 1  # no pixel belongs to two


def test_enough_of_each_silhouette_is_seen():
    """Against silhouettes rendered alone, with what lies outside the image."""
    source = Scenes(size=64)
    for index in range(60):
        rng = np.random.default_rng([source.seed, 0, index])
        wanted = int(rng.integers(2, 6))
        placed, owner = source._arrange(rng, wanted)
        for k, thing in enumerate(placed):
            whole = np.count_nonzero(thing.opacity >= 0.5)
            assert np.count_nonzero(owner == k) >= MIN_VISIBLE * whole


def test_masks_are_exact(monkeypatch):
    """Each product in its own flat colour, without shadow, light and noise: the colours are the masks."""
    palette = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]], np.float32)
    source = Scenes(size=64)
    for index in range(30):
        rng = np.random.default_rng([index])
        placed, owner = source._arrange(rng, 5)
        canvas = np.zeros((3, 64, 64), np.float32)
        weight = np.zeros((len(placed), 64, 64))
        for k, thing in enumerate(placed):
            no_shadow = np.random.default_rng(0)
            monkeypatch.setattr(scenes, "SHADOW", 0.0)
            scenes._paint(no_shadow, canvas, thing, palette[k], palette[k])
            solo = np.zeros((3, 64, 64), np.float32)
            scenes._paint(no_shadow, solo, thing, np.ones(3, np.float32), np.ones(3, np.float32))
            weight *= 1 - solo[0]
            weight[k] = solo[0]
        # More than half of a pixel: it is the product's own. Hardly any of it: it is the background's.
        for k in range(len(placed)):
            assert (owner[weight[k] > 0.5 + 1e-5] == k).all()
        assert (owner[weight.sum(0) < 0.25] == -1).all()
        colours = np.tensordot(weight, palette[: len(placed)], (0, 0))
        np.testing.assert_allclose(canvas.transpose(1, 2, 0), colours, atol=1e-4)


def test_colour_is_no_clue_to_class():
    """The mean colour of the visible pixels tells the class hardly better than chance, which is 10 %."""
    source = Scenes(size=32)
    colours, labels = [], []
    for index in range(400):
        scene = source.scene(index)
        assert scene.objects.masks is not None
        assert scene.objects.labels is not None
        for mask, label in zip(scene.objects.masks, scene.objects.labels, strict=True):
            mean = scene.image[mask].mean(0)
            colours.append(
                mean / mean.sum()
            )  # hue and saturation; brightness belongs to the product's texture
            labels.append(label)
    colours, labels = np.stack(colours), np.array(labels)
    fit, held = slice(0, None, 2), slice(1, None, 2)
    means = np.stack([colours[fit][labels[fit] == c].mean(0) for c in range(10)])
    guess = ((colours[held][:, None] - means) ** 2).sum(2).argmin(1)
    assert (guess == labels[held]).mean() < 0.17


def test_all_classes_and_sizes_occur():
    source = Scenes(size=32)
    drawn = [source.scene(index).objects for index in range(200)]
    labels = np.concatenate([objects.labels for objects in drawn if objects.labels is not None])
    areas = np.concatenate([objects.areas for objects in drawn])
    assert np.bincount(labels, minlength=10).min() > 20
    assert np.quantile(areas, 0.95) > 4 * np.quantile(areas, 0.05)


@pytest.mark.parametrize("counts", [(1, 1), (2, 3), (5, 5)])
def test_number_of_objects(counts):
    seen = {len(Scenes(size=64, objects=counts).scene(index).objects) for index in range(40)}
    assert seen == set(range(counts[0], counts[1] + 1))


def test_samples():
    source = Scenes(size=32, count=3)
    sample = source[2]
    assert sample.name == "scenes/train/2"
    assert sample.objects is not None
    assert sample.objects.labels is not None
    assert sample.label == sample.objects.labels[sample.objects.areas.argmax()]
    assert len(source) == 3
    with pytest.raises(IndexError):
        source[3]


def test_fingerprints_tell_data_apart():
    made = [
        Scenes(),
        Scenes("test"),
        Scenes(size=48),
        Scenes(seed=1),
        Scenes(count=9),
        Scenes(objects=(2, 3)),
    ]
    assert len({identity_of(source).digest for source in made}) == len(made)
    assert identity_of(Scenes()).digest == identity_of(Scenes()).digest


@pytest.mark.parametrize(("inputs", "outputs"), [(28, 11), (28, 28), (5, 64)])
def test_linear_weights_keep_a_ramp(inputs, outputs):
    weights = linear_weights(inputs, outputs)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    ramp = weights @ ((np.arange(inputs) + 0.5) / inputs)
    want = (np.arange(outputs) + 0.5) / outputs
    inner = (want > 1.5 / inputs) & (want < 1 - 1.5 / inputs)
    np.testing.assert_allclose(ramp[inner], want[inner], atol=0.5 / inputs)
