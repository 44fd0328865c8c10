"""The tuned lens: what a direction at a middle layer says in the vocabulary, in its own words.

Belrose et al. 2023 (2303.08112) train an affine map a layer by gradient descent on KL; ours is a ridge regression from
the stream to the final normed state, fitted on base activations only, in closed form and in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunediff.core.artifacts import finish, is_finished, key_of, open_folder, read_tensors, write_tensors
from tunediff.core.axes import BASE
from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.models.loading import fingerprint
from tunediff.models.network import LanguageModel
from tunediff.records.site import Site

if TYPE_CHECKING:
    from tunediff.harvests.samples import Sample
    from tunediff.texts.tokens import Batch, Tokens

SCHEMA = "tunediff.lens/1"


@dataclass(frozen=True, eq=False)
class Lens:
    """For each site, a map (D, D) from a direction of the stream to one of the final normed state, and how much of
    the held-out final state it explains (R^2)."""

    sites: tuple[Site, ...]
    map_SDD: Tensor
    r2_S: Tensor

    def read(
        self, model: LanguageModel, site: Site, direction_D: Tensor, count: int = 20, mask_V: Tensor | None = None
    ) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The `count` tokens a direction promotes most and those it suppresses most, with weights (cosines).

        The unembedding is centered over the vocabulary and its rows normalized, so that frequent tokens with long
        rows do not come first whatever the direction. `mask_V` (True = may be named) takes out what is generic.
        """
        rows_VD = model.family.unembedding(model.network).weight.float()
        rows_VD = torch.nn.functional.normalize(rows_VD - rows_VD.mean(0), dim=1)
        read = self.map_SDD[self.sites.index(site)] @ direction_D.to(self.map_SDD)
        read = torch.nn.functional.normalize(read, dim=0).to(rows_VD)
        scores = (rows_VD @ read).detach().cpu()
        may_V = torch.ones(len(scores), dtype=torch.bool) if mask_V is None else mask_V.cpu()
        named = may_V.nonzero()[:, 0]
        order = named[scores[named].argsort(descending=True, stable=True)].tolist()
        top, bottom = order[:count], order[::-1][:count]
        return [(v, float(scores[v])) for v in top], [(v, float(scores[v])) for v in bottom]


def fit_lens(
    model: LanguageModel,
    tokens: Tokens,
    sites: Sequence[Site],
    folder: Path,
    *,
    ridge: float = 0.01,
    batch_tokens: int = 2048,
    abnormal: float = 6.0,
    sample: Sample | None = None,
    model_fingerprint: str = "",
) -> Lens:
    """Ridge regression from the stream at each site to the final normed state, on `tokens`' training documents.

    ridge      added to the diagonal, as a share of its mean: more blurs the read-out, less overfits
    abnormal   tokens with a stream norm above this multiple of the median are left out
    sample     these tokens' streams from a harvest, if there is one: runs then go on from them
    model_fingerprint   base's, where it is known; hashing a model takes a while

    Every eighth batch, from the second on, is kept for the R^2. Skips what is finished in `folder`; raises
    `ArtifactError` if that is a lens of another model, text or setting, `NumericsError` on non-finite streams.
    """
    sites = tuple(sorted(set(sites)))
    key = key_of(
        SCHEMA,
        model_fingerprint or fingerprint(model.network, adapters=False),
        tokens.fingerprint,
        list(map(str, sites)),
        ridge,
        batch_tokens,
        abnormal,
        sample is not None,
    )
    if is_finished(folder):
        manifest = open_folder(folder, SCHEMA)
        if manifest["key"] != key:
            raise ArtifactError(
                f"{folder} holds a lens of another model, text, sites or settings",
                expected=f"key {key}",
                got=manifest["key"],
                remedy=f"delete {folder}, or name another folder",
            )
        return _open(folder, sites)
    width = model.width
    gram = torch.zeros(len(sites), width, width, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    sums = torch.zeros(2, len(sites), width, dtype=torch.float64)
    count, kept = 0, []

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        start, _ = sample.starts(batch) if sample else (None, None)
        if start is None:
            return model.streams_and_states(batch.ids_BT, sites)
        at = [sample.sites.index(site) for site in sites]
        return sample.streams_NSMD[sample.places(batch).clamp_min(0)][:, :, at, BASE], model.states(
            batch.ids_BT, start, batch.mask_BT
        )

    for number, batch in enumerate(
        sample.batches(batch_tokens) if sample else tokens.select("train").batches(batch_tokens)
    ):
        x_NSD, y_ND = (taken[batch.mask_BT].cpu().double() for taken in read(batch))
        if not (torch.isfinite(x_NSD).all() and torch.isfinite(y_ND).all()):
            raise NumericsError(
                f"a stream of {model.name} holds NaN or infinite values",
                expected="finite streams",
                remedy="--set pair.dtype=float32",
            )
        norms = x_NSD.norm(dim=-1)
        ordinary = (norms <= abnormal * norms.median(0).values).all(-1)
        x_NSD, y_ND = x_NSD[ordinary], y_ND[ordinary]
        if number % 8 == 1:
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
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "lens.safetensors", {"map": torch.stack(maps).float(), "r2": torch.tensor(r2)})
    finish(
        folder, SCHEMA, {"key": key, "sites": [str(s) for s in sites], "ridge": ridge, "r2": r2}, ["lens.safetensors"]
    )
    # The very tensors that anyone who opens it has: even their alignment in memory moves the last bits of a product.
    return _open(folder, sites)


IDENTITY = (
    "man -> man\n1135 -> 1135\nhello -> hello\n?",
    "blue -> blue\nrun -> run\n42 -> 42\n?",
    "cat -> cat\nParis -> Paris\nor -> or\n?",
)
"""Texts that go on with what stands at their last token (Ghandeharioun et al. 2024, 2401.06102)."""

SIZES = (0.5, 1.0, 2.0)
"""Lengths at which a direction is put there, in units of the stream's own."""


def patchscope(
    model: LanguageModel, site: Site, direction_D: Tensor, size: float, vocabulary: int, count: int = 20
) -> list[int]:
    """The `count` tokens that `model` says of a direction: their probability after texts that repeat what stands at their
    last token, with the direction in place of the stream there, less the probability with its opposite.

    size   the stream's usual length at the site; the direction is put in at several multiples

    Minder et al. (2510.13900) let a language model choose the length that reads best; here all count alike, and the
    opposite direction takes away what the texts say by themselves.
    """
    unit_D = torch.nn.functional.normalize(direction_D.float(), dim=0)
    length_B = size * torch.tensor([sign * length for length in SIZES for sign in (1, -1)])

    def put(stream_BTD: Tensor) -> Tensor:
        stream_BTD = stream_BTD.clone()
        stream_BTD[:, -1] = (length_B[:, None] * unit_D).to(stream_BTD)
        return stream_BTD

    gained_V = torch.zeros(vocabulary)
    for text in IDENTITY:
        ids_BT = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]] * len(length_B))
        with model.writing(site, put):
            logit_BV = model.logits(model.states(ids_BT)[:, -1])[:, :vocabulary]
        gained_V += length_B.sign() @ logit_BV.float().softmax(1).cpu()
    return gained_V.topk(min(count, vocabulary)).indices.tolist()


def _open(folder: Path, sites: tuple[Site, ...]) -> Lens:
    saved = read_tensors(folder / "lens.safetensors")
    return Lens(sites, saved["map"], saved["r2"])
