"""Shared prefixes: what rows of a batch begin with is run once, and what nobody wants is not run at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunediff.core.errors import FamilyError
from tunediff.models.fast.folds import Fold
from tunediff.models.fast.weights import kept
from tunediff.models.passes import Start, Watch, first, replaced, with_first
from tunediff.records.site import Site

if TYPE_CHECKING:
    from tunediff.models.network import LanguageModel

SHORTEST = 8
"""Shortest shared prefix worth caching."""
PREFIXES = 16
"""Most prefixes kept at once, each with its keys and values and what was read of it; the oldest go first."""


Read = tuple[Tensor | None, Tensor | None]
"""What a pass returns: streams at sites, final normed states."""


class Sharing:
    """Passes of a network whose rows share the run of what they begin with. ``modules`` are all of the network's."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules

    def allows(self, model: LanguageModel) -> bool:
        """Whether rows may share a prefix: hooks of other people may count on whole rows."""
        if not model.shares_prefixes:
            return False
        hooks = (hook for m in self.modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
        return all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)

    def read(
        self,
        model: LanguageModel,
        ids_BT: Tensor,
        sites: Sequence[Site],
        final: bool,
        start: Start | None,
        wanted_BT: Tensor | None,
        watch: Watch | None,
    ) -> Read:
        """As `LanguageModel.read`, with less work.

        The prefix of all rows (a chat's system prompt) is run once; of the rest, what some rows begin with is run once
        too. The last block's MLP is run at the wanted positions alone.
        """
        length = _common_prefix(ids_BT, start)
        rest = slice(length, None)
        tail_BT, start_tail = ids_BT[:, rest], start and start.part(slice(None), rest)
        fold, wanted_tail = None, None if wanted_BT is None else wanted_BT[:, rest]
        if ids_BT.shape[1] <= model.family.window(model.network):  # a fold's mask is the same in every block
            fold = Fold.of(tail_BT, start_tail.stream_BTD if start_tail else None, wanted_tail)
        if fold and length + fold.first_CL.shape[1] > model.positions:
            fold = None
        if fold:
            tail_BT = fold.pack(tail_BT)
            wanted_tail = None if wanted_tail is None else fold.total(wanted_tail.cpu().int()) > 0
            start_tail = start_tail and Start(start_tail.site, fold.pack(start_tail.stream_BTD))
        at_head = at_tail = watch
        if watch:
            at_head = replace(watch, weight_BTC=watch.weight_BTC[:, :length].sum(0, True))
            weight_BTC = watch.weight_BTC[:, rest]
            at_tail = replace(watch, weight_BTC=fold.total(weight_BTC) if fold else weight_BTC)
        head: Read = (None, None)
        cache = None
        if length:
            head, cache = self.prefix(model, ids_BT[0, :length], len(tail_BT), sites, final, start, at_head)
        with _spared(model, wanted_tail) if final and wanted_tail is not None and not watch else nullcontext():
            named = fold.inputs(next(model.module.parameters()).dtype, length, model.device) if fold else {}
            tail = model.run(tail_BT, sites, final, start_tail, at_tail, cache, **named)
        if fold:
            tail = _both(fold.unpack, tail)
        if not length:
            return tail
        return _both(lambda h, t: torch.cat([h.expand(len(ids_BT), *h.shape[1:]), t], 1), head, tail)

    def prefix(
        self,
        model: LanguageModel,
        ids_P: Tensor,
        rows: int,
        sites: Sequence[Site] = (),
        final: bool = False,
        start: Start | None = None,
        watch: Watch | None = None,
        keep: bool = True,
    ) -> tuple[Read, Any]:
        """What is read on a prefix of `rows` rows, and a cache from which each of them goes on.

        Batch after batch begins alike, so the latest prefixes are kept while the network is held, unless somebody
        watches or, without `keep`, may hook into the pass.
        """
        from tunediff.models.fast.caches import repeated

        prefixes = kept.prefixes if keep and watch is None and kept.depth else None
        key = model.network, model.switch, tuple(ids_P.tolist()), tuple(sites), final, start and start.site
        start = start and start.part(slice(0, 1), slice(0, len(ids_P)))
        found = prefixes.pop(key, None) if prefixes else None
        if found is None or start and not torch.equal(found[2], start.stream_BTD):
            found = *self._run_prefix(model, ids_P, sites, final, start, watch), start and start.stream_BTD.clone()
        if prefixes is not None:
            prefixes[key] = found  # now the latest
            for old in list(prefixes)[:-PREFIXES]:
                del prefixes[old]
        return found[0], repeated(found[1], rows)

    def _run_prefix(
        self,
        model: LanguageModel,
        ids_P: Tensor,
        sites: Sequence[Site],
        final: bool,
        start: Start | None,
        watch: Watch | None,
    ) -> tuple[Read, Any]:
        cache = self.cache(model)
        head = model.run(ids_P[None], sites, final, start, watch, cache)
        # Masks and positions follow from the length of every layer's keys, those of skipped blocks included.
        for layer in range(start.site.layer + 1 if start and model.resumes else 0):
            nothing = torch.zeros(1, 1, len(ids_P), 1, dtype=next(model.module.parameters()).dtype, device=model.device)
            cache.update(nothing, nothing, layer)
        return head, cache

    def cache(self, model: LanguageModel) -> Any:
        """An empty cache for a network whose caches are known to be shareable; its plain layers grow ahead of need."""
        from tunediff.models.fast.caches import growing

        return growing(model.family.cache(model.network))

    def is_exact(self, model: LanguageModel, ids_BT: Tensor, site: Site, tolerance: float) -> bool:
        """Whether shared prefixes, folds and a spared MLP give what whole rows give, from the tokens and from a start.

        `tolerance`: largest difference of logits allowed, relative to the largest logit. The model shares nothing yet.
        """
        ids_BT = torch.cat([ids_BT[:1, :SHORTEST].expand(len(ids_BT), -1).to(ids_BT), ids_BT], 1)
        other_BT = ids_BT.clone()
        other_BT[:, -2:] = ids_BT[:, -2:].flip(1)
        ids_BT = torch.cat([ids_BT, other_BT])
        wanted_BT = (torch.arange(ids_BT.shape[1]) % 2 == 1).expand(ids_BT.shape)

        def logits() -> Tensor:
            streams_BTSD, states_BTD = model.streams_and_states(ids_BT, [site])
            some_BTD = model.states(ids_BT, Start(site, streams_BTSD[:, :, 0]), wanted_BT)
            return model.logits(torch.cat([states_BTD.flatten(0, 1), some_BTD[wanted_BT]]))

        whole = logits()
        model.shares_prefixes = True
        try:
            return float((logits() - whole).abs().max() / whole.abs().max()) <= tolerance
        except Exception:  # of whatever kind a network's own cache raises; whole rows are always right
            return False
        finally:
            model.shares_prefixes = False


