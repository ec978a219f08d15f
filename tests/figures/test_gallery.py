"""Sheets hold what the functions beneath them say; `foveola visualize` writes them and explains mistakes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import foveola
from foveola import cli
from foveola.config import UserError
from foveola.console import split
from foveola.data.sample import Objects, Sample
from foveola.data.shown import components_of, rgb_of
from foveola.data.sources import open_source
from foveola.drawing.sheet import Row, Sheet, panel
from foveola.evaluation.features.table import ExtractConfig, extract
from foveola.figures import gallery
from foveola.figures.choice import image_numbers, pairs_of, points_of
from foveola.figures.pca import pca_images
from foveola.figures.positions import position_map
from foveola.figures.tiles import FULL, patches_of_object
from foveola.figures.visualize import FIGURES, draw, open_models
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.transform import resize
from foveola.models.vit import ViTConfig


def encoder_of(seed: int = 0, **model) -> Encoder:
    torch.manual_seed(seed)
    shape = {"width": 16, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32, "field_size": (5, 6)}
    pool = "token" if model.get("class_token", True) else "average"
    transform = TransformConfig(resize=32, crop=32)
    return Encoder(EncoderConfig(model=ViTConfig(**shape | model), transform=transform, pool=pool))


ENCODER = encoder_of()
PLAIN = encoder_of(1, class_token=False, positions="rope", registers=4)  # no class token


@pytest.fixture(scope="module")
def scenes():
    return open_source("scenes:?size=32&count=12&objects=1-3", "test")


@pytest.fixture(scope="module")
def wide() -> Sample:
    """An image of 40 x 64 with one object in its upper left quarter, and one everywhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    objects = Objects.from_boxes(np.array([[0, 0, 0.5, 0.5], [0, 0, 1, 1]], np.float32))
    return Sample(pixels, "wide", objects, 0)


def test_every_tile_is_a_whole_number_of_pixels_a_patch(wide):
    sheet = gallery.pca_sheet({"a": ENCODER, "b": PLAIN}, [wide], size=64)
    assert list(sheet.columns) == ["image", "a", "b"]
    image, first, second = sheet.rows[0].tiles
    assert image.shape == first.shape == second.shape == (200, 320, 3)
    small = pca_images(ENCODER, [wide.image], size=64)[0]
    assert small.shape == (5, 8, 3)
    np.testing.assert_array_equal(first[20::40, 20::40], small)
    np.testing.assert_array_equal(first, small.repeat(40, 0).repeat(40, 1))


def test_attention_sheets(wide, scenes):
    sheet = gallery.attention_sheet(ENCODER, [wide, scenes[0]], heads=True)
    assert list(sheet.columns)[:3] == ["image", "class token", "token in mask"]
    assert list(sheet.columns)[3:] == ["heads, 60 %", "head 1", "head 2"]
    assert [len(row.tiles) for row in sheet.rows] == [6, 6]
    sheet = gallery.attention_sheet({"a": ENCODER, "b": PLAIN}, [scenes[0]])
    assert list(sheet.columns)[1:] == [
        *["a: class token", "a: token in mask", "a: heads, 60 %"],
        *["b: read by all patches", "b: heads, 60 %"],
    ]
    bare = Sample(wide.image, "bare")
    assert "token in mask" not in gallery.attention_sheet(ENCODER, [bare]).columns
    with pytest.raises(UserError, match="neither boxes nor masks"):
        gallery.objects_sheet(ENCODER, [bare])
    with pytest.raises(UserError, match="no class token"):
        gallery.objects_sheet(PLAIN, [wide])


def test_object_tokens_light_only_their_object(wide):
    sheet = gallery.objects_sheet(ENCODER, [wide], size=64)
    everything, corner = sheet.rows
    dark = corner.tiles[1][120:, :]  # below the object, where its token reads nothing: gray
    assert (np.ptp(dark.astype(int), axis=2) <= 1).all()
    assert (np.ptp(corner.tiles[1][:100, :160].astype(int), axis=2) > 5).any()
    assert (np.ptp(everything.tiles[1][120:].astype(int), axis=2) > 5).any()
    assert len(gallery.objects_sheet(ENCODER, [wide], each=1).rows) == 1


