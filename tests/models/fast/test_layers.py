"""A network's layers answer as their own do, whoever multiplies, and stay what they were to everybody else."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import tiny_models
import torch
from torch import nn

from tunediff import kernels
from tunediff.core.errors import NumericsError
from tunediff.kernels.cpu import products as tiled
from tunediff.models.divergences import Said, kl_divergence
from tunediff.models.fast import layers, weights
from tunediff.models.network import swapped


class Own(nn.Linear):
    """A layer of somebody's own."""

    def forward(self, input):
        return -super().forward(input)


@pytest.fixture
def quicken():
    """Quickens a network until the test is over."""
    with ExitStack() as stack:
        yield lambda network: stack.enter_context(layers.quickened(network.modules()))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20, bias=False), Own(20, 20), nn.ReLU())


@pytest.fixture(params=["torch", "product"])
def maker(request, monkeypatch):
    """Who multiplies: torch, or what `kernels.product` would on another machine, at every size."""
    calls = []

    def product(x, w_OI, few):
        calls.append(x.shape)
        return (x.double() @ w_OI.double().T).float()

    monkeypatch.setattr(kernels, "product", (lambda x, w, few: None) if request.param == "torch" else product)
    return calls if request.param == "product" else None


@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)])
def test_answers_are_torchs(maker, shape, quicken):
    plain, quick = network(), network()
    quicken(quick)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), plain(x))
        apart = torch.randn(6, 80)[:, ::2]
        torch.testing.assert_close(quick(apart), plain(apart))
    if maker is not None:
        assert len(maker) == 4  # two plain layers, twice; not the layer of somebody's own


def test_gradients_are_torchs(maker, quicken):
    plain, quick = network(), network()
    quicken(quick)
    x = torch.randn(3, 40)
    for one in (plain, quick):
        one(x).sum().backward()
    for p, q in zip(plain.parameters(), quick.parameters()):
        assert torch.equal(p.grad, q.grad)
    with torch.no_grad():
        assert torch.equal(plain(x), quick(x))
    assert not maker


def test_precision_that_a_user_asks_for_is_his(maker, quicken):
    plain, quick = network(), network()
    quicken(quick)
    x = torch.randn(100, 40)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert quick(x).dtype == torch.bfloat16 and torch.equal(plain(x), quick(x))
    assert not maker


def test_shapes_that_do_not_fit_are_torchs_to_refuse(quicken):
    big = nn.Sequential(nn.Linear(512, 512))
    quicken(big)
    for width in (500, 528):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            big(torch.randn(64, width))


def test_nothing_else_changes(quicken):
    plain, quick = network(), network()
    quicken(quick)
    quicken(quick)
    assert all(isinstance(m, nn.Linear) for m in quick[:3]) and type(quick[2]) is Own
    assert {n: t.data_ptr() for n, t in quick.state_dict().items()} == {
        n: t.data_ptr() for n, t in quick.named_parameters()
    }
    plain.load_state_dict(quick.state_dict())
    other = copy.deepcopy(quick)
    with torch.no_grad():
        other[0].weight.zero_()
        assert quick[0].weight.any() and not (other[0](torch.randn(60, 40)) - other[0].bias).any()


def wide(quicken) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 400, bias=False)).requires_grad_(False)
    quicken(net)
    return net


@pytest.fixture
def made(monkeypatch):
    """Which weights were brought into tiles, on any machine; products by them are torch's."""
    brought = []

    class Tiles:
        nbytes = 1 << 20

        def __init__(self, weight):
            self.copy, self.shape = weight.clone(), weight.shape
            brought.append(tuple(weight.shape))

    monkeypatch.setattr(kernels, "tiles", lambda weight, room: Tiles(weight) if room >= Tiles.nbytes else None)
    monkeypatch.setattr(kernels, "product", lambda x, w, few: x @ (w.copy if isinstance(w, Tiles) else w).T)
    return brought


def test_weights_are_brought_once_while_nobody_writes(made, quicken):
    net, x = wide(quicken), torch.randn(5, 400)
    with torch.inference_mode():
        plain = net(x)
        assert made == []  # for one product it does not pay
        with weights.holding():
            with weights.holding():
                assert torch.equal(net(x), plain)
            assert torch.equal(net(x), plain) and len(made) == 2, "kept until the outermost ends"
        with weights.holding():
            net(x)
        assert len(made) == 4


def test_what_torch_counts_as_a_write_is_seen(made, quicken):
    net, x = wide(quicken), torch.randn(5, 400)
    with weights.holding():
        with torch.inference_mode():
            net(x)
        with torch.no_grad():
            net[0].weight.mul_(2)
        with torch.inference_mode():
            assert torch.equal(net(x), nn.functional.linear(net[0](x), net[1].weight)) and len(made) == 3


