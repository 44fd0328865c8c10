"""Compare float32 products of linear layers on bfloat16 tiles with torch's: time, and error against float64.

Weights have the types that models are published in. Tiles split a bfloat16 weight into one part, a float16 or low-bit
quantized weight into two, and a float32 weight into three. Each shape has many weight matrices, as a model does, so
that none stays in a cache. They are tiled for each product, or kept as tiles. The script then runs both models of a
pair in float32 by torch, in float32 by tiles, and in float64. It reports the errors of the streams and of their
difference. The processor must support tiles.

    python benchmarks/products.py [--threads 2] [--rounds 9] [--base default] [--tuned demo]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core import pages
from tunediff.kernels.cpu import products as tiled
from tunediff.kernels.matmuls import fast_matmul
from tunediff.records.site import Site
from tunediff.runs.plan import Plan
from tunediff.runs.run import Run
from tunediff.texts.corpus import Corpus

SHAPES = (
    (64, 576, 1536), (256, 576, 1536), (1000, 576, 1536), (1000, 1536, 576), (1000, 576, 576), (256, 576, 49152),
    (1000, 2048, 8192),
)  # fmt: skip
"""Tokens, numbers in, numbers out."""
KINDS = ("bfloat16", "float16", "float32")
MEMORY = 1 << 28
"""Bytes of weights that a round goes through."""


def compare(tokens: int, inputs: int, outputs: int, kind: str, rounds: int) -> dict:
    """One shape and kind of weights, torch's product and ours in turns."""
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(tokens, inputs, generator=generator)
    some_OI = torch.randn(outputs, inputs, generator=generator)
    w_OI = some_OI.to(getattr(torch, kind)).float()
    weights = [w_OI.clone() for _ in range(max(1, MEMORY // (4 * w_OI.numel())))]
    kept = [tiled.tiles(w, MEMORY) for w in weights]
    makers = {
        "torch": lambda w: x_NI @ w.T,
        "tiles": lambda w: tiled.product(x_NI, w),
        "kept": lambda w: tiled.product(x_NI, w),
    }
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds + 1):
        for name, make in makers.items():
            began = time.perf_counter()
            for w in kept if name == "kept" else weights:
                make(w)
            times[name].append((time.perf_counter() - began) / len(weights))
    part = slice(0, 4096)
    exact = x_NI.double() @ w_OI[part].double().T
    ratios = sorted(a / b for a, b in zip(times["torch"][1:], times["kept"][1:]))
    return {
        "tokens": tokens, "inputs": inputs, "outputs": outputs, "kind": kind,
        "milliseconds": {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()},
        "error": {name: float((make(w_OI[part]) - exact).norm() / exact.norm()) for name, make in makers.items()},
        "ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
    }  # fmt: skip


def difference(base: str, tuned: str, tokens: int = 1024) -> dict:
    """How far both models' streams, and the difference, are off float64's, as a share of their length."""
    with tempfile.TemporaryDirectory() as scratch:
        pair = Run(Plan(base, tuned), Path(scratch)).pair
    batch = next(iter(Corpus.default().tokens(pair.tokenizer, row_tokens=64, limit_tokens=tokens).batches(tokens)))
    sites = [Site(pair.base.depth // 2), Site(pair.base.depth - 2)]
    counts_BT = batch.mask_BT.clone()
    counts_BT[:, 0] = False  # the first position's stream is a hundred times as long

    def streams() -> tuple[Tensor, Tensor]:
        before, after = (m.streams(batch.ids_BT, sites)[counts_BT].double() for m in (pair.base, pair.tuned))
        return before, after - before

    found = {"tiles": streams()}
    with kernels.using("torch"):
        found["torch"] = streams()
    pair.base.module.double()
    exact = streams()
    off = lambda one, other: [float((one - other)[:, s].norm() / other[:, s].norm()) for s in range(len(sites))]  # noqa: E731
    return {
        "base": base,
        "tuned": tuned,
        "sites": [str(s) for s in sites],
        "off": {
            name: {"streams": off(one[0], exact[0]), "difference": off(one[1], exact[1])} for name, one in found.items()
        },
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--base", default="default")
    options.add_argument("--tuned", default="demo")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "products.json")
    given = options.parse_args()
    if kernels.products() != "tiles":
        raise SystemExit(
            "this processor has no tiles of bfloat16, or tunediff was installed without a compiler: torch makes all products"
        )
    pages.keep()  # as the command line does
    torch.set_num_threads(given.threads)
    with torch.inference_mode(), fast_matmul():
        shapes = [compare(*shape, kind, given.rounds) for shape in SHAPES for kind in KINDS]
    result = {
        "threads": given.threads,
        "torch": torch.__version__,
        "shapes": shapes,
        "pair": difference(given.base, given.tuned),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{'tokens, in, out':>20} {'weights':>9} {'torch, ms':>10} {'tiles, ms':>10} {'kept, ms':>9} {'times kept':>20} {'error: torch':>13} {'tiles':>8}"
    )
    for row in shapes:
        shape, ratio = (
            f"{row['tokens']}, {row['inputs']}, {row['outputs']}",
            "{min:.2f} {median:.2f} {max:.2f}".format(**row["ratio"]),
        )
        ms, error = row["milliseconds"], row["error"]
        print(
            f"{shape:>20} {row['kind']:>9} {ms['torch']:>10.2f} {ms['tiles']:>10.2f} {ms['kept']:>9.2f} {ratio:>20} {error['torch']:>13.1e} {error['tiles']:>8.1e}"
        )
    print(json.dumps(result["pair"]["off"]))


if __name__ == "__main__":
    main()
