"""What data workers do in front of the training process, against the usual multi-crop pipeline, on one core.

    FOVEOLA_DATA=/data python -m benchmarks.decode [--rounds 5] [--canvas 256]

Ours: decode a JPEG and squash it to a uint8 canvas (all views are made later, batched, where the training
runs). The usual way: PIL decode, then 2 crops of 224 and 10 of 96 pixels with flip, colour jitter, grayscale,
blur, solarisation and normalisation, written with torchvision as DINO and iBOT publish it. Both read the same
files, decode included, in turns, in one run. Files: up to 64 of `photos.zip` in $FOVEOLA_DATA, or else JPEGs
of 500x375 of textured noise.
"""

import argparse
import io
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos(count: int) -> tuple[list[bytes], str]:
    """JPEG files, and where they are from."""
    archive = Path(os.environ.get("FOVEOLA_DATA", "")) / "photos.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as file:
            names = sorted(name for name in file.namelist() if name.lower().endswith((".jpg", ".jpeg")))[
                :count
            ]
            return [file.read(name) for name in names], str(archive)
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        layers = [rng.normal(0, 40, (375 // cell + 1, 500 // cell + 1, 3)) for cell in (4, 16, 64)]
        layers = [
            np.kron(layer, np.ones((c, c, 1)))[:375, :500]
            for layer, c in zip(layers, (4, 16, 64), strict=True)
        ]
        pixels = (128 + np.sum(layers, axis=0)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files, "textured noise, 500x375"


def canvas(size: int) -> Callable[[bytes], torch.Tensor]:
    """Ours."""
    from foveola.data.decode import Scratch, decode, to_canvas

    scratch = Scratch()  # as the loader does
    return lambda data: to_canvas(decode(data, scratch), size)


def multi_crop() -> Callable[[bytes], list[torch.Tensor]]:
    """The usual way: iBOT's augmentation, crop scales (0.25, 1) and (0.05, 0.25)."""
    from torchvision import transforms as t

    def blur(picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(float(np.random.default_rng().uniform(0.1, 2))))

    def pipeline(size: int, scale: tuple[float, float], blurred: float, solarised: float) -> t.Compose:
        return t.Compose(
            [
                t.RandomResizedCrop(size, scale, interpolation=t.InterpolationMode.BICUBIC),
                t.RandomHorizontalFlip(),
                t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                t.RandomGrayscale(0.2),
                t.RandomApply([t.Lambda(blur)], p=blurred),
                t.RandomSolarize(128, p=solarised),
                t.ToTensor(),
                t.Normalize(MEAN, STD),
            ]
        )

    first, second = pipeline(224, (0.25, 1), 1.0, 0.0), pipeline(224, (0.25, 1), 0.1, 0.2)
    local = pipeline(96, (0.05, 0.25), 0.5, 0.0)

    def crops(data: bytes) -> list[torch.Tensor]:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        return [first(picture), second(picture), *(local(picture) for _ in range(10))]

    return crops


def seconds(work: Callable[[bytes], object], files: list[bytes]) -> float:
    """Per picture."""
    began = time.perf_counter()
    for data in files:
        work(data)
    return (time.perf_counter() - began) / len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each way goes over all files")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--canvas", type=int, default=256, help="pixels a side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, origin = photos(options.count)
    ways = {
        f"decode to canvas {options.canvas}": canvas(options.canvas),
        "PIL multi-crop 2x224 + 10x96": multi_crop(),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():  # caches and lazy imports
        seconds(work, files[:2])
    for _ in range(options.rounds):
        for name, work in ways.items():
            times[name].append(seconds(work, files))
    print(f"{len(files)} pictures ({origin}), one core, best of {options.rounds} rounds\n")
    print(f"{'in the worker':<32}{'ms/image':>10}{'images/s':>10}")
    best = {name: min(values) for name, values in times.items()}
    for name, value in best.items():
        print(f"{name:<32}{value * 1e3:>10.2f}{1 / value:>10.0f}")
    ours, usual = best.values()
    print(f"\nratio {usual / ours:.1f} (goal: at least 15)")


if __name__ == "__main__":
    main()
