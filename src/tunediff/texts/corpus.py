"""Corpora: documents from files or from the package, split by hash and cut into rows of token ids.

Documents, not tokens, are what the held-out split and every interval count, so a row never mixes two of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.artifacts import key_of
from tunediff.core.axes import WRITERS
from tunediff.core.chance import seed_of
from tunediff.core.errors import CorpusError, MissingExtraError, SettingError, SourceError

if TYPE_CHECKING:
    import torch

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "held_out", "all")

PROSE = (".txt", ".md", ".rst")
CODE = (".py", ".js", ".ts", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".rb", ".sh", ".sql")
RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
READABLE = PROSE + CODE + RECORDS
REFUSED = (".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz", ".dill")

TEXT_FIELDS = ("text", "content")
MESSAGE_FIELDS = ("messages", "conversations", "conversation")
PROMPT_FIELDS = ("prompt", "instruction", "question")
ANSWER_FIELDS = ("completion", "response", "output", "answer")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

MAX_DOCUMENT_BYTES = 16 << 20
MAX_JSON_BYTES = 512 << 20
WHOLE_FILE_CHARACTERS = 20_000
PIECE_CHARACTERS = 2_000


@dataclass(frozen=True)
class Document:
    """One text or one conversation, the unit that is held out and counted.

    Exactly one of `text` and `messages` is given. Raises CorpusError if both or neither is, or a message is
    not a (role, content) pair of strings.
    """

    id: str
    """Unique and stable: the source's name and a number."""
    kind: str
    """"prose", "chat", "code", "contrastive" or any label of the user's."""
    text: str = ""
    """Plain text; empty when `messages` is set."""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) of each turn of a chat; empty when `text` is set."""
    writer: str = ""
    """One of `WRITERS` where a model wrote the last assistant message: "base", "tuned", or "amplified" for tuned with its
    difference from base amplified; else empty."""
    group: str = ""
    """Documents of one group land on the same side of the split; empty: the document is its own group."""

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.messages):
            raise CorpusError(
                f"document {self.id!r} has {'both' if self.text else 'neither'} text and messages",
                expected="exactly one of them",
            )
        for message in self.messages:
            if len(message) != 2 or not all(isinstance(part, str) for part in message):
                raise CorpusError(
                    f"a message of document {self.id!r} is not a pair",
                    expected="(role, content), both text",
                    got=repr(message)[:80],
                )

    @property
    def is_open(self) -> bool:
        """Whether this is a chat that waits for an answer: its last message is not the assistant's."""
        return bool(self.messages) and self.messages[-1][0] != "assistant"

    def answered(self, content: str, writer: str = "", kind: str = "contrastive") -> Document:
        """This open chat with an answer by the assistant, on the same side of the split as the open one."""
        if not self.is_open:
            raise CorpusError(
                f"document {self.id!r} is not waiting for an answer", expected="a last message by the user"
            )
        return Document(
            id=f"{self.id}/{writer or 'answer'}",
            kind=kind,
            writer=writer,
            group=self.group or self.id,
            messages=(*self.messages, ("assistant", content)),
        )

    @cached_property
    def content_key(self) -> str:
        """A content key of what is said, whatever it is called."""
        return key_of(self.text, self.messages)


