"""What people see of images of many channels: chosen ones, or principal components, worked out by hand."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import foveola
from foveola.config import ConfigError, UserError, build
from foveola.data.decoding import Decoding
from foveola.data.shown import (
    component_colours,
    drawn_rgb,
    rgb_of,
    showing,
    shown_alike,
    shown_channels,
    shown_image,
)
from foveola.data.sources import open_source
from foveola.data.suited import suited
from foveola.models.transform import TransformConfig
from tests.training.conftest import SMALL_MAE

LOW, HIGH = 72, 183  # one deviation below and above the mean: 127.5 -+ 255 / 4.6


def mixture(kind: type = np.uint16, times: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return 8 channels made of three square waves that have nothing in common, and the waves [H, W, 3].

    Each wave has channels of its own, with weights of length one: 0.5 four times, (0.8, 0.6), (-0.8, 0.6).
    """
    row = np.arange(64)
    waves = np.stack([np.where(row // width % 2, 1, -1) for width in (1, 2, 4)], axis=1)  # [64, 3]
    strength = np.array([8000, 2000, 500]) // (1 if kind == np.uint16 else 100)
    weights = np.zeros((3, 8))
    weights[0, :4], weights[1, 4:6], weights[2, 6:] = 0.5, (0.8, 0.6), (-0.8, 0.6)
    middle = 20000 if kind == np.uint16 else 128
    rows = middle + (waves * strength) @ weights
    shape = (8 * times, 8)
    return np.tile(rows, (times, 1)).reshape(*shape, 8).round().astype(kind), np.tile(
        waves, (times, 1)
    ).reshape(*shape, 3)


@pytest.mark.parametrize("kind", [np.uint16, np.uint8])
def test_components_of_mixtures_are_what_was_mixed(kind: type) -> None:
    pixels, waves = mixture(kind)
    waves[..., 2] *= -1  # its heavier channel falls as it rises: the sum of its weights is below 0
    wanted = np.where(waves > 0, HIGH, LOW)
    assert np.abs(component_colours(pixels).astype(int) - wanted).max() <= (0 if kind == np.uint16 else 1)
    assert np.array_equal(rgb_of(pixels, "pca"), component_colours(pixels))
    # Scale and offset of all channels change nothing, nor does their order.
    other = (pixels.astype(np.float64) / 2 + 30).astype(np.float32)[..., ::-1]
    assert np.abs(component_colours(other).astype(int) - component_colours(pixels)).max() <= 1


def test_components_without_variance_are_grey() -> None:
    pixels = mixture()[0]
    pixels[..., 4:] = 7
    seen = component_colours(pixels)
    assert set(seen[..., 0].ravel()) == {LOW, HIGH}
    assert (seen[..., 1:] == 128).all()
    assert (component_colours(np.full((4, 4, 5), 9, np.uint16)) == 128).all()


def test_equal_values_of_two_images_have_one_colour(tmp_path: Path) -> None:
    dark, both = mixture()[0], mixture()[0]
    dark[..., :4], both[:4, :, 4:] = 9000, 9000
    for name, pixels in (("a", dark), ("b", both)):
        np.save(tmp_path / f"{name}.npy", pixels)
    source = open_source(f"folder:{tmp_path}?channels=all&range=container&show=pca")
    seen = np.stack([shown_image(sample.image) for sample in source])
    rows = np.stack([dark, both]).reshape(-1, 8) / 65535
    _, spread, lines = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)  # another way to the same
    shares = (rows - rows.mean(axis=0)) @ lines[:3].T / (spread[:3] / len(rows) ** 0.5) / 4.6 + 0.5
    wanted = np.round(255 * shares).clip(0, 255).reshape(seen.shape)
    apart = np.minimum(np.abs(seen - wanted), np.abs(255 - seen - wanted))  # signs are another matter
    assert apart.max() <= 1
    assert not np.array_equal(seen[0], component_colours(dark))
    # A part of the data, another opening of them, and workers show the same.
    half = open_source(f"folder:{tmp_path}?channels=all&range=container&show=pca&limit=1")
    again = pickle.loads(pickle.dumps(shown_channels(source)))
    assert shown_channels(half) == again
    (tmp_path / "others").mkdir()
    np.save(tmp_path / "others" / "a.npy", both[::-1, :, ::-1])
    others = open_source(f"folder:{tmp_path}/others?channels=all&range=container&show=pca")
    assert shown_channels(others) != again
    assert shown_alike(others, source) == (again, again)
    assert shown_alike(source, open_source("scenes:")) == (again, None)
    tiles = open_source(f"folder:{tmp_path}?channels=all&range=container&show=pca&tiles=8")
    chosen = shown_channels(tiles)
    assert np.array_equal(rgb_of(dark, chosen)[:8, :8], shown_image(tiles[0].image))


def test_16_bits_are_rounded_to_8() -> None:
    every = np.arange(2**16, dtype=np.uint16).reshape(256, 256, 1).repeat(3, axis=2)
    assert np.array_equal(rgb_of(every), np.rint(every / 257))


def test_what_is_shown_follows_the_encoder_of_other_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", mixture()[0])
    source = open_source(f"folder:{tmp_path}?show=pca")  # as RGB, which these files are not
    assert shown_channels(source) == "pca"
    read = suited(source, Decoding.of("container", "8", None), 8)
    assert np.array_equal(shown_image(read[0].image), component_colours(mixture()[0]))
    assert len(shown_channels(read).weights[0]) == 8


def test_figures_of_training_show_the_same() -> None:
    pixels = mixture()[0]
    views = torch.from_numpy((pixels / 65535).astype(np.float32)).permute(2, 0, 1)
    pair = torch.stack([views, views.flip(-1)])
    for choice in ("pca", (7, 0, 3)):
        wanted = rgb_of(pixels, choice)
        seen = drawn_rgb(pair, choice).permute(0, 2, 3, 1).numpy()
        assert np.abs(seen[0].astype(int) - wanted).max() <= 1
        assert np.array_equal(seen[1], seen[0][:, ::-1])
        with showing(choice):
            assert torch.equal(drawn_rgb(pair), drawn_rgb(pair, choice))
            assert np.array_equal(rgb_of(pixels), wanted)
            assert np.array_equal(rgb_of(pixels, (5, 6, 7)), rgb_of(pixels[..., 5:], (0, 1, 2)))
    assert torch.equal(drawn_rgb(pair), drawn_rgb(pair, (0, 1, 2)))


def test_data_strings_say_it(tmp_path: Path) -> None:
    pixels = mixture()[0]
    np.save(tmp_path / "a.npy", pixels)
    data = f"folder:{tmp_path}?channels=all&range=container"
    source = open_source(f"{data}&show=pca")
    assert np.array_equal(shown_image(source[0].image), component_colours(pixels))
    assert Decoding.of("container", "8", None, "pca").options()["show"] == "pca"
    assert source.identity().digest == open_source(data).identity().digest
    with pytest.raises(UserError, match=r"show= asks for channel 9, and there are 8"):
        open_source(f"{data}&show=1,9,2")
    with pytest.raises(UserError, match=r"show=pca needs three channels, and there are 2"):
        open_source(f"folder:{tmp_path}?channels=1,2&range=container&show=pca")
    with pytest.raises(UserError, match="such as 4,3,2, or pca"):
        open_source(f"{data}&show=umap")
    with pytest.raises(ConfigError, match="show= asks for channel 4, and there are 3"):
        build(TransformConfig, {"show": "1,2,4"})


def test_a_run_draws_and_keeps_what_its_data_say(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / "data").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / f"{name}.npy", mixture(times=4)[0])
    settings = SMALL_MAE | {"duration": "1 steps"}
    drawn, weights = [], []
    for more in ("", "&show=pca"):
        data = f"folder:{tmp_path}/data?channels=all&range=container{more}"
        out = tmp_path / f"run{more}"
        run = foveola.pretrain("mae-tiny-tinyimagenet", data=data, out=str(out), **settings)
        (figure,) = (run.folder / "figures").iterdir()
        drawn.append(figure.read_bytes())
        weights.append(foveola.load(run.folder))
    assert drawn[0] != drawn[1]
    assert [encoder.config.transform.show for encoder in weights] == [None, "pca"]
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in weights), strict=True))
