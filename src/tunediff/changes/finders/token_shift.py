"""Tokens that tuned says more or less often than base, where only the output differs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within
from tunediff.records.change import Change


@dataclass(frozen=True)
class TokenShift(Finder):
    """The tokens that gain the most probability on training text as one change, those that lose the most as another.

    It proposes changes only where both models' streams are equal, so that the difference lies after them, in the final norm
    or the unembedding. Tokens that only one model has are left to `new_tokens`: probabilities are those among the tokens
    that both have.
    """

    at_output = True

    tokens: int = 8
    """Largest number of tokens in a change."""
    share: float = 0.1
    """Smallest gain of a token of the change, as a share (0..1) of the largest gain."""
    least: float = 0.01
    """Smallest probability (0..1) gained together at which the change counts as on."""

    def __post_init__(self) -> None:
        within("find.token_shift", self, tokens=1, share=(0, 1), least=(0, 1))

    def find(self, view: View) -> Found:
        outputs = view.outputs
        if outputs is None or any(view.harvest.manifest["delta_energy"]):
            return Found([])
        gain_V = torch.zeros(view.pair.vocabulary, dtype=torch.float64)
        count = 0
        for _, *both in outputs.parts():
            p_NV, q_NV = (_among(x_NU[:, outputs.shared]) for x_NU in both)
            gain_V += (p_NV - q_NV).sum(0)
            count += len(p_NV)
        changes = []
        for name, raised in (("raised", True), ("lowered", False)):
            found = (gain_V if raised else -gain_V).topk(min(self.tokens, len(gain_V)))
            most = float(found.values[0])
            kept = (found.values >= self.share * most) & (found.values > 1e-6 * max(count, 1))
            if not kept.any():
                continue
            group = outputs.group(found.indices[kept].tolist(), raised)
            gains = dict(zip(group.names, (found.values[kept] / count).tolist()))
            origin = {"tokens": list(group.names), "gain_a_token": gains}
            width = view.pair.base.width
            changes.append(Change.at_the_output(f"token_shift/{name}", group, width, self.least, "token_shift", origin))
        return Found(changes)


def _among(x_NV: Tensor) -> Tensor:
    """Probabilities among these tokens alone."""
    return x_NV.double() / x_NV.double().sum(1, keepdim=True)


VARIANT = TokenShift
