"""What every test shares. Shapes and types of foveola are checked while testing.

They are checked at the first calls of every function in every test: a training run calls the same functions a
thousand times with the same shapes, and to check all of them would take a third of the time of all tests.
"""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from types import FunctionType
from typing import Any

import jaxtyping
import pytest
import torch

CALLS_CHECKED = 10  # of each function, in each test
calls: list[list[int]] = []  # of each function, in this test


def first_calls(plain: Callable[..., Any], check: Callable[[Any], Any]) -> Callable[..., Any]:
    """The checked function for the first calls in a test, the plain one after them.

    It is made when it is first called: to make one of every function would take longer than many tests.
    """
    count, checked = [0], functools.cache(lambda: check(plain))
    calls.append(count)

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if count[0] >= CALLS_CHECKED or torch.compiler.is_exporting():  # where sizes are symbols, no ints
            return plain(*args, **kwargs)
        count[0] += 1
        return checked()(*args, **kwargs)

    return call


def jaxtyped(*, typechecker: Any, check_all: Callable[..., Any] = jaxtyping.jaxtyped) -> Callable[[Any], Any]:
    """In place of jaxtyping's, for what the import hook decorates."""

    def decorate(what: Any) -> Any:
        check = check_all(typechecker=typechecker)
        if isinstance(what, FunctionType):
            return first_calls(what, check)
        plain, made = what.__init__, check(what)
        if (checked := made.__init__) is not plain:  # of a dataclass

            @functools.wraps(checked)
            def init(self: Any, *args: Any, **kwargs: Any) -> None:
                (plain if torch.compiler.is_exporting() else checked)(self, *args, **kwargs)

            made.__init__ = init
        return made

    return decorate


# Before anything imports foveola. The tower lets an int stand for a float, as type checkers do.
jaxtyping.jaxtyped = jaxtyped
jaxtyping.install_import_hook(
    "foveola", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)  # what is small here gets no faster by more, and sums keep their order


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def checks_anew() -> None:
    for count in calls:
        count[0] = 0


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What foveola keeps of files of the tests stays with the tests; matplotlib's fonts where they are."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR") or str(before / "matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FOVEOLA_CACHE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def painted_once() -> Iterator[None]:
    """Scenes are painted once for all tests: to paint them takes longer than what most tests do with them."""
    from foveola.data.scenes import Scene, Scenes

    paint = Scenes.scene

    @functools.lru_cache(maxsize=1024)
    def kept(split: Any, size: int, seed: int, objects: tuple[int, int], index: int) -> Scene:
        return paint(Scenes(split, size, index + 1, seed, objects), index)

    @functools.wraps(paint)
    def scene(self: Scenes, index: int) -> Scene:
        if type(self) is not Scenes or not 0 <= index < self.count:
            return paint(self, index)
        return deepcopy(kept(self.split, self.size, self.seed, self.objects, index))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scenes, "scene", scene)
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets named by FOVEOLA_DATA."""
    if "FOVEOLA_DATA" not in os.environ:
        pytest.skip("set FOVEOLA_DATA to a folder of data sets to run this")
    folder = Path(os.environ["FOVEOLA_DATA"])
    assert folder.is_dir(), f"FOVEOLA_DATA={folder} is not a folder"
    return folder


@pytest.fixture(scope="session")
def tiny_recipe() -> str:
    """A recipe that trains in less than a second, for commands that need a run."""
    return """
base: demo
data: "scenes:?size=32&count=64"
duration: 4 steps
batch_size: 16
device: cpu
model: {width: 32, depth: 2, heads: 2, patch_size: 8, image_size: 16}
views: {global_size: 16}
loader: {canvas: 32, mask_canvas: 32, workers: 0, objects_per_image: 1}
transform: {resize: 16, crop: 16}
"""


@pytest.fixture(scope="session")
def host() -> Iterator[subprocess.Popen[str]]:
    """The process of host.py, which forks others."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "host.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take most of a report's time once its results are there."""
    from foveola.drawing import html

    monkeypatch.setattr(
        html, "charts", lambda charts, salt, names=(): "".join(f"<p>{chart.title}</p>" for chart in charts)
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that is installed already."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with warnings.catch_warnings():  # playwright's own loop and pipes
        warnings.simplefilter("ignore")
        with sync.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            yield browser
            browser.close()


class Forked:
    """Processes that run a script, forked from `host`, which has imported what takes long.

    Attributes:
        pids: their numbers. Each is the first of a group of its own, with its workers.
        printed, errors: the files of what each writes to its standard output, and to its standard error.
    """

    def __init__(
        self, host: subprocess.Popen[str], folder: Path, code: str, ranks: int, words: Sequence[str]
    ):
        self.host, script = host, folder / "ranks.py"
        script.write_text(code)
        self.printed, self.errors = ([folder / f"{n}.{end}" for n in range(ranks)] for end in ("out", "err"))
        for path in (*self.printed, *self.errors):
            path.touch()  # so that they can be read before the processes open them
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            [common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)), str(out), str(errors)]
            for rank, (out, errors) in enumerate(zip(self.printed, self.errors, strict=True))
        ]
        order = {"words": [str(script), *words], "folder": str(Path.cwd()), "processes": processes}
        assert host.stdin is not None
        assert host.stdout is not None
        print(json.dumps(order), file=host.stdin, flush=True)
        self.pids: list[int] = json.loads(host.stdout.readline())
        self.codes: list[int] | None = None

    def wait(self, timeout: float = 120) -> list[int]:
        """Their exit codes, when all have ended; those that take too long are killed."""
        assert self.host.stdout is not None
        late = threading.Timer(timeout, self.kill)
        late.start()
        codes: list[int] = json.loads(self.host.stdout.readline())
        self.codes = codes
        late.cancel()
        return codes

    def kill(self) -> None:
        for pid in self.pids if self.codes is None else ():
            os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        if self.codes is None:
            self.kill()
            self.wait()


@pytest.fixture(scope="session")
def forked(host: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Forked]:
    """`with forked(code, words) as process`: code in a process of its own, while a test does something else.

    Nothing is checked there at calls, and it ends without taking its modules apart.
    """

    def start(code: str, words: Sequence[str] = (), ranks: int = 1) -> Forked:
        return Forked(host, tmp_path_factory.mktemp("ranks"), code, ranks, words)

    return start


@pytest.fixture(scope="session")
def run_ranks(forked: Callable[..., Forked]) -> Callable[..., list[str]]:
    """run_ranks(code, ranks=2, words=[]): run code in as many processes as torchrun would; what each printed.

    Nothing is checked there at calls. One rank is a process of its own.
    """

    def run(code: str, ranks: int = 2, words: Sequence[str] = (), timeout: float = 120) -> list[str]:
        with forked(code, words, ranks) as processes:
            for code_, errors in zip(processes.wait(timeout), processes.errors, strict=True):
                assert code_ == 0, errors.read_text()
            return [path.read_text() for path in processes.printed]

    return run


@pytest.fixture
def example_of_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes the example of docs/extend.md that defines a class as a module that Python finds.

    Takes the class and the module's name; returns the folder of the module.
    """
    page = (Path(__file__).parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")

    def write(defined: str, module: str) -> Path:
        blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        (code,) = (block for block in blocks if re.search(rf"^class {defined}\b", block, re.MULTILINE))
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return write
