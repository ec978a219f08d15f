"""Configuration: frozen dataclasses to and from YAML and `key=value`, with errors a person can act on.

A component owns its dataclass and declares each field with `key(default, help, ranges)`; this module knows no
component. Values are checked when a configuration is built from a tree (`build`), before anything else runs.
YAML is read with the core rules of YAML 1.2: `1e-4` is a number; `no`, `on` and `1:30` are text.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from operator import ge, gt, le, lt
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
RANGES = {"above": (">", gt), "at_least": (">=", ge), "below": ("<", lt), "at_most": ("<=", le)}
TYPES = {
    int: "int",
    float: "float",
    bool: "true|false",
    str: "text",
    Path: "path",
    NoneType: "null",
    Any: "any",
}


class UserError(Exception):
    """A mistake of the user; the message is one line: what is wrong, where, and what would be right."""


class ConfigError(UserError):
    """A configuration that cannot be: unknown key, bad value, unreadable file."""


def key(default: Any = MISSING, help: str = "", *, factory: Any = MISSING, **ranges: float | None) -> Any:
    """Declare a field of a configuration dataclass; without `default` and `factory` the key must be given.

    `help` is one line of meaning for --help. `ranges` are any of `above`, `at_least`, `below`, `at_most`;
    `build` checks them on numbers, and on each number of a tuple.
    """
    if unknown := ranges.keys() - RANGES:
        raise TypeError(f"key() has no range named {sorted(unknown)}")
    limits = {name: limit for name, limit in ranges.items() if limit is not None}
    metadata = {"help": help, "ranges": limits}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelled most like `word` (case ignored), or None when none comes close."""
    spellings = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), spellings, n=1, cutoff=0.6)
    return spellings[found[0]] if found else None


# -- YAML ------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (ours, below, in place of the YAML 1.1 rules)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for name, _ in node.value:
            if name.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {name.value!r} is given twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # keeps the YAML 1.1 rules beside ours: text either reader mistakes is quoted
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_flat(
        self, data: list
    ) -> Any:  # [1, 2] on one line, longer structures on lines of their own
        nested = any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=not nested)


_Dumper.add_representer(list, _Dumper.represent_flat)
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
for _tag, _pattern, _firsts in [
    ("null", "~|null|", ["~", "n", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", _FLOAT + r"|[-+]?\.inf|\.nan", list("-+.0123456789")),
]:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _firsts)


def read_yaml(path: str | Path) -> dict:
    """Read a YAML file that holds `key: value` pairs. Raises ConfigError with file, line and column."""
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [other.name for other in path.parent.glob("*.y*ml")])
        raise ConfigError(
            f"no configuration file {path}" + (f"; did you mean {path.with_name(near)}?" if near else "")
        )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = " (text that holds a colon needs quotes)" if "mapping values" in str(error.problem) else ""
        raise ConfigError(f"{path}{place}: {error.problem}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML text file") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected `key: value` pairs, got {_shown(tree)}")
    return tree or {}


def parse_overrides(overrides: Iterable[str]) -> dict:
    """`["a.b=1", "c=[2, 3]"]` -> `{"a": {"b": 1}, "c": [2, 3]}`. Values are YAML; a later one wins."""
    tree: dict = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(parts := path.strip().split(".")):
            raise ConfigError(f"expected key=value, got {text!r}")
        branch = _parse_value(path, value.strip())
        for part in reversed(parts):
            branch = {part: branch}
        tree = merge(tree, branch)
    return tree


def _parse_value(path: str, text: str) -> Any:
    if text[:1] not in (
        "[",
        "{",
        '"',
        "'",
    ):  # a plain scalar, which may hold ": " or " #" (data strings, paths)
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(yaml.ScalarNode(tag, text))
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot read the value {text!r} as YAML") from error


def merge(base: dict, override: dict) -> dict:
    """A new tree: `override` laid over `base`, dictionaries key by key, everything else replaced."""
    merged = dict(base)
    for name, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = merge(base[name], value) if both else value
    return merged


# -- building --------------------------------------------------------------------------------------------


def build(cls: type[T], tree: dict, where: str = "") -> T:
    """Build the dataclass `cls` from a tree of plain values, strictly; keys left out keep their defaults.

    `where` is the path of this tree in the whole configuration, for messages. Unknown keys, missing keys,
    wrong types, values out of range, and ValueErrors of `__post_init__` raise ConfigError.
    """
    known, hints, values = {f.name: f for f in fields(cls) if f.init}, get_type_hints(cls), {}  # type: ignore[arg-type]
    for name in tree:
        if name not in known:
            raise ConfigError(_unknown_key(cls, str(name), where, list(known)))
    for name, f in known.items():
        path = _join(where, name)
        if name in tree:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            values[name] = _convert(hints[name], _over_default(default, tree[name]), path)
            _check_range(values[name], f.metadata.get("ranges", {}), path)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(
                f"{path}: a value is needed ({f.metadata.get('help') or _type_name(hints[name])})"
            )
    try:
        return cls(**values)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _over_default(default: Any, value: Any) -> Any:
    """Lay the given keys of a group over its default, unless they name another kind of group."""
    if is_dataclass(default) and isinstance(value, dict):
        base = to_dict(default)
        return merge(base, value) if value.get("name", base.get("name")) == base.get("name") else value
    return value


def _unknown_key(cls: type, name: str, where: str, siblings: list[str]) -> str:
    deeper = [path for path in _paths(cls) if path.endswith(f".{name}")]  # the right word on the wrong level
    near = min(deeper, key=len) if deeper else nearest(name, siblings)
    hint = f"did you mean {_join(where, near)!r}?" if near else f"known here: {', '.join(siblings)}"
    return f"unknown key {_join(where, name)!r}; {hint}"


