"""Latents of a Matryoshka crosscoder, for beside the Delta-Crosscoder's: nested groups keep the first latents broad."""

from __future__ import annotations

from dataclasses import dataclass

from tunediff import dictionaries
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.changes.finders.crosscode import latents_of
from tunediff.core.errors import within


@dataclass(frozen=True)
class Nested(Finder):
    """What `crosscode` proposes of a Matryoshka dictionary of as many latents, in all and on a token, as the run's own (Bussmann et al.
    2025, 2503.17547).

    Delta latents start as differences at single tokens and say what changes from token to token. The first of these have to explain both
    models by themselves, and read the kind of text in which a change shows.
    """

    k: float = 24.0
    """Latents a token, where the run's own dictionary sets no number of them."""
    first: int = 32
    """Latents of the smallest nested dictionary, at least: fewer than a tune has things to say merges them."""
    min_firings: int = 20
    """Latents that fire on fewer training tokens are not proposed: held-out text could say nothing of them."""

    def __post_init__(self) -> None:
        within("find.nested", self, k=1, first=1, min_firings=1)

    def find(self, view: View) -> Found:
        k = sum(getattr(view.spec, name, 0.0) for name in ("k", "k_shared", "k_delta")) or min(
            self.k, view.spec.latents
        )
        prefixes = max(1, min(5, (view.spec.latents // self.first).bit_length() - 1))
        return latents_of(
            dictionaries.spec("matryoshka", latents=view.spec.latents, k=k, prefixes=prefixes),
            view,
            "nested",
            self.min_firings,
        )


VARIANT = Nested
