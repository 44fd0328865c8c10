"""Tokens a second of reading both models' streams: ours against plain Hugging Face forwards with `output_hidden_states`.

Both read the same chats of the embedded default and the tune that ships, in float32, at one layer, interleaved; the figure is
the ratio of one round's times. The rival is what one would write: two whole models, the tune merged, all tokens, all blocks.

    python benchmarks/harvest.py [--site resid.15] [--rounds 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from tunediff.axes import BASE, TUNED
from tunediff.corpora import Corpus
from tunediff.pairs import Pair
from tunediff.sites import Site
from tunediff.stages import DEMO


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--site", default="resid.15")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "harvest.json")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    site = Site.parse(given.site)
    pair = Pair.load("default", str(DEMO))
    base = Pair.load("default", "default", allow_identical=True)  # two whole models of their own
    merged = Pair.load("default", str(DEMO)).tuned.module.merge_and_unload()
    documents = tuple(d for d in Corpus.prompts().documents[:64] if d.is_open)
    tokens = Corpus("prompts", documents).tokens(pair.tokenizer, row_tokens=512)
    batches = list(tokens.batches(2048))

    def naive() -> torch.Tensor:
        out = []
        with torch.inference_mode():
            for batch in batches:
                both = [m(input_ids=batch.ids_BT, output_hidden_states=True, use_cache=False).hidden_states[site.layer + 1]
                        for m in (base.base.network, merged)]
                out.append(torch.stack(both, 2)[batch.mask_BT])
        return torch.cat(out)

    def ours() -> torch.Tensor:
        return torch.cat([pair.both_streams(batch.ids_BT, [site])[:, :, 0][batch.mask_BT] for batch in batches])

    def timed(run) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        got = run()
        return time.perf_counter() - began, got

    rounds, error = [], 0.0
    for number in range(given.rounds + 1):
        slow, theirs = timed(naive)
        fast, mine = timed(ours)
        delta = theirs[:, TUNED] - theirs[:, BASE]
        error = float((mine[:, TUNED] - mine[:, BASE] - delta).norm() / delta.norm())
        if number:  # the first round warms up
            rounds.append((slow, fast))
    ratios = sorted(slow / fast for slow, fast in rounds)
    count = tokens.count
    result = {
        "site": given.site, "tokens": count, "rounds": given.rounds, "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}", "torch": torch.__version__,
        "tokens_per_second": {"naive": count / statistics.median(s for s, _ in rounds), "ours": count / statistics.median(f for _, f in rounds)},
        "ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
        "relative_error_of_delta": error,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
