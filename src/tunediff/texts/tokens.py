"""Documents as rows of token ids: encoding, selection and batches."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunediff.core.errors import CorpusError, SettingError
from tunediff.core.remarks import Remark
from tunediff.core.text import one_line
from tunediff.texts.chat_template import ChatTemplate, Refused, TooSlow
from tunediff.texts.document import Document

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "held_out", "all")
"""Names of the parts that `Tokens.select` takes."""
SHARED_PREFIX = 8
"""Rows whose first so many tokens are equal are put into batches of their own, as their shared prefix is then run once."""
FEWEST_SHARING = 4
"""Fewest rows with an equal start that get batches of their own."""
SLOW_CHATS = 3
"""Number of chats on which a chat template may run out of time before it is given up."""


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids (R rows), each from one document, with what it takes to split and batch them."""

    rows: tuple[tuple[int, ...], ...] = field(repr=False)
    """Token ids of each row, unpadded."""
    document_R: tuple[int, ...] = field(repr=False)
    """Index into `documents` of each row."""
    start_R: tuple[int, ...] = field(repr=False)
    """Where in its document a row starts, in tokens; leading special tokens are not counted."""
    prompt_R: tuple[int, ...] = field(repr=False)
    """How many leading tokens of a row precede the last assistant message of a chat; 0 for plain text."""
    documents: tuple[Document, ...] = field(repr=False)
    """Every document of the corpus, including those without a row here."""
    held_out: tuple[bool, ...] = field(repr=False)
    """Whether each document is held out."""
    pad_id: int = 0
    """The id that fills a batch on the right; never read by a causal model."""
    remarks: tuple[Remark, ...] = field(default=(), repr=False)
    """Documents that were adapted to the chat template or left out, by what was done; no part of the key."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def count(self) -> int:
        """The number of tokens in all rows."""
        return sum(map(len, self.rows))

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of tokens of each kind of document."""
        counter: Counter[str] = Counter()
        for row, number in zip(self.rows, self.document_R):
            counter[self.documents[number].kind] += len(row)
        return dict(counter)

    @cached_property
    def fingerprint(self) -> str:
        """A 16-digit content key of the rows, where they come from, and which are held out."""
        digest = hashlib.sha256()
        for row, number, *rest in zip(self.rows, self.document_R, self.start_R, self.prompt_R):
            document = self.documents[number]
            head = [document.id, document.kind, document.writer, self.held_out[number], *rest]
            head += [document.condition] if document.condition else []
            digest.update(f"{json.dumps(head)}{row}\n".encode())
        return digest.hexdigest()[:16]

    def select(self, which: str | Callable[[Document], bool]) -> Tokens:
        """Return the rows of one split ("train", "held_out" or "all"), or of the documents that a predicate accepts.

        Raises SettingError for an unknown split, CorpusError if no row is left.
        """
        if callable(which):
            keep = [which(document) for document in self.documents]
        elif which == "all":
            return self
        elif which in SPLITS:
            keep = [held_out == (which == "held_out") for held_out in self.held_out]
        else:
            raise SettingError(f"there is no split {which!r}", expected=", ".join(SPLITS))
        kept = [row for row, number in enumerate(self.document_R) if keep[number]]
        if not kept:
            raise CorpusError(
                "no document is left in this selection"
                if callable(which)
                else f"the {which} part of the corpus is empty",
                got=f"{len(set(self.document_R))} documents in all",
                remedy="" if callable(which) else "add documents, or --set corpus.held_out_share=0.5",
            )
        return self.only(kept)

    def only(self, rows: Sequence[int]) -> Tokens:
        """Return the rows of these numbers, in the order given; `documents` stays whole."""
        return replace(
            self,
            rows=tuple(self.rows[row] for row in rows),
            document_R=tuple(self.document_R[row] for row in rows),
            start_R=tuple(self.start_R[row] for row in rows),
            prompt_R=tuple(self.prompt_R[row] for row in rows),
        )

    def used(self) -> Tokens:
        """Return the same rows, without the documents of which there is no row here."""
        kept = sorted(set(self.document_R))
        place = {number: new for new, number in enumerate(kept)}
        return replace(
            self,
            document_R=tuple(place[number] for number in self.document_R),
            documents=tuple(self.documents[number] for number in kept),
            held_out=tuple(self.held_out[number] for number in kept),
        )

    def then(self, other: Tokens) -> Tokens:
        """Return these rows and documents, and after them the other's."""
        return replace(
            self,
            rows=self.rows + other.rows,
            document_R=(*self.document_R, *(len(self.documents) + number for number in other.document_R)),
            start_R=self.start_R + other.start_R,
            prompt_R=self.prompt_R + other.prompt_R,
            documents=self.documents + other.documents,
            held_out=self.held_out + other.held_out,
            remarks=self.remarks + other.remarks,
        )

    def batches(self, tokens_per_batch: int, order: str = "length") -> Iterator[Batch]:
        """Yield right-padded batches of at most `tokens_per_batch` positions (or one row); every row comes exactly once.

        `order` "length" puts rows of similar length together, longest first: little is padded, and memory runs out at
        once or never. Rows with an equal start (chats with one system prompt) get batches of their own, because a
        prefix shared by a whole batch is run once. "rows" keeps the order of the rows. Both are deterministic.

        Raises SettingError for an unknown order or a size below 1.
        """
        import torch

        if order not in ("length", "rows"):
            raise SettingError(f"there is no order {order!r}", expected="length, rows")
        if tokens_per_batch < 1:
            raise SettingError("tokens_per_batch is too small", expected="at least 1", got=str(tokens_per_batch))
        for rows_B in self._grouped(order, tokens_per_batch):
            longest = max(len(self.rows[row]) for row in rows_B)
            ids_BT = torch.full((len(rows_B), longest), self.pad_id, dtype=torch.long)
            mask_BT = torch.zeros((len(rows_B), longest), dtype=torch.bool)
            for b, row in enumerate(rows_B):
                ids_BT[b, : len(self.rows[row])] = torch.tensor(self.rows[row])
                mask_BT[b, : len(self.rows[row])] = True
            yield Batch(ids_BT, mask_BT, torch.tensor(rows_B))

    def _grouped(self, order: str, tokens_per_batch: int) -> Iterator[list[int]]:
        """Yield the row numbers of each batch."""
        starting: dict[tuple[int, ...], list[int]] = {(): []}
        for row, ids in enumerate(self.rows):
            starting.setdefault(ids[:SHARED_PREFIX] if order == "length" else (), []).append(row)
        if order == "length":
            few = [begin for begin, rows in starting.items() if begin and len(rows) < FEWEST_SHARING]
            starting[()] = sorted(row for begin in few for row in starting.pop(begin))
            for rows in starting.values():
                rows.sort(key=lambda row: -len(self.rows[row]))
        for rows in sorted(filter(None, starting.values()), key=lambda rows: (-len(self.rows[rows[0]]), rows[0])):
            for group in _filled([len(self.rows[row]) for row in rows], tokens_per_batch):
                yield rows[group]


