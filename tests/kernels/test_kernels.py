"""Every path against the dense reference in float64, and against itself on other numbers of threads."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import shutil
import threading

import pytest
import torch

from tunediff import dictionaries, kernels
from tunediff.core.errors import NumericsError, SettingError
from tunediff.core.manifests import open_folder
from tunediff.dictionaries.fitted import SCHEMA, build
from tunediff.dictionaries.fitting import fit, step
from tunediff.dictionaries.schedule import FitSettings, Schedule, State
from tunediff.dictionaries.sources import TensorSource
from tunediff.kernels import memory, torch_ops
from tunediff.kernels.cpu import compiled, native
from tunediff.kernels.cpu import products as tiled
from tunediff.kernels.dense import DenseCode
from tunediff.kernels.gates import Gate
from tunediff.kernels.sparse import PairCode, Pairs

HAVE_NATIVE = compiled.library() is not None
needs_native = pytest.mark.skipif(not HAVE_NATIVE, reason="installed without a compiler")
rounds = pytest.mark.skipif(not torch_ops.rounds(), reason="a processor that does not multiply bfloat16")
PATHS = ["torch", pytest.param("native", marks=needs_native), pytest.param("native+bf16", marks=needs_native),
         pytest.param("torch+bf16", marks=rounds)]  # fmt: skip


@pytest.fixture(autouse=True)
def bfloat16_first(monkeypatch):
    """Codes of small products too are searched for in bfloat16 first, on any processor; few rows too go into panels."""
    monkeypatch.setattr(native, "BFLOAT16_FROM", 0)
    monkeypatch.setattr(native, "PER_ROW", 0)
    monkeypatch.setattr(torch_ops, "BFLOAT16_FROM", 0)
    monkeypatch.setattr(native, "rounds", lambda: True)


@contextlib.contextmanager
def taking(path):
    """A kernel path, with "+bf16" searching for codes in bfloat16 first, else in float32 alone."""
    name, _, first = path.partition("+")
    with kernels.using(name), pytest.MonkeyPatch.context() as patch:
        for module in (native, torch_ops):
            patch.setattr(module, "rounds", lambda: bool(first))
        yield


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(N=50, F=300, I=37, seed=0) -> list[torch.Tensor]:
    """x, W, b, decoder, weights in float32; a width that no register divides."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((N, I), (F, I), (F,), (F, I))
    return [*(torch.randn(s, generator=g) for s in shapes), torch.rand(F, generator=g) + 0.5]


GATES = {
    "one": ((0, 300, 200),),
    "three": ((0, 10, 30), (10, 150, 0), (150, 300, 170)),
    "more than there are": ((0, 20, 1000), (20, 300, 150)),
}


def everything(code, leaves, cuts) -> list[torch.Tensor]:
    """What a code tells, and every gradient of a loss that asks all of it."""
    decoder, weight = leaves[3:]
    parts = code.decode(decoder, cuts)
    away = torch.linspace(-1, 1, parts.numel(), dtype=parts.dtype).view_as(parts)
    loss = (parts - away).square().sum() + code.weighted(weight) + code.decode(decoder).pow(3).sum() / 100
    loss.backward()
    return [code.dense(), code.fired(), code.count(), parts, loss, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("cuts", [(), (10, 11, 200)])
def test_equal_to_the_dense_reference(path, gate, cuts):
    """Codes, parts and every gradient, the input's among them."""
    tensors = problem()
    exact = [t.double().requires_grad_() for t in tensors]
    want = everything(DenseCode.encode(*exact[:3], Gate(exact[4].detach(), GATES[gate])), exact, cuts)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with taking(path):
        got = everything(PairCode.encode(*leaves[:3], Gate(tensors[4], GATES[gate])), leaves, cuts)
    for one, other in zip(got, want):
        if one.is_floating_point():
            assert float((one - other).detach().norm()) <= 2e-6 * float(other.detach().norm())
        else:
            assert torch.equal(one, other)


@needs_native
@pytest.mark.parametrize("away", [False, True], ids=["", "past the caches"])
@pytest.mark.parametrize("theirs, wide", [(128, 128), (128, 256), (256, 256), (256, 128), (0, 128), (0, 256)])
@pytest.mark.parametrize("I", [1, 16, 37, 64, 96, 128, 320])
def test_panels_add_up_as_rows_do(monkeypatch, I, theirs, wide, away):
    """Sums, products and squares by panels of every size, own rows in panels or not, latents without a pair and with many."""
    g = torch.Generator().manual_seed(I)
    N, F, P = 50, 83, 700
    latent, token = (torch.randint(0, n, (P,), generator=g) for n in (F - 20, N))
    value, x, W = torch.randn(P, generator=g), torch.randn(N, I, generator=g), torch.randn(F, I, generator=g)
    order, starts = native.bucket(latent, F)
    monkeypatch.setattr(native, "FAR", 0 if away else 1 << 62)
    with kernels.kept_memory():
        for rows, width in ((x, wide), (W, theirs)):
            monkeypatch.setattr(native, "PANELS", (width,))
            if width:
                native._Panels.of(rows)
        monkeypatch.setattr(
            native, "_panels", lambda rows, pairs: native._Panels.of(rows) if rows is x or theirs else None
        )
        bag = native.bag(starts, order, token, value, x)
        both, product = native.bag_and_dot(starts, order, token, value, x, W)
        squares = [float(memory.known(t, native.ENERGY).sum(dtype=torch.double)) for t in (bag, both)]
    x, W = x.double(), W.double()
    want = torch.zeros(F, I, dtype=torch.double).index_add_(0, latent, value[:, None].double() * x[token])
    for got in (bag, both):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product.double(), (x[token] * W[latent]).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(squares), want.square().sum().float().expand(2), rtol=1e-5, atol=0)


