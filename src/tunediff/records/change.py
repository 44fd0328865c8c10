"""Changes, the waist: one claimed difference between two models, whoever found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.artifacts import read_json, read_tensors, write_json, write_tensors
from tunediff.core.axes import BASE, TUNED
from tunediff.core.errors import ArtifactError
from tunediff.records.site import Site

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "tunediff.changes/1"


@dataclass(frozen=True, eq=False)
class Change:
    """One claimed difference: where it is read, how strongly it is on at a token, and what it writes in each model.

    Everything is in the streams' own units (no normalization left to undo). With x_SMD the streams of both models
    at the change's sites at one token, g = sum(rows_SMD * x_SMD) + bias; the change's strength is f = g if
    g > threshold, else 0. In model m at site s it accounts for f * write_SMD[s, m] of the stream; the difference
    it claims is f * (write[:, tuned] - write[:, base]).

    id          unique in a run, e.g. ``crosscode/512``; also a file-safe name
    sites       S sites, lowest first
    rows_SMD    readout rows; zeros with bias 1 make a constant offset
    write_SMD   what the change writes in base and in tuned
    bias, threshold   scalars; threshold -inf makes the readout linear and signed
    finder      which finder made it
    origin      what the finder says of it, plain JSON (latent number, group, held-out firing count ...)
    """

    id: str
    sites: tuple[Site, ...]
    rows_SMD: Tensor
    write_SMD: Tensor
    bias: float
    threshold: float
    finder: str
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def difference_SD(self) -> Tensor:
        """What one unit of strength adds to tuned beyond base, at each site."""
        return self.write_SMD[:, TUNED] - self.write_SMD[:, BASE]

    @property
    def share(self) -> float:
        """|write tuned| / (|write base| + |write tuned|): 0 base only, 1/2 both, 1 tuned only (Lindsey et al. 2024)."""
        base, tuned = (float(self.write_SMD[:, m].norm()) for m in (BASE, TUNED))
        return tuned / (base + tuned) if base + tuned else 0.5

    def strength(self, streams_NSMD: Tensor) -> Tensor:
        """f_N for streams (N, S, M, D) at this change's sites, in this order; float32."""
        import torch

        x = streams_NSMD.float()
        g = x.flatten(1) @ self.rows_SMD.flatten().to(x) + self.bias
        return torch.where(g > self.threshold, g, torch.zeros_like(g))

    def mirrored(self) -> Change:
        """The same change with base and tuned swapped."""
        return replace(self, rows_SMD=self.rows_SMD.flip(1), write_SMD=self.write_SMD.flip(1))


def save_changes(folder: Path, changes: Sequence[Change]) -> list[str]:
    """Write changes as ``changes.safetensors`` and ``changes.json``; returns the file names, for a manifest."""
    tensors = {}
    for number, change in enumerate(changes):
        tensors[f"{number}.rows"] = change.rows_SMD.float()
        tensors[f"{number}.write"] = change.write_SMD.float()
    write_tensors(folder / "changes.safetensors", tensors)
    records = [
        {
            "id": c.id,
            "sites": [str(s) for s in c.sites],
            "bias": c.bias,
            # JSON has no infinity: null stands for a readout without a threshold.
            "threshold": c.threshold,
            "finder": c.finder,
            "origin": c.origin,
        }
        for c in changes
    ]
    write_json(folder / "changes.json", {"schema": SCHEMA, "changes": records})
    return ["changes.json", "changes.safetensors"]


def load_changes(folder: Path) -> list[Change]:
    """Read what `save_changes` wrote."""
    table = read_json(folder / "changes.json")
    if table.get("schema") != SCHEMA:
        raise ArtifactError(f"{folder} holds no changes", expected=SCHEMA, got=str(table.get("schema")))
    tensors = read_tensors(folder / "changes.safetensors")
    return [
        Change(
            id=r["id"],
            sites=tuple(Site.parse(s) for s in r["sites"]),
            rows_SMD=tensors[f"{n}.rows"],
            write_SMD=tensors[f"{n}.write"],
            bias=r["bias"],
            threshold=float("-inf") if r["threshold"] is None else r["threshold"],
            finder=r["finder"],
            origin=r["origin"],
        )
        for n, r in enumerate(table["changes"])
    ]
