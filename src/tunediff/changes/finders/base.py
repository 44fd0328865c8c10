"""What every finder is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tunediff.changes.attributions import Shift
from tunediff.dictionaries.architectures.base import Spec
from tunediff.dictionaries.fitted import Fitted
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests.harvest import Harvest
from tunediff.models.pair import Pair
from tunediff.records.change import Change


@dataclass(frozen=True, eq=False)
class View:
    """What a finder may look at. It must not read the harvest's held-out split.

    folder      the finder's own, for what it wants to keep
    candidates  how many changes it may propose at most
    spec, fit   settings of a dictionary, for finders that fit one
    shift       for finders that ask how the output moves at every training token; costs a run of the upper blocks, once
    pair        both models, for finders that look at weights
    progress    told (tokens done, tokens in all, what the curve says)
    device      where a dictionary is fitted; results do not stay there
    """

    harvest: Harvest
    folder: Path
    seed: int
    candidates: int
    spec: Spec
    fit: FitSettings
    shift: Callable[[], Shift]
    pair: Pair
    progress: Callable | None = None
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Found:
    """The changes a finder proposes, and the dictionaries it fitted on the way."""

    changes: list[Change]
    fits: dict[str, Fitted] = field(default_factory=dict)


@dataclass(frozen=True)
class Finder(ABC):
    """Who proposes changes: its settings, each with a docstring under it, and `find`.

    Its name is its file's name, or its import path; its settings are ``find.NAME.field``.
    """

    control: ClassVar[bool] = False
    """Whether it is a control for the other finders: it must not find what is there."""

    offset: ClassVar[bool] = False
    """Whether its changes are the constant offset, which other finders leave out of theirs."""

    @abstractmethod
    def find(self, view: View) -> Found:
        """Propose changes from the training split."""
