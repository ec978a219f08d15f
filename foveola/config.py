"""Configuration: frozen dataclasses to and from trees of plain values, with errors a person can act on.

A component owns its dataclass and declares each field with `key(default, help, ranges)`; this module knows no
component. Values are checked when a configuration is built from a tree (`build`), before anything else runs.
How trees are read and written (YAML, `key=value`) is in `trees`.
"""

import re
import sys
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from operator import ge, gt, le, lt
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from foveola.trees import (
    FLOAT,
    FORMER_CHOICES,
    FORMER_NAMES,
    ConfigError,
    UserError,
    dump_tree,
    kind_of,
    merge,
    nearest,
    parse_overrides,
    path_hint,
    read_yaml,
    renewed,
    shown,
)

__all__ = [
    "ConfigError",
    "KeyInfo",
    "UserError",
    "again",
    "build",
    "describe",
    "dump_yaml",
    "key",
    "kind_of",
    "merge",
    "nearest",
    "parse_overrides",
    "path_hint",
    "read_yaml",
    "refuse_unread",
    "renewed",
    "to_dict",
]

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


def key(
    default: Any = MISSING,
    help: str = "",
    *,
    factory: Any = MISSING,
    among: Callable[[dict], type] | None = None,
    **ranges: float | None,
) -> Any:
    """Declare a field of a configuration dataclass; without `default` and `factory` the key must be given.

    `help` is one line of meaning for --help. `among` tells the class of a group from its tree, where that
    depends on what the tree names; it raises UserError where nothing has that name. `ranges` are any of
    `above`, `at_least`, `below`, `at_most`; `build` checks them on numbers, on each number of a tuple, and on
    what a group returns as its `numbers()`. Numbers that are not finite are refused everywhere.
    """
    if unknown := ranges.keys() - RANGES:
        raise TypeError(f"key() has no range named {sorted(unknown)}")
    limits = {name: limit for name, limit in ranges.items() if limit is not None}
    metadata = {"help": help, "ranges": limits, "among": among}
    if factory is not MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def again(config: type, name: str, default: Any, **ranges: float | None) -> Any:
    """Return the key `name` of a configuration class for a class that inherits it: another default or
    range.
    """
    known = next(f for f in fields(config) if f.name == name).metadata
    return key(default, known["help"], **known["ranges"] | ranges)


# -- building --------------------------------------------------------------------------------------------


def build(cls: type[T], tree: dict, where: str = "") -> T:
    """Build the dataclass `cls` from a tree of plain values, strictly; keys left out keep their defaults.

    `where` is the path of this tree in the whole configuration, for messages. Unknown keys, missing keys,
    wrong types, values out of range, and ValueErrors of `__post_init__` raise ConfigError.
    """
    known, hints, values = {f.name: f for f in fields(cls) if f.init}, get_type_hints(cls), {}  # type: ignore[arg-type]
    today = [
        name if name in known else _renewed(name, FORMER_NAMES, known, where or "configuration")
        for name in tree
    ]
    if len(set(today)) < len(today):
        twice = next(name for name in today if today.count(name) > 1)
        raise ConfigError(f"{_join(where, twice)}: given twice, once by its former name")
    tree = dict(zip(today, tree.values(), strict=True))
    for name in tree:
        if name not in known:
            raise ConfigError(_unknown_key(cls, str(name), where, list(known)))
    for name, f in known.items():
        path = _join(where, name)
        if name in tree:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            value = _over_default(default, tree[name])
            among = f.metadata.get("among")
            hint = hints[name] if among is None else _chosen(among, value, path)
            values[name] = _convert(hint, value, path)
            _check_range(values[name], f.metadata.get("ranges", {}), path)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(
                f"{path}: a value is needed ({f.metadata.get('help') or _type_name(hints[name])})"
            )
    try:
        return cls(**values)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _renewed(word: Any, former: dict[str, str], known: Container[Any], where: str) -> Any:
    """What a key or a choice of an earlier version is called today, or the word itself."""
    today = former.get(word, word) if isinstance(word, str) else word
    if today == word or today not in known:
        return word
    warnings.warn(f"{where}: {word!r} is now called {today!r}", FutureWarning, stacklevel=1)
    return today


