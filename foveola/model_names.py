"""Names of the networks of a run besides its newest encoder, and the folders that hold their results."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from foveola.config import UserError, nearest
from foveola.files import EncoderFolder, RunFolder

_HOME = re.compile(r"^((?:[a-z]+:)*)~(?=/)")  # of a path, perhaps after untrained: or a library


@dataclass(frozen=True)
class RunModel:
    """A network of a run besides its newest encoder, by its name: `RUN?step=400`, `RUN?which=student`."""

    name: str
    run: RunFolder
    step: int | None = None  # None: the newest; of an encoder always given, unless it is the best
    student: bool = False

    @property
    def home(self) -> Path:
        """The folder that has its `results/`."""
        if self.student:
            own = self.run.path / "student"
            return own if self.step is None else own / self.run.checkpoint(self.step).name
        step = self.run.best.step if self.step is None else self.step
        return self.run.best.path if step is None else self.run.saved_encoder(step).path


def run_model(name: str | Path) -> RunModel | None:
    """Return what `RUN?step=N`, `RUN?step=best` or `RUN?which=student` names; None for any other name.

    A folder whose own name holds a question mark is that folder. Raises UserError for options of a folder
    that are not these.
    """
    name = with_home(name)
    text, mark, query = name.rpartition("?")
    if not mark or is_there(name) or not (is_there(text) and Path(text).is_dir()):
        return None
    run, options = RunFolder(Path(text)), parse_qsl(query, keep_blank_values=True)
    if not run.is_run() and not run.encoder.config.is_file():
        raise UserError(
            f"{name}: {text} is no run folder, so it has no other steps: load it without ?{query}"
        )
    known = dict(options)
    if len(known) < len(options) or not options:
        raise UserError(f"{name}: expected ?step=N, ?which=student or both, each once")
    for option in known.keys() - {"step", "which"}:
        near = nearest(option, ("step", "which"))
        hint = f"did you mean {near}=?" if near else "a run takes ?step=N and ?which=student"
        raise UserError(f"{name}: unknown option {option!r}; {hint}")
    which, step = known.get("which"), known.get("step")
    if which not in (None, "student"):
        raise UserError(
            f"{name}: which={which}: valid is student; without it, it is the network that the run keeps "
            "(the teacher, where there is one)"
        )
    if step == "best" and which is None:
        return RunModel(name, run)
    if step is not None and not (step.isascii() and step.isdecimal()):
        best = "" if which else ", or best"
        raise UserError(f"{name}: step={step}: expected a number of steps{best}")
    return RunModel(name, run, None if step is None else int(step), which is not None)


def is_there(text: str) -> bool:
    """Return whether this names a file or folder that exists; False for what cannot, such as long words."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def with_home(model: str | Path) -> str:
    """Return the name of a model with the folder of the user in place of a ~ that its path begins with."""
    return _HOME.sub(lambda found: f"{found[1]}{Path.home()}", str(model))


def home_of(model: str | Path) -> Path | None:
    """Return the folder whose `results/` are those of a model; None for a model that has no folder of its
    own.

    That is a run folder itself, RUN/untrained for `untrained:RUN`, RUN/encoders/step-N for an encoder
    that was kept on the way (also by its name `RUN?step=N`; the best one is of such a step, too), and
    RUN/student, or RUN/student/step-N, for `RUN?which=student`.
    """
    model = with_home(model)
    head, colon, rest = model.partition(":")
    if colon and head == "untrained":
        run = home_of(rest)
        return None if run is None else RunFolder(run).untrained
    if named := run_model(model):
        return named.home
    path = Path(model)
    run = RunFolder(path.parent.parent)
    if path == run.best.path and run.best.step is not None:
        return run.saved_encoder(run.best.step).path
    kept = path.parent.name == "encoders" and EncoderFolder(path).config.is_file()
    return path if kept or RunFolder(path).encoder.config.is_file() else None
