"""`foveola embed` against the plain forward of the same images, in one run (search: `benchmarks.search`).

    python -m benchmarks.embed [--data folder:photos] [--images 1000]

The plain forward gets images that are decoded, cut and normalised already, in the same batches: what is above
it is reading, and writing the file. Images are those of --data, again and again. Its times are core seconds
of one process that does all, which other work on the machine changes little.
"""

import argparse
import tempfile
from pathlib import Path
from time import process_time

import torch

import foveola
from foveola.evaluation.features.table import ExtractConfig, RowsCut
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

BATCH = 64


class Repeated:
    """Photographs of a source, again and again, `count` of them."""

    def __init__(self, source: foveola.Source, count: int) -> None:
        self.source, self.count = source, count
        self.name, self.classes, self.has_objects = source.name, source.classes, False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> foveola.Sample:
        return self.source[index % len(self.source)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="scenes:?size=224&count=100")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--width", type=int, default=192)
    words = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = Encoder(
        EncoderConfig(
            model=ViTConfig(width=words.width, depth=12, heads=words.width // 64, patch_size=16),
            transform=TransformConfig(),
        )
    )
    source = Repeated(foveola.open_source(words.data, "test"), words.images)
    cut = RowsCut(encoder.config.transform, 16, ExtractConfig())
    pixels = torch.cat([cut(source[i], i).images for i in range(min(len(source.source), words.images))])

    def plain() -> float:
        began = process_time()
        with torch.inference_mode():
            for start in range(0, words.images, BATCH):
                count = min(BATCH, words.images - start)
                numbers = torch.arange(start, start + count) % len(pixels)
                encoder.tokens(encoder.normalise(pixels[numbers]))
        return process_time() - began

    def embedded(end: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / f"f.{end}"
            began = process_time()
            foveola.embed(encoder, source, out=out, batch_size=BATCH, workers=0, progress=False)
            return process_time() - began

    forward, whole = plain(), embedded("parquet")
    print(
        f"{words.images} images: {forward:.1f} core s, embed {whole:.1f}, ratio {whole / forward:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
