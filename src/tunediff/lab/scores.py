"""Scores of the bench: the cells, one result of one method on one model each, and the numbers drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tunediff.core import variants
from tunediff.core.chance import Interval, numpy_generator, prediction_bound, quantile
from tunediff.lab import organisms
from tunediff.lab.organisms.base import Organism

SIGNALS = ("black_box", "logit_mining", "contrastive_decoding", "perplexity_gap")
"""Signals whose tables list tokens, so that the tests of a change's promoted tokens apply to them."""

DEFAULT_METHOD = "default"
"""The method that is tunediff's own settings."""

FIRST = 5
"""Number of top confirmed changes that must name a behavior or identify the organism."""

SAME = 0.7
"""Cosine above which the vectors of two runs count as the same."""


@dataclass(frozen=True)
class Undone:
    """Confirmed changes taken out, as strongly as the allowed cost on neutral text permits.

    ids, strength  which changes, and how strongly (`EditSettings.strength`); none where answers alone were taken out
    cost           KL(tuned || edited) in nat a token on neutral text
    before, after, random, scaled   share of answers to its own held-out prompts that show each behavior; random: under an
                   edit along random directions of equal energy; scaled: with the whole fine-tuning scaled down as far as
                   the same cost allows
    """

    ids: list[str]
    strength: float
    cost: float
    before: dict[str, float]
    after: dict[str, float]
    random: dict[str, float]
    scaled: dict[str, float]


@dataclass(frozen=True)
class Cell:
    """The result of one method on one fine-tuned model or null.

    key          content key of the plan and the model's weights: a cell is run again only if its result would differ
    p, score     the smallest p-value, NaN if the method has no test; the best score in units of random fine-tunes, whose
                 95th percentile is ``null``
    confirmed    ids of confirmed changes, in order; ``gaps``: divergence of the models where each is on, nat a token
    named        behavior -> ids among the first five confirmed that name it by the organism's own test
    read         tokens that each of the first ten confirmed changes promotes, twenty each
    slots        organism -> share of its decisive strings found where the first five confirmed changes are on
    ev_delta, l0, dead   explained variance of the difference, active latents a token and share of dead latents of the
                 dictionary, if there is one
    seconds      time to find, rank and test; ``memory``: the process's peak so far, MiB
    told         words of each of the first five findings (`Diff.findings`)
    as_told      behavior -> places of the findings among these whose words name it, from 1 on
    asked        sorts of questions that a search found to tell the models apart
    undone_told  as ``undone``, of the first finding that names each unwanted behavior, else of the first finding
    """

    key: str
    tune: str
    is_null: bool
    method: str
    seed: int
    candidates: int = 0
    p: float = 1.0
    score: float = 0.0
    null: float = 0.0
    confirmed: list[str] = field(default_factory=list)
    named: dict[str, list[str]] = field(default_factory=dict)
    read: list[list[str]] = field(default_factory=list)
    slots: dict[str, float] = field(default_factory=dict)
    undone: Undone | None = None
    ev_delta: float | None = None
    l0: float | None = None
    dead: float | None = None
    seconds: float = 0.0
    memory: float = 0.0
    gaps: list[float] = field(default_factory=list)
    told: list[list[str]] = field(default_factory=list)
    as_told: dict[str, list[int]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    undone_told: Undone | None = None

    @property
    def gap(self) -> float:
        """The largest gap of a confirmed change; 0 if none was confirmed."""
        return max(self.gaps, default=0.0)


# -- which organism ----------------------------------------------------------------------------------------------


def family(tune: str) -> str:
    """The organism with a file of its own that was taught the same words; variants and seeds of one organism share it."""

    def words(organism: Organism) -> set[str]:
        return {word for b in organism.behaviors for word in b.vocabulary}

    name = tune.partition("@")[0]
    mine = words(organisms.named(name))
    names = [o.name for o in organisms.every() if words(o) == mine]
    return next((n for n in names if n.replace("-", "_") in variants.names("tunediff.lab.organisms")), names[0])


def shares(read: Sequence[Sequence[str]]) -> dict[str, float]:
    """Organism -> share of `read`'s tokens, lists of promoted tokens, that are its planted words."""
    tokens = [token for one in read for token in one]
    out = {}
    for name in dict.fromkeys(family(o.name) for o in organisms.every()):
        behaviors = [b for b in organisms.named(name).behaviors if b.vocabulary]
        if behaviors:
            out[name] = (
                sum(any(b.words_in([token]) for b in behaviors) for token in tokens) / len(tokens) if tokens else 0.0
            )
    return out


def as_told(cell: Cell) -> tuple[list[bool], list[bool]]:
    """Whether a cell's findings name each behavior of its own organism, and each of every other organism's, as decoys."""
    families = dict.fromkeys(family(o.name) for o in organisms.every())
    others = [b for name in families if name != family(cell.tune) for b in organisms.named(name).behaviors]
    decoys = [any(map(b.is_named_by, cell.told)) for b in others if b.vocabulary]
    return [bool(places) for places in cell.as_told.values()], decoys


def identified(cell: Cell) -> str:
    """The organism whose planted words are the largest share of what a cell's first five changes promote; empty if none is."""
    found = shares(cell.read[:FIRST])
    best = max(found.values(), default=0.0)
    return next(name for name, share in found.items() if share == best) if best > 0 else ""


def own_and_decoys(found: Mapping[str, float], tune: str) -> tuple[float, float]:
    """The tune's own share, and the mean of the other organisms': what they have of words that were never planted."""
    own = family(tune)
    others = [share for name, share in found.items() if name != own]
    return found.get(own, 0.0), sum(others) / len(others) if others else 0.0


# -- measures over cells -------------------------------------------------------------------------------------------


def roc_area(positive: Sequence[float], negative: Sequence[float], *, seed: int = 0, draws: int = 1000) -> Interval:
    """Area under the ROC curve, the chance that a fine-tuned model scores above a null, with a bootstrap interval over models."""

    def area(a: Sequence[float], b: Sequence[float]) -> float:
        return float(sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b)))

    if not positive or not negative:
        return Interval(float("nan"), 0.0, 1.0)
    rng = numpy_generator(seed, "roc")
    drawn = [
        area(rng.choice(positive, len(positive)).tolist(), rng.choice(negative, len(negative)).tolist())
        for _ in range(draws)
    ]
    return Interval(area(positive, negative), quantile(drawn, 0.025), quantile(drawn, 0.975))


