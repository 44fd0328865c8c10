"""The scan: which layers are looked at."""

from __future__ import annotations

import pytest

from tunediff.harvests.scans import candidate_sites


@pytest.mark.parametrize(
    ("depth", "lowest", "layers"),
    [
        (30, 0, [5, 10, 14, 19, 23, 28]),
        (30, 5, [5, 10, 14, 19, 23, 28]),
        (30, 10, [10, 14, 17, 21, 24, 28]),  # the organisms that ship
        (30, 28, [28]),
        (30, 29, [29]),
        (30, None, [5, 10, 14, 19, 23, 28, 29]),
        (3, 1, [1]),
        (3, 2, [2]),
        (1, 0, [0]),
    ],
)
def test_layers_run_from_where_weights_differ_and_to_the_last_only_where_no_other_does(depth, lowest, layers):
    assert [site.layer for site in candidate_sites(depth, 6, lowest)] == layers
