"""Principal components are scikit-learn's up to the sign, which is fixed; colours follow CAPI's rule."""

import numpy as np
import pytest
import torch
from scipy.stats import skew
from sklearn.decomposition import PCA

from foveola.config import UserError
from foveola.figures import pca
from foveola.figures.pca import Basis, Maps, fit_basis, pca_images, pca_rgb
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

RNG = np.random.default_rng(0)
# Components of different, skewed distributions in a rotated space, away from the origin.
WAY = np.linalg.qr(RNG.normal(size=(20, 20)))[0]
FEATURES = (RNG.gamma(1.5, size=(400, 20)) * np.geomspace(5, 0.1, 20)) @ WAY + 7


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=16, depth=1, heads=2, patch_size=4, image_size=16)
    return Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=16, crop=16)))


def images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (24, 16 + 8 * i, 3), dtype=np.uint8) for i in range(count)]


@pytest.mark.parametrize("components", [3, 6])
def test_components_are_those_of_scikit_learn_up_to_the_sign(components):
    basis = Basis.fit(FEATURES, components)
    theirs = PCA(components, whiten=True, svd_solver="full").fit(FEATURES)
    np.testing.assert_allclose(np.abs(basis.components), np.abs(theirs.components_), atol=1e-9)
    np.testing.assert_allclose(basis.scale, np.sqrt(theirs.explained_variance_), rtol=1e-10)
    ours, expected = basis.project(FEATURES), theirs.transform(FEATURES)
    np.testing.assert_allclose(ours, expected * np.sign((ours * expected).sum(axis=0)), atol=1e-8)
    assert (skew(ours) > 0).all()


def test_chunks_give_the_same_as_all_at_once():
    whole = Basis.fit(FEATURES, 4)
    for size in (1, 7, 399):
        parts = [FEATURES[i : i + size] for i in range(0, 400, size)]
        basis = Basis.fit_chunks(lambda parts=parts: parts, 4)
        np.testing.assert_allclose(basis.components, whole.components, atol=1e-9)
        np.testing.assert_allclose(basis.mean, whole.mean, rtol=1e-12)


def test_rotation_translation_and_order_change_no_colour():
    colors = pca_rgb(FEATURES, Basis.fit(FEATURES))
    turned = FEATURES @ np.linalg.qr(RNG.normal(size=(20, 20)))[0] - 3
    np.testing.assert_allclose(pca_rgb(turned, Basis.fit(turned)), colors, atol=1e-6)
    order = RNG.permutation(400)
    np.testing.assert_allclose(pca_rgb(FEATURES, Basis.fit(FEATURES[order])), colors, atol=1e-6)


def test_the_sign_of_a_component_without_skewness_is_that_of_its_largest_entry():
    rows = np.zeros((4, 3))
    rows[:, 1] = [-2, -1, 1, 2]
    rows[:, 0] = [0.2, 0.1, -0.1, -0.2]
    for features in (rows, -rows):
        component = Basis.fit(features, 1).components[0]
        np.testing.assert_allclose(component, np.array([-0.1, 1, 0]) / np.sqrt(1.01), atol=1e-12)


def test_colours_follow_the_rule_and_are_clipped():
    basis = Basis(np.zeros(3), np.eye(3), np.array([2.0, 1.0, 0.5]))
    features = np.array([[0.0, 0.0, 0.0], [4.6, -2.3, 0.575], [100.0, -100.0, 0.0]])
    colors = pca_rgb(features, basis)
    np.testing.assert_allclose(colors, [[0.5, 0.5, 0.5], [1, 0, 0.75], [1, 0, 0.5]], atol=1e-7)
    colors = pca_rgb(FEATURES * 50, Basis.fit(FEATURES, 6))
    assert colors.shape == (400, 3)
    assert colors.min() == 0
    assert colors.max() == 1


def test_fewer_than_three_components_leave_colours_in_the_middle():
    assert (pca_rgb(FEATURES, Basis.fit(FEATURES, 1))[:, 1:] == 0.5).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_features_are_gray(value):
    features = np.full((5, 5, 8), value, np.float32)
    assert (pca_rgb(features, Basis.fit(features)) == 0.5).all()
    one = features[:1, :1]
    assert (pca_rgb(one, Basis.fit(one)) == 0.5).all(), "also a single patch"


def test_a_saved_basis_repeats_exactly(tmp_path, encoder):
    two = images(2)
    for foreground in (False, True):
        basis = fit_basis(Maps(encoder, two), foreground)
        again = Basis.load(basis.save(tmp_path / "deep" / "basis.safetensors"))
        for name in ("mean", "components", "scale", "divider", "threshold"):
            np.testing.assert_array_equal(getattr(again, name), getattr(basis, name))
        first = pca_images(encoder, two, joint=True, foreground=foreground)
        second = pca_images(encoder, two, basis=again)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def test_joint_and_single_bases(encoder, monkeypatch):
    three = images(3)
    single = pca_images(encoder, three)
    assert [p.shape for p in single] == [(4, 3, 3), (4, 4, 3), (3, 4, 3)]
    np.testing.assert_array_equal(single[1], pca_images(encoder, three[1:2], joint=True)[0])
    joint = pca_images(encoder, three, joint=True)
    assert not np.array_equal(single[1], joint[1])
    monkeypatch.setattr(pca, "HELD", 0)  # nothing is held in memory: every image is encoded again
    for a, b in zip(joint, pca_images(encoder, three, joint=True), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_the_side_away_from_the_border(sign):
    rng = np.random.default_rng(5)
    features = rng.normal(size=(8, 8, 6)) * 0.1
    inside = np.zeros((8, 8), bool)
    inside[1:7, 2:6] = True  # a large object, which only the rule about the border tells from the rest
    features[inside] += sign * np.array([3, 0, 0, 0, 0, 0])
    features[inside, 1] += np.linspace(-1, 1, inside.sum())
    basis = fit_basis(lambda: (features,), foreground=True)
    np.testing.assert_array_equal(basis.foreground(features), inside)
    colors = pca_rgb(features, basis)
    assert (colors[~inside] == 0).all()
    alone = Basis.fit(features[inside])
    np.testing.assert_allclose(colors[inside], pca_rgb(features[inside], alone), atol=1e-7)


def test_constant_features_are_all_foreground():
    features = np.ones((4, 4, 5))
    assert fit_basis(lambda: (features,), foreground=True).foreground(features).all()


def test_bad_input(tmp_path, encoder):
    with pytest.raises(UserError, match=r"^21 components of features of 20 numbers$"):
        Basis.fit(FEATURES, 21)
    with pytest.raises(UserError, match=r"^a basis for features of 20 numbers, but these have 16$"):
        pca_images(encoder, images(1), basis=Basis.fit(FEATURES))
    with pytest.raises(UserError, match="features are not finite"):
        Basis.fit(np.full((3, 4), np.nan))
    with pytest.raises(UserError, match="no features"):
        Basis.fit(np.zeros((0, 4)))
    with pytest.raises(UserError, match=r"basis=.*nowhere: No such file"):
        Basis.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("a basis")
    with pytest.raises(UserError, match="is no basis that was saved by foveola"):
        Basis.load(tmp_path / "text")
