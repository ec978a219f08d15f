"""An encoder, with its head, as an ONNX file, checked against onnxruntime before it has its name."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveola import files
from foveola.config import UserError
from foveola.exporting.program import DetectorProgram, compare_runs, trace
from foveola.models.encoder import Encoder
from foveola.outside import library
from foveola.zoo.exported import ONNX_FACTS, onnx_session

ONNX_OPSET = 20
ONNX_TOLERANCE = 1e-4  # of onnxruntime to the network, over the largest number
ONNX_BYTES = 2**31 - 2**24  # of one file (protobuf)


def write_onnx(encoder: Encoder, out: Path, objects: bool = False) -> dict[str, Any]:
    """Write the program of `write_program` as an ONNX file of operator set 20; returns what it says.

    Inputs and outputs have the names of the program; what it says of itself is in the metadata of the file,
    the whole of it as JSON by the name `foveola`, the rest as text by its own name. onnxruntime must give the
    numbers of the network, to 1e-4 of the largest, in batches of 1, 2 and 3 and, where sizes may vary, for
    three sizes, else a UserError is raised and nothing is written. Raises UserError also for detectors, for
    encoders beyond 2 GB and where a library is missing.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        library(module, "onnx", "format=onnx")
    if hasattr(encoder.head, "traced"):
        raise UserError(
            "format=onnx: a detector gives any number of objects, which torch's ONNX exporter does not "
            "express here; format=program takes it, and head=false exports its encoder"
        )
    size = sum(value.numel() * 4 for value in encoder.state_dict().values())
    if size > ONNX_BYTES:
        raise UserError(
            f"an ONNX file holds 2 GB, and this encoder has {size / 2**30:.1f} GiB of weights: format=program"
        )
    traced = trace(_on_cpu(encoder), objects)
    assert not isinstance(traced.program, DetectorProgram)
    names = list(traced.wanted[0])
    with _quiet():
        try:
            made = torch.onnx.export(
                traced.exported,
                dynamo=True,
                external_data=False,
                verbose=False,
                opset_version=ONNX_OPSET,
                input_names=list(traced.names),
                output_names=names,
            )
        except Exception as error:  # whatever the exporter meets
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"torch.onnx.export cannot express this encoder: {first}") from error
    assert made is not None
    about = {"opset": ONNX_OPSET} | traced.about()
    made.model.metadata_props.update(_metadata(about))
    made.model.producer_name = "foveola"
    with files.whole(out) as part:
        made.save(str(part), external_data=False)
        session = onnx_session(part)

        def run(*inputs: Tensor) -> dict[str, Tensor]:
            asked = dict(zip(traced.names, (each.numpy() for each in inputs), strict=True))
            return dict(zip(names, map(torch.from_numpy, session.run(names, asked)), strict=True))

        compare_runs(traced, run, ONNX_TOLERANCE, "ONNX file")
    return about


def _on_cpu(encoder: Encoder) -> Encoder:
    """The encoder where onnxruntime computes: numbers of another device differ by more than rounding."""
    if encoder.device.type == "cpu":
        return encoder
    other = Encoder(encoder.config)
    other.load_state_dict({n: v.cpu() for n, v in encoder.state_dict().items() if not n.startswith("head.")})
    if encoder.head is not None:
        other.head = type(encoder.head)(encoder.head.config, encoder.config.model).eval()
        other.head.load_state_dict({name: value.cpu() for name, value in encoder.head.state_dict().items()})
    return other.requires_grad_(False)


def _metadata(about: dict[str, Any]) -> dict[str, str]:
    """Text by name: the whole as JSON, and what people look for by itself."""
    plain = {name: value for name, value in about.items() if name not in ("encoder", "head", "foveola")}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in plain.items()}
    return {ONNX_FACTS: json.dumps(about)} | texts


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of itself on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
