"""Files that are whole or not there, with the permissions of any other file."""

import errno
import os
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from foveola import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    assert files.write_text(path, "first ä\n") == path
    with files.whole(path) as part:
        part.write_text("second")
        assert path.read_text(encoding="utf-8") == "first ä\n"
    assert path.read_text() == "second"
    assert [left.name for left in path.parent.iterdir()] == ["notes.txt"]


def write_half(path):
    with files.whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "notes.txt"
    for before in (None, "first"):
        if before:
            path.write_text(before)
        with pytest.raises(KeyboardInterrupt):
            write_half(path)
        assert [left.read_text() for left in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, monkeypatch, run_ranks, mask):
    """safetensors writes files that only their owner can read, whatever the umask says."""
    code = f"""
        import os, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from foveola import files
        os.umask({mask})
        with files.whole("model.safetensors") as part:
            save_file({{"x": torch.zeros(1)}}, part)
        files.write_text("notes.txt", "text")
        Path("other").touch()
    """
    monkeypatch.chdir(tmp_path)
    run_ranks(textwrap.dedent(code), ranks=1)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "notes.txt", "other"), 0o666 & ~mask)


def test_what_killed_processes_left_is_removed(tmp_path):
    path, old = tmp_path / "model[1].safetensors", 2 * files.STALE_SECONDS
    names = {
        ".model[1].safetensors.123": True,  # left by a killed process
        ".model[1].safetensors.124": False,  # another process may be writing it
        ".other.safetensors.123": False,
        ".model[1].safetensors.txt": False,
    }
    for name in names:
        (tmp_path / name).touch()
        if name != ".model[1].safetensors.124":
            os.utime(tmp_path / name, (time.time() - old,) * 2)
    with files.whole(path) as part:
        save_file({"x": torch.ones(2)}, part)
    left = {name for name, removed in names.items() if not removed}
    assert {found.name for found in tmp_path.iterdir()} == left | {path.name}


@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_is_told_with_the_file_that_was_asked_for(tmp_path, named):
    """Libraries name no file, or the temporary one."""
    with pytest.raises(OSError, match=r"[/\\]x\.png'$"), files.whole(tmp_path / "x.png") as part:
        raise OSError(errno.ENOSPC, "No space left on device", *([str(part)] if named else []))
    with pytest.raises(OSError, match="other"), files.whole(tmp_path / "x.png"):
        raise OSError(errno.ENOENT, "No such file", "other")


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "encoders" / "best"
    with files.whole_folder(target) as part:
        assert not target.exists()
        (part / "weights").write_text("first")

    def torn() -> None:
        with files.whole_folder(target) as part:
            (part / "weights").write_text("torn")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torn()
    assert (target / "weights").read_text() == "first"
    with files.whole_folder(target) as part:
        (part / "other").write_text("second")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in target.parent.iterdir()] == ["best"]


def test_a_folder_that_is_replaced_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    target, new, earlier = (tmp_path / name for name in ("step-1", ".new", "step-1.replaced"))
    for folder in (target, new):
        folder.mkdir()
        (folder / "said").write_text(folder.name)
    rename = Path.rename

    def killed(self: Path, to: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            files.put_folder(new, target, earlier)
    assert (earlier / "said").read_text() == "step-1"
    files.put_folder(new, target, earlier)
    assert (target / "said").read_text() == ".new"
    assert not earlier.exists()


def full(path: str | Path | None = None) -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", *([] if path is None else [str(path)]))


@pytest.mark.parametrize(("named", "said"), [("model.onnx", "mine/model.onnx"), ("", "mine"), (None, "mine")])
def test_a_fault_in_a_folder_names_what_was_asked_for(tmp_path, named, said):
    with pytest.raises(OSError, match="No space") as found, files.whole_folder(tmp_path / "mine") as part:
        raise full(named if named is None else part / named)
    assert (found.value.filename, found.value.filename2) == (str(tmp_path / said), None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/mine'$"), files.whole_folder(tmp_path / "file" / "mine"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_is_written_where_a_link_leads(tmp_path, there):
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    link.symlink_to(target)
    if there:
        target.mkdir(parents=True)
    with files.whole_folder(link) as part:
        (part / "weights").touch()
    assert link.readlink() == target
    assert [path.name for path in target.iterdir()] == ["weights"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_folder_whose_process_was_killed_between_two_names_comes_back(tmp_path):
    target, old = tmp_path / "best", 2 * files.STALE_SECONDS
    for name in (".replaced-best", ".best.123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    os.utime(tmp_path / ".best.123", (time.time() - old,) * 2)
    with pytest.raises(OSError, match="No space"), files.whole_folder(target):
        raise full()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (target / "weights").read_text() == ".replaced-best"
