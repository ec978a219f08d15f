"""A run over data: what it writes, what it goes on with after a kill, and what it refuses."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import foveola
from foveola.config import UserError
from foveola.data.sample import DataError
from foveola.proposals.journal import Journal
from foveola.proposals.written import read_about, read_summary

ROOT = Path(__file__).resolve().parents[2]
# A proposer whose objects are the pixels brighter and darker than the mean; other processes read it, too.
BRIGHT = """
import time
import numpy as np
import foveola


class Bright:
    classes, batch_size = ("object",), 3

    def __init__(self, level=0.0, wait=0.0):
        self.level, self.wait, self.seen = level, wait, []

    def describe(self):
        return {"kind": "bright", "level": self.level}

    def propose(self, images):
        time.sleep(self.wait)
        self.seen.append([image.shape for image in images])
        return [self.of(image.mean(2)) for image in images]

    def of(self, grey):
        masks = np.stack([grey > grey.mean() + self.level, grey < grey.mean() - self.level])
        boxes = np.tile(np.array([[0, 0, grey.shape[1], grey.shape[0]]], np.float32), (2, 1))
        scores = np.array([grey[mask].mean() if mask.any() else 0 for mask in masks], np.float32)
        return foveola.Proposals(boxes, scores, np.zeros(2, np.int64), masks)
"""
space: dict = {}
exec(BRIGHT, space)
Bright = space["Bright"]
DATA = "scenes:?size=32&count=20"


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, forked):
    whole = foveola.propose(Bright(), DATA, out=tmp_path / "whole", progress=False, sheet=0)
    assert not (tmp_path / "whole" / "objects.unfinished").exists()
    out = tmp_path / "killed"
    code = f"{BRIGHT}\nfoveola.propose(Bright(wait=0.3), {DATA!r}, out={str(out)!r}, progress=False, sheet=0)"
    lines, late = out / "objects.unfinished" / "0.jsonl", time.monotonic() + 60
    with forked(code) as process:
        while not (lines.is_file() and lines.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < late, process.errors[0].read_text()
            time.sleep(0.02)
        process.kill()
        process.wait()
    done = lines.read_bytes().count(b"\n")
    assert 2 <= done < 7
    assert not (out / "objects.json").exists()
    with lines.open("ab") as file:  # as a kill in the midst of a line leaves it
        file.write(b'[{"index": 6, "file_na')
    again = Bright()
    foveola.propose(again, DATA, out=out, progress=False, sheet=0)
    assert len(again.seen) == 7 - done
    assert (out / "objects.json").read_bytes() == whole.file.read_bytes()
    assert not lines.parent.exists()


def test_several_processes_share_the_images(tmp_path: Path, run_ranks):
    code = f"""{BRIGHT}
import sys
from foveola import distributed
with distributed.joined("cpu"):
    proposer = Bright()
    foveola.propose(proposer, {DATA!r}, out=sys.argv[1], progress=False, sheet=0)
    print(sum(map(len, proposer.seen)))
