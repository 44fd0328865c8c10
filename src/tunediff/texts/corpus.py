"""A corpus: a named set of documents with a held-out part, cut into rows of token ids.

The held-out split and every interval count documents, not tokens, so a row never mixes two documents.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import key_of
from tunediff.core.chance import seed_of
from tunediff.core.errors import CorpusError, SettingError
from tunediff.core.remarks import Remark, Remarks
from tunediff.texts.chat_template import ChatTemplate
from tunediff.texts.document import Document
from tunediff.texts.reading import ReadSettings, read
from tunediff.texts.tokens import Encoded, Tokens, encode, leading_ids, pad_id_of

ASSETS = Path(__file__).parent / "assets"
"""Folder of the texts that ship with the package."""
FEWEST_DOCUMENTS = 8
"""Under a token limit, a document takes at most this part of it as long as there are others."""
Row = tuple[int, tuple[int, ...], int]
"""Where in its document a row starts, its token ids, and how many of them precede the last answer."""


@dataclass(frozen=True)
class Corpus:
    """A named set of documents with a fingerprint and a held-out part.

    Raises CorpusError if there is no document or two share an id, SettingError if the share is not in [0, 1).
    """

    name: str
    """Name of the corpus in reports."""
    documents: tuple[Document, ...] = field(repr=False)
    """Every document, in the order read."""
    held_out_share: float = 0.25
    """Expected share (0 to 1) of documents held out for verification. Too few: wide intervals. Too many: poor fits."""
    seed: int = 0
    """Seed of the split, and of the order in which documents are taken under a token limit."""
    remarks: tuple[Remark, ...] = field(default=(), repr=False)
    """What reading its files left out or changed."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_share < 1:
            raise SettingError(
                "held_out_share is out of range", expected="0 <= share < 1", got=str(self.held_out_share)
            )
        if not self.documents:
            raise CorpusError(f"corpus {self.name!r} has no documents")
        twice = [id for id, count in Counter(document.id for document in self.documents).items() if count > 1]
        if twice:
            raise CorpusError(
                f"{len(twice)} document ids of corpus {self.name!r} occur more than once",
                got=repr(twice[0]),
                expected="ids that are unique",
                remedy="rename the records' id column",
            )

    @classmethod
    def from_files(
        cls,
        paths: str | Path | Sequence[str | Path],
        *,
        kind: str | None = None,
        text_field: str | None = None,
        messages_field: str | None = None,
        broken: float = ReadSettings.broken,
        max_bytes: int = ReadSettings.max_bytes,
        max_documents: int = ReadSettings.max_documents,
        prompts: bool = False,
        name: str | None = None,
        held_out_share: float = 0.25,
        seed: int = 0,
    ) -> Corpus:
        """Read files, folders of files at any depth, patterns such as ``data/*.jsonl``, and data sets of the hub.

        Text and code, JSON lines, JSON, CSV, TSV, Parquet, Arrow and folders that `datasets` saved are read, also
        compressed (gz, bz2, xz, zst). A text of up to 20,000 characters is one document. A longer one is cut at blank
        lines into documents of about 2,000 characters. Elsewhere each record is a document:

        chats             `messages_field`, else ``messages``, ``conversations`` and other usual names
        preferences       ``chosen``, after ``prompt`` if there is one; ``rejected`` is left out
        texts             `text_field`, else ``text`` or ``content``, else the one column that holds text
        prompt, answer    ``prompt``, ``instruction``, ``question`` … and ``completion``, ``response``, ``output``,
                          ``answer`` …, with ``input``, ``context``, ``system`` and ``history``; a prompt alone is open

        A record's own ``kind`` overrides `kind`, which overrides the default: prose, code or chat. A record's ``id``
        replaces its number; its ``group`` and ``writer`` are kept. Documents with equal content are put on the same
        side of the split. With `prompts`, every document is an open chat: texts are the user's, answers are left out,
        and each line of a text file is a prompt.

        Rows without text are left out, and so are unreadable ones up to the share `broken`. At most `max_bytes` and
        `max_documents` are read. All that was left out or changed is counted in `remarks`.

        Raises SourceError (missing, refused or malformed files, with the first line), CorpusError (no text at all),
        MissingExtraError (a library is missing that a file needs).
        """
        given = [paths] if isinstance(paths, (str, Path)) else list(paths)
        settings = ReadSettings(kind or "", text_field or "", messages_field or "", broken, max_bytes, max_documents)
        reading = read(given, settings, prompts)
        title = name or ", ".join(Path(path).name for path in given)
        return cls(title, _grouped(reading.documents), held_out_share, seed, reading.remarks)

    @classmethod
    def default(cls, *, held_out_share: float = 0.25, seed: int = 0) -> Corpus:
        """Return the corpus that ships: prose, chat and code in English (sources and licenses in NOTICE)."""
        paths = [ASSETS / f"{kind}.jsonl" for kind in ("prose", "chat", "code")]
        read = cls.from_files(paths, name="default", held_out_share=held_out_share, seed=seed)
        return replace(read, remarks=())

    @classmethod
    def prompts(cls, *, held_out_share: float = 0.25, seed: int = 0) -> Corpus:
        """Return the 480 open chats that ship with the package, 12 for each of 40 everyday topics.

        Topics alternate, so the first n chats are balanced for any n. Ids read ``prompts/TOPIC-NN``.
        """
        read = cls.from_files(ASSETS / "prompts.jsonl", name="prompts", held_out_share=held_out_share, seed=seed)
        return replace(read, remarks=())

    def plus(self, documents: Iterable[Document], name: str | None = None) -> Corpus:
        """Return this corpus with more documents; those already here stay on their side of the split."""
        return replace(self, name=name or self.name, documents=_grouped([*self.documents, *documents]))

    @cached_property
    def fingerprint(self) -> str:
        """A 16-digit content key of all documents and of the split."""
        return key_of(self.documents, self.held_out_share, self.seed)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """Number of documents of each kind, in order of first appearance."""
        return dict(Counter(document.kind for document in self.documents))

    def is_held_out(self, document: Document) -> bool:
        """Whether a document is held out, decided by a hash of the seed and its group or id alone."""
        return _share(self.seed, "held out", document.group or document.id) < self.held_out_share

    def tokens(
        self,
        tokenizer: Any,
        *,
        row_tokens: int = 128,
        limit_tokens: int | None = None,
        template: ChatTemplate | None = None,
    ) -> Tokens:
        """Cut the documents into rows of at most `row_tokens` ids of `tokenizer` (a transformers tokenizer).

        A longer document becomes several rows of similar length. Tokens that the tokenizer puts before any text
        (``<bos>``) start every row. Strings such as ``<|im_start|>`` in a text become special tokens, as they would in
        training.

        `limit_tokens` keeps at most that many tokens (one row at least), from every kind and both splits in
        proportion, in an order fixed by the seed. A document is cut at the end of a row where it is the last one taken,
        or takes more than an eighth of the tokens while others wait.
        `template` is the form of chats; without it the tokenizer's own, else plain lines. A chat that it refuses is
        adapted or left out, which `Tokens.remarks` count. Documents that carry token ids keep them, each in one row.

        Raises SettingError (sizes), CorpusError (no tokens, or a template that cannot be run).
        """
        template = template or ChatTemplate.of(tokenizer) or ChatTemplate("plain")
        lead = leading_ids(tokenizer)
        if row_tokens < len(lead) + 1:
            raise SettingError("row_tokens is too small", expected=f"at least {len(lead) + 1}", got=str(row_tokens))
        if limit_tokens is not None and limit_tokens < 1:
            raise SettingError("limit_tokens is too small", expected="at least 1", got=str(limit_tokens))
        order = range(len(self.documents)) if limit_tokens is None else self._spread()
        remarks = Remarks()
        cut = self._cut(encode(order, self.documents, tokenizer, template, lead), lead, row_tokens, remarks)
        rows = dict(cut if limit_tokens is None else _limited(cut, limit_tokens))
        flat = [(number, *row) for number in sorted(rows) for row in rows[number]]
        if not flat:
            raise CorpusError(
                f"corpus {self.name!r} has no tokens under this tokenizer",
                got="; ".join(map(str, remarks.all()[:3])),
                remedy="--set pair.template=plain" if remarks.all() else "",
            )
        return Tokens(
            rows=tuple(row for _, _, row, _ in flat),
            document_R=tuple(number for number, *_ in flat),
            start_R=tuple(start for _, start, _, _ in flat),
            prompt_R=tuple(before for *_, before in flat),
            documents=self.documents,
            held_out=tuple(map(self.is_held_out, self.documents)),
            pad_id=pad_id_of(tokenizer),
            remarks=remarks.all(),
        )

    def _cut(
        self, encoded: Iterable[Encoded], lead: tuple[int, ...], row_tokens: int, remarks: Remarks
    ) -> Iterator[tuple[int, list[Row]]]:
        """Yield (document number, its rows) of encoded documents; remarks on them are counted as they come."""
        for one in encoded:
            document, ids = self.documents[one.number], one.ids
            for what in one.told:
                remarks.add(what, document.id)
            parts = 1 if one.whole else -(-len(ids) // (row_tokens - len(lead)))
            body = -(-len(ids) // parts) if parts else 1  # rows of even length: else the last holds a token or two
            cut = []
            for start in range(0, len(ids), body):
                row = (*lead, *ids[start : start + body])
                before = len(lead) + min(max(one.prompt - start, 0), len(row) - len(lead))
                cut.append((start, row, before if document.messages else 0))
            yield one.number, cut

    def _spread(self) -> list[int]:
        """Document numbers in an order of which any first n hold every kind and split in proportion."""
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, document in enumerate(self.documents):
            groups.setdefault((document.kind, self.is_held_out(document)), []).append(number)
        placed = []
        for group in groups.values():
            group.sort(key=lambda number: seed_of(self.seed, "order", self.documents[number].id))
            placed += [((place + 0.5) / len(group), number) for place, number in enumerate(group)]
        return [number for _, number in sorted(placed)]


def _limited(cut: Iterable[tuple[int, list[Row]]], limit: int) -> dict[int, list[Row]]:
    """Documents' first rows up to so many tokens; of a long document only so many that others have room, if there are any."""
    rows: dict[int, list[Row]] = {}
    waiting: list[tuple[int, list[Row]]] = []
    taken = 0
    for number, new in itertools.chain(cut, waiting):
        share = limit if number in rows else limit / FEWEST_DOCUMENTS
        mine, began = rows.setdefault(number, []), taken
        for place, (start, row, before) in enumerate(new):
            if taken and taken + len(row) > limit:
                return rows
            if place and taken - began >= share:
                waiting.append((number, new[place:]))
                break
            row = row[:limit]
            mine.append((start, row, min(before, len(row))))
            taken += len(row)
    return rows


def _share(seed: int, *names: object) -> float:
    return seed_of(seed, *names) / 2**63


def _grouped(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Put every document that repeats an earlier one's content into that one's group."""
    first: dict[str, str] = {}
    out = []
    for document in documents:
        group = first.setdefault(document.content_key, document.group or document.id)
        same = group == (document.group or document.id)
        out.append(document if same else replace(document, group=group))
    return tuple(out)