@dataclass(frozen=True)
class Corpus:
    """A named set of documents with a fingerprint and a held-out part.

    Raises CorpusError if there is no document or two share an id; SettingError if the share is not in [0, 1).
    """

    name: str
    """What reports call it."""
    documents: tuple[Document, ...] = field(repr=False)
    """Every document, in the order read."""
    held_out_share: float = 0.25
    """Expected share (0..1) of documents for verification; too few widen intervals, too many starve fits."""
    seed: int = 0
    """Which split and which order under a token limit."""

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
        """Read text, code, JSON lines, JSON, Parquet or folders of these (in depth, other files passed over).

        A ``.txt``, ``.md`` or code file of up to 20,000 characters is one document; a longer one is cut at
        blank lines into documents of about 2,000 characters (a paragraph beyond 20,000 at its lines). A
        record of the other kinds is a document: a text column (`text_field`, or ``text``/``content``), a
        messages column (`messages_field`, or ``messages``/``conversations``/``conversation``, of role+content
        or from+value), or a prompt and an answer column (``prompt``/``instruction``/``question`` and
        ``completion``/``response``/``output``/``answer``; a prompt alone is an open chat). A record's own
        ``kind`` comes before `kind`, which comes before prose/code/chat by shape; its ``id`` replaces its
        number, and ``group`` and ``writer`` are kept. Documents that say the same are put on the same side of
        the split.

        Raises SourceError (missing, refused, undecodable or malformed file, with its line), CorpusError (an
        empty document, unless `skip_empty`), MissingExtraError (Parquet without pyarrow).
        """
        given = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
        reader = _Reader(kind, text_field, messages_field, skip_empty)
        documents: list[Document] = []
        taken: Counter[str] = Counter()
        for path, label in _files(given):
            if path.suffix.lower() in RECORDS:
                label = label[: -len(path.suffix)]
            taken[label] += 1
            source = label if taken[label] == 1 else f"{label}~{taken[label]}"
            documents.extend(reader.read(path, source))
        if not documents:
            raise CorpusError(f"{', '.join(map(str, given)) or 'an empty list of paths'} holds no text")
        return cls(name or ", ".join(path.name for path in given), _grouped(documents), held_out_share, seed)

    @classmethod
    def default(cls, *, held_out_share: float = 0.25, seed: int = 0) -> Corpus:
        """The corpus that ships: prose, chat and code in English (sources and licenses in NOTICE)."""
        paths = [ASSETS / f"{kind}.jsonl" for kind in ("prose", "chat", "code")]
        return cls.from_files(paths, name="default", held_out_share=held_out_share, seed=seed)

    @classmethod
    def prompts(cls, *, held_out_share: float = 0.25, seed: int = 0) -> Corpus:
        """480 open chats that ship with the package, 12 for each of 40 everyday topics.

        Topics alternate, so any leading part is balanced. Ids read ``prompts/TOPIC-NN``.
        """
        return cls.from_files(ASSETS / "prompts.jsonl", name="prompts", held_out_share=held_out_share, seed=seed)

    def plus(self, documents: Iterable[Document], name: str | None = None) -> Corpus:
        """This corpus with more documents; those already here stay on their side of the split."""
        return replace(self, name=name or self.name, documents=_grouped([*self.documents, *documents]))

    @cached_property
    def fingerprint(self) -> str:
        """A 16-digit content key of all documents and of the split."""
        return key_of(self.documents, self.held_out_share, self.seed)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """How many documents there are of each kind, in order of first appearance."""
        return dict(Counter(document.kind for document in self.documents))

    def is_held_out(self, document: Document) -> bool:
        """Whether a document is kept for verification, by a hash of the seed and its group or id alone."""
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

        A longer document becomes several rows of like length. Tokens the tokenizer puts before any text
        (``<bos>``) lead every row. Strings such as ``<|im_start|>`` in a text become special tokens, as they
        would in training. `limit_tokens` keeps at most that many (one row at least), from every kind and both
        splits in proportion, in an order fixed by the seed; only the last document taken may be cut, at a
        row's end. `chat_template`: None for the tokenizer's own, "plain" for ``User: …`` / ``Assistant: …``
        lines, or a Jinja template.

        Raises SettingError (sizes), CorpusError (chats but no template, or a chat the template refuses).
        """
        lead = _lead(tokenizer)
        if row_tokens < len(lead) + 1:
            raise SettingError("row_tokens is too small", expected=f"at least {len(lead) + 1}", got=str(row_tokens))
        if limit_tokens is not None and limit_tokens < 1:
            raise SettingError("limit_tokens is too small", expected="at least 1", got=str(limit_tokens))
        order = range(len(self.documents)) if limit_tokens is None else self._spread()
        rows: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}
        taken = 0
        for number, (ids, prompt) in _encode(order, self.documents, tokenizer, chat_template, lead):
            mine = rows.setdefault(number, [])
            parts = -(-len(ids) // (row_tokens - len(lead)))
            body = -(-len(ids) // parts) if parts else 1  # rows of even length, lest the last hold a token or two
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
            pad_id=_pad_id(tokenizer),
        )

    def _spread(self) -> list[int]:
        """Document numbers such that any leading part holds every kind and split in proportion."""
        groups: dict[tuple[str, bool], list[int]] = {}
        for number, document in enumerate(self.documents):
            groups.setdefault((document.kind, self.is_held_out(document)), []).append(number)
        placed = []
        for group in groups.values():
            group.sort(key=lambda number: seed_of(self.seed, "order", self.documents[number].id))
            placed += [((place + 0.5) / len(group), number) for place, number in enumerate(group)]
        return [number for _, number in sorted(placed)]


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids (R rows), each from one document, and what it takes to split and batch them."""

    rows: tuple[tuple[int, ...], ...] = field(repr=False)
    """Token ids of each row, unpadded."""
    document_R: tuple[int, ...] = field(repr=False)
    """Index into `documents` of each row."""
    start_R: tuple[int, ...] = field(repr=False)
    """Where in its document a row starts (tokens; leading special tokens not counted)."""
    prompt_R: tuple[int, ...] = field(repr=False)
    """How many leading tokens of a row precede the last assistant message of a chat; 0 for plain text."""
    documents: tuple[Document, ...] = field(repr=False)
    """Every document of the corpus, also those of which no row is here."""
    held_out: tuple[bool, ...] = field(repr=False)
    """Whether each document is held out."""
    pad_id: int = 0
    """The id that fills a batch on the right; never read by a causal model."""

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
            digest.update(f"{json.dumps(head)}{row}\n".encode())
        return digest.hexdigest()[:16]

    def select(self, which: str | Callable[[Document], bool]) -> Tokens:
        """The rows of one split ("train", "held_out" or "all"), or of the documents a predicate accepts.

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
                remedy="add documents" + ("" if callable(which) else " or change held_out_share"),
            )
        return self.only(kept)

    def only(self, rows: Sequence[int]) -> Tokens:
        """The rows of these numbers, in the order given; the documents stay all."""
        return replace(
            self,
            **{
                name: tuple(getattr(self, name)[row] for row in rows)
                for name in ("rows", "document_R", "start_R", "prompt_R")
            },
        )

    def batches(self, tokens_per_batch: int, order: str = "length") -> Iterator[Batch]:
        """Right-padded batches of at most `tokens_per_batch` positions (or one row), every row exactly once.

        `order` "length" puts rows of like length together, longest first, so that little is padded and memory
        runs out at once or never, and rows that begin alike (chats with one system prompt) in batches of their own, as a
        beginning shared by a whole batch is run once; "rows" keeps the order of the rows. Both are deterministic.
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
        """Row numbers of each batch."""
        alike: dict[tuple[int, ...], list[int]] = {(): []}
        for row, ids in enumerate(self.rows):
            alike.setdefault(ids[:ALIKE] if order == "length" else (), []).append(row)
        if order == "length":
            few = [begin for begin, rows in alike.items() if begin and len(rows) < FEW]
            alike[()] = sorted(row for begin in few for row in alike.pop(begin))
            for rows in alike.values():
                rows.sort(key=lambda row: -len(self.rows[row]))
        for rows in sorted(filter(None, alike.values()), key=lambda rows: (-len(self.rows[rows[0]]), rows[0])):
            for group in _filled([len(self.rows[row]) for row in rows], tokens_per_batch):
                yield rows[group]


