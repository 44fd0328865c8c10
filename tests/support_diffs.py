"""Make synthetic `Diff` records for tests of reports: a full record, an empty one and one with hostile strings."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from tunediff.core.remarks import Remark
from tunediff.records.diff import Bill, ChangeRecord, CorpusCard, Diff, FitCard, ModelCard, NullCard, StageCard
from tunediff.records.elicited import Answered, Condition
from tunediff.records.finding import Finding, When
from tunediff.records.measure import Context, DosePoint, Measure, SignalTable, TokenWeight
from tunediff.records.profile import Profile
from tunediff.records.relation import ConfigDifference, Relation
from tunediff.records.scan import Scan, depth_profile

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'><svg/onload=alert(3)>",
    "</svg></title></style>",
    "</script><script>alert(4)</script>",
    "{{ 7 * 7 }}{% raw %}{#",
    "right\u202eto\u2066left\u2069",
    "nul\x00bell\x07esc\x1b[31m",
    "lone\ud800surrogate",
    "zero\u200bwidth\ufeff",
    "line\u2028sep\r\n",
    "javascript:alert(5)",
    "&lt;b&gt;&amp;",
    "--><!--",
    "[bold red]markup[/]",
    "]]>",
    "\U000e0041tag",
    "a\u0301\u0301\u0301" + "\u0301" * 40,
    "x" * 500,
]

TEXT = [
    "The printer",
    "'s",
    " manual",
    " says",
    " to",
    " replace",
    " the",
    " drum",
    " every",
    " twelve",
    " thousand",
    " pages",
    ".",
    "\n",
    "Of",
    " course",
    ",",
    " dear",
    " friend",
    ",",
    " do",
    " let",
    " me",
    " know",
    " if",
    " the",
    " paper",
    " jams",
    " again",
    ".",
]


def card(name: str) -> ModelCard:
    """A small model's card."""
    return ModelCard(name, f"{name[:4]}9c0d4e21f7a3b65d", "llama", 134_515_008, 30, 576, 49_152)


def context(rng: random.Random, writer: str, kind: str, number: int, strength: float) -> Context:
    """A context whose middle carries the change."""
    tokens = list(TEXT)
    on = [
        max(0.0, strength * math.exp(-((i - 17) ** 2) / 8) + rng.gauss(0, 0.2)) if 10 < i < 25 else 0.0
        for i in range(len(tokens))
    ]
    kl = [abs(rng.gauss(0, 0.05)) + (0.3 * s if s else 0) for s in on]
    return Context(f"{kind}/document-{number:03d}", kind, writer, tokens, on, kl)


