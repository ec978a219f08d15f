"""Model cards say what a run and its results say, and nothing else; names of others stay names."""

import json
from pathlib import Path

import pytest
import yaml

from foveola import cli
from foveola.evaluation.result import Result
from foveola.exporting.card import plain_text, without_folders
from foveola.exporting.export import export
from foveola.files import RunFolder
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

HOSTILE = "a|b\n# <script>alert(1)</script> [x](javascript:y) `z` *k*"


def front_of(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of 100 steps of 16 images, with a result of its encoder and one of another."""
    folder, data = tmp_path / "run", "folder:/home/me/secret/photos?limit=64"
    model = ViTConfig(width=24, depth=1, heads=2, patch_size=8, image_size=32)
    encoder = Encoder(EncoderConfig(model, TransformConfig(36, 32), origin=HOSTILE, step=80))
    encoder.save(folder / "encoder")
    tree = {"recipe": "ibot-tiny", "data": data, "batch_size": 16, "duration": "100 steps", "seed": 3}
    tree |= {
        "precision": "fp32",
        "init": "timm:vit_small_patch16_224.dino",
        "method": {"name": "distillation"},
    }
    RunFolder(folder).config.write_text(yaml.safe_dump(tree))
    RunFolder(folder).data.write_text(json.dumps({"count": 64, "contents": "content:abc", "sizes": None}))
    metrics = {"top1": 18.75, "top1_low": 8.89, "top1_high": 35.31, "best_k": 10.0}
    own = {"test": {"name": f"folder:/data/{HOSTILE}", "images": 32, "fingerprint": "content:def"}}
    for protocol, name in (("mine", encoder.fingerprint()), ("theirs", "0" * 16)):
        Result(protocol, {}, metrics, own, name, {}, "", 1.0).save(folder)
    return folder


def test_a_card_says_what_the_run_says(run: Path, tmp_path: Path):
    card = (export(str(run), tmp_path / "out", "safetensors", licence="Our own") / "README.md").read_text()
    for line in (
        "- data: folder:photos?limit=64",
        "- images: 64",
        "- identity, a hash of their contents: content:abc",
        "- classes: none were read in training",
        "- steps: 80 of 100, of 16 images each: 1,280 images seen",
        "- seed: 3; precision: fp32",
        "Of the weights: Our own.",
    ):
        assert line.replace("_", "\\_") in card.replace("&amp;", "&"), line
    (row,) = [line for line in card.splitlines() if line.startswith("| mine")]
    assert row.endswith("| 18.75 | 8.89 to 35.31 |")
    assert "32 images (content:def)" in row
    assert "theirs" not in card  # of another encoder
    assert "/home" not in card
    front = front_of(card)
    assert (front["license"], front["license_name"]) == ("other", "Our own")
    (result,) = front["model-index"][0]["results"]
    assert [each["value"] for each in result["metrics"]] == [18.75]
    assert 'library_name: "foveola"' in card


def test_names_of_others_stay_names(run: Path, tmp_path: Path):
    card = (export(str(run), tmp_path / "out", "safetensors") / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    assert front_of(card)["model-index"][0]["name"] == HOSTILE
    assert "<script" not in body.replace("\\<", "")
    assert "](javascript" not in body
    assert sum(line.startswith("# ") for line in body.splitlines()) == 1
    (row,) = [line for line in body.splitlines() if line.startswith("| mine")]
    assert row.replace("\\|", "").count("|") == 6
    assert "license" not in front_of(card)
    assert "Of the weights: not stated by who exported them." in body
    assert plain_text("a  b\t\n\x1b[0m\u202ec") == "a b \\[0m c"
    assert without_folders("coco:/data/val?annotations=/home/x/a.json") == "coco:val?annotations=a.json"
    assert without_folders("hf:owner/name") == "hf:owner/name"


def test_without_a_run_it_says_that_nothing_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = ViTConfig(width=24, depth=1, heads=2, patch_size=8, image_size=32)
    folder = Encoder(EncoderConfig(model, TransformConfig(36, 32))).save(tmp_path / "encoder")
    words = ["export", str(folder), f"out={tmp_path / 'out'}", "format=torch", "licence=MIT"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert f"encoder = foveola.load('{tmp_path / 'out' / 'model.pth'}')" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not known: the encoder was not exported from the folder of a run." in card
    assert "No results of this very encoder lie beside it" in card
    assert front_of(card)["license"] == "mit"
