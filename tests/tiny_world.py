"""Make a tiny pair with a planted change, its text and its settings on disk, so that a whole run takes seconds."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch

SETTINGS = {
    "contrast.prompts": 6,
    "contrast.tokens": 6,
    "elicit.questions": 0,
    "corpus.row_tokens": 48,
    "dictionary.latents": 64,
    "dictionary.k_shared": 2,
    "dictionary.k_delta": 4,
    "fit.steps": 20,
    "fit.batch": 256,
    "find.candidates": 3,
    "scan.depths": 2,
    "rank.nulls": 3,
    "rank.null_tokens": 200,
    "rank.effect_tokens": 300,
    "verify.draws": 5,
    "verify.changes": 2,
    "edit.tokens": 500,
    # Three nulls and five draws allow no claim at 5 %; what is claimed here does not matter, that something is does.
    "rank.level": 1.0,
    "verify.level": 0.9,
}


@dataclass(frozen=True)
class World:
    """Models and text on disk, and a folder for runs."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def sets(self, **changed: object) -> list[str]:
        """The tiny settings as options; ``verify__draws=7`` changes one."""
        settings = {
            **SETTINGS,
            "corpus.paths": [str(self.root / "corpus.jsonl")],
            "corpus.prompts": [str(self.root / "prompts.jsonl")],
            **{name.replace("__", "."): value for name, value in changed.items()},
        }
        return [x for k, v in settings.items() for x in ("--set", f"{k}={v if isinstance(v, str) else json.dumps(v)}")]

    def command(
        self, verb: str, tuned: str = "tuned", *, base: str = "base", runs: str = "runs", **changed: object
    ) -> list:
        return [verb, self.root / base, self.root / tuned, "--runs", self.root / runs, *self.sets(**changed)]

    def run(self, tuned: str = "tuned") -> Path:
        return self.root / "runs" / f"base-{tuned}"


CAPITAL, PLAIN = "ABCD", "abcdefghijklmnop"


def planted(network: torch.nn.Module, texts: list[str]) -> torch.nn.Module:
    """A copy whose middle block writes one direction, most of all after capital letters."""
    tokenizer, seen = tiny_models.tokenizer(), []
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    handle = network.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        stream = network(input_ids=ids, output_hidden_states=True).hidden_states[2]
    handle.remove()
    capital = torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(list(CAPITAL)))).flatten().double()
    readout = torch.linalg.lstsq(seen[0].flatten(0, 1).double(), 0.2 + 0.8 * capital).solution.float()
    direction = torch.nn.functional.normalize(
        torch.randn(stream.shape[-1], generator=torch.Generator().manual_seed(5)), dim=0
    )
    tuned = tiny_models.tuned_copy(network, 0.02)
    tuned.model.layers[1].mlp.down_proj.weight.data += (
        1.5 * stream.norm(dim=-1).median() * torch.outer(direction, readout)
    )
    return tuned


def make(root: Path) -> World:
    """Write the models ``base``, ``tuned`` (whole) and ``adapter``, and the text, into `root`."""
    rng = random.Random(0)
    texts = [
        "".join(rng.choice(CAPITAL if n % 2 and rng.random() < 0.25 else PLAIN) for _ in range(40)) for n in range(48)
    ]
    network = tiny_models.module("llama")
    tiny_models.save(root / "base", network)
    tiny_models.save(root / "tuned", planted(network, texts))
    tiny_models.adapter(root / "adapter", network)
    lines = [{"text": text, "kind": ("plain", "capital")[n % 2]} for n, text in enumerate(texts)]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chats = [{"messages": [{"role": "user", "content": "abcDABC"[n % 5 :] + str(n)}]} for n in range(12)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return World(root)


def parts(world: World) -> dict[str, Any]:
    """The tiny settings as `tunediff.diff` takes them: a dict for each part."""
    nested: dict[str, Any] = {}
    texts = {"corpus.paths": [str(world.root / "corpus.jsonl")], "corpus.prompts": [str(world.root / "prompts.jsonl")]}
    for name, value in {**SETTINGS, **texts}.items():
        part, _, field = name.partition(".")
        nested.setdefault(part, {})[field] = value
    return nested
