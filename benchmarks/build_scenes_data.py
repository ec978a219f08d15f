"""Build the stock of the built-in scenes from the official Fashion-MNIST files.

    python benchmarks/build_scenes_data.py FOLDER-WITH-THE-IDX-FILES

The four files (`train-images-idx3-ubyte.gz`, ...) come from https://github.com/zalandoresearch/fashion-mnist
or from Debian's package `dataset-fashion-mnist`. Needs scipy. The stock for training comes from the official
training file, the stock for testing from the official test file, the same number of products from each class.
A product that leaves too little or too much of its frame to be cut out (see `MIN_AREA`) is left out.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

OUT = Path(__file__).parents[1] / "foveola" / "data" / "fashion"
PER_CLASS = {"train": 1000, "test": 250}
THRESHOLD = 5  # the official images carry compression noise of 1..3 grey levels around the product
SMALL_HOLE = (
    6  # pixels: a larger dark hole shows the background (the handle of a bag), a smaller one is a print
)
MIN_AREA = 60  # pixels of 784: below it, thin straps are all that is left of a sandal


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of an idx file after its header."""
    if not path.is_file():
        raise SystemExit(f"no file {path}")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def silhouette(image: UInt8[np.ndarray, "28 28"]) -> Bool[np.ndarray, "28 28"]:
    """Which pixels are product.

    Products stand on pure black, so dark prints, stripes and seams must be told from the background. A
    vertical closing bridges black stripes, which run across, but not the gaps beside arms and legs, which run
    down; then enclosed holes are filled when small or when they hold more than the background's noise.
    """
    padded = np.pad(image, 2)
    mask = ndimage.binary_closing(padded >= THRESHOLD, np.ones((3, 1), bool))
    holes, count = ndimage.label(~mask)
    for hole in range(1, count + 1):
        inside = holes == hole
        if not inside[0, 0] and (inside.sum() <= SMALL_HOLE or padded[inside].mean() > 1):
            mask |= inside
    parts, count = ndimage.label(mask, np.ones((3, 3), int))
    sizes = ndimage.sum_labels(mask, parts, range(1, count + 1))
    mask &= np.isin(parts, 1 + np.flatnonzero(sizes >= 10))  # specks of noise
    return mask[2:-2, 2:-2]


def build(folder: Path, split: str) -> None:
    """Write `<split>.npz`: images uint8 [N, 28, 28] (0 outside, 1..255 inside), labels, official rows."""
    prefix = "train" if split == "train" else "t10k"
    originals = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
    images, rows = [], []
    for label in range(10):
        left = PER_CLASS[split]
        for row in np.flatnonzero(labels == label):
            mask = silhouette(originals[row])
            if left and MIN_AREA <= mask.sum() <= 28 * 28 * 0.98:
                images.append(np.where(mask, np.maximum(originals[row], 1), 0).astype(np.uint8))
                rows.append(row)
                left -= 1
        if left:
            raise SystemExit(f"class {label} of {split} is {left} products short of {PER_CLASS[split]}")
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{split}.npz"
    np.savez_compressed(path, images=np.stack(images), labels=labels[rows], rows=np.array(rows, np.int32))
    print(f"{path}: {len(images)} products, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the four official .gz files")
    source = parser.parse_args().folder
    for name in PER_CLASS:
        build(source, name)
