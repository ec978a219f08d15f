"""`foveola masks`: objects for images that have none, in one file that every data string reads."""

from typing import Any

from foveola.command_keys import MASKS, MASKS_CHECK
from foveola.config import UserError, describe, parse_overrides
from foveola.console import named_by_key, only, print_keys, print_table, split

USAGE = """\
  masks KIND data=... model=... out=... [key=value ...]
                                      objects for images that have none, found by features (discover),
                                      by a detector (detect) or a segmenter (segment)
      --help                          every kind; after a kind, every key of it
  masks check annotations=... data=...
                                      whether the objects of a file are those that people annotated
"""


def main(arguments: list[str]) -> None:
    usage = "foveola masks KIND data=... model=... out=... [key=value ...]"
    names, overrides, flags = split(arguments, ())
    names, overrides = named_by_key(names, overrides, "kind", usage)
    from foveola.proposals.run import DOOR, ProposeConfig, config_of_kind, find_kind

    if "--help" in flags and not names:
        print(
            f"usage: {usage}\n\nWrites OUT/objects.json, which `annotations=` of any data string reads, and "
            "a\ncontact sheet (docs/masks.md). Started again, it goes on. `foveola masks KIND --help` lists "
            "the keys of a kind:"
        )
        print_table([(f"  {name}", find_kind(name).help) for name in DOOR.names()])
        print("\n`foveola masks check` holds such a file against objects that people annotated.")
        return
    kind = only(names, f"kind ({', '.join(DOOR.names())}, check)", usage)
    if kind == "check":
        _check(overrides, "--help" in flags)
        return
    found = find_kind(kind)
    if "--help" in flags:
        print(f"foveola masks {kind} [key=value ...]: {found.help}\n")
        print_keys([*MASKS, *describe(config_of_kind(found)()), *describe(ProposeConfig())])
        return
    settings = parse_overrides(overrides)
    options = {info.path: settings.pop(info.path, None) for info in MASKS}
    _propose(kind, options, settings, usage)


def _propose(kind: str, options: dict[str, Any], settings: dict[str, Any], usage: str) -> None:
    from foveola import distributed
    from foveola.proposals.run import configure_kind, find_kind, propose

    configure_kind(find_kind(kind), settings)  # mistakes first, before anything is loaded
    for name in ("data", "model", "out"):
        if options[name] is None:
            raise UserError(f"masks {kind} needs {name}=; usage: {usage}")
    with distributed.joined(str(options["device"] or "auto")) as device:
        data, model, out = (str(options[name]) for name in ("data", "model", "out"))
        found = propose(kind, data, model, out=out, device=str(device), **settings)
        if distributed.is_main():
            print(found.table())


def _check(overrides: list[str], help: bool) -> None:
    from foveola.evaluation.detection.check import MasksCheckConfig, check_masks

    usage = "foveola masks check annotations=masks/objects.json data=... [key=value ...]"
    if help:
        print(
            f"usage: {usage}\n\nHolds the objects of a file against those of data, whose images it names:\n"
            "precision, recall, CorLoc, AP and AR (docs/evaluation/discovery.md).\n"
        )
        print_keys([*MASKS_CHECK, *describe(MasksCheckConfig())])
        return
    settings = parse_overrides(overrides)
    options = {info.path: settings.pop(info.path, None) for info in MASKS_CHECK}
    for name in ("annotations", "data"):
        if options[name] is None:
            raise UserError(f"masks check needs {name}=; usage: {usage}")
    out = None if options["out"] is None else str(options["out"])
    print(check_masks(str(options["annotations"]), str(options["data"]), out=out, **settings).table())