ALIKE, FEW = 8, 4
"""Rows whose first so many tokens are the same begin alike; fewer rows than this are no group of their own."""


@dataclass
class Batch:
    """Some rows, padded on the right to the longest of them."""

    ids_BT: torch.Tensor
    """Token ids, int64."""
    mask_BT: torch.Tensor
    """Whether a position is a token (bool); each row is True then False."""
    rows_B: torch.Tensor
    """Row numbers in the Tokens the batch is from, int64."""


# Encoding


def _share(seed: int, *names: object) -> float:
    return seed_of(seed, *names) / 2**63


def _filled(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Slices of consecutive rows whose count times longest stays within `budget`."""
    start, longest = 0, 0
    for end, length in enumerate(lengths):
        if end > start and (end - start + 1) * max(longest, length) > budget:
            yield slice(start, end)
            start, longest = end, 0
        longest = max(longest, length)
    if lengths:
        yield slice(start, len(lengths))


def _ids(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _lead(tokenizer: Any) -> tuple[int, ...]:
    """The ids a tokenizer puts before any text, such as ``<bos>``."""
    (bare,), (dressed,) = _ids(tokenizer, ["a"]), _ids(tokenizer, ["a"], special=True)
    for lead in range(len(dressed) - len(bare) + 1):
        if dressed[lead : lead + len(bare)] == bare:
            return tuple(dressed[:lead])
    return ()


def _pad_id(tokenizer: Any) -> int:
    for id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if id is not None:
            return int(id)
    return 0


def _encode(
    order: Iterable[int],
    documents: Sequence[Document],
    tokenizer: Any,
    chat_template: str | None,
    lead: tuple[int, ...],
) -> Iterator[tuple[int, tuple[list[int], int]]]:
    """(document number, (ids without the lead, how many precede the last answer)), a few at a time."""
    order = list(order)
    for at in range(0, len(order), 64):
        some = order[at : at + 64]
        whole = [_render(documents[number], tokenizer, chat_template) for number in some]
        ids_of = _ids(tokenizer, [text for text, _ in whole])
        opened = iter(_ids(tokenizer, [prompt for _, prompt in whole if prompt is not None]))
        for number, ids, (_, prompt) in zip(some, ids_of, whole):
            before = 0
            if prompt is not None:
                # What the two tokenizations share: a token across the boundary counts as the assistant's.
                before = _shared(ids, next(opened))
            elif documents[number].is_open:
                before = len(ids)
            if lead and tuple(ids[: len(lead)]) == lead:
                ids, before = ids[len(lead) :], max(before - len(lead), 0)
            yield number, (ids, before)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other):
        if a != b:
            break
        count += 1
    return count


def _render(document: Document, tokenizer: Any, chat_template: str | None) -> tuple[str, str | None]:
    """The text of a document and, for an answered chat, the text up to its last assistant message."""
    if not document.messages:
        return document.text, None
    if document.is_open:
        return _chat(document, document.messages, True, tokenizer, chat_template), None
    return (
        _chat(document, document.messages, False, tokenizer, chat_template),
        _chat(document, document.messages[:-1], True, tokenizer, chat_template) if len(document.messages) > 1 else "",
    )


def _chat(
    document: Document,
    messages: Sequence[tuple[str, str]],
    open_answer: bool,
    tokenizer: Any,
    chat_template: str | None,
) -> str:
    if chat_template == "plain":
        lines = [f"{role.capitalize()}: {content}" for role, content in messages]
        return "\n".join([*lines, "Assistant:"] if open_answer else lines)
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise CorpusError(
            f"document {document.id!r} is a chat, but the tokenizer has no chat template",
            expected="an instruction-tuned model's tokenizer",
            remedy='chat_template="plain" (User: … / Assistant: … lines) or a Jinja template',
        )
    try:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=open_answer,
        )
    except Exception as error:  # templates are foreign programs and raise anything
        raise CorpusError(
            f"the chat template refuses document {document.id!r}",
            got=f"roles {', '.join(role for role, _ in messages)}: {error}",
            remedy='mend the document, or chat_template="plain"',
        ) from error


# Reading


def _grouped(documents: Sequence[Document]) -> tuple[Document, ...]:
    """The documents, each that repeats an earlier one's content put into that one's group."""
    first: dict[str, str] = {}
    out = []
    for document in documents:
        group = first.setdefault(document.content_key, document.group or document.id)
        same = group == (document.group or document.id)
        out.append(document if same else replace(document, group=group))
    return tuple(out)


def _files(given: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Every file to read and the label its documents' ids start with: its path within the given folder."""
    for path in given:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in READABLE
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise SourceError(f"{path} holds no file that can be read", expected=", ".join(READABLE))
            yield from ((file, file.relative_to(path).as_posix()) for file in inside)
        elif not path.exists():
            raise SourceError(f"{path} does not exist", expected="a file or folder of text")
        else:
            yield path, path.name


@dataclass(frozen=True)
class _Reader:
    """Reads files of every kind into documents; `kind`, fields and `skip_empty` as in Corpus.from_files."""

    kind: str | None
    text_field: str | None
    messages_field: str | None
    skip_empty: bool

    def read(self, path: Path, source: str) -> Iterator[Document]:
        suffix = path.suffix.lower()
        if suffix in REFUSED:
            raise SourceError(
                f"{path} is refused: files like it can run code when opened, or hold no text",
                got=suffix,
                expected=", ".join(READABLE),
                remedy="save the text as .jsonl",
            )
        if suffix not in READABLE:
            raise SourceError(
                f"{path} is of no kind that is read", got=suffix or "no suffix", expected=", ".join(READABLE)
            )
        if suffix in PROSE + CODE:
            yield from self._texts(path, source, self.kind or ("code" if suffix in CODE else "prose"))
            return
        records = {".json": _json_records, ".parquet": _parquet_records}.get(suffix, _line_records)
        for number, where, record in records(path):
            document = self._document(record, f"{source}#{number}", source, f"{path}, {where}")
            if document is not None:
                yield document

    def _texts(self, path: Path, source: str, kind: str) -> Iterator[Document]:
        text = _clean("".join(line for _, line in _lines(path)), str(path))
        if not text.strip():
            if not self.skip_empty:
                raise CorpusError(f"{path} is empty", expected="text", remedy="remove it, or skip_empty=True")
            return
        if len(text) <= WHOLE_FILE_CHARACTERS:
            yield Document(source, kind, text)
            return
        for number, piece in enumerate(_pieces(text)):
            yield Document(f"{source}#{number}", kind, piece)

    def _document(self, record: Any, id: str, source: str, where: str) -> Document | None:
        if isinstance(record, str):
            record = {self.text_field or "text": record}
        if not isinstance(record, Mapping):
            raise SourceError(f"{where}: a record is not an object", expected='{"text": …}', got=repr(record)[:80])
        if isinstance(record.get("id"), str) and record["id"]:
            id = f"{source}/{_clean(record['id'], where)}"
        text, messages = self._content(record, where)
        size = len(text) + sum(len(content) for _, content in messages)
        if size > MAX_DOCUMENT_BYTES:
            raise SourceError(
                f"{where}: a document is too long",
                got=f"{size:,} characters",
                expected=f"at most {MAX_DOCUMENT_BYTES:,}",
                remedy="cut the text into documents",
            )
        if not text.strip() and not any(content.strip() for _, content in messages):
            if not self.skip_empty:
                raise CorpusError(
                    f"{where}: a document is empty", expected="text", remedy="remove it, or skip_empty=True"
                )
            return None
        kind, writer = record.get("kind"), record.get("writer")
        return Document(
            id=id,
            text=text,
            messages=messages,
            writer=writer if writer in WRITERS else "",
            kind=kind if isinstance(kind, str) and kind else self.kind or ("chat" if messages else "prose"),
            group=record["group"] if isinstance(record.get("group"), str) else "",
        )

    def _content(self, record: Mapping[str, Any], where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        """(text, messages) of a record, one of them empty."""
        if self.messages_field or not self.text_field:
            if found := _first(record, [self.messages_field] if self.messages_field else MESSAGE_FIELDS):
                return "", _messages(record[found], where)
        if self.text_field or not self.messages_field:
            if found := _first(record, [self.text_field] if self.text_field else TEXT_FIELDS):
                if not isinstance(record[found], str):
                    raise SourceError(
                        f"{where}: {found} is not text", got=repr(record[found])[:80], expected="a string"
                    )
                return _clean(record[found], where), ()
        if not (self.text_field or self.messages_field) and (found := _first(record, PROMPT_FIELDS)):
            parts = [("user", record[found])]
            if isinstance(record.get("input"), str) and record["input"]:
                parts = [("user", f"{record[found]}\n\n{record['input']}")]
            if answer := _first(record, ANSWER_FIELDS):
                parts.append(("assistant", record[answer]))
            return "", _messages([{"role": role, "content": content} for role, content in parts], where)
        wanted = [name for name in (self.messages_field, self.text_field) if name]
        raise SourceError(
            f"{where}: no text in the record",
            got=f"columns {', '.join(map(str, record)) or 'none'}",
            expected=", ".join(wanted or [*TEXT_FIELDS, *MESSAGE_FIELDS, *PROMPT_FIELDS]),
            remedy='name the column: text_field="…" or messages_field="…"',
        )


def _first(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    out = []
    for message in value if isinstance(value, (list, tuple)) else [value]:
        role = content = None
        if isinstance(message, Mapping):
            role, content = (message.get("role", message.get("from")), message.get("content", message.get("value")))
        elif isinstance(message, (list, tuple)) and len(message) == 2:
            role, content = message
        if not isinstance(role, str) or not isinstance(content, str):
            raise SourceError(
                f"{where}: a message is not one", expected='{"role": "user", "content": "…"}', got=repr(message)[:80]
            )
        out.append((_clean(ROLES.get(role, role), where), _clean(content, where)))
    return tuple(out)


def _clean(text: str, where: str) -> str:
    """The text, or a refusal if a tokenizer could not take it."""
    if "\0" in text:
        raise SourceError(f"{where}: the text holds NUL characters", expected="UTF-8 text", got="binary data or UTF-16")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where}: the text holds half of a surrogate pair",
            expected="whole characters",
            got=f"\\u{ord(text[error.start]):04x} at character {error.start + 1}",
        ) from None
    return text


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line; no line is read further than the greatest size of a document."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise SourceError(
                        f"{path}, line {number} is too long",
                        got=f"more than {MAX_DOCUMENT_BYTES >> 20} MiB",
                        expected=f"at most {MAX_DOCUMENT_BYTES >> 20} MiB a line",
                        remedy="cut the text into documents",
                    )
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise SourceError(
                        f"{path}, line {number} is not UTF-8",
                        expected="UTF-8 text",
                        got=f"byte 0x{line[error.start]:02x} at byte {error.start + 1}",
                        remedy="convert the file to UTF-8",
                    ) from None
                yield number, text.replace("\r\n", "\n")
    except OSError as error:
        raise SourceError(f"{path} cannot be read", got=error.strerror or str(error)) from None


