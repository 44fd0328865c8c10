"""README and docs read once by a stranger: no sentence over 30 words, no word that only this house uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"settings"}
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in GENERATED),
]
LONGEST = 30
"""Words in the longest sentence that a page may have."""
PRIVATE = {
    r"(?<!-)\btunes?": "fine-tuned model, fine-tune",
    r"\bset apart": "excluded",
    r"\btold": "reported, stated",
    r"\bbeginnings?": "prefix, start",
}
"""Words of this house, and the field's words for them."""


def paragraphs(text: str) -> list[str]:
    """Paragraphs and list items of a Markdown page as plain text; tables, headings and code blocks are left out."""
    text = re.sub(r"^```.*?^```", "\n", text, flags=re.M | re.S)
    text = re.sub(r"^(#|\||!\[| {4}|---).*$", "\n", text, flags=re.M)
    text = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", text, flags=re.M)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part.replace("**", "").replace("*", "") for part in parts if part]


def sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph; `et al.` and an initial's dot end none."""
    return re.split(r"(?<=[.!?])(?<!\bal\.)(?<!\b[A-Z]\.)[\"')]*\s+", paragraph)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    text = page.read_text(encoding="utf-8")
    long = [s for p in paragraphs(text) for s in sentences(p) if len(s.split()) > LONGEST]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words_are_the_fields(page):
    prose = re.sub(r'"[^"]*"', "", "\n".join(paragraphs(page.read_text(encoding="utf-8"))))
    found = {w: better for w, better in PRIVATE.items() if re.search(rf"{w}\b", prose, flags=re.I)}
    assert found == {}


def test_a_long_sentence_and_a_private_word_are_seen():
    text = "# T\n\n" + "word " * 31 + "end.\nOne more, by Kassem et al. 2026. Two.\n\n| " + "cell " * 40 + "|\n"
    (paragraph,) = paragraphs(text)
    assert [len(s.split()) for s in sentences(paragraph)] == [32, 7, 1]
