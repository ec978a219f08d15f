"""Processes that torchrun did not start: srun, mpirun, `gpus=8` of a command, and jobs of Slurm."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_tasks_of_mpi_in_a_job_of_slurm_are_not_the_tasks_of_srun() -> None:
    """There srun starts a daemon on each machine, and every task sees what srun told the daemon."""
    daemon = SRUN | {"MASTER_ADDR": "gpu03"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "11"}
    mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    hydra = {"PMI_SIZE": "16", "PMI_RANK": "11", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"}
    for told in (mpi, hydra):
        found = joined(daemon | told)
        assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["11", "16", "3"]
    pmi2 = joined(SRUN | {"PMI_SIZE": "7", "PMI_RANK": "5"})  # srun --mpi=pmi2
    assert {name: pmi2[name] for name in TASK} == TASK


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
        launchers.split_processes(["pretrain", "x", "gpus=2", "processes=2"])


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


# What foveola is started as: in a process that has imported it, which forks what it starts as well.
# To fork is torch's other way of starting them, whose warnings of what it ends the usual way has not.
FORKED = """
import logging, os, sys
from torch.distributed.launcher import api
from foveola.cli import main

class Forks(api.elastic_launch):
    def __call__(self, *words):
        assert words[:2] == ("-m", "foveola.cli")
        self._config.start_method, self._entrypoint = "fork", lambda *words: sys.exit(main([*words[2:]]))
        return super().__call__(*words)

