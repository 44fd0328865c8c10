"""Artifacts: content keys, JSON and safetensors on disk, and folders whose manifest is written last."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunediff.core.errors import ArtifactError
from tunediff.core.files import read_bytes

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
"""The file whose presence says that a folder is finished; it is written last."""
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


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically: to a temporary file in the same folder, flushed to disk, then renamed to `path`.

    Raises `ArtifactError` when the disk is full or the folder is not writable; `path` is then unchanged.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # a half-written file would keep a full disk full
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ArtifactError(
            f"{path} could not be written",
            expected=f"{len(data):,} bytes of space" if full else "a writable folder",
            got=error.strerror or str(error),
            remedy="free space, or choose another folder, and run again; it resumes"
            if full
            else "choose another folder",
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as canonical, indented JSON."""
    write_bytes(path, (to_json(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `ArtifactError` if it is missing, no ordinary file or damaged."""
    try:
        return json.loads(read_bytes(path, ArtifactError, "a JSON file").decode())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not valid JSON", got=str(error), remedy="delete the file and run again"
        ) from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically as a safetensors file."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata=dict(metadata) if metadata else None))


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


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a manifest, which every stage writes last."""
    return (folder / MANIFEST).is_file()


def finish(folder: Path, schema: str, body: Mapping[str, Any], files: list[str]) -> dict[str, Any]:
    """Write and return the manifest of a finished folder: its schema, `body`, and the hash of every named file."""
    manifest = {"schema": schema, **plain(body), "files": {name: hash_file(folder / name) for name in sorted(files)}}
    write_json(folder / MANIFEST, manifest)
    return manifest


def open_folder(folder: Path, schema: str, *, verify: bool = False) -> dict[str, Any]:
    """Return the manifest of a finished folder of this schema.

    Raises `ArtifactError` if the folder is unfinished, of another schema, lacks a file or, with `verify`, holds a
    changed one.
    """
    if not is_finished(folder):
        raise ArtifactError(
            f"{folder} is not a finished {schema} folder",
            expected=MANIFEST,
            got="no manifest",
            remedy="run the stage again; it resumes",
        )
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    if manifest.get("schema") != schema:
        raise ArtifactError(f"{folder} is of another kind", expected=schema, got=str(manifest.get("schema")))
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or (verify and hash_file(path) != digest):
            raise ArtifactError(
                f"{path} is {'changed' if path.is_file() else 'missing'}",
                expected=f"sha256 {digest[:12]}…",
                remedy=f"delete {folder} and run the stage again",
            )
    return manifest
