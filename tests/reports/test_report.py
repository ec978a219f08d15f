"""The page itself: what is on it, that text cannot break it, and that a real browser is content with it."""

import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import foveola
from foveola import cli
from foveola.config import UserError
from foveola.data.sources import open_source
from foveola.reports.findings import Findings, by_seed
from foveola.reports.progress import MeasuredRun
from foveola.reports.record import read_runs
from foveola.reports.report import report
from foveola.reports.request import Data
from foveola.training.recipe import resolve
from foveola.training.run import pretrain

EVIL = '<script>alert("x")</script> & "quotes" \'and\' <b>'
QUICK: dict[str, Any] = {
    "device": "cpu",
    "limit": 12,
    "images": 2,
    "checkpoints": 1,
    "progress": False,
    "knn": {"k": [3]},
    "retrieval": {"objects": 8},
}
TINY = {
    "data": "scenes:?size=32&count=32",
    "duration": "6 steps",
    "batch_size": 8,
    "device": "cpu",
    "model": {"width": 32, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 16},
    "views.global_size": 16,
    "loader": {"canvas": 32, "mask_canvas": 32, "workers": 0, "objects_per_image": 1},
    "transform": {"resize": 16, "crop": 16},
    "log_every": 1,
    "keep_every": "3 steps",
    "checkpoint_every": "3 steps",
    "optimizer.lr.warmup": "1 steps",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `odis` that is finished, of which other tests take copies."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(resolve("demo", {**TINY, "out": str(folder / "odis")}))
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    """The report of that run, with its user's words and a log and images that are worth a look."""
    run = runs / "odis"
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("about:\n  method: ODIS", f"about:\n  method: {json.dumps(EVIL)}")
    )
    with (run / "log.txt").open("a", encoding="utf-8") as file:
        file.write("2026-01-01 00:00:00  step 2: gradients are not finite; the weights stay as they are\n")
    (run / "figures").mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 700, 3), np.uint8)  # as wide as a sheet
    Image.fromarray(pixels).save(run / "figures" / "some_figure-00000006.png")
    return report(run, reference=f"untrained:{run}", **QUICK)


VOID = {"meta", "link", "img", "br", "line", "path", "use", "rect"}


