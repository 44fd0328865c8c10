"""How a harvest's streams are stored: number formats on disk, and streams that are computed again when read."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

STORES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "none": torch.float32,
}
"""Number formats that streams are stored in, by their name in the settings; "none" stores no streams."""
STREAMS = ("base", "delta")
"""Names of the stored streams: base's, and tuned minus base."""
HELD_BYTES = 2 << 30
"""Approximate bytes of streams that are held in memory if none are on disk."""
SCALE_GROUP = 32
"""Neighboring values that share one scale in int8 (fewer, where the width is no multiple of it)."""


class Again(Sequence[Mapping[str, Tensor]]):
    """Shards whose streams are not on disk: reading a shard computes it again, and the last `held` stay in memory.

    run     computes the streams of a shard by its number
    count   number of shards
    held    most shards in memory
    kept    the shards in memory, the one read longest ago first
    """

    def __init__(self, run: Callable[[int], Mapping[str, Tensor]], count: int, held: int):
        self._run, self._count, self.held = run, count, held
        self.kept: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Mapping[str, Tensor]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Mapping[str, Tensor]]: ...
    def __getitem__(self, number: int | slice) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        return self.keep(number, self.kept[number] if number in self.kept else self._run(number))

    def keep(self, number: int, shard: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Hold a shard in memory; beyond `held` shards, drop the one read longest ago."""
        self.kept[number] = shard
        self.kept.move_to_end(number)
        if len(self.kept) > self.held:
            self.kept.popitem(last=False)
        return shard


def in_range(base: Tensor, delta: Tensor, ordinary_N: Tensor, store: torch.dtype) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return base and delta (N, S, D) as they fit a format, and the format: float32 where float16 is too small for them.

    Streams of some networks, such as Gemma 3, exceed 65,504 at ordinary tokens. Outlier tokens are clamped to the range
    of float16 instead, as no finder sees them.
    """
    if store is not torch.float16:
        return base, delta, store
    limit = torch.finfo(store).max
    if (base[ordinary_N].abs() > limit).any() or (delta[ordinary_N].abs() > limit).any():
        return base, delta, torch.float32
    return base.clamp(-limit, limit), delta.clamp(-limit, limit), store


def to_store(name: str, value_NSD: Tensor, store: torch.dtype) -> dict[str, Tensor]:
    """Return values as they are stored; in int8 with scales (N, S, D / 32), rounded up so that nothing is clipped."""
    if store is not torch.int8:
        return {name: value_NSD.to(store)}
    groups = value_NSD.unflatten(-1, (-1, math.gcd(SCALE_GROUP, value_NSD.shape[-1])))
    scale = (groups.abs().amax(-1, keepdim=True) * ((1 + 2**-7) / 127)).bfloat16()
    whole = (groups / scale.float().clamp_min(1e-30)).round()
    return {name: whole.to(store).flatten(-2), f"{name}_scale": scale[..., 0]}


def stored(shard: Mapping[str, Tensor], name: str, index_N: Tensor) -> Tensor:
    """Return the values (N, S, D) of some of a shard's tokens, in float32."""
    value = shard[name][index_N].float()
    if f"{name}_scale" not in shard:
        return value
    scale = shard[f"{name}_scale"][index_N].float()[..., None]
    return (value.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)
