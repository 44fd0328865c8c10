"""The contracts, asked of every finder, trial and edit operation that is found, from one place.

The pair is a tiny random llama whose tune writes a known direction where capital letters occur, among random
changes of everything else. A new file in finders/ or trials/ is asked without a word here.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from pathlib import Path

import planted_pairs
import pytest
import tiny_models
import torch
from planted_pairs import SITE, Planted
from torch.nn.functional import cosine_similarity

from tunediff import dictionaries
from tunediff.changes.attributions import Shift, output_shift
from tunediff.changes.finders.base import Found, View
from tunediff.changes.rankings import Ranking, RankSettings, rank
from tunediff.changes.trial_bench import Spread, TrialBench, trial_bench
from tunediff.changes.trials.base import Outcome, VerifySettings
from tunediff.core import variants
from tunediff.core.axes import BASE, TUNED
from tunediff.dictionaries.schedule import FitSettings
from tunediff.edits import edit as edit_module
from tunediff.edits import reverting as reverting_module
from tunediff.edits.baking import merged
from tunediff.edits.edit import Edit, EditSettings, scaling
from tunediff.edits.reverting import Moments, input_moments, random_directions, reverting
from tunediff.harvests.harvest import Harvest
from tunediff.harvests.samples import Sample, batches_of
from tunediff.models.divergences import kl_divergence, log_probabilities
from tunediff.models.pair import Pair
from tunediff.records.change import Change, load_changes, save_changes
from tunediff.records.site import Site


def of_streams(package: str) -> list[str]:
    """The variants whose changes are of streams; those of changes at the output are asked in `test_outputs`."""
    return [name for name in variants.names(package) if not variants.load(package, name).at_output]


FINDERS = of_streams("tunediff.changes.finders")
CONTROLS = [name for name in FINDERS if variants.load("tunediff.changes.finders", name).control]
SEEKERS = [name for name in FINDERS if name not in CONTROLS]
TRIALS = of_streams("tunediff.changes.trials")
VERIFY = VerifySettings(draws=39, documents=5, scored=40)
"""Only the strongest documents: a direction that is read everywhere takes away as much noise as it has found in the others."""
RANK = RankSettings(null_tokens=1000, effect_tokens=1000)
DEPTHS = [Site(layer) for layer in range(SITE.layer - 1, SITE.layer + 2)]
NULLS = 6


class Lab:
    """One harvested pair, and what finders, ranking and trials say of it, each asked once."""

    def __init__(self, root: Path, pair: Pair, tokens, harvest: Harvest):
        self.root, self.pair, self.tokens, self.harvest = root, pair, tokens, harvest
        self.asked_for_shift: set[str] = set()
        self.sample = Sample.take(harvest, tokens, split="held_out", limit=10**6, seed=0)
        self.seen = Sample.take(harvest, tokens, split="train", limit=10**6, seed=0)
        self.found, self.shift = cache(self.found), cache(self.shift)
        self.ranking, self.outcome = cache(self.ranking), cache(self.outcome)

    def found(self, finder: str, again: int = 0) -> Found:
        view = View(
            self.harvest,
            self.root / f"{finder}-{again}",
            0,
            12,
            dictionaries.spec("delta", latents=48, k_shared=4.0, k_delta=4.0),
            FitSettings(steps=250, batch=256, learning_rate=3e-3),
            lambda: self.shift(finder),
            self.pair,
        )
        return variants.load("tunediff.changes.finders", finder)().find(view)

    def shift(self, asker: str) -> Shift:
        """How far and where the output moves at every training token, as a real run finds it."""
        self.asked_for_shift.add(asker)
        train = Sample.take(self.harvest, self.tokens, split="train", limit=10**9, seed=0)
        shift = Shift.none(len(self.harvest.token_N))
        shift.put(train.token_N, output_shift(self.pair, SITE, train, RANK.batch_tokens))
        return shift.at(self.harvest.index("train"))

    def ranking(self, finder: str) -> Ranking:
        return rank(self.pair, self.found(finder).changes, self.sample, self.seen, RANK, 0, depths=DEPTHS)

    def bench(self, change: Change, others: list[Change]) -> TrialBench | None:
        delta_ND = self.sample.streams_NSMD[:, 0, TUNED] - self.sample.streams_NSMD[:, 0, BASE]
        return trial_bench(self.pair, change, others, self.sample, Spread.of(delta_ND), VERIFY, 0)

    def outcome(self, finder: str, trial: str) -> Outcome | None:
        """Of the finder's best change; None if there is nothing to try."""
        ranked = self.ranking(finder).ranked
        bench = self.bench(ranked[0].change, self.found(finder).changes) if ranked else None
        return variants.load("tunediff.changes.trials", trial)().run(bench, VERIFY) if bench else None


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Planted:
    return planted_pairs.planted(tmp_path_factory.mktemp("planted") / "harvest")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, planted) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"), planted.pair, planted.tokens, planted.harvest)


