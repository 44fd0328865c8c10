"""Vocabularies that differ: which tokens are compared, who reads what, and what is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models
import torch
from planted_pairs import side

from tunediff.core.errors import PairError
from tunediff.models.completing import complete
from tunediff.models.pair import Pair
from tunediff.models.vocabulary import FLOOR, IN_PLACE, Vocabularies
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document


def network(rows: int = 300, seed: int = 0) -> torch.nn.Module:
    made = tiny_models.module("llama", seed)
    if rows != 300:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            made.resize_token_embeddings(rows, mean_resizing=False)
    return made


def tokenizer(*added: str, filled: int = 0):
    """The tiny tokenizer with more tokens; `filled` names the rows up to there first, so that new tokens come after."""
    made = tiny_models.tokenizer()
    made.add_tokens([f"<filler{n}>" for n in range(len(made), filled)])
    made.add_tokens(list(added))
    return made


def pair(base, tuned) -> Pair:
    return Pair.of(side(base[0], base[1], "base"), side(tuned[0], tuned[1], "tuned"))


def text_of(*texts: str) -> Corpus:
    documents = [Document(f"d/{n}", "plain", text=text) for n, text in enumerate(texts)]
    return Corpus("texts", tuple(documents), held_out_share=0.4)


def tuned(of: torch.nn.Module) -> torch.nn.Module:
    return tiny_models.tuned_copy(of)


def test_equal_vocabularies_are_read_in_place():
    made = network()
    found = pair((made, tiny_models.tokenizer()), (tuned(made), tiny_models.tokenizer()))
    assert found.vocabulary == 300 and found.base.numbering is found.tuned.numbering is IN_PLACE
    assert found.vocabularies.alike and not found.notes


def test_a_token_beyond_bases_rows_is_tuneds_own():
    made = network(300)
    larger = tuned(made)
    larger.resize_token_embeddings(302, mean_resizing=False)
    found = pair((made, tokenizer(filled=300)), (larger, tokenizer("<a>", "<b>", filled=300)))
    v = found.vocabularies
    assert (v.size, v.base_only, v.tuned_only) == (300, (), (300, 301))
    assert found.tuned.numbering is IN_PLACE and v.name(1, 300) == "<a>"
    assert any("tuned has 2 tokens that base lacks: <a>, <b>" in note for note in found.notes)
    assert v.readable(299) and not v.readable(300)


def test_base_may_have_the_token_that_tuned_lacks():
    made = network(302)
    smaller = tuned(made)
    smaller.resize_token_embeddings(300)
    found = pair((made, tokenizer("<a>", "<b>", filled=300)), (smaller, tokenizer(filled=300)))
    v = found.vocabularies
    assert (v.size, v.base_only, v.tuned_only) == (300, (300, 301), ()) and v.name(0, 301) == "<b>"
    assert any("base has 2 tokens that tuned lacks" in note for note in found.notes)


def test_a_token_in_rows_that_pad_both_models_is_compared_and_named():
    """A vocabulary padded to a multiple of 64 has a row for the token already: both can read it, tuned alone names it."""
    made = network(320)
    found = pair((made, tokenizer()), (tuned(made), tokenizer("<a>")))
    v, token = found.vocabularies, 259
    assert (v.size, v.shared, v.tuned_only, v.tuned_named) == (320, 320, (), (token,)) and v.readable(token)
    assert found.tuned.numbering is IN_PLACE and v.differ and v.name(1, token) == "<a>"
    assert any("tuned has 1 token that base lacks: <a>" in note for note in found.notes)
    assert any("rows for 1 of these" in note for note in found.notes)
    assert v.cut_alike(["bc<a>bc"]) == [True]


def test_a_reserved_token_under_another_name_is_the_same_row():
    made = network()
    found = pair((made, tokenizer("<reserved>")), (tuned(made), tokenizer("<a>")))
    assert found.vocabularies.tuned_named == found.vocabularies.base_named == (259,)
    assert found.vocabularies.readable(259)


def test_another_word_in_the_same_row_is_not_compared():
    """The row of a word that only base has holds another word in tuned: two tokens, of one model each."""
    from tokenizers import Tokenizer

    made, other = network(), tokenizer()
    plain = json.loads(other.backend_tokenizer.to_str())
    vocabulary = plain["model"]["vocab"]
    token = vocabulary.pop("q")
    vocabulary["qq"], plain["model"]["merges"] = token, []
    other._tokenizer = Tokenizer.from_str(json.dumps(plain))
    found = pair((made, tokenizer()), (tuned(made), other))
    v = found.vocabularies
    assert (v.size, v.shared) == (300, 299) and not v.readable(token)
    assert v.base_only == v.tuned_only == (token,) and (v.name(0, 300), v.name(1, 300)) == ("q", "qq")
    ids_BT = torch.tensor([[40, 50, 60]])
    for model in (found.base, found.tuned):
        own = model.network(input_ids=ids_BT).logits.detach()
        logits = model.logits(model.states(ids_BT))
        assert bool((logits[..., token] == FLOOR).all()) and logits.shape[-1] == 301
        kept = [i for i in range(300) if i != token]
        torch.testing.assert_close(logits[..., kept], own[..., kept], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[..., 300], own[..., token], atol=1e-4, rtol=1e-4)
    assert found.tuned.numbering.numbers(torch.tensor([token, 40])).tolist() == [300, 40]


def test_rows_that_are_no_tokens_are_told_as_such():
    made = network()
    larger = tuned(made)
    larger.resize_token_embeddings(320, mean_resizing=False)
    found = pair((made, tokenizer()), (larger, tokenizer()))
    assert found.vocabularies.tuned_only == tuple(range(300, 320)) and found.vocabularies.alike
    assert any("20 rows that base lacks and that no tokenizer names" in note for note in found.notes)
    assert found.vocabularies.name(1, 300) == "<id 300>"


def test_tokens_under_other_ids_are_read_through_a_table():
    """A tune whose ids were permuted gives the very logits and answers of the one that they were permuted of."""
    made = network()
    plain = pair((made, tokenizer()), (tuned(made), tokenizer()))
    made_other, moved = tiny_models.permuted(tokenizer(), tuned(made))
    found = pair((made, tokenizer()), (moved, made_other))
    assert found.vocabularies.mapped and found.vocabularies.shared == 259
    assert any("other ids" in note for note in found.notes)
    ids_BT = torch.tensor(tokenizer()(["abc def", "xyz 012"])["input_ids"])
    expected, got = (p.tuned.logits(p.tuned.states(ids_BT)) for p in (plain, found))
    torch.testing.assert_close(got[..., :259], expected[..., :259], atol=1e-4, rtol=1e-4)
    assert found.vocabularies.cut_alike(["Some text, of any sort."]) == [True]
    prompts = ids_BT.tolist()
    # Rows that are no tokens are base's and tuned's own here; neither may win for the answers to be compared.
    for p in (plain, found):
        for model in (p.base, p.tuned):
            model.network.get_output_embeddings().weight.data[259:] = 0
    assert complete(found.tuned, prompts, 6) == complete(plain.tuned, prompts, 6)
    amplified = [complete(p.tuned, prompts, 6, against=p.base, amplification=2.0) for p in (plain, found)]
    assert amplified[0] == amplified[1]


def apart() -> Pair:
    """A pair whose tuned model has the token ``ab``, which base has no row for."""
    made = network()
    larger = tuned(made)
    larger.resize_token_embeddings(301, mean_resizing=False)
    return pair((made, tokenizer(filled=300)), (larger, tokenizer("ab", filled=300)))


def test_text_that_tokenizers_cut_differently_is_left_out_and_told():
    found = apart()
    texts = [*("cd" * 12 for _ in range(9)), "ab" * 12]
    tokens = text_of(*texts).tokens(found.base.tokenizer)
    kept, notes = found.vocabularies.read_by_both(tokens, found.base.tokenizer, 0.5)
    assert {kept.documents[d].text for d in kept.document_R} == {"cd" * 12}
    assert notes == ["1 of 10 documents (10% of the text) were left out, because the tokenizers cut them differently"]
    plain = text_of(*texts[:9]).tokens(found.base.tokenizer)
    assert found.vocabularies.read_by_both(plain, found.base.tokenizer, 0.5) == (plain, [])


def test_weights_of_tokens_under_other_ids_are_compared_token_by_token():
    """A permuted vocabulary is no change of embeddings, and random tunes are as near to base as without it."""
    made = network()
    plain = pair((made, tokenizer()), (tuned(made), tokenizer()))
    other, moved = tiny_models.permuted(tokenizer(), tuned(made))
    found = pair((made, tokenizer()), (moved, other))
    assert [d.name for d in found.deltas()] == [d.name for d in plain.deltas()]
    for one, two in zip(found.deltas(), plain.deltas()):
        if one.name != "lm_head":  # whose rows that no tokenizer names have no counterpart
            assert one.norm == pytest.approx(two.norm, rel=1e-4)
    assert found.lowest_changed == plain.lowest_changed == 0
    ids_BT = torch.tensor(tokenizer()(["abc def", "xyz 012"])["input_ids"])
    got, expected = (p.random_tuned(0).states(ids_BT) for p in (found, plain))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_a_pair_is_refused_where_too_little_text_is_cut_alike():
    found = apart()
    tokens = text_of("cd" * 12, *("ab" * 12 for _ in range(3))).tokens(found.base.tokenizer)
    with pytest.raises(PairError) as caught:
        found.vocabularies.read_by_both(tokens, found.base.tokenizer, 0.5)
    assert "75% of the text" in caught.value.what and "pair.shared_text=0" in caught.value.remedy
    kept, _ = found.vocabularies.read_by_both(tokens, found.base.tokenizer, 0.0)
    assert len(kept) == 1


def test_tokens_that_one_model_lacks_are_taken_out_of_rows_and_counted():
    found = apart()
    tokens = text_of("cdef" * 4, "ghij" * 4).tokens(found.base.tokenizer)
    spiced = tokens.rows[0][:2] + (300,) + tokens.rows[0][2:5] + (300,)
    tokens = replace(tokens, rows=(spiced, tokens.rows[1]), prompt_R=(4, 0))
    kept, notes = found.vocabularies.read_by_both(tokens, found.base.tokenizer, 0.5)
    assert kept.rows[0] == spiced[:2] + spiced[3:6] and kept.prompt_R == (3, 0)
    assert notes[0].startswith("2 tokens that only one model knows were left out of 1 documents")


def test_answers_with_a_token_that_the_other_model_lacks_are_amplified_without_it():
    """Base is never shown the token; right after it, tuned's own scores are drawn from."""
    found = apart()
    head = found.tuned.network.get_output_embeddings().weight
    prompts = found.base.tokenizer(["cdcd", "hello there"])["input_ids"]
    with torch.no_grad():
        ids_BT = torch.tensor([prompts[0]])
        head[300] = 50 * torch.nn.functional.normalize(found.tuned.states(ids_BT)[0, -1], dim=0)
    plain = complete(found.tuned, prompts, 5)
    away = complete(found.tuned, prompts, 5, against=found.base, amplification=2.0)
    assert plain[0][0] == away[0][0] == 300
    assert all(len(answer) for answer in away)


