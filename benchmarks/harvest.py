"""Measure the tokens a second at which both models' streams are read: tunediff against Hugging Face and nnsight.

All read the same chats with the shipped base and fine-tuned model, in float32, at one layer, in turns within each
round. The result is the ratio of times within a round. The rivals run what a user would write: two whole models, the
adapter merged, all tokens. Hugging Face returns `output_hidden_states`; nnsight saves the layer's output and stops the
forward pass there. If nnsight is not installed, the result says so.

    python benchmarks/harvest.py [--site resid.15] [--rounds 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from tunediff.core.axes import BASE, TUNED
from tunediff.models.pair import Pair
from tunediff.models.shipped import DEMO
from tunediff.records.site import Site
from tunediff.texts.corpus import Corpus


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
    # Two whole models of their own, as Hugging Face makes them.
    base = Pair.load("default", "default", allow_identical=True).base.network
    merged = Pair.load("default", str(DEMO)).tuned.module.merge_and_unload()
    documents = tuple(d for d in Corpus.prompts().documents[:64] if d.is_open)
    tokens = Corpus("prompts", documents).tokens(pair.tokenizer, row_tokens=512)
    batches = list(tokens.batches(2048))

    def naive() -> torch.Tensor:
        out = []
        with torch.inference_mode():
            for batch in batches:
                both = [
                    m(input_ids=batch.ids_BT, output_hidden_states=True, use_cache=False).hidden_states[site.layer + 1]
                    for m in (base, merged)
                ]
                out.append(torch.stack(both, 2)[batch.mask_BT])
        return torch.cat(out)

    def by_nnsight() -> torch.Tensor:
        out = []
        with torch.inference_mode():
            for batch in batches:
                both = []
                for model in traced:
                    with model.trace(input_ids=batch.ids_BT, use_cache=False) as tracer:
                        stream = model.model.layers[site.layer].output.save()
                        tracer.stop()
                    both.append(stream[0] if isinstance(stream, tuple) else stream)
                out.append(torch.stack(both, 2)[batch.mask_BT])
        return torch.cat(out)

    try:
        from nnsight import NNsight

        traced = [NNsight(base), NNsight(merged)]
    except ImportError:
        traced = []

    def ours() -> torch.Tensor:
        with pair.running():  # as the harvest's stage does
            return torch.cat([pair.both_streams(batch.ids_BT, [site])[:, :, 0][batch.mask_BT] for batch in batches])

    def timed(run) -> tuple[float, torch.Tensor]:
        began = time.perf_counter()
        got = run()
        return time.perf_counter() - began, got

    contenders = {"naive": naive, **({"nnsight": by_nnsight} if traced else {}), "ours": ours}
    rounds: list[dict[str, float]] = []
    error = {}
    for number in range(given.rounds + 1):
        took, streams = {}, {}
        for name, run in contenders.items():
            took[name], streams[name] = timed(run)
        delta = streams["naive"][:, TUNED] - streams["naive"][:, BASE]
        error = {name: float((s[:, TUNED] - s[:, BASE] - delta).norm() / delta.norm()) for name, s in streams.items()}
        if number:  # the first round warms up
            rounds.append(took)

    def spread(name: str) -> dict[str, float]:
        ratios = sorted(took[name] / took["ours"] for took in rounds)
        return {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]}

    count = tokens.count
    result = {
        "site": given.site,
        "tokens": count,
        "rounds": given.rounds,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "nnsight": importlib.metadata.version("nnsight") if traced else "not installed",
        "tokens_per_second": {name: count / statistics.median(took[name] for took in rounds) for name in contenders},
        "ratio": {name: spread(name) for name in contenders if name != "ours"},
        "relative_error_of_delta": error,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