def test_other_values_in_a_parameter_are_other_weights(made, quicken):
    """As long as they are there; and what lies where they lay is not taken for them."""
    net, x = wide(quicken), torch.randn(5, 400)
    with weights.holding():
        with torch.inference_mode():
            plain = net(x)
        for seed in range(20):
            values = torch.randn(300, 400, generator=torch.Generator().manual_seed(seed))
            with torch.inference_mode(), swapped({net[0].weight: values}):
                for _ in range(2):
                    assert torch.equal(net(x), (x @ values.T + net[0].bias) @ net[1].weight.T)
            del values
            with torch.inference_mode():
                assert torch.equal(net(x), plain)
        assert len(made) == 22


def test_no_more_is_kept_than_there_is_room_for(made, monkeypatch, quicken):
    monkeypatch.setattr(weights, "ROOM", 3 << 19)
    net, x = wide(quicken), torch.randn(5, 400)
    for _ in range(2):
        with torch.inference_mode(), weights.holding():
            assert torch.equal(net(x), net(x))
    assert made == [(300, 400)] * 2, "one of two weights, and the room for it is given back"


@pytest.mark.parametrize("family", sorted(tiny_models.configs()))
def test_networks_answer_as_they_did_before(family, quicken):
    network = tiny_models.module(family)
    x, own = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0)), None
    with torch.inference_mode():
        own = network(x).logits
    classes = {name: str(module) for name, module in network.named_modules()}
    quicken(network)
    assert classes == {name: str(module) for name, module in network.named_modules()}
    with torch.inference_mode():
        torch.testing.assert_close(network(x).logits, own, rtol=1e-4, atol=1e-4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert network(x).logits.dtype == torch.bfloat16
    network(x).logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad and p.numel() > 1000)


@pytest.mark.skipif(not tiled.on_tiles(), reason="a processor without tiles of bfloat16")
@pytest.mark.parametrize("rows", [1, 5, 31, 32, 100])
def test_bits_do_not_hang_on_what_there_is_room_for(rows, monkeypatch, quicken):
    net, x = wide(quicken), torch.randn(rows, 400)
    with torch.inference_mode():
        plain = net(x)
        with weights.holding():
            found = net(x)
        monkeypatch.setattr(weights, "ROOM", 1 << 18)
        with weights.holding():
            assert torch.equal(net(x), found)
    torch.testing.assert_close(found, plain)


@pytest.mark.skipif(not tiled.on_tiles(), reason="a processor without tiles of bfloat16")
def test_divergences_need_no_logits_while_weights_are_frozen(quicken):
    """Whatever shape they are asked in; who counts runs of the layer sees them, and who watches it gets logits."""
    net = nn.Sequential(nn.Linear(200, 700, bias=False))
    quicken(net)

    class Model:
        plain = 0

        def divergence(self, states_RD, logp_QV, theirs):
            return layers.divergence_of(net[0], states_RD, logp_QV, theirs)

        def logits(self, states_ND):
            self.plain += 1
            return net(states_ND)

    model, states_END = Model(), torch.randn(4, 5, 200)
    table_NV = Said(model, states_END[0] + 0.1, 700).logp()
    asked = [
        (Said(model, states, 700), table_NV.expand(*states.shape[:-2], -1, -1))
        for states in (states_END[0], states_END[1:2])
    ]
    asked += [(Said(model, states_END, 700), table_NV), (table_NV, Said(model, states_END, 700))]
    with torch.inference_mode():
        for p, q in asked:
            model.plain = 0
            expected = kl_divergence(p, q)
            assert model.plain
            model.plain, calls = 0, []
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, given, out: calls.append(given[0].shape)
            )
            with weights.holding():
                found = kl_divergence(p, q)
            handle.remove()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            assert calls == [(found.numel(), 200)] and not model.plain, "not even once"
        for table in (table_NV[:, :600], states_END[:2, :, :1].expand(-1, -1, 700)):  # other tokens, other axes
            with weights.holding(), pytest.raises(NumericsError):
                kl_divergence(Said(model, states_END, 700), table)
        said = Said(model, states_END[1], 700)
        with weights.holding():
            handle = net[0].register_forward_hook(lambda module, given, out: out * 2)
            assert model.divergence(said.states_ND, table_NV, False) is None
            assert float((kl_divergence(said, table_NV) - expected[1]).abs().max()) > 0.1
            handle.remove()
            biased = nn.Sequential(nn.Linear(200, 700))
            quicken(biased)
            assert layers.divergence_of(biased[0], said.states_ND, table_NV, False) is None
