"""How fast `foveola explore` is with many images: features and thumbnails are made up.

python -m benchmarks.explore [rows=100000]: start, first gallery, frames of the map, in Chromium.
"""

import shutil
import sys
from time import perf_counter
from typing import Any

import numpy as np

from foveola.data.sample import Sample
from foveola.embedding.index import Index
from foveola.explorer.explore import LOOPBACK, Explorer
from foveola.explorer.session import Session
from foveola.explorer.sides import Side

WIDTH, CLASSES, FRAMES = 384, 20, 40


class Made:
    """Images of one colour each, 64 x 48 pixels."""

    name, classes, has_objects = "made", tuple(f"class {i:02d}" for i in range(CLASSES)), False

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        color = np.random.default_rng(index).integers(0, 256, 3, dtype=np.uint8)
        return Sample(np.tile(color, (48, 64, 1)), f"folder/{index:06d}.jpg", label=index % CLASSES)


def index_of(count: int) -> Index:
    """Return features around a centre for each class."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    labels = np.arange(count) % CLASSES
    features = centres[labels] + rng.normal(size=(count, WIDTH)).astype(np.float32)
    names = [f"folder/{i:06d}.jpg" for i in range(count)]
    index = Index.build(features, names, [Made.classes[label] for label in labels], device="cpu")
    index.rows = index.rows._replace(width=np.full(count, 64), height=np.full(count, 48))
    index.about = {"features": "token", "settings": {"image_size": None, "rows": "images"}, "masks": False}
    return index


def measure(tab: Any, url: str) -> dict[str, float]:
    """Return seconds and milliseconds as a person waits for them."""
    began = perf_counter()
    tab.goto(url)
    tab.locator(".tile img").first.wait_for()
    gallery = perf_counter() - began
    began = perf_counter()
    tab.click("#view [data-value=map]")
    tab.locator(".note", has_text="principal components of the features").first.wait_for()
    shown, box = perf_counter() - began, tab.locator("canvas").first.bounding_box()
    frames = []
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for turn in range(FRAMES):
        tab.mouse.wheel(0, -60 if turn % 20 < 10 else 60)
        tab.wait_for_timeout(40)
        frames.append(tab.evaluate("performance.getEntriesByName('map')[0].duration"))
    return {"gallery, s": gallery, "map, s": shown, "frame, ms": float(np.median(frames))}


def main(count: int) -> None:
    """Print the measurements."""
    from playwright.sync_api import sync_playwright

    index, side = index_of(count), Side("made", "made", why="Features that were made up.")
    side.indices["images"] = index
    began = perf_counter()
    session = Session([side], Made(count), "pca")
    with Explorer(session, LOOPBACK, 0) as page, sync_playwright() as playwright:
        print(f"{count:,} rows: start {perf_counter() - began:.2f} s")
        path = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))))
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        for name, value in measure(tab, page.url).items():
            print(f"{name}: {value:.2f}")
        browser.close()


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[1:])
    main(int(words.get("rows", 100_000)))
