"""Search in files of features: the exact neighbours, of the images and objects that are asked for."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import foveola
from foveola import cli
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.embedding.index import Index
from foveola.evaluation import search
from foveola.zoo.load import load

QUIET = {"workers": 0, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def written(photos, model, tmp_path_factory) -> dict[str, Path]:
    """A file of each kind of rows."""
    folder = tmp_path_factory.mktemp("written")
    kinds = {kind: folder / f"{kind}.npz" for kind in ("images", "objects", "patches")}
    for kind, path in kinds.items():
        foveola.embed(model, photos, out=path, rows=kind, **QUIET)
    return kinds


def path_of(photos: str, name: str) -> Path:
    return Path(photos.partition(":")[2].partition("?")[0]) / name


def naive(queries: np.ndarray, references: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines in float64, all of them, sorted."""
    a, b = (x.astype(np.float64) for x in (queries, references))
    cosines = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
        b / np.linalg.norm(b, axis=1, keepdims=True)
    ).T
    order = np.argsort(-cosines, axis=1)[:, :top]
    return np.take_along_axis(cosines, order, axis=1), order


# -- vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [np.float32, np.float16])
def test_exact_search_is_that_of_all_cosines_in_float64(store) -> None:
    rng = np.random.default_rng(0)
    references, queries = (
        rng.normal(size=(500, 16)).astype(store),
        rng.normal(size=(7, 16)).astype(np.float32),
    )
    found = Index.build(references, device="cpu").search(queries, 12)
    cosines, order = naive(queries, references, 12)
    assert np.array_equal(found.indices, order)
    np.testing.assert_allclose(found.similarities, cosines, atol=1e-6)
    one = Index.build(torch.from_numpy(references), device="cpu").search(queries[0].tolist(), 600)
    assert one.indices.shape == (1, 500)


@pytest.mark.parametrize("kept", [0, 2**32])
def test_rows_get_their_length_once_where_they_fit(kept: int, monkeypatch) -> None:
    """And both ways give the same bits."""
    from foveola.embedding import index as own

    monkeypatch.setattr(own, "KEPT_BYTES", kept)
    monkeypatch.setattr(own, "CHUNK", 64)
    counted, real = [], search.unit_rows
    for module in (own, search):
        monkeypatch.setattr(module, "unit_rows", lambda x: (counted.append(len(x)), real(x))[1])
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(500, 16)).astype(np.float16), rng.normal(size=(7, 16))
    index = Index.build(bank, device="cpu")
    found = [index.search(queries, 12) for _ in range(3)]
    assert sum(counted) == (500 + 3 * 7 if kept else 3 * 507)
    similarities, order = search.nearest_rows(torch.from_numpy(queries), torch.from_numpy(bank), 12)
    for each in found:
        assert np.array_equal(each.indices, order)
        assert np.array_equal(each.similarities, similarities)


def test_a_patch_of_a_grid_has_its_place_and_its_box() -> None:
    grids = np.random.default_rng(0).normal(size=(3, 2, 4, 8)).astype(np.float32)
    index = Index.build(grids, names=["a", "b", "c"], labels=["x", "", "z"], boxes=[[0.2, 0.1, 0.6, 0.9]] * 3)
    assert len(index) == 24
    (found,) = index.search(grids[2, 1, 3], 1).indices[0]
    about = index.describe(found)
    assert (about["name"], about["label"], about["patch"]) == ("c", "z", [1, 3])
    np.testing.assert_allclose(about["box"], [0.5, 0.5, 0.6, 0.9], atol=1e-6)
    assert index.describe(8)["label"] is None


def test_a_graph_says_its_recall_and_is_kept_for_the_same_rows(
    tmp_path, written, monkeypatch, capsys
) -> None:
    faiss = pytest.importorskip("faiss")
    path = tmp_path / "objects.npz"
    path.write_bytes(written["objects"].read_bytes())
    index = Index.load(path, "cpu")
    exact, graph = index.search(index.vectors[:9], 5), index.search(index.vectors[:9], 5, method="hnsw")
    assert np.array_equal(exact.indices, graph.indices)  # of 40 rows the graph sees all
    np.testing.assert_allclose(exact.similarities, graph.similarities, atol=1e-6)
    assert index.graph.recall == 1
    kept = (tmp_path / "objects.npz.hnsw.npz").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("foveola.progress.SAY_SECONDS", 0)
        patch.setattr("foveola.embedding.graph.ADDED", 15)
        Index.build(index.vectors, device="cpu").search(index.vectors[0], 5, method="hnsw", progress=True)
    assert "graph of 39 rows, part by part: 1 of 3 in 0 min" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "IndexHNSWFlat", None)  # it is not made again
        again = Index.load(path, "cpu").search(index.vectors[:9], 5, method="hnsw")
    assert np.array_equal(again.indices, graph.indices)
    path.write_bytes(written["images"].read_bytes())  # other rows by that name
    Index.load(path, "cpu").search(index.vectors[:1], 5, method="hnsw")
    assert (tmp_path / "objects.npz.hnsw.npz").read_bytes() != kept


