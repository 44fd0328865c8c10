"""Pairs: a base and a fine-tuned model, loaded and checked to be comparable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.errors import PairError
from tunediff.models.deltas import MERGE, Delta, full_deltas, lora_deltas, saved_deltas, unmatched
from tunediff.models.loading import (
    adapter_folder,
    adapter_off,
    check_finite,
    check_runtime,
    fingerprints,
    load_frozen,
    peft_layers,
    with_adapter,
)
from tunediff.models.network import LanguageModel
from tunediff.models.passes import Start
from tunediff.models.vocabulary import Vocabularies, probe_ids
from tunediff.records.diff import WeightsCard
from tunediff.records.site import Site


@dataclass(eq=False)
class Pair:
    """Base and tuned, shown to be comparable. ``shared`` says whether one module serves as both (a LoRA over base).

    Tokens are numbered as base does. Numbers below ``vocabulary`` are compared (see `Vocabularies`, which says what is not);
    `tokenizer` is base's.
    """

    base: LanguageModel
    tuned: LanguageModel
    shared: bool
    vocabulary: int
    base_fingerprint: str
    tuned_fingerprint: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(
        cls,
        base: str,
        tuned: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        allow_identical: bool = False,
        fast: bool = True,
        family: str = "",
    ) -> Pair:
        """Load and compare two models.

        base    a local folder, a hub id, a GGUF file, or ``default`` (the embedded SmolLM2-135M-Instruct)
        tuned   any of these, or a PEFT adapter folder over base; ``default`` again is base itself
        dtype   precision of both models' forward passes; in bfloat16 the difference between two light fine-tunes is up
                to 60 % rounding error
        allow_identical   accept identical weights, as a sanity null
        fast    accelerate runs, see `models.fast`
        family  name or import path of the family that reads both networks; empty for what their structure tells

        Raises `SourceError` for what cannot be read, `PairError` for what cannot be compared.
        """
        check_runtime(dtype, device)
        module, tokenizer = load_frozen(base, dtype, device)
        model = LanguageModel(module, tokenizer, base, fast=fast, family=family)
        adapter = adapter_folder(tuned)
        if adapter:
            pair = cls._over(model, tuned, adapter)
            pair._compare(allow_identical)
            return pair
        other = LanguageModel(*load_frozen(tuned, dtype, device), tuned, fast=fast, family=family)
        return cls.of(model, other, allow_identical)

    @classmethod
    def _over(cls, untouched: LanguageModel, tuned: str, adapter: Path) -> Pair:
        """The pair of a model and an adapter over it, in one module."""
        module, tokenizer, base = untouched.module, untouched.tokenizer, untouched.name
        alike: dict[str, Any] = {"fast": untouched.fast, "family": untouched.family_name}
        ids_BT = probe_ids(tokenizer, untouched.vocabulary)
        before = untouched.logits(untouched.states(ids_BT))
        wrapped = with_adapter(module, adapter, base)
        wrapped.to(untouched.device).eval().requires_grad_(False)
        check_finite(tuned, wrapped, ".lora_", "modules_to_save")
        pair = cls(
            LanguageModel(wrapped, tokenizer, base, adapter_off(wrapped), **alike),
            LanguageModel(wrapped, tokenizer, tuned, **alike),
            True,
            0,
            *fingerprints((module, False), (wrapped, True)),
        )
        after = pair.base.logits(pair.base.states(ids_BT))
        if not torch.equal(before, after):
            # Trained biases and some initializations stay in the base's weights when PEFT switches off.
            raise PairError(
                f"{base} does not come back when the adapter {tuned} is switched off",
                expected="equal logits",
                got=f"logits up to {float((before - after).abs().max()):.2g} apart",
                remedy=MERGE,
            )
        return pair

    @classmethod
    def of(cls, base: LanguageModel, tuned: LanguageModel, allow_identical: bool = False) -> Pair:
        """Compare two models that are loaded already, each with a network of its own; raises as `load` does."""
        pair = cls(base, tuned, False, 0, *fingerprints((base.module, True), (tuned.module, True)))
        pair._compare(allow_identical)
        return pair

    @property
    def tokenizer(self) -> Any:
        """Base's tokenizer; the check on loading showed that tuned's reads shared text alike."""
        return self.base.tokenizer

    @cached_property
    def vocabularies(self) -> Vocabularies:
        """How the tokens of both models correspond."""
        return Vocabularies.of(self.base, self.tuned)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold both networks for many runs, during which nobody writes to weights; cheap where they are held already.

        What runs make of weights is kept for the next one, and given up on leaving, also where an outer hold goes on.
        """
        with self.base.running() as shortcuts, self.tuned.running():
            try:
                yield
            finally:
                if shortcuts:
                    shortcuts.clear()

    def _compare(self, allow_identical: bool) -> None:
        base, tuned = self.base, self.tuned
        for what, of in (("depth", lambda m: m.depth), ("width", lambda m: m.width)):
            if of(base) != of(tuned):
                raise PairError(
                    f"{base.name} and {tuned.name} differ in {what}",
                    expected=f"{of(base)} (base)",
                    got=f"{of(tuned)} (tuned)",
                    remedy="give the model that tuned was made from as BASE",
                )
        found = self.vocabularies
        self.vocabulary = found.size
        self.notes += found.notes
        for model in (base, tuned):
            model.check_reading(probe_ids(model.tokenizer, model.vocabulary))
        base.numbering, tuned.numbering = found.base, found.tuned
        ids_BT = found.probes()
        base.fast = tuned.fast = base.fast and tuned.fast  # they may be one network
        with self.running():
            same = self.base_fingerprint == self.tuned_fingerprint
            if not same:
                gap = (
                    (
                        base.logits(base.states(ids_BT))[..., : self.vocabulary]
                        - tuned.logits(tuned.states(ids_BT))[..., : self.vocabulary]
                    )
                    .abs()
                    .max()
                )
                same = float(gap) == 0.0 and not found.differ
        if same and not allow_identical:
            what = f"the adapter {tuned.name} changes no logits" if self.shared else "base and tuned are the same model"
            raise PairError(
                what,
                expected="a tuned model that differs from base",
                got="equal logits on every probe text",
                remedy="--set pair.allow_identical=true to run it as a sanity null",
            )

    @cached_property
    def common_blocks(self) -> int:
        """Number of lowest blocks that a shared module's adapter leaves alone; both models agree there exactly."""
        if not self.shared:
            return 0
        kinds = peft_layers()
        blocks = set(map(id, self.base.blocks.modules()))
        outside = any(isinstance(m, kinds) and id(m) not in blocks for m in self.base.network.modules())
        touched = [any(isinstance(m, kinds) for m in block.modules()) for block in self.base.blocks]
        return 0 if outside or True not in touched else touched.index(True)

    @cached_property
    def lowest_changed(self) -> int | None:
        """The first block from which streams may differ: 0 where embeddings do, None where no block's weights differ.

        Other differences (positions, the final norm, the unembedding, the configuration) are not looked at.
        """
        if self.shared:
            kinds = peft_layers()
            changed = [any(isinstance(m, kinds) for m in block.modules()) for block in self.base.blocks]
            embedding = any(isinstance(m, kinds) for m in self.base.network.get_input_embeddings().modules())
        else:
            base, tuned = self.base, self.tuned
            ids = torch.arange(self.vocabulary)[slice(None) if (some := self.vocabularies.readable_V) is None else some]
            rows = (m.network.get_input_embeddings().weight[m.numbering.ids(ids)] for m in (base, tuned))
            embedding = not torch.equal(*rows)
            changed = (_differ(one, other) for one, other in zip(base.blocks, tuned.blocks))
        return 0 if embedding else next((number for number, differs in enumerate(changed) if differs), None)

    def common_start(self, ids_BT: Tensor, sites: Sequence[Site] = (), wanted_BT: Tensor | None = None) -> Start | None:
        """Return a start above the blocks that tuning left alone, for runs of tuned and its variants.

        None where there are no such blocks, or a site to be read is not above them.
        """
        below = self._common_site(sites)
        return below and Start(below, self.base.streams(ids_BT, [below], wanted_BT=wanted_BT)[:, :, 0])

    def both_streams(self, ids_BT: Tensor, sites: Sequence[Site], wanted_BT: Tensor | None = None) -> Tensor:
        """Return streams (B, T, S, M, D) of both models. Blocks below the first that tuning touched run once, for both.

        wanted_BT   positions whose values will be used, all if None; others may hold anything
        """
        return self._both(ids_BT, sites, False, wanted_BT)[0]

    def both_states(
        self, ids_BT: Tensor, sites: Sequence[Site] = (), wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return base's and tuned's final normed states (B, T, D), and `both_streams` at the sites, from one run of each."""
        streams, base_BTD, tuned_BTD = self._both(ids_BT, sites, True, wanted_BT)
        return base_BTD, tuned_BTD, streams

    def _both(self, ids_BT: Tensor, sites: Sequence[Site], final: bool, wanted_BT: Tensor | None) -> tuple:
        below = Site(self.common_blocks - 1) if self.common_blocks else None
        base, base_states = self.base.read(ids_BT, [below, *sites] if below else sites, final, None, wanted_BT)
        start = None
        if below:
            base, start = base[:, :, 1:], Start(below, base[:, :, 0])
        own = [s for s, site in enumerate(sites) if not below or site.layer > below.layer]  # below, both are the same
        tuned, tuned_states = base, None
        if own or final:
            streams, tuned_states = self.tuned.read(ids_BT, [sites[s] for s in own], final, start, wanted_BT)
            if len(own) == len(sites):
                tuned = streams
            elif own:
                tuned = base.clone()
                tuned[:, :, own] = streams
        return torch.stack([base, tuned], dim=3) if sites else None, base_states, tuned_states

    def _common_site(self, sites: Sequence[Site]) -> Site | None:
        common = self.common_blocks
        return Site(common - 1) if common and all(site.layer >= common for site in sites) else None

    def deltas(self) -> list[Delta]:
        """Return what tuning changed in every parameter that it touched, in the order of the network."""
        if self.shared:
            return [*lora_deltas(self.tuned.module), *saved_deltas(self.tuned)]
        return list(full_deltas(self.base, self.tuned))

    def weights(self) -> list[WeightsCard]:
        """Return which kinds of parameters differ, largest share of the difference first.

        Each parameter counts with its squared change relative to its own size, so that a norm weighs as much as a matrix.
        What only one of the models has counts in full. Models that differ in no weight differ in what is no weight.
        """
        sizes: dict[str, list[float]] = {}
        for delta in self.deltas():
            sizes.setdefault(delta.kind, []).append(delta.relative)
        kinds = {kind: (len(each), sum(each), True) for kind, each in sizes.items()}
        if not self.shared and (alone := unmatched(self.base, self.tuned)):
            kinds["parameters that only one model has"] = len(alone), float(len(alone)), False
        elif not any(map(any, sizes.values())) and self.base_fingerprint != self.tuned_fingerprint:
            kinds = {"no weights, but other things": (0, 1.0, False)}
        total = sum(size for _, size, _ in kinds.values())
        cards = [
            WeightsCard(kind, count, size / total if total else 0.0, covered)
            for kind, (count, size, covered) in kinds.items()
        ]
        return sorted(cards, key=lambda card: -card.share)

    def random_tuned(self, seed: int) -> LanguageModel:
        """Return a null for tuned: base plus, in every parameter that tuning touched, a random change of the same norm.

        Tokens that tuning added keep their rows, and so does what base has no value of.
        """
        tensors: dict[nn.Parameter, Tensor] = {}
        for delta in self.deltas():
            tensors.update(delta.random(seed))
        return self.tuned.variant(f"random tune {seed}", tensors)


def _differ(one: nn.Module, other: nn.Module) -> bool:
    """Whether the weights of two modules differ, in value or in kind."""
    mine, theirs = (dict(module.named_parameters()) for module in (one, other))
    return mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine)
