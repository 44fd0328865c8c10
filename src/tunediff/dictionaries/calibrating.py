"""Calibration of a trained dictionary: inference thresholds, decoder vectors for base, and held-out quality."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tunediff.core.axes import BASE, TUNED
from tunediff.core.chance import generator
from tunediff.dictionaries.architectures.base import Dictionary, Target, delta_of, select
from tunediff.dictionaries.fitted import Fitted, Quality, thresholds_of
from tunediff.dictionaries.schedule import FitSettings, Schedule, State
from tunediff.dictionaries.sources import CHUNK, HELD_OUT, TRAIN, Normalization, OnDevice, Source, spread
from tunediff.kernels import gates
from tunediff.kernels.sparse import Pairs

BASE_TOKENS = 1 << 18
"""Most training tokens, spread evenly, that `base_writes` reads."""
BASE_STEPS = 40
"""Most steps of conjugate gradients that `base_writes` takes."""
RECONSTRUCTED: dict[Target, tuple[str, ...]] = {
    "both": ("base", "tuned", "delta"),
    "tuned": ("base", "tuned", "delta"),
    "difference": ("delta",),
}
"""Streams whose explained variance is measured, by the dictionary's target; see `Quality`."""


def apart(source: Source, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """Return indices (N,) into the training split, ascending: tokens to train on, and tokens held out for calibration.

    Whole documents are drawn by the seed, because tokens of one document are not independent. Single tokens are drawn
    if the source knows no documents or only one. If nothing can be held out, both results are all tokens.
    """
    count = source.count(TRAIN)
    unit_N = torch.arange(count)
    if hasattr(source, "documents"):
        document_N = torch.unique(source.documents(TRAIN), return_inverse=True)[1]
        unit_N = document_N if len(document_N) and int(document_N.max()) else unit_N
    units = int(unit_N.max()) + 1 if count else 0
    kept = min(math.ceil(units * settings.calibration_share), units - 1)
    if kept <= 0:
        return torch.arange(count), torch.arange(count)
    kept_U = torch.zeros(units, dtype=torch.bool)
    kept_U[torch.randperm(units, generator=generator(settings.seed, "calibration"))[:kept]] = True
    return (~kept_U[unit_N]).nonzero()[:, 0], kept_U[unit_N].nonzero()[:, 0]


@torch.no_grad()
def base_writes(
    dictionary: Dictionary, source: Source, norm: Normalization, threshold_F: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factors beta (F,) and the offset (S, D) with which a dictionary of tuned alone best reconstructs base.

    Conjugate gradients from beta = 1 give the least-squares fit of x_base by sum_j beta_j f_j d_j + offset over the
    training tokens. A latent that never varies keeps beta = 1, which claims no difference. At the optimum, beta_j is
    Latent Scaling's factor on base's error (Minder et al. 2025, 2504.02922), jointly for all latents. If each latent
    were fitted alone, latents that fire together would each claim their common change.
    """
    write_FI, bias_I = dictionary.decoder_FSMD.flatten(1), dictionary.decoder_bias_SMD.flatten()
    chunks = spread(source.count(TRAIN), BASE_TOKENS).split(CHUNK)
    n = sum(len(at) for at in chunks)
    codes = []
    for at in chunks:
        pre_NF = dictionary.pre(norm.apply(source.read(TRAIN, at)))
        kept_P = (pre_NF > threshold_F).view(-1).nonzero()[:, 0]
        codes.append((Pairs.of(kept_P, *pre_NF.shape), pre_NF.view(-1)[kept_P]))
    nothing = torch.zeros((), dtype=torch.float64)
    f_F = sum((pairs.sum_latents(f.double()) for pairs, f in codes), nothing) / n
    square_F = sum((pairs.sum_latents(f.double().square()) for pairs, f in codes), nothing) / n
    spread_F = (square_F - f_F.square()) * write_FI.double().square().sum(1)

    def along(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the covariance (F,) of f_j and d_j * y over all tokens, and the mean of y (I,); y_NI comes in
        chunks."""
        product_F, total_I = torch.zeros_like(f_F), nothing
        for (pairs, f), y_NI in zip(codes, parts):
            product_F += pairs.sum_latents((f * pairs.dot(y_NI, write_FI)).double())
            total_I = total_I + y_NI.double().sum(0)
        return product_F / n - f_F * (write_FI.double() @ (total_I / n)), total_I / n

    def written(scale_F: Tensor) -> Iterator[Tensor]:
        return (pairs.gather_tokens(f * scale_F.float()[pairs.latent_P], write_FI) for pairs, f in codes)

    every = written(torch.ones_like(f_F))
    x_base = (norm.apply(source.read(TRAIN, at))[:, :, BASE].flatten(1) for at in chunks)
    residual_F, left_I = along(x - xhat - bias_I for x, xhat in zip(x_base, every))
    inverse_F = torch.where(spread_F > 1e-12, 1 / spread_F, 0.0)
    change_F, step_F = torch.zeros_like(f_F), residual_F * inverse_F
    size = first = float(residual_F @ step_F)
    for _ in range(BASE_STEPS):
        if size <= 1e-6 * first:
            break
        product_F, _ = along(written(step_F))
        rate = size / float(step_F @ product_F)
        change_F, residual_F = change_F + rate * step_F, residual_F - rate * product_F
        before, size = size, float(residual_F @ (residual_F * inverse_F))
        step_F = residual_F * inverse_F + size / before * step_F
    offset_I = bias_I + left_I - (change_F * f_F) @ write_FI.double()
    return (1 + change_F).float(), offset_I.float().view(dictionary.sites, dictionary.width)


@torch.no_grad()
def finish(
    state: State,
    source: OnDevice,
    norm: Normalization,
    settings: FitSettings,
    schedule: Schedule,
    calibration_N: Tensor,
) -> Fitted:
    """Set the inference thresholds, then measure the dictionary on held-out tokens."""
    dictionary = state.dictionary
    dictionary.requires_grad_(False)
    count = min(len(calibration_N), settings.calibration)
    some = source.order(calibration_N, generator(settings.seed, "calibration tokens"))[:count]
    index_N = calibration_N[some.sort().values]
    groups, weight_F = dictionary.groups(), dictionary.scales_F()
    pools: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    on = 0
    for at in index_N.split(CHUNK):
        pre_NF = dictionary.pre(norm.apply(source.read(TRAIN, at)))
        gated = any(group.k is not None for group in groups)
        on += select(pre_NF, weight_F, groups).numel() if gated else int((pre_NF > 0).sum())
        value_NF = pre_NF.relu_().mul_(weight_F)
        for group in groups:
            if group.k is not None:
                part = value_NF[:, group.start : group.stop]
                # A chunk of shuffled tokens has at most four times its share of codes above the common threshold.
                pools[group.name].append(
                    part.reshape(-1)[gates.batch_topk(part, min(4 * group.k + 1, group.stop - group.start))]
                )
    thresholds = {
        group.name: 0.0 if group.k is None else gates.calibrate(pools[group.name], round(count * group.k))
        for group in groups
    }
    threshold_F = thresholds_of(dictionary, thresholds)
    if dictionary.spec.target == "tuned":
        beta_F, offset_SD = base_writes(dictionary, source, norm, threshold_F)
        dictionary.base_scale_F.copy_(beta_F)
        dictionary.base_bias_SD.copy_(offset_SD)
    held_out = source.count(HELD_OUT)
    firings_F = torch.zeros_like(threshold_F, dtype=torch.long)
    named = RECONSTRUCTED[dictionary.spec.target]
    errors, squares = dict.fromkeys(named, 0.0), dict.fromkeys(named, 0.0)
    sums = dict.fromkeys(named, torch.zeros((), dtype=torch.float64))
    for at in torch.arange(held_out).split(CHUNK):
        x = norm.apply(source.read(HELD_OUT, at))
        f_NF = gates.threshold_gate(dictionary.pre(x), threshold_F)
        firings_F += (f_NF > 0).sum(0)
        error = (x - dictionary.decode(f_NF)).double()
        for name, e, y in (
            ("base", error[:, :, BASE], x[:, :, BASE]),
            ("tuned", error[:, :, TUNED], x[:, :, TUNED]),
            ("delta", delta_of(error), delta_of(x.double())),
        ):
            if name not in named:
                continue
            y = y.double()
            errors[name] += float(e.square().sum())
            sums[name] = sums[name] + y.sum(0)
            squares[name] += float(y.square().sum())
    ev = dict.fromkeys(("base", "tuned", "delta"), float("nan"))
    for name in named:
        spread = squares[name] - float((sums[name] ** 2).sum()) / held_out if held_out else 0.0
        ev[name] = 1 - errors[name] / spread if spread > 0 else float("nan")
    l0_training = on / count
    l0 = float(firings_F.sum()) / held_out if held_out else float("nan")
    quality = Quality(
        ev_base=ev["base"],
        ev_tuned=ev["tuned"],
        ev_delta=ev["delta"],
        l0_training=l0_training,
        l0_inference=l0,
        l0_gap=l0 / l0_training - 1 if l0_training else float("nan"),
        dead_share=float((state.silent_F >= schedule.dead_tokens).float().mean()),
        silent_share=float((firings_F == 0).float().mean()),
        train_tokens=schedule.steps * schedule.batch,
        held_out_tokens=held_out,
        log_rms_ratio=tuple(norm.log_rms_ratio_S.tolist()),
        delta_ratio=math.sqrt(norm.delta_variance),
    )
    return Fitted(
        dictionary=dictionary.cpu(),
        normalization=norm.to("cpu"),
        thresholds=thresholds,
        sites=source.sites,
        quality=quality,
        curve=state.curve,
        firings_F=firings_F.cpu(),
        seed=settings.seed,
        source=source.fingerprint,
    )
