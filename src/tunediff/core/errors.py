"""The one tree of errors. Each says what is wrong, what was expected, what it got and what to try."""

from __future__ import annotations


class TunediffError(Exception):
    """An error that a user can act on, in up to four lines.

    ``what`` names the thing and its fault; ``expected``, ``got`` and ``remedy`` are optional sentences.
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", remedy: str = ""):
        self.what, self.expected, self.got, self.remedy = what, expected, got, remedy
        super().__init__(self.__str__())

    def lines(self) -> list[str]:
        """The lines of the message, without empty ones."""
        told = [self.what]
        for label, text in (("expected", self.expected), ("got", self.got), ("try", self.remedy)):
            if text:
                told.append(f"  {label}: {text}")
        return [" ".join(line.splitlines()) for line in told]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class SettingError(TunediffError):
    """A setting is unknown, out of range or of the wrong type."""


def within(part: str, settings: object, **bounds: float | tuple[float, float]) -> None:
    """Raise `SettingError` for the first field of `settings` that is out of bounds.

    A bound is the smallest value allowed, or the smallest and the largest; both are included. NaN and what is infinite
    are out of bounds.
    """
    for name, bound in bounds.items():
        low, high = bound if isinstance(bound, tuple) else (bound, float("inf"))
        value = getattr(settings, name)
        if not (low <= value <= high and value < float("inf")):
            expected = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
            raise SettingError(f"{part}.{name} is out of range".lstrip("."), expected=expected, got=str(value))


class VariantError(TunediffError):
    """A named variant (dictionary, finder, signal, trial, family, organism) does not exist or does not fit."""


class ArtifactError(TunediffError):
    """A folder or file is missing, damaged, unfinished, of another schema or made from other models."""


class SourceError(TunediffError):
    """A model, adapter or corpus could not be read, or is of a kind that is refused (a pickle, say)."""


class PairError(TunediffError):
    """Base and tuned cannot be compared."""


class CorpusError(TunediffError):
    """The text cannot serve: empty, too short, or without a held-out part."""


class FamilyError(TunediffError):
    """A network's blocks, streams or unembedding could not be located, or did not read back right."""


class NumericsError(TunediffError):
    """Non-finite values, or a self-check on numbers that failed."""


class MissingExtraError(TunediffError):
    """An optional dependency is not installed."""


def first_line(error: BaseException, length: int | None = 200) -> str:
    """The first line of an error's text, cut at `length` characters, or the error's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]
