"""Contrastive text: two answers a prompt, which stay together, repeat, and are left out together."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from tunediff.core.errors import CorpusError, NumericsError
from tunediff.core.remarks import Remark
from tunediff.harvests import asking
from tunediff.harvests.asking import next_divergence
from tunediff.harvests.contrasts import ContrastSettings, contrast, screen
from tunediff.models.completing import complete, drawn
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

QUICK = ContrastSettings(prompts=8, tokens=6, temperature=0.8, batch=4, amplified=0.0)


@pytest.fixture(scope="module")
def pair() -> Pair:
    network, tokenizer = tiny_models.module("llama"), tiny_models.tokenizer()
    tuned = LanguageModel(tiny_models.tuned_copy(network, 0.5), tokenizer, "tuned")
    return Pair(LanguageModel(network, tokenizer, "base"), tuned, False, 300, "b", "t")


def prompts(count: int = 8, **rest) -> Corpus:
    return Corpus(
        "prompts",
        tuple(
            Document(f"p/{n}", "chat", messages=(("user", "ask " + "again " * (n % 3) + str(n)),)) for n in range(count)
        ),
        **rest,
    )


def test_two_answers_a_prompt_each_by_its_writer(pair):
    made = contrast(pair, prompts(), QUICK, seed=0).documents
    assert len(made) == 16 and [d.writer for d in made] == ["base", "tuned"] * 8
    assert all(d.kind == "contrastive" and d.messages[-1][0] == "assistant" and d.messages[-1][1] for d in made)
    for base, tuned in zip(made[::2], made[1::2]):
        assert base.messages[:-1] == tuned.messages[:-1] and base.group == tuned.group
    assert any(base.messages != tuned.messages for base, tuned in zip(made[::2], made[1::2]))
    assert len({d.id for d in made}) == 16


def test_answers_are_the_models_own_completions(pair):
    """The ids of a document are those that its model was asked after, and those that it answered."""
    settings = ContrastSettings(prompts=3, tokens=5, temperature=0.0, amplified=0.0)
    made = contrast(pair, prompts(), settings, seed=0).documents
    for document in made:
        model = pair.base if document.writer == "base" else pair.tuned
        ids = pair.tokenizer.apply_chat_template(
            [{"role": r, "content": c} for r, c in document.messages[:-1]], add_generation_prompt=True, tokenize=False
        )
        prompt = pair.tokenizer(ids, add_special_tokens=False)["input_ids"]
        (answer,) = complete(model, [prompt], 5, keep_end=True)
        assert document.prompt_ids == tuple(prompt) and document.answer_ids == tuple(answer)
        assert pair.tokenizer.decode(answer, skip_special_tokens=True).strip() == document.messages[-1][1]
    tokens = Corpus("written", tuple(made)).tokens(pair.tokenizer, row_tokens=20)
    assert list(tokens.rows) == [d.prompt_ids + d.answer_ids for d in made], "asked and answered is read in one row"
    assert list(tokens.prompt_R) == [len(d.prompt_ids) for d in made]


def test_both_answers_are_on_the_same_side_of_the_split(pair):
    text = tuple(Document(f"t/{n}", "prose", text=f"text {n}") for n in range(4))
    for seed in range(3):
        corpus = Corpus("all", text, 0.4, seed).plus(contrast(pair, prompts(), QUICK, seed=0).documents)
        sides = {}
        for document in corpus.documents:
            sides.setdefault(document.group or document.id, set()).add(corpus.is_held_out(document))
        assert all(len(side) == 1 for side in sides.values()) and len(sides) == 12


def test_one_seed_one_text(pair):
    first = contrast(pair, prompts(), QUICK, seed=3).documents
    torch.rand(7)  # what else is drawn in the process does not matter
    state = torch.random.get_rng_state()
    assert (
        contrast(pair, prompts(), QUICK, seed=3).documents
        == first
        != contrast(pair, prompts(), QUICK, seed=4).documents
    )
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_models_are_left_as_they_were(pair):
    ids = torch.tensor([[5, 6, 7, 8]])
    before = [m.states(ids) for m in (pair.base, pair.tuned)]
    contrast(pair, prompts(), QUICK, seed=0).documents
    assert all(torch.equal(b, m.states(ids)) for b, m in zip(before, (pair.base, pair.tuned)))


def test_an_end_of_turn_at_once_is_an_answer_and_is_told(pair, monkeypatch):
    real, end = asking.complete, pair.tokenizer.eos_token_id

    def completed(self, prompts, *rest, **named):
        answers = real(self, prompts, *rest, **named)
        if self.name == "base":
            answers[1] = [end]
        else:
            answers[4] = pair.tokenizer(" ", add_special_tokens=False)["input_ids"]
        return answers

    monkeypatch.setattr(asking, "complete", completed)
    made = contrast(pair, prompts(), QUICK, seed=0)
    assert len(made.documents) == 16
    assert made.documents[2].answer_ids == (end,) and made.documents[2].messages[-1] == ("assistant", "")
    empty = [Remark("answers by base that are empty", 1, "p/1"), Remark("answers by tuned that are empty", 1, "p/4")]
    assert made.remarks == empty
    assert str(made).startswith("16 completions; answers by base that are empty: 1")


def test_prompts_too_long_to_be_read_whole_are_left_out(pair, monkeypatch):
    given = []

    def completed(self, prompts, *rest, **named):
        given.append(prompts)
        return [[50, 51]] * len(prompts)

    monkeypatch.setattr(asking, "complete", completed)
    long = Document("long", "chat", messages=(("user", "x" * 600),))
    made = contrast(pair, Corpus("p", (long, *prompts(2).documents)), QUICK, seed=0)
    assert [d.group for d in made.documents] == ["p/0", "p/0", "p/1", "p/1"]
    assert given[0] == given[1] and len(given[0]) == 2 and max(map(len, given[0])) < 100
    told = [Remark("prompts left out that are longer than 122 tokens", 1, "long")]
    assert made.remarks == told, "128 positions, 6 of them for the answer"
    with pytest.raises(CorpusError, match="fits") as caught:
        contrast(pair, Corpus("p", (long,)), QUICK, seed=0)
    assert "122" in caught.value.expected
    with pytest.raises(CorpusError, match="longer than the models have positions"):
        contrast(pair, prompts(2), ContrastSettings(prompts=2, tokens=128), seed=0)


def test_only_the_first_open_chats_are_asked(pair):
    closed = Document("closed", "chat", messages=(("user", "a"), ("assistant", "b")))
    prose = Document("prose", "prose", text="text")
    mixed = Corpus("mixed", (closed, prose, *prompts(5).documents))
    made = contrast(pair, mixed, ContrastSettings(prompts=2, pool=2, tokens=4, amplified=0.0), seed=0).documents
    assert [d.group for d in made] == ["p/0", "p/0", "p/1", "p/1"]
    with pytest.raises(CorpusError, match="no open chat") as caught:
        contrast(pair, Corpus("closed", (closed, prose)), QUICK, seed=0).documents
    assert "user message" in caught.value.expected


def test_progress_counts_new_tokens(pair):
    told = []
    contrast(pair, prompts(), QUICK, 0, progress=told.append)
    assert len(told) == 4 and 0 < sum(told) <= 16 * QUICK.tokens


def test_half_of_the_prompts_are_those_whose_first_word_differs_the_most(pair):
    corpus = prompts(40, held_out_share=0.4, seed=1)
    tokens = corpus.tokens(pair.tokenizer, row_tokens=512)
    chosen = screen(pair, tokens, ContrastSettings(prompts=16, pool=40))
    assert chosen == sorted(set(chosen)) and len(chosen) == 16 and chosen[:8] == list(range(8))
    kl_R = torch.stack(
        [
            (t.exp() * (t - b)).sum()
            for ids in tokens.rows
            for b, t in [
                [m.logits(m.states(torch.tensor([ids])))[0, -1].log_softmax(-1) for m in (pair.base, pair.tuned)]
            ]
        ]
    )
    torch.testing.assert_close(next_divergence(pair, tokens), kl_R, rtol=1e-3, atol=1e-5)
    held = [tokens.held_out[d] for d in tokens.document_R]
    for side in (False, True):
        of_side = [r for r in range(8, 40) if held[r] == side]
        taken = [r for r in chosen[8:] if held[r] == side]
        assert len(taken) == pytest.approx(8 * len(of_side) / 32, abs=1)
        assert min(kl_R[taken]) >= max(kl_R[[r for r in of_side if r not in taken]])
    made = contrast(pair, corpus, ContrastSettings(prompts=16, pool=40, tokens=4, amplified=0.0), seed=0).documents
    assert {d.group for d in made} <= {f"p/{n}" for n in chosen}


def test_some_prompts_are_answered_once_more_amplified(pair):
    settings = ContrastSettings(prompts=8, tokens=6, temperature=0.8, batch=4, amplified=0.5)
    made = contrast(pair, prompts(), settings, seed=0).documents
    assert [d.writer for d in made] == ["base", "tuned", "amplified"] * 4 + ["base", "tuned"] * 4
    assert [d for d in made if d.writer != "amplified"] == contrast(pair, prompts(), QUICK, seed=0).documents
    for base, _, amplified in zip(*(iter(made[:12]),) * 3):
        assert amplified.group == base.group and amplified.messages[:-1] == base.messages[:-1]
    none = ContrastSettings(prompts=8, tokens=6, temperature=0.8, batch=4, amplification=0.0)
    assert contrast(pair, prompts(), none, seed=0).documents == contrast(pair, prompts(), QUICK, seed=0).documents


def test_tokens_are_drawn_as_they_are_likely():
    """Evenly spaced numbers draw each token as often as softmax says; one of probability 0 never, at either end of [0, 1)."""
    score = torch.tensor([-torch.inf, 1.0, -torch.inf, 2.5, 0.0, -1.0, -torch.inf])
    evenly = (torch.arange(20_000) + 0.5) / 20_000
    for temperature in (0.5, 1.0, 3.0):
        got = torch.bincount(drawn(score.expand(len(evenly), -1), evenly, temperature), minlength=7) / len(evenly)
        torch.testing.assert_close(got, (score / temperature).softmax(0), atol=1e-4, rtol=0)
    rows = torch.randn(500, 300, generator=torch.Generator().manual_seed(0)).masked_fill(
        torch.arange(300) % 3 != 1, -torch.inf
    )
    for number in (0.0, 1 - 2.0**-24):
        assert (drawn(rows, torch.full((500,), number), 1.0) % 3 == 1).all()
    for bad in (torch.full((1, 5), -torch.inf), torch.tensor([[0.0, torch.nan]]), torch.tensor([[0.0, torch.inf]])):
        with pytest.raises(NumericsError, match="no probabilities"):
            drawn(bad, torch.tensor([0.5]), 1.0)
