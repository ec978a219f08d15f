"""A batch script of Slurm for a command that goes on where it was stopped, and its submission."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foveola.config import ConfigError, UserError, key
from foveola.files import write_text
from foveola.launchers import STOPPED

UNFINISHED = 75  # "try again", of the exit codes that sysexits.h names
NO_JOB = ("--dry-run", "--help", "-h")


@dataclass(frozen=True)
class SlurmConfig:
    """What a job asks of Slurm."""

    nodes: int = key(1, "machines", at_least=1)
    gpus: int = key(
        1, "GPUs of each machine, a process for each; 0 = one process a machine, on CPUs", at_least=0
    )
    time: str = key(
        "24:00:00", "time limit of one stay in the queue, as sbatch has it; the job goes on after it"
    )
    cpus: int | None = key(None, "CPU cores of each process; null = Slurm's default", at_least=1)
    memory: str | None = key(
        None, "memory of each machine, as sbatch has it ('200G'); null = Slurm's default"
    )
    partition: str | None = key(None, "partition; null = Slurm's default")
    account: str | None = key(None, "account; null = Slurm's default")
    qos: str | None = key(None, "quality of service; null = Slurm's default")
    constraint: str | None = key(None, "features that the machines must have")
    name: str = key("foveola", "name of the job")
    warning: int = key(300, "seconds before the limit at which the run stops with a checkpoint", at_least=30)
    before: str | None = key(
        None, "a line of shell to run first ('module load cuda', 'source env/bin/activate')"
    )
    submit: bool = key(True, "whether to submit the script; false only writes it")


def slurm_script(words: Sequence[str], config: SlurmConfig, log: Path) -> str:
    """Return the batch script that runs the foveola command `words` in all processes of a job.

    The job is told `warning` seconds before its time ends, or when it is preempted; the run then stops with a
    checkpoint, and the job is queued again until the run is finished. An error ends it.
    """
    asked = {
        "job-name": config.name,
        "nodes": config.nodes,
        "ntasks-per-node": max(config.gpus, 1),
        "gpus-per-node": config.gpus or None,
        "cpus-per-task": config.cpus,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "signal": f"USR2@{config.warning}",
        "chdir": Path.cwd(),  # where relative paths are meant, wherever the script is submitted
        "output": str(log).replace("%", "%%"),
        "open-mode": "append",
    }
    for name, value in asked.items():
        if value is not None and (not str(value).isprintable() or not str(value).strip()):
            raise ConfigError(f"{name} {str(value)!r} cannot stand in a batch script")
    lines = [
        f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in asked.items() if value is not None
    ]
    command = shlex.join([sys.executable, "-m", "foveola.cli", *words])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            "#SBATCH --requeue",
            *([config.before] if config.before else []),
            f"export {STOPPED}={UNFINISHED}",
            "# One process that fails ends all of them.",
            f"srun --kill-on-bad-exit=1 {command}",
            "status=$?",
            f'if [ "$status" -eq {UNFINISHED} ]; then',
            "    # Stopped with a checkpoint: the same command goes on from there.",
            '    scontrol requeue "$SLURM_JOB_ID"',
            "    exit 0",
            "fi",
            'exit "$status"',
            "",
        ]
    )


def check_command(words: Sequence[str]) -> Path:
    """Return the run folder of a command that can be a job. Raises UserError for any other."""
    if not words or words[0] not in ("pretrain", "finetune"):
        raise UserError(
            "expected `foveola slurm pretrain RECIPE out=...` or `foveola slurm finetune RECIPE out=...`"
        )
    out = [word.partition("=")[2] for word in words if word.startswith("out=")]
    if len(out) != 1 or not out[0]:
        raise UserError(
            "a job needs out=, its run folder: there it goes on when it comes back from the queue"
        )
    if refused := [word for word in words if word in NO_JOB]:
        raise UserError(f"{refused[0]} needs no job: run it here")
    return Path(out[0]).expanduser().absolute()


def submit(words: Sequence[str], config: SlurmConfig) -> str:
    """Write the script of a command beside its run, submit it if asked, and return what there is to say.

    `words` are those of `foveola pretrain` or `finetune`, with `out=`: without it, each stay in the queue
    could begin another run. Raises UserError where that is missing, and where sbatch is missing or refuses.
    """
    folder = check_command(words)
    folder.parent.mkdir(parents=True, exist_ok=True)
    script, log = (folder.parent / f"{folder.name}.{end}" for end in ("sbatch", "slurm.txt"))
    write_text(script, slurm_script(words, config, log))
    if not config.submit:
        return f"{script}: submit it with sbatch"
    if shutil.which("sbatch") is None:
        raise UserError(
            f"{script} is written, but there is no sbatch on this machine; submit=false only writes"
        )
    answer = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"sbatch {script}: {answer.stderr.strip() or f'exit code {answer.returncode}'}")
    return f"{script}: {answer.stdout.strip()}; its output goes to {log}"
