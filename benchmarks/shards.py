"""What shards cost: reading against a folder, and an index of a million small entries.

    python -m benchmarks.shards read [--images 2000] [--rounds 5]
    python -m benchmarks.shards index [--entries 1000000] [--files 10] [--folder /scratch] [--linked]

`read`: the same JPEGs (photos of $FOVEOLA_DATA, or noise of 500x375) in a folder, in shards that
`foveola pack` wrote and in parquet files that `datasets` wrote, 100 rows a group. Measured are the bytes of
images in random order and in order, and batches of the loader (canvas of 256), all in one process, in turns
in one run; medians of core seconds, and of the ratios to the folder in a round. Files are in the page cache:
a disk or a network makes the folder slower, since it is asked for each file.

`index`: shards of a key, a file of 16 bytes and a class, written as `tarfile` has them. Each phase runs in a
process of its own: making the index, starting from it (until the source is open, and until a sample is read),
and what a worker adds. Memory is what a process holds beyond one that has imported foveola (`Pss` of
`/proc/self/smaps_rollup`, in which pages that several share count in part, and what is not in a file).
With `--linked` one file is written and indexed; the others are links to it, and their part of the index is
that of the first with names of their own: for sets so large that writing and indexing them takes hours.
"""

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode import photos
from foveola.data.shards import tar
from foveola.data.shards.index import index_of
from foveola.data.shards.parts import ShardColumns, ShardPart
from foveola.data.shards.stores import Shard, find_shards

MIB = 2**20
FIRST = "FOVEOLA_BENCHMARK_FIRST"  # of the environment: where the index of the first file is


# -- reading ------------------------------------------------------------------------------------------------


def make(root: Path, count: int) -> dict[str, str]:
    """The same images as a folder, shards and parquet files: their data strings."""
    import datasets

    import foveola

    (root / "folder").mkdir(parents=True)
    files = photos(64)[0]
    for number in range(count):
        data = files[number % len(files)] + number.to_bytes(4, "big")  # no two are the same file
        (root / "folder" / f"{number:07d}.jpg").write_bytes(data)
    foveola.pack(f"folder:{root}/folder", root / "shards", size="50MB", progress=False)
    rows = {"image": [{"bytes": p.read_bytes(), "path": p.name} for p in sorted((root / "folder").iterdir())]}
    table = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()}))
    (root / "parquet").mkdir()
    table.to_parquet(str(root / "parquet" / "0.parquet"), batch_size=100)
    return {kind: f"{kind}:{root}/{kind}" for kind in ("folder", "shards", "parquet")}


