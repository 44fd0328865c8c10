"""Random directions drawn from the covariance of the difference: the control that finders must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.changes.finders._directions import moments, signed
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.chance import generator


@dataclass(frozen=True)
class RandomDirections(Finder):
    """Random directions as changes, as many as there may be candidates, divided among the sites.

    A finder is useful only where its changes do better than these. The directions are Gaussian with the covariance of
    tuned minus base on training text. They lie where the difference lies, and move the output about as much as any
    direction there. Isotropic directions would be too easy to beat.

    The strength is the centered difference's coordinate along the direction, as for principal directions: always on,
    signed.
    """

    control = True

    def find(self, view: View) -> Found:
        sites = view.harvest.sites
        mean_SD, covariance_SDD = moments(view.harvest)
        changes = []
        for s, site in enumerate(sites):
            energies, vectors = torch.linalg.eigh(covariance_SDD[s])
            if energies[-1] <= 0:
                continue
            # The symmetric root is unique, unlike eigenvectors: the same draws in every run.
            root_DD = (vectors * energies.clamp_min(0).sqrt()) @ vectors.T
            mine = len(range(s, view.candidates, len(sites)))
            rng = generator(view.seed, "random directions", site)
            drawn_KD = torch.randn(mine, len(energies), generator=rng, dtype=torch.float64) @ root_DD
            for number, v in enumerate(torch.nn.functional.normalize(drawn_KD, dim=1)):
                origin = {"energy_share": float(v @ covariance_SDD[s] @ v / energies.sum())}
                changes.append(signed("random_directions", site, number, v, mean_SD[s], origin))
        return Found(changes)


VARIANT = RandomDirections
