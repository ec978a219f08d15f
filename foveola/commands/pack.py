"""`foveola pack`: any data to tar files of samples."""

from foveola.command_keys import PACK
from foveola.config import UserError, describe, parse_overrides
from foveola.console import only, print_keys, split

USAGE = """\
  pack DATA out=FOLDER [size=1GB] [format=original] [key=value ...]
                                      any data to tar files of samples, which shards:FOLDER reads
"""


def main(arguments: list[str]) -> None:
    usage = "foveola pack DATA out=FOLDER [size=1GB] [format=original] [key=value ...]"
    names, overrides, flags = split(arguments, ())
    from foveola.data.shards.pack import PackConfig, pack

    if "--help" in flags:
        print(f"usage: {usage}\n\nWrites the samples of a data string as tar files (docs/shards.md).\n")
        print_keys([*PACK, *describe(PackConfig())])
        return
    settings = parse_overrides(overrides)
    if "data" in settings:
        names = [*names, str(settings.pop("data"))]
    data, out = only(names, "data set", usage), settings.pop("out", None)
    if out is None:
        raise UserError(f"pack needs out=; usage: {usage}")
    print(pack(data, str(out), **settings))
