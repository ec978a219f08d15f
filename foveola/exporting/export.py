"""`foveola.export`: encoders of ours in the layouts of other libraries, and as programs without us.

In folders of libraries, positions are written as a table for the images of `encoder.transform`; at other
sizes each library resizes it in its own way.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foveola import files
from foveola.config import UserError, nearest, to_dict
from foveola.exporting.card import check_licence, model_card
from foveola.exporting.hf_folder import write_hf
from foveola.exporting.onnx_file import write_onnx
from foveola.exporting.plain import LIBRARY_OF, check_plain
from foveola.exporting.program import write_program
from foveola.exporting.timm_folder import write_timm
from foveola.exporting.usage import how_to_load
from foveola.models.encoder import Encoder
from foveola.zoo.foreign import TOLERANCE, import_library
from foveola.zoo.libraries import load_library
from foveola.zoo.load import load
from foveola.zoo.weights import HEAD_SETTINGS, SETTINGS

FILE_ENDS = {  # formats that are one file: how its name may end
    "onnx": (".onnx",),
    "program": (".pt2",),
    "torch": (".pth", ".pt", ".bin"),
    "safetensors": (".safetensors",),
}
EXPORT_FORMATS = ("timm", "hf", *FILE_ENDS)


def export(
    encoder: Encoder | str | Path,
    out: str | Path,
    format: str | None = None,
    head: bool = True,
    *,
    objects: bool = False,
    licence: str | None = None,
) -> Path:
    """Write an encoder for others, and check that it gives the same there; returns `out`.

    The encoder may also be named, as for `load`. Formats:

    - `timm`: a folder for `timm.create_model("local-dir:OUT", pretrained=True)`. `hf`: a folder for
      `transformers.AutoModel.from_pretrained(OUT)` and its image processor. They hold encoders alone, and
      warn of a head that is left behind, unless `head` is false.
    - `onnx`: the program as an ONNX file, checked with onnxruntime (`write_onnx`).
    - `program`: a file of `torch.export`, .pt2, from pixels to the answers of the head (`write_program`), or
      to features where there is none or `head` is false.
    - `safetensors`: tensors by timm's names and settings, with the head: of any encoder, one file, or a
      folder as runs have it. `torch`: the same as one file of torch.

    Args:
        out: a file that ends as its format does, such as mine.onnx, mine.pt2, mine.safetensors, mine.pth; or
            a folder, which gets the file, by the name `model`, and a model card (README.md).
        format: by default what the end of `out` says, timm of a folder.
        objects: onnx and program: masks of objects as a second input.
        licence: of the weights, for the card, such as "apache-2.0"; the card says where it is not known.

    `foveola.load` reads all of them. Raises UserError for networks that a library cannot express, for outputs
    that differ, for an `out` that exists, and where a library is missing; nothing is then left at `out`.
    """
    return export_and_tell(encoder, out, format, head, objects=objects, licence=licence)[0]


def export_and_tell(
    encoder: Encoder | str | Path,
    out: str | Path,
    format: str | None = None,
    head: bool = True,
    *,
    objects: bool = False,
    licence: str | None = None,
) -> tuple[Path, str]:
    """Export as `export` does; returns `out`, and lines of Python that use what is there."""
    out = Path(out).expanduser()
    format = _format_of(out, format)
    one_file = format in FILE_ENDS and bool(out.suffix)
    _check_out(out, format)
    check_licence(licence)
    if objects and format not in ("onnx", "program"):
        raise UserError(f"objects=true has no effect on format={format}: it is for onnx and program")
    if one_file and licence is not None:
        raise UserError("licence= is for the model card, which a folder has: give out= a name without end")
    name = None if isinstance(encoder, Encoder) else str(encoder)
    encoder = encoder if isinstance(encoder, Encoder) else load(encoder)
    encoder.check_inside("export")
    encoder = _with_head(encoder, out, format, head)
    write = _writer(format, encoder, objects)
    if one_file:
        return out, how_to_load(format, str(out), encoder, write(out))
    inside = ""
    if format in FILE_ENDS and format != "safetensors":
        inside = f"model{FILE_ENDS[format][0]}"
    with files.whole_folder(out) as part:
        about = write(part / inside)
        if format in LIBRARY_OF:
            _compare(encoder, load_library(f"{format}:{part}"), out)
        card = model_card(encoder, name, format=format, about=about, licence=licence)
        files.write_text(part / "README.md", card)
    return out, how_to_load(format, str(out / inside), encoder, about)


def _with_head(encoder: Encoder, out: Path, format: str, head: bool) -> Encoder:
    """The encoder with what the format holds of it; warns of a head that is left behind."""
    if encoder.head is None or (head and format not in LIBRARY_OF):
        return encoder
    if head:
        warnings.warn(
            f"{out} is without the head for {encoder.head.config.name}, as format={format} holds encoders "
            "alone; safetensors, onnx and program take the head along",
            stacklevel=4,
        )
    return Encoder(encoder.config, encoder.backbone, encoder.predictor)


def _writer(format: str, encoder: Encoder, objects: bool) -> Callable[[Path], dict[str, Any]]:
    """What writes this format to a path. Raises UserError for what the format cannot hold."""
    if format in ("onnx", "program"):
        make = write_onnx if format == "onnx" else write_program
        return lambda path: make(encoder, path, objects)
    if format in LIBRARY_OF:
        check_plain(encoder, format)
        import_library(LIBRARY_OF[format], format)
        write = write_timm if format == "timm" else write_hf
    else:
        write = _write_safetensors if format == "safetensors" else _write_torch

    def done(path: Path) -> dict[str, Any]:
        write(encoder, path)
        return {}

    return done


def _format_of(out: Path, format: str | None) -> str:
    """The format that is meant. Raises UserError for an unknown one, and one that `out` contradicts."""
    if format is not None and format not in EXPORT_FORMATS:
        near = nearest(format, EXPORT_FORMATS)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"format={format}: expected {', '.join(EXPORT_FORMATS)}{hint}")
    said = next((name for name, ends in FILE_ENDS.items() if out.suffix in ends), None)
    if format is None:
        return said or "timm"
    if said not in (None, format):
        wanted = f"out={out.with_suffix(FILE_ENDS[format][0])}" if format in FILE_ENDS else "a folder as out="
        raise UserError(f"out={out} is a name of format={said}, and format={format} writes {wanted}")
    return format


def _check_out(out: Path, format: str) -> None:
    """Raise UserError for a path that cannot be written to."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"out={out} exists; export writes to a new path")
    if format in FILE_ENDS and out.suffix and out.suffix not in FILE_ENDS[format]:
        end = FILE_ENDS[format][0]
        raise UserError(
            f"format={format} writes a file that ends in {end}, or a folder: out={out.with_suffix(end)} or "
            f"out={out.with_suffix('')}"
        )
    files.check_writable(out.parent, "give another out=")


