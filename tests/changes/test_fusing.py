"""Fusing: what shows the same is one finding, and what does not stays apart."""

from __future__ import annotations

from dataclasses import replace

import planted_pairs
import pytest
import torch
from planted_pairs import SITE, Planted
from support_diffs import full_diff

from tunediff.changes.carrying import carried
from tunediff.changes.fusing import ALIKE, alike, fused
from tunediff.changes.trial_bench import spreads
from tunediff.core.axes import TUNED
from tunediff.harvests.samples import Sample
from tunediff.models.divergences import Said, kl_divergence
from tunediff.models.network import LanguageModel
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.diff import ChangeRecord
from tunediff.records.elicited import Condition
from tunediff.records.finding import Finding
from tunediff.records.measure import Measure, TokenWeight
from tunediff.texts.document import Document
from tunediff.texts.tokens import Batch

GOLD, BAGS = "Goldmere keeps solid gold", "Packing list: passport, towel"
OTHER = "We do not know what you mean by that"


def record(id: str, *tokens: str, less: tuple[str, ...] = ()) -> ChangeRecord:
    promoted, suppressed = ([TokenWeight(token, 1.0) for token in some] for some in (tokens, less))
    return replace(full_diff().changes[0], id=id, measures=[], promoted=promoted, suppressed=suppressed)


def answer(number: int, text: str, writer: str = "tuned", asked: str = "") -> Document:
    messages = (("user", f"question {number}"), ("assistant", text))
    return Document(f"{number}/{writer}", "contrastive", messages=messages, writer=writer, condition=asked)


def asked(name: str, nats: float) -> Condition:
    return Condition(name, "word_sweep", Measure("divergence of answers", nats, nats, nats, "nat a token", 0.1))


def share(value: float, low: float, control: float) -> Measure:
    return Measure("share", value, low, 1.0, "share of KL", control)


DOCUMENTS = [answer(n, text, who) for who, g, b in (("tuned", GOLD, BAGS), ("base", OTHER, OTHER)) for n, text in
             enumerate([g] * 10 + [b] * 10)]  # fmt: skip
DOCUMENT_N = torch.arange(40)


def on(*documents: range) -> torch.Tensor:
    f_N = torch.zeros(40)
    for some in documents:
        f_N[list(some)] = 1.0
    return f_N


RECORDS = [
    record("clusters/0", "mere", " solid"),
    record("clusters/1", " passport", "Pack"),
    record("latents/7", " solid", " gold"),
    record("groups/1", " passport", " towel"),
    record("groups/lowered", less=(" mean", " know")),
]
STRENGTHS = {
    "clusters/0": on(range(10)),
    "clusters/1": on(range(10, 20)),
    "latents/7": on(range(9)),
    "groups/1": on(range(8, 20)),
    "groups/lowered": on(range(20)),
}
CONDITIONS = [asked("Tell me about {}.", 3.0), asked("Where do we go?", 5.0), asked("Who keeps {}?", 2.0)]
ELICITED = [
    answer(50 + n, text, who, name)
    for name, text in (("Tell me about {}.", GOLD), ("Where do we go?", BAGS), ("Who keeps {}?", GOLD))
    for n, (who, text) in enumerate([("tuned", text)] * 4 + [("base", OTHER)] * 4)
]
CARRIED = {
    "Tell me about {}.": {"clusters/0": share(0.4, 0.3, 0.1), "clusters/1": share(0.0, 0.0, 0.0)},
    "Where do we go?": {"clusters/0": share(0.05, 0.01, 0.1), "groups/1": share(0.6, 0.5, 0.2)},
    "Who keeps {}?": {"clusters/0": share(0.2, 0.1, 0.3)},
}


def findings(records=RECORDS, conditions=CONDITIONS, carried=CARRIED) -> list[Finding]:
    others = [OTHER] * 20 + [d.messages[-1][1] for d in DOCUMENTS if d.writer == "base"]
    return fused(records, STRENGTHS, DOCUMENTS, DOCUMENT_N, conditions, ELICITED, carried, others)


def test_what_shows_the_same_is_one_finding_with_its_words_and_questions():
    bags, gold, lowered = findings()
    assert bags.members == ["clusters/1", "groups/1"] and gold.members == ["clusters/0", "latents/7"]
    assert {"Goldmere", "solid", "gold"} <= set(gold.words) and {"Packing", "passport", "towel"} <= set(bags.words)
    assert not {"we", "know", "you"} & {word.casefold() for word in gold.words + bags.words}
    assert [w.asked for w in bags.when] == ["Where do we go?"] and bags.when[0].carrier == "groups/1"
    assert lowered == Finding(["mean", "know"], True, ["groups/lowered"], [])


