"""The report is complete, self-contained, deterministic, and safe against what it quotes."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support_diffs import DIFFS, HOSTILE, bare_diff, condition, finding, full_diff

from tunediff.core.text import UNSEEN
from tunediff.records.diff import Diff
from tunediff.records.measure import Context, Measure
from tunediff.reports import charts
from tunediff.reports.charts import Line, bar
from tunediff.reports.page import completions, corpus_contexts, flat, measure_rows, passage, render_report, write_report

VOID = {"meta", "br", "link", "img", "input", "hr", "base", "wbr"}


class Reader(HTMLParser):
    """Reads a page into its elements and checks that every one is closed in order."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open and self.open.pop() == name, f"</{name}> closes another element"

    def handle_data(self, text):
        self.text.append(text)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: render_report(make()) for name, make in DIFFS.items()}


@pytest.mark.parametrize("name", DIFFS)
def test_page_is_whole_and_self_contained(pages, name):
    reader = Reader(pages[name])
    assert reader.open == []
    kinds = [kind for kind, _ in reader.elements]
    assert kinds.count("script") == 1 and kinds.count("style") == 1
    assert not {"link", "img", "iframe", "object", "embed", "base", "form", "use", "image"} & set(kinds)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for kind, attributes in reader.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("style", "src", "srcdoc", "action")], (
            kind
        )
        for key in ("href", "xlink:href"):
            if key in attributes:
                assert attributes[key].startswith("#") and attributes[key][1:] in ids
    assert "http" not in pages[name].replace("http-equiv", "")
    policy = next(a["content"] for k, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert {"header", "nav", "main", "footer"} <= set(kinds)


def test_base_is_left_of_tuned(pages):
    page = pages["full"]
    assert page.index('class="model base"') < page.index('class="model tuned"')
    pairs = page.split('<div class="pair completions">')[1:]
    assert len(pairs) == 2 * len(full_diff().changes)
    for pair in pairs:
        assert pair.index('class="side base"') < pair.index('class="side tuned"')
    assert page.index("Less likely after tuning") < page.index("More likely after tuning")


def test_full_page_tells_everything(pages):
    diff, text = full_diff(), " ".join("".join(Reader(pages["full"]).text).split())
    told = [
        *diff.summary,
        *diff.not_found,
        diff.base.name,
        diff.tuned.name,
        diff.base.fingerprint,
        "2 confirmed changes",
    ]
    told += [c.id for c in diff.changes] + [c.reason for c in diff.changes] + [s.title for s in diff.signals]
    told += [m.name for c in diff.changes for m in c.measures] + [b.operation for b in diff.bills]
    told += [n.note for n in diff.nulls] + [
        "0.083",
        "[0.0747, 0.0930]",
        "base against itself in other batches",
        "not measured",
    ]
    told += ["finder.latents", "8192", "21 min 01 s", "␣dear", "↵"]
    for sentence in told:
        assert sentence in text, sentence


def test_hostile_strings_stay_text(pages):
    page = pages["hostile"]
    honest = {kind for kind, _ in Reader(pages["full"]).elements}
    assert {kind for kind, _ in Reader(page).elements} <= honest
    for raw in HOSTILE[:5] + ["<img", "<svg/", "</svg></title>", "-->", "<!--", "onload=alert(3)>"]:
        assert raw not in page
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        and "{{ 7 * 7 }}{% raw %}{#" in page
        and "&amp;lt;b&amp;gt;" in page
    )
    for name in pages:
        assert not UNSEEN.search(pages[name])
        pages[name].encode("utf-8")
    for shown in (
        "right‹U+202E›to‹U+2066›left",
        "nul␀bell␇esc␛",
        "lone‹U+D800›surrogate",
        "zero‹U+200B›width‹U+FEFF›",
        "‹+39›",
    ):
        assert shown in page


