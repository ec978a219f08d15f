"""Whether foveola is right and fast on a GPU: one command, less than nine minutes, one table.

    python -m benchmarks.gpu [--quick] [--out table.md] [--minutes 8.5] [--device cuda]

First come checks of numbers: the tests for GPUs, losses and views against the CPU, bf16 and fp16 against
float32, compiled against eager networks, and a resumed run against one that was not interrupted. Then steps
of the published recipes (bf16, fused AdamW, random images that are on the device): images a second, memory,
the share of the peak of bf16 matrix products that counted operations reach (MFU), kernels of a step, and how
often the CPU waits for the GPU in one, which is to be never. Then views, the loader, features and k-NN alone.

A cell that fails says why, one that does not fit into memory is tried with half of the batch, and what the
time does not suffice for is named. The table is written anew after each row. `--device cpu` runs all of it at
small sizes, to see that it works; its numbers mean nothing.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.decode import Files, photos
from benchmarks.gpu_checks import checks
from benchmarks.gpu_steps import Cost, Step, forget, measure, precision_of, timed, trainer_of
from benchmarks.step import canvases, flops, matmul_peak
from foveola.data.loader import Loader, LoaderConfig
from foveola.evaluation.classification.knn import predict
from foveola.models.vit import VisionTransformer, ViTConfig
from foveola.views.batch import Streams, make_views
from foveola.views.config import ViewsConfig

ROOT = Path(__file__).resolve().parents[1]
HEAD = ("what", "batch", "images/s", "of peak", "GiB", "kernels", "waits", "note")
COMPILED = ("", "default", "graphs")


def steps(tiny: bool) -> list[Step]:
    """Return the steps to measure, what matters most first."""
    if tiny:
        kinds = ("ibot", "capi", "mae")
        found = [Step(f"{kind} tiny", f"{kind}-tiny-tinyimagenet", 4) for kind in kinds]
        return [*found, dataclasses.replace(found[0], compiled="default")]
    small = [
        Step(f"{kind} S/16", f"{kind}-vits16-in1k", 128) for kind in ("ibot", "odis", "dinov2", "posfield")
    ]
    small += [Step("capi S/14", "capi-vits14", 256), Step("mae B/16", "mae-vitb16-in1k", 256)]
    large = (("model.size", "large"),)
    base = [
        Step(f"{kind} B/16", f"{kind}-vitb16-in1k", 64) for kind in ("ibot", "odis", "dinov2", "posfield")
    ]
    more = [Step("capi L/14", "capi-vitl14-in1k", 64)]
    more += [Step(f"{kind} L/16", f"{kind}-vitl16-in1k", 32) for kind in ("ibot", "odis", "dinov2")]
    more += [Step("posfield L/16", "posfield-vitb16-in1k", 32, changes=large)]
    eager = [*small, *base[:1], *more[:2], *base[1:], *more[2:]]
    chosen = (small[0], small[2], small[4], small[5], base[0], more[0])
    compiled = [dataclasses.replace(each, compiled="default") for each in chosen]
    graphs = [dataclasses.replace(each, compiled="graphs") for each in (small[0], small[4])]
    return [*eager, *compiled, *graphs]


class Table:
    """Lines of text, printed and written at once."""

    def __init__(self, out: Path | None, until: float) -> None:
        self.out, self.until, self.lines = out, until, []

    def say(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)
        if self.out is not None:
            self.out.write_text("\n".join(self.lines) + "\n")

    def row(self, *cells: str) -> None:
        self.say(f"| {' | '.join(cells)} |")

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.monotonic()


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}".replace("|", "/")


def check_all(table: Table, device: torch.device, quick: bool) -> bool:
    """Say what each check finds; whether none failed."""
    good = True
    for name, check in checks(ROOT).items():
        if (quick and name == "tests for GPUs") or table.left < 30:
            table.say(f"- {name}: left out")
            continue
        began = time.monotonic()
        try:
            said = check(device)
        except Exception as error:
            good, said = False, f"**failed**: {first_line(error)}"
        forget(device)
        table.say(f"- {name}: {said} ({time.monotonic() - began:.0f} s)")
    return good


def cells(cost: Cost, peak: float) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    share = None if cost.flops is None else cost.flops / cost.seconds / peak
    numbers = (
        shown(share, ".0%"),
        shown(cost.memory, ".1f"),
        shown(cost.kernels, ","),
        shown(cost.waits, ""),
    )
    places = [place.rpartition("/foveola/")[2] for place in cost.places]
    return [str(cost.batch), f"{cost.speed:,.1f}", *numbers, "; ".join(places[:4])]


def step_rows(table: Table, chosen: list[Step], device: torch.device, seconds: float, peak: float) -> None:
    """A row for each step, as long as there is time: so many seconds are kept for the rest."""
    known: dict[str, float] = {}
    longest: dict[str, float] = dict.fromkeys(COMPILED, 5.0)
    left_out = []
    for step in chosen:
        if table.left < longest[step.compiled] * 1.2:
            left_out.append(step.label)
            continue
        began = time.monotonic()
        try:
            cost = measure(step, device, seconds, known.get(step.name))
            if cost.flops is not None:
                known.setdefault(step.name, cost.flops / cost.batch)
            table.row(step.label, *cells(cost, peak))
        except Exception as error:
            table.row(step.label, str(step.batch), *[""] * 5, first_line(error))
            forget(device)
        longest[step.compiled] = max(longest[step.compiled], time.monotonic() - began)
    if left_out:
        table.row("left out for time", *[""] * 6, ", ".join(left_out))


def views_alone(device: torch.device, batch: int, seconds: float, peak: float) -> list[str]:
    """2 x 224 and 10 x 96 views of canvases on the device."""
    images = canvases(batch, torch.device("cpu")).to(device)
    spent = timed(lambda: make_views(images, ViewsConfig(), 16, Streams(0, 1)), device, seconds)
    return cells(Cost(batch, spent), peak)


def loader_alone(device: torch.device, batch: int, seconds: float, peak: float) -> list[str]:
    """JPEGs of 500 x 375 decoded and laid on canvases by as many workers as cores, copied to the device."""
    workers = max(min(os.cpu_count() or 1, 16) - 1, 1)
    source = Files(photos(64)[0] * (1 + 8 * batch // 64))
    loader = Loader(source, batch, 0, LoaderConfig(workers=workers), with_objects=False, device=device)
    batches = iter(loader)
    try:
        next(batches)
        spent = timed(lambda: next(batches), device, seconds)
    finally:
        batches.close()
    return [*cells(Cost(batch, spent), peak)[:-1], f"{workers} workers"]


def fed(device: torch.device, tiny: bool, seconds: float, peak: float) -> list[str]:
    """A step of iBOT S whose images come from the loader: its speed, and the share that it waits for them."""
    step = steps(tiny)[0]
    trainer, progress = trainer_of(step, step.batch, device)
    workers = max(min(os.cpu_count() or 1, 16) - 1, 1)
    source = Files(photos(64)[0] * (1 + 8 * step.batch // 64))
    batches = iter(
        Loader(source, step.batch, 0, LoaderConfig(workers=workers), with_objects=False, device=device)
    )
    waited = 0.0

    def once() -> None:
        nonlocal waited
        began = time.perf_counter()
        images = next(batches)
        waited += time.perf_counter() - began
        trainer.step(progress, lambda: images)

    try:
        once()
        waited, began = 0.0, time.perf_counter()
        spent = timed(once, device, seconds)
        whole = time.perf_counter() - began
    finally:
        batches.close()
    return [*cells(Cost(step.batch, spent), peak)[:-1], f"data wait {waited / whole:.0%}, {workers} workers"]


def features(device: torch.device, size: str, batch: int, seconds: float, peak: float) -> list[str]:
    """Class tokens and patches of a ViT/16 at 224 pixels, without gradient."""
    config = ViTConfig(size="tiny", depth=1) if size == "tiny" else ViTConfig(size=size)  # pyright: ignore[reportArgumentType]
    network = VisionTransformer(config).to(device).eval()
    images = torch.randn(batch, 3, 224, 224, device=device)

    @torch.inference_mode()
    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision_of(device) == "bf16"):
            network(images)

    work = flops(once)
    return cells(Cost(batch, timed(once, device, seconds), flops=work), peak)


def neighbours(device: torch.device, tiny: bool, peak: float) -> list[str]:
    """k-NN of 50,000 queries in 1,281,167 rows of 384, for k = 10, 20, 100, 200 at once."""
    queries, rows = (200, 2000) if tiny else (50_000, 1_281_167)
    references, asked = (torch.randn(count, 384) for count in (rows, queries))
    labels = torch.randint(1000, (rows,))
    began = time.perf_counter()
    predict(
        asked, references, labels, k=(10, 20, 100, 200), classes=1000, temperature=0.07, device=str(device)
    )
    spent = time.perf_counter() - began
    return [*cells(Cost(queries, spent), peak)[:-1], f"{spent:.1f} s for {rows:,} rows, copies included"]


def other_rows(table: Table, device: torch.device, tiny: bool, seconds: float, peak: float) -> None:
    batch = 4 if tiny else 128
    sizes = ("tiny",) if tiny else ("small", "base", "large")
    rows: dict[str, Callable[[], list[str]]] = {
        "views alone, 2 x 224 + 10 x 96": lambda: views_alone(device, batch, seconds, peak),
        "loader alone, 500 x 375 JPEGs": lambda: loader_alone(device, batch, seconds, peak),
        "ibot fed by the loader": lambda: fed(device, tiny, seconds, peak),
        **{f"features, {s}/16": partial(features, device, s, 2 * batch, seconds, peak) for s in sizes},
        "k-NN of the size of ImageNet": lambda: neighbours(device, tiny, peak),
    }
    for name, row in rows.items():
        try:
            table.row(name, *row())
        except Exception as error:
            table.row(name, *[""] * 6, first_line(error))
        forget(device)


def run(device: torch.device, out: Path | None, minutes: float, quick: bool) -> bool:
    """Print and write the table; whether all checks passed."""
    tiny = device.type == "cpu"
    table = Table(out, time.monotonic() + 60 * minutes)
    dtype = torch.bfloat16 if precision_of(device) == "bf16" else torch.float32
    kind = "CPU, tiny sizes: no measurement" if tiny else torch.cuda.get_device_name(device)
    table.say(f"{kind}; torch {torch.__version__}; {precision_of(device)}; {os.cpu_count()} CPU cores")
    table.say()
    good = check_all(table, device, quick)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    peak = matmul_peak(device, dtype)
    table.say(f"- peak of matrix products: {peak / 1e12:,.1f} TFLOP/s")
    table.say()
    table.row(*HEAD)
    table.row(*["---"] * len(HEAD))
    chosen = [step for step in steps(tiny) if not quick or step.name.endswith(("S/16", "tiny"))]
    seconds = 0.1 if tiny else 1.0 if quick else 2.0
    eager = [step for step in chosen if not step.compiled]
    step_rows(table, eager, device, seconds, peak)
    other_rows(table, device, tiny, seconds, peak)
    step_rows(table, [step for step in chosen if step.compiled], device, seconds, peak)
    table.say(f"\n{minutes * 60 - table.left:.0f} s" + ("" if good else "; **a check failed**"))
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ViT-S alone, without the tests")
    parser.add_argument("--out", type=Path, help="file to write the table to, as it grows")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing more is begun")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command out")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that torch can use here; --device cpu tries the command out")
    raise SystemExit(not run(device, options.out, options.minutes, options.quick))


if __name__ == "__main__":
    main()
