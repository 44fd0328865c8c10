"""Adapters: every kind gives PEFT's own logits or is refused as what it is; each factor finds its place, each place a factor."""

from __future__ import annotations

import copy
import json
import shutil
import time
import warnings
from pathlib import Path

import peft
import pytest
import tiny_models
import tiny_world
import torch
from command_line import cli
from safetensors.torch import load_file, save_file

from tunediff.core.errors import PairError, SettingError, SourceError
from tunediff.models.adapters import Adapter
from tunediff.models.pair import Pair
from tunediff.records.diff import Diff

IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))
MAPS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A base, and a place for adapters over it."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_models.save(root / "base", tiny_models.module("llama"))
    return root


def made(folder: Path, config, network=None, size: float = 0.05, seed: int = 7, tokenizer=None) -> Path:
    """An adapter whose trainable numbers all moved, saved as PEFT saves it."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(copy.deepcopy(network or tiny_models.module("llama")), config)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=size)
        wrapped.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def peft_logits(folder: Path, network=None) -> torch.Tensor:
    """What PEFT itself computes with an adapter, nothing merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(network or tiny_models.module("llama")), str(folder))
    with torch.inference_mode():
        return wrapped.eval()(input_ids=IDS, use_cache=False).logits


def logits(model) -> torch.Tensor:
    return model.logits(model.states(IDS))


def load(base, tuned, **settings) -> Pair:
    return Pair.load(str(base), str(tuned), **settings)


def refused(kind, base, tuned, **settings):
    with pytest.raises(kind) as caught:
        load(base, tuned, **settings)
    assert caught.value.remedy and len(str(caught.value)) < 1200
    return caught.value


PLAIN = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, **MAPS),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, **MAPS),
    "patterns": peft.LoraConfig(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, **MAPS),
    "regex": peft.LoraConfig(r=4, target_modules=r".*\.[01]\.self_attn\.(q|k)_proj"),
    "head": peft.LoraConfig(r=4, target_modules=["lm_head"]),
    "whole": peft.LoraConfig(r=4, modules_to_save=["lm_head", "embed_tokens"], **MAPS),
}
MERGED = {
    "dora": peft.LoraConfig(r=4, use_dora=True, **MAPS),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "biases": peft.LoraConfig(r=4, bias="all", **MAPS),
    "rows": peft.LoraConfig(r=4, trainable_token_indices=[5, 9], **MAPS),
    "tokens": peft.TrainableTokensConfig(token_indices=[5, 9]),
    "pissa": peft.LoraConfig(r=4, init_lora_weights="pissa", **MAPS),
    "norms beside": peft.LoraConfig(r=4, modules_to_save=["norm"], **MAPS),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "loha": peft.LoHaConfig(r=4, **MAPS),
    "lokr": peft.LoKrConfig(r=4, **MAPS),
    "adalora": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, tinit=1, tfinal=1, **MAPS),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "fourier": peft.FourierFTConfig(n_frequency=20, scaling=10.0, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", [*PLAIN, *MERGED])
def test_every_kind_gives_pefts_own_logits(home, tmp_path, name):
    adapter = made(tmp_path / name.replace(" ", ""), {**PLAIN, **MERGED}[name])
    pair = load(home / "base", adapter)
    expected = peft_logits(adapter)
    assert float((logits(pair.tuned) - expected).abs().max() / expected.abs().max()) < 1e-5
    base = tiny_models.module("llama")(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(logits(pair.base), base.detach(), rtol=1e-4, atol=1e-4)
    assert pair.relation.kind == "adapter" and pair.shared == (name in PLAIN)
    assert any("merged into a copy" in note for note in pair.notes) == (name in MERGED)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_adapted_as_parameters_are_merged(tmp_path, kind):
    import transformers as t

    small = {**tiny_models.SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
    config, experts = {
        "qwen3_moe": (
            t.Qwen3MoeConfig(**small, num_experts=4, moe_intermediate_size=32),
            ["gate_up_proj", "down_proj"],
        ),
        "gpt_oss": (t.GptOssConfig(**small, num_local_experts=4, sliding_window=16), ["gate_up_proj"]),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base = tiny_models.save(tmp_path / "base", network)
    targets = [f"mlp.experts.{name}" for name in experts]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets)
    adapter = made(tmp_path / "adapter", config, network, size=0.2)
    pair, expected = load(base, adapter), peft_logits(adapter, network)
    assert float((logits(pair.tuned) - expected).abs().max() / expected.abs().max()) < 1e-4
    assert not torch.equal(logits(pair.base), logits(pair.tuned)) and not pair.shared


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "multitask", "adaption"])
def test_adapters_that_add_inputs_are_refused_as_what_they_are(home, tmp_path, kind):
    virtual = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    config = {
        "prompt": peft.PromptTuningConfig(**virtual),
        "prefix": peft.PrefixTuningConfig(**virtual),
        "p-tuning": peft.PromptEncoderConfig(**virtual),
        "multitask": peft.MultitaskPromptTuningConfig(**virtual, num_tasks=1),
        "adaption": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    }[kind]
    error = refused(SourceError, home / "base", made(tmp_path / "adapter", config))
    assert kind in error.what and "beside the text" in error.got


@pytest.mark.parametrize("kind", ["alora", "poly"])
def test_adapters_that_depend_on_the_text_are_refused(home, tmp_path, kind):
    config = {
        "alora": peft.LoraConfig(r=4, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], **MAPS),
        "poly": peft.PolyConfig(r=4, n_tasks=1, n_skills=2, n_splits=1, target_modules=["q_proj"]),
    }[kind]
    assert "cannot be merged" in refused(SourceError, home / "base", made(tmp_path / "adapter", config)).what


