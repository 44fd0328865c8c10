"""Pairs: a base and a fine-tuned model, loaded and checked to be comparable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tunediff.core.errors import PairError
from tunediff.models.adapters import peft_layers
from tunediff.models.deltas import Delta, Whole, full_deltas, lora_deltas, saved_deltas, unmatched
from tunediff.models.fingerprints import fingerprints, speech_fingerprint
from tunediff.models.loading import check_runtime
from tunediff.models.network import LanguageModel
from tunediff.models.opening import Opened, Opener, changed_rows
from tunediff.models.passes import Start
from tunediff.models.relations import relation
from tunediff.models.vocabulary import FLOOR, Vocabularies, probe_ids
from tunediff.records.diff import WeightsCard
from tunediff.records.relation import Relation
from tunediff.records.site import Site

SAME = 1e-6
"""Difference of logits, relative to the largest, up to which an adapter merged into a copy of base is taken to do nothing:
merging rounds."""


@dataclass(eq=False)
class Pair:
    """Base and tuned, shown to be comparable. ``shared`` says whether one module serves as both (a LoRA over base).

    Tokens are numbered as base does. Numbers below ``vocabulary`` are compared (see `Vocabularies`, which says what is not).
    """

    base: LanguageModel
    tuned: LanguageModel
    shared: bool
    vocabulary: int
    base_fingerprint: str
    tuned_fingerprint: str
    notes: list[str] = field(default_factory=list)
    relation: Relation | None = None

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
        over: str = "",
        allow_unrelated: bool = False,
    ) -> Pair:
        """Load and compare two models.

        base    a local folder, a hub id, a GGUF file, ``default`` (the embedded SmolLM2-135M-Instruct), or a PEFT adapter
        tuned   any of these; an adapter is over base, or, where base is an adapter, over the model that base is over
        dtype   precision of both models' forward passes; in bfloat16 the difference between two light fine-tunes is up
                to 60 % rounding error
        allow_identical   accept identical weights, as a sanity null
        fast    accelerate runs, see `models.fast`
        family  name or import path of the family that reads both networks; empty for what their structure tells
        over    the model that adapters are over; empty for BASE, or the one that an adapter as BASE names
        allow_unrelated   accept a tuned model whose weights do not come from base's

        Raises `SourceError` for what cannot be read, `PairError` for what cannot be compared.
        """
        check_runtime(dtype, device)
        opened = Opener(over, dtype, device, fast, family).pair(base, tuned)
        return cls._compared(opened, allow_identical, allow_unrelated)

    @classmethod
    def of(
        cls, base: LanguageModel, tuned: LanguageModel, allow_identical: bool = False, allow_unrelated: bool = False
    ) -> Pair:
        """Compare two models that are loaded already, each with a network of its own; raises as `load` does."""
        return cls._compared(Opened(base, tuned), allow_identical, allow_unrelated)

    @classmethod
    def _compared(cls, opened: Opened, allow_identical: bool, allow_unrelated: bool) -> Pair:
        base, tuned = opened.base, opened.tuned
        # A network in which PEFT put an adapter is hashed as it was before, as base.
        first = (base.network, False) if opened.shared else (base.module, True)
        base_fingerprint, tuned_fingerprint = fingerprints(first, (tuned.module, True))
        pair = cls(base, tuned, opened.shared, 0, base_fingerprint, tuned_fingerprint, list(opened.notes))
        pair._refuse_other_shapes()
        pair.relation = relation(base, tuned, opened.adapter is not None, opened.doubts)
        if not allow_unrelated:
            pair._refuse_foreign(pair.relation)
        pair._compare(allow_identical)
        return pair

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that encodes text for both models."""
        return self.vocabularies.encoder

    @cached_property
    def vocabularies(self) -> Vocabularies:
        """How the tokens of both models correspond."""
        return Vocabularies.of(self.base, self.tuned)

    def fitting(self, what: str, wanted: int) -> int:
        """How many tokens of at most `wanted` both networks take in a row; a note tells of fewer. `what` is in the plural."""
        most = int(min(self.base.positions, self.tuned.positions, wanted))
        note = f"{what} have at most {most} tokens instead of {wanted}: the networks have no more positions"
        if most < wanted and note not in self.notes:
            self.notes.append(note)
        return most

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

    @cached_property
    def speech_fingerprints(self) -> list[str]:
        """Hashes of how each model's text becomes tokens and where its answers end (see `speech_fingerprint`)."""
        return [speech_fingerprint(side.tokenizer, side.network) for side in (self.base, self.tuned)]

    def _refuse_other_shapes(self) -> None:
        base, tuned = self.base, self.tuned
        for what, of_base, of_tuned in (("depth", base.depth, tuned.depth), ("width", base.width, tuned.width)):
            if of_base != of_tuned:
                raise PairError(
                    f"{base.name} and {tuned.name} differ in {what}",
                    expected=f"{of_base} (base)",
                    got=f"{of_tuned} (tuned)",
                    remedy="give the model that tuned was made from as BASE",
                )

    def _refuse_foreign(self, found: Relation) -> None:
        if not found.is_foreign:
            return
        cosine = "none in common" if found.cosine is None else f"median cosine {found.cosine:.2f}"
        raise PairError(
            f"the weights of {self.tuned.name} do not come from {self.base.name}",
            expected="a model that was made from base",
            got=f"{found.kind}: {cosine} over {found.compared} parameters of equal names and shapes, "
            f"{found.only_base} only in base, {found.only_tuned} only in tuned",
            remedy="give the model that tuned was made from as BASE, or --set pair.allow_unrelated=true",
        )

    def _compare(self, allow_identical: bool) -> None:
        base, tuned, found = self.base, self.tuned, self.vocabularies
        self.vocabulary = found.size
        self.notes += found.notes
        for model in (base, tuned):
            model.check_reading(probe_ids(model.tokenizer, model.vocabulary))
        base.numbering, tuned.numbering = found.base, found.tuned
        ids_BT = found.probes()
        base.fast = tuned.fast = base.fast and tuned.fast  # they may be one network
        same = self.base_fingerprint == self.tuned_fingerprint
        with self.running():
            gap = self._gap(ids_BT)
            if gap <= SAME and not same:
                gap = self._gap(changed_rows(base, tuned, self.vocabulary, ids_BT))
        merged = self.relation is not None and self.relation.kind == "adapter" and not self.shared
        if gap <= (SAME if merged else 0.0) and (same or not found.differ) and not allow_identical:
            raise PairError(
                f"the adapter {tuned.name} changes no logits"
                if self.shared or merged
                else "base and tuned are the same model"
                if same
                else f"{tuned.name} differs from {base.name}, but no logits do",
                expected="a tuned model that differs from base",
                got="equal logits on every probe text" if not gap else f"logits at most {gap:.1g} of the largest apart",
                remedy="--set pair.allow_identical=true to run it as a sanity null",
            )

    def _gap(self, ids_BT: Tensor) -> float:
        """The largest difference of both models' logits on some rows, relative to the largest logit."""
        base, tuned = (side.logits(side.states(ids_BT))[..., : self.vocabulary] for side in (self.base, self.tuned))
        largest = base[base > FLOOR].abs().max()  # not of tokens that are not compared
        return float((base - tuned).abs().max() / largest.clamp_min(1e-30))

    @cached_property
    def common_blocks(self) -> int:
        """Number of lowest blocks that a shared module's adapter leaves alone; both models agree there exactly."""
        if not self.shared:
            return 0
        blocks = set(map(id, self.base.blocks.modules()))
        outside = any(isinstance(m, peft_layers()) and id(m) not in blocks for m in self.base.network.modules())
        touched = list(map(_is_adapted, self.base.blocks))
        return 0 if outside or True not in touched else touched.index(True)

    @cached_property
    def lowest_changed(self) -> int | None:
        """The first block from which streams may differ: 0 where embeddings or the configuration do, None where no
        block's weights differ.

        Other differences (positions, the final norm, the unembedding) are not looked at.
        """
        if self.relation is not None and self.relation.config:
            return 0
        changed: Iterable[bool]
        if self.shared:
            changed = map(_is_adapted, self.base.blocks)
            embedding = _is_adapted(self.base.network.get_input_embeddings())
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
        return None if below is None else Start(below, self.base.streams(ids_BT, [below], wanted_BT=wanted_BT)[:, :, 0])

    def both_streams(self, ids_BT: Tensor, sites: Sequence[Site], wanted_BT: Tensor | None = None) -> Tensor:
        """Return streams (B, T, S, M, D) of both models. Blocks below the first that tuning touched run once, for both.

        wanted_BT   positions whose values will be used, all if None; others may hold anything
        """
        streams: Tensor = self._both(ids_BT, sites, False, wanted_BT)[0]
        return streams

    def both_states(
        self, ids_BT: Tensor, sites: Sequence[Site] = (), wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return base's and tuned's final normed states (B, T, D), and `both_streams` at the sites, from one run of each."""
        streams, base_BTD, tuned_BTD = self._both(ids_BT, sites, True, wanted_BT)
        return base_BTD, tuned_BTD, streams

    def _both(
        self, ids_BT: Tensor, sites: Sequence[Site], final: bool, wanted_BT: Tensor | None
    ) -> tuple[Any, Any, Any]:
        below = Site(self.common_blocks - 1) if self.common_blocks else None
        base: Any
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
        found = full_deltas(self.base, self.tuned)
        return list(self._by_token(found) if self.vocabularies.mapped else found)

    def _by_token(self, deltas: Iterator[Whole]) -> Iterator[Whole]:
        """What differs between tables of tokens whose rows are in another order, token by token."""
        tables = {}
        for table_of in (lambda m: m.network.get_input_embeddings(), lambda m: m.family.unembedding(m.network)):
            both = zip(table_of(self.base).parameters(), table_of(self.tuned).parameters())
            tables.update({id(theirs): ours.data for ours, theirs in both})
        for delta in deltas:
            ours, theirs = tables.get(id(delta.parameter)), delta.parameter.data
            if ours is None:
                yield delta
            elif not torch.equal(base := self.vocabularies.in_order_of_tuned(ours, theirs), theirs):
                yield replace(delta, base=base)

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


def _is_adapted(module: nn.Module) -> bool:
    """Whether PEFT put an adapter into a module."""
    return any(isinstance(part, peft_layers()) for part in module.modules())


def _differ(one: nn.Module, other: nn.Module) -> bool:
    """Whether the weights of two modules differ, in value or in kind."""
    mine, theirs = (dict(module.named_parameters()) for module in (one, other))
    return mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine)