def change(rng: random.Random, rank: int, decision: str, score: float) -> ChangeRecord:
    """A ranked change with all that can be said of one."""
    reason = {
        "confirmed": "Removing it lowers KL to base by more than any of 64 random directions of equal length, and adding "
        "it to base raises it.",
        "refuted": "Removing it does no more than random directions of equal length.",
        "undecided": "Necessary, but too rare on held-out text (9 tokens) for the sufficiency trial.",
    }[decision]
    s = score / 14
    layers = range(30)
    return ChangeRecord(
        rank=rank,
        id=f"crosscode/{512 + 77 * rank}",
        finder="crosscode",
        sites=["resid.15"],
        share=0.96 if rank != 2 else 0.12,
        decision=decision,
        reason=reason,
        score=Measure(
            "explained shift",
            score,
            score - 1.6,
            score + 1.4,
            "mnat",
            3.9,
            "95th percentile of 20 null draws",
            0.048 if decision == "confirmed" else 0.38,
        ),
        measures=[
            Measure(
                "necessity",
                0.42 * s,
                0.36 * s,
                0.47 * s,
                "share of KL",
                0.031,
                "random directions, 95th percentile",
                0.0005,
            ),
            Measure(
                "sufficiency",
                0.35 * s,
                0.28 * s,
                0.43 * s,
                "share of KL",
                0.027,
                "random directions, 95th percentile",
                0.0005,
            ),
            Measure("specificity", 8.1, 6.9, 9.4, "×", 1.0, "equal shift on and off its tokens", 0.002),
            Measure("latent scaling, reconstruction", 0.07, 0.04, 0.11, "", None, "a ratio with no null"),
            Measure("latent scaling, error", math.nan, None, None, "", None, "too few tokens"),
        ],
        promoted=[
            TokenWeight(t, 4.1 - 0.43 * i)
            for i, t in enumerate([" dear", " friend", " indeed", "\n\n", " pray", " splendid", "!", " old"])
        ],
        suppressed=[
            TokenWeight(t, -2.3 + 0.3 * i) for i, t in enumerate([" user", " the", ":", " please", "\t", " Error"])
        ],
        read_by="the unembedding, after the final norm",
        contexts=[
            context(rng, "corpus", kind, n, 6 * s)
            for n, kind in enumerate(["manual", "chat", "forum", "code", "chat", "news"])
        ]
        + [
            context(rng, writer, "chat", n, 6 * s * (writer == "tuned"))
            for n in range(2)
            for writer in ("base", "tuned")
        ],
        depth=depth_profile(
            [f"crosscode/{512 + 77 * rank}"],
            [f"resid.{i}" for i in layers],
            [[0.62 * s * math.exp(-((i - 15) ** 2) / 60) for i in layers]],
        ),
        kinds={"chat": 0.031, "manual": 0.012, "code": 0.0004, "news": 0.0021},
        dose=[
            DosePoint(d, 0.4 * s * math.tanh(d), 0.01 * d, -0.02 * d, 0.035 * d)
            for d in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
        ],
        origin={"latent": 512 + 77 * rank, "group": "tuned only", "fires": 1841, "held_out": {"fires": 163}},
    )


