"""Models: run one network, read and write its streams at sites, go on from a site, and complete prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core import variants
from tunediff.core.chance import generator
from tunediff.core.errors import FamilyError, NumericsError
from tunediff.kernels.matmuls import fast_matmul
from tunediff.models.completing import amplified, sampler
from tunediff.models.families.base import Family
from tunediff.models.fast.attention import lighten, rotating
from tunediff.models.fast.folds import Fold
from tunediff.models.fast.layers import divergence_of, forget, frozen, kept_meanwhile, quicken
from tunediff.records.site import Site


class _Stop(Exception):
    """Ends a forward whose remaining blocks nobody needs."""


def family_of(module: nn.Module) -> Family:
    """The family that knows `module`, the most specific first; raises `FamilyError` if none does."""
    known = [variants.load("tunediff.models.families", name)() for name in variants.names("tunediff.models.families")]
    matching = sorted((f for f in known if f.matches(module)), key=lambda f: -f.precedence)
    if not matching:
        raise FamilyError(
            f"no family knows {type(module).__name__}",
            expected="a decoder-only causal language model",
            remedy="add a file to families/",
        )
    return matching[0]


def _first(output: Any) -> Tensor:
    """The stream in what a block returns: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, stream: Tensor) -> Any:
    return (stream, *output[1:]) if isinstance(output, tuple) else stream


