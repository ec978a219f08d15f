"""A selection as a list: `listed:` reads back the same images, or the reason is said."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveola.data.sources import open_source
from foveola.explorer.listing import listing

NAMES = (
    "plain.png",
    "two words.png",
    'a,"b".png',
    "tab\there.png",
    "#hash & %25?x=1.png",
    'quote".png',
    "dürer.png",
)


@pytest.mark.parametrize("classes", ["", "cats/", "7/"])
def test_names_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: str) -> None:
    root = tmp_path / "a folder, 100%"
    for number, name in enumerate(NAMES):
        path = root / f"{classes}{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 300 * number + 9, np.uint16)).save(path)
    (tmp_path / "a folder, 100%" / "deep").mkdir()
    if classes:
        Image.new("RGB", (4, 4)).save(root / "deep" / "x.png")
    source = open_source(f"folder:{str(root).replace('%', '%25')}?range=0-4095")
    chosen = [*range(len(source))][1:]
    made = listing(source, [*reversed(chosen), *chosen])
    assert made.data is not None, made.why
    (tmp_path / "selection.txt").write_text(made.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    again = open_source(made.data)
    assert [again[i].name for i in range(len(again))] == [source[i].name for i in chosen]
    assert again[0].image == source[chosen[0]].image  # the range, too
    if classes == "cats/":
        assert again.classes is not None
        assert source.classes is not None
        assert [again.classes[again[i].label or 0] for i in range(len(again))] == [
            source.classes[source[i].label or 0] for i in chosen
        ]


def test_what_no_list_can_name_is_said() -> None:
    made = listing(open_source("scenes:?size=32&count=4"), [2, 0])
    assert made.data is None
    assert "no files below one folder" in made.why
    assert made.text.splitlines() == ["scenes/train/0", "scenes/train/2"]
