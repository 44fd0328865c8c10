"""Corpora of a plan: text and prompts are split alike, and very few of either still have two sides or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_texts import texts, write

from tunediff.core.errors import CorpusError
from tunediff.runs import corpora
from tunediff.runs.plan import CorpusSettings


def settings(folder: Path, documents: int, prompts: int = 0, **changed) -> CorpusSettings:
    paths = (str(write(folder / f"{documents}.jsonl", *texts(documents))),) if documents else ()
    asked = folder / f"{prompts}.txt"
    asked.write_text("\n".join(f"What is {n}?" for n in range(prompts)))
    return CorpusSettings(paths=paths, prompts=(str(asked),) if prompts else (), **changed)


@pytest.mark.parametrize("documents", [2, 3, 5])
@pytest.mark.parametrize("prompts", [2, 3])
def test_a_few_documents_are_on_both_sides_and_the_split_is_told(tmp_path, documents, prompts):
    for split in range(10):
        text, asked = corpora.read(settings(tmp_path, documents, prompts, split=split), prompts)
        for corpus in (text, asked):
            assert len({corpus.is_held_out(document) for document in corpus.documents}) == 2
        assert text.seed == asked.seed
        told = [remark.first for remark in text.remarks if "another split" in remark.what]
        assert told == ([f"corpus.split={text.seed}"] if text.seed != split else [])


def test_one_document_or_one_prompt_will_do_with_more_of_the_other(tmp_path):
    text, asked = corpora.read(settings(tmp_path, 1, 4), 4)
    assert (len(text.documents), len(asked.documents)) == (1, 4)
    assert len({asked.is_held_out(document) for document in asked.documents}) == 2
    text, asked = corpora.read(settings(tmp_path, 4, 1), 1)
    assert len({text.is_held_out(document) for document in text.documents}) == 2


@pytest.mark.parametrize(("prompts", "asked"), [(1, 8), (4, 1), (0, 0)])
def test_one_document_and_one_prompt_are_too_few(tmp_path, prompts, asked):
    with pytest.raises(CorpusError, match="two documents or prompts"):
        corpora.read(settings(tmp_path, 1, prompts), asked)


def test_the_shipped_texts_keep_the_plans_split(tmp_path):
    text, asked = corpora.read(CorpusSettings(), 128)
    assert (text.seed, asked.seed, text.remarks, asked.remarks) == (166, 166, (), ())


def test_the_settings_reach_the_reader(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"body": f"Body {n}.", "title": f"Title {n}"} for n in range(9)), 7)
    chosen = CorpusSettings(paths=(str(path),), text_field="title", kind="titles", broken=0.2, max_documents=5)
    text, _ = corpora.read(chosen, 4)
    assert {document.kind for document in text.documents} == {"titles"} and len(text.documents) <= 5