def _plain_tensors(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().cpu().contiguous() for name, value in module.items()}


def _write_torch(encoder: Encoder, out: Path) -> None:
    tree: dict[str, Any] = {"state_dict": _plain_tensors(encoder.weights())}
    tree[SETTINGS] = json.dumps(to_dict(encoder.config))
    if encoder.head is not None:
        tree["head_state_dict"] = _kept(encoder.head.state_dict())
        tree[HEAD_SETTINGS] = json.dumps(to_dict(encoder.head.config))
    with files.whole(out) as part:
        torch.save(tree, part)


def _kept(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a head, which may count."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _write_safetensors(encoder: Encoder, out: Path) -> None:
    """One file whose metadata hold the settings; of a name without end the folder of `Encoder.save`."""
    from safetensors.torch import save_file

    if not out.suffix or out.is_dir():
        encoder.save(out)
        return
    tensors, metadata = _plain_tensors(encoder.weights()), {SETTINGS: json.dumps(to_dict(encoder.config))}
    if encoder.head is not None:
        tensors |= {f"head.{name}": value for name, value in _kept(encoder.head.state_dict()).items()}
        metadata[HEAD_SETTINGS] = json.dumps(to_dict(encoder.head.config))
    with files.whole(out) as part:
        save_file(tensors, part, metadata)


@torch.inference_mode()
def _compare(encoder: Encoder, other: Encoder, out: Path) -> None:
    """Raise UserError where a library gives other tokens than the encoder, or sees other images."""
    patch, side = encoder.patch_size, encoder.config.transform.crop
    # Rotary positions hold for any size; tables are resized in each library's own way.
    sizes = (
        [(side, side), (3 * patch, 5 * patch)] if encoder.config.model.positions == "rope" else [(side, side)]
    )
    count = encoder.config.model.channels
    for size in sizes:
        images = torch.randn(1, count, *size, generator=torch.Generator().manual_seed(0))
        ours, theirs = encoder.backbone(images.to(encoder.device)), other.backbone(images)
        for part in ("objects", "registers", "patches"):
            a, b = getattr(ours, part).cpu(), getattr(theirs, part)
            scale = a.square().mean().sqrt().item() if a.numel() else 1.0
            if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale):
                raise UserError(f"{out}: the exported network gives other {part} than the encoder")
    settings = ("mean", "std", "crop", "resize", "squash", "interpolation")
    for name in settings:
        if getattr(encoder.config.transform, name) != getattr(other.config.transform, name):
            raise UserError(f"{out}: the exported network has another transform.{name} than the encoder")
