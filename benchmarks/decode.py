"""What data workers do in front of the training process, against the usual multi-crop pipeline, on one core.

    FOVEOLA_DATA=/data python -m benchmarks.decode [--rounds 5] [--canvas 512]

Ours: the batches of our loader, JPEGs decoded and laid on uint8 canvases (all views are made later,
batched, where the training runs). The usual way: PIL decode, then 2 crops of 224 and 10 of 96 pixels with
flip, colour jitter, grayscale, blur, solarisation and normalisation, written with torchvision as DINO and
iBOT publish it. Both read the same files, decode included, in turns, in one run. Files: up to 64 of
`photos.zip` in $FOVEOLA_DATA, or else JPEGs of 500x375 of textured noise.
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

from foveola.data.loader import Loader, LoaderConfig
from foveola.data.sample import Sample

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


class Files:
    """A source of files in memory."""

    name, classes, has_objects = "files:", None, False

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.files[index], f"file {index}")

    def fingerprint(self) -> str:
        return "files"


def canvases(files: list[bytes], size: int) -> Callable[[], int]:
    """Ours: work that reads all files once (but for what fills no batch) and says how many."""
    config = LoaderConfig(canvas=size, workers=0)
    batch = min(32, len(files))
    loader = Loader(Files(files), batch, 0, config, with_objects=False)
    batches = iter(loader)
    return lambda: sum(len(next(batches)) for _ in range(loader.steps_per_epoch))


def multi_crop(files: list[bytes]) -> Callable[[], int]:
    """The usual way, as `canvases`: iBOT's augmentation, crop scales (0.25, 1) and (0.05, 0.25)."""
    from torchvision import transforms as t

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(np.random.default_rng().uniform(0.1, 2))))

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
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [first(image), second(image), *(local(image) for _ in range(10))]

    return lambda: len([crops(data) for data in files])


def seconds(work: Callable[[], int]) -> float:
    """Core-seconds an image, in which other programs' turns do not count."""
    began = time.process_time()
    count = work()
    return (time.process_time() - began) / count


def compare(files: list[bytes], sizes: list[int], rounds: int) -> None:
    """Print the speed of each canvas and of the usual way, measured in turns."""
    usual = "PIL multi-crop 2x224 + 10x96"
    ways = {f"canvas of at most {size}": canvases(files, size) for size in sizes}
    ways[usual] = multi_crop(files)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in (*(canvases(files[:2], size) for size in sizes), multi_crop(files[:2])):
        way()  # caches and lazy imports
    for _ in range(rounds):
        for name, work in ways.items():
            times[name].append(seconds(work))
    best = {name: min(values) for name, values in times.items()}
    print(f"{len(files)} images, one core, best of {rounds} rounds\n")
    print(f"{'in the worker':<32}{'ms/image':>10}{'images/s':>10}{'ratio':>8}")
    for name, value in best.items():
        print(f"{name:<32}{value * 1e3:>10.2f}{1 / value:>10.0f}{best[usual] / value:>8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each way goes over all files")
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--canvas", type=int, default=512, help="pixels a side")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files, origin = photos(options.count)
    print(f"files: {origin}")
    compare(files, [options.canvas], options.rounds)
    print("\ngoal: a ratio of at least 8")


if __name__ == "__main__":
    main()