"""
    printed = run_ranks(code, 2, [str(tmp_path / "two")])
    assert [int(text) for text in printed] == [9, 11]
    one = foveola.propose(Bright(), DATA, out=tmp_path / "one", progress=False, sheet=0)
    assert (tmp_path / "two" / "objects.json").read_bytes() == one.file.read_bytes()


def test_finished_work_is_not_done_again_and_other_work_is_refused(tmp_path: Path):
    first = foveola.propose(Bright(), DATA, out=tmp_path, progress=False, sheet=0, min_area=0.1)
    again = Bright()
    second = foveola.propose(again, DATA, out=tmp_path, progress=False, sheet=0, min_area=0.1, workers=0)
    assert not again.seen
    assert second.known
    assert second.table() == first.table().replace("objects.json", "objects.json (was there already)", 1)
    for proposer, data, settings, message in (
        (Bright(level=3.0), DATA, {"min_area": 0.1}, r"by\.level is 0\.0 there and 3\.0 here"),
        (Bright(), DATA, {}, r"kept\.min_area is 0\.1 there and 0\.0 here"),
        (Bright(), f"{DATA}&seed=1", {"min_area": 0.1}, "contents is 'content:.*give another out="),
    ):
        with pytest.raises(UserError, match=message):
            foveola.propose(proposer, data, out=tmp_path, progress=False, sheet=0, **settings)
    first.file.write_text("{}")
    with pytest.raises(UserError, match=r"objects\.json was not written by foveola masks"):
        foveola.propose(Bright(), DATA, out=tmp_path, progress=False, sheet=0)
    unfinished = tmp_path / "other"
    Journal(unfinished / "objects.unfinished").begin({"by": {"kind": "bright", "level": 9}})
    with pytest.raises(UserError, match=r"objects\.unfinished holds other work: by\.level is 9 there"):
        foveola.propose(Bright(), DATA, out=unfinished, progress=False, sheet=0)


def test_images_that_cannot_be_read_are_named_and_sizes_are_those_of_upright_images(tmp_path: Path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 30)), ("long.png", (4000, 9)), ("turned.jpg", (24, 16))):
        image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned.jpg" else 1
        image.save(folder / name, exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    found = foveola.propose(
        Bright(), f"folder:{folder}", out=tmp_path / "out", progress=False, sheet=0, workers=0
    )
    tree = json.loads(found.file.read_text())
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in tree["images"]}
    assert sizes == {"a.png": (40, 30), "long.png": (4000, 9), "turned.jpg": (16, 24)}
    assert [name for name, _ in found.summary.unreadable] == ["dot.png", "torn.jpg"]
    assert "unreadable images: 2: dot.png (1x1 pixels is less than 8 on a side)" in found.table()
    assert [text.split(":")[0] for text in tree["info"]["unreadable"]] == ["dot.png", "torn.jpg"]
    assert read_summary(found.file) == found.summary
    (folder / "a.png").rename(folder / "aa.png")
    with pytest.raises(UserError, match=r"objects\.json holds other work: names is '"):
        foveola.propose(Bright(), f"folder:{folder}", out=tmp_path / "out", progress=False, sheet=0)
    (folder / "aa.png").rename(folder / "a.png")
    for name in sizes:
        (folder / name).unlink()
    with pytest.raises(DataError, match=r"none of 2 images can be read, such as dot\.png \(1x1"):
        foveola.propose(Bright(), f"folder:{folder}", out=tmp_path / "none", progress=False, sheet=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_the_file_is_one_of_coco(tmp_path: Path, capsys):
    """By pycocotools, and by what its authors say of the format."""
    from pycocotools.coco import COCO

    found = foveola.propose(Bright(), DATA, out=tmp_path, progress=False, sheet=0)
    tree = json.loads(found.file.read_text())
    kinds = {
        "images": {"id": int, "width": int, "height": int, "file_name": str},
        "annotations": {
            "id": int,
            "image_id": int,
            "category_id": int,
            "segmentation": dict,
            "area": float,
            "bbox": list,
            "iscrowd": int,
        },
        "categories": {"id": int, "name": str, "supercategory": str},
    }
    assert {"info", "licenses", *kinds} == tree.keys()
    for part, needed in kinds.items():
        assert tree[part]
        for row in tree[part]:
            assert all(isinstance(row[name], kind) for name, kind in needed.items())
        assert len({row["id"] for row in tree[part]}) == len(tree[part])
    data = COCO(str(found.file))
    assert len(data.getAnnIds(iscrowd=False)) == sum(found.summary.counts) == len(tree["annotations"])
    proposer, source = Bright(), foveola.open_source(DATA)
    for index in range(3):
        of_image = data.loadAnns(data.getAnnIds(imgIds=index + 1))
        want = proposer.of(source[index].image.mean(2))
        order = np.argsort(-want.scores)
        for annotation, k in zip(of_image, order, strict=True):
            assert np.array_equal(data.annToMask(annotation).astype(bool), want.masks[k])
            assert annotation["area"] == want.masks[k].sum()
            assert annotation["score"] == pytest.approx(want.scores[k], abs=1e-6)
    about = read_about(found.file)
    assert about is not None
    assert about["by"] == {"kind": "bright", "level": 0.0}
    assert about["data"] == source.name
    capsys.readouterr()


class Boxes(Bright):
    """Boxes alone, prompted by those that the data have."""

    prompts = True

    def propose(self, images, objects):
        return [
            foveola.Proposals(
                each.boxes * np.float32([i.shape[1], i.shape[0]] * 2), each.areas, each.labels, None
            )
            for i, each in zip(images, objects, strict=True)
        ]


def test_prompts_and_boxes_alone(tmp_path: Path):
    proposer = Boxes()
    proposer.classes = foveola.open_source(DATA).classes
    found = foveola.propose(proposer, DATA, out=tmp_path / "a", progress=False, sheet=0, duplicate_iou=None)
    tree = json.loads(found.file.read_text())
    assert not any("segmentation" in each for each in tree["annotations"])
    first = foveola.open_source(DATA)[0].objects
    assert first is not None
    boxes = {tuple(each["bbox"]) for each in tree["annotations"] if each["image_id"] == 1}
    corners = {(x, y, x + w, y + h) for x, y, w, h in boxes}
    assert corners == {tuple(box) for box in (first.boxes * 32).tolist()}
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    with pytest.raises(UserError, match="has no objects, and this model is prompted by their boxes"):
        foveola.propose(Boxes(), f"folder:{folder}", out=tmp_path / "b", progress=False, sheet=0)


def test_a_link_that_leads_nowhere_yet_is_where_objects_go(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "masks")
    foveola.propose(Bright(), DATA, out=tmp_path / "link", progress=False, sheet=0)
    assert (tmp_path / "disk" / "masks" / "objects.json").is_file()


class Named:
    """Source of images with any names."""

    name, classes, has_objects = "named", None, False

    def __init__(self, *names: str) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> foveola.Sample:
        return foveola.Sample(np.full((8, 8, 3), index, np.uint8), self.names[index])


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="is not below the folder of images"):
        foveola.propose(Bright(), Named("a.png", name), out=tmp_path, progress=False, sheet=0)


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"named: images 0 and 2 are both named a\.png"):
        foveola.propose(Bright(), Named("a.png", "b.png", "a.png"), out=tmp_path, progress=False, sheet=0)
    for arguments, settings, message in (
        ((Bright(), DATA), {"min_scor": 1}, "unknown key 'min_scor'; did you mean 'min_score'"),
        ((Bright(), DATA), {"max_area": 2.0}, "max_area: must be <= 1, got 2"),
        ((Bright(), DATA, "runs/x"), {}, "model= has no effect: .*Bright finds the objects itself"),
        (("discoverr", DATA, "runs/x"), {}, "unknown kind of proposals 'discoverr'; did you mean 'discover'"),
    ):
        with pytest.raises(UserError, match=message):
            foveola.propose(*arguments, out=tmp_path / "x", progress=False, sheet=0, **settings)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file where a folder belongs: give another out="):
        foveola.propose(Bright(), DATA, out=tmp_path / "file", progress=False, sheet=0)


class Stopped(Bright):
    """Stops after three batches."""

    def propose(self, images):
        if len(self.seen) == 3:
            raise KeyboardInterrupt
        return super().propose(images)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [b"garbage\n", *lines],
        lambda lines: [lines[0], b"\0" * 99 + b"\n", *lines[1:]],
        lambda lines: [lines[0], lines[1][:99] + lines[1][200:], lines[2]],
        lambda lines: [lines[0], lines[1].replace(b'"found"', b'"fund"'), lines[2]],
        lambda lines: [lines[0], b"[1, 2]\n", b"7\n", *lines[1:]],
    ],
)
def test_damaged_lines_count_as_not_written(tmp_path: Path, damage):
    whole = foveola.propose(Bright(), DATA, out=tmp_path / "whole", progress=False, sheet=0)
    with pytest.raises(KeyboardInterrupt):
        foveola.propose(Stopped(), DATA, out=tmp_path / "out", progress=False, sheet=0)
    file = tmp_path / "out" / "objects.unfinished" / "0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(damage(lines)))
    kept = sum(line in file.read_bytes() for line in lines)
    again = Bright()
    foveola.propose(again, DATA, out=tmp_path / "out", progress=False, sheet=0)
    assert len(again.seen) == 7 - kept
    assert (tmp_path / "out" / "objects.json").read_bytes() == whole.file.read_bytes()


def test_damaged_files_are_named(tmp_path: Path):
    for text in ("{", "[]"):
        with pytest.raises(KeyboardInterrupt):
            foveola.propose(Stopped(), DATA, out=tmp_path / text, progress=False, sheet=0)
        (tmp_path / text / "objects.unfinished" / "work.json").write_text(text)
        with pytest.raises(UserError, match=r"work\.json is damaged: remove .*objects\.unfinished"):
            foveola.propose(Bright(), DATA, out=tmp_path / text, progress=False, sheet=0)
    file = foveola.propose(Bright(), DATA, out=tmp_path, progress=False, sheet=0).file
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"objects\.json is damaged .*give another out=, or remove it"):
        foveola.propose(Bright(), DATA, out=tmp_path, progress=False, sheet=0)


def test_a_folder_has_one_run_at_a_time(tmp_path: Path, forked):
    out = tmp_path / "out"
    code = f"{BRIGHT}\nfoveola.propose(Bright(wait=9), {DATA!r}, out={str(out)!r}, progress=False, sheet=0)"
    late = time.monotonic() + 60
    with forked(code) as process:
        while not (out / "objects.unfinished" / "work.json").is_file():
            assert time.monotonic() < late, process.errors[0].read_text()
            time.sleep(0.02)
        with pytest.raises(UserError, match=r"another process finds objects in .*out: wait for it"):
            foveola.propose(Bright(), DATA, out=out, progress=False, sheet=0)
        process.kill()
        process.wait()
    foveola.propose(Bright(), DATA, out=out, progress=False, sheet=0)


class Answering(Bright):
    """Says of each image what it is told to."""

    batch_size = 20

    def __init__(self, answer) -> None:
        self.answer = answer

    def describe(self):
        return {}

    def propose(self, images):
        return self.answer(len(images))


def proposals(**wrong) -> foveola.Proposals:
    """A box, and what differs: written past the type checks, which only tests have."""
    one = {"boxes": np.float32([[0, 0, 9, 9]]), "scores": np.ones(1, np.float32), "labels": np.zeros(1, int)}
    found = object.__new__(foveola.Proposals)
    for name, value in (one | {"masks": None} | wrong).items():
        object.__setattr__(found, name, value)
    return found


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: None, r"returned .*None.* for 20 images"),
        (lambda n: [proposals()] * (n - 1), "returned 19 results for 20 images"),
        (lambda n: [None] * n, r"scenes/train/0: the model found .*None.*, expected foveola\.Proposals"),
        (lambda n: [proposals(boxes=[[0, 0, 9, 9]])] * n, r"found boxes of .*list"),
        (lambda n: [proposals(scores=np.ones(2, np.float32))] * n, r"scores of shape \(2,\) for 1 boxes"),
        (lambda n: [proposals(labels=np.ones(1, int))] * n, "found the label 1, and has 1 classes"),
        (lambda n: [proposals(labels=-np.ones(1, int))] * n, "found the label -1, and has 1 classes"),
        (
            lambda n: [proposals(masks=np.full((1, 32, 32), 255, np.uint8))] * n,
            "found masks of uint8, expected a NumPy array of bool",
        ),
    ],
)
def test_answers_that_are_no_proposals_are_refused_at_once(tmp_path: Path, answer, message: str):
    with pytest.raises(UserError, match=message):
        foveola.propose(Answering(answer), DATA, out=tmp_path, progress=False, sheet=0)
    assert not (tmp_path / "objects.json").exists()


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    page = (ROOT / "docs" / "masks.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("count=100", "count=9&size=32")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "images: 9\n" in capsys.readouterr().out
    bright = json.loads((tmp_path / "masks" / "objects.json").read_text())["annotations"]
    source = foveola.open_source("scenes:?count=9&size=32")
    areas = [int((source[index].image.mean(2) > 128).sum()) for index in range(9)]  # type: ignore[union-attr]
    assert [each["area"] for each in bright] == [area for area in areas if area]
