"""Which way imports point, and what importing costs."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "foveola").rglob("*.py"))

# A room may import itself, the leaves, and what its line names; nothing else of ours.
OPEN_LEAVES = {
    "config",
    "trees",
    "health",
    "failures",
    "files",
    "model_names",
    "outside",
    "schedules",
    "state_files",
    "launchers",
    "locks",
}  # any file may import these
LEAVES = OPEN_LEAVES | {"distributed", "geometry"}
ALLOWED = {
    "__main__": {"cli"},
    "cli": {
        "commands",
        "console",
        "command_keys",
        "training",
        "evaluation",
        "figures",
        "reports",
        "zoo",
        "demo",
        "distributed",
        "models.encoder",
    },
    "commands": {
        "embedding",
        "exporting",
        "explorer",
        "slurm",
        "console",
        "command_keys",
        "training",
        "evaluation",
        "proposals",
        "figures",
        "reports",
        "zoo",
        "data",
        "distributed",
        "models.encoder",
    },
    "demo": {
        "training",
        "evaluation",
        "figures",
        "reports",
        "distributed",
        "drawing",
        "data",
        "views",
        "zoo",
        "models.encoder",
    },
    "training": {
        "methods",
        "logged",
        "proposals",
        "tasks",
        "data",
        "views",
        "zoo",
        "distributed",
        "models.encoder",
        "models.lora",
        "models.starting",
        "models.shape",
        "models.transform",
        "models.vit",
    },
    "training.evaluations": {
        "evaluation.evaluate",
        "evaluation.features.overlap",
        "evaluation.result",
        "evaluation.stored",
    },
    "training.milestones": {
        "evaluation.paired",
        "evaluation.protocol",
        "evaluation.result",
        "evaluation.stored",
    },
    "training.auto.cost": {"models.heads"},
    "training.recipe": {"evaluation.classification.knn"},  # its config only
    "training.planned": {"evaluation.classification.knn", "evaluation.protocol"},
    "tasks": {
        "methods",
        "views",
        "models",
        "losses",
        "distributed",
        "data.sample",
        "data.shown",
        "data.values",
        "drawing",
    },
    "methods": {
        "views",
        "models",
        "losses",
        "cross_entropy",
        "clustering",
        "distributed",
        "data.shown",
        "logged",
    },
    "reports": {
        "progress",
        "figures",
        "drawing",
        "evaluation",
        "zoo",
        "models.encoder",
        "models.transform",
        "data",
        "distributed",
    },
    "figures": {
        "tasks",
        "drawing",
        "evaluation",
        "zoo",
        "models.encoder",
        "models.seen",
        "models.vit",
        "models.transform",
        "data",
        "distributed",
    },
    "embedding": {
        "evaluation",
        "drawing",
        "zoo",
        "models.encoder",
        "models.seen",
        "models.transform",
        "data",
        "distributed",
        "progress",
    },
    "exporting": {"tasks", "zoo", "evaluation.result", "reports.record", "models.encoder"},
    "explorer": {
        "embedding",
        "figures",
        "drawing",
        "evaluation",
        "zoo",
        "models.encoder",
        "models.seen",
        "models.transform",
        "data",
        "distributed",
    },
    "drawing": set(),
    "zoo": {"tasks", "models.encoder", "models.lora", "models.shape", "models.vit", "models.wrapped"},
    "zoo.exported": {"models.transform"},
    "zoo.transfer": {"models"},  # it makes tensors of other shapes
    "zoo.training_heads": {"models.starting"},
    "proposals": {
        "zoo",
        "models.encoder",
        "models.capture",
        "models.seen",
        "models.transform",
        "models.wrapped",
        "data",
        "drawing",
        "geometry",
        "distributed",
        "progress",
    },
    "evaluation": {
        "progress",
        "tasks",
        "proposals",
        "models.encoder",
        "models.seen",
        "models.transform",
        "zoo",
        "data",
        "geometry",
        "distributed",
        "views",
    },
    "views": {"data.sample", "geometry", "logged"},
    "models": {"geometry"},
    "models.transform": {"data.decode", "data.decoding"},
    "models.seen": {"data.suited"},
    "models.encoder": {"data.decode"},  # one way from a file to pixels
    "logged": {"distributed"},
    "losses": {"cross_entropy", "distributed"},
    "cross_entropy": set(),
    "clustering": {"losses"},
    "data": set(),
    "console": {"distributed"},
    "progress": {"distributed"},
    "command_keys": set(),
    "slurm": set(),
}
# The files of methods/ that other methods may build on.
METHOD_BASES = {"clusters", "method", "targets", "terms"}


def module_of(path: Path) -> str:
    """foveola/views/batch.py -> "views.batch"; a package's own file has the package's name."""
    parts = path.relative_to(ROOT / "foveola").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, also inside functions; "a.b.c" for `from a.b import c`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the absolute name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def ours(path: Path) -> set[str]:
    return {name.removeprefix("foveola.") for name in imports(path) if name.startswith("foveola.")}


def upward(module: str, names: set[str]) -> set[str]:
    room = module.split(".")[0]
    allowed = OPEN_LEAVES | ALLOWED.get(room, set()) | ALLOWED.get(module, set())
    if room not in LEAVES:
        allowed = allowed | {room}
    return {name for name in names if not inside(name, allowed) and name != "__version__"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    if module == "":
        return  # the public names, each loaded when first used
    assert module.split(".")[0] in LEAVES | ALLOWED.keys(), f"{path} is in no known room"
    assert not upward(module, ours(path)), "imports that point up or sideways"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A way along the arrows of a graph that ends where it began, or nothing."""
    finished: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in finished:
            return []
        for other in sorted(graph.get(node, ())):
            if found := visit(other, [*way, node]):
                return found
        finished.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_no_file_imports_itself_by_way_of_others():
    """Neither files nor rooms go round in a circle, imports inside functions included."""
    modules = {module_of(path) for path in FILES} - {""}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        names = {name.rpartition(".")[0] if name not in modules else name for name in ours(path)}
        graph[module_of(path)] = names & modules
    graph.pop("")
    assert not circle(graph)
    rooms: dict[str, set[str]] = {}
    for module, names in graph.items():
        room = module.split(".")[0]
        rooms.setdefault(room, set()).update({name.split(".")[0] for name in names} - {room})
    assert not circle(rooms)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_the_page_has_every_room_above_what_it_imports():
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    _, table, files = page.split("## Which way imports point")[1].split("## Reading order")[0].split("```")
    lines = [re.split(r"  +", line)[0].split(", ") for line in table.strip().splitlines()]
    level = {room: number for number, rooms in enumerate(lines) for room in rooms}
    beside = set(re.findall(r"`(\w+)`", files))
    assert level.keys() | beside == (LEAVES | ALLOWED.keys() - {"__main__"}) - {
        name for name in ALLOWED if "." in name
    }
    assert set(re.findall(r"`(\w+)`", files.partition("leaves")[2])) == OPEN_LEAVES
    for module, names in ALLOWED.items():
        if (room := module.split(".")[0]) in level:
            below = {name.split(".")[0] for name in names} - {room} - beside
            assert not {name for name in below if level[name] <= level[room]}, module


