"""Clusters of documents by the words that the tuned model makes more likely at the tokens with the largest KL."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff.changes.attributions import Shift
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within
from tunediff.records.change import Change
from tunediff.records.site import Site


@dataclass(frozen=True)
class DecisionClusters(Finder):
    """One change for each cluster of documents whose decisive tokens make the same words more likely.

    A behavior is often decided at few tokens, such as the first of an answer, too few for a dictionary to spend a
    latent on. Decisive tokens are those with the largest KL(tuned || base).

    A document is described by its rises in next-token probability, summed over its decisive tokens. Documents are
    clustered by average linkage on the cosine of square roots (Bhattacharyya's coefficient). Behaviors with different
    words therefore land in different clusters, however many behaviors there are.

    A cluster's change writes the KL-weighted mean of the centered difference over the cluster's decisive tokens. The
    read direction is the shrunken linear discriminant between these tokens and all others, scaled to 1 on average over
    the cluster's tokens. The threshold is one half. Clusters may share a write direction; the read direction tells them
    apart.
    """

    share: float = 0.8
    """Share of the whole KL(tuned || base) on training text that the decisive tokens hold (0..1)."""
    alike: float = 0.2
    """Smallest mean cosine at which two clusters are merged; on the demo, .15 to .3 gave the same leading clusters."""
    documents: int = 3
    """Fewest documents in a cluster; one or two documents do not show a behavior."""
    most: int = 512
    """Largest number of documents clustered, by descending KL."""
    ridge: float = 1.0
    """Shrinkage of the read direction's covariance toward a sphere, as a share of the mean variance."""

    def __post_init__(self) -> None:
        within("find.decision_clusters", self, share=(0, 1), alike=(0, 1), documents=1, most=1, ridge=0)

    def find(self, view: View) -> Found:
        harvest = view.harvest
        tokens = harvest.index("train")
        shift = view.shift()
        order = torch.argsort(shift.kl_N, descending=True, stable=True)
        held = shift.kl_N[order].cumsum(0) / shift.kl_N.sum().clamp_min(1e-30)
        decisive = order[: int((held < self.share).sum()) + 1]
        decisive = decisive[shift.kl_N[decisive] > 0]
        if not len(decisive):
            return Found([])
        clusters = self._clusters(shift.at(decisive), harvest.document_N[tokens][decisive])[: view.candidates]
        x_NSMD = harvest.at(tokens)
        changes = []
        for s, site in enumerate(harvest.sites):
            delta_NW = x_NSMD[:, s, 1] - x_NSMD[:, s, 0]
            mean_W = delta_NW.mean(0)
            centered_NW = delta_NW - mean_W
            covariance = centered_NW.T @ centered_NW / len(centered_NW)
            covariance.diagonal().add_(self.ridge * covariance.diagonal().mean())
            changes += [
                _change(site, number, centered_NW, mean_W, covariance, decisive[mine], shift.kl_N)
                for number, mine in enumerate(clusters)
            ]
        return Found(changes)

    def _clusters(self, shift: Shift, document_N: Tensor) -> list[Tensor]:
        """For each cluster of documents, a mask of the decisive tokens; clusters with the most KL come first."""
        document, number_N = document_N.unique(return_inverse=True)
        kl_D = torch.zeros(len(document)).index_add_(0, number_N, shift.kl_N)
        chosen = torch.argsort(kl_D, descending=True, stable=True)[: self.most]
        word, column_NK = shift.said_NK.unique(return_inverse=True)
        says_DV = torch.zeros(len(document), len(word))
        says_DV.index_put_((number_N[:, None].expand_as(column_NK), column_NK), shift.rise_NK, accumulate=True)
        unit_DV = torch.nn.functional.normalize(says_DV[chosen].sqrt(), dim=1)
        groups = average_linkage(unit_DV @ unit_DV.T, self.alike)
        groups = [chosen[group] for group in groups if len(group) >= self.documents]
        groups.sort(key=lambda group: -float(kl_D[group].sum()))
        return [torch.isin(number_N, group).nonzero()[:, 0] for group in groups]


def average_linkage(alike_GG: Tensor, alike: float) -> list[list[int]]:
    """Merge rows into groups, most alike first, while the mean likeness (G, G) of two groups is at least `alike`."""
    sum_GG = alike_GG.clone()
    size_G = torch.ones(len(sum_GG))
    groups = {row: [row] for row in range(len(sum_GG))}
    while len(groups) > 1:
        mean_GG = sum_GG / (size_G[:, None] * size_G)
        mean_GG.fill_diagonal_(-1)
        first, second = divmod(int(mean_GG.argmax()), len(mean_GG))
        if mean_GG[first, second] < alike:
            break
        groups[first] += groups.pop(second)
        sum_GG[first] += sum_GG[second]
        sum_GG[:, first] += sum_GG[:, second]
        size_G[first] += size_G[second]
        sum_GG[second] = sum_GG[:, second] = -1e30  # merged into another group
    return list(groups.values())


def _change(
    site: Site, cluster: int, centered_NW: Tensor, mean_W: Tensor, covariance: Tensor, mine: Tensor, kl_N: Tensor
) -> Change:
    weight = kl_N[mine] / kl_N[mine].sum()
    write_W = weight @ centered_NW[mine]
    row_W = torch.linalg.solve(covariance, write_W)
    row_W = row_W / (row_W @ write_W)
    return Change(
        id=f"decision_clusters/{site}-{cluster}",
        sites=(site,),
        rows_SMD=torch.stack([-row_W, row_W])[None],
        write_SMD=torch.stack([torch.zeros_like(write_W), write_W])[None],
        bias=-float(row_W @ mean_W),
        threshold=0.5,
        finder="decision_clusters",
        origin={"decisive_tokens": len(mine), "kl_share": float(kl_N[mine].sum() / kl_N.sum())},
    )


VARIANT = DecisionClusters