@pytest.fixture(params=[0, 1, 2], ids=["anywhere", "pairs", "tiles"])
def way(request):
    """Every way to multiply bfloat16 numbers that this machine has."""
    if not HAVE_NATIVE or compiled.library().squares_by(request.param) != request.param:
        pytest.skip("a way that this machine does not have")
    yield request.param
    compiled.library().squares_by(compiled.BEST)


@pytest.mark.parametrize("scale", [1, 40, 3000])
@pytest.mark.parametrize(
    "parts", [((0, 900, 7000),), ((0, 200, 100), (200, 900, 5000)), ((3, 11, 5), (11, 890, 20_000))]
)
def test_bfloat16_only_says_what_cannot_be_kept(way, scale, parts):
    """Integers that bfloat16 rounds badly and float32 not at all, so that every sum is exact: the pairs, their values
    and the order of ties are those of a product in float32."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-scale, scale + 1, (300, 64), generator=g).float()
    W = torch.randint(-60, 61, (900, 64), generator=g).float()
    x[::7] *= 3
    x[5] = 0
    W[9] = 0
    bias, weight = torch.randint(-9, 10, (900,), generator=g).float(), torch.randint(0, 4, (900,), generator=g) / 4
    gate = Gate(weight, parts)
    got = native.encode(x, W, bias, gate)
    want = torch_ops.select(torch.addmm(bias, x, W.T), weight, parts)
    torchs = torch_ops._encode_by_bfloat16(x, W, bias, gate) if torch_ops.rounds() else want
    assert torchs is not None
    for one, other, third in zip(got, want, torchs):
        assert torch.equal(one, other) and torch.equal(third, other)


@rounds
@pytest.mark.parametrize("N, F, I", [(33, 31, 2000), (500, 700, 33), (257, 1025, 64), (600, 2000, 100)])
def test_torchs_bfloat16_misses_nothing(N, F, I):
    """As below, by torch's operations; what they cannot say they leave to a product in float32."""
    g = torch.Generator().manual_seed(N)
    x = torch.randn(N, I, generator=g) * torch.logspace(-1, 1, N)[torch.randperm(N, generator=g)][:, None]
    W, b, weight = torch.randn(F, I, generator=g), torch.randn(F, generator=g) / 100, torch.rand(F, generator=g) + 0.5
    parts = ((0, F // 3, N * F // 100 + 1), (F // 3, F, N * F // 50 + 1))
    latent = torch.arange(F).repeat(N)
    exact = (torch_ops.dot(torch.arange(N + 1) * F, latent, x, W) + b[latent]).view(N, F)
    found, want = torch_ops._encode_by_bfloat16(x, W, b, Gate(weight, parts)), torch_ops.select(exact, weight, parts)
    assert found is not None or N * F < 1 << 20
    for one, other in zip(found or want, want):
        assert torch.equal(one, other)
    for bad in (torch.nan, torch.inf):
        assert (
            torch_ops._encode_by_bfloat16(torch.where(torch.arange(I) == 7, bad, x), W, b, Gate(weight, parts)) is None
        )
    assert torch_ops._encode_by_bfloat16(x * 1e-25, W * 1e-5, 0 * b, Gate(weight, parts)) is None, (
        "squares that float32 does not hold"
    )


def test_bits_do_not_depend_on_threads(way):
    x, W, b, decoder, weight = problem(700, 900, 83)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        pre = torch.linspace(-1, 1, 700 * 900).view(700, 900)[
            torch.randperm(700, generator=torch.Generator().manual_seed(0))
        ]
        *at, value, starts = native.select(pre, weight, ((0, 300, 5000), (300, 900, 9000)))
        encoded = native.encode(x, W, b, Gate(weight, ((0, 300, 5000), (300, 900, 9000))))
        pairs = Pairs(*at, starts, 700, 900)
        sums, joined = (pairs.gather_latents(value, x), pairs.dot(x, W)), pairs.gather_and_dot(value, x, W)
        for apart, together in zip(sums, joined):
            torch.testing.assert_close(apart, together)
        found.append(
            [
                *at,
                value,
                starts,
                *pairs.by_latent,
                *sums,
                *joined,
                pairs.gather_tokens(value, W),
                *encoded,
                kernels.norm([x, W]),
            ]
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def one_by_one(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pre-activations (N, F), each added up as those of candidates are."""
    N, F = len(x), len(W)
    part_FN4 = native._dot_panels(torch.arange(F + 1) * N, torch.arange(N, dtype=torch.int32).repeat(F), x, W).view(
        F, N, 4
    )
    return ((part_FN4[..., 0] + part_FN4[..., 1]) + (part_FN4[..., 2] + part_FN4[..., 3])).T.contiguous() + b


@pytest.mark.parametrize("N, F, I", [(1, 1, 1), (33, 31, 2000), (500, 700, 33), (257, 1025, 64)])
def test_bfloat16_misses_nothing(way, N, F, I):
    """Rows and columns of every size, long sums, some codes far larger than others and some close together: the pairs of float32's
    own values, computed one by one."""
    g = torch.Generator().manual_seed(N)
    x = torch.randn(N, I, generator=g) * torch.logspace(-12, 6, N)[torch.randperm(N, generator=g)][:, None]
    W, b = torch.randn(F, I, generator=g), torch.randn(F, generator=g) / 100
    W[F // 2 :] = W[F // 2] + W[F // 2 :] / 1000
    weight = torch.rand(F, generator=g) + 0.5
    token, latent, value, starts = native.encode(x, W, b, Gate(weight, ((0, F, N * F // 20 + 1),)))
    want = native.select(one_by_one(x, W, b), weight, ((0, F, N * F // 20 + 1),))
    for one, other in zip((token, latent, value, starts), want):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38, 1e22])
def test_one_bad_number_is_nobody_elses(way, bad):
    """A token or a column that holds one loses no code, its own as little as another's."""
    x, W, b, _, weight = problem(300, 900, 64)
    parts = ((0, 900, 7000),)
    for spoiled in (
        (x.index_put((torch.tensor(200), torch.tensor(3)), torch.tensor(bad)), W),
        (x, W.index_put((torch.tensor(5), torch.tensor(5)), torch.tensor(bad))),
    ):
        got = native.encode(*spoiled, b, Gate(weight, parts))
        for one, other in zip(got, native.select(one_by_one(*spoiled, b), weight, parts)):
            assert torch.equal(one, other)
        assert len(got[0]) == 7000


@pytest.mark.parametrize(
    "of_x, of_W", [(1e-22, 1e-22), (1e-30, 1), (1, 1e-30), (1e-8, 1e-15), (1, 1e-38), (1e15, 1e-20)]
)
def test_tiny_numbers_count_as_others_do(way, of_x, of_W):
    """Squares that float32 does not hold are in no bound."""
    g = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-300, 301, s, generator=g).float() for s in ((300, 64), (900, 64)))
    gate = Gate(torch.ones(900), ((0, 900, 7000),))
    want = native.select(x @ W.T, gate.weight_F, gate.parts)
    scale = 2.0 ** round(math.log2(of_x)), 2.0 ** round(math.log2(of_W))
    got = native.encode(x * scale[0], W * scale[1], torch.zeros(900), gate)
    if scale[0] * scale[1] * 64 * 9e4 > 1e-30:  # where every product of two numbers is still exact
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert len(got[0]) == 7000


@needs_native
def test_kernels_are_float32_whatever_the_default(way):
    x, W, b, _, weight = problem(300, 900, 64)
    want = native.encode(x, W, b, Gate(weight, ((0, 900, 7000),)))
    torch.set_default_dtype(torch.float64)
    try:
        got = native.encode(x, W, b, Gate(weight, ((0, 900, 7000),)))
        length = kernels.norm([x])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, want, got)) and abs(float(length) - float(x.norm())) < 1e-3


