"""Stages: a plan carried out, each stage in a content-keyed folder of its own, what is finished skipped."""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable

import torch

from tunediff import __version__, edits, variants
from tunediff.artifacts import finish, is_finished, key_of, open_folder, read_json, read_tensors, write_bytes, write_json, write_tensors
from tunediff.chance import Interval
from tunediff.changes import Change, load_changes, save_changes
from tunediff.contrasts import contrast
from tunediff.corpora import Corpus, Document, Tokens
from tunediff.errors import ArtifactError, SettingError
from tunediff.examples import caused_tokens, contexts, kind_rates, lens_tokens
from tunediff.finders.base import View
from tunediff.fitting import Fitted
from tunediff.harvests import Harvest, harvest
from tunediff.lenses import Lens, fit_lens
from tunediff.pairs import Pair
from tunediff.plans import Plan
from tunediff.rankings import Ranked, Ranking, Sample, rank
from tunediff.results import (
    Bill, ChangeRecord, CorpusCard, Diff, FitCard, Measure, ModelCard, NullCard, SignalTable, SiteScan, StageCard,
    typed,
)
from tunediff.scans import candidate_sites, choose, scan
from tunediff.sites import Site
from tunediff.trials.base import bench_of
from tunediff.trials.patch import _quantile

Progress = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """A progress that says nothing."""


