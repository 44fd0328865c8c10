"""Stages: a plan carried out, each stage in a content-keyed folder of its own, what is finished skipped."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, Callable, Sequence

import torch

from tunediff import __version__
from tunediff.edits import bills
from tunediff.edits import reverting as edits
from tunediff.core import variants
from tunediff.core.artifacts import (
    finish,
    is_finished,
    key_of,
    open_folder,
    plain,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)
from tunediff.changes.attributions import Shift, output_shift
from tunediff.core.axes import BASE, MODELS, TUNED, WRITERS
from tunediff.changes.calibrations import AS_A_PLACEBO, Calibration
from tunediff.core.chance import Interval, bootstrap_ratio, quantile
from tunediff.core.progress import Progress, quiet
from tunediff.core.text import visible
from tunediff.records.change import Change, load_changes, save_changes
from tunediff.harvests.contrasts import contrast
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens
from tunediff.core.errors import SettingError
from tunediff.core.typed import typed
from tunediff.changes.examples import caused_tokens, contexts, kind_rates, lens_tokens
from tunediff.changes.finders.base import View
from tunediff.dictionaries.fitted import Fitted
from tunediff.harvests.harvest import Harvest, harvest
from tunediff.dictionaries.latent_scaling import latent_scaling
from tunediff.harvests.lenses import Lens, fit_lens
from tunediff.models.fast.layers import clear, frozen
from tunediff.models.pair import Pair
from tunediff.models.shipped import DEMO
from tunediff.runs.plan import Plan, to_record
from tunediff.changes.rankings import Ranked, Ranking, rank
from tunediff.records.diff import Bill, ChangeRecord, CorpusCard, Diff, FitCard, ModelCard, NullCard, SiteScan, StageCard
from tunediff.records.measure import Measure, SignalTable

from tunediff.harvests.samples import Sample
from tunediff.changes.signals.base import read as read_signals
from tunediff.harvests.scans import candidate_sites, choose, scan
from tunediff.records.site import Site
from tunediff.changes.trials.base import Spread, bench_of

class stage(cached_property):
    """A stage: run once, and nobody writes to the networks' weights meanwhile. What is kept of them makes room for the next stage, which
    begins the same whether this one ran or was found done."""

    def __get__(self, run: "Run | None", owner: type | None = None) -> Any:
        with frozen():
            got = super().__get__(run, owner)
            clear()
            return got


@dataclass(eq=False)
class Run:
    """One plan and its folder. A stage is run by reading the property or method of its name; it runs what it needs.

    folder     runs/NAME; every stage keeps a folder ``STAGE/KEY`` in it, KEY from all that the result depends on
    progress   told (stage, done, total) as work goes on
    given      a pair already loaded, in place of the plan's; its fingerprints must tell it from others
    """

    plan: Plan
    folder: Path
    progress: Progress = quiet
    given: Pair | None = None

    def __post_init__(self) -> None:
        self.cards: list[StageCard] = []
        self._edits: dict[tuple[str, ...], tuple[edits.Edit, list[edits.Edit]]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / "plan.toml", self.plan.to_toml().encode())
        if self.plan.runtime.threads:
            torch.set_num_threads(self.plan.runtime.threads)

    # -- what stages share -------------------------------------------------------------------------------------

    def _at(self, stage: str, *parts: Any) -> tuple[str, Path]:
        key = key_of(stage, __version__, *parts)
        return key, self.folder / stage / key

    def _done(self, stage: str, key: str, began: float, *notes: str) -> None:
        """Keep what the stage took, of the run that made it, beside its result."""
        note = self.folder / stage / key / "took.json"
        if note.is_file():
            seconds = read_json(note)["seconds"]
        else:
            seconds = round(time.monotonic() - began, 2)
            note.parent.mkdir(parents=True, exist_ok=True)
            write_json(note, {"seconds": seconds})
        card = StageCard(stage, key, seconds, list(notes))
        if card not in self.cards:
            self.cards.append(card)

    @cached_property
    def pair(self) -> Pair:
        """Both models, loaded and checked."""
        if self.given is not None:
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
        )
        self.progress("load", 1, 1)
        self.cards.append(StageCard("load", "", round(time.monotonic() - began, 2), list(pair.notes)))
        return pair

    @property
    def _models(self) -> list[str]:
        return [self.pair.base_fingerprint, self.pair.tuned_fingerprint, self.plan.pair.dtype]

    @cached_property
    def corpus(self) -> Corpus:
        """The text that is not written by the models."""
        c = self.plan.corpus
        if c.paths:
            return Corpus.from_files(c.paths, kind=c.kind or None, held_out_share=c.held_out_share, seed=c.split)
        return Corpus.default(held_out_share=c.held_out_share, seed=c.split)

    @property
    def _written(self) -> tuple[str, ...]:
        """The kind of text that the models wrote; empty, which is every kind, where they wrote none."""
        return ("contrastive",) if self.contrast else ()

    @property
    def _plain(self) -> tuple[str, ...]:
        """The kinds of text that the models did not write."""
        return tuple(sorted({d.kind for d in self.tokens.documents} - {"contrastive"}))

    # -- stages ------------------------------------------------------------------------------------------------

    @stage
    def contrast(self) -> list[Document]:
        """Contrastive text, kept as JSON."""
        plan, c = self.plan, self.plan.corpus
        if not plan.contrast.prompts:
            return []
        prompts = (
            Corpus.from_files(c.prompts, held_out_share=c.held_out_share, seed=c.split)
            if c.prompts
            else Corpus.prompts(held_out_share=c.held_out_share, seed=c.split)
        )
        key, folder = self._at("contrast", self._models, prompts.fingerprint, plan.contrast, plan.seed)
        began = time.monotonic()
        if not is_finished(folder):
            told = [0]
            asked = min(plan.contrast.prompts, len(prompts.documents))
            total = (2 * asked + plan.contrast.amplified_of(asked)) * plan.contrast.tokens

            def progress(new: int) -> None:
                told[0] += new
                self.progress("contrast", told[0], total)

            documents = contrast(self.pair, prompts, plan.contrast, plan.seed, progress)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "documents.json", documents)
            finish(folder, "tunediff.contrast/1", {"documents": len(documents)}, ["documents.json"])
        open_folder(folder, "tunediff.contrast/1")
        records = read_json(folder / "documents.json")
        documents = [Document(**{**r, "messages": tuple(map(tuple, r["messages"]))}) for r in records]
        self._done("contrast", key, began, f"{len(documents)} completions")
        return documents

    @cached_property
    def tokens(self) -> Tokens:
        """Corpus text up to its limit, and all contrastive text, as rows of token ids."""
        c, tokenizer = self.plan.corpus, self.pair.tokenizer
        plain = self.corpus.tokens(tokenizer, row_tokens=c.row_tokens, limit_tokens=c.tokens)
        used = [self.corpus.documents[d] for d in sorted(set(plain.document_R))]
        whole = dataclasses.replace(self.corpus, documents=tuple(used)).plus(self.contrast)
        return whole.tokens(tokenizer, row_tokens=c.row_tokens)

    @stage
    def scan(self) -> list[SiteScan]:
        """The scan over depth; the chosen sites are marked."""
        plan = self.plan
        given = [Site.parse(s) for s in plan.scan.sites]
        sites = sorted(set(candidate_sites(self.pair.base.depth, plan.scan.depths)) | set(given))
        kind = "contrastive" if self.contrast else self.tokens.documents[0].kind
        key, folder = self._at("scan", self._models, self.tokens.fingerprint, plan.scan, plan.seed)
        began = time.monotonic()
        if not is_finished(folder):
            few = self.tokens.only(_some(self.tokens, plan.scan.tokens, kind))
            self.progress("scan", 0, 1)
            readings = scan(self.pair, few, sites)
            chosen = given or [choose(readings, plan.scan.reach)]
            folder.mkdir(parents=True, exist_ok=True)
            write_json(
                folder / "scan.json",
                [
                    {
                        "site": str(r.site),
                        "relative": r.relative,
                        "offset_share": r.offset_share,
                        "noise": r.noise,
                        "ceiling": r.ceiling,
                        "chosen": r.site in chosen,
                    }
                    for r in readings
                ],
            )
            finish(folder, "tunediff.scan/1", {}, ["scan.json"])
            self.progress("scan", 1, 1)
        readings = typed(list[SiteScan], read_json(folder / "scan.json"), "scan.json")
        self._done("scan", key, began, "chosen: " + ", ".join(r.site for r in readings if r.chosen))
        return readings

    @property
    def sites(self) -> list[Site]:
        """The sites in use."""
        return [Site.parse(r.site) for r in self.scan if r.chosen]

    @stage
    def harvest(self) -> Harvest:
        """Both models' streams at the sites, on disk."""
        key, folder = self._at(
            "harvest", self._models, self.tokens.fingerprint, list(map(str, self.sites)), self.plan.harvest
        )
        began = time.monotonic()
        done = harvest(
            self.pair, self.tokens, self.sites, folder, self.plan.harvest, lambda d, t: self.progress("harvest", d, t)
        )
        m = done.manifest
        self._done(
            "harvest",
            key,
            began,
            f"{m['tokens']} tokens, {m['repeats']} of them repeats, "
            f"{m['set_apart']} set apart as abnormal ({m['set_apart_first_position']} in first position)",
        )
        return done

    @stage
    def found(self) -> tuple[list[Change], dict[str, Fitted]]:
        """The changes of every finder, and the dictionaries fitted on the way."""
        plan = self.plan
        changes: list[Change] = []
        fits: dict[str, Fitted] = {}
        spec = plan.spec()
        fit = dataclasses.replace(plan.fit, seed=plan.seed)
        for name in plan.find.finders:
            key, folder = self._at(
                "find", self.harvest.fingerprint, name, plan.find.candidates, plan.find.dictionary, spec, fit, plan.seed
            )
            began = time.monotonic()
            fit_folder = folder / "dictionary"
            if not is_finished(folder):
                view = View(
                    self.harvest,
                    folder,
                    plan.seed,
                    plan.find.candidates,
                    spec,
                    fit,
                    lambda: self._shifts.at(self.harvest.index("train")),
                    self.pair,
                    lambda d, t, row: self.progress(f"find {name}", d, t),
                    plan.runtime.device,
                )
                result = variants.load("tunediff.changes.finders", name)().find(view)
                folder.mkdir(parents=True, exist_ok=True)
                files = save_changes(folder, result.changes)
                finish(folder, "tunediff.find/1", {"changes": len(result.changes)}, files)
            mine = load_changes(folder)
            if is_finished(fit_folder):
                fits[name] = Fitted.load(fit_folder, plan.spec.variant)
            changes += mine
            self._done("find", key, began, f"{name}: {len(mine)} candidates")
        return changes, fits

    @stage
    def _shifts(self) -> Shift:
        """How the output moves at every token of the text that the models wrote (of all if they wrote none).

        No stage of its own: its time is part of the stage's that asked first."""
        _, folder = self._at("shift", self.harvest.fingerprint, self._written, self.plan.seed)
        if not is_finished(folder):
            site = next((site for site in reversed(self.sites) if site.kind == "resid"), None)
            shift = Shift.none(len(self.harvest.token_N))
            for some in (self._train(), self.sample) if site else ():
                shift.put(some.token_N, output_shift(self.pair, site, some, self.plan.rank.batch_tokens))
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / "shift.safetensors", vars(shift))
            finish(folder, "tunediff.shift/1", {}, ["shift.safetensors"])
        open_folder(folder, "tunediff.shift/1")
        return Shift(**read_tensors(folder / "shift.safetensors"))

    @cached_property
    def sample(self) -> Sample:
        """Held-out rows on which changes are ranked and verified: of the text that the models wrote (of all if they wrote
        none)."""
        return Sample.take(
            self.harvest, self.tokens, split="held_out", limit=HELD_OUT_TOKENS, seed=self.plan.seed, kinds=self._written
        )

    def _train(self) -> Sample:
        """Training rows of the text that the models wrote (of all if they wrote none)."""
        return Sample.take(
            self.harvest, self.tokens, split="train", limit=10**9, seed=self.plan.seed, kinds=self._written
        )

    @stage
    def ranking(self) -> Ranking:
        """All candidates, ranked."""
        changes = self.found[0]
        key, folder = self._at(
            "rank", self.harvest.fingerprint, [c.id for c in changes], self._found_key, self.plan.rank, self.plan.seed
        )
        began = time.monotonic()
        by_id = {c.id: c for c in changes}
        if not is_finished(folder):
            ranking = rank(
                self.pair,
                changes,
                self.sample,
                self._train(),
                self.plan.rank,
                self.plan.seed,
                lambda d, t: self.progress("rank", d, t),
                [Site.parse(r.site) for r in self.scan],
            )
            folder.mkdir(parents=True, exist_ok=True)
            write_json(
                folder / "ranking.json",
                [
                    {
                        **{f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.name != "change"},
                        "change": r.change.id,
                    }
                    for r in ranking.ranked
                ],
            )
            finish(folder, "tunediff.rank/1", {}, ["ranking.json"])
        records = read_json(folder / "ranking.json")
        ranked = [
            Ranked(
                **{
                    **r,
                    "change": by_id[r["change"]],
                    "null": tuple(r["null"]),
                    **{name: typed(Interval, r[name], name) for name in ("score", "effect")},
                }
            )
            for r in records
        ]
        self._done("rank", key, began, f"{len(ranked)} candidates against {self.plan.rank.nulls} random tunes")
        return Ranking(ranked)

    @property
    def _found_key(self) -> list[Any]:
        p = self.plan
        return [list(p.find.finders), p.find.dictionary, p.find.candidates, p.dictionary, p.fit, p.seed]

    @stage
    def lens(self) -> Lens:
        """A tuned lens of base at the sites."""
        key, folder = self._at("lens", self.harvest.fingerprint)
        began = time.monotonic()
        few = Sample.of(self.harvest, self.tokens, _some(self.tokens, LENS_TOKENS))
        lens = fit_lens(
            self.pair.base,
            self.tokens.only(few.rows),
            self.sites,
            folder,
            abnormal=self.plan.harvest.abnormal,
            sample=few,
            model_fingerprint=self.pair.base_fingerprint,
        )
        self._done("lens", key, began, "R² " + ", ".join(f"{v:.2f}" for v in lens.r2_S.tolist()))
        return lens

    @stage
    def verdicts(self) -> list[ChangeRecord]:
        """Every ranked change as a record; the first few put on trial."""
        plan, ranking = self.plan, self.ranking
        self.lens  # now, so that a run that finds its verdicts done lists the same stages
        key, folder = self._at(
            "verify",
            self.harvest.fingerprint,
            self._found_key,
            plan.rank,
            plan.verify,
            plan.seed,
            [(r.change.id, r.p, r.score.value) for r in ranking.ranked],
        )
        began = time.monotonic()
        if not is_finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # What does no more than random tunes do is refuted already.
            chosen = [r for r in ranking.ranked[: plan.verify.changes] if self._stands_out(r)]
            spread, scales = self._spread(), self._latent_scales()
            records = []
            for number, ranked in enumerate(ranking.ranked):
                # A trial is kept as soon as it is over, so that a killed run loses one at most.
                path = folder / f"trial-{number:03d}.json"
                if not path.is_file():
                    record = self._try(number, ranked, ranked in chosen, spread)
                    write_json(path, dataclasses.replace(record, measures=record.measures + scales.get(record.id, [])))
                records.append(read_json(path))
                if chosen:
                    self.progress("verify", min(number + 1, len(chosen)), len(chosen))
            write_json(folder / "verdicts.json", records)
            finish(folder, "tunediff.verify/1", {}, ["verdicts.json"])
        records = typed(list[ChangeRecord], read_json(folder / "verdicts.json"), "verdicts.json")
        if self.calibration:  # evidence is kept as it is; only what is claimed of it changes with what nulls do
            records = list(map(self.calibration.judged, records))
        tried = sum(map(self._stands_out, ranking.ranked[: plan.verify.changes]))
        self._done("verify", key, began, f"{tried} changes on trial")
        return records

    def _latent_scales(self) -> dict[str, list[Measure]]:
        """Latent Scaling on held-out text of those changes that are latents of a dictionary, by change."""
        out = {}
        for name, fitted in self.found[1].items():
            of = {
                r.change.origin["latent"]: r.change.id
                for r in self.ranking.ranked
                if r.change.finder == name and "latent" in r.change.origin
            }
            scales = latent_scaling(
                fitted, self.harvest, doc_N=self.harvest.documents("held_out"), latents=sorted(of), seed=self.plan.seed
            )
            for scale in scales:
                nus = (("error", scale.nu_error), ("reconstruction", scale.nu_reconstruction))
                out[of[scale.latent]] = [
                    Measure(
                        f"Latent Scaling, {part}",
                        nu.value if isfinite(nu.value) else None,
                        nu.low,
                        nu.high,
                        "need in base / in tuned",
                        1.0,
                        f"a latent that base needs as much; verdict: {scale.kind}",
                    )
                    for part, nu in nus
                ]
        return out

    @cached_property
    def calibration(self) -> Calibration | None:
        """What `calibrate` measured on this base; None if it was never run on it."""
        return Calibration.of(self.pair.base_fingerprint)

    def _stands_out(self, ranked: Ranked) -> bool:
        return ranked.p <= self.plan.rank.level

    def _spread(self) -> dict[Site, Spread]:
        """For each site how the difference spreads on training tokens."""
        x_NSMD = self.harvest.at(self.harvest.index("train")[:20_000])
        return {site: Spread.of(x_NSMD[:, s, TUNED] - x_NSMD[:, s, BASE]) for s, site in enumerate(self.harvest.sites)}

    def _try(self, number: int, ranked: Ranked, on_trial: bool, spread: dict[Site, Spread]) -> ChangeRecord:
        plan, change, tokenizer = self.plan, ranked.change, self.pair.tokenizer
        stands_out = self._stands_out(ranked)
        measures = [
            Measure(
                "effect on the output",
                ranked.effect.value,
                ranked.effect.low,
                ranked.effect.high,
                "nat a token",
                None,
                "taken out alone on training text; no control of its own: orders the changes that stand out",
            ),
            Measure("tokens on", ranked.share_of_tokens, unit="share", against=f"{ranked.firings} held-out tokens"),
        ]
        decision, reason, dose, promoted, suppressed, read_by = "undecided", "", [], [], [], ""
        if not stands_out:
            decision = "refuted"
            reason = f"random tunes of the same size do as much (p = {ranked.p:.2g})"
        bench = None
        if on_trial:
            others = [r.change for r in self.ranking.ranked if r.change.finder in (change.finder, "mean_difference")]
            bench = bench_of(self.pair, change, others, self.sample, spread[change.sites[-1]], plan.verify, plan.seed)
        if bench is not None:
            outcomes = {
                name: variants.load("tunediff.changes.trials", name)().run(bench, plan.verify)
                for name in variants.names("tunediff.changes.trials")
            }
            for outcome in outcomes.values():
                measures += outcome.measures
                dose += outcome.dose
            patch = outcomes["patch"]
            if stands_out:
                decision = {True: "confirmed", False: "refuted", None: "undecided"}[patch.speaks]
                reason = patch.reason
            # Words are read off more text than the change is tried on: this takes one run, not one for every control.
            wide = dataclasses.replace(plan.verify, documents=READ_DOCUMENTS, scored=READ_SCORED)
            promoted, suppressed = caused_tokens(
                tokenizer, bench_of(self.pair, change, [], self.sample, spread[change.sites[-1]], wide, plan.seed)
            )
            read_by = (
                "what tuned says more and less of because of it (keyness of what is expected on held-out text, nat)"
            )
        elif stands_out:
            reason = "stands out from random tunes, but was not put on trial"
        if not promoted and not suppressed and number < 3 * plan.verify.changes:
            promoted, suppressed = lens_tokens(tokenizer, self.pair.base, self.lens, change)
            read_by = f"tuned lens at {change.sites[-1]} (cosine)"
        score = Measure(
            "energy along the change",
            ranked.score.value,
            ranked.score.low,
            ranked.score.high,
            "x random tunes",
            quantile(ranked.null, 0.95),
            against=f"95th percentile of the best candidate in {len(ranked.null)} random tunes",
            p=ranked.p,
        )
        return ChangeRecord(
            rank=number + 1,
            id=change.id,
            finder=change.finder,
            sites=[str(s) for s in change.sites],
            share=change.share,
            decision=decision,
            reason=reason,
            score=score,
            measures=measures,
            promoted=promoted,
            suppressed=suppressed,
            read_by=read_by,
            contexts=contexts(tokenizer, self.sample, change, self._kl_N) if number < 3 * plan.verify.changes else [],
            depth=ranked.depth,
            kinds=kind_rates(self.sample, change),
            dose=dose,
            origin=change.origin,
        )

    def change(self, id: str) -> Change:
        """The candidate of that id; raises `SettingError` naming the confirmed ones if there is none."""
        by_id = {r.change.id: r.change for r in self.ranking.ranked}
        if id not in by_id:
            confirmed = [r.id for r in self.verdicts if r.decision == "confirmed"]
            raise SettingError(
                f"this run has no change {id!r}", expected=", ".join(confirmed) or "(none was confirmed)"
            )
        return by_id[id]

    def inputs(self, ids: Sequence[str]) -> list[dict[str, edits.Moments]]:
        """What an edit that takes these changes out follows from (see `bills.inputs`), of training text; not kept, as it may be
        as large as the model."""
        seed, changes, train, neutral = self.plan.seed, [self.change(i) for i in ids], self._train(), None
        if self._written and not all(
            train.strength(c).any() for c in changes
        ):  # there such an edit would do nothing, silently
            train = Sample.take(self.harvest, self.tokens, split="train", limit=10**9, seed=seed)
        elif self._written and self._plain:
            neutral = Sample.take(
                self.harvest, self.tokens, split="train", limit=self.plan.edit.tokens // 3, seed=seed, kinds=self._plain
            )
        with frozen():
            return bills.inputs(self.pair, changes, train, neutral, self.plan.edit, seed)

    def edit(self, ids: Sequence[str]) -> tuple[edits.Edit, list[edits.Edit]]:
        """The edit that takes these changes out, and its controls; computed once a run in memory."""
        if tuple(ids) not in self._edits:
            self.progress("revert", 0, 1)
            self._edits[tuple(ids)] = bills.removing(self.pair, ids, self.inputs(ids), self.plan.edit, self.plan.seed)
            self.progress("revert", 1, 1)
        return self._edits[tuple(ids)]

    def afford(self, ids: Sequence[str], cost: float) -> float | None:
        """Let the plan take these changes out as strongly as `cost` allows, in nat a token on held-out neutral text. Returns
        what that costs; None, and nothing changes, where even the weakest edit costs more."""
        if not self._plain or not self.neutral.rows:
            raise SettingError(
                "there is no held-out text that the models did not write",
                expected="neutral text to measure a cost on",
                remedy="a corpus with more documents, or no cost",
            )
        inputs = self.inputs(ids)
        for number, strength in enumerate(STRENGTHS):
            self.progress("afford", number, len(STRENGTHS))
            settings = dataclasses.replace(self.plan.edit, strength=strength)
            alone, _ = bills.removing(
                self.pair, ids, inputs[:1], dataclasses.replace(settings, controls=0), self.plan.seed
            )
            (paid,) = bills.costs(self.pair, [alone], self.neutral)
            if paid <= cost:
                self.progress("afford", len(STRENGTHS), len(STRENGTHS))
                self.plan = dataclasses.replace(self.plan, edit=settings)
                self._edits = {tuple(ids): bills.removing(self.pair, ids, inputs, settings, self.plan.seed)}
                return paid
        return None

    @cached_property
    def neutral(self) -> Sample:
        """Held-out text that the models did not write, on which an edit's cost is told."""
        return Sample.take(
            self.harvest, self.tokens, split="held_out", limit=NEUTRAL_TOKENS, seed=self.plan.seed, kinds=self._plain
        )

    def bill(self, ids: Sequence[str]) -> Bill:
        """What taking these changes out does and costs, on held-out text."""
        plan = self.plan
        key, folder = self._at(
            "revert", self.harvest.fingerprint, self._found_key, plan.rank, plan.edit, list(ids), plan.seed
        )
        began = time.monotonic()
        if not is_finished(folder):
            edit, controls = self.edit(ids)
            changes = [self.change(i) for i in ids]
            with frozen():
                result = bills.bill(self.pair, edit, controls, changes, self.sample, self.neutral, plan.edit, plan.seed)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "bill.json", result)
            finish(folder, "tunediff.revert/1", {}, ["bill.json"])
        self._done("revert", key, began, "without " + ", ".join(ids))
        return typed(Bill, read_json(folder / "bill.json"), "bill.json")

    @stage
    def signals(self) -> list[SignalTable]:
        """Evidence tables, read on the held-out sample's rows and as much neutral text."""
        plan = self.plan
        if not plan.find.signals:
            return []
        key, folder = self._at("signals", self._models, self.tokens.fingerprint, plan.find.signals, plan.seed)
        began = time.monotonic()
        if not is_finished(folder):
            said = Sample.take(
                self.harvest, self.tokens, split="held_out", limit=SIGNAL_TOKENS, seed=plan.seed, kinds=self._written
            )
            rows = {*said.rows, *self.neutral.rows}
            signals = [
                variants.load("tunediff.changes.signals", name)(self.pair.tokenizer, self.pair.vocabulary)
                for name in plan.find.signals
            ]
            starts = Sample.of(self.harvest, self.tokens, sorted(rows)).starts
            tables = read_signals(self.pair, self.tokens, sorted(rows), signals, 1200, starts=starts)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "signals.json", tables)
            finish(folder, "tunediff.signals/1", {}, ["signals.json"])
        self._done("signals", key, began, ", ".join(plan.find.signals))
        return typed(list[SignalTable], read_json(folder / "signals.json"), "signals.json")

    def diff(self, billed: Sequence[Bill] = ()) -> Diff:
        """Everything, as one record, with the bills that were drawn up."""
        scan_, records, signals = self.scan, self.verdicts, self.signals
        confirmed = [r for r in records if r.decision == "confirmed"]
        ranking = self.ranking
        nulls = [
            NullCard(
                "random tunes",
                "base plus, in every map the tune touched, a random change of the same rank and norm; the "
                "score of the best of all candidates in each",
                list(ranking.ranked[0].null) if ranking.ranked else [],
            )
        ]
        if self.calibration:
            names = ", ".join(sorted({null.name for null in self.calibration.nulls}))
            nulls.append(
                NullCard(
                    "calibration",
                    f"pairs of this base with nothing to find ({names}); the best score in each. A change "
                    f"is claimed above {self.calibration.score:.3g}, where the models are more than "
                    f"{self.calibration.gap:.2g} nat apart",
                    [null.score for null in self.calibration.nulls],
                )
            )
        held = [d for d in set(self.tokens.document_R) if self.tokens.held_out[d]]
        corpus = CorpusCard(
            self.tokens.fingerprint,
            len(set(self.tokens.document_R)),
            self.tokens.count,
            len(held),
            self.tokens.select("held_out").count,
            self.tokens.counts,
        )
        output = self._output()
        diff = Diff(
            base=self._card("base"),
            tuned=self._card("tuned"),
            corpus=corpus,
            found=bool(confirmed),
            rate=self.plan.rank.level,
            summary=_summary(records, confirmed, output, self.plan.rank.level, self.calibration),
            output=output,
            scan=scan_,
            changes=records,
            signals=signals,
            fits=self._fits(),
            nulls=nulls,
            bills=list(billed),
            not_found=_not_found(records, self),
            stages=list(self.cards),
            plan=to_record(self.plan),
            version=__version__,
        )
        return typed(Diff, plain(diff), "diff.json")  # as saved: unbounded intervals are none, in every report alike

    @property
    def _kl_N(self) -> torch.Tensor:
        """KL(tuned || base) in nat at the held-out sample's tokens."""
        return self._shifts.kl_N[self.sample.token_N]

    def _output(self) -> list[Measure]:
        """KL(tuned || base) a token of the held-out sample, by who wrote the text."""
        kl_N = self._kl_N
        measures = []
        documents = self.sample.document_N
        writers = {d: self.tokens.documents[d].writer or self.tokens.documents[d].kind for d in set(documents.tolist())}
        for writer in sorted(set(writers.values())):
            mine = [d for d in sorted(writers) if writers[d] == writer]
            nats = [float(kl_N[documents == d].double().sum()) for d in mine]
            counts = [int((documents == d).sum()) for d in mine]
            value = bootstrap_ratio(nats, counts, seed=self.plan.seed)
            text = f"text by {writer}" if writer in MODELS else f"{writer} text" if writer in WRITERS else writer
            noise = max((r.noise for r in self.scan), default=0.0)
            measures.append(
                Measure(
                    f"KL(tuned || base), {text}",
                    value.value,
                    value.low,
                    value.high,
                    "nat a token",
                    0.0,
                    f"base against itself; streams' noise floor {noise:.1e} of their size",
                )
            )
        return measures

    def _card(self, side: str) -> ModelCard:
        model = getattr(self.pair, side)
        plan_name = getattr(self.plan, side)
        name = {"default": "SmolLM2-135M-Instruct", "demo": "two-objectives (demo)"}.get(plan_name, plan_name)
        parameters = sum(p.numel() for n, p in model.network.named_parameters() if side == "tuned" or "lora_" not in n)
        kind = "LoRA over base" if side == "tuned" and self.pair.shared else type(model.network).__name__
        return ModelCard(
            name,
            getattr(self.pair, f"{side}_fingerprint"),
            kind,
            parameters,
            model.depth,
            model.width,
            model.vocabulary,
        )

    def _fits(self) -> list[FitCard]:
        cards = []
        for name, fitted in self.found[1].items():
            q = fitted.quality
            columns = list(fitted.curve[0]) if fitted.curve else []
            none = "one number of one fit"
            measures = [
                Measure(
                    "EV base, held-out", q.ev_base, unit="share of variance", control=0.0, against="predicting the mean"
                ),
                Measure(
                    "EV tuned, held-out",
                    q.ev_tuned,
                    unit="share of variance",
                    control=0.0,
                    against="predicting the mean",
                ),
                Measure(
                    "EV of the difference, held-out",
                    q.ev_delta,
                    unit="share of variance",
                    control=0.0,
                    against="predicting the mean",
                ),
                Measure(
                    "L0 at inference",
                    q.l0_inference,
                    unit="latents a token",
                    control=q.l0_training,
                    against="in training",
                ),
                Measure("dead latents", q.dead_share, unit="share", against=none),
            ]
            cards.append(
                FitCard(
                    f"{name}: {fitted.dictionary.spec.variant}",
                    {**dataclasses.asdict(fitted.dictionary.spec), "seed": fitted.seed},
                    columns,
                    [[float(row.get(c, float("nan"))) for c in columns] for row in fitted.curve],
                    measures,
                )
            )
        return cards


