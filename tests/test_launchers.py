"""Processes that torchrun did not start: srun, mpirun, `gpus=8` of a command, and jobs of Slurm."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foveola import launchers, slurm
from foveola.cli import main
from foveola.config import UserError
from foveola.files import RunFolder
from foveola.launchers import count_of, first_host, join_tasks, machines

SRUN = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04],login1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
}
TASK = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu03"}


def joined(environment: dict[str, str]) -> dict[str, str]:
    told = dict(environment)
    join_tasks(told)
    return {name: value for name, value in told.items() if name not in environment}


def test_tasks_of_srun_find_each_other() -> None:
    told = joined(SRUN)
    assert told.pop("MASTER_PORT") == str(20_000 + 12345 * 7 % 12_000)
    assert told == TASK
    assert joined(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}).keys() == TASK.keys() - {
        "MASTER_ADDR"
    }


def test_steps_of_a_job_and_other_jobs_have_ports_of_their_own() -> None:
    ports = {joined(SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})["MASTER_PORT"]
             for job in ("12345", "12346") for step in ("0", "1")}  # fmt: skip
    assert len(ports) == 4


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node[003-006,9],b2", "node003"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]n[07,09]-ib", "rack2n07-ib"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_of_mpi() -> None:
    common = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    here = common | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert joined(here) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    with pytest.raises(UserError, match=r"mpirun started 4 tasks on several machines, .*MASTER_ADDR"):
        joined(common | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})
    hydra = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert joined(hydra)["RANK"] == "1"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 tasks, .*'SLURM_PROCID' is missing"),
        (SRUN | {"SLURM_LOCALID": "x"}, "srun started 7 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun started 8 tasks"),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, "mpiexec started 8 tasks"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1: a launcher started several tasks, but not how many"),
    ],
)
def test_tasks_that_cannot_find_each_other_are_refused(environment: dict[str, str], said: str) -> None:
    """Each would do the whole work alone, and write over what the others wrote."""
    with pytest.raises(UserError, match=said):
        joined(environment)
    assert joined(environment | {"WORLD_SIZE": "1"}) == {}  # on purpose


def test_one_task_is_no_group() -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        assert joined({name: "1"}) == {}


def test_how_many_processes_are_asked_for() -> None:
    assert count_of("gpus=all", lambda: 4) == 4
    assert count_of("gpus=2", lambda: 4) == 2
    assert count_of("processes=3", lambda: 0) == 3
    for asked, said in [
        ("gpus=8", "this machine shows 4"),
        ("gpus=x", "or all"),
        ("processes=0", "a whole number"),
    ]:
        with pytest.raises(UserError, match=said):
            count_of(asked, lambda: 4)
    with pytest.raises(UserError, match="shows no GPU; processes=2 device=cpu"):
        count_of("gpus=all", lambda: 0)
    with pytest.raises(UserError, match="one of them is enough"):
        launchers.processes_asked(["pretrain", "x", "gpus=2", "processes=2"])


def test_one_task_a_machine_starts_the_processes_of_its_machine() -> None:
    one = SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    one |= {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    met = machines(one)
    assert (met["min_nodes"], met["max_nodes"], met["rdzv_configs"]["rank"]) == (3, 3, 2)
    assert met["rdzv_endpoint"].startswith("gpu03:2")
    assert machines({})["max_nodes"] == 1
    with pytest.raises(UserError, match="3 tasks were started here"):
        machines(SRUN)
    with pytest.raises(UserError, match="leave it out under torchrun"):
        machines({"RANK": "0", "WORLD_SIZE": "2"})


# -- whole runs -------------------------------------------------------------------------------------------

RUN = ("pretrain", "demo", "device=cpu", "data=scenes:?size=32&count=64", "batch_size=8", "loader.workers=0",
       "model.width=24", "model.depth=1", "model.heads=2", "views.global_size=32", "loader.canvas=32",
       "duration=4 steps", "log_every=1", "evaluate_every=null")  # fmt: skip


def started(out: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "foveola.cli", *RUN, f"out={out}", *words],
        env=known | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(out).read_metrics()]


def test_tasks_of_srun_train_one_run_as_processes_of_the_command_do(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tasks = [
        started(
            tmp_path / "srun",
            **SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
            | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    own = started(tmp_path / "own", "processes=2")
    for task in (*tasks, own):
        said, _ = task.communicate(timeout=240)
        assert task.returncode == 0, said
    assert len(losses(tmp_path / "own")) == 4
    assert losses(tmp_path / "srun") == losses(tmp_path / "own")


def test_a_stopped_run_of_several_processes_says_so_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    task = started(out, "processes=2", "duration=4000 steps", **{launchers.STOPPED: "75"})
    deadline = time.monotonic() + 240
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline and task.poll() is None:
        time.sleep(0.1)
    task.send_signal(signal.SIGUSR2)
    said, _ = task.communicate(timeout=240)
    assert task.returncode in (75, 128 + signal.SIGUSR2), said
    assert "Traceback" not in said
    steps = [int(path.name.removeprefix("step-")) for path in RunFolder(out).checkpoints.glob("step-*")]
    assert steps
    assert f"stopped after step {max(steps)} of 4000" in said


def test_a_mistake_is_said_once_and_ends_all(tmp_path: Path) -> None:
    task = started(tmp_path / "run", "processes=2", "data=folder:/no/such/folder")
    said, _ = task.communicate(timeout=240)
    assert task.returncode == 2
    assert said.count("no folder /no/such/folder") == 1
    assert "Traceback" not in said


# -- jobs -------------------------------------------------------------------------------------------------


def test_a_job_is_written_submitted_and_queued_again(tmp_path, monkeypatch, capsys) -> None:
    """A stand-in for Slurm: sbatch runs the script, srun the command, scontrol notes what is queued again."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in {
        "sbatch": 'echo "Submitted batch job 7"; SLURM_JOB_ID=7 bash "$1" > /dev/null; exit 0',
        "srun": f'shift; echo "$@" >> {tmp_path}/ran; exit $(cat {tmp_path}/code)',
        "scontrol": f'echo "$@" >> {tmp_path}/queued',
    }.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    words = [
        "slurm",
        "pretrain",
        "demo",
        f"out={tmp_path}/my run",
        "slurm.gpus=8",
        "slurm.nodes=2",
        "slurm.name=a b",
    ]
    (tmp_path / "code").write_text("75")
    assert main(words) == 0
    assert "Submitted batch job 7" in capsys.readouterr().out
    script = (tmp_path / "my run.sbatch").read_text()
    for line in (
        "--job-name='a b'",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--signal=USR2@300",
    ):
        assert f"#SBATCH {line}\n" in script
    assert (tmp_path / "ran").read_text().split("foveola.cli ")[1] == f"pretrain demo out={tmp_path}/my run\n"
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    (tmp_path / "code").write_text("2")  # a mistake is not tried again
    assert main(words) == 0
    assert (tmp_path / "queued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "demo"], "a job needs out="),
        (["evaluate", "knn", "out=x"], "expected `foveola slurm pretrain"),
        (["pretrain", "demo", "out=x", "slurm.node=2"], "did you mean 'slurm.nodes'"),
        (["pretrain", "demo", "out=x", "batchsize=2"], "did you mean 'batch_size'"),
        (["pretrain", "demo", "out=x", "--dry-run"], "needs no job"),
    ],
)
def test_mistakes_are_said_before_anything_is_queued(words, said, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["slurm", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_sbatch_the_script_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch on this machine; submit=false only writes"):
        slurm.submit(["pretrain", "demo", f"out={tmp_path}/run"], slurm.SlurmConfig())
    assert (tmp_path / "run.sbatch").is_file()
