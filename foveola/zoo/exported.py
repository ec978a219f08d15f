"""What `foveola export` wrote, as an encoder again: programs of torch.export and ONNX files."""

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveola.config import UserError, build
from foveola.models.encoder import Encoder, EncoderConfig, filled
from foveola.models.transform import TransformConfig
from foveola.models.wrapped import ImageTokens
from foveola.outside import library
from foveola.tasks.task import filled_head, make_head
from foveola.zoo.wrap import wrap

FACTS_INSIDE = "foveola.json"  # in a program: what goes in, what comes out, classes, all settings
ONNX_FACTS = "foveola"  # the same in the metadata of an ONNX file
WEIGHTS_LIST = "data/weights/model_weights_config.json"  # of torch's archives of programs
SCALARS = {
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    13: torch.bfloat16,
}  # torch's numbers of dtypes
MOST_FACTS = 2**24  # bytes


def load_program(path: Path) -> Encoder:
    """Return the encoder, with its head, whose program is in a file of `torch.export`.

    It is made of the settings and tensors that the file holds, not of its program, so that all of it is there
    (object tokens, attention); and no code from the file runs, which `torch.export.load` does not promise.
    Raises UserError for a file of somebody else, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            inside = f"extra/{FACTS_INSIDE}"
            if inside not in names:
                raise UserError(
                    f"{path} is a program of torch.export that foveola did not write: nothing says what its "
                    "images are; its module can be wrapped: foveola.wrap"
                )
            if archive.getinfo(names[inside]).file_size > MOST_FACTS:
                raise ValueError(f"{FACTS_INSIDE} is larger than any")
            about = json.loads(archive.read(names[inside]))
            tensors = _tensors(archive, names)
            config, head = about["encoder"], about.get("head")
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, RuntimeError) as error:
        raise UserError(f"{path} is no whole program of foveola ({type(error).__name__}: {error})") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no program of torch.export: {error}") from error
    weights: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = name.removeprefix("encoder.")
        if plain.startswith("head."):
            own[plain.removeprefix("head.")] = value
        elif plain not in ("mean", "std", "low", "high"):
            weights[plain.removeprefix("backbone.")] = value
    encoder = filled(build(EncoderConfig, config, where=str(path)), weights, path)
    if head is not None:
        encoder.head = filled_head(make_head(head, encoder.config.model, path), own, path)
    return encoder


def _tensors(archive: zipfile.ZipFile, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors of a program by name. Raises ValueError for any that only pickle could read."""
    found: dict[str, Tensor] = {}
    for name, entry in json.loads(archive.read(names[WEIGHTS_LIST]))["config"].items():
        if entry["use_pickle"]:
            raise ValueError(f"{name} is not kept as plain numbers")
        meta = entry["tensor_meta"]
        shape, strides = ([int(n["as_int"]) for n in meta[key]] for key in ("sizes", "strides"))
        where = names[f"data/weights/{entry['path_name']}"]
        if archive.getinfo(where).compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        flat = torch.frombuffer(bytearray(archive.read(where)), dtype=SCALARS[meta["dtype"]])
        if math.prod(shape) > len(flat):  # strides of zero would make any number of a few
            raise ValueError(f"{name} is larger than what is there")
        # torch refuses what lies beyond the bytes that there are.
        found[name] = flat.as_strided(shape, strides, int(meta["storage_offset"]["as_int"])).clone()
    return found


class OnnxFeatures(nn.Module):
    """An ONNX file of `foveola export`, computed by onnxruntime: images to tokens.

    One that takes pixels of 8 bits gets normalised images rounded to these. One of an encoder with a range
    takes values of files, which are not rounded (earlier versions wrote 8 bits for these encoders, too).
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, path: Path, transform: TransformConfig, patch: int) -> None:
        super().__init__()
        self.session, self.patch = onnx_session(path), patch
        self.register_buffer("mean", torch.tensor(transform.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(transform.std)[:, None, None])
        given = self.session.get_inputs()[0].type
        self.takes_values = given == "tensor(float)"
        ranges = (transform.value_ranges if self.takes_values else None) or ((0.0, 255.0),)
        for name, ends in zip(("low", "high"), zip(*ranges, strict=True), strict=True):
            self.register_buffer(name, torch.tensor(ends)[:, None, None], persistent=False)
        # Fingerprints are of tensors, and these are all that it has.
        digest = np.frombuffer(_digest(path), dtype=np.uint8).copy()
        self.register_buffer("file", torch.from_numpy(digest))

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B C H W"]) -> ImageTokens:
        """Return patches, and what stands for the image."""
        pixels = (images * self.std + self.mean) * (self.high - self.low) + self.low
        if not self.takes_values:
            pixels = pixels.round().clamp(0, 255).byte()
        asked = {"images": pixels.cpu().numpy()}
        embedding, patches = self.session.run(["embedding", "patches"], asked)
        tokens, pooled = (torch.from_numpy(each).to(images.device) for each in (patches, embedding))
        grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        return ImageTokens(tokens, grid, pooled)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def load_onnx(path: Path) -> Encoder:
    """Return an ONNX file of `foveola export` as a wrapped encoder: features of images and patches alone.

    What stands for an image is what stood for it there, whatever that was (`pool`). Raises UserError for a
    file of somebody else, a damaged one, one with a head or with masks, and where onnxruntime is missing.
    """
    session = onnx_session(path)
    text = session.get_modelmeta().custom_metadata_map.get(ONNX_FACTS)
    try:
        about = json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: what it says of itself is no JSON") from error
    if not isinstance(about, dict) or not isinstance(about.get("encoder"), dict):
        raise UserError(
            f"{path} is an ONNX file that foveola did not write: nothing says what its images are; a module "
            "of your own that runs it can be wrapped: foveola.wrap"
        )
    given = [each.name for each in session.get_inputs()]
    gives = {each.name: each.shape for each in session.get_outputs()}
    if given != ["images"] or not {"embedding", "patches"} <= gives.keys():
        what = "the answers of a head" if "logits" in gives else "masks as a second input"
        raise UserError(f"{path} has {what}: foveola reads ONNX files of images to features alone")
    config = build(EncoderConfig, about["encoder"], where=str(path))
    if gives["embedding"][-1] != gives["patches"][-1]:
        raise UserError(
            f"{path} gives {gives['embedding'][-1]} numbers an image and {gives['patches'][-1]} a patch; "
            "foveola reads files that give as many"
        )
    module = OnnxFeatures(path, config.transform, config.model.patch_size)
    return wrap(module, str(path), config.transform, "an ONNX file")


def onnx_session(path: Path) -> Any:
    """Return an ONNX file as a session of onnxruntime on the CPU. Raises UserError for a damaged one."""
    runtime = library("onnxruntime", "onnx", f"{path.name}")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of the library, which has a class for each of its states
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no readable ONNX file: {first[:200]}") from error
