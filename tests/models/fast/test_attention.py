"""Attention of ours gives what a network's own gives."""

from __future__ import annotations

import contextlib

import pytest
import tiny_models
import torch

from tunediff.models.completing import complete
from tunediff.models.fast import accelerated, attention
from tunediff.models.network import LanguageModel

FAMILIES = sorted(tiny_models.configs())
IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> LanguageModel:
    return LanguageModel(tiny_models.module(request.param), tiny_models.tokenizer(), request.param)


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
    own = model.network.config._attn_implementation
    with accelerated(model.network):
        assert model.network.config._attn_implementation == ("eager" if model.name == "gemma2" else attention.NAME)
    assert model.network.config._attn_implementation == own
    monkeypatch.setattr(attention, "SHORT", short)
    ids = torch.cat([IDS[:1, :9].expand(len(IDS), -1), IDS], 1)
    ids[1, 9:15] = ids[2, 9:15]  # a fold
    prompts = [IDS[0, :9].tolist() + IDS[i, : 3 + 2 * i].tolist() for i in range(3)]

    def all_of_it():
        return model.states(IDS), model.states(ids), complete(model, prompts, 12)

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
    """A network that is read can be trained meanwhile and afterwards."""
    model.states(IDS)
    for context in (accelerated(model.network), contextlib.nullcontext()):
        with context:
            model.network(input_ids=IDS).logits.square().mean().backward()
    grads = [p.grad for p in model.network.parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    model.network.zero_grad(set_to_none=True)
