"""Image files with names that a page could mistake for its own text, and two small encoders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from foveola.explorer.app import application
from foveola.explorer.explore import LOOPBACK
from foveola.explorer.session import Session
from foveola.explorer.sides import ExploreConfig, sides_of
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

NAMES = (
    "cats/<img src=x onerror=window.hit=1>.png",
    'dogs/a, b "c" & d.png',
    "cats/</script><b>bold.png",
    "dogs/ü 图.png",
)
COUNT, TOKEN = 20, "a-token-for-tests"
QUICK: dict[str, Any] = {"workers": 0, "batch_size": 8, "patches": 12}


def name_at(i: int) -> str:
    return NAMES[i] if i < len(NAMES) else f"{('cats', 'dogs')[i % 2]}/{i:02d}.png"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data string: 20 images of two classes, 48 x 40 pixels, noise with one to three bright boxes each."""
    folder, lines = tmp_path_factory.mktemp("photos"), ["name,x0,y0,x1,y1,label"]
    for i in range(COUNT):
        rng = np.random.default_rng(i)
        pixels, name = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8), name_at(i)
        for j in range(1 + i % 3):
            x0, y0 = 8 + 10 * j, 4 + int(rng.integers(0, 16))
            pixels[y0 : y0 + 14, x0 : x0 + 8] = rng.integers(0, 256, 3)
            quoted = name.replace('"', '""')
            lines.append(f'"{quoted}",{x0},{y0},{x0 + 8},{y0 + 14},{("eye", "<i>ear</i>")[j % 2]}')
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).save(path)
    table = tmp_path_factory.mktemp("boxes") / "boxes.csv"
    table.write_text("\n".join(lines) + "\n")
    return f"folder:{folder}?boxes={table}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two encoder folders, of 4 x 4 and of 2 x 2 patches of 32-pixel crops."""
    made = []
    with torch.random.fork_rng():
        for patch in (8, 16):
            torch.manual_seed(patch)
            shape = ViTConfig(width=24, depth=2, heads=2, patch_size=patch, image_size=32)
            transform = TransformConfig(resize=32, crop=32)
            encoder = Encoder(EncoderConfig(model=shape, transform=transform))
            for block in encoder.backbone.blocks:  # larger weights than at the start: masks must matter
                block.attn.qkv.weight.mul_(8)  # type: ignore[union-attr]
            made.append(encoder.save(tmp_path_factory.mktemp("model")))
    return made[0], made[1]


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where features are kept for all tests: they are computed once."""
    return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="session")
def session(photos: str, models: tuple[Path, Path], kept: Path) -> Session:
    """Both encoders side by side, with maps by principal components."""
    config = ExploreConfig(**QUICK, map="pca")
    sides, source = sides_of([*map(str, models)], photos, {}, config, cache=kept, progress=False)
    return Session(sides, source, "pca")


@pytest.fixture
def client(session: Session) -> Iterator[TestClient]:
    """A browser's place: it has opened the page once, and has its cookie."""
    with TestClient(application(session, TOKEN, LOOPBACK), base_url="http://127.0.0.1:8000") as made:
        assert made.get("/", params={"token": TOKEN}).status_code == 200
        yield made


def ask(client: TestClient, **values: Any) -> list[dict[str, Any]]:
    answer = client.post("/ask", json=values)
    assert answer.status_code == 200, answer.text
    return answer.json()
