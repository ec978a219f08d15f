"""Faults of the machine, made by the machine where it can make them here, in one line each."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foveola.config import ConfigError, UserError
from foveola.failures import explain, explained


def raised(work) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (any: what it is, is the question)
        work()
    return caught.value


def test_what_the_system_refuses_names_the_path_and_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    cases = {
        "a file stands where a folder belongs": lambda: (tmp_path / "file" / "x").write_text(""),
        "choose a shorter name": lambda: (tmp_path / ("x" * 300)).write_text(""),
        "a folder stands where a file belongs": lambda: tmp_path.write_text(""),
        "something else stands there": lambda: (tmp_path / "file").mkdir(),
        "No such file or directory": lambda: (tmp_path / "nowhere").read_text(),
    }
    for remedy, work in cases.items():
        reason = explain(raised(work))
        assert reason is not None
        assert remedy in reason
        assert str(tmp_path) in reason
        assert "\n" not in reason
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EDQUOT):
        reason = explain(OSError(number, os.strerror(number), "/some/where"))
        assert reason is not None
        assert reason.startswith(f"/some/where: {os.strerror(number)}; ")


@pytest.fixture
def small_files():
    """Files of more than 4 kB cannot be written: what a full disk looks like to who writes."""
    import signal

    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_writers_of_tensors_that_meet_a_limit(tmp_path, small_files):
    state = {"x": torch.zeros(100_000)}
    for work in (
        lambda: torch.save(state, tmp_path / "a.pt"),
        lambda: save_file(state, tmp_path / "a.safetensors"),
        lambda: (tmp_path / "a").write_bytes(bytes(100_000)),
    ):
        reason = explain(raised(work))
        assert reason is not None
        assert "limit on the size of files" in reason


def test_sizes_that_no_memory_holds():
    for work in (
        lambda: torch.empty(10**15),
        lambda: torch.nn.Linear(10**10, 10**10),
        lambda: bytearray(10**16),
        lambda: torch.empty(2**62, 2**62),
    ):
        reason = explain(raised(work))
        assert reason is not None
        assert reason.startswith("out of memory: ")
        assert "\n" not in reason
    assert "out of memory" in str(explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")))


def test_other_errors_are_left_alone(tmp_path):
    for error in (ValueError("x"), KeyError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")):
        assert explain(error) is None
    with pytest.raises(ZeroDivisionError), explained("dividing"):
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError, match=r"^mine$"), explained("reading"):
        raise ConfigError("mine")
    with (
        pytest.raises(UserError, match=r"^the list cannot be read: .*nowhere: No such file"),
        explained("the list cannot be read"),
    ):
        Path(tmp_path / "nowhere").read_text()
