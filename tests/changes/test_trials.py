"""What decides on a change: necessity and sufficiency together, among the same controls."""

from __future__ import annotations

import numpy as np
import pytest

from tunediff.changes.trials.patch import BOTH, both_ways, decide
from tunediff.models.divergences import Divergence

GAP = Divergence([4.0, 6.0], [10, 10])
SAID = "{need:.0%} and {enough:.0%}"


def left(share: float) -> Divergence:
    """The gap after `share` of it was closed in every document."""
    return Divergence([nats * (1 - share) for nats in GAP.nats], GAP.tokens)


def tried(own: tuple[float, float], controls) -> list:
    pairs = ((left(need), left(enough)) for need, enough in controls)
    return both_ways((left(own[0]), left(own[1])), pairs, GAP, "share of KL", "controls", 0)


def test_measures_are_shares_of_the_gap_beside_the_same_controls():
    need, enough, both = tried((0.5, 0.3), [(0.1, 0.0), (0.6, -0.4), (0.0, 0.35)])
    assert (need.value, enough.value, both.value) == pytest.approx((0.5, 0.3, 0.4))
    assert (need.p, enough.p, both.p) == (0.5, 0.5, 0.25), "no control does as much both ways"
    assert both.name == BOTH and both.control < 0.4 and "3 controls" in both.against


def test_a_change_that_does_one_thing_only_is_not_confirmed():
    few = [(0.0, 0.0)] * 60
    assert decide(tried((0.5, 0.3), few), 0.05, SAID, "controls")[0] is True
    speaks, reason = decide(tried((0.5, -0.1), few), 0.05, SAID, "controls")
    assert speaks is None and "sufficiency may be 0" in reason
    speaks, reason = decide(tried((0.5, 0.3), [(0.6, 0.4)] * 60), 0.05, SAID, "controls")
    assert speaks is False and reason == "controls do as much"
    assert decide(tried((-0.1, 0.9), few), 0.05, SAID, "controls")[0] is False, "taking it out closes nothing"


def test_a_random_direction_is_confirmed_no_more_often_than_the_level_says():
    """Among controls of its own kind, whose two sides go together, in part, as those of the demo do."""
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(400):
        draws = rng.multivariate_normal([0.2, 0.2], [[1e-3, 3e-4], [3e-4, 1e-3]], size=100)
        passed += decide(tried(tuple(draws[0]), draws[1:]), 0.05, SAID, "controls")[0] is True
    assert 0.01 <= passed / 400 <= 0.05


def test_what_was_chosen_for_its_necessity_has_to_stand_out_in_sufficiency():
    """The first of many random directions has a high necessity by choice, and an ordinary sufficiency."""
    rng = np.random.default_rng(1)
    controls = np.stack([rng.normal(0.1, 0.02, 100), rng.normal(0.1, 0.02, 100)], 1)
    speaks, reason = decide(tried((0.3, 0.11), controls), 0.05, SAID, "controls")
    assert speaks is None and "does not stand out" in reason
    assert decide(tried((0.13, 0.3), controls), 0.05, SAID, "controls")[0] is True, "necessity need not be the best"
