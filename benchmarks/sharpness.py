"""How much detail views have beside Pillow's crop and resize of the original image, and what they cost.

    FOVEOLA_DATA=/data python -m benchmarks.sharpness [--count 143] [--canvas 256 512] [--rounds 3]

Boxes are drawn as each method does, on whole pixels, and both ways cut the same. `energy` is the power above
half of the Nyquist frequency (of the rows or of the columns; grey, under a Hann window), summed over all
views, ours as a share of Pillow's; `gradient` is the same share of the mean step between neighbours; PSNR is
of 8-bit pixels, a mean over views. `large` is the energy in those photos alone that have a side above the
canvas. Then images a second on one core: our loader against the usual multi-crop in Pillow, as in
`benchmarks.decode`. Files: those of `photos.zip` in $FOVEOLA_DATA, or else textured noise.
"""

import argparse
import io
from collections import defaultdict

import numpy as np
import torch
from PIL import Image

from benchmarks.decode import compare, photos
from foveola.data.decode import decode, to_canvas
from foveola.geometry import random_boxes, sample

METHODS = {
    "MAE": ((0.2, 1.0), 224),
    "DINO, iBOT, ODIS global": ((0.25, 1.0), 224),
    "DINO, iBOT, ODIS local": ((0.05, 0.25), 96),
    "DINOv2 global": ((0.32, 1.0), 224),
    "I-JEPA": ((0.3, 1.0), 224),
    "CAPI": ((0.6, 1.0), 224),
}
RATIO = (3 / 4, 4 / 3)


def fine_energy(view: np.ndarray) -> float:
    """Power of a view [h, w, 3] above half of the Nyquist frequency."""
    grey = view.mean(axis=2)
    window = np.hanning(len(grey))
    spectrum = np.fft.fft2((grey - grey.mean()) * window[:, None] * window)
    frequency = np.abs(np.fft.fftfreq(len(grey)))
    high = np.maximum(frequency[:, None], frequency) > 0.25
    return float((np.abs(spectrum[high]) ** 2).sum())


def gradient(view: np.ndarray) -> float:
    """The mean absolute difference between neighbours."""
    return float(np.abs(np.diff(view, axis=0)).mean() + np.abs(np.diff(view, axis=1)).mean()) / 2


def measure(data: bytes, canvas: int, views: int, sums: dict, generator: torch.Generator) -> None:
    """Add one photo's views of each method to `sums`."""
    pixels = decode(data)
    height, width = pixels.shape[:2]
    original = Image.fromarray(pixels)
    image = to_canvas(pixels, canvas)[None].float()
    for method, (scale, size) in METHODS.items():
        drawn = random_boxes(torch.tensor([width / height]), views, scale, RATIO, generator)[0].double()
        corners = (drawn * torch.tensor([width, height] * 2)).round()
        boxes = (corners / torch.tensor([width, height] * 2))[None].float()
        ours = sample(image, boxes, None, size)[0].clamp(0, 255).round().double().permute(0, 2, 3, 1).numpy()
        for box, view in zip(corners.int().tolist(), ours, strict=True):
            official = original.crop(box).resize((size, size), Image.Resampling.BICUBIC)
            official = np.asarray(official).astype(np.float64)
            error = max(float(((view - official) ** 2).mean()), 1e-3)
            energies = np.array([fine_energy(view), fine_energy(official)])
            sums["energy", method] += energies
            sums["gradient", method] += np.array([gradient(view), gradient(official)])
            sums["psnr", method] += np.array([10 * np.log10(255**2 / error), 1])
            if max(height, width) > canvas:
                sums["large", method] += energies


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=143, help="photos")
    parser.add_argument("--views", type=int, default=2, help="views of each photo and method")
    parser.add_argument("--canvas", type=int, nargs="+", default=[256, 512], help="pixels a side")
    parser.add_argument("--rounds", type=int, default=3, help="times that speed is measured; 0 = not at all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, origin = photos(options.count)
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in files])
    middle = "x".join(f"{side:.0f}" for side in np.median(sizes, axis=0))
    print(f"{len(files)} photos ({origin}), median {middle}, {options.views} views of each and method")
    for canvas in options.canvas:
        sums: dict = defaultdict(lambda: np.zeros(2))
        generator = torch.Generator().manual_seed(0)
        for data in files:
            measure(data, canvas, options.views, sums, generator)
        print(
            f"\ncanvas {canvas}; {(sizes.max(axis=1) > canvas).mean():.0%} of the photos have a longer side"
        )
        print(f"{'views':<26}{'energy':>8}{'gradient':>10}{'PSNR dB':>9}{'large':>8}")
        for method in METHODS:
            shares = {
                name: np.divide(*sums[name, method]) for name in ("energy", "gradient", "psnr", "large")
            }
            print(
                f"{method:<26}{shares['energy']:>8.3f}{shares['gradient']:>10.3f}{shares['psnr']:>9.1f}"
                f"{shares['large']:>8.3f}"
            )
    if options.rounds:
        print()
        compare(files[:64], options.canvas, options.rounds)


if __name__ == "__main__":
    main()
