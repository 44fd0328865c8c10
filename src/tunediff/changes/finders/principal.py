"""Principal directions of the centered difference: dense, linear, signed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.changes.finders._directions import moments, signed
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within


@dataclass(frozen=True)
class Principal(Finder):
    """The leading directions of the covariance of tuned minus base at each site.

    A direction's strength at a token is the centered difference's coordinate along it, so it is on everywhere and may
    be negative; the directions of one site are orthogonal. They explain the most energy that any few directions can,
    which says nothing of meaning.
    """

    directions: int = 4
    """Directions proposed at each site, at most."""

    def __post_init__(self) -> None:
        within("find.principal", self, directions=1)

    def find(self, view: View) -> Found:
        sites = view.harvest.sites
        mean_SD, covariance_SDD = moments(view.harvest)
        changes = []
        for site, mean_D, covariance_DD in zip(sites, mean_SD, covariance_SDD):
            energies, vectors = torch.linalg.eigh(covariance_DD)
            for rank in range(min(self.directions, len(energies), view.candidates)):
                origin = {"rank": rank, "energy_share": float(energies[-1 - rank] / energies.sum())}
                changes.append(signed("principal", site, rank, vectors[:, -1 - rank], mean_D, origin))
        return Found(changes)


VARIANT = Principal