def test_where_a_graph_has_no_way_to_as_many_rows_all_are_compared() -> None:
    pytest.importorskip("faiss")
    references = np.repeat(np.random.default_rng(0).normal(size=(30, 16)), 100, axis=0).astype(np.float32)
    index, lost = Index.build(references, device="cpu"), []
    for number in (0, 1500):  # which of them the graph serves is its own affair
        own = references[number : number + 1]
        there = index.search(own, 200, method="hnsw")
        if (index.graph.search(own / np.linalg.norm(own), 200)[1] < 0).any():
            exact = naive(own, references, 200)[0]
            np.testing.assert_allclose(there.similarities, exact, atol=1e-5)
            lost.append(number)
        assert len(set(there.indices[0].tolist())) == 200
        assert there.indices.min() >= 0
    assert lost


def test_a_graph_that_cannot_be_kept_or_read_is_made_again(tmp_path, written, monkeypatch) -> None:
    pytest.importorskip("faiss")
    path = tmp_path / "objects.npz"
    path.write_bytes(written["objects"].read_bytes())
    kept = tmp_path / "objects.npz.hnsw.npz"
    for left in (b"PK", b"", b"\x80"):
        kept.write_bytes(left)
        index = Index.load(path, "cpu")
        assert index.search(index.vectors[3], 1, method="hnsw").indices.tolist() == [[3]]
        assert len(kept.read_bytes()) > 1000
    kept.unlink()

    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("foveola.embedding.graph.np.savez", full)
    index = Index.load(path, "cpu")
    with pytest.warns(UserWarning, match="the graph is not kept: .*No space left on device"):
        found = index.search(index.vectors[3], 1, method="hnsw")
    assert found.indices.tolist() == [[3]]


def test_own_features_in_other_forms() -> None:
    ones = torch.eye(4, 8, dtype=torch.bfloat16)
    index = Index.build(ones, device="cpu")
    assert index.search(ones[2], 1).indices.tolist() == [[2]]
    with pytest.raises(UserError, match=r"boxes: expected \[4, 4\], got \[4, 5\]"):
        Index.build(ones, boxes=np.zeros((4, 5)))
    with pytest.raises(UserError, match="vectors: not all numbers are finite"):
        index.search(np.full(8, np.nan))


