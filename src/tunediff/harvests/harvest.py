"""Harvests: both models' streams on exactly the same tokens, on disk as base and delta or run again when they are read, resumable,
read in any order."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunediff import kernels
from tunediff.core.artifacts import (
    finish,
    is_finished,
    key_of,
    open_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from tunediff.core.axes import BASE, MODELS, TUNED
from tunediff.core.chance import generator
from tunediff.core.errors import ArtifactError, CorpusError, NumericsError, SettingError
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.site import Site

if TYPE_CHECKING:
    from tunediff.texts.tokens import Tokens

SCHEMA = "tunediff.harvest/1"
WORK = "work.json"
STORES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "none": torch.float32,
}
STREAMS = ("base", "delta")
HELD = 2 << 30
"""Bytes of streams that are in memory at once, about, where none are on disk."""
SHARED = 32
"""Neighboring values that share one scale in int8 (fewer, where a width is no multiple of it)."""


@dataclass(frozen=True)
class HarvestSettings:
    """How streams are taken and stored."""

    store: str = "float16"
    """Format of base and of delta on disk: float32 keeps delta exactly, float16 to 0.02 %, bfloat16 to 0.16 %, int8 (with a
    scale for every 32 values) to about 1 %. none keeps no streams: both models run again on the text that is read, each time it is
    no longer held in memory."""
    abnormal: float = 6.0
    """Tokens whose stream norm exceeds this multiple of the median (attention sinks) are set apart and counted: lower
    drops ordinary tokens, higher lets a handful own the loss."""
    batch_tokens: int = 2048
    """Tokens a forward; changes speed and the last bits of the streams, so it is part of the key."""
    shard_tokens: int = 8192
    """Tokens a shard file, at least; a killed run loses at most one shard."""

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
    """Mean squared length (S,) of the difference between two runs of one model that only differ in batch shape: all rows
    `together` (B, T, S, D), if that run has been made already, and each alone."""
    together = model.streams(ids_BT, sites).float() if together is None else together
    alone = torch.cat([model.streams(ids_BT[i : i + 1], sites).float() for i in range(len(ids_BT))])
    return ((together - alone).pow(2).sum(-1))[mask_BT].mean(0)


def repeated(tokens: Tokens) -> list[int]:
    """For each row, how many of its leading tokens begin another row too, so that their streams are the same.

    Of such rows one counts as the first: training rows before held-out ones, so that nothing held out has been seen,
    and by document id, so that the order of rows plays no part.
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
            prefix = hash((prefix, token))  # of integers, hence the same in every process
            out[r] += prefix in seen
            seen.add(prefix)
    return out


