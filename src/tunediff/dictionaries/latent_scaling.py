"""Latent Scaling: a test of whether base uses a latent too, independent of decoder norms (Minder et al. 2025,
2504.02922)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import Interval, numpy_generator
from tunediff.core.errors import NumericsError
from tunediff.dictionaries.fitted import Fitted
from tunediff.dictionaries.sources import CHUNK, HELD_OUT, Source
from tunediff.kernels.sparse import Pairs

Kind = Literal["tuned-specific", "base-specific", "not specific", "too rare"]

ERROR_LIMIT = 0.2
"""Threshold on nu_error below which a latent can be specific, as in the source."""
RECONSTRUCTION_LIMIT = 0.5
"""Threshold on nu_reconstruction below which a latent can be specific, as in the source."""

MIN_SHARE = 0.25
"""Smallest share of its decoder norms that a latent has in the model it is specific to.

The source has no such limit. Along a vanishing decoder vector the ratios are arbitrary, and a base-only latent could
pass as tuned-specific.
"""

MIN_FIRINGS = 100
"""Fewest firings for which a latent gets a verdict."""

BLOCKS = 512
"""Most resampling units of the bootstrap; more documents are grouped into this many blocks, which bounds memory."""


@dataclass(frozen=True)
class LatentScale:
    """Latent Scaling of one latent in both models, on tokens that the dictionary was not fitted to.

    beta_m is the factor on code * d, for direction d, that best explains a target in model m. With d = d_tuned,
    ``nu_error`` is beta_base / beta_tuned on the error plus the latent's own part: near 1, base needs the latent too
    (complete shrinkage). ``nu_reconstruction`` is the same ratio on the reconstruction: near 1, other latents write the
    direction into base (latent decoupling). ``mirror_*`` swap the models, with d = d_base.

    Intervals are percentile bootstraps over documents. A ratio is infinite if its denominator is not positive. A latent
    is specific to *these* activations only, which does not show that the latent causes anything. If the target is
    tuned, the write into base is `base_scale_F` times d. If the target is the difference, nothing is written into base,
    so base's error is the whole stream.

    latent, firings   number of the latent, and number of tokens on which it fires
    share             |d_tuned| / (|d_base| + |d_tuned|)
    beta_error, beta_reconstruction   (base, tuned), along d_tuned
    kind              verdict. Specific: both upper ends below their thresholds, neither ratio below minus its
                      threshold, and the model's own share of norms at least .25; if both models pass, the one with
                      the larger norm. "too rare" below 100 firings
    """

    latent: int
    firings: int
    share: float
    beta_error: tuple[float, float]
    beta_reconstruction: tuple[float, float]
    nu_error: Interval
    nu_reconstruction: Interval
    mirror_nu_error: Interval
    mirror_nu_reconstruction: Interval
    kind: Kind


@torch.no_grad()
def latent_scaling(
    fitted: Fitted,
    source: Source,
    *,
    split: str = HELD_OUT,
    doc_N: Tensor | Sequence[int] | None = None,
    latents: Sequence[int] | None = None,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
    min_firings: int = MIN_FIRINGS,
) -> list[LatentScale]:
    """Measure Latent Scaling of `latents` (default: all) in one pass over `split`, in normalized units.

    doc_N         document of each token of the split; None treats tokens as independent samples
    seed          seed of the bootstrap
    draws         bootstrap samples
    level         level of the intervals
    min_firings   fewest firings for a verdict

    Products are computed only at the (token, latent) pairs that fire, so the cost follows L0 instead of the number of
    latents. Raises `NumericsError` if the length of `doc_N` is not the number of tokens in the split.
    """
    dictionary, norm = fitted.dictionary, fitted.normalization
    F, N = dictionary.spec.latents, source.count(split)
    document_N = torch.arange(N) if doc_N is None else torch.as_tensor(doc_N, dtype=torch.long)
    if len(document_N) != N:
        raise NumericsError("doc_N does not fit the split", expected=f"{N} tokens", got=str(len(document_N)))
    block_N = _blocks(document_N, seed)
    G = int(block_N.max()) + 1 if N else 1
    at_J = torch.arange(F) if latents is None else torch.as_tensor(list(latents), dtype=torch.long)
    wanted_F = torch.zeros(F, dtype=torch.bool)
    wanted_F[at_J] = True
    column_F = torch.zeros(F, dtype=torch.long)
    column_F[at_J] = torch.arange(len(at_J))
    J = len(at_J)
    write_MFI = dictionary.write_FSMD().transpose(1, 2).transpose(0, 1).flatten(2).contiguous()
    bias_MI = dictionary.bias_SMD().transpose(0, 1).flatten(1)
    gram_RMF = torch.einsum("rfi,mfi->rmf", write_MFI, write_MFI)
    # sums over a block's tokens of f * (d_r . Y^m), and of f^2; r is the model whose decoder vector is the direction
    error, reconstruction = (torch.zeros(2, 2, G * J, dtype=torch.float64) for _ in range(2))
    square, firings_J = torch.zeros(G * J, dtype=torch.float64), torch.zeros(J, dtype=torch.long)
    with kernels.fast_matmul():
        for index in torch.arange(N).split(CHUNK):
            x = norm.apply(source.read(split, index))
            pre = dictionary.pre(x)
            kept = (pre > fitted.threshold_F).view(-1).nonzero().squeeze(1)
            every = Pairs.of(kept, len(index), F)
            f_all = pre.view(-1)[kept]
            mine = wanted_F[every.latent_P]
            pairs = Pairs.of(kept[mine], len(index), F)
            f = f_all[mine]
            column = column_F[pairs.latent_P]
            slot = block_N[index][pairs.token_P] * J + column
            firings_J += torch.bincount(column, minlength=J)
            square.index_add_(0, slot, f.double().square())
            for m in (BASE, TUNED):
                xhat = every.gather_tokens(f_all, write_MFI[m])
                e = x[:, :, m].flatten(1) - xhat - bias_MI[m]
                for r in (BASE, TUNED):
                    on_error = pairs.dot(e, write_MFI[r]) + f * gram_RMF[r, m][pairs.latent_P]
                    on_xhat = pairs.dot(xhat, write_MFI[r])
                    error[r, m].index_add_(0, slot, (f * on_error).double())
                    reconstruction[r, m].index_add_(0, slot, (f * on_xhat).double())
    error_RMGJ, reconstruction_RMGJ = (sums.view(2, 2, G, J).numpy() for sums in (error, reconstruction))
    energy_RJ = gram_RMF.double()[[0, 1], [0, 1]][:, at_J] * square.view(G, J).sum(0)
    scale_RJ = np.maximum(energy_RJ.numpy(), 1e-300)
    counts = _draws(G, draws, seed)
    enough, share_F = firings_J.numpy() >= min_firings, dictionary.share_F()
    nus = {
        name: _ratios(sums[r, 1 - r], sums[r, r], counts, enough, level)
        for r, prefix in ((TUNED, ""), (BASE, "mirror_"))
        for name, sums in ((prefix + "nu_error", error_RMGJ), (prefix + "nu_reconstruction", reconstruction_RMGJ))
    }

    def beta(sums: np.ndarray, c: int) -> tuple[float, float]:
        """Return the factors (base, tuned) of the c-th latent along d_tuned."""
        base, tuned = (float(sums[TUNED, m, :, c].sum() / scale_RJ[TUNED, c]) for m in (BASE, TUNED))
        return base, tuned

    out = []
    for c, latent in enumerate(at_J.tolist()):
        own = {name: intervals[c] for name, intervals in nus.items()}
        out.append(
            LatentScale(
                latent=latent,
                firings=int(firings_J[c]),
                share=float(share_F[latent]),
                beta_error=beta(error_RMGJ, c),
                beta_reconstruction=beta(reconstruction_RMGJ, c),
                kind=_kind(own, float(share_F[latent]), bool(enough[c])),
                **own,
            )
        )
    return out


def _kind(nus: dict[str, Interval], share: float, enough: bool) -> Kind:
    if not enough:
        return "too rare"
    sides: tuple[tuple[float, str, Kind], ...] = (
        (share, "", "tuned-specific"),
        (1 - share, "mirror_", "base-specific"),
    )
    passed = [
        (own, kind)
        for own, prefix, kind in sides
        if own >= MIN_SHARE
        and _below(nus[prefix + "nu_error"], ERROR_LIMIT)
        and _below(nus[prefix + "nu_reconstruction"], RECONSTRUCTION_LIMIT)
    ]
    return max(passed)[1] if passed else "not specific"


def _below(nu: Interval, limit: float) -> bool:
    """Return whether the whole interval is below the limit and the ratio is above minus the limit.

    The second condition is not in the source. A strongly negative ratio means that the other model holds the opposite
    direction instead of nothing; latents of a difference that read a removed feature, or noise, have such ratios.
    """
    return nu.high < limit and nu.value > -limit


def _blocks(document_N: Tensor, seed: int) -> Tensor:
    """Return the block of each token: documents are assigned at random to at most `BLOCKS` blocks of nearly equal
    size."""
    number_N: Tensor = torch.unique(document_N, return_inverse=True)[1]
    documents = int(number_N.max()) + 1 if len(number_N) else 0
    if documents <= BLOCKS:
        return number_N
    deal: Tensor = torch.from_numpy(numpy_generator(seed, "latent scaling blocks").permutation(documents) % BLOCKS)
    return deal[number_N]


def _draws(blocks: int, draws: int, seed: int) -> np.ndarray:
    """Return the number of times that each bootstrap sample draws each block, (R, G)."""
    rng = numpy_generator(seed, "latent scaling bootstrap")
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=draws).astype(np.float64)


def _ratios(
    top_GJ: np.ndarray, bottom_GJ: np.ndarray, counts: np.ndarray, enough_J: np.ndarray, level: float
) -> list[Interval]:
    """Return the ratio of sums over blocks for each latent; infinite if the denominator is not positive.

    Rare latents get the interval (-inf, inf).
    """

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.inf)

    value_J = ratio(top_GJ.sum(0), bottom_GJ.sum(0))
    low_J, high_J = np.full_like(value_J, -np.inf), np.full_like(value_J, np.inf)
    if len(top_GJ) >= 2:
        at = np.flatnonzero(enough_J)
        for some in np.array_split(at, max(1, -(-len(at) // 256))):
            drawn = ratio(counts @ top_GJ[:, some], counts @ bottom_GJ[:, some])
            low_J[some], high_J[some] = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0, method="nearest")
    return [Interval(float(v), float(lo), float(hi), level) for v, lo, hi in zip(value_J, low_J, high_J)]
