"""Baking: an edited model written as an ordinary Hugging Face folder, with a model card that says what was done."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from tunediff.core.disk import new_folder, write_bytes
from tunediff.core.errors import ArtifactError, NumericsError
from tunediff.core.text import visible
from tunediff.edits.edit import Edit
from tunediff.models.adapters import peft_layers
from tunediff.models.loading import load_frozen
from tunediff.models.network import LanguageModel, swapped
from tunediff.models.pair import Pair
from tunediff.records.diff import Bill

TOLERANCE = 1e-4
"""Largest accepted difference between the logits of a baked model and of the live edit, relative to the largest logit."""


def merged(pair: Pair, edit: Edit | None = None) -> Any:
    """A new network with the tuned model's weights, edited if an edit is given, and the adapter merged."""
    with swapped(edit.parameters(pair.tuned) if edit else {}):
        module: Any = copy.deepcopy(pair.tuned.module)
    if not hasattr(module, "merge_and_unload"):
        return module
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    adapted: list[Any] = [layer for layer in module.modules() if isinstance(layer, peft_layers()[0])]
    for layer in (each.get_base_layer() for each in adapted):
        if uses[id(layer.weight)] > 1:
            # Beside a tied weight an adapter changes one of its uses; merged into it, it would change them all.
            layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    network = module.merge_and_unload()
    if network.get_input_embeddings().weight is not network.get_output_embeddings().weight:
        for config in (network.config, network.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False  # or loading would tie them again
    return network


def check_empty(out: Path) -> None:
    """Raise `ArtifactError` unless `out` is an empty folder or does not exist."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} is not an empty folder", remedy="--bake FOLDER, one that is empty or new")


def bake_edit(pair: Pair, edit: Edit, bill: Bill, out: Path) -> float:
    """Write the edited model to `out` and check it against the live edit; return the relative error of its logits.

    The check is of the folder as it is read again, and the folder appears only when it is whole and right. Raises
    `ArtifactError` if `out` is not empty or cannot be written or the edit belongs to another model, and `NumericsError`
    if the baked model differs by more than `TOLERANCE`.
    """
    check_empty(out)
    with new_folder(out) as partial:
        error = _write(pair, edit, partial)
        write_bytes(partial / "README.md", _card(pair, edit, bill, error).encode())
    return error


def _write(pair: Pair, edit: Edit, folder: Path) -> float:
    """Write the edited model and its tokenizer; return the relative error of what is read back."""
    merged(pair, edit).save_pretrained(folder)
    pair.tuned.tokenizer.save_pretrained(folder)
    dtype = str(next(pair.tuned.module.parameters()).dtype).removeprefix("torch.")
    error = relative_error(pair, edit, load_frozen(str(folder), dtype, str(pair.tuned.device)).module)
    if error > TOLERANCE:
        raise NumericsError(
            "the baked model is not the live edit",
            expected=f"logits within {TOLERANCE} of the largest",
            got=f"{error:.2g}",
            remedy="--set pair.dtype=float32",
        )
    return error


def relative_error(pair: Pair, edit: Edit, network: nn.Module) -> float:
    """Largest difference of logits on probe text between `network` and the live edit, over the largest logit."""
    ids_BT = pair.vocabularies.probes()
    live = edit.applied(pair.tuned)
    expected = live.logits(live.states(ids_BT))
    baked = LanguageModel(network, pair.tokenizer, "baked", fast=pair.tuned.fast, family=pair.tuned.family_name)
    baked.numbering = live.numbering
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
Norms, biases, embeddings and convolutions are as tuned has them.
Logits agree with the live edit to {error:.1e} of the largest.

| measure | value | interval | unit | control | control is |
|---|---|---|---|---|---|
{rows}

Measured on held-out text. What the edit does on other text was not measured.
"""
