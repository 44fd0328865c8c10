"""Sources: the text of a run keeps to its limits, and what reading it left out is told."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import tiny_world
from small_texts import texts, write
from tiny_world import World

from tunediff.core.progress import ProgressBar
from tunediff.runs.plan import Plan
from tunediff.runs.sources import Sources


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return tiny_world.make(tmp_path_factory.mktemp("world"))


def sources(world: World, folder: Path, **changed: object) -> Sources:
    """The sources of the tiny pair, with some settings changed."""
    plan = Plan(str(world.base), str(world.tuned))
    for text in world.sets(**changed)[1::2]:
        plan = plan.set(text)
    return Sources(plan, folder)


@pytest.mark.parametrize(("length", "count"), [(10, 300), (2_000, 6), (20_000, 4)])
@pytest.mark.parametrize("prompts", [0, 6])
def test_no_more_corpus_tokens_are_read_than_asked_for(world, tmp_path, length, count, prompts):
    rng = random.Random(0)
    long = (" ".join(rng.choices(("abc", "defg", "hi", "jklmn"), k=length)) for _ in range(count))
    path = write(tmp_path / "long.jsonl", *({"text": text} for text in long))
    run = sources(world, tmp_path / "run", corpus__paths=[str(path)], corpus__tokens=1000, contrast__prompts=prompts)
    tokens = run.tokens
    read = sum(count for kind, count in tokens.counts.items() if kind != "contrastive")
    assert 900 < read <= 1000
    assert ("contrastive" in tokens.counts) == bool(prompts)
    assert set(tokens.document_R) == set(range(len(tokens.documents)))
    for split in ("train", "held_out"):
        assert tokens.select(split).count > 100
    assert len({document.id for document in tokens.documents}) == len(tokens.documents)


def test_what_reading_left_out_is_told_and_reaches_the_cards(world, tmp_path):
    path = write(tmp_path / "a.jsonl", *texts(12), {"text": ""}, {"prompt": "a", "chosen": "b", "rejected": "c"})
    run = sources(world, tmp_path / "run", corpus__paths=[str(path)])
    run.progress = ProgressBar(io.StringIO())
    assert len(run.corpus.documents) == 13
    (card,) = (card for card in run.cards if card.name == "corpus")
    assert card.notes == [
        f"rows without text left out: 1 (first: {path}, line 13)",
        f"rejected answers left out: 1 (first: {path}, line 14)",
    ]
    (line,) = run.progress.stream.getvalue().splitlines()
    assert line == "text    " + "; ".join(card.notes)