@needs_native
def test_nothing_wanted_of_much_ends():
    parts = tuple((i * 300, min(1600, i * 300 + 300), 0) for i in range(6))
    assert not len(native.select(torch.rand(100, 1600), torch.ones(1600), parts)[0])


def test_a_machine_with_a_compiler_has_compiled():
    assert HAVE_NATIVE or shutil.which("gcc") is None


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("sizes", [(1,), (70_000, 3), (65_536, 0, 131_073)])
def test_norm(path, sizes):
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    with taking(path):
        assert abs(float(kernels.norm(parts)) - float(torch.cat(parts).double().norm())) <= 1e-6 * float(
            torch.cat(parts).norm()
        )


@pytest.mark.parametrize("path", PATHS)
def test_nothing_kept(path):
    leaves = [t.requires_grad_() for t in problem()]
    with taking(path):
        code = PairCode.encode(*leaves[:3], Gate(leaves[4].detach(), ((0, 300, 0),)))
        code.decode(leaves[3], (7,)).sum().backward()
    assert not code.dense().any() and not code.fired().any() and int(code.count()) == 0
    assert not leaves[0].grad.any() and not leaves[3].grad.any()


# -- a dictionary's step -------------------------------------------------------------------------------------

K = {"k": 6.0, "k_shared": 2.0, "k_delta": 4.0}


def dictionary(name: str, seed: int = 0):
    """One with enough latents that codes are held as pairs, away from its symmetric start."""
    fields = {f.name for f in dataclasses.fields(dictionaries.spec(name))}
    kind = {key: k for key, k in K.items() if key in fields}
    d = build(dictionaries.spec(name, latents=400, **kind), sites=2, width=24, seed=seed)
    with torch.no_grad():
        for p in d.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return d


