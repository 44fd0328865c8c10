"""Chat templates: which one a pair is read and asked in, and what is done with chats that it does not take."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunediff.core.artifacts import key_of
from tunediff.core.errors import CorpusError, SettingError
from tunediff.core.text import visible

Messages = tuple[tuple[str, str], ...]
"""(role, content) of each turn of a chat."""

NAMED = ("auto", "base", "tuned", "plain")
"""Values of the setting ``pair.template`` that name no file."""
DATE = "2024-07-26"
"""The day that a template is told when it asks for today's: the one that Llama 3's own templates fall back to."""
SECONDS = 10.0
"""Longest time that a template may take for one chat."""
RESERVED = ("messages", "add_generation_prompt", "tools", "documents", "strftime_now", "raise_exception")
"""Variables of a template that are not the user's to set."""
OUTPUT_CHARACTERS = 100_000
"""Most characters that a template may write for a chat, besides ten times the chat's own."""
LARGEST = 1 << 20
"""Largest template that is read, in characters."""
PLAIN_END = "\nUser:"
"""What a model that answers in plain lines writes where its answer is over and the next turn begins."""
SYSTEM = ("system", "developer")
"""Roles whose text instructs the assistant and is no turn."""


class Refused(Exception):
    """A template does not take a chat; the text says why, in its author's words."""


class TooSlow(Refused):
    """A template did not end on a chat in time."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text, the messages that were rendered, and how these were adapted to the template."""

    text: str
    messages: Messages
    how: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """The form in which chats are read and asked: a Jinja template with its variables, or plain lines.

    A template is a foreign program. It runs in the sandbox that transformers uses, in a process of its own, with limits
    of time, memory and output. Equal templates give equal text on every day: the date and random choices are fixed.
    """

    origin: str
    """Where it comes from: "tuned", "base", "plain" or a file's path."""
    text: str = field(default="", repr=False)
    """The Jinja template; empty for plain lines."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template is given besides messages: special tokens such as ``bos_token``, and the user's options."""
    date: str = DATE
    """The day, YYYY-MM-DD, that it is told as today's."""
    seconds: float = SECONDS
    """Longest time for one chat; no part of the fingerprint."""

    @classmethod
    def of(cls, tokenizer: Any, origin: str = "tokenizer", **settings: Any) -> ChatTemplate | None:
        """The template that a tokenizer brings, the one named "default" of several; None if it brings none."""
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, (list, tuple)):
            own = {named["name"]: named["template"] for named in own}
        if isinstance(own, Mapping):
            name = "default" if "default" in own else next(iter(sorted(own)), "")
            origin, own = (origin if name in ("default", "") else f"{origin} ({name})"), own.get(name)
        if not isinstance(own, str) or not own.strip():
            return None
        return cls(origin, own, **settings)._with_tokens(tokenizer)

    @classmethod
    def chosen(
        cls,
        setting: str,
        base: Any,
        tuned: Any,
        options: Mapping[str, Any] | None = None,
        date: str = DATE,
        seconds: float = SECONDS,
    ) -> ChatTemplate:
        """The template that ``pair.template`` names, given both models' tokenizers; auto is tuned's, else base's, else plain.

        Raises `SettingError` where the model that is named has none, or the file cannot be read.
        """
        rest: dict[str, Any] = {"variables": dict(options or {}), "date": date, "seconds": seconds}
        plain = cls("plain", **rest)
        if setting == "plain":
            return plain
        sides = {"tuned": tuned, "base": base}
        if setting not in NAMED:
            return cls(setting, template_file(setting), **rest)._with_tokens(tuned)
        for side in sides if setting == "auto" else [setting]:
            if found := cls.of(sides[side], side, **rest):
                return found
        if setting == "auto":
            return plain
        raise SettingError(
            f"{setting} brings no chat template",
            expected="a tokenizer with one",
            remedy="--set pair.template=auto, or --set pair.template=plain",
        )

    def _with_tokens(self, tokenizer: Any) -> ChatTemplate:
        """This template with a tokenizer's special tokens among its variables; the user's options come first."""
        tokens = {
            name: [*map(str, token)] if isinstance(token, (list, tuple)) else str(token)
            for name, token in getattr(tokenizer, "special_tokens_map", {}).items()
        }
        return ChatTemplate(self.origin, self.text, {**tokens, **self.variables}, self.date, self.seconds)

    @cached_property
    def fingerprint(self) -> str:
        """A 16-digit content key of everything that the rendered text depends on."""
        return key_of("chat template", self.text, self.variables, self.date)

    @property
    def end(self) -> str:
        """Text at which an answer is over, besides end-of-turn tokens; empty if there is none."""
        return "" if self.text else PLAIN_END

    def __str__(self) -> str:
        """The template in a note: whose it is, and the fingerprint that tells it from others."""
        return f"the chat template of {self.origin} ({self.fingerprint})" if self.text else "plain lines"

    @property
    def is_dated(self) -> bool:
        """Whether the template may ask for today's date."""
        return "strftime_now" in self.text

    def render(self, messages: Messages, open: bool = False) -> Rendered:
        """Return a chat as text; if `open`, with the opening of the assistant's next turn.

        Where the template refuses the chat, or leaves out what a system or tool turn says, the chat is adapted with as
        few changes as it takes. Raises `Refused` if no adaptation is taken, `CorpusError` for what is no Jinja template.
        """
        first: Refused | None = None
        lossy: Rendered | None = None
        for how, adapted in _adaptations(messages):
            try:
                text = self.written(adapted, open)
            except TooSlow:
                raise
            except Refused as refusal:
                first = first or refusal
                continue
            lost = _lost(adapted, text)
            if not any(role not in ("user", "assistant") for role in lost):
                return Rendered(text, adapted, (*how, *map(_part_lost, lost)))
            lossy = lossy or Rendered(text, adapted, (*how, *map(_part_lost, lost)))
        if lossy is None:
            raise first or Refused("it takes none of its turns")
        return lossy

    def written(self, messages: Messages, open: bool = False) -> str:
        """Return these very messages as text; raises as `render` does, without adapting anything."""
        if not self.text:
            lines = [f"{role.capitalize()}: {content}\n" for role, content in messages]
            return "".join([*lines, "Assistant:"] if open else lines)
        most = OUTPUT_CHARACTERS + 10 * sum(len(content) for _, content in messages)
        reply = _ask(
            {
                "template": self.text,
                "variables": {
                    "tools": None,
                    "documents": None,
                    **self.variables,
                    "messages": [{"role": role, "content": content} for role, content in messages],
                    "add_generation_prompt": open,
                },
                "date": self.date,
                "most": most,
                "seconds": self.seconds,
            }
        )
        if "syntax" in reply:
            raise CorpusError(
                f"{self} is no Jinja template",
                got=visible(reply["syntax"])[:200],
                remedy="--set pair.template=plain, or a file with a template",
            )
        if "late" in reply:
            raise TooSlow(f"no end within {self.seconds:g} s")
        if "text" not in reply:
            raise Refused(str(reply.get("refused", "no answer")))
        return str(reply["text"])

    def end_of_turn(self, tokenizer: Any) -> set[int]:
        """The special token that follows an assistant's words in this template, as its id; empty if there is none."""
        try:
            text = self.written((("user", "a"), ("assistant", "zq")))
        except (Refused, CorpusError):
            return set()
        ids = tokenizer(text.rpartition("zq")[2], add_special_tokens=False)["input_ids"]
        added = getattr(tokenizer, "added_tokens_decoder", {})
        return {ids[0]} if self.text and "zq" in text and ids and ids[0] in added else set()


