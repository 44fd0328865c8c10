"""The GPU path: Triton kernels against the dense float64 reference, the same bytes twice, no wait for the host.

Without a GPU they run in Triton's interpreter on the CPU, which shows that they are right and says nothing of their
speed; that they compile for GPUs is shown apart. With a GPU the same tests run there.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton", reason="triton is not installed; it is for Linux only")

from tunediff import dictionaries, kernels
from tunediff.dictionaries.fitted import build
from tunediff.dictionaries.fitting import fit, step
from tunediff.dictionaries.schedule import FitSettings, Schedule, State
from tunediff.dictionaries.sources import TensorSource
from tunediff.kernels import gates, paths, torch_ops
from tunediff.kernels.dense import DenseCode
from tunediff.kernels.gpu import triton as gpu
from tunediff.kernels.gpu.code import GpuCode
from tunediff.kernels.sparse import Pairs

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
"""Of float32 sums to float64 ones, with everything of size 1."""


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The GPU path for every float32 tensor, wherever it lies."""

    def on_gpu(*tensors):
        return gpu if paths.allows("triton") and all(t.dtype == torch.float32 for t in tensors) else None

    monkeypatch.setattr(paths, "on_gpu", on_gpu)
    with kernels.using("triton"):
        yield


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def first_by_value(value_NF: torch.Tensor, keep: int) -> torch.Tensor:
    """The reference: a stable sort."""
    return torch.sort(value_NF.flatten(), descending=True, stable=True).indices[:keep].sort().values


# -- selection -----------------------------------------------------------------------------------------------


def kept(pre_NF: torch.Tensor, weight_F: torch.Tensor, *parts: gates.Part) -> torch.Tensor:
    """Flat indices that these kernels keep, after a look at the rest of the answer."""
    token_P, latent_P, pre_P, starts_N = gpu.select(pre_NF, weight_F, parts)
    flat_P = token_P * pre_NF.shape[1] + latent_P
    assert torch.equal(flat_P, flat_P.sort().values) and torch.equal(pre_P, pre_NF.flatten()[flat_P])
    assert torch.equal(starts_N, torch_ops.edges(token_P, len(pre_NF)))
    return flat_P


@pytest.mark.parametrize("N,F,keep", [(1, 1, 1), (7, 33, 20), (12, 1500, 60), (5, 40, 200), (3, 2100, 1)])
def test_select_is_a_stable_sort(N, F, keep):
    pre_NF, weight_F = drawn(N, F), drawn(F, seed=1).abs()
    assert torch.equal(kept(pre_NF, weight_F, (0, F, keep)), first_by_value(torch.relu(pre_NF) * weight_F, keep))


