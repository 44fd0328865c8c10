"""Clusters of documents by the direction of their mean difference, one change for each cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within
from tunediff.records.change import Change


@dataclass(frozen=True)
class DocumentClusters(Finder):
    """One change for each cluster of documents whose mean differences point the same way.

    A behavior that lasts for a whole answer moves all its tokens in one direction, which a latent that fires on single
    tokens misses. The mean centered difference of each document is clustered by direction (spherical k-means, Dhillon &
    Modha 2001).

    A cluster's change reads and writes the centered difference's coordinate along the cluster's direction. The
    threshold lies halfway between the cluster's own tokens and all others.
    """

    clusters: int = 12
    """Largest number of clusters at each site; there is never more than one for every eight documents."""
    rounds: int = 30
    """Largest number of k-means rounds."""
    min_tokens: int = 4
    """Fewest kept tokens of a clustered document; the mean over fewer tokens is noise."""

    def __post_init__(self) -> None:
        within("find.document_clusters", self, clusters=2, rounds=1, min_tokens=1)

    def find(self, view: View) -> Found:
        harvest = view.harvest
        tokens = harvest.index("train")
        x_NSMD = harvest.at(tokens)
        document, number_N = harvest.document_N[tokens].unique(return_inverse=True)
        count_D = torch.bincount(number_N, minlength=len(document))
        changes = []
        for s, site in enumerate(harvest.sites):
            delta_NW = x_NSMD[:, s, 1] - x_NSMD[:, s, 0]
            mean_W = delta_NW.mean(0)
            centered_NW = delta_NW - mean_W
            sums_DW = torch.zeros(len(document), delta_NW.shape[1]).index_add_(0, number_N, centered_NW)
            enough = (count_D >= self.min_tokens).nonzero()[:, 0]
            means_DW = sums_DW[enough] / count_D[enough, None]
            clusters = min(self.clusters, view.candidates, len(enough) // 8)
            if clusters < 2 or not means_DW.any():
                continue
            labels = spherical_k_means(means_DW, clusters, self.rounds)
            label_of = torch.full((len(document),), -1)
            label_of[enough] = labels
            label_N = label_of[number_N]
            for cluster in range(clusters):
                mine = label_N == cluster
                if not mine.any():
                    continue
                v = torch.nn.functional.normalize(centered_NW[mine].mean(0), dim=0)
                along_N = centered_NW @ v
                threshold = float(along_N[mine].mean() + along_N[~mine].mean()) / 2
                changes.append(
                    Change(
                        id=f"document_clusters/{site}-{cluster}",
                        sites=(site,),
                        rows_SMD=torch.stack([-v, v])[None],
                        write_SMD=torch.stack([torch.zeros_like(v), v])[None],
                        bias=-float(v @ mean_W),
                        threshold=max(threshold, 0.0),
                        finder="document_clusters",
                        origin={
                            "documents": int((labels == cluster).sum()),
                            "mean_along": float(along_N[mine].mean()),
                            "mean_along_elsewhere": float(along_N[~mine].mean()),
                        },
                    )
                )
        return Found(changes)


def spherical_k_means(x_DW: Tensor, clusters: int, rounds: int = 30) -> Tensor:
    """Labels (D,) of rows clustered by direction; longer rows weigh more.

    The first centers are long rows that are far apart, so the result depends neither on chance nor on the rows' order.
    """
    unit_DW = torch.nn.functional.normalize(x_DW, dim=1)
    weight_D = x_DW.norm(dim=1)
    chosen = [int(weight_D.argmax())]
    while len(chosen) < clusters:
        nearest_D = (unit_DW @ unit_DW[chosen].T).max(1).values
        chosen.append(int((weight_D.square() * (1 - nearest_D)).argmax()))
    centers_CW = unit_DW[chosen]
    labels = torch.zeros(len(x_DW), dtype=torch.long)
    for _ in range(rounds):
        fresh = (unit_DW @ centers_CW.T).argmax(1)
        if torch.equal(fresh, labels):
            break
        labels = fresh
        sums = torch.zeros_like(centers_CW).index_add_(0, labels, x_DW)
        moved = sums.norm(dim=1) > 0
        centers_CW[moved] = torch.nn.functional.normalize(sums[moved], dim=1)
    return labels


VARIANT = DocumentClusters
