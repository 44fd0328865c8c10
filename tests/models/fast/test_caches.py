"""Keys and values that grow in place are what transformers' own layer holds, whatever is done to them between."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tunediff.models.fast.caches import GrowingLayer, growing


@pytest.mark.parametrize("seed", range(8))
def test_a_growing_layer_holds_what_a_dynamic_one_does(seed):
    g = torch.Generator().manual_seed(seed)
    layers, rows = (GrowingLayer(), DynamicLayer()), 3
    given = []
    for _ in range(60):
        act = int(torch.randint(0, 8, (1,), generator=g))
        length = layers[1].get_seq_length()
        if act == 0 and length > 3:
            for layer in layers:
                layer.crop(-2)
        elif act == 1 and rows < 20 and length:
            rows *= 2
            for layer in layers:
                layer.batch_repeat_interleave(2)
        elif act == 2 and length:
            some = torch.randint(0, rows, (4,), generator=g)
            rows = 4
            for layer in layers:
                layer.batch_select_indices(some)
        elif act == 3 and length > 40:
            for layer in layers:
                layer.reset()
            rows = rows if layers[1].get_seq_length() else 2  # before 5.9 resetting fills with zeros and keeps the rows
        else:
            T = 1 if act > 4 else 5
            new = torch.randn(2, rows, 2, T, 4, generator=g)
            found, own = (layer.update(*new) for layer in layers)
            given.append((found, tuple(t.clone() for t in own)))
        assert layers[0].get_seq_length() == layers[1].get_seq_length()
        if layers[1].get_seq_length():
            assert torch.equal(layers[0].keys, layers[1].keys) and torch.equal(layers[0].values, layers[1].values)
    assert len(given) > 10


def test_one_position_after_the_other_is_not_copied():
    layer = GrowingLayer()
    layer.update(*torch.zeros(2, 2, 3, 10, 4))
    places = {layer.update(*torch.zeros(2, 2, 3, 1, 4))[0].data_ptr() for _ in range(100)}
    assert len(places) <= 3 and layer.get_seq_length() == 110


def test_only_plain_layers_grow():
    import tiny_models

    assert all(
        type(layer) is GrowingLayer for layer in growing(DynamicCache(config=tiny_models.module("llama").config)).layers
    )
    kinds = {type(layer) for layer in growing(DynamicCache(config=tiny_models.module("gemma3").config)).layers}
    assert any(kind is not GrowingLayer for kind in kinds)
