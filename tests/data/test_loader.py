"""The loader: its order, its resuming, its counting of bad images, and its workers."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import brentq

from foveola.config import ConfigError, build
from foveola.data import ahead
from foveola.data import loader as loader_file
from foveola.data.ahead import Asker, OutOfSharedMemory, room
from foveola.data.decode import to_canvas
from foveola.data.loader import Loader, LoaderConfig, too_many
from foveola.data.order import epoch_order
from foveola.data.sample import BadImage, Canvases, DataError, Objects, Sample
from foveola.data.scenes import Scenes
from foveola.data.sources import open_source


class Numbered:
    """Flat images that show their own number; `bad` ones cannot be read."""

    name, classes, has_objects = "numbered:", None, True

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if index in self.bad:
            if index % 2:
                raise BadImage(f"number {index}: no annotation")
            return Sample(b"", f"number {index}")
        boxes = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 1], [0, 0.5, 1, 1]])
        objects = Objects.from_boxes(boxes, np.array([0, 1, 2])) if index % 4 else None
        return Sample(np.full((8, 16, 3), index % 256, np.uint8), f"number {index}", objects, label=index)

    def fingerprint(self) -> str:
        return str(self.count)


class Held:
    """Images in memory."""

    name, classes, has_objects = "held:", None, False

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], f"image {index}")

    def fingerprint(self) -> str:
        return "held"


def config(**changes: Any) -> LoaderConfig:
    return build(LoaderConfig, {"canvas": 8, "mask_canvas": 8, "workers": 0} | changes)


def loader(source: Any = None, batch_size: int = 4, seed: int = 0, **options: Any) -> Loader:
    made = config(**options.pop("config", {}))
    return Loader(source or Numbered(30), batch_size, seed, made, with_objects=True, **options)


def take(some: Loader, count: int) -> list[Canvases]:
    return list(islice(some, count))


def equal(a: Canvases, b: Canvases) -> bool:
    same = all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    return same and a.skipped == b.skipped


def test_a_batch_is_what_the_samples_say():
    source = Scenes(size=40, count=20)
    batch = next(iter(loader(source, config={"canvas": 24, "mask_canvas": 10, "objects_per_image": 3})))
    assert batch.object_masks.shape == (4, 3, 10, 10)
    for row, index in enumerate(batch.indices.tolist()):
        sample = source[index]
        assert sample.objects is not None
        assert isinstance(sample.image, np.ndarray)
        assert torch.equal(batch.images[row], to_canvas(sample.image, 24))
        assert batch.labels[row] == sample.label
        drawn = [sample.objects.draw(k, 10) for k in range(len(sample.objects))]
        for mask, label in zip(batch.object_masks[row], batch.object_labels[row], strict=True):
            assert sample.objects.labels is not None
            matching = [k for k, one in enumerate(drawn) if np.array_equal(one, mask.numpy())]
            assert label in sample.objects.labels[matching]
    assert not batch.whole.any()
    assert torch.equal(batch.aspects, torch.ones(4))


def test_images_of_all_sizes_lie_in_the_corner_of_one_canvas():
    """The canvas of a batch is as large as its images need, and dark beyond each of them."""
    rng = np.random.default_rng(0)
    shapes = [(20, 30), (44, 12), (9, 9), (60, 100)]
    images = [rng.integers(100, 200, (*shape, 3), np.uint8) for shape in shapes]
    for canvas, largest in ((64, (60, 64)), (40, (40, 40)), (200, (60, 100))):
        batch = take(loader(Held(images), config={"canvas": canvas}), 1)[0]
        assert batch.images.shape == (4, 3, *largest)
        for image, extent, index in zip(batch.images, batch.extents.tolist(), batch.indices, strict=True):
            height, width = shapes[index]
            assert extent == [min(height, canvas), min(width, canvas)]
            assert torch.equal(image[:, : extent[0], : extent[1]], to_canvas(images[index], canvas))
            assert image.count_nonzero() == 3 * extent[0] * extent[1]
        assert torch.equal(batch.aspects, torch.tensor([w / h for h, w in shapes])[batch.indices])


def test_without_annotation_the_object_is_the_whole_image():
    batch = take(loader(batch_size=30), 1)[0]
    bare = batch.indices % 4 == 0
    assert torch.equal(batch.whole[:, 0], bare)
    assert (batch.object_masks[bare] == 255).all()
    assert (batch.object_labels[bare] == -1).all()
    assert (batch.object_masks[~bare].float().mean((1, 2, 3)) < 255).all()
    assert torch.equal(batch.aspects, torch.full((30,), 2.0))
    plain = next(iter(Loader(Numbered(30), 30, 0, config(), with_objects=False)))
    assert plain.whole.all()
    assert (plain.object_masks == 255).all()
    assert torch.equal(plain.labels, plain.indices)


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 5), (2, 5), (3, 2)])
def test_an_epoch_visits_each_sample_once_over_all_ranks(ranks: int, batch_size: int):
    made = [loader(batch_size=batch_size, rank=rank, world_size=ranks) for rank in range(ranks)]
    steps = 30 // (ranks * batch_size)
    assert {each.steps_per_epoch for each in made} == {steps}
    streams = [take(each, 2 * steps) for each in made]
    for epoch in range(2):
        parts = [batch for stream in streams for batch in stream[epoch * steps : (epoch + 1) * steps]]
        assert sorted(torch.cat([batch.indices for batch in parts]).tolist()) == list(range(30))
    together = torch.cat([stream[k].indices for k in range(steps) for stream in streams])
    assert together.tolist() == epoch_order(0, 0, 30).tolist()


def test_what_does_not_fill_a_batch_is_left_out():
    made = loader(Numbered(11), batch_size=2, world_size=2)
    assert made.steps_per_epoch == 2
    seen = torch.cat([batch.indices for batch in take(made, 2)]).tolist()
    assert len(set(seen)) == len(seen) == 4


def test_seeds_and_epochs_differ_and_repeat():
    order = [batch.indices.tolist() for batch in take(loader(batch_size=30), 3)]
    assert order == [batch.indices.tolist() for batch in take(loader(batch_size=30), 3)]
    assert order[0] != order[1] != order[2]
    assert take(loader(batch_size=30, seed=1), 1)[0].indices.tolist() != order[0]


def test_each_epoch_chooses_objects_anew():
    batches = take(loader(batch_size=30, config={"choose": "uniform"}), 60)
    chosen: dict[int, Counter] = {index: Counter() for index in range(30)}
    for batch in batches:
        for index, label in zip(batch.indices.tolist(), batch.object_labels[:, 0].tolist(), strict=True):
            chosen[index][label] += 1
    for index, counts in chosen.items():
        assert set(counts) == ({-1} if index % 4 == 0 else {0, 1, 2})
        assert index % 4 == 0 or min(counts.values()) > 6


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 15])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_any_step_gives_the_same_batches(workers: int, start: int):
    whole = take(loader(seed=5), start + 9)  # 7 steps an epoch
    part = take(loader(seed=5, start_step=start, config={"workers": workers}), 9)
    assert all(equal(a, b) for a, b in zip(whole[start:], part, strict=True))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_any_way_to_start_workers_gives_the_same_batches(how: str):
    if sys.platform == "win32" and how == "fork":
        pytest.skip("no fork on Windows")
    source = open_source("scenes:?size=32&count=20")
    alone = take(loader(source), 4)
    helped = take(loader(source, config={"workers": 2, "start": how, "prefetch": 1}), 4)
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(loader(config={"workers": 1}), 2)
    take(loader(), 2)
    assert torch.equal(torch.get_rng_state(), before)


# -- bad images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_counted_and_named(workers: int):
    source = Numbered(400, bad=(7, 100))
    made = loader(source, batch_size=20, config={"workers": workers})
    batches = take(made, 20)
    assert made.bad_count == 2
    assert made.bad_names == {"number 100 (the file is empty)", "image 7 (number 7: no annotation)"}
    assert sum(batch.skipped for batch in batches) == 2
    seen = torch.cat([batch.indices for batch in batches])
    assert not {7, 100} & set(seen.tolist())
    order = epoch_order(0, 0, 400)
    stood_in = np.flatnonzero(seen.numpy() != order)
    assert sorted(order[stood_in].tolist()) == [7, 100]
    for batch in batches:
        assert torch.equal(batch.images[:, 0, 0, 0], batch.indices.to(torch.uint8))
    again = take(loader(source, batch_size=20), 20)
    assert torch.equal(torch.cat([batch.indices for batch in again]), seen)


def test_more_bad_ones_than_the_limit_allows_among_all_are_certain():
    made = loader(Numbered(400, bad=tuple(range(0, 40, 2))), batch_size=20)
    take(made, 20)
    assert made.judge(0, 0, 4) == ""  # 1 % of 400
    reason = made.judge(0, 0, 5)
    assert reason.startswith("numbered:: 5 of all 400 images cannot be read, more than loader.max_bad=0.01 ")
    assert "(the file is empty)" in reason
    assert f"{made.bad_count} of 400 images" in made.judge(made.bad_count, made.seen)


@pytest.mark.parametrize(("share", "dies"), [(0.001, False), (0.005, False), (0.009, False), (0.05, True)])
def test_a_run_within_the_limit_of_bad_images_survives_and_one_beyond_it_is_stopped_soon(share, dies):
    """As 8 processes x 32 ask, after every step of an epoch of 400,000 images, with 20 seeds."""
    for seed in range(20):
        bad = np.random.default_rng(seed).binomial(8 * 32, share, 400_000 // 256).cumsum()
        judged = (step for step in range(len(bad)) if too_many(int(bad[step]), 256 * (step + 1), 0.01))
        at = next(judged, None)
        assert (at is not None and at < 20) if dies else at is None, (seed, at)


def test_the_bound_is_wilsons():
    """3 of 100: the share p for which 0.03 lies BEYOND_DOUBT standard deviations of p above it."""
    bound = brentq(lambda p: p + 4.0 * math.sqrt(p * (1 - p) / 100) - 0.03, 1e-9, 0.03)
    assert too_many(3, 100, bound * 0.999)
    assert not too_many(3, 100, bound * 1.001)
    assert not too_many(0, 100, 0.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_images(workers: int):
    with pytest.raises(DataError, match=r"^numbered:: 20 images cannot be read, such as [^\n]*$"):
        take(loader(Numbered(9, bad=tuple(range(9))), config={"workers": workers}), 1)


def test_broken_files_on_disk(tmp_path: Path):
    for k in range(120):
        Image.fromarray(np.full((10, 12, 3), k, np.uint8)).save(tmp_path / f"{k:03}.jpg")
    (tmp_path / "005.jpg").write_bytes(b"")
    whole = (tmp_path / "006.jpg").read_bytes()
    (tmp_path / "006.jpg").write_bytes(whole[: len(whole) // 2])
    made = loader(open_source(f"folder:{tmp_path}"), batch_size=40, config={"max_bad": 0.02, "workers": 1})
    take(made, 3)
    assert sorted(name.split()[0] for name in made.bad_names) == ["005.jpg", "006.jpg"]


def test_too_few_images():
    with pytest.raises(DataError, match=r"numbered:: 7 images do not fill one batch of 8; use"):
        loader(Numbered(7), batch_size=8)
    with pytest.raises(DataError, match=r"batch of 16 \(2 processes x 8\)"):
        loader(Numbered(15), batch_size=8, world_size=2)


def test_configuration_is_checked():
    for key, value in (("canvas", 4), ("workers", -1), ("max_bad", 2), ("choose", "biggest")):
        with pytest.raises(ConfigError, match=key):
            config(**{key: value})


# -- what happens to readers ------------------------------------------------------------------------------


class Away(Numbered):
    """A disk that is away while `flag` exists, which is removed at the `tries`-th read that fails."""

    def __init__(self, flag: Path, tries: int) -> None:
        super().__init__(30)
        self.flag, self.tries = flag, tries

    def __getitem__(self, index: int) -> Sample:
        if self.flag.exists():
            self.tries -= 1
            if not self.tries:
                self.flag.unlink()
            return Sample(Path("/nowhere/at/all.jpg"), f"number {index}")
        return super().__getitem__(index)


@pytest.mark.parametrize("tries", [1, 5, 21, 50])
def test_a_disk_that_was_away_for_a_moment_changes_nothing(tmp_path: Path, monkeypatch, tries: int):
    monkeypatch.setattr(loader_file, "PAUSES", (0.0,) * 5)
    (tmp_path / "away").touch()
    made = loader(Away(tmp_path / "away", tries))
    assert all(equal(a, b) for a, b in zip(take(made, 3), take(loader(), 3), strict=True))
    assert (made.bad_count, made.bad_names) == (0, set())
    (tmp_path / "away").touch()
    with pytest.raises(DataError, match=r"20 images cannot be read, such as number .*No such file"):
        take(loader(Away(tmp_path / "away", 1000)), 1)


class Deadly(Numbered):
    """Kills the process that reads number `at`; once, where there is a file to remember it."""

    def __init__(self, at: int, once: Path | None) -> None:
        super().__init__(30)
        self.at, self.once = at, once

    def __getitem__(self, index: int) -> Sample:
        if index == self.at and (self.once is None or not self.once.exists()):
            if self.once is not None:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_workers_that_die_are_replaced_bit_for_bit(tmp_path: Path, monkeypatch):
    said: list[str] = []
    at = int(epoch_order(0, 0, 30)[9])  # in the third batch
    source = Deadly(at, tmp_path / "died")
    before = signal.getsignal(signal.SIGCHLD)
    made = loader(source, config={"workers": 2, "prefetch": 1}, asker=Asker(said.append))
    assert all(equal(a, b) for a, b in zip(take(made, 8), take(loader(), 8), strict=True))
    assert said == [
        "a worker process ended (Killed) while reading: workers begin anew at the same step, one batch ahead"
    ]
    assert signal.getsignal(signal.SIGCHLD) is before
    monkeypatch.setattr(ahead, "RESTARTS", 1)
    batches = iter(loader(Deadly(at, None), config={"workers": 1}))
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataError, match=r"ended \(Killed\), 2 times at step 3: .*loader.workers=0"):
        next(batches)


class Hanging(Numbered):
    def __getitem__(self, index: int) -> Sample:
        time.sleep(1000)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_reads_that_hang_are_said_and_a_stop_ends_the_wait(monkeypatch, workers: int):
    monkeypatch.setattr(ahead, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(ahead, "HUNG_SECONDS", 0.1)
    said: list[str] = []
    asker = Asker(said.append, lambda: bool(said))
    began = time.monotonic()
    assert take(loader(Hanging(30), config={"workers": workers}, asker=asker), 1) == []
    assert time.monotonic() - began < 30  # not the 1000 s
    assert len(said) == 1
    assert said[0].startswith("no batch for 0 s: the disk or network")


class Slow(Numbered):
    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.02)
        return super().__getitem__(index)


def test_no_thread_that_reads_is_left_behind(monkeypatch):
    """An interpreter that ends while a thread is in torch may abort."""
    monkeypatch.setattr(ahead, "POLL_SECONDS", 0.01)
    asker = Asker(lambda _: None, lambda: True)
    before = set(threading.enumerate())
    assert take(loader(Slow(30), config={"workers": 0}, asker=asker), 1) == []  # stopped while it reads
    assert set(threading.enumerate()) <= before


def test_where_the_largest_batch_does_not_fit_the_first_one_tells_the_size(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead, "SHARED", tmp_path)
    options = {"canvas": 64, "objects_per_image": 3, "mask_canvas": 10, "workers": 2, "prefetch": 1}
    made = loader(batch_size=6, config=options)
    batch = next(iter(loader(batch_size=6, config=options | {"workers": 0})))
    actual = sum(x.numel() * x.element_size() for x in batch.tensors())
    assert actual < 6 * 3 * 64**2  # images of 8 x 16
    monkeypatch.setattr(ahead.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * actual))
    assert made.batches.room_of(0, 2, 1) == (actual, 2, 1)
    monkeypatch.setattr(ahead.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert made.batches.room_of(0, 2, 1) == (6 * (3 * 64**2 + 3 * 10**2), 2, 1)


@pytest.mark.parametrize(
    ("free", "wanted", "given"),
    [
        (1000, (2, 4), (2, 4)),
        (112, (2, 4), (2, 4)),  # 0.9 x 112 are 100: 8 batches, and 2 in use and on their way
        (111, (2, 4), (2, 3)),
        (56, (2, 4), (2, 1)),
        (34, (2, 4), (1, 1)),
        (23, (2, 4), (0, 4)),
        (0, (2, 4), (0, 4)),
        (0, (0, 4), (0, 4)),
    ],
)
def test_workers_fit_the_shared_memory_there_is(monkeypatch, tmp_path, free, wanted, given):
    monkeypatch.setattr(ahead, "SHARED", tmp_path)
    monkeypatch.setattr(ahead.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert room(10, *wanted) == given
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ahead.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * free))
    assert room(10, *wanted) == given


def test_without_shared_memory_reading_goes_on_without_workers(monkeypatch):
    """In docker /dev/shm has 64 MB: torch would lose the batch, and training would wait for it for ever."""
    said: list[str] = []

    def full(needed: int) -> None:
        raise OutOfSharedMemory

    monkeypatch.setattr(loader_file, "check_room", full)
    made = loader(config={"workers": 1}, asker=Asker(said.append))
    assert all(equal(a, b) for a, b in zip(take(made, 3), take(loader(), 3), strict=True))
    assert [text.partition(":")[0] for text in said] == [
        "/dev/shm is full, through which workers hand over their batches"
    ]
    monkeypatch.setattr(loader_file, "room", lambda size, workers, prefetch: (0, prefetch))
    said.clear()
    made = loader(config={"workers": 2}, asker=Asker(said.append))
    assert all(equal(a, b) for a, b in zip(take(made, 3), take(loader(), 3), strict=True))
    assert len(said) == 1
    assert "room for loader.workers=2 x loader.prefetch=4 batches of 0 MiB each: 0 x 4 instead" in said[0]


# -- workers ----------------------------------------------------------------------------------------------


def test_waiting_is_measured():
    class Slow(Numbered):
        def __getitem__(self, index: int) -> Sample:
            time.sleep(0.01)
            return super().__getitem__(index)

    made = loader(Slow(30), batch_size=10)
    take(made, 1)
    assert 0.1 <= made.wait_seconds < 5


SCRIPT = """
import os, signal, sys, time
from multiprocessing import active_children
from foveola.data.loader import Loader, LoaderConfig
from foveola.data.scenes import Scenes
config = LoaderConfig(canvas=32, mask_canvas=8, workers=2)
made = Loader(Scenes(size=32, count=40), 4, 0, config, with_objects=True)
batches = iter(made)
next(batches)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals tell their sender on Linux only")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_survive_a_signal_to_the_whole_group(number: signal.Signals, forked, tmp_path):
    """As Ctrl-C and batch systems send it: the training process decides what to do, and needs its batches."""
    code = (
        "import os, sys, time\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "for _ in range(20): next(batches)\n"
        "print(len(active_children()))\n"
    )
    with forked(SCRIPT + code, [str(tmp_path / "go on")]) as process:
        wait_for_line(process)
        (pid,) = process.pids
        assert os.getpgid(pid) == pid != os.getpgid(0)
        os.killpg(pid, number)
        (tmp_path / "go on").touch()
        codes = process.wait(60)
        said = process.printed[0].read_text(), process.errors[0].read_text()
    assert (codes, *said) == ([0], "ready\n2\n", "")


def wait_for_line(process: Any) -> str:
    deadline = time.perf_counter() + 60
    while not (text := process.printed[0].read_text()).endswith("\n"):
        assert time.perf_counter() < deadline, process.errors[0].read_text()
        time.sleep(0.01)
    return text


def test_leaving_with_a_loader_in_use_does_not_hang():
    """In an interpreter that takes itself apart at its end."""
    command = [sys.executable, "-c", SCRIPT + "print('end')"]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_when_the_training_process_is_killed(forked):
    code = "import time; print(*[child.pid for child in active_children()], flush=True); time.sleep(600)"
    with forked(SCRIPT + code) as process:
        workers = [int(pid) for pid in wait_for_line(process).split()]
        process.kill()
        process.wait()
    assert len(workers) == 2
    deadline = time.perf_counter() + 30
    while any(alive(pid) for pid in workers):
        assert time.perf_counter() < deadline, "workers outlive the training process"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu():
    alone, moved = take(loader(), 3), take(loader(device="cuda", config={"workers": 2}), 3)
    assert all(batch.images.device.type == "cuda" for batch in moved)
    assert all(equal(a, b.to("cpu")) for a, b in zip(alone, moved, strict=True))
