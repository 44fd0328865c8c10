"""Checkpoints: an index, link, header, quantization or number that misleads is refused before a library opens the folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from tunediff.core.errors import SourceError, TunediffError
from tunediff.models.checkpoints import check_checkpoint
from tunediff.models.loading import load_frozen
from tunediff.models.pair import Pair


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model in one file."""
    root = tmp_path_factory.mktemp("checkpoints")
    return Path(tiny_models.save(root / "base", tiny_models.module("llama")))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A model in several files with an index."""
    root = tmp_path_factory.mktemp("sharded")
    tiny_models.module("llama").save_pretrained(root / "base", max_shard_size="100KB")
    tiny_models.tokenizer().save_pretrained(root / "base")
    return root / "base"


def load(folder: Path):
    return load_frozen(str(folder), "float32", "cpu")


def refused(folder: Path, *words: str) -> SourceError:
    start = time.monotonic()
    with pytest.raises(SourceError) as caught:
        load(folder)
    error = caught.value
    for word in words:
        assert word in str(error), error
    assert error.remedy and len(error.lines()) <= 4 and time.monotonic() - start < 20
    return error


def with_config(base: Path, folder: Path, **fields) -> Path:
    shutil.copytree(base, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def with_index(sharded: Path, folder: Path, change) -> Path:
    shutil.copytree(sharded, folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(change(index)))
    return folder


class Trap:
    """Unpickling one leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_whole_folders_pass(base, sharded):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert check_checkpoint(base, "base") == check_checkpoint(sharded, "sharded") == []
    assert load(base).notes == load(sharded).notes == []


@pytest.mark.parametrize("name", ["evil.bin", "evil.pkl", "evil.pt", "evil.pickle", "evil.ckpt"])
def test_an_index_that_names_pickles_is_refused_unread(sharded, tmp_path, name):
    def change(index):
        index["weight_map"]["model.norm.weight"] = name
        return index

    folder = with_index(sharded, tmp_path / "folder", change)
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    refused(folder, "names pickled weights", name)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name", ["../{}", "../../etc/passwd", "/etc/passwd", "sub/../../{}", "..\\{}", "x/{}", 3, None, []]
)
def test_an_index_that_names_files_elsewhere_is_refused(sharded, tmp_path, name):
    shard = next(sharded.glob("*.safetensors"))
    shutil.copy(shard, tmp_path / shard.name)

    def change(index):
        index["weight_map"]["model.norm.weight"] = name.format(shard.name) if isinstance(name, str) else name
        return index

    refused(with_index(sharded, tmp_path / "folder", change), "no safetensors file in its folder")


@pytest.mark.parametrize(
    "index",
    [{}, [], 3, None, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}, {"weight_map": None}],
    ids=str,
)
def test_a_damaged_index_is_refused(sharded, tmp_path, index):
    refused(with_index(sharded, tmp_path / "folder", lambda _: index))


def test_an_index_that_is_cut_short_or_lacks_a_shard_is_refused(sharded, tmp_path):
    folder = with_index(sharded, tmp_path / "cut", lambda index: index)
    file = folder / "model.safetensors.index.json"
    file.write_bytes(file.read_bytes()[:200])
    refused(folder, "could not be read")
    folder = with_index(sharded, tmp_path / "lacking", lambda index: index)
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    refused(folder, "lacks a file")


@pytest.mark.parametrize(
    "named", ["../model.safetensors", "weights.bin", "/etc/passwd", 5, "pytorch_model.bin", "sub/x.safetensors"]
)
def test_a_config_that_names_its_own_weights_is_held_to_the_folder(base, tmp_path, named):
    refused(with_config(base, tmp_path / "folder", transformers_weights=named), "config.json")


def test_links_out_of_the_folder_are_told_and_those_of_a_hub_cache_are_not(base, tmp_path):
    folder, cache = tmp_path / "folder", tmp_path / "models--lab--tiny"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(base / "model.safetensors")
    (note,) = load(folder).notes
    assert "model.safetensors is a link to" in note and str(base) in note
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load(snapshot).notes == []
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("nowhere")
    refused(snapshot, "link to nowhere")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_are_refused_and_not_waited_for(base, tmp_path, name):
    shutil.copytree(base, tmp_path / "folder")
    (tmp_path / "folder" / name).unlink()
    os.mkfifo(tmp_path / "folder" / name)
    with pytest.raises(SourceError, match="no ordinary file"):
        load(tmp_path / "folder")


