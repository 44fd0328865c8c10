"""What every family answers, and which family knows a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunediff.core import variants
from tunediff.core.errors import FamilyError
from tunediff.models.maps import Layout, Seen
from tunediff.models.passes import OTHER_NETWORK

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

PACKAGE = "tunediff.models.families"


@dataclass(frozen=True)
class Family(ABC):
    """How to read one kind of network. Stateless: every method takes the module."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this family knows `module`; where several do, the one with the higher `precedence` is taken."""

    @property
    def precedence(self) -> int:
        """0 for a family that goes by structure alone, higher for one written for certain networks."""
        return 0

    @abstractmethod
    def blocks(self, module: nn.Module) -> Iterable[nn.Module]:
        """Return the blocks, first to last; raise `FamilyError` where they are not to be found."""

    @abstractmethod
    def part(self, block: nn.Module, kind: str) -> nn.Module:
        """Return the submodule of a block whose output is written to the stream: `kind` is ``attn`` or ``mlp``."""

    @abstractmethod
    def unembedding(self, module: nn.Module) -> nn.Module:
        """Return the module that maps the final normed state to logits."""

    @abstractmethod
    def scaled_logits(self, module: nn.Module, logits: Tensor) -> Tensor:
        """Apply what the network still does to logits after the unembedding (soft caps, constant scales)."""

    def window(self, module: nn.Module) -> float:
        """Return how many positions back every block sees; rows are packed only up to that length."""
        return float("inf")

    def positions(self, module: nn.Module) -> float:
        """Return how many tokens a row may have; longer rows and prompts are cut, or left out."""
        return float("inf")

    def maps(self, module: nn.Module) -> Mapping[str, Layout]:
        """Return the linear maps whose inputs a call of `module` shows, by their parameters' names within it.

        `module` is any part of the network. What no part answers for is no linear map, or one whose inputs cannot be
        seen: edits leave it as it is. By default a module shows its own `weight`, where that has two axes and is no table
        of embeddings.
        """
        from torch import nn

        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or "Embedding" in type(module).__name__:
            return {}
        return {} if isinstance(module, nn.Embedding) else {"weight": Layout(type(module).__name__ == "Conv1D")}

    def reads(self, module: nn.Module, given: Sequence[Any], named: Mapping[str, Any]) -> Iterable[Seen]:
        """Yield what the maps of `maps` read in one call of `module`, asked just before it.

        given, named   the arguments of the call
        By default every map reads the first argument, at all positions.
        """
        value = next(iter((*given, *named.values())))
        return [Seen(name, value) for name in self.maps(module)]

    def cache(self, module: nn.Module) -> Any:
        """Return an empty key-value cache as the network's forward takes it, or None where it has none.

        It is a `transformers` cache: layers that can be updated one by one, and rows that can be repeated. Without one,
        rows never share the run of a prefix.
        """
        return None


def family_of(module: nn.Module, name: str = "") -> Family:
    """Return the family called `name`, which may be an import path; without a name, the most specific that knows `module`.

    Raises `VariantError` for a name that is no family's, `FamilyError` if none knows the module.
    """
    known = [variants.make(Family, one) for one in ([name] if name else variants.names(PACKAGE))]
    matching = sorted((f for f in known if f.matches(module)), key=lambda f: -f.precedence)
    if not matching:
        raise FamilyError(
            f"the family {name} does not know {type(module).__name__}"
            if name
            else f"no family knows {type(module).__name__}",
            expected="a decoder-only causal language model",
            remedy="--set pair.family= which goes by structure" if name else OTHER_NETWORK,
        )
    return matching[0]
