"""Test sets beside ImageNet, lists of images, and class folders: labels mean ImageNet's classes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.identity import identity_of
from foveola.data.imagenet import Variant, wnids
from foveola.data.sample import DataError
from foveola.data.sources import decode, open_source


def image(path: Path, colour: tuple[int, int, int] = (9, 99, 199), side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)
    return path


def labels_of(spec: str) -> dict[str, int | None]:
    source = open_source(spec, "test")
    again = pickle.loads(pickle.dumps(source))
    assert identity_of(again).digest == identity_of(source).digest
    return {source[i].name: source[i].label for i in range(len(source))}


def test_the_list_of_classes():
    assert len(wnids()) == 1000
    assert wnids() == sorted(wnids())
    assert (wnids()[0], wnids()[999]) == ("n01440764", "n15075141")  # tench, toilet tissue


def test_v2_folders_are_numbers_not_text(tmp_path: Path):
    for folder in ("0", "1", "10", "100", "2", "999"):
        image(tmp_path / folder / "a.jpeg")
    assert labels_of(f"imagenetv2:{tmp_path}") == {f"{n}/a.jpeg": n for n in (0, 1, 10, 100, 2, 999)}
    assert open_source(f"imagenetv2:{tmp_path}").classes == tuple(wnids())
    image(tmp_path / "1000" / "a.jpeg")
    with pytest.raises(DataError, match="has 1000; expected folders 0 to 999"):
        open_source(f"imagenetv2:{tmp_path}")


def test_a_restricts_the_candidates(tmp_path: Path):
    for number in (6, 11, 987):
        image(tmp_path / wnids()[number] / "a.jpg")
    source = open_source(f"imagenet-a:{tmp_path}")
    assert isinstance(source, Variant)
    assert source.candidates == (6, 11, 987)
    assert [source[i].label for i in range(3)] == [6, 11, 987]
    image(tmp_path / "cats" / "a.jpg")
    with pytest.raises(DataError, match="has cats; expected folders named by ImageNet's wnids"):
        open_source(f"imagenet-a:{tmp_path}")


def test_real_has_lists_of_answers(tmp_path: Path):
    for number in (1, 2, 3):
        image(tmp_path / "in1k" / "val" / wnids()[number] / f"ILSVRC2012_val_0000000{number}.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[5, 7], [], [3]]))
    source = open_source(f"imagenet-real:{tmp_path / 'in1k'}?labels={tmp_path / 'real.json'}")
    assert isinstance(source, Variant)
    assert [source[i].name[-10:] for i in range(len(source))] == ["00001.JPEG", "00003.JPEG"]
    assert [source.answers(i).tolist() for i in range(2)] == [[5, 7], [3]]  # an empty list is left out
    assert source[0].label == 5
    for content, match in (
        ([[5]], "1 lists, and none for .*00002.JPEG"),
        ({"a": 1}, "must be a list of lists"),
        ([[5], [1000], [3]], "class numbers from 0 to 999"),
    ):
        (tmp_path / "real.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=match):
            open_source(f"imagenet-real:{tmp_path / 'in1k'}?labels={tmp_path / 'real.json'}")


@pytest.fixture
def objectnet(tmp_path: Path) -> Path:
    base = tmp_path / "objectnet-1.0"
    tables = {
        "folder_to_objectnet_label.json": {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock"},
        "objectnet_to_imagenet_1k.json": {"Alarm clock": "analog clock; digital clock"},
        "pytorch_to_imagenet_2012_id.json": {"409": 1, "530": 0, "3": 2},
    }
    (base / "mappings").mkdir(parents=True)
    for name, table in tables.items():
        (base / "mappings" / name).write_text(json.dumps(table))
    (base / "mappings" / "imagenet_to_label_2012_v2").write_text("digital clock\nanalog clock\nshark\n")
    for folder in tables["folder_to_objectnet_label.json"]:
        path = image(base / "images" / folder / "a.png")
        pixels = np.array(Image.open(path))
        pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:] = ([255, 0, 0],) * 4  # the red frame
        Image.fromarray(pixels).save(path)
    return base


def test_objectnet(objectnet: Path):
    source = open_source(f"objectnet:{objectnet.parent}")
    assert isinstance(source, Variant)
    assert [source[i].name for i in range(len(source))] == [
        "alarm_clock/a.png"
    ]  # the other is not ImageNet's
    assert source.answers(0).tolist() == [409, 530]
    assert source.candidates == (409, 530)
    pixels = decode(source[0].image)
    assert pixels.shape == (20, 20, 3)
    assert (pixels == (9, 99, 199)).all()
    assert decode(open_source(f"objectnet:{objectnet}?border=0")[0].image).shape == (24, 24, 3)


def test_objectnet_mistakes(objectnet: Path):
    image(objectnet / "images" / "banana" / "a.png")
    with pytest.raises(DataError, match="no label for the folder banana"):
        open_source(f"objectnet:{objectnet}")
    (objectnet / "mappings" / "objectnet_to_imagenet_1k.json").write_text('{"Alarm clock": "sundial"}')
    with pytest.raises(DataError, match="does not name 'sundial'"):
        open_source(f"objectnet:{objectnet}")
    with pytest.raises(DataError, match="no folder mappings"):
        open_source(f"objectnet:{objectnet / 'images'}")


# -- lists and folders ------------------------------------------------------------------------------------


def test_places_list(tmp_path: Path):
    for name in ("a/abbey/1.jpg", "z/zoo/2.jpg"):
        image(tmp_path / name)
    (tmp_path / "val.csv").write_text("/a/abbey/1.jpg 0\nz/zoo/2.jpg 3\n")
    spec = f"listed:{tmp_path}?files={tmp_path / 'val.csv'}"
    assert labels_of(spec) == {"a/abbey/1.jpg": 0, "z/zoo/2.jpg": 3}
    assert open_source(spec).classes == ("0", "1", "2", "3")
    (tmp_path / "names.txt").write_text("abbey\nairport\nbar\n")
    with pytest.raises(DataError, match=r"label 3, but .*names.txt names 3 classes"):
        open_source(f"{spec}&classes={tmp_path / 'names.txt'}")


def test_sun_partition(tmp_path: Path):
    """Class names are nested folders; `a/arch` and `a/arch/inner` are two classes."""
    for name in ("a/arch/sun 1.jpg", "a/arch/inner/sun 2.jpg", "b/bar/sun 3.jpg"):
        image(tmp_path / name)
    (tmp_path / "Training_01.txt").write_text("/a/arch/sun 1.jpg\n/a/arch/inner/sun 2.jpg\n")
    (tmp_path / "Testing_01.txt").write_text("/b/bar/sun 3.jpg\n")
    (tmp_path / "ClassName.txt").write_text("/a/arch\n/a/arch/inner\n/b/bar\n")
    names = f"&classes={tmp_path / 'ClassName.txt'}"
    train = f"listed:{tmp_path}?files={tmp_path / 'Training_01.txt'}{names}"
    assert labels_of(train) == {"a/arch/sun 1.jpg": 0, "a/arch/inner/sun 2.jpg": 1}
    assert labels_of(train.replace("Training", "Testing")) == {"b/bar/sun 3.jpg": 2}
    assert open_source(train).classes == ("a/arch", "a/arch/inner", "b/bar")


def test_lists_of_other_forms(tmp_path: Path):
    for name in ("x.jpg", "y z.jpg"):
        image(tmp_path / name)
    for text in ("x.jpg,owl\ny z.jpg,wren\n", "x.jpg\towl\ny z.jpg\twren\n", "x.jpg owl\ny z.jpg wren\n"):
        (tmp_path / "list").write_text(text)
        assert labels_of(f"listed:{tmp_path}?files={tmp_path / 'list'}") == {"x.jpg": 0, "y z.jpg": 1}


def test_list_mistakes(tmp_path: Path):
    image(tmp_path / "x.jpg")
    spec = f"listed:{tmp_path}?files={tmp_path / 'list'}"
    with pytest.raises(DataError, match="listed: needs files="):
        open_source(f"listed:{tmp_path}")
    for text, match in (
        ("x.jpg,1\nx.jpg\n", "every line is `path label`, or every line is `path`"),
        ("\n", "and there is a line"),
        ("gone.jpg 1\n", "1 of 1 listed images are missing, such as gone.jpg"),
    ):
        (tmp_path / "list").write_text(text)
        with pytest.raises(DataError, match=match):
            open_source(spec)


def test_inaturalist_by_class_folders(tmp_path: Path):
    """The prefix of a folder is the class: sorted as text it is sorted by number."""
    names = [f"{n:05d}_Animalia_{word}" for n, word in enumerate(("zebra", "ant", "bee"))]
    for half in ("train_mini", "val"):
        for name in names:
            image(tmp_path / half / name / "a.jpg")
    assert labels_of(f"folder:{tmp_path / 'val'}") == {f"{name}/a.jpg": n for n, name in enumerate(names)}
    assert open_source(f"folder:{tmp_path / 'train_mini'}").classes == tuple(names)