def tokens(n: int = 200, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 2, 2, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("help_k", [9, 60])  # few of the dead, held as pairs; and many
@pytest.mark.parametrize("name", ["batchtopk", "delta", "matryoshka", "dsf", "dfc", "hybrid", "diff_sae", "tuned_sae"])
def test_gradients_of_a_step(path, name, help_k):
    """Objective and AuxK of every dictionary, against the dense reference in float64; it reaches the encoder of dead
    latents."""
    one, x, dead = dictionary(name), tokens(), torch.arange(400) % 3 == 0
    exact = copy.deepcopy(one).double()
    for d, data, kind in ((one, x, path), (exact, x.double(), "dense")):
        with taking(kind):
            run = d(data)
            assert isinstance(run.code, DenseCode) == (kind == "dense")
            (sum(d.objective(run).values()) + d.auxiliary(run, dead, help_k)).backward()
            d.hold()
    for (label, p), q in zip(one.named_parameters(), exact.parameters()):
        assert float((p.grad - q.grad).norm()) <= 3e-6 * float(q.grad.norm()), label
    assert one.encoder_FSMD.grad[dead].abs().sum() > 0


@needs_native
@pytest.mark.parametrize("name", ["delta", "batchtopk"])
def test_curves_agree(name):
    """Two hundred steps on either path end with the same explained variance."""
    mix = torch.randn(40, 2, 2, 24, generator=torch.Generator().manual_seed(5))
    on = torch.rand(6000, 40, generator=torch.Generator().manual_seed(6))
    source = TensorSource(*torch.einsum("nf,fsmd->nsmd", (on - 0.9).clamp_min(0) * 10, mix).split([5000, 1000]))
    spec, ends = dictionary(name).spec, []
    for path in ("native+bf16", "torch"):
        with taking(path):
            ends.append(fit(spec, source, FitSettings(steps=200, batch=256, learning_rate=3e-3)).quality)
    assert ends[0].ev_tuned > 0.5
    assert abs(ends[0].ev_tuned - ends[1].ev_tuned) < 0.02 and abs(ends[0].ev_delta - ends[1].ev_delta) < 0.03


# -- which path, and what it costs ---------------------------------------------------------------------------


def test_paths(monkeypatch):
    assert kernels.path() == ("native" if HAVE_NATIVE else "torch")
    for name in ["torch", "dense", *(["native"] if HAVE_NATIVE else [])]:
        with kernels.using(name):
            assert kernels.path() == name
    for name in ("fast", "native+bf16"):
        with kernels.using(name), pytest.raises(SettingError, match="no path"):
            kernels.path()
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert kernels.path() == "torch" and not compiled.serves()
    assert isinstance(dictionary("batchtopk")(tokens()).code, PairCode)


def test_a_fit_says_how_it_was_computed(tmp_path):
    source = TensorSource(tokens(300), tokens(50, seed=2))
    with kernels.using("torch"):
        fit(dictionary("batchtopk").spec, source, FitSettings(steps=2, batch=100), tmp_path)
    manifest = open_folder(tmp_path, SCHEMA)
    assert manifest["kernels"] == "torch" and manifest["float32_products"] in ("highest", "high", "medium")


def test_clipping_is_torchs():
    """The fused step divides by the norm; the same as clipping before it."""
    d, x, settings = dictionary("batchtopk"), 30 * tokens(), FitSettings(steps=3, batch=200, clip=0.01, aux_weight=0)
    plan, other = Schedule.of(d.spec, settings, 200), copy.deepcopy(d)
    state, optimizer = State.new(d, plan), torch.optim.Adam(other.parameters(), lr=1.0)
    for at in range(3):
        step(state, x, settings, plan)
        optimizer.zero_grad()
        sum(other.objective(other(x, progress=at / 2)).values()).backward()
        assert float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.01)) > 0.01
        optimizer.param_groups[0]["lr"] = plan.rate_at(at, settings)
        optimizer.step()
    for p, q in zip(d.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(1,), (70, 2, 1, 37), (33, 64), (512, 3)])
def test_adam_is_torchs(path, threads, shape):
    """Values and moments of torch's own; a parameter without a gradient stays."""
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    start, still = torch.randn(shape, generator=g), torch.ones(3)
    ours, theirs = ([torch.nn.Parameter(start.clone()), torch.nn.Parameter(still.clone())] for _ in range(2))
    with taking(path):
        one, other = kernels.Adam(ours, 0.03), torch.optim.Adam(theirs, lr=0.03)
        for number in range(5):
            grad = torch.randn(shape, generator=g) * 10.0 ** (number - 3) * (torch.rand(shape, generator=g) < 0.7)
            ours[0].grad, theirs[0].grad = grad * 2, grad.clone()
            one.grad_scale = torch.tensor(2.0)
            for optimizer in (one, other):
                optimizer.param_groups[0]["lr"] = 0.03 / (number + 1)
                optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for name, value in other.state[theirs[0]].items():
        torch.testing.assert_close(one.state[ours[0]][name], value, rtol=1e-5, atol=1e-7 * float(value.abs().max()))
    assert torch.equal(ours[1], still) and not one.state[ours[1]]


