"""ARCHITECTURE.md names every room and every file, with the phrases that the code has itself."""

import ast
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, MARK = ROOT / "ARCHITECTURE.md", "<!-- files -->\n"


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def phrase(path: Path) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(docstring(path).split("\n\n")[0].split())


def tree(room: Path) -> str:
    """A room with its files, then the rooms in it."""
    own = room / "__init__.py"
    parts = [f"\n### {room.relative_to(ROOT).as_posix()}/\n", phrase(own)]
    if nots := docstring(own).split("\n\n")[1:]:
        parts.append("\n" + " ".join(" ".join(nots).split()))
    files = [path for path in sorted(room.glob("*.py")) if path != own]
    parts.append("\n" + "\n".join(f"- `{path.name}`: {phrase(path)}" for path in files))
    inner = [path.parent for path in sorted(room.glob("*/__init__.py"))]
    return "\n".join([*parts, *map(tree, inner)])


def test_the_map_has_every_file_with_its_own_phrase():
    page = PAGE.read_text(encoding="utf-8")
    head, mark, _ = page.partition(MARK)
    assert mark
    now = head + mark + tree(ROOT / "foveola") + "\n"
    if os.environ.get("FOVEOLA_GOLDEN") == "write":
        PAGE.write_text(now, encoding="utf-8")
        return
    assert page == now, "FOVEOLA_GOLDEN=write pytest tests/test_architecture.py writes it anew"


def test_every_file_and_room_says_what_it_is_for():
    for path in (ROOT / "foveola").rglob("*.py"):
        assert len(phrase(path).split()) >= 4, f"{path}: no phrase"
    for own in (ROOT / "foveola").glob("*/__init__.py"):
        assert "\n\n" in docstring(own), f"{own}: what does not live here?"
