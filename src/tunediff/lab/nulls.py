"""Make nulls: pairs of models without a learned difference, made from a pair without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tunediff.changes.calibrations import Calibration, NullPair
from tunediff.core.chance import generator, seed_of
from tunediff.core.errors import SourceError
from tunediff.core.progress import Progress, quiet
from tunediff.edits.baking import merged
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.runs.plan import settled
from tunediff.runs.run import Run

RANK = 16
"""Rank of an untrained change in each weight matrix."""

SIZES = (0.003, 0.01, 0.03)
"""Norms of untrained changes as shares of each weight matrix's norm, from a light LoRA's to a heavy one's."""


def identical(pair: Pair, seed: int) -> Pair:
    """The base model against itself: a method that finds something here is broken."""
    return Pair.load(pair.base.name, pair.base.name, allow_identical=True)


def rounded(pair: Pair, seed: int) -> Pair:
    """The base model against itself with weights rounded to bfloat16: every weight changes, but not by training."""
    null = identical(pair, seed)
    for parameter in null.tuned.module.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return replace(null, tuned_fingerprint=f"{null.base_fingerprint} rounded")


def random_tune(pair: Pair, seed: int) -> Pair:
    """The base model plus a random change of the fine-tune's norm in every parameter it changed, of its rank in maps."""
    return _null(pair, pair.random_tuned(seed_of(seed, "null tune")), f"random {seed}")


def permuted(pair: Pair, seed: int) -> Pair:
    """The fine-tune's own changes with the inputs and outputs of every map, and the axes of all else, permuted.

    The permutation keeps each change's singular values and destroys its meaning.
    """
    tensors: dict[nn.Parameter, torch.Tensor] = {}
    for delta in pair.deltas():
        tensors.update(delta.permuted(seed))
    return _null(pair, pair.tuned.variant(f"permuted tune {seed}", tensors), f"permuted {seed}")


def second_seed(pair: Pair, seed: int) -> Pair:
    """Two fine-tunes by one recipe with different seeds, each merged into the base model.

    Both learned the same behaviors, so only the seeds make them differ. The other fine-tune is read from the folder
    NAME@SEED beside this one's; raises `SourceError` if that folder does not exist.
    """
    folder = Path(pair.tuned.name)
    beside = folder.with_name(f"{folder.name.partition('@')[0]}@{seed}")
    if not beside.is_dir() or beside == folder:
        raise SourceError(
            f"there is no other seed {seed} of the tune {folder.name}",
            expected=f"the folder {beside}",
            remedy=f"tunediff organism make NAME {beside} --seed {seed}",
        )
    one, other = (
        LanguageModel(merged(p), p.tokenizer, p.tuned.name) for p in (pair, Pair.load(pair.base.name, str(beside)))
    )
    return Pair.of(one, other)


def _null(pair: Pair, tuned: LanguageModel, name: str) -> Pair:
    return replace(pair, tuned=tuned, tuned_fingerprint=f"{pair.tuned_fingerprint} {name}")


def untrained(base: str, size: float, seed: int) -> Pair:
    """A base model against itself plus a random change of rank `RANK` in every weight matrix of its blocks.

    size   norm of the change, as a share of the matrix's norm
    """
    pair = Pair.load(base, base, allow_identical=True)
    for name, parameter in pair.tuned.blocks.named_parameters():
        stack = parameter.dim() == 3 and parameter.shape[1] > 1  # of experts; the middle axis of a convolution is 1
        for number, part in enumerate(parameter if stack else [parameter]):
            if part.dim() == 2:
                rng = generator(seed, "untrained tune", f"{name}/{number}" if stack else name)
                rank = min(RANK, *part.shape)
                change = (
                    torch.randn(part.shape[0], rank, generator=rng) @ torch.randn(rank, part.shape[1], generator=rng)
                ).to(part)
                part.data += change * (size * part.norm() / change.norm())
    return replace(pair, tuned_fingerprint=f"{pair.base_fingerprint} untrained {size} {seed}")


def calibrate(
    base: str,
    count: int,
    folder: Path,
    *,
    tunes: Sequence[str] = (),
    settings: Sequence[str] = (),
    progress: Progress = quiet,
) -> Calibration:
    """Run `diff` up to its verdicts on null pairs of a base model, and keep their scores as a calibration.

    count      number of untrained changes, which take the sizes in `SIZES` in turn
    folder     keeps the runs; a pair that was finished there is not run again
    tunes      folders of placebos trained from this base, if there are any: harder nulls than untrained changes
    settings   plan settings of all runs
    """
    plan = settled(None, settings, base=base)
    nulls, fingerprint = [], ""
    for number in range(count + len(tunes)):
        trained, size = number >= count, SIZES[number % len(SIZES)]
        name = tunes[number - count] if trained else f"untrained, {size:g} of every map"
        pair = Pair.load(base, name) if trained else untrained(base, size, number)
        run = Run(replace(plan, tuned=name), folder / f"null-{number}", progress, pair)
        run.calibration = None  # the runs that set a threshold must not use one
        nulls.append(
            NullPair(
                Path(name).name if trained else name,
                trained,
                max((r.score.value for r in run.verdicts if not r.standing), default=0.0),
                max((r.gap for r in run.verdicts if r.decision == "confirmed"), default=0.0),
                max((r.standing for r in run.verdicts if r.decision == "confirmed"), default=0.0),
            )
        )
        fingerprint = pair.base_fingerprint
    return Calibration(fingerprint, nulls, plan.rank.level)


NULLS: dict[str, Callable[[Pair, int], Pair]] = {
    "identical": identical,
    "rounded": rounded,
    "random": random_tune,
    "permuted": permuted,
    "second_seed": second_seed,
}
"""Functions that make a null pair from a pair and a seed, by name; trained nulls such as the placebo are organisms."""
