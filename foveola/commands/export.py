"""`foveola export`: an encoder for another library, or as a program that needs none of ours."""

from typing import Any

from foveola.command_keys import EXPORT
from foveola.config import UserError, nearest, parse_overrides
from foveola.console import named_by_key, only, print_keys, split
from foveola.failures import explained

USAGE = """\
  export MODEL out=... [format=timm]  write an encoder for timm, Hugging Face (hf), as a program (onnx,
                                      program of torch.export), or as a file (safetensors, torch)
"""


def main(arguments: list[str]) -> None:
    usage = "foveola export MODEL out=... [format=timm|hf|onnx|program|safetensors|torch]"
    names, overrides, flags = split(arguments, ())
    if "--help" in flags:
        print(
            f"usage: {usage}\n\nWrites an encoder, any that evaluate takes as model=, for others "
            "(docs/export.md).\n"
        )
        print_keys(EXPORT)
        return
    names, overrides = named_by_key(names, overrides, "model", usage)
    model = only(names, "model", usage)
    settings, known = parse_overrides(overrides), [info.path for info in EXPORT]
    for name in settings.keys() - set(known):
        near = nearest(name, known)
        raise UserError(
            f"unknown key {name!r}; " + (f"did you mean {near!r}?" if near else f"usage: {usage}")
        )
    if "out" not in settings:
        raise UserError(f"export needs out=, where to write; usage: {usage}")
    for name in ("head", "objects"):
        if not isinstance(settings.get(name, True), bool):
            raise UserError(f"{name}={settings[name]}: expected true or false")
    from foveola.exporting.export import export_and_tell

    out = str(settings.pop("out"))
    words = {name: settings.pop(name) for name in ("format", "licence") if settings.get(name) is not None}
    with explained(f"{out} cannot be written"):
        options: dict[str, Any] = {name: str(value) for name, value in words.items()}
        written, usage = export_and_tell(model, out, **options, **settings)
    print(f"{written}\n\n{usage}")
