"""The report and the terminal summary: complete, self-contained, deterministic, and safe against what they quote."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support_diffs import HOSTILE, bare_diff, empty_diff, full_diff, hostile_diff

from tunediff.records.diff import Context, Diff, Measure
from tunediff.reports import charts
from tunediff.reports.charts import Line, bar, interval, number, token_text, visible
from tunediff.reports.page import (
    completions,
    corpus_contexts,
    flat,
    measure_rows,
    passage,
    percent,
    render_report,
    seconds,
    summary_table,
    tally,
    verdict,
    write_report,
)

DIFFS = {"full": full_diff, "empty": empty_diff, "bare": bare_diff, "hostile": hostile_diff}
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


def lines_of(diff: Diff, width: int) -> list[str]:
    import io

    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(summary_table(diff))
    return console.file.getvalue().splitlines()


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
        assert not charts.UNSEEN.search(pages[name])
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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (math.nan, "not measured"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (-0.0, "0"),
        (0.5, "0.500"),
        (-1.234, "−1.23"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (1.2e-5, "1.20×10⁻⁵"),
        (-3e9, "−3.00×10⁹"),
        (7, "7"),
        (-1234567, "−1,234,567"),
        (True, "yes"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_other_formats():
    assert interval(None, None) == interval(math.nan, None) == "not measured"
    assert interval(-1.0, 2.5) == "[−1.00, 2.50]" and interval(-math.inf, math.inf) == "[−∞, ∞]"
    assert [seconds(s) for s in (0.04, 59.99, 3725.0, math.nan)] == [
        "0.0 s",
        "1 min 00 s",
        "1 h 02 min",
        "not measured",
    ]
    assert percent(0.05) == "5 %" and percent(math.nan) == "not measured"
    assert (
        token_text(" a b\n") == "␣a b↵"
        and token_text("\n\t") == "↵⇥"
        and token_text("") == "∅"
        and token_text("\x00") == "␀"
    )
    assert visible("a\tb\nc") == "a\tb\nc"
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


def test_verdicts():
    assert (
        verdict(full_diff()) == "2 confirmed changes"
        and tally(full_diff()) == "7 ranked: 2 confirmed, 4 refuted, 1 undecided"
    )
    assert verdict(bare_diff()) == "1 confirmed change"
    assert (
        verdict(empty_diff()) == "No change found at a false-positive rate of 5 %"
        and tally(empty_diff()) == "No change was ranked"
    )


def test_same_record_same_bytes(tmp_path: Path):
    diff = full_diff()
    write_report(diff, tmp_path / "a.html")
    diff.save(tmp_path / "diff.json")
    write_report(Diff.load(tmp_path / "diff.json"), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("name", DIFFS)
def test_summary_fits_a_terminal(name, width):
    from rich.cells import cell_len

    diff = DIFFS[name]()
    many = [dataclasses.replace(c, rank=i) for i, c in enumerate(diff.changes * 30, start=1)]
    crowded = dataclasses.replace(
        diff,
        changes=many,
        output=diff.output * 9,
        bills=diff.bills * 9,
        not_found=diff.not_found * 9,
        stages=diff.stages * 9,
    )
    for d in (diff, crowded):
        told = lines_of(d, width)
        assert len(told) <= 40 and all(cell_len(row.rstrip()) <= width for row in told)
        assert not re.search("[\x00-\x1f\x7f\u202e]", "".join(told))
    assert verdict(diff) in lines_of(diff, width)[0]


def test_summary_tells_the_story():
    text = "\n".join(lines_of(full_diff(), 140))
    for told in (
        "crosscode/589",
        "confirmed",
        "13.4  vs 3.90",
        "[11.8, 14.8]",
        "vs 0.0310",
        "0.402",
        "␣dear",
        "both changes",
        "No rare trigger",
        "harvest 3 min 02 s",
        "0.0830 nat [0.0747, 0.0930]",
        "control 0.00400",
    ):
        assert told in text, told


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