def _both(make: Callable[..., Tensor], *reads: Read) -> Read:
    """Both parts of what passes returned, made into one; None stays None."""
    streams, states = (None if parts[0] is None else make(*parts) for parts in zip(*reads))
    return streams, states


def _common_prefix(ids_BT: Tensor, start: Start | None) -> int:
    """The number of leading positions that all rows share, streams to start from included; 0 where too few to pay."""
    if len(ids_BT) < 2:
        return 0
    same_T = (ids_BT == ids_BT[0]).all(0)
    if start is not None:
        # Equal up to the rounding of what is kept in float16.
        gap_BT = (start.stream_BTD - start.stream_BTD[0]).norm(dim=-1)
        same_T = same_T & (gap_BT <= 2**-10 * start.stream_BTD[0].norm(dim=-1)).all(0).to(same_T.device)
    length = min(int(same_T.long().cumprod(0).sum()), ids_BT.shape[1] - 1)
    return length if length >= SHORTEST else 0


@contextmanager
def _spared(model: LanguageModel, wanted_BT: Tensor) -> Iterator[None]:
    """While inside, the last block's MLP runs at wanted positions alone; no block above it would read the others.

    Where passes start below that block, as on a bench of trials, this is most of what they cost.
    """
    try:
        mlp = model.family.part(model.blocks[-1], "mlp")
    except FamilyError:  # spread over the block itself
        yield
        return
    forward, wanted_BT = mlp.forward, wanted_BT.to(model.device)

    def some(*given: Any, **named: Any) -> Any:
        def chosen(value: Any) -> Any:
            of_rows = isinstance(value, Tensor) and value.shape[:2] == wanted_BT.shape
            return value[wanted_BT][None] if of_rows else value

        out = forward(*map(chosen, given), **{name: chosen(value) for name, value in named.items()})
        stream = first(out)
        whole = stream.new_zeros(*wanted_BT.shape, stream.shape[-1])
        return with_first(out, whole.masked_scatter_(wanted_BT[..., None], stream))

    with replaced(mlp, "forward", some):
        yield
