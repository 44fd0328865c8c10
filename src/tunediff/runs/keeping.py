"""Keeping: a stage's finished result is read from the folder of its content key, otherwise made and kept there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tunediff import __version__
from tunediff.core import manifests
from tunediff.core.artifacts import key_of, read_json, write_json
from tunediff.core.errors import ArtifactError
from tunediff.core.typed import typed
from tunediff.records.diff import StageCard

T = TypeVar("T")


class stage(cached_property[T]):
    """A property of a run that is one of its stages; it is computed once, while nothing may write to the models'
    weights.

    Values cached from the weights are dropped at the end. The next stage therefore starts the same, whether this stage
    ran or was read from disk.
    """

    def __get__(self, run: Any, owner: type | None = None) -> Any:
        if run is None:
            return self
        with run.pair.running():
            return super().__get__(run, owner)


@dataclass(frozen=True)
class Place:
    """Where a stage keeps its result: ``STAGE/KEY`` in the run's folder."""

    stage: str
    key: str
    folder: Path

    @property
    def schema(self) -> str:
        """The schema in the manifest of the place."""
        return f"tunediff.{self.stage}/1"

    @property
    def is_finished(self) -> bool:
        """Whether the result is on disk and complete."""
        return manifests.is_finished(self.folder)


@dataclass(eq=False)
class Keeper:
    """A run's stage results on disk, and a card for each stage that was requested."""

    folder: Path
    cards: list[StageCard] = field(default_factory=list)

    def at(self, stage: str, *parts: Any) -> Place:
        """The place of a stage's result; `parts` are everything that the result depends on besides the version."""
        key = key_of(stage, __version__, *parts)
        return Place(stage, key, self.folder / stage / key)

    def kept(
        self,
        place: Place,
        make: Callable[[Path], Iterable[str]],
        read: Callable[[Path], T],
        note: Callable[[T], str] | None = None,
    ) -> T:
        """The result at `place`: read if it is finished and whole, otherwise made first (see `manifests.kept`).

        make   writes the result into a folder and returns the names of its files
        note   returns the text of the stage's card; without `note` the stage gets no card
        """
        began = time.monotonic()
        result = manifests.kept(
            place.folder, place.schema, place.key, lambda: ({}, make(place.folder)), lambda: read(place.folder)
        )
        if note:
            self.done(place, began, note(result))
        return result

    def kept_json(
        self, place: Place, kind: Any, file: str, make: Callable[[Path], Any], note: Callable[[Any], str] | None = None
    ) -> Any:
        """Like `kept`, for a result that is one JSON file of type `kind`; `make` returns the value to write."""

        def written(folder: Path) -> list[str]:
            write_json(folder / file, make(folder))
            return [file]

        return self.kept(place, written, lambda folder: typed(kind, read_json(folder / file), file), note)

    def done(self, place: Place, began: float, *notes: str) -> None:
        """Add a stage's card; the seconds come from the run that made the result, and are kept beside it.

        They are no part of the result: where they are lost or cannot be written, those of this run are told.
        """
        took = place.folder / "took.json"
        try:
            seconds = typed(dict[str, float], read_json(took), took.name)["seconds"]
        except (ArtifactError, LookupError):
            seconds = round(time.monotonic() - began, 2)
            with contextlib.suppress(ArtifactError):
                write_json(took, {"seconds": seconds})
        card = StageCard(place.stage, place.key, seconds, list(notes))
        if card not in self.cards:
            self.cards.append(card)
