"""Latents of a Matryoshka crosscoder, whose nested groups keep the first latents broad; complements `crosscode`."""

from __future__ import annotations

from dataclasses import dataclass

from tunediff import dictionaries
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.changes.finders.crosscode import latents_of
from tunediff.core.errors import within


@dataclass(frozen=True)
class Nested(Finder):
    """What `crosscode` proposes, from a Matryoshka dictionary of the same size and sparsity (Bussmann et al. 2025,
    2503.17547).

    Delta latents start as differences at single tokens and describe token-level changes. The first Matryoshka latents
    must explain both models by themselves, so they read the kind of text in which a change shows.
    """

    k: float = 24.0
    """Mean number of active latents a token, where the run's own dictionary sets none."""
    first: int = 32
    """Fewest latents of the smallest nested dictionary; fewer latents than changes would merge changes."""
    min_firings: int = 20
    """Fewest training tokens on which a proposed latent fires; rarer latents cannot be tested on held-out text."""

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
