"""Helpers of finders that propose directions: moments of the difference, and a direction or an offset as a change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunediff.harvests.harvest import Harvest
from tunediff.records.change import Change
from tunediff.records.site import Site


def moments(harvest: Harvest) -> tuple[Tensor, Tensor]:
    """Mean (S, D) and covariance (S, D, D) of tuned minus base over training tokens, in float64."""
    first, second, count = 0.0, 0.0, 0
    for _, x_NSMD in harvest.chunks("train"):
        delta_NSD = (x_NSMD[:, :, 1] - x_NSMD[:, :, 0]).double()
        first = first + delta_NSD.sum(0)
        second = second + torch.einsum("nsd,nse->sde", delta_NSD, delta_NSD)
        count += len(delta_NSD)
    mean_SD = first / count
    return mean_SD, second / count - torch.einsum("sd,se->sde", mean_SD, mean_SD)


def signed(finder: str, site: Site, number: int, v_D: Tensor, mean_D: Tensor, origin: dict[str, Any]) -> Change:
    """A unit direction as a change whose strength is the centered difference's coordinate along it: always on, signed.

    The sign of a direction is arbitrary. The largest entry is made positive, so that runs agree.
    """
    v_D = v_D * torch.sign(v_D[v_D.abs().argmax()])
    return Change(
        id=f"{finder}/{site}-{number}",
        sites=(site,),
        rows_SMD=torch.stack([-v_D, v_D])[None].float(),
        write_SMD=torch.stack([torch.zeros_like(v_D), v_D])[None].float(),
        bias=-float(v_D @ mean_D),
        threshold=float("-inf"),
        finder=finder,
        origin=origin,
    )


def constant(finder: str, name: str, site: Site, mean_D: Tensor, origin: dict[str, Any]) -> Change:
    """A constant offset of the tuned model as a change: always on, at strength 1."""
    write = torch.stack([torch.zeros_like(mean_D), mean_D])[None]
    return Change(
        id=f"{finder}/{name}",
        sites=(site,),
        rows_SMD=torch.zeros_like(write),
        write_SMD=write,
        bias=1.0,
        threshold=float("-inf"),
        finder=finder,
        origin=origin,
    )
