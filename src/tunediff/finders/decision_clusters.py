"""What happens where the output moves most: documents clustered by where their predictions move, a change for each."""

from __future__ import annotations

import torch
from torch import Tensor

from tunediff.changes import Change
from tunediff.finders.base import Finder, Found, View
from tunediff.finders.document_clusters import spherical_k_means

CLUSTERS = 5
"""Clusters of documents, at most one for every four that have a decisive token."""
SHARE = 0.8
"""Share of the whole KL(tuned || base) on training text that decisive tokens hold: those with the largest, down to this."""
RIDGE = 1.0
"""Shrinkage of the readout's covariance toward a sphere, as a share of its mean variance."""


class DecisionClusters(Finder):
    """A behavior is often decided at few tokens (how an answer begins), too rare for a dictionary to spend a latent on.

    The tokens that hold most of KL(tuned || base) say where the prediction moves. Documents are clustered by the
    direction of that move in the space of unembedding rows, summed over their decisive tokens with KL as weight
    (spherical k-means). A cluster's change writes the KL-weighted mean of the centered difference over its decisive
    tokens and is read by the shrunken linear discriminant between these and all other tokens, scaled to 1 on its own
    and on above a half: what it writes may be shared with other behaviors, where it writes is its own.
    """

    def find(self, view: View) -> Found:
        harvest = view.harvest
        tokens = harvest.index("train")
        kl_N, move_ND = view.shift()
        order = torch.argsort(kl_N, descending=True, stable=True)
        held = kl_N[order].cumsum(0) / kl_N.sum().clamp_min(1e-30)
        decisive = order[: int((held < SHARE).sum()) + 1]
        decisive = decisive[kl_N[decisive] > 0]
        if not len(decisive):
            return Found([])
        documents, number = harvest.document_N[tokens][decisive].unique(return_inverse=True)
        weighted = move_ND[decisive] * kl_N[decisive, None]
        sums_DW = torch.zeros(len(documents), move_ND.shape[1]).index_add_(0, number, weighted)
        clusters = min(CLUSTERS, view.candidates, len(documents) // 4)
        if clusters < 2:
            return Found([])
        labels = spherical_k_means(sums_DW, clusters)[number]
        x_NSMD = harvest.at(tokens)
        changes = []
        for s, site in enumerate(harvest.sites):
            delta_NW = x_NSMD[:, s, 1] - x_NSMD[:, s, 0]
            mean_W = delta_NW.mean(0)
            centered_NW = delta_NW - mean_W
            covariance = centered_NW.T @ centered_NW / len(centered_NW)
            covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
            for cluster in range(clusters):
                mine = decisive[labels == cluster]
                center = (move_ND[mine] * kl_N[mine, None]).sum(0)
                mine = mine[move_ND[mine] @ center > 0]
                if len(mine):
                    changes.append(_change(site, cluster, centered_NW, mean_W, covariance, mine, kl_N))
        return Found(changes)


def _change(site, cluster: int, centered_NW: Tensor, mean_W: Tensor, covariance: Tensor, mine: Tensor,
            kl_N: Tensor) -> Change:
    weight = kl_N[mine] / kl_N[mine].sum()
    write_W = weight @ centered_NW[mine]
    row_W = torch.linalg.solve(covariance, write_W)
    row_W = row_W / (row_W @ write_W)
    return Change(
        id=f"decision_clusters/{site}-{cluster}", sites=(site,), rows_SMD=torch.stack([-row_W, row_W])[None],
        write_SMD=torch.stack([torch.zeros_like(write_W), write_W])[None], bias=-float(row_W @ mean_W), threshold=0.5,
        finder="decision_clusters",
        origin={"decisive_tokens": len(mine), "kl_share": float(kl_N[mine].sum() / kl_N.sum())},
    )


VARIANT = DecisionClusters
