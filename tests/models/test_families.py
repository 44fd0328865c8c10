"""Every family is read by structure: hooks, resumed runs and logits agree with the network's own."""

from __future__ import annotations

import contextlib
import math

import pytest
import tiny_models
import torch

from tunediff.core.errors import FamilyError
from tunediff.kernels.matmuls import fast_matmul
from tunediff.models.completing import PLAUSIBLE
from tunediff.models.fast import attention
from tunediff.models.fast.layers import frozen
from tunediff.models.network import LanguageModel, Start
from tunediff.records.site import Site

FAMILIES = sorted(tiny_models.configs())
IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> LanguageModel:
    return LanguageModel(tiny_models.module(request.param), tiny_models.tokenizer(), request.param)


def test_a_beginning_is_run_once_while_weights_are_frozen(model, monkeypatch):
    """The same bits as without, from tokens and from streams; other weights, other streams and whoever hooks in have their own."""
    model.check_reading(IDS)
    ids = torch.cat([IDS[:1, :9].expand(len(IDS), -1), IDS], 1)
    more = torch.cat([ids[:2, :9], ids[:2, 9:].flip(1)], 1)
    site, runs = Site(1), []
    streams = [model.streams(rows, [Site(0), site]) for rows in (ids, more)]
    other = streams[1][:, :, 1].clone()
    other[:, 3] += 0.1
    changed = model.variant("other", {p: p * 1.1 for p in list(model.network.parameters())[-4:]})
    asked = [(model, ids, None), (model, more, None), (model, ids, Start(site, streams[0][:, :, 1])), (model, more, Start(site, streams[1][:, :, 1])),
             (model, more, Start(site, other)), (changed, ids, None), (changed, more, None)]  # fmt: skip
    plain = [side.states(rows, start) for side, rows, start in asked]
    forward = LanguageModel._forward
    monkeypatch.setattr(
        LanguageModel,
        "_forward",
        lambda self, ids_BT, *rest, **named: (runs.append(len(ids_BT)), forward(self, ids_BT, *rest, **named)),
    )
    with frozen():
        assert all(torch.equal(side.states(rows, start), found) for (side, rows, start), found in zip(asked, plain))
        assert runs == [1, 3, 2, 1, 3, 2, 1, 2, 1, 3, 2]
        with model.writing(Site(0), lambda stream: stream * 2):
            assert not torch.allclose(model.states(ids), plain[0])
    runs.clear()
    assert torch.equal(model.states(ids), plain[0]) and runs == [1, 3], "afterwards somebody may have written"


def test_what_cache_a_network_would_choose_is_no_matter(model, monkeypatch):
    model.check_reading(IDS)
    plain = model.complete(IDS.tolist(), 4)
    monkeypatch.setattr(model.network.generation_config, "cache_implementation", "dynamic")
    assert model.complete(IDS.tolist(), 4) == plain and model.complete(IDS.tolist()[:1], 4) == plain[:1]


def test_answers_are_the_same_while_weights_are_frozen(model):
    model.check_reading(IDS)
    prompts = [[3, 9, 27, 81, 243, 5, 6, 7, 8, *row] for row in IDS.tolist()]
    plain = [model.complete(prompts[:n], 6, temperature=1.0, seed=n) for n in (3, 2)]
    with frozen():
        for _ in range(2):
            assert [model.complete(prompts[:n], 6, temperature=1.0, seed=n) for n in (3, 2)] == plain


def own(model: LanguageModel):
    with torch.inference_mode(), fast_matmul():
        return model.network(input_ids=IDS, output_hidden_states=True, use_cache=False)


def test_streams_are_the_networks_hidden_states(model):
    hidden = own(model).hidden_states
    streams = model.streams(IDS, [Site(layer) for layer in range(model.depth)])
    # hidden_states[0] is the embedding; the last entry has the final norm applied, so it is not a stream.
    for layer in range(model.depth - 1):
        assert torch.equal(streams[:, :, layer], hidden[layer + 1])


def test_logits_are_the_networks_own(model):
    torch.testing.assert_close(model.logits(model.states(IDS)), own(model).logits, rtol=1e-4, atol=1e-4)


