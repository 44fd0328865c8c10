"""Linear layers answer as torch's do, whoever multiplies, and stay what they were to everybody else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunediff import kernels, linears


class Own(nn.Linear):
    """A layer of somebody's own."""

    def forward(self, input):
        return -super().forward(input)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20, bias=False), Own(20, 20), nn.ReLU())


@pytest.fixture(params=["torch", "product"])
def maker(request, monkeypatch):
    """Who multiplies: torch, or what `kernels.product` would on another machine, at every size."""
    calls = []

    def product(x_NI, w_OI):
        calls.append(x_NI.shape)
        return (x_NI.double() @ w_OI.double().T).float()

    monkeypatch.setattr(kernels, "product", (lambda x, w: None) if request.param == "torch" else product)
    return calls if request.param == "product" else None


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)])
def test_answers_are_torchs(maker, shape):
    plain, quick = network(), network()
    linears.quicken(quick)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(quick(x), plain(x))
        apart = torch.randn(6, 80)[:, ::2]
        torch.testing.assert_close(quick(apart), plain(apart))
    if maker is not None:
        assert len(maker) == 4  # two plain layers, twice; not the layer of somebody's own


def test_gradients_are_torchs(maker):
    plain, quick = network(), network()
    linears.quicken(quick)
    x = torch.randn(3, 40)
    for one in (plain, quick):
        one(x).sum().backward()
    for p, q in zip(plain.parameters(), quick.parameters()):
        assert torch.equal(p.grad, q.grad)
    assert not maker


def test_nothing_else_changes():
    plain, quick = network(), network()
    linears.quicken(quick)
    linears.quicken(quick)
    assert all(isinstance(m, nn.Linear) for m in quick[:3]) and type(quick[2]) is Own
    assert {n: t.data_ptr() for n, t in quick.state_dict().items()} == {n: t.data_ptr() for n, t in quick.named_parameters()}
    plain.load_state_dict(quick.state_dict())
    other = copy.deepcopy(quick)
    with torch.no_grad():
        other[0].weight.zero_()
        assert quick[0].weight.any() and not (other[0](torch.randn(60, 40)) - other[0].bias).any()