def test_the_rule_sees_what_it_should():
    assert upward("evaluation.knn", {"methods.method.Method"})
    assert upward("methods.distillation", {"evaluation.evaluate"})
    assert upward("views.batch", {"data.loader.Loader"})
    assert upward("geometry", {"distributed.rank"})
    assert upward("training.loop", {"evaluation.evaluate.evaluate"})
    assert not upward(
        "training.evaluations", {"evaluation.evaluate.evaluate", "config.key", "training.loop.train"}
    )
    assert not upward("views.batch", {"data.sample.Canvases", "geometry.sample", "schedules.Schedule"})


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_the_training_side_knows_torch_distributed(path):
    module = module_of(path)
    if inside(module, {"distributed", "launchers", "state_files", "training"}):
        return
    names = {name for name in imports(path) if inside(name, {"torch.distributed"})}
    assert not names
    assert not re.search(r"\btorch\.distributed\b", path.read_text())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_methods_do_not_build_on_each_other(path):
    module = module_of(path)
    if not module.startswith("methods."):
        return
    siblings = {name.split(".")[1] for name in ours(path) if name.startswith("methods.")}
    assert siblings <= METHOD_BASES


def test_no_warehouses():
    names = {part for path in FILES for part in module_of(path).split(".")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "core"}


def test_import_is_light():
    """`import foveola` loads no array library, takes under 0.3 s, and lists the public names."""
    code = (
        "import sys, time; start = time.perf_counter(); import foveola; print(time.perf_counter() - start);"
        "print(*sys.modules); print(*dir(foveola))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        for _ in range(3)
    ]
    seconds, modules, names = runs[0].stdout.splitlines()
    heavy = {"torch", "torchvision", "numpy", "PIL", "matplotlib", "tensorboard", "rich", "scipy"}
    assert not heavy & {name.split(".")[0] for name in modules.split()}
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < 0.3, seconds
    assert {"pretrain", "evaluate", "load", "Encoder", "Features", "Result", "Run"} <= set(names.split())


def test_unknown_public_name():
    import foveola

    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = foveola.pretrian


def test_calls_are_checked_against_their_annotations():
    """The import hook of conftest.py is at work: a wrong type or shape is an error in tests."""
    import torch
    from jaxtyping import TypeCheckError

    from foveola import config, distributed

    with pytest.raises(TypeCheckError):
        config.nearest(3, [])
    with pytest.raises(TypeCheckError):
        distributed.all_reduce_mean(torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_find_what_they_measure(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module(f"benchmarks.{path.stem}".removesuffix(".__init__"))


@pytest.mark.parametrize("turn", [1, 2])
def test_the_first_calls_of_a_function_are_checked_in_every_test(turn: int):
    from jaxtyping import TypeCheckError

    from foveola.health import as_percent

    with pytest.raises(TypeCheckError):
        as_percent("half")  # type: ignore[arg-type]
    assert {as_percent(turn) for _ in range(50)} == {f"{turn}00 %"}