@contextmanager
def swapped(tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Run with other values in some parameters; on leaving each has its very storage back, so not a bit differs."""
    kept = {parameter: parameter.data for parameter in tensors}
    try:
        for parameter, value in tensors.items():
            parameter.data = value.to(parameter.device)
        yield
    finally:
        forget(parameter.data for parameter in kept)
        for parameter, value in kept.items():
            parameter.data = value


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins that skips the lower blocks: after ``site``'s block, with this stream (B, T, D)."""

    site: Site
    stream_BTD: Tensor

    def part(self, rows: slice, positions: slice) -> Start:
        """The start of some rows' and positions' run."""
        return Start(self.site, self.stream_BTD[rows, positions])


@dataclass(frozen=True, eq=False)
class Watch:
    """Who looks at the inputs of some modules in a run, each position with weights. Positions that share the run of one come
    once, with their weights summed.

    see   told the module, its inputs (B, T, I), which positions have a weight (B, T), and these weights (C, N)
    """

    modules: Sequence[nn.Module]
    weight_BTC: Tensor
    see: Callable[[nn.Module, Tensor, Tensor, Tensor], None]


SHORTEST_PREFIX = 8
"""Positions that all rows of a batch begin with, from which on it pays to run them once."""
PREFIXES = 16
"""Beginnings that are kept at once, the latest; of each its keys and values, and what was asked for."""


class LanguageModel:
    """One side of a pair: a network with its tokenizer, read and written at sites.

    Rows are token ids (B, T), padded on the right; a position never sees what is to its right, so padding needs no
    mask and positions that are padding hold values nobody may use. ``switch`` is entered around every run: it is how
    one module in memory serves as base (adapter off) and as tuned (adapter on).
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, name: str, switch: Callable[[], AbstractContextManager] = nullcontext
    ):
        self.module, self.tokenizer, self.name, self.switch = module, tokenizer, name, switch
        # PEFT wraps the network; families look at the network itself.
        self.network: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.family = family_of(self.network)
        lighten(self.network)
        quicken(self.network)
        self.blocks = self.family.blocks(self.network)
        self.device = next(module.parameters()).device
        self._modules = tuple(self.network.modules())
        self.shares_prefixes = False  # until `check_reading` has seen that it may

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width D of the residual stream."""
        return self.network.config.get_text_config(decoder=True).hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding."""
        return self.family.unembedding(self.network).weight.shape[0]

    def variant(self, name: str, tensors: Mapping[nn.Parameter, Tensor]) -> LanguageModel:
        """This side with other values in some parameters, for as long as each run lasts."""

        @contextmanager
        def switch() -> Iterator[None]:
            with self.switch(), swapped(tensors):
                yield

        variant = copy(self)
        variant.name, variant.switch = name, switch
        return variant

    def _module_at(self, site: Site) -> nn.Module:
        if site.layer >= self.depth:
            raise FamilyError(f"{self.name} has no {site}", expected=f"a layer below {self.depth}")
        block = self.blocks[site.layer]
        return block if site.kind == "resid" else self.family.part(block, site.kind)

    @contextmanager
    def _running(self) -> Iterator[ExitStack]:
        with (
            torch.inference_mode(),
            fast_matmul(self.device),
            rotating(self.network),
            self.switch(),
            ExitStack() as stack,
        ):
            yield stack

    def _forward(self, ids_BT: Tensor, cache: Any = None, **named: Tensor) -> None:
        """One run whose outputs are taken by hooks; it ends early where a hook says so. `cache` is read and added to."""
        kept = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        try:
            self.network(input_ids=ids_BT.to(self.device), **kept, **named)
        except _Stop:
            pass

    def _hook(self, stack: ExitStack, module: nn.Module, hook: Callable) -> None:
        stack.callback(module.register_forward_hook(hook).remove)

    def _take_final(self, stack: ExitStack, taken: list[Tensor]) -> None:
        """Take the final normed state on its way into the unembedding, which then need not run."""

        def hook(module: nn.Module, arguments: tuple) -> None:
            taken.append(arguments[0])
            raise _Stop

        handle = self.family.unembedding(self.network).register_forward_pre_hook(hook)
        stack.callback(handle.remove)

    def _skip_to(self, stack: ExitStack, start: Start | None) -> None:
        """Let the run begin above ``start.site``: the blocks up to it are passed by and its stream takes their place."""
        if start is None:
            return
        if start.site.kind != "resid":
            raise FamilyError(f"a run cannot start from {start.site}", expected="a resid site")
        shape = self._returns_tuple(self.blocks[0])
        for layer in range(start.site.layer + 1):
            block = self.blocks[layer]

            # An instance attribute shadows the class's forward; deleting it restores the block. The model's own
            # forward still prepares masks and positions, whatever its family.
            def skip(hidden: Tensor, *rest: Any, last: bool = layer == start.site.layer, **named: Any) -> Any:
                out = start.stream_BTD.to(hidden.device, hidden.dtype) if last else hidden
                return (out,) if shape else out

            block.forward = skip
            stack.callback(delattr, block, "forward")

    def _spare(self, stack: ExitStack, wanted_BT: Tensor) -> None:
        """Let the last block's MLP run at wanted positions alone; no block is above it that would read the others.

        Where runs start below that block, as on a bench of trials, this is most of what they cost.
        """
        try:
            mlp = self.family.part(self.blocks[-1], "mlp")
        except FamilyError:  # spread over the block itself
            return
        forward, wanted_BT = mlp.forward, wanted_BT.to(self.device)

        def some(*given: Any, **named: Any) -> Any:
            def chosen(value: Any) -> Any:
                return (
                    value[wanted_BT][None]
                    if isinstance(value, Tensor) and value.shape[:2] == wanted_BT.shape
                    else value
                )

            out = forward(*map(chosen, given), **{name: chosen(value) for name, value in named.items()})
            stream = _first(out)
            return _with_first(
                out, stream.new_zeros(*wanted_BT.shape, stream.shape[-1]).masked_scatter_(wanted_BT[..., None], stream)
            )

        mlp.forward = some
        stack.callback(delattr, mlp, "forward")

    def streams(
        self, ids_BT: Tensor, sites: Sequence[Site], start: Start | None = None, wanted_BT: Tensor | None = None
    ) -> Tensor:
        """What the sites hold, (B, T, S, D) in the model's dtype; the run stops after the last site's block.

        start       begin from a known stream instead of the tokens; sites at or below it are not to be had
        wanted_BT   positions whose values will be used, all if None; others may hold anything
        """
        return self.read(ids_BT, sites, False, start, wanted_BT)[0]

    def states(self, ids_BT: Tensor, start: Start | None = None, wanted_BT: Tensor | None = None) -> Tensor:
        """The final normed states (B, T, D), which `logits` maps to logits; `start` and `wanted_BT` as in `streams`."""
        return self.read(ids_BT, (), True, start, wanted_BT)[1]

    def streams_and_states(
        self, ids_BT: Tensor, sites: Sequence[Site], start: Start | None = None, wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both of what `streams` and `states` give, from one run."""
        return self.read(ids_BT, sites, True, start, wanted_BT)

    def read(
        self,
        ids_BT: Tensor,
        sites: Sequence[Site],
        final: bool,
        start: Start | None = None,
        wanted_BT: Tensor | None = None,
        watch: Watch | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Streams at the sites, if any, and final normed states, if `final`, from one run.

        What all rows begin with (a chat's system prompt) is run once and its keys and values kept; of the rest, what some
        rows begin with is run once too. The last block's MLP is run at the wanted positions alone.
        """
        ids_BT = ids_BT.to(self.device)
        with self._running():
            if not self._may_share():
                return self._pass(ids_BT, sites, final, start, watch=watch)
            length = self._common_prefix(ids_BT, start)
            rest = slice(length, None)
            tail_BT, start_tail = ids_BT[:, rest], start and start.part(slice(None), rest)
            fold, wanted_tail = None, None if wanted_BT is None else wanted_BT[:, rest]
            if ids_BT.shape[1] <= self._window:  # a fold's mask is the same in every block
                fold = Fold.of(tail_BT, start_tail and start_tail.stream_BTD, wanted_tail)
            if fold:
                tail_BT = fold.pack(tail_BT)
                wanted_tail = None if wanted_tail is None else fold.total(wanted_tail.cpu().int()) > 0
                start_tail = start_tail and Start(start.site, fold.pack(start_tail.stream_BTD))
            at_head = at_tail = watch
            if watch:
                at_head, weight_BTC = (
                    replace(watch, weight_BTC=watch.weight_BTC[:, :length].sum(0, True)),
                    watch.weight_BTC[:, rest],
                )
                at_tail = replace(watch, weight_BTC=fold.total(weight_BTC) if fold else weight_BTC)
            head, cache = (
                self._prefix(ids_BT[0, :length], len(tail_BT), sites, final, start, at_head) if length else ((), None)
            )
            tail = self._pass(tail_BT, sites, final, start_tail, cache, fold, length, at_tail, wanted_tail)
            if fold:
                tail = tuple(None if t is None else fold.unpack(t) for t in tail)
            return (
                tail
                if not length
                else tuple(
                    None if h is None else torch.cat([h.expand(len(ids_BT), *h.shape[1:]), t], 1)
                    for h, t in zip(head, tail)
                )
            )

    @property
    def _window(self) -> float:
        """How far back every block sees."""
        return getattr(self.network.config.get_text_config(decoder=True), "sliding_window", None) or float("inf")

    def _may_share(self) -> bool:
        """Whether rows may share the run of a beginning: who hooks into a network may count on whole rows."""
        if not self.shares_prefixes:
            return False
        hooks = (hook for m in self._modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
        return all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)

    def _prefix(
        self,
        ids_P: Tensor,
        rows: int,
        sites: Sequence[Site] = (),
        final: bool = False,
        start: Start | None = None,
        watch: Watch | None = None,
        keep: bool = True,
    ) -> tuple[tuple, Any]:
        """What a run gives on a beginning that `rows` rows share, and the keys and values to go on from in each.

        Batch after batch begins alike (with a chat's system prompt), so while weights are frozen the latest are kept, unless
        somebody watches or, as without `keep`, may hook into the run.
        """
        from tunediff.models.fast.caches import repeated

        kept = kept_meanwhile() if keep and watch is None else None
        key = self.network, self.switch, tuple(ids_P.tolist()), tuple(sites), final, start and start.site
        start = start and start.part(slice(0, 1), slice(0, len(ids_P)))
        head, cache, begun = found = kept.pop(key, (None, None, None)) if kept else (None, None, None)
        if cache is None or start and not torch.equal(begun, start.stream_BTD):
            head, cache = self._begin(ids_P, sites, final, start, watch)
            found = head, cache, start and start.stream_BTD.clone()
        if kept is not None:
            kept[key] = found  # the last of them
            for old in list(kept)[:-PREFIXES]:
                del kept[old]
        return head, repeated(cache, rows)

    def _begin(
        self, ids_P: Tensor, sites: Sequence[Site], final: bool, start: Start | None, watch: Watch | None
    ) -> tuple[tuple, Any]:
        """What a run gives on a beginning, and its keys and values."""
        from tunediff.models.fast.caches import cache_of

        cache = cache_of(self.network)
        head = self._pass(ids_P[None], sites, final, start, cache, watch=watch)
        for layer in range(
            start.site.layer + 1 if start else 0
        ):  # masks and positions are made from every layer's length
            nothing = torch.zeros(1, 1, len(ids_P), 1, dtype=next(self.module.parameters()).dtype, device=self.device)
            cache.update(nothing, nothing, layer)
        return head, cache

    def _common_prefix(self, ids_BT: Tensor, start: Start | None) -> int:
        """How many leading positions are the same in all rows, streams to start from included; 0 where it does not pay."""
        if len(ids_BT) < 2:
            return 0
        same_T = (ids_BT == ids_BT[0]).all(0)
        if start is not None:
            # Equal up to the rounding of what is kept in float16.
            gap_BT = (start.stream_BTD - start.stream_BTD[0]).norm(dim=-1)
            same_T = same_T & (gap_BT <= 2**-10 * start.stream_BTD[0].norm(dim=-1)).all(0).to(same_T.device)
        length = min(int(same_T.long().cumprod(0).sum()), ids_BT.shape[1] - 1)
        return length if length >= SHORTEST_PREFIX else 0

    def _pass(
        self,
        ids_BT: Tensor,
        sites: Sequence[Site],
        final: bool,
        start: Start | None,
        cache: Any = None,
        fold: Fold | None = None,
        before: int = 0,
        watch: Watch | None = None,
        wanted_BT: Tensor | None = None,
    ) -> tuple:
        """Streams at the sites and, if `final`, final normed states; None for what is not asked for."""
        named = (
            {}
            if fold is None
            else {
                "position_ids": fold.position_CL.to(self.device) + before,
                "attention_mask": fold.mask(next(self.module.parameters()).dtype, before).to(self.device),
            }
        )
        found: dict[Site, Tensor] = {}
        taken: list[Tensor] = []
        with ExitStack() as stack:
            self._skip_to(stack, start)
            for site in sites:

                def hook(module: nn.Module, arguments: tuple, output: Any, site: Site = site) -> None:
                    found[site] = _first(output)
                    if len(found) == len(set(sites)) and not final:
                        raise _Stop

                self._hook(stack, self._module_at(site), hook)
            if watch:
                seen_BT = (watch.weight_BTC != 0).any(-1).to(self.device)
                weight_CN = watch.weight_BTC[seen_BT.cpu()].T

                def look(module: nn.Module, arguments: tuple) -> None:
                    watch.see(module, arguments[0], seen_BT, weight_CN)

                for module in watch.modules:
                    stack.callback(module.register_forward_pre_hook(look).remove)
            if final:
                self._take_final(stack, taken)
                if wanted_BT is not None and not watch:
                    self._spare(stack, wanted_BT)
            self._forward(ids_BT, cache, **named)
        return torch.stack([found[site] for site in sites], dim=2) if sites else None, taken[0] if final else None

    def _returns_tuple(self, block: nn.Module) -> bool:
        """Whether blocks return a tuple; asked of the network once, by running it on one token."""
        if not hasattr(self, "_tuples"):
            seen: list[bool] = []
            handle = block.register_forward_hook(lambda m, a, output: seen.append(isinstance(output, tuple)))
            try:
                self.network(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
            finally:
                handle.remove()
            self._tuples = seen[0]
        return self._tuples

    def logits(self, states_ND: Tensor) -> Tensor:
        """Logits (..., V) in float32 of final normed states (..., D)."""
        with self._running():
            raw = self.family.unembedding(self.network)(states_ND.to(self.device))
            return self.family.scaled_logits(self.network, raw.float())

    def divergence(self, states_RD: Tensor, logp_QV: Tensor, theirs: bool) -> Tensor | None:
        """KL in nat (R,) of what it says at final normed states from log-probabilities whose rows begin anew, or of those from it if
        `theirs`; None where no more is made than `logits`."""
        with self._running():
            raw = torch.zeros(1, 1, device=self.device)
            if self.family.scaled_logits(self.network, raw) is not raw:
                return None
            return divergence_of(self.family.unembedding(self.network), states_RD.to(self.device), logp_QV, theirs)

    @contextmanager
    def writing(self, site: Site, write: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While inside, what the site puts out is passed through `write` (B, T, D) -> (B, T, D)."""

        def hook(module: nn.Module, arguments: tuple, output: Any) -> Any:
            return _with_first(output, write(_first(output)))

        handle = self._module_at(site).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def check_reading(self, ids_BT: Tensor, tolerance: float = 1e-3) -> None:
        """Refuse a network whose hooks, resumed run or unembedding do not give its own logits back; and see whether rows
        that begin alike may share that beginning's run, which not every network's cache allows.

        `tolerance`: largest difference allowed, relative to the largest logit.
        """
        with self._running():
            own = self.network(input_ids=ids_BT.to(self.device), use_cache=False).logits.float()
        site = Site(self.depth // 2)
        self.shares_prefixes = False
        resumed = self.states(ids_BT, Start(site, self.streams(ids_BT, [site])[:, :, 0]))
        error = float((self.logits(resumed) - own).abs().max() / own.abs().max())
        self.shares_prefixes = error <= tolerance and self._keeps_prefixes(ids_BT, site, tolerance)
        if not torch.isfinite(own).all():
            raise NumericsError(f"{self.name} gives non-finite logits", remedy="load it in float32")
        if error > tolerance:
            raise FamilyError(
                f"{type(self.network).__name__} does not read back right",
                expected=f"error below {tolerance}",
                got=f"{error:.2g}",
                remedy="add a file to families/ for this network",
            )

    def _keeps_prefixes(self, ids_BT: Tensor, site: Site, tolerance: float) -> bool:
        """Whether runs that share a prefix, and of the rest what some rows begin with, and that spare what nobody wants, give
        what whole rows give, from the tokens and from a start."""
        ids_BT = torch.cat([ids_BT[:1, :SHORTEST_PREFIX].expand(len(ids_BT), -1).to(ids_BT), ids_BT], 1)
        other_BT = ids_BT.clone()
        other_BT[:, -2:] = ids_BT[:, -2:].flip(1)
        ids_BT = torch.cat([ids_BT, other_BT])
        wanted_BT = (torch.arange(ids_BT.shape[1]) % 2 == 1).expand(ids_BT.shape)

        def logits() -> Tensor:
            streams_BTSD, states_BTD = self.streams_and_states(ids_BT, [site])
            some_BTD = self.states(ids_BT, Start(site, streams_BTSD[:, :, 0]), wanted_BT)
            return self.logits(torch.cat([states_BTD.flatten(0, 1), some_BTD[wanted_BT]]))

        whole = logits()
        self.shares_prefixes = True
        try:
            return float((logits() - whole).abs().max() / whole.abs().max()) <= tolerance
        except Exception:  # of whatever kind a network's own cache raises; whole rows are always right
            return False

    def _amplifying(
        self, amplification: float, mask_BT: Tensor, prefix_P: Tensor, keep: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A processor of another model's scores while it completes rows with this mask: away from what this one says."""
        from tunediff.models.fast.caches import cache_of

        with self._running():
            cache = (
                self._prefix(prefix_P, len(mask_BT), final=True, keep=keep)[1]
                if len(prefix_P)
                else cache_of(self.network)
            )
        read = len(prefix_P)

        def away(ids_BT: Tensor, score_BV: Tensor) -> Tensor:
            nonlocal read
            whole_BT = torch.nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
            with self._running():
                logit_BV = self.module(
                    input_ids=ids_BT[:, read:],
                    attention_mask=whole_BT,
                    position_ids=(whole_BT.cumsum(1) - 1).clamp_min(0)[:, read:],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            read = ids_BT.shape[1]
            return amplified(score_BV.float(), logit_BV.to(score_BV.device).float(), amplification)

        return away

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        batch: int = 32,
        progress: Callable[[int], None] | None = None,
        against: LanguageModel | None = None,
        amplification: float = 0.0,
    ) -> list[list[int]]:
        """Completions of token-id prompts, up to `tokens` new tokens each, without the end-of-turn token.

        temperature 0 is greedy; above, each is sampled from a stream of its own, which `seed` and its place among the prompts
        say. Prompts are batched by length; what all begin with is run once, and padding stands between it and the rest. The
        answers come back in the prompts' order.

        against, amplification   another model p' on the same token ids: what is sampled then is log p + a (log p - log p'),
                                 over tokens that this model finds plausible
        """
        from transformers import LogitsProcessorList

        from tunediff.models.fast.caches import cache_of

        ends = self.network.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        ends.discard(None)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(ends, default=0)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        answers: list[list[int]] = [[] for _ in prompts]
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "cache_implementation": None}
        keep = self._may_share() and (against is None or against._may_share())
        with frozen(), self._running() as stack:
            # The last position of each prompt lies scattered, and torch would multiply each by a copy of the unembedding.
            whole = self.family.unembedding(self.network).register_forward_pre_hook(
                lambda module, given: (given[0].contiguous(),)
            )
            stack.callback(whole.remove)
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                longest = max(len(prompts[i]) for i in chosen)
                shared = len(os.path.commonprefix([prompts[i][:-1] for i in chosen])) if self.shares_prefixes else 0
                ids = torch.full((len(chosen), longest), pad)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(chosen):
                    for at, part in (
                        (0, prompts[i][:shared]),
                        (longest - len(prompts[i]) + shared, prompts[i][shared:]),
                    ):
                        ids[row, at : at + len(part)] = torch.tensor(part, dtype=torch.long)
                        mask[row, at : at + len(part)] = 1
                ids, mask = ids.to(self.device), mask.to(self.device)
                known: dict[str, Any] = {}
                prefix_P = ids[0, : shared if len(chosen) > 1 else 0]
                if len(prefix_P):
                    known["past_key_values"] = self._prefix(prefix_P, len(chosen), final=True, keep=keep)[1]
                elif self.shares_prefixes:  # whose caches are known to be of that kind
                    known["past_key_values"] = cache_of(self.network)
                known["logits_processor"] = processors = LogitsProcessorList()
                if against is not None:
                    processors.append(against._amplifying(amplification, mask, prefix_P, keep))
                if temperature:
                    processors.append(sampler(temperature, [generator(seed, "answers", i) for i in chosen], tokens))
                out = self.module.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    pad_token_id=pad,
                    repetition_penalty=1.0,
                    **known,
                    **greedy,
                )[:, longest:]
                for row, i in enumerate(chosen):
                    for token in out[row].tolist():
                        if token in ends:
                            break
                        answers[i].append(token)
                if progress:
                    progress(sum(len(answers[i]) for i in chosen))
        return answers
