"""Every layout in miniature, and every mistake in it: one clear line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from foveola.data.identity import identity_of
from foveola.data.sample import BadImage, DataError, Objects, Sample
from foveola.data.sources import Source, decode, open_source

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


def image(path: Path, width: int = 40, height: int = 20, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def objects_of(sample: Sample) -> Objects:
    assert sample.objects is not None
    return sample.objects


def check(source: Source) -> None:
    """What every source promises."""
    assert isinstance(source, Source)
    again = pickle.loads(pickle.dumps(source))
    assert identity_of(again).digest == identity_of(source).digest
    for index in range(len(source)):
        sample = source[index]
        pixels = decode(sample.image)
        assert again[index].name == sample.name
        assert sample.name
        assert pixels.shape[2] == 3
        if sample.label is not None:
            assert source.classes is not None
            assert 0 <= sample.label < len(source.classes)
        if sample.objects is not None:
            assert source.has_objects
            assert len(sample.objects) > 0
            assert sample.objects.draw(0, 16).any()


# -- folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cats/a.jpg", "cats/deep/b.png", "dogs/c.webp", "dogs/D.JPEG"):
        image(tmp_path / "images" / name)
    (tmp_path / "images" / "cats" / "notes.txt").write_text("no image")
    image(tmp_path / "images" / ".hidden" / "e.jpg")
    image(tmp_path / "images" / "cats" / "._a.jpg")
    return tmp_path / "images"


def test_folder(folder: Path):
    source = open_source(f"folder:{folder}")
    check(source)
    assert source.classes == ("cats", "dogs")
    names = [source[i].name for i in range(4)]
    assert names == ["cats/a.jpg", "cats/deep/b.png", "dogs/D.JPEG", "dogs/c.webp"]
    assert [source[i].label for i in range(4)] == [0, 0, 1, 1]
    assert len(source) == 4
    assert not source.has_objects
    with pytest.raises(IndexError):
        source[4]


def test_flat_folder(folder: Path):
    source = open_source(f"folder:{folder / 'dogs'}")
    check(source)
    assert source.classes is None
    assert source[0].label is None


def test_folder_behind_links(folder: Path, tmp_path: Path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "felines").symlink_to(folder / "cats")
    assert open_source(f"folder:{tmp_path / 'links'}").classes == ("felines",)


def test_limit_is_a_seeded_part(folder: Path):
    names = []
    for seed in range(8):
        source = open_source(f"folder:{folder}?limit=2&seed={seed}")
        again = open_source(f"folder:{folder}?limit=2&seed={seed}")
        check(source)
        assert len(source) == 2
        assert identity_of(source).digest == identity_of(again).digest
        names.append((source[0].name, source[1].name))
    assert len(set(names)) > 2
    assert all(a < b for a, b in names)


def test_fingerprint_follows_the_data_not_the_place(folder: Path, tmp_path: Path):
    before = identity_of(open_source(f"folder:{folder}")).digest
    folder.rename(tmp_path / "elsewhere")
    assert identity_of(open_source(f"folder:{tmp_path / 'elsewhere'}")).digest == before
    image(tmp_path / "elsewhere" / "dogs" / "new.jpg")
    assert identity_of(open_source(f"folder:{tmp_path / 'elsewhere'}")).digest != before


def test_folder_with_boxes(folder: Path, tmp_path: Path):
    (tmp_path / "boxes.csv").write_text(
        "name,x0,y0,x1,y1,label\ncats/a.jpg,10,5,30,15,\ncats/a.jpg,20,0,40,20,tail\n\nb.png, 4, 4, 400, 9,\n"
    )
    source = open_source(f"folder:{folder}?boxes={tmp_path / 'boxes.csv'}")
    check(source)
    assert source.classes == ("cats", "dogs", "tail")
    objects = objects_of(source[0])
    np.testing.assert_allclose(objects.boxes, [[0.25, 0.25, 0.75, 0.75], [0.5, 0, 1, 1]])
    np.testing.assert_allclose(objects.areas, [0.25, 0.5])
    assert objects.labels is not None
    assert objects.labels.tolist() == [0, 2]  # the image's class where the box has none
    np.testing.assert_allclose(objects_of(source[1]).boxes, [[0.1, 0.2, 1, 0.45]])
    assert source[2].objects is None

    boxes = {"cats/a.jpg": [[10, 5, 30, 15], [20, 0, 40, 20, "tail"]], "cats/deep/b.png": [[4, 4, 400, 9]]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    same = open_source(f"folder:{folder}?boxes={tmp_path / 'boxes.json'}")
    assert identity_of(same).digest == identity_of(source).digest


def test_boxes_refer_to_the_image_the_right_way_up(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "p" / "a.jpg", width=40, height=20, exif=exif)  # shown 20 wide, 40 high
    (tmp_path / "boxes.csv").write_text("a.jpg,10,0,20,40\n")
    sample = open_source(f"folder:{tmp_path / 'p'}?boxes={tmp_path / 'boxes.csv'}")[0]
    assert decode(sample.image).shape == (40, 20, 3)
    np.testing.assert_allclose(objects_of(sample).boxes, [[0.5, 0, 1, 1]])


def test_broken_image_with_boxes_is_left_to_decode(tmp_path: Path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_bytes(b"")
    (tmp_path / "boxes.csv").write_text("a.jpg,1,0,2,4\n")
    sample = open_source(f"folder:{tmp_path / 'p'}?boxes={tmp_path / 'boxes.csv'}")[0]
    with pytest.raises(BadImage, match="empty"):
        decode(sample.image)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["gray", "palette", "16 bit"])
def test_folder_with_label_maps(folder: Path, tmp_path: Path, kind: str, inside: bool):
    masks = folder / "masks" if inside else tmp_path / "masks"
    values = np.zeros((10, 20), np.uint16 if kind == "16 bit" else np.uint8)  # half the size of the image
    values[2:6, 5:10] = 1
    values[6:, :] = 1000 if kind == "16 bit" else 7
    values[0, 0] = 255
    (masks / "cats" / "deep").mkdir(parents=True)
    drawn = Image.fromarray(values)
    if kind == "palette":
        drawn.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    drawn.save(masks / "cats" / "a.png")
    Image.fromarray(np.zeros((20, 40), np.uint8)).save(masks / "cats" / "deep" / "b.png")
    source = open_source(f"folder:{folder}?masks={masks}&ignore=255")
    check(source)
    assert len(source) == 4
    objects = objects_of(source[0])
    np.testing.assert_allclose(objects.boxes, [[0.25, 0.2, 0.5, 0.6], [0, 0.6, 1, 1]], rtol=1e-6)
    np.testing.assert_allclose(objects.areas, [0.1, 0.4], rtol=1e-6)
    assert objects.labels is not None
    assert objects.labels.tolist() == [0, 0]
    assert np.array_equal(objects.draw(0, 20)[4:12, 5:10], np.full((8, 5), 255))
    assert objects.draw(0, 20).sum() == 255 * 40
    assert source[1].objects is None  # an empty map
    assert source[2].objects is None  # no map


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cats/a.jpg,1,2,3", "line 1: a box is x0, y0, x1, y1"),
        ("cats/a.jpg,1,2,3,4\ncats/a.jpg,1,2,x,4", "line 2: a box is"),
        ("cats/a.jpg,5,2,5,4", "line 1: box 5, 2, 5, 4 has no area"),
        ("cats/a.jpg,-9,2,-1,4", "has no area inside the image"),
        ("cats/a.jpg,0,0,nan,4", "has no area inside the image"),
        ("cats/a.jpg,0.1,0.2,0.5,1", "boxes are in pixels"),
        (
            "cats/A.jpg,0,0,9,9",
            "1 of 1 images that it names are missing, such as cats/A.jpg; did you mean cats/a",
        ),
    ],
)
def test_mistakes_in_boxes(folder: Path, tmp_path: Path, text: str, message: str):
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(f"folder:{folder}?boxes={tmp_path / 'boxes.csv'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: line 1"),
        ("[1, 2]", "must be"),
        ('{"cats/a.jpg": [7]}', "cats/a.jpg: a box is x0"),
        ('{"cats/a.jpg": [[1, 2, 3, null]]}', "a box is x0"),
    ],
)
def test_mistakes_in_json_boxes(folder: Path, tmp_path: Path, text: str, message: str):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_source(f"folder:{folder}?boxes={tmp_path / 'boxes.json'}")


def test_mistakes_in_label_maps(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no annotation there belongs to any"):
        open_source(f"folder:{folder}?masks={tmp_path}")
    masks = tmp_path / "masks"
    Image.fromarray(np.ones((10, 20), np.uint8)).save(masks.parent / "good.png")
    (masks / "cats").mkdir(parents=True)
    (masks.parent / "good.png").rename(masks / "cats" / "a.png")
    source = open_source(f"folder:{folder}?masks={masks}")
    image(masks / "cats" / "a.png")
    with pytest.raises(DataError, match="one channel"):
        source[0]
    (masks / "cats" / "a.png").write_bytes(b"rubbish")
    with pytest.raises(BadImage, match=r"cats/a.jpg: its label map .* cannot be read"):
        source[0]
    with pytest.raises(
        DataError, match=r"1 of 1 annotated images .*cats/a.jpg: its label map .* cannot be read"
    ):
        open_source(f"folder:{folder}?masks={masks}")


# -- Tiny ImageNet ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    root = tmp_path / "tiny"
    root.mkdir()
    (root / "wnids.txt").write_text("n02\nn01\n")
    (root / "words.txt").write_text("n01\tcat, feline\nn02\tdog\nn03\tother\n")
    for wnid in ("n01", "n02"):
        lines = []
        for k, box in enumerate(["0\t0\t31\t63", "16\t32\t47\t47", "63\t0\t63\t10"]):
            image(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", 64, 64)
            lines.append(f"{wnid}_{k}.JPEG\t{box}\n")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("".join(lines) + "n01_99.JPEG\t0\t0\t5\t5\n")
    for k in range(2):
        image(root / "val" / "images" / f"val_{k}.JPEG", 64, 64)
    (root / "val" / "val_annotations.txt").write_text(
        "val_1.JPEG\tn02\t0\t0\t63\t63\nval_0.JPEG\tn01\t8\t8\t15\t23\n"
    )
    return root


def test_tiny_imagenet(tiny: Path):
    train, test = open_source(f"tinyimagenet:{tiny}"), open_source(f"tinyimagenet:{tiny}", "test")
    for source, count in ((train, 6), (test, 2)):
        check(source)
        assert len(source) == count
        assert source.classes == ("n01 cat", "n02 dog")
    assert [train[i].label for i in range(6)] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(objects_of(train[0]).boxes, [[0, 0, 0.5, 1]])
    np.testing.assert_allclose(objects_of(train[1]).boxes, [[0.25, 0.5, 0.75, 0.75]])
    assert train[2].objects is None  # nothing but an edge is left of its object
    assert [test[i].label for i in range(2)] == [0, 1]
    np.testing.assert_allclose(objects_of(test[0]).boxes, [[0.125, 0.125, 0.25, 0.375]])
    labels = objects_of(test[0]).labels
    assert labels is not None
    assert labels.tolist() == [0]
    assert identity_of(open_source(f"tinyimagenet:{tiny}?split=val")).digest == identity_of(test).digest
    assert train.name != test.name


def test_tiny_imagenet_mistakes(tiny: Path):
    (tiny / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn09\t8\t8\t15\t23\nval_1.JPEG\tn01\t8\t8\t15\t23\n"
    )
    with pytest.raises(DataError, match=r"val_0.JPEG"):
        open_source(f"tinyimagenet:{tiny}", "test")
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t8\t8\t15\t23\n")
    with pytest.raises(DataError, match=r"1 images are not listed, such as val/images/val_1.JPEG"):
        open_source(f"tinyimagenet:{tiny}", "test")
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\n")
    with pytest.raises(DataError, match="line 1: 2 fields where 6 are expected"):
        open_source(f"tinyimagenet:{tiny}", "test")
    (tiny / "wnids.txt").unlink()
    with pytest.raises(DataError, match=r"no file .*wnids.txt"):
        open_source(f"tinyimagenet:{tiny}")


def test_real_tiny_imagenet(data_folder: Path, tmp_path: Path):
    import zipfile

    with zipfile.ZipFile(data_folder / "tiny-imagenet-100-val.zip") as archive:
        archive.extractall(tmp_path)
    source = open_source(f"tinyimagenet:{next(tmp_path.rglob('wnids.txt')).parent}", "test")
    assert len(source) == 5000
    assert source.classes is not None
    assert len(source.classes) == 100
    assert np.bincount([source[i].label or 0 for i in range(5000)]).tolist() == [50] * 100
    assert decode(source[17].image).shape == (64, 64, 3)


# -- ImageNet ---------------------------------------------------------------------------------------------


XML = (
    """<annotation><filename>%s</filename><size><width>{}</width><height>{}</height></size>{}</annotation>"""
)
BOX = (
    "<object><name>rose</name><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for half in ("train", "val"):
        for wnid in ("n02", "n01"):
            for k in range(2):
                image(tmp_path / "in1k" / half / wnid / f"{wnid}_{half}_{k}.JPEG")
    annotations = tmp_path / "boxes" / "train" / "n01"
    annotations.mkdir(parents=True)
    # Shown to annotators at 80x80, not the 40x20 of the file; corners swapped, beyond the edge, without area.
    boxes = [BOX.format(*b) for b in ((20, 40, 60, 80), (80, 20, 40, 0), (-8, 60, 88, 90), (9, 9, 9, 20))]
    (annotations / "n01_train_1.xml").write_text(XML.format(80, 80, "".join(boxes)))
    return tmp_path


def test_imagenet(imagenet: Path):
    plain = open_source(f"imagenet:{imagenet / 'in1k'}")
    check(plain)
    assert plain.classes == ("n01", "n02")
    assert [plain[i].label for i in range(4)] == [0, 0, 1, 1]
    assert not plain.has_objects
    source = open_source(f"imagenet:{imagenet / 'in1k'}?boxes={imagenet / 'boxes'}")
    check(source)
    assert identity_of(source).digest != identity_of(plain).digest
    assert [source[i].objects is None for i in range(4)] == [True, False, True, True]
    objects = objects_of(source[1])
    np.testing.assert_allclose(
        objects.boxes, [[0.25, 0.5, 0.75, 1], [0.5, 0, 1, 0.25], [0, 0.75, 1, 1]], rtol=1e-6
    )
    assert objects.labels is not None
    assert objects.labels.tolist() == [0, 0, 0]
    test = open_source(f"imagenet:{imagenet / 'in1k'}", "test")
    assert test[0].name == "n01/n01_val_0.JPEG"


def test_imagenet_as_kaggle_packs_it(imagenet: Path):
    root = imagenet / "kaggle"
    for k in range(3):
        image(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / f"ILSVRC2012_val_{k:08d}.JPEG")
    with pytest.raises(DataError, match=r"no LOC_val_solution.csv"):
        open_source(f"imagenet:{root}", "test")
    table = root / "LOC_val_solution.csv"
    table.write_text(
        "ImageId,PredictionString\n"
        + "".join(f"ILSVRC2012_val_{k:08d},n0{3 - k} 1 2 3 4 \n" for k in range(3))
    )
    boxes = root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
    boxes.mkdir(parents=True)
    (boxes / "ILSVRC2012_val_00000002.xml").write_text(XML.format(40, 20, BOX.format(0, 0, 20, 20)))
    source = open_source(f"imagenet:{root}?boxes={root / 'ILSVRC'}", "test")
    check(source)
    assert [source[i].label for i in range(3)] == [2, 1, 0]
    np.testing.assert_allclose(objects_of(source[2]).boxes, [[0, 0, 0.5, 1]])
    table.write_text("ImageId,PredictionString\nILSVRC2012_val_00000000,n01 1 2 3 4\n")
    with pytest.raises(DataError, match="says nothing about 2 images"):
        open_source(f"imagenet:{root}", "test")


@pytest.mark.parametrize(
    ("kind", "lacks", "expected", "otherwise"),
    [
        ("tinyimagenet", "no file .*wnids.txt", "wnids.txt, train/<wnid>/images", "folder:"),
        ("imagenet", "no folder train", "train/<wnid>", "folder:"),
        ("imagenetv2", "has a.png", "folders 0 to 999", "folder:"),
        ("imagenet-a", "has a.png", "folders named by ImageNet's wnids", "folder:"),
        ("objectnet", "no folder mappings", "the folders images and mappings", "folder:"),
        ("voc", "no folder SegmentationClass", "JPEGImages, SegmentationClass", "masks:"),
        ("ade20k", "no folder images/training", "images/training, annotations/training", "masks:"),
        ("cityscapes", "no folder leftImg8bit/train", "leftImg8bit/<split>/<city>", "masks:"),
        ("camvid", "no train/images with train/labels", "<split>/images and <split>/labels", "masks:"),
    ],
)
def test_a_plain_folder_is_told_what_was_expected_and_what_reads_it(
    tmp_path: Path, kind: str, lacks: str, expected: str, otherwise: str
):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"^{kind}: .*{lacks}.*; expected {expected}.* \({otherwise} reads"):
        open_source(f"{kind}:{tmp_path}")


def test_imagenet_mistakes(imagenet: Path):
    with pytest.raises(DataError, match=r"no folder train in .*; expected train/<wnid>.*folder: reads"):
        open_source(f"imagenet:{imagenet / 'in1k' / 'train'}")
    with pytest.raises(DataError, match="no annotation there belongs to any"):
        open_source(f"imagenet:{imagenet / 'in1k'}?boxes={imagenet / 'boxes'}", "test")
    where = imagenet / "boxes" / "train" / "n01" / "n01_train_1.xml"
    source = open_source(f"imagenet:{imagenet / 'in1k'}?boxes={imagenet / 'boxes'}")
    for text in (
        "",
        "<annotation>",
        "<annotation/>",
        XML.format(0, 0, ""),
        XML.format(9, 9, BOX.format(1, 2, 3, "")),
    ):
        where.write_text(text)
        with pytest.raises(BadImage, match=r"n01/n01_train_1.JPEG: its annotation .* cannot be read"):
            source[1]


# -- COCO -------------------------------------------------------------------------------------------------


def coco_tree() -> dict:
    blob = np.zeros((20, 40), np.uint8, order="F")
    blob[5:15, 10:30] = 1
    rle = coco.encode(blob)
    rle["counts"] = rle["counts"].decode()
    plain = {"size": [20, 40], "counts": [205, 10] + [10, 10] * 19 + [205]}
    square = [8, 4, 16, 4, 16, 12, 8, 12]
    annotations = [
        {"image_id": 9, "category_id": 3, "bbox": [8, 4, 8, 8], "area": 64, "segmentation": [square]},
        {"image_id": 9, "category_id": 90, "bbox": [10, 5, 20, 10], "area": 200, "segmentation": rle},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 40, 20], "iscrowd": 1, "segmentation": rle},
        {"image_id": 9, "category_id": 3, "bbox": [10, 5, 20, 10], "area": 200, "segmentation": plain},
        {"image_id": 4, "category_id": 90, "bbox": [0, 0, 20, 10], "iscrowd": 0},
        {"image_id": 4, "category_id": 90, "bbox": [5, 5, 0, 10], "area": 0, "segmentation": [[5, 5, 5, 15]]},
    ]
    images = [{"id": k, "file_name": f"{k:03}.jpg", "width": 40, "height": 20} for k in (9, 4, 5)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}],
    }


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    for k in (9, 4, 5):
        image(tmp_path / "images" / f"{k:03}.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(coco_tree()))
    return tmp_path


def test_coco(coco_folder: Path):
    source = open_source(f"coco:{coco_folder / 'images'}?annotations={coco_folder / 'instances.json'}")
    check(source)
    assert source.classes == ("car", "zebra")
    assert [source[i].name for i in range(3)] == ["004.jpg", "005.jpg", "009.jpg"]
    assert source[0].label is None
    assert source[1].objects is None
    np.testing.assert_allclose(objects_of(source[0]).boxes, [[0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(objects_of(source[0]).areas, [0.25])
    objects = objects_of(source[2])
    assert objects.labels is not None
    assert objects.labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(objects.areas, [0.08, 0.25, 0.25])
    want = np.zeros((20, 20), np.uint8)
    want[5:15, 5:15] = 255
    assert np.array_equal(objects.draw(1, 20), want)
    assert np.array_equal(objects.draw(2, 20), want)
    want[:] = 0
    want[4:12, 4:8] = 255
    assert np.array_equal(objects.draw(0, 20), want)


def change_coco(folder: Path, change) -> str:
    tree = coco_tree()
    change(tree)
    (folder / "instances.json").write_text(json.dumps(tree))
    return f"coco:{folder / 'images'}?annotations={folder / 'instances.json'}"


def test_coco_mistakes(coco_folder: Path):
    for change, message in (
        (lambda t: t.pop("images"), "has no list 'images'"),
        (lambda t: t["images"].clear(), "lists no images"),
        (lambda t: t["annotations"][0].update(image_id=77), "not as COCO instances are: KeyError 77"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2]), r"of image 9: bbox \[1, 2\] is not x, y"),
        (
            lambda t: t["images"].append(t["images"][0] | {"id": 1, "file_name": "x.jpg"}),
            "1 of 4 .* such as x.jpg",
        ),
    ):
        with pytest.raises(DataError, match=message):
            open_source(change_coco(coco_folder, change))
    with pytest.raises(DataError, match="needs annotations="):
        open_source(f"coco:{coco_folder / 'images'}")
    for text, message in (('{"images": [', "is not JSON: line 1, column 13"), ("\xff\xfe", "is not JSON")):
        (coco_folder / "instances.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=message):
            open_source(f"coco:{coco_folder / 'images'}?annotations={coco_folder / 'instances.json'}")


# -- data strings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scense:", "unknown data 'scense:'; did you mean scenes:?"),
        ("http://x", "valid kinds: scenes:, folder:"),
        ("", "unknown data"),
        ("scenes:/path", "is built in and has no path"),
        ("scenes:?sise=3", "scenes: has no option 'sise'; did you mean size?"),
        ("scenes:?size=big", "scenes: option 'size=big' needs a whole number"),
        ("scenes:?size=16", "size=16 must be from 32"),
        ("scenes:?objects=5-2", "must be a range within 1-9"),
        ("scenes:?objects=a-b", "needs a range such as 2-5"),
        ("scenes:?count=0", "count=0 must be from 1"),
        ("scenes:?size=64&size=32", "needs a value, once"),
        ("scenes:?size", "needs a value, once"),
        ("scenes:?split=dev", "needs train or test"),
        ("folder:", "needs a folder, as in folder:/path"),
        ("folder:/no/such/place", "folder: no folder /no/such/place"),
        ("folder:/tmp?boxes=/no/such.csv", "needs a path that exists"),
        ("folder:/tmp?limit=0", "'limit=0' needs at least 1"),
        (
            "folder:/tmp?zzzz=1",
            "has no option 'zzzz'; valid: boxes, masks, ignore, limit, seed, range, pages",
        ),
    ],
)
def test_mistakes_in_data_strings(spec: str, message: str):
    with pytest.raises(DataError) as caught:
        open_source(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistaken_folders(tmp_path: Path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"images is empty"):
        open_source(f"folder:{tmp_path / 'images'}")
    with pytest.raises(DataError, match=r"no folder .*/imags; did you mean .*/images\?"):
        open_source(f"folder:{tmp_path / 'imags'}")
    with pytest.raises(DataError, match=r"needs a kind in front; did you mean folder:/"):
        open_source(str(tmp_path / "images"))
    (tmp_path / "images" / "a.txt").write_text("")
    (tmp_path / "images" / "b.XYZ").write_text("")
    with pytest.raises(DataError, match=r"holds no images \(.* \.jpg .*\), but 1 \.txt, 1 \.xyz"):
        open_source(f"folder:{tmp_path / 'images'}")
    with pytest.raises(DataError, match=r"a\.txt is a file, but a folder is needed"):
        open_source(f"folder:{tmp_path / 'images' / 'a.txt'}")
    image(tmp_path / "images" / "a.jpg")
    (tmp_path / "b.csv").write_text("a.jpg,1,1,2,2")
    with pytest.raises(DataError, match="not both"):
        open_source(f"folder:{tmp_path / 'images'}?boxes={tmp_path / 'b.csv'}&masks={tmp_path}")


def test_scenes_string():
    source = open_source("scenes:?size=40&count=7&seed=3&objects=3", "test")
    check(source)
    assert len(source) == 7
    assert decode(source[0].image).shape == (40, 40, 3)
    assert (
        identity_of(open_source(source.name)).digest == identity_of(source).digest
    )  # the name is the whole truth
    assert (
        identity_of(open_source("scenes:?split=test")).digest
        == identity_of(open_source("scenes:", "test")).digest
    )


def test_escaped_paths(tmp_path: Path):
    image(tmp_path / "a?b&c" / "x.jpg")
    assert len(open_source(f"folder:{tmp_path}/a%3Fb&c")) == 1
