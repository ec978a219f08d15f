"""Networks of a run besides its newest encoder: earlier steps, the best one, and the student."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from foveola.config import UserError, build
from foveola.files import EncoderFolder, checkpoint_step, is_whole
from foveola.model_names import RunModel
from foveola.models.encoder import Encoder, EncoderConfig, filled
from foveola.models.lora import merged
from foveola.state_files import read_state
from foveola.tasks.task import STUDENT_HEAD, TaskHead, filled_head, make_head
from foveola.zoo.weights import read_config

# Where the students of our methods stood before checkpoints said it.
EARLIER = {"backbone": "student.backbone.", "predictor": "student.predictor."}


def saved_folder(model: RunModel) -> EncoderFolder:
    """Return the folder of the encoder that a run has of a step, or of its best one.

    Raises UserError, which names the steps that are there, where it was not kept.
    """
    run = model.run
    if model.step is None:
        if not run.best.is_whole():
            raise UserError(f"{model.name}: the run has no encoders/best: best=EVALUATION/METRIC keeps it")
        return run.best
    others = (run.encoder, run.best)  # what they are of was perhaps not kept otherwise
    there = {each.step: each for each in others if each.step is not None} | dict(run.saved_encoders())
    if model.step not in there:
        steps = ", ".join(f"step={step}" for step in sorted(there))
        known = f"there are {steps}" if steps else "it kept none: keep_every= keeps them"
        raise UserError(f"{model.name}: the run kept no encoder of that step; {known}")
    return there[model.step]


def student_of(model: RunModel) -> Encoder:
    """Return the student of the newest whole checkpoint of a run, or of that of a step, as an encoder.

    It has the shape, transform and pooling of the encoder that the run keeps, and of a task its head. Of a
    method without a teacher both are the same. Raises UserError, which names the steps that are there, where
    there is no checkpoint.
    """
    own = model.run.encoder.config
    if not own.is_file():
        raise UserError(f"{model.name}: the run has no encoder yet: the first checkpoint writes it")
    path = _checkpoint(model)
    settings = read_config(own) | {"step": checkpoint_step(path)}
    config = build(EncoderConfig, settings, where=str(own))
    tensors, names = _read(path)
    with torch.device("meta"):
        wanted = Encoder(config).weights()
    found: dict[str, Tensor] = {}
    for name in wanted:
        part = "predictor" if name.startswith("predictor.") else "backbone"
        theirs = names.get(part, "") + name.removeprefix("predictor.")
        if theirs not in tensors:
            raise UserError(f"{model.name}: {path} lacks {theirs}, a weight of the student")
        found[name] = tensors[theirs].float()
    encoder = filled(config, found, path)
    if model.run.encoder.head_config.is_file():
        head = {
            name.removeprefix(STUDENT_HEAD): value.float()
            for name, value in tensors.items()
            if name.startswith(STUDENT_HEAD)
        }
        encoder.head = filled_head(empty_head(model.run.encoder, config), head, path)
    return encoder


def empty_head(folder: EncoderFolder, config: EncoderConfig) -> TaskHead:
    """Return the head that an encoder folder describes, with fresh weights. Raises UserError as
    `make_head`.
    """
    return make_head(read_config(folder.head_config), config.model, folder.head_config)


def _checkpoint(model: RunModel) -> Path:
    """The folder of the checkpoint that is asked for; it is whole."""
    found = model.run.found_checkpoints()
    asked = [path for path in found if model.step in (None, checkpoint_step(path))]
    path = next(filter(is_whole, asked), None)
    if path is None:
        steps = sorted({checkpoint_step(each) for each in found if is_whole(each)})
        there = ", ".join(f"step={step}" for step in steps)
        raise UserError(
            f"{model.name}: students are in checkpoints that are whole, of which there "
            + (f"are {there}" if there else "is none")
        )
    return path


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors of the method in a checkpoint, and how the names of those of its student begin."""
    try:
        state = read_state(path, mmap=True)
        return merged(state["trainer"]["method"]), dict(state.get("student", EARLIER))
    except (
        *(RuntimeError, OSError, LookupError, TypeError, ValueError, AttributeError),
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"{path} is no checkpoint of a run: it holds no networks") from error
