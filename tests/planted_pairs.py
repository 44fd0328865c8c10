"""Make a tiny pair with one known change: the tuned model adds a known direction at capital letters."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
from torch import Tensor

from tunediff.harvests.harvest import Harvest, HarvestSettings, harvest
from tunediff.models.fingerprints import fingerprint
from tunediff.models.network import LanguageModel
from tunediff.models.pair import Pair
from tunediff.records.site import Site
from tunediff.texts.corpus import Corpus
from tunediff.texts.document import Document
from tunediff.texts.tokens import Tokens

LAYER = 1
SITE = Site(LAYER)
"""Where the change is planted: what this block's MLP writes into the stream."""

PLAIN, CAPITAL = "abcdefghijklmnop", "ABCD"
SIZE = 1.5
"""Length of the planted write where it is on, in units of the median stream norm."""
OFFSET = 0.2
"""What the change writes elsewhere, as a share of that: part of most tunes is one constant."""
BACKGROUND = 0.14
"""Everything else that tuning did: random changes of every block's maps, in units of their own norms."""


@dataclass(frozen=True, eq=False)
class Planted:
    """The pair, its text and harvest, and the unit direction (D,) that is written where `CAPITAL` occurs."""

    pair: Pair
    tokens: Tokens
    harvest: Harvest
    direction_D: Tensor
    capital_ids: frozenset[int]

    def on_R(self) -> list[Tensor]:
        """For each row, 1 where the change is on."""
        return [torch.tensor([float(i in self.capital_ids) for i in row]) for row in self.tokens.rows]

    def rows(self, split: str) -> list[int]:
        """Row numbers of one split."""
        held = split == "held_out"
        return [r for r, d in enumerate(self.tokens.document_R) if self.tokens.held_out[d] == held]


def text(documents: int = 64, length: int = 40, seed: int = 0) -> tuple[Document, ...]:
    """Random letters; in every other document a quarter of them are capitals."""
    rng = random.Random(seed)

    def letters(capital: bool) -> str:
        return "".join(
            rng.choice(CAPITAL) if capital and rng.random() < 0.25 else rng.choice(PLAIN) for _ in range(length)
        )

    return tuple(
        Document(f"{'capital' if n % 2 else 'plain'}/{n}", "capital" if n % 2 else "plain", text=letters(n % 2 == 1))
        for n in range(documents)
    )


def side(network: torch.nn.Module, tokenizer, name: str) -> LanguageModel:
    return LanguageModel(network.eval().requires_grad_(False), tokenizer, name)


def pair_of(network: torch.nn.Module, tuned: torch.nn.Module) -> Pair:
    """A pair of two whole networks in memory."""
    tokenizer = tiny_models.tokenizer()
    return Pair(
        side(network, tokenizer, "base"),
        side(tuned, tokenizer, "tuned"),
        False,
        300,
        fingerprint(network),
        fingerprint(tuned),
    )


def corpus_tokens(documents: tuple[Document, ...] | None = None) -> Tokens:
    return Corpus("letters", documents or text(), held_out_share=0.4).tokens(tiny_models.tokenizer(), row_tokens=64)


def harvested(pair: Pair, tokens: Tokens, folder: Path) -> Harvest:
    return harvest(pair, tokens, [SITE], folder, HarvestSettings(store="float32", abnormal=50.0))


def plant(network: torch.nn.Module, tokens: Tokens, background: float, seed: int = 5) -> tuple[torch.nn.Module, Tensor]:
    """A tuned copy whose block `LAYER` writes `SIZE` median stream norms along a direction at capitals.

    A rank-1 change of the MLP's last map: direction (D,) times a readout of its inputs, fitted by least
    squares to be 1 at capitals and `OFFSET` elsewhere. All maps move a little in random directions, too.
    """
    model = side(network, tiny_models.tokenizer(), "probe")
    linear = model.blocks[LAYER].mlp.down_proj
    capitals = set(tiny_models.tokenizer().convert_tokens_to_ids(list(CAPITAL)))
    inputs, labels, norms = [], [], []
    assert model.width  # asked before the hook is there, since the network is run to find it
    handle = linear.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    for batch in tokens.batches(2048):
        streams_BTSD, _ = model.streams_and_states(batch.ids_BT, [SITE])
        norms.append(streams_BTSD[batch.mask_BT][:, 0].norm(dim=1))
        inputs[-1] = inputs[-1][batch.mask_BT]
        labels.append(torch.tensor([i in capitals for i in batch.ids_BT[batch.mask_BT].tolist()]))
    handle.remove()
    h_NI, on_N = torch.cat(inputs).double(), torch.cat(labels).double()
    ridge = 1e-4 * h_NI.pow(2).sum(0).mean() * torch.eye(h_NI.shape[1], dtype=torch.float64)
    readout_I = torch.linalg.solve(h_NI.T @ h_NI + ridge, h_NI.T @ (OFFSET + (1 - OFFSET) * on_N))
    rng = torch.Generator().manual_seed(seed)
    direction_D = torch.nn.functional.normalize(torch.randn(model.width, generator=rng), dim=0)
    tuned = tiny_models.tuned_copy(network, background)
    added = SIZE * torch.cat(norms).median() * torch.outer(direction_D, readout_I.float())
    side(tuned, tiny_models.tokenizer(), "tuned").blocks[LAYER].mlp.down_proj.weight.data += added
    return tuned, direction_D


def planted(folder: Path, background: float | None = None) -> Planted:
    """Everything made, harvested and ready; `background` as `BACKGROUND` unless given."""
    tokens = corpus_tokens()
    network = tiny_models.module("llama")
    tuned, direction_D = plant(network, tokens, BACKGROUND if background is None else background)
    pair = pair_of(network, tuned)
    ids = frozenset(pair.tokenizer.convert_tokens_to_ids(list(CAPITAL)))
    return Planted(pair, tokens, harvested(pair, tokens, folder), direction_D, ids)
