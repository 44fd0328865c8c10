"""Harvests: both models' streams on the same tokens, stored or computed again when read, resumable, read in any
order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core.artifacts import key_of, read_tensors
from tunediff.core.axes import BASE, MODELS, TUNED
from tunediff.core.chance import generator
from tunediff.core.errors import ArtifactError, CorpusError, NumericsError, SettingError
from tunediff.core.manifests import Work, kept, open_folder
from tunediff.harvests import stores
from tunediff.harvests.stores import STORES, STREAMS, Again, in_range, stored, to_store
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.site import Site

if TYPE_CHECKING:
    from tunediff.texts.tokens import Batch, Tokens

SCHEMA = "tunediff.harvest/1"
"""Schema of a harvest's manifest."""


@dataclass(frozen=True)
class HarvestSettings:
    """How streams are taken and stored."""

    store: str = "float16"
    """Number format of base and delta on disk. float32 stores delta exactly, float16 to 0.02 %, bfloat16 to 0.16 %,
    int8 (one scale for 32 values) to about 1 %. Where ordinary streams exceed float16's 65,504, it is float32 that is
    stored. none stores no streams: both models run again on what is read and no longer in memory."""
    abnormal: float = 6.0
    """Tokens whose stream norm exceeds this multiple of the median are outliers (attention sinks): counted, and in
    neither split. Lower drops ordinary tokens; higher lets a few tokens dominate the loss."""
    batch_tokens: int = 2048
    """Tokens a forward pass; changes speed and the last bits of the streams, so it is part of the key."""
    shard_tokens: int = 8192
    """Fewest tokens a shard file; a killed run loses at most one shard."""

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise SettingError(f"harvest.store is {self.store!r}", expected=", ".join(STORES))
        if self.abnormal <= 1 or min(self.batch_tokens, self.shard_tokens) < 1:
            raise SettingError(
                "a harvest setting is out of range", expected="abnormal > 1, batch_tokens and shard_tokens >= 1"
            )


def noise_floor(
    model: LanguageModel, ids_BT: Tensor, mask_BT: Tensor, sites: Sequence[Site], together: Tensor | None = None
) -> Tensor:
    """Return the mean squared length (S,) of the difference between two runs of one model that differ in batch shape
    alone.

    One run takes all rows at once, or is given as `together` (B, T, S, D); the other takes each row alone.
    """
    together = model.streams(ids_BT, sites).float() if together is None else together
    alone = torch.cat([model.streams(ids_BT[i : i + 1], sites).float() for i in range(len(ids_BT))])
    return ((together - alone).pow(2).sum(-1))[mask_BT].mean(0)


def repeated(tokens: Tokens) -> list[int]:
    """Return for each row the number of its leading tokens that also start an earlier row and so have the same streams.

    Training rows come before held-out ones, so that no held-out token repeats a training token. Within a split, rows
    come in order of document id, so that the order of `tokens` does not matter.
    """
    order = sorted(
        range(len(tokens.rows)),
        key=lambda r: (
            tokens.held_out[tokens.document_R[r]],
            tokens.documents[tokens.document_R[r]].id,
            tokens.start_R[r],
        ),
    )
    seen: set[int] = set()
    out = [0] * len(order)
    for r in order:
        prefix = 0
        for token in tokens.rows[r]:
            prefix = hash((prefix, token))  # a hash of integers is the same in every process
            out[r] += prefix in seen
            seen.add(prefix)
    return out


