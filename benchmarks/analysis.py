"""What the analysis of attention costs beside a plain pass, and that memory does not grow with images.

    python -m benchmarks.analysis [--images 32] [--batch 16] [--threads 1] [--device cpu] [--memory 50 500]

The first table takes ViT-S/16 at 224 with fresh weights of a spread that makes attention uneven: seconds of
the forward pass alone, of the pass that also hands out every block's attention, and with all statistics, the
median of several rounds that take turns. The second is the most memory that a process held which analysed so
many images, reading included.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.memory import in_a_process, peak_mib
from benchmarks.step import seconds
from foveola import analyze_attention
from foveola.evaluation.attention.reader import AnalysisConfig, AttentionReader
from foveola.models.encoder import Encoder, EncoderConfig
from foveola.models.vit import ViTConfig


def encoder(device: torch.device, **changes: object) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(EncoderConfig(ViTConfig(**changes)))
    for name, weight in made.backbone.named_parameters():
        if name.endswith("attn.qkv.weight"):
            weight.mul_(4)
    return made.to(device)


def cost_table(count: int, batch: int, rounds: int, device: torch.device) -> None:
    vit = encoder(device)
    images = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    reader = AttentionReader("ViT-S/16", vit, AnalysisConfig())

    def plain() -> None:
        for part in images.split(batch):
            with torch.inference_mode():
                vit.backbone(vit.normalise(part.to(device)))

    def handed_out() -> None:
        for part in images.split(batch):
            vit.visit(vit.normalise(part.to(device)), lambda *a: None)

    def analysed() -> None:
        for part in images.split(batch):
            reader.read(part, 99, "noise")  # from the fourth batch on nothing is timed inside

    works = {"forward alone": plain, "with attention handed out": handed_out, "with all statistics": analysed}
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device) / count)
    first = statistics.median(times["forward alone"])
    print(f"\nViT-S/16 at 224, {count} images in batches of {batch}, median of {rounds} rounds")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:<30}{1e3 * middle:>9.2f} ms/image{middle / first:>7.2f} of forward alone")


def held(count: int) -> float:
    torch.set_num_threads(1)
    vit = encoder(torch.device("cpu"), size="tiny", depth=4, image_size=224)
    analyze_attention(vit, f"scenes:?count={count}", limit=None, workers=0, progress=False)
    return peak_mib()


def memory_table(counts: list[int]) -> None:
    print("\nmost memory of a process that analyses so many images (ViT-Ti/16 of 4 blocks at 224)")
    for count in counts:
        print(f"{count:<30}{in_a_process(held, count):>9.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="*", default=[50, 500])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{device}, {arguments.threads} thread(s), torch {torch.__version__}")
    cost_table(arguments.images, arguments.batch, arguments.rounds, device)
    if Path("/proc/self/status").exists():
        memory_table(arguments.memory)


if __name__ == "__main__":
    main()
