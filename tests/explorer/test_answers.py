"""Answers of the page are those of `Index` and `foveola.search`, and mistakes are said."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import foveola
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.explorer.layers import layer
from foveola.explorer.questions import sample_at
from foveola.explorer.session import Session
from foveola.explorer.sides import ExploreConfig, sides_of
from foveola.explorer.thumbnails import Thumbnails
from foveola.figures.pca import pca_images
from foveola.zoo.load import load
from tests.explorer.conftest import COUNT, QUICK, ask


def names_of(hits: list[dict]) -> list[tuple[str, int, float]]:
    return [(hit["name"], hit["object"], round(hit["similarity"], 4)) for hit in hits]


@pytest.fixture
def found(session: Session):
    """What `foveola.search` finds with a box of an image, of other images."""

    def search(side: int, kind: str, image: int, box, crop: bool = False) -> list[tuple[str, int, float]]:
        index = session.sides[side].indices[kind]
        sample, pixels = sample_at(session.source, image)
        height, width = pixels.shape[:2]
        corners = [c * s for c, s in zip(box, (width, height, width, height), strict=True)]
        if crop:
            x0, y0, x1, y1 = map(round, corners)
            result = foveola.search(
                index, pixels[y0:y1, x0:x1], top=COUNT * 40, model=session.sides[side].encoder
            )
        else:
            result = foveola.search(
                index, pixels, box=corners, top=COUNT * 40, model=session.sides[side].encoder
            )
        return [hit for hit in names_of(list(result.hits[0])) if hit[0] != sample.name]

    return search


@pytest.mark.parametrize(("find", "masked", "kind"), [
    ("images", True, "images"), ("images", False, "images"), ("objects", True, "objects"),
    ("objects", False, "crops"), ("patches", True, "patches"),
])  # fmt: skip
def test_a_box_finds_what_search_finds(client, found, find, masked, kind):
    box = [0.25, 0.25, 0.75, 0.8]
    answers = ask(client, image=3, box=box, find=find, masked=masked, top=9)
    for side, answer in enumerate(answers):
        crop = find == "images" and not masked
        assert names_of(answer["hits"]) == found(side, kind, 3, box, crop)[:9]
        assert answer["asked"] == box


def test_a_patch_finds_what_the_index_finds(client, session):
    """The patch at (0.6, 0.4) of images with rows among the patches, in grids of 4 x 4 and 2 x 2."""
    for side, (grid, cell) in enumerate((((4, 4), (1, 2)), ((2, 2), (0, 1)))):
        index = session.sides[side].indices["patches"]
        image, size = int(index.rows.image_index[5]), grid[0] * grid[1]
        row = 5 * size + cell[0] * grid[1] + cell[1]
        hits = ask(client, image=image, point=[0.6, 0.4], find="patches", own=True, top=12)[side]["hits"]
        cosines, rows = index.search(index.vectors[row].numpy(), 12)
        assert [(h["name"], h["patch"]) for h in hits] == [
            (index.describe(r)["name"], index.describe(r)["patch"]) for r in rows[0]
        ]
        np.testing.assert_allclose([h["similarity"] for h in hits], cosines[0], atol=1e-6)
        assert hits[0]["patch"] == list(cell)
        assert all(
            h["image_index"] != image
            for h in ask(client, image=image, point=[0.6, 0.4], find="patches")[side]["hits"]
        )


def test_a_patch_of_an_image_without_rows_is_encoded_as_rows_are(client, session):
    index = session.sides[0].indices["patches"]
    image = next(i for i in range(COUNT) if i not in index.rows.image_index)
    hits = ask(client, image=image, point=[0.6, 0.4], find="patches", top=5)[0]["hits"]
    _, pixels = sample_at(session.source, image)
    encoder = session.sides[0].encoder
    features = encoder(encoder.transform(pixels)[None]).patches[0, 1 * 4 + 2]
    cosines, rows = index.search(features, 5)
    assert [(h["name"], h["patch"]) for h in hits] == [
        (index.describe(r)["name"], index.describe(r)["patch"]) for r in rows[0]
    ]
    np.testing.assert_allclose([h["similarity"] for h in hits], cosines[0], atol=1e-3)


def test_images_and_objects_ask_with_their_own_rows(client, session):
    for side in (0, 1):
        images = session.sides[side].indices["images"]
        hits = ask(client, image=4, own=True, top=6)[side]["hits"]
        assert names_of(hits) == [
            (images.describe(r)["name"], -1, round(float(c), 4))
            for c, r in zip(*(part[0] for part in images.search(images.vectors[4], 6)), strict=True)
        ]
        for masked, kind in ((True, "objects"), (False, "crops")):
            index = session.sides[side].indices[kind]
            row = int(np.flatnonzero((index.rows.image_index == 2) & (index.rows.object == 1))[0])
            hits = ask(client, image=2, object=1, find="objects", masked=masked, own=True, top=6)[side][
                "hits"
            ]
            found = index.search(index.vectors[row], 6).indices[0]
            assert [(h["name"], h["object"]) for h in hits] == [
                (index.describe(r)["name"], index.describe(r)["object"]) for r in found
            ]


def test_what_cannot_be_asked_is_said(client):
    (first, _) = ask(client, image=0, find="patches")
    assert "click into the image" in first["error"]
    (first, _) = ask(client, image=0, find="patches", point=[0.01, 0.5])
    assert "no patch here" in first["error"]
    (first, _) = ask(client, image=0, object=7)
    assert "no object 7" in first["error"]
    bad = [
        {"image": COUNT}, {"image": -1}, {"image": "0"}, {"image": True}, {}, [1],
        {"image": 0, "find": "files"},
        {"image": 0, "top": 0}, {"image": 0, "top": 10**9}, {"image": 0, "box": [0.5, 0, 0.4, 1]},
        {"image": 0, "box": [0, 0, 2, 1]}, {"image": 0, "box": "0011"}, {"image": 0, "point": [0.5]},
        {"image": 0, "point": [0.5, 0.5], "object": 0}, {"image": 0, "path": "/etc/passwd"},
        {"image": 0, "masked": "yes"}, {"image": 0, "box": [0, 0, float("1e-9"), None]},
    ]  # fmt: skip
    for values in bad:
        answer = client.post("/ask", json=values)
        assert answer.status_code == 400, values
        assert answer.json()["error"]
    kind = {"content-type": "application/json"}
    assert client.post("/ask", content=b"[" * 100_000, headers=kind).status_code == 400
    assert client.post("/ask", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/ask", content=b" " * (2**24 + 1), headers=kind).status_code == 413


def test_layers_are_those_of_the_figures(client, session, photos):
    encoder, pixels = load(session.sides[0].name), sample_at(open_source(photos, "test"), 6)[1]
    made = layer(encoder, pixels, "pca")
    (expected,) = pca_images(encoder, [pixels], size=64)
    assert np.array_equal(made.pixels, expected)
    for what, words in (
        ("attention", "class token"),
        ("reads", "patch under the dot"),
        ("similarity", "to 1"),
    ):
        answer = client.get(f"/layer/0/6/{what}", params={"x": 0.3, "y": 0.7, "head": 1}).json()
        assert words in answer["note"]
        assert answer["image"].startswith("data:image/png;base64,")
    assert "head=9" in client.get("/layer/0/6/attention?head=9").json()["error"]
    assert client.get("/layer/0/6/secrets").status_code == 404
    assert client.get("/layer/0/6/pca?x=nan").status_code == 400


def test_thumbnails_are_images_and_objects(client, session):
    whole = Image.open(BytesIO(client.get("/thumbnail/2").content))
    assert whole.size == (48, 40)
    x0, y0, x1, y1 = session.source[2].objects.boxes[1] * [48, 40, 48, 40]
    cut = np.asarray(Image.open(BytesIO(client.get("/thumbnail/2/1").content)).convert("RGB"))
    pixels, rim = sample_at(session.source, 2)[1], 0.15 * 14
    top, left = int(y0 - rim), int(x0 - rim)
    assert cut.shape[:2] == (int(y1 + rim + 1) - top, int(x1 + rim + 1) - left)
    middle = pixels[int(y0) + 7, int(x0) + 4].astype(int)
    assert np.abs(cut[int(y0) + 7 - top, int(x0) + 4 - left] - middle).max() < 12  # JPEG
    for path in (
        "/thumbnail/20",
        "/thumbnail/2/9",
        "/image/20",
        "/about/99",
        "/rows/files",
        "/map/images/5/pca",
    ):
        assert client.get(f"/{path}").status_code == 404, path


def test_other_depths_and_channels_are_shown_as_rgb(tmp_path) -> None:
    many = np.zeros((32, 32, 8), np.uint16)
    many[..., 0], many[..., 4] = 65535, 32896
    np.save(tmp_path / "a.npy", many)
    for query, want in (("", (255, 0, 0)), ("&show=5,1,2", (128, 255, 0))):
        source = open_source(f"folder:{tmp_path}?range=container&channels=all{query}")
        seen = np.asarray(Image.open(BytesIO(Thumbnails(source).get(0)))).astype(int)
        assert np.abs(seen - want).max() <= 3  # JPEG


def test_rows_and_facts(client, session):
    rows, source = client.get("/rows/objects").json(), session.source
    every = [(i, j) for i in range(COUNT) for j in range(len(source[i].objects))]
    assert list(zip(rows["image"], rows["object"], strict=True)) == every
    assert [rows["names"][n] for n in rows["name"]] == [source[i].name for i, _ in every]
    assert {rows["labels"][n] for n in rows["label"]} == {"eye", "<i>ear</i>"}
    about = client.get("/about/3").json()
    assert about["name"] == source[3].name
    assert [about["width"], about["height"]] == [48, 40]
    assert [o["box"] for o in about["objects"]] == source[3].objects.boxes.tolist()
    assert about["grids"] == [[4, 4], [2, 2]]
    # A crop of 32 of the 38 x 32 pixels to which 48 x 40 is resized.
    np.testing.assert_allclose(about["seen"][0], [3 / 38, 0, 35 / 38, 1])


def test_a_selection_is_a_list_that_a_data_string_reads(client, session, tmp_path: Path, monkeypatch):
    made = client.post("/selection", json={"images": [17, *range(COUNT), 2, 2]}).json()
    (tmp_path / "selection.txt").write_text(made["text"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    again = open_source(made["data"])
    assert [again[i].name for i in range(len(again))] == [session.source[i].name for i in range(COUNT)]
    assert [(again.classes or ())[again[i].label or 0] for i in range(COUNT)] == [
        session.source[i].name.split("/")[0] for i in range(COUNT)
    ]
    for values in ([0], {}, {"images": ["../../etc/passwd"]}, {"images": [True]}):
        assert client.post("/selection", json=values).status_code == 400
    assert client.post("/selection", json={"images": [COUNT]}).status_code == 404


def test_features_alone_answer_what_they_hold(tmp_path: Path, photos, models):
    folder = tmp_path / "model"
    load(models[0]).save(folder)
    files = [tmp_path / f"{kind}.npz" for kind in ("images", "objects", "patches")]
    for path in files:
        foveola.embed(folder, photos, out=path, rows=path.stem, workers=0, progress=False)
    (folder / "model.safetensors").unlink()
    (side,), source = sides_of([*map(str, files)], None, {}, ExploreConfig(), progress=False)
    session = Session([side], source)
    assert "cannot be loaded" in session.state()["sides"][0]["why"]
    assert session.ask({"image": 0, "top": 3})[0]["hits"]
    assert session.ask({"image": 0, "object": 0, "find": "objects"})[0]["hits"]
    assert session.ask({"image": 0, "point": [0.5, 0.5], "find": "patches"})[0]["hits"]
    assert "cannot be loaded" in session.ask({"image": 0, "box": [0.1, 0.1, 0.6, 0.9]})[0]["error"]
    assert (
        "foveola embed rows=objects masks=false view=object makes one"
        in (session.ask({"image": 0, "object": 0, "find": "objects", "masked": False})[0]["error"])
    )
    with pytest.raises(UserError, match="limit= has no effect: given features"):
        sides_of([*map(str, files)], None, {"limit": 3}, ExploreConfig(limit=3), progress=False)
    with pytest.raises(UserError, match="both images of one encoder"):
        sides_of([str(files[0])] * 2, None, {}, ExploreConfig(), progress=False)
    other = f"scenes:?size=32&count={COUNT}"
    with pytest.raises(UserError, match="features of other data"):
        sides_of([str(files[0])], other, {}, ExploreConfig(), progress=False)


def test_what_cannot_be_explored_is_refused(photos, models, kept, tmp_path: Path):
    quick = ExploreConfig(**QUICK)
    for names, data, words in (
        ([], photos, "nothing to explore"),
        ([str(models[0])], None, "data= is needed"),
        ([str(models[0])] * 2, photos, "the same encoder"),
        (["pixels:", *map(str, models)], photos, "two at most"),
    ):
        with pytest.raises(UserError, match=words):
            sides_of(names, data, {}, quick, cache=kept, progress=False)
    with pytest.raises(UserError, match=r"no file of features .*gone\.npz"):
        foveola.explore(tmp_path / "gone.npz", progress=False)
    with pytest.raises(UserError, match="no effect"):
        foveola.explore(models[0], data=photos, patches=0, seed=3, progress=False)
