"""Models: run one network, read and write its streams at sites, and go on from a site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.errors import FamilyError
from tunediff.kernels.matmuls import fast_matmul
from tunediff.models.families.base import family_of
from tunediff.models.fast import accelerated, forget
from tunediff.models.passes import Form, Forms, Start, Stop, Watch, cached, first, replaced, with_first
from tunediff.models.reading import check
from tunediff.models.vocabulary import IN_PLACE
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
        some = next(module.parameters())
        self.device, self.dtype = some.device, some.dtype
        self.shares_prefixes = False
        """Whether rows may share the run of a prefix; `check_reading` says so."""
        self.pads = True
        """Whether padding on the left, under a mask, leaves what follows as it is; `check_reading` says so."""
        self.caches = True
        """Whether completions may go on from what was kept of the tokens before; `check_reading` says so."""
        self.resumes = True
        """Whether blocks below a start may be left out; `check_reading` says otherwise where others need more of them."""
        self.numbering = IN_PLACE
        """How tokens are numbered that are given and answered; a pair whose vocabularies differ sets it."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width D of the stream between blocks."""
        return self.forms.blocks[0].width

    @property
    def positions(self) -> float:
        """How many tokens a row may have."""
        return self.family.positions(self.network)

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
        ids_BT = self.numbering.ids(ids_BT).to(self.device)
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
        early = self.forms.once and not final  # what blocks put out is found before any hook is there
        with ExitStack() as stack:
            self._skip_to(stack, start)
            for site in sites:

                def hook(module: nn.Module, arguments: tuple, output: Any, site: Site = site) -> None:
                    found[site] = self._stream(site, output)
                    if early and len(found) == len(set(sites)):
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
        kept = {"use_cache": False} if cache is None else {"use_cache": True, **cached(self.network, cache)}
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
        for layer in range(start.site.layer + 1) if self.resumes else ():
            # The network's own forward still prepares masks and positions, whatever its family.
            def skip(*given: Any, form: Form = self.forms.blocks[layer], **named: Any) -> Any:
                hidden = next(iter((*given, *named.values())))
                return form.output(start.stream_BTD.to(hidden.device, hidden.dtype))

            stack.enter_context(replaced(self.blocks[layer], "forward", skip))
        if not self.resumes:
            stack.enter_context(self.writing(start.site, lambda stream_BTD: start.stream_BTD.to(stream_BTD)))

    @cached_property
    def forms(self) -> Forms:
        """What the blocks put out."""
        with torch.inference_mode():
            return Forms.of(self.network, self.blocks)

    def _stream(self, site: Site, output: Any) -> Tensor:
        return self.forms.blocks[site.layer].stream(output) if site.kind == "resid" else first(output)

    def logits(self, states_ND: Tensor) -> Tensor:
        """Return logits (..., V) in float32 of final normed states (..., D)."""
        with self.run_context():
            raw = self.family.unembedding(self.network)(states_ND.to(self.device))
            return self.numbering.logits(self.family.scaled_logits(self.network, raw.float()))

    def divergence(self, states_RD: Tensor, logp_QV: Tensor, theirs: bool) -> Tensor | None:
        """Return the divergence in nat (R,) of the distributions at final normed states from a table, without making logits.

        The table's log-probabilities (Q, V) are taken over again, R / Q times. With `theirs` it is the divergence of the
        table from the model. None where `logits` has to be called instead.
        """
        with self.run_context() as shortcuts:
            raw = torch.zeros(1, 1, device=self.device)
            if not (shortcuts and self.numbering is IN_PLACE and self.family.scaled_logits(self.network, raw) is raw):
                return None
            return shortcuts.divergence(
                self.family.unembedding(self.network), states_RD.to(self.device), logp_QV, theirs
            )

    @contextmanager
    def writing(self, site: Site, write: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While inside, what the site puts out is passed through `write` (B, T, D) -> (B, T, D)."""

        def hook(module: nn.Module, arguments: tuple, output: Any) -> Any:
            stream_BTD = write(self._stream(site, output))
            form = self.forms.blocks[site.layer] if site.kind == "resid" else None
            return form.replaced(output, stream_BTD) if form else with_first(output, stream_BTD)

        handle = self._module_at(site).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def check_reading(self, ids_BT: Tensor, tolerance: float = 1e-3) -> None:
        """Refuse a network that cannot be read, and find out what it allows; see `reading.check`."""
        check(self, ids_BT, tolerance)