def test_recall_of_a_graph_that_misses_some_is_what_it_misses() -> None:
    """With a graph that is nearly none, `recall` is the share that a count by hand gives."""
    pytest.importorskip("faiss")
    from foveola.embedding import graph as own

    vectors = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 24)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "LINKS", 2)
        patch.setattr(own, "BUILD_WIDTH", 2)
        patch.setattr(own, "SEARCH_WIDTH", 2)
        made = own.graph_of(vectors, None, torch.device("cpu"))
        unit = torch.nn.functional.normalize(vectors).numpy()
        found = made.search(unit, 11)[1]
    exact = naive(vectors.numpy(), vectors.numpy(), 11)[1]
    shares = [len((set(e) & set(f)) - {i}) / 10 for i, (e, f) in enumerate(zip(exact, found, strict=True))]
    assert made.recall == pytest.approx(np.mean(shares), abs=1e-9)
    assert 0.05 < made.recall < 0.95


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Index.build(np.zeros((2, 3, 4))), r"features: expected \[n, D\] or \[n, h, w, D\]"),
        (lambda: Index.build(np.full((2, 3), np.nan)), "features: not all numbers are finite"),
        (lambda: Index.build(np.ones((2, 3)), names=["a"]), "names: 1 of 2 rows"),
        (lambda: Index.build(np.ones((2, 3))).search(np.ones((1, 4))), r"vectors: expected \[m, 3\]"),
        (lambda: Index.build(np.ones((2, 3))).search(np.ones((1, 3)), 0), "top=0: expected at least 1"),
        (lambda: Index.build(np.ones((2, 3))).search(np.ones(3), method="h"), "method=h: expected exact or"),
        (lambda: foveola.search(Index.build(np.ones((2, 3))), "a.png"), "does not say which encoder made it"),
    ],
)
def test_mistakes_with_vectors(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


# -- images and objects --------------------------------------------------------------------------------------


def test_images_are_found_by_their_files(photos, written) -> None:
    names = ["cats/04.png", "dogs/07.png"]
    paths = [path_of(photos, name) for name in names]
    found = foveola.search(written["images"], paths, top=4, device="cpu")
    index = Index.load(written["images"], "cpu")
    for number, name in enumerate(names):
        own = index.rows.name.tolist().index(name)
        cosines, order = naive(index.rows.feature[[own]], index.rows.feature, 4)
        assert [hit["name"] for hit in found.hits[number]] == index.rows.name[order[0]].tolist()
        np.testing.assert_allclose([hit["similarity"] for hit in found.hits[number]], cosines[0], atol=1e-5)
        assert found.hits[number][0]["label"] == name.partition("/")[0]
    with Image.open(paths[0]) as image:
        for query in (np.asarray(image), paths[0].read_bytes(), image, str(paths[0])):
            again = foveola.search(index, query, top=4, device="cpu").hits[0]
            assert [hit["name"] for hit in again] == [hit["name"] for hit in found.hits[0]]
    frame = found.frame()
    assert isinstance(frame, pd.DataFrame)
    assert frame.groupby("query")["rank"].apply(list).tolist() == [[1, 2, 3, 4]] * 2


def test_a_box_asks_with_the_object_token_of_evaluations(photos, written) -> None:
    """Annotated boxes, in pixels, find the rows of their own objects; the image without a box does not."""
    source, index = open_source(photos, "test"), Index.load(written["objects"], "cpu")
    for i in (1, 5, 14):
        sample, j = source[i], len(source[i].objects) - 1
        box = (sample.objects.boxes[j] * [48, 40, 48, 40]).round().tolist()
        (hits,) = foveola.search(index, path_of(photos, sample.name), box=box, top=3, device="cpu").hits
        assert (hits[0]["image_index"], hits[0]["object"]) == (i, j)
        assert hits[0]["similarity"] == pytest.approx(1, abs=1e-5)
    (hits,) = foveola.search(index, path_of(photos, sample.name), top=1, device="cpu").hits
    assert hits[0]["similarity"] < 0.9999
    every = foveola.search(index, photos, top=1, device="cpu")  # each object of a data set
    assert [hits[0]["object"] for hits in every.hits] == index.rows.object.tolist()
    assert all(query["masked"] for query in every.queries)


def test_a_box_is_read_as_the_objects_of_the_index_were(photos, model, tmp_path) -> None:
    """Of crops without masks it is a crop without a mask; where it would change nothing it is refused."""
    kinds = {"crops": {"view": "object", "context": 1.0}, "whole": {"view": "image"}}
    for name, settings in kinds.items():
        foveola.embed(
            model, photos, out=tmp_path / f"{name}.npz", rows="objects", masks=False, **settings, **QUIET
        )
    source, index = open_source(photos, "test"), Index.load(tmp_path / "crops.npz", "cpu")
    for i in (2, 9):
        sample, j = source[i], len(source[i].objects) - 1
        box = (sample.objects.boxes[j] * [48, 40, 48, 40]).round().tolist()
        found = foveola.search(index, path_of(photos, sample.name), box=box, top=1, device="cpu")
        assert (found.hits[0][0]["image_index"], found.hits[0][0]["object"]) == (i, j)
        assert found.hits[0][0]["similarity"] == pytest.approx(1, abs=1e-5)
        assert ", box 0." in found.table().splitlines()[0]
    with pytest.raises(UserError, match="box= has no effect: masks=false read the objects of this index as"):
        foveola.search(tmp_path / "whole.npz", path_of(photos, sample.name), box=box, device="cpu")


def test_a_box_in_an_index_of_patches_asks_by_the_mean_of_its_patches(photos, written) -> None:
    index = Index.load(written["patches"], "cpu")
    grid, seen = index.rows.feature[3], index.rows.box[3]
    side = (seen[2:] - seen[:2]) / 4  # of a patch; the box covers the patches (1..2, 0..1)
    low, high = seen[:2] + side * [0.1, 1.1], seen[:2] + side * [1.9, 2.9]
    box = (np.array([*low, *high]) * [48, 40, 48, 40]).tolist()
    found = foveola.search(index, path_of(photos, str(index.rows.name[3])), box=box, top=5, device="cpu")
    mean = grid[1:3, 0:2].reshape(4, -1).mean(axis=0, keepdims=True)
    cosines, order = naive(mean, index.rows.feature.reshape(-1, 24), 5)
    np.testing.assert_allclose([hit["similarity"] for hit in found.hits[0]], cosines[0], atol=1e-5)
    assert [hit["image_index"] * 16 + hit["patch"][0] * 4 + hit["patch"][1] for hit in found.hits[0]] == (
        order[0].tolist()
    )
    with pytest.raises(UserError, match="this index is of patches: box="):
        foveola.search(index, path_of(photos, "cats/00.png"), device="cpu")


def test_queries_need_the_encoder_of_the_index(photos, written, model, tmp_path) -> None:
    index, query = Index.load(written["images"], "cpu"), path_of(photos, "cats/00.png")
    other = load(f"untrained:{model}")
    with pytest.raises(UserError, match=r"was made by .* \([0-9a-f]{16}\), but .* is .*need the same"):
        foveola.search(index, query, model=other)
    assert foveola.search(index, query, model=load(model), top=1).hits[0][0]["name"] == "cats/00.png"
    index.about["model"] = str(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no model at .*moved.*; model= names the encoder of the index, if"):
        foveola.search(index, query)
    assert foveola.search(index, query, model=model, top=1).hits[0][0]["name"] == "cats/00.png"


def test_the_command_prints_a_table_and_writes_json_and_a_sheet(photos, written, tmp_path, capsys) -> None:
    words = [f"index={written['objects']}", f"query={path_of(photos, 'cats/02.png')}", "device=cpu", "top=2"]
    assert cli.main(["search", *words, "box=6,8,16,22", f"out={tmp_path / 'found.json'}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path_of(photos, 'cats/02.png')}, box 0.125, 0.200, 0.333, 0.550"
    assert out[1].split() == ["cosine", "name", "label", "object", "box"]
    found = json.loads((tmp_path / "found.json").read_text())
    hits = found["queries"][0]["hits"]
    assert out[2].split()[:4] == ["1", f"{hits[0]['similarity']:.4f}", hits[0]["name"], hits[0]["label"]]
    assert found["index"]["path"] == str(written["objects"])
    both = f"query={path_of(photos, 'cats/02.png')},{path_of(photos, 'dogs/03.png')}"
    assert cli.main(["search", words[0], both, *words[2:], f"out={tmp_path / 'found.png'}"]) == 0
    sheet = Image.open(tmp_path / "found.png")
    assert sheet.width > 3 * 112
    assert sheet.height > 2 * 90
    colours = {colour for _, colour in sheet.getcolors(2**20)}
    assert (255, 220, 0) in colours  # the boxes of what was found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("query={cat}", "search needs index="),
        ("index={images}", "search needs query="),
        ("index=none.npz query={cat}", "no file of features none.npz"),
        ("index={cat} query={cat}", "expected a name that ends in .parquet, .npz, .zarr"),
        ("index={images} query=nowhere.png", "nowhere.png"),
        ("index={images} query={cat} tpo=3", "unknown key 'tpo'; did you mean 'top'?"),
        ("index={images} query={cat} top=0", "top=0: expected a number of at least 1"),
        ("index={images} query={cat} box=1,2,3", "box=1.0,2.0,3.0: expected x0,y0,x1,y1 in pixels"),
        ("index={images} query={cat} box=a,b", "box=a,b: expected x0,y0,x1,y1 in pixels"),
        ("index={images} query={cat} box=0,0,50,10", "expected x0 < x1 <= 48 and y0 < y1 <= 40"),
        ("index={images} query={cat} box=0,0,2,40", "lies outside of the square of the image"),
        ("index={images} query={cat},{cat} box=0,0,9,9", "box= is of one image, not of 2"),
        ("index={images} query={photos} box=0,0,9,9", "box= is of one image, not of a data set"),
        ("index={images} query={cat} out=x.txt", "out=x.txt: expected a name that ends in .json or .png"),
        ("index={images} query={cat} data=x out=a.json", "data= has no effect"),
        ("index={images} query={cat} data=scenes:?count=30 out=a.png", "these are other data"),
        ("index={images} query={cat} method=fast", "method=fast: expected exact or hnsw"),
    ],
)
def test_mistakes_are_one_line(photos, written, tmp_path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"cat": path_of(photos, "cats/00.png"), "images": written["images"], "photos": photos}
    assert cli.main(["search", *words.format(**named).split(), "device=cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