class Checker(html.parser.HTMLParser):
    """Elements are closed in order; collects addresses, ids, and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str | None] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.ids += [str(v) for k, v in attrs if k == "id"]
        if tag == "img":
            self.alts.append(values.get("alt"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids)), "an id is there twice"
    assert all(link.startswith(("#", "data:")) for link in checker.links)
    assert {link[1:] for link in checker.links if link.startswith("#")} <= set(checker.ids)
    assert not re.search(r"url\((?!#)", text), "a style that fetches something"
    assert "script" not in checker.tags
    return checker


def test_the_page_is_whole_and_fetches_nothing(page: Path, runs: Path) -> None:
    text = page.read_text(encoding="utf-8")
    checker = checked(text)
    assert page == runs / "odis" / "report.html"
    assert text.startswith("<!doctype html>")
    assert {*("verdict", "setup", "helped", "health", "images", "curves", "config", "next", "use")} <= set(
        checker.ids
    )
    assert len(checker.alts) > 20
    assert all(alt and len(alt) > 10 for alt in checker.alts)
    assert text.count('<figure class="chart">') > 10


def test_the_page_says_what_it_should(page: Path, runs: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    run = runs / "odis"
    for words in (
        "6 of 6, 8 images each",
        "<dt>Images in it</dt><dd>32</dd>",
        "48 (1.5 epochs)",
        "scenes:?size=32&count=32",
        "width 32, 2 blocks, 2 heads, patches of 8 on 16 pixels",
        f"foveola {foveola.__version__}, torch",
        "untrained",
        "step 3",
        f"untrained:{run}",
        "1 steps left the weights as they were",
        f"foveola pretrain {run}/config.yaml out=NEW_FOLDER",
        f"foveola.load('{run}')",
        "duration: 6 steps",
        "some figure at step 6",
    ):
        assert words in text, words
    # Chance and amounts stand beside the numbers, and what colours mean beside the images.
    (classes,) = {len(open_source("scenes:").classes or ())}
    assert f"(chance {100 / classes:.1f} %)" in text
    assert "test objects with " in text
    assert "1x: uniform" in text
    # Health has not been foreseen for six steps, nor has a page for a phone without a word on scrolling.
    assert "too short to tell what the method can do" in text
    assert f"foveola report {run} limit=10000" in text
    assert text.count("Scroll this sideways") >= 2
    for metric in ("k-NN top-1", "same-object retrieval rank-1", "image found again", "RankMe"):
        assert metric in text, metric


def test_the_words_of_users_stay_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in re.sub(r"<b>[A-Z]", "", text)
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &quot;quotes&quot;" in text


def test_the_five_lines_work(page: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    found = re.search(r"<code>(import foveola.*?)</code>", text, re.DOTALL)
    assert found is not None
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "image.jpg")
    lines = found[1].replace('"image.jpg"', repr(str(tmp_path / "image.jpg")))
    assert len(lines.splitlines()) == 5
    exec(compile(lines, "report", "exec"), {})
    assert capsys.readouterr().out.strip() == "torch.Size([1, 1, 32]) torch.Size([1, 4, 32])"


def test_of_starting_weights_the_page_says_what_was_gained_and_forgotten(runs, tmp_path, no_charts):
    """A run that "began" from an untrained encoder, and whose best step is the third."""
    run = tmp_path / "adapted"
    shutil.copytree(runs / "odis", run, ignore=shutil.ignore_patterns("report*", "checkpoints"))
    foveola.load(f"untrained:{run}").save(run / "encoders" / "step-00000000")
    shutil.copytree(run / "encoders" / "step-00000003", run / "encoders" / "best")
    text = report(run, control="scenes:?size=32&count=20", **QUICK).read_text(encoding="utf-8")
    lead = r"(Use encoders/best \(step 3\)|Use the last encoder|Training hurt|Keep the starting)"
    assert re.search(lead, text)
    for words in ("gained, what was forgotten", "best (step 3)", "Neighbours before and after"):
        assert words in text
    table = text.partition("what was forgotten")[2].partition("</table>")[0]
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", table.partition("</tr>")[0])
    assert heads[1:6] == ["on", "untrained", "start", "best (step 3)", "end"]
    assert heads[6:] == ["change start to best", "change start to end"]
    values: dict[str, set[float]] = {}
    for path in (run / "report").rglob("knn.json"):
        result = json.loads(path.read_text())
        values.setdefault(result["data"]["test"]["name"], set()).add(result["metrics"]["top1_plain"])
    assert len(values) == 2
    assert any("count=20" in name for name in values)
    (row,) = re.findall(r"<tr>(?:(?!</tr>).)*control set.*?</tr>", table, re.DOTALL)
    numbers = [float(x) for x in re.findall(r"<td[^>]*>([-+0-9.]+)", row)]
    start, best, end, *changes = numbers[1:]
    assert numbers[0] == start  # the same network here
    assert changes == pytest.approx([best - start, end - start], abs=0.11)  # as they are rounded


def test_a_second_report_measures_and_draws_nothing(page: Path, runs: Path, monkeypatch) -> None:
    from foveola.reports import images, progress

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured or drawn again")

    monkeypatch.setattr(progress, "evaluate_all", never)
    monkeypatch.setattr(images, "_each", never)
    before = re.sub(r"Made [^<]*", "", page.read_text(encoding="utf-8"))
    report(runs / "odis", reference=f"untrained:{runs / 'odis'}", **QUICK)
    assert re.sub(r"Made [^<]*", "", page.read_text(encoding="utf-8")) == before


def test_runs_of_different_methods_side_by_side(page: Path, runs: Path, tmp_path: Path) -> None:
    """Another run of the same folder layout: unfinished, of MAE, with another batch, without an encoder."""
    other = tmp_path / "mae"
    other.mkdir()
    (other / "config.yaml").write_text(
        "recipe: mae-old\nbatch_size: 16\nduration: 40 steps\nmethod: {name: mae, gone: 1}\n"
        "data: 'folder:/nowhere/at/all'\nmodel: {width: 32, depth: 2, patch_size: 8}\n"
    )
    (other / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "loss": 1.0, "loss/reconstruction": None}) + "\n" for i in range(1, 6))
    )
    out = report([runs / "odis", other], tmp_path / "deep" / "both.html", **QUICK)
    text = html.unescape(out.read_text(encoding="utf-8"))
    checked(out.read_text(encoding="utf-8"))
    for words in (
        "5 of 40 steps",
        "cannot be opened",
        "images seen",
        "loss/reconstruction",
        "targets that do not",
    ):
        assert words in text, words


def test_runs_of_other_seeds_are_summed_up(
    page: Path, runs: Path, no_charts: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A copy with another seed in its config.yaml; with another batch, it is another run."""
    names = []
    for name, old, new in (
        ("again", "\nseed: 0", "\nseed: 1"),
        ("other", "\nbatch_size: 8", "\nbatch_size: 9"),
    ):
        copy = Path(shutil.copytree(runs / "odis", tmp_path / name))
        text = (copy / "config.yaml").read_text()
        assert old in text
        (copy / "config.yaml").write_text(text.replace(old, new))
        names.append(copy)
    settings = {k: v for k, v in QUICK.items() if k != "images"} | {"images": 0, "checkpoints": 0}
    out = report([runs / "odis", *names], tmp_path / "seeds.html", **settings)
    text = html.unescape(out.read_text(encoding="utf-8"))
    assert "odis, again" in text
    (told,) = re.findall(r"Over 2 seeds [^<]*", text)
    # The copy has the weights of the first run, but another seed, and so another untrained network.
    about = r"Over 2 seeds k-NN top-1 \(object masks\) went from [\d.]+ ± (?!0\.0 )[\d.]+ % to [\d.]+ ± 0.0 %"
    assert re.match(about, told), told
    assert text.count('<th scope="col">2 seeds</th>') == 1
    records = read_runs([runs / "odis", *names])
    found = [Findings(record, Data(), MeasuredRun(), []) for record in records]
    assert [[each.record.name for each in group] for group in by_seed(found)] == [["odis", "again"]]


