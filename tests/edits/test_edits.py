"""Edits: the least squares does what it says at its limits, on every kind of tune."""

from __future__ import annotations

import planted_pairs
import pytest
import tiny_models
import torch

from tunediff.edits.edit import EditSettings, scaling
from tunediff.edits.reverting import Moments, input_moments, random_directions, revert_map, reverting
from tunediff.models.pair import Pair

KINDS = ("llama-full", "llama-lora", "gpt2-full", "gpt2-lora")
IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory) -> Pair:
    family, kind = request.param.split("-")
    root = tmp_path_factory.mktemp(request.param)
    network = tiny_models.module(family)
    base = tiny_models.save(root / "base", network)
    if kind == "lora":
        return Pair.load(base, tiny_models.adapter(root / "lora", network))
    return Pair.load(base, tiny_models.save(root / "full", tiny_models.tuned_copy(network)))


@pytest.fixture(scope="module")
def tokens():
    return planted_pairs.corpus_tokens(planted_pairs.text(documents=12))


def logits(model) -> torch.Tensor:
    return model.logits(model.states(IDS))


def added(pair: Pair, edit=None) -> dict[str, torch.Tensor]:
    """What tuning adds to every map, (out, in) in float64, with or without an edit."""
    edited = {} if edit is None else edit.parameters(pair.tuned)
    out = {}
    for delta in pair.deltas():
        now = delta.added(value=edited.get(delta.parameter))
        out[delta.name] = now if delta.up is None else delta.up.double() @ now
    return out


def moments_of(pair: Pair, on_II=None, off_II=None) -> dict[str, Moments]:
    """The same moments for every map, made from its number of inputs; zeros where none are given."""
    out = {}
    for delta in pair.deltas():
        size = delta.added().shape[1]
        out[delta.name] = Moments(*(torch.zeros(size, size) if m is None else m(size) for m in (on_II, off_II)))
    return out


# The least squares

EYE = torch.eye(12, dtype=torch.float64)


def moments(seed: int = 0, size: int = 12, on_rank: int = 12) -> Moments:
    rng = torch.Generator().manual_seed(seed)
    on, off = torch.randn(500, on_rank, generator=rng), torch.randn(700, size, generator=rng)
    on = on @ torch.randn(on_rank, size, generator=rng)
    return Moments(on.T @ on, off.T @ off)


def test_strength_zero_is_the_identity():
    torch.testing.assert_close(revert_map(moments(), EditSettings(strength=0.0))(EYE), EYE)
    nothing_on = Moments(torch.zeros(12, 12), moments().off_II)
    assert torch.equal(revert_map(nothing_on, EditSettings())(EYE), EYE)


def test_on_everywhere_gives_base_back():
    everywhere = Moments(moments().off_II, torch.zeros(12, 12))
    assert float(revert_map(everywhere, EditSettings(strength=10.0))(EYE).norm()) < 0.01


def test_moments_that_are_not_definite_are_made_so():
    """On text where the changes are on nearly everywhere, moments elsewhere are what is left of two large float32 sums."""
    off_II = torch.diag(torch.tensor([1.0] * 8 + [0.0] * 3 + [-0.5]))
    map_II = revert_map(Moments(moments().on_II, off_II), EditSettings(strength=1e-7))(EYE)
    torch.testing.assert_close(map_II[:8, :8], EYE[:8, :8], atol=1e-3, rtol=0)
    assert bool(torch.isfinite(map_II).all())


def test_off_inputs_are_kept_and_on_inputs_reverted_where_they_can_be_told_apart():
    """On inputs live in the first four dimensions, off inputs in the others."""
    rng = torch.Generator().manual_seed(0)
    on, off = torch.zeros(300, 12), torch.zeros(300, 12)
    on[:, :4], off[:, 4:] = torch.randn(300, 4, generator=rng), torch.randn(300, 8, generator=rng)
    map_II = revert_map(Moments(on.T @ on, off.T @ off), EditSettings(ridge=1e-6))(EYE).float()
    torch.testing.assert_close(off @ map_II.T, off, atol=1e-3, rtol=0)
    assert float((on @ map_II.T).norm() / on.norm()) < 1e-3


def test_the_map_is_the_least_squares_answer():
    """Its objective is stationary: any small step away is worse."""
    m, settings = moments(on_rank=5), EditSettings(strength=2.0)
    rng = torch.Generator().manual_seed(3)
    added_OI = torch.randn(7, 12, generator=rng).double()
    on, off = (c.double() / c.double().diagonal().sum() for c in (m.on_II, m.off_II))
    ridge = settings.ridge / 12 * torch.eye(12, dtype=torch.float64)

    def objective(new_OI: torch.Tensor) -> float:
        lost = new_OI - added_OI
        return float(settings.strength * (new_OI @ on @ new_OI.T).trace() + (lost @ (off + ridge) @ lost.T).trace())

    answer = revert_map(m, settings)(added_OI)
    for _ in range(20):
        step = 1e-3 * torch.randn(7, 12, generator=rng).double()
        assert objective(answer + step) > objective(answer)


