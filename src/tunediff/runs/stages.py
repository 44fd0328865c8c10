"""Stages: from two models and text to changes on trial, each stage in a content-keyed folder of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tunediff.changes.attributions import Shift, output_shift
from tunediff.changes.calibrations import Calibration
from tunediff.changes.finders.base import View
from tunediff.changes.outputs import Outputs
from tunediff.changes.rankings import Ranking, rank
from tunediff.changes.signals.base import read as read_signals
from tunediff.changes.verdicts import Proposals, Verifier
from tunediff.core import variants
from tunediff.core.artifacts import read_json, write_json
from tunediff.core.manifests import Work, is_finished
from tunediff.dictionaries.fitted import Fitted
from tunediff.harvests.harvest import Harvest, harvest
from tunediff.harvests.lenses import Lens, fit_lens
from tunediff.harvests.samples import Sample, spread_rows
from tunediff.harvests.scans import candidate_sites, choose, scan
from tunediff.records.change import Change, load_changes, save_changes
from tunediff.records.diff import ChangeRecord, load_records, load_scan
from tunediff.records.finding import Finding
from tunediff.records.measure import SignalTable
from tunediff.records.scan import Scan
from tunediff.records.site import Site
from tunediff.runs.fused import asked, findings
from tunediff.runs.keeping import stage
from tunediff.runs.outputs import OutputSide, in_one_ranking, output_side
from tunediff.runs.sources import Sources

LENS_TOKENS = 2500
"""Approximate number of training tokens that the tuned lens is fitted to."""

HELD_OUT_TOKENS = 10_000
"""Fewest held-out tokens on which changes are ranked and tested."""

SIGNAL_TOKENS = 1500
"""Fewest held-out tokens of the models' own text on which signals are computed."""

NEUTRAL_TOKENS = 800
"""Fewest held-out tokens of plain text on which costs are measured."""