@dataclass
class Batch:
    """Some rows, padded on the right to the longest of them."""

    ids_BT: torch.Tensor
    """Token ids, int64."""
    mask_BT: torch.Tensor
    """Whether a position is a token (bool); each row is True then False."""
    rows_B: torch.Tensor
    """Row numbers in the Tokens the batch is from, int64."""


def _filled(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Yield slices of consecutive rows whose number times their longest length stays within `budget`."""
    start, longest = 0, 0
    for end, length in enumerate(lengths):
        if end > start and (end - start + 1) * max(longest, length) > budget:
            yield slice(start, end)
            start, longest = end, 0
        longest = max(longest, length)
    if lengths:
        yield slice(start, len(lengths))


def _ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    """Token ids of each text; with the tokenizer's leading and trailing ones if `special`."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def leading_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before any text, such as ``<bos>``."""
    (bare,), (dressed,) = _ids(tokenizer, ["a"]), _ids(tokenizer, ["a"], special=True)
    for lead in range(len(dressed) - len(bare) + 1):
        if dressed[lead : lead + len(bare)] == bare:
            return tuple(dressed[:lead])
    return ()


def pad_id_of(tokenizer: Any) -> int:
    """Return the padding id of a tokenizer, else its end-of-text id, else 0."""
    for id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if id is not None:
            return int(id)
    return 0


@dataclass(frozen=True)
class Encoded:
    """One document as ids without the tokenizer's leading ones; no ids where the template refuses it."""

    number: int
    ids: Sequence[int]
    prompt: int = 0
    """How many of the ids precede the last answer."""
    whole: bool = False
    """Whether the ids are those that a model was asked and answered, which are read in one row."""
    told: tuple[str, ...] = ()
    """How the document was adapted to the template, or that it was left out."""


def encode(
    order: Iterable[int], documents: Sequence[Document], tokenizer: Any, template: ChatTemplate, lead: tuple[int, ...]
) -> Iterator[Encoded]:
    """Yield the documents of these numbers as ids, in `order`, 64 at a time; those that carry ids keep them.

    Raises CorpusError for a template that is none, or ran out of time on several chats.
    """
    order, slow = list(order), 0
    for at in range(0, len(order), 64):
        some = order[at : at + 64]
        texts: dict[int, tuple[str, str | None]] = {}
        told: dict[int, tuple[str, ...]] = {}
        for number in some:
            if documents[number].prompt_ids:
                continue
            try:
                whole, prompt, told[number] = _render(documents[number], template)
                texts[number] = whole, prompt
            except Refused as refusal:
                slow += isinstance(refusal, TooSlow)
                if slow == SLOW_CHATS:
                    raise CorpusError(
                        f"{template} did not end on {SLOW_CHATS} chats",
                        expected=f"at most {template.seconds:g} s for a chat",
                        remedy="--set pair.template_seconds=60, or --set pair.template=plain",
                    ) from None
                told[number] = (f"chats left out, as the template refuses them ({one_line(str(refusal))[:120]})",)
        ids_of = dict(zip(texts, _ids(tokenizer, [whole for whole, _ in texts.values()])))
        opened = {number: prompt for number, (_, prompt) in texts.items() if prompt is not None}
        opened_ids = dict(zip(opened, _ids(tokenizer, list(opened.values()))))
        for number in some:
            document = documents[number]
            ids = [*document.prompt_ids, *document.answer_ids] or ids_of.get(number, [])
            before = len(document.prompt_ids) or len(ids) * document.is_open
            if number in opened:
                before = _shared(ids, opened_ids[number])  # a token that crosses the boundary is the assistant's
            if lead and tuple(ids[: len(lead)]) == lead:
                ids, before = ids[len(lead) :], max(before - len(lead), 0)
            yield Encoded(number, ids, before, bool(document.prompt_ids), told.get(number, ()))


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading ids the two have in common."""
    count = 0
    for a, b in zip(one, other):
        if a != b:
            break
        count += 1
    return count


def _render(document: Document, template: ChatTemplate) -> tuple[str, str | None, tuple[str, ...]]:
    """The text of a document, for an answered chat the text up to its last answer, and how the chat was adapted."""
    if not document.messages:
        return document.text, None, ()
    rendered = template.render(document.messages, document.is_open)
    if document.is_open:
        return rendered.text, None, rendered.how
    *before, (_, answer) = rendered.messages
    if not before:
        return rendered.text, "", rendered.how
    try:
        prompt = template.written(tuple(before), True)
    except Refused:  # then the answer begins where its words do
        prompt = rendered.text[: max(rendered.text.rfind(answer.strip()), 0)]
    return rendered.text, prompt, rendered.how
