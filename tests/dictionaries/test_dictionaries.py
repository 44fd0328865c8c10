"""Every dictionary, found unasked: mirror, order, determinism, round trip, gradients, gates, resumption."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunediff import dictionaries
from tunediff.core import variants
from tunediff.core.artifacts import read_json, sealed, write_json
from tunediff.core.axes import BASE, TUNED
from tunediff.core.errors import ArtifactError, SettingError, VariantError
from tunediff.dictionaries.architectures.base import Pass, delta_of, mean_squared_error
from tunediff.dictionaries.calibrating import apart
from tunediff.dictionaries.fitted import Fitted, build
from tunediff.dictionaries.fitting import fit, step
from tunediff.dictionaries.latent_scaling import latent_scaling
from tunediff.dictionaries.schedule import FitSettings, Schedule, State
from tunediff.dictionaries.sources import Normalization, TensorSource
from tunediff.kernels import gates

VARIANTS = variants.names(dictionaries.PACKAGE)
TARGET = {name: variants.load(dictionaries.PACKAGE, name).Spec.target for name in VARIANTS}
S, D, F = 2, 12, 40


def small(name: str, **more):
    """A spec of that variant that fits the data below."""
    known = {f.name for f in dataclasses.fields(variants.load(dictionaries.PACKAGE, name).Spec)}
    wanted = {"latents": F, "k": 3.0, "k_shared": 1.0, "k_delta": 2.0, **more}
    return dictionaries.spec(name, **{key: value for key, value in wanted.items() if key in known})


def made(name: str, dtype=torch.float32, seed: int = 0, **more):
    """A dictionary away from its symmetric start."""
    d = build(small(name, **more), sites=S, width=D, seed=seed).to(dtype)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in d.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=dtype))
    return d


def activations(n: int = 256, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, S, 2, D, generator=torch.Generator().manual_seed(99), dtype=dtype)
    directions[:14, :, TUNED] = directions[:14, :, BASE]
    directions[14:17, :, BASE] = 0
    directions[17:, :, TUNED] = 0
    on = (torch.rand(n, 20, generator=g, dtype=dtype) < 0.1) * (0.5 + torch.rand(n, 20, generator=g, dtype=dtype))
    return torch.einsum("nf,fsmd->nsmd", on, directions) + 0.02 * torch.randn(n, S, 2, D, generator=g, dtype=dtype)


@pytest.fixture(scope="module")
def source() -> TensorSource:
    return TensorSource(activations(12_000, 1) + 0.7, activations(4000, 2) + 0.7)


SHORT = FitSettings(steps=120, batch=256, learning_rate=3e-3, log_every=40)


@pytest.fixture(scope="module")
def fits(source) -> dict[str, Fitted]:
    return {name: fit(small(name), source, SHORT) for name in VARIANTS}


# -- variants
# -------------------------------------------------------------------------------------------------


def test_all_are_found():
    rivals = {"dsf", "dfc", "matryoshka", "diff_sae", "tuned_sae"}
    assert {"batchtopk", "l1", "hybrid", "delta"} | rivals <= set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_abstract_or_final(name):
    """A variant implements what the base leaves open and overrides nothing that it implements."""
    from tunediff.dictionaries.architectures.base import Dictionary

    kind = variants.load(dictionaries.PACKAGE, name)
    assert kind.Spec.variant == name
    implemented = {key for key in vars(Dictionary) if key not in Dictionary.__abstractmethods__}
    assert not {key for key in vars(kind) if not key.startswith("__") and key in implemented} - {"Spec", "_abc_impl"}


def test_settings_refuse():
    with pytest.raises(SettingError, match="latents"):
        dictionaries.spec("batchtopk", latent=3)
    with pytest.raises(SettingError, match="k is out of range"):
        dictionaries.spec("batchtopk", latents=8, k=9)
    with pytest.raises(VariantError):
        dictionaries.spec("batchtopq")


@pytest.mark.parametrize("name", VARIANTS)
def test_groups_cover_all_latents(name):
    groups = made(name).groups()
    assert [g.start for g in groups] == [0, *[g.stop for g in groups][:-1]] and groups[-1].stop == F


@pytest.mark.parametrize("name", VARIANTS)
def test_start_is_copied(name):
    """Both models and both ends start from one draw: independent draws fake an asymmetry."""
    d = build(small(name), sites=S, width=D, seed=3)
    share_F = built_in(d)
    write_FSMD = d.write_FSMD()
    both = share_F == 0.5
    assert torch.equal(write_FSMD[both, :, BASE], write_FSMD[both, :, TUNED])
    assert torch.equal(d.encoder_FSMD, d.decoder_FSMD)
    torch.testing.assert_close(d.norms_MF(), d.spec.init_norm * torch.stack([share_F < 1, share_F > 0]))
    assert torch.equal(d.share_F(), share_F)


def built_in(d) -> torch.Tensor:
    """The shares that follow from the forms alone: one half for a latent that is free, or shared."""
    forms = {"base": 0.0, "tuned": 1.0}
    free = 1.0 if d.spec.target == "difference" else 0.5
    return torch.tensor([forms.get(g.form_of(j), free) for g in d.groups() for j in range(g.start, g.stop)])


@pytest.mark.parametrize("name", VARIANTS)
def test_mirror(name):
    """Swapping the models mirrors share and negates delta, before and after training. Only what is told from both
    models has a mirror, and training keeps it where no latent is kept for one of them."""
    if TARGET[name] != "both":
        with pytest.raises(SettingError, match="mirror"):
            made(name).mirrored()
        return
    d, x = made(name, torch.float64), activations(dtype=torch.float64)
    run, twin = d(x), d.mirrored()(x.flip(2))
    torch.testing.assert_close(twin.code.dense(), run.code.dense())
    torch.testing.assert_close(twin.xhat_NSMD, run.xhat_NSMD.flip(2))
    torch.testing.assert_close(delta_of(twin.xhat_NSMD), -delta_of(run.xhat_NSMD))
    torch.testing.assert_close(d.mirrored().share_F(), 1 - d.share_F())
    for one, other in zip(d.objective(run).values(), d.mirrored().objective(twin).values()):
        torch.testing.assert_close(one, other)
    if bool((built_in(d) != 0.5).any()):
        return
    trained, mirrored = trained_steps(name, x), trained_steps(name, x.flip(2))
    torch.testing.assert_close(mirrored.share_F(), 1 - trained.share_F(), atol=1e-6, rtol=0)


def trained_steps(name, x_NSMD, steps: int = 30, **more):
    """A dictionary trained on the same batch again and again, from the usual start."""
    d = build(small(name, **more), sites=S, width=D, seed=0).to(x_NSMD.dtype)
    settings = FitSettings(steps=steps, batch=len(x_NSMD), learning_rate=3e-3)
    plan = Schedule.of(d.spec, settings, len(x_NSMD))
    state = State.new(d, plan)
    for _ in range(steps):
        step(state, x_NSMD, settings, plan)
    return d


@pytest.mark.parametrize("name", VARIANTS)
def test_order_changes_nothing(name):
    d, x = made(name, torch.float64), activations(dtype=torch.float64)
    run = d(x)
    tokens = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d(x[tokens]).code.dense(), run.code.dense()[tokens])
    order = torch.cat(
        [g.start + torch.randperm(g.stop - g.start, generator=torch.Generator().manual_seed(1)) for g in d.groups()]
    )
    twin = copy.deepcopy(d)
    with torch.no_grad():
        for part in ("encoder_FSMD", "decoder_FSMD", "encoder_bias_F"):
            getattr(twin, part).copy_(getattr(d, part)[order])
    again = twin(x)
    torch.testing.assert_close(again.code.dense(), run.code.dense()[:, order])
    torch.testing.assert_close(again.xhat_NSMD, run.xhat_NSMD)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_fp64(name):
    """Every part of every objective against finite differences, in the middle of one pattern of kept
    codes."""
    d, x = made(name, torch.float64), activations(24, dtype=torch.float64)
    names = [n for n, _ in d.named_parameters()]

    def loss(*values):
        run = torch.func.functional_call(d, dict(zip(names, values)), (x,))
        with swapped(d, names, values):
            return torch.stack(list(d.objective(run).values())).sum()

    values = tuple(p.detach().clone().requires_grad_() for p in d.parameters())
    assert torch.autograd.gradcheck(loss, values, eps=1e-7, atol=1e-5, fast_mode=True)


class swapped:
    """Puts other tensors in the place of a module's parameters, for a with block."""

    def __init__(self, module, names, values):
        self.module, self.names, self.values = module, names, values

    def __enter__(self):
        self.kept = {n: self.module._parameters.pop(n) for n in self.names}
        for n, v in zip(self.names, self.values):
            setattr(self.module, n, v)

    def __exit__(self, *_):
        for n in self.names:
            delattr(self.module, n)
            self.module._parameters[n] = self.kept[n]