api.elastic_launch = Forks
logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
rank = os.environ["RANK"]
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    del os.environ[name]
if os.environ.get("SLURM_STEP_NUM_TASKS"):
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
sys.exit(main())
"""


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(out).read_metrics()]


def test_tasks_of_srun_train_one_run_as_processes_of_the_command_do(tmp_path, run_ranks, monkeypatch) -> None:
    run_ranks(FORKED, 1, [*RUN, f"out={tmp_path / 'own'}", "processes=2"])
    here = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    for name, value in (SRUN | here).items():
        monkeypatch.setenv(name, value)
    run_ranks(FORKED, 2, [*RUN, f"out={tmp_path / 'srun'}"])
    assert len(losses(tmp_path / "own")) == 4
    assert losses(tmp_path / "srun") == losses(tmp_path / "own")


def test_a_stopped_run_of_several_processes_says_so_and_goes_on(tmp_path: Path) -> None:
    """As a user starts it: an interpreter, and one for each process."""
    out = tmp_path / "run"
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    task = subprocess.Popen(
        [sys.executable, "-m", "foveola.cli", *RUN, f"out={out}", "processes=2", "duration=4000 steps"],
        env=known | {"OMP_NUM_THREADS": "1", launchers.STOPPED: "75"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
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


def test_the_demo_trains_in_two_processes_and_measures_in_one(tmp_path, forked) -> None:
    brief = "from foveola import demo\ndemo.DEMO_OBJECTS, demo.REPORTED, demo.DRAWN = 16, 8, 24\n"
    code = FORKED.replace("sys.exit(main())\n", brief + "sys.exit(main())\n")
    words = ["demo", *RUN[2:], "evaluate.limit=24", "loader.workers=0", f"out={tmp_path}"]
    with forked(code, words) as task:
        assert task.wait() == [0], task.errors[0].read_text()
        said = task.printed[0].read_text()
    assert len(losses(tmp_path / "seed-0")) == 4
    assert "2 processes" in (tmp_path / "seed-0" / "log.txt").read_text()
    assert "nothing to do" not in said
    assert "same-object retrieval" in said
    assert (tmp_path / "demo.png").is_file()


def test_what_starts_processes_is_afterwards_as_it_was(monkeypatch) -> None:
    class Launch:
        def __init__(self, config: object, *_: str) -> None:
            os.environ["LAUNCHED"] = os.environ[launchers.STOPPED]
            signal.signal(signal.SIGTERM, lambda *_: None)

        def __call__(self, *_: str) -> None:
            assert os.environ["LAUNCHED"] == "75"

    for name in ("RANK", "WORLD_SIZE", launchers.STOPPED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", Launch)
    before, answer = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert launchers.start_processes(["pretrain"], "processes=2", 75) == 0
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == (before, answer)


def test_a_mistake_is_said_once_and_ends_all(tmp_path: Path, forked: Callable[..., Any]) -> None:
    with forked(FORKED, [*RUN, f"out={tmp_path}", "processes=2", "data=folder:/no/such/folder"]) as task:
        assert task.wait() == [2]
        said = task.errors[0].read_text().splitlines()
    assert len(said) == 1  # torch's launcher has nothing to add
    assert "no folder /no/such/folder" in said[0]


def test_commands_of_one_process_say_so_and_the_others_what_they_take(capsys, monkeypatch) -> None:
    monkeypatch.setattr("foveola.cli.start_processes", lambda *_: pytest.fail("only help was asked for"))
    for words in (["recipes"], ["demo"], ["compare", "a", "b"], ["report", "a"], ["visualize", "map"]):
        assert main([*words, "gpus=2"]) == 2
        assert (
            f"{words[0]} runs in one process: leave out gpus=2; several are for pretrain"
            in capsys.readouterr().err
        )
    assert main(["slurm", "pretrain", "demo", "out=x", "gpus=2"]) == 2
    assert "slurm.gpus= says how many processes a machine" in capsys.readouterr().err
    assert main(["pretrian", "demo", "gpus=2"]) == 2
    assert "did you mean 'pretrain'?" in capsys.readouterr().err
    for command in ("pretrain", "masks", "embed"):
        assert main([command, "--help", "processes=2"]) == 0
        assert "with processes=2 device=cpu: in two on CPUs" in capsys.readouterr().out


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


def test_a_script_runs_what_was_asked_where_it_was_asked(tmp_path, monkeypatch, capsys) -> None:
    """By bash, from another folder, with words that a shell would read otherwise; %j is a number to Slurm."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {tmp_path}/ran\n")
    (tmp_path / "bin" / "srun").chmod(stat.S_IRWXU)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    hostile = ['data=folder:it\'s "my" $HOME/`id`; exit 7', "out=runs/50%j é", "init=null"]
    before = "slurm.before='echo $NOT_SET > /dev/null'"  # as scripts of conda do
    assert main(["slurm", "pretrain", "demo", *hostile, before, "slurm.submit=false"]) == 0
    script = tmp_path / "runs" / "50%j é.sbatch"
    assert f"{script}: submit it with sbatch" in capsys.readouterr().out
    subprocess.run(["bash", str(script)], cwd="/", check=True)
    assert (tmp_path / "ran").read_text().splitlines()[4:] == ["pretrain", "demo", *hostile]
    asked = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if "#SBATCH" in line]
    assert f"chdir={tmp_path}" in asked
    assert f"output='{tmp_path}/runs/50%%j é.slurm.txt'" in asked
    for wrong in ("out=a\nb", 'slurm.qos="a\\nb"', "slurm.constraint=' '"):
        assert (
            main(
                [
                    "slurm",
                    "pretrain",
                    "demo",
                    "slurm.submit=false",
                    *(["out=x"] if "slurm" in wrong else []),
                    wrong,
                ]
            )
            == 2
        )
        assert "cannot stand in a batch script" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "demo"], "a job needs out="),
        (["evaluate", "knn", "out=x"], "expected `foveola slurm pretrain"),
        (["pretrain", "demo", "out=x", "slurm.node=2"], "did you mean 'slurm.nodes'"),
        (["pretrain", "demo", "out=x", "batchsize=2"], "did you mean 'batch_size'"),
        (["pretrain", "demo", "out=x", "--dry-run"], "needs no job"),
        (["pretrain", "demo", f"out={__file__}"], "test_launchers.py is a file, not a folder"),
        (["pretrain", "demo", f"out={Path(__file__).parent}"], "is not empty and holds no run"),
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
