"""Sites: places in a network, written ``resid.15`` (the stream after block 15, counted from 0) or ``mlp.7``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tunediff.core.errors import SettingError

KINDS = ("resid", "attn", "mlp")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a network: what a block's residual stream, attention or MLP puts out. ``layer`` counts from 0."""

    layer: int
    kind: str = "resid"

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``kind.layer``; raises `SettingError` on anything else."""
        match = re.fullmatch(r"([a-z]+)\.([0-9]{1,9})", text.strip())
        if not match or match[1] not in KINDS:
            expected = "kind.layer with kind one of " + ", ".join(KINDS)
            raise SettingError(f"{text!r} is not a site", expected=expected, remedy="--set scan.sites=resid.15")
        return cls(int(match[2]), match[1])
