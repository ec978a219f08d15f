"""`foveola.load`: what a user names, a folder, a file or a model of another library, as an `Encoder`."""

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as read_tensors
from torch import Tensor

from foveola.config import UserError, build, path_hint, read_yaml
from foveola.files import EncoderFolder, RunFolder
from foveola.model_names import run_model, with_home
from foveola.models.encoder import Encoder, EncoderConfig, filled
from foveola.tasks.task import filled_head
from foveola.zoo.exported import load_onnx, load_program
from foveola.zoo.files import load_file, split_options
from foveola.zoo.libraries import load_library
from foveola.zoo.pixels import pixel_encoder
from foveola.zoo.runs import empty_head, saved_folder, student_of
from foveola.zoo.weights import read_config
from foveola.zoo.wrap import load_python

UNTRAINED = "untrained:"
LIBRARIES = ("timm:", "hf:")
PIXELS_PREFIX = "pixels:"
PYTHON = "python:"
FILE_READERS = {".onnx": load_onnx, ".pt2": load_program}  # of files of weights there is `load_file`
EXPORTED = ("model.pt2", "model.onnx", "model.pth")  # what `foveola export` writes into a folder


def load(path: str | Path, device: str | torch.device = "cpu", trainable: bool = False) -> Encoder:
    """Load an encoder: an encoder folder, a run folder, or a checkpoint file of a public ViT.

    Files and folders of `foveola export` are encoders again, with their heads; of an ONNX file features alone
    are known. Other files are those of `zoo.convert.KNOWN` (`.pth`, `.pt`, `.safetensors`),
    as published (the teacher is taken where there are two networks); `FILE?heads=12` says what such a file
    does not tell (`zoo.files`). `RUN?step=400` is the encoder that a run kept at that step, `RUN?step=best`
    that of `encoders/best`, `RUN?which=student` the student of the newest checkpoint, or with `&step=400` of
    that one (`zoo.runs`). `timm:NAME` and `hf:NAME` are models of these libraries, NAME one of theirs
    or a local folder (`zoo.libraries`); `python:my_module:my_encoder` is a module of your own, of which
    features alone are known (`zoo.wrap`), as of those models of libraries that are no plain ViTs; `pixels:`
    has pixels as features (`zoo.pixels`). `untrained:PATH` is an encoder of the shape of the one at PATH with
    fresh weights, drawn by the seed of the run at PATH, or by seed 0 where PATH is no run. With `trainable`
    its weights take gradients, and it is in training mode, with the stochastic depth of its configuration;
    otherwise it is frozen. Raises UserError for anything else.
    """
    encoder = _load(with_home(path)).to(device)
    return encoder.requires_grad_(True).train() if trainable else encoder


def _load(name: str) -> Encoder:
    if name.startswith(PIXELS_PREFIX):
        return pixel_encoder(name)
    if name.startswith(PYTHON):
        return load_python(name)
    if name.startswith(LIBRARIES):
        return load_library(name)
    if name.startswith(UNTRAINED):
        return _untrained(name.removeprefix(UNTRAINED))
    if named := run_model(name):
        return student_of(named) if named.student else _load_folder(saved_folder(named))
    path = Path(name)
    if path.is_file() or Path(name.partition("?")[0]).is_file():
        return _load_any_file(name)
    if not path.exists():
        wanted = "expected a run folder, an encoder folder, a checkpoint file, timm:, hf: or python:"
        raise UserError(f"no model at {path}: {wanted}{path_hint(path)}")
    own = RunFolder(path).encoder
    folder = own if own.config.is_file() else EncoderFolder(path)
    if not folder.is_whole():
        if (found := [path / each for each in EXPORTED if (path / each).is_file()]) and len(found) == 1:
            return _load_any_file(str(found[0]))
        raise UserError(
            f"{path} is no run and no encoder folder: it lacks encoder/config.json and model.safetensors"
        )
    return _load_folder(folder)


def _load_any_file(name: str) -> Encoder:
    path, query = split_options(name)
    if path.suffix not in FILE_READERS:
        return load_file(name)
    if query:
        raise UserError(f"{name}: {path} says all of itself: load it without ?{query}")
    return FILE_READERS[path.suffix](path)


def _untrained(path: str) -> Encoder:
    if named := run_model(path):
        raise UserError(
            f"{UNTRAINED}{path}: untrained networks have no steps: write {UNTRAINED}{named.run.path}"
        )
    run = RunFolder(Path(path)).config
    seed = read_yaml(run).get("seed") if run.is_file() else None
    with torch.random.fork_rng(devices=[]):
        encoder = load(path)
        encoder.check_inside(f"{UNTRAINED}{path}")
        config = encoder.config
        torch.default_generator.manual_seed(seed if isinstance(seed, int) else 0)
        return Encoder(dataclasses.replace(config, origin="untrained", step=0))


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(file)
    except SafetensorError as error:
        raise UserError(f"{file.parent} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _load_folder(folder: EncoderFolder) -> Encoder:
    settings = read_config(folder.config)
    state = _tensors(folder.weights)
    for name, library in (("model_type", "hf"), ("architecture", "timm")):
        if name in settings:
            raise UserError(
                f"{folder.path} is a folder of another library; load it as {library}:{folder.path}"
            )
    encoder = filled(build(EncoderConfig, settings, where=str(folder.config)), state, folder.path)
    if folder.head_config.is_file():
        head = empty_head(folder, encoder.config)
        encoder.head = filled_head(head, _tensors(folder.head_weights), folder.head_weights)
    return encoder