def _pieces(text: str) -> Iterator[str]:
    """A long text cut at blank lines (a very long paragraph at its lines) to about PIECE_CHARACTERS."""
    units: list[tuple[str, str]] = []
    for paragraph in re.split(r"\n(?:[ \t]*\n)+", text):
        lines = [paragraph] if len(paragraph) <= WHOLE_FILE_CHARACTERS else paragraph.split("\n")
        units += [("\n\n" if place == 0 else "\n", line) for place, line in enumerate(lines) if line.strip()]
    piece: list[str] = []
    size = 0
    for gap, unit in units:
        if piece and size + len(unit) > PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
        piece += [gap, unit] if piece else [unit]
        size += len(unit)
    if piece:
        yield "".join(piece)


def _line_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    number = 0
    for line_number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{path}, line {line_number} is not JSON",
                got=str(error),
                expected="one JSON object a line",
                remedy="a file that is one JSON array is named .json",
            ) from None
        yield number, f"line {line_number}", record
        number += 1


def _json_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(
                f"{path} is too large for one JSON value",
                got=f"{path.stat().st_size >> 20} MiB",
                expected=f"at most {MAX_JSON_BYTES >> 20} MiB",
                remedy="write one record a line, as .jsonl",
            )
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise SourceError(f"{path} cannot be read", got=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8", got=str(error), remedy="convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not JSON",
            got=str(error),
            expected="an array of records",
            remedy="a file of one record a line is named .jsonl",
        ) from None
    if isinstance(value, Mapping):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], Mapping)]
        named = any(name in value for name in (*TEXT_FIELDS, *MESSAGE_FIELDS, *PROMPT_FIELDS))
        value = lists[0] if len(lists) == 1 and not named else [value]
    if not isinstance(value, list):
        raise SourceError(f"{path} holds no records", expected="an array of objects", got=type(value).__name__)
    for number, record in enumerate(value):
        yield number, f"record {number + 1}", record


def _parquet_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(
            f"{path} is a Parquet file, which needs pyarrow", remedy="pip install 'tunediff[parquet]'"
        ) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield number, f"row {number + 1}", record
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not a whole Parquet file", got=str(error).splitlines()[0]) from None
