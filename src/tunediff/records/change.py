"""Changes: one claim of what a direction is read from and writes, in one model or across several, whoever found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.artifacts import read_json, read_tensors, write_json, write_tensors
from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.core.typed import typed
from tunediff.records.site import Site

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "tunediff.changes/1"


@dataclass(frozen=True)
class TokenGroup:
    """A group of vocabulary entries whose probability a change moves.

    numbers   the tokens by number, as `Vocabularies.joint` orders both models' tokens
    names     their texts, to be treated as hostile
    raised    whether the last model gives them more probability than the first, or less
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    raised: bool = True

    @property
    def sign(self) -> int:
        """1 for tokens that are raised, -1 for those that are lowered."""
        return 1 if self.raised else -1


@dataclass(frozen=True, eq=False)
class Change:
    """One claim about M models: where it is read, how strongly it is on at a token, and what it writes in each model.

    M = 1 is a concept in one model, M = 2 a change from base (0) to tuned (1), M > 2 a series of checkpoints in order.

    Everything is in the units of the residual streams. With x_SMD the streams of all models at the change's sites at
    one token, g = sum(rows_SMD * x_SMD) + bias. The strength is f = g where g > threshold, and 0 elsewhere. In model m
    at site s the change accounts for f * write_SMD[s, m] of the stream.

    id          unique in a run, such as ``crosscode/512``; also safe as a file name
    sites       S sites, lowest first
    rows_SMD    read-out directions; zeros with bias 1 make a constant offset
    write_SMD   what one unit of strength writes in each model
    bias, threshold   scalars; with threshold -inf the read-out is linear and signed
    finder      name of the finder that made it
    origin      what the finder says of it, as plain JSON (number of the latent, held-out firings, ...)
    group       the tokens whose probability it moves, where the claim is about tokens

    A change of a group with sites raises these tokens' logits (lowers, if not ``raised``) by what it writes there.

    A change of a group without sites lives at the output: it claims no direction in a stream, its tensors are (0, M, D), and
    its strength at a token is the probability that the group gains there (loses, if not ``raised``), where that is above the
    threshold. Streams do not give it, so `strength` refuses; `changes.outputs` measures it.

    Raises `NumericsError` unless both tensors are (S, M, D) with M and D at least 1.
    """

    id: str
    sites: tuple[Site, ...]
    rows_SMD: Tensor
    write_SMD: Tensor
    bias: float
    threshold: float
    finder: str
    origin: dict[str, Any] = field(default_factory=dict)
    group: TokenGroup | None = None

    def __post_init__(self) -> None:
        rows, write = tuple(self.rows_SMD.shape), tuple(self.write_SMD.shape)
        nowhere = not self.sites and self.group is None
        if rows != write or len(rows) != 3 or rows[0] != len(self.sites) or 0 in rows[1:] or nowhere:
            raise NumericsError(
                f"the directions of change {self.id!r} do not fit its sites",
                expected=f"rows and write of one shape (S={len(self.sites)}, M>=1, D>=1)",
                got=f"rows {rows}, write {write}",
                remedy="give one read-out and one write direction for each site and model",
            )

    @classmethod
    def at_the_output(
        cls, id: str, group: TokenGroup, width: int, threshold: float, finder: str, origin: dict[str, Any]
    ) -> Change:
        """A change of a pair that lives at the output alone."""
        import torch

        nothing = torch.zeros(0, 2, width)
        return cls(id, (), nothing, nothing, 0.0, threshold, finder, origin, group)

    @property
    def is_at_output(self) -> bool:
        """Whether the change claims tokens alone, and no direction in a stream."""
        return not self.sites

    @property
    def models(self) -> int:
        """Number M of models that the change speaks of."""
        return self.rows_SMD.shape[1]

    @property
    def difference_SD(self) -> Tensor:
        """What one unit of strength adds to the last model beyond the first; with one model, what it writes there."""
        if self.models == 1:
            return self.write_SMD[:, 0]
        return self.write_SMD[:, -1] - self.write_SMD[:, 0]

    @property
    def share(self) -> float:
        """|write last| / (|write first| + |write last|): 0 first model only, 1/2 both, 1 last only.

        The first model is base and the last is tuned in a pair (Lindsey et al. 2024). NaN with one model, where nothing
        is compared, and at the output, where nothing is written into a stream.
        """
        if self.models == 1 or self.is_at_output:
            return float("nan")
        first, last = (float(self.write_SMD[:, m].norm()) for m in (0, -1))
        return last / (first + last) if first + last else 0.5

    def strength(self, streams_NSMD: Tensor) -> Tensor:
        """Strength (N,), float32, for streams (N, S, M, D) at this change's sites and models, in this order.

        Raises `NumericsError` for streams of other sites, models or width.
        """
        import torch

        if self.is_at_output:
            raise NumericsError(
                f"change {self.id!r} is at the output, and is read from no stream",
                expected="a change with sites",
                remedy="use Outputs.strengths, which runs both models",
            )
        if streams_NSMD.shape[1:] != self.rows_SMD.shape:
            raise NumericsError(
                f"these streams are not those that change {self.id!r} is read from",
                expected=f"(N, S, M, D) = (N, {', '.join(map(str, self.rows_SMD.shape))})",
                got=str(tuple(streams_NSMD.shape)),
                remedy="give streams of as many models, at " + ", ".join(map(str, self.sites)),
            )
        x = streams_NSMD.float()
        g = x.flatten(1) @ self.rows_SMD.flatten().to(x) + self.bias
        return torch.where(g > self.threshold, g, torch.zeros_like(g))

    def mirrored(self) -> Change:
        """The same change with the order of the models reversed; with two, base and tuned swapped."""
        group = self.group and replace(self.group, raised=not self.group.raised)
        return replace(self, rows_SMD=self.rows_SMD.flip(1), write_SMD=self.write_SMD.flip(1), group=group)


def save_changes(folder: Path, changes: Sequence[Change]) -> list[str]:
    """Write changes as ``changes.safetensors`` and ``changes.json``; return the file names, for a manifest."""
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
            **({"group": c.group} if c.group else {}),
        }
        for c in changes
    ]
    write_json(folder / "changes.json", {"schema": SCHEMA, "changes": records})
    return ["changes.json", "changes.safetensors"]


def load_changes(folder: Path) -> list[Change]:
    """Read what `save_changes` wrote; raises `ArtifactError` where `folder` holds no changes."""
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
            group=typed(TokenGroup, r["group"], "group") if "group" in r else None,
        )
        for n, r in enumerate(table["changes"])
    ]