def test_patches_of_an_object_follow_the_grid(wide):
    patches = patches_of_object(wide, 0, (5, 8)).view(5, 8)
    assert patches[:3, :4].all()
    assert patches.sum() == 12
    tiny = Sample(wide.image, "tiny", Objects.from_boxes(np.array([[0.5, 0.5, 0.503, 0.503]], np.float32)))
    assert patches_of_object(tiny, 0, (4, 4)).sum() == 1, "an object of a hundredth of a patch has that patch"
    third = Sample(wide.image, "third", Objects.from_boxes(np.array([[0, 0, 0.625, 0.25]], np.float32)))
    for least, count in ((0.4, 3), (0.6, 2)):  # two patches and a half in one row of four
        assert patches_of_object(third, 0, (4, 4), least).sum() == count


def test_sheets_about_points(wide):
    points = [(0.1, 0.1), (0.9, 0.9)]
    query = gallery.query_sheet({"a": ENCODER, "b": PLAIN}, [wide], points, heads=True)
    assert [len(row.tiles) for row in query.rows] == [7, 7]
    alike = gallery.similarity_sheet(ENCODER, [wide], points, size=64)
    assert all(row.captions[1].endswith(" to 1") for row in alike.rows)
    top, bottom = (row.tiles[1] for row in alike.rows)
    # Coolwarm's red at the patch itself, beside its dot.
    assert tuple(top[2, 2]) == tuple(bottom[-3, -3]) == (180, 4, 38)


def test_neighbours_are_those_of_the_feature_table(scenes):
    references = open_source("scenes:?size=32&count=30&objects=1-3", "train")
    config = ExtractConfig(workers=0)
    sheet = gallery.neighbour_sheet(ENCODER, references, scenes, [3, 7], found=4, config=config)
    assert [row.title for row in sheet.rows] == ["without mask", "with mask"] * 2
    for number, image in enumerate((3, 7)):
        for masks, row in zip((False, True), sheet.rows[2 * number : 2 * number + 2], strict=True):
            tables = [
                extract(ENCODER, s, masks=masks, config=config, progress=False) for s in (references, scenes)
            ]
            unit = [torch.nn.functional.normalize(table.features, dim=1) for table in tables]
            near = (unit[0] @ unit[1][image]).argsort(descending=True)[:4]
            labels = [int(tables[0].labels[i]) for i in near]
            own = int(tables[1].labels[image])
            assert list(row.captions) == [references.classes[i] for i in (own, *labels)]
            assert list(row.right) == [None, *(label == own for label in labels)]