class Stages(Sources):
    """The stages of a run. Reading the property of a stage's name runs that stage and what it needs."""

    def taken(self, split: str, limit: int, kinds: tuple[str, ...]) -> Sample:
        """Rows of one split with at least `limit` tokens of some kinds of text, with both models' streams."""
        return Sample.take(self.harvest, self.tokens, split=split, limit=limit, seed=self.plan.seed, kinds=kinds)

    @cached_property
    def sample(self) -> Sample:
        """Held-out rows on which changes are ranked and verified: of the text that the models wrote, else of all."""
        return self.taken("held_out", HELD_OUT_TOKENS, self.written)

    @cached_property
    def neutral(self) -> Sample:
        """Held-out text that the models did not write, on which an edit's cost is measured."""
        return self.taken("held_out", NEUTRAL_TOKENS, self.plain)

    @property
    def train(self) -> Sample:
        """Training rows of the text that the models wrote, else of all."""
        return self.taken("train", 10**9, self.written)

    # -- stages --------------------------------------------------------------------------------------------------

    @stage
    def scan(self) -> Scan:
        """The scan over depth, and the sites chosen by it or by the plan."""
        plan = self.plan
        given = [Site.parse(s) for s in plan.scan.sites]
        depth, lowest = self.pair.base.depth, self.pair.lowest_changed
        sites = sorted({*candidate_sites(depth, plan.scan.depths, lowest), *given})
        elsewhere = [] if lowest == 0 else [list(map(str, sites))]
        kind = "contrastive" if self.contrast else self.tokens.documents[0].kind

        def make(folder: Path) -> list[str]:
            few = self.tokens.only(spread_rows(self.tokens, plan.scan.tokens, kind))
            self.progress("scan", 0, 1)
            seen = scan(self.pair, few, sites)
            self.progress("scan", 1, 1)
            write_json(folder / "scan.json", choose(seen, plan.scan.reach, given))
            return ["scan.json"]

        place = self.keeper.at("scan", self._models, self.tokens.fingerprint, plan.scan, plan.seed, *elsewhere)
        return self.keeper.kept(
            place, make, lambda folder: load_scan(folder / "scan.json"), lambda s: "chosen: " + ", ".join(s.chosen)
        )

    @property
    def sites(self) -> list[Site]:
        """The sites in use."""
        return [Site.parse(site) for site in self.scan.chosen]

    @stage
    def harvest(self) -> Harvest:
        """Both models' streams at the sites, on disk."""
        sites = list(map(str, self.sites))
        place = self.keeper.at("harvest", self._models, self.tokens.fingerprint, sites, self.plan.harvest)
        began = time.monotonic()
        done = harvest(
            self.pair,
            self.tokens,
            self.sites,
            place.folder,
            self.plan.harvest,
            lambda d, t: self.progress("harvest", d, t),
        )
        m = done.manifest
        self.keeper.done(
            place,
            began,
            f"{m['tokens']} tokens, {m['repeats']} of them repeats, "
            f"{m['set_apart']} set apart as abnormal ({m['set_apart_first_position']} in first position)",
        )
        return done

    def view(self, folder: Path, doing: str, outputs: Outputs | None = None) -> View:
        """What finders see, with `folder` for their own files; progress is told as `doing`."""
        plan = self.plan
        return View(
            self.harvest,
            folder,
            plan.seed,
            plan.find.candidates,
            plan.spec(),
            dataclasses.replace(plan.fit, seed=plan.seed),
            lambda: self._shifts.at(self.harvest.index("train")),
            self.pair,
            lambda d, t, row: self.progress(doing, d, t),
            plan.runtime.device,
            outputs,
        )

    @stage
    def found(self) -> list[Proposals]:
        """What every finder proposes, and the dictionaries that were fitted on the way."""
        plan = self.plan
        spec, fit = plan.spec(), dataclasses.replace(plan.fit, seed=plan.seed)
        found: list[Proposals] = []
        if self.scan.equal:
            return found  # a finder has no difference to look at
        taken: set[str] = set()
        for name, finder in plan.finders().items():
            place = self.keeper.at(
                "find",
                self.harvest.fingerprint,
                name,
                plan.find.candidates,
                plan.find.dictionary,
                spec,
                fit,
                plan.seed,
                *self._code([finder], dictionary=True),
            )

            def make(folder: Path, name: str = name, finder: Any = finder) -> Iterable[str]:
                return save_changes(folder, finder.find(self.view(folder, f"find {name}")).changes)

            def read(folder: Path) -> tuple[list[Change], Fitted | None]:
                fitted = folder / "dictionary"
                return load_changes(folder), Fitted.load(fitted, spec.variant) if is_finished(fitted) else None

            changes, fitted = self.keeper.kept(place, make, read, lambda r: f"{name}: {len(r[0])} candidates")
            if taken & {c.id for c in changes}:  # the same finder under two names
                own = name.replace(":", ".")
                changes = [dataclasses.replace(c, id=f"{own}/{c.id.rpartition('/')[2]}", finder=own) for c in changes]
            taken |= {c.id for c in changes}
            found.append(Proposals(name, changes, fitted, finder.offset))
        return found

    @property
    def changes(self) -> list[Change]:
        """All changes that finders propose."""
        return [change for proposals in self.found for change in proposals.changes]

    @property
    def fits(self) -> dict[str, Fitted]:
        """The dictionaries that finders fitted, by finder."""
        return {p.name: p.fitted for p in self.found if p.fitted is not None}

    def _code(self, made: Iterable[Any], dictionary: bool = False) -> list[Any]:
        """The parts of a key that identify variants' code besides their names; empty for variants that ship with
        tunediff.
        """
        parts = [variants.identity(one) for one in made]
        if dictionary:
            parts.append(list(filter(None, [variants.source(type(self.plan.spec()))])))
        return [parts] if any(parts) else []

    @property
    def found_key(self) -> list[Any]:
        """What the proposals depend on besides the harvest, for content keys."""
        p = self.plan
        named = [list(p.find.finders), p.find.dictionary, p.find.candidates, p.dictionary, p.fit, p.seed]
        return named + self._code(p.finders().values(), dictionary=True) + self._beyond

    @stage
    def _shifts(self) -> Shift:
        """How the output moves at every token of the text that the models wrote (of all if they wrote none).

        It is no stage of its own: its time is part of the stage's that asked first.
        """

        def make(folder: Path) -> Iterable[str]:
            site = next((site for site in reversed(self.sites) if site.kind == "resid"), None)
            shift = Shift.none(len(self.harvest.token_N))
            if site is not None:
                for some in (self.train, self.sample):
                    shift.put(some.token_N, output_shift(self.pair, site, some, self.plan.rank.batch_tokens))
            return shift.save(folder)

        place = self.keeper.at("shift", self.harvest.fingerprint, self.written, self.plan.seed)
        return self.keeper.kept(place, make, Shift.load)

    @property
    def kl_N(self) -> torch.Tensor:
        """KL(tuned || base) in nats at the held-out sample's tokens."""
        return self._shifts.kl_N[self.sample.token_N]

    @stage
    def ranking(self) -> Ranking:
        """All candidates, ranked."""
        plan, by_id = self.plan, {c.id: c for c in self.changes}

        def make(folder: Path) -> Iterable[str]:
            ranking = rank(
                self.pair,
                list(by_id.values()),
                self.sample,
                self.train,
                plan.rank,
                plan.seed,
                lambda d, t: self.progress("rank", d, t),
                [Site.parse(site) for site in self.scan.sites],
            )
            return ranking.save(folder)

        place = self.keeper.at("rank", self.harvest.fingerprint, list(by_id), self.found_key, plan.rank, plan.seed)
        return self.keeper.kept(place, make, lambda f: Ranking.load(f, by_id), lambda ranking: ranking.note)

    @stage
    def lens(self) -> Lens:
        """A tuned lens of base at the sites."""
        place = self.keeper.at("lens", self.harvest.fingerprint)
        began = time.monotonic()
        few = Sample.of(self.harvest, self.tokens, spread_rows(self.tokens, LENS_TOKENS))
        lens = fit_lens(
            self.pair.base,
            self.tokens.only(few.rows),
            self.sites,
            place.folder,
            abnormal=self.plan.harvest.abnormal,
            sample=few,
            model_fingerprint=self.pair.base_fingerprint,
        )
        self.keeper.done(place, began, "R² " + ", ".join(f"{v:.2f}" for v in lens.r2_S.tolist()))
        return lens

    @cached_property
    def calibration(self) -> Calibration | None:
        """What `calibrate` measured on this base; None if it was never run on it."""
        return Calibration.of(self.pair.base_fingerprint)

    @stage
    def verdicts(self) -> list[ChangeRecord]:
        """Every ranked change as a record; the first few are put on trial."""
        plan, ranked, trials = self.plan, self.ranking.ranked, self.plan.trials()
        verifier = Verifier(
            self.pair,
            self.harvest,
            self.sample,
            self.lens,
            self.ranking,
            self.found,
            trials,
            plan.verify,
            plan.rank.level,
            plan.seed,
            self.kl_N,
        )
        tried = len(verifier.tried)

        def make(folder: Path) -> list[str]:
            records, work = [], Work.at(folder, place.key)
            for number in range(len(ranked)):
                # A trial is kept as soon as it is over, so that a killed run loses one at most.
                trial = f"trial-{number:03d}.json"
                if not work.has(trial):
                    work.write_json(trial, verifier.record(number))
                records.append(read_json(folder / trial))
                if tried:
                    self.progress("verify", min(number + 1, tried), tried)
            write_json(folder / "verdicts.json", records)
            return ["verdicts.json"]

        place = self.keeper.at(
            "verify",
            self.harvest.fingerprint,
            self.found_key,
            plan.rank,
            plan.verify,
            plan.seed,
            [(r.change.id, r.p, r.score.value) for r in ranked],
            *self._code(trials.values()),
        )
        records = self.keeper.kept(
            place, make, lambda folder: load_records(folder / "verdicts.json"), lambda _: f"{tried} changes on trial"
        )
        # Evidence is kept as it is; only what is claimed of it changes with what nulls do.
        outputs = self.output_side.records
        if self.calibration:
            outputs, records = (list(map(self.calibration.judged, some)) for some in (outputs, records))
        return in_one_ranking(outputs, records)

    @stage
    def output_side(self) -> OutputSide:
        """Changes that claim tokens; they have a stage of their own."""
        return output_side(self)

    @stage
    def asked(self) -> Sample | None:
        """Tuned's answers to the questions that the search found, with both models' streams."""
        return asked(self)

    @property
    def elicited_key(self) -> list[str]:
        """What depends on the questions that the search found, for content keys."""
        return [document.content_key for document in self.elicited.documents]

    @stage
    def findings(self) -> list[Finding]:
        """Confirmed changes and elicited questions that show the same, each told once."""
        return findings(self)

    @property
    def in_streams(self) -> dict[str, Change]:
        """All candidates that write into a stream, by id, those that claim tokens too."""
        return {change.id: change for change in (*self.changes, *self.output_side.changes)}

    @stage
    def signals(self) -> list[SignalTable]:
        """Evidence tables, read on the held-out sample's rows and as much neutral text."""
        plan = self.plan
        if not plan.find.signals:
            return []
        signals = list(plan.signals().values())

        def make(_: Path) -> list[SignalTable]:
            rows = sorted({*self.taken("held_out", SIGNAL_TOKENS, self.written).rows, *self.neutral.rows})
            starts = Sample.of(self.harvest, self.tokens, rows).starts
            return read_signals(self.pair, self.tokens, rows, signals, 1200, starts=starts)

        place = self.keeper.at(
            "signals", self._models, self.tokens.fingerprint, plan.find.signals, plan.seed, *self._code(signals)
        )
        return self.keeper.kept_json(
            place, list[SignalTable], "signals.json", make, lambda _: ", ".join(plan.find.signals)
        )
