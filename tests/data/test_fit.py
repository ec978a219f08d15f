"""Annotations against the image that is decoded: turned with it, at another resolution, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.fit import turn_of, views_of
from foveola.data.formats import Header, turn, turn_boxes
from foveola.data.sample import BadImage, DataError, Objects, Sample
from foveola.data.segmentation import LabelledImages
from foveola.data.sources import decode, notes_of, open_source

BOX = (10, 5, 30, 15)  # x0, y0, x1, y1 on the pixels as stored


def photo(path: Path, orientation: int = 1, size: tuple[int, int] = (60, 40)) -> Path:
    """A dark image of `size` (as stored) with a bright object at BOX, which EXIF turns."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, quality=95, subsampling=0)
    return path


def bright(sample: Sample) -> np.ndarray:
    """Where the decoded image shows the object."""
    return decode(sample.image)[:, :, 0] > 127


def objects_of(sample: Sample) -> Objects:
    assert sample.objects is not None
    return sample.objects


def box_of(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    return np.array([xs[0] / width, ys[0] / height, (xs[-1] + 1) / width, (ys[-1] + 1) / height])


def coco(folder: Path, sizes: list[tuple[int, int]], segmentation: object) -> str:
    x0, y0, x1, y1 = BOX
    tree = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, (w, h) in enumerate(sizes)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            | ({} if segmentation is None else {"segmentation": segmentation})
            for i in range(len(sizes))
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder.parent / "coco.json").write_text(json.dumps(tree))
    return f"coco:{folder}?annotations={folder.parent / 'coco.json'}"


x0, y0, x1, y1 = BOX
POLYGON = [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pixels_do(orientation: int):
    pixels = np.zeros((40, 60), bool)
    pixels[y0:y1, x0:x1] = True
    unit = np.array([[x0 / 60, y0 / 40, x1 / 60, y1 / 40]])
    want = box_of(turn(pixels, orientation))
    np.testing.assert_allclose(turn_boxes(unit, orientation), want[None], atol=1e-12)


@pytest.mark.parametrize("segmentation", [None, POLYGON])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_coco_drawn_on_stored_pixels_turns_with_the_image(tmp_path: Path, orientation: int, segmentation):
    """The shape that the JSON states is that of the pixels as stored."""
    photo(tmp_path / "p" / "0.jpg", orientation)
    sample = open_source(coco(tmp_path / "p", [(60, 40)], segmentation))[0]
    np.testing.assert_allclose(objects_of(sample).boxes, box_of(bright(sample))[None], atol=1e-6)
    drawn = objects_of(sample).draw(0, 120) > 127
    want = np.kron(bright(sample), np.ones((2, 3) if bright(sample).shape == (60, 40) else (3, 2)))
    assert np.array_equal(drawn, want.astype(bool))


def test_coco_drawn_on_the_image_the_right_way_up_stays(tmp_path: Path):
    photo(tmp_path / "p" / "0.jpg", 6)  # shown 40 wide, 60 high
    sample = open_source(coco(tmp_path / "p", [(40, 60)], None))[0]
    np.testing.assert_allclose(objects_of(sample).boxes, [[10 / 40, 5 / 60, 30 / 40, 15 / 60]], rtol=1e-6)


def test_where_sizes_do_not_tell_the_other_images_do(tmp_path: Path):
    for number, orientation in enumerate((3, 6)):  # by 180 degrees; by 90
        photo(tmp_path / "p" / f"{number}.jpg", orientation)
    stored = open_source(coco(tmp_path / "p", [(60, 40), (60, 40)], None))
    np.testing.assert_allclose(objects_of(stored[0]).boxes, box_of(bright(stored[0]))[None], atol=1e-6)
    assert "EXIF turns 1 of 2 images looked at whose annotations may" in notes_of(stored)[0]
    assert notes_of(stored)[0].endswith("taken as drawn on pixels as they are stored, as those of others are")
    upright = open_source(coco(tmp_path / "p", [(60, 40), (40, 60)], None))
    np.testing.assert_allclose(objects_of(upright[0]).boxes, [[1 / 6, 1 / 8, 1 / 2, 3 / 8]], rtol=1e-6)
    assert notes_of(upright)[0].endswith("images the right way up, as those of others are")


def test_parts_of_one_folder_are_read_alike(tmp_path: Path):
    """What `limit=` leaves may lack the images that tell; each image has the same boxes in any part."""
    for number, orientation in enumerate((3, 6, 3)):
        photo(tmp_path / "p" / f"{number}.jpg", orientation)
    spec = coco(tmp_path / "p", [(60, 40)] * 3, None)
    for part in (f"{spec}&limit=1&seed={seed}" for seed in range(4)):
        sample = open_source(part)[0]
        np.testing.assert_allclose(objects_of(sample).boxes, box_of(bright(sample))[None], atol=1e-6)


@pytest.mark.parametrize(("size", "turned"), [((60, 40), True), ((40, 60), False), ((500, 400), False)])
def test_boxes_of_imagenets_xml_turn_where_their_size_says_so(tmp_path: Path, size, turned):
    photo(tmp_path / "in" / "val" / "n01440764" / "a.jpg", 6)
    xml = tmp_path / "xml" / "n01440764" / "a.xml"
    xml.parent.mkdir(parents=True)
    corners = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), BOX, strict=True))
    w, h = size
    xml.write_text(
        f"<annotation><size><width>{w}</width><height>{h}</height></size>"
        f"<object><bndbox>{corners}</bndbox></object></annotation>"
    )
    sample = open_source(f"imagenet:{tmp_path / 'in'}?boxes={tmp_path / 'xml'}", "test")[0]
    as_stated = np.array([[x0 / w, y0 / h, x1 / w, y1 / h]])
    want = box_of(bright(sample))[None] if turned else as_stated
    np.testing.assert_allclose(objects_of(sample).boxes, want, atol=1e-6)


