"""`annotations=`: the objects of a COCO file for the images of any source, by their names."""

import json
import pickle
from copy import copy
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from foveola.data.identity import identity_of
from foveola.data.listing import find_images
from foveola.data.sample import DataError, Sample, full_mask
from foveola.data.sources import Source, open_source, with_objects

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
MASK = np.zeros((12, 16), bool)
MASK[2:7, 3:15] = True
MASK[9, 9] = True


def coco(path: Path, names: dict[str, list[dict]], classes: tuple = ("object",), size=(16, 12)) -> Path:
    """Write a file that gives each named image these annotations: a mask in a box, but for what they say."""
    from foveola.data.coco import rle_of

    images = [
        {"id": k, "file_name": name, "width": size[0], "height": size[1]} for k, name in enumerate(names, 1)
    ]
    plain = {"bbox": [3, 2, 12, 8], "area": int(MASK.sum()), "iscrowd": 0, "category_id": 1}
    mask = {"segmentation": rle_of(MASK)} if size == (16, 12) else {}
    some = [
        {"image_id": image["id"], **plain, **mask, **each}
        for image, each_image in zip(images, names.values(), strict=True)
        for each in each_image
    ]
    tree = {
        "images": images,
        "annotations": [each | {"id": k} for k, each in enumerate(some, 1)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
    }
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of 16x12 pixels in two class folders; EXIF turns one."""
    folder = tmp_path / "my images"
    rng = np.random.default_rng(0)
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "dog/turned.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        turned = name.endswith("jpg")
        pixels = rng.integers(0, 255, (16, 12, 3) if turned else (12, 16, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if turned else 1
        Image.fromarray(pixels).save(folder / name, exif=exif)
    return folder


def opened(images: Path, file: Path, options: str = "", kind: str = "folder") -> Source:
    return open_source(f"{kind}:{quote(str(images))}?annotations={quote(str(file))}{options}")


def by_name(source: Source) -> dict[str, Sample]:
    return {source[index].name: source[index] for index in range(len(source))}


def test_objects_without_classes_have_the_label_of_their_image(images: Path, tmp_path: Path):
    names = {"cat/a.png": [{"score": 0.5}], "dog/turned.jpg": [{"score": 0.25}, {"score": 1}], "b.png": []}
    source = opened(images, coco(tmp_path / "o.json", names))
    assert source.classes == ("cat", "dog")
    assert source.has_objects
    samples = by_name(source)
    assert {name for name, sample in samples.items() if sample.objects} == {"cat/a.png", "dog/turned.jpg"}
    for name, count in (("cat/a.png", 1), ("dog/turned.jpg", 2)):
        objects = samples[name].objects
        assert objects is not None
        assert objects.labels is not None
        assert objects.labels.tolist() == [samples[name].label] * count
        assert np.array_equal(full_mask(objects.masks[0]), MASK)  # type: ignore[index]
        assert objects.scores is not None
    assert samples["dog/turned.jpg"].objects.scores.tolist() == [0.25, 1.0]  # type: ignore[union-attr]
    assert source.with_objects() == 2  # type: ignore[attr-defined]
    note = "names 3 of 4 images; those that it leaves out have no objects, such as dog/a.png"
    assert source.notes[-1].endswith(note)  # type: ignore[attr-defined]
    source.keep(np.array([0, 1, 3]))  # type: ignore[attr-defined]
    assert list(by_name(source)) == ["cat/a.png", "cat/b.png", "dog/turned.jpg"]
    assert source.notes == ()  # type: ignore[attr-defined]


def test_classes_of_the_file_come_behind_those_of_the_images(images: Path, tmp_path: Path):
    names = {"cat/a.png": [{"category_id": 1}, {"category_id": 2}], "cat/b.png": [{"iscrowd": 1}]}
    source = opened(images, coco(tmp_path / "o.json", names, ("tail", "dog")))
    assert source.classes == ("cat", "dog", "tail")
    samples = by_name(source)
    assert samples["cat/a.png"].objects.labels.tolist() == [2, 1]  # type: ignore[union-attr]
    assert samples["cat/a.png"].label == 0
    assert samples["cat/b.png"].objects is None
    assert len(samples["cat/b.png"].crowds) == 1  # type: ignore[arg-type]


def test_parts_of_the_data_keep_their_objects(images: Path, tmp_path: Path):
    names = {"cat/a.png": [{}], "dog/a.png": [{"bbox": [0, 0, 4, 4]}], "dog/turned.jpg": [{}]}
    file = coco(tmp_path / "o.json", names)
    whole = by_name(opened(images, file))
    for options in ("&limit=2&seed=1", "&holdout=0.5", "&holdout=0.5&split=test"):
        part = opened(images, file, options)
        assert len(part) == 2
        for name, sample in by_name(part).items():
            want = whole[name].objects
            assert (sample.objects is None) == (want is None)
            assert want is None or np.array_equal(sample.objects.boxes, want.boxes)  # type: ignore[union-attr]
    source = opened(images, file)
    left = copy(source)
    left.keep(np.array([2, 3]))  # type: ignore[attr-defined]
    assert (len(source), len(left)) == (4, 2)
    assert left[0].objects is not None
    assert np.array_equal(left[0].objects.boxes, whole["dog/a.png"].objects.boxes)  # type: ignore[union-attr]
    assert by_name(pickle.loads(pickle.dumps(left))).keys() == {"dog/a.png", "dog/turned.jpg"}


def test_the_identity_is_that_of_images_and_objects(images: Path, tmp_path: Path):
    names = {"cat/a.png": [{}], "dog/a.png": [{}]}
    first = identity_of(opened(images, coco(tmp_path / "o.json", names)))
    copied = tmp_path / "elsewhere.json"
    assert identity_of(opened(images, coco(copied, names))).digest == first.digest
    other = {"cat/b.png": [{}], "dog/a.png": [{}]}
    assert identity_of(opened(images, coco(tmp_path / "p.json", other))).digest != first.digest
    moved = {"cat/a.png": [{"bbox": [2, 2, 12, 8]}], "dog/a.png": [{}]}
    assert identity_of(opened(images, coco(tmp_path / "q.json", moved))).digest != first.digest
    assert (first.contents == identity_of(open_source(f"folder:{quote(str(images))}")).contents).all()


def test_every_kind_of_data_reads_it(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scenes = coco(tmp_path / "s.json", {f"scenes/train/{k}": [{}] for k in (1, 3)}, size=(32, 32))
    source = open_source(f"scenes:?size=32&count=4&annotations={scenes}")
    assert [source[k].objects is not None for k in range(4)] == [False, True, False, True]
    assert source[1].objects.labels.tolist() == [source[1].label]  # type: ignore[union-attr]
    assert open_source(source.name)[3].objects is not None  # its name opens it again
    file = coco(tmp_path / "o.json", {"cat/a.png": [{}]})
    assert by_name(opened(images, file, kind="coco"))["cat/a.png"].objects is not None
    imagenet = tmp_path / "imagenet"
    imagenet.mkdir()
    (imagenet / "train").symlink_to(images)
    assert by_name(opened(imagenet, file, kind="imagenet"))["cat/a.png"].objects.labels.tolist() == [0]  # type: ignore[union-attr]
    lines = "\n".join(find_images(images).files)
    (tmp_path / "list.txt").write_text(lines)
    listed = opened(images, file, f"&files={tmp_path / 'list.txt'}", kind="listed")
    assert by_name(listed)["cat/a.png"].objects is not None
    (tmp_path / "my_data.py").write_text(
        "from foveola import open_source\ndef images(path):\n    return open_source('folder:' + path)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = open_source(f"my_data:images?path={quote(quote(str(images)))}&annotations={file}")
    assert by_name(own)["cat/a.png"].objects is not None
    assert by_name(with_objects(open_source(f"folder:{quote(str(images))}"), file))["cat/a.png"].objects


def test_rows_of_the_hub_read_it(images: Path, tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"image": [str(images / "cat/a.png"), str(images / "dog/a.png")]})
    table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    source = opened(tmp_path / "saved", coco(tmp_path / "o.json", {"row 1": [{}]}), kind="hf")
    assert [source[k].objects is not None for k in range(2)] == [False, True]
    assert np.array_equal(full_mask(source[1].objects.masks[0]), MASK)  # type: ignore[union-attr, index]


def test_what_is_refused(images: Path, tmp_path: Path):
    file = tmp_path / "o.json"
    for names, message in (
        ({"b.png": [{}], "cat/b.png": [{}]}, r"names the image cat/b\.png more than once"),
        ({"a.png": [{}]}, "1 of 1 images that it names are missing"),  # two images have this name
        ({"../secret.png": [{}]}, r"names '\.\./secret\.png', which is not below the folder of images"),
        ({"/etc/passwd": [{}]}, "names '/etc/passwd', which is not below"),
        ({"cat/../../a.png": [{}]}, "which is not below"),
        ({"cat/a.png": [{"score": None}]}, "score None"),
    ):
        with pytest.raises(DataError, match=message):
            opened(images, coco(file, names))
    tree = json.loads(coco(file, {"cat/a.png": []}).read_text())
    tree["images"][0]["file_name"] = 3
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"o\.json: not as COCO instances are"):
        opened(images, file)
    with pytest.raises(DataError, match=r"needs a path that exists"):
        opened(images, tmp_path / "nowhere.json")
    coco(file, {"cat/a.png": [{}]})
    with pytest.raises(DataError, match="folder: takes masks= or annotations=, not both"):
        opened(images, file, f"&masks={quote(str(images))}")
    with pytest.raises(DataError, match=r"no option 'anotations'; did you mean annotations"):
        open_source(f"folder:{quote(str(images))}?anotations={file}")
    pixels = coco(file, {"scenes/train/0": [{}]}, ("bird",), size=(32, 32))
    with pytest.raises(DataError, match="its class 'bird' is none of the classes of the pixels of scenes:"):
        open_source(f"scenes:?size=32&count=2&background=class&annotations={pixels}")


def test_objects_of_an_image_of_another_size_are_not_laid_on_it(images: Path, tmp_path: Path):
    names = {name: [{}] for name in ("cat/a.png", "cat/b.png", "dog/a.png")}
    with pytest.raises(DataError, match=r"3 of 3 annotated images looked at do not fit .*16x12 pixels, its"):
        opened(images, coco(tmp_path / "o.json", names, size=(64, 12)))
