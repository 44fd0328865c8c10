"""Time a training step of a TopK dictionary: tunediff against SAELens, dictionary-learning and sparsify.

All libraries train on the same batches in one process, in turns within each round. Each has width n, F latents, k
active latents a token, B tokens, float32, mean squared error and torch's fused Adam. All use the same learning rate
and initial vectors, and none revives dead latents. tunediff also clips the gradient, counts active latents and scales
codes by decoder norms. Ratios compare times within one round. Each shape has its own process, since memory left by an
earlier shape changes how fast torch allocates. The unexplained share of variance after all rounds is reported, so that
no library gains speed by doing less. "ours" searches for codes in bfloat16 where the processor supports it, and
computes the kept codes in float32. A library that is not installed is named and skipped. The limit is the sum over
phases of max(FLOP / measured FLOP rate, bytes / measured byte rate), for the least work that the algorithm needs.

    python benchmarks/train_step.py [--rounds 10] [--threads 2] [--device cuda] [--shapes 1152,9216,64,2048 ...]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunediff import dictionaries, kernels
from tunediff.dictionaries.fitted import build
from tunediff.dictionaries.fitting import step
from tunediff.dictionaries.schedule import FitSettings, Schedule, State
from tunediff.kernels import torch_ops
from tunediff.kernels.cpu import native
from tunediff.kernels.matmuls import precision

SHAPES = ("1152,9216,64,2048", "1152,4608,32,1024", "512,4096,32,2048")
RATE = 1e-3


class Ours:
    """`fitting.step` on a BatchTopK dictionary of one stream of width n, which a crosscoder's two of n / 2 amount to."""

    def __init__(self, path: str, n: int, F: int, k: int, B: int, device: str):
        self.path = path
        self.settings = FitSettings(
            steps=10_000, batch=B, learning_rate=RATE, warmup=0, decay=0, aux_weight=0, log_every=10_000
        )
        d = build(dictionaries.spec("tuned_sae", latents=F, k=k), sites=1, width=n, seed=0).to(device)
        self.schedule = Schedule.of(d.spec, self.settings, B)
        self.state = State.new(d, self.schedule)

    def step(self, x_NI: Tensor) -> None:
        with kernels.using(self.path):
            step(self.state, self._streams(x_NI), self.settings, self.schedule)

    def left(self, x_NI: Tensor) -> Tensor:
        return self.state.dictionary(self._streams(x_NI)).error_NSMD.flatten(1)

    def _streams(self, x_NI: Tensor) -> Tensor:
        return x_NI[:, None, None].expand(-1, 1, 2, -1)


class Rival:
    """A module of another library, with the loss and the optimizer that all have."""

    def __init__(self, module: torch.nn.Module, reconstruct: Callable[[Tensor], Tensor], autocast: bool = False):
        self.module, self.reconstruct, self.autocast = module, reconstruct, autocast
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)

    def step(self, x_NI: Tensor) -> None:
        with torch.autocast(x_NI.device.type, torch.bfloat16, enabled=self.autocast):
            xhat_NI = self.reconstruct(x_NI)
        loss = torch.nn.functional.mse_loss(xhat_NI.float(), x_NI)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def left(self, x_NI: Tensor) -> Tensor:
        return x_NI - self.reconstruct(x_NI)


def sparsify(vectors_FI: Tensor, k: int, autocast: bool = False) -> Rival:
    from sparsify import SparseCoder, SparseCoderConfig

    F, n = vectors_FI.shape
    coder = SparseCoder(n, SparseCoderConfig(num_latents=F, k=k), device=vectors_FI.device, dtype=torch.float32)
    coder.encoder.weight.data.copy_(vectors_FI)
    coder.W_dec.data.copy_(vectors_FI)

    def reconstruct(x_NI: Tensor) -> Tensor:
        values, latents, _ = coder.encode(x_NI)
        return coder.decode(values, latents)

    return Rival(coder, reconstruct, autocast)


def dictionary_learning(vectors_FI: Tensor, k: int) -> Rival:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    sae = BatchTopKSAE(vectors_FI.shape[1], len(vectors_FI), k).to(vectors_FI.device)
    sae.encoder.weight.data.copy_(vectors_FI)
    sae.decoder.weight.data.copy_(vectors_FI.T)
    return Rival(sae, lambda x: sae.decode(sae.encode(x, use_threshold=False)))


def sae_lens(vectors_FI: Tensor, k: int) -> Rival:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    F, n = vectors_FI.shape
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=n, d_sae=F, k=k, device=str(vectors_FI.device)))
    sae.W_enc.data.copy_(vectors_FI.T)
    sae.W_dec.data.copy_(vectors_FI)
    return Rival(sae, lambda x: sae.decode(sae.encode_with_hidden_pre(x)[0]))


