"""`foveola search`: what is most alike to an image or an object, in a file of features."""

from typing import Any

from foveola.command_keys import SEARCH
from foveola.config import UserError, nearest, parse_overrides
from foveola.console import placed, print_keys, split
from foveola.model_names import is_there

USAGE = """\
  search index=features.parquet query=IMAGE[,IMAGE ...]|DATA [box=x0,y0,x1,y1] [top=10] [out=...]
                                      the most similar images, objects or patches of what embed wrote
"""


def main(arguments: list[str]) -> None:
    usage = "foveola search index=features.parquet query=IMAGE[,IMAGE ...]|DATA [key=value ...]"
    names, overrides, flags = split(arguments, ())
    if "--help" in flags:
        print(f"usage: {usage}\n\nPrints the most similar rows of a file of features (docs/embed.md).\n")
        print_keys(SEARCH)
        return
    overrides = placed(names, overrides, ("index", "query"), usage)
    settings, known = parse_overrides(overrides), {info.path: info.value for info in SEARCH}
    for name in settings.keys() - known.keys():
        near = nearest(name, known)
        raise UserError(f"unknown key {name!r}" + (f"; did you mean {near!r}?" if near else f"; {usage}"))
    for name in ("index", "query"):
        if settings.get(name) is None:
            raise UserError(f"search needs {name}=; usage: {usage}")
    given = known | settings
    top, out, data = given["top"], given["out"], given["data"]
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise UserError(f"top={top}: expected a number of at least 1")
    if data is not None and not str(out).endswith(".png"):
        raise UserError("data= has no effect: it is for the images of out=....png")
    from foveola import distributed
    from foveola.embedding.search import check_result_name, search

    if out is not None:
        check_result_name(str(out))
    with distributed.joined(str(given["device"] or "auto")) as device:
        found = search(
            str(given["index"]),
            _queries(given["query"]),
            box=_box(given["box"]),
            top=top,
            model=None if given["model"] is None else str(given["model"]),
            method=str(given["method"]),
            device=str(device),
            progress=True,
        )
        if not distributed.is_main():
            return
        print(found.table())
        if out is not None:
            print(found.save(str(out), None if data is None else str(data)))


def _queries(value: Any) -> Any:
    """One path or data string, or several paths joined by commas; a path may have a comma in it."""
    if isinstance(value, list):
        return [str(each) for each in value]
    text = str(value)
    parts = text.split(",")
    if len(parts) == 1 or is_there(text) or ":" in parts[0]:
        return text
    return [part.strip() for part in parts if part.strip()]


def _box(value: Any) -> list[float] | None:
    if value is None or isinstance(value, list):
        return value
    try:
        return [float(part) for part in str(value).split(",")]
    except ValueError:
        raise UserError(f"box={value}: expected x0,y0,x1,y1 in pixels") from None
