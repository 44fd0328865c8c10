"""Artifacts: content keys, and values as JSON and safetensors on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.disk import write_bytes
from tunediff.core.errors import ArtifactError
from tunediff.core.files import read_bytes

if TYPE_CHECKING:
    import torch

CHECKSUM = "checksum"
"""The field of a sealed JSON object that holds the SHA-256 of the others' canonical JSON."""
SEAL = "# checksum "
"""What begins the first line of a sealed text."""
LATER = {"later": True}
"""Metadata of a dataclass field that was added after keys existed: at its default it stays out of the key, so that
artifacts made before the field existed are still found."""


def plain(value: Any, key: bool = False) -> Any:
    """`value` as JSON can hold it: dataclasses become objects, tuples lists, paths strings, non-finite floats null.

    With `key`, fields marked `LATER` that hold their default are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (
            f
            for f in dataclasses.fields(value)
            if not (key and f.metadata.get("later") and getattr(value, f.name) == default_of(f))
        )
        return {f.name: plain(getattr(value, f.name), key) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): plain(v, key) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v, key) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field, made by its factory where it has one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Canonical JSON with sorted keys and without NaN: equal values give equal bytes."""
    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)


def key_of(*parts: Any) -> str:
    """The content key of `parts`: the first 16 hex digits of the SHA-256 of their canonical JSON."""
    return hashlib.sha256(to_json(plain(list(parts), key=True)).encode()).hexdigest()[:16]


def json_bytes(value: Any) -> bytes:
    """`value` as the canonical, indented JSON of a file."""
    return (to_json(value, indent=1) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as canonical, indented JSON."""
    write_bytes(path, json_bytes(value))


def sealed(value: Any) -> dict[str, Any]:
    """A JSON object with its own checksum in the field `CHECKSUM`; `read_json` checks it and leaves it out."""
    record = plain(value)
    return {**record, CHECKSUM: _checksum(record)}


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(record).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `ArtifactError` if it is missing, no ordinary file, damaged, or not what its checksum says."""
    try:
        value = json.loads(read_bytes(path, ArtifactError, "a JSON file").decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not valid JSON", got=str(error), remedy="delete the file and run again"
        ) from None
    if isinstance(value, dict) and CHECKSUM in value:
        said, found = value.pop(CHECKSUM), _checksum(value)
        if said != found:
            raise ArtifactError(
                f"{path} is not what was written",
                expected=f"checksum {said}",
                got=found,
                remedy="delete the file and run again",
            )
    return value


def sealed_text(text: str) -> str:
    """A text with its own checksum as a comment in its first line, where a text that is cut short keeps it."""
    return f"{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def refuse_changed(path: Path, remedy: str) -> None:
    """Raise `ArtifactError` for a sealed text that is not what was written; one without a seal may be anything."""
    first, _, text = path.read_bytes().partition(b"\n")
    if first.startswith(SEAL.encode()) and hashlib.sha256(text).hexdigest().encode() != first[len(SEAL) :]:
        raise ArtifactError(f"{path} is not what was written", got="another checksum", remedy=remedy)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically as a safetensors file."""
    write_bytes(path, tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = save(contiguous, metadata=dict(metadata) if metadata else None)
    return data


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file (memory-mapped); raises `ArtifactError` if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist", remedy="run the stage that makes it first") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not a whole safetensors file", got=str(error), remedy="delete the file and run again"
        ) from None