LENS_TOKENS = 2500
"""Training tokens that the tuned lens is fitted to, about."""

HELD_OUT_TOKENS = 10_000
"""Held-out tokens on which changes are ranked and put on trial, at least."""

READ_DOCUMENTS, READ_SCORED = 24, 400
"""Held-out documents, and tokens of them, at most, off which a change's words are read."""

SIGNAL_TOKENS = 1500
"""Held-out tokens of the text that the models wrote on which signals are read, at least."""

STRENGTHS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""`EditSettings.strength` where a cost is given: the first of these that keeps to it."""

NEUTRAL_TOKENS = 800
"""Held-out tokens of plain text on which costs are measured, at least."""


def _summary(
    records: list[ChangeRecord],
    confirmed: list[ChangeRecord],
    output: list[Measure],
    rate: float,
    calibration: Calibration | None,
) -> list[str]:
    """The finding in plain, neutral sentences."""
    said = []
    if not confirmed:
        said.append(
            f"No change was confirmed at a false-positive rate of {rate:.0%}. That is not a proof that there is none: "
            "the last section lists what was looked at."
        )
    else:
        said.append(
            f"{len(confirmed)} of {len(records)} candidate changes "
            f"{'was' if len(confirmed) == 1 else 'were'} confirmed: {'it stands' if len(confirmed) == 1 else 'they stand'} "
            f"out from random tunes of the same size at a rate of {rate:.0%}, and intervening on "
            f"{'it' if len(confirmed) == 1 else 'each'} moves the output as claimed, in both directions."
        )
        if calibration and calibration.gap:
            said[-1] += (
                f" The models are further apart there than training on nothing makes them ({calibration.gap:.2g} nat a token)."
            )
    for record in confirmed[:5]:
        tokens = [visible(t.token) for t in record.promoted[:8]]
        said.append(
            f"{record.id}: {record.reason}; with it tuned says more of " + ", ".join(tokens) + "."
            if tokens
            else f"{record.id}: {record.reason}."
        )
    for measure in output:
        if "by tuned" in measure.name or len(output) == 1:
            said.append(f"{measure.name}: {measure.value:.3g} nat a token.")
    return said


def _not_found(records: list[ChangeRecord], run: Run) -> list[str]:
    """What was looked at without a finding, and what could not be seen."""
    plan = run.plan
    counts = {d: sum(r.decision == d for r in records) for d in ("refuted", "undecided")}
    said = [
        f"{counts['refuted']} candidates do no more than random tunes or random directions of the same size; "
        f"{counts['undecided']} were not decided, {sum(not r.measures or 'not put on trial' in r.reason for r in records)} of "
        f"them for want of a trial (verify.changes = {plan.verify.changes}).",
        f"Only streams at {', '.join(str(s) for s in run.sites)} were read; the ceiling row of each trial says how much of the "
        "difference can be seen from there.",
        "A behavior whose trigger does not occur in the text leaves no trace in streams: "
        f"{run.tokens.count:,} tokens were read, {sum(d.kind == 'contrastive' for d in run.tokens.documents)} of the documents "
        "were written by the two models.",
    ]
    if like := sum(r.reason.startswith(AS_A_PLACEBO) for r in records):
        said.append(f"{like} of the undecided pass every trial, but are no more than what training on nothing does.")
    if not (run.calibration and run.calibration.gap):
        said.append(
            "No placebo of this base was measured, so what any tune by the same recipe shares may be among what is confirmed "
            "(tunediff calibrate)."
        )
    return said


def _some(tokens: Tokens, limit: int, *kinds: str) -> list[int]:
    """Training rows of the given kinds up to `limit` tokens, evenly spread over the corpus."""
    rows = [
        r
        for r, d in enumerate(tokens.document_R)
        if not tokens.held_out[d] and (not kinds or tokens.documents[d].kind in kinds)
    ]
    total = sum(len(tokens.rows[r]) for r in rows)
    stride = max(1, total // max(1, limit))
    return rows[::stride]
