"""What is said of files that cannot be read from afar: a lost server, or a fault of a program."""

import importlib
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import foveola
from foveola.config import UserError
from foveola.data.shards import stores
from foveola.data.sources import decode, open_source

REGISTRY = importlib.import_module("fsspec.registry")._registry  # classes by protocol
# What their file systems say of the version of a file: gcsfs the tag, HfFileSystem the id in git.
VERSIONS = {"gs": "etag", "hf": "blob_id"}


@pytest.fixture(params=VERSIONS)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file system in memory in place of that of a protocol whose servers cannot be reached."""
    name = request.param

    class InMemory(MemoryFileSystem):
        protocol = name
        store: dict[str, Any] = {}  # noqa: RUF012 (as in the class above)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix(f"{name}://").strip("/")

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            found = super().info(path, **options)
            found.pop("created", None)
            if found["type"] == "file":
                found[VERSIONS[name]] = str(hash(self.store[self._strip_protocol(path)].getvalue()))
            return found

        def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
            names = super().find(path, maxdepth, withdirs)
            return {each: self.info(each) for each in names} if options.get("detail") else names

    monkeypatch.setitem(REGISTRY, name, InMemory)
    yield InMemory()
    stores._check_once.cache_clear()


def test_every_protocol_of_fsspec_goes_the_same_way(store: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FOVEOLA_CACHE", str(tmp_path / "cache"))
    foveola.pack("scenes:?count=12&size=32", tmp_path / "shards", size="10KB", progress=False)
    local, name = open_source(f"shards:{tmp_path}/shards"), store.protocol
    files = sorted((tmp_path / "shards").iterdir())
    assert len(files) > 2
    for file in files:
        store.pipe_file(f"bucket/data/{file.name}", file.read_bytes())
    for more in ("*.tar", f"?cache={tmp_path}/blocks", ""):
        there: Any = open_source(f"shards:{name}://bucket/data/{more}")
        assert there.identity().digest == local.identity().digest
        assert all(
            np.array_equal(decode(a.image), decode(b.image)) for a, b in zip(there, local, strict=True)
        )
    there = open_source(f"shards:{name}://bucket/data/*.tar")
    first = files[0].read_bytes()
    store.pipe_file(f"bucket/data/{files[0].name}", first[:-1] + b"\1")  # of the same size
    stores._check_once.cache_clear()  # as a process that begins
    with pytest.raises(UserError, match="was changed since it was indexed"):
        decode(there[0].image)


@pytest.mark.parametrize(("url", "package"), [("gs", "gcsfs"), ("hf", "huggingface_hub"), ("s3", "s3fs")])
def test_a_missing_package_names_the_extra(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(REGISTRY, url, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pip install 'foveola\[remote\]'"):
        open_source(f"shards:{url}://bucket/a.tar")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("no route to host"), "cannot be read: no route to host"),
        (
            TypeError("expected bytes"),
            "a fault inside foveola or its libraries, not of the server: TypeError: exp",
        ),
    ],
)
def test_a_lost_server_is_told_from_a_fault_inside(error: Exception, said: str, monkeypatch: Any) -> None:
    system = fsspec.filesystem("memory")

    def fails(*_: Any, **__: Any) -> None:
        raise error

    for name in ("info", "find", "glob", "exists", "isdir"):
        monkeypatch.setattr(type(system), name, fails)
    with pytest.raises(UserError) as raised:
        open_source("shards:memory://lost/a.tar")
    assert said in str(raised.value)
    assert ("not of the server" in str(raised.value)) == isinstance(error, TypeError)