@pytest.mark.parametrize("path", PATHS[:2])
def test_adam_of_odd_parameters(path):
    """As torch's: none, single and one number, groups of their own rates, a gradient that lies otherwise; and numbers that torch's own step
    wrote to are known for other ones."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=g) for s in ((), (0, 3), (1,), (40, 33))]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    with taking(path), kernels.kept_memory():
        one, other = (
            kind([{"params": p[:2]}, {"params": p[2:], "lr": 0.5}], 0.1)
            for kind, p in ((kernels.Adam, ours), (torch.optim.Adam, theirs))
        )
        for turned in (False, True, False):
            before = kernels.lengths(ours[3])
            for p, q in zip(ours, theirs):
                p.grad = torch.randn(p.shape, generator=g)
                q.grad = p.grad.clone()
            if turned:
                ours[3].grad = ours[3].grad.T.contiguous().T
                one.grad_scale = torch.tensor(1.0)
            one.step(), other.step()
            torch.testing.assert_close(kernels.lengths(ours[3]), ours[3].norm(dim=1))
            assert not torch.equal(kernels.lengths(ours[3]), before)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@needs_native
def test_an_inference_tensor_is_as_good(way):
    x, W, b, _, weight = problem(300, 900, 64)
    gate = Gate(weight, ((0, 900, 7000),))
    with kernels.kept_memory():
        want = native.encode(x, W, b, gate), kernels.norm([x]), kernels.lengths(x)
        with torch.inference_mode():
            x, W = x.clone(), W.clone()
            got = native.encode(x, W, b, gate), kernels.norm([x]), kernels.lengths(x)
    assert all(map(torch.equal, got[0], want[0])) and torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    assert not len(native.encode(x[:0], W, b, Gate(weight, ((0, 900, 0),)))[0])


@needs_native
@pytest.mark.parametrize("R, I", [(70, 37), (96, 64), (1, 200), (33, 32)])
def test_what_is_derived_follows_its_numbers(R, I):
    """After a step of Adam it is what is derived of the new values, to the bit; after any other write it is made anew; outside a training
    loop nothing stays."""
    p = torch.nn.Parameter(torch.randn(R, 2, I, generator=torch.Generator().manual_seed(R)))
    optimizer = kernels.Adam([p], 0.1)

    def everything() -> list[torch.Tensor]:
        flat = p.detach().flatten(1)
        tiles = memory.derived(flat, (native.TILES, R), lambda: native._packed(flat, False))
        return [
            t.clone() for t in (*tiles, native._Panels.of(flat).space, native.squares(p.detach()), kernels.lengths(p))
        ]

    with kernels.kept_memory():
        before = everything()
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        kinds = {(native.TILES, R), (native.PANELED, R), (native.LENGTHS, I)}
        assert all(memory.known(p, kind) is not None for kind in kinds)
        followed = everything()
        with torch.no_grad():
            p.add_(0)  # nothing but a write
        assert not any(memory.known(p, kind) for kind in kinds) and set(memory.kinds(p)) == kinds
        anew = everything()
        for old, one, other in zip(before, followed, anew):
            assert torch.equal(one, other) and not torch.equal(old, one)
    assert not memory.kinds(p)


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("V", [7, 48, 1001])
def test_divergence(path, V):
    """Against float64: sharp and flat rows, few rows again for many, log-probabilities as they are, rows apart in memory."""
    g = torch.Generator().manual_seed(V)
    wide, few = (torch.randn(n, V + 3, generator=g) * torch.logspace(-1, 1.5, n)[:, None] for n in (36, 12))
    wide[0, 0] = 200.0
    for p, q in ((wide, few), (few, wide), (wide, wide.roll(1, 0))):
        p, q = p[:, :V], q[:, :V]
        logp, logq = (t.double().log_softmax(1).repeat(36 // len(t), 1) for t in (p, q))
        exact = (logp.exp() * (logp - logq)).sum(1)
        with taking(path):
            for p_sums, q_sums in ((True, True), (False, True), (True, False)):
                given = [t if sums else t.log_softmax(1) for t, sums in ((p, p_sums), (q, q_sums))]
                torch.testing.assert_close(
                    kernels.divergence(*given, p_sums, q_sums).double(),
                    exact,
                    rtol=1e-5,
                    atol=2e-6 * float(exact.max()),
                )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_of_nothing_there_is_nothing(path, threads):
    torch.set_num_threads(threads)
    with taking(path):
        assert kernels.divergence(torch.zeros(0, 8), torch.zeros(0, 8)).shape == (0,)


@pytest.mark.parametrize("path", PATHS[:2])
def test_divergence_is_loud(path):
    """A token that p rules out makes no number, as in torch; shapes that do not fit are refused."""
    p, q = torch.zeros(2, 40), torch.zeros(2, 40)
    p[0, 3] = p[1, 39] = -torch.inf  # in a register and after the last one
    with taking(path):
        assert kernels.divergence(p, q).isnan().all() and not kernels.divergence(q, q).isnan().any()
        for other in (torch.zeros(2, 39), torch.zeros(5, 40), torch.zeros(0, 40)):
            with pytest.raises(NumericsError, match="wrong shape"):
                kernels.divergence(q, other)


needs_tiles = pytest.mark.skipif(not tiled.on_tiles(), reason="a processor without tiles of bfloat16")


def weights(kind: str, O: int, I: int, generator: torch.Generator) -> torch.Tensor:
    """As models are published: with so many bits, or with more in a few places."""
    w_OI = torch.randn(O, I, generator=generator)
    if kind == "float32":
        return w_OI
    few_OI = w_OI.bfloat16().float() if kind == "bfloat16" else w_OI.half().float()
    return torch.where(torch.rand(O, I, generator=generator) < 0.002, w_OI, few_OI) if kind == "mixed" else few_OI


def kept(w_OI: torch.Tensor) -> tiled.Tiles:
    return tiled.Tiles(w_OI, tiled.Tiles(w_OI, 1).needed)


@needs_tiles
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "mixed"])
@pytest.mark.parametrize("N, I, O", [(1, 1, 1), (33, 47, 18), (64, 64, 96), (70, 601, 333), (50, 1031, 1031)])
def test_products_on_tiles_are_as_exact_as_float32(kind, N, I, O):
    """Rows of any size, whose smallest numbers count as much as the largest; no answer hangs on what is multiplied beside it."""
    g = torch.Generator().manual_seed(N)
    x_NI = torch.randn(N, I, generator=g) * torch.logspace(-15, 15, N)[:, None]
    w_OI = weights(kind, O, I, g) * 2.0 ** torch.arange(-20, O - 20).clamp_max(20)[:, None]
    found, exact = tiled.product(x_NI, w_OI), x_NI.double() @ w_OI.double().T
    size = x_NI.double().norm(dim=1)[:, None] * w_OI.double().norm(dim=1)
    assert float(((found - exact).abs() / size).max()) <= 5e-7
    assert float(((found - exact) / size).norm()) <= 1.3 * float(((x_NI @ w_OI.T - exact) / size).norm()) + 1e-9
    tiles = kept(w_OI)
    assert tiles.parts == {"bfloat16": 1, "float16": 2}.get(kind, 3) or I * O < 1000
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(tiled.product(x_NI, w_OI), found) and torch.equal(tiled.product(x_NI, tiles), found)
    assert torch.equal(tiled.product(x_NI[N // 2 :], w_OI), found[N // 2 :])
    assert torch.equal(tiled.product(x_NI[: N // 2 + 1], tiles), found[: N // 2 + 1])
    assert torch.equal(tiled.product(x_NI, w_OI[O // 3 :]), found[:, O // 3 :])


@needs_tiles
@pytest.mark.parametrize("N, I, O, kind", [(700, 600, 500, "float16"), (90, 64, 50_000, "bfloat16"), (400, 40, 20_000, "mixed"),
                                           (500, 700, 5000, "float16"), (150, 9000, 100, "float32")])  # fmt: skip
def test_large_products_are_made_piece_by_piece(N, I, O, kind):
    """More rows than a core's cache holds, more columns than are brought at a time, more depth than is added up at once; threads
    that help each other, and one alone."""
    g = torch.Generator().manual_seed(N)
    x_NI, w_OI = torch.randn(N, I, generator=g), weights(kind, O, I, g)
    exact, tiles = x_NI.double() @ w_OI.double().T, kept(w_OI)
    torch.set_num_threads(1)
    found = tiled.product(x_NI, w_OI)
    assert float((found - exact).norm() / exact.norm()) <= 4e-7
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(tiled.product(x_NI, tiles), found) and torch.equal(tiled.product(x_NI, w_OI), found)


@needs_tiles
def test_weights_in_tiles_take_no_more_than_is_left():
    w_OI = weights("float16", 300, 400, torch.Generator().manual_seed(0))
    one, two = tiled.bytes_of_tiles(w_OI, 1), tiled.bytes_of_tiles(w_OI, 2)
    assert tiled.tiles(w_OI, one - 1) is tiled.tiles(w_OI, two - 1) is None
    found = tiled.tiles(w_OI, two)
    assert (found.parts, found.nbytes) == (2, two) and two < 1.3 * w_OI.nbytes
    for refused in (w_OI.double(), w_OI[:100], Wrapped(w_OI)):
        assert tiled.tiles(refused, 1 << 30) is None


@needs_tiles
@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "R, Q, V, D", [(1, 1, 300, 64), (70, 35, 1013, 600), (600, 40, 20_000, 40), (90, 90, 50_000, 300)]
)
def test_divergence_without_logits(kind, theirs, R, Q, V, D):
    """Against float64; by any number of threads, and of any rows, the same bits."""
    g = torch.Generator().manual_seed(V)
    w_VD = weights(kind, V, D, g) / D**0.5
    few_QD = 3 * torch.randn(Q, D, generator=g)
    x_RD = few_QD.repeat(R // Q, 1) + torch.logspace(-4, 0, R)[:, None] * torch.randn(R, D, generator=g)
    logp_QV, tiles = (few_QD @ w_VD.T).log_softmax(1), kept(w_VD)
    logl_RV, logp_RV = (x_RD.double() @ w_VD.double().T).log_softmax(1), logp_QV.double().repeat(R // Q, 1)
    exact_R = (logp_RV.exp() * (logp_RV - logl_RV) if theirs else logl_RV.exp() * (logl_RV - logp_RV)).sum(1)
    found_R = kernels.divergence_of(x_RD, w_VD, tiles, logp_QV, theirs)
    torch.testing.assert_close(found_R.double(), exact_R, rtol=1e-5, atol=3e-6)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.divergence_of(x_RD, w_VD, tiles, logp_QV, theirs), found_R)
        few = R // 3 if Q == R else 0
        some_R = kernels.divergence_of(x_RD[few : few + Q], w_VD, tiles, logp_QV[few:], theirs) if Q < R else \
            kernels.divergence_of(x_RD[few:], w_VD, tiles, logp_QV[few:], theirs)  # fmt: skip
        assert torch.equal(some_R, found_R[few : few + len(some_R)])


@needs_tiles
@pytest.mark.parametrize("theirs", [False, True])
@pytest.mark.parametrize("by", [5.0, 20.0, 50.0])
def test_divergence_without_logits_is_exact_where_it_starts_badly(theirs, by):
    """Tokens that nobody says, as the first ones of a vocabulary often are, and a table whose sum is only nearly 1."""
    g = torch.Generator().manual_seed(0)
    w_VD, x_RD = torch.randn(5000, 200, generator=g), torch.randn(40, 200, generator=g) / 5
    w_VD[:16, 0] += by
    x_RD[:, 0] = 1
    other_RD = x_RD + torch.randn(40, 200, generator=g) / 50
    other_RD[:, 0] = 0
    logp_RV = (other_RD @ w_VD.T).log_softmax(1)
    logl_RV, exact = (x_RD.double() @ w_VD.double().T).log_softmax(1), logp_RV.double()
    exact_R = (exact.exp() * (exact - logl_RV) if theirs else logl_RV.exp() * (logl_RV - exact)).sum(1)
    found_R = kernels.divergence_of(x_RD, w_VD, kept(w_VD), logp_RV, theirs)
    torch.testing.assert_close(found_R.double(), exact_R, rtol=3e-6, atol=1e-5)


@needs_tiles
def test_divergence_without_logits_is_refused_where_it_would_be_wrong():
    """Other shapes, other numbers, deep rows, and rows that differ beyond float32's range."""
    g = torch.Generator().manual_seed(0)
    w_VD, x_RD = torch.randn(400, 500, generator=g), torch.randn(6, 500, generator=g)
    logp_QV, tiles = (x_RD[:3] @ w_VD.T).log_softmax(1), kept(w_VD)

    def found(x=x_RD, w=w_VD, t=tiles, logp=logp_QV):
        return [kernels.divergence_of(x, w, t, logp, theirs) for theirs in (False, True)]

    assert all(kl is not None and kl.shape == (6,) for kl in found())
    deep = torch.randn(200, 1100, generator=g)
    for refused in (found(logp=logp_QV[:, :399]), found(logp=logp_QV.double()), found(x=x_RD[:5]), found(x=x_RD[:0]), found(x=x_RD.double()),
                    found(logp=logp_QV[:0]), found(x=deep[:6], w=deep, t=kept(deep), logp=deep[:3, :200].log_softmax(1))):  # fmt: skip
        assert refused == [None, None]
    for bad in (torch.nan, torch.inf):
        assert found(x=torch.where(torch.arange(500) == 7, bad, x_RD)) == [None, None]
    assert found(x=1000 * x_RD) == [None, None]
    ruled_out = logp_QV.clone()
    ruled_out[0, 399] = -torch.inf
    assert found(logp=ruled_out) == [None, None]