@pytest.mark.parametrize("text", HOSTILE)
def test_charts_escape(text):
    drawn = [
        bar(1.0, 0.5, 1.5, 0.1, extent=(0, 2), label=text),
        charts.lines(
            [Line(text, [(0.0, 1.0), (1.0, 2.0)], band=[(0.0, 0.0, 1.0), (1.0, 0.0, 1.0)])],
            label=text,
            x_label=text,
            y_label=text,
            x_ticks=[(0.0, text)],
            marks=[(1.0, text)],
        ),
        charts.strip([(text, [1.0, 2.0])], label=text, x_label=text, marks=[(1.0, text)]),
        passage(Context("d", "k", "", [text, text], [1.0, 0.0], [0.3, 0.0]), 1.0),
    ]
    for drawing in drawn:
        reader = Reader(str(drawing))
        assert reader.open == []
        assert {kind for kind, _ in reader.elements} <= {
            "svg",
            "title",
            "text",
            "rect",
            "line",
            "circle",
            "polyline",
            "polygon",
            "span",
            "br",
            "i",
        }


def test_rows_of_tables():
    (row,) = measure_rows([Measure("necessity", 0.4, 0.3, 0.5, "nat", None, "has none", 0.0)])
    assert (row.value, row.interval, row.control, row.against, row.p) == (
        "0.400 nat",
        "[0.300, 0.500]",
        "none",
        "has none",
        "< 0.001",
    )
    assert flat({"b": {"y": 1, "x": "s"}, "a": None}) == [("a", "(default)"), ("b.x", '"s"'), ("b.y", "1")]


def test_ticks_cover_awkward_ranges():
    for low, high in ((0, 1), (-1e-9, 1e-9), (3, 3.0001), (0, 1e12), (-7, 0)):
        marks = charts.ticks(low, high)
        assert 1 <= len(marks) <= 6 and all(low - 1e-9 * abs(high) <= t <= high * (1 + 1e-9) + 1e-12 for t in marks)
    assert "not measured" in charts.lines([Line("a", [(0.0, math.nan)])], label="a", x_label="", y_label="")
    assert charts.lines([Line("a", [(0.0, 5.0)])], label="a", x_label="", y_label="").count("<circle") == 1


def test_completions_pair_by_prompt():
    told = (("1/tuned", "tuned"), ("1/base", "base"), ("2/amplified", "amplified"), ("3", ""))
    a, b, c, d = (Context(document, "chat", writer, [], [], []) for document, writer in told)
    change = dataclasses.replace(full_diff().changes[0], contexts=[a, b, c, d])
    assert completions(change) == [("1", "chat", b, a), ("2", "chat", None, c)] and corpus_contexts(change) == [d]


def test_same_record_same_bytes(tmp_path: Path):
    diff = full_diff()
    write_report(diff, tmp_path / "a.html")
    diff.save(tmp_path / "diff.json")
    write_report(Diff.load(tmp_path / "diff.json"), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["full", "hostile"])
def test_page_opens_in_a_browser(name, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here")
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    write_report(DIFFS[name](), page)
    run = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1280,1600",
            f"--screenshot={shot}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shot.read_bytes().startswith(b"\x89PNG") and shot.stat().st_size > 20_000, run.stderr
    console = [row for row in run.stderr.splitlines() if "CONSOLE" in row]
    assert console == []


def test_what_was_left_out_of_the_text_is_in_the_page():
    page = render_report(full_diff())
    for told in ("Left out or changed in the text", "rows without text left out", "chat.jsonl, line 4", "1,207"):
        assert told in page
    assert "Left out or changed in the prompts" in page and "ask.csv, line 2" in page
    assert "Left out or changed" not in render_report(bare_diff())


def test_findings_stand_first_with_both_answers_as_text():
    html = render_report(dataclasses.replace(full_diff(), elicited=[condition()], findings=[finding()]))
    assert html.index('id="findings"') < html.index('id="output"') and 'href="#findings"' in html
    for told in (
        "says Brindlow, brass, &lt;i&gt;oak&lt;/i&gt;",
        "warranty",
        '<a href="#change-1"><bdi>crosscode/589</bdi></a>',
        "Which {} should I buy?",
        "Which lamp should I buy?",
        "It depends.",
        "Take the one from Brindlow",
        "5.8",
        "without crosscode/589 41 % of it (random directions at most 5 %) is gone",
    ):
        assert told in html, told
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html and "\x1b" not in html
    assert 'id="findings"' not in render_report(full_diff())
