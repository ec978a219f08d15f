"""`foveola export`: an encoder for another library."""

from foveola.command_keys import EXPORT
from foveola.config import UserError, parse_overrides
from foveola.console import only, print_keys, split
from foveola.failures import told

USAGE = """\
  export MODEL out=... [format=timm]  write an encoder for timm, Hugging Face (hf), as a file (torch), or
                                      with its head as a program of torch.export (program)
"""


def main(arguments: list[str]) -> None:
    usage = "foveola export MODEL out=... [format=timm|hf|torch|program]"
    names, overrides, flags = split(arguments, ())
    if "--help" in flags:
        print(
            f"usage: {usage}\n\nWrites an encoder, any that evaluate takes as model=, for another library.\n"
        )
        print_keys(EXPORT)
        return
    model = only(names, "model", usage)
    settings = parse_overrides(overrides)
    for name in settings.keys() - {info.path for info in EXPORT}:
        raise UserError(f"unknown key {name!r}; usage: {usage}")
    if "out" not in settings:
        raise UserError(f"export needs out=, where to write; usage: {usage}")
    from foveola.zoo.export import export

    with told(f"{settings['out']} cannot be written"):
        head = settings.get("head", True)
        if not isinstance(head, bool):
            raise UserError(f"head={head}: expected true or false")
        print(export(model, str(settings["out"]), str(settings.get("format", "timm")), head))
