"""The interface of a finder: its input `View`, its output `Found`, and the base class `Finder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tunediff.changes.attributions import Shift
from tunediff.changes.outputs import Outputs
from tunediff.dictionaries.architectures.base import Spec
from tunediff.dictionaries.fitted import Fitted
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests.harvest import Harvest
from tunediff.models.pair import Pair
from tunediff.records.change import Change


@dataclass(frozen=True, eq=False)
class View:
    """The input of a finder. A finder must not read the harvest's held-out split.

    folder      folder for the finder's own files
    candidates  largest number of changes to propose
    spec, fit   settings of a dictionary, for finders that fit one
    shift       returns the output shift at every training token; the first call runs the upper blocks once
    pair        both models, for finders that read weights
    progress    called with (tokens done, all tokens, points of the training curve)
    device      device on which a dictionary is fitted; results must be returned on the CPU
    outputs     both models' distributions at the training tokens, for finders of changes at the output
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
    outputs: Outputs | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """The changes that a finder proposes, and the dictionaries fitted for them."""

    changes: list[Change]
    fits: dict[str, Fitted] = field(default_factory=dict)


@dataclass(frozen=True)
class Finder(ABC):
    """Base class of finders: a dataclass of settings with a method `find`.

    A finder's name is its file's name or its import path. Each setting is ``find.NAME.field``, with a docstring under
    it.
    """

    control: ClassVar[bool] = False
    """Whether the finder is a control, which must not find the planted changes."""

    offset: ClassVar[bool] = False
    """Whether the finder's changes are the constant offset, which other finders leave out of their own changes."""

    at_output: ClassVar[bool] = False
    """Whether the finder's changes claim tokens: what is said more or less often, or could be."""

    @abstractmethod
    def find(self, view: View) -> Found:
        """Propose changes from the training split."""
