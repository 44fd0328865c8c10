"""A corpus: a named set of documents with a held-out part, cut into rows of token ids.

The held-out split and every interval count documents, not tokens, so a row never mixes two documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import key_of
from tunediff.core.chance import seed_of
from tunediff.core.errors import CorpusError, SettingError
from tunediff.texts import readers
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens, encode, leading_ids, pad_id_of

ASSETS = Path(__file__).parent / "assets"
"""Folder of the texts that ship with the package."""


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
        skip_empty: bool = False,
        name: str | None = None,
        held_out_share: float = 0.25,
        seed: int = 0,
    ) -> Corpus:
        """Read files of text, code, JSON lines, JSON or Parquet, and folders of these at any depth.

        A ``.txt``, ``.md`` or code file of up to 20,000 characters is one document. A longer one is cut at blank lines
        into documents of about 2,000 characters; a paragraph over 20,000 characters is cut at its lines. In the other
        formats each record is a document, from the first of these that it has:

        messages          `messages_field`, else ``messages``, ``conversations`` or ``conversation``; each message has
                          role and content, or from and value
        text              `text_field`, else ``text`` or ``content``
        prompt, answer    ``prompt``, ``instruction`` or ``question``, and ``completion``, ``response``, ``output`` or
                          ``answer``; a prompt alone is an open chat

        A record's own ``kind`` overrides `kind`, which overrides the default: prose, code or chat. A record's ``id``
        replaces its number; its ``group`` and ``writer`` are kept. Documents with equal content are put on the same
        side of the split. In a folder, files of other formats are passed over.

        Raises SourceError (missing, refused, undecodable or malformed file, with its line), CorpusError (an empty
        document, unless `skip_empty`), MissingExtraError (Parquet without pyarrow).
        """
        given = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        documents = readers.read(
            given, kind=kind, text_field=text_field, messages_field=messages_field, skip_empty=skip_empty
        )
        if not documents:
            raise CorpusError(f"{', '.join(map(str, given)) or 'an empty list of paths'} holds no text")
        return cls(name or ", ".join(path.name for path in given), _grouped(documents), held_out_share, seed)

    @classmethod
    def default(cls, *, held_out_share: float = 0.25, seed: int = 0) -> Corpus:
        """Return the corpus that ships: prose, chat and code in English (sources and licenses in NOTICE)."""
        paths = [ASSETS / f"{kind}.jsonl" for kind in ("prose", "chat", "code")]
        return cls.from_files(paths, name="default", held_out_share=held_out_share, seed=seed)

    @classmethod
    def prompts(cls, *, held_out_share: float = 0.25, seed: int = 0) -> Corpus:
        """Return the 480 open chats that ship with the package, 12 for each of 40 everyday topics.

        Topics alternate, so the first n chats are balanced for any n. Ids read ``prompts/TOPIC-NN``.
        """
        return cls.from_files(ASSETS / "prompts.jsonl", name="prompts", held_out_share=held_out_share, seed=seed)

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
        chat_template: str | None = None,
    ) -> Tokens:
        """Cut the documents into rows of at most `row_tokens` ids of `tokenizer` (a transformers tokenizer).

        A longer document becomes several rows of similar length. Tokens that the tokenizer puts before any text
        (``<bos>``) start every row. Strings such as ``<|im_start|>`` in a text become special tokens, as they would in
        training.

        `limit_tokens` keeps at most that many tokens (one row at least), from every kind and both splits in
        proportion, in an order fixed by the seed; only the last document taken may be cut, at the end of a row.
        `chat_template` is None for the tokenizer's own, "plain" for ``User: …`` / ``Assistant: …`` lines, or a Jinja
        template.

        Raises SettingError (sizes), CorpusError (chats but no template, or a chat that the template refuses).
        """
        lead = leading_ids(tokenizer)
        if row_tokens < len(lead) + 1:
            raise SettingError("row_tokens is too small", expected=f"at least {len(lead) + 1}", got=str(row_tokens))
        if limit_tokens is not None and limit_tokens < 1:
            raise SettingError("limit_tokens is too small", expected="at least 1", got=str(limit_tokens))
        order = range(len(self.documents)) if limit_tokens is None else self._spread()
        rows: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}
        taken = 0
        for number, (ids, prompt) in encode(order, self.documents, tokenizer, chat_template, lead):
            mine = rows.setdefault(number, [])
            parts = -(-len(ids) // (row_tokens - len(lead)))
            body = -(-len(ids) // parts) if parts else 1  # rows of even length: else the last holds a token or two
            for start in range(0, len(ids), body):
                row = (*lead, *ids[start : start + body])
                if limit_tokens is not None and taken and taken + len(row) > limit_tokens:
                    break
                if limit_tokens is not None and len(row) > limit_tokens:
                    row = row[:limit_tokens]
                before = 0
                if self.documents[number].messages:
                    before = len(lead) + min(max(prompt - start, 0), len(row) - len(lead))
                mine.append((start, row, before))
                taken += len(row)
            else:
                continue
            break
        flat = [(number, *row) for number in sorted(rows) for row in rows[number]]
        if not flat:
            raise CorpusError(f"corpus {self.name!r} has no tokens under this tokenizer")
        return Tokens(
            rows=tuple(row for _, _, row, _ in flat),
            document_R=tuple(number for number, *_ in flat),
            start_R=tuple(start for _, start, _, _ in flat),
            prompt_R=tuple(before for *_, before in flat),
            documents=self.documents,
            held_out=tuple(map(self.is_held_out, self.documents)),
            pad_id=pad_id_of(tokenizer),
        )

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
