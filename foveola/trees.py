"""Trees of plain values (dict, list, scalars) from and to YAML and `key=value`; errors that say where.

YAML is read with the core rules of YAML 1.2: `1e-4` is a number; `no`, `on` and `1:30` are text.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 32  # of nested groups and lists; more is a mistake, and thousands would exhaust the stack
# What versions before 28 November 2026 called otherwise: keys, metrics and facts; and choices of some keys.
FORMER_NAMES = {
    former: former.replace("picture", "image")
    for former in ("pictures", "per_picture", "bad_pictures", "rankme_picture", "first_component_picture")
}
FORMER_METRIC = re.compile(r"(\w*boxacc_\w+)_full_picture(_low|_high|)")  # of the protocol `localisation`
FORMER_CHOICES = {"picture": "image", "pictures": "images"}
CHOICE_KEYS = ("rows", "view", "evaluate_at", "around")


class UserError(Exception):
    """A mistake of the user; the message is one line: what is wrong, where, and what would be right."""


class ConfigError(UserError):
    """A configuration that cannot be: unknown key, bad value, unreadable file."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate spelled most like `word` (case ignored), or None when none comes close."""
    spellings = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), spellings, n=1, cutoff=0.6)
    return spellings[found[0]] if found else None


def path_hint(path: str | Path) -> str:
    """Return the end of a message on a path that does not exist: the nearest one that does, if one comes
    close.
    """
    path = Path(path)
    try:
        missing = next((part for part in (*reversed(path.parents), path) if not part.exists()), None)
        near = missing and nearest(missing.name, [other.name for other in missing.parent.iterdir()])
    except (OSError, ValueError):  # what cannot be listed gives no hint
        return ""
    if missing is None or near is None:
        return ""
    whole = missing.with_name(near) / path.relative_to(missing)
    return f"; did you mean {whole if whole.exists() else missing.with_name(near)}?"


def kind_of(value: Any) -> str:
    """Return the type of a value with its article, for messages."""
    name = type(value).__name__
    return (
        "None"
        if value is None
        else f"{'an' if name[0].lower() in 'aeiou' or name == 'ndarray' else 'a'} {name}"
    )


def renewed(tree: Any, key: str = "") -> Any:
    """Return a tree that an earlier version wrote, under `key`, with the names of today.

    An image was called a picture then. Only names and choices that there were are renamed, and none where
    the new name is there as well: all else is a user's own.
    """
    if isinstance(tree, dict):
        today = {
            name: FORMER_NAMES.get(name, FORMER_METRIC.sub(r"\1_full_image\2", str(name))) for name in tree
        }
        return {
            name if today[name] in tree else today[name]: renewed(value, name) for name, value in tree.items()
        }
    if isinstance(tree, list):
        return [renewed(value, key) for value in tree]
    return FORMER_CHOICES.get(tree, tree) if key in CHOICE_KEYS and isinstance(tree, str) else tree


def shown(value: Any) -> str:
    """Return a value in a message, as it would be written, shortened."""
    try:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (ours, below, in place of the YAML 1.1 rules)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[union-attr]
            raise yaml.MarkedYAMLError(None, None, f"more than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, OverflowError) as error:  # such as `!!int x`
            what = f"cannot read {shown(str(node.value))}"
            raise yaml.MarkedYAMLError(None, None, what, node.start_mark) from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", name.start_mark)
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
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
for _tag, _pattern, _firsts in [
    ("null", "~|null|", ["~", "n", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", FLOAT + r"|[-+]?\.inf|\.nan", list("-+.0123456789")),
]:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _firsts)


def read_yaml(path: str | Path) -> dict:
    """Read a YAML file that holds `key: value` pairs. Raises ConfigError with file, line and column."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}{path_hint(path)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = " (text that holds a colon needs quotes)" if "mapping values" in str(error.problem) else ""
        raise ConfigError(f"{path}{where}: {error.problem}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML text file") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: expected `key: value` pairs, got {shown(tree)}")
    return tree or {}


def parse_overrides(overrides: Iterable[str]) -> dict:
    """Parse `["a.b=1", "c=[2, 3]"]` -> `{"a": {"b": 1}, "c": [2, 3]}`. Values are YAML; a later one wins."""
    tree: dict = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not all(parts := path.strip().split(".")) or len(parts) > DEEPEST:
            raise ConfigError(f"expected key=value, got {shown(text)}")
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
        try:
            return loader.construct_object(yaml.ScalarNode(tag, text))
        except yaml.MarkedYAMLError as error:
            raise ConfigError(f"{path}: {error.problem}") from error
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot read the value {shown(text)} as YAML") from error


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a tree as values by full paths: `{"a": {"b": 1}}` becomes `{"a.b": 1}`; `{}` is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def merge(base: dict, override: dict) -> dict:
    """Return a new tree: `override` laid over `base`, dictionaries key by key, everything else replaced."""
    merged = dict(base)
    for name, value in override.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = merge(base[name], value) if both else value
    return merged


def dump_tree(tree: Any) -> str:
    """Return YAML text of a tree, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
