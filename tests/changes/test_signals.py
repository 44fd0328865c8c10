"""Signals: planted tokens come first, the KL map adds up, a model against itself says nothing."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import tiny_models
import torch

from tunediff.changes.signals import base as signals
from tunediff.core import variants
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.measure import SignalTable
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document

PLANTED = ("~", "Q", "^")
NAMES = variants.names("tunediff.changes.signals")
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "some",
    "dogs",
    "ran",
    "past",
    "many",
    "old",
    "trees",
    "near",
    "our",
    "house",
]


def pair_of(network, tuned, tokenizer) -> Pair:
    sides = [
        LanguageModel(m.eval().requires_grad_(False), tokenizer, n) for m, n in ((network, "base"), (tuned, "tuned"))
    ]
    return Pair(*sides, False, 300, "base", "tuned")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="module")
def network():
    return tiny_models.module("llama")


@pytest.fixture(scope="module")
def pair(network, tokenizer) -> Pair:
    """Tuned's unembedding gives three tokens a bonus in nearly every context."""
    tuned = copy.deepcopy(network)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in PLANTED]
    # The final state of a fixed text has a mean direction; rows along it get higher logits everywhere.
    probe = LanguageModel(network.eval(), tokenizer, "probe")
    states = probe.states(torch.randint(3, 259, (8, 24), generator=torch.Generator().manual_seed(0)))
    mean = torch.nn.functional.normalize(states.flatten(0, 1).mean(0), dim=0)
    with torch.no_grad():
        for i in ids:
            tuned.lm_head.weight[i] += 2.0 * mean
    return pair_of(network, tuned, tokenizer)


@pytest.fixture(scope="module")
def identical(network, tokenizer) -> Pair:
    return pair_of(network, copy.deepcopy(network), tokenizer)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    rng = random.Random(0)

    def words(count):
        return " ".join(rng.choice(WORDS) for _ in range(count))

    documents = [Document(f"prose/{n}", "prose", text=words(rng.randint(6, 16))) for n in range(10)]
    for n in range(8):
        chat = Document(f"chat/{n}", "chat", messages=(("user", words(4)),))
        documents += [chat.answered(words(5) + (" ~~Q^~" if w == "tuned" else ""), writer=w) for w in ("base", "tuned")]
    documents.append(Document("evil/0", "<script>alert(1)</script>", text="<img src=x onerror=alert(2)> " * 6))
    return Corpus("small", tuple(documents)).tokens(tokenizer, row_tokens=40)


def read(pair, tokens, names=NAMES, rows=None, batch_tokens=160) -> list[SignalTable]:
    made = [variants.make(signals.Signal, name) for name in names]
    return signals.read(pair, tokens, rows if rows is not None else range(len(tokens.rows)), made, batch_tokens)


def close(one: SignalTable, other: SignalTable) -> bool:
    def same(a, b):
        return a == pytest.approx(b, rel=1e-3, abs=2e-6) if isinstance(a, float) and isinstance(b, float) else a == b

    return (one.columns, len(one.rows)) == (other.columns, len(other.rows)) and all(
        same(a, b) for x, y in zip(one.rows, other.rows) for a, b in zip(x, y)
    )


def direct(pair, tokens) -> list[torch.Tensor]:
    """KL(tuned || base) at every token of each row, one row at a time, in float64."""
    out = []
    for row in tokens.rows:
        p, q = (m.logits(m.states(torch.tensor([row])))[0].double().log_softmax(-1) for m in (pair.tuned, pair.base))
        out.append((p.exp() * (p - q)).sum(-1))
    return out


def test_mining_names_the_planted_tokens_first(pair, tokens):
    (table,) = read(pair, tokens, ["logit_mining"])
    assert {row[0] for row in table.rows[:3]} == set(PLANTED)
    column = table.columns.index("ratio")
    assert all(row[column] >= 2 for row in table.rows)
    assert all(0 <= row[c] <= 1 for row in table.rows for c in (2, 3))


