"""The page as a person has it: a real server, and a real Chromium where there is one."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foveola
from foveola import cli
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.explorer.questions import sample_at
from tests.explorer.conftest import COUNT, QUICK


@pytest.fixture(scope="module")
def explorer(photos: str, models: tuple[Path, Path], kept: Path) -> Iterator[foveola.Explorer]:
    with foveola.explore(*models, data=photos, cache=kept, progress=False, map="pca", **QUICK) as made:
        yield made


@pytest.fixture
def tab(browser: Any, explorer: foveola.Explorer) -> Iterator[Any]:
    """The page, opened; at its end nothing was complained about, and no other machine asked."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    tab, said, asked = context.new_page(), [], []
    tab.set_default_timeout(60_000)
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(explorer.url)
    tab.wait_for_selector(".tile img")
    yield tab
    own = explorer.url.partition("/?")[0]
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []
    assert said == []
    context.close()


def until(tab: Any, expression: str) -> None:
    """Wait for a condition; what playwright has for it evaluates text, which the page's policy forbids."""
    for _ in range(600):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(100)
    pytest.fail(expression)


def hits_of(tab: Any, side: int) -> list[str]:
    until(tab, "!document.querySelector('.hits[aria-busy]') && document.querySelector('.hit')")
    return tab.locator(".hits").nth(side).locator(".hit").evaluate_all("all => all.map(e => e.dataset.name)")


def answered(tab: Any, act: Any) -> None:
    with tab.expect_response(lambda response: response.url.endswith("/ask")):
        act()


# -- the server ----------------------------------------------------------------------------------------------


def test_a_server_on_loopback_alone_that_ends(photos: str, models: tuple[Path, Path], kept: Path) -> None:
    made = foveola.explore(models[0], data=photos, cache=kept, progress=False, map="pca", **QUICK)
    address, _, token = made.url.partition("/?token=")
    host, port = made.socket.getsockname()
    assert host == "127.0.0.1"
    assert len(token) >= 32
    with urllib.request.urlopen(made.url) as answer:
        assert "HttpOnly; SameSite=Strict" in answer.headers["set-cookie"]
        assert "uvicorn" not in str(answer.headers).lower()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address}/state")
    with pytest.raises(UserError, match=f"port={port}.*give another port="):
        foveola.explore(models[0], data=photos, cache=kept, port=port, progress=False, **QUICK)
    made.close()
    with pytest.raises(OSError, match=r"refused"):
        socket.create_connection((host, port), timeout=5)


def test_the_command_says_what_it_takes(capsys: pytest.CaptureFixture[str], photos: str) -> None:
    assert cli.main(["explore", "--help"]) == 0
    keys = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert {"data", "host", "port", "cache", "device", "features", "patches", "map", "limit"} <= keys
    for words, said in (
        (["explore"], "which encoder"),
        (["explore", "gone", f"data={photos}"], "no model at gone"),
        (["explore", "pixels:", f"data={photos}", "port=0"], "port=0: expected 1 to 65535"),
        (["explore", "pixels:", f"data={photos}", "colour=red"], "colour"),
    ):
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err


# -- in a browser --------------------------------------------------------------------------------------------


def test_gallery_names_and_filter(tab: Any, photos: str, explorer: foveola.Explorer) -> None:
    source = open_source(photos, "test")
    titles = tab.locator(".tile").evaluate_all("all => all.map(e => e.title)")
    assert titles == [source[i].name for i in range(COUNT)]  # hostile ones, too, are text
    assert tab.evaluate("window.hit === undefined && !document.querySelector('.tile b, .tile script')")
    assert "token" not in tab.url
    assert tab.evaluate("document.cookie") == ""
    tab.fill("#filter", "dogs/0")
    until(tab, "document.getElementById('count').textContent.includes(' of ')")
    names = [source[i].name for i in range(COUNT) if "dogs/0" in source[i].name]
    assert tab.locator(".tile").evaluate_all("all => all.map(e => e.title)") == names
    tab.fill("#filter", "no such name")
    tab.get_by_text("No name and class fits the filter.").wait_for()
    tab.click("text=Show all")
    tab.click("#kind [data-value=objects]")
    tab.select_option("#label", label=f"<i>ear</i> ({sum(1 + i % 3 > 1 for i in range(COUNT))})")
    until(tab, "document.getElementById('count').textContent.startsWith('13 of')")