# -- fits
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_same_twice(name, source, fits):
    again = fit(small(name), source, SHORT)
    for key, value in fits[name].dictionary.state_dict().items():
        assert torch.equal(value, again.dictionary.state_dict()[key]), key
    assert again.curve == fits[name].curve and same(again.quality, fits[name].quality)


def same(one, other) -> bool:
    """Equal, and nan where the other is: what a dictionary does not reconstruct has no explained variance."""
    return repr(one) == repr(other)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, source, fits, tmp_path):
    x = activations(500, 5) + 0.7
    fits[name].save(tmp_path)
    again = Fitted.load(tmp_path)
    assert torch.equal(again.codes(x), fits[name].codes(x))
    assert torch.equal(again.reconstruct(x), fits[name].reconstruct(x))
    for part in ("thresholds", "curve", "sites", "seed", "source"):
        assert getattr(again, part) == getattr(fits[name], part), part
    assert same(again.quality, fits[name].quality)


def test_a_manifest_does_not_decide_which_code_runs(fits, tmp_path, monkeypatch):
    folder, lab = tmp_path / "fit", tmp_path / "lab"
    lab.mkdir()
    (lab / "lab_dictionary.py").write_text("from tunediff.dictionaries.architectures.batchtopk import VARIANT as Probe")
    monkeypatch.syspath_prepend(lab)
    fits["batchtopk"].save(folder)
    manifest = folder / "manifest.json"
    write_json(manifest, sealed({**read_json(manifest), "variant": "lab_dictionary:Probe"}))
    for variant in (None, "batchtopk", "lab_dictionary:Other"):
        with pytest.raises(ArtifactError, match="names code to be imported"):
            Fitted.load(folder, variant)
        assert "lab_dictionary" not in sys.modules
    again = Fitted.load(folder, "lab_dictionary:Probe")
    assert torch.equal(again.dictionary.encoder_FSMD, fits["batchtopk"].dictionary.encoder_FSMD)
    del sys.modules["lab_dictionary"]