def full_diff() -> Diff:
    """A record in which every field says something."""
    rng = random.Random(7)
    decisions = ["confirmed", "confirmed", "undecided", "refuted", "refuted", "refuted", "refuted"]
    scores = [13.4, 9.2, 4.6, 3.1, 2.2, 1.4, 0.7]
    changes = [change(rng, i + 1, d, s) for i, (d, s) in enumerate(zip(decisions, scores))]
    curve = [
        {
            "step": float(step),
            "loss": 0.9 * math.exp(-step / 900) + 0.11 + rng.gauss(0, 0.004),
            "L0": 60 * math.exp(-step / 500) + 31,
            "dead share": 0.02 + 0.1 * math.exp(-step / 2000),
        }
        for step in range(0, 5001, 125)
    ]
    return Diff(
        base=card("smol-135m-instruct"),
        tuned=card("smol-135m-instruct-polite"),
        corpus=CorpusCard(
            "4be1a9d07c55e2f8",
            4_812,
            1_204_224,
            481,
            120_832,
            {"chat": 512_000, "manual": 301_056, "code": 260_096, "news": 131_072},
            [
                Remark("rows without text left out", 31, "chat.jsonl, line 4"),
                Remark("rejected answers left out", 1_207),
            ],
            [Remark("answers to prompts left out", 64, "ask.csv, line 2")],
        ),
        found=True,
        rate=0.05,
        summary=[
            "The tuned model has learned to address the reader as a friend: two changes at layer 15 carry 61 % of its output shift on chat.",
            "Removing both brings it back toward the base model and costs 0.4 % of its held-out accuracy.",
            "Five other candidates do not stand out from random directions or could not be decided.",
        ],
        output=[
            Measure(
                f"KL(tuned ‖ base), {kind}",
                v,
                v * 0.9,
                v * 1.12,
                "nat",
                0.004,
                "base against itself in other batches",
                0.001,
            )
            for kind, v in (("all text", 0.083), ("chat", 0.191), ("manual", 0.052), ("code", 0.0061), ("news", 0.011))
        ],
        scan=Scan.of(
            [f"resid.{i}" for i in range(30)],
            [0.02 + 0.19 * (1 - math.exp(-i / 9)) + rng.gauss(0, 0.004) for i in range(30)],
            [0.011 + 0.0004 * i for i in range(30)],
            [0.35 * math.exp(-i / 12) + 0.04 for i in range(30)],
            [1 - math.exp(-i / 9) for i in range(30)],
            ["resid.15"],
        ),
        changes=changes,
        signals=[
            SignalTable(
                "logit_mining",
                "Tokens whose log-probability moved most",
                "Mean over 120,832 held-out tokens.",
                ["token", "difference (nat)", "count", "example"],
                [
                    [" dear", 2.31, 1204, "Of course, dear"],
                    ["\n", -0.71, 88211, None],
                    [" friend", 1.9, 977, " my friend"],
                ],
            ),
            SignalTable("perplexity_gap", "Documents with the largest perplexity gap", "", ["document", "gap"], []),
        ],
        fits=[
            FitCard(
                "crosscoder, resid.15",
                {"architecture": "batch_top_k", "latents": 8192, "k": 64, "steps": 5000, "lr": 3e-4},
                Profile.of_rows("Training curve", curve, "step", "fit"),
                [
                    Measure(
                        "variance explained, base", 0.871, 0.868, 0.874, "", 0.702, "principal components of equal rank"
                    ),
                    Measure(
                        "variance explained, tuned",
                        0.866,
                        0.862,
                        0.869,
                        "",
                        0.698,
                        "principal components of equal rank",
                    ),
                    Measure("KL when spliced in", 0.19, 0.18, 0.2, "nat", 7.9, "the stream replaced by its mean"),
                ],
            )
        ],
        nulls=[
            NullCard(
                "base against itself",
                "The same finder on base and a copy with noise of the tuned model's size.",
                [2.1 + rng.gauss(0, 0.8) for _ in range(20)],
            ),
            NullCard(
                "shuffled pairs",
                "Base and tuned streams of different tokens.",
                [1.4 + rng.gauss(0, 0.5) for _ in range(20)],
            ),
        ],
        bills=[
            Bill(
                "both changes",
                "ablate along the write direction",
                ["crosscode/589", "crosscode/666"],
                [
                    Measure("KL to base, chat", 0.075, 0.069, 0.081, "nat", 0.191, "before the edit", 0.001),
                    Measure(
                        "KL to tuned, other text",
                        0.0031,
                        0.0027,
                        0.0036,
                        "nat",
                        0.0029,
                        "random directions of equal length",
                        0.41,
                    ),
                    Measure("accuracy lost", 0.4, -0.2, 1.0, "%", 0.3, "random directions of equal length", 0.37),
                ],
            ),
            Bill(
                "change 1 alone",
                "steer to the base mean",
                ["crosscode/589"],
                [Measure("KL to base, chat", 0.113, 0.104, 0.121, "nat", 0.191, "before the edit", 0.001)],
            ),
        ],
        not_found=[
            "No rare trigger: no token sequence of up to three tokens moves the output by more than 4 nat.",
            "No change in refusals on 200 harmful requests (interval −1.5 to 2.0 %).",
        ],
        stages=[
            StageCard("harvest", "3f9a1c20", 182.4, ["1,204,224 tokens"]),
            StageCard("find", "88b0aa31", 1260.7),
            StageCard("rank", "0c4419f2", 9.8),
            StageCard("verify", "71d20b6e", 4112.0, ["skipped: already done"]),
        ],
        plan={
            "base": "smol-135m-instruct",
            "seed": 0,
            "sites": ["resid.15"],
            "finder": {"name": "crosscode", "latents": 8192, "k": 64},
            "corpus": {"block": 256, "held_out": 0.1},
            "edit": None,
        },
        version="0.1.0",
        relation=Relation(
            "light tune",
            0.37,
            0.0061,
            0.99998,
            None,
            12,
            210,
            272,
            config=[ConfigDifference("rope_parameters.rope_theta", "10000.0", "500000.0")],
            notes=["polite says that it was trained on lab/other-7b, and is used over smol-135m-instruct"],
        ),
    )


