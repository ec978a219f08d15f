"""Do the tests notice? Lines of foveola are broken one at a time in a copy, and their tests must fail.

    python -m benchmarks.mutants [NAME ...]

Each mutant is a line, what it becomes, and the tests that should kill it. The first four were alive once. The
exit code is 1 if one lives, or if its line is not found any more.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; `tests` are what pytest is given."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "headline": Mutant(
        "evaluation/classification/knn.py",
        "best = max(ks, key=lambda k: percent(correct[k]))",
        "best = ks[0]",
        "tests/evaluation/classification/test_knn.py -k headline",
    ),
    "accumulation": Mutant(
        "training/loop.py",
        "progress.step * self.accumulate + part",
        "progress.step * self.accumulate",
        "tests/training/test_loop.py -k views_of_their_own",
    ),
    "empty-object": Mutant(
        "models/encoder.py",
        "read = (objects | ~objects.any(dim=2, keepdim=True))",
        "read = objects",
        "tests/models/test_encoder.py -k without_patches",
    ),
    "parcels": Mutant(
        "evaluation/views/retrieval.py",
        "streams = Streams(config.seed, number)",
        "streams = Streams(config.seed, 0)",
        "tests/evaluation/views/test_retrieval.py -k parcels",
    ),
    "ema": Mutant(
        "methods/method.py",
        "torch._foreach_lerp_(old, new, 1 - momentum)",
        "torch._foreach_lerp_(old, new, momentum)",
        "tests/methods/test_distillation.py",
    ),
    "temperature": Mutant(
        "losses.py",
        "log = logits.float() / temperature",
        "log = logits.float()",
        "tests/test_losses.py -k sinkhorn",
    ),
    "lost-object": Mutant(
        "views/batch.py",
        "lost = empty.any(dim=1)",
        "lost = empty.all(dim=1)",
        "tests/views/test_objects.py tests/views/test_batch.py",
    ),
    "koleo-views": Mutant(
        "methods/terms/spread.py",
        "for view in objects.unbind(dim=1)]).sum()",
        "for view in objects.unbind(dim=1)]).mean()",
        "tests/methods/test_dinov2.py -k koleo",
    ),
    "image-token": Mutant(
        "methods/terms/token.py",
        "tokens[:, :, -1:] if",
        "tokens[:, :, :1] if",
        "tests/methods/test_terms.py -k image_token",
    ),
    "own-object": Mutant(
        "models/encoder.py",
        "alone = objects.flatten(0, 1)[:, None]",
        "alone = objects.flatten(0, 1)[:, None] | True",
        "tests/models/test_encoder.py -k object",
    ),
    "smallest-k": Mutant(
        "evaluation/classification/knn.py",
        "best = max(ks, key=lambda k: percent(correct[k]))",
        "best = max(reversed(ks), key=lambda k: percent(correct[k]))",
        "tests/evaluation/classification/test_knn.py -k smallest",
    ),
    "torn-line": Mutant(
        "files.py",
        "if number < len(texts):",
        "if True:",
        "tests/reports/test_record.py",
    ),
}


def killed(mutant: Mutant, copy: Path) -> bool | None:
    """Whether the tests fail on the broken line; None where the line is not there exactly once."""
    path = copy / "foveola" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return None
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    try:
        code = subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode
        if code not in (0, 1):
            raise SystemExit(f"pytest ends with {code}, not with a verdict: {mutant.tests}")
        return code == 1
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*MUTANTS], metavar="NAME", help=", ".join(MUTANTS))
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in ("foveola", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, Path(folder) / part)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder)
        for name in parser.parse_args().names:
            found = killed(MUTANTS[name], Path(folder))
            alive += not found
            print(f"{name:<14}", {True: "killed", False: "ALIVE", None: "line not found"}[found], flush=True)
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
