"""Groups of tokens whose logits tuned raises or lowers together, and what of the difference of streams does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunediff.changes.finders.base import Finder, Found, View
from tunediff.changes.finders.decision_clusters import average_linkage
from tunediff.changes.gains import rises, standing
from tunediff.changes.rankings import halves
from tunediff.core.axes import BASE, TUNED
from tunediff.core.errors import within
from tunediff.harvests.samples import Sample
from tunediff.records.change import Change, TokenGroup
from tunediff.records.site import Site


@dataclass(frozen=True)
class LogitGains(Finder):
    """One change for each group of tokens with a high standing (`changes.gains`): raised in far more text than said.

    The tokens of highest standing on training text are grouped by average linkage. Two tokens are as alike as the larger of
    two cosines: of their gains in documents, and of their rows of the unembedding. Spellings of one word, with other cases or
    a space before them, are alike.

    The change of a group reads the mean gain of its tokens off the difference of streams, by ridge regression through the
    origin, at the site where that predicts the other half of the documents best. It writes what of the difference goes
    along with this readout. So a word that is raised everywhere is a change, too: the constant offset is not left out.
    """

    at_output = True

    most: int = 48
    """Number of tokens grouped, of those that are raised and of those that are lowered."""
    alike: float = 0.35
    """Smallest mean likeness (0..1) at which two groups of tokens are merged."""
    tokens: int = 20
    """Largest number of tokens in a change, those of highest standing."""
    groups: int = 3
    """Largest number of groups proposed, of those that are raised and of those that are lowered."""
    ridge: float = 1.0
    """Shrinkage of the readout, as a share of the difference's mean square."""

    def __post_init__(self) -> None:
        within("find.logit_gains", self, most=1, alike=(0, 1), tokens=1, groups=1, ridge=0)

    def find(self, view: View) -> Found:
        outputs = view.outputs
        if outputs is None or not any(view.harvest.manifest["delta_energy"]):
            return Found([])  # equal streams write nothing; `token_shift` is for them
        if not any(site.kind == "resid" for site in outputs.sample.sites):
            return Found([])  # runs can start from residual streams only
        score_V = standing(outputs).score_V
        count = min(self.most, int((score_V != 0).sum()))
        raised_K, lowered_K = (
            order[:count].tolist() for order in (score_V.argsort(descending=True), score_V.argsort())
        )
        tokens = [*raised_K, *lowered_K]
        read = [
            (where_N, *(part_NV[:, tokens] for part_NV in rises(tuned_NV, base_NV)))
            for where_N, tuned_NV, base_NV in outputs.logits()
        ]
        where_N, rise_NK, plausible_NK = (torch.cat(parts) for parts in zip(*read))
        document_N = outputs.sample.document_N[where_N]
        half_N = halves(outputs.sample)[where_N]
        changes = []
        for name, mine, sign in (("raised", raised_K, 1), ("lowered", lowered_K, -1)):
            columns = [tokens.index(token) for token in mine if sign * score_V[token] > 0]
            gain_NK = (rise_NK * plausible_NK)[:, columns] * sign
            groups = self._groups(view, [tokens[c] for c in columns], gain_NK, document_N) if columns else []
            for number, group in enumerate(groups[: self.groups]):
                numbers = [tokens[columns[g]] for g in group[: self.tokens]]
                y_N = rise_NK[:, [columns[g] for g in group[: self.tokens]]].mean(1) * sign
                site, row_D, write_D = self._directions(outputs.sample, where_N, y_N, half_N)
                named = outputs.group(numbers, sign > 0)
                scores = {text: abs(float(score_V[n])) for text, n in zip(named.names, numbers)}
                changes.append(
                    _change(f"logit_gains/{name}-{number}", site, row_D, write_D, named, {"standing": scores})
                )
        return Found(changes)

    def _groups(self, view: View, tokens: list[int], gain_NK: Tensor, document_N: Tensor) -> list[list[int]]:
        """Groups of these tokens by place, each with the highest standing first, as the tokens come."""
        documents, number_N = document_N.unique(return_inverse=True)
        gain_DK = torch.zeros(len(documents), len(tokens)).index_add_(0, number_N, gain_NK)
        by_text_KD = torch.nn.functional.normalize(gain_DK.T.clamp_min(0), dim=1)
        rows_KD = torch.nn.functional.normalize(_unembedding(view, tokens), dim=1)
        spelled = [view.pair.vocabularies.name(1, n).strip().casefold() for n in tokens]
        same_KK = torch.tensor([[float(a == b) for b in spelled] for a in spelled])
        alike_KK = torch.stack([by_text_KD @ by_text_KD.T, rows_KD @ rows_KD.T, same_KK]).amax(0)
        return sorted((sorted(group) for group in average_linkage(alike_KK, self.alike)), key=lambda group: group[0])

    def _directions(self, sample: Sample, where_N: Tensor, y_N: Tensor, half_N: Tensor) -> tuple[Site, Tensor, Tensor]:
        """The site at which a gain is read best, the readout of the difference there, and what it writes."""
        best: tuple[float, Site, Tensor] | None = None
        for s, site in enumerate(sample.sites):
            if site.kind != "resid":
                continue
            delta_ND = sample.streams_NSMD[where_N, s, TUNED] - sample.streams_NSMD[where_N, s, BASE]
            missed = sum(
                float((y_N[~half] - delta_ND[~half] @ self._readout(delta_ND[half], y_N[half])).square().sum())
                for half in (half_N, ~half_N)
            )
            if best is None or missed < best[0]:
                best = missed, site, delta_ND
        assert best is not None
        _, site, delta_ND = best
        row_D = self._readout(delta_ND, y_N)
        f_N = delta_ND @ row_D
        return site, row_D, (f_N @ delta_ND) / f_N.square().sum().clamp_min(1e-30)

    def _readout(self, delta_ND: Tensor, y_N: Tensor) -> Tensor:
        """The ridge regression (D,) of a gain on the difference, through the origin."""
        square_DD = delta_ND.T.double() @ delta_ND.double()
        square_DD.diagonal().add_(self.ridge * square_DD.diagonal().mean().clamp_min(1e-30))
        row_D: Tensor = torch.linalg.solve(square_DD, delta_ND.T.double() @ y_N.double()).float()
        return row_D


def _unembedding(view: View, tokens: list[int]) -> Tensor:
    """Base's rows of the unembedding for some tokens, (K, D), less the mean of all rows."""
    base = view.pair.base
    weight: Any = base.family.unembedding(base.network).weight
    rows_VD: Tensor = weight.detach()
    chosen_K = base.numbering.ids(torch.tensor(tokens)).to(rows_VD.device)
    return (rows_VD[chosen_K].float() - rows_VD.float().mean(0)).cpu()


def _change(id: str, site: Site, row_D: Tensor, write_D: Tensor, group: TokenGroup, origin: dict[str, Any]) -> Change:
    return Change(
        id=id,
        sites=(site,),
        rows_SMD=torch.stack([-row_D, row_D])[None],
        write_SMD=torch.stack([torch.zeros_like(write_D), write_D])[None],
        bias=0.0,
        threshold=float("-inf"),
        finder="logit_gains",
        origin=origin,
        group=group,
    )


VARIANT = LogitGains
