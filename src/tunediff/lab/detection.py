"""Measure the detection floor: the weakest and rarest change, planted in a real network, that a method finds.

The tuned model is the base model, or the base model plus a background such as a random weight change. At every token of
a known class, a known vector is added to the tuned model's stream at one site. The vector's length is the amplitude
times the stream's norm. Candidates found at a later site are compared with the mean effect of the planted vector there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from tunediff.changes.finders.base import View
from tunediff.core.chance import generator
from tunediff.core.errors import SettingError
from tunediff.core.progress import Progress, quiet
from tunediff.dictionaries.sources import HELD_OUT, TensorSource
from tunediff.models.network import LanguageModel
from tunediff.models.passes import Start
from tunediff.records.change import Change
from tunediff.records.site import Site
from tunediff.runs.plan import Plan
from tunediff.texts.tokens import Tokens

FIRST = 10
"""Number of a method's top candidates among which the planted change must be to count as found."""

COSINE = 0.7
"""Smallest |cosine| between a candidate's direction and the planted change's effect to count as found."""

AUROC = 0.9
"""Smallest area under the ROC curve, of a candidate's strength at planted against other tokens, to count as found."""


class PlantedSource(TensorSource):
    """Streams (N, 2, D) of one site in memory, with the methods that finders call on a harvest.

    train_N, held_N   document number of each training and of each held-out token
    """

    def __init__(self, x_train: Tensor, x_held_out: Tensor, site: Site, train_N: Tensor, held_N: Tensor):
        super().__init__(x_train, x_held_out, (site,))
        self.document_N, self._documents = train_N, {"train": train_N, "held_out": held_N}

    def documents(self, split: str) -> Tensor:
        """Document number of each token of `split`."""
        return self._documents[split]

    def index(self, split: str) -> Tensor:
        """Token numbers of the training split, whatever `split` is: finders may read no other."""
        return torch.arange(self.count("train"))

    def at(self, tokens_N: Tensor) -> Tensor:
        """Streams of training tokens by number."""
        return self.read("train", tokens_N)

    def chunks(self, split: str, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of token numbers (n,) and streams (n, 2, D), in order, `size` tokens at a time."""
        for part in torch.arange(self.count(split)).split(size):
            yield part, self.read(split, part)


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted change and the streams that result from it.

    source      streams of both models at the site that is read
    image_D     mean effect of the planted vector at that site, over the class's training tokens, less the background
    on_N        whether the change was planted at each held-out token
    share       share of all tokens at which the change was planted, 0 to 1
    relative    |image_D| in units of the background's root mean square difference; infinite without a background
    """

    source: PlantedSource
    image_D: Tensor
    on_N: Tensor
    share: float
    relative: float


@dataclass(frozen=True)
class Detection:
    """How well one method found one planted change.

    The best candidate is the one of the first ten with the largest product of cosine and AUROC.

    amplitude      length of the planted vector, in units of the stream's norm
    frequency      share of tokens at which it was planted, 0 to 1
    relative       effect size in units of the background's root mean square difference
    candidates     number of candidates that the method proposed
    place          rank of the best candidate, from 1; 0 if there is none
    cosine         |cosine| of the best candidate's direction with the planted change's effect
    auroc          area under the ROC curve of the best candidate's strength at planted against other tokens
    chance_cosine  largest |cosine| of the same candidates with a random vector
    chance_auroc   largest AUROC of the same candidates for a random class of as many tokens
    """

    method: str
    amplitude: float
    frequency: float
    seed: int
    relative: float
    candidates: int
    place: int
    cosine: float
    auroc: float
    chance_cosine: float
    chance_auroc: float

    @property
    def found(self) -> bool:
        """Whether the best candidate reaches both `COSINE` and `AUROC`."""
        return self.cosine >= COSINE and self.auroc >= AUROC


class Text:
    """Streams that all plantings on one text share, so that they are computed once.

    base, tuned    the two models, before anything is planted
    tokens         the text
    write          site at which changes are planted
    read           site from which candidates are found; a higher layer than `write`
    batch_tokens   tokens that are run at once

    Raises `SettingError` unless `write` is a residual-stream site below `read`.
    """

    def __init__(
        self,
        base: LanguageModel,
        tuned: LanguageModel,
        tokens: Tokens,
        write: Site,
        read: Site,
        batch_tokens: int = 2048,
    ):
        if not write.layer < read.layer or write.kind != "resid":
            raise SettingError(
                "a change is planted in a stream and read above",
                expected="resid sites, the second one higher",
                got=f"{write} and {read}",
            )
        self.base, self.tuned, self.write, self.read = base, tuned, write, read
        self.batches = list(tokens.batches(batch_tokens))
        self.document_N = torch.cat(
            [
                torch.tensor([tokens.document_R[r] for r in b.rows_B.tolist()])[:, None].expand_as(b.mask_BT)[b.mask_BT]
                for b in self.batches
            ]
        )
        self.held_N = torch.tensor(tokens.held_out)[self.document_N]
        self.ids_N = torch.cat([b.ids_BT[b.mask_BT] for b in self.batches])
        # Finders never see the first position of a row, whose stream is an outlier.
        self.kept_N = torch.cat(
            [(torch.arange(b.mask_BT.shape[1]) > 0).expand_as(b.mask_BT)[b.mask_BT] for b in self.batches]
        )
        self.base_ND = torch.cat(
            [base.streams(b.ids_BT, [read])[:, :, 0][b.mask_BT].float().cpu() for b in self.batches]
        )
        below, there = zip(*(tuned.streams(b.ids_BT, [write, read]).float().cpu().unbind(2) for b in self.batches))
        self.below, self.tuned_ND = list(below), torch.cat([x[b.mask_BT] for x, b in zip(there, self.batches)])

    def token_class(self, frequency: float, seed: int) -> Tensor:
        """Ids of vocabulary entries drawn at random until they make up `frequency` of all tokens.

        Raises `SettingError` if fewer than five of these tokens are in the training or in the held-out split.
        """
        ids, counts = self.ids_N[self.kept_N].unique(return_counts=True)
        left = round(frequency * int(self.kept_N.sum()))
        chosen = []
        for at in torch.randperm(len(ids), generator=generator(seed, "token class", frequency)).tolist():
            if counts[at] <= left:
                chosen.append(int(ids[at]))
                left -= int(counts[at])
        on_N = torch.isin(self.ids_N, torch.tensor(chosen)) & self.kept_N
        for held in (False, True):
            if int((on_N & (self.held_N == held)).sum()) < 5:
                raise SettingError(
                    f"a frequency of {frequency:g} leaves too few tokens",
                    expected="more tokens, or a higher frequency",
                    got=f"{int(on_N.sum())} of {len(on_N)} tokens",
                )
        return torch.tensor(chosen)

    def plant(self, amplitude: float, frequency: float, seed: int) -> Planted:
        """Add a random unit vector times `amplitude` times the stream's norm at every token of a random class.

        Raises `SettingError` if the class has too few tokens.
        """
        chosen = self.token_class(frequency, seed)
        vector_D = torch.nn.functional.normalize(
            torch.randn(self.base.width, generator=generator(seed, "planted vector")), dim=0
        )
        above = []
        for batch, stream_BTD in zip(self.batches, self.below):
            on_BT = torch.isin(batch.ids_BT, chosen) & (torch.arange(batch.ids_BT.shape[1]) > 0)
            moved = stream_BTD + amplitude * on_BT[..., None] * stream_BTD.norm(dim=-1, keepdim=True) * vector_D
            above.append(
                self.tuned.streams(batch.ids_BT, [self.read], Start(self.write, moved))[:, :, 0][batch.mask_BT]
                .float()
                .cpu()
            )
        tuned_ND = torch.cat(above)
        on_N = torch.isin(self.ids_N, chosen) & self.kept_N
        train_N, held_N = self.kept_N & ~self.held_N, self.kept_N & self.held_N
        image_D = (tuned_ND - self.tuned_ND)[on_N & train_N].mean(0)
        around = (self.tuned_ND - self.base_ND)[train_N]
        rms = float((around - around.mean(0)).square().sum(1).mean().sqrt())
        x_NMD = torch.stack([self.base_ND, tuned_ND], 1)
        source = PlantedSource(
            x_NMD[train_N], x_NMD[held_N], self.read, self.document_N[train_N], self.document_N[held_N]
        )
        return Planted(
            source,
            image_D,
            on_N[held_N],
            float(on_N[self.kept_N].float().mean()),
            float(image_D.norm()) / rms if rms > 0 else float("inf"),
        )


def detect(
    planted: Planted, method: str, settings: Sequence[str], amplitude: float, frequency: float, seed: int, folder: Path
) -> Detection:
    """Run one method's finders on a planted change's training tokens, and score the top candidates on held-out tokens.

    settings   plan settings that define the method
    folder     where finders keep their files
    """
    plan = Plan("planted", "planted", seed).changed(settings)
    changes: list[Change] = []
    for name, finder in plan.finders().items():
        view = View(
            planted.source,  # type: ignore[arg-type]  # has every method that stream-only finders call on a harvest
            folder / name,
            seed,
            plan.find.candidates,
            plan.spec(),
            plan.fit,
            _no_output,
            None,  # type: ignore[arg-type]  # stream-only finders need no pair
        )
        changes += finder.find(view).changes
    x_NSMD = planted.source.read(HELD_OUT, torch.arange(planted.source.count(HELD_OUT)))
    rng = generator(seed, "chance", amplitude, frequency)
    random_D = torch.randn(len(planted.image_D), generator=rng)
    random_N = planted.on_N[torch.randperm(len(planted.on_N), generator=rng)]
    best, chance = (0.0, 0, 0.0, 0.5), [0.0, 0.5]
    for place, change in enumerate(changes[:FIRST], 1):
        f_N = change.strength(x_NSMD).abs()
        d_D = change.difference_SD[-1]
        cosine, area = _cosine(d_D, planted.image_D), auroc(f_N, planted.on_N)
        best = max(best, (cosine * area, -place, cosine, area))
        chance = [max(chance[0], _cosine(d_D, random_D)), max(chance[1], auroc(f_N, random_N))]
    return Detection(
        method, amplitude, frequency, seed, planted.relative, len(changes), -best[1], best[2], best[3], *chance
    )


def _cosine(a_D: Tensor, b_D: Tensor) -> float:
    """Absolute cosine, since the sign of a direction is arbitrary."""
    return float(torch.nn.functional.cosine_similarity(a_D.double(), b_D.double(), dim=0).abs())


def auroc(score_N: Tensor, on_N: Tensor) -> float:
    """Area under the ROC curve, 0 to 1: chance that a token in `on_N` scores above another token.

    A tie counts half. The area is 0.5 if `on_N` holds for all tokens or for none.
    """
    off = score_N[~on_N].double().sort().values
    on = score_N[on_N].double()
    if not len(on) or not len(off):
        return 0.5
    below, upto = torch.searchsorted(off, on), torch.searchsorted(off, on, right=True)
    return float((below + upto).double().mean()) / 2 / len(off)


def _no_output() -> NoReturn:
    raise SettingError(
        "a planted change has no output to look at",
        expected="finders that read streams alone",
        remedy="--methods delta,principal",
    )


def floor(detections: Sequence[Detection]) -> list[dict[str, str]]:
    """One table row a method: for each frequency the smallest amplitude that is found, and "not found" where none is.

    The change must be found in at least half of the seeds at that amplitude and at every larger one.
    """
    rows = []
    for method in dict.fromkeys(d.method for d in detections):
        row = {"method": method}
        for frequency in sorted({d.frequency for d in detections}, reverse=True):
            least = None
            for amplitude in sorted({d.amplitude for d in detections}, reverse=True):
                mine = [
                    d.found
                    for d in detections
                    if (d.method, d.frequency, d.amplitude) == (method, frequency, amplitude)
                ]
                if not mine or sum(mine) * 2 < len(mine):
                    break
                least = amplitude
            row[f"{frequency:.2%}"] = f"{least:g}" if least is not None else "not found"
        rows.append(row)
    return rows


def grid(
    text: Text,
    methods: Mapping[str, Sequence[str]],
    amplitudes: Sequence[float],
    frequencies: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    progress: Progress = quiet,
) -> list[Detection]:
    """Run every method on every combination of amplitude, frequency and seed.

    methods   plan settings of each method, by name
    folder    where finders keep their files
    """
    total = len(methods) * len(amplitudes) * len(frequencies) * len(seeds)
    found: list[Detection] = []
    for seed in seeds:
        for frequency in frequencies:
            for amplitude in amplitudes:
                planted = text.plant(amplitude, frequency, seed)
                for method, settings in methods.items():
                    at = folder / f"{method}-{amplitude:g}-{frequency:g}-{seed}".replace(" ", "-").replace(",", "")
                    found.append(detect(planted, method, settings, amplitude, frequency, seed, at))
                    progress("floor", len(found), total)
    return found
