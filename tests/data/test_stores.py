"""What is said of files that cannot be read from afar: a lost server, or a fault of a program."""

from typing import Any

import fsspec
import pytest

from foveola.config import UserError
from foveola.data.sources import open_source


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
