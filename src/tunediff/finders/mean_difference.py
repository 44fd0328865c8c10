"""The constant offset: the mean of tuned minus base."""

from __future__ import annotations

import torch

from tunediff.changes import Change
from tunediff.finders.base import Finder, Found, View


class MeanDifference(Finder):
    """One change a site, always on, that writes the mean difference. About half of a tune's change is this."""

    def find(self, view: View) -> Found:
        harvest = view.harvest
        total, count = 0.0, 0
        for _, x_NSMD in harvest.chunks("train"):
            total = total + (x_NSMD[:, :, 1] - x_NSMD[:, :, 0]).double().sum(0)
            count += len(x_NSMD)
        mean_SD = (total / count).float()
        changes = []
        for s, site in enumerate(harvest.sites):
            write = torch.stack([torch.zeros_like(mean_SD[s]), mean_SD[s]])[None]
            changes.append(Change(
                id=f"mean_difference/{site}", sites=(site,), rows_SMD=torch.zeros_like(write), write_SMD=write,
                bias=1.0, threshold=float("-inf"), finder="mean_difference", origin={"tokens": count},
            ))
        return Found(changes)


VARIANT = MeanDifference
