"""LoRA by PEFT, with less work a pass: the adapter's part added in place, and the adapter switched by flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from tunediff.models.fast.layers import watched
from tunediff.models.passes import replaced


@contextmanager
def adapted(module: Any) -> Iterator[None]:
    """While inside, a PEFT model's plain LoRA layers run by `forward`, and its `disable_adapter` only sets flags."""
    with ExitStack() as stack:
        if hasattr(module, "peft_config"):
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils.other import AuxiliaryTrainingWrapper

            layers = [m for m in module.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
            for layer in filter(_is_plain, layers):
                stack.enter_context(replaced(layer, "forward", partial(forward, layer)))
            if all(config.peft_type == "LORA" for config in module.peft_config.values()):
                stack.enter_context(replaced(module, "disable_adapter", partial(_disabled, layers)))
        yield


@contextmanager
def _disabled(layers: list[Any]) -> Iterator[None]:
    """While inside, no adapter is active.

    PEFT's own switch looks over the whole network each time, which takes longer than a block's pass.
    """
    before = [vars(layer).get("_disable_adapters") for layer in layers]  # None where the class says it
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer._disable_adapters
            else:
                layer._disable_adapters = own


def _is_plain(layer: Any) -> bool:
    """Whether a layer is one that `forward` computes: a single LoRA adapter on a linear map, not merged, run by PEFT's own forward."""
    from peft.tuners.lora import layer as lora

    if type(layer) is not lora.Linear or "forward" in vars(layer) or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    dropout = layer.lora_dropout[name] if name in layer.lora_A else None
    still = isinstance(dropout, nn.Identity) or dropout is not None and not dropout.training
    return still and name not in layer.lora_variant and not layer.lora_bias.get(name)


def forward(layer: Any, x_BTI: Tensor, *rest: Any, **named: Any) -> Any:
    """A plain LoRA layer's output as PEFT computes it, without two more passes over an output as large as the map's."""
    if rest or named:
        return type(layer).forward(layer, x_BTI, *rest, **named)
    out_BTO = layer.base_layer(x_BTI)
    if layer.disable_adapters:
        return out_BTO
    (name,) = layer.active_adapters
    maps = layer.lora_A[name], layer.lora_B[name]
    down, up = (linear.weight for linear in maps)
    if not x_BTI.dtype == down.dtype == out_BTO.dtype or any(map(watched, maps)):
        return type(layer).forward(layer, x_BTI)
    read_NR = x_BTI.flatten(0, -2) @ down.T
    return out_BTO.flatten(0, -2).addmm_(read_NR, up.T, alpha=layer.scaling[name]).view_as(out_BTO)
