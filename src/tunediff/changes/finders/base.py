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


class Finder(ABC):
    """Stateless; its name is its file's name."""

    control: ClassVar[bool] = False
    """Whether it looks for nothing and is there for the others to be held against: it must not find what is there."""

    @abstractmethod
    def find(self, view: View) -> Found:
        """Propose changes from the training split."""
