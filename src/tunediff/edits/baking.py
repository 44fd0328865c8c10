"""Baking: an edited model written as an ordinary Hugging Face folder, with a model card that says what was done."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from tunediff.core.artifacts import write_bytes
from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.core.text import visible
from tunediff.edits.edit import Edit
from tunediff.models.network import LanguageModel, swapped
from tunediff.models.pair import Pair, probe_ids
from tunediff.records.diff import Bill

TOLERANCE = 1e-4
"""Largest accepted difference between the logits of a baked model and of the live edit, relative to the largest logit."""


def baked_network(pair: Pair, edit: Edit) -> nn.Module:
    """A new network with the edited weights and the adapter merged."""
    with swapped(edit.parameters(pair.tuned)):
        return merged(pair)


def merged(pair: Pair) -> nn.Module:
    """A new network with the tuned model's present weights and the adapter merged."""
    module = copy.deepcopy(pair.tuned.module)
    merge = getattr(module, "merge_and_unload", None)
    return merge() if merge else module


def check_empty(out: Path) -> None:
    """Raise `ArtifactError` unless `out` is an empty folder or does not exist."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is not an empty folder", remedy="another --bake folder")


def bake_edit(pair: Pair, edit: Edit, bill: Bill, out: Path) -> float:
    """Write the edited model to `out` and check it against the live edit; return the relative error of its logits.

    The folder appears only when it is whole. Raises `ArtifactError` if `out` is not empty or cannot be written or the
    edit belongs to another model, and `NumericsError` if the baked model differs by more than `TOLERANCE`.
    """
    check_empty(out)
    network = baked_network(pair, edit)
    error = relative_error(pair, edit, network)
    if error > TOLERANCE:
        raise NumericsError(
            "the baked model is not the live edit", expected=f"error below {TOLERANCE}", got=f"{error:.2g}"
        )
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        partial.mkdir(parents=True)
        cast(Any, network).save_pretrained(partial)
        pair.tuned.tokenizer.save_pretrained(partial)
        write_bytes(partial / "README.md", _card(pair, edit, bill, error).encode())
        os.replace(partial, out)
    except (OSError, SafetensorError) as fault:
        raise ArtifactError(f"{out} could not be written", got=str(fault), remedy="another --bake folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return error


def relative_error(pair: Pair, edit: Edit, network: nn.Module) -> float:
    """Largest difference of logits on probe text between `network` and the live edit, over the largest logit."""
    ids_BT = probe_ids(pair.tokenizer, pair.vocabulary)
    live = edit.applied(pair.tuned)
    expected = live.logits(live.states(ids_BT))
    baked = LanguageModel(network, pair.tokenizer, "baked", fast=pair.tuned.fast, family=pair.tuned.family_name)
    got = baked.logits(baked.states(ids_BT))
    return float((got - expected).abs().max() / expected.abs().max())


def _card(pair: Pair, edit: Edit, bill: Bill, error: float) -> str:
    rows = "\n".join(
        f"| {visible(m.name)} | {'not measured' if m.value is None else f'{m.value:.3g}'} | "
        f"{'' if m.low is None else f'{m.low:.3g} to {m.high:.3g}'} | {m.unit} | "
        f"{'' if m.control is None else f'{m.control:.3g}'} | {visible(m.against)} |"
        for m in bill.measures
    )
    return f"""---
library_name: transformers
tags: [tunediff, model-edit]
---
# {visible(Path(pair.tuned.name).name)} without {", ".join(map(visible, edit.changes))}

Made by tunediff from the base `{visible(Path(pair.base.name).name)}` ({pair.base_fingerprint}) and the tune
`{visible(Path(pair.tuned.name).name)}` ({pair.tuned_fingerprint}) by the operation *{edit.operation}*: what tuning added to
each linear map was taken back where the changes above are on, and kept elsewhere. Base's own weights are untouched.
Logits agree with the live edit to {error:.1e} of the largest.

| measure | value | interval | unit | control | control is |
|---|---|---|---|---|---|
{rows}

Measured on held-out text. What the edit does on other text was not measured.
"""
