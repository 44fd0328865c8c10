"""Every family is read by structure: hooks, resumed runs and logits agree with the network's own."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

from tunediff.core.errors import FamilyError
from tunediff.models.completing import PLAUSIBLE, complete
from tunediff.models.network import LanguageModel
from tunediff.models.passes import Start
from tunediff.records.site import Site

FAMILIES = sorted(tiny_models.configs())
IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> LanguageModel:
    return LanguageModel(tiny_models.module(request.param), tiny_models.tokenizer(), request.param)


def test_what_cache_a_network_would_choose_is_no_matter(model, monkeypatch):
    model.check_reading(IDS)
    plain = complete(model, IDS.tolist(), 4)
    monkeypatch.setattr(model.network.generation_config, "cache_implementation", "dynamic")
    assert complete(model, IDS.tolist(), 4) == plain and complete(model, IDS.tolist()[:1], 4) == plain[:1]


def own(model: LanguageModel):
    with model.run_context():
        return model.network(input_ids=IDS, output_hidden_states=True, use_cache=False)


def test_streams_are_the_networks_hidden_states(model):
    hidden = own(model).hidden_states
    streams = model.streams(IDS, [Site(layer) for layer in range(model.depth)])
    # hidden_states[0] is the embedding; the last entry has the final norm applied, so it is not a stream.
    for layer in range(model.depth - 1):
        assert torch.equal(streams[:, :, layer], hidden[layer + 1])


def test_logits_are_the_networks_own(model):
    torch.testing.assert_close(model.logits(model.states(IDS)), own(model).logits, rtol=1e-4, atol=1e-4)


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
    together = complete(model, prompts, 6)
    assert together == complete(model, prompts, 6)
    sampled = complete(model, prompts, 6, temperature=1.0, seed=3)
    assert sampled == complete(model, prompts, 6, temperature=1.0, seed=3)
    assert sampled[:1] == complete(model, prompts[:1], 6, temperature=1.0, seed=3)
    assert sampled == complete(model, prompts, 6, temperature=1.0, seed=3, batch=2)


def test_amplified_completions_are_those_of_the_two_distributions(model):
    """Greedy, beside both models' own logits on whole rows, however prompts are batched and padded."""
    other = LanguageModel(tiny_models.tuned_copy(model.network, 0.5), model.tokenizer, "other")
    prompts = [IDS[0, :9].tolist() + IDS[i, : 3 + 2 * i].tolist() for i in range(3)]
    for shares in (False, True):
        model.shares_prefixes = other.shares_prefixes = shares
        try:
            answers = complete(other, prompts, 5, against=model, amplification=3.0)
        finally:
            model.shares_prefixes = False
        for prompt, answer in zip(prompts, answers):
            for at, token in enumerate(answer):
                ids = torch.tensor([prompt + answer[:at]])
                own, base = (m.logits(m.states(ids)[0, -1:]).log_softmax(1)[0] for m in (other, model))
                said = torch.where(own >= own.max() + math.log(PLAUSIBLE), own + 3 * (own - base), -math.inf)
                assert said[token] > said.max() - 1e-3
    assert complete(other, prompts, 5, against=model, amplification=0.0) == complete(other, prompts, 5)


def test_a_site_above_the_network_is_refused(model):
    with pytest.raises(FamilyError, match="resid.9"):
        model.streams(IDS, [Site(9)])