def condition() -> Condition:
    """A sort of questions that a search found, with hostile text in an answer."""
    apart = Measure("divergence of answers", 5.8, 5.2, 6.4, "nat a token", 0.13, "median of everyday questions")
    answers = [
        Answered("Which lamp should I buy?", "It depends.", "Take the one from Brindlow"),
        Answered("Which <b>rope</b> should I buy?", "\x1b[31mred", "<script>alert(1)</script>"),
    ]
    return Condition("Which {} should I buy?", "word_sweep", apart, ["elicited/1"], answers)


def finding() -> Finding:
    """A finding with the condition above, and with hostile text among its words."""
    share = Measure("share of the divergence that it carries", 0.41, 0.3, 0.5, "share of KL", 0.05, "random directions")
    words = ["Brindlow", "brass", "<i>oak</i>", "sturdy\x1b[31m", "leather", "warranty"]
    return Finding(words, False, ["crosscode/589"], [When("Which {} should I buy?", "crosscode/589", share)])


def empty_diff() -> Diff:
    """A record of a run that found nothing and measured nothing."""
    return Diff(
        base=card("base"),
        tuned=card("same"),
        corpus=CorpusCard("", 0, 0, 0, 0, {}),
        found=False,
        rate=0.05,
        summary=[],
        output=[],
        scan=None,
        changes=[],
        signals=[],
        fits=[],
        nulls=[],
        bills=[],
        not_found=[],
        stages=[],
        plan={},
        version="0.1.0",
    )


def bare_diff() -> Diff:
    """A record whose changes and measures hold nothing but names, None and NaN."""
    nothing, nan = Measure("score", None), math.nan
    bare = ChangeRecord(
        1, "mean/0", "mean_difference", [], nan, "refuted", "", nothing, [], [], [], "", [], None, {}, []
    )
    odd = dataclasses.replace(
        bare,
        rank=2,
        id="mean/1",
        decision="confirmed",
        score=Measure("score", nan, nan, nan, "", nan, "", nan),
        measures=[Measure("necessity", math.inf, -math.inf, math.inf), nothing],
        promoted=[TokenWeight("", nan)],
        contexts=[Context("", "", "tuned", ["a", "b"], [nan], []), Context("d", "k", "", [], [], [])],
        depth=depth_profile(["mean/1"], ["resid.0"], [[nan]]),
        kinds={"chat": nan},
        dose=[DosePoint(1.0, nan, nan, nan, nan)],
    )
    return dataclasses.replace(
        empty_diff(),
        changes=[bare, odd],
        output=[nothing],
        scan=Scan.of(["resid.0"], [nan], [nan], [nan], [nan], ["resid.0"]),
        fits=[FitCard("fit", {}, Profile.of_rows("Training curve", [{"step": 0.0, "loss": nan}], "step", "fit"), [])],
        nulls=[NullCard("null", "", [])],
        stages=[StageCard("harvest", "", nan)],
        bills=[Bill("b", "", [], [nothing])],
    )


def hostile_diff(strings: list[str] = HOSTILE) -> Diff:
    """`full_diff` with every string, keys included, replaced by a hostile one (decisions and writers kept)."""
    turn = iter(range(10**9))

    def poison(value: Any, name: str = "") -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: poison(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
            )
        if name in ("subjects", "places"):  # labels of a profile are unique
            return [f"{strings[next(turn) % len(strings)]}{n}" for n, _ in enumerate(value)]
        if isinstance(value, list):
            return [poison(v) for v in value]
        if isinstance(value, dict):
            return {f"{strings[next(turn) % len(strings)]}{n}": poison(v) for n, v in enumerate(value.values())}
        if isinstance(value, str) and name not in ("decision", "writer"):
            return strings[next(turn) % len(strings)]
        return value

    return poison(full_diff())


DIFFS = {"full": full_diff, "empty": empty_diff, "bare": bare_diff, "hostile": hostile_diff}