def test_ties_go_by_flat_index_across_tokens():
    value_NF = torch.randint(0, 3, (20, 90), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    one_F = torch.ones(90, device=DEVICE)
    for keep in (1, 100, 700, 1500):  # 1500: more than are positive
        assert torch.equal(kept(value_NF, one_F, (0, 90, keep)), first_by_value(value_NF, keep))


def test_neighbours_in_value_are_told_apart():
    """Floats that differ in the last bit, far below the first digit; huge, tiny and infinite ones beside them."""
    base = torch.full((4, 300), 1.5).view(torch.int32) + torch.randperm(1200).view(4, 300).int() // 2
    value_NF = base.view(torch.float32).to(DEVICE)
    value_NF[0, :3], value_NF[1, :2], value_NF[2, :2] = 3e38, 1e-30, torch.inf
    for keep in (2, 5, 400, 1196, 1199):
        assert torch.equal(
            kept(value_NF, torch.ones(300, device=DEVICE), (0, 300, keep)), first_by_value(value_NF, keep)
        )


def test_groups_keep_their_own_and_interleave():
    """One keeps nothing, and one more than it has."""
    pre_NF, weight_F = drawn(16, 120), drawn(120, seed=1).abs()
    parts = ((0, 30, 24), (30, 100, 32), (100, 105, 0), (105, 120, 1000))
    got, want = kept(pre_NF, weight_F, *parts), gates.keep(pre_NF, weight_F, parts)
    assert len(got) == 24 + 32 + 16 * 15 and torch.equal(got[pre_NF.flatten()[got] > 0], want)


def test_best_of_each_token():
    pre_NF, weight_F = drawn(6, 1300), drawn(1300, seed=1).abs()
    weight_F[::3] = 0
    pre_NF[1] = pre_NF[1].round()  # ties
    pre_NF[2, 4:] = -1.0  # fewer positive than k
    pre_NF[3] = -1.0
    latent_NK = gpu.best(pre_NF, weight_F, 9)
    for n, value_F in enumerate(torch.relu(pre_NF) * weight_F):
        want = first_by_value(value_F, 9)
        want = want[value_F[want] > 0]
        assert torch.equal(latent_NK[n, : len(want)], want) and (latent_NK[n, len(want) :] == 1300).all()
    assert (gpu.best(pre_NF, torch.zeros_like(weight_F), 9) == 1300).all()


# -- codes ---------------------------------------------------------------------------------------------------


def both_ways(N: int, I: int, F: int, parts, use, chosen_P: torch.Tensor | None = None) -> None:
    """`use` of a code and a decoder, a scalar, and all its gradients: these kernels against dense float64.

    `chosen_P`: flat indices to keep, whatever their values."""
    values = [drawn(N, I), drawn(F, I, seed=1) / I**0.5, drawn(F, seed=2), drawn(F, I, seed=3)]
    weight_F, found = drawn(F, seed=4).abs(), []
    for kind, dtype in ((GpuCode, torch.float32), (DenseCode, torch.float64)):
        x, W, b, decoder = (v.to(dtype, copy=True).requires_grad_() for v in values)
        if chosen_P is None:
            code = kind.encode(x, W, b, gates.Gate(weight_F.to(dtype), parts))
        elif kind is GpuCode:
            code = GpuCode(Pairs.of(chosen_P, N, F), (x, W, b, None))
        else:
            mask = torch.zeros(N * F, device=DEVICE, dtype=dtype).index_fill_(0, chosen_P, 1).view(N, F)
            code = DenseCode(torch.relu(torch.addmm(b, x, W.T)) * mask)
        out = use(code, decoder)
        out.backward()
        found.append([out, *(t.grad if t.grad is not None else torch.zeros_like(t) for t in (x, W, b, decoder))])
    scale = max(1.0, *(float(t.detach().abs().max()) for t in found[1]))
    for one, other in zip(*found):
        torch.testing.assert_close(one.double() / scale, other / scale, **CLOSE)


def waves(code, decoder, cuts=()):
    return (code.decode(decoder, cuts) * drawn(1, decoder.shape[1], seed=9).to(decoder)).sin().sum()


@pytest.mark.parametrize(
    "N,I,F,keep", [(24, 20, 40, 90), (3, 600, 10, 12), (17, 1, 30, 40), (9, 33, 50, 1), (4, 8, 5, 0)]
)
def test_forward_and_gradients(N, I, F, keep):
    both_ways(N, I, F, ((0, F, keep),), waves)


def test_every_use_of_a_code():
    parts = ((0, 10, 9), (10, 40, 50))
    both_ways(
        20, 12, 40, parts,
        lambda code, decoder: waves(code, decoder, (5, 11)) + code.weighted(decoder.norm(dim=1)) + code.dense().sum(),
    )  # fmt: skip
    code, dense = (
        kind.encode(drawn(20, 12), drawn(40, 12, seed=1), drawn(40, seed=2), gates.Gate(drawn(40, seed=4).abs(), parts))
        for kind in (GpuCode, DenseCode)
    )
    torch.testing.assert_close(code.dense(), dense.dense(), **CLOSE)
    assert torch.equal(code.fired(), dense.fired()) and int(code.count()) == int(dense.count())


@pytest.mark.parametrize("long", [4, 16])
def test_long_bags_are_dealt_out(long, monkeypatch):
    """Latents on at every token, tokens with nearly every latent, bags at the limit, and many with none."""
    monkeypatch.setattr(gpu, "LONG", long)
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask[:, 3], mask[7, :30], mask[:long, 10], mask[: long + 1, 20], mask[:, 39] = True, True, True, True, True
    both_ways(50, 20, 40, None, waves, mask.flatten().nonzero()[:, 0].to(DEVICE))


# -- dictionaries --------------------------------------------------------------------------------------------

F, D, BATCH = 32, 6, 12


def made(name: str, **more):
    settings = {"batchtopk": {"k": 2.0}, "delta": {"k_shared": 0.5, "k_delta": 1.5}, "hybrid": {"k": 2.0}}[name]
    d = build(dictionaries.spec(name, latents=F, **settings, **more), sites=1, width=D, seed=0)
    with torch.no_grad():
        for i, p in enumerate(d.parameters()):
            p.add_(0.1 * drawn(*p.shape, seed=i).to(p))
    return d.to(DEVICE)


@pytest.mark.parametrize("name", ["batchtopk", "delta", "hybrid"])
def test_losses_and_gradients_of_dictionaries(name):
    """Objective and AuxK, with many dead latents and with none; the reference is dense and in float64."""
    for dead in (slice(5, 30), slice(0, 0)):
        dead_F = torch.zeros(F, dtype=torch.bool, device=DEVICE)
        dead_F[dead] = True
        found = []
        for dtype in (torch.float32, torch.float64):
            d = made(name).to(dtype)
            run = d(drawn(BATCH, 1, 2, D, seed=5).to(dtype))
            assert isinstance(run.code, GpuCode if dtype == torch.float32 else DenseCode)
            parts = {**d.objective(run), "aux": d.auxiliary(run, dead_F, 5)}
            sum(parts.values()).backward()
            found.append([*parts.values(), *(p.grad for p in d.parameters())])
        for one, other in zip(*found):
            torch.testing.assert_close(one.double(), other, **CLOSE)
    assert float(found[0][-1].abs().max()) > 0


def test_auxk_reaches_the_encoder_of_the_dead_alone():
    d, dead_F = made("batchtopk"), torch.zeros(F, dtype=torch.bool, device=DEVICE)
    dead_F[5:25] = True
    d.auxiliary(d(drawn(BATCH, 1, 2, D)), dead_F, 4).backward()
    for part in (d.encoder_FSMD, d.decoder_FSMD, d.encoder_bias_F):
        assert float(part.grad[5:25].abs().sum()) > 0 and not part.grad[:5].any() and not part.grad[25:].any()
    assert d.decoder_bias_SMD.grad is None


def test_fewer_positive_than_k():
    """The places left over hold codes of 0, which neither count nor learn."""
    d = made("batchtopk")
    with torch.no_grad():
        d.encoder_bias_F.fill_(-1e3)
        d.encoder_bias_F[7] = 5.0
    run = d(drawn(BATCH, 1, 2, D))
    assert int(run.code.count()) == BATCH and run.code.value_P.numel() == 2 * BATCH
    assert run.code.fired().nonzero().flatten().tolist() == [7]
    run.error_NSMD.square().mean().backward()
    silent = [j for j in range(F) if j != 7]
    assert not d.encoder_FSMD.grad[silent].any() and not d.decoder_FSMD.grad[silent].any()


# -- training ------------------------------------------------------------------------------------------------


class NoWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU, or gives a tensor a size that depends on data."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert not name.startswith(self.waits), f"{func} in a step"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]), f"{func} by a mask"
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(devices) <= 1, f"{func} of tensors on {devices} in a step"
        return out


SETTINGS = FitSettings(steps=20, batch=BATCH, dead_window=0.05, aux_k=4, log_every=1000, anneal_from=1.5, anneal=0.5)
PLAN = Schedule.of(dictionaries.spec("batchtopk"), SETTINGS, 1000)


def trained(name: str, steps: int) -> State:
    state = State.new(made(name), PLAN)
    for i in range(steps):
        step(state, drawn(BATCH, 1, 2, D, seed=i), SETTINGS, PLAN)
    return state


@pytest.mark.parametrize("name", ["batchtopk", "delta", "dfc", "diff_sae", "dsf", "hybrid", "matryoshka", "tuned_sae"])
def test_a_step_needs_no_data(name, monkeypatch):
    """On tensors without any, all on one device, and with launches that do nothing: no size and no branch hangs on
    what a GPU holds. The optimizer's own step is torch's and left out."""
    k = {"k_shared": 2.0, "k_delta": 3.0} if name == "delta" else {"k": 4.0}
    d = build(dictionaries.spec(name, latents=512, **k), sites=2, width=8, seed=0).to("meta")
    state = State(d, torch.optim.Adam(d.parameters()), torch.zeros(512, dtype=torch.long, device="meta"), 1, [])
    monkeypatch.setattr(state.optimizer, "step", lambda: None)
    monkeypatch.setattr(type(gpu._bags), "__getitem__", lambda kernel, grid: lambda *args, **more: None)
    with NoWait():
        assert step(state, torch.empty(24, 2, 2, 8, device="meta"), SETTINGS, PLAN) is None
        assert isinstance(d(torch.empty(24, 2, 2, 8, device="meta")).code, GpuCode)
    assert all(p.grad.is_meta for p in d.parameters())


@pytest.mark.parametrize("name", ["delta", "hybrid"])
def test_no_wait_in_a_step(name):
    """The second step and on: the first logs. Dead latents are there, and k is coming down."""
    state, x_NSMD = trained(name, 1), drawn(BATCH, 1, 2, D, seed=7)
    assert bool((state.silent_F >= PLAN.dead_tokens).any())
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.MonkeyPatch.context() as patch, NoWait():
            if DEVICE.type == "cpu":  # the interpreter itself looks at tensors; a launch on a GPU does not
                patch.setattr(gpu.triton.runtime.interpreter.InterpretedFunction, "__getitem__", unwatched)
            step(state, x_NSMD, SETTINGS, PLAN)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def unwatched(kernel, grid):
    """A launch out of sight of the mode."""
    from triton.runtime.interpreter import GridExecutor

    def launch(*args, **more):
        with torch.utils._python_dispatch._disable_current_modes():
            return GridExecutor(kernel.fn, kernel.arg_names, grid)(*args, **more)

    return launch


def test_the_watch_sees():
    flags = torch.ones(3, dtype=torch.bool)
    for wait in (
        lambda: flags.any().item(),
        lambda: flags.nonzero(),
        lambda: torch.ones(3)[flags],
        lambda: bool(flags[0]),
        lambda: torch.tensor([1, 2]).to("meta"),
    ):
        with pytest.raises(AssertionError), NoWait():
            wait()


@pytest.mark.parametrize("name", ["delta"])
def test_same_bytes_twice(name):
    one, other = (trained(name, 2).dictionary.state_dict() for _ in range(2))
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_a_fit_comes_out_as_on_the_cpu():
    """The whole fit, saved and loaded, near the torch path's: the same steps up to rounding."""
    x = drawn(120, 1, 2, D, seed=3).cpu()
    x[:, :, 1] = x[:, :, 0] + 0.3 * drawn(120, 1, D, seed=4).cpu()
    source, spec = (
        TensorSource(x[:100], x[100:]),
        dictionaries.spec(
            "delta",
            latents=F,
            k_shared=1.0,
            k_delta=1.5,
            from_differences=False,  # else gradients near 0, whose sign Adam follows
        ),
    )
    settings = FitSettings(steps=3, batch=24, learning_rate=1e-2, dead_window=0.3, log_every=3)
    one = fit(spec, source, settings, device=DEVICE)
    with kernels.using("torch"):
        other = fit(spec, source, settings)
    for (key, a), b in zip(one.dictionary.state_dict().items(), other.dictionary.state_dict().values()):
        assert not a.is_cuda
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3, msg=key)
    assert one.quality.l0_training == pytest.approx(other.quality.l0_training, rel=0.02)
    assert one.quality.ev_tuned == pytest.approx(other.quality.ev_tuned, abs=0.02)


