"""What a grid of attentive probes costs beside one, and where the time of a feature pass goes.

    python -m benchmarks.probes [--small] [--device cuda]

Grid: seconds of a training step of one attentive probe, written as CAPI describes it (`torch.nn`, AdamW), of
one folded probe, of 30 folded ones at once, and of CAE's probe; the same batch, the median of several steps;
ratios to the first and to the second. Pass: features
of generated JPEG images by a ViT-S/16 and by a network so small that reading is the work, printed as shares
of the time: waiting for images, encoding and writing. Stream: seconds of training DINOv2's grid of linear
probes on crops of such images that are encoded as they are drawn, over the seconds of the plain forward of as
many images that are in memory already, the mean of the passes before and after it.
"""

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from foveola.data.sample import Sample
from foveola.evaluation.classification.attentive import AttentiveGrid
from foveola.evaluation.classification.cae import CaeGrid
from foveola.evaluation.classification.linear import LINEAR_RATES, LinearGrid, joined_width, need_of
from foveola.evaluation.classification.stream import Stream
from foveola.evaluation.classification.training import ProbePlan, cosine, train_plans
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.need import FeedConfig, need
from foveola.models.encoder import Encoder, EncoderConfig
from foveola.models.vit import ViTConfig


class Direct(nn.Module):
    """One probe, not folded."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.kv = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        k, v = self.kv(x).view(b, n, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        query = self.query.view(1, self.heads, 1, -1).expand(b, -1, -1, -1)
        return self.head(scaled_dot_product_attention(query, k, v).transpose(1, 2).flatten(1))


def median_seconds(work: Callable[[], None], device: str, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def grid(device: str, small: bool, repeats: int = 5) -> None:
    width, patches, classes, batch = (384, 196, 100, 64) if small else (1024, 256, 1000, 1024)
    heads = width // 64
    x = torch.randn(batch, patches, width, device=device)
    y = torch.randint(classes, (batch,), device=device)
    module = Direct(width, heads, classes).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95))

    def direct() -> None:
        optimizer.zero_grad()
        cross_entropy(module(x), y).backward()
        optimizer.step()

    def folded(count: int) -> Callable[[], None]:
        rates = torch.full((count,), 1e-3)
        grid = AttentiveGrid(rates, rates, width, classes, heads=heads, device=device)
        return lambda: grid.step({"patches": x}, y, 1.0)

    def cae(count: int) -> Callable[[], None]:
        grid = CaeGrid(torch.full((count,), 1e-3), width, classes, heads=heads, device=device)
        return lambda: grid.step({"patches": x}, y, 1.0)

    print(f"a step of {batch} x {patches} patches of {width}, {heads} heads, {classes} classes, {device}")
    rows = [
        ("one probe, as it is written", direct),
        ("one probe, folded", folded(1)),
        ("30 probes, folded", folded(30)),
        ("one probe of CAE, folded", cae(1)),
        ("4 probes of CAE, folded", cae(4)),
    ]
    seconds = [median_seconds(work, device, repeats) for _, work in rows]
    for (name, _), mine in zip(rows, seconds, strict=True):
        print(f"{name:<32}{1000 * mine:>10.1f} ms{mine / seconds[0]:>8.2f} x{mine / seconds[1]:>8.2f} x")


class Jpegs:
    """Generated images of 500 x 375 pixels, some of them over and over."""

    name, classes, has_objects = "jpegs:", None, False

    def __init__(self, count: int) -> None:
        from PIL import Image

        self.count, self.files = count, []
        for seed in range(16):
            small = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((500, 375)).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.files[index % 16], str(index), None, index % 10)

    def fingerprint(self) -> str:
        return f"jpegs{self.count}"


def passing(device: str, small: bool, width: int, depth: int) -> None:
    model = ViTConfig(width=width, depth=depth, heads=width // 64, patch_size=16)
    encoder = Encoder(EncoderConfig(model=model)).to(device)
    count = 256 if small else 4096
    config = FeedConfig(batch_size=64, workers=1 if device == "cpu" else 12)
    if device != "cpu":
        config = FeedConfig(batch_size=256, workers=12, precision="bf16", store="float16")
    with Feed(encoder, None, progress=False) as feed:
        began = time.perf_counter()
        facts = feed.open(Jpegs(count), config, need("token", "average", "patches")).facts
        whole = time.perf_counter() - began
    seconds = facts["pass_seconds"]
    total = sum(seconds.values())
    name = f"a ViT of {depth} blocks, width {width}"
    print(f"\n{count} images to tokens and patches, {name}: {count / whole:.1f} images a second")
    for name, value in seconds.items():
        print(f"{name:<12}{value:>8.2f} s{100 * value / total:>7.1f} %")


@torch.inference_mode()
def forward_seconds(encoder: Encoder, images: Tensor, count: int, config: FeedConfig) -> float:
    """Seconds of encoding `count` images, of which there are some, batch by batch."""
    device = encoder.device
    began = time.perf_counter()
    for start in range(0, count, config.batch_size):
        part = images[: min(config.batch_size, count - start)].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            encoder.backbone(encoder.normalise(part))
    if device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def streaming(device: str, small: bool, width: int, depth: int, classes: int) -> None:
    """One epoch of the grid of 52 probes on streamed crops, against the forward of its images."""
    encoder = Encoder(EncoderConfig(model=ViTConfig(width=width, depth=depth, heads=width // 64)))
    encoder = encoder.to(device)
    count, batch = (64, 32) if small else (16384, 1024)
    config = FeedConfig(batch_size=32, workers=1)
    if device != "cpu":
        config = FeedConfig(batch_size=256, workers=14, precision="bf16")
    names = ("token", "token4", "token+average", "token4+average")
    rates = torch.tensor(LINEAR_RATES)
    grids = [LinearGrid(n, rates, joined_width(encoder, n), classes, device=device) for n in names]
    images = torch.randint(256, (config.batch_size, 3, 224, 224), dtype=torch.uint8)
    forward_seconds(encoder, images, config.batch_size, config)
    before = forward_seconds(encoder, images, count, config)
    steps = count // batch
    stream = Stream(encoder, Jpegs(count), np.arange(count), config)
    began = time.perf_counter()
    drawn = stream.drawn(need_of(names, masks=False), batch, steps, 0)
    train_plans([ProbePlan(grids, cosine(steps), batch, steps)], drawn, progress=False)
    if device != "cpu":
        torch.cuda.synchronize()
    whole = time.perf_counter() - began
    forward = (before + forward_seconds(encoder, images, count, config)) / 2
    print(f"\n52 linear probes of {classes} classes on {count} streamed crops, width {width}, {depth} blocks")
    print(f"forward {forward:.1f} s, streamed {whole:.1f} s: {whole / forward:.2f} x")
    print(", ".join(f"{name} {value:.1f} s" for name, value in stream.seconds.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    grid(arguments.device, arguments.small)
    passing(arguments.device, arguments.small, 384, 12)
    passing(arguments.device, arguments.small, 128, 2)
    streaming(arguments.device, arguments.small, 384, 12, 10)
    streaming(arguments.device, arguments.small, 384, 12, 1000)


if __name__ == "__main__":
    main()
