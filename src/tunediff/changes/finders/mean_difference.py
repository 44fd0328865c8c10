"""The constant offset: the mean of tuned minus base."""

from __future__ import annotations

from dataclasses import dataclass

from tunediff.changes.finders._directions import constant
from tunediff.changes.finders.base import Finder, Found, View


@dataclass(frozen=True)
class MeanDifference(Finder):
    """One change for each site, always on, that writes the mean difference, about half of what fine-tuning changes."""

    offset = True

    def find(self, view: View) -> Found:
        harvest = view.harvest
        total, count = 0.0, 0
        for _, x_NSMD in harvest.chunks("train"):
            total = total + (x_NSMD[:, :, 1] - x_NSMD[:, :, 0]).double().sum(0)
            count += len(x_NSMD)
        mean_SD = (total / count).float()
        return Found(
            [
                constant("mean_difference", str(site), site, mean_D, {"tokens": count})
                for site, mean_D in zip(harvest.sites, mean_SD)
            ]
        )


VARIANT = MeanDifference
