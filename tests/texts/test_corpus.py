"""Corpora: a document stays on one side of the split; the texts that ship are balanced and named in NOTICE."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_texts import texts, write

from tunediff.core.errors import CorpusError, SettingError
from tunediff.texts.corpus import ASSETS, Corpus

ROOT = Path(__file__).resolve().parents[2]


def test_the_split_is_stable_when_documents_are_added(tmp_path: Path) -> None:
    small = Corpus.from_files(write(tmp_path / "a.jsonl", *texts(200)))
    sides = {document.id: small.is_held_out(document) for document in small.documents}
    large = Corpus.from_files([write(tmp_path / "a.jsonl", *texts(300)), write(tmp_path / "b.jsonl", *texts(50, 900))])
    assert all(
        large.is_held_out(document) == sides[document.id] for document in large.documents if document.id in sides
    )
    assert 0.15 < sum(sides.values()) / 200 < 0.35
    other = Corpus("other", small.documents, seed=1)
    assert any(other.is_held_out(document) != sides[document.id] for document in small.documents)
    assert small.fingerprint != large.fingerprint != other.fingerprint


def test_no_document_and_no_copy_of_one_is_on_both_sides(tmp_path: Path, tokenizer) -> None:
    corpus = Corpus.from_files(write(tmp_path / "a.jsonl", *texts(40), *texts(40)))
    tokens = corpus.tokens(tokenizer, row_tokens=16)
    train, held_out = tokens.select("train"), tokens.select("held_out")
    assert not set(train.document_R) & set(held_out.document_R)
    assert not {train.documents[n].text for n in train.document_R} & {
        held_out.documents[n].text for n in held_out.document_R
    }
    assert len(train) + len(held_out) == len(tokens) == len(tokens.select("all"))
    with pytest.raises(SettingError, match="no split 'test'"):
        tokens.select("test")
    with pytest.raises(CorpusError, match="held_out part of the corpus is empty"):
        Corpus("one", corpus.documents[:1], held_out_share=0.0).tokens(tokenizer).select("held_out")
    assert tokens.select(lambda document: document.id == "a#3").documents[3].id == "a#3"


def test_answers_stay_on_the_side_of_their_prompt() -> None:
    prompts = Corpus.prompts()
    both = [prompt.answered("Yes.", writer) for prompt in prompts.documents[:80] for writer in ("base", "tuned")]
    corpus = Corpus("answers", tuple(both))
    for prompt, one, other in zip(prompts.documents, both[::2], both[1::2]):
        assert corpus.is_held_out(one) == corpus.is_held_out(other) == prompts.is_held_out(prompt)
        assert (one.writer, one.kind, one.id != other.id) == ("base", "contrastive", True)
    with pytest.raises(CorpusError, match="not waiting"):
        both[0].answered("Again.")
    assert len(prompts.plus(both).documents) == 480 + 160


def test_the_default_corpus_loads_and_its_sources_are_in_the_notice(tokenizer) -> None:
    corpus = Corpus.default()
    assert corpus.kinds == {"prose": 200, "chat": 120, "code": 100}
    assert corpus.tokens(tokenizer).select("held_out").counts.keys() == {"prose", "chat", "code"}
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    records = [
        json.loads(line) for path in sorted(ASSETS.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
    ]
    assert len(records) == 900
    for source in {record["source"] for record in records}:
        assert re.search(rf"^{re.escape(source)}$", notice, re.MULTILINE), source
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 3 << 20


def test_the_prompts_are_balanced_and_open() -> None:
    prompts = Corpus.prompts()
    topics = [re.fullmatch(r"prompts/([a-z-]+)-\d\d", document.id)[1] for document in prompts.documents]
    assert len(set(topics)) == 40 and {topics.count(topic) for topic in topics} == {12}
    assert len(set(topics[:40])) == 40
    said = [document.messages[0][1] for document in prompts.documents]
    assert len(set(said)) == 480 and all(6 <= len(text.split()) <= 25 for text in said)
    assert all(document.is_open for document in prompts.documents)
    assert 0.15 < sum(map(prompts.is_held_out, prompts.documents)) / 480 < 0.35
