"""Maps: which parameters map inputs to outputs, how they are kept, and what they read in a call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a parameter keeps one linear map, or several side by side.

    transposed   kept as (in, out), as in GPT-2's Conv1D and gpt-oss's experts; otherwise as (out, in)
    stack        number of maps in the parameter, such as the experts of a block; 0 for a single map
    """

    transposed: bool = False
    stack: int = 0

    def maps(self, value: Tensor) -> list[Tensor]:
        """Return the maps (out, in) in a value of the parameter, as views of it: what is written to them is written to it.

        A stack is kept as (stack, ., .), or with the rows of its maps one below the other, (stack * ., .).
        """
        each = value.view(self.stack, -1, value.shape[-1]) if self.stack else value[None]
        return list((each.transpose(1, 2) if self.transposed else each).unbind(0))


@dataclass(frozen=True, eq=False)
class Seen:
    """What one linear map read in one call of a module.

    name     the parameter, by its name within the module
    x_NI     its inputs (N, in), or with any leading shape
    number   which map of a stack; 0 for a single one
    at_N     which positions of the call these inputs are at, as numbers into its rows and positions laid out flat; None
             where every position was read, in order
    """

    name: str
    x_NI: Tensor
    number: int = 0
    at_N: Tensor | None = None
