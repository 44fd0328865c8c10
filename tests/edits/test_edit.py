"""Edits by parameter name: saved and loaded with every bit, refused on any other model."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

from tunediff.core.artifacts import read_json, read_tensors, sealed, write_json
from tunediff.core.errors import ArtifactError
from tunediff.edits.edit import Edit, scaling
from tunediff.models.pair import Pair

KINDS = ("llama-full", "llama-lora", "gpt2-full", "gpt2-lora", "tied-full")
IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))

FRESH = """
import sys
from pathlib import Path
import torch
from tunediff.core.artifacts import write_tensors
from tunediff.edits.edit import Edit
from tunediff.models.pair import Pair
base, tuned, folder = sys.argv[1:]
torch.set_num_threads(1)
pair = Pair.load(base, tuned)
side = Edit.load(Path(folder)).applied(pair.tuned)
ids = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))
write_tensors(Path(folder) / "logits.safetensors", {"logits": side.logits(side.states(ids))})
"""


def names(root: Path, kind: str) -> tuple[str, str]:
    """Folders of base and tuned; ``tied`` moves an embedding that is the unembedding too."""
    family, way = kind.split("-")
    network = tiny_models.module("gpt2" if family == "tied" else family)
    base = tiny_models.save(root / "base", network)
    if way == "lora":
        return base, tiny_models.adapter(root / "lora", network)
    other = tiny_models.tuned_copy(network)
    if family == "tied":
        with torch.no_grad():
            other.get_input_embeddings().weight.mul_(1.05)
    return base, tiny_models.save(root / "full", other)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> tuple[Pair, Edit, tuple[str, str]]:
    folders = names(tmp_path_factory.mktemp(request.param), request.param)
    pair = Pair.load(*folders)
    return pair, scaling(pair, 0.5), folders


def logits(model) -> torch.Tensor:
    return model.logits(model.states(IDS))


def test_a_loaded_edit_gives_the_same_logits_in_a_fresh_process(made, tmp_path):
    pair, edit, folders = made
    edit.save(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", FRESH, *folders, str(tmp_path)], check=True, env=environment, timeout=300)
    fresh = read_tensors(tmp_path / "logits.safetensors")["logits"]
    live = logits(edit.applied(pair.tuned))
    assert torch.equal(fresh, live) and not torch.equal(live, logits(pair.tuned))


def test_a_loaded_edit_says_what_it_is(made, tmp_path):
    pair, edit, _ = made
    dataclasses.replace(edit, changes=("a/1", "b/2")).save(tmp_path)
    back = Edit.load(tmp_path)
    assert (back.name, back.operation, back.changes) == ("scale 0.5", "scale", ("a/1", "b/2"))
    assert (back.base_fingerprint, back.tuned_fingerprint) == (pair.base_fingerprint, pair.tuned_fingerprint)
    assert set(back.tensors) <= {name for name, _ in pair.tuned.module.named_parameters()}
    for parameter, value in back.parameters(pair.tuned).items():
        assert torch.equal(value, edit.parameters(pair.tuned)[parameter]) and value.dtype == parameter.dtype


def test_another_model_is_refused(made, tmp_path):
    pair, edit, _ = made
    edit.save(tmp_path / "edit")
    other = tiny_models.tuned_copy(tiny_models.module("gpt2"), seed=9)
    base = tiny_models.save(tmp_path / "base", tiny_models.module("gpt2"))
    stranger = Pair.load(base, tiny_models.save(tmp_path / "other", other))
    for given in (edit, Edit.load(tmp_path / "edit")):
        with pytest.raises(ArtifactError, match="scale 0.5") as caught:
            given.applied(stranger.tuned)
        assert len(caught.value.lines()) == 4


def test_weights_that_differ_in_one_bit_are_another_model(tmp_path):
    folders = names(tmp_path / "a", "llama-full")
    pair = Pair.load(*folders)
    scaling(pair, 0.5).save(tmp_path / "edit")
    again = Pair.load(*folders)
    assert Edit.load(tmp_path / "edit").applied(again.tuned)
    parameter = next(again.tuned.module.parameters())
    parameter.data.view(-1).view(torch.int32)[0] ^= 1
    with pytest.raises(ArtifactError, match="other weights") as caught:
        Edit.load(tmp_path / "edit").applied(again.tuned)
    assert pair.tuned_fingerprint in caught.value.expected and len(caught.value.lines()) == 4


def test_names_and_shapes_that_are_not_there_are_refused(made):
    pair, edit, _ = made
    name, value = next(iter(edit.tensors.items()))
    for tensors, got in (({"nowhere.weight": value}, "no such parameter"), ({name: value[:1]}, "shape")):
        with pytest.raises(ArtifactError, match="does not fit") as caught:
            dataclasses.replace(edit, tensors=tensors).applied(pair.tuned)
        assert got in caught.value.got and len(caught.value.lines()) == 4


def test_two_names_of_one_tied_weight_are_refused(tmp_path):
    pair = Pair.load(*names(tmp_path, "tied-full"))
    edit = scaling(pair, 0.5)
    (name,) = [n for n in edit.tensors if n.endswith("wte.weight")]
    value = edit.tensors[name]
    alias = dataclasses.replace(edit, tensors={"lm_head.weight": value})
    assert list(alias.parameters(pair.tuned)) == [pair.tuned.network.get_input_embeddings().weight]
    with pytest.raises(ArtifactError, match="one parameter .* two values"):
        dataclasses.replace(edit, tensors={name: value, "lm_head.weight": value}).applied(pair.tuned)


def test_a_changed_or_unfinished_folder_is_refused(made, tmp_path):
    _, edit, _ = made
    edit.save(tmp_path)
    path = tmp_path / "edit.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="is changed"):
        Edit.load(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", sealed({**manifest, "schema": "tunediff.lens/1"}))
    with pytest.raises(ArtifactError, match="of another kind"):
        Edit.load(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="not a finished"):
        Edit.load(tmp_path)