def lab_of(root: Path, pair: Pair, tokens) -> Lab:
    return Lab(root, pair, tokens, planted_pairs.harvested(pair, tokens, root / "harvest"))


@pytest.fixture(scope="module")
def identical(tmp_path_factory, planted) -> Lab:
    root = tmp_path_factory.mktemp("identical")
    folder = tiny_models.save(root / "base", tiny_models.module("llama"))
    return lab_of(root, Pair.load(folder, folder, allow_identical=True), planted.tokens)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory, planted) -> Lab:
    pair = planted.pair
    swapped = replace(
        pair,
        base=pair.tuned,
        tuned=pair.base,
        base_fingerprint=pair.tuned_fingerprint,
        tuned_fingerprint=pair.base_fingerprint,
    )
    return lab_of(tmp_path_factory.mktemp("mirrored"), swapped, planted.tokens)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory, planted) -> Lab:
    order = torch.randperm(len(planted.tokens.rows), generator=torch.Generator().manual_seed(1)).tolist()
    names = ("rows", "document_R", "start_R", "prompt_R")
    tokens = replace(planted.tokens, **{n: tuple(getattr(planted.tokens, n)[r] for r in order) for n in names})
    return lab_of(tmp_path_factory.mktemp("shuffled"), planted.pair, tokens)


@pytest.fixture(scope="module")
def random_tunes(tmp_path_factory, planted) -> list[Lab]:
    """Tunes with nothing to find: every map moved in a random direction."""
    network = tiny_models.module("llama")
    root = tmp_path_factory.mktemp("random")
    tunes = [tiny_models.tuned_copy(network, planted_pairs.BACKGROUND, seed=100 + n) for n in range(NULLS)]
    return [lab_of(root / str(n), planted_pairs.pair_of(network, t), planted.tokens) for n, t in enumerate(tunes)]


@pytest.fixture(params=FINDERS)
def finder(request) -> str:
    return request.param


@pytest.fixture(params=SEEKERS)
def seeker(request) -> str:
    return request.param


def claim(change: Change, streams_NSMD: torch.Tensor) -> torch.Tensor:
    """What a change says it accounts for of the difference, (N, S, D)."""
    return change.strength(streams_NSMD)[:, None, None] * change.difference_SD


# 1 Null


def test_a_model_against_itself_gives_no_standing_change(identical, finder):
    assert all(r.p > 0.05 for r in identical.ranking(finder).ranked)
    for trial in TRIALS:
        outcome = identical.outcome(finder, trial)
        assert outcome is None or outcome.speaks is not True


def test_random_tunes_stand_out_no_more_often_than_the_level_says(random_tunes, finder):
    """A readout that looks at the difference itself goes along with any difference; the nulls must, too."""
    standing = [any(r.p <= 0.05 for r in lab.ranking(finder).ranked) for lab in random_tunes]
    assert sum(standing) <= 2, standing


# 2 Planted


def test_the_planted_change_comes_first(lab, planted, seeker):
    best = lab.ranking(seeker).ranked[0]
    # A direction that is on everywhere has no tokens of its own on which to stand out from a random tune's best one.
    dense = best.change.threshold == float("-inf") and bool(best.change.rows_SMD.any())
    assert dense or best.p <= 0.05
    assert abs(cosine_similarity(best.change.difference_SD[0], planted.direction_D, dim=0)) > 0.7
    assert best.score.low <= best.score.value <= best.score.high
    ((below, here, above),) = best.depth.only(places=[str(site) for site in DEPTHS]).values
    assert 2 * below < here <= 1 and above > 2 * below, best.depth


