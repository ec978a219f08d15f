from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from foveola.config import (
    ConfigError,
    KeyInfo,
    UserError,
    build,
    describe,
    dump_yaml,
    key,
    merge,
    nearest,
    parse_overrides,
    read_yaml,
    renewed,
    to_dict,
)


@dataclass(frozen=True)
class Circle:
    name: Literal["circle"] = "circle"
    radius: float = key(1.0, "in pixels", above=0)


@dataclass(frozen=True)
class Box:
    name: Literal["box", "square"] = "box"
    sides: tuple[float, ...] = key((1.0, 2.0), "of the box", at_least=0, below=100)


@dataclass(frozen=True)
class Inner:
    rate: float = key(1e-4, "learning rate", above=0)
    momentum: float = 0.9
    limits: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        if self.limits[0] > self.limits[1]:
            raise ValueError("limits must rise")


@dataclass(frozen=True)
class Span:
    low: float = 0.0
    high: float = 1.0

    def numbers(self) -> dict[str, float]:
        return {"low": self.low, "high": self.high}


@dataclass(frozen=True)
class Outer:
    data: str = key(help="where the images are")
    shape: Circle | Box = key(Circle(radius=3.0), "what to draw")
    inner: Inner = key(Inner(momentum=0.5), "how to learn")
    spread: Inner | None = key(None, "may be left out")
    span: Span | None = key(None, "its own numbers have no range, this key has", at_least=0, at_most=2)
    named: dict[str, Circle] = key(factory=dict, help="any number of these")
    duration: str | int = key("10 epochs", "how long")
    count: int = key(3, "how many", at_least=1)
    flag: bool = False
    patch: Literal[8, 16] = 16
    path: Path | None = None
    free: Any = None
    items: list[str] = field(default_factory=list)
    hidden: int = field(default=5, init=False)


def outer(*overrides: str) -> Outer:
    return build(Outer, parse_overrides(["data=x", *overrides]))


def test_defaults_and_types():
    config = outer()
    assert config == Outer("x")
    config = outer(
        "inner.rate=1e-3",
        "inner.momentum=1",
        "count=1e3",
        "flag=true",
        "patch=8",
        "path=/a b",
        "items=[a, '1']",
    )
    assert (config.inner.rate, config.inner.momentum, config.count) == (0.001, 1.0, 1000)
    assert isinstance(config.inner.momentum, float)
    assert isinstance(config.count, int)
    assert (config.flag, config.patch, config.path, config.items) == (True, 8, Path("/a b"), ["a", "1"])
    assert outer("inner.rate=1e308").inner.rate == 1e308
    assert build(Outer, {"data": "x", "inner": {"rate": "1e-3"}}).inner.rate == 0.001  # as YAML 1.1 reads it


def test_a_partial_group_keeps_the_rest_of_its_default():
    config = outer("inner.rate=2")
    assert config.inner == Inner(2.0, 0.5)
    assert outer("shape.radius=4").shape == Circle(radius=4.0)
    assert outer("spread.rate=2").spread == Inner(2.0, 0.9)
    assert outer("spread=null").spread is None


def test_groups_told_apart_by_name():
    assert outer("shape.name=square", "shape.sides=[1, 2e1, 3]").shape == Box("square", (1.0, 20.0, 3.0))
    assert outer("named.a.radius=2", "named.b={}").named == {"a": Circle(radius=2.0), "b": Circle()}
    assert build(Outer, {"data": "x", "shape": Box()}).shape == Box()  # an instance, from Python


