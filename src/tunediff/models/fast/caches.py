"""Key-value caches whose memory is allocated ahead of need."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

AHEAD = 64
"""Positions allocated ahead while tokens come one by one; transformers' own layer copies its whole cache for each."""


class GrowingLayer(DynamicLayer):
    """transformers' cache layer with room for the next positions; it returns views of its memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, T, E) and return all (B, H, S, E)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms: dict[str, Tensor] = {}
        self.keys, self.values = (
            self._put("keys", self.keys, key_states),
            self._put("values", self.values, value_states),
        )
        return self.keys, self.values

    def _put(self, name: str, old_BHSE: Tensor, new_BHTE: Tensor) -> Tensor:
        B, H, T, E = new_BHTE.shape
        before = old_BHSE.shape[-2] if old_BHSE.numel() else 0
        room_BHSE, after = self._rooms.get(name), before + T
        # A crop leaves a shorter view of the same memory here, a selection or repetition another tensor.
        fits = room_BHSE is not None and room_BHSE.shape[:2] == (B, H) and room_BHSE.shape[2] >= after
        if (
            not fits
            or old_BHSE.data_ptr() != room_BHSE.data_ptr()
            or room_BHSE.is_inference()
            and not torch.is_inference_mode_enabled()
        ):
            room_BHSE = self._rooms[name] = new_BHTE.new_empty(B, H, after + AHEAD * (T == 1), E)
            if before:
                room_BHSE[:, :, :before] = old_BHSE
        room_BHSE[:, :, before:after] = new_BHTE
        return room_BHSE[:, :, :after]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; a single row is not copied until more positions come."""
        if self.get_seq_length() == 0 or len(self.keys) > 1:
            return super().batch_repeat_interleave(repeats)
        self.keys, self.values = self.keys.expand(repeats, -1, -1, -1), self.values.expand(repeats, -1, -1, -1)
        self._rooms = {}


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a cache of many rows that begin with a cache of one, which stays as it is."""
    other = copy(cache)
    other.layers = [copy(layer) for layer in cache.layers]
    other.batch_repeat_interleave(rows)
    return other


def growing(cache: DynamicCache) -> DynamicCache:
    """Make the plain layers of an empty cache grow ahead of need, and return it."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
    return cache
