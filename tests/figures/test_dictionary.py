"""Sparse codes equal scikit-learn's, atoms get better, colours follow the palette."""

import numpy as np
import pytest
from sklearn.decomposition import sparse_encode

from foveola.config import UserError
from foveola.figures.dictionary import (
    Dictionary,
    _better_atoms,
    dictionary_rgb,
    objective,
    sparse_codes,
)

RNG = np.random.default_rng(0)
ATOMS = RNG.normal(size=(5, 12))
ATOMS /= np.linalg.norm(ATOMS, axis=1, keepdims=True)
CODES = RNG.normal(size=(300, 5)) * (RNG.random((300, 5)) < 0.3) * 4
ROWS = CODES @ ATOMS + 0.05 * RNG.normal(size=(300, 12))


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_codes_are_those_of_scikit_learn(alpha):
    theirs = sparse_encode(ROWS, ATOMS, algorithm="lasso_cd", alpha=alpha, max_iter=10_000)
    np.testing.assert_allclose(sparse_codes(ROWS, ATOMS, alpha), theirs, atol=1e-3)
    assert objective(ROWS, sparse_codes(ROWS, ATOMS, alpha), ATOMS, alpha) <= objective(
        ROWS, theirs, ATOMS, alpha
    ) * (1 + 1e-9)


def test_codes_meet_the_conditions_of_the_optimum():
    codes = sparse_codes(ROWS, ATOMS, 0.5)
    slope = (ROWS - codes @ ATOMS) @ ATOMS.T
    assert np.abs(slope).max() <= 0.5 + 1e-6
    np.testing.assert_allclose(slope[codes != 0], 0.5 * np.sign(codes[codes != 0]), atol=1e-6)
    assert (codes == 0).mean() > 0.3


def test_every_step_lowers_the_objective_and_atoms_have_length_one():
    atoms = RNG.normal(size=(5, 12))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    values, codes = [], np.zeros((300, 5))
    for _ in range(5):
        codes = sparse_codes(ROWS, atoms, 0.3, codes)
        values.append(objective(ROWS, codes, atoms, 0.3))
        atoms = _better_atoms(ROWS, codes, atoms)
        values.append(objective(ROWS, codes, atoms, 0.3))
        np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1)
    assert (np.diff(values) <= 1e-9).all()
    assert values[-1] < 0.7 * values[0]


def test_the_directions_of_sparse_sums_are_found():
    dictionary = Dictionary.fit(ROWS * 7 + 3, 5, alpha=0.3)
    found = np.abs(dictionary.atoms @ ATOMS.T).max(axis=0)
    assert found.min() > 0.95
    again = Dictionary.fit(ROWS * 7 + 3, 5, alpha=0.3)
    np.testing.assert_array_equal(dictionary.atoms, again.atoms)
    # Scale and place of features change no code.
    np.testing.assert_allclose(
        dictionary.codes(ROWS * 7 + 3), Dictionary.fit(ROWS, 5, alpha=0.3).codes(ROWS), atol=1e-4
    )
    assert dictionary.codes(np.zeros((2, 3, 12))).shape == (2, 3, 5)


def test_an_unused_atom_becomes_the_worst_explained_feature():
    rows = np.array([[2.0, 0, 0], [3.0, 0, 0], [0, 0, 5.0]])
    codes = np.array([[2.0, 0], [3.0, 0], [0, 0]])
    atoms = _better_atoms(rows, codes, np.array([[1.0, 0, 0], [0, 1.0, 0]]))
    np.testing.assert_allclose(atoms, [[1, 0, 0], [0, 0, 1]])


def test_constant_features_and_few_directions():
    assert not Dictionary.fit(np.full((9, 4), 0.1), 3).codes(np.full((9, 4), 0.1)).any()
    flat = np.outer(np.linspace(-1, 1, 9), np.ones(4))  # one direction, three atoms
    assert np.isfinite(Dictionary.fit(flat, 3).codes(flat)).all()


def test_colours():
    codes = np.array([[2.0, 0, 0], [0, -1.0, 0], [1.0, 1.0, 2.0], [0, 0, 0]])
    np.testing.assert_allclose(dictionary_rgb(codes), [[1, 0, 0], [0, 0.5, 0], [0.5, 0.5, 1], [0, 0, 0]])
    np.testing.assert_allclose(dictionary_rgb(codes, 4.0)[0], [0.5, 0, 0])
    six = dictionary_rgb(np.eye(6))
    np.testing.assert_allclose(six, [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
    assert len(np.unique(dictionary_rgb(np.eye(10)), axis=0)) == 10
    assert not dictionary_rgb(np.zeros((2, 2, 3))).any()


def test_bad_input():
    with pytest.raises(UserError, match=r"^13 components of 300 features of 12 numbers$"):
        Dictionary.fit(ROWS, 13)
    with pytest.raises(UserError, match="there are colours for 10"):
        dictionary_rgb(np.eye(11))
