"""Tokens that only one of the models has, as a change at the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within
from tunediff.models.vocabulary import NO_TOKEN
from tunediff.records.change import Change


@dataclass(frozen=True)
class NewTokens(Finder):
    """The tokens that tuned has and base lacks, as one change; those that base has and tuned lacks as another.

    The change holds the tokens to which their model gives at least ``least`` of the probability at some training token. Where
    it gives no token that much, the change holds all of them, so that the finding says that they are never said. Rows of the
    unembedding that no tokenizer names are proposed only where they are said.
    """

    at_output = True

    least: float = 0.05
    """Smallest probability (0..1) at which a token counts as said."""

    def __post_init__(self) -> None:
        within("find.new_tokens", self, least=(0, 1))

    def find(self, view: View) -> Found:
        outputs = view.outputs
        if outputs is None:
            return Found([])
        vocabularies = view.pair.vocabularies
        changes = []
        for name, own, within_rows, raised in (
            ("said", outputs.tuned_only, vocabularies.tuned_named, True),
            ("lost", outputs.base_only, vocabularies.base_named, False),
        ):
            whole = [*within_rows, *range(own.start, own.stop)]
            if not whole:
                continue
            peak_G = torch.zeros(len(whole))
            for _, p_NU, q_NU in outputs.parts():
                peak_G = torch.maximum(peak_G, (p_NU if raised else q_NU)[:, whole].max(0).values)
            numbers = [whole[i] for i in (peak_G >= self.least).nonzero()[:, 0].tolist()]
            all_of = outputs.group(whole, raised)
            named = [n for n, text in zip(all_of.numbers, all_of.names) if not text.startswith(NO_TOKEN)]
            if not (numbers or named):
                continue
            group = outputs.group(numbers or named, raised)
            origin = {"tokens": list(group.names), "most": float(peak_G.max())}
            width = view.pair.base.width
            changes.append(Change.at_the_output(f"new_tokens/{name}", group, width, self.least, "new_tokens", origin))
        return Found(changes)


VARIANT = NewTokens
