"""Template worker: a script that renders chat templates, which are foreign programs, in a process of its own.

A line of JSON on stdin asks, a line on stdout answers. It imports the standard library and jinja2 alone, so it starts
quickly. It may not write files, its memory is bounded, and the system ends it where its parent could not.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY = 2 << 30
"""Largest address space of the process, in bytes."""
GRACE = 5
"""Seconds after its time limit at which a rendering ends itself, should the parent be gone."""


def environment() -> Any:
    """The sandbox in which transformers renders chat templates, with its filters, functions and tags."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """``{% generation %}``, which marks an assistant's words, leaves them as they are."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Names(Namespace):
        """A namespace without private names."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"{name} is a private name")
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals.update(
        raise_exception=raise_exception, namespace=Names, dict=lambda *args, **named: dict(*args, **named)
    )
    return made


def answer(compiled: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The text of one chat, or why there is none."""
    from jinja2.exceptions import TemplateSyntaxError

    def strftime_now(format: str) -> str:
        return datetime.datetime.fromisoformat(request["date"]).strftime(format)

    try:
        template = compiled(request["template"])
    except TemplateSyntaxError as error:
        return {"syntax": f"line {error.lineno}: {error.message}"}
    random.seed(0)  # templates may shuffle and choose
    pieces, size = [], 0
    for piece in template.generate(strftime_now=strftime_now, **request["variables"]):
        pieces.append(piece)
        size += len(piece)
        if size > request["most"]:
            return {"refused": f"more than {request['most']:,} characters of output"}
    text = "".join(pieces)
    text.encode()
    return {"text": text}


def main() -> None:
    """Answer requests until stdin ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    compiled = lru_cache(environment().from_string)
    sys.stdout.buffer.write(b"{}\n")  # ready
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        with contextlib.suppress(AttributeError):  # Windows has no alarm
            signal.alarm(int(request["seconds"]) + GRACE)
        try:
            reply = answer(compiled, request)
        except Exception as error:  # a template raises anything
            reply = {"refused": str(error) or type(error).__name__}
        with contextlib.suppress(AttributeError):
            signal.alarm(0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
