"""Text for people: nothing hidden passes, and numbers read the same everywhere."""

from __future__ import annotations

import math

import pytest

from tunediff.core.text import interval, number, percent, quantity, seconds, token_text, visible


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
    durations = ["0.0 s", "1 min 00 s", "1 h 02 min", "not measured"]
    assert [seconds(s) for s in (0.04, 59.99, 3725.0, math.nan)] == durations
    assert percent(0.05) == "5 %" and percent(math.nan) == "not measured"
    assert quantity(0.4, "nat") == "0.400 nat" and quantity(None, "nat") == "not measured"


@pytest.mark.parametrize(
    ("token", "text"), [(" a b\n", "␣a b↵"), ("\n\t", "↵⇥"), ("", "∅"), ("\x00", "␀"), ("a\nb", "a↵b")]
)
def test_tokens_show_their_spaces(token, text):
    assert token_text(token) == text


def test_only_what_hides_is_written_out():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("a\u202eb\x7f") == "a‹U+202E›b␡"
    assert visible("e" + "\u0301" * 6) == "e" + "\u0301" * 4 + "‹+2›"
