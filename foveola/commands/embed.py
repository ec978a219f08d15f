"""`foveola embed`: the features of a data set in one file."""

from foveola.command_keys import EMBED
from foveola.config import UserError, describe, parse_overrides
from foveola.console import placed, print_keys, split

USAGE = """\
  embed model=... data=... out=features.parquet|npz|zarr [rows=images] [key=value ...]
                                      features of images, objects or patches in one file
"""


def main(arguments: list[str]) -> None:
    usage = "foveola embed model=... data=... out=features.parquet|npz|zarr [key=value ...]"
    names, overrides, flags = split(arguments, ())
    from foveola.embedding.rows import EmbedConfig

    if "--help" in flags:
        print(
            f"usage: {usage}\n\nWrites one row for each image, object or grid of patches (docs/embed.md).\n"
        )
        print_keys([*EMBED, *describe(EmbedConfig())])
        return
    settings = parse_overrides(placed(names, overrides, ("model", "data"), usage))
    options = {info.path: settings.pop(info.path, None) for info in EMBED}
    for name in ("model", "data", "out"):
        if options[name] is None:
            raise UserError(f"embed needs {name}=; usage: {usage}")
    from foveola import distributed
    from foveola.embedding.embed import embed

    with distributed.joined(str(options["device"] or "auto")) as device:
        model, data, out = (str(options[name]) for name in ("model", "data", "out"))
        written = embed(model, data, out=out, device=str(device), **settings)
        if distributed.is_main():
            print(written)
