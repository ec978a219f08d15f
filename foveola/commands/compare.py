"""`foveola compare`: results of several encoders side by side."""

from foveola.config import UserError, parse_overrides
from foveola.console import named_by_key, split

USAGE = """\
  compare RUN RUN ... [protocol=...]  results of several encoders side by side, if they were measured alike
"""


def main(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    usage = "foveola compare RUN RUN ... [protocol=...]"
    if "--help" in flags:
        print(
            f"usage: {usage}\n\n"
            "Prints what `foveola evaluate` wrote for several encoders side by side, for the protocols that\n"
            "all of them have. RUN is a run folder, an out= folder, a result file, or untrained:RUN,\n"
            "RUN?step=400, RUN?step=best, RUN?which=student. Only results with the same settings and data\n"
            "are shown together: the newest, if there are several; notes name the others."
        )
        return
    names, overrides = named_by_key(names, overrides, "model", usage, several=True)
    settings = parse_overrides(overrides)
    protocol = settings.pop("protocol", None)
    if settings:
        raise UserError(f"compare takes no {next(iter(settings))!r}; usage: {usage}")
    from foveola.evaluation.compare import compare

    tables = [c.table() for c in compare(names, None if protocol is None else str(protocol))]
    print("\n\n".join(tables))
