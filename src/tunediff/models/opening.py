"""Opening two models: each a whole model or an adapter over one, as one module with a switch where that is possible."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunediff.core.errors import PairError, SettingError, SourceError
from tunediff.models.adapters import Adapter, adapter_off, is_tied, merged_copy, with_adapter
from tunediff.models.deltas import MERGE, lora_deltas
from tunediff.models.loading import Loaded, borrowed, check_finite, load_frozen, located
from tunediff.models.network import LanguageModel
from tunediff.models.shipped import BASE_NAME
from tunediff.models.vocabulary import probe_ids


@dataclass(eq=False)
class Opened:
    """Two models that are not compared yet.

    shared    whether one module serves as both, by switching an adapter off and on
    adapter   tuned's adapter over base, whether switched or merged into a copy of base; None for two whole models
    notes     what a user should know of how they were opened
    doubts    what speaks against tuned having been made from base
    """

    base: LanguageModel
    tuned: LanguageModel
    shared: bool = False
    adapter: Adapter | None = None
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Opener:
    """Opens models with the same settings, and each folder once.

    over   the model that adapters are over; empty for the one that an adapter's configuration names
    """

    over: str
    dtype: str
    device: str
    fast: bool
    family: str

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        self.doubts: list[str] = []
        self._whole: dict[Path, Loaded] = {}

    def pair(self, base: str, tuned: str) -> Opened:
        """Open both; raises `SourceError`, `PairError` or `SettingError` for what cannot be."""
        places = [located(name) for name in (base, tuned)]
        first, second = (Adapter.at(place, name) for place, name in zip(places, (base, tuned)))
        if self.over and first is None and second is None:
            raise SettingError(
                "pair.over names a model under adapters, and there is no adapter",
                expected="a PEFT adapter as BASE or TUNED",
                got=f"{base} and {tuned}",
                remedy='--set pair.over=""',
            )
        self.notes += [note for adapter in (first, second) if adapter for note in adapter.notes]
        for adapter, under in ((first, self.over), (second, self.over if first else self.over or base)):
            if adapter and under and adapter.over and not _same_name(adapter.over, under):
                self.doubts.append(
                    f"{adapter.name} says that it was trained on {adapter.over}, and is used over {under}"
                )
        if first is None and second is not None and (not self.over or located(self.over) == places[0]):
            return self._over(base, places[0], second)
        if first and second and not self.over and self._under(first)[1] != self._under(second)[1]:
            raise PairError(
                f"{base} and {tuned} are adapters over different models",
                expected=f"{first.over} (of {base})",
                got=f"{second.over} (of {tuned})",
                remedy="--set pair.over=FOLDER, if both were trained on the model in FOLDER",
            )
        left = self._model(base, places[0], first)
        right = self._model(tuned, places[1], second, left.tokenizer)
        return Opened(left, right, False, None, self.notes, self.doubts)

    def _loaded(self, source: str, place: Path, spare: Any = None) -> Loaded:
        if place not in self._whole:
            self._whole[place] = load_frozen(source, self.dtype, self.device, spare)
            self.notes += self._whole[place].notes
        return self._whole[place]

    def _language_model(self, module: Any, tokenizer: Any, name: str, **more: Any) -> LanguageModel:
        return LanguageModel(module, tokenizer, name, fast=self.fast, family=self.family, **more)

    def _model(self, name: str, place: Path, adapter: Adapter | None, spare: Any = None) -> LanguageModel:
        """A whole model, or an adapter merged into a copy of the model that it is over."""
        if adapter is None:
            loaded = load_frozen(name, self.dtype, self.device, spare)
            self.notes += loaded.notes
            return self._language_model(loaded.module, loaded.tokenizer, name)
        source, under = self._under(adapter)
        loaded = self._loaded(source, under)
        module, tokenizer = self._merged(loaded.module, loaded.tokenizer, adapter.tokenizer(), adapter, source)
        return self._language_model(module, tokenizer, name)

    def _under(self, adapter: Adapter) -> tuple[str, Path]:
        """The name and place of the model that an adapter is over."""
        source = self.over or adapter.over
        try:
            if not source:
                raise SourceError(f"{adapter.name} does not say which model it is over")
            return source, located(source)
        except SourceError as error:
            raise SourceError(
                f"the model that the adapter {adapter.name} is over cannot be found",
                expected="a folder, a hub id, a GGUF file or default",
                got=error.what,
                remedy="--set pair.over=FOLDER, the model that it was trained on",
            ) from None

    def _merged(self, module: Any, tokenizer: Any, own: Any, adapter: Adapter, base: str) -> tuple[Any, Any]:
        """An adapter merged into a copy of its base, with its `own` tokenizer, or base's (with its own chat template) if it has none."""
        rows = adapter.rows(module, own)
        have = module.get_input_embeddings().weight.shape[0]
        ids_BT = probe_ids(own or tokenizer, have).to(self.device)
        merged = merged_copy(module, adapter, base, ids_BT, rows)
        self._tell_untied(is_tied(module), merged, adapter)
        check_finite(adapter.name, merged)
        self.notes.append(
            f"the adapter {adapter.name} ({adapter.kind}) is merged into a copy of {base} and compared as a whole fine-tune"
        )
        if rows > have:
            self.notes.append(
                f"{base} has {have} rows of embeddings and the adapter {adapter.name} {rows}: its copy was enlarged, by the "
                "adapter's rows where it has them and the mean of the others where not"
            )
        return merged, own or borrowed(tokenizer, adapter.folder)

    def _tell_untied(self, tied: bool, module: Any, adapter: Adapter) -> None:
        if tied and not is_tied(module):
            self.notes.append(f"base's embeddings are tied and {adapter.name} changes one of them: tuned has two")

    def _over(self, name: str, place: Path, adapter: Adapter) -> Opened:
        """A whole base and an adapter over it: in one module, or merged into a copy where a switch would not be exact."""
        loaded = self._loaded(name, place)
        module: Any = loaded.module
        tokenizer = loaded.tokenizer
        untouched = self._language_model(module, tokenizer, name)
        own = adapter.tokenizer()
        if not adapter.is_plain(module) or adapter.rows(module, own) > module.get_input_embeddings().weight.shape[0]:
            merged, own = self._merged(module, tokenizer, own, adapter, name)
            return Opened(
                untouched, self._language_model(merged, own, adapter.name), False, adapter, self.notes, self.doubts
            )
        ids_BT = probe_ids(tokenizer, untouched.vocabulary)
        before = untouched.logits(untouched.states(ids_BT))
        tied = is_tied(module)
        wrapped = with_adapter(module, adapter, name)
        self._tell_untied(tied, wrapped, adapter)
        for _ in lora_deltas(wrapped):
            pass  # what is no plain LoRA after all is refused here, before hours are spent on it
        wrapped.to(untouched.device).eval().requires_grad_(False)
        check_finite(adapter.name, wrapped, ".lora_", "modules_to_save")
        base = self._language_model(wrapped, tokenizer, name, switch=adapter_off(wrapped))
        after = base.logits(base.states(ids_BT))
        if not torch.equal(before, after):
            # Some initializations stay in the base's weights when PEFT switches off.
            raise PairError(
                f"{name} does not come back when the adapter {adapter.name} is switched off",
                expected="equal logits",
                got=f"logits up to {float((before - after).abs().max()):.2g} apart",
                remedy=MERGE,
            )
        tuned = self._language_model(wrapped, own or borrowed(tokenizer, adapter.folder), adapter.name)
        return Opened(base, tuned, True, adapter, self.notes, self.doubts)