def test_neighbours_are_shown_in_the_channels_that_the_data_say(tmp_path):
    many = np.zeros((32, 32, 5), np.uint8)
    many[..., 4], many[..., 1] = 250, 100
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", many + np.uint8(number))
    source = open_source(f"folder:{tmp_path}?channels=all&show=5,2,1")
    transform = TransformConfig(resize=32, crop=32, mean=(0.5,) * 5, std=(0.25,) * 5)
    config = replace(ENCODER.config.model, channels=5)
    encoder = Encoder(EncoderConfig(model=config, transform=transform))
    config = ExtractConfig(workers=0)
    (row,) = gallery.neighbour_sheet(encoder, source, source, [0], found=2, masks=False, config=config).rows
    assert [tuple(tile[0, 0] // 10) for tile in row.tiles] == [(25, 10, 0)] * 3


def test_each_right_answer_of_a_query_has_a_green_frame():
    references = open_source("scenes:?size=32&count=30&objects=1-3", "train")
    queries = open_source("scenes:?size=32&count=8&objects=1-3", "test")
    label = queries[3].label
    queries.answers = lambda index: [label, (label + 1) % 10, (label + 2) % 10] if index == 3 else None
    config = ExtractConfig(workers=0)
    (row,) = gallery.neighbour_sheet(
        ENCODER, references, queries, [3], found=30, masks=False, config=config
    ).rows
    names = {queries.classes[(label + i) % 10] for i in range(3)}
    assert row.right[1:] == [caption in names for caption in row.captions[1:]]
    assert row.right.count(True) > row.captions[1:].count(queries.classes[label]) > 0


def test_neighbours_of_objects_never_find_their_own_image(scenes):
    config = ExtractConfig(workers=0, rows="objects", view="object")
    sheet = gallery.neighbour_sheet(ENCODER, scenes, scenes, [0], found=100, masks=True, config=config)
    largest = int(scenes[0].objects.areas.argmax())
    assert sheet.rows[0].captions[0] == scenes.classes[int(scenes[0].objects.labels[largest])]
    others = sum(len(scenes[i].objects) for i in range(1, len(scenes)))
    assert len(sheet.rows[0].tiles) == 1 + others


@pytest.mark.parametrize("positions", ["learned", "sincos", "field"])
def test_positions_are_what_is_added(positions):
    encoder = encoder_of(positions=positions)
    added = []
    encoder.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: added.append(inputs[0]))
    encoder(torch.zeros(1, 3, 32, 32))
    patches = encoder.backbone.patch_embed(torch.zeros(1, 3, 32, 32))
    expected = (added[0][0, 1:] - patches[0]).detach().view(4, 4, 16)
    np.testing.assert_allclose(position_map(encoder), expected.numpy(), atol=1e-5)


def test_rotary_positions_depend_on_differences():
    places = position_map(encoder_of(1, class_token=False, positions="rope"))
    flat = torch.from_numpy(places).flatten(0, 1)
    cosines = (flat @ flat.T).view(4, 4, 4, 4)
    torch.testing.assert_close(cosines[0, 0, 1, 2], cosines[2, 1, 3, 3])
    field = encoder_of(positions="field")
    sheet = gallery.position_sheet({"table": ENCODER, "turned": PLAIN, "field": field})
    assert "rotary: nothing is added" in sheet.rows[1].title
    assert [row.captions[0] for row in sheet.rows] == ["4 x 4 positions"] * 2 + ["5 x 6 positions"]


def test_dictionary_and_correspondences(scenes, wide):
    sheet = gallery.dictionary_sheet(ENCODER, [scenes[0], scenes[1]], components=3, joint=True)
    assert all(row.tiles[1].any() for row in sheet.rows)
    sheet = gallery.correspondence_sheet({"a": ENCODER, "b": PLAIN}, [(wide, scenes[0])])
    assert len(sheet.rows[0].tiles) == 2
    assert min(tile.shape[1] for tile in sheet.rows[0].tiles) > 2 * FULL - 1


# -- sheets as pixels ----------------------------------------------------------------------------------------


def test_panel_keeps_shapes_and_frames_right_and_wrong():
    tall, flat = np.full((40, 20, 3), 10, np.uint8), np.full((20, 40, 3), 30, np.uint8)
    drawn = panel("title", ["a", "b"], [Row("row", [tall, flat], ["x", "y"], [True, False])], tile=100)
    assert (drawn == 10).all(axis=2).sum() == pytest.approx(50 * 100, rel=0.07)
    assert (drawn == 30).all(axis=2).sum() == pytest.approx(100 * 50, rel=0.07)
    assert (drawn == (0x1A, 0x96, 0x41)).all(axis=2).any()
    assert (drawn == (0xD7, 0x19, 0x1C)).all(axis=2).any()


def test_long_words_stay_inside_their_place():
    tile = np.zeros((8, 8, 3), np.uint8)
    for head in ("W" * 60, "a-very-long-name/of_a_run" * 3, "many short words " * 9):
        drawn = Sheet("title", [head, "b"], [Row("W" * 40, [tile, tile], ["c" * 90, ""])]).draw(60)
        assert (drawn[:, -1] == 255).all()
        assert drawn.shape[1] < 600
    assert Sheet("only a title", [], []).draw().shape[1] > 100


# -- what a user asks for ------------------------------------------------------------------------------------


def test_images_points_and_pairs(scenes):
    assert image_numbers(scenes, 4) == [0, 3, 6, 9]
    assert image_numbers(scenes, 100) == list(range(12))
    assert image_numbers(scenes, 4, "5, 2") == [5, 2]
    assert image_numbers(scenes, 4, (1,)) == image_numbers(scenes, 4, 1) == [1]
    assert points_of("0.2,0.3;1,0") == [(0.2, 0.3), (1, 0)]
    assert points_of([0.2, 0.3]) == points_of([[0.2, 0.3]]) == [(0.2, 0.3)]
    labels = [(a.label, b.label) for a, b in pairs_of(scenes, 3)]
    every = [scenes[i].label for i in range(12)]
    assert all(a == b or every.count(a) == 1 for a, b in labels)
    assert [(a.name, b.name) for a, b in pairs_of(scenes, 9, "4,5")] == [("scenes/test/4", "scenes/test/5")]


def test_names_of_models_are_as_short_as_they_can_be(tmp_path):
    for place in ("x/one", "y/one", "y/two"):
        ENCODER.save(tmp_path / place / "encoder")
    both = f"{tmp_path}/x/one,{tmp_path}/y/two/encoder"
    assert list(open_models(both, "cpu")) == ["one", "two"]
    same = [f"{tmp_path}/x/one", f"{tmp_path}/y/one/", f"untrained:{tmp_path}/y/one"]
    assert list(open_models(same, "cpu")) == ["x/one", "y/one", "untrained:y/one"]
    with pytest.raises(UserError, match="expected different models"):
        open_models([same[0], same[0]], "cpu")


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


DATA = "scenes:?size=32&count=12"
OWN = {
    "neighbours": {"workers": 0, "limit": 8, "count": 2},
    "positions": {},
    "query": {"points": "0.2,0.2;0.8,0.8", "count": 2},
    "correspondences": {"images": "0,1"},
}


@pytest.mark.parametrize("kind", sorted(FIGURES.keys() - {"answers", "detections"}))  # of heads
def test_every_kind_writes_one_image_twice_the_same(kind, tmp_path):
    settings = OWN.get(kind, {"count": 2})
    paths = [
        foveola.visualize(kind, ENCODER, DATA, out=tmp_path / name, **settings) for name in ("a", "b.png")
    ]
    assert paths == [[tmp_path / "a" / f"{kind}.png"], [tmp_path / "b.png"]]
    assert paths[0][0].read_bytes() == paths[1][0].read_bytes()
    assert min(size_of(paths[0][0])) > 150
    sheet = draw(kind, ENCODER, DATA, **settings)
    assert all(max(tile.shape[:2]) >= FULL - 8 or kind == "positions" for tile in sheet.rows[0].tiles)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ENCODER.save("one/encoder")
    PLAIN.save("two")
    words = f"visualize pca model=one,two data={DATA} images=0,4 joint=true each=true device=cpu".split()
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == "figures/pca.png"
    assert [Path(path).name for path in printed[1:]] == [
        f"pca-{row:03d}-{name}.png" for row in (0, 1) for name in ("0-image", "1-one", "2-two")
    ]
    assert all(Path(path).is_file() for path in printed)
    assert size_of(Path(printed[2])) == (FULL, FULL)

    words = f"visualize pca model=one data={DATA} count=2 each=true device=cpu".split()
    assert cli.main([*words, "joint=true", "save_basis=kept/b.safetensors", "out=a.png"]) == 0
    assert cli.main([*words, "basis=kept/b.safetensors", "out=b.png"]) == 0
    assert Path("a-001-1-features.png").read_bytes() == Path("b-001-1-features.png").read_bytes()


def test_out_and_device_are_checked_before_anything_is_drawn(tmp_path, monkeypatch):
    path = foveola.visualize("pca", ENCODER, DATA, out=tmp_path / "v1.5", count=1)[0]
    assert path == tmp_path / "v1.5" / "pca.png"
    ENCODER.save(tmp_path / "a,b=1")
    assert list(open_models(str(tmp_path / "a,b=1"), "cpu")) == ["a,b=1"]
    with pytest.raises(UserError, match="no such device: 'foo'"):
        open_models(str(tmp_path / "a,b=1"), "foo")
    monkeypatch.setattr("foveola.figures.visualize.draw", lambda *_, **__: pytest.fail("drawn"))
    with pytest.raises(UserError, match="expected a folder"):
        foveola.visualize("pca", ENCODER, DATA, out=tmp_path / "a.svg")


def test_words_that_are_paths_are_names(tmp_path):
    (tmp_path / "lr=0.1").mkdir()
    words = [f"{tmp_path}/lr=0.1", "lr=0.1", f"data=folder:{tmp_path}", f"{tmp_path}/lr=0.2"]
    assert split(words, ())[:2] == (words[:1], words[1:])


def test_help(capsys):
    assert cli.main(["visualize", "--help"]) == 0
    out = capsys.readouterr().out
    for kind in FIGURES:
        assert f"  {kind} " in out
        assert cli.main(["visualize", kind, "--help"]) == 0
        keys = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
        assert len(keys) == len(set(keys))
        assert {"model", "data", "out", "cell", "each"} <= set(keys)
        assert ("train" in keys) == (kind == "neighbours")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "which kind (pca, attention, "),
        ("pac", "unknown kind 'pac'; did you mean 'pca'?"),
        ("pca data=scenes:", "visualize pca needs model=: a run folder"),
        ("pca model=M", "visualize pca needs data=, such as data=folder:/images"),
        ("pca model=M data=scenes: cont=3", "unknown key 'cont'; did you mean 'count'?"),
        ("pca model=M data=scenes: block=3", "unknown key 'block'; "),
        ("pca model=M data=scenes: train=scenes:", "unknown key 'train'; "),
        ("pca model=M data=scenes: images=0,99999", "images: there is no 99999, the last of scenes:"),
        ("pca model=M data=scenes: images=zero", "images='zero': expected indices such as '0,5,9'"),
        ("pca model=M data=scenes: save_basis=b", "save_basis needs joint=true"),
        ("pca model=M data=scenes: basis=b joint=true", "basis= has its components already"),
        ("pca model=M data=scenes: basis=nowhere", "basis=nowhere: No such file"),
        ("pca model=M,untrained:M data=scenes: basis=b", "a basis belongs to one encoder"),
        ("pca model=M data=scenes: out=a.jpg", "out=a.jpg: expected a folder, or a file that ends in .png"),
        ("pca model=M data=folder:/nowhere", "folder: no folder /nowhere"),
        ("pca model=nowhere data=scenes:", "no model at nowhere"),
        ("query model=M data=scenes: points=2,0.5", "points: 2,0.5 is not in the unit square"),
        ("query model=M data=scenes: points=0.5", "points=0.5: expected x,y pairs"),
        ("query model=M data=scenes: block=9", "block=9: this encoder has 2 blocks"),
        ("correspondences model=M data=scenes: images=1,2,3", "images: correspondences are of pairs"),
        ("objects model=P data=scenes: count=1", "this encoder has no class token"),
        ("objects model=M data=folder:F images=0", "objects: these images have neither boxes nor masks"),
        ("neighbours model=M data=folder:F masks=true", "masks=true, but folder:F"),
        ("pca model=M data=folder:F size=20 images=1", "1.png: not an image of a known kind"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ENCODER.save("M")
    PLAIN.save("P")
    Path("F").mkdir()
    Image.new("RGB", (32, 32)).save("F/0.png")
    Path("F/1.png").write_text("no image")
    assert cli.main(["visualize", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"foveola: error: {message}"), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("show", ["3,5,1", "pca"])
def test_figures_show_what_the_data_say_rather_than_the_encoder(show: str, tmp_path: Path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", random.integers(0, 255, (32, 32, 5), np.uint8))
    transform = TransformConfig(resize=32, crop=32, mean=(0.5,) * 5, std=(0.25,) * 5, show="1,2,4")
    encoder = Encoder(EncoderConfig(model=replace(ENCODER.config.model, channels=5), transform=transform))
    data = f"folder:{tmp_path}?channels=all"
    file = np.load(tmp_path / "a.npy")
    wanted = (
        components_of(file.reshape(-1, 5) / 255) if show == "pca" else (2, 4, 0)
    )  # of the file, not a tile
    for query, choice in (("", (0, 1, 3)), (f"&show={show}", wanted)):
        sheet = draw("attention", encoder, data + query, device="cpu", size=32)
        pixels = resize(file, *sheet.rows[0].tiles[0].shape[:2]).permute(1, 2, 0)
        assert np.array_equal(sheet.rows[0].tiles[0], rgb_of(pixels.numpy(), choice))
