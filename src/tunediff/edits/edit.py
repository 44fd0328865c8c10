"""Edits: other values for some parameters of one fine-tuned model, used live, saved and loaded, or baked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from tunediff.core.artifacts import read_tensors, write_tensors
from tunediff.core.errors import ArtifactError, within
from tunediff.core.manifests import finish, open_folder
from tunediff.core.typed import typed
from tunediff.models.fingerprints import fingerprint
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair

SCHEMA = "tunediff.edit/1"
FILE = "edit.safetensors"
REMEDY = "give the pair that the edit was made for, loaded with the same pair.dtype"


@dataclass(frozen=True)
class EditSettings:
    """How changes are taken out."""

    strength: float = 1.0
    """Weight of restoring base's map against keeping the tuned one, at equal mass of text (0..inf).
    Too little leaves the behavior, too much takes its neighbors with it."""
    ridge: float = 1e-3
    """Pull toward the tuned map on inputs that are hardly seen, as a share of the mean squared input.
    Too little lets rare inputs be reverted on no evidence, too much blunts the edit."""
    spread: bool = True
    """Whether a change counts as on from its first firing in a row to the row's end, or only where it fires."""
    tokens: int = 4000
    """Training tokens from which moments are taken: a third where the changes are on the most, a third anywhere in what the
    models wrote, and a third neutral text, on which the tuned maps are kept whatever fires."""
    bills: int = 1
    """Number of confirmed changes, first ones first, whose removal `diff` bills."""
    controls: int = 1
    """Number of control edits of equal energy of each kind: along random directions, and aimed at random text."""

    def __post_init__(self) -> None:
        within("edit", self, strength=0, ridge=0, tokens=1, bills=0, controls=0)


@dataclass(frozen=True)
class _Manifest:
    schema: str
    name: str
    operation: str
    changes: list[str]
    base_fingerprint: str
    tuned_fingerprint: str
    files: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Edit:
    """A reversible edit of one fine-tuned model: other values for some of its parameters.

    name        what tells this edit from others in a bill
    operation   how the values were found, such as ``revert`` or ``scale``
    changes     ids of the changes that it takes out
    tensors     new values by the names of the tuned model's parameters and buffers (``model.module.named_parameters()``)
    base_fingerprint, tuned_fingerprint   of the pair whose tuned model the values belong to
    """

    name: str
    operation: str
    changes: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    base_fingerprint: str
    tuned_fingerprint: str
    # Networks that are known to be the one the edit belongs to, so that their weights need not be hashed again.
    _known: WeakSet[nn.Module] = field(default_factory=WeakSet, init=False, repr=False)

    @classmethod
    def of(
        cls, pair: Pair, name: str, operation: str, changes: Sequence[str], tensors: Mapping[nn.Parameter, Tensor]
    ) -> Edit:
        """The edit that gives these parameters of the pair's tuned model these values."""
        names = {parameter: name for name, parameter in reversed(_named(pair.tuned.module).items())}
        named = {names[parameter]: value for parameter, value in tensors.items()}
        edit = cls(name, operation, tuple(changes), named, pair.base_fingerprint, pair.tuned_fingerprint)
        edit._known.add(pair.tuned.module)
        return edit

    @contextmanager
    def on(self, model: LanguageModel) -> Iterator[LanguageModel]:
        """The edited model, for use inside; `model` itself is bit-identical before, inside and after."""
        yield self.applied(model)

    def applied(self, model: LanguageModel) -> LanguageModel:
        """The edited model as a model of its own; the network holds the edit only while that model runs.

        Raises `ArtifactError` where `model` is not the tuned model that the edit was made for.
        """
        return model.variant(f"{model.name} without {', '.join(self.changes)}", self.parameters(model))

    def parameters(self, model: LanguageModel) -> dict[nn.Parameter, Tensor]:
        """The new values by parameter of `model`.

        Raises `ArtifactError` where a name or shape is not in the model, two names are one parameter, or the model's
        weights are not those that the edit was made for.
        """
        named = _named(model.module)
        found: dict[nn.Parameter, Tensor] = {}
        for name, value in self.tensors.items():
            shape = tuple(named[name].shape) if name in named else None
            if shape != tuple(value.shape):
                raise ArtifactError(
                    f"the edit {self.name!r} does not fit {model.name}",
                    expected=f"a parameter {name} of shape {tuple(value.shape)}",
                    got="no such parameter" if shape is None else f"shape {shape}",
                    remedy=REMEDY,
                )
            if named[name] in found:
                raise ArtifactError(
                    f"the edit {self.name!r} gives one parameter of {model.name} two values",
                    expected="one name for each parameter",
                    got=f"{name}, which is tied to another",
                    remedy=REMEDY,
                )
            found[named[name]] = value
        if model.module not in self._known:
            got = fingerprint(model.module)
            if got != self.tuned_fingerprint:
                raise ArtifactError(
                    f"the edit {self.name!r} was made for other weights than those of {model.name}",
                    expected=f"fingerprint {self.tuned_fingerprint}",
                    got=got,
                    remedy=REMEDY,
                )
            self._known.add(model.module)
        return found

    def save(self, folder: Path) -> None:
        """Write tensors and a manifest to `folder`; raises `ArtifactError` where it cannot be written."""
        write_tensors(folder / FILE, self.tensors)
        body = {
            "name": self.name,
            "operation": self.operation,
            "changes": self.changes,
            "base_fingerprint": self.base_fingerprint,
            "tuned_fingerprint": self.tuned_fingerprint,
        }
        finish(folder, SCHEMA, body, [FILE])

    @classmethod
    def load(cls, folder: Path) -> Edit:
        """Read what `save` wrote; raises `ArtifactError` for a folder that is unfinished, changed or of another kind.

        Whether a model is the one the edit belongs to is checked when it is first applied.
        """
        manifest: _Manifest = typed(_Manifest, open_folder(folder, SCHEMA), str(folder))
        return cls(
            manifest.name,
            manifest.operation,
            tuple(manifest.changes),
            read_tensors(folder / FILE),
            manifest.base_fingerprint,
            manifest.tuned_fingerprint,
        )


def _named(module: nn.Module) -> dict[str, Any]:
    """Parameters, then buffers, by name; a tied one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def scaling(pair: Pair, strength: float) -> Edit:
    """Plain scaling: take out a share `strength` (0..1) of everything that fine-tuning changed.

    This covers linear maps, norms, embeddings and the unembedding; at 1 the weights are base's.
    """
    tensors: dict[nn.Parameter, Tensor] = {}
    for delta in pair.deltas():
        tensors.update(delta.without(strength))
    return Edit.of(pair, f"scale {1 - strength:g}", "scale", (), tensors)
