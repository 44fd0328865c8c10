"""Measure how time and memory of harvest and fit grow with tokens, latents F, width n and k.

Tokens go up to ten times those of a default run. Each point is measured in its own process, on a small random network
and random activations. The result is the exponent b of cost = a * x^b, fitted to each series by least squares of
logarithms. Memory is the process's peak less its size at the start. `seconds` are CPU seconds of all threads, which a
busy machine disturbs less than wall-clock time.

    python benchmarks/scaling.py [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

SERIES: dict[str, tuple[str, list[int]]] = {
    "harvest, tokens": ("tokens", [20_000, 50_000, 100_000, 200_000]),
    "fit, tokens": ("tokens", [20_000, 50_000, 100_000, 200_000]),
    "fit, F": ("latents", [1024, 2048, 4096, 8192]),
    "fit, n": ("width", [128, 256, 512, 1024]),
    "fit, k": ("k", [8, 16, 32, 64]),
}
"""What is varied over which values; 20,000 tokens are about those of a default run. The rest stays at `STAYS`."""
STAYS = {"tokens": 20_000, "latents": 2048, "width": 256, "k": 16}
STEPS = 60


def held() -> float:
    """Most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def harvest_of(tokens: int, width: int, folder: Path) -> Any:
    """What is timed: a harvest of so many tokens by two random networks of 4 blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunediff.harvests.harvest import HarvestSettings, harvest
    from tunediff.models.fingerprints import fingerprint
    from tunediff.models.network import LanguageModel
    from tunediff.models.pair import Pair
    from tunediff.records.site import Site
    from tunediff.texts.document import Document
    from tunediff.texts.tokens import Tokens

    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * width,
    )
    sides = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        sides.append(LanguageModel(LlamaForCausalLM(config).eval().requires_grad_(False), None, f"random {seed}"))
    pair = Pair(*sides, False, 1000, *(fingerprint(side.network) for side in sides))
    count = tokens // 100
    rows = torch.randint(0, 1000, (count, 100), generator=torch.Generator().manual_seed(2)).tolist()
    documents = tuple(Document(f"d{i}", "random", text="x") for i in range(count))
    text = Tokens(
        documents=documents,
        held_out=tuple(i % 5 == 0 for i in range(count)),
        rows=tuple(map(tuple, rows)),
        document_R=tuple(range(count)),
        start_R=(0,) * count,
        prompt_R=(0,) * count,
        pad_id=0,
    )
    return lambda: harvest(pair, text, [Site(2)], folder, HarvestSettings())


def fit_of(tokens: int, latents: int, width: int, k: int) -> Any:
    """What is timed: so many steps of the default dictionary on random activations."""
    import torch

    from tunediff import dictionaries
    from tunediff.dictionaries.fitting import fit
    from tunediff.dictionaries.schedule import FitSettings
    from tunediff.dictionaries.sources import TensorSource

    rng = torch.Generator().manual_seed(0)
    x_NMD = torch.randn(tokens, 2, width, generator=rng)
    source = TensorSource(x_NMD, x_NMD[:2000].clone())
    spec = dictionaries.spec("delta", latents=latents, k_shared=k // 2, k_delta=k // 2)
    return lambda: fit(spec, source, FitSettings(steps=STEPS, batch=1024))


def point(series: str, sizes: dict[str, int], threads: int) -> dict[str, float]:
    """One measurement; the first, small one of the same kind warms up what is made once."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:

        def job(where: str, **changed: int) -> Any:
            given = {**sizes, **changed}
            if series.startswith("harvest"):
                return harvest_of(given["tokens"], given["width"], Path(scratch) / where)
            return fit_of(**given)

        job("warm", tokens=4000)()
        run = job("timed")
        before, began = held(), time.process_time()
        run()
        return {"seconds": time.process_time() - began, "mib": held() - before}


def exponent(xs: list[int], ys: list[float]) -> float:
    """b of y = a * x^b by least squares of logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / sum((a - mean_u) ** 2 for a in u)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    given = options.parse_args()
    result: dict[str, Any] = {
        "threads": given.threads,
        "machine": f"{platform.machine()}, {platform.system()}",
        "steps": STEPS,
        "stays": STAYS,
        "series": {},
    }
    print(f"{'series':<18}{'x':>9}{'CPU s':>9}{'MiB':>9}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for series, (varied, values) in SERIES.items():
            rows = []
            for value in values:
                rows.append({varied: value, **pool.apply(point, (series, {**STAYS, varied: value}, given.threads))})
                print(f"{series:<18}{value:>9,}{rows[-1]['seconds']:>9.2f}{rows[-1]['mib']:>9.0f}", flush=True)
            fitted = {name: exponent(values, [row[name] for row in rows]) for name in ("seconds", "mib")}
            print(f"{series:<18}{'exponent':>9}{fitted['seconds']:>9.2f}{fitted['mib']:>9.2f}", flush=True)
            result["series"][series] = {"points": rows, "exponents": fitted}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