def _paths(cls: Any, above: tuple = ()) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield name
        for inner in (hint, *get_args(hint)):
            if is_dataclass(inner) and inner not in above:
                yield from (f"{name}.{path}" for path in _paths(inner, (*above, inner)))


def _convert(hint: Any, value: Any, path: str) -> Any:
    kind, args = get_origin(hint) or hint, get_args(hint)
    value = to_dict(value) if is_dataclass(value) else value
    if kind in (Union, UnionType):
        return _convert_union(args, value, path)
    if kind is Literal:
        return _convert_literal(args, value, path)
    if is_dataclass(kind) and isinstance(value, dict):
        return build(kind, value, path)  # type: ignore[arg-type]
    if kind in (tuple, list) and isinstance(value, list | tuple):
        inner = args if kind is tuple and args and args[-1] is not ... else (args[:1] or (Any,)) * len(value)
        if len(inner) != len(value):
            raise ConfigError(f"{path}: expected {_type_name(hint)}, got {_shown(value)}")
        return kind(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if kind is tuple and args[1:] == (...,) and isinstance(value, int | float | str):  # k=5 means k=[5]
        try:
            return (_convert(args[0], value, path),)
        except ConfigError as error:
            raise ConfigError(f"{path}: expected {_type_name(hint)}, got {_shown(value)}") from error
    if kind is dict and isinstance(value, dict):
        inner = args[1] if args else Any
        return {str(name): _convert(inner, item, _join(path, name)) for name, item in value.items()}
    return _convert_scalar(hint, value, path)


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any or (hint in (bool, NoneType) and isinstance(value, hint)):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint in (int, float) and isinstance(value, str) and re.fullmatch(_FLOAT, value):
        value, number = float(value), True  # `1e-4` as a YAML 1.1 reader gives it
    if hint is int and number and float(value).is_integer():  # 1e5 counts as whole
        return int(value)
    if hint is float and number:
        return float(value)
    if hint in (str, Path) and (isinstance(value, str | Path) or (number and isinstance(value, int))):
        return hint(str(value))
    quote = " (text that looks like something else needs quotes)" if hint is str and value is not None else ""
    raise ConfigError(f"{path}: expected {_type_name(hint)}, got {_shown(value)}{quote}")


def _convert_literal(choices: tuple, value: Any, path: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = nearest(str(value), map(str, choices))
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigError(f"{path}: expected one of {', '.join(map(str, choices))}; got {_shown(value)}{hint}")


def _convert_union(options: tuple, value: Any, path: str) -> Any:
    if value is None and NoneType in options:
        return None
    groups = [option for option in options if is_dataclass(option)]
    if groups and isinstance(value, dict):
        named = {name: group for group in groups for name in get_args(get_type_hints(group).get("name"))}
        if len(groups) > 1 and "name" not in value:
            raise ConfigError(f"{path}.name: a value is needed, one of {', '.join(named)}")
        if len(groups) == 1:
            return _convert(groups[0], value, path)
        return _convert(named[_convert_literal(tuple(named), value["name"], f"{path}.name")], value, path)
    rest = [option for option in options if option is not NoneType and option not in groups]
    if len(rest) == 1 and not groups:
        return _convert(rest[0], value, path)  # its message says more than that of the union
    for option in sorted(rest, key=lambda option: option is not type(value)):  # the value's own type first
        try:
            return _convert(option, value, path)
        except ConfigError:
            continue  # when no type fits, the error below names them all
    raise ConfigError(f"{path}: expected {' or '.join(map(_type_name, options))}, got {_shown(value)}")


def _check_range(value: Any, ranges: dict, path: str) -> None:
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            _check_range(item, ranges, f"{path}[{i}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        for name, limit in ranges.items():
            if not RANGES[name][1](value, limit):
                raise ConfigError(f"{path}: must be {RANGES[name][0]} {limit}, got {value}")


# -- showing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyInfo:
    """One line of --help: where, what kind (with its range), the value now, and its meaning."""

    path: str
    type: str
    value: Any
    help: str


def to_dict(config: Any) -> Any:
    """Plain YAML types (dict, list, scalars) of a configuration; `build(type(config), ...)` gives it back."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config) if f.init}
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def dump_yaml(config: Any) -> str:
    """The configuration (a dataclass or a tree) as YAML text, keys in declared order."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def describe(config: Any, where: str = "") -> list[KeyInfo]:
    """Every key of a configuration instance, in declared order, nested keys as dotted paths."""
    hints, lines = get_type_hints(type(config)), []
    for f in (f for f in fields(config) if f.init):
        path, value = _join(where, f.name), getattr(config, f.name)
        groups = value if isinstance(value, dict) else {"": value}
        if groups and all(map(is_dataclass, groups.values())):
            for name, group in groups.items():
                lines += describe(group, _join(path, name) if name else path)
        else:
            limits = [f"{RANGES[name][0]} {limit}" for name, limit in f.metadata.get("ranges", {}).items()]
            kind = " ".join([_type_name(hints[f.name]), *limits])
            lines.append(KeyInfo(path, kind, to_dict(value), f.metadata.get("help", "")))
    return lines


def _type_name(hint: Any) -> str:
    kind, args = get_origin(hint) or hint, get_args(hint)
    if is_dataclass(kind):
        return "{" + ", ".join(f.name for f in fields(kind)) + "}"
    if kind in (tuple, list):
        return f"[{', '.join('...' if arg is ... else _type_name(arg) for arg in args)}]"
    if kind is dict:
        return f"{{name: {_type_name(args[1])}}}"
    if kind in (Union, UnionType):
        return " or ".join(map(_type_name, args))
    return "|".join(map(str, args)) if kind is Literal else TYPES.get(hint, str(hint))


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _join(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)
