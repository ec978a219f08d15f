"""`foveola slurm`: a run as a job of Slurm, which goes on when its time ends or it is preempted."""

from dataclasses import replace

from foveola.config import build, describe, parse_overrides
from foveola.console import print_keys, split

USAGE = """\
  slurm pretrain|finetune RECIPE out=... [slurm.gpus=8] [slurm.nodes=2] [key=value ...]
                                      write and submit a batch job for that command, which goes on by itself
      --help                          every key of the job
"""


def main(arguments: list[str]) -> None:
    from foveola.slurm import SlurmConfig, check_command, submit

    _, _, flags = split(arguments, ("--dry-run",))
    own = [word for word in arguments if word.startswith("slurm.")]
    if "--help" in flags:
        print(USAGE.strip().splitlines()[0].strip(), "\n", sep="\n", end="")
        print_keys([replace(info, path=f"slurm.{info.path}") for info in describe(SlurmConfig())])
        return
    config = build(SlurmConfig, parse_overrides(own).get("slurm", {}), "slurm")
    words = [word for word in arguments if word not in own]
    folder = check_command(words)
    _check_recipe(words)
    from foveola.training.folder import holds_run

    holds_run(folder)
    print(submit(words, config))


def _check_recipe(words: list[str]) -> None:
    """Say what is wrong with a recipe and its keys now rather than in the queue."""
    from foveola.training.auto.plan import AUTO
    from foveola.training.finetune import with_test
    from foveola.training.recipe import resolve

    names, overrides, _ = split(words, ("--dry-run",))
    if len(names) != 2 or names[1] == AUTO:  # a plan is made for the machine of the job
        return
    settings = parse_overrides(overrides)
    test = settings.pop("test", None) if names[0] == "finetune" else None
    resolve(names[1], with_test(names[1], settings, test) if names[0] == "finetune" else settings)