def test_click_patch_box_and_object_answer_as_search_does(tab: Any, explorer: foveola.Explorer) -> None:
    session = explorer.session
    image = int(session.sides[0].indices["patches"].rows.image_index[3])
    name = session.source[image].name
    tab.locator(".tile").nth(image).click()
    for side in (0, 1):
        index = session.sides[side].indices["images"]
        rows = index.search(index.vectors[image], COUNT).indices[0]
        assert hits_of(tab, side) == [index.describe(r)["name"] for r in rows if r != image]
    answered(tab, lambda: tab.click("#detail [data-value=patches]"))
    tab.get_by_text("Patches are found for a patch or a box").first.wait_for()
    frame = tab.locator(".stage").first.bounding_box()
    where = frame["x"] + 0.6 * frame["width"], frame["y"] + 0.4 * frame["height"]
    answered(tab, lambda: tab.mouse.click(*where))
    for side, patch in ((0, 6), (1, 1)):
        index = session.sides[side].indices["patches"]
        size = len(index) // len(index.rows.name)
        rows = index.search(index.vectors[3 * size + patch], 24 + size).indices[0]
        expected = [index.describe(r)["name"] for r in rows]
        assert hits_of(tab, side) == [each for each in expected if each != name][:24]
    answered(tab, lambda: tab.click("#detail [data-value=objects]"))
    tab.mouse.move(frame["x"] + 0.2 * frame["width"], frame["y"] + 0.2 * frame["height"])
    tab.mouse.down()
    tab.mouse.move(*where)
    answered(tab, lambda: (tab.mouse.move(frame["x"] + 0.8 * frame["width"], where[1]), tab.mouse.up()))
    box = np.array(
        tab.evaluate("""() => {
        const s = document.querySelector('.asked').style;
        return [s.left, s.top, s.width, s.height].map(v => parseFloat(v) / 100); }""")
    )
    np.testing.assert_allclose(box, [0.2, 0.2, 0.6, 0.2], atol=0.01)
    corners = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]]) * [48, 40, 48, 40]
    pixels = sample_at(session.source, image)[1]
    for side in (0, 1):
        found = foveola.search(
            session.sides[side].indices["objects"],
            pixels,
            box=corners.clip(0, [48, 40, 48, 40]).tolist(),
            top=24 + 3,
            model=session.sides[side].encoder,
        )
        assert hits_of(tab, side) == [hit["name"] for hit in found.hits[0] if hit["name"] != name][:24]
    answered(tab, lambda: tab.locator(".object button").first.click())
    index = session.sides[0].indices["objects"]
    row = int(np.flatnonzero((index.rows.image_index == image) & (index.rows.object == 0))[0])
    rows = index.search(index.vectors[row], 24 + 3).indices[0]
    expected = [index.describe(r)["name"] for r in rows]
    assert hits_of(tab, 0) == [each for each in expected if each != name][:24]


def test_layers_keys_map_and_selection(tab: Any, explorer: foveola.Explorer) -> None:
    tab.focus(".tiles")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press(" ")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".hit")
    name = explorer.session.source[1].name
    assert tab.locator(".name h2").text_content() == name
    tab.click("#detail [data-value=attention]")
    until(tab, "document.querySelectorAll('.layer:not([hidden])').length === 2")
    tab.locator(".note", has_text="what the class token of the last block reads").first.wait_for()
    tab.keyboard.press("Escape")
    assert tab.locator("#detail").is_hidden()
    tab.click("#view [data-value=map]")
    tab.locator(".note", has_text="principal components of the features").nth(1).wait_for()
    tab.click("#maps [data-value=lasso]")
    frame = tab.locator("canvas").first.bounding_box()
    left, top, right, bottom = (frame["x"] + 3, frame["y"] + 3, frame["x"] + frame["width"] - 3,
                                frame["y"] + frame["height"] - 3)  # fmt: skip
    tab.mouse.move(left, top)
    tab.mouse.down()
    for corner in ((right, top), (right, bottom), (left, bottom), (left, top + 9)):
        tab.mouse.move(*corner)
    tab.mouse.up()
    tab.locator("#selection strong", has_text=f"{COUNT} images selected").wait_for()
    with tab.expect_download() as waited:
        tab.click("text=Download list")
    lines = Path(waited.value.path()).read_text(encoding="utf-8").splitlines()
    assert len(lines) == COUNT
    assert waited.value.suggested_filename == "selection.txt"
    assert "listed:" in tab.locator("#said code").text_content()


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (800, "dark"), (390, "light")])
def test_it_fits_every_width(browser: Any, explorer: foveola.Explorer, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(explorer.url)
    tab.locator(".tile").first.click()
    tab.wait_for_selector(".hit")
    wide = "() => [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
    wide += "e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.stage')).map(e => e.className)"
    assert tab.evaluate(wide) == []
    assert tab.evaluate(
        "document.querySelector('#detail').scrollWidth <= document.querySelector('#detail').clientWidth"
    )
    context.close()
