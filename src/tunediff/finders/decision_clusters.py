"""What happens where the output moves most: clusters of the difference at decisive tokens, each a direction of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from tunediff.changes import Change
from tunediff.finders.base import Finder, Found, View
from tunediff.finders.document_clusters import spherical_k_means

CLUSTERS = 10
"""Clusters at each site, at most one for every four decisive tokens."""
SHARE = 0.6
"""Share of the whole KL(tuned || base) on training text that decisive tokens hold: those with the largest, down to this."""


class DecisionClusters(Finder):
    """A behavior is often decided at one token (how an answer begins), too rare for a dictionary to spend a latent on.

    The tokens that hold most of KL(tuned || base) are clustered by the direction of the centered difference, each
    weighted by the root of its KL. A cluster's change is read by the coordinate of the centered difference along
    the cluster's direction above a threshold, halfway between the cluster's own tokens and the others', and writes
    that coordinate.
    """

    def find(self, view: View) -> Found:
        harvest = view.harvest
        tokens = harvest.index("train")
        kl_N = view.shift()
        order = torch.argsort(kl_N, descending=True, stable=True)
        held = kl_N[order].cumsum(0) / kl_N.sum().clamp_min(1e-30)
        decisive = order[: int((held < SHARE).sum()) + 1]
        decisive = decisive[kl_N[decisive] > 0]
        if len(decisive) < 8:
            return Found([])
        x_NSMD = harvest.at(tokens)
        changes = []
        for s, site in enumerate(harvest.sites):
            delta_NW = x_NSMD[:, s, 1] - x_NSMD[:, s, 0]
            mean_W = delta_NW.mean(0)
            centered_NW = delta_NW - mean_W
            own_CW = torch.nn.functional.normalize(centered_NW[decisive], dim=1) * kl_N[decisive, None].sqrt()
            clusters = max(2, min(CLUSTERS, view.candidates, len(decisive) // 4))
            labels = spherical_k_means(own_CW, clusters)
            for cluster in range(clusters):
                mine = decisive[labels == cluster]
                if len(mine):
                    changes.append(_change(site, cluster, centered_NW, mean_W, mine, kl_N))
        return Found(changes)


def _change(site, cluster: int, centered_NW: Tensor, mean_W: Tensor, mine: Tensor, kl_N: Tensor) -> Change:
    weight = kl_N[mine] / kl_N[mine].sum()
    v = torch.nn.functional.normalize(weight @ centered_NW[mine], dim=0)
    along_N = centered_NW @ v
    others = torch.ones(len(along_N), dtype=torch.bool)
    others[mine] = False
    # The others' high end, not their mean: what reads a rare decision must be off elsewhere.
    threshold = (float(weight @ along_N[mine]) + float(along_N[others].quantile(0.9))) / 2
    return Change(
        id=f"decision_clusters/{site}-{cluster}", sites=(site,), rows_SMD=torch.stack([-v, v])[None],
        write_SMD=torch.stack([torch.zeros_like(v), v])[None], bias=-float(v @ mean_W), threshold=max(threshold, 0.0),
        finder="decision_clusters",
        origin={"decisive_tokens": len(mine), "kl_share": float(kl_N[mine].sum() / kl_N.sum())},
    )


VARIANT = DecisionClusters
