"""Models: run one network, read and write its streams at sites, and go on from a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.errors import FamilyError, NumericsError
from tunediff.kernels.matmuls import fast_matmul
from tunediff.models.families.base import family_of
from tunediff.models.fast import accelerated, forget
from tunediff.models.passes import Start, Stop, Watch, first, replaced, returns_tuple, with_first
from tunediff.records.site import Site


@contextmanager
def swapped(tensors: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """While inside, some parameters hold other values; on leaving each has its own storage back, so not a bit differs."""
    kept = {parameter: parameter.data for parameter in tensors}
    try:
        for parameter, value in tensors.items():
            parameter.data = value.to(parameter.device)
        yield
    finally:
        forget(parameter.data for parameter in kept)
        for parameter, value in kept.items():
            parameter.data = value


class LanguageModel:
    """One side of a pair: a network with its tokenizer, read and written at sites.

    Rows are token ids (B, T), padded on the right. A position never sees what is to its right, so padding needs no
    mask, and what is read at padding means nothing.

    switch   entered around every run: how one module in memory serves as base (adapter off) and as tuned (adapter on)
    fast     accelerate runs (see `models.fast`); without it, every run is the network's own forward pass
    family   name or import path of the family that reads the network; empty for the one that its structure tells
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        switch: Callable[[], AbstractContextManager] = nullcontext,
        fast: bool = True,
        family: str = "",
    ):
        self.module, self.tokenizer, self.name, self.switch, self.fast = module, tokenizer, name, switch, fast
        # PEFT wraps the network; families look at the network itself.
        self.network: nn.Module = module.get_base_model() if hasattr(module, "get_base_model") else module
        self.family, self.family_name = family_of(self.network, family), family
        blocks = self.family.blocks(self.network)
        self.blocks = blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(blocks)
        self.device = next(module.parameters()).device
        self.shares_prefixes = False
        """Whether rows may share the run of a prefix; `check_reading` says so."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width D of the residual stream."""
        return self.family.width(self.network)

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding."""
        return self.family.unembedding(self.network).weight.shape[0]

    def variant(self, name: str, tensors: Mapping[nn.Parameter, Tensor]) -> LanguageModel:
        """This model with other values in some parameters, for as long as each run lasts."""

        @contextmanager
        def switch() -> Iterator[None]:
            with self.switch(), swapped(tensors):
                yield

        variant = copy(self)
        variant.name, variant.switch = name, switch
        return variant

    def running(self) -> AbstractContextManager:
        """A context for many runs, during which nobody writes to weights: what runs make of weights is kept for the next."""
        return accelerated(self.module, hold=True) if self.fast else nullcontext()

    @contextmanager
    def run_context(self) -> Iterator[Any]:
        """The context of one run; yields the shortcuts that it may take, None where it is not accelerated."""
        with torch.inference_mode(), accelerated(self.module) if self.fast else nullcontext() as shortcuts:
            with fast_matmul(self.device) if shortcuts else nullcontext(), self.switch():
                yield shortcuts

    def streams(
        self, ids_BT: Tensor, sites: Sequence[Site], start: Start | None = None, wanted_BT: Tensor | None = None
    ) -> Tensor:
        """Return the streams at the sites (B, T, S, D) in the model's dtype; the run stops after the last site's block.

        start       begin from a known stream instead of the tokens; sites at or below it cannot be read
        wanted_BT   positions whose values will be used, all if None; others may hold anything
        """
        return self.read(ids_BT, sites, False, start, wanted_BT)[0]

    def states(self, ids_BT: Tensor, start: Start | None = None, wanted_BT: Tensor | None = None) -> Tensor:
        """Return the final normed states (B, T, D), which `logits` maps to logits; arguments as of `streams`."""
        return self.read(ids_BT, (), True, start, wanted_BT)[1]

    def streams_and_states(
        self, ids_BT: Tensor, sites: Sequence[Site], start: Start | None = None, wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `streams` and `states` return, from one run."""
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
        """Return streams at the sites, if any, and final normed states, if `final`, from one run; see `streams`."""
        ids_BT = ids_BT.to(self.device)
        with self.run_context() as shortcuts:
            if shortcuts and shortcuts.allows(self):
                return shortcuts.read(self, ids_BT, sites, final, start, wanted_BT, watch)
            return self.run(ids_BT, sites, final, start, watch)

    def run(
        self,
        ids_BT: Tensor,
        sites: Sequence[Site],
        final: bool,
        start: Start | None = None,
        watch: Watch | None = None,
        cache: Any = None,
        **named: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One forward pass of these rows as they are, inside `run_context`; returns what `read` does.

        cache   keys and values to go on from, which the pass adds to
        named   whatever else the network is to be given
        """
        found: dict[Site, Tensor] = {}
        taken: list[Tensor] = []
        with ExitStack() as stack:
            self._skip_to(stack, start)
            for site in sites:

                def hook(module: nn.Module, arguments: tuple, output: Any, site: Site = site) -> None:
                    found[site] = first(output)
                    if len(found) == len(set(sites)) and not final:
                        raise Stop

                stack.callback(self._module_at(site).register_forward_hook(hook).remove)
            if watch:
                self._show(stack, watch)
            if final:
                self._take_final(stack, taken)
            self._forward(ids_BT, cache, **named)
        return torch.stack([found[site] for site in sites], dim=2) if sites else None, taken[0] if final else None

    def _forward(self, ids_BT: Tensor, cache: Any = None, **named: Tensor) -> None:
        """Call the network; hooks take its outputs, and end the pass early where nobody needs the rest."""
        kept = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        try:
            self.network(input_ids=ids_BT.to(self.device), **kept, **named)
        except Stop:
            pass

    def _module_at(self, site: Site) -> nn.Module:
        if site.layer >= self.depth:
            raise FamilyError(f"{self.name} has no {site}", expected=f"a layer below {self.depth}")
        block = self.blocks[site.layer]
        return block if site.kind == "resid" else self.family.part(block, site.kind)

    def _take_final(self, stack: ExitStack, taken: list[Tensor]) -> None:
        """Take the final normed state on its way into the unembedding, which then need not run."""

        def hook(module: nn.Module, arguments: tuple) -> None:
            taken.append(arguments[0])
            raise Stop

        stack.callback(self.family.unembedding(self.network).register_forward_pre_hook(hook).remove)

    def _show(self, stack: ExitStack, watch: Watch) -> None:
        """Let `watch` see the inputs of its modules."""
        weight_CP = watch.weight_BTC.flatten(0, 1).T

        def look(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
            watch.see(module, arguments, named, weight_CP)

        for module in watch.modules:
            stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)

    def _skip_to(self, stack: ExitStack, start: Start | None) -> None:
        """Let the pass begin above ``start.site``: its stream takes the place of the blocks up to it."""
        if start is None:
            return
        if start.site.kind != "resid":
            raise FamilyError(f"a run cannot start from {start.site}", expected="a resid site")
        wrapped = self._returns_tuple  # found before any block is replaced
        for layer in range(start.site.layer + 1):
            # The network's own forward still prepares masks and positions, whatever its family.
            def skip(hidden: Tensor, *rest: Any, last: bool = layer == start.site.layer, **named: Any) -> Any:
                out = start.stream_BTD.to(hidden.device, hidden.dtype) if last else hidden
                return (out,) if wrapped else out

            stack.enter_context(replaced(self.blocks[layer], "forward", skip))

    @cached_property
    def _returns_tuple(self) -> bool:
        return returns_tuple(self.network, self.blocks[0])

    def logits(self, states_ND: Tensor) -> Tensor:
        """Return logits (..., V) in float32 of final normed states (..., D)."""
        with self.run_context():
            raw = self.family.unembedding(self.network)(states_ND.to(self.device))
            return self.family.scaled_logits(self.network, raw.float())

    def divergence(self, states_RD: Tensor, logp_QV: Tensor, theirs: bool) -> Tensor | None:
        """Return the divergence in nat (R,) of the distributions at final normed states from a table, without making logits.

        The table's log-probabilities (Q, V) are taken over again, R / Q times. With `theirs` it is the divergence of the
        table from the model. None where `logits` has to be called instead.
        """
        with self.run_context() as shortcuts:
            raw = torch.zeros(1, 1, device=self.device)
            if shortcuts is None or self.family.scaled_logits(self.network, raw) is not raw:
                return None
            return shortcuts.divergence(
                self.family.unembedding(self.network), states_RD.to(self.device), logp_QV, theirs
            )

    @contextmanager
    def writing(self, site: Site, write: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While inside, what the site puts out is passed through `write` (B, T, D) -> (B, T, D)."""

        def hook(module: nn.Module, arguments: tuple, output: Any) -> Any:
            return with_first(output, write(first(output)))

        handle = self._module_at(site).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def check_reading(self, ids_BT: Tensor, tolerance: float = 1e-3) -> None:
        """Refuse a network whose hooks, resumed pass or unembedding do not give its own logits back.

        Finds on the way whether rows may share prefixes, which not every network's cache allows.

        `tolerance`: largest difference allowed, relative to the largest logit.
        """
        site = Site(self.depth // 2)
        self.shares_prefixes = False
        with self.run_context() as shortcuts:
            own = self.network(input_ids=ids_BT.to(self.device), use_cache=False).logits.float()
        resumed = self.states(ids_BT, Start(site, self.streams(ids_BT, [site])[:, :, 0]))
        error = float((self.logits(resumed) - own).abs().max() / own.abs().max())
        if not torch.isfinite(own).all():
            raise NumericsError(f"{self.name} gives non-finite logits", remedy="load it in float32")
        if error > tolerance:
            raise FamilyError(
                f"{type(self.network).__name__} does not read back right",
                expected=f"error below {tolerance}",
                got=f"{error:.2g}",
                remedy="add a file to families/ for this network",
            )
        if shortcuts and error <= tolerance and self.family.cache(self.network) is not None:
            self.shares_prefixes = shortcuts.is_exact(self, ids_BT, site, tolerance)
