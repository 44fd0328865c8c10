"""Sources: what a run reads, the two models and the text, and where it keeps what its stages make."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tunediff.changes.gains import raised_words
from tunediff.core import disk, locks, variants
from tunediff.core.artifacts import sealed_text
from tunediff.core.errors import SettingError
from tunediff.core.progress import Progress, ProgressBar, quiet
from tunediff.harvests.asking import among, ends_of_turn
from tunediff.harvests.contrasts import Contrast, contrast
from tunediff.harvests.eliciting import Elicited, elicit
from tunediff.models.deltas import MAP
from tunediff.models.pair import Pair
from tunediff.models.shipped import DEMO
from tunediff.records.diff import StageCard
from tunediff.records.site import Site
from tunediff.runs import corpora
from tunediff.runs.keeping import Keeper, stage
from tunediff.runs.plan import Plan
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens

WORDS_READ = 64
"""Number of prompts whose answers tell an elicitor which words tuned raises."""
LONGEST = 640
"""Longest answer, with its prompt, that is read for them, in tokens."""


@dataclass(eq=False)
class Sources:
    """One plan, its models and its text.

    folder     runs/NAME; every stage keeps a folder ``STAGE/KEY`` in it, KEY from all that the result depends on
    progress   called with (stage, done, total) as work goes on
    given      a pair already loaded, in place of the plan's; its fingerprints must tell it from others
    """

    plan: Plan
    folder: Path
    progress: Progress = quiet
    given: Pair | None = None

    def __post_init__(self) -> None:
        self.keeper = Keeper(self.folder)
        disk.update_bytes(self.folder / "plan.toml", sealed_text(self.plan.to_toml()).encode())
        disk.sweep(self.folder)
        locks.sweep(self.folder)
        if self.plan.runtime.threads:
            torch.set_num_threads(self.plan.runtime.threads)

    @property
    def cards(self) -> list[StageCard]:
        """A card for each stage that was asked for, in the order of their ends."""
        return self.keeper.cards

    @cached_property
    def pair(self) -> Pair:
        """Both models, loaded and checked."""
        if self.given is not None:
            self._check_sites(self.given)
            return self.given
        began = time.monotonic()
        plan = self.plan
        self.progress("load", 0, 1)
        tuned = str(DEMO) if plan.tuned == "demo" else plan.tuned
        pair = Pair.load(
            plan.base,
            tuned,
            dtype=plan.pair.dtype,
            device=plan.runtime.device,
            allow_identical=plan.pair.allow_identical,
            fast=plan.runtime.fast,
            family=plan.pair.family,
            over=plan.pair.over,
            allow_unrelated=plan.pair.allow_unrelated,
        )
        self._check_sites(pair)
        self.progress("load", 1, 1)
        self.cards.append(StageCard("load", "", round(time.monotonic() - began, 2), list(pair.notes)))
        return pair

    def _check_sites(self, pair: Pair) -> None:
        """Raise `SettingError` for a site that the networks do not have, before any text is written or read."""
        depth = pair.base.depth
        for site in map(Site.parse, self.plan.scan.sites):
            if site.layer >= depth:
                last = Site(depth - 1, site.kind)
                raise SettingError(
                    f"{pair.base.name} has no {site}",
                    expected=f"{Site(0, site.kind)} to {last}",
                    remedy=f"--set scan.sites={last}",
                )

    @property
    def _models(self) -> list[Any]:
        """What results depend on of the models, for content keys."""
        pair = self.pair
        named = [pair.base_fingerprint, pair.tuned_fingerprint, pair.speech_fingerprints, self.plan.pair.dtype]
        family = self.plan.family()
        return [*named, self.plan.pair.family, *variants.identity(family)] if family else named

    @cached_property
    def _beyond(self) -> list[Any]:
        """For content keys: the parameters that differ and that random tunes and edits of 0.1.0 left alone."""
        inside = {id(module) for module in self.pair.tuned.blocks.modules()}
        whole = (delta for delta in self.pair.deltas() if delta.up is None)
        beyond = sorted(delta.name for delta in whole if delta.kind != MAP or id(delta.reader) not in inside)
        return [beyond] if beyond else []

    @cached_property
    def _corpora(self) -> tuple[Corpus, Corpus]:
        """The text and the prompts."""
        began = time.monotonic()
        read = corpora.read(self.plan.corpus, self.plan.contrast.prompts)
        notes = [str(remark) for corpus in read for remark in corpus.remarks]
        self.cards.append(StageCard("corpus", "", round(time.monotonic() - began, 2), notes))
        if notes and isinstance(self.progress, ProgressBar):
            self.progress.say("text    " + "; ".join(notes))
        return read

    @property
    def corpus(self) -> Corpus:
        """The text that is not written by the models."""
        return self._corpora[0]

    @property
    def prompts(self) -> Corpus:
        """The prompts of contrastive text."""
        return self._corpora[1]

    @cached_property
    def template(self) -> ChatTemplate:
        """The form in which both models are asked and chats are read."""
        p, base, tuned = self.plan.pair, self.pair.base.tokenizer, self.pair.tuned.tokenizer
        return ChatTemplate.chosen(p.template, base, tuned, p.template_options, p.date, p.template_seconds)

    @stage
    def answers(self) -> Contrast:
        """Both models' answers to the same prompts, kept as JSON."""
        plan = self.plan
        if not plan.contrast.prompts:
            return Contrast([])
        prompts = self.prompts
        asked = min(plan.contrast.prompts, len(prompts.documents))
        total = (2 * asked + plan.contrast.amplified_of(asked)) * plan.contrast.tokens
        done = 0

        def progress(new: int) -> None:
            nonlocal done
            done += new
            self.progress("contrast", done, total)

        form = [self.template.fingerprint, sorted(ends_of_turn(self.pair, self.template))]
        place = self.keeper.at("contrast", self._models, prompts.fingerprint, plan.contrast, plan.seed, form)
        kept: Contrast = self.keeper.kept_json(
            place,
            Contrast,
            "documents.json",
            lambda _: contrast(self.pair, prompts, plan.contrast, plan.seed, self.template, progress),
            str,
        )
        return kept

    @stage
    def elicited(self) -> Elicited:
        """Questions on which the models' answers differ far more than on everyday ones, with the answers."""
        plan, answers = self.plan, self.answers.documents
        elicitors = plan.elicitors()
        if not (plan.contrast.prompts and plan.elicit.questions and elicitors):
            return Elicited()
        chats = [d for d in answers if d.writer == "base" and not self.prompts.is_held_out(d)]
        own = self.corpus.documents if plan.corpus.paths else ()

        def make(_: Path) -> Elicited:
            read = [d for d in answers if not self.prompts.is_held_out(d)][: 2 * WORDS_READ]
            words: list[str] = []
            if read:
                words = raised_words(self.pair, self.answer_rows(read))
            return elicit(
                self.pair,
                elicitors,
                self.prompts,
                plan.elicit,
                plan.seed,
                self.template,
                words=words,
                chats=chats,
                own=[d for d in own if not self.prompts.is_held_out(d)],
                progress=lambda d, t: self.progress("elicit", d, t),
            )

        form = [self.template.fingerprint, sorted(ends_of_turn(self.pair, self.template))]
        text = [self.prompts.fingerprint, *([self.corpus.fingerprint] if own else [])]
        code = [variants.identity(elicitor) for elicitor in elicitors.values()]
        asked = [d.id for d in answers]
        place = self.keeper.at("elicit", self._models, text, asked, plan.contrast, plan.elicit, plan.seed, form, code)
        kept: Elicited = self.keeper.kept_json(place, Elicited, "elicited.json", make, str)
        return kept

    def answer_rows(self, answers: Sequence[Document]) -> Tokens:
        """Answers to prompts as rows of token ids, each on its prompt's side of the split."""
        room = self.pair.fitting("answers", LONGEST)
        return among(self.prompts, answers).tokens(self.pair.tokenizer, row_tokens=room, template=self.template)

    @property
    def contrast(self) -> list[Document]:
        """Contrastive text: the answers of both models to the same prompts, where `elicit.joins` also to questions found."""
        return [*self.answers.documents, *(self.elicited.documents if self.plan.elicit.joins else ())]

    @cached_property
    def tokens(self) -> Tokens:
        """Corpus text up to its limit, and all contrastive text, as rows of token ids."""
        c, tokenizer = self.plan.corpus, self.pair.tokenizer
        row_tokens = self.pair.fitting("rows of text", c.row_tokens)
        form: dict[str, Any] = {"row_tokens": row_tokens, "template": self.template}
        tokens = self.corpus.tokens(tokenizer, limit_tokens=c.tokens, **form).used()
        if self.contrast:
            whole = dataclasses.replace(self.corpus, documents=tokens.documents).plus(self.contrast)
            written = dataclasses.replace(whole, documents=whole.documents[len(tokens.documents) :])
            tokens = tokens.then(written.tokens(tokenizer, **form))
        fit, notes = self.pair.vocabularies.read_by_both(tokens, tokenizer, self.plan.pair.shared_text)
        self._tell([*map(str, (*tokens.remarks, *self.answers.remarks, *self.elicited.remarks)), *notes])
        return fit

    def _tell(self, remarks: list[str]) -> None:
        """Say on a card, and where something was adapted or left out on the terminal too, what form chats have."""
        said = [f"chats in {self.template}"]
        if self.template.is_dated:
            said.append(f"it is told that today is {self.template.date} (pair.date)")
        if self.pair.tokenizer is not self.pair.base.tokenizer:
            said.append("text in tuned's tokenizer, which knows tokens of its chat template that base's lacks")
        self.cards.append(StageCard("text", "", 0.0, [*said, *remarks]))
        if isinstance(self.progress, ProgressBar) and (remarks or self.template.origin != "base"):
            self.progress.say("text    " + "; ".join([*said, *remarks]))

    @property
    def written(self) -> tuple[str, ...]:
        """The kind of text that the models wrote; empty, which is every kind, unless both sides of the split hold it."""
        return ("contrastive",) if len({*map(self.corpus.is_held_out, self.contrast)}) == 2 else ()

    @property
    def plain(self) -> tuple[str, ...]:
        """The kinds of text that the models did not write."""
        return tuple(sorted({d.kind for d in self.tokens.documents} - {"contrastive"}))