@pytest.mark.parametrize(
    "how, told",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "\x1b[31mred"}, "kind"),
        ({"odd": 1}, "unknown"),
        ("fp8", "fp8"),
    ],
    ids=str,
)
def test_quantized_weights_are_refused_for_that_reason(base, tmp_path, how, told):
    error = refused(with_config(base, tmp_path / "folder", quantization_config=how), "quantized", told)
    assert "quantized from" in error.remedy


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"hidden_size": 10**9},
        {"hidden_size": 10**15},
        {"intermediate_size": 10**12},
        {"num_attention_heads": 10**9},
        {"num_key_value_heads": 10**9},
        {"head_dim": 10**9},
        {"vocab_size": 10**18},
        {"max_position_embeddings": 10**18},
        {"num_hidden_layers": -1},
        {"num_attention_heads": 0},
        {"hidden_size": "32"},
        {"hidden_size": None},
        {"hidden_size": 31},
        {"intermediate_size": 48},
        {"num_hidden_layers": 1.5},
        {"hidden_act": "none such"},
        {"hidden_act": 3},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": "none such"}},
        {"model_type": "none such"},
        {"model_type": 5},
        {"model_type": "bert"},
        {"architectures": 3},
        {"rms_norm_eps": "small"},
        {"vocab_size": None},
        {"layer_types": ["full_attention"] * 10**5},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_odd_fields_of_a_config_are_refused_or_harmless(base, tmp_path, fields):
    """Never another error than one of four lines, and never a wait."""
    start = time.monotonic()
    try:
        load(with_config(base, tmp_path / "folder", **fields))
    except TunediffError as error:
        assert error.remedy and len(error.lines()) <= 4
    assert time.monotonic() - start < 30


def test_a_model_with_experts_by_the_billion_is_refused(tmp_path):
    import transformers as t

    small = {**tiny_models.SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    network = t.AutoModelForCausalLM.from_config(t.MixtralConfig(**small, num_local_experts=4))
    base = Path(tiny_models.save(tmp_path / "base", network))
    assert load(base).notes == []
    refused(with_config(base, tmp_path / "folder", num_local_experts=10**9), "cannot fill", "num_local_experts")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', '{"a":' * 30_000, "\xff\xfe"], ids=lambda t: t[:9])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_damaged_json_is_refused_or_harmless(base, tmp_path, name, text):
    shutil.copytree(base, tmp_path / "folder")
    (tmp_path / "folder" / name).write_bytes(text.encode("latin-1"))
    try:
        load(tmp_path / "folder")
    except TunediffError as error:
        assert error.remedy and len(error.lines()) <= 4
    else:
        assert name != "config.json"


def test_weights_without_a_place_are_told(base, tmp_path):
    shutil.copytree(base, tmp_path / "folder")
    file = tmp_path / "folder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.9.odd": tensors["model.norm.weight"].clone()}, file, metadata={"format": "pt"})
    (note,) = load(tmp_path / "folder").notes
    assert "1 weights" in note and "model.layers.9.odd" in note


def test_a_folder_without_a_tokenizer_borrows_bases(base, tmp_path):
    shutil.copytree(base, tmp_path / "folder")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / "folder" / name).unlink(missing_ok=True)
    refused(tmp_path / "folder", "could not be read", "tokenizer")
    spare = tiny_models.tokenizer()
    loaded = load_frozen(str(tmp_path / "folder"), "float32", "cpu", spare)
    assert loaded.tokenizer is spare and "holds no tokenizer" in loaded.notes[0]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["whole", "adapter", "merged adapter"])
def test_a_folder_without_a_tokenizer_brings_its_chat_template(base, tmp_path, kind, place):
    """Answers would otherwise be asked for in another form than the one it was trained in."""
    tuned = tmp_path / "tuned"
    if kind == "whole":
        shutil.copytree(base, tuned)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            (tuned / name).unlink(missing_ok=True)
    else:
        pytest.importorskip("peft")
        tiny_models.adapter(tuned, tiny_models.module("llama"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    (tuned / place).write_text(template if place.endswith("jinja") else json.dumps({"chat_template": template}))
    first = base
    if kind == "merged adapter":
        first = tiny_models.adapter(tmp_path / "other", tiny_models.module("llama"), seed=5)
    over = str(base) if kind == "merged adapter" else ""
    pair = Pair.load(str(first), str(tuned), over=over, allow_identical=True)
    assert pair.tuned.tokenizer.chat_template == template != pair.base.tokenizer.chat_template
    assert pair.tuned.tokenizer.get_vocab() == pair.base.tokenizer.get_vocab()
