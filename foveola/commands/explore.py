"""`foveola explore`: a local page with a data set as one or two encoders see it."""

from foveola.command_keys import EXPLORE
from foveola.config import UserError, describe, parse_overrides
from foveola.console import named_by_key, print_keys, split

USAGE = """\
  explore RUN|features.npz ... data=... [host=127.0.0.1] [port=N] [key=value ...]
                                      a local page: gallery, map, what is alike, of one or two encoders
"""


def main(arguments: list[str]) -> None:
    usage = "foveola explore RUN|features [RUN|features ...] data=... [key=value ...]"
    names, overrides, flags = split(arguments, ())
    from foveola.explorer.sides import ExploreConfig

    if "--help" in flags:
        print(f"usage: {usage}\n\nServes a page on this machine until Ctrl-C (docs/explore.md).\n")
        print_keys([*EXPLORE, *describe(ExploreConfig())])
        return
    names, overrides = named_by_key(names, overrides, "model", usage, several=True)
    if not names:
        raise UserError(f"which encoder, or file of features? usage: {usage}")
    settings = parse_overrides(overrides)
    own = {info.path: settings.pop(info.path, info.value) for info in EXPLORE}
    port = own["port"]
    if port is not None and (type(port) is not int or not 1 <= port < 2**16):
        raise UserError(f"port={port}: expected 1 to 65535")
    data, cache, device = (None if own[n] is None else str(own[n]) for n in ("data", "cache", "device"))
    from foveola import distributed
    from foveola.explorer.explore import explore

    with distributed.joined(device or "auto") as found:
        page = explore(
            *names,
            data=data,
            host=str(own["host"]),
            port=port,
            device=str(found),
            cache=cache,
            **settings,
        )
        with page:
            print(f"open {page.url}\nCtrl-C ends the page", flush=True)
            page.wait()