@pytest.mark.parametrize("trial", TRIALS)
def test_trials_speak_for_the_planted_change(lab, seeker, trial):
    outcome = lab.outcome(seeker, trial)
    assert outcome.speaks is True, outcome.reason
    assert outcome.reason and all(m.control is not None or m.against for m in outcome.measures)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_stands_out_no_more_often_than_the_level_says(lab, control):
    """Though the planted change is most of the difference, so that its random directions lie near it."""
    ranked = lab.ranking(control).ranked
    assert len(ranked) == 12 and not any(r.p <= RANK.level for r in ranked)


@pytest.mark.parametrize("control", CONTROLS)
def test_patching_a_control_speaks_no_more_often_than_the_level_says(lab, control):
    """Taking out any coordinate of the difference brings tuned nearer to base; a control's takes out no more than others do."""
    changes = lab.found(control).changes
    patch = variants.load("tunediff.changes.trials", "patch")()
    speaks = [patch.run(lab.bench(change, changes), VERIFY).speaks is True for change in changes]
    assert sum(speaks) <= 2, speaks


# 3 Mirror


def test_mirroring_a_change_mirrors_its_share_and_claim(lab, finder):
    x_NSMD = lab.sample.streams_NSMD
    for change in lab.found(finder).changes:
        other = change.mirrored()
        assert other.share == pytest.approx(1 - change.share, abs=1e-6)
        torch.testing.assert_close(claim(other, x_NSMD.flip(2)), -claim(change, x_NSMD))
        assert torch.equal(other.mirrored().write_SMD, change.write_SMD)


def test_swapped_models_give_the_mirrored_finding(lab, mirrored, finder):
    x_NSMD = lab.sample.streams_NSMD
    one, other = lab.found(finder), mirrored.found(finder)
    # Gradient descent does not mirror to the bit, and KL(tuned || base), which the shift is made of, is another number
    # the other way round: of finders that use either, the best change mirrors, in what it claims.
    if one.fits or finder in lab.asked_for_shift:
        mine = claim(lab.ranking(finder).ranked[0].change.mirrored(), x_NSMD.flip(2)).flatten()
        best = max(float(cosine_similarity(claim(c, x_NSMD.flip(2)).flatten(), mine, dim=0)) for c in other.changes)
        assert best > 0.8
        return
    assert len(one.changes) == len(other.changes)
    for a, b in zip(one.changes, other.changes):
        torch.testing.assert_close(claim(b, x_NSMD.flip(2)), claim(a.mirrored(), x_NSMD.flip(2)), atol=1e-4, rtol=1e-3)


# 4 Order


