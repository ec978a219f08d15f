"""Exact search and the graph (HNSW) in a million rows: core seconds and memory of one process, in one run.

    python -m benchmarks.search [--rows 1000000] [--width 128] [--inner 16]

Rows are made: normal numbers in `--inner` directions of the space and a tenth as much in all of them, since
features of images fill few of their directions, and a graph finds neighbours the better the fewer there are.
Queries are made alike, and are none of the rows; recall is the share of the ten nearest rows of 1,000 of
them, as exact search has these. Times are core seconds (process_time) of one thread, which other work on the
machine changes little; memory is that of the process, at its largest until then.
"""

import argparse
import resource
from pathlib import Path
from time import perf_counter, process_time

import faiss
import numpy as np
import torch

import foveola
from foveola.embedding.graph import graph_of

CHUNK = 65536  # rows that are made at once
QUERIES = (1, 100)
RECALL_QUERIES = 1000


def made_rows(count: int, width: int, inner: int, seed: int) -> np.ndarray:
    """Return rows, float32 [count, width]; the directions are the same for every seed."""
    directions = np.random.default_rng(0).normal(size=(inner, width)).astype(np.float32) / inner**0.5
    rng, rows = np.random.default_rng(seed), np.empty((count, width), np.float32)
    for start in range(0, count, CHUNK):
        part = rows[start : start + CHUNK]
        part[:] = rng.standard_normal((len(part), inner), np.float32) @ directions
        part += 0.1 * rng.standard_normal(part.shape, np.float32)
    return rows


def memory() -> str:
    """Return what the process holds, and the most it has held."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = int(lines["VmRSS"].split()[0]) / 2**20
    return f"memory {now:.2f} GiB, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"


def say(line: str) -> None:
    print(f"{line}; {memory()}", flush=True)


def ask(index: foveola.Index, method: str, words: argparse.Namespace) -> np.ndarray:
    """Say what queries cost; return the rows found for many of them, [queries, 10]."""
    for count in QUERIES:
        queries = made_rows(count, words.width, words.inner, 2)
        began = process_time()
        index.search(queries, method=method)
        first, began = process_time() - began, process_time()
        index.search(queries, method=method)
        again = process_time() - began
        say(f"{method}, {count} queries: {1e3 * again:.1f} core ms (the first time {first:.1f} core s)")
    return index.search(made_rows(RECALL_QUERIES, words.width, words.inner, 3), method=method).indices


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--inner", type=int, default=16)
    words = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    say("start")
    index = foveola.Index.build(made_rows(words.rows, words.width, words.inner, 1), device="cpu")
    say(f"{words.rows:,} rows of {words.width} as an index")
    exact = ask(index, "exact", words)
    began, clock = process_time(), perf_counter()
    index.graph = graph_of(index.vectors, None, index.device, progress=True)
    took = f"{process_time() - began:.0f} core s ({perf_counter() - clock:.0f} by the clock)"
    say(f"the graph is made in {took}")
    found = ask(index, "hnsw", words)
    shares = [len(set(e) & set(f)) / len(e) for e, f in zip(exact.tolist(), found.tolist(), strict=True)]
    print(
        f"recall of queries: {np.mean(shares):.4f}; of rows, as every answer says: {index.graph.recall:.4f}"
    )


if __name__ == "__main__":
    main()
