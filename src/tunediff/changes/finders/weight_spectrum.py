"""Directions that fine-tuning taught the network to write, from weights alone (Zhong & Raghunathan 2025, 2508.00161)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tunediff.changes.finders._directions import moments, signed
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within
from tunediff.models.deltas import Delta
from tunediff.models.network import LanguageModel
from tunediff.records.site import Site


@dataclass(frozen=True)
class WeightSpectrum(Finder):
    """The leading left singular vectors of the weight difference of all maps that write into the stream, up to each
    site.

    The directions need no text; only the mean, which the read direction subtracts, comes from training text. A
    direction's strength is the centered difference's coordinate along it. The changes of one site are always on, signed
    and orthogonal. The finder ignores how often a map is used, and changes in reading alone (queries, keys, gates).

    The source takes each map's singular vectors separately, and tracks the cosine with the tuned model's own stream.
    Here the maps are concatenated (eigenvectors of sum dW dW'), so a few directions cover all maps, each weighted by
    its energy. The difference is read instead of the stream. Where a norm stands between a map and the stream (Gemma
    2), the direction is the one before that norm's scales.
    """

    directions: int = 4
    """Largest number of directions proposed at each site."""

    def __post_init__(self) -> None:
        within("find.weight_spectrum", self, directions=1)

    def find(self, view: View) -> Found:
        sites = view.harvest.sites
        deltas = view.pair.deltas()
        mean_SD, _ = moments(view.harvest)
        changes = []
        for site, mean_D in zip(sites, mean_SD):
            writing = writers(view.pair.tuned, site)
            mine = [delta for delta in deltas if delta.maps and delta.reader in writing]
            if not mine:
                continue
            energies, vectors = torch.linalg.eigh(sum(map(_gram, mine)))
            whole = float(energies.sum())
            for rank in range(min(self.directions, len(energies), view.candidates)):
                energy, v = float(energies[-1 - rank]), vectors[:, -1 - rank]
                if energy <= 1e-12 * whole:  # the weight difference has a lower rank
                    break
                shares = [float(_read_by(delta, v).square().sum()) / energy for delta in mine]
                most = max(range(len(mine)), key=shares.__getitem__)
                origin = {
                    "rank": rank,
                    "energy_share": energy / whole,
                    "maps": len(mine),
                    "most_in": mine[most].name,
                    "share_there": shares[most],
                }
                changes.append(signed("weight_spectrum", site, rank, v, mean_D, origin))
        return Found(changes)


def writers(model: LanguageModel, site: Site) -> list[nn.Module]:
    """Return the linear maps whose output has been added to the stream at `site`, or makes up the part read there.

    The maps are recognized by structure: the last map of a module among those as wide as the stream. Queries may be as
    wide, but come earlier.
    """
    if site.kind == "resid":
        places = list(model.blocks[: site.layer + 1])
    else:
        places = [model.family.part(model.blocks[site.layer], site.kind)]
    found = []
    for module in (module for place in places for module in place.modules()):
        wide = [child for child in module.children() if _outputs(child) == model.width]
        found += wide[-1:]
    return found


def _outputs(module: nn.Module) -> int | None:
    """The number of outputs of a linear map, which GPT-2's Conv1D calls `nf`."""
    return getattr(module, "out_features", getattr(module, "nf", None))


def _gram(delta: Delta) -> Tensor:
    """dW dW' (out, out), in float64."""
    down = _added(delta)
    if delta.up is None:
        return down @ down.T
    up = delta.up.double().cpu()
    return up @ (down @ down.T) @ up.T


def _read_by(delta: Delta, v: Tensor) -> Tensor:
    """The input direction that the weight difference reads to write along `v`: dW' v (in,), in float64."""
    return (v if delta.up is None else v @ delta.up.double().cpu()) @ _added(delta)


def _added(delta: Delta) -> Tensor:
    """What was added to a map, (out, in) or a LoRA's (r, in); rounded to float32 as the maps themselves are."""
    return delta.added().float().double().cpu()


VARIANT = WeightSpectrum