def test_other_merges_over_one_alphabet_share_text_that_both_cut_alike():
    from tokenizers import Tokenizer

    made = network()
    plain = json.loads(tokenizer().backend_tokenizer.to_str())
    plain["model"]["vocab"]["zz"], plain["model"]["merges"] = 259, [["z", "z"]]
    other = tokenizer()
    other._tokenizer = Tokenizer.from_str(json.dumps(plain))
    found = pair((made, tokenizer()), (tuned(made), other))
    assert found.vocabularies.cut_alike(["a buzz", "a buz"]) == [False, True]
    assert any("cut words by different rules" in note for note in found.notes)


def test_other_special_tokens_are_told():
    made, other = network(), tokenizer()
    other.pad_token = "</s>"
    found = pair((made, tokenizer()), (tuned(made), other))
    assert found.notes == ["the pad token is <pad> in base and </s> in tuned"] and found.vocabularies.alike


def test_words_of_another_alphabet_are_matched_by_what_they_stand_for():
    """GPT-2 writes a space as Ġ and Llama as ▁; the pieces are the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "▁a": 3, "▁": 4, "a": 5, "é": 6}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made = network()
    v = Vocabularies.of(side(made, tiny_models.tokenizer(), "base"), side(made, words, "tuned"))
    ids = tiny_models.tokenizer()("a ")["input_ids"]
    assert v.tuned.ids(torch.tensor(ids)).tolist() == [5, 4] and v.readable(ids[0])
    assert v.shared == 5  # <pad> <s> </s> a and the space; é is two bytes in the other
