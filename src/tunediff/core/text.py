"""Text for people: hostile strings made visible, and numbers written as text."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import TypeGuard

NOT_MEASURED = "not measured"
"""What stands in place of a number that is missing or NaN."""
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e01ef]"
)
"""One character that hides, reorders or breaks text: a control, bidirectional mark, zero width, invisible filler, lone
surrogate, tag or supplementary variation selector. Tab and newline are left to the caller."""
MARK = "[\u0300-\u036f\u0483-\u0489\u0e31-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
"""One mark that is drawn above or below the letter before it."""
STACK = re.compile(f"({MARK}{{4}})({MARK}+)")
"""More than four marks stacked on one letter: the first four, and the rest."""
SPACES = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\xa0": "⍽"})
"""A sign for each space, line break and tab."""


def visible(text: str) -> str:
    """`text` with characters that hide or reorder text written out, e.g. ``␀``, ``␛`` or ``‹U+202E›``.

    A letter keeps four marks stacked on it; how many more there were is written out.
    """

    def name(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"‹U+{code:04X}›"

    return STACK.sub(lambda stack: f"{stack[1]}‹+{len(stack[2])}›", UNSEEN.sub(name, text))


def escaped(json: str) -> str:
    """JSON whose strings hold the same characters, with what `visible` would write out as ``\\u`` escapes."""

    def code(match: re.Match[str]) -> str:
        units = match[0].encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))

    return STACK.sub(lambda stack: stack[1] + re.sub(".", code, stack[2]), UNSEEN.sub(code, json))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of `known` that is spelled most like `name`; empty if none is alike to `cutoff` (0..1)."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def one_line(text: str) -> str:
    """`visible`, with line breaks and tabs shown as signs."""
    return visible(text.replace("\n", "↵").replace("\t", "⇥"))


def token_text(token: str) -> str:
    """A token for a list: `one_line`, with its outer spaces shown as signs too; ``∅`` if the token is empty."""
    core = token.strip(" \n\t\xa0")
    if not core:
        return visible(token.translate(SPACES)) or "∅"
    start = token.index(core)
    head, tail = token[:start].translate(SPACES), token[start + len(core) :].translate(SPACES)
    return one_line(head + core + tail)


def finite(value: float | None) -> TypeGuard[float]:
    """Whether `value` is a number: not None, NaN or infinite."""
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """A number in three significant digits with grouped thousands, ``1.20×10⁻⁵``, or ``not measured``."""
    if value is None or value != value:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        mantissa, power = f"{value:.2e}".split("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}×10{raised}".replace("-", "−")
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """``[low, high]``, or ``not measured`` if both ends are missing or NaN."""
    if all(v is None or math.isnan(v) for v in (low, high)):
        return NOT_MEASURED
    return f"[{number(low)}, {number(high)}]"


def percent(value: float | None) -> str:
    """A share as a percentage, e.g. ``5 %``."""
    return f"{100 * value:.3g} %" if finite(value) else NOT_MEASURED


def seconds(value: float | None) -> str:
    """A duration, e.g. ``3.2 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    if not finite(value):
        return NOT_MEASURED
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def quantity(value: float | None, unit: str) -> str:
    """A number and its unit, cut to 24 characters; no unit where nothing was measured."""
    text = number(value)
    return f"{text} {unit[:24]}" if unit and text != NOT_MEASURED else text


NAME_LENGTH = 80
"""Most characters of a file-safe name."""


def slug(text: str) -> str:
    """A file-safe name of at most `NAME_LENGTH` characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:NAME_LENGTH].rstrip("-.") or "run"