RIVALS = {"sparsify": ("eai-sparsify", sparsify), "dictionary-learning": ("dictionary-learning", dictionary_learning),
          "sae-lens": ("sae-lens", sae_lens)}  # fmt: skip


def batches(n: int, B: int, device: str, count: int = 6) -> list[Tensor]:
    """Sums of few of 2n directions and a little noise; element variance about 1."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(2 * n, n, generator=g)
    out = []
    for _ in range(count):
        on = (torch.rand(B, 2 * n, generator=g) < 16 / (2 * n)) * torch.rand(B, 2 * n, generator=g)
        out.append((on @ directions / 2.3 + 0.1 * torch.randn(B, n, generator=g)).to(device))
    return out


clock = time.perf_counter


def seconds(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def rates(n: int, F: int, B: int, fast: str, device: str) -> dict[str, float]:
    """What this machine does at the encoder's product (GFLOP/s, by library and type) and at a triad (GB/s)."""
    x, w, out = torch.randn(B, n, device=device), torch.randn(F, n, device=device), torch.empty(B, F, device=device)
    x16, w16, out16 = x.bfloat16(), w.bfloat16(), out.bfloat16()
    found = {}
    for name, setting, run in (
        ("default", "highest", lambda: torch.mm(x, w.T, out=out)),
        ("fast", fast, lambda: torch.mm(x, w.T, out=out)),
        ("bf16", fast, lambda: torch.mm(x16, w16.T, out=out16)),
    ):
        with precision(setting):
            found[name] = 2e-9 * n * F * B / min(seconds(run, device) for _ in range(6))
    a, b, c = (torch.zeros(1 << 25, device=device) for _ in range(3))
    found["triad"] = 12e-9 * len(a) / min(seconds(lambda: torch.add(a, b, alpha=2.0, out=c), device) for _ in range(6))
    return found


def limit(n: int, F: int, k: int, B: int, product: float, flops: float, triad: float) -> float:
    """Seconds, as the sum over phases; `product` is the rate of the encoder's, all others go at `flops`."""
    rows, tokens = 4 * n * F, 4 * n * B
    sparse = [(2 * B * n * k, rows + tokens)] * 4  # decoding, its gradient in the codes, both weight gradients
    adam = 28 * 2 * n * F  # value, gradient and two moments in, three of them out
    phases = [(2 * B * n * F / product, rows + tokens), *((f / flops, b) for f, b in sparse), (0, adam)]
    return sum(max(f / 1e9, b / triad / 1e9) for f, b in phases)


