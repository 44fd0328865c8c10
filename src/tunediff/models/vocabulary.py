"""Vocabularies: how the token ids of two models correspond, and what only one of them can read or say."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunediff.core.errors import PairError
from tunediff.core.text import visible

if TYPE_CHECKING:
    from tunediff.models.network import LanguageModel
    from tunediff.texts.tokens import Tokens

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "In 1969, 3 people went to the Moon; two of them walked on it.",
    "Café, naïve, 東京, Москва — “quotes” and emoji 🙂.",
)
"""Texts on which both models are compared on loading."""

FLOOR = -1e4
"""Logit of a token that is not compared: its probability is 0, and differences of its logits are finite."""

NO_TOKEN = "<id "
"""Beginning of the name of a row of the embedding that is no token."""

NAMED = 8
"""Most tokens that a note names."""


class Numbering:
    """How a model's own ids are numbered in its pair; here they are the numbers."""

    def ids(self, numbers: Tensor) -> Tensor:
        """The model's own ids of tokens given by their numbers."""
        return numbers

    def numbers(self, ids: Tensor) -> Tensor:
        """The numbers of tokens given by the model's own ids."""
        return ids

    def knows(self, numbers: Tensor, rows: int) -> Tensor:
        """Whether a model of so many rows can read the tokens of these numbers."""
        return numbers < rows

    def logits(self, raw: Tensor) -> Tensor:
        """The model's own logits (..., I) by number (..., C)."""
        return raw

    def compared(self, raw: Tensor) -> Tensor:
        """The model's own logits (..., I) by number, without those of tokens that it has to itself."""
        return raw

    def own(self, score_C: Tensor) -> Tensor:
        """Scores by number (..., C) as scores of the model's own ids (..., I); -inf where an id has no number."""
        return score_C


IN_PLACE = Numbering()
"""The numbering of a model whose own ids are the numbers."""


@dataclass(frozen=True, eq=False)
class Table(Numbering):
    """The numbering of a model whose ids are not the numbers, or some of whose tokens are not compared.

    own_C      the model's own id for each number C
    absent_C   which numbers the other model lacks, so that they are not compared
    size       numbers from here on are this model's alone
    """

    own_C: Tensor
    absent_C: Tensor
    size: int

    @cached_property
    def _number_I(self) -> Tensor:
        """The number of each of the model's own ids, and one that nobody knows for ids beyond."""
        number_I = torch.arange(int(self.own_C.max()) + 2)
        number_I[-1] = len(self.own_C)
        for numbers in ((~self.absent_C[: self.size]).nonzero()[:, 0], torch.arange(self.size, len(self.own_C))):
            number_I[self.own_C[numbers]] = numbers
        return number_I

    def ids(self, numbers: Tensor) -> Tensor:
        return self.own_C.to(numbers.device)[numbers]

    def numbers(self, ids: Tensor) -> Tensor:
        number_I = self._number_I.to(ids.device)
        return number_I[ids.clamp_max(len(number_I) - 1)]

    def knows(self, numbers: Tensor, rows: int) -> Tensor:
        return (numbers < self.size) & ~self.absent_C.to(numbers.device)[numbers.clamp_max(self.size - 1)]

    def logits(self, raw: Tensor) -> Tensor:
        return raw[..., self.own_C.to(raw.device)].masked_fill(self.absent_C.to(raw.device), FLOOR)

    def compared(self, raw: Tensor) -> Tensor:
        return self.logits(raw)[..., : self.size]

    def own(self, score_C: Tensor) -> Tensor:
        kept = ~self.absent_C.to(score_C.device)
        own = score_C.new_full((*score_C.shape[:-1], len(self._number_I) - 1), float("-inf"))
        own[..., self.own_C.to(score_C.device)[kept]] = score_C[..., kept]
        return own


