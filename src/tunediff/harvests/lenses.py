"""The tuned lens, which reads a direction at a middle layer as tokens of the vocabulary, and Patchscopes.

Belrose et al. 2023 (2303.08112) train one affine map per layer by gradient descent on KL. Here each map is a ridge
regression from the stream to the final normed state, in closed form, on base activations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunediff.core.artifacts import key_of, read_tensors, write_tensors
from tunediff.core.axes import BASE
from tunediff.core.errors import NumericsError
from tunediff.core.manifests import kept
from tunediff.models.fingerprints import fingerprint
from tunediff.models.network import LanguageModel
from tunediff.records.site import Site

if TYPE_CHECKING:
    from tunediff.harvests.samples import Sample
    from tunediff.texts.tokens import Batch, Tokens

SCHEMA = "tunediff.lens/1"
FILE = "lens.safetensors"


@dataclass(frozen=True, eq=False)
class Lens:
    """Linear maps from directions of the stream to directions of the final normed state.

    sites     the sites along axis S
    map_SDD   map of each site
    r2_S      explained share (R^2) of the final state on batches that were not fitted
    """

    sites: tuple[Site, ...]
    map_SDD: Tensor
    r2_S: Tensor

    def read(
        self, model: LanguageModel, site: Site, direction_D: Tensor, count: int = 20, mask_V: Tensor | None = None
    ) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Return the `count` tokens that a direction promotes most and the `count` it suppresses most, with cosines.

        The unembedding is centered over the vocabulary and its rows are normalized. Otherwise frequent tokens with long
        rows would come first for every direction. `mask_V` is True for tokens that may be returned.
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
    """Fit a ridge regression from the stream at each site to the final normed state, on `tokens`' training documents.

    ridge      share of the diagonal's mean that is added to the diagonal: more blurs the read-out, less overfits
    abnormal   tokens with a stream norm above this multiple of the median are left out
    sample     rows with streams from a harvest, if available; base then runs from these streams on
    model_fingerprint   fingerprint of base, if known; computing it takes a while

    Every eighth batch, from the second on, is held out to measure R^2. A finished lens in `folder` is opened instead.
    Raises `ArtifactError` if `folder` holds a lens of another model, text or setting, `NumericsError` on non-finite
    streams.
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

    def make() -> tuple[dict[str, Any], list[str]]:
        maps_SDD, r2_S = _fitted(model, tokens, sites, ridge, batch_tokens, abnormal, sample)
        write_tensors(folder / FILE, {"map": maps_SDD, "r2": r2_S})
        return {"sites": [str(s) for s in sites], "ridge": ridge, "r2": r2_S}, [FILE]

    # Reading the saved file gives the same bits as opening the lens later: memory alignment alters a product's last
    # bits.
    return kept(folder, SCHEMA, key, make, lambda: _open(folder, sites))


def _fitted(
    model: LanguageModel,
    tokens: Tokens,
    sites: tuple[Site, ...],
    ridge: float,
    batch_tokens: int,
    abnormal: float,
    sample: Sample | None,
) -> tuple[Tensor, Tensor]:
    """The maps (S, D, D) of a lens, and the explained share of each (S,)."""
    width = model.width
    gram = torch.zeros(len(sites), width, width, dtype=torch.float64)
    final = int(model.family.unembedding(model.network).weight.shape[1])  # narrower where a network has several streams
    cross = torch.zeros(len(sites), final, width, dtype=torch.float64)
    x_sum, y_sum = gram.new_zeros(len(sites), width), gram.new_zeros(final)
    count, left_out = 0, []

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        start = sample.starts(batch)[0] if sample else None
        if sample is None or start is None:
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
            left_out.append((x_NSD, y_ND))
            continue
        gram += torch.einsum("nsd,nse->sde", x_NSD, x_NSD)
        cross += torch.einsum("nsd,ne->sed", x_NSD, y_ND)
        x_sum += x_NSD.sum(0)
        y_sum += y_ND.sum(0)
        count += len(y_ND)
    x_mean, y_mean = x_sum / count, y_sum / count
    maps, r2 = [], []
    for s in range(len(sites)):
        covariance = gram[s] / count - torch.outer(x_mean[s], x_mean[s])
        cross_covariance = cross[s] / count - torch.outer(y_mean, x_mean[s])
        covariance.diagonal().add_(ridge * covariance.diagonal().mean())
        maps.append(torch.linalg.solve(covariance, cross_covariance.T).T)
        wrong = total = 0.0
        for x_NSD, y_ND in left_out:
            y = y_ND - y_mean
            wrong += float((y - (x_NSD[:, s] - x_mean[s]) @ maps[s].T).pow(2).sum())
            total += float(y.pow(2).sum())
        r2.append(1 - wrong / total if total else float("nan"))
    return torch.stack(maps).float(), torch.tensor(r2)


IDENTITY = (
    "man -> man\n1135 -> 1135\nhello -> hello\n?",
    "blue -> blue\nrun -> run\n42 -> 42\n?",
    "cat -> cat\nParis -> Paris\nor -> or\n?",
)
"""Prompts that make a model repeat the content of their last token (Ghandeharioun et al. 2024, 2401.06102)."""

SIZES = (0.5, 1.0, 2.0)
"""Lengths of the inserted direction, in units of the stream's usual length."""


def patchscope(
    model: LanguageModel, site: Site, direction_D: Tensor, size: float, vocabulary: int, count: int = 20
) -> list[int]:
    """Return the `count` tokens whose probability a direction raises most in prompts that repeat their last token.

    The direction replaces the stream at the last token of each `IDENTITY` prompt. A token's score is its probability
    with the direction less its probability with the opposite direction, summed over prompts and lengths.

    size   usual length of the stream at the site; the direction is inserted at the multiples in `SIZES`

    Minder et al. 2025 (2510.13900) let a language model choose the most readable length; here all lengths count
    equally. The opposite direction cancels what the prompts alone predict.
    """
    unit_D = torch.nn.functional.normalize(direction_D.float(), dim=0)
    length_B = size * torch.tensor([sign * length for length in SIZES for sign in (1, -1)])

    def put(stream_BTD: Tensor) -> Tensor:
        stream_BTD = stream_BTD.clone()
        stream_BTD[:, -1] = (length_B[:, None] * unit_D).to(stream_BTD)
        return stream_BTD

    gained_V = torch.zeros(vocabulary)
    for text in IDENTITY:
        own = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]] * len(length_B))
        ids_BT = model.numbering.numbers(own)
        with model.writing(site, put):
            logit_BV = model.logits(model.states(ids_BT)[:, -1])[:, :vocabulary]
        gained_V += length_B.sign() @ logit_BV.float().softmax(1).cpu()
    return gained_V.topk(min(count, vocabulary)).indices.tolist()


def _open(folder: Path, sites: tuple[Site, ...]) -> Lens:
    saved = read_tensors(folder / FILE)
    return Lens(sites, saved["map"], saved["r2"])
