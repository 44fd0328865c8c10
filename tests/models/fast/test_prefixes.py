"""Rows that share the run of a prefix, and passes that run less, give what whole rows give."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from tunediff.models.completing import complete
from tunediff.models.network import LanguageModel
from tunediff.models.passes import Start
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
    with model.running():
        assert all(torch.equal(side.states(rows, start), found) for (side, rows, start), found in zip(asked, plain))
        assert runs == [1, 3, 2, 1, 3, 2, 1, 2, 1, 3, 2]
        with model.writing(Site(0), lambda stream: stream * 2):
            assert not torch.allclose(model.states(ids), plain[0])
    runs.clear()
    assert torch.equal(model.states(ids), plain[0]) and runs == [1, 3], "afterwards somebody may have written"


def test_answers_are_the_same_while_weights_are_frozen(model):
    model.check_reading(IDS)
    prompts = [[3, 9, 27, 81, 243, 5, 6, 7, 8, *row] for row in IDS.tolist()]
    plain = [complete(model, prompts[:n], 6, temperature=1.0, seed=n) for n in (3, 2)]
    with model.running():
        for _ in range(2):
            assert [complete(model, prompts[:n], 6, temperature=1.0, seed=n) for n in (3, 2)] == plain


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
    whole = complete(model, prompts, 6)
    model.shares_prefixes = True
    try:
        assert complete(model, prompts, 6) == whole
        assert complete(model, prompts[:1], 6) == whole[:1]
    finally:
        model.shares_prefixes = False
