"""Scan over layers: where two models differ beyond noise, and where the difference already determines the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tunediff.core.axes import BASE, TUNED
from tunediff.core.errors import SettingError, within
from tunediff.harvests.harvest import noise_floor
from tunediff.models.divergences import Said, kl_divergence
from tunediff.models.pair import Pair
from tunediff.models.passes import Start
from tunediff.records.scan import Scan
from tunediff.records.site import Site
from tunediff.texts.tokens import Tokens


@dataclass(frozen=True)
class ScanSettings:
    """Which layers are scanned, and how a site is chosen."""

    sites: tuple[str, ...] = ()
    """Sites to use, such as resid.15. Empty: chosen by the scan."""
    depths: int = 6
    """Number of layers to scan, spread evenly over the upper five sixths of the network."""
    tokens: int = 300
    """Tokens that the scan reads. It only orders layers, so few suffice."""
    reach: float = 0.95
    """Share of the best ceiling that the chosen site must reach; the lowest such site is taken.
    A higher share chooses a deeper site, which is cheaper to verify and leaves less to undo."""

    def __post_init__(self) -> None:
        within("scan", self, depths=1, tokens=1, reach=(0, 1))
        for site in map(Site.parse, self.sites):
            if site.kind != "resid":  # runs start from streams only, to see what a difference there does to the output
                raise SettingError(
                    f"scan.sites holds {site}", expected="streams", remedy=f"--set scan.sites=resid.{site.layer}"
                )


def candidate_sites(depth: int, count: int, lowest: int | None = 0) -> list[Site]:
    """Return `count` layers at even spacing, from a sixth of the depth to the last but one.

    lowest   the first block that differs. Above the first of these layers, the layers run from it, because below it nothing
             is to be seen; and to the last block only where that alone differs, because it has the best ceiling of any
             fine-tune and would mostly be chosen. None where no block is known to differ: the last is then among them
    """
    first, last = depth // 6, max(depth - 2, 0)
    if lowest is not None and lowest > first:
        first, last = lowest, max(lowest, last)
    steps = max(count - 1, 1)
    layers = {round(first + (last - first) * i / steps) for i in range(count)}
    return [Site(layer) for layer in sorted(layers | ({depth - 1} if lowest is None else set()))]


def scan(pair: Pair, tokens: Tokens, sites: Sequence[Site], batch_tokens: int = 1200) -> Scan:
    """Measure how far both models differ at `sites` on `tokens`, without choosing a site.

    `tokens` may be training text, because no result rests on the scan.
    """
    sites = sorted(set(sites))
    base_squares = torch.zeros(len(sites), dtype=torch.float64)
    delta_squares, noise = torch.zeros_like(base_squares), torch.zeros_like(base_squares)
    total, count = torch.zeros(len(sites), pair.base.width, dtype=torch.float64), 0
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
                left[s] += whole  # patching would not change base
                continue
            patched = Said.at(pair.base, batch.ids_BT, mask, pair.vocabulary, Start(site, streams[:, :, s, TUNED]))
            left[s] += float(kl_divergence(tuned, patched).sum())
    offset = (total / count).pow(2).sum(-1) * count
    return Scan.of(
        [str(site) for site in sites],
        relative=(delta_squares / base_squares).sqrt().tolist(),
        noise=(noise * count / base_squares).sqrt().tolist(),
        offset=[float(part / whole) if whole else 0.0 for part, whole in zip(offset, delta_squares)],
        ceiling=[1 - float(part) / gap if gap else 0.0 for part in left],
    )


def choose(seen: Scan, reach: float, given: Sequence[Site] = ()) -> Scan:
    """Return the scan with its chosen sites: those `given`, else the lowest whose ceiling is at least `reach` times the best.

    Only sites at which streams differ are chosen from: the middle one of these where no ceiling is positive, and the last of
    all sites where streams differ nowhere. Raises `SettingError` for a given site at which they do not differ.
    """
    (differ,), (ceiling,) = seen.relative.values, seen.ceiling.values
    shares = {site: share for site, size, share in zip(seen.sites, differ, ceiling) if size > 0}
    if given:
        named = [str(site) for site in sorted(set(given))]
        if shares and (equal := [site for site in named if site not in shares]):
            raise SettingError(
                f"both models' streams are equal at {', '.join(equal)}, so no change can be found there",
                expected="sites at which they differ, such as " + ", ".join(shares),
                remedy=f"--set scan.sites={[next(iter(shares))]}".replace("'", '"'),
            )
        return replace(seen, chosen=named)
    if not shares:
        return replace(seen, chosen=[seen.sites[-1]])
    best = max(shares.values())
    if best <= 0:
        return replace(seen, chosen=[list(shares)[len(shares) // 2]])
    return replace(seen, chosen=[next(site for site, share in shares.items() if share >= reach * best)])