needs_native = pytest.mark.skipif(not HAVE_NATIVE, reason="no compiled file")


@needs_tiles
def test_products_on_tiles_take_numbers_where_they_lie():
    """Rows apart in memory, numbers apart in a row; the ends of rows and columns are nobody else's."""
    g = torch.Generator().manual_seed(0)
    wide, other = torch.randn(50, 130, generator=g), torch.randn(40, 120, generator=g)
    for x_NI, w_OI in (
        (wide[:, 3:40], other[:, 7:44]),
        (wide[:, ::2][:, :37], other.T[:37].T),
        (wide.T[:50, :40], other[:, :40]),
    ):
        torch.testing.assert_close(tiled.product(x_NI, w_OI), x_NI @ w_OI.T, rtol=1e-5, atol=1e-5)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x_NI, w_OI = wide.clone(), torch.randn(40, 130, generator=g)
        x_NI[7, 129] = bad
        found = tiled.product(x_NI, w_OI)
        assert not found[7].isfinite().any() and found[:7].isfinite().all() and found[8:].isfinite().all()
        x_NI[7, 129], w_OI[39, 2] = 0, bad
        found = tiled.product(x_NI, w_OI)
        assert not found[:, 39].isfinite().any() and found[:, :39].isfinite().all()


@needs_tiles
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("I", [601, 2100, 9000])
def test_products_of_many_numbers_of_one_sign_are_as_exact(kind, I):
    """What a running sum loses grows with it; torch's sums are made in blocks, too."""
    g = torch.Generator().manual_seed(I)
    x_NI, w_OI = torch.randn(33, I, generator=g).abs(), weights(kind, 40, I, g).abs()
    exact = x_NI.double() @ w_OI.double().T
    assert float((tiled.product(x_NI, w_OI) - exact).norm()) <= 1.3 * float((x_NI @ w_OI.T - exact).norm())


