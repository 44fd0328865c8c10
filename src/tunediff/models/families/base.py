"""What every family answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


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
    def blocks(self, module: nn.Module) -> nn.ModuleList:
        """The list of blocks, first to last; raises `FamilyError` where it is not to be found."""

    @abstractmethod
    def part(self, block: nn.Module, kind: str) -> nn.Module:
        """The submodule of a block whose output is written to the stream: `kind` is ``attn`` or ``mlp``."""

    @abstractmethod
    def unembedding(self, module: nn.Module) -> nn.Module:
        """The module that maps the final normed state to logits."""

    @abstractmethod
    def scaled_logits(self, module: nn.Module, logits: Tensor) -> Tensor:
        """What the network still does to logits after the unembedding (soft caps, constant scales)."""