@dataclass(frozen=True, eq=False)
class Harvest:
    """A finished harvest; tokens are numbered 0..N-1 over all shards.

    folder       where it is stored
    manifest     settings, fingerprints and totals
    sites        the sites along axis S
    shards       tensors of each shard by name, from disk or computed again
    starts       number of each shard's first token, and N
    token_N      token ids
    row_N        row of `Tokens` that each token is from
    position_N   position in that row
    document_N   number of its document
    held_out_N   whether that document is held out
    ordinary_N   whether the token is no outlier (see `HarvestSettings.abnormal`)
    kept_N       whether it is in a split: no outlier, and no repeat of another row's start (see `repeated`)
    """

    folder: Path
    manifest: dict[str, Any]
    sites: tuple[Site, ...]
    shards: Sequence[Mapping[str, Tensor]]
    starts: Tensor
    token_N: Tensor
    row_N: Tensor
    position_N: Tensor
    document_N: Tensor
    held_out_N: Tensor
    ordinary_N: Tensor
    kept_N: Tensor

    @classmethod
    def open(cls, folder: Path, again: Again | None = None) -> Harvest:
        """Open a finished folder, memory-mapped; `again` computes the streams of one that stores none.

        Raises ArtifactError if the folder is unfinished or damaged, or stores no streams and `again` is missing.
        """
        manifest = open_folder(folder, SCHEMA)
        shards = [read_tensors(folder / name) for name in manifest["shards"]]
        if again is None and any(name not in shards[0] for name in STREAMS):
            raise ArtifactError(
                f"{folder} keeps no streams",
                expected="a harvest with its streams on disk",
                remedy="run the command again that made it, which has the models",
            )
        counts = torch.tensor([0, *(len(s["token"]) for s in shards)])

        def column(name: str) -> Tensor:
            return torch.cat([s[name] for s in shards])

        return cls(
            folder,
            manifest,
            tuple(Site.parse(s) for s in manifest["sites"]),
            shards if again is None else again,
            counts.cumsum(0),
            column("token"),
            column("row"),
            column("position"),
            column("document"),
            column("held_out").bool(),
            column("ordinary").bool(),
            column("kept").bool(),
        )

    @property
    def fingerprint(self) -> str:
        """The content key that this harvest was made under."""
        return self.manifest["key"]

    def index(self, split: str) -> Tensor:
        """Return the token numbers of ``train``, ``held_out`` or ``all``."""
        if split == "all":
            return self.kept_N.nonzero()[:, 0]
        return (self.kept_N & (self.held_out_N == (split == "held_out"))).nonzero()[:, 0]

    def count(self, split: str) -> int:
        """Number of tokens in `split`."""
        return len(self.index(split))

    def documents(self, split: str) -> Tensor:
        """Return the document number of each token of `split`."""
        return self.document_N[self.index(split)]

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """Return streams (N, S, M, D) in float32 of the tokens at indices `index_N` of `split`."""
        return self.at(self.index(split)[index_N])

    def at(self, tokens_N: Tensor) -> Tensor:
        """Return streams (N, S, M, D) in float32 of tokens by number."""
        shard_N = self._shard_of(tokens_N)
        held = getattr(self.shards, "kept", {})  # read shards in memory first, before others replace them
        numbers = sorted(shard_N.unique().tolist(), key=lambda number: (number not in held, number))
        width = self.shards[numbers[0] if numbers else 0]["base"].shape[-1]
        out = torch.empty(len(tokens_N), len(self.sites), 2, width)
        for number in numbers:
            shard, where = self.shards[number], (shard_N == number).nonzero()[:, 0]
            local = tokens_N[where] - self.starts[number]
            base = stored(shard, "base", local)
            out[where, :, BASE] = base
            out[where, :, TUNED] = base + stored(shard, "delta", local)
        return out

    def order(self, split: str, index_N: Tensor, rng: torch.Generator) -> Tensor:
        """Return a random order (N,) of the tokens at indices `index_N` of `split`, as indices into `index_N`.

        If streams are computed again when read, tokens are grouped by as many shards as fit in memory. The shards are
        in random order too.
        """
        order_N = torch.randperm(len(index_N), generator=rng)
        if not isinstance(self.shards, Again) or self.shards.held >= len(self.shards):
            return order_N
        group_K = torch.randperm(len(self.shards), generator=rng) // self.shards.held
        group_N = group_K[self._shard_of(self.index(split)[index_N])]
        return order_N[torch.argsort(group_N[order_N], stable=True)]

    def _shard_of(self, tokens_N: Tensor) -> Tensor:
        return torch.searchsorted(self.starts, tokens_N, right=True) - 1

    def chunks(self, split: str, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (token numbers, streams) of a split in order, `size` tokens at a time."""
        index = self.index(split)
        for part in index.split(size):
            yield part, self.at(part)


def harvest(
    pair: Pair,
    tokens: Tokens,
    sites: Sequence[Site],
    folder: Path,
    settings: HarvestSettings = HarvestSettings(),
    progress: Callable[[int, int], None] | None = None,
) -> Harvest:
    """Run both models over `tokens` and store their streams at `sites`; resumes, and skips what is finished.

    tokens     rows of token ids; the same ids go through both models
    folder     where to write; the manifest comes last
    progress   called with (tokens done, tokens in all)

    Raises NumericsError on non-finite streams, CorpusError if a split is empty, ArtifactError if the folder holds a
    harvest of other models, text, sites or settings.
    """
    sites = sorted(set(sites))
    sides = {tokens.held_out[d] for d in tokens.document_R}
    if len(sides) < 2:
        raise CorpusError(
            "the whole corpus is held out" if True in sides else "the corpus has no held-out part",
            expected="documents in both splits",
            remedy="add documents, or --set corpus.tokens=20000",
        )
    key = key_of(
        SCHEMA, pair.base_fingerprint, pair.tuned_fingerprint, tokens.fingerprint, list(map(str, sites)), settings
    )
    batches, again = list(tokens.batches(settings.batch_tokens)), None
    if settings.store == "none":
        batches = _mixed(batches)
    groups = _group(batches, settings.shard_tokens)
    if settings.store == "none":
        held = stores.HELD_BYTES // (
            settings.shard_tokens * len(sites) * len(STREAMS) * pair.base.width * torch.float32.itemsize
        )
        again = Again(lambda number: _again(pair, groups[number], sites), len(groups), max(1, held))

    def make() -> tuple[dict[str, Any], list[str]]:
        work = Work.at(folder, key)
        total = sum(int(b.mask_BT.sum()) for b in batches)
        median_SM, noise_S = _calibrate(pair, batches, sites)
        done, apart, first, repeats = 0, 0, 0, 0
        document_R, held_D, repeated_R = map(torch.tensor, (tokens.document_R, tokens.held_out, repeated(tokens)))
        names = []
        energy = torch.zeros(2, len(sites), dtype=torch.float64)
        for number, group in enumerate(groups):
            name = f"shard-{number:05d}.safetensors"
            names.append(name)
            if not work.has(name):
                shard = _shard(pair, group, sites, settings, median_SM, repeated_R, document_R, held_D, tokens)
                if again is not None:
                    again.keep(number, {stream: shard.pop(stream) for stream in STREAMS})
                work.write_tensors(name, shard)
            shard = read_tensors(folder / name)
            in_split, ordinary = shard["kept"].bool(), shard["ordinary"].bool()
            apart += int((~ordinary).sum())
            first += int((~ordinary & (shard["position"] == 0)).sum())
            repeats += int((ordinary & ~in_split).sum())
            energy += shard["energy"]
            done += len(in_split)
            if progress:
                progress(done, total)
        kept_tokens = done - apart - repeats
        if not kept_tokens:
            raise NumericsError(
                "every token is an outlier or a repeat",
                got=f"{apart} and {repeats} tokens",
                expected=f"stream norms within {settings.abnormal:g} times the median",
                remedy=f"--set harvest.abnormal={10 * settings.abnormal:g}",
            )
        return {
            "sites": [str(s) for s in sites],
            "settings": settings,
            "shards": names,
            "base": pair.base_fingerprint,
            "tuned": pair.tuned_fingerprint,
            "corpus": tokens.fingerprint,
            "tokens": done,
            "repeats": repeats,
            "set_apart": apart,
            "set_apart_first_position": first,
            "median_norm": median_SM,
            "noise": noise_S,
            "products": kernels.products(pair.base.device),
            "base_energy": energy[0] / kept_tokens,
            "delta_energy": energy[1] / kept_tokens,
        }, names

    return kept(folder, SCHEMA, key, make, lambda: Harvest.open(folder, again))


def _mixed(batches: list[Batch]) -> list[Batch]:
    """Shuffle batches in a fixed order, because training reads a shard at once and its rows would have similar
    lengths."""
    return [batches[at] for at in torch.randperm(len(batches), generator=generator(0, "shards")).tolist()]


def _again(pair: Pair, group: list[Batch], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Compute a shard's streams as they were when it was made."""
    streams = torch.cat([_streams(pair, batch, sites) for batch in group])
    return {"base": streams[:, :, BASE], "delta": streams[:, :, TUNED] - streams[:, :, BASE]}


def _streams(pair: Pair, batch: Batch, sites: Sequence[Site]) -> Tensor:
    return pair.both_streams(batch.ids_BT, sites, batch.mask_BT)[batch.mask_BT].float().cpu()


def _group(batches: list[Batch], shard_tokens: int) -> list[list[Batch]]:
    """Group consecutive batches until each group has at least `shard_tokens` tokens."""
    groups: list[list[Batch]] = [[]]
    size = 0
    for batch in batches:
        if size >= shard_tokens:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += int(batch.mask_BT.sum())
    return groups


def _calibrate(pair: Pair, batches: list[Batch], sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """Return median stream norms (S, M) and the noise floor (S,) on the middle batch; the same on every resume."""
    batch = batches[len(batches) // 2]
    ids, mask = batch.ids_BT[:8], batch.mask_BT[:8]
    streams = pair.both_streams(ids, sites, mask).float()
    return streams[mask].cpu().norm(dim=-1).median(0).values, noise_floor(
        pair.base, ids, mask, sites, streams[:, :, :, BASE]
    ).cpu()


def _shard(
    pair: Pair,
    group: list[Batch],
    sites: Sequence[Site],
    settings: HarvestSettings,
    median_SM: Tensor,
    repeated_R: Tensor,
    document_R: Tensor,
    held_D: Tensor,
    tokens: Tokens,
) -> dict[str, Tensor]:
    """Return streams and facts of each token, and the summed energy (2, S) of base and delta over the tokens kept."""
    parts: dict[str, list[Tensor]] = {}
    for batch in group:
        mask = batch.mask_BT
        rows_B = torch.as_tensor(batch.rows_B)
        row_BT = rows_B[:, None].expand_as(batch.ids_BT)
        position_BT = torch.arange(mask.shape[1])[None].expand_as(batch.ids_BT)
        document_N = document_R[row_BT[mask]]
        streams = _streams(pair, batch, sites)
        finite_NSM = torch.isfinite(streams).all(-1)
        if not finite_NSM.all():
            n, s, m = (~finite_NSM).nonzero()[0].tolist()
            raise NumericsError(
                f"a stream of {MODELS[m]} holds NaN or infinite values",
                expected="finite streams",
                got=f"{sites[s]} at token {position_BT[mask][n]} of a row of {tokens.documents[document_N[n]].id}",
                remedy="--set pair.dtype=float32",
            )
        base, delta = streams[:, :, BASE], streams[:, :, TUNED] - streams[:, :, BASE]
        ordinary = (streams.norm(dim=-1) <= settings.abnormal * median_SM).all(-1).all(-1)
        kept = ordinary & (position_BT[mask] >= repeated_R[row_BT[mask]])
        base, delta, store = in_range(base, delta, ordinary, STORES[settings.store])
        for name, value in {
            **to_store("base", base, store),
            **to_store("delta", delta, store),
            "token": batch.ids_BT[mask].int(),
            "row": row_BT[mask].int(),
            "position": position_BT[mask].int(),
            "document": document_N.int(),
            "held_out": held_D[document_N].to(torch.uint8),
            "kept": kept.to(torch.uint8),
            "ordinary": ordinary.to(torch.uint8),
        }.items():
            parts.setdefault(name, []).append(value)
    shard = {name: torch.cat(values) for name, values in parts.items()}
    shard["energy"] = torch.stack(
        [stored(shard, name, shard["kept"].bool()).double().pow(2).sum((0, 2)) for name in STREAMS]
    )
    return shard