def test_more_strength_leaves_less():
    left = [float(revert_map(moments(), EditSettings(strength=s))(EYE).norm()) for s in (0.0, 0.1, 1.0, 10.0)]
    assert left == sorted(left, reverse=True) and left[-1] < 0.5 * left[0]


# On models


def test_moments_are_those_of_the_inputs(pair, tokens):
    on_R = [torch.tensor([float(t % 3 == 0) for t in row]) for row in tokens.rows]
    none_R = [torch.zeros(len(row)) for row in tokens.rows]
    found, none = input_moments(pair.tuned, pair.deltas(), tokens, [on_R, none_R], batch_tokens=300)
    for delta in pair.deltas()[:5]:
        seen, on = [], []
        handle = delta.reader.register_forward_pre_hook(lambda module, given: seen.append(given[0][0].double()))
        for row, weights in zip(tokens.rows, on_R):
            pair.tuned.states(torch.tensor([row]))
            on.append(weights.bool())
        handle.remove()
        x, chosen = torch.cat(seen), torch.cat(on)
        torch.testing.assert_close(found[delta.name].on_II.double(), x[chosen].T @ x[chosen], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[delta.name].off_II.double(), x[~chosen].T @ x[~chosen], atol=1e-3, rtol=1e-3)
        assert not none[delta.name].on_II.any()


def test_reverting_at_the_limits(pair):
    eye, whole = torch.eye, added(pair)
    kept = added(pair, reverting(pair, "x", ["x"], moments_of(pair, None, eye)))
    half = added(pair, reverting(pair, "x", ["x"], moments_of(pair, eye, eye), EditSettings(ridge=0.0)))
    gone = added(pair, reverting(pair, "x", ["x"], moments_of(pair, eye, None)))
    for name, before in whole.items():
        torch.testing.assert_close(kept[name], before, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(half[name], before / 2, atol=1e-6, rtol=1e-4)
        assert float(gone[name].norm()) < 0.02 * float(before.norm())


def test_an_edited_lora_is_a_lora_of_its_rank(pair, tokens):
    on_R = [torch.tensor([float(t % 3 == 0) for t in row]) for row in tokens.rows]
    (found,) = input_moments(pair.tuned, pair.deltas(), tokens, [on_R])
    edit = reverting(pair, "x", ["x"], found)
    edited = edit.parameters(pair.tuned)
    for delta in pair.deltas():
        value = edited[delta.parameter]
        assert value.shape == delta.parameter.shape and value.dtype == delta.parameter.dtype
        if delta.up is not None:
            assert delta.up_parameter not in edited
    ranks = {name: int(torch.linalg.matrix_rank(m, rtol=1e-5)) for name, m in added(pair).items()}
    after = {name: int(torch.linalg.matrix_rank(m, rtol=1e-5)) for name, m in added(pair, edit).items()}
    assert all(after[name] <= ranks[name] for name in ranks)


def test_equal_energy_is_equal_energy(pair, tokens):
    on_R = [torch.tensor([float(t % 3 == 0) for t in row]) for row in tokens.rows]
    other_R = [torch.tensor([float(t % 7 == 1) for t in row]) for row in tokens.rows]
    mine, others = input_moments(pair.tuned, pair.deltas(), tokens, [on_R, other_R])
    edit = reverting(pair, "x", ["x"], mine)
    controls = [reverting(pair, "y", ["y"], others, energy_of=edit), random_directions(pair, "z", mine, edit, seed=0)]
    before, after = added(pair), added(pair, edit)
    for control in controls:
        other = added(pair, control)
        for name in before:
            text_II = (mine[name].on_II + mine[name].off_II).double()

            def energy(changed: dict) -> float:
                gone = (before[name] - changed[name]).double()
                return float(((gone @ text_II) * gone).sum())

            assert energy(other) == pytest.approx(energy(after), rel=1e-2)
            assert not torch.allclose(other[name], after[name], rtol=0.1)


def test_scaling_runs_from_tuned_to_base(pair):
    tuned, base = logits(pair.tuned), logits(pair.base)
    assert torch.equal(logits(scaling(pair, 0.0).applied(pair.tuned)), tuned)
    assert torch.equal(logits(scaling(pair, 1.0).applied(pair.tuned)), base)
    whole, half = added(pair), added(pair, scaling(pair, 0.5))
    for name in whole:
        torch.testing.assert_close(half[name], whole[name] / 2, atol=1e-6, rtol=1e-3)


def test_edits_leave_no_trace(pair):
    edit = scaling(pair, 0.7)
    before = logits(pair.tuned)
    with edit.on(pair.tuned) as edited:
        assert not torch.equal(logits(edited), before)
    assert torch.equal(logits(pair.tuned), before)
