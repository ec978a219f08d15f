"""What an earlier version measured is still of use: results are compared, probes score, files are searched.

`earlier/evaluated.tar.xz` is what that version left: twelve training and nine test images, an encoder, its
results and probes on them, and the files that `foveola embed` wrote of the test images.
"""

import json
import tarfile
from pathlib import Path

import pytest

import foveola

ARCHIVE = Path(__file__).parent / "earlier" / "evaluated.tar.xz"
PROBES = ("linear", "attentive", "abmilp")


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what was left, in which data strings name the images as they did."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_result_is_that_of_now_and_is_compared_with_it(earlier: Path):
    before = json.loads((earlier / "results" / "knn.json").read_text())
    now = foveola.evaluate(
        "run/encoder",
        "knn",
        train="folder:images/train",
        test="folder:images/test",
        out="now",
        progress=False,
        workers=0,
        k=[3],
    )
    assert now.encoder == before["encoder"]
    assert now.metrics == pytest.approx(before["metrics"], rel=1e-4)
    (compared,) = foveola.compare([".", "now"], protocol="knn")
    assert compared.results[0].metrics == before["metrics"]
    assert "are the same encoder" in compared.table()


@pytest.mark.parametrize("protocol", PROBES)
def test_a_probe_scores_as_it_did(earlier: Path, protocol: str):
    before = json.loads((earlier / "results" / f"{protocol}.json").read_text())["metrics"]
    probe = f"results/{protocol}/probe.safetensors"
    settings = {"probe": probe, "workers": 0, "progress": False, "out": "scored"}
    scored = foveola.evaluate("run/encoder", protocol, test="folder:images/test", **settings).metrics
    assert any(name.startswith(f"top1_{protocol}") for name in scored)
    assert scored == pytest.approx({name: before[name] for name in scored}, rel=1e-4)


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_a_file_of_features_is_searched(earlier: Path, ending: str):
    found = foveola.search(f"features.{ending}", "images/test/b/1.png", top=9)
    (hits,) = found.hits
    assert hits[0]["name"] == "b/1.png"
    assert hits[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert sorted(hit["name"] for hit in hits) == [f"{folder}/{n}.png" for folder in "abc" for n in range(3)]
