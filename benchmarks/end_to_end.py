"""Measure the wall-clock time of each stage of a whole `diff`, and how far each stage is from its limit.

A stage's limit is the time that its matrix products alone would take. It is computed from counts of tokens times
blocks and of tokens mapped to logits. The rate is that of a float32 product measured just before, in the same process
and by the same kernel. Beyond the limit a stage spends time on attention, norms, elementwise work, statistics,
training and disk. Loading has no limit. On a busy machine only the counts are meaningful.

    python benchmarks/end_to_end.py [--threads 2] [--device cuda] [--tuned demo] [--base default]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accounts import Account, counted

from tunediff import kernels
from tunediff.core import pages
from tunediff.kernels.matmuls import fast_matmul
from tunediff.lab.demo import check
from tunediff.models.network import LanguageModel
from tunediff.runs.plan import Plan
from tunediff.runs.run import Run

STAGES = {
    "contrast": lambda run: run.answers,
    "elicit": lambda run: run.elicited,
    "scan": lambda run: run.scan,
    "harvest": lambda run: run.harvest,
    "find": lambda run: run.found,
    "rank": lambda run: run.ranking,
    "lens": lambda run: run.lens,
    "outputs": lambda run: run.output_side,
    "verify": lambda run: run.verdicts,
    "signals": lambda run: run.signals,
    "revert, counted": None,
}


def flops(model: LanguageModel) -> tuple[int, int]:
    """FLOP of one token through one block, and of one token mapped to logits: two for each weight of a matrix."""
    block = sum(p.numel() for n, p in model.blocks[0].named_parameters() if p.dim() == 2 and "lora_" not in n)
    return 2 * block, 2 * model.family.unembedding(model.network).weight.numel()


def rate(model: LanguageModel, tokens: int = 1024, repeats: int = 7) -> float:
    """FLOP a second of a float32 product with the largest weight matrix of a block, by the model's own kernel.

    The fastest of `repeats` measurements counts.
    """
    linear = max(
        (m for m in model.blocks[0].modules() if isinstance(m, torch.nn.Linear)), key=lambda m: m.weight.numel()
    )
    x = torch.randn(tokens, linear.weight.shape[1], device=model.device)
    best = float("inf")
    with torch.inference_mode(), fast_matmul(model.device):
        for _ in range(repeats):
            _wait(model.device)
            began = time.perf_counter()
            for _ in range(8):
                linear(x)
            _wait(model.device)
            best = min(best, time.perf_counter() - began)
    return 8 * 2 * tokens * linear.weight.numel() / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak() -> int:
    """Most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", default="default")
    options.add_argument("--tuned", default="demo")
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--set", action="append", default=[], help="A setting, as in the command line.")
    options.add_argument("--run", type=Path, help="Folder of the run; a temporary one if left out.")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "end_to_end.json")
    given = options.parse_args()
    pages.keep()  # as the command line does
    plan = Plan(base=given.base, tuned=given.tuned)
    for text in [f"runtime.device={given.device}", f"runtime.threads={given.threads}", *given.set]:
        plan = plan.set(text)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Run(plan, given.run or Path(scratch) / "run"), given.tuned == "demo")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def measure(run: Run, demo: bool) -> dict[str, Any]:
    """Run every stage, count and time it."""
    began = time.perf_counter()
    pair = run.pair
    rows = [
        {
            "stage": "load",
            "seconds": time.perf_counter() - began,
            "token_blocks": 0,
            "token_logits": 0,
            "peak_mib": peak(),
        }
    ]
    of_block, of_logits = flops(pair.base)
    per_second = rate(pair.base)
    with counted(pair.base, pair.tuned) as account:

        def timed(stage: str, do: Callable[[Run], Any]) -> Any:
            began = time.perf_counter()
            got = do(run)
            _wait(pair.base.device)
            rows.append(row(stage, time.perf_counter() - began, account.taken()))
            return got

        def row(stage: str, seconds: float, cost: Account) -> dict[str, Any]:
            limit = (cost.token_blocks * of_block + cost.token_logits * of_logits) / per_second
            return {
                "stage": stage,
                "seconds": seconds,
                **vars(cost),
                "limit_seconds": limit,
                "share_of_limit": limit / seconds,
                "peak_mib": peak(),
            }

        checked = None
        for stage, do in STAGES.items():
            if do is not None:
                timed(stage, do)
            elif demo:
                checked = timed(stage, check)
    confirmed = [r.id for r in run.verdicts if r.decision == "confirmed"]
    total = {
        name: sum(r.get(name, 0) for r in rows) for name in ("seconds", "token_blocks", "token_logits", "limit_seconds")
    }
    return {
        "base": run.plan.base,
        "tuned": run.plan.tuned,
        "device": run.plan.runtime.device,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "products": kernels.products(pair.base.device),
        "gflop_per_second": per_second / 1e9,
        "mflop_per_token_block": of_block / 1e6,
        "mflop_per_token_logits": of_logits / 1e6,
        "stages": rows,
        "total": total,
        "confirmed": confirmed,
        **({"checked": checked.text.splitlines()} if checked else {}),
    }


def show(result: dict[str, Any]) -> None:
    """One table on stdout."""
    print(
        f"{'stage':<16}{'seconds':>9}{'token-blocks':>14}{'token-logits':>14}{'limit, s':>10}{'share':>7}{'peak MiB':>10}"
    )
    for row in [*result["stages"], {"stage": "all", **result["total"]}]:
        limit = row.get("limit_seconds", 0.0)
        print(
            f"{row['stage']:<16}{row['seconds']:>9.1f}{row['token_blocks']:>14,}{row['token_logits']:>14,}{limit:>10.1f}"
            f"{limit / row['seconds']:>7.2f}{row.get('peak_mib', result['stages'][-1]['peak_mib']):>10,}"
        )
    print(
        f"limit: {result['gflop_per_second']:.0f} GFLOP/s in float32 by {result['products']} on {result['threads']} threads"
    )
    for line in result.get("checked", []):
        print(line)


if __name__ == "__main__":
    main()
