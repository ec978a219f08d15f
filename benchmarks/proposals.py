"""What objects from features cost, over the forward pass of the encoder on the same images, from one run.

    python -m benchmarks.proposals [images] [pixels] [model] [data]

Prints the CPU seconds of an image for the pass (whole, to the patches) and for each way of cutting (the pass
included), and the ratio of each to the pass: with OMP_NUM_THREADS=1 other work on the machine changes little.
Images are those of a data string, squashed to squares, or else smooth noise, in whose features cuts find
something.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from foveola.data.sources import decode, open_source
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.transform import resize
from foveola.models.vit import ViTConfig
from foveola.proposals.discover import DiscoverConfig, discoverer
from foveola.zoo.load import load

BATCH = 8
WAYS = (
    {"method": "tokencut"},
    {"method": "maskcut"},
    {"method": "lost"},
    {"method": "attention"},
    {"method": "maskcut", "features": "keys"},
    {"method": "maskcut", "refine": "grabcut"},
)


def images(count: int, side: int, data: str | None) -> list[np.ndarray]:
    """Return images drawn by seed 0, or noise of 8 x 8 cells, enlarged."""
    if data is not None:
        source = open_source(data)
        order = np.random.default_rng(0).permutation(len(source))[:count].tolist()
        small = (resize(decode(source[index].image), side, side) for index in order)
        return [one.permute(1, 2, 0).contiguous().numpy() for one in small]
    random = np.random.default_rng(0)
    cells = random.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return [resize(one, side, side).permute(1, 2, 0).contiguous().numpy() for one in cells]


def seconds(work: Callable[[list[np.ndarray]], object], some: list[np.ndarray]) -> float:
    """Return the CPU seconds that an image takes, in batches; the first batch once before."""
    batches = [some[i : i + BATCH] for i in range(0, len(some), BATCH)]
    work(batches[0])
    start = time.process_time()
    for batch in batches:
        work(batch)
    return (time.process_time() - start) / len(some)


def forward(encoder: Encoder, side: int) -> Callable[[list[np.ndarray]], object]:
    """Return the plain pass."""

    @torch.inference_mode()
    def work(batch: list[np.ndarray]) -> object:
        pixels = torch.stack([resize(image, side, side) for image in batch])
        return encoder.backbone(encoder.normalise(pixels.to(encoder.device))).patches.cpu()

    return work


def main(count: int = 32, side: int = 336, model: str | None = None, data: str | None = None) -> None:
    """Print the table."""
    if model is None:
        shape = ViTConfig(patch_size=14, image_size=224)
        encoder = Encoder(EncoderConfig(shape, TransformConfig(resize=224, crop=224)))
    else:
        encoder = load(model)
    side = side // encoder.patch_size * encoder.patch_size
    some = images(count, side, data)
    plain = seconds(forward(encoder, side), some)
    print(f"{'the pass':40s} {plain:8.3f} s an image")
    for way in WAYS:
        proposer = discoverer(encoder, DiscoverConfig(image_size=side, batch_size=BATCH, **way))
        own = seconds(proposer.propose, some)
        name = " ".join(f"{name}={value}" for name, value in way.items())
        print(f"{name:40s} {own:8.3f} s an image   {own / plain:5.2f} x the pass", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*(int(one) for one in given[:2]), *given[2:])
