"""k-NN classification against scikit-learn's brute force, same data, same cores, one run.

    python -m benchmarks.knn [--small] [--device cuda]

Ours: `foveola.evaluation.classification.knn.predict` (k = 10, 20, 100, 200 at once). scikit-learn:
`KNeighborsClassifier` on cosine distances (its only exact route to this vote), and its fastest exact search,
squared Euclidean on unit rows, without any vote. Each runs in a process of its own, so that peak memory above
that of the data can be told apart.
"""

import argparse
import time

import numpy as np
import torch

from benchmarks.memory import in_a_process, peak_mib

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CLASSES = 100


def make(queries: int, references: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping clouds: float32 references [references, width], its labels, queries [queries, width]."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, width)).astype(np.float32)
    labels = rng.integers(CLASSES, size=references)
    noise = 3 * rng.normal(size=(references, width)).astype(np.float32)
    others = rng.integers(CLASSES, size=queries)
    return (
        centres[labels] + noise,
        labels,
        centres[others] + 3 * rng.normal(size=(queries, width)).astype(np.float32),
    )


def ours(references: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: str) -> np.ndarray:
    from foveola.evaluation.classification.knn import predict

    b, y, q = (torch.from_numpy(x) for x in (references, labels, queries))
    return predict(q, b, y, k=KS, classes=CLASSES, temperature=TEMPERATURE, device=device)[KS[-1]][
        :, 0
    ].numpy()


def classifier(references: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: str) -> np.ndarray:
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(
        KS[-1], weights=lambda d: np.exp((1 - d) / TEMPERATURE), metric="cosine", algorithm="brute", n_jobs=-1
    )
    return model.fit(references, labels).predict(queries)


def search(references: np.ndarray, labels: np.ndarray, queries: np.ndarray, device: str) -> None:
    from sklearn.neighbors import NearestNeighbors

    references = references / np.linalg.norm(references, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    model = NearestNeighbors(n_neighbors=KS[-1], algorithm="brute", metric="sqeuclidean", n_jobs=-1)
    model.fit(references).kneighbors(queries)


def measure(name: str, sizes: tuple[int, int, int], device: str) -> tuple[float, float, np.ndarray]:
    """Seconds, MiB above those of the data, predictions."""
    references, labels, queries = make(*sizes)
    candidate = {"ours": ours, "classifier": classifier, "search": search}[name]
    candidate(references[:1000], labels[:1000], queries[:100], device)  # imports, thread pools
    before = peak_mib()
    start = time.perf_counter()
    predictions = candidate(references, labels, queries, device)
    seconds = time.perf_counter() - start
    return seconds, peak_mib() - before, predictions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="2,000 against 20,000 instead of 50,000 against 100,000"
    )
    parser.add_argument("--device", default="cpu", help="where ours runs")
    arguments = parser.parse_args()
    sizes = (2_000, 20_000, 384) if arguments.small else (50_000, 100_000, 384)
    names = ("ours", "classifier", "search")
    results = {name: in_a_process(measure, name, sizes, arguments.device) for name in names}
    print(
        f"{sizes[0]:,} queries, {sizes[1]:,} x {sizes[2]} references, k = {KS}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':44}{'seconds':>9}{'ratio':>8}{'extra MiB':>11}")
    shown = {
        "ours": f"foveola ({arguments.device}), four values of k",
        "classifier": "scikit-learn KNeighborsClassifier, k = 200",
        "search": "scikit-learn fastest search, k = 200, no vote",
    }
    for name, (seconds, memory, _) in results.items():
        print(f"{shown[name]:<46}{seconds:>7.2f}{seconds / results['ours'][0]:>8.2f}{memory:>11.0f}")
    same = (results["ours"][2] == results["classifier"][2]).mean()
    print(f"same class as scikit-learn: {100 * same:.2f} %")


if __name__ == "__main__":
    main()
