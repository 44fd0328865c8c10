"""What tuned itself would ask: user's turns that it writes, with its difference from base amplified."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunediff.core.errors import CorpusError, within
from tunediff.harvests.asking import Asking, said
from tunediff.harvests.elicitors.base import Elicitor, Scope
from tunediff.harvests.questions import Question
from tunediff.texts.chat_template import Refused
from tunediff.texts.tokens import leading_ids

MARK = "zq"
"""In place of what the user says, to find where that begins."""
SENTENCE_ENDS = ".?!。？！"
"""Characters that end a sentence."""


@dataclass(frozen=True)
class OwnQuestions(Elicitor):
    """Lets tuned write user's turns from the start of the chat template, drawn away from base, and asks them.

    Training text leaks into what a model writes there (2605.25902 recovers it by the same amplification).
    """

    tokens: int = 24
    """Largest number of tokens in a question; one that is cut off there keeps its whole sentences."""
    amplification: float = 2.0
    """Strength of tuned's difference from base in what it writes; 0 leaves tuned as it is."""
    temperature: float = 1.0
    """Sampling temperature; lower ones repeat themselves."""

    def __post_init__(self) -> None:
        within("elicit.own_questions", self, tokens=1, amplification=0, temperature=0.01)

    def search(self, scope: Scope) -> None:
        """Write more questions than may be asked, as some are kept for testing, and ask them."""
        asking, pair = scope.asker.asking, scope.pair
        start = _start(asking)
        if not start or not scope.left:
            return
        writer = replace(asking, tokens=self.tokens)
        away = {"against": pair.base, "amplification": self.amplification} if self.amplification else None
        written = writer.answers(pair.tuned, [start] * (2 * scope.left), self.temperature, away=away)
        texts = (
            _whole(said(pair.tuned, ids, skip_special_tokens=True), bool(set(ids[-1:]) & asking.ends))
            for ids in written
        )
        scope.ask(Question(text) for text in dict.fromkeys(texts) if len(text) > 2)


def _whole(text: str, ended: bool) -> str:
    """The first line of what was written, without broken characters; up to its last whole sentence where it was cut off.

    What holds no whole sentence stays as it is.
    """
    line, broken, _ = text.replace("\N{REPLACEMENT CHARACTER}", "").strip().partition("\n")
    last = max(line.rfind(mark) for mark in SENTENCE_ENDS) + 1
    return (line if ended or broken or not last else line[:last]).strip()


def _start(asking: Asking) -> list[int]:
    """The ids of a chat up to where the user's first turn begins; empty where the template does not show it."""
    try:
        text = asking.template.written((("user", MARK),))
    except (Refused, CorpusError):
        return []
    before, mark, _ = text.rpartition(MARK)
    tokenizer = asking.pair.tokenizer
    ids = [*leading_ids(tokenizer), *tokenizer(before, add_special_tokens=False)["input_ids"]]
    return ids if mark and all(map(asking.pair.vocabularies.readable, ids)) else []


VARIANT = OwnQuestions
