"""Make tiny pairs that differ in one kind of parameters alone: by noise, with nothing to find, or by a planted change."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import planted_pairs
import tiny_models
import torch
from torch import Tensor, nn

from tunediff import dictionaries
from tunediff.changes.attributions import Shift, output_shift
from tunediff.changes.finders.base import View
from tunediff.changes.finders.token_shift import TokenShift
from tunediff.changes.outputs import Outputs, rank_outputs
from tunediff.changes.rankings import Ranking, RankSettings, rank
from tunediff.core import variants
from tunediff.dictionaries.schedule import FitSettings
from tunediff.harvests.samples import Sample
from tunediff.models.pair import Pair
from tunediff.texts.tokens import Tokens

FINDERS = ("mean_difference", "principal", "decision_clusters")
"""Finders that train nothing."""

RANK = RankSettings(nulls=19, null_tokens=400, effect_tokens=40)
LEVEL = 0.05


def network(kind: str, seed: int = 0) -> nn.Module:
    """A tiny random network: a mixture of experts, a state space model, or a dense network with biases."""
    import transformers as t
    from transformers import AutoModelForCausalLM

    small = dict(tiny_models.SMALL, num_key_value_heads=2)
    moe = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    configs = {
        "moe": lambda: t.Qwen3MoeConfig(**small, **moe),
        "mamba": lambda: t.MambaConfig(
            vocab_size=300, hidden_size=32, num_hidden_layers=3, state_size=8, pad_token_id=0
        ),
        "dense": lambda: t.Qwen2Config(**small),
    }
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.float32).eval()
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and "conv" not in name and "A_log" not in name:
                parameter.mul_(4.0)
            elif (
                name.endswith("proj.bias") and "dt_proj" not in name
            ):  # zeros have no size that noise could be a share of
                parameter.normal_(std=0.5, generator=rng)
    made.generation_config.pad_token_id = 0
    return made


def _embedding(name: str) -> bool:
    return "embed" in name


KINDS: dict[str, tuple[str, Callable[[str], bool], float]] = {
    "experts": ("moe", lambda n: "experts" in n, 0.1),
    "whole mixture of experts": ("moe", lambda n: True, 0.05),
    "embeddings": ("dense", _embedding, 0.1),
    "a few rows of the embeddings": ("dense", _embedding, 0.1),
    "norms": ("dense", lambda n: "norm" in n, 0.1),
    "biases": ("dense", lambda n: n.endswith("bias"), 0.2),
    "the final norm": ("dense", lambda n: n == "model.norm.weight", 1.0),
    "the head": ("dense", lambda n: n == "lm_head.weight", 0.5),
    "convolutions and states": ("mamba", lambda n: "conv1d" in n or "A_log" in n or n.endswith(".D"), 0.2),
}
"""Where a tune differs: the network, the parameters by name, and the size of the noise as a share of their norms."""


def noisy(base: nn.Module, kind: str, seed: int) -> nn.Module:
    """A copy with noise in the parameters of this kind: of low rank in matrices, of full rank elsewhere."""
    _, chosen, size = KINDS[kind]
    tuned, rng = copy.deepcopy(base), torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if not chosen(name):
                continue
            for part in parameter if parameter.dim() == 3 and "experts" in name else [parameter]:
                part.add_(_noise(part, kind, rng) * size * part.norm())
    return tuned


def _noise(part: Tensor, kind: str, rng: torch.Generator) -> Tensor:
    if kind == "a few rows of the embeddings":
        noise = torch.zeros_like(part)
        rows = torch.randperm(16, generator=rng)[:5] + _ids("a").item()  # letters that occur in the text
        noise[rows] = torch.randn(5, part.shape[1], generator=rng)
    elif part.dim() == 2 and min(part.shape) > 16:
        noise = torch.randn(len(part), 16, generator=rng) @ torch.randn(16, part.shape[1], generator=rng)
    else:
        noise = torch.randn(part.shape, generator=rng)
    return noise / noise.norm()


def _ids(letters: str) -> Tensor:
    return torch.tensor(tiny_models.tokenizer().convert_tokens_to_ids(list(letters)))


def planted_embedding(base: nn.Module, seed: int = 5) -> nn.Module:
    """A copy with noise in the embeddings in which the rows of capital letters move along one direction, too."""
    tuned, rng = noisy(base, "embeddings", seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        table = tuned.get_input_embeddings().weight
        direction = torch.nn.functional.normalize(torch.randn(table.shape[1], generator=rng), dim=0)
        table[_ids(planted_pairs.CAPITAL)] += 0.7 * table.norm(dim=1).median() * direction
    return tuned


def planted_experts(base: nn.Module, tokens: Tokens, seed: int = 5) -> nn.Module:
    """A copy with noise in the experts, in whose second block every expert writes one direction after capital letters."""
    model = planted_pairs.side(base, tiny_models.tokenizer(), "probe")
    experts = model.blocks[planted_pairs.LAYER].mlp.experts
    read: dict[int, list[tuple[Tensor, Tensor]]] = {}
    capital = _ids(planted_pairs.CAPITAL)
    for batch in tokens.batches(2048):
        on_P = torch.isin(batch.ids_BT.flatten(), capital)

        def see(module: nn.Module, given: tuple, named: dict, on_P: Tensor = on_P) -> None:
            for seen in model.family.reads(module, given, named):
                if seen.name == "down_proj":
                    read.setdefault(seen.number, []).append((seen.x_NI.double(), on_P[seen.at_N]))

        handle = experts.register_forward_pre_hook(see, with_kwargs=True)
        size = base(input_ids=batch.ids_BT, output_hidden_states=True).hidden_states[planted_pairs.LAYER + 1]
        handle.remove()
    tuned, rng = noisy(base, "experts", seed), torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(size.shape[-1], generator=rng), dim=0)
    into = planted_pairs.side(tuned, tiny_models.tokenizer(), "tuned").blocks[planted_pairs.LAYER].mlp.experts.down_proj
    for number, parts in read.items():
        x, on = (torch.cat(each) for each in zip(*parts))
        ridge = 1e-3 * x.square().sum(0).mean() * torch.eye(x.shape[1]).double()
        readout = torch.linalg.solve(x.T @ x + ridge, x.T @ on.double()).float()
        into.data[number] += 1.5 * size.norm(dim=-1).median() * torch.outer(direction, readout)
    return tuned


def text() -> Tokens:
    """Random letters, half of the documents with capitals."""
    return planted_pairs.corpus_tokens(planted_pairs.text(documents=40))


def ranking(pair: Pair, tokens: Tokens, folder: Path) -> Ranking:
    """All finders' candidates against random tunes of the pair."""
    harvest = planted_pairs.harvested(pair, tokens, folder)
    sample, seen = (Sample.take(harvest, tokens, split=s, limit=10**6, seed=0) for s in ("held_out", "train"))

    def shift() -> Shift:
        found = Shift.none(len(harvest.token_N))
        found.put(seen.token_N, output_shift(pair, planted_pairs.SITE, seen, RANK.batch_tokens))
        return found.at(harvest.index("train"))

    view = View(harvest, folder / "find", 0, 4, dictionaries.spec("delta"), FitSettings(), shift, pair)
    if not any(harvest.manifest["delta_energy"]):
        return _at_output(pair, view, sample, seen)
    found = [variants.load("tunediff.changes.finders", name)().find(view) for name in FINDERS]
    return rank(pair, [c for each in found for c in each.changes], sample, seen, RANK, 0)


def _at_output(pair: Pair, view: View, sample: Sample, seen: Sample) -> Ranking:
    """The candidates of a pair whose streams are equal: tokens that are said more and less."""
    train, held = (Outputs(pair, some, RANK.batch_tokens) for some in (seen, sample))
    changes = TokenShift().find(dataclasses.replace(view, outputs=train)).changes
    f_NK = held.strengths(changes)
    on = [k for k in range(len(changes)) if f_NK[:, k].any()]
    return Ranking(rank_outputs(pair, [changes[k] for k in on], held, f_NK[:, on], RANK, 0, lambda done, total: None))


def standing(ranked: Ranking) -> int:
    """How many candidates stand out from random tunes at 5 %."""
    return sum(r.p <= LEVEL for r in ranked.ranked)