@pytest.mark.parametrize("name", VARIANTS)
def test_changes_are_the_dictionary(name, fits):
    """Strengths are codes, writes add up to the reconstruction, all in raw units."""
    fitted, x = fits[name], activations(500, 6) + 0.7
    f_NF = fitted.codes(x)
    changes = [fitted.change(j, id=f"t/{j}", finder="test") for j in range(F)]
    assert float((f_NF > 0).sum()) > 0
    g = torch.stack([c.strength(x) for c in changes], 1)
    near = (fitted.dictionary.pre(fitted.normalization.apply(x)) - fitted.threshold_F).abs() < 1e-4
    torch.testing.assert_close(torch.where(near, f_NF, g), f_NF, atol=1e-4, rtol=1e-4)
    total = torch.einsum("nf,fsmd->nsmd", f_NF, torch.stack([c.write_SMD for c in changes])) + fitted.offset_SMD
    torch.testing.assert_close(total, fitted.reconstruct(x), atol=1e-4, rtol=1e-4)
    shares = torch.tensor([c.share for c in changes])
    torch.testing.assert_close(shares, fitted.dictionary.share_F(), atol=0.05 if S > 1 else 1e-5, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_calibrated(name, fits):
    """Mean L0 at inference is within 5 % of training's, and good enough to be worth calibrating."""
    quality = fits[name].quality
    assert quality.comparable, quality
    if TARGET[name] == "difference":
        assert math.isnan(quality.ev_base) and math.isnan(quality.ev_tuned) and quality.ev_delta > 0.5
    else:
        assert quality.ev_base > 0.5 and quality.ev_tuned > 0.5


class Documents(TensorSource):
    """Activations in documents of ten tokens."""

    def documents(self, split: str) -> torch.Tensor:
        return torch.arange(self.count(split)) // 10


def noisy_documents(n: int, seed: int) -> torch.Tensor:
    """Nothing to learn but the documents themselves."""
    g = torch.Generator().manual_seed(seed)
    about = torch.randn(n // 10, S, 2, D, generator=g).repeat_interleave(10, 0)
    return about + 0.3 * torch.randn(n, S, 2, D, generator=g)


def test_calibrated_on_text_it_was_not_trained_on():
    """Few tokens and many epochs: set on text trained on, the threshold lets through twice k of any other text.

    Measured, of k = 4: 9.3 on training tokens, 7.8 on other tokens of the same documents, 3.9 on other documents.
    """
    x = noisy_documents(3000, 1), noisy_documents(4000, 2)
    spec = small("batchtopk", latents=512, k=4.0)
    settings = FitSettings(steps=500, batch=128, learning_rate=3e-3)

    def l0(source, **more):
        return fit(spec, source, dataclasses.replace(settings, **more)).quality.l0_inference

    before, tokens, documents = l0(Documents(*x), calibration_share=0.0), l0(TensorSource(*x)), l0(Documents(*x))
    assert before > 1.8 * spec.k
    assert documents < tokens < before and abs(documents / spec.k - 1) < 0.1


def test_kept_apart():
    """Whole documents, by the seed, never trained on; tokens where documents are not known; never all of them."""
    x = activations(100)
    train, kept = apart(Documents(x, x), FitSettings())
    assert torch.equal(torch.cat([train, kept]).sort().values, torch.arange(100))
    assert len(kept) == 10 and len(torch.unique(kept // 10)) == 1
    others = [apart(Documents(x, x), FitSettings(seed=seed))[1] for seed in range(8)]
    assert torch.equal(others[0], kept) and len({int(other[0]) for other in others}) > 1
    assert len(apart(TensorSource(x, x), FitSettings())[1]) == 10
    one = Documents(x[:10], x)  # one document: its tokens are dealt
    assert [len(part) for part in apart(one, FitSettings())] == [9, 1]
    for source, share in ((Documents(x, x), 0.0), (TensorSource(x[:1], x), 0.1)):
        both = apart(source, FitSettings(calibration_share=share))
        assert torch.equal(*both) and len(both[0]) == source.count("train")
    read = []

    class Watched(Documents):
        def read(self, split, index_N):
            read.append((split, index_N))
            return super().read(split, index_N)

    data = activations(1000)
    source = Watched(data, data)
    settings = dataclasses.replace(SHORT, steps=20, batch=64)
    fit(small("batchtopk"), source, settings)
    trained = torch.cat([index for split, index in read if split == "train" and len(index) == 64])
    train, kept = apart(source, settings)
    assert torch.isin(trained, train).all() and not torch.isin(trained, kept).any()


def test_normalization(source):
    norm = Normalization.measure(source)
    x = norm.apply(source.read("train", torch.arange(source.count("train"))))
    assert float(x.mean(0).abs().max()) < 1e-5
    torch.testing.assert_close(x.square().mean((0, 2, 3)), torch.ones(S))
    torch.testing.assert_close(norm.undo(x), source.read("train", torch.arange(source.count("train"))))
    assert abs(norm.delta_variance - float(delta_of(x).square().mean())) < 1e-5
    loud = Normalization.measure(TensorSource(activations() * torch.tensor([1.0, 1.3])[:, None], activations()))
    quiet = Normalization.measure(TensorSource(activations(), activations()))
    difference = loud.log_rms_ratio_S - quiet.log_rms_ratio_S
    torch.testing.assert_close(difference, torch.full((S,), 1.3).log())


def test_identical_models_stay_identical():
    """A model against itself: symmetric start, symmetric gradients, share exactly one half.

    Nearly so beside latents dedicated to one model, which are as many for both but start apart.
    """
    x = activations()
    x = x[:, :, :1].expand(-1, -1, 2, -1)
    for name in VARIANTS:
        trained = trained_steps(name, x)
        torch.testing.assert_close(trained.share_F(), built_in(trained), atol=0.02 if name == "dfc" else 1e-5, rtol=0)


# -- gates
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,k", [((64, 40), 3), ((512, 300), 7.5), ((1024, 512), 0.01), ((300, 400), 120)])
def test_batch_topk_is_exact(shape, k):
    v = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    at = gates.batch_topk(v, k)
    want = torch.sort(v.flatten(), descending=True, stable=True).indices[: round(shape[0] * k)].sort().values
    assert torch.equal(at, want)


def test_batch_topk_ties_and_shortage():
    v = torch.randint(0, 3, (400, 200), generator=torch.Generator().manual_seed(0)).float()
    at = gates.batch_topk(v, 5)
    assert len(at) == 2000 and torch.equal(at, (v.flatten() == 2).nonzero().flatten()[:2000])
    assert len(gates.batch_topk(v, 190)) == int((v > 0).sum())
    assert len(gates.batch_topk(torch.zeros(5, 5), 2)) == 0
    spiked = torch.zeros(1000, 100)
    spiked.view(-1)[::61] = torch.rand(1640)  # everything large sits where the sample looks
    spiked = spiked + 1e-6
    assert len(gates.batch_topk(spiked, 10)) == 10_000


@pytest.mark.parametrize("name", VARIANTS)
def test_gates_keep_exactly_nk(name):
    d, x = made(name), activations()
    f = d(x).code.dense()
    for group in d.groups():
        if group.k is not None:
            assert int((f[:, group.start : group.stop] > 0).sum()) == round(len(x) * group.k)


def test_calibrate():
    v = [torch.rand(100), torch.rand(100)]
    theta = gates.calibrate(v, 30)
    assert int((torch.cat(v) > theta).sum()) == 30
    assert gates.calibrate(v, 500) == 0.0 and gates.calibrate(v, 0) == float("inf")


def test_auxk_helps_the_dead_alone():
    """It reaches the encoder of dead latents, leaves live ones and the target alone, and survives
    nonsense."""
    d, x = made("batchtopk"), activations()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[5:15] = True
    run = d(x)
    d.auxiliary(run, dead, 4).backward()
    for part in (d.encoder_FSMD, d.decoder_FSMD, d.encoder_bias_F):
        assert float(part.grad[dead].abs().sum()) > 0
        assert float(part.grad[~dead].abs().sum()) == 0
    assert d.decoder_bias_SMD.grad is None
    assert d.auxiliary(run, torch.zeros_like(dead), 4).item() == 0
    perfect = Pass(x, x.clone(), run.parts, run.code, 1.0)
    d.zero_grad()
    nothing = d.auxiliary(perfect, dead, 4)
    nothing.backward()
    assert nothing.item() == 0 and not d.encoder_FSMD.grad.any()
    assert made("l1").auxiliary(run, dead, 4).item() == 0  # ReLU latents are not gated


# -- Delta-Crosscoder
# -----------------------------------------------------------------------------------------


def test_delta_term_spares_the_shared_group():
    d, x = made("delta"), activations()
    d.delta_error(d(x), d.spec.shared).backward()
    shared = slice(0, d.spec.shared)
    for part in (d.encoder_FSMD, d.decoder_FSMD, d.encoder_bias_F):
        assert float(part.grad[shared].abs().sum()) == 0
        assert float(part.grad[d.spec.shared :].abs().sum()) > 0


def test_unmasked_delta_term_is_the_difference_of_errors():
    d, x = made("delta", torch.float64), activations(dtype=torch.float64)
    run = d(x)
    error = run.error_NSMD
    torch.testing.assert_close(d.delta_error(run, 0), (error[:, :, TUNED] - error[:, :, BASE]).square().mean())


def test_without_its_term_and_groups_delta_is_batchtopk():
    x = activations()
    for share in (0.0, 1.0):
        one = trained_steps("delta", x, lambda_delta=0.0, shared_share=share, k_shared=3.0, k_delta=3.0)
        other = trained_steps("batchtopk", x)
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


# -- what the rivals promise
# -------------------------------------------------------------------------------------


def test_dedicated_latents_never_touch_the_other_model(fits):
    """Exactly 0 after training, AuxK included; the groups are told in the changes."""
    fitted = fits["dfc"]
    d, own = fitted.dictionary, fitted.dictionary.spec.exclusive
    assert own == 2
    for part, other in ((slice(0, own), TUNED), (slice(own, 2 * own), BASE)):
        for whole in (d.encoder_FSMD, d.decoder_FSMD):
            assert not whole[part, :, other].any() and whole[part, :, 1 - other].all()
    assert d.share_F()[: 2 * own].tolist() == [0, 0, 1, 1]
    assert float(d.share_F()[2 * own :].min()) > 0.1 and float(d.share_F()[2 * own :].max()) < 0.9
    named = [fitted.change(j, id=f"t/{j}", finder="test").origin["group"] for j in range(2 * own + 1)]
    assert named == ["base", "base", "tuned", "tuned", "both"]
    d, x = build(small("dfc"), sites=S, width=D, seed=0), activations()
    d.auxiliary(d(x), torch.ones(F, dtype=torch.bool), 4).backward()
    d.hold()
    assert not d.decoder_FSMD.grad[:own, :, TUNED].any() and d.decoder_FSMD.grad[:own, :, BASE].any()


def test_designated_latents_write_alike(fits):
    """One decoder vector for both models, exactly, while encoders and free latents part; k is the sum."""
    d = fits["dsf"].dictionary
    shared, free = d.decoder_FSMD[: d.spec.shared], d.decoder_FSMD[d.spec.shared :]
    assert d.spec.shared == 4 and torch.equal(shared[:, :, BASE], shared[:, :, TUNED])
    assert not torch.equal(free[:, :, BASE], free[:, :, TUNED])
    assert not torch.equal(d.encoder_FSMD[:4, :, BASE], d.encoder_FSMD[:4, :, TUNED])
    assert sum(g.k for g in d.groups()) == pytest.approx(d.spec.k)
    on_shared, on_free = (g.k / (g.stop - g.start) for g in d.groups())
    assert on_shared == pytest.approx(2 * on_free)


def test_prefixes_reconstruct(fits, source):
    """Each is the decoding of its own latents; early ones say more than as many of plain BatchTopK."""
    d, x = made("matryoshka", torch.float64), activations(dtype=torch.float64)
    assert d.spec.sizes == (1, 4, 9, 19, 40)
    assert dictionaries.spec("matryoshka", latents=65_536).sizes == (2048, 6144, 14_336, 30_720, 65_536)
    run = d(x)
    f_NF = run.code.dense()
    for stop, xhat in zip(d.spec.sizes, d.prefixes(run)):
        torch.testing.assert_close(xhat, d.decode(f_NF * (torch.arange(F) < stop)))

    def left(name: str) -> float:
        fitted = fits[name]
        y = fitted.normalization.apply(source.read("held_out", torch.arange(2000)))
        f_NF = gates.threshold_gate(fitted.dictionary.pre(y), fitted.threshold_F)
        return float((y - fitted.dictionary.decode(f_NF * (torch.arange(F) < 19))).square().mean())

    assert left("matryoshka") < 0.8 * left("batchtopk")


def test_one_prefix_is_batchtopk():
    x = activations()
    one, other = trained_steps("matryoshka", x, prefixes=1), trained_steps("batchtopk", x)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_a_difference_is_all_that_a_diff_sae_sees(fits):
    """What both models have alike changes no code; it reads tuned minus base and writes into tuned alone."""
    fitted, x = fits["diff_sae"], activations(500, 7) + 0.7
    both = 3 * torch.randn(500, S, 1, D, generator=torch.Generator().manual_seed(0))
    change = fitted.change(0, id="t/0", finder="test")
    assert torch.equal(change.rows_SMD[:, BASE], -change.rows_SMD[:, TUNED])
    assert not change.write_SMD[:, BASE].any() and change.share == 1
    f_NF, moved_NF = fitted.codes(x), fitted.codes(x + both)
    assert float((f_NF - moved_NF).abs().gt(1e-3).float().mean()) < 1e-3
    explained = delta_of(fitted.reconstruct(x)) - delta_of(fitted.reconstruct(x + both))
    assert float(explained.square().mean()) < 1e-4


def test_base_writes_of_an_sae_on_tuned(source, fits):
    """Read off tuned alone; what base has of each latent is the least-squares fit, written out densely here."""
    fitted, x = fits["tuned_sae"], activations(500, 8) + 0.7
    d, other = fitted.dictionary, x.clone()
    other[:, :, BASE] = 0
    assert torch.equal(fitted.codes(x), fitted.codes(other))
    x = source.read("train", torch.arange(source.count("train")))
    y_NI = fitted.normalization.apply(x)[:, :, BASE].flatten(1).double()
    f_NF, write_FI = fitted.codes(x).double(), d.decoder_FSMD.flatten(1).double()
    f_NF, y_NI, mean_F, mean_I = f_NF - f_NF.mean(0), y_NI - y_NI.mean(0), f_NF.mean(0), y_NI.mean(0)
    silent_F = (mean_F == 0).double()  # keeps 1
    gram_FF = (f_NF.T @ f_NF) * (write_FI @ write_FI.T) + silent_F.diag()
    beta_F = torch.linalg.solve(gram_FF, (f_NF * (y_NI @ write_FI.T)).sum(0) + silent_F)
    torch.testing.assert_close(d.base_scale_F.double(), beta_F, atol=5e-3, rtol=0)
    offset_I = mean_I - (d.base_scale_F * mean_F) @ write_FI
    torch.testing.assert_close(d.base_bias_SD.flatten().double(), offset_I, atol=1e-4, rtol=0)
    assert fitted.quality.ev_delta > 0


# -- Latent Scaling
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batchtopk", "dfc", "diff_sae", "tuned_sae"])
def test_latent_scaling_by_hand(name, source, fits):
    """The streamed, sparse sums against the formula written out densely."""
    fitted = fits[name]
    x = fitted.normalization.apply(source.read("held_out", torch.arange(source.count("held_out"))))
    d = fitted.dictionary
    f = gates.threshold_gate(d.pre(x), fitted.threshold_F)
    e, xhat, write_FSMD = x - d.decode(f), d.decode(f) - d.bias_SMD(), d.write_FSMD()
    scales = latent_scaling(fitted, source, draws=50)
    for j in range(0, F, 3):
        if not float(f[:, j].sum()):
            assert scales[j].kind == "too rare"
            continue
        v = write_FSMD[j, :, TUNED]
        if not v.any():
            continue
        beta = []
        for m in (BASE, TUNED):
            y = e[:, :, m] + f[:, j, None, None] * write_FSMD[j, :, m]
            beta.append(
                [
                    float((f[:, j] * (t * v).sum((1, 2))).sum() / (v.square().sum() * f[:, j].square().sum()))
                    for t in (y, xhat[:, :, m])
                ]
            )
        assert scales[j].beta_error == pytest.approx([b[0] for b in beta], rel=1e-3, abs=1e-4)
        assert scales[j].beta_reconstruction == pytest.approx([b[1] for b in beta], rel=1e-3, abs=1e-4)
        if beta[1][0] > 1e-3:
            assert scales[j].nu_error.value == pytest.approx(beta[0][0] / beta[1][0], rel=1e-2, abs=1e-3)
        assert scales[j].firings == int((f[:, j] > 0).sum())


def test_latent_scaling_mirrors(source, fits):
    fitted = fits["batchtopk"]
    held = source.read("held_out", torch.arange(source.count("held_out"))).flip(2)
    norm = fitted.normalization
    twin = dataclasses.replace(
        fitted,
        dictionary=fitted.dictionary.mirrored().requires_grad_(False),
        normalization=dataclasses.replace(norm, center_SMD=norm.center_SMD.flip(1)),
    )
    swap = {"tuned-specific": "base-specific", "base-specific": "tuned-specific"}
    doc_N = torch.arange(len(held)) // 50
    one = latent_scaling(fitted, source, doc_N=doc_N, draws=100)
    other = latent_scaling(twin, TensorSource(held, held), doc_N=doc_N, draws=100)
    assert [swap.get(s.kind, s.kind) for s in one] == [s.kind for s in other]
    some = [s.latent for s in one if s.kind != "too rare"][:5]
    subset = latent_scaling(fitted, source, doc_N=doc_N, draws=100, latents=some)
    assert [s.latent for s in subset] == some
    assert [s.nu_error.value for s in subset] == pytest.approx([one[j].nu_error.value for j in some], rel=1e-4)


# -- folders
# --------------------------------------------------------------------------------------------------


def test_finished_is_not_trained_again(source, tmp_path):
    spec, rows = small("batchtopk"), []
    settings = dataclasses.replace(SHORT, steps=40)
    first = fit(spec, source, settings, tmp_path, lambda done, total, row: rows.append((done, total)))
    assert rows[-1] == (40 * 256, 40 * 256)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.json", "dictionary.safetensors", "manifest.json"]
    rows.clear()
    again = fit(spec, source, settings, tmp_path, lambda *_: rows.append(0))
    assert not rows and again.quality == first.quality
    with pytest.raises(ArtifactError, match="sites or settings"):
        fit(spec, source, dataclasses.replace(settings, seed=1), tmp_path)


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_dictionaries import *
def slow(done, total, row):
    print(int(row["step"]), flush=True)
    time.sleep(0.02)
torch.set_num_threads(1)
source = TensorSource(activations(3000, 1) + 0.7, activations(2000, 2) + 0.7)
fit(small(sys.argv[3]), source, RESUMED, Path(sys.argv[1]), slow)
"""
RESUMED = FitSettings(steps=300, batch=256, learning_rate=3e-3, log_every=5, checkpoint_every=20)


def child(folder: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parents[1]), name],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta", "hybrid", "dfc", "tuned_sae"])
def test_killed_and_resumed_ends_with_the_same_bytes(name, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert child(whole, name).wait(timeout=300) == 0
    for until in (45, 130):
        process = child(broken, name)
        for line in process.stdout:
            if int(line) >= until:
                process.send_signal(signal.SIGKILL)
                break
        process.wait(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert (broken / "checkpoint.safetensors").is_file() and not (broken / "manifest.json").exists()
    process = child(broken, name)
    steps = [int(line) for line in process.stdout]
    assert process.wait(timeout=300) == 0 and steps[0] > 100
    for path in whole.iterdir():
        assert path.read_bytes() == (broken / path.name).read_bytes(), path.name
    assert not (broken / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mean_square_is_torchs(dtype):
    """Value and gradient, with the loss in a sum and scaled."""
    x, xhat = (activations(70, seed, dtype) for seed in (0, 1))
    leaves = [xhat.clone().requires_grad_() for _ in range(2)]
    losses = [mean_squared_error(Pass(x, leaves[0] + 0, (), None, 0.0)), torch.nn.functional.mse_loss(leaves[1], x)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        (3 * loss + 1).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