@dataclass(eq=False)
class Run:
    """One plan and its folder. A stage is run by reading the property or method of its name; it runs what it needs.

    folder     runs/NAME; every stage keeps a folder ``STAGE/KEY`` in it, KEY from all that the result depends on
    progress   told (stage, done, total) as work goes on
    """

    plan: Plan
    folder: Path
    progress: Progress = quiet

    def __post_init__(self) -> None:
        self.cards: list[StageCard] = []
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
        self.cards.append(StageCard(stage, key, seconds, list(notes)))

    @cached_property
    def pair(self) -> Pair:
        """Both models, loaded and checked."""
        began = time.monotonic()
        plan = self.plan
        self.progress("load", 0, 1)
        pair = Pair.load(plan.base, plan.tuned, dtype=plan.pair.dtype, device=plan.runtime.device,
                         allow_identical=plan.pair.allow_identical)
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
            return Corpus.from_files(c.paths, kind=c.kind or None, held_out_share=c.held_out_share, seed=self.plan.seed)
        return Corpus.default(held_out_share=c.held_out_share, seed=self.plan.seed)

    # -- stages ------------------------------------------------------------------------------------------------

    @cached_property
    def contrast(self) -> list[Document]:
        """Contrastive text, kept as JSON."""
        plan, c = self.plan, self.plan.corpus
        if not plan.contrast.prompts:
            return []
        prompts = (Corpus.from_files(c.prompts, held_out_share=c.held_out_share, seed=plan.seed) if c.prompts
                   else Corpus.prompts(held_out_share=c.held_out_share, seed=plan.seed))
        key, folder = self._at("contrast", self._models, prompts.fingerprint, plan.contrast, plan.seed)
        began = time.monotonic()
        if not is_finished(folder):
            told = [0]
            total = 2 * min(plan.contrast.prompts, len(prompts.documents)) * plan.contrast.tokens

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

    @cached_property
    def scan(self) -> list[SiteScan]:
        """The scan over depth; the chosen sites are marked."""
        plan = self.plan
        given = [Site.parse(s) for s in plan.scan.sites]
        sites = sorted(set(candidate_sites(self.pair.base.depth, plan.scan.depths)) | set(given))
        kind = "contrastive" if self.contrast else self.tokens.documents[0].kind
        key, folder = self._at("scan", self._models, self.tokens.fingerprint, plan.scan, plan.seed)
        began = time.monotonic()
        if not is_finished(folder):
            few = _some(self.tokens.select("train"), plan.scan.tokens, kind)
            self.progress("scan", 0, 1)
            readings = scan(self.pair, few, sites)
            chosen = given or [choose(readings, plan.scan.reach)]
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "scan.json", [
                {"site": str(r.site), "relative": r.relative, "offset_share": r.offset_share, "noise": r.noise,
                 "ceiling": r.ceiling, "chosen": r.site in chosen} for r in readings
            ])
            finish(folder, "tunediff.scan/1", {}, ["scan.json"])
            self.progress("scan", 1, 1)
        readings = typed(list[SiteScan], read_json(folder / "scan.json"), "scan.json")
        self._done("scan", key, began, "chosen: " + ", ".join(r.site for r in readings if r.chosen))
        return readings

    @property
    def sites(self) -> list[Site]:
        """The sites in use."""
        return [Site.parse(r.site) for r in self.scan if r.chosen]

    @cached_property
    def harvest(self) -> Harvest:
        """Both models' streams at the sites, on disk."""
        key, folder = self._at("harvest", self._models, self.tokens.fingerprint, list(map(str, self.sites)),
                               self.plan.harvest)
        began = time.monotonic()
        done = harvest(self.pair, self.tokens, self.sites, folder, self.plan.harvest,
                       lambda d, t: self.progress("harvest", d, t))
        m = done.manifest
        self._done("harvest", key, began, f"{m['tokens']} tokens, {m['set_apart']} set apart as abnormal "
                   f"({m['set_apart_first_position']} in first position)")
        return done

    @cached_property
    def found(self) -> tuple[list[Change], dict[str, Fitted]]:
        """The changes of every finder, and the dictionaries fitted on the way."""
        plan = self.plan
        changes: list[Change] = []
        fits: dict[str, Fitted] = {}
        spec = plan.spec()
        fit = dataclasses.replace(plan.fit, seed=plan.seed)
        for name in plan.find.finders:
            key, folder = self._at("find", self.harvest.fingerprint, name, plan.find.candidates,
                                   plan.find.dictionary, spec, fit, plan.seed)
            began = time.monotonic()
            fit_folder = folder / "dictionary"
            if not is_finished(folder):
                view = View(self.harvest, folder, plan.seed, plan.find.candidates, spec, fit,
                            lambda d, t, row: self.progress(f"find {name}", d, t))
                result = variants.load("tunediff.finders", name)().find(view)
                folder.mkdir(parents=True, exist_ok=True)
                files = save_changes(folder, result.changes)
                finish(folder, "tunediff.find/1", {"changes": len(result.changes)}, files)
            mine = load_changes(folder)
            if is_finished(fit_folder):
                fits[name] = Fitted.load(fit_folder)
            changes += mine
            self._done("find", key, began, f"{name}: {len(mine)} candidates")
        return changes, fits

    @cached_property
    def sample(self) -> Sample:
        """Held-out rows on which changes are ranked and verified: contrastive text first, where there is any."""
        kinds = ("contrastive",) if self.contrast else ()
        return Sample.take(self.harvest, self.tokens, split="held_out", limit=self.plan.rank.effect_tokens,
                           seed=self.plan.seed, kinds=kinds)

    @cached_property
    def ranking(self) -> Ranking:
        """All candidates, ranked."""
        changes = self.found[0]
        key, folder = self._at("rank", self.harvest.fingerprint, [c.id for c in changes], self._found_key,
                               self.plan.rank, self.plan.seed)
        began = time.monotonic()
        by_id = {c.id: c for c in changes}
        if not is_finished(folder):
            ranking = rank(self.pair, changes, self.sample, self.plan.rank, self.plan.seed,
                           lambda d, t: self.progress("rank", d, t))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "ranking.json", [
                {**{f.name: getattr(r, f.name) for f in dataclasses.fields(r) if f.name != "change"},
                 "change": r.change.id} for r in ranking.ranked
            ])
            write_tensors(folder / "kl.safetensors", {"kl": ranking.kl_N})
            finish(folder, "tunediff.rank/1", {}, ["ranking.json", "kl.safetensors"])
        records = read_json(folder / "ranking.json")
        ranked = [
            Ranked(**{**r, "change": by_id[r["change"]], "null": tuple(r["null"]),
                      "effect": typed(Interval, r["effect"], "effect")})
            for r in records
        ]
        self._done("rank", key, began, f"{len(ranked)} candidates against {self.plan.rank.nulls} random tunes")
        return Ranking(ranked, read_tensors(folder / "kl.safetensors")["kl"])

    @property
    def _found_key(self) -> list[Any]:
        p = self.plan
        return [list(p.find.finders), p.find.dictionary, p.find.candidates, p.dictionary, p.fit, p.seed]

    @cached_property
    def lens(self) -> Lens:
        """A tuned lens of base at the sites."""
        key, folder = self._at("lens", self._models[0], self.tokens.fingerprint, list(map(str, self.sites)))
        began = time.monotonic()
        kinds = {d.kind for d in self.tokens.documents}
        few = _some(self.tokens.select("train"), 4000, *sorted(kinds))
        lens = fit_lens(self.pair.base, few, self.sites, folder, abnormal=self.plan.harvest.abnormal)
        self._done("lens", key, began, "R² " + ", ".join(f"{v:.2f}" for v in lens.r2_S.tolist()))
        return lens

    @cached_property
    def verdicts(self) -> list[ChangeRecord]:
        """Every ranked change as a record; the first few put on trial."""
        plan, ranking = self.plan, self.ranking
        key, folder = self._at("verify", self.harvest.fingerprint, self._found_key, plan.rank, plan.verify, plan.seed)
        began = time.monotonic()
        if not is_finished(folder):
            folder.mkdir(parents=True, exist_ok=True)
            chosen = ranking.ranked[: plan.verify.changes]
            spread = self._spread()
            records = []
            for number, ranked in enumerate(ranking.ranked):
                # A trial is kept as soon as it is over, so that a killed run loses one at most.
                path = folder / f"trial-{number:03d}.json"
                if not path.is_file():
                    write_json(path, self._try(number, ranked, ranked in chosen, spread))
                records.append(read_json(path))
                self.progress("verify", min(number + 1, len(chosen)), len(chosen))
            write_json(folder / "verdicts.json", records)
            finish(folder, "tunediff.verify/1", {}, ["verdicts.json"])
        records = typed(list[ChangeRecord], read_json(folder / "verdicts.json"), "verdicts.json")
        self._done("verify", key, began, f"{min(plan.verify.changes, len(records))} changes on trial")
        return records

    def _spread(self) -> dict[Site, torch.Tensor]:
        """For each site a square root of the covariance of the difference on training tokens."""
        out = {}
        train = self.harvest.index("train")[:20_000]
        x_NSMD = self.harvest.at(train)
        for s, site in enumerate(self.harvest.sites):
            delta = x_NSMD[:, s, 1] - x_NSMD[:, s, 0]
            delta = delta - delta.mean(0)
            values, vectors = torch.linalg.eigh(delta.T @ delta / len(delta))
            out[site] = values.clamp_min(0).sqrt()[:, None] * vectors.T
        return out

    def _try(self, number: int, ranked: Ranked, on_trial: bool, spread: dict[Site, torch.Tensor]) -> ChangeRecord:
        plan, change, tokenizer = self.plan, ranked.change, self.pair.tokenizer
        stands_out = ranked.p <= plan.rank.level
        measures = [
            Measure("first-order effect on the output", ranked.effect.value, ranked.effect.low, ranked.effect.high,
                    "nat a token", None, "no control of its own; orders the changes that stand out"),
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
            outcomes = {name: variants.load("tunediff.trials", name)().run(bench, plan.verify)
                        for name in variants.names("tunediff.trials")}
            for outcome in outcomes.values():
                measures += outcome.measures
                dose += outcome.dose
            patch = outcomes["patch"]
            if stands_out:
                decision = {True: "confirmed", False: "refuted", None: "undecided"}[patch.speaks]
                reason = patch.reason
            promoted, suppressed = caused_tokens(tokenizer, bench)
            read_by = "what tuned says more and less of because of it (expected occurrences on its held-out text)"
        elif stands_out:
            reason = "stands out from random tunes, but was not put on trial"
        if not promoted and not suppressed and number < 3 * plan.verify.changes:
            promoted, suppressed = lens_tokens(tokenizer, self.pair.base, self.lens, change)
            read_by = f"tuned lens at {change.sites[-1]} (cosine)"
        score = Measure("energy along the change", ranked.score, unit="x random tunes", control=_quantile(list(ranked.null), 0.95),
                        against=f"95th percentile of the best candidate in {len(ranked.null)} random tunes", p=ranked.p)
        return ChangeRecord(
            rank=number + 1, id=change.id, finder=change.finder, sites=[str(s) for s in change.sites],
            share=change.share, decision=decision, reason=reason, score=score, measures=measures,
            promoted=promoted, suppressed=suppressed, read_by=read_by,
            contexts=contexts(tokenizer, self.sample, change, self.ranking.kl_N) if number < 3 * plan.verify.changes else [],
            depth={}, kinds=kind_rates(self.sample, change), dose=dose, origin=change.origin,
        )


def _some(tokens: Tokens, limit: int, *kinds: str) -> Tokens:
    """Rows of the given kinds up to `limit` tokens, evenly spread over the corpus."""
    rows = [r for r, d in enumerate(tokens.document_R) if not kinds or tokens.documents[d].kind in kinds]
    total = sum(len(tokens.rows[r]) for r in rows)
    stride = max(1, total // max(1, limit))
    chosen = rows[::stride]
    return dataclasses.replace(tokens, **{
        name: tuple(getattr(tokens, name)[r] for r in chosen) for name in ("rows", "document_R", "start_R", "prompt_R")
    })
