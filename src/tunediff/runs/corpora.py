"""Corpora: the text and the prompts that a plan names, read by its settings and split alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tunediff.core.errors import CorpusError
from tunediff.core.remarks import Remark
from tunediff.runs.plan import CorpusSettings
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.reading import ReadSettings

SPLITS = 1_000
"""How many other splits are tried where the plan's leaves one side empty."""
FEW = 64
"""So many documents, or fewer, may all be on one side of a split by chance."""


def read(settings: CorpusSettings, asked: int) -> tuple[Corpus, Corpus]:
    """The text and the prompts, of which the first `asked` are sure to be asked; what was left out is in their remarks.

    Where the plan's split leaves nothing, or nothing but, held-out documents of a few, the next one that does not is
    used. Raises CorpusError if the text is one document and there is one prompt at most.
    """
    text = _read(settings, settings.paths) if settings.paths else Corpus.default(**_split(settings))
    prompts = _read(settings, settings.prompts, True) if settings.prompts else Corpus.prompts(**_split(settings))
    parts = [_one_a_group(text.documents), _one_a_group(prompts.documents[:asked])]
    several = [documents for documents in parts if len(documents) > 1]
    if not several:
        raise CorpusError(
            f"{text.name} is one document, and there is {'one prompt' if asked else 'no prompt'}",
            expected="two documents or prompts, one to find changes in and one to test them on; a dozen are better",
            remedy="add documents, or --set contrast.prompts=128 without corpus.prompts",
        )
    for seed in chain([settings.split], range(SPLITS)):
        tried = dataclasses.replace(text, seed=seed)
        if all(len({tried.is_held_out(document) for document in documents[:FEW]}) == 2 for documents in several):
            break
    else:
        seed = settings.split
    if seed == settings.split:
        return text, prompts
    remark = Remark(
        "another split used, as corpus.split leaves one side of few documents empty", 1, f"corpus.split={seed}"
    )
    return (
        dataclasses.replace(text, seed=seed, remarks=(*text.remarks, remark)),
        dataclasses.replace(prompts, seed=seed),
    )


def _read(settings: CorpusSettings, paths: Sequence[str], prompts: bool = False) -> Corpus:
    how: dict[str, Any] = {f.name: getattr(settings, f.name) for f in dataclasses.fields(ReadSettings)}
    return Corpus.from_files(paths, prompts=prompts, **_split(settings), **how)


def _split(settings: CorpusSettings) -> dict[str, Any]:
    return {"held_out_share": settings.held_out_share, "seed": settings.split}


def _one_a_group(documents: Sequence[Document]) -> list[Document]:
    """One document of each group: a group is on one side."""
    return list({document.group or document.id: document for document in documents}.values())