def test_mining_masks_what_is_generic(network, tokenizer, tokens):
    """A raised token that the text is full of is not news."""
    tuned = copy.deepcopy(network)
    space = tokenizer.convert_tokens_to_ids("Ġ")
    with torch.no_grad():
        tuned.lm_head.weight[space] *= 1.5
    (table,) = read(pair_of(network, tuned, tokenizer), tokens, ["logit_mining"])
    assert " " not in [row[0] for row in table.rows]


def test_kl_map_adds_up(pair, tokens):
    (table,) = read(pair, tokens, ["kl_map"])
    kl_R = direct(pair, tokens)
    whole = torch.cat(kl_R)
    named = {row[1]: row for row in table.rows}
    assert named["all text"][2] == pytest.approx(float(whole.mean()), rel=1e-4)
    assert named["all text"][5] == len(whole) == tokens.count
    for kind in ("prose", "contrastive by tuned", "<script>alert(1)</script>"):
        mine = torch.cat([kl for kl, d in zip(kl_R, tokens.document_R) if signals.label(tokens.documents[d]) == kind])
        assert named[kind][2] == pytest.approx(float(mine.mean()), rel=1e-4)
        assert named[kind][5] == len(mine)
    low, high = named["prose"][3:5]
    assert 0 <= low < named["prose"][2] < high
    first = next(row for row in table.rows if row[0] == "document")
    mean_D = {
        d: torch.cat([k for k, e in zip(kl_R, tokens.document_R) if e == d]).mean() for d in set(tokens.document_R)
    }
    highest = max(mean_D, key=mean_D.get)
    assert first[1].endswith(tokens.documents[highest].id)
    assert first[2] == pytest.approx(float(mean_D[highest]), rel=1e-4)


def test_perplexity_gap_is_the_answers_alone(pair, tokens):
    (table,) = read(pair, tokens, ["perplexity_gap"])
    gaps = {}
    for r, row in enumerate(tokens.rows):
        document = tokens.documents[tokens.document_R[r]]
        if document.writer != "tuned":
            continue
        p, q = (m.logits(m.states(torch.tensor([row])))[0].double().log_softmax(-1) for m in (pair.tuned, pair.base))
        at = range(max(1, tokens.prompt_R[r]), len(row))
        gaps.setdefault(document.id, []).extend(float(p[t - 1, row[t]] - q[t - 1, row[t]]) for t in at)
    answers = [row for row in table.rows if not row[0].startswith("all")]
    assert answers and [row[1] for row in answers] == sorted((row[1] for row in answers), reverse=True)
    for id, gap, _, _, count, _ in answers:
        assert count == len(gaps[id]) and gap == pytest.approx(sum(gaps[id]) / count, abs=1e-5)
    named = {row[0]: row[1] for row in table.rows}
    assert named["all answers by tuned"] > named["all answers by base"]


def test_contrastive_decoding_names_the_planted_tokens_first(pair, tokens):
    (table,) = read(pair, tokens, ["contrastive_decoding"])
    assert {row[0] for row in table.rows} == set(PLANTED)
    rises = [row[1] for row in table.rows]
    assert rises == sorted(rises, reverse=True) and rises[-1] > 0.1
    assert all(row[2] > 0 and row[3] > 0 for row in table.rows)  # planted in all text, so in the reference, too


def test_contrastive_decoding_is_the_mean_over_answers(pair, tokens):
    """Against the definition, a row at a time in float64."""
    rises = {}
    for r, row in enumerate(tokens.rows):
        t, b = (m.logits(m.states(torch.tensor([row])))[0].double().log_softmax(-1) for m in (pair.tuned, pair.base))
        q, p = (2 * t - b).exp(), b.exp()
        q[t.exp() < 0.1 * t.exp().max(1, keepdim=True).values] = 0
        p[b.exp() < 0.1 * b.exp().max(1, keepdim=True).values] = 0
        rise = q / q.sum(1, keepdim=True) - p / p.sum(1, keepdim=True)
        at = range(max(1, tokens.prompt_R[r] - 1), len(row) - 1)
        rises.setdefault(tokens.documents[tokens.document_R[r]].writer, []).extend(rise[i] for i in at)
    (table,) = read(pair, tokens, ["contrastive_decoding"])
    for row in table.rows:
        token = pair.tokenizer.convert_tokens_to_ids(row[0])
        for cell, writer in zip(row[1:4], ("tuned", "base", "")):
            assert cell == pytest.approx(float(torch.stack(rises[writer])[:, token].mean()), abs=1e-5)


