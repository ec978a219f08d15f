"""What a command is about can be said by position or by key, as people try it; else the key is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

import foveola
from foveola import cli, console
from foveola.config import UserError
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.shape import ViTConfig

MODEL = "nowhere"


def error_of(capsys: Any, words: str) -> str:
    assert cli.main(words.split()) == 2
    return capsys.readouterr().err.removeprefix("foveola: error: ").strip()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"export {MODEL} out=OUT/a.pt2", f"export model={MODEL} out=OUT/a.pt2"),
        (f"embed {MODEL} data=scenes: out=OUT/a.npz", f"embed model={MODEL} data=scenes: out=OUT/a.npz"),
        (f"embed {MODEL} scenes: out=OUT/a.npz", f"embed model={MODEL} data=scenes: out=OUT/a.npz"),
        ("search OUT/no.npz OUT/a.png", "search index=OUT/no.npz query=OUT/a.png"),
        (f"explore {MODEL} data=scenes:", f"explore model={MODEL} data=scenes:"),
        ("compare OUT/a OUT/b", "compare model=OUT/a,OUT/b"),
        ("report OUT/a OUT/b", "report model=[OUT/a,OUT/b]"),
        (
            f"evaluate knn {MODEL} train=scenes: test=scenes:",
            f"evaluate protocol=knn model={MODEL} train=scenes: test=scenes:",
        ),
        (f"visualize pca {MODEL} data=scenes:", f"visualize kind=pca model={MODEL} data=scenes:"),
        (
            f"analyze attention {MODEL} data=scenes: out=OUT/b",
            f"analyze attention model={MODEL} data=scenes: out=OUT/b",
        ),
        ("masks nothing data=scenes:", "masks kind=nothing data=scenes:"),
        ("check folder:/nowhere", "check data=folder:/nowhere"),
        ("pack folder:/nowhere out=OUT/c", "pack data=folder:/nowhere out=OUT/c"),
        ("pretrain nothing", "pretrain recipe=nothing"),
        ("finetune nothing", "finetune recipe=nothing"),
    ],
)
def test_position_and_key_say_the_same(one: str, other: str, tmp_path: Path, capsys: Any) -> None:
    first, second = (error_of(capsys, words.replace("OUT", str(tmp_path))) for words in (one, other))
    assert first == second
    assert not first.startswith(("expected key=value", "which ", "unknown key"))
    assert "needs" not in first.partition(";")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrain demo folder:/images", "expected key=value, got 'folder:/images': perhaps data="),
        ("masks discover OUT", "expected key=value, got 'OUT': perhaps model=OUT; usage: foveola masks"),
        ("export OUT model=OUT out=a.pt2", "'OUT' and model=OUT say the same: give one;"),
        ("embed OUT model=a data=b out=c", "'OUT' would be model=, which is given, too;"),
        ("embed a b c", "expected key=value, got 'c'; usage: foveola embed"),
        ("evaluate knn OUT OUT", "expected key=value, got 'OUT': perhaps model=OUT;"),
        ("export", "which model? usage: foveola export MODEL"),
    ],
)
def test_a_word_without_a_place_is_named_with_its_key(
    words: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    there = str(tmp_path)
    assert error_of(capsys, words.replace("OUT", there)).startswith(message.replace("OUT", there))


def test_paths_with_commas_are_one_name(tmp_path: Path) -> None:
    odd = tmp_path / "a,b"
    odd.mkdir()
    assert console.named_by_key([], [f"model={odd}"], "model", "", several=True) == ([str(odd)], [])
    found = console.named_by_key([], ["model=a, b", "top=3"], "model", "", several=True)
    assert found == (["a", "b"], ["top=3"])
    with pytest.raises(UserError, match="say the same"):
        console.named_by_key(["x"], ["model=y"], "model", "")


def test_the_folder_of_the_user_is_found_in_every_word(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Shells put it in place of ~ in some words alone, such as `~/x`, but not `a,~/x`, or `model=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names, overrides, _ = console.split(
        ["~/a", "model=x,~/b", "init=untrained:~/c", "data=folder:~/d?annotations=~/e", "f=a~/b", "~g/h"], ()
    )
    home = str(tmp_path)
    assert names == [f"{home}/a", "~g/h"]
    assert overrides == [
        *(f"model=x,{home}/b", f"init=untrained:{home}/c"),
        *(f"data=folder:{home}/d?annotations={home}/e", "f=a~/b"),
    ]
    torch.manual_seed(0)
    shape = ViTConfig(width=16, depth=1, heads=2, patch_size=8, image_size=16)
    encoder = Encoder(EncoderConfig(shape, TransformConfig(resize=16, crop=16)))
    encoder.save(tmp_path / "mine")
    for name in ("~/mine", "untrained:~/mine"):
        assert foveola.load(name).config.model == shape
    assert foveola.export("~/mine", "~/mine.pth") == tmp_path / "mine.pth"
    with pytest.raises(UserError, match=f"{home}/no"):
        foveola.load("~/no")
    assert cli.main(["export", "~/mine", "out=~/again.pth"]) == 0
    assert (tmp_path / "again.pth").is_file()


def test_a_path_with_an_equals_sign_is_a_name_and_an_empty_word_is_none(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a b=c/run=1", "lr=0.1/run", "x y=1"):
        Path(folder).mkdir(parents=True)
        assert console.split([folder, "out=x"], ()) == ([folder], ["out=x"], set())
    assert console.split(["lr=0.1", "lr=0.1/no"], ())[0] == []
    assert cli.main(["export", "", "out=x"]) == 2  # of a variable of the shell that is not set
    assert "which model?" in capsys.readouterr().err
