"""Print how often noise in one kind of parameters alone stands out from random tunes: ``python tools/null_parameters.py 20``.

For each kind, as many tiny pairs as asked for are made, and ranked against 19 random tunes at 5 %.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import null_pairs
import planted_pairs


def main(seeds: int, kinds: list[str]) -> None:
    """Print a row for each kind: pairs in which a candidate stands out, and the largest score of all."""
    tokens = null_pairs.text()
    claims, best = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0.0)
    for seed in range(seeds):
        for kind in kinds:
            base = null_pairs.network(null_pairs.KINDS[kind][0], seed)
            pair = planted_pairs.pair_of(base, null_pairs.noisy(base, kind, seed))
            with tempfile.TemporaryDirectory() as folder:
                ranked = null_pairs.ranking(pair, tokens, Path(folder) / "harvest")
            claims[kind] += null_pairs.standing(ranked) > 0
            best[kind] = max([best[kind], *(r.score.value for r in ranked.ranked)])
        print(f"{seed + 1} of {seeds}: {claims}", file=sys.stderr, flush=True)
    print("| noise in | pairs | stand out | largest score |\n|---|---|---|---|")
    for kind in kinds:
        print(f"| {kind} | {seeds} | {claims[kind]} | {best[kind]:.2g} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, sys.argv[2:] or list(null_pairs.KINDS))