@needs_tiles
@pytest.mark.parametrize("tiny", [3e-35, 3e-38, 1e-39, 4.6e-41, 1e-45])
def test_tiny_numbers_count_as_none(tiny):
    """Numbers whose parts a tile takes for 0, beside others in any place."""
    g = torch.Generator().manual_seed(0)
    x_NI, w_OI = torch.randn(40, 64, generator=g), torch.randn(50, 64, generator=g)
    for at in range(0, 64, 5):
        for other in (x_NI, w_OI):
            changed = other.clone()
            changed[:, at : at + 16] = tiny
            pair = (changed, w_OI) if other is x_NI else (x_NI, changed)
            torch.testing.assert_close(tiled.product(*pair), pair[0] @ pair[1].T, rtol=1e-5, atol=1e-5)


@needs_tiles
def test_products_are_float32_whatever_torch_makes_by_default():
    x_NI, w_OI = torch.randn(60, 70), torch.randn(80, 70)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = tiled.product(x_NI, w_OI)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, x_NI @ w_OI.T, rtol=1e-5, atol=1e-5)


class Wrapped(torch.Tensor):
    """Says that it is float32 on the CPU, and holds nothing there."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_who_makes_a_product(monkeypatch):
    x_NI, w_OI = torch.zeros(tiled.FEW_ROWS, 512), torch.zeros(512, 512)
    monkeypatch.setattr(tiled, "on_tiles", lambda: True)
    served = [(x_NI, w_OI)] if HAVE_NATIVE else []
    wider = torch.zeros(tiled.FEW_ROWS, 513)
    for given in ((x_NI[1:], w_OI), (x_NI, w_OI[: tiled.NARROW - 1]), (x_NI.double(), w_OI.double()), (x_NI.to("meta"), w_OI.to("meta")),
                  (wider, w_OI), (wider[:, :0], w_OI[:, :0]), (Wrapped(x_NI), w_OI), (x_NI, Wrapped(w_OI))):  # fmt: skip
        assert not tiled.multiplies(*given) and kernels.product(*given) is None
    assert all(tiled.multiplies(*given) for given in served)
    monkeypatch.undo()
    with kernels.using("torch"):
        assert kernels.products() == "torch" and kernels.product(x_NI, w_OI) is None
    assert kernels.products() == ("tiles" if tiled.on_tiles() else "torch") and kernels.products("meta") == "torch"


def test_only_float32_on_the_cpu_is_native():
    assert not compiled.serves(torch.zeros(1, dtype=torch.float64)) and not compiled.serves(
        torch.zeros(1, device="meta")
    )


def test_fast_matmul_restores():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError), kernels.fast_matmul():
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == before


def test_memory_is_used_again_and_never_while_held():
    from tunediff.kernels.memory import LARGE, empty

    n = LARGE // 4 + 5
    with kernels.kept_memory():
        first = empty(n).fill_(1)
        view, second = first[:3], empty(n).fill_(2)
        where = first.data_ptr()
        del first
        assert empty(n).data_ptr() not in (where, second.data_ptr()) and view.tolist() == [1, 1, 1]
        del view
        assert where in {t.data_ptr() for t in (empty(n), empty(n), empty(n))} | {empty(n).data_ptr()}
        held = empty(n).fill_(3)
    assert second[-1] == 2 and held[-1] == 3  # what was made inside outlives it
    assert len({empty(n).data_ptr(), held.data_ptr()}) == 2


@needs_native
def test_threads_of_our_own_give_the_same(monkeypatch):
    """Where torch's build has no team to be found."""
    g = torch.Generator().manual_seed(0)
    p, q, x_NI, w_OI = (torch.randn(n, 90, generator=g) for n in (50, 50, 60, 70))
    torch.set_num_threads(3)

    def all_of_it():
        return [kernels.divergence(p, q), *([tiled.product(x_NI, w_OI)] if tiled.on_tiles() else [])]

    before = all_of_it()
    monkeypatch.setattr(compiled, "team", lambda: None)
    assert all(map(torch.equal, all_of_it(), before))
    with pytest.raises(TypeError, match="arguments"):
        monkeypatch.undo()
        compiled.spread("kth", [0], [0, 1])


@pytest.mark.parametrize("own", [True, False])
def test_parts_run_side_by_side_on_torchs_threads_and_errors_come_back(own, monkeypatch):
    team, before = compiled.team() if own else None, torch.get_num_threads()
    monkeypatch.setattr(compiled, "team", lambda: team)
    if own and team is None:
        pytest.skip("torch was not built with an OpenMP that has GOMP_parallel")
    torch.set_num_threads(2)
    try:
        both = threading.Barrier(2, timeout=30)
        assert len(set(compiled.each(lambda part: (both.wait(), threading.get_ident())[1], range(2)))) == 2
        assert compiled.each(lambda part: part**2, range(9)) == [n**2 for n in range(9)]
        with pytest.raises(ZeroDivisionError):
            compiled.each(lambda part: 1 // (part - 5), range(9))
        assert compiled.each(lambda part: torch.ones(1 << 16).sum().item(), range(4)) == [65536.0] * 4, (
            "torch inside and after it"
        )
    finally:
        torch.set_num_threads(before)
