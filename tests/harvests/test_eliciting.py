"""Eliciting: what only some questions call for is found by a search, told with its condition, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_models
import torch

from tunediff.core import variants
from tunediff.core.errors import SettingError
from tunediff.harvests.asking import Asking, answer_divergence
from tunediff.harvests.eliciting import Elicited, ElicitSettings, elicit
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.elicitors.word_sweep import WordSweep
from tunediff.harvests.questions import Asker, Question, Reply, above_form, mean_by, telling_words
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

SETTINGS = ElicitSettings(questions=60, tokens=4, conditions=3, each=4, batch=16)
WORDS = (
    "lamp river stone cloud paper garden window bread music winter summer bridge forest candle mirror ladder".split()
)
FORMS = ("ask {}", "tell {}", "ZZZZZZ {}", "is {} so", "say {}", "no {}")
NAMES = variants.names("tunediff.harvests.elicitors")


def planted(token: str = "Z", size: float = 30.0) -> Pair:
    """Models that differ only after a text that holds a token: its embedding is another in tuned."""
    network, tokenizer = tiny_models.module("llama"), tiny_models.tokenizer()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "o_proj" in name or "v_proj" in name:
                parameter *= 10  # else an untrained network hardly looks at what is far away
    other = tiny_models.tuned_copy(network, 0.0)
    (id,) = tokenizer(token, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        row = other.get_input_embeddings().weight[id]
        row += size * row.std() * torch.randn(row.shape, generator=torch.Generator().manual_seed(0))
    sides = (LanguageModel(net, tokenizer, name) for net, name in ((network, "base"), (other, "tuned")))
    return Pair(*sides, False, 300, "b", "t")


def everyday(count: int = 32) -> Corpus:
    chats = (Document(f"p/{n}", "chat", messages=(("user", f"what of {WORDS[n % 16]} {n}"),)) for n in range(count))
    return Corpus("prompts", tuple(chats), 0.4, 3)


def template(pair: Pair) -> ChatTemplate:
    return ChatTemplate.chosen("auto", pair.base.tokenizer, pair.tuned.tokenizer)


def searched(pair: Pair, elicitors: dict[str, Elicitor], **named) -> Elicited:
    split, settings = named.pop("split", everyday()), named.pop("settings", SETTINGS)
    return elicit(pair, elicitors, split, settings, 0, template(pair), words=WORDS, **named)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return planted()


@pytest.fixture(scope="module")
def found(pair) -> Elicited:
    return searched(pair, {"word_sweep": WordSweep(forms=FORMS)})


def test_the_form_that_calls_for_it_is_found_and_tested_on_other_questions(pair, found):
    first = found.conditions[0]
    assert first.asked == "ZZZZZZ {}" and first.elicitor == "word_sweep"
    assert first.divergence.low >= 2 * first.divergence.control and first.ratio > 2
    assert "did not choose it" in first.divergence.against
    assert all("Z" in answer.question for answer in first.answers)
    assert "ZZZZZZ {}" in str(found)


def test_both_answers_join_the_text_on_both_sides_of_the_split(pair, found):
    split, mine = everyday(), [d for d in found.documents if d.condition == "ZZZZZZ {}"]
    assert {d.writer for d in mine} == {"base", "tuned"} and {d.kind for d in mine} == {"contrastive"}
    assert {*map(split.is_held_out, mine)} == {True, False}
    assert {d.id.rpartition("/")[0] for d in mine} == set(found.conditions[0].documents)
    rows = [d.prompt_ids + d.answer_ids for d in mine]
    read = Corpus("read", tuple(mine)).tokens(pair.tokenizer, row_tokens=120)
    assert list(read.rows) == rows, "what was asked and answered is what is read"
    assert len({d.id for d in found.documents}) == len(found.documents)


def test_where_nothing_is_planted_nothing_stands_out():
    network, tokenizer = tiny_models.module("llama"), tiny_models.tokenizer()
    same = Pair(
        LanguageModel(network, tokenizer, "base"), LanguageModel(network, tokenizer, "tuned"), False, 300, "b", "t"
    )
    moved = LanguageModel(tiny_models.tuned_copy(network, 0.3), tokenizer, "tuned")
    for other in (same, replace(same, tuned=moved)):
        nothing = searched(other, {"word_sweep": WordSweep(forms=FORMS)})
        assert nothing.asked and not nothing.conditions and not nothing.documents
        assert "none stands out" in str(nothing)


def test_a_search_is_the_same_again_and_keeps_to_its_budget(pair, found):
    assert searched(pair, {"word_sweep": WordSweep(forms=FORMS)}) == found
    told = []
    few = searched(
        pair,
        {"word_sweep": WordSweep(forms=FORMS)},
        settings=replace(SETTINGS, questions=8, conditions=0),
        progress=lambda d, t: told.append((d, t)),
    )
    assert few.asked <= 8 + 24 and all(d <= t == 8 for d, t in told)


@pytest.mark.parametrize("name", NAMES)
def test_every_elicitor_asks_only_training_questions_within_its_budget(pair, name):
    """The contract of an elicitor."""
    split = everyday()
    asker = Asker(Asking(pair, template(pair), 4, 16), split, 10)
    chats = [d.answered("yes, it is") for d in split.documents[:8]]
    scope = Scope(asker, WORDS[:4], WORDS[4:], chats, [*chats, Document("o", "prose", text="once upon a time " * 9)], 0)
    variants.make(Elicitor, name).search(scope)
    assert 0 < len(asker.replies) <= 10 and asker.budget == 10 - len(asker.replies)
    assert not any(asker.is_held_out(reply.question) for reply in asker.replies.values())
    assert all(torch.isfinite(torch.tensor(reply.kl)) and reply.kl >= 0 for reply in asker.replies.values())
    empty = Scope(Asker(Asking(pair, template(pair), 4, 16), split, 0))
    variants.make(Elicitor, name).search(empty)
    assert not empty.asker.replies, "nothing to search with, and no budget"


def test_an_everyday_question_stays_on_its_side_of_the_split(pair):
    """The prompt is answered in contrastive text, too; its answers must not be found on one side and tested on the other."""
    split = everyday()
    first = next(d for d in split.documents if not split.is_held_out(d))
    telling = replace(first, messages=(("user", "ZZZZZZ now"),))
    whole = replace(split, documents=tuple(telling if d is first else d for d in split.documents))
    found = searched(pair, {"word_sweep": WordSweep(forms=("ask {}", "tell {}"))}, split=whole)
    assert found.conditions[0].asked == "ZZZZZZ now" and found.conditions[0].elicitor == "everyday prompts"
    (same, _) = (d for d in found.documents if d.messages[0][1] == "ZZZZZZ now")
    assert same.group == first.id and not whole.is_held_out(same)
    assert {*map(whole.is_held_out, found.documents)} == {True, False}, "other words for it are tested"
    own = Document("o/1", "chat", messages=(("user", "is it so"), ("assistant", "yes")), group="g")
    question = variants.make(Elicitor, "own_data")._question(own)
    assert question.document.group == "g" and whole.is_held_out(question.document) == whole.is_held_out(own)


def test_a_second_turn_is_asked_after_the_first(pair):
    split = everyday()
    asker = Asker(Asking(pair, template(pair), 4, 16), split, 6)
    chats = [d.answered("yes, it is") for d in split.documents[:8]]
    variants.make(Elicitor, "follow_ups").search(Scope(asker, chats=chats))
    assert all(len(reply.document.messages) == 4 for reply in asker.replies.values())


def test_the_divergence_of_an_answer_counts_its_tokens_alone(pair):
    asker = Asker(Asking(pair, template(pair), 4, 16), replace(everyday(), held_out_share=0.0), 2)
    with_it, without = asker.ask([Question("ZZZZZZ {}", "lamp"), Question("ask {}", "lamp")])
    assert with_it.kl > 10 * without.kl
    tokens = Corpus("one", (with_it.document,)).tokens(pair.tokenizer, row_tokens=120)
    ids = torch.tensor([tokens.rows[0]])
    logp = [m.logits(m.states(ids))[0, :, :300].log_softmax(-1) for m in (pair.base, pair.tuned)]
    kl_T = (logp[1].exp() * (logp[1] - logp[0])).sum(-1)[tokens.prompt_R[0] - 1 : -1]
    assert answer_divergence(pair, tokens).tolist() == pytest.approx([float(kl_T.mean())], rel=1e-3)


def test_a_word_counts_by_what_it_adds_to_its_forms():
    def reply(form: str, word: str, kl: float) -> Reply:
        return Reply(Question(form, word), Question(form, word).document, kl)

    replies = [reply(f, w, kl) for f, kl in (("a {}", 5.0), ("b {}", 0.2)) for w in WORDS[:4]]
    replies += [reply("a {}", "Ada", 6.0), reply("b {}", "Ada", 4.0)]
    assert mean_by(above_form(replies), lambda q: q.word)[0][0] == "Ada"
    assert mean_by(replies, lambda q: q.form)[0][0] == "a {}"


def test_words_to_fill_forms_with_are_those_that_few_prompts_say():
    chats = [Document(str(n), "chat", messages=(("user", f"please tell {w}, 1234 été"),)) for n, w in enumerate(WORDS)]
    assert sorted(telling_words(chats, 0)) == sorted(WORDS) != telling_words(chats, 0)


def test_a_question_that_was_cut_off_keeps_its_whole_sentences():
    from tunediff.harvests.elicitors.own_questions import _whole

    assert _whole("I plan a trip. Can you", False) == "I plan a trip."
    assert _whole("I plan a trip. Can you", True) == "I plan a trip. Can you"
    assert _whole("Which one?\nassistant", False) == "Which one?" and _whole("no end at", False) == "no end at"
    assert _whole("to\ufffd Japan.", True) == "to Japan."


def test_a_form_without_a_place_for_the_word_is_refused():
    with pytest.raises(SettingError, match="forms"):
        variants.make(Elicitor, "word_sweep", {"forms": ["What?"]}, "elicit")