def test_what_cannot_be_read_is_said(runs: Path, page: Path, no_charts: None, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "odis", tmp_path / "run"))
    (run / "figures" / "mine-00000003.png").write_bytes(b"no image")
    (run / "figures" / "my-own.png").write_bytes(b"")
    for kept in run.glob("report/*/images-*.html"):
        kept.write_text("")
    text = html.unescape(report(run, **QUICK).read_text(encoding="utf-8"))
    assert "mine-00000003.png cannot be read" in text
    assert "Same things should find each other" in text, "drawn again"
    (run / "encoder" / "model.safetensors").write_bytes(b"torn")
    text = html.unescape(report(run, **QUICK).read_text(encoding="utf-8"))
    assert "end was not measured: " in text
    assert "No images of the encoder" in text
    with pytest.raises(UserError, match="no such device"):
        report(run, progress=False, device="foo")


def test_the_commands_work(page: Path, runs: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    found = re.search(r"foveola (evaluate .*)", text)
    assert found is not None
    more = ["limit=8", "workers=0", "device=cpu", "k=[3]"]
    assert cli.main([*shlex.split(found[1]), *more]) == 0


def test_titles_are_no_patterns() -> None:
    from foveola.drawing import html
    from foveola.drawing.plots import Chart, Line

    drawn = html.chart(Chart(r"a\1b\g<x>", [Line("one", [0.0, 1.0], [0.0, 1.0])], "step", "y"), "s")
    assert r"a\1b\g&lt;x&gt;" in drawn


@pytest.mark.parametrize("left", ["config alone", "no images", "old encoder gone"])
def test_what_is_missing_is_said_in_a_line(
    runs: Path, page: Path, no_charts: None, tmp_path: Path, left: str
) -> None:
    run = tmp_path / "run"
    if left == "config alone":
        run.mkdir()
        shutil.copy(runs / "odis" / "config.yaml", run)
        words = ("No step was logged", "no encoder yet")
    else:
        shutil.copytree(runs / "odis", run)
        if left == "no images":
            text = (run / "config.yaml").read_text()
            (run / "config.yaml").write_text(text.replace("scenes:?size=32&count=32", "folder:/nowhere"))
            words = ("no folder /nowhere", "was not measured")
        else:
            shutil.rmtree(run / "encoders")
            (run / "encoder" / "model.safetensors").unlink()
            words = ("no encoder yet",)
    out = report(run, **QUICK)
    text = html.unescape(out.read_text(encoding="utf-8"))
    checked(out.read_text(encoding="utf-8"))
    for each in words:
        assert each in text, each


def test_mistakes(runs: Path, tmp_path: Path) -> None:
    run = runs / "odis"
    for words, settings in (
        ("unknown key 'protocol'; did you mean 'protocols'", {"protocol": "knn"}),
        ("unknown protocol 'knm'; did you mean 'knn'", {"protocols": "knm"}),
        ("images: must be >= 0, got -1", {"images": -1}),
        ("no folder /nowhere", {"data": "folder:/nowhere"}),
        ("no model at nowhere", {"reference": "nowhere", "protocols": "knn", "limit": 4}),
        ("is a folder; expected a file", {"out": str(tmp_path)}),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            report(run, progress=False, **settings)


def test_the_command(
    page: Path, runs: Path, no_charts: None, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    words = (
        f"limit=12 images=0 checkpoints=0 protocols=knn knn.k=[3] device=cpu out={out}".split()
    )  # all kept
    assert cli.main(["report", str(runs / "odis"), *words]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "odis: measuring end, 2 of 2 networks: knn\n" in said.err
    assert "No images were asked for" in out.read_text(encoding="utf-8")
    assert cli.main(["report", "--help"]) == 0
    keys = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert {"out", "data", "train", "test", "protocols", "reference", "images", "checkpoints"} <= keys


# -- in a browser --------------------------------------------------------------------------------------------


OVERFLOW = """() => [...document.querySelectorAll('body *')].filter(e =>
    !e.closest('.scroll') && !e.closest('pre') && !e.closest('svg')
    && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML.slice(0, 100))"""
SMALLEST = """() => {
  const sizes = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.checkVisibility()) continue;
    const matrix = e instanceof SVGGraphicsElement ? e.getScreenCTM() : null;
    const scale = matrix === null ? 1 : Math.hypot(matrix.a, matrix.b);
    sizes.push([parseFloat(getComputedStyle(e).fontSize) * scale, walk.currentNode.textContent]);
  }
  return sizes.sort((a, b) => a[0] - b[0])[0];
}"""
CONTRAST = """() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => {
      x /= 255; return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
  let worst = [99, ''];
  const some = 'h1, h2, h3, p, li, dt, dd, td, th, a, small, .chip, .text, .caption, summary, svg text';
  for (const e of document.querySelectorAll(some)) {
    if (!e.checkVisibility() || !e.textContent.trim()) continue;
    let under = e;
    const clear = node => /^rgba\\(0, 0, 0, 0\\)$/.test(getComputedStyle(node).backgroundColor);
    while (under && clear(under)) under = under.parentElement;
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    const [a, b] = [light(ink), light(getComputedStyle(under || document.body).backgroundColor)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 100)];
  }
  return worst;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "light"), (1280, "dark")])
def test_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.resolve().as_uri())
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [page.resolve().as_uri()]
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    images = tab.evaluate(
        "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 0)"
    )
    assert len(images) > 10
    assert all(images)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(OVERFLOW) == []
    size, text = tab.evaluate(SMALLEST)
    assert size >= 12, text
    ratio, where = tab.evaluate(CONTRAST)
    assert ratio >= 4.5, where  # WCAG AA
    context.close()