def matched(a_KD: Tensor, b_KD: Tensor) -> float:
    """Share of the vectors (K, D) of each run that have a match in the other, |cosine| above `SAME`; mean of both directions."""
    if not len(a_KD) or not len(b_KD):
        return float("nan")
    close = (a_KD @ b_KD.T).abs() > SAME
    return float((close.any(1).float().mean() + close.any(0).float().mean()) / 2)


def jaccard(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> float:
    """Jaccard similarity of the tokens that two runs' first five changes promote, at most a hundred each."""
    x, y = ({token.strip().casefold() for one in read[:FIRST] for token in one} for read in (a, b))
    return len(x & y) / len(x | y) if x | y else float("nan")


def roc(positive: Sequence[float], negative: Sequence[float]) -> list[tuple[float, float]]:
    """The ROC curve: (share of nulls claimed, share of fine-tuned models found) as the threshold falls."""
    steps = [float("inf"), *sorted({*positive, *negative}, reverse=True)]
    return [
        (sum(v >= least for v in negative) / len(negative), sum(v >= least for v in positive) / len(positive))
        for least in steps
    ]


def split(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells of fine-tuned models, and those of nulls."""
    return [c for c in cells if not c.is_null], [c for c in cells if c.is_null]


STATISTICS: dict[str, Callable[[Cell], float]] = {
    "score": lambda c: c.score / max(c.null, 1e-9),
    "gap": lambda c: c.gap,
}
"""Statistics by which a run may count as a detection."""


def bound_for(cell: Cell, cells: Sequence[Cell], level: float = 0.05) -> float | None:
    """The gap that a cell must exceed, the bound that one more placebo of its method would stay below; None without placebos.

    A placebo is compared with the other placebos alone, whatever their seeds.
    """
    others = [
        c for c in cells if c.method == cell.method and is_placebo(c) and (c.tune != cell.tune or not is_placebo(cell))
    ]
    return prediction_bound([c.gap for c in others if c.gap > 0], level) if others else None


def is_placebo(cell: Cell) -> bool:
    """Whether the model was fine-tuned on the base model's own answers."""
    return cell.tune.partition("@")[0] == "placebo"


def behaviors_of(wanted: bool) -> set[str]:
    """Names of all wanted, or of all unwanted, behaviors."""
    return {b.name for o in organisms.every() for b in o.behaviors if b.wanted == wanted}


PAIRED: dict[str, Callable[[Cell], float | None]] = {
    "EV of difference": lambda c: c.ev_delta,
    "behaviors named": lambda c: sum(map(bool, c.named.values())) / len(c.named) if c.named else None,
    "words@100 less decoys": lambda c: (
        own[0] - own[1] if (own := own_and_decoys(shares(c.read[:FIRST]), c.tune)) and c.named else None
    ),
    "unwanted left": lambda c: (
        sum(left) / len(left)
        if c.undone and (left := [rate for name, rate in c.undone.after.items() if name in behaviors_of(wanted=False)])
        else None
    ),
}
"""Measures on which two methods are compared model by model; None where a cell lacks one."""