class Again(Sequence):
    """Shards whose streams are not on disk. One that is read is run again; the `held` that were read last stay."""

    def __init__(self, run: Callable[[int], Mapping[str, Tensor]], count: int, held: int):
        self._run, self._count, self.held = run, count, held
        self.kept: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Mapping[str, Tensor]:
        return self.keep(number, self.kept[number] if number in self.kept else self._run(number))

    def keep(self, number: int, shard: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Hold a shard that has just been run, in the place of the one that was read longest ago."""
        self.kept[number] = shard
        self.kept.move_to_end(number)
        if len(self.kept) > self.held:
            self.kept.popitem(last=False)
        return shard


@dataclass(frozen=True, eq=False)
class Harvest:
    """A finished harvest. Tokens are numbered 0..N-1 over shards; those set apart are left out of both splits.

    ``token_N``, ``row_N``, ``position_N``, ``document_N`` say what each token is; ``held_out_N`` which split it is
    in. `read` gives streams (N, S, M, D) in float32.
    """

    folder: Path
    manifest: dict
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
        """Open a finished folder; tensors are memory-mapped. `again` runs the streams of one that keeps none."""
        manifest = open_folder(folder, SCHEMA)
        shards = [read_tensors(folder / name) for name in manifest["shards"]]
        if again is None and any(name not in shards[0] for name in STREAMS):
            raise ArtifactError(
                f"{folder} keeps no streams",
                expected="a harvest with its streams on disk",
                remedy="the command that made it, which has the models",
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
        """The content key this harvest was made under."""
        return self.manifest["key"]

    def index(self, split: str) -> Tensor:
        """Token numbers of ``train``, ``held_out`` or ``all``."""
        if split == "all":
            return self.kept_N.nonzero()[:, 0]
        return (self.kept_N & (self.held_out_N == (split == "held_out"))).nonzero()[:, 0]

    def count(self, split: str) -> int:
        """How many tokens `split` has."""
        return len(self.index(split))

    def documents(self, split: str) -> Tensor:
        """The document number of each token of `split`."""
        return self.document_N[self.index(split)]

    def read(self, split: str, index_N: Tensor) -> Tensor:
        """Streams (N, S, M, D) in float32 of the tokens at places `index_N` of `split`."""
        return self.at(self.index(split)[index_N])

    def at(self, tokens_N: Tensor) -> Tensor:
        """Streams (N, S, M, D) in float32 of tokens by number."""
        shard_N = self._shard_of(tokens_N)
        held = getattr(self.shards, "kept", {})  # these first: others will take their places
        numbers = sorted(shard_N.unique().tolist(), key=lambda number: (number not in held, number))
        width = self.shards[numbers[0] if numbers else 0]["base"].shape[-1]
        out = torch.empty(len(tokens_N), len(self.sites), 2, width)
        for number in numbers:
            shard, where = self.shards[number], (shard_N == number).nonzero()[:, 0]
            local = tokens_N[where] - self.starts[number]
            base = _stored(shard, "base", local)
            out[where, :, BASE] = base
            out[where, :, TUNED] = base + _stored(shard, "delta", local)
        return out

    def order(self, split: str, index_N: Tensor, rng: torch.Generator) -> Tensor:
        """The tokens at places `index_N` of `split` in random order (N,), as places in `index_N`. Where streams are run again,
        those of as many shards as are held come together, the shards in random order too."""
        order_N = torch.randperm(len(index_N), generator=rng)
        if not isinstance(self.shards, Again) or self.shards.held >= len(self.shards):
            return order_N
        group_K = torch.randperm(len(self.shards), generator=rng) // self.shards.held
        group_N = group_K[self._shard_of(self.index(split)[index_N])]
        return order_N[torch.argsort(group_N[order_N], stable=True)]

    def _shard_of(self, tokens_N: Tensor) -> Tensor:
        return torch.searchsorted(self.starts, tokens_N, right=True) - 1

    def chunks(self, split: str, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """(token numbers, streams) of a split in order, `size` tokens at a time."""
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
    """Run both models over `tokens` and keep their streams at `sites`; resumes, and skips what is finished.

    tokens     rows of token ids; the same ids go through both models
    folder     written here; its manifest comes last
    progress   called with (tokens done, tokens in all)

    Raises `NumericsError` on non-finite streams, `CorpusError` if a split is empty, `ArtifactError` if the folder
    holds a harvest of other models, text, sites or settings.
    """
    sites = sorted(set(sites))
    sides = {tokens.held_out[d] for d in tokens.document_R}
    if len(sides) < 2:
        raise CorpusError(
            "the whole corpus is held out" if True in sides else "the corpus has no held-out part",
            expected="documents in both splits",
            remedy="more documents",
        )
    key = key_of(
        SCHEMA, pair.base_fingerprint, pair.tuned_fingerprint, tokens.fingerprint, list(map(str, sites)), settings
    )
    batches, again = list(tokens.batches(settings.batch_tokens)), None
    if settings.store == "none":
        batches = _mixed(batches)
    groups = _group(batches, settings.shard_tokens)
    if settings.store == "none":
        held = HELD // (settings.shard_tokens * len(sites) * len(STREAMS) * pair.base.width * torch.float32.itemsize)
        again = Again(lambda number: _again(pair, groups[number], sites), len(groups), max(1, held))
    if is_finished(folder):
        done = Harvest.open(folder, again)
        _refuse_other(folder, "a", done.fingerprint, key)
        (folder / WORK).unlink(missing_ok=True)  # a run killed right after its manifest leaves it
        return done
    total = sum(int(b.mask_BT.sum()) for b in batches)
    folder.mkdir(parents=True, exist_ok=True)
    _same_work(folder, key)
    median_SM, noise_S = _calibrate(pair, batches, sites)
    done, apart, first, repeats = 0, 0, 0, 0
    document_R, held_D, repeated_R = map(torch.tensor, (tokens.document_R, tokens.held_out, repeated(tokens)))
    names = []
    energy = torch.zeros(2, len(sites), dtype=torch.float64)
    for number, group in enumerate(groups):
        name = f"shard-{number:05d}.safetensors"
        names.append(name)
        path = folder / name
        if not path.is_file():
            shard = _shard(pair, group, sites, settings, median_SM, repeated_R, document_R, held_D, tokens)
            if again is not None:
                again.keep(number, {stream: shard.pop(stream) for stream in STREAMS})
            write_tensors(path, shard)
        shard = read_tensors(path)
        kept, ordinary = shard["kept"].bool(), shard["ordinary"].bool()
        apart += int((~ordinary).sum())
        first += int((~ordinary & (shard["position"] == 0)).sum())
        repeats += int((ordinary & ~kept).sum())
        energy += shard["energy"]
        done += len(kept)
        if progress:
            progress(done, total)
    kept_tokens = done - apart - repeats
    if not kept_tokens:
        raise NumericsError(
            "every token was set apart as abnormal or a repeat",
            got=f"{apart} and {repeats} tokens",
            expected=f"stream norms within {settings.abnormal:g} times the median",
            remedy="a larger --set harvest.abnormal=",
        )
    finish(
        folder,
        SCHEMA,
        {
            "key": key,
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
        },
        names,
    )
    (folder / WORK).unlink(missing_ok=True)
    return Harvest.open(folder, again)


def _mixed(batches: list) -> list:
    """Batches in random order, always the same: those of one shard are trained on together, and would be of like length."""
    return [batches[at] for at in torch.randperm(len(batches), generator=generator(0, "shards")).tolist()]


def _again(pair: Pair, group: list, sites: Sequence[Site]) -> dict[str, Tensor]:
    """A shard's streams, run as they were when it was made."""
    streams = torch.cat([_streams(pair, batch, sites) for batch in group])
    return {"base": streams[:, :, BASE], "delta": streams[:, :, TUNED] - streams[:, :, BASE]}


def _streams(pair: Pair, batch, sites: Sequence[Site]) -> Tensor:
    return pair.both_streams(batch.ids_BT, sites, batch.mask_BT)[batch.mask_BT].float().cpu()


def _group(batches: list, shard_tokens: int) -> list[list]:
    """Consecutive batches put together until each group has `shard_tokens`."""
    groups: list[list] = [[]]
    size = 0
    for batch in batches:
        if size >= shard_tokens:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += int(batch.mask_BT.sum())
    return groups


def _same_work(folder: Path, key: str) -> None:
    """Refuse to go on with another run's shards: the key of the work in progress is kept beside them."""
    note = folder / WORK
    if note.is_file():
        _refuse_other(folder, "an unfinished", read_json(note)["key"], key)
    else:
        write_json(note, {"key": key})


def _refuse_other(folder: Path, which: str, theirs: str, key: str) -> None:
    if theirs != key:
        raise ArtifactError(
            f"{folder} holds {which} harvest of other models, text, sites or settings",
            expected=f"key {key}",
            got=theirs,
            remedy=f"delete {folder}, or name another folder",
        )


def _calibrate(pair: Pair, batches: list, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """Median stream norms (S, M) and the noise floor (S,) on the first rows; the same on every resume."""
    batch = batches[len(batches) // 2]
    ids, mask = batch.ids_BT[:8], batch.mask_BT[:8]
    streams = pair.both_streams(ids, sites, mask).float()
    return streams[mask].cpu().norm(dim=-1).median(0).values, noise_floor(
        pair.base, ids, mask, sites, streams[:, :, :, BASE]
    ).cpu()


def _shard(pair, group, sites, settings, median_SM, repeated_R, document_R, held_D, tokens) -> dict[str, Tensor]:
    """Streams and what is known of each token, and the summed energy (2, S) of base and delta over the tokens kept."""
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
        store = STORES[settings.store]
        if store is torch.float16:
            limit = torch.finfo(store).max
            if (base[ordinary].abs() > limit).any() or (delta[ordinary].abs() > limit).any():
                raise NumericsError(
                    "a stream is too large for float16",
                    expected=f"at most {limit:.0f}",
                    remedy="--set harvest.store=bfloat16",
                )
            base = base.clamp(-limit, limit)  # only tokens that are set apart
            delta = delta.clamp(-limit, limit)
        for name, value in {
            **_to_store("base", base, store),
            **_to_store("delta", delta, store),
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
        [_stored(shard, name, shard["kept"].bool()).double().pow(2).sum((0, 2)) for name in STREAMS]
    )
    return shard


def _to_store(name: str, value_NSD: Tensor, store: torch.dtype) -> dict[str, Tensor]:
    """Values as they are kept on disk; in int8 with their scales (N, S, D / 32), rounded up so that nothing is cut off."""
    if store is not torch.int8:
        return {name: value_NSD.to(store)}
    groups = value_NSD.unflatten(-1, (-1, math.gcd(SHARED, value_NSD.shape[-1])))
    scale = (groups.abs().amax(-1, keepdim=True) * ((1 + 2**-7) / 127)).bfloat16()
    whole = (groups / scale.float().clamp_min(1e-30)).round()
    return {name: whole.to(store).flatten(-2), f"{name}_scale": scale[..., 0]}


def _stored(shard: dict[str, Tensor], name: str, index_N: Tensor) -> Tensor:
    """Values (N, S, D) of some of a shard's tokens, in float32."""
    value = shard[name][index_N].float()
    if f"{name}_scale" not in shard:
        return value
    scale = shard[f"{name}_scale"][index_N].float()[..., None]
    return (value.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)