def _same_name(one: str, other: str) -> bool:
    """Whether two names may be of one model: equal in their last part, whoever's folder or account it is in."""
    names = []
    for name in (one, other):
        parts = Path(name).expanduser().parts
        cached = [
            part.rpartition("--")[2] for part in parts if part.startswith("models--")
        ]  # a folder of the hub's cache
        names.append(cached[-1] if cached else BASE_NAME if name == "default" else parts[-1] if parts else "")
    same = names[0].casefold() == names[1].casefold()
    return same or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def changed_rows(base: LanguageModel, tuned: LanguageModel, vocabulary: int, ids_BT: Tensor) -> Tensor:
    """Return rows of tokens, of the shape of `ids_BT`, on which two models may differ though they do not on `ids_BT`.

    Tokens whose input embeddings differ come first; the rest are spread over the vocabulary. All are known to both.
    """
    count = ids_BT.numel()
    known = torch.arange(vocabulary)
    known = known[base.numbering.knows(known, base.vocabulary) & tuned.numbering.knows(known, tuned.vocabulary)]
    spread = known[torch.linspace(0, len(known) - 1, count).long()]
    if base.network is not tuned.network:
        with contextlib.suppress(AttributeError, NotImplementedError):  # networks that look up no table
            networks: list[Any] = [base.network, tuned.network]
            ours, theirs = (net.get_input_embeddings().weight.data for net in networks)
            differ = ours[base.numbering.ids(known)] != theirs[tuned.numbering.ids(known)]
            moved = known[differ.any(1).cpu()]
            chosen = moved[torch.linspace(0, len(moved) - 1, min(len(moved), count // 2)).long()]
            spread[: len(chosen)] = chosen
    return spread[torch.arange(count).view(ids_BT.shape[1], -1).T]
