"""Fit a dictionary to a source of activations: train, calibrate, measure on held-out tokens, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core import artifacts
from tunediff.core.chance import generator
from tunediff.core.errors import NumericsError
from tunediff.core.manifests import Work, kept
from tunediff.dictionaries.architectures.base import Spec
from tunediff.dictionaries.calibrating import apart, finish
from tunediff.dictionaries.fitted import SCHEMA, Fitted, build
from tunediff.dictionaries.schedule import FitSettings, Schedule, State
from tunediff.dictionaries.sources import TRAIN, Normalization, OnDevice, Source

START = 1 << 14
"""Most training tokens from which initial vectors of latents are drawn."""
CHECKPOINT = "checkpoint.safetensors"
"""The state of a fit that is not over; a killed run goes on from it."""
Progress = Callable[[int, int, dict[str, float]], None]
"""Called with tokens done, tokens in all, and the newest row of the training curve."""


def fit(
    spec: Spec,
    source: Source,
    settings: FitSettings | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Fitted:
    """Train the dictionary that `spec` names, set its thresholds on held-out training text, and measure it.

    folder     folder for the result. A finished fit of the same spec, settings and source is opened instead of
               trained again; a killed fit resumes from its last checkpoint and ends with the same bytes
    progress   called at every row of the training curve
    device     device to train on; the result is on the CPU

    Raises ArtifactError if `folder` holds something else, NumericsError if activations or the loss are not finite.
    """
    settings = settings or FitSettings()
    key = artifacts.key_of(
        SCHEMA,
        spec.variant,
        spec,
        dataclasses.replace(settings, checkpoint_every=1),
        source.fingerprint,
        [str(site) for site in source.sites],
    )
    device = torch.device(device)

    def fitted(work: Work | None) -> tuple[Fitted, dict[str, Any]]:
        here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with here, kernels.fast_matmul(device), kernels.kept_memory():
            return _fit(spec, source, settings, work, progress, device)

    if folder is None:
        return fitted(None)[0]
    folder = Path(folder)

    def make() -> tuple[dict[str, Any], list[str]]:
        made, facts = fitted(Work.at(folder, key))
        return {**made.body, **facts}, made.write(folder)

    return kept(folder, SCHEMA, key, make, lambda: Fitted.load(folder, spec.variant))


def _fit(
    spec: Spec,
    source: Source,
    settings: FitSettings,
    work: Work | None,
    progress: Progress | None,
    device: torch.device,
) -> tuple[Fitted, dict[str, Any]]:
    """The dictionary, and how it was made, for the manifest."""
    train_N, calibration_N = apart(source, settings)
    source = OnDevice(source, device)
    norm = Normalization.measure(source)
    sites, width = norm.center_SMD.shape[0], norm.center_SMD.shape[2]
    dictionary = build(spec, sites=sites, width=width, seed=settings.seed)
    dictionary.delta_variance.fill_(norm.delta_variance)
    dictionary.to(device)
    some = source.order(train_N, generator(settings.seed, "start"))[:START]
    dictionary.begin(norm.apply(source.read(TRAIN, train_N[some])))
    schedule = Schedule.of(spec, settings, len(train_N))
    state = State.new(dictionary, schedule)
    if work is not None and work.has(CHECKPOINT):
        state.restore(artifacts.read_tensors(work.folder / CHECKPOINT))
    order: dict[int, Tensor] = {}
    while state.step < schedule.steps:
        epoch, at = divmod(state.step, schedule.batches)
        if epoch not in order:
            order = {epoch: source.order(train_N, generator(settings.seed, "shuffle", epoch))}
        index_N = train_N[order[epoch][at * schedule.batch : (at + 1) * schedule.batch]]
        x_NSMD = norm.apply(source.read(TRAIN, index_N))
        row = step(state, x_NSMD, settings, schedule)
        if row is not None:
            state.curve.append(row)
            if progress is not None:
                progress(state.step * schedule.batch, schedule.steps * schedule.batch, row)
        if work is not None and state.step % settings.checkpoint_every == 0 and state.step < schedule.steps:
            work.write_tensors(CHECKPOINT, state.tensors())
    how = {"kernels": kernels.path(device), "float32_products": torch.get_float32_matmul_precision()}
    facts = {"settings": settings, "steps": schedule.steps, "batch": schedule.batch, **how}
    return finish(state, source, norm, settings, schedule, calibration_N), facts


def step(state: State, x_NSMD: Tensor, settings: FitSettings, schedule: Schedule) -> dict[str, float] | None:
    """Take one optimizer step on normalized activations; return a row of the training curve where one is due."""
    dictionary, optimizer = state.dictionary, state.optimizer
    done = state.step / max(1, schedule.steps - 1)
    k_factor = schedule.k_factor(state.step, settings)
    run = dictionary(x_NSMD, progress=done, k_factor=k_factor)
    parts = dictionary.objective(run)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(parts.values())).sum().backward()
    dead_F = state.silent_F >= schedule.dead_tokens
    if settings.aux_weight:
        k = min(max(1, dictionary.width // 2), settings.aux_k)
        parts = {**parts, "aux": settings.aux_weight * dictionary.auxiliary(run, dead_F, k)}
        if parts["aux"].requires_grad:  # last, so that AuxK adds to existing gradients in place
            parts["aux"].backward()
    dictionary.hold()
    norm = kernels.norm([p.grad for p in dictionary.parameters() if p.grad is not None])
    # The fused step divides gradients by `grad_scale`, so clipping needs no pass of its own.
    optimizer.grad_scale = ((norm.float() + 1e-6) / settings.clip).clamp_min(1)
    rate = schedule.rate_at(state.step, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    with torch.no_grad():
        state.silent_F = (state.silent_F + x_NSMD.shape[0]).masked_fill(run.code.fired(), 0)
    state.step += 1
    if state.step % settings.log_every and state.step != schedule.steps and state.step != 1:
        return None
    with torch.no_grad():
        error, spread = (
            run.error_NSMD.square().sum((0, 1, 3)),
            (run.x_NSMD - run.x_NSMD.mean(0)).square().sum((0, 1, 3)),
        )
        names = {"both": ("base", "tuned"), "tuned": ("tuned",), "difference": ("delta",)}
        ev = dict(zip(names[dictionary.spec.target], (1 - error / spread).tolist()))
        row = {
            "step": float(state.step),
            "rate": rate,
            "loss": float(torch.stack(list(parts.values())).sum()),
            **{f"loss.{k}": float(v) for k, v in parts.items()},
            **{f"ev_{name}": value for name, value in ev.items()},
            "l0": float(run.code.count()) / x_NSMD.shape[0],
            "dead": float((state.silent_F >= schedule.dead_tokens).sum()),
        }
    if not math.isfinite(row["loss"]):
        raise NumericsError(f"the loss is not finite at step {state.step}", remedy="--set fit.learning_rate=1e-4")
    return row
