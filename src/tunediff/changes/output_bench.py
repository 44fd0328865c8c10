"""The bench of one change at the output: both models' distributions on held-out text, and random groups of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tunediff.changes.outputs import Outputs, js_divergence
from tunediff.changes.trials.base import VerifySettings
from tunediff.core.chance import generator
from tunediff.models.divergences import Divergence, by_document
from tunediff.records.change import Change, TokenGroup

NEAREST = 20
"""Number of tokens of the nearest probability from which a control takes one in the place of each token of the group."""


@dataclass(eq=False)
class OutputBench:
    """Distributions at the tokens on which one change at the output is tried.

    These are the scored tokens from the change's first firing in a row on, in the documents with its largest strengths.

    tuned_NU, base_NU   probabilities, in the order of `Outputs`
    strength_N          the change's strength
    """

    change: Change
    group: TokenGroup
    tuned_NU: Tensor
    base_NU: Tensor
    strength_N: Tensor
    document_N: Tensor
    seed: int
    draws: int

    @cached_property
    def documents(self) -> list[int]:
        """The documents with a scored token."""
        return sorted(set(self.document_N.tolist()))

    def by_document(self, value_N: Tensor) -> Divergence:
        """Sums of a value at scored tokens, by document."""
        return by_document(value_N, self.document_N, self.documents)

    @cached_property
    def gap_N(self) -> Tensor:
        """The Jensen-Shannon divergence of the models at scored tokens, nat."""
        return js_divergence(self.tuned_NU, self.base_NU)

    def controls(self) -> Iterator[list[int]]:
        """Random groups of as many tokens, each about as likely as the one that it stands for."""
        mass_U = ((self.tuned_NU + self.base_NU) / 2).mean(0).double().clamp_min(1e-12).log()
        inside = torch.zeros(len(mass_U), dtype=torch.bool)
        inside[list(self.group.numbers)] = True
        others = (~inside).nonzero()[:, 0]
        if not len(others):
            return
        near = [
            others[
                (mass_U[others] - mass_U[token]).abs().topk(min(NEAREST, len(others)), largest=False).indices
            ].tolist()
            for token in self.group.numbers
        ]
        rng = generator(self.seed, "random groups", self.change.id)
        for _ in range(self.draws):
            chosen: list[int] = []
            for some in near:
                free = [token for token in some if token not in chosen]
                if free:
                    chosen.append(free[int(torch.randint(len(free), (1,), generator=rng))])
            yield chosen


def output_bench(
    outputs: Outputs, change: Change, f_N: Tensor, settings: VerifySettings, seed: int
) -> OutputBench | None:
    """The bench of one change at the output on a held-out sample; None if the change is on nowhere.

    f_N   the change's strength on the sample
    """
    sample = outputs.sample
    energy: dict[int, tuple[float, int]] = {}
    for row in sample.rows:
        mine = sample.row_N == row  # to its end: answers come after long prompts, and nothing is run for a control
        value, document = float(f_N[mine].double().pow(2).sum()), sample.tokens.document_R[row]
        if value > 0 and value > energy.get(document, (0.0, 0))[0]:
            energy[document] = (value, row)
    rows = sorted(row for _, row in sorted(energy.values(), reverse=True)[: settings.documents])
    if not rows or change.group is None:
        return None
    reached_N = torch.zeros(len(f_N), dtype=torch.bool)
    for row in rows:
        mine = (sample.row_N == row).nonzero()[:, 0]
        reached_N[mine] = (f_N[mine] != 0).cumsum(0) > 0
    reached = (reached_N & sample.scored_N).nonzero()[:, 0]
    reached = reached[torch.linspace(0, len(reached) - 1, min(settings.scored, len(reached))).round().long()]
    wanted_N = torch.zeros(len(f_N), dtype=torch.bool)
    wanted_N[reached] = True
    few = outputs.only(rows)
    places = torch.isin(sample.row_N, torch.tensor(rows)).nonzero()[:, 0]
    found = [
        (places[where_N][keep], p_NU[keep], q_NU[keep])
        for where_N, p_NU, q_NU in few.parts()
        if (keep := wanted_N[places[where_N]]).any()
    ]
    where_N, tuned_NU, base_NU = (torch.cat(parts) for parts in zip(*found))
    return OutputBench(
        change, change.group, tuned_NU, base_NU, f_N[where_N], sample.document_N[where_N], seed, settings.draws
    )
