"""Edits reach every linear map of every sort of network, experts by what is routed to them; the rest is told."""

from __future__ import annotations

import copy

import planted_pairs
import pytest
import tiny_models
import torch
from torch import nn

from tunediff.edits.baking import bake_edit, merged, relative_error
from tunediff.edits.bills import LEFT, left_as_tuned
from tunediff.edits.edit import Edit, EditSettings, scaling
from tunediff.edits.reverting import input_moments, random_directions, reverting
from tunediff.models.pair import Pair
from tunediff.records.diff import Bill

IDS = torch.randint(3, 259, (3, 17), generator=torch.Generator().manual_seed(0))
FEW = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
OPT = dict(FEW, num_attention_heads=4, ffn_dim=64, max_position_embeddings=128)


def configs() -> dict:
    """One network of each sort: stacks of experts either way round, with biases, compressed attention, state spaces."""
    import transformers as t

    small = dict(tiny_models.SMALL, num_key_value_heads=2)
    latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1)
    return {
        "qwen3_moe": t.Qwen3MoeConfig(
            **small, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "mixtral": t.MixtralConfig(**small, num_local_experts=4, num_experts_per_tok=2),
        "gpt_oss": t.GptOssConfig(**small, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        "deepseek_v3": t.DeepseekV3Config(
            **dict(small, num_key_value_heads=4), **latent, **experts, moe_intermediate_size=16, num_experts_per_tok=2
        ),
        "opt": t.OPTConfig(**OPT, word_embed_proj_dim=32),
        "opt_after": t.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        "mamba": t.MambaConfig(**FEW, state_size=8),
        "mamba2": t.Mamba2Config(**FEW, state_size=8, head_dim=8, num_heads=8, n_groups=1, chunk_size=16),
        "gpt2": tiny_models.configs()["gpt2"],
    }


SORTS = list(configs())
STACKS = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


def moved(network: nn.Module, size: float = 0.1) -> nn.Module:
    """A copy in which every parameter moved."""
    tuned, rng = copy.deepcopy(network), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.add_(noise * (size * parameter.norm().clamp_min(1) / noise.norm()))
    return tuned


@pytest.fixture(scope="module", params=SORTS)
def pair(request) -> Pair:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(configs()[request.param], dtype=torch.float32).eval()
        for name, parameter in network.named_parameters():
            parameter.mul_(4.0 if parameter.dim() == 2 or "experts" in name and parameter.dim() == 3 else 1.0)
    return planted_pairs.pair_of(network, moved(network))


@pytest.fixture(scope="module")
def tokens():
    return planted_pairs.corpus_tokens(planted_pairs.text(documents=8))


def logits(model) -> torch.Tensor:
    return model.logits(model.states(IDS))


def moments_of(pair: Pair, tokens, on):
    on_R = [torch.tensor([float(on(t)) for t in row]) for row in tokens.rows]
    return input_moments(pair.tuned, pair.deltas(), tokens, [on_R], batch_tokens=300)[0]


def test_every_linear_map_is_edited_and_undone_to_the_bit(pair, tokens, tmp_path):
    before, found = logits(pair.tuned), moments_of(pair, tokens, lambda t: t % 3 == 0)
    deltas = pair.deltas()
    maps = [delta for delta in deltas if delta.maps]
    unseen = [delta.name for delta in maps if not any(name in found for name in delta.maps)]
    assert all(name.endswith("mixer.dt_proj") for name in unseen), "whose weight Mamba multiplies without calling it"
    plain = {delta.name for delta in maps if delta.kind == "linear maps"}
    linear = {id(m.weight) for m in pair.tuned.network.modules() if isinstance(m, nn.Linear)}
    tables = {id(m.weight) for m in pair.tuned.network.modules() if isinstance(m, nn.Embedding)}
    assert len(plain) >= len(linear - tables)
    edit = reverting(pair, "x", ["x"], found)
    assert len(edit.tensors) == len(maps) - len(unseen)
    control = random_directions(pair, "z", found, edit, seed=0)
    edited = [logits(side.applied(pair.tuned)) for side in (edit, control)]
    assert not any(torch.equal(one, before) for one in edited) and not torch.equal(*edited)
    assert torch.equal(logits(pair.tuned), before)
    (tmp_path / "edit").mkdir()
    edit.save(tmp_path / "edit")
    assert torch.equal(logits(Edit.load(tmp_path / "edit").applied(pair.tuned)), edited[0])


def test_changes_that_are_on_everywhere_get_bases_maps_back(pair, tokens):
    """An edit of maps alone is then a tune of all the rest alone, wherever text reads the maps."""
    found = moments_of(pair, tokens, lambda t: True)
    edit = reverting(pair, "x", ["x"], found, EditSettings(strength=1e6, ridge=1e-6))
    whole = {}
    for delta in pair.deltas():
        gone = [name in found for name in delta.maps]
        whole.update(delta.with_inputs(*[torch.zeros_like if now else None for now in gone]) if gone else {})
    ids = torch.tensor([row[:16] for row in tokens.rows if len(row) >= 16])
    sides = (edit.applied(pair.tuned), pair.tuned.variant("maps of base", whole), pair.tuned)
    live, expected, tuned = (side.logits(side.states(ids)) for side in sides)
    assert float((live - expected).norm()) < 0.05 * float((tuned - expected).norm())


def test_the_rest_stays_as_tuned_and_is_told(pair, tokens):
    edit = reverting(pair, "x", ["x"], moments_of(pair, tokens, lambda t: t % 3 == 0))
    measure = left_as_tuned(pair, edit)
    rest = {delta.kind for delta in pair.deltas() if not delta.maps}
    assert measure.name == LEFT and 0 < measure.value < 1 and rest and all(kind in measure.against for kind in rest)
    everything = left_as_tuned(pair, scaling(pair, 1.0))
    assert everything.value == 0 and "every parameter" in everything.against
    kept = reverting(pair, "x", ["x"], {})
    assert left_as_tuned(pair, kept).value == pytest.approx(1)


def test_a_bake_is_the_live_edit(pair, tokens):
    edit = reverting(pair, "x", ["x"], moments_of(pair, tokens, lambda t: t % 3 == 0))
    assert relative_error(pair, edit, merged(pair, edit)) < 1e-5


@pytest.mark.parametrize("pair", STACKS, indirect=True)
def test_an_expert_reads_what_the_network_itself_multiplies_it_with(pair, tokens, monkeypatch):
    """Seen from within the products of the plainest way that the network has of running its experts."""
    found = moments_of(pair, tokens, lambda t: True)
    stacks = [delta for delta in pair.deltas() if delta.kind == "experts"]
    seen: dict[str, torch.Tensor] = {}

    def see(x: torch.Tensor, weight: torch.Tensor) -> None:
        for delta in stacks:
            at = weight.data_ptr() - delta.parameter.data_ptr()
            if weight.dim() == 2 and 0 <= at < delta.parameter.numel() * 4:
                name = delta.maps[at // (delta.parameter[0].numel() * 4)]
                x = x.double()
                seen[name] = seen.get(name, 0) + x.T @ x

    linear, matmul = nn.functional.linear, torch.Tensor.__matmul__
    monkeypatch.setattr(pair.tuned.network.config, "_experts_implementation", "eager")
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, *rest: (see(x, w), linear(x, w, *rest))[1])
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, w: (see(x, w), matmul(x, w))[1])
    with torch.no_grad():
        for row in tokens.rows:
            pair.tuned.network(input_ids=torch.tensor([row]), use_cache=False)
    assert seen.keys() == {name for delta in stacks for name in delta.maps if name in found}
    for name, product_II in seen.items():
        torch.testing.assert_close(found[name].on_II.double(), product_II, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer"
)
def test_an_adapter_on_a_tied_unembedding_is_untied_when_baked(tmp_path):
    """CASES E: merged into the tied weight, it would change the embedding, too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    network = tiny_models.module("gpt2")
    folder = tiny_models.save(tmp_path / "base", network)
    wrapped = get_peft_model(copy.deepcopy(network), LoraConfig(r=4, target_modules=["lm_head"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    wrapped.save_pretrained(tmp_path / "lora")
    pair = Pair.load(folder, str(tmp_path / "lora"))
    edit = scaling(pair, 0.25)
    error = bake_edit(pair, edit, Bill("x", "scale", [], []), tmp_path / "baked")
    assert error < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    assert again.lm_head.weight is not again.transformer.wte.weight
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, logits(edit.applied(pair.tuned)), rtol=1e-4, atol=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
