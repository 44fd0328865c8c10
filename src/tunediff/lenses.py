"""The tuned lens: what a direction at a middle layer says in the vocabulary, in its own words.

Belrose et al. 2023 (2303.08112) train an affine map a layer by gradient descent on KL; ours is a ridge regression from
the stream to the final normed state, fitted on base activations only, in closed form and in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

import torch
from torch import Tensor

from tunediff.artifacts import finish, is_finished, open_folder, read_tensors, write_tensors
from tunediff.models import LanguageModel
from tunediff.sites import Site

if TYPE_CHECKING:
    from tunediff.corpora import Tokens

SCHEMA = "tunediff.lens/1"


@dataclass(frozen=True, eq=False)
class Lens:
    """For each site, a map (D, D) from a direction of the stream to one of the final normed state, and how much of
    the held-out final state it explains (R^2)."""

    sites: tuple[Site, ...]
    map_SDD: Tensor
    r2_S: Tensor

    def read(self, model: LanguageModel, site: Site, direction_D: Tensor, count: int = 20,
             mask_V: Tensor | None = None) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The `count` tokens a direction promotes most and those it suppresses most, with weights (cosines).

        The unembedding is centered over the vocabulary and its rows normalized, so that frequent tokens with long
        rows do not come first whatever the direction. `mask_V` (True = may be named) takes out what is generic.
        """
        rows_VD = model.family.unembedding(model.network).weight.float()
        rows_VD = torch.nn.functional.normalize(rows_VD - rows_VD.mean(0), dim=1)
        read = torch.nn.functional.normalize(self.map_SDD[self.sites.index(site)] @ direction_D.float(), dim=0)
        scores = rows_VD @ read
        if mask_V is not None:
            scores = torch.where(mask_V, scores, torch.zeros_like(scores))
        top, bottom = scores.topk(count), (-scores).topk(count)
        return (
            list(zip(top.indices.tolist(), top.values.tolist())),
            list(zip(bottom.indices.tolist(), (-bottom.values).tolist())),
        )


def fit_lens(
    model: LanguageModel, tokens: "Tokens", sites: Sequence[Site], folder: Path, *, ridge: float = 0.01,
    batch_tokens: int = 2048, abnormal: float = 6.0,
) -> Lens:
    """Ridge regression from the stream at each site to the final normed state, on `tokens`' training documents.

    ridge      added to the diagonal, as a share of its mean: more blurs the read-out, less overfits
    abnormal   tokens with a stream norm above this multiple of the median are left out

    Every eighth batch is kept for the R^2. Skips what is finished in `folder`.
    """
    sites = tuple(sorted(set(sites)))
    if is_finished(folder):
        manifest = open_folder(folder, SCHEMA)
        saved = read_tensors(folder / "lens.safetensors")
        return Lens(tuple(Site.parse(s) for s in manifest["sites"]), saved["map"], saved["r2"])
    width = model.width
    gram = torch.zeros(len(sites), width, width, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    sums = torch.zeros(2, len(sites), width, dtype=torch.float64)
    count, kept = 0, []
    for number, batch in enumerate(tokens.select("train").batches(batch_tokens)):
        x, y = model.streams_and_states(batch.ids_BT, sites)
        norms = x[batch.mask_BT].norm(dim=-1)
        ordinary = (norms <= abnormal * norms.median(0).values).all(-1)
        x_NSD, y_ND = x[batch.mask_BT][ordinary].double(), y[batch.mask_BT][ordinary].double()
        if number % 8 == 7:
            kept.append((x_NSD, y_ND))
            continue
        gram += torch.einsum("nsd,nse->sde", x_NSD, x_NSD)
        cross += torch.einsum("nsd,ne->sed", x_NSD, y_ND)
        sums[0] += x_NSD.sum(0)
        sums[1] += y_ND.sum(0)
        count += len(y_ND)
    means = sums / count
    maps, r2 = [], []
    for s in range(len(sites)):
        covariance = gram[s] / count - torch.outer(means[0, s], means[0, s])
        cross_covariance = cross[s] / count - torch.outer(means[1, s], means[0, s])
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        maps.append(torch.linalg.solve(covariance, cross_covariance.T).T)
        wrong = total = 0.0
        for x_NSD, y_ND in kept:
            y = y_ND - means[1, s]
            wrong += float((y - (x_NSD[:, s] - means[0, s]) @ maps[s].T).pow(2).sum())
            total += float(y.pow(2).sum())
        r2.append(1 - wrong / total if total else float("nan"))
    lens = Lens(sites, torch.stack(maps).float(), torch.tensor(r2))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "lens.safetensors", {"map": lens.map_SDD, "r2": lens.r2_S})
    finish(folder, SCHEMA, {"sites": [str(s) for s in sites], "ridge": ridge, "r2": lens.r2_S}, ["lens.safetensors"])
    return lens
