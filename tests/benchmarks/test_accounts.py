"""Bound a diff's cost by counts of tokens through blocks and unembedding, which a busy machine does not change."""

from __future__ import annotations

import json
import os

import pytest
import tiny_models
import torch
from accounts import counted

from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.site import Site
from tunediff.runs.plan import Plan
from tunediff.runs.run import Run

STAGES = {
    "contrast": "answers",
    "elicit": "elicited",
    "scan": "scan",
    "harvest": "harvest",
    "find": "found",
    "rank": "ranking",
    "lens": "lens",
    "outputs": "output_side",
    "verify": "verdicts",
    "signals": "signals",
}
SYSTEM = "You answer short."
QUESTIONS = ("why", "when", "who", "how", "what", "which")
AT_MOST = {
    "contrast": (4700, 265),
    "elicit": (14219, 1638),
    "scan": (995, 462),
    "harvest": (4780, 0),
    "find": (1617, 441),
    "rank": (1455, 107),
    "lens": (607, 0),
    "outputs": (2264, 780),
    "verify": (45205, 7262),
    "signals": (781, 1728),
    "bill": (6061, 5185),
}
"""Token-blocks and token-logits of each stage: 5 % above what they were when this was written.

Verify runs an answer with its whole prompt before it, which is most of a row here, where every byte is a token.
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    network = tiny_models.module("llama")
    return Pair.load(tiny_models.save(root / "base", network), tiny_models.adapter(root / "tuned", network))


def test_only_what_is_run_is_counted(pair):
    ids = torch.randint(3, 259, (2, 11), generator=torch.Generator().manual_seed(0))
    with counted(pair.base, pair.tuned) as account:
        stream = pair.base.streams(ids, [Site(1)])[:, :, 0]
        assert account.taken().token_blocks == 22 * 2, "a run stops above its last site"
        states = pair.tuned.states(ids, Start(Site(1), stream))
        assert vars(account.taken()) == {"token_blocks": 22, "token_logits": 0}, "and begins above its start"
        pair.base.logits(states[:, -1])
        assert vars(account.taken()) == {"token_blocks": 0, "token_logits": 2}
    pair.base.states(ids)
    assert not account.token_blocks


@pytest.mark.skipif(os.environ.get("TUNEDIFF_FAST") == "0", reason="counts what acceleration leaves to run")
def test_no_stage_runs_more_than_it_did(pair, tmp_path):
    prompts = [
        {
            "id": f"q/{i}",
            "kind": "chat",
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{QUESTIONS[i % 6]} {i}"}],
        }
        for i in range(24)
    ]
    texts = [{"id": f"t/{i}", "kind": "plain", "text": "abcdefgh"[i % 8 :] * 4} for i in range(24)]
    for name, records in (("prompts", prompts), ("texts", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    plan = Plan()
    for text in (
        f'corpus.paths=["{tmp_path}/texts.jsonl"]',
        f'corpus.prompts=["{tmp_path}/prompts.jsonl"]',
        "corpus.tokens=400",
        "contrast.prompts=12",
        "contrast.tokens=6",
        "elicit.questions=8",
        "scan.tokens=100",
        'scan.sites=["resid.1"]',
        "fit.steps=30",
        "dictionary.latents=64",
        "rank.nulls=3",
        "rank.level=1.0",
        "rank.null_tokens=100",
        "rank.effect_tokens=100",
        "verify.draws=10",
        "verify.changes=2",
        "edit.tokens=300",
        "find.candidates=4",
    ):
        plan = plan.set(text)
    run, cost = Run(plan, tmp_path / "run", given=pair), {}
    with counted(pair.base, pair.tuned) as account:
        for name, attribute in STAGES.items():
            getattr(run, attribute)
            cost[name] = tuple(vars(account.taken()).values())
        run.bill([run.ranking.ranked[0].change.id])
        cost["bill"] = tuple(vars(account.taken()).values())
    over = {name: (cost[name], AT_MOST[name]) for name in cost if any(c > m for c, m in zip(cost[name], AT_MOST[name]))}
    assert not over, "(now, at most)"