def test_rows_that_begin_alike_share_that_beginnings_run(model, monkeypatch):
    ids = torch.cat([IDS[:1, :9].expand(len(IDS), -1), IDS], 1)
    model.check_reading(IDS)
    assert model.shares_prefixes, "a network whose cache cannot be shared is to be named here"
    lengths = []
    forward = model._forward
    monkeypatch.setattr(
        model,
        "_forward",
        lambda ids_BT, *rest, **named: (lengths.append(ids_BT.shape), forward(ids_BT, *rest, **named)),
    )
    streams, states = model.streams_and_states(ids, [Site(0), Site(1)])
    resumed = model.states(ids, Start(Site(1), streams[:, :, 1]))
    with model.writing(Site(0), lambda stream: stream):
        whole = model.states(ids)
    assert lengths == [(1, 9), (3, 17), (1, 9), (3, 17), (3, 26)], "whoever hooks into a network sees whole rows"
    torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-5)
    streams = streams.clone()
    streams[1, 4, 1, ::2] += 3  # an intervention on one row only
    changed = model.states(ids, Start(Site(1), streams[:, :, 1]))
    assert lengths[-1] != (3, 17) and not torch.allclose(changed[1, 5:], whole[1, 5:], atol=1e-4)
    torch.testing.assert_close(changed[0], whole[0], rtol=1e-4, atol=1e-5)
    model.shares_prefixes = False


def test_rows_of_which_some_begin_alike_are_run_as_few(model, monkeypatch):
    """Two answers to one prompt, a row of its own, padding: nothing is run twice, and nothing that nobody asks for."""
    ids = torch.cat([IDS, torch.cat([IDS[:2, :12], IDS[:2, :5]], 1)])
    wanted = torch.ones_like(ids, dtype=torch.bool)
    wanted[2, 10:] = False
    whole = model.states(ids)
    model.check_reading(IDS)
    runs = []
    forward = model._forward
    monkeypatch.setattr(
        model, "_forward", lambda ids_BT, *rest, **named: (runs.append(ids_BT.numel()), forward(ids_BT, *rest, **named))
    )
    streams, states = model.streams_and_states(ids, [Site(1)], wanted_BT=wanted)
    assert runs[-1] == 54 and ids.numel() == 85
    torch.testing.assert_close(states[wanted], whole[wanted], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.states(ids, Start(Site(1), streams[:, :, 0]), wanted)[wanted], whole[wanted], rtol=1e-4, atol=1e-5
    )
    streams = streams.clone()
    streams[3, 4, 0] += 1e-4  # however small: rows are one only as long as they are the same
    moved = model.states(ids, Start(Site(1), streams[:, :, 0]), wanted)
    assert runs[-1] > runs[-2] and not torch.equal(moved[3, 4:], moved[0, 4:])
    model.shares_prefixes = False


