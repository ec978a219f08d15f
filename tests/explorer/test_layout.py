"""Maps: principal components against a singular value decomposition, and how they are kept."""

import time
from pathlib import Path

import numpy as np
import pytest

from foveola.config import UserError
from foveola.explorer import layout
from foveola.explorer.layout import Layouts, pca_map


def test_a_map_by_principal_components_is_that_of_the_decomposition() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 9)).astype(np.float32) * np.arange(
        1, 10, dtype=np.float32
    )
    points = pca_map(rows)
    centred = rows.astype(np.float64) - rows.astype(np.float64).mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * values[:2]), rtol=1e-4, atol=1e-4)
    assert pca_map(rows[:, :1]).shape == (60, 2)
    assert not pca_map(rows[:1]).any()


def test_a_map_is_made_once_and_kept_beside_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, beside = np.random.default_rng(1).normal(size=(30, 5)).astype(np.float32), tmp_path / "features.npz"
    made = Layouts().get("a", "pca", lambda: rows, beside)
    (kept,) = tmp_path.glob("features.npz.pca-*.npy")
    monkeypatch.setattr(layout, "pca_map", lambda _: pytest.fail("it was made again"))
    again = Layouts()
    assert np.array_equal(again.get("a", "pca", lambda: rows, beside), made)  # type: ignore[arg-type]
    assert np.array_equal(again.get("a", "pca", lambda: pytest.fail("asked again"), beside), made)  # type: ignore[arg-type]
    kept.write_bytes(kept.read_bytes()[:-9])
    monkeypatch.undo()
    assert np.array_equal(Layouts().get("a", "pca", lambda: rows, beside), made)  # type: ignore[arg-type]
    Layouts().get("a", "pca", lambda: rows + 1, beside)  # other features have another map
    assert len([*tmp_path.glob("features.npz.pca-*.npy")]) == 2


def test_umap_is_made_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is a stand-in: UMAP itself takes longer to import than all tests of this file."""
    rows, beside = np.random.default_rng(2).normal(size=(30, 5)).astype(np.float32), tmp_path / "features.npz"
    program = tmp_path / "umap.py"
    program.write_text("import sys, numpy as np; np.save(sys.argv[4], np.load(sys.argv[3])[:, :2])")
    monkeypatch.setattr(layout, "has_umap", lambda: True)
    plain = layout.subprocess.Popen

    def run(words: list[str], **settings):
        return plain([words[0], str(program), *words[1:]], **settings)

    monkeypatch.setattr(layout.subprocess, "Popen", run)
    maps = Layouts()
    assert maps.get("a", "umap", lambda: rows, beside) is None

    def settled():
        for _ in range(600):
            if (found := maps.get("a", "umap", lambda: rows, beside)) is not None:
                return found
            time.sleep(0.05)
        return None

    assert np.array_equal(settled(), rows[:, :2])  # type: ignore[arg-type]
    assert len([*tmp_path.glob("features.npz.umap-*.npy")]) == 1
    program.write_text("raise SystemExit('no memory')")
    maps = Layouts()
    rows = rows + 1
    assert maps.get("a", "umap", lambda: rows, beside) is None
    with pytest.raises(UserError, match="UMAP has failed: no memory"):
        settled()


def test_maps_that_cannot_be_made_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((3, 4), np.float32)
    with pytest.raises(UserError, match="unknown map 'tsne'"):
        Layouts().get("a", "tsne", lambda: rows, None)
    monkeypatch.setattr(layout, "has_umap", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'foveola\[map\]'"):
        Layouts().get("a", "umap", lambda: rows, None)
    monkeypatch.setattr(layout, "has_umap", lambda: True)
    with pytest.raises(UserError, match="3 rows are too few"):
        Layouts().get("a", "umap", lambda: rows, None)