def test_one_value_is_a_list_of_one() -> None:
    """Where a list may have any length; a pair stays a pair. Mistakes are said of the list."""
    for text in ("shape.sides=2e1", "shape.sides=[20]"):
        assert outer("shape.name=square", text).shape == Box("square", (20.0,))
    for text, message in (
        ("shape.sides=wide", "shape.sides: expected [float, ...], got 'wide'"),
        ("shape.sides=null", "shape.sides: expected [float, ...], got null"),
        ("shape.sides=100", "shape.sides[0]: must be < 100, got 100.0"),
    ):
        with pytest.raises(ConfigError) as caught:
            outer("shape.name=square", text)
        assert str(caught.value) == message
    with pytest.raises(ConfigError, match=r"inner\.limits: expected \[int, int\], got 3"):
        outer("inner.limits=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cuont=1", "unknown key 'cuont'; did you mean 'count'?"),
        ("inner.rat=1", "unknown key 'inner.rat'; did you mean 'inner.rate'?"),
        ("sides=1", "unknown key 'sides'; did you mean 'shape.sides'?"),
        ("named.a.xyz=1", "unknown key 'named.a.xyz'; known here: name, radius"),
        ("hidden=1", "unknown key 'hidden'; known here: data, "),
        (
            "shape.name=circel",
            "shape.name: expected one of circle, box, square; got 'circel'; did you mean 'cir",
        ),
        ("shape.name=box", None),
        ("shape=3", "shape: expected {name, radius} or {name, sides}, got 3"),
        ("inner=3", "inner: expected {rate, momentum, limits}, got 3; did you mean inner.rate=3?"),
        ("inner=fast", "inner: expected {rate, momentum, limits}, got 'fast'"),
        ("spread=3", "spread: expected {rate, momentum, limits} or null, got 3; did you mean spread.rate=3?"),
        (
            "spread=true",
            "spread: expected {rate, momentum, limits} or null, got true; did you mean spread={}?",
        ),
        (
            "spread=false",
            "spread: expected {rate, momentum, limits} or null, got false; did you mean spread=null?",
        ),
        ("inner.rate=.inf", "inner.rate: expected float, got inf"),
        ("inner.rate=-.inf", "inner.rate: expected float, got -inf"),
        ("inner.limits=[.inf, 2]", "inner.limits[0]: expected int, got inf"),
        (f"count={'9' * 5000}", "count: cannot read '99999"),
        (f"inner.rate={'9' * 400}", "inner.rate: expected float, got 99999"),
        ("count=[!!int x]", "count: cannot read the value '[!!int x]' as YAML"),
        (f"items={'[' * 3000}", "items: cannot read the value '[[[["),
        (".".join("a" * 3000) + "=1", "expected key=value, got 'a.a.a"),
        ("span.high=-1", "span.high: must be >= 0, got -1.0"),
        ("span={low: 2.5, high: 1}", "span.low: must be <= 2, got 2.5"),
        ("inner.rate=fast", "inner.rate: expected float, got 'fast'"),
        ("inner.rate=.nan", "inner.rate: expected float, got nan"),
        ("inner.rate=0", "inner.rate: must be > 0, got 0.0"),
        ("inner.rate=null", "inner.rate: expected float, got null"),
        ("inner.rate=true", "inner.rate: expected float, got true"),
        ("inner.limits=[1]", "inner.limits: expected [int, int], got [1]"),
        ("inner.limits=[1, 2.5]", "inner.limits[1]: expected int, got 2.5"),
        ("inner.limits=[3, 2]", "inner: limits must rise"),
        ("shape={name: box, sides: [1, 100]}", "shape.sides[1]: must be < 100, got 100.0"),
        ("count=0", "count: must be >= 1, got 0"),
        ("count=1.5", "count: expected int, got 1.5"),
        ("count=.inf", "count: expected int, got inf"),
        ("flag=1", "flag: expected true|false, got 1"),
        ("flag=yes", "flag: expected true|false, got 'yes'"),
        ("patch=14", "patch: expected one of 8, 16; got 14"),
        ("patch=true", "patch: expected one of 8, 16; got true"),
        ("duration=[1]", "duration: expected text or int, got [1]"),
        ("data=1.5", "data: expected text, got 1.5 (text that looks like something else needs quotes)"),
        ("data=null", "data: expected text, got null"),
        ("items=a", "items: expected [text], got 'a'"),
        ("count", "expected key=value, got 'count'"),
        ("a..b=1", "expected key=value, got 'a..b=1'"),
        ("items=[a", "items: cannot read the value '[a' as YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override, message):
    if message is None:
        outer(override)
        return
    with pytest.raises(ConfigError) as caught:
        outer(override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_missing_values_and_names():
    with pytest.raises(ConfigError, match=r"^run\.data: a value is needed \(where the images are\)$"):
        build(Outer, {}, "run")
    required = dataclass(frozen=True)(type("Pick", (), {"__annotations__": {"shape": Circle | Box}}))
    with pytest.raises(ConfigError, match=r"^shape\.name: a value is needed, one of circle, box, square$"):
        build(required, {"shape": {"radius": 1}})
    with pytest.raises(TypeError, match="no range named"):
        key(1, at_leats=0)


def test_overrides_are_text_where_text_is_likely():
    tree = parse_overrides(
        ["a=scenes:", "b=x: y #z", "c=no", "d=1:30", "e=007", "f=2024-01-01", "g=", "h='1'", "i=0"]
    )
    expected = ["scenes:", "x: y #z", "no", "1:30", "007", "2024-01-01", None, "1", 0]
    assert list(tree.values()) == expected
    assert parse_overrides(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}
    assert parse_overrides(["a=x=y"]) == {"a": "x=y"}
    assert parse_overrides(["a.b=1", "a=null"]) == {"a": None}


def test_merge_leaves_its_arguments_alone():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert merge(base, {"a": {"c": [3]}, "d": 4}) == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert merge({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}


AWKWARD = [
    "1e-4",
    "no",
    "null",
    "~",
    "",
    "1:30",
    "2024-01-01",
    "007",
    "scenes:",
    "a: b",
    "é",
    "[x",
    "true",
    "0x1f",
    "-",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_yaml_round_trip(tmp_path, text):
    config = Outer(
        text,
        shape=Box("square", (0.5, 2.0, 1e-7)),
        inner=Inner(1e300),
        spread=Inner(3e8),
        named={"no": Circle(), "1": Circle(radius=2.0)},
        duration=7,
        path=Path("/x"),
        free={"a": [1, [2, None]]},
        items=[text, "b"],
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert build(Outer, read_yaml(path)) == config
    assert build(Outer, to_dict(config)) == config
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["data"] == text  # other readers agree
    assert "  sides: [0.5, 2.0, 1.0e-07]\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: 1\nb: scenes:\n",
            r"c.yaml, line 2, column 10: mapping values .* \(text that holds a colon needs quotes\)",
        ),
        ("a: 1\na: 2\n", r"c.yaml, line 2, column 1: key 'a' is given twice"),
        ("- 1\n- 2\n", r"c.yaml: expected `key: value` pairs, got \[1, 2\]"),
        ("a: [1\n", r"c.yaml, line \d, column \d: "),
        ("a: !!python/name:os.system\n", r"c.yaml, line 1"),
        ("a: \x00", r"c.yaml: not a YAML text file"),
        ("? [a]\n: b\n", r"c.yaml, line 1, column 3: a key must be a word"),
        ("x: 1\na: !!int x\n", r"c.yaml, line 2, column 4: cannot read 'x'"),
        ("a: !!float x\n", r"c.yaml, line 1, column 4: cannot read 'x'"),
        ("a: !!bool x\n", r"c.yaml, line 1, column 4: cannot read 'x'"),
        ("a: !!timestamp x\n", r"c.yaml, line 1, column 4: cannot read 'x'"),
        ("a: " + "9" * 5000, r"c.yaml, line 1, column 4: cannot read '9999"),
        ("a: " + "[" * 3000 + "]" * 3000, r"c.yaml, line 1, column \d+: more than 32 levels"),
        (b"\xff\xfe\xfa", r"c.yaml: not a YAML text file"),
    ],
)
def test_unreadable_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    assert read_yaml(tmp_path / "recipe.yaml") == {}
    with pytest.raises(ConfigError, match=r"recipes\.yml; did you mean .*recipe\.yaml\?"):
        read_yaml(tmp_path / "recipes.yml")
    with pytest.raises(ConfigError, match=r"no configuration file .*/nowhere/x\.yaml$"):
        read_yaml(tmp_path / "nowhere" / "x.yaml")


def test_describe_lists_every_key_once():
    lines = describe(outer("named.a.radius=2", "spread=null"))
    assert lines[:4] == [
        KeyInfo("data", "text", "x", "where the images are"),
        KeyInfo("shape.name", "circle", "circle", ""),
        KeyInfo("shape.radius", "float > 0", 3.0, "in pixels"),
        KeyInfo("inner.rate", "float > 0", 1e-4, "learning rate"),
    ]
    by_path = {line.path: line for line in lines}
    assert len(by_path) == len(lines)
    assert by_path["named.a.radius"].value == 2.0
    assert by_path["spread"].type == "{rate, momentum, limits} or null"
    assert by_path["inner.limits"] == KeyInfo("inner.limits", "[int, int]", [1, 2], "")
    assert by_path["patch"].type == "8|16"
    assert "hidden" not in by_path
    assert describe(Outer("x", shape=Box()))[2].type == "[float, ...] >= 0 < 100"


def test_nearest():
    assert nearest("ODIS", ["dino", "odis", "ibot"]) == "odis"
    assert nearest("xyz", ["dino", "odis"]) is None
    assert nearest("a", []) is None


def test_keys_and_choices_that_said_picture_are_understood():
    """They were typed in earlier versions; what they are called today is said."""

    @dataclass(frozen=True)
    class Rows:
        per_image: bool = key(True)
        rows: Literal["images", "objects"] = key("objects")

    with pytest.warns(FutureWarning) as said:
        assert build(Rows, {"per_picture": False, "rows": "pictures"}) == Rows(False, "images")
    told = [str(warning.message) for warning in said]
    assert told == [
        "configuration: 'per_picture' is now called 'per_image'",
        "rows: 'pictures' is now called 'images'",
    ]
    with pytest.warns(FutureWarning), pytest.raises(ConfigError, match="per_image: given twice"):
        build(Rows, {"per_picture": False, "per_image": True})
    with pytest.raises(ConfigError, match="per_pictures"):
        build(Rows, {"per_pictures": False})
    tree = {"pictures": [1, {"rows": "pictures"}], "out": "my_pictures", "my_picture": "picture"}
    new = {"images": [1, {"rows": "images"}], "out": "my_pictures", "my_picture": "picture"}
    assert renewed(tree) == new, "names of one's own stay"
    metrics = {"maxboxacc_v2_full_picture_low": 1.0, "rankme_picture": 2.0}
    assert list(renewed(metrics)) == ["maxboxacc_v2_full_image_low", "rankme_image"]
    assert renewed({"pictures": 1, "images": 2}) == {"pictures": 1, "images": 2}, "nothing is lost"