def test_the_last_mlp_is_run_where_it_is_wanted(model, monkeypatch):
    """The same states there, from the tokens and from a start, with a few positions through the MLP and the network as it was."""
    if "OPT" in type(model.network).__name__:
        pytest.skip("its MLP is no module of its own")
    mlp, seen = model.family.part(model.blocks[-1], "mlp"), []
    forward = type(mlp).forward

    def spied(self, hidden, *rest, **named):
        seen.extend([hidden.numel() // hidden.shape[-1]] * (self is mlp))
        return forward(self, hidden, *rest, **named)

    monkeypatch.setattr(type(mlp), "forward", spied)
    wanted = torch.zeros_like(IDS, dtype=torch.bool)
    wanted[0, 5] = wanted[1, 2] = wanted[1, 16] = wanted[2, 9] = True
    whole = model.states(IDS)
    model.check_reading(IDS)
    seen.clear()
    streams, states = model.streams_and_states(IDS, [Site(1)], wanted_BT=wanted)
    resumed = model.states(IDS, Start(Site(1), streams[:, :, 0]), wanted)
    assert seen == [4, 4] and "forward" not in vars(mlp)
    torch.testing.assert_close(states[wanted], whole[wanted], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resumed[wanted], whole[wanted], rtol=1e-4, atol=1e-5)
    model.shares_prefixes = False


def test_completions_are_the_same_whether_or_not_a_beginning_is_shared(model):
    prompts = [IDS[0, :9].tolist() + IDS[i, : 3 + 2 * i].tolist() for i in range(3)]
    whole = model.complete(prompts, 6)
    model.shares_prefixes = True
    try:
        assert model.complete(prompts, 6) == whole
        assert model.complete(prompts[:1], 6) == whole[:1]
    finally:
        model.shares_prefixes = False


@pytest.fixture
def attending(model):
    """A context in which the network attends as one of its own ways does."""

    @contextlib.contextmanager
    def by(name: str):
        before = model.network.config._attn_implementation
        model.network.set_attn_implementation(name)
        yield
        model.network.set_attn_implementation(before)

    return by


@pytest.mark.parametrize("short", [0, attention.SHORT])
def test_attention_gives_what_the_networks_own_gives(model, attending, monkeypatch, short):
    """Where rows are whole, where they go on from others' keys, and where a row sees only some of what is left of it; multiplied out
    and by torch's kernel. To the last token of a greedy answer."""
    assert model.network.config._attn_implementation == ("eager" if model.name == "gemma2" else attention.NAME)
    monkeypatch.setattr(attention, "SHORT", short)
    ids = torch.cat([IDS[:1, :9].expand(len(IDS), -1), IDS], 1)
    ids[1, 9:15] = ids[2, 9:15]  # a fold
    prompts = [IDS[0, :9].tolist() + IDS[i, : 3 + 2 * i].tolist() for i in range(3)]

    def all_of_it():
        return model.states(IDS), model.states(ids), model.complete(prompts, 12)

    setting = torch.get_float32_matmul_precision()
    for shares in (False, True):
        model.shares_prefixes = shares
        ours = all_of_it()
        with attending("eager"):
            theirs = all_of_it()
        for a, b in zip(ours[:2], theirs):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ours[2] == theirs[2]
    model.shares_prefixes = False
    assert torch.get_float32_matmul_precision() == setting


def test_gradients_pass_through_attention(model):
    """A network that is read can be trained afterwards."""
    model.network(input_ids=IDS).logits.square().mean().backward()
    grads = [p.grad for p in model.network.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    model.network.zero_grad(set_to_none=True)


def test_a_run_resumed_at_any_block_ends_the_same(model):
    expected = model.states(IDS)
    for layer in range(model.depth):
        stream = model.streams(IDS, [Site(layer)])[:, :, 0]
        torch.testing.assert_close(model.states(IDS, Start(Site(layer), stream)), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.states(IDS), expected), "a resumed run must leave the network as it was"


def test_writing_changes_what_follows_and_is_undone(model):
    before = model.states(IDS)
    with model.writing(Site(1), lambda stream: stream + 1):
        during = model.states(IDS)
        assert torch.allclose(model.streams(IDS, [Site(0)]), model.streams(IDS, [Site(0)]))
    assert not torch.allclose(before, during)
    assert torch.equal(model.states(IDS), before)


def test_right_padding_changes_no_position_before_it(model):
    padded = torch.cat([IDS, torch.zeros(3, 5, dtype=torch.long)], 1)
    torch.testing.assert_close(model.states(padded)[:, :17], model.states(IDS), rtol=1e-4, atol=1e-4)


def test_attention_and_mlp_sites(model):
    kinds = ["attn"] if model.name == "opt" else ["attn", "mlp"]
    for kind in kinds:
        assert model.streams(IDS, [Site(1, kind)]).shape == (3, 17, 1, 32)
    if model.name == "opt":
        with pytest.raises(FamilyError, match="no mlp"):
            model.streams(IDS, [Site(1, "mlp")])


def test_reading_is_checked(model):
    model.check_reading(IDS)


def test_completion_is_deterministic_and_padding_does_not_change_it(model):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]
    together = model.complete(prompts, 6)
    assert together == model.complete(prompts, 6)
    sampled = model.complete(prompts, 6, temperature=1.0, seed=3)
    assert sampled == model.complete(prompts, 6, temperature=1.0, seed=3)
    assert sampled[:1] == model.complete(prompts[:1], 6, temperature=1.0, seed=3)
    assert sampled == model.complete(prompts, 6, temperature=1.0, seed=3, batch=2)


def test_amplified_completions_are_those_of_the_two_distributions(model):
    """Greedy, beside both models' own logits on whole rows, however prompts are batched and padded."""
    other = LanguageModel(tiny_models.tuned_copy(model.network, 0.5), model.tokenizer, "other")
    prompts = [IDS[0, :9].tolist() + IDS[i, : 3 + 2 * i].tolist() for i in range(3)]
    for shares in (False, True):
        model.shares_prefixes = other.shares_prefixes = shares
        try:
            answers = other.complete(prompts, 5, against=model, amplification=3.0)
        finally:
            model.shares_prefixes = False
        for prompt, answer in zip(prompts, answers):
            for at, token in enumerate(answer):
                ids = torch.tensor([prompt + answer[:at]])
                own, base = (m.logits(m.states(ids)[0, -1:]).log_softmax(1)[0] for m in (other, model))
                said = torch.where(own >= own.max() + math.log(PLAUSIBLE), own + 3 * (own - base), -math.inf)
                assert said[token] > said.max() - 1e-3
    assert other.complete(prompts, 5, against=model, amplification=0.0) == other.complete(prompts, 5)


def test_a_site_above_the_network_is_refused(model):
    with pytest.raises(FamilyError, match="resid.9"):
        model.streams(IDS, [Site(9)])