@contextlib.contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Seconds of ours by what they are for, those of a phase within another in the inner one alone."""
    spent: dict[str, float] = {}
    kept, within = [], ["other"]

    def lap(last: list[float] = [clock()]) -> None:  # noqa: B006, B008 (kept from call to call)
        now = clock()
        spent[within[-1]] = spent.get(within[-1], 0.0) + now - last[0]
        last[0] = now

    def wrap(module: Any, name: str, label: Callable[..., str]) -> None:
        inner = getattr(module, name)
        kept.append((module, name, inner))

        def timed(*args: Any, **named: Any) -> Any:
            lap()
            within.append(label(*args))
            try:
                return inner(*args, **named)
            finally:
                lap()
                within.pop()

        setattr(module, name, timed)

    wrap(native, "bag_and_dot", lambda *a: "decoder and code gradients")
    for module in (native, torch_ops):
        wrap(module, "encode", lambda *a: "select")
        wrap(module, "bag", lambda starts, order, *a: "decode" if order is None else "encoder gradient")
        wrap(module, "bucket", lambda *a: "bucket")
        wrap(module, "dot", lambda *a: "code gradients")
    wrap(torch, "mm", lambda *a: "product")
    wrap(torch, "addmm", lambda *a: "product")
    wrap(kernels.Adam, "step", lambda *a: "adam")
    try:
        yield spent
        lap()
    finally:
        for module, name, inner in reversed(kept):
            setattr(module, name, inner)


@kernels.kept_memory()
def compare(shape: str, given: argparse.Namespace, fast: str) -> dict[str, Any]:
    n, F, k, B = map(int, shape.split(","))
    device, data = given.device, batches(n, B, given.device)
    best = kernels.path(device)
    contenders: dict[str, tuple[Any, str]] = {"ours": (Ours(best, n, F, k, B, device), fast)}
    if device == "cpu":
        contenders |= {
            "ours, rivals' product": (Ours(best, n, F, k, B, device), "highest"),
            "ours, not compiled": (Ours("torch", n, F, k, B, device), fast),
        }
    first = contenders["ours"][0].state.dictionary.encoder_FSMD.detach().flatten(1)
    vectors_FI = first / first.norm(dim=1, keepdim=True)
    missing = []
    for name, (package, make) in RIVALS.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        contenders[name] = make(vectors_FI, k), "highest"
        if name == "sparsify":
            contenders["sparsify, autocast bf16"] = make(vectors_FI, k, autocast=True), "highest"
    found = rates(n, F, B, fast, device)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(given.rounds + 1):
        x = data[number % (len(data) - 1)]
        for name, (contender, setting) in contenders.items():
            with precision(setting):
                took = seconds(lambda: contender.step(x), device)
            if number:  # the first round warms up
                times[name].append(took)
    spread = (data[-1] - data[-1].mean(0)).square().sum()
    left = {}
    for name, (contender, setting) in contenders.items():
        with torch.no_grad(), precision(setting):
            left[name] = float(contender.left(data[-1]).square().sum() / spread)
    phases: dict[str, float] = {}
    if device == "cpu":
        with timed_phases() as phases, precision(fast):
            for x in data[:3]:
                contenders["ours"][0].step(x)
    bound = {
        "ours": limit(n, F, k, B, found["bf16" if device == "cpu" and native.rounds() else "fast"], found["fast"], found["triad"]),
        "ours, not compiled": limit(n, F, k, B, found["fast"], found["fast"], found["triad"]),
        "sparsify, autocast bf16": limit(n, F, k, B, found["bf16"], found["bf16"], found["triad"]),
    }  # fmt: skip
    usual = limit(n, F, k, B, found["default"], found["default"], found["triad"])
    rows = {}
    for name, took in times.items():
        ratios = {
            other: {"min": r[0], "median": statistics.median(r), "max": r[-1]}
            for other in times
            if other.split(",")[0] in RIVALS and name.startswith("ours")
            for r in [sorted(b / a for a, b in zip(took, times[other]))]
        }
        median = statistics.median(took)
        rows[name] = {
            "milliseconds": 1e3 * median,
            "share_of_limit": bound.get(name, usual) / median,
            "variance_left": left[name],
            "times_as_long": ratios,
        }
    total = sum(phases.values()) or 1.0
    return {
        "n": n, "F": F, "k": k, "B": B, "path": best, "not_installed": missing, "contenders": rows,
        "gflops": {name: found[name] for name in ("default", "fast", "bf16")}, "triad_gb_per_s": found["triad"],
        "phases": {name: s / total for name, s in sorted(phases.items(), key=lambda item: -item[1])},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    rivals = [name for name in result["contenders"] if not name.startswith("ours")]
    lines = [
        f"n {result['n']}, F {result['F']}, k {result['k']}, B {result['B']}; {result['path']}; GFLOP/s of the product: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in result["gflops"].items())
        + f"; triad {result['triad_gb_per_s']:.0f} GB/s",
        f"{'':24}{'ms':>8}{'limit':>7}{'left':>8}  " + "".join(f"{name:>25}" for name in rivals),
    ]
    for name, row in result["contenders"].items():
        ratios = [row["times_as_long"].get(rival) for rival in rivals]
        cells = [f"{r['min']:.1f} {r['median']:.1f} {r['max']:.1f}" if r else "" for r in ratios]
        lines.append(
            f"{name:24}{row['milliseconds']:8.0f}{row['share_of_limit']:7.2f}{row['variance_left']:8.4f}  "
            + "".join(f"{cell:>25}" for cell in cells)
        )
    if result["phases"]:
        lines.append("ours: " + ", ".join(f"{name} {share:.0%}" for name, share in result["phases"].items()))
    lines += [f"{name}: not installed" for name in result["not_installed"]]
    return "\n".join(lines)


def settle(given: argparse.Namespace) -> None:
    """What the options say of this process."""
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.clock == "cpu":
        global clock
        clock = time.process_time
        torch.set_num_threads(1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", nargs="+", default=SHAPES, metavar="n,F,k,B")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--threads", type=int, default=0)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    options.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: of a busy machine, one thread")
    given = options.parse_args()
    settle(given)
    with kernels.fast_matmul() as fast:
        pass
    results = []
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1, initializer=settle, initargs=(given,), **fresh) as processes:
        for shape in given.shapes:
            results.append(processes.submit(compare, shape, given, fast).result())
            print(table(results[-1]), flush=True)
    versions = {"torch": torch.__version__}
    for package, _ in RIVALS.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    where = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.machine()}, {platform.system()}"
    record = {
        "machine": where, "threads": torch.get_num_threads(), "clock": given.clock, "rounds": given.rounds, "versions": versions,
        "fast_setting": fast, "shapes": results,
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
