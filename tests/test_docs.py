"""The documentation: pages are in the site, links lead somewhere, the Python page has all public names."""

import re
from pathlib import Path

import foveola

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


def test_every_page_is_in_the_site():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES]


def test_links_lead_to_files_and_headings():
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: no {target}"
            if anchor and path.suffix == ".md":
                assert anchor in anchors(path), f"{page.name}: {target} has no heading #{anchor}"


def test_the_python_page_has_every_public_name():
    named = re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.M)
    homes = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in named}
    assert homes.keys() == set(foveola.__all__) - {"__version__"}
    assert homes == {name: foveola._HOMES[name] for name in homes}