def _chosen(among: Callable[[dict], type], value: Any, path: str) -> type:
    """The class of a group whose tree says what it is of."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a group of keys, one of them name, got {shown(value)}")
    try:
        return among(value)
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from error


def _over_default(default: Any, value: Any) -> Any:
    """Lay the given keys of a group over its default, unless they name another kind of group."""
    value = to_dict(value)
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
    if is_dataclass(kind):
        if isinstance(value, dict):
            return build(kind, value, path)  # type: ignore[arg-type]
        raise ConfigError(
            f"{path}: expected {_type_name(hint)}, got {shown(value)}{_inside(kind, value, path)}"
        )
    if kind in (tuple, list) and isinstance(value, list | tuple):
        inner = args if kind is tuple and args and args[-1] is not ... else (args[:1] or (Any,)) * len(value)
        if len(inner) != len(value):
            raise ConfigError(f"{path}: expected {_type_name(hint)}, got {shown(value)}")
        return kind(_convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if kind is tuple and args[1:] == (...,) and isinstance(value, int | float | str):  # k=5 means k=[5]
        try:
            return (_convert(args[0], value, path),)
        except ConfigError as error:
            raise ConfigError(f"{path}: expected {_type_name(hint)}, got {shown(value)}") from error
    if kind is dict and isinstance(value, dict):
        inner = args[1] if args else Any
        value = dict(_leaves(value)) if inner is str else value  # by dotted names, if nested
        return {str(name): _convert(inner, item, _join(path, name)) for name, item in value.items()}
    return _convert_scalar(hint, value, path)


def _inside(group: Any, value: Any, path: str) -> str:
    """A hint where a group was given a value of its first key, as in `optimizer.lr=0.001`."""
    first = fields(group)[0]
    try:
        _convert(get_type_hints(group)[first.name], value, path)
    except ConfigError:
        return ""
    return "" if value is None else f"; did you mean {path}.{first.name}={shown(value)}?"


def _finite(value: Any) -> bool:
    """Whether this is a number that a float can hold; truth values are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any or (hint in (bool, NoneType) and isinstance(value, hint)):
        return value
    if hint in (int, float) and isinstance(value, str) and re.fullmatch(FLOAT, value):
        value = float(value)  # `1e-4` as a YAML 1.1 reader gives it
    whole = isinstance(value, int) and not isinstance(value, bool)
    if hint is int and (whole or (isinstance(value, float) and value.is_integer())):  # 1e5 counts as whole
        return int(value)
    if hint is float and _finite(value):
        return float(value)
    if hint in (str, Path) and (isinstance(value, str | Path) or whole):
        return hint(str(value))
    quote = " (text that looks like something else needs quotes)" if hint is str and value is not None else ""
    raise ConfigError(f"{path}: expected {_type_name(hint)}, got {shown(value)}{quote}")


def _convert_literal(choices: tuple, value: Any, path: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    if (today := _renewed(value, FORMER_CHOICES, choices, path)) != value:
        return today
    near = nearest(str(value), map(str, choices))
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigError(f"{path}: expected one of {', '.join(map(str, choices))}; got {shown(value)}{hint}")


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
    hint = _inside(groups[0], value, path) if len(groups) == 1 else ""
    if groups and isinstance(value, bool) and NoneType in options and not hint:
        hint = f"; did you mean {path}={'{}' if value else 'null'}?"
    raise ConfigError(f"{path}: expected {' or '.join(map(_type_name, options))}, got {shown(value)}{hint}")


def _check_range(value: Any, ranges: dict, path: str) -> None:
    if isinstance(value, tuple | list):
        for i, item in enumerate(value):
            _check_range(item, ranges, f"{path}[{i}]")
    elif is_dataclass(value) and ranges:
        for name, number in value.numbers().items():  # type: ignore[union-attr]
            _check_range(number, ranges, f"{path}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        for name, limit in ranges.items():
            if not RANGES[name][1](value, limit):
                raise ConfigError(f"{path}: must be {RANGES[name][0]} {limit}, got {shown(value)}")


# -- keys without effect ---------------------------------------------------------------------------------


def unread(config: Any, where: str = "") -> dict[str, str]:
    """Return keys that nothing reads with these settings, by path, and why: the `unread()` of every group."""
    found: dict[str, str] = {}
    inner = config if isinstance(config, dict) else {}
    if is_dataclass(config):
        inner = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
        if hasattr(config, "unread"):
            found = {_join(where, name): why for name, why in config.unread().items()}  # type: ignore[union-attr]
    for name, value in inner.items():
        found |= unread(value, _join(where, name))
    return found


def refuse_unread(config: Any, overrides: dict) -> None:
    """Raise ConfigError where a key that was asked for, in the tree `overrides`, changes nothing.

    What a recipe holds besides may be idle: a key of something that the user has switched off.
    """
    idle = unread(config)
    for path, _ in _leaves(overrides):
        for name, why in idle.items():
            if path == name or path.startswith(f"{name}."):
                raise ConfigError(f"{path} has no effect: {why}")


def _leaves(tree: dict, where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = _join(where, name)
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


# -- showing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyInfo:
    """One line of --help: where, what kind (with its range), the value now, and its meaning."""

    path: str
    type: str
    value: Any
    help: str


def to_dict(config: Any) -> Any:
    """Return plain YAML types (dict, list, scalars) of a configuration; `build(type(config), ...)` gives it
    back.
    """
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config) if f.init}
    if isinstance(config, dict):
        return {name: to_dict(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def dump_yaml(config: Any) -> str:
    """Return the configuration (a dataclass or a tree) as YAML text, keys in declared order."""
    return dump_tree(to_dict(config))


def describe(config: Any, where: str = "") -> list[KeyInfo]:
    """Return every key of a configuration instance, in declared order, nested keys as dotted paths."""
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


def _join(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)
