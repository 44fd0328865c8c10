"""The scan over depth: where the two models differ, above what noise, and where the difference already decides the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.core.axes import BASE, TUNED
from tunediff.core.errors import within
from tunediff.harvests.harvest import noise_floor
from tunediff.models.divergences import Said, kl_divergence
from tunediff.models.network import Start
from tunediff.models.pair import Pair
from tunediff.records.site import Site
from tunediff.texts.tokens import Tokens


@dataclass(frozen=True)
class ScanSettings:
    """Which depths are looked at, and how a site is chosen."""

    sites: tuple[str, ...] = ()
    """Sites to use, e.g. resid.15; empty: chosen by the scan."""
    depths: int = 6
    """How many layers the scan looks at, evenly spread over the upper five sixths of the network."""
    tokens: int = 300
    """Tokens the scan reads; it only orders layers, so few suffice."""
    reach: float = 0.95
    """The lowest layer is taken whose difference, put into base, makes at least this share of what the best layer's
    does: higher goes deeper (cheaper to verify, less left to undo), lower goes earlier."""

    def __post_init__(self) -> None:
        within("scan", self, depths=1, tokens=1, reach=(0, 1))


@dataclass(frozen=True)
class SiteReading:
    """What the scan saw at one site; see `results.SiteScan`. ``ceiling`` is the share of KL(tuned || base) that the
    whole difference at the site makes when base goes on from it."""

    site: Site
    relative: float
    offset_share: float
    noise: float
    ceiling: float


def candidate_sites(depth: int, count: int) -> list[Site]:
    """Layers evenly spread from a sixth of the depth to the last but one."""
    first, last = depth // 6, max(depth - 2, 0)
    steps = max(count - 1, 1)
    return [Site(layer) for layer in sorted({round(first + (last - first) * i / steps) for i in range(count)})]


def scan(pair: Pair, tokens: Tokens, sites: list[Site], batch_tokens: int = 1200) -> list[SiteReading]:
    """Read both models at `sites` on `tokens` (no held-out text is needed: nothing is claimed from it)."""
    sites = sorted(set(sites))
    base_squares = torch.zeros(len(sites), dtype=torch.float64)
    delta_squares, noise = torch.zeros_like(base_squares), torch.zeros_like(base_squares)
    total, count = 0.0, 0
    gap, left = 0.0, torch.zeros_like(base_squares)
    for number, batch in enumerate(tokens.batches(batch_tokens)):
        mask = batch.mask_BT.clone()
        mask[:, 0] = False  # the first position is an attention sink in many networks
        base_BTD, tuned_BTD, streams = pair.both_states(batch.ids_BT, sites, batch.mask_BT)
        streams = streams.float()
        x_NSMD = streams[mask]
        delta_NSD = (x_NSMD[:, :, TUNED] - x_NSMD[:, :, BASE]).double()
        base_squares += x_NSMD[:, :, BASE].double().pow(2).sum((0, 2))
        delta_squares += delta_NSD.pow(2).sum((0, 2))
        total, count = total + delta_NSD.sum(0), count + len(delta_NSD)
        if number == 0:
            noise = noise_floor(pair.base, batch.ids_BT, mask, sites, streams[:, :, :, BASE]).double()
        tuned = Said(pair.tuned, tuned_BTD[mask], pair.vocabulary).logp()
        whole = float(kl_divergence(tuned, Said(pair.base, base_BTD[mask], pair.vocabulary)).sum())
        gap += whole
        for s, site in enumerate(sites):
            if torch.equal(x_NSMD[:, s, TUNED], x_NSMD[:, s, BASE]):
                left[s] += whole  # nothing would be put into base
                continue
            patched = Said.at(pair.base, batch.ids_BT, mask, pair.vocabulary, Start(site, streams[:, :, s, TUNED]))
            left[s] += float(kl_divergence(tuned, patched).sum())
    offset = (total / count).pow(2).sum(-1) * count
    return [
        SiteReading(
            site,
            float((delta_squares[s] / base_squares[s]).sqrt()),
            float(offset[s] / delta_squares[s]) if delta_squares[s] else 0.0,
            float((noise[s] * count / base_squares[s]).sqrt()),
            1 - float(left[s]) / gap if gap else 0.0,
        )
        for s, site in enumerate(sites)
    ]


def choose(readings: list[SiteReading], reach: float) -> Site:
    """The lowest site whose ceiling is at least `reach` times the best; where nothing differs, the middle one."""
    best = max(reading.ceiling for reading in readings)
    if best <= 0:
        return readings[len(readings) // 2].site
    return next(r.site for r in readings if r.ceiling >= reach * best)