def test_own_boxes_on_images_that_exif_turns_are_said(tmp_path: Path):
    photo(tmp_path / "p" / "0.jpg", 6)
    photo(tmp_path / "p" / "1.jpg")
    table = tmp_path / "boxes.csv"
    table.write_text("".join(f"{n}.jpg,10,5,30,15\n" for n in range(2)))
    (note,) = notes_of(open_source(f"folder:{tmp_path / 'p'}?boxes={table}"))
    assert "EXIF turns 1 of 2 images looked at whose annotations may have been drawn before" in note
    assert note.endswith("they are taken as drawn on images the right way up")


def test_another_resolution_fits_and_another_shape_does_not(tmp_path: Path):
    for number in range(3):
        photo(tmp_path / "p" / f"{number}.jpg")
    halved = open_source(coco(tmp_path / "p", [(120, 80)] * 3, None))
    np.testing.assert_allclose(objects_of(halved[0]).boxes, [[1 / 12, 1 / 16, 1 / 4, 3 / 16]], rtol=1e-6)
    with pytest.raises(
        DataError, match=r"3 of 3 .* do not fit .* 0.jpg: is 60x40 pixels, its annotation 40x60"
    ):
        open_source(coco(tmp_path / "p", [(40, 60)] * 3, None))
    some = open_source(coco(tmp_path / "p", [(60, 40), (60, 40), (100, 100)], None))
    assert "1 of 3 annotated images looked at do not fit" in notes_of(some)[0]
    with pytest.raises(BadImage, match=r"2.jpg: is 60x40 pixels, its annotation 100x100"):
        some[2]


@pytest.mark.parametrize(("orientation", "scale"), [(1, 1), (6, 1), (8, 1), (6, 2)])
def test_instance_maps_of_stored_pixels_turn(tmp_path: Path, orientation: int, scale: int):
    photo(tmp_path / "p" / "a.jpg", orientation)
    values = np.zeros((40, 60), np.uint8)
    values[y0:y1, x0:x1] = 3
    (tmp_path / "m").mkdir()
    Image.fromarray(values[::scale, ::scale].copy()).save(tmp_path / "m" / "a.png")
    sample = open_source(f"folder:{tmp_path / 'p'}?masks={tmp_path / 'm'}")[0]
    np.testing.assert_allclose(objects_of(sample).boxes, box_of(bright(sample))[None], atol=0.05)


def test_instance_maps_of_another_shape_are_refused(tmp_path: Path):
    photo(tmp_path / "p" / "a.jpg")
    (tmp_path / "m").mkdir()
    Image.fromarray(np.ones((20, 20), np.uint8)).save(tmp_path / "m" / "a.png")
    with pytest.raises(DataError, match=r"a.jpg: is 60x40 pixels, its annotation 20x20"):
        open_source(f"folder:{tmp_path / 'p'}?masks={tmp_path / 'm'}")


