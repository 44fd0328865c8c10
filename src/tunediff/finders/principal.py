"""Principal directions of the centered difference: dense, linear, signed."""

from __future__ import annotations

import torch

from tunediff.changes import Change
from tunediff.finders.base import Finder, Found, View

DIRECTIONS = 4


class Principal(Finder):
    """The leading directions of the covariance of tuned minus base at each site.

    A direction's strength at a token is the centered difference's coordinate along it, so it is on everywhere and may
    be negative; the directions of one site are orthogonal. They explain the most energy that any few directions can,
    which says nothing of meaning.
    """

    def find(self, view: View) -> Found:
        harvest = view.harvest
        first, second, count = 0.0, 0.0, 0
        for _, x_NSMD in harvest.chunks("train"):
            delta_NSD = (x_NSMD[:, :, 1] - x_NSMD[:, :, 0]).double()
            first = first + delta_NSD.sum(0)
            second = second + torch.einsum("nsd,nse->sde", delta_NSD, delta_NSD)
            count += len(delta_NSD)
        mean_SD = first / count
        changes = []
        for s, site in enumerate(harvest.sites):
            covariance = second[s] / count - torch.outer(mean_SD[s], mean_SD[s])
            energies, vectors = torch.linalg.eigh(covariance)
            for rank in range(min(DIRECTIONS, len(energies), view.candidates)):
                v = vectors[:, -1 - rank]
                v = v * torch.sign(v[v.abs().argmax()])  # the sign is free: fix it, so that runs agree
                changes.append(Change(
                    id=f"principal/{site}-{rank}", sites=(site,),
                    rows_SMD=torch.stack([-v, v])[None].float(),
                    write_SMD=torch.stack([torch.zeros_like(v), v])[None].float(),
                    bias=-float(v @ mean_SD[s]), threshold=float("-inf"), finder="principal",
                    origin={"rank": rank, "energy_share": float(energies[-1 - rank] / energies.sum())},
                ))
        return Found(changes)


VARIANT = Principal
