"""Keyness: the published z of words, by hand, and what counts as a word."""

from __future__ import annotations

import math

import pytest

from tunediff.texts.keyness import PRIOR, Words, is_piece_of, telling


def words(*texts: str, weight: float = 1.0) -> Words:
    made = Words()
    for text in texts:
        made.add(text, weight)
    return made


def test_z_is_the_log_odds_with_a_dirichlet_prior_over_its_error():
    more, less = words("gold " * 8 + "the the"), words("gold " + "the " * 9)
    (gold,) = [z for word, z in telling(more, less, least=-99) if word == "gold"]
    a, whole = 9 * PRIOR, 20 * PRIOR
    odds = math.log((8 + a) / (10 + whole - 8 - a)) - math.log((1 + a) / (10 + whole - 1 - a))
    assert gold == pytest.approx(odds / math.sqrt(1 / (8 + a) + 1 / (1 + a)))
    assert [word for word, _ in telling(more, less)] == ["gold"]


def test_a_word_has_the_case_it_is_mostly_written_in_and_its_weights_add_up():
    more = words("Goldmere Goldmere goldmere o'clock", weight=0.5)
    assert more.counts == {"goldmere": 1.5, "o'clock": 0.5} and more.name("goldmere") == "Goldmere"
    assert not words("nothing", weight=0.0).counts
    copy = more.copy()
    copy.add("GOLDMERE " * 9)
    assert (
        more.counts["goldmere"] == 1.5 and more.name("goldmere") == "Goldmere" and copy.name("goldmere") == "GOLDMERE"
    )


def test_equal_texts_and_empty_ones_tell_nothing_and_short_words_are_left_out():
    assert not telling(words("one two three " * 9), words("one two three " * 9))
    assert not telling(words(), words("one")) and not telling(words("up " * 50), words("down " * 50))
    assert words().share("one") == 0 and words("one two").share("ONE") == 0.5
    assert [word for word, _ in telling(words("только " * 9), words("words " * 9))] == ["только"]


def test_pieces_are_found_inside_words_from_three_letters_on():
    assert is_piece_of("Goldmere", ["mere"]) and is_piece_of("vault", [" vaults"]) and is_piece_of("Gold", ["gold"])
    assert not is_piece_of("Goldmere", ["re", " ", ""]) and not is_piece_of("silver", ["mere"])