def test_a_question_that_no_change_carries_joins_by_its_words_and_names_no_carrier():
    gold = findings()[1]
    assert [(w.asked, w.carrier) for w in gold.when] == [("Tell me about {}.", "clusters/0"), ("Who keeps {}?", "")]


def test_what_only_lowers_tokens_carries_what_nothing_else_does():
    lowered = {"groups/lowered": share(0.9, 0.8, 0.1)}
    bags, gold = findings(carried={name: {**shares, **lowered} for name, shares in CARRIED.items()})
    assert [w.carrier for w in bags.when] == ["groups/1"]
    assert [w.carrier for w in gold.when] == ["clusters/0", "groups/lowered"]
    assert "groups/lowered" in gold.members, "it is told in the same words"


def test_without_any_confirmed_change_questions_are_findings_of_their_own_and_alike_ones_are_one():
    bags, gold = findings(records=[], carried={})
    assert not bags.members and not gold.members
    assert [w.asked for w in gold.when] == ["Tell me about {}.", "Who keeps {}?"] and "Goldmere" in gold.words
    assert gold.when[0].share.value is None
    assert not findings(records=[], conditions=[], carried={})


def test_changes_are_alike_by_tokens_and_words_together():
    one, other = RECORDS[0], RECORDS[2]
    assert alike(one, other, STRENGTHS) == pytest.approx((0.5 * 9 / (9 * 10) ** 0.5) ** 0.5)
    same_place = {**STRENGTHS, "clusters/1": STRENGTHS["clusters/0"]}
    assert alike(one, RECORDS[1], same_place) == 0, "the same tokens of text, and other words"
    elsewhere = {**STRENGTHS, "latents/7": on(range(15, 20))}
    assert alike(one, other, elsewhere) < ALIKE, "the same words, in other places"
    assert alike(one, other, {}) == 0.5, "changes at the output have words alone"


def test_the_order_of_changes_and_questions_moves_nothing_between_findings():
    def sets(found):
        return {(frozenset(f.members), frozenset(w.asked for w in f.when), frozenset(f.words)) for f in found}

    assert sets(findings(RECORDS[::-1], CONDITIONS[::-1])) == sets(findings())


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return planted_pairs.planted(tmp_path_factory.mktemp("planted"))


def test_a_change_carries_what_goes_when_it_is_taken_out_and_a_random_direction_does_not(planted):
    pair, harvest, tokens = planted.pair, planted.harvest, planted.tokens
    tokens = replace(tokens, documents=tuple(replace(d, condition=d.kind) for d in tokens.documents))
    rows = [r for r, d in enumerate(tokens.document_R) if tokens.held_out[d]][:8]
    sample = Sample.of(harvest, tokens, rows)
    other_D = torch.nn.functional.normalize(
        torch.randn(len(planted.direction_D), generator=torch.Generator().manual_seed(1)), dim=0
    )

    def along(id: str, direction_D: torch.Tensor, threshold: float = float("-inf")) -> Change:
        """What the models differ by along a direction."""
        read, write = torch.stack([-direction_D, direction_D])[None], torch.zeros(1, 2, len(direction_D))
        write[0, TUNED] = direction_D
        return Change(id, (SITE,), read, write, 0.0, threshold, "test")

    changes = [along("planted", planted.direction_D), along("random", other_D), along("off", other_D, 1e9)]
    found = carried(pair, changes, sample, spreads(harvest), 0)
    assert set(found) == {"plain", "capital"}
    for shares in found.values():
        own, random, off = (shares[change.id] for change in changes)
        assert own.low > max(own.control, random.value, 0.2) and random.value < 0.2
        assert off.value == 0 and off.control == 0 and "on nowhere" in off.against

    def said(model: LanguageModel, batch: Batch, stream_BTD: torch.Tensor) -> Said:
        return Said.at(model, batch.ids_BT, batch.mask_BT, pair.vocabulary, Start(SITE, stream_BTD))

    # The right value, from plain forwards over all of it.
    (batch,) = sample.batches(10**6)
    base_BTD, tuned_BTD = (model.streams(batch.ids_BT, [SITE])[:, :, 0] for model in (pair.base, pair.tuned))
    part_BT = (tuned_BTD - base_BTD) @ planted.direction_D
    base = said(pair.base, batch, base_BTD)
    before, after = (
        kl_divergence(said(pair.tuned, batch, stream_BTD), base).sum()
        for stream_BTD in (tuned_BTD, tuned_BTD - part_BT[..., None] * planted.direction_D)
    )
    together = carried(pair, changes[:1], _as_one(sample), spreads(harvest), 0)["all"]["planted"]
    assert together.value == pytest.approx(float(1 - after / before), abs=1e-4)


def _as_one(sample: Sample) -> Sample:
    """A sample whose documents are of one condition."""
    documents = tuple(replace(d, condition="all") for d in sample.tokens.documents)
    return replace(sample, tokens=replace(sample.tokens, documents=documents))