def template_file(path: str) -> str:
    """The text of a template file; raises `SettingError` for one that is missing, too large, or no template."""
    file = Path(path).expanduser()
    expected = "auto, base, tuned, plain, or a file that holds a Jinja template"
    if not file.is_file():
        raise SettingError(f"pair.template: {path} is no file", expected=expected, got=path)
    try:
        if file.stat().st_size > LARGEST:
            raise SettingError(f"pair.template: {path} is too large", expected=f"at most {LARGEST:,} bytes")
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingError(f"pair.template: {path} is not UTF-8 text", expected=expected) from None
    except OSError as error:
        raise SettingError(f"pair.template: {path} cannot be read", got=error.strerror or str(error)) from None
    if not text.strip():
        raise SettingError(f"pair.template: {path} is empty", expected=expected)
    try:
        ChatTemplate(path, text).written(())
    except Refused:
        pass  # it refuses a chat without a turn, as it may
    except CorpusError as error:
        raise SettingError(
            f"pair.template: {path} is no Jinja template",
            expected=expected,
            got=error.got,
            remedy="--set pair.template=plain",
        ) from None
    return text


def check_options(options: Mapping[str, Any], date: str) -> None:
    """Raise `SettingError` for options that a template cannot be given, or a date that is none."""
    for name in options:
        if name in RESERVED or not name.isidentifier():
            raise SettingError(
                f"pair.template_options.{name} cannot be set",
                expected=f"a variable of the template other than {', '.join(RESERVED)}",
                remedy="--set 'pair.template_options={enable_thinking=false}'",
            )
        try:
            json.dumps(options[name])
        except (TypeError, ValueError):
            raise SettingError(
                f"pair.template_options.{name} is of the wrong type",
                expected="text, a number, true, false, or a list or table of these",
                got=type(options[name]).__name__,
            ) from None
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise SettingError(
            "pair.date is no date", expected="YYYY-MM-DD", got=date, remedy=f"--set pair.date={DATE}"
        ) from None


