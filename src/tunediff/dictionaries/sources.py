"""Sources of activations, and the normalization of both models' streams."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tunediff.core.axes import BASE, MODELS, TUNED, check
from tunediff.core.errors import NumericsError
from tunediff.dictionaries.architectures.base import delta_of
from tunediff.records.site import Site

TRAIN = "train"
"""Name of the split that dictionaries are trained on."""
HELD_OUT = "held_out"
"""Name of the split that dictionaries are measured on."""
CHUNK = 4096
"""Tokens read at a time by a pass without gradients; changes speed only."""
LIMIT = 1 << 20
"""Most training tokens for means and variances; of more tokens, this many are taken at even spacing."""


class Source(Protocol):
    """Where activations come from: a harvest on disk, or tensors in memory.

    A source may also have ``documents(split)``, the document number of each token (N,): calibration then holds out
    whole documents. A source with slow random access may have ``order(split, index_N, generator)``, a random order of
    the tokens at `index_N` that the source reads fast.
    """

    @property
    def fingerprint(self) -> str:
        """A content key: it differs wherever the activations do."""
        ...

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites along axis S, in order."""
        ...

    def count(self, split: str) -> int:
        """Number of tokens in ``train`` or ``held_out``."""
        ...

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """Return the activations x_NSMD of these tokens (int64 indices in [0, count)), float32, in this order."""
        ...


class TensorSource:
    """Activations in memory; `x_train` and `x_held_out` are (N, S, M, D), or (N, M, D) for one site."""

    def __init__(self, x_train: Tensor, x_held_out: Tensor, sites: tuple[Site, ...] | None = None):
        self._splits: dict[str, Tensor] = {}
        for split, x in ((TRAIN, x_train), (HELD_OUT, x_held_out)):
            x = x.unsqueeze(1) if x.ndim == 3 else x
            self._splits[split] = check(x.float().contiguous(), "NSMD", M=len(MODELS))
        self._sites = sites or tuple(Site(s) for s in range(self._splits[TRAIN].shape[1]))
        check(self._splits[TRAIN], "NSMD", S=len(self._sites))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites along axis S."""
        return self._sites

    @cached_property
    def fingerprint(self) -> str:
        """A hash of both splits' bytes."""
        digest = hashlib.sha256()
        for x in self._splits.values():
            digest.update(str(tuple(x.shape)).encode())
            digest.update(x.numpy().data.cast("B"))
        return digest.hexdigest()[:16]

    def count(self, split: str) -> int:
        """Number of tokens in `split`."""
        return self._splits[split].shape[0]

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """Return x_NSMD of these tokens."""
        return self._splits[split][index_N]


class OnDevice:
    """A source whose activations arrive on a device, copied while the host goes on."""

    def __init__(self, source: Source, device: torch.device):
        self._source, self._device = source, device
        self.fingerprint, self.sites, self.count = source.fingerprint, source.sites, source.count

    def order(self, index_N: Tensor, rng: torch.Generator) -> Tensor:
        """Return a random order of training tokens, as places in `index_N`."""
        order: Callable[[str, Tensor, torch.Generator], Tensor] | None = getattr(self._source, "order", None)
        if order is not None:
            return order(TRAIN, index_N, rng)
        return torch.randperm(len(index_N), generator=rng)

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """Return x_NSMD of these tokens, on the device."""
        x_NSMD = self._source.read(split, index_N)
        if self._device.type == "cuda" and not x_NSMD.is_cuda:
            x_NSMD = x_NSMD.pin_memory()
        return x_NSMD.to(self._device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Normalization:
    """Centering and scaling of streams: x_normalized = (x - center_SMD) / scale_S.

    center_SMD        each model's own mean, so that a constant offset is removed before a dictionary sees it
    scale_S           one root mean square for both models, as two would distort their difference
    log_rms_ratio_S   log(rms tuned / rms base) of the centered streams
    delta_variance    mean square of the normalized, centered difference tuned - base; 0 for equal models
    """

    center_SMD: Tensor
    scale_S: Tensor
    log_rms_ratio_S: Tensor
    delta_variance: float

    @classmethod
    def measure(cls, source: Source, *, limit: int = LIMIT) -> Normalization:
        """Measure the normalization on all training tokens, or on `limit` evenly spaced ones, with sums in float64.

        Raises NumericsError on non-finite activations or a site that never varies.
        """
        index_N = spread(source.count(TRAIN), limit)
        sums = squares = deltas = torch.zeros((), dtype=torch.float64)
        pivot: Tensor | None = None
        for at in index_N.split(CHUNK):
            x = source.read(TRAIN, at).double()
            if not bool(torch.isfinite(x).all()):
                raise NumericsError("the training activations are not finite", remedy="--set pair.dtype=float32")
            pivot = x.mean(0) if pivot is None else pivot
            x = x - pivot  # close to the mean, so that the difference of sums below loses nothing
            sums, squares = sums + x.sum(0), squares + x.square().sum(0)
            deltas = deltas + delta_of(x).square().sum(0)
        if pivot is None:
            raise NumericsError("there are no training tokens", remedy="--set corpus.tokens=20000")
        n = len(index_N)
        mean_SMD = sums / n
        variance_SMD = (squares / n - mean_SMD.square()).clamp_min(0)
        rms_SM = variance_SMD.mean(2).sqrt()
        scale_S = variance_SMD.mean((1, 2)).sqrt()
        if not bool((scale_S > 0).all()):
            raise NumericsError("a site's activations never vary", got=f"scale {scale_S.tolist()}")
        delta_SD = (deltas / n - delta_of(mean_SMD[None])[0].square()).clamp_min(0)
        return cls(
            center_SMD=(pivot + mean_SMD).float(),
            scale_S=scale_S.float(),
            log_rms_ratio_S=(rms_SM[:, TUNED] / rms_SM[:, BASE]).log().float(),
            delta_variance=float((delta_SD / scale_S[:, None].square()).mean()),
        )

    def apply(self, x_NSMD: Tensor) -> Tensor:
        """Convert raw activations to normalized ones."""
        return (x_NSMD - self.center_SMD) / self.scale_S[:, None, None]

    def to(self, device: torch.device | str) -> Normalization:
        """Return the same normalization on `device`."""
        parts = {name: getattr(self, name).to(device) for name in ("center_SMD", "scale_S", "log_rms_ratio_S")}
        return dataclasses.replace(self, **parts)

    def undo(self, x_NSMD: Tensor) -> Tensor:
        """Convert normalized activations to raw ones."""
        return x_NSMD * self.scale_S[:, None, None] + self.center_SMD


def spread(count: int, limit: int) -> Tensor:
    """Return the indices [0, count), or `limit` evenly spaced ones if there are more."""
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit
