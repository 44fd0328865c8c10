"""Measure what each on-disk format of a harvest costs: bytes, error of the streams, and effect on a fitted dictionary.

The demo's text is harvested once in each format, and the default dictionary is fitted to each. Each fit is compared
with the fit of the float32 store. As a reference, the float32 store is also fitted with another seed: a format whose
effect is smaller than the seed's costs nothing.

    python benchmarks/stores.py [--tuned demo] [--run runs/demo]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunediff.core.axes import BASE, TUNED
from tunediff.dictionaries.architectures.base import delta_of
from tunediff.dictionaries.fitted import Fitted
from tunediff.dictionaries.fitting import fit
from tunediff.dictionaries.sources import HELD_OUT
from tunediff.harvests.harvest import Harvest, harvest
from tunediff.harvests.stores import STORES
from tunediff.lab.scores import SAME, matched
from tunediff.runs.plan import Plan
from tunediff.runs.run import Run

FIRST = 32
"""Latents compared: those that write the most of the difference on held-out text."""


def error(got: Tensor, true: Tensor) -> float:
    """|got - true| / |true|, over all tokens."""
    return float((got - true).double().norm() / true.double().norm())


def writes(fitted: Fitted, source: Harvest) -> Tensor:
    """Unit vectors (FIRST, S * D) that the latents which write the most energy to the difference add to it."""
    code_NF = fitted.codes(source.read(HELD_OUT, torch.arange(source.count(HELD_OUT))))
    write_FI = delta_of(fitted.dictionary.write_FSMD().detach()).flatten(1)
    order = (code_NF.square().sum(0) * write_FI.square().sum(1)).argsort(descending=True)[:FIRST]
    return torch.nn.functional.normalize(write_FI[order], dim=1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="default")
    options.add_argument("--tuned", default="demo")
    options.add_argument("--run", type=Path, help="Folder of the run that holds the text; a temporary one if left out.")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stores.json")
    given = options.parse_args()
    plan = Plan(given.base, given.tuned)
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(measure(Run(plan, given.run or Path(scratch) / "run"), Path(scratch)))
    given.out.write_text(
        json.dumps(
            {
                "base": given.base,
                "tuned": given.tuned,
                "torch": torch.__version__,
                "rows": rows,
                "machine": f"{platform.machine()}, {platform.system()}",
            },
            indent=1,
        )
        + "\n"
    )


def measure(run: Run, scratch: Path) -> Any:
    """One row a format, float32 first, and one for another seed."""
    true: Tensor | None = None
    vectors: Tensor | None = None
    for store, seed in [*((store, run.plan.seed) for store in STORES), ("float32", run.plan.seed + 1)]:
        folder = scratch / store
        source = harvest(run.pair, run.tokens, run.sites, folder, dataclasses.replace(run.plan.harvest, store=store))
        tokens = torch.arange(source.count("all"))
        began = time.perf_counter()
        got = source.read("all", tokens)
        seconds = time.perf_counter() - began
        true = got if true is None else true
        fitted = fit(run.plan.spec(), source, dataclasses.replace(run.plan.fit, seed=seed))
        mine = writes(fitted, source)
        vectors = mine if vectors is None else vectors
        row = {
            "store": store,
            "seed": seed,
            "bytes_a_token": sum(p.stat().st_size for p in folder.glob("shard-*")) / len(source.token_N),
            "read_tokens_per_second": len(tokens) / seconds,
            "error_base": error(got[:, :, BASE], true[:, :, BASE]),
            "error_delta": error(got[:, :, TUNED] - got[:, :, BASE], true[:, :, TUNED] - true[:, :, BASE]),
            "ev_delta": float(fitted.quality.ev_delta),
            f"first_{FIRST}_matched_above_{SAME}": matched(mine, vectors),
        }
        print(
            "  ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )
        yield row


if __name__ == "__main__":
    main()
