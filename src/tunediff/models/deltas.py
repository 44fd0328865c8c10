"""What fine-tuning added to each linear map: LoRA factors, or differences between two whole models' weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunediff.core.chance import generator
from tunediff.core.errors import PairError, SourceError
from tunediff.models.network import LanguageModel

MERGE = "merge the adapter (merge_and_unload) and give the merged folder as TUNED"
"""Advice for an adapter of a kind that cannot be compared as an adapter."""


@dataclass(frozen=True, eq=False)
class Delta:
    """What fine-tuning added to one linear map: ``up @ down`` of shape (out, in), and the parameters that hold it.

    For a LoRA, `up` (out, r) includes the scale, and `down_parameter` is the adapter's A. For a full fine-tune, `up` is
    None, `down` is the whole difference (out, in), and `down_parameter` and `base_weight` are both models' weights as
    the module stores them.
    """

    name: str
    linear: nn.Module
    down: Tensor
    up: Tensor | None
    down_parameter: nn.Parameter
    up_parameter: nn.Parameter | None
    transposed: bool = False
    base_weight: Tensor | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the added map."""
        if self.up is None:
            return float(self.down.double().norm())
        # |UD|^2 = <U'U, DD'>, without forming the product.
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())

    def with_inputs(self, through: Callable[[Tensor], Tensor]) -> Mapping[nn.Parameter, Tensor]:
        """Return parameter values under which the added map is up @ through(down).

        `through` is linear, from (any, in) to (any, in). The identity gives tuned's weights to the bit, zeros give base's.
        """
        if self.up is not None:
            return {self.down_parameter: through(self.down.double()).to(self.down)}
        # The difference in float64 leads back to either end exactly; `down` is rounded to float32.
        whole = self.down_parameter.data.double() - self.base_weight.double()
        return self._over_base(through(whole.T if self.transposed else whole).to(whole))

    def _over_base(self, added: Tensor) -> Mapping[nn.Parameter, Tensor]:
        """Parameters under which a full fine-tune added `added` (out, in) to base."""
        weight = self.base_weight.double() + (added.T if self.transposed else added).double()
        return {self.down_parameter: weight.to(self.down_parameter.dtype)}

    def random(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        """Return parameter values under which the added map is Gaussian, of the same rank (at most 16) and norm."""
        rank = self.down.shape[0] if self.up is not None else min(16, *self.down.shape)
        out = (self.up if self.up is not None else self.down).shape[0]
        rng = generator(seed, "random lora", self.name)
        up = torch.randn(out, rank, generator=rng).to(self.down)
        down = torch.randn(rank, self.down.shape[1], generator=rng).to(self.down)
        scale = self.norm / float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum().sqrt())
        if self.up is None:
            return self._over_base((up.double() @ down.double()) * scale)
        ratio = float(self.up_parameter.data.norm() / self.up.norm().clamp_min(1e-30))  # undo the adapter's own scale
        return {self.down_parameter: down * scale, self.up_parameter: up * ratio}


def lora_deltas(module: nn.Module) -> Iterator[Delta]:
    """Yield the LoRA layers of a PEFT model with one active plain LoRA adapter; other kinds raise `SourceError`."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if module.active_peft_config.peft_type != "LORA":
        raise SourceError(
            f"the adapter is of kind {str(module.active_peft_config.peft_type.value)}",
            expected="plain LoRA",
            remedy=MERGE,
        )
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        active = layer.active_adapters
        if not isinstance(layer, LoraLayer) or len(active) != 1 or active[0] not in layer.lora_A:
            raise SourceError(
                f"{name} is not a plain LoRA layer",
                expected="one LoRA adapter on linear maps",
                got=type(layer).__name__,
                remedy=MERGE,
            )
        adapter = active[0]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        variant = layer.lora_variant.get(adapter)  # DoRA and its like
        if variant is not None or layer.lora_bias.get(adapter):
            raise SourceError(
                f"{name} uses {type(variant).__name__ if variant else 'a LoRA bias'}",
                expected="plain LoRA",
                remedy=MERGE,
            )
        yield Delta(name, layer, down.data, up.data * layer.scaling[adapter], down, up)


def full_deltas(base: LanguageModel, tuned: LanguageModel) -> Iterator[Delta]:
    """Yield the linear maps inside the blocks whose weights differ between two whole models."""
    theirs = dict(base.blocks.named_modules())
    shapes = [{n: tuple(p.shape) for n, p in side.blocks.named_parameters() if p.dim() == 2} for side in (base, tuned)]
    if shapes[0] != shapes[1]:
        name = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise PairError(
            f"the blocks of {base.name} and {tuned.name} are built differently",
            expected=f"{name} of shape {shapes[0].get(name, 'none')} (base)",
            got=f"{shapes[1].get(name, 'none')} (tuned)",
            remedy="the model that tuned was made from as BASE",
        )
    for name, module in tuned.blocks.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
        difference = weight.data.float() - theirs[name].weight.data.float()
        if difference.any():
            yield Delta(
                name,
                module,
                difference.T if transposed else difference,
                None,
                weight,
                None,
                transposed,
                theirs[name].weight.data,
            )


def counterparts(base: LanguageModel, tuned: LanguageModel) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield every parameter of tuned that base has a value of, with that value; LoRA factors have none."""
    if base.network is tuned.network:
        from peft.utils.other import ModulesToSaveWrapper

        for wrapper in tuned.network.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                mine = dict(wrapper.original_module.named_parameters())
                for name, parameter in wrapper.modules_to_save[wrapper.active_adapter].named_parameters():
                    yield parameter, mine[name].data
        return
    mine = dict(base.network.named_parameters())
    for name, parameter in tuned.network.named_parameters():
        if name in mine and mine[name].shape[1:] == parameter.shape[1:]:
            yield parameter, mine[name].data