def ways(spec: str, order: list[int]) -> dict[str, Callable[[], int]]:
    """What is measured of a data string: each call says how many images it read."""
    from foveola.data.identity import hash_of
    from foveola.data.loader import Loader, LoaderConfig
    from foveola.data.sources import open_source

    source: Any = open_source(spec)

    def at_random() -> int:
        return sum(len(_bytes(source, index)) > 0 for index in order)

    def in_order() -> int:
        return sum(len(hash_of(_bytes(source, index))) > 0 for index in range(len(order)))

    config = LoaderConfig(canvas=256, workers=0)
    loader = Loader(source, 32, 0, config, with_objects=False)
    batches = iter(loader)
    steps = max(len(order) // 32, 1)
    return {
        "bytes, random order": at_random,
        "bytes, in order, hashed": in_order,
        "batches of the loader": lambda: sum(len(next(batches)) for _ in range(steps)),
    }


def _bytes(source: Any, index: int) -> bytes:
    found = source[index].image
    return found if isinstance(found, bytes) else found.read_bytes()


def read(count: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOVEOLA_CACHE"] = f"{folder}/cache"
        specs = make(Path(folder), count)
        order = random.Random(0).sample(range(count), count)
        measured = {kind: ways(spec, order) for kind, spec in specs.items()}
        speeds: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for what in measured["folder"]:
                for kind, each in measured.items():
                    began = time.process_time()
                    done = each[what]()
                    speeds.setdefault((what, kind), []).append(done / (time.process_time() - began))
    print(f"{count} images, medians of {rounds} rounds, images a core-second (ratio to the folder)")
    print("| | folder | shards | parquet |\n| --- | --- | --- | --- |")
    for what in measured["folder"]:
        plain = np.array(speeds[what, "folder"])
        cells = [
            f"{np.median(found):,.0f} ({np.median(found / plain):.2f})"
            for found in (np.array(speeds[what, kind]) for kind in specs)
        ]
        print(f"| {what} | {' | '.join(cells)} |")


# -- the index ----------------------------------------------------------------------------------------------


def make_tiny(folder: Path, entries: int, files: int) -> None:
    """Shards of small entries: what there is to index, and nothing to decode."""
    folder.mkdir(parents=True)
    each = -(-entries // files)
    for number in range(files):
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            for row in range(number * each, min((number + 1) * each, entries)):
                for name, data in ((f"{row % 1000:04d}/{row:09d}.jpg", b"\xff\xd8\xff\xe0 0123456789"),
                                   (f"{row % 1000:04d}/{row:09d}.cls", b"%d" % (row % 1000))):  # fmt: skip
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))


def link_tiny(folder: Path, entries: int, files: int) -> None:
    """The same from one file: links to it, and an index in which each has names of its own."""
    make_tiny(folder, entries // files, 1)
    began = time.process_time()
    first = tar.index_tar(find_shards("shards", str(folder), ".tar", None)[0], ShardColumns())
    each = (time.process_time() - began) / len(first)
    print(f"one file is indexed: {1e6 * each:.0f} us of a core for a sample", flush=True)
    first.save(Path(os.environ[FIRST]))
    for number in range(1, files):
        os.link(folder / "00000.tar", folder / f"{number:05d}.tar")
    index_of(find_shards("shards", str(folder), ".tar", None), ShardColumns(), index_tar)


def index_tar(shard: Shard, columns: ShardColumns) -> ShardPart:
    """The index of a link to the first file, by the name of what makes that of shards."""
    first = ShardPart.load(Path(os.environ[FIRST]))
    assert first is not None
    names = first.arrays["names"].reshape(len(first), -1).copy()
    names[:, :4] = np.frombuffer(f"{int(shard.name[:5]):04d}".encode(), np.uint8)
    hashes = [hashlib.blake2b(name.tobytes(), digest_size=8).digest() for name in names]
    arrays = first.arrays | {"names": names.ravel(), "name_hashes": np.frombuffer(b"".join(hashes), "<u8")}
    return ShardPart(arrays, highest=first.highest)


PHASE = """
import json, os, sys, time
from foveola.data.sources import open_source
import foveola.data.loader, numpy as np
def held(name="Pss"):
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith(name + ":")) / 1024
before, began = held(), time.perf_counter()
source = open_source(sys.argv[1])
opened = time.perf_counter() - began
source[len(source) // 2].image.read_bytes()
first = time.perf_counter() - began
after = held()
order = np.random.default_rng(0).permutation(len(source))[:20000]
begin = time.perf_counter()
for index in order.tolist():
    source[index].image.read_bytes()
touched = held()
import resource
print(json.dumps({"opened": opened, "first": first, "after": after - before, "touched": touched - before,
    "images": len(source),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "children": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    "each": (time.perf_counter() - begin) / len(order) * 1e6}))
"""


def index(entries: int, files: int, root: Path | None, linked: bool) -> None:
    folder = Path(tempfile.mkdtemp(dir=root))
    os.environ |= {"FOVEOLA_CACHE": str(folder / "cache"), FIRST: str(folder / "first.npz")}
    try:
        began = time.perf_counter()
        (link_tiny if linked else make_tiny)(folder / "shards", entries, files)
        size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
        print(f"{entries:,} samples, {2 * entries:,} entries, {files} files, {size / 2**30:.1f} GiB, "
              f"written in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        for what in ("warm", "warm", "warm") if linked else ("made", "warm", "warm"):
            done = subprocess.run([sys.executable, "-c", PHASE, f"shards:{folder}/shards"],
                                  check=True, capture_output=True, text=True)  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{what}: open in {found['opened']:.2f} s, first sample after {found['first']:.2f} s, "
                f"{found['after']:.0f} MiB more held, {found['touched']:.0f} MiB after 20,000 samples "
                f"at random ({found['each']:.0f} us each); at most {found['peak']:.0f} MiB in the process, "
                f"{found['children']:.0f} MiB in one that indexes",
                flush=True,
            )
        kept = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        print(f"on the disk {kept / MIB:.0f} MiB, {kept / entries:.0f} bytes a sample")
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("read", "index"))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--entries", type=int, default=10**6)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--linked", action="store_true")
    options = parser.parse_args()
    if options.what == "read":
        read(options.images, options.rounds)
    else:
        index(options.entries, options.files, options.folder, options.linked)


if __name__ == "__main__":
    main()
