"""A figure from outside, as docs/extend.md shows it: by importable name, by entry point, as an object."""

import importlib
import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import foveola
from foveola import outside
from foveola.cli import main
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.figures.settings import ImagesConfig
from foveola.figures.visualize import draw, find_figure
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

DATA = "scenes:?size=32&count=6"
NAME = "norms_of_docs:norms"


@pytest.fixture
def module(example_of_docs) -> ModuleType:
    example_of_docs("NormsConfig", "norms_of_docs")
    return importlib.import_module("norms_of_docs")


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    model = ViTConfig(width=24, depth=2, heads=3, patch_size=8, image_size=32)
    return Encoder(EncoderConfig(model, TransformConfig(32, 32)))


def test_its_tiles_are_those_of_a_loop(module, encoder):
    sheet = draw(module.norms, encoder, DATA, images="0,3", top=100)
    source = open_source(DATA, "test")
    for row, index in zip(sheet.rows, (0, 3), strict=True):
        patches = encoder(encoder.transform(source[index].image)[None]).patches[0].double()
        norms = [sum(float(x) ** 2 for x in patch) ** 0.5 for patch in patches]
        expected = [int(255 * norm / max(norms)) for norm in norms]
        assert np.abs(row.tiles[0][:, :, 1].flatten().astype(int) - expected).max() <= 1
        assert row.tiles[0].max() == 255


def test_the_command_line_knows_it(module, encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder.save("one/encoder")
    assert main(["visualize", NAME, "--help"]) == 0
    assert "percentile of the norms" in capsys.readouterr().out
    words = ["model=one,untrained:one", f"data={DATA}", "device=cpu", "count=2"]
    assert main(["visualize", NAME, *words, "each=true"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == "figures/norms.png"
    assert len(printed) == 1 + 2 * 2
    with Image.open(printed[1]) as image:
        assert image.size == (4, 4)
    for mistake, message in (
        ([NAME, *words, "tpo=3"], "unknown key 'tpo'; did you mean 'top'?"),
        (["norms", *words], r"unknown kind 'norms'; known: pca, "),
        ([f"{NAME}s", *words], "has no 'normss'; did you mean 'norms'?"),
        (["norms_of_docs:draw_norms", *words], "expected a foveola.Figure, got a function"),
        (["no_such_module:norms", *words], "there is no module 'no_such_module'; PYTHONPATH=."),
    ):
        assert main(["visualize", *mistake]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    entry = EntryPoint("norms", NAME, "foveola.figures")
    monkeypatch.setattr(outside, "entry_points", lambda group: [entry] * (group == entry.group))
    assert main(["visualize", "--help"]) == 0
    assert f"norms {module.norms.help}" in re.sub(" +", " ", capsys.readouterr().out)
    assert find_figure("norms") is module.norms


def test_a_contract_that_is_not_kept_is_refused(module, encoder):
    for changes, message in (
        ({"name": "pca"}, "'pca' is a figure of foveola"),
        ({"name": "../up"}, "letters, digits"),
        ({"config": dict}, "a dataclass with the base SheetConfig"),
        ({"draw": lambda encoders, source, config: 3}, "norms: draw returns an int, expected"),
    ):
        with pytest.raises(UserError, match=message):
            draw(replace(module.norms, **changes), encoder, DATA)
    with pytest.raises(UserError, match="norms needs data="):
        draw(module.norms, encoder)


def test_one_without_images_and_one_with_training_images(module, encoder):
    told = []

    def look(encoders, source, config, references=None):
        told.append((source, None if references is None else references.name))
        return module.draw_norms(encoders, open_source(DATA, "test"), module.NormsConfig())

    draw(foveola.Figure("bare", ImagesConfig, look, "no images", data=False), encoder)
    draw(foveola.Figure("two", ImagesConfig, look, "two sources", train=True), encoder, DATA)
    assert told[0] == (None, None)
    assert told[1][1] == open_source(DATA, "train").name != told[1][0].name