# -- compiled ------------------------------------------------------------------------------------------------

COMPILE = r"""
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tunediff.kernels.gpu import triton as gpu
INT = {"F", "I", "K", "P", "R", "start", "stop"}
INT32 = {"counts_ptr", "above_ptr", "equal_ptr"}
FLOAT = {"pre_ptr", "weight_ptr", "value_ptr", "rows_ptr", "part_ptr", "a_ptr", "b_ptr"}
CONSTANT = {"BINS": gpu._BINS, "LOW": gpu._LOW, "LONG": gpu.LONG}
BLOCK = {"_bags": 512, "_pieces": 512, "_dots": 128}
for name in ("_first_digit", "_other_digits", "_count", "_write", "_best", "_pieces", "_bags", "_dots"):
    kernel = getattr(gpu, name)
    constant, signature = {}, {}
    for arg in kernel.arg_names:
        if arg.isupper() and arg not in INT:
            constant[arg] = {**CONSTANT, "BLOCK": BLOCK.get(name, gpu._BLOCK), "TILE": 16 if name == "_dots" else 8}[arg]
            signature[arg] = "constexpr"
        elif arg in INT:
            signature[arg] = "i32"
        elif arg in FLOAT or (arg == "out_ptr" and name != "_best"):
            signature[arg] = "*fp32"
        else:
            signature[arg] = "*i32" if arg in INT32 else "*i64"
    built = triton.compile(ASTSource(kernel, signature, constant), GPUTarget("cuda", 90, 32))
    assert not re.search(r"(atom|red)\.\S*add\.\S*f(16|32|64)", built.asm["ptx"]), "floats are added by atomics"
    assert built.metadata.shared <= 48 << 10 and built.asm["cubin"]
    print(name)
"""


def test_compiles_for_gpus(tmp_path):
    """What the interpreter lets pass, the compiler may not; it needs no GPU."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 8, done.stderr[-2000:]