@pytest.mark.parametrize("size", [(60, 40), (60, 60)])
@pytest.mark.parametrize("orientation", [3, 6])
def test_label_maps_turn_with_their_image(tmp_path: Path, orientation: int, size: tuple[int, int]):
    """With a quarter turn of another image to tell where size does not."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[y0:y1, x0:x1] = 1
    (tmp_path / "m").mkdir()
    photo(tmp_path / "p" / "a.jpg", orientation, size)
    Image.fromarray(values).save(tmp_path / "m" / "a.png")
    photo(tmp_path / "p" / "b.jpg", 6)
    values = np.zeros((40, 60), np.uint8)
    values[y0:y1, x0:x1] = 1
    Image.fromarray(values).save(tmp_path / "m" / "b.png")
    source = open_source(f"masks:{tmp_path / 'p'}?labels={tmp_path / 'm'}&classes=2")
    assert isinstance(source, LabelledImages)
    for index in range(2):
        assert np.array_equal(source.label_map(index), bright(source[index]))


def test_boxes_of_another_resolution_are_refused(tmp_path: Path):
    for name in "abc":
        photo(tmp_path / "p" / f"{name}.jpg")
    csv = tmp_path / "b.csv"
    csv.write_text("".join(f"{name}.jpg,100,50,300,150\n" for name in "abc"))
    spec = f"folder:{tmp_path / 'p'}?boxes={csv}"
    with pytest.raises(DataError, match=r"3 of 3 .* a.jpg: its box 100, 50, 300, 150 lies outside its 60x40"):
        open_source(spec)
    csv.write_text("a.jpg,10,5,30,15\nb.jpg,10,5,30,15\nc.jpg,100,50,300,150\n")
    assert "1 of 3 annotated images looked at do not fit" in notes_of(open_source(spec))[0]


def test_boxes_that_end_beyond_their_image_are_said(tmp_path: Path):
    photo(tmp_path / "p" / "a.jpg")
    (tmp_path / "b.csv").write_text("a.jpg,10,5,30,15\na.jpg,10,5,90,15\na.jpg,0,0,61,40\n")
    source = open_source(f"folder:{tmp_path / 'p'}?boxes={tmp_path / 'b.csv'}")
    assert notes_of(source)[0].endswith("1 of 3 boxes looked at end beyond their image and are cut off there")
    np.testing.assert_allclose(objects_of(source[0]).boxes[1], [1 / 6, 1 / 8, 1, 3 / 8], rtol=1e-6)


def test_few_images_with_boxes_are_said(tmp_path: Path):
    for name in "abc":
        photo(tmp_path / "p" / f"{name}.jpg")
    (tmp_path / "b.csv").write_text("a.jpg,10,5,30,15\n")
    source = open_source(f"folder:{tmp_path / 'p'}?boxes={tmp_path / 'b.csv'}")
    assert notes_of(source) == (
        f"{tmp_path / 'b.csv'}: objects in 1 of 3 images; each of the others counts as one",
    )


def test_a_bomb_as_a_label_map_is_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in "abc":
        photo(tmp_path / "p" / f"{name}.jpg")
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(tmp_path / "m" / f"{name}.png")
    Image.new("L", (600, 400)).save(tmp_path / "m" / "c.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    source = open_source(f"folder:{tmp_path / 'p'}?masks={tmp_path / 'm'}")
    with pytest.raises(BadImage, match=r"c.jpg: its label map .*c.png cannot be read \(.*decompression bomb"):
        source[2]


@pytest.mark.parametrize(
    ("size", "image", "orientation", "fits"),
    [
        ((60, 40), (60, 40), 1, (True, True)),
        ((60, 40), (60, 40), 6, (True, False)),
        ((40, 60), (60, 40), 6, (False, True)),
        ((320, 241), (640, 480), 1, (True, True)),  # half, rounded
        ((300, 240), (640, 480), 1, (False, False)),
        ((9, 8), (9, 8), 6, (True, False)),  # exactly, although a rounded 8x9 would do
        ((1001, 1000), (1001, 1000), 8, (True, False)),
    ],
)
def test_which_sizes_fit(size, image, orientation, fits):
    assert views_of(size, Header(*image, orientation)) == fits


def test_what_does_not_fit_names_both_sizes():
    with pytest.raises(BadImage, match=r"a.jpg: is 40x60 pixels, its annotation 50x50"):
        turn_of((50, 50), Header(60, 40, 6), False, "a.jpg")
