"""Activation-difference lens: the mean difference at each of the first positions of a text (Minder et al. 2025,
2510.13900).
"""

from __future__ import annotations

from dataclasses import dataclass

from tunediff.changes.finders._directions import constant
from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.axes import BASE, TUNED
from tunediff.core.errors import CorpusError, within
from tunediff.harvests.lenses import patchscope


@dataclass(frozen=True)
class DeltaLens(Finder):
    """One change for each site and each of the first positions, always on, that writes the mean difference there.

    A narrow fine-tune shifts the streams before a text has any content. Position 0 is often excluded as an outlier
    token; the source also leaves out the first token. The tokens that the patchscope decodes are kept in `origin`. The
    source's steering and effect on the output are left to the trials.
    """

    positions: int = 5
    """Number of first positions that are read, each as its own change."""
    fewest: int = 8
    """Fewest training tokens at a position; the mean over fewer tokens is noise."""

    def __post_init__(self) -> None:
        within("find.delta_lens", self, positions=1, fewest=1)

    def find(self, view: View) -> Found:
        harvest = view.harvest
        index_N = harvest.index("train")
        position_N = harvest.position_N[index_N]
        tokenizer, changes = view.pair.tokenizer, []
        for position in range(self.positions):
            here_N = index_N[position_N == position]
            if len(here_N) < self.fewest:
                continue
            x_NSMD = harvest.at(here_N).double()
            mean_SD = (x_NSMD[:, :, TUNED] - x_NSMD[:, :, BASE]).mean(0).float()
            for s, site in enumerate(harvest.sites):
                origin = {"position": position, "tokens": len(here_N)}
                if site.kind == "resid" and tokenizer is not None:
                    size = float(x_NSMD[:, s, TUNED].norm(dim=1).median())
                    told = patchscope(view.pair.tuned, site, mean_SD[s], size, view.pair.vocabulary)
                    origin["patchscope"] = [tokenizer.decode([token]) for token in told]
                changes.append(constant("delta_lens", f"{site}-{position}", site, mean_SD[s], origin))
        if not changes:
            raise CorpusError(
                "no first position is seen often enough for delta_lens",
                expected=f"{self.fewest} training rows that begin differently",
                remedy="--set corpus.tokens=20000",
            )
        return Found(changes)


VARIANT = DeltaLens
