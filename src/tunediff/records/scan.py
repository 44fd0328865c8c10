"""The scan over depth: how far two models differ at each site, and which sites were chosen for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunediff.records.profile import Profile

SUBJECT = "tuned against base"
"""Label of the one subject of a pair's scan."""


@dataclass(frozen=True)
class Scan:
    """How far two models differ at each scanned site, lowest first.

    relative   |tuned - base| / |base| (root mean square); its control is the noise floor on the same scale
    offset     share of the squared difference that is one constant offset, 0..1
    ceiling    share of KL(tuned || base) that the whole difference makes when base goes on from it
    chosen     sites at which changes are looked for
    """

    relative: Profile
    offset: Profile
    ceiling: Profile
    chosen: list[str]

    @classmethod
    def of(
        cls,
        sites: Sequence[str],
        relative: Sequence[float],
        noise: Sequence[float],
        offset: Sequence[float],
        ceiling: Sequence[float],
        chosen: Sequence[str] = (),
    ) -> Scan:
        """The scan of one pair from a number for each site."""

        def profile(name: str, values: Sequence[float], unit: str, control: Sequence[float] | None = None) -> Profile:
            return Profile(
                name,
                [SUBJECT],
                list(sites),
                [list(values)],
                unit,
                "scan",
                control=None if control is None else [list(control)],
                against="" if control is None else "noise floor",
            )

        return cls(
            profile("Relative difference", relative, "|tuned − base| / |base|", noise),
            profile("Constant offset", offset, "share of squared difference"),
            profile("Ceiling", ceiling, "share of KL(tuned || base)"),
            list(chosen),
        )

    @property
    def sites(self) -> list[str]:
        """The scanned sites, lowest first."""
        return self.relative.places

    @property
    def equal(self) -> bool:
        """Whether both models' streams are equal at every scanned site, so that at most their outputs differ."""
        return not any(self.relative.values[0])

    @property
    def noise(self) -> list[float]:
        """Noise floor of the relative difference at each site."""
        return [] if self.relative.control is None else self.relative.control[0]


def depth_profile(changes: Sequence[str], sites: Sequence[str], values: Sequence[Sequence[float]]) -> Profile:
    """How much of the difference at each site goes along with each change, from a row of numbers for each change.

    A value is the share of the difference's variance that the change's strength predicts on other documents than the
    direction was fitted to; of the whole difference for a constant offset. Chance gives 0 or a little less.
    """
    return Profile(
        "Along depth", list(changes), list(sites), [list(row) for row in values], "share of the difference", "rank"
    )