# -- adapting chats ----------------------------------------------------------------------------------------------


def _lost(messages: Messages, text: str) -> list[str]:
    """Roles of turns that say something which is not in the text; white space aside."""
    packed = "".join(text.split())
    lost = [role for role, content in messages if "".join(content.split()) not in packed]
    return sorted(set(lost))


def _part_lost(role: str) -> str:
    return f"chats of which the template leaves out part of what {role} says"


def _tools_as_user(messages: Messages) -> Messages:
    known = ("user", "assistant", *SYSTEM)
    return tuple((role if role in known else "user", content) for role, content in messages)


def _system_folded(messages: Messages) -> Messages:
    """Each system text goes before the next user turn's, or becomes a user turn of its own where there is none."""
    out: list[tuple[str, str]] = []
    waiting: list[str] = []
    for role, content in messages:
        if role in SYSTEM:
            waiting.append(content)
        elif role == "user" and waiting:
            out.append((role, "\n\n".join([*waiting, content])))
            waiting = []
        else:
            out.append((role, content))
    return tuple(out + [("user", content) for content in waiting])


def _opening_answer_left_out(messages: Messages) -> Messages:
    head = tuple(itertools.takewhile(lambda message: message[0] in SYSTEM, messages))
    rest = itertools.dropwhile(lambda message: message[0] == "assistant", messages[len(head) :])
    return (*head, *rest)


def _merged(messages: Messages) -> Messages:
    out: list[tuple[str, str]] = []
    for role, group in itertools.groupby(messages, key=lambda message: message[0]):
        out.append((role, "\n\n".join(content for _, content in group)))
    return tuple(out)


ADAPTATIONS: dict[str, Callable[[Messages], Messages]] = {
    "chats whose tool turns are read as the user's": _tools_as_user,
    "chats whose system text is put before the user's": _system_folded,
    "chats whose opening answer is left out": _opening_answer_left_out,
    "chats with turns of one role in a row, merged": _merged,
}
"""What may be done to a chat that a template refuses, in the order in which it is done."""


def _adaptations(messages: Messages) -> list[tuple[tuple[str, ...], Messages]]:
    """The chat as it is, then adapted in every way that changes it, with few steps before many."""
    seen, out = set(), []
    for count in range(len(ADAPTATIONS) + 1):
        for how in itertools.combinations(ADAPTATIONS, count):
            adapted = messages
            for step in how:
                adapted = ADAPTATIONS[step](adapted)
            if adapted and adapted not in seen:
                seen.add(adapted)
                out.append((how, adapted))
    return out


# -- the worker --------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_workers: dict[int, subprocess.Popen[bytes]] = {}


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer to a request, ``{"late": True}`` if it took too long, or ``{"refused": …}`` if it died."""
    with _lock:
        worker = _workers.get(os.getpid()) or _started()
        late = threading.Event()

        def stop() -> None:
            late.set()
            worker.kill()

        watchdog = threading.Timer(request["seconds"], stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            reply = _exchange(worker, json.dumps(request).encode() + b"\n")
        finally:
            watchdog.cancel()
        if reply is None:
            _end(worker)
            return {"late": True} if late.is_set() else {"refused": "its program died"}
        return reply


def _exchange(worker: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | None:
    """One line there and one back; None if the worker has ended."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
        return dict(json.loads(worker.stdout.readline()))
    except (OSError, ValueError):
        return None


def _started() -> subprocess.Popen[bytes]:
    """A worker that is ready; one serves a whole process."""
    script = Path(__file__).with_name("template_worker.py")
    try:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert worker.stdout is not None
        ready = bool(worker.stdout.readline())
    except OSError as error:
        raise CorpusError("chat templates cannot be run", got=str(error), remedy="--set pair.template=plain") from None
    if not ready:
        _end(worker)
        raise CorpusError(
            "chat templates cannot be run", expected="jinja2 3.1.6 or newer", remedy="pip install -U jinja2"
        )
    _workers[os.getpid()] = worker
    return worker


@atexit.register
def _end_all() -> None:
    for worker in [worker for process, worker in _workers.items() if process == os.getpid()]:
        _end(worker)


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a worker, wait for it and close its pipes."""
    _workers.pop(os.getpid(), None)
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    worker.wait()