def test_the_order_of_rows_changes_no_change(lab, shuffled, planted, finder):
    one, other = lab.found(finder), shuffled.found(finder)
    if one.fits:  # the order of tokens is the order of descent: the direction is the same, not the numbers
        best = shuffled.ranking(finder).ranked[0].change
        assert abs(cosine_similarity(best.difference_SD[0], planted.direction_D, dim=0)) > 0.7
        return
    assert [c.id for c in one.changes] == [c.id for c in other.changes]
    for a, b in zip(one.changes, other.changes):
        torch.testing.assert_close(a.rows_SMD, b.rows_SMD, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(a.write_SMD, b.write_SMD, atol=1e-4, rtol=1e-3)
        assert a.bias == pytest.approx(b.bias, abs=1e-4)


# 5 Undo, 6 Toward base


def revert(planted: Planted, on_R=None, energy_of: Edit | None = None, strength: float = 1.0) -> Edit:
    """The revert of the planted change, with moments from training text; `on_R` says where it is on."""
    return reverting(
        planted.pair, "planted", ["planted"], moments(planted, on_R), EditSettings(strength=strength), energy_of
    )


def moments(planted: Planted, on_R=None) -> dict[str, Moments]:
    on_R, rows = on_R or planted.on_R(), planted.rows("train")
    (found,) = input_moments(
        planted.pair.tuned, planted.pair.deltas(), planted.tokens.select("train"), [[on_R[r] for r in rows]]
    )
    return found


OPERATIONS = {
    "reverting": revert,
    "random_directions": lambda planted: random_directions(
        planted.pair, "random", moments(planted), revert(planted), 0
    ),
    "scaling": lambda planted: scaling(planted.pair, 0.5),
}
"""Every function of `tunediff.edits` that makes an edit, with what it takes here."""


def test_every_operation_is_asked():
    makers = [
        n
        for module in (edit_module, reverting_module)
        for n, f in inspect.getmembers(module, inspect.isfunction)
        if f.__module__ == module.__name__ and f.__annotations__.get("return") in ("Edit", Edit)
    ]
    assert sorted(makers) == sorted(OPERATIONS)


def logits(model, planted) -> torch.Tensor:
    ids_BT = torch.tensor([row[:32] for row in planted.tokens.rows[:8]])
    return model.logits(model.states(ids_BT))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_edits_leave_no_trace(planted, operation):
    edit = OPERATIONS[operation](planted)
    pair = planted.pair
    weights = {n: p.detach().clone() for n, p in pair.tuned.module.named_parameters()}
    before, base = logits(pair.tuned, planted), logits(pair.base, planted)
    with edit.on(pair.tuned) as edited:
        inside = logits(edited, planted)
        assert not torch.equal(inside, before)
        assert torch.equal(logits(pair.tuned, planted), before)
    applied = edit.applied(pair.tuned)
    assert torch.equal(logits(applied, planted), inside)
    assert torch.equal(logits(pair.tuned, planted), before) and torch.equal(logits(pair.base, planted), base)
    assert all(torch.equal(p, weights[n]) for n, p in pair.tuned.module.named_parameters())


@pytest.mark.parametrize("operation", OPERATIONS)
def test_edits_that_break_off_leave_no_trace(planted, operation, monkeypatch):
    edit, tuned = OPERATIONS[operation](planted), planted.pair.tuned
    before = logits(tuned, planted)
    edited = edit.applied(tuned)

    def broken(*anything):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(edited, "_forward", broken)
    with pytest.raises(RuntimeError), edit.on(tuned):
        logits(edited, planted)
    assert torch.equal(logits(tuned, planted), before)


def test_writing_leaves_no_trace(planted):
    tuned = planted.pair.tuned
    before = logits(tuned, planted)
    with tuned.writing(SITE, lambda stream: stream + planted.direction_D):
        assert not torch.equal(logits(tuned, planted), before)
    assert torch.equal(logits(tuned, planted), before)
    with pytest.raises(ValueError), tuned.writing(SITE, lambda stream: stream):
        raise ValueError
    assert torch.equal(logits(tuned, planted), before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_baked_edit_equals_the_live_one(planted, operation):
    edit, tuned = OPERATIONS[operation](planted), planted.pair.tuned
    assert all(v.dtype == p.dtype and v.shape == p.shape for p, v in edit.parameters(tuned).items())
    side = planted_pairs.side(merged(planted.pair, edit), tuned.tokenizer, "baked")
    assert torch.equal(logits(side, planted), logits(edit.applied(tuned), planted))


def gap(planted: Planted, model, on: bool) -> float:
    """Mean KL(model || base) over held-out tokens where the planted change is on, or where it is not."""
    on_R, total, count = planted.on_R(), 0.0, 0
    pair = planted.pair
    for batch in batches_of(planted.tokens, planted.rows("held_out"), 2048):
        chosen = torch.zeros_like(batch.mask_BT)
        for b, row in enumerate(batch.rows_B.tolist()):
            chosen[b, : len(on_R[row])] = on_R[row].bool() == on
        p, q = (log_probabilities(m, batch.ids_BT, chosen, pair.vocabulary) for m in (model, pair.base))
        total, count = total + float(kl_divergence(p, q).sum()), count + int(chosen.sum())
    return total / count


def elsewhere(planted: Planted, seed: int) -> list[torch.Tensor]:
    """As many tokens as the planted change is on at, but any."""
    on_R = planted.on_R()
    flat = torch.cat(on_R)
    flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))]
    return list(flat.split([len(on) for on in on_R]))