@dataclass(frozen=True, eq=False)
class Vocabularies:
    """How the tokens of base and tuned correspond: one numbering for both.

    A number below `size` is base's id. Numbers from `size` on stand for the tokens that a model has to itself, for each
    model its own, in the order of ``base_only`` and ``tuned_only`` (ids of that model). Logits of either model have their
    columns in this order.

    Where both networks have a row for an id, it is compared, also if one tokenizer alone names it: vocabularies are padded,
    and tokens are added in rows that base has already.

    base, tuned   how the ids of each model are numbered
    base_named, tuned_named   numbers below `size` that both networks have a row for, and one tokenizer alone names so
    mapped        whether tuned has other ids for tokens that both have
    alike         whether both tokenizers are known to cut every text into the same tokens
    notes         what differs, in sentences
    """

    size: int
    base: Numbering = IN_PLACE
    tuned: Numbering = IN_PLACE
    base_only: tuple[int, ...] = ()
    tuned_only: tuple[int, ...] = ()
    base_named: tuple[int, ...] = ()
    tuned_named: tuple[int, ...] = ()
    mapped: bool = False
    alike: bool = True
    notes: tuple[str, ...] = ()
    tokenizers: tuple[Any, Any] = field(default=(None, None), repr=False)

    @classmethod
    def of(cls, base: LanguageModel, tuned: LanguageModel) -> Vocabularies:
        """Compare the vocabularies and tokenizers of two models."""
        ours, theirs = base.tokenizer, tuned.tokenizer
        rows = base.vocabulary, tuned.vocabulary
        if ours is theirs or (ours is None or theirs is None):
            return cls._in_place(rows, (), (), (ours, theirs))
        named = [_vocabulary(tokenizer, count) for tokenizer, count in zip((ours, theirs), rows)]
        if named[0] != named[1] and _alphabet(ours) != _alphabet(theirs):
            named = [_pieces(tokenizer, count) for tokenizer, count in zip((ours, theirs), rows)]
        both = named[0].keys() & named[1].keys()
        only = [sorted(i for piece, i in mine.items() if piece not in both) for mine in named]
        if all(named[0][piece] == named[1][piece] for piece in both):
            made = cls._in_place(rows, only[0], only[1], (ours, theirs))
        else:
            made = cls._mapped(rows, {named[0][piece]: named[1][piece] for piece in both}, (ours, theirs))
        cut = _cut_differences(ours, theirs)
        alike = not (only[0] or only[1] or cut or made.mapped)
        return replace(made, alike=alike, notes=(*made.notes, *cut, *_special_differences(ours, theirs)))

    @classmethod
    def _in_place(
        cls, rows: tuple[int, int], base_only: Sequence[int], tuned_only: Sequence[int], tokenizers: tuple[Any, Any]
    ) -> Vocabularies:
        """Tokens that both have have equal ids."""
        size = min(rows)
        inner: list[list[int]] = [[], []]
        named: list[list[int]] = [[], []]
        for side, only, other in ((0, base_only, set(tuned_only)), (1, tuned_only, set(base_only))):
            mine, theirs = tokenizers[side].added_tokens_decoder, tokenizers[1 - side].added_tokens_decoder
            for id in (i for i in only if i < size):
                # An added token in a row that pads the other's vocabulary, or is reserved there, is the same row. Words are
                # tokens of their own.
                same = id in mine and (id in theirs or id not in other) and id not in inner[0]
                (named if same else inner)[side].append(id)
        absent_V = torch.zeros(size, dtype=torch.bool)
        absent_V[inner[0] + inner[1]] = True
        numberings, own = [], []
        for mine, count in zip(inner, rows):
            own.append((*mine, *range(size, count)))
            own_C = torch.cat([torch.arange(size), torch.tensor(own[-1], dtype=torch.long)])
            absent_C = torch.cat([absent_V, torch.zeros(len(own[-1]), dtype=torch.bool)])
            numberings.append(Table(own_C, absent_C, size) if any(inner) else IN_PLACE)
        base, tuned = numberings
        base_named, tuned_named = map(tuple, named)
        return cls(size, base, tuned, own[0], own[1], base_named, tuned_named, tokenizers=tokenizers)._told(rows)

    @classmethod
    def _mapped(cls, rows: tuple[int, int], id_of: dict[int, int], tokenizers: tuple[Any, Any]) -> Vocabularies:
        """Tokens that both have have other ids in tuned: `id_of` leads from base's ids to tuned's."""
        size = rows[0]
        known = set(id_of.values())
        own = tuple(i for i in range(size) if i not in id_of), tuple(i for i in range(rows[1]) if i not in known)
        absent_V = torch.zeros(size, dtype=torch.bool)
        absent_V[list(own[0])] = True
        starts = torch.arange(size), torch.tensor([id_of.get(i, 0) for i in range(size)])
        base, tuned = (
            Table(
                torch.cat([start_V, torch.tensor(mine, dtype=torch.long)]),
                torch.cat([absent_V, torch.zeros(len(mine), dtype=torch.bool)]),
                size,
            )
            for start_V, mine in zip(starts, own)
        )
        return cls(size, base, tuned, own[0], own[1], mapped=True, tokenizers=tokenizers)._told(rows)

    def _told(self, rows: tuple[int, int]) -> Vocabularies:
        """The same, with notes of what differs between the vocabularies."""
        notes = []
        if rows[0] != rows[1]:
            notes.append(
                f"vocabularies of {rows[0]} and {rows[1]} tokens: compared on the shared {self.shared}"
                if not self.mapped
                else f"vocabularies of {rows[0]} and {rows[1]} tokens, {self.shared} of them in both"
            )
        if self.mapped:
            notes.append(
                f"{self.shared} tokens are in both vocabularies, with other ids in tuned: read through a table"
            )
        for side, one, other, only, within_rows in (
            (0, "base", "tuned", self.base_only, self.base_named),
            (1, "tuned", "base", self.tuned_only, self.tuned_named),
        ):
            names = [self.name(side, n) for n in (*within_rows, *range(self.size, self.size + len(only)))]
            named = [name for name in names if not name.startswith(NO_TOKEN)]
            if named:
                more = f", … and {len(named) - NAMED} more" if len(named) > NAMED else ""
                notes.append(
                    f"{one} has {len(named)} token{'s' * (len(named) > 1)} that {other} lacks: "
                    + ", ".join(map(visible, named[:NAMED]))
                    + more
                )
            if within_rows:
                notes.append(
                    f"{other}'s network has rows for {len(within_rows)} of these, so they are read and compared"
                )
            if bare := len(names) - len(named):
                notes.append(f"{one} has {bare} row{'s' * (bare > 1)} that {other} lacks and that no tokenizer names")
        return replace(self, notes=tuple(notes))

    @property
    def differ(self) -> bool:
        """Whether one model has tokens, or rows for tokens, that the other lacks."""
        return bool(self.base_only or self.tuned_only or self.base_named or self.tuned_named)

    @property
    def shared(self) -> int:
        """Number of tokens that are compared."""
        return self.size if self.readable_V is None else int(self.readable_V.sum())

    @cached_property
    def readable_V(self) -> Tensor | None:
        """Which numbers below `size` both models can read; None for all."""
        return ~self.base.absent_C[: self.size] if isinstance(self.base, Table) else None

    @property
    def encoder(self) -> Any:
        """The tokenizer that encodes text for both models: base's, or tuned's where its chat template needs it.

        That is where the template uses added tokens which base's tokenizer lacks. Those for which base's network has no row
        are then taken out of what both read.
        """
        base, tuned = self.tokenizers
        if base is tuned or None in (base, tuned) or not (self.base is IN_PLACE and self.tuned is IN_PLACE):
            return base
        known = {str(token): id for id, token in tuned.added_tokens_decoder.items()}
        if any(known.get(str(token)) != id for id, token in base.added_tokens_decoder.items()):
            return base
        template = str(getattr(tuned, "chat_template", None) or "")
        named = {str(getattr(tuned, f"{kind}_token", None)) for kind in ("bos", "eos") if f"{kind}_token" in template}
        new = (token for token, id in known.items() if base.convert_tokens_to_ids(token) != id)
        return tuned if any(token in template or token in named for token in new) else base

    def readable(self, number: int) -> bool:
        """Whether both models can read the token of this number."""
        return number < self.size and (self.readable_V is None or bool(self.readable_V[number]))

    def in_order_of_tuned(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """A table of base's, with a row for each of its ids, in the order of tuned's ids.

        Rows of tokens that base lacks are those of tuned's own table, `theirs`.
        """
        numbers = torch.arange(self.size)
        numbers = numbers if self.readable_V is None else numbers[self.readable_V]
        rows = theirs.clone()
        rows[self.tuned.ids(numbers).to(rows.device)] = ours[self.base.ids(numbers).to(ours.device)].to(rows)
        return rows

    def probes(self) -> Tensor:
        """The probe texts as numbers (B, T), as base's tokenizer cuts them; another token stands for one that is not shared.

        Raises `PairError` where the tokenizers cut none of the texts alike, so that no text can be compared.
        """
        if not any(self.cut_alike(PROBES)):
            ours, theirs = (t(PROBES[0], add_special_tokens=False)["input_ids"] for t in self.tokenizers)
            raise PairError(
                "base and tuned cut the same text into different tokens",
                expected=f"{ours[:8]} (base)",
                got=f"{theirs[:8]} (tuned) for {PROBES[0][:24]!r}; " + "; ".join(self.notes),
                remedy="take a pair with one tokenizer; streams at different tokens cannot be compared",
            )
        ids_BT = probe_ids(self.tokenizers[0], self.size)
        return (
            ids_BT if self.readable_V is None else ids_BT.where(self.readable_V[ids_BT], self.readable_V.int().argmax())
        )

    def name(self, side: int, number: int) -> str:
        """The text of a token that base (0) or tuned (1) knows by this number; ``<id N>`` for a row that is no token."""
        numbering = self.tuned if side else self.base
        id = int(numbering.ids(torch.tensor(number)))
        tokenizer = self.tokenizers[side]
        if tokenizer is None or tokenizer.convert_ids_to_tokens(id) is None:
            return f"{NO_TOKEN}{id}>"
        return str(tokenizer.decode([id]) or tokenizer.convert_ids_to_tokens(id))

    def cut_alike(self, texts: Sequence[str]) -> list[bool]:
        """Whether both tokenizers cut each text into the same tokens, all of them known to both models."""
        if self.alike or not texts:
            return [True] * len(texts)
        return [all(map(self._cut_alike, self._between.split(text))) for text in texts]

    @cached_property
    def _between(self) -> re.Pattern[str]:
        """What parts a text at added tokens that only one tokenizer knows, and whose rows both networks have."""
        named = ((0, n) for n in self.base_named), ((1, n) for n in self.tuned_named)
        names = sorted({self.name(side, n) for side, n in chain(*named)}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _cut_alike(self, text: str) -> bool:
        ours, theirs = (t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in self.tokenizers)
        theirs = self.tuned.numbers(torch.tensor(theirs, dtype=torch.long)).tolist()
        return bool(ours == theirs) and all(map(self.readable, ours))

    def read_by_both(self, tokens: Tokens, tokenizer: Any, least: float) -> tuple[Tokens, list[str]]:
        """The rows that both models can read, and notes of what was left out.

        Tokens that one model lacks are taken out of rows. Documents that the tokenizers cut differently are left out,
        because a model reads tokens it would not have cut as something it was not trained on.

        tokenizer   what the rows were encoded with
        least       smallest share (0..1) of the text that must be left

        Raises `PairError` where less is left.
        """
        notes: list[str] = []
        rows, prompts, left, touched = [], [], 0, set()
        for row, (ids, prompt) in enumerate(zip(tokens.rows, tokens.prompt_R)):
            kept = [self.readable(i) for i in ids]
            left += len(kept) - sum(kept)
            if not all(kept):
                touched.add(tokens.document_R[row])
                prompt, ids = sum(kept[:prompt]), tuple(i for i, keep in zip(ids, kept) if keep)
            rows.append(ids)
            prompts.append(prompt)
        if left:
            tokens = replace(tokens, rows=tuple(rows), prompt_R=tuple(prompts))
            tokens = tokens.only([row for row, ids in enumerate(tokens.rows) if ids])
            notes.append(
                f"{left} tokens that only one model knows were left out of {len(touched)} documents, "
                "because the other cannot read them"
            )
        if self.alike:
            return tokens, notes
        of: dict[int, list[int]] = {}
        for row, document in enumerate(tokens.document_R):
            of.setdefault(document, []).append(row)
        texts = [tokenizer.decode([i for row in mine for i in tokens.rows[row]]) for mine in of.values()]
        alike = {document for document, same in zip(of, self.cut_alike(texts)) if same}
        if len(alike) == len(of):
            return tokens, notes
        fit = tokens.only([row for row, document in enumerate(tokens.document_R) if document in alike])
        share = fit.count / tokens.count
        if share < least or not alike:
            raise PairError(
                f"base and tuned cut {1 - share:.0%} of the text into different tokens",
                expected=f"at least {least:.0%} of the text cut alike, because streams are compared token by token",
                got=f"{share:.0%}; " + "; ".join(self.notes),
                remedy="take a pair with one tokenizer, or --set pair.shared_text=0 to compare on what is left",
            )
        notes.append(
            f"{len(of) - len(alike)} of {len(of)} documents ({1 - share:.0%} of the text) were left out, "
            "because the tokenizers cut them differently"
        )
        return fit, notes


def probe_ids(tokenizer: Any, vocabulary: int) -> Tensor:
    """Return the probe texts as token ids (B, T), cut to the shortest; 0 stands where a token is not shared."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    length = min(map(len, rows))
    return torch.tensor([[i if i < vocabulary else 0 for i in row[:length]] for row in rows])


def _vocabulary(tokenizer: Any, rows: int) -> dict[Any, int]:
    """The tokens of a tokenizer and their ids, without those that the network has no row for."""
    return {token: id for token, id in tokenizer.get_vocab().items() if id < rows}


def _pieces(tokenizer: Any, rows: int) -> dict[Any, int]:
    """The tokens of a tokenizer as the bytes that they stand for, so that tokenizers of other alphabets compare."""
    alphabet, named = _alphabet(tokenizer), _vocabulary(tokenizer, rows)
    if alphabet == "bytes":
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = set(tokenizer.added_tokens_decoder)
    pieces: dict[Any, int] = {}
    for token, id in sorted(named.items(), key=lambda item: item[1]):
        piece: Any = token
        if id not in added and alphabet == "bytes" and all(c in byte_of for c in token):
            piece = bytes(byte_of[c] for c in token)
        elif id not in added and alphabet == "words":
            hexadecimal = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            piece = bytes([int(token[3:5], 16)]) if hexadecimal else token.replace("▁", " ").encode()
        pieces.setdefault(piece, id)
    return pieces


def _backend(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer as plain values; empty for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return json.loads(backend.to_str()) if backend is not None else {}


def _alphabet(tokenizer: Any) -> str:
    """How a tokenizer writes bytes in its tokens: ``bytes`` (GPT-2's alphabet), ``words`` (``▁`` for a space), or other."""
    told = json.dumps(_backend(tokenizer).get("decoder"))
    return "bytes" if '"ByteLevel"' in told else "words" if "▁" in told or "\\u2581" in told else "other"


def _cut_differences(ours: Any, theirs: Any) -> list[str]:
    """What differs in how two tokenizers cut a text, besides their tokens, in sentences."""
    one, other = _backend(ours), _backend(theirs)
    if not one or not other:
        cut = [[t(text, add_special_tokens=False)["input_ids"] for text in PROBES] for t in (ours, theirs)]
        return [] if cut[0] == cut[1] else ["the tokenizers cut text differently"]
    told = []
    for part, what in (("normalizer", "normalize text"), ("pre_tokenizer", "split text into words")):
        if one.get(part) != other.get(part):
            told.append(f"the tokenizers {what} differently")
    rules = [{k: v for k, v in side["model"].items() if k != "vocab"} for side in (one, other)]
    if rules[0] != rules[1]:
        told.append("the tokenizers cut words by different rules")
    flags = [
        {t["content"]: {k: v for k, v in t.items() if k != "id"} for t in side.get("added_tokens", ())}
        for side in (one, other)
    ]
    if any(flags[0][token] != flags[1][token] for token in flags[0].keys() & flags[1].keys()):
        told.append("the tokenizers read added tokens in a text differently")
    return told


def _special_differences(ours: Any, theirs: Any) -> list[str]:
    """Which special tokens differ, in sentences."""
    told = []
    for kind in ("bos", "eos", "pad"):
        mine, other = (getattr(tokenizer, f"{kind}_token", None) for tokenizer in (ours, theirs))
        if mine != other:
            told.append(f"the {kind} token is {visible(str(mine))} in base and {visible(str(other))} in tuned")
    return told