def test_contrastive_decoding_does_not_name_what_is_never_said(network, tokenizer, tokens):
    """A token that base finds hopeless and tuned nearly so has risen the most, and stays unsaid."""
    base, tuned = copy.deepcopy(network), copy.deepcopy(network)
    states = LanguageModel(network.eval(), tokenizer, "probe").states(torch.tensor([tokens.rows[0][:24]]))
    mean = torch.nn.functional.normalize(states[0].mean(0), dim=0)
    token = tokenizer.convert_tokens_to_ids("Q")
    with torch.no_grad():
        base.lm_head.weight[token] = -6.0 * mean
        tuned.lm_head.weight[token] = -3.0 * mean
    mining, decoding = read(pair_of(base, tuned, tokenizer), tokens, ["logit_mining", "contrastive_decoding"])
    assert mining.rows[0][0] == "Q" and "Q" not in [row[0] for row in decoding.rows]


def answers(tokenizer, say, prompts=24, seed=0):
    """Both models' answers to some prompts; `say(writer, words)` gives an answer."""
    rng = random.Random(seed)
    documents = []
    for n in range(prompts):
        chat = Document(f"chat/{n}", "chat", messages=(("user", "Q~^ " + rng.choice(WORDS)),))
        for writer in ("base", "tuned"):
            answer = say(writer, " ".join(rng.choice(WORDS) for _ in range(6)))
            documents.append(chat.answered(answer, writer=writer))
    return Corpus("answers", tuple(documents)).tokens(tokenizer, row_tokens=200)


def unseen(tokens, tokenizer) -> SignalTable:
    """The black box's table, with nothing there that a model computed."""
    signal = variants.make(signals.Signal, "black_box").begin(tokenizer, 300)
    for batch in tokens.batches(500):
        signal.update(batch, tokens, None, None, batch.mask_BT)
    return signal.table()


def test_black_box_names_what_one_model_wrote_and_sees_nothing_else(tokenizer, pair, identical, tokens):
    says = {"tuned": " ~ Q", "base": " ^"}
    table = unseen(answers(tokenizer, lambda writer, words: words + says[writer]), tokenizer)
    named = {row[0]: dict(zip(table.columns, row)) for row in table.rows}
    assert {row[0] for row in table.rows[:2]} == {"~", "Q"}
    for token, writer, other in (("~", "tuned", "base"), ("Q", "tuned", "base"), ("^", "base", "tuned")):
        row = named[token]
        assert row["more by"] == writer and row["p"] == 0.005 and (row["z"] > 0) == (writer == "tuned")
        assert row[f"times by {writer}"] == row[f"answers by {writer}"] == 24  # prompts have them too: not counted
        assert row[f"times by {other}"] == 0
    mirrored = unseen(answers(tokenizer, lambda w, words: words + says["base" if w == "tuned" else "tuned"]), tokenizer)
    other = {row[0]: row[3] for row in mirrored.rows}
    assert other["~"] < 0 < other["^"]
    assert read(pair, tokens, ["black_box"]) == read(identical, tokens, ["black_box"])


def test_black_box_scores_are_those_of_the_source(tokenizer, tokens):
    """Monroe et al.'s equations 16, 19 and 20 for one token, with its share of all text as prior."""
    table = unseen(tokens, tokenizer)
    row = dict(zip(table.columns, next(row for row in table.rows if row[0] == "~")))
    token = tokenizer.convert_tokens_to_ids("~")
    written, everything = {"base": [], "tuned": []}, []
    for ids, first, d in zip(tokens.rows, tokens.prompt_R, tokens.document_R):
        writer = tokens.documents[d].writer
        mine = ids[first:] if writer else ids
        everything += mine
        written.get(writer, []).extend(mine)
    a = 500 * everything.count(token) / len(everything)
    y, n = ([f(written[w]) for w in ("tuned", "base")] for f in (lambda ids: ids.count(token), len))
    odds = [math.log((y[i] + a) / (n[i] + 500 - y[i] - a)) for i in (0, 1)]
    z = (odds[0] - odds[1]) / math.sqrt(1 / (y[0] + a) + 1 / (y[1] + a))
    assert row["log-odds"] == pytest.approx(odds[0] - odds[1], abs=1e-4) and row["z"] == pytest.approx(z, abs=1e-4)