# Factor by factor


def renamed(source: Path, target: Path, new) -> Path:
    """A copy of an adapter whose tensors are `new` of the old ones."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    save_file({k: v.contiguous() for k, v in new(load_file(file)).items()}, file, metadata={"format": "pt"})
    return target


DAMAGES = {
    "as of a deeper model": (
        lambda d: {k.replace("layers.1.", "layers.11.").replace("layers.2.", "layers.12."): v for k, v in d.items()},
        ("12 tensors", "layers.11.", "12 places"),
    ),
    "another name": (
        lambda d: {k.replace("v_proj", "value_proj"): v for k, v in d.items()},
        ("6 tensors", "value_proj"),
    ),
    "no prefix": (
        lambda d: {k.replace("base_model.model.", "", 1): v for k, v in d.items()},
        ("18 tensors", "18 places"),
    ),
    "other prefix": (lambda d: {f"x.{k}": v for k, v in d.items()}, ("18 tensors", "x.base_model")),
    "a layer missing": (lambda d: {k: v for k, v in d.items() if "layers.2." not in k}, ("6 places", "layers.2.")),
    "one missing": (lambda d: dict(list(d.items())[1:]), ("1 places",)),
    "one too many": (
        lambda d: {**d, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 32)},
        ("1 tensors", "up_proj"),
    ),
    "weights that are no factors": (lambda d: {**d, "base_model.model.odd.weight": torch.ones(4)}, ("odd",)),
    "empty": (lambda d: {}, ("18 places",)),
    "another rank": (
        lambda d: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in d.items()},
        ("size mismatch in 18 of 18",),
    ),
    "one of another rank": (
        lambda d: {k: v[:2] if "layers.2.self_attn.v_proj.lora_A" in k else v for k, v in d.items()},
        ("size mismatch in 1 of 18",),
    ),
    "transposed": (lambda d: {k: v.T for k, v in d.items()}, ("size mismatch",)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_factor_finds_a_place_and_every_place_a_factor(home, tmp_path, damage):
    whole = made(tmp_path / "whole", PLAIN["lora"])
    new, words = DAMAGES[damage]
    error = refused(SourceError, home / "base", renamed(whole, tmp_path / "damaged", new))
    assert "does not fit" in error.what
    for word in words:
        assert word in error.got, error


def test_an_adapter_of_another_base_is_refused(home, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    small = {**tiny_models.SMALL, "num_key_value_heads": 2}
    # A deeper base's adapter finds no place for some factors, a shallower one's lacks the upper ones.
    for number, (config, got) in enumerate(
        (
            (dict(hidden_size=64), "size mismatch"),
            (dict(num_hidden_layers=5), "4 tensors"),
            (dict(num_hidden_layers=2), "2 places"),
        )
    ):
        other = AutoModelForCausalLM.from_config(LlamaConfig(**{**small, **config}))
        adapter = made(tmp_path / str(number), peft.LoraConfig(r=2, target_modules=["q_proj"]), other)
        error = refused(SourceError, home / "base", adapter)
        assert "does not fit" in error.what and got in error.got and "as BASE" in error.remedy
    tiny_models.adapter(tmp_path / "gpt2", tiny_models.module("gpt2"))
    assert "does not fit" in refused(SourceError, home / "base", tmp_path / "gpt2").what


def test_an_adapter_that_does_nothing_is_told(home, tmp_path):
    for name, config in (("lora", PLAIN["lora"]), ("dora", MERGED["dora"]), ("ia3", MERGED["ia3"])):
        adapter = made(tmp_path / name, config, size=0.0)
        error = refused(PairError, home / "base", adapter)
        assert "changes no logits" in error.what and "allow_identical" in error.remedy
        assert load(home / "base", adapter, allow_identical=True).relation.kind == "adapter"


def test_rows_of_tokens_that_probes_do_not_show_are_a_difference(home, tmp_path):
    """Trained embeddings of two rare tokens change no logits on the probe texts, and all where these tokens stand."""
    pair = load(home / "base", made(tmp_path / "rows", peft.TrainableTokensConfig(token_indices=[3, 299])))
    assert pair.relation.equal > 0.99 and not pair.shared


# Which adapter, over which base


def test_one_of_several_adapters_is_chosen_by_its_path(home, tmp_path):
    for name in ("math", "poetry"):
        made(tmp_path / "both" / name, PLAIN["lora"], seed=len(name))
    error = refused(SourceError, home / "base", tmp_path / "both")
    assert "several adapters" in error.what and error.got == "math, poetry"
    chosen = load(home / "base", error.remedy.removeprefix("name ").removesuffix(" as TUNED"))
    assert chosen.relation.kind == "adapter"
    shutil.rmtree(tmp_path / "both" / "poetry")
    alone = load(home / "base", tmp_path / "both")
    assert alone.tuned_fingerprint == chosen.tuned_fingerprint and "math" in alone.notes[0]


def test_another_base_that_the_adapter_names_is_told(home, tmp_path):
    adapter = made(tmp_path / "adapter", PLAIN["lora"])
    for named, told in (("lab/other-7b", True), ("lab/base", False), (str(home / "base"), False), ("", False)):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
        notes = load(home / "base", adapter).relation.notes
        assert bool(notes) == told and all("lab/other-7b" in note for note in notes)


def test_two_adapters_over_one_base_are_compared(home, tmp_path):
    one = made(tmp_path / "one", PLAIN["lora"], seed=1)
    two = made(tmp_path / "two", MERGED["dora"], seed=2)
    error = refused(SourceError, one, two)
    assert "cannot be found" in error.what and "pair.over=" in error.remedy
    pair = load(one, two, over=str(home / "base"))
    for side, folder in ((pair.base, one), (pair.tuned, two)):
        torch.testing.assert_close(logits(side), peft_logits(folder), rtol=1e-4, atol=1e-4)
    assert not pair.shared and len(pair.deltas()) == 9
    for adapter in (one, two):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(home / "base")}))
    assert load(one, two).tuned_fingerprint == pair.tuned_fingerprint, "the base that both name"
    whole = load(one, home / "base")
    torch.testing.assert_close(logits(whole.tuned), logits(load(home / "base", one).base), rtol=0, atol=0)
    assert refused(PairError, one, one).what == "base and tuned are the same model"


def test_adapters_over_different_bases_are_refused(home, tmp_path):
    other = tiny_models.save(tmp_path / "other", tiny_models.module("llama", seed=5))
    for name, base in (("one", home / "base"), ("two", other)):
        adapter = made(tmp_path / name, PLAIN["lora"])
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(base)}))
    error = refused(PairError, tmp_path / "one", tmp_path / "two")
    assert "different models" in error.what and "pair.over=FOLDER" in error.remedy
    assert load(tmp_path / "one", tmp_path / "two", over=str(home / "base"), allow_identical=True)


@pytest.mark.slow
def test_adapters_are_compared_and_refused_from_the_command_line(tmp_path):
    world = tiny_world.make(tmp_path)
    network = tiny_models.module("llama")
    made(tmp_path / "one", PLAIN["lora"], network, seed=1)
    made(tmp_path / "two", MERGED["dora"], network, seed=2)
    told = cli(*world.command("diff", "two", base="one", pair__over=str(world.base)), "--no-undo")
    assert told.code == 0, told.err
    diff = Diff.load(tmp_path / "runs" / "one-two" / "diff.json")
    notes = next(stage.notes for stage in diff.stages if stage.name == "load")
    assert sum("merged into a copy" in note for note in notes) == 2 and diff.relation.kind == "heavy tune"
    new, words = DAMAGES["another name"]
    renamed(tmp_path / "one", tmp_path / "part", new)
    told = cli(*world.command("diff", "part"))
    assert told.code == 2 and "does not fit" in told.err and "value_proj" in told.err and "Traceback" not in told.err


def test_over_without_an_adapter_is_refused(home):
    with pytest.raises(SettingError, match="no adapter"):
        load(home / "base", home / "base", over=str(home / "base"))


# Resized and tied embeddings


def test_an_adapter_over_a_resized_base_enlarges_a_copy(home, tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens([f"<new{n}>" for n in range(45)])
    network = tiny_models.module("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    whole = peft.LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    adapter = made(tmp_path / "whole", whole, network, tokenizer=tokenizer)
    pair = load(home / "base", adapter)
    torch.testing.assert_close(logits(pair.tuned), peft_logits(adapter, network), rtol=1e-4, atol=1e-4)
    assert (pair.base.vocabulary, pair.tuned.vocabulary, pair.vocabulary) == (300, 304, 300)
    assert any("304" in note and "enlarged" in note for note in pair.notes)
    assert len(pair.tuned.tokenizer) == 304
    small = made(tmp_path / "small", peft.LoraConfig(r=4, target_modules=["q_proj"]), network, tokenizer=tokenizer)
    pair = load(home / "base", small)  # the rows of new tokens are lost: they are the mean of the others
    weight = pair.tuned.network.get_input_embeddings().weight
    assert len(weight) == 304
    torch.testing.assert_close(weight[302], weight[:300].mean(0), rtol=1e-5, atol=1e-6)


def test_adapters_of_tied_embeddings_are_exact_and_told(tmp_path):
    import transformers as t

    config = t.LlamaConfig(**tiny_models.SMALL, num_key_value_heads=2, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    base = tiny_models.save(tmp_path / "base", network)
    for name, lora in (
        ("head", peft.LoraConfig(r=4, target_modules=["lm_head"])),
        ("embedding", peft.LoraConfig(r=4, target_modules=["embed_tokens"])),
        ("rows", peft.LoraConfig(r=4, trainable_token_indices=[40, 41], target_modules=["q_proj"])),
    ):
        adapter = made(tmp_path / name, lora, network, size=0.2)
        pair, expected = load(base, adapter), peft_logits(adapter, network)
        assert float((logits(pair.tuned) - expected).abs().max() / expected.abs().max()) < 1e-4, name
        assert any("are tied and" in note for note in pair.notes) == (name != "rows"), (name, pair.notes)


# Hostile and odd


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_a_pattern_that_never_ends_is_refused(home, tmp_path, field, monkeypatch):
    monkeypatch.setattr("tunediff.models.adapters.SECONDS", 2.0)
    adapter = made(tmp_path / "adapter", PLAIN["lora"])
    file, evil = adapter / "adapter_config.json", "(([a-z0-9_]+)+[.]?)+!"
    value = {evil: 3} if field == "rank_pattern" else evil
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    start = time.monotonic()
    assert "too long" in refused(SourceError, home / "base", adapter).what
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "changed",
    [
        {"peft_type": "NOVEL"},
        {"peft_type": 3},
        {"peft_type": None},
        {"r": "four"},
        {"r": -1},
        {"r": 0},
        {"lora_alpha": "x"},
        {"target_modules": None},
        {"target_modules": 5},
        {"target_modules": ["absent"]},
        {"target_modules": "(((("},
        {"modules_to_save": ["absent"]},
        {"init_lora_weights": "eva"},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"task_type": "SEQ_CLS"},
        {"fan_in_fan_out": "perhaps"},
        {"rank_pattern": [1]},
        {"base_model_name_or_path": {"a": 1}},
    ],
    ids=str,
)
def test_odd_fields_are_refused_in_four_lines_or_harmless(home, tmp_path, changed):
    adapter = made(tmp_path / "adapter", PLAIN["lora"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    try:
        pair = load(home / "base", adapter)
    except (SourceError, PairError) as error:
        assert error.remedy and len(error.lines()) <= 4
    else:
        torch.testing.assert_close(
            logits(pair.tuned), peft_logits(made(tmp_path / "a", PLAIN["lora"])), rtol=1e-4, atol=1e-4
        )


def test_a_damaged_configuration_is_refused(home, tmp_path):
    for text in ("", "{", "[]", "null", "3", '{"a":' * 30_000, "\xff"):
        adapter = made(tmp_path / "adapter", PLAIN["lora"])
        (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
        assert "adapter_config.json could not be read" in refused(SourceError, home / "base", adapter).what
        shutil.rmtree(adapter)


def test_a_folder_with_a_model_and_adapters_inside_is_the_model(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "model")
    made(tmp_path / "model" / "checkpoint-1", PLAIN["lora"])
    assert Adapter.at(tmp_path / "model", "model") is None
