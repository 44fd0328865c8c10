"""Tokens: every document is encoded whole, prompts end where answers begin, batches hold every row once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_texts import CHATML, make_tokenizer, texts, write

from tunediff.core.errors import CorpusError, SettingError
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens


def test_rows_give_back_every_document_whole(tmp_path: Path, tokenizer) -> None:
    corpus = Corpus.from_files(write(tmp_path / "a.jsonl", {"text": "Grüße, 世界! " * 30}, *texts(5)))
    tokens = corpus.tokens(tokenizer, row_tokens=50)
    assert max(map(len, tokens.rows)) <= 50 and min(map(len, tokens.rows)) > 10
    for number, document in enumerate(corpus.documents):
        ids: list[int] = []
        for row, of, start in zip(tokens.rows, tokens.document_R, tokens.start_R):
            if of == number:
                assert start == len(ids)
                ids += row
        assert tokenizer.decode(ids) == document.text
    assert tokens.prompt_R == (0,) * len(tokens)
    assert tokens.counts == {"prose": tokens.count}
    assert tokens.fingerprint == corpus.tokens(tokenizer, row_tokens=50).fingerprint
    assert (
        tokens.fingerprint != corpus.tokens(tokenizer, row_tokens=20).fingerprint != tokens.select("train").fingerprint
    )


def chats() -> Corpus:
    turns = (("user", "Hi there"), ("assistant", "One."), ("user", "More"), ("assistant", "Two words, and then some."))
    return Corpus(
        "chats", (Document("a", "chat", messages=turns), Document("b", "chat", messages=turns[:1])), held_out_share=0
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, "plain"])
@pytest.mark.parametrize("row_tokens", [20, 1000])
def test_the_boundary_of_a_chat_is_where_the_last_answer_starts(
    bos: bool, template: str | None, row_tokens: int
) -> None:
    tokenizer = make_tokenizer(bos)
    tokens = chats().tokens(tokenizer, row_tokens=row_tokens, template=template and ChatTemplate(template))
    answer, prompt = [], []
    for row, number, before in zip(tokens.rows, tokens.document_R, tokens.prompt_R):
        assert (row[0] == 1) == bos and 1 not in row[1:]
        if number == 0:
            prompt += row[bos:before]
            answer += row[before:]
        else:
            assert before == len(row)
    ends = {None: "<|im_start|>assistant\n", "plain": "\nAssistant:"}[template]
    assert tokenizer.decode(prompt).endswith("More" + ("<|im_end|>\n" if template is None else "") + ends)
    assert (
        tokenizer.decode(answer)
        == {None: "Two words, and then some.<|im_end|>\n", "plain": " Two words, and then some.\n"}[template]
    )


def test_a_template_that_starts_with_bos_gives_one(tokenizer) -> None:
    tokens = chats().tokens(make_tokenizer(True, "<bos>" + CHATML))
    assert all(row.count(1) == 1 and row[0] == 1 for row in tokens.rows)


def test_chats_without_a_template_are_plain_lines_and_refused_ones_are_told(tokenizer) -> None:
    bare = make_tokenizer(template=None)
    assert bare.decode(chats().tokens(bare).rows[1]) == "User: Hi there\nAssistant:"
    with pytest.raises(CorpusError, match="no tokens") as caught:
        chats().tokens(make_tokenizer(template="{{ raise_exception('roles must alternate') }}"))
    assert "chats left out, as the template refuses them (roles must alternate): 2" in caught.value.got
    assert Corpus("p", (Document("p", "prose", "Plain text"),)).tokens(make_tokenizer(template=None)).count == 10
    with pytest.raises(SettingError, match="row_tokens"):
        chats().tokens(tokenizer, row_tokens=0)
    with pytest.raises(SettingError, match="limit_tokens"):
        chats().tokens(tokenizer, limit_tokens=0)


def test_a_limit_keeps_every_kind_and_both_splits_in_proportion(tokenizer) -> None:
    corpus = Corpus.default()
    whole, part = corpus.tokens(tokenizer), corpus.tokens(tokenizer, limit_tokens=60_000)
    assert 59_000 < part.count <= 60_000
    for split in ("train", "held_out"):
        for kind, count in part.select(split).counts.items():
            share, expected = count / part.count, whole.select(split).counts[kind] / whole.count
            assert 0.5 * expected < share < 2 * expected
        assert part.select(split).counts.keys() == whole.select(split).counts.keys()
    assert part.fingerprint == corpus.tokens(tokenizer, limit_tokens=60_000).fingerprint
    more = corpus.tokens(tokenizer, limit_tokens=90_000)
    assert set(zip(part.document_R, part.start_R)) <= set(zip(more.document_R, more.start_R))
    book = Corpus("book", (Document("b", "prose", "word " * 1000),))
    assert 0 < book.tokens(tokenizer, row_tokens=100, limit_tokens=450).count <= 450
    assert book.tokens(tokenizer, row_tokens=100, limit_tokens=7).count == 7


def of_lengths(lengths: list[int]) -> Tokens:
    document = Document("a", "prose", "text")
    rows = tuple(tuple(range(1, length + 1)) for length in lengths)
    zeros = (0,) * len(rows)
    return Tokens(rows, zeros, zeros, zeros, (document,), (False,), pad_id=0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    budget=st.integers(1, 200),
    order=st.sampled_from(["length", "rows"]),
)
def test_batches_hold_every_row_exactly_once(lengths: list[int], budget: int, order: str) -> None:
    tokens = of_lengths(lengths)
    seen: list[int] = []
    for batch in tokens.batches(budget, order):
        assert batch.ids_BT.shape == batch.mask_BT.shape
        assert batch.ids_BT.numel() <= budget or len(batch.rows_B) == 1
        assert bool((batch.mask_BT.long().diff(dim=1) <= 0).all())  # padding on the right only
        assert bool((batch.ids_BT[~batch.mask_BT] == 0).all())
        for ids, mask, row in zip(batch.ids_BT, batch.mask_BT, batch.rows_B.tolist()):
            assert tuple(ids[mask].tolist()) == tokens.rows[row]
            seen.append(row)
    assert sorted(seen) == list(range(len(lengths)))
    assert order == "length" or seen == sorted(seen)


def test_batches_are_the_same_each_time_and_check_their_settings() -> None:
    tokens = of_lengths([3, 9, 9, 1, 4])
    first, second = list(tokens.batches(18)), list(tokens.batches(18))
    assert all(torch.equal(a.ids_BT, b.ids_BT) and torch.equal(a.rows_B, b.rows_B) for a, b in zip(first, second))
    assert first[0].rows_B.tolist() == [1, 2]
    assert first[0].mask_BT.dtype == torch.bool and first[0].ids_BT.dtype == torch.long
    with pytest.raises(SettingError):
        next(tokens.batches(0))
    with pytest.raises(SettingError):
        next(tokens.batches(8, "random"))
