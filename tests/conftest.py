"""What every test shares. Shapes and types of foveola are checked at every call while testing."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Before anything imports foveola. The tower lets an int stand for a float, as type checkers do.
install_import_hook("foveola", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

ROOT = Path(__file__).resolve().parents[1]
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What foveola keeps of files of the tests stays with the tests; matplotlib's fonts where they are."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(before / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FOVEOLA_CACHE", raising=False)
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets named by FOVEOLA_DATA."""
    if "FOVEOLA_DATA" not in os.environ:
        pytest.skip("set FOVEOLA_DATA to a folder of data sets to run this")
    folder = Path(os.environ["FOVEOLA_DATA"])
    assert folder.is_dir(), f"FOVEOLA_DATA={folder} is not a folder"
    return folder


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """run_ranks(code, ranks=2): run code in that many processes, as torchrun would; what each printed."""

    def run(code: str, ranks: int = 2, timeout: float = 120) -> list[str]:
        script = tmp_path / "ranks.py"
        script.write_text(code)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        common = os.environ | {"PYTHONPATH": str(ROOT)} | {name: str(value) for name, value in shared.items()}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            outputs = [process.communicate(timeout=timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
        return [out for out, _ in outputs]

    return run
