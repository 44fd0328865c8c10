"""Linear layers answer as torch's do, whoever multiplies, and stay what they were to everybody else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tunediff import kernels, layers


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

    def product(x, w_OI):
        calls.append(x.shape)
        return (x.double() @ w_OI.double().T).float()

    monkeypatch.setattr(kernels, "product", (lambda x, w: None) if request.param == "torch" else product)
    return calls if request.param == "product" else None


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)])
def test_answers_are_torchs(maker, shape):
    plain, quick = network(), network()
    layers.quicken(quick)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), plain(x))
        apart = torch.randn(6, 80)[:, ::2]
        torch.testing.assert_close(quick(apart), plain(apart))
    if maker is not None:
        assert len(maker) == 4  # two plain layers, twice; not the layer of somebody's own


def test_gradients_are_torchs(maker):
    plain, quick = network(), network()
    layers.quicken(quick)
    x = torch.randn(3, 40)
    for one in (plain, quick):
        one(x).sum().backward()
    for p, q in zip(plain.parameters(), quick.parameters()):
        assert torch.equal(p.grad, q.grad)
    with torch.no_grad():
        assert torch.equal(plain(x), quick(x))
    assert not maker


def test_precision_that_a_user_asks_for_is_his(maker):
    plain, quick = network(), network()
    layers.quicken(quick)
    x = torch.randn(100, 40)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert quick(x).dtype == torch.bfloat16 and torch.equal(plain(x), quick(x))
    assert not maker


def test_shapes_that_do_not_fit_are_torchs_to_refuse():
    big = nn.Sequential(nn.Linear(512, 512))
    layers.quicken(big)
    for width in (500, 528):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            big(torch.randn(64, width))


def test_nothing_else_changes():
    plain, quick = network(), network()
    layers.quicken(quick)
    layers.quicken(quick)
    assert all(isinstance(m, nn.Linear) for m in quick[:3]) and type(quick[2]) is Own
    assert {n: t.data_ptr() for n, t in quick.state_dict().items()} == {n: t.data_ptr() for n, t in quick.named_parameters()}
    plain.load_state_dict(quick.state_dict())
    other = copy.deepcopy(quick)
    with torch.no_grad():
        other[0].weight.zero_()
        assert quick[0].weight.any() and not (other[0](torch.randn(60, 40)) - other[0].bias).any()
