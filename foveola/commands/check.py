"""`foveola check`: a first look at the images of a data set."""

from foveola.command_keys import CHECK_KEYS
from foveola.config import UserError, parse_overrides
from foveola.console import only, print_keys, split

USAGE = """\
  check DATA [out=FOLDER] [images=512]
                                      what the images of a data set are, and what to do about it
"""


def main(arguments: list[str]) -> None:
    usage = "foveola check DATA [out=FOLDER] [images=512]"
    names, overrides, flags = split(arguments, ())
    if "--help" in flags:
        print(
            f"usage: {usage}\n\nLooks at images of a data set: sizes, channels, range of values, copies,\n"
            "damaged files, classes and objects, with advice. DATA is a data string, as folder:/my/images.\n"
        )
        print_keys(CHECK_KEYS)
        return
    settings = parse_overrides(overrides)
    if "data" in settings:
        names = [*names, str(settings.pop("data"))]
    data = only(names, "data set", usage)
    for name in settings.keys() - {info.path for info in CHECK_KEYS}:
        raise UserError(f"unknown key {name!r}; usage: {usage}")
    images = settings.get("images", 512)
    if not isinstance(images, int) or isinstance(images, bool) or images < 1:
        raise UserError(f"images={images}: expected a whole number of images, at least 1")
    from foveola.reports.data_page import check_data

    out = settings.get("out")
    found = check_data(data, None if out is None else str(out), images=images)
    print(found.table())
    if out is not None:
        print(f"written to {out}/check.json and {out}/check.html")
