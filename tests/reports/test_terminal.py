"""The terminal's summary fits, tells the finding, and sends no control characters."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from support_diffs import DIFFS, bare_diff, condition, empty_diff, finding, full_diff

from tunediff.records.diff import Diff
from tunediff.records.finding import Finding
from tunediff.reports.sentences import tally, verdict
from tunediff.reports.terminal import summary_table


def lines_of(diff: Diff, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(summary_table(diff))
    return console.file.getvalue().splitlines()


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


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("name", DIFFS)
def test_summary_fits_a_terminal(name, width):
    diff = DIFFS[name]()
    many = [dataclasses.replace(c, rank=i) for i, c in enumerate(diff.changes * 30, start=1)]
    crowded = dataclasses.replace(
        diff,
        changes=many,
        output=diff.output * 9,
        bills=diff.bills * 9,
        not_found=diff.not_found * 9,
        stages=diff.stages * 9,
        elicited=[condition()] * 9,
        findings=[finding()] * 9,
    )
    for d in (diff, crowded):
        told = lines_of(d, width)
        assert len(told) <= 49 and all(cell_len(row.rstrip()) <= width for row in told)
        assert not re.search("[\x00-\x1f\x7f\u202e]", "".join(told))
    assert verdict(diff) in lines_of(diff, width)[0]


def test_summary_tells_the_story():
    text = "\n".join(lines_of(full_diff(), 140))
    for told in (
        "tuned is a light fine-tune of base: weights are 0.61 % of base's norm away, 37 % of numbers are equal",
        "rope_parameters.rope_theta 10000.0 in base, 500000.0 in tuned",
        "was trained on lab/other-7b",
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
        "Text  rows without text left out: 31; rejected answers left out: 1,207; answers to prompts left out: 64",
    ):
        assert told in text, told


def test_findings_are_told_first_with_an_answer():
    diff = dataclasses.replace(full_diff(), elicited=[condition()], findings=[finding()])
    told = lines_of(diff, 140)
    at = told.index("Findings")
    assert told[at + 1].startswith(
        " 1  says Brindlow, brass, <i>oak</i>, sturdy␛[31m, leather  asked 'Which {} should I buy?'"
    )
    assert "Take the one from Brindlow" in told[at + 2]
    assert (
        "5.80 nat a token apart there, 0.130 on everyday questions; 1 confirmed change: crosscode/589" in told[at + 3]
    )
    assert at < told.index("Output shift") and "Findings" not in "\n".join(lines_of(full_diff(), 140))


def test_a_finding_without_questions_or_changes_says_so():
    alone = [Finding(["moths"], False, ["crosscode/7"], []), Finding(["drop"], True, ["logit_gains/lowered-0"], [])]
    lone = Finding([], False, [], finding().when)
    told = "\n".join(lines_of(dataclasses.replace(full_diff(), elicited=[condition()], findings=[*alone, lone]), 140))
    assert "says moths\n" in told.replace(" \n", "\n") and "says less: drop" in told
    assert "(no word tells it)" in told and "no confirmed change carries it" in told
