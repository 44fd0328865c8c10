"""Principal directions of the centered difference: dense, linear, signed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.changes.finders._directions import moments, signed
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within


@dataclass(frozen=True)
class Principal(Finder):
    """The leading eigenvectors of the covariance of tuned minus base at each site.

    A direction's strength is the centered difference's coordinate along it, so each change is always on and signed. The
    directions of one site are orthogonal. No other few directions explain more energy, but energy says nothing of
    meaning.
    """

    directions: int = 4
    """Largest number of directions proposed at each site."""

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