def test_reverting_moves_toward_base_where_the_change_is_on(planted):
    """Edits aimed at as many random tokens do so less; at equal energy they take other text with them."""
    tuned = planted.pair.tuned
    before = {on: gap(planted, tuned, on) for on in (True, False)}

    def closed(edit: Edit) -> dict[bool, float]:
        return {on: 1 - gap(planted, edit.applied(tuned), on) / before[on] for on in before}

    edit = revert(planted, strength=0.3)
    own = closed(edit)
    assert own[True] > 0.4 and own[True] > own[False] + 0.2
    for seed in range(3):
        aimed = elsewhere(planted, seed)
        assert closed(revert(planted, aimed, strength=0.3))[True] < own[True]
        equal = closed(revert(planted, aimed, energy_of=edit, strength=0.3))
        assert equal[False] > own[False] and equal[True] - equal[False] < own[True] - own[False]


# 7 Round trip


def test_saved_and_loaded_changes_read_the_same_numbers(lab, finder, tmp_path):
    changes = lab.found(finder).changes
    save_changes(tmp_path, changes)
    again = load_changes(tmp_path)
    assert len(again) == len(changes) > 0
    for a, b in zip(changes, again):
        assert (a.id, a.sites, a.bias, a.threshold, a.finder, a.share) == (
            b.id,
            b.sites,
            b.bias,
            b.threshold,
            b.finder,
            b.share,
        )
        assert torch.equal(lab.sample.strength(a), lab.sample.strength(b))
        assert torch.equal(a.difference_SD, b.difference_SD)


# 8 Outside judge


def auc(a_ND: torch.Tensor, b_ND: torch.Tensor, document_N: torch.Tensor) -> float:
    """How well a logistic regression tells b from a on documents it was not fitted to."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import StandardScaler

    fitted = document_N.unique(return_inverse=True)[1] % 2 == 0
    scaler = StandardScaler().fit(torch.cat([a_ND, b_ND]))

    def both(where):
        x = scaler.transform(torch.cat([a_ND[where], b_ND[where]]))
        return x, [0] * int(where.sum()) + [1] * int(where.sum())

    judge = LogisticRegression(C=0.1, max_iter=500).fit(*both(fitted))
    x, y = both(~fitted)
    return roc_auc_score(y, judge.predict_proba(x)[:, 1])


def test_an_outside_judge_cannot_tell_edited_from_base(tmp_path):
    """At the site and where the change is on, after taking the planted change out as patching does.

    The tune did little else here, or the judge would rightly see that.
    """
    planted = planted_pairs.planted(tmp_path / "harvest", background=0.02)
    lab, d = Lab(tmp_path, planted.pair, planted.tokens, planted.harvest), planted.direction_D
    change = Change(
        "planted",
        (SITE,),
        torch.stack([-d, d])[None],
        torch.stack([torch.zeros_like(d), d])[None],
        0.0,
        float("-inf"),
        "nobody",
    )
    x_NSMD = lab.sample.streams_NSMD
    on = torch.cat([planted.on_R()[row] for row in lab.sample.rows]).bool()
    base, tuned = x_NSMD[:, 0, BASE], x_NSMD[:, 0, TUNED]
    edited = tuned - claim(change, x_NSMD)[:, 0]
    document_N = lab.sample.document_N[on]
    assert auc(base[on], tuned[on], document_N) > 0.8
    assert auc(base[on], edited[on], document_N) < 0.6


# 9 Determinism


def test_twice_the_same_bytes(lab, finder, tmp_path):
    for again in (0, 1):
        save_changes(tmp_path / str(again), lab.found(finder, again).changes)
    for name in ("changes.json", "changes.safetensors"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_ranking_twice_says_the_same(lab, finder):
    one, other = (
        lab.ranking(finder),
        rank(lab.pair, lab.found(finder).changes, lab.sample, lab.seen, RANK, 0, depths=DEPTHS),
    )
    assert [(r.change.id, r.p, r.score, r.effect, r.null) for r in one.ranked] == [
        (r.change.id, r.p, r.score, r.effect, r.null) for r in other.ranked
    ]
