"""The rules of the house that a machine can see: sizes, names that mean one thing, sentences with verbs."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import foveola

ROOT = Path(foveola.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
LINES, BODY, PARAMETERS = 400, 70, 8

# What is the same in each module that defines it: a type variable, a room's door, the contract of a command.
OPENERS = ("open_hub",)  # takes the options of a data string, each by its name
DEFINED_TWICE = {"DOOR", "T", "USAGE", "main", "wanted_of"}
# Words that say nothing to a newcomer: fraction, index, path or position, prediction, ... are the field's.
PRIVATE_WORDS = frozenset(
    """
    answers asked bank few given kept meant place places said share shares some told
    """.split()  # noqa: SIM905 - a list of words is read as words
)
# Where such a word is the field's, a verb, or a name that users type.
SAID_OUTSIDE = {
    "kept",  # patches that an encoder sees
    "place_views",
    "share", "cutmix_share", "max_class_share", "some",  # keys of configurations
    "answers", "answers_sheet", "answers_section",  # of a source with several right classes; a figure
    "shares",  # in what `foveola check` writes as JSON
}  # fmt: skip
# What a docstring of a function or method begins with.
VERBS = frozenset(
    """
    add adopt agree analyse answer apply ask assign attach average be begin bin bound bring build
    call cap check choose clamp classify clean clear close colour compare compute convert copy count
    attend clip cluster mask rotate
    cover crop cut decide declare decode defer delete describe do draw drop embed emit encode end ensure
    estimate evaluate expand explain export extract fetch fill find fit flush fold follow forget freeze
    gather get give go group hash have hold import initialise iterate join judge keep lay leave let list
    load log look make mark match measure merge minimise move name need normalise note offer open order
    pack paint parse pass pick place plan pool predict prefer prepare pretrain print project put
    quantise raise read reduce refuse register release remember remove render repeat replace report
    reset resize resolve restore resume return round run sample save say scale score search see send
    serve set share show sort split start state step stop store stretch sum take tell test tokenise
    train transform translate try turn undo update use visualize wait walk warn weigh wrap write yield
    """.split()  # noqa: SIM905 - a list of words is read as words
)


def definitions(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level for others."""
    for node in tree.body:
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


def functions(node: ast.AST, public: bool = True) -> Iterator[tuple[ast.FunctionDef, bool, bool]]:
    """Every function below a node; whether it is public, and whether it is a method."""
    for child in ast.iter_child_nodes(node):
        named = public and not getattr(child, "name", "").startswith("_")
        if isinstance(child, ast.FunctionDef):
            yield child, named, isinstance(node, ast.ClassDef)
            yield from functions(child, public=False)
        elif not isinstance(child, ast.expr):
            yield from functions(child, named)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def test_files_and_functions_are_short(trees):
    long = [name for name, path in FILES.items() if len(path.read_text().splitlines()) > LINES]
    assert not long, f"files of more than {LINES} lines"
    for name, tree in trees.items():
        for function, _, _ in functions(tree):
            assert (function.end_lineno or 0) - function.lineno < BODY, f"{name}: {function.name} is too long"


def test_functions_have_few_parameters(trees):
    """Settings that are given by name and have a default do not count."""
    many = []
    for name, tree in trees.items():
        for function, _, method in functions(tree):
            arguments = function.args
            needed = [value for value in arguments.kw_defaults if value is None]
            count = len(arguments.posonlyargs) + len(arguments.args) + len(needed) - method
            if count > PARAMETERS and function.name not in OPENERS:
                many.append(f"{name}: {function.name} has {count}")
    assert not many


def test_a_public_name_is_defined_in_one_module(trees):
    where = defaultdict(list)
    for name, tree in trees.items():
        for defined in set(definitions(tree)):
            where[defined].append(name)
    twice = {defined: names for defined, names in where.items() if len(names) > 1}
    assert twice.keys() == DEFINED_TWICE, twice


def public_names(tree: ast.Module) -> Iterator[str]:
    """Names that others read: of functions and classes, of parameters, and of fields."""
    yield from (name for name in definitions(tree) if not name.isupper())
    for function, _, _ in functions(tree):
        if not function.name.startswith("_"):
            yield function.name
            arguments = function.args
            yield from (each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = (child.target for child in node.body if isinstance(child, ast.AnnAssign))
            yield from (each.id for each in fields if isinstance(each, ast.Name))


def test_public_names_say_what_they_are(trees):
    found = {
        f"{name}: {public}"
        for name, tree in trees.items()
        for public in public_names(tree)
        if PRIVATE_WORDS & set(public.lower().split("_")) and public not in SAID_OUTSIDE
    }
    assert not found


def described_arguments(text: str) -> list[str]:
    """Names under `Args:` of a docstring."""
    found = re.search(r"^Args:\n((?:    .*\n|\n)*(?:    .*)?)", text, re.MULTILINE)
    entries = re.findall(r"^    (\w[\w*, ]*): ", found[1] if found else "", re.MULTILINE)
    return [name.strip("* ") for entry in entries for name in entry.split(",")]


def test_docstrings_describe_the_arguments_that_there_are(trees):
    stale = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inner = list(ast.walk(node))
                taken = {each.arg for each in inner if isinstance(each, ast.arg)}
                fields = (each.target for each in inner if isinstance(each, ast.AnnAssign))
                taken |= {each.id for each in fields if isinstance(each, ast.Name)}
                for described in described_arguments(ast.get_docstring(node) or ""):
                    if described not in taken:
                        stale.append(f"{name}: {node.name}: {described}")
    assert not stale


def test_a_fraction_is_called_one():
    """A part of a whole is a fraction, in code and docs; what a process gets of the work is its part."""
    pages = sorted((ROOT.parent / "docs").rglob("*.md"))
    lines = [
        f"{path}: {line}" for path in (*FILES.values(), *pages) for line in path.read_text().splitlines()
    ]
    assert not [line for line in lines if re.search(r"\bshares? of\b", line)]


def begins_with_a_verb(text: str) -> bool:
    word = text.split()[0].strip("`,.:;").lower()
    forms = {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"}
    return bool(forms & VERBS)


def test_docstrings_of_functions_begin_with_a_verb(trees):
    """What a function does is a sentence. Classes and properties name a thing, as is usual."""
    bare = []
    for name, tree in trees.items():
        for function, public, _ in functions(tree):
            text = ast.get_docstring(function)
            decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
            if public and text and "property" not in decorators and not begins_with_a_verb(text):
                bare.append(f"{name}: {function.name}: {text.splitlines()[0]}")
    assert not bare