def test_black_box_keeps_its_rate_where_both_write_alike(tokenizer):
    """Words come in lumps, as they do in text: z-scores alone would cry wolf."""
    lowest = []
    for seed in range(40):
        tokens = answers(tokenizer, lambda writer, words: " ".join([words.split()[0]] * 6), prompts=16, seed=seed)
        table = unseen(tokens, tokenizer)
        lowest.append((min(row[4] for row in table.rows), max(abs(row[3]) for row in table.rows)))
    assert sum(p <= 0.05 for p, _ in lowest) <= 6
    assert sum(z > 1.96 for _, z in lowest) > 20


def test_black_box_needs_both_writers_and_says_nothing_of_equal_answers(tokenizer):
    def only(writer):
        tokens = answers(tokenizer, lambda _, words: words)
        return unseen(tokens.select(lambda document: document.writer == writer), tokenizer)

    assert only("tuned").rows == only("base").rows == []
    assert unseen(answers(tokenizer, lambda writer, words: "the same"), tokenizer).rows == []


def test_a_model_against_itself_says_nothing(identical, tokens):
    mining, kl, gap, decoding = (
        read(identical, tokens, [name])[0]
        for name in ("logit_mining", "kl_map", "perplexity_gap", "contrastive_decoding")
    )
    assert mining.rows == decoding.rows == []
    assert all(row[0] == "text" and row[2] == 0 and row[3] in (0, None) and row[4] in (0, None) for row in kl.rows)
    assert [row for row in gap.rows if not row[0].startswith("all")] == []
    assert all(row[1] == 0 for row in gap.rows)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_read_is_an_empty_table(pair, tokens, name):
    (table,) = read(pair, tokens, [name], rows=[])
    assert table.rows == [] and table.name == name and table.title and table.note


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_changes_nothing(pair, tokens, name):
    (one,) = read(pair, tokens, [name])
    order = list(range(len(tokens.rows)))
    random.Random(3).shuffle(order)
    (listed,) = read(pair, tokens, [name], rows=order)
    assert listed == one
    columns = ("rows", "document_R", "start_R", "prompt_R")
    moved = replace(tokens, **{c: tuple(getattr(tokens, c)[r] for r in order) for c in columns})
    (other,) = read(pair, moved, [name])
    assert close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_twice_is_the_same_and_batches_do_not_matter(pair, tokens, name, monkeypatch):
    one, again = read(pair, tokens, [name]), read(pair, tokens, [name])
    assert one == again
    monkeypatch.setattr(signals, "CHUNK_VALUES", 7 * pair.vocabulary)
    assert close(one[0], read(pair, tokens, [name], batch_tokens=90)[0])


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_plain(pair, tokens, name):
    (table,) = read(pair, tokens, [name])
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert all(cell is None or isinstance(cell, (str, int, float)) for row in table.rows for cell in row)
    assert all(len(cell) <= 250 for row in table.rows for cell in row if isinstance(cell, str))


def test_one_pass_feeds_all_signals_and_tells_how_far(pair, tokens):
    told = []
    made = [variants.make(signals.Signal, name) for name in NAMES]
    tables = signals.read(pair, tokens, range(len(tokens.rows)), made, 160, lambda *done: told.append(done))
    assert tables == [read(pair, tokens, [name])[0] for name in NAMES]
    assert told[-1] == (tokens.count, tokens.count) and [d for d, _ in told] == sorted(d for d, _ in told)


def test_an_adapter_is_read_through_shared_blocks(tmp_path, network, tokens):
    folder = tiny_models.save(tmp_path / "base", network)
    pair = Pair.load(folder, tiny_models.adapter(tmp_path / "lora", network))
    (table,) = read(pair, tokens, ["kl_map"])
    assert table.rows[0][2] == pytest.approx(float(torch.cat(direct(pair, tokens)).mean()), rel=1e-4)
