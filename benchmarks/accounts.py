"""Accounts: how many tokens went through blocks and through the unembedding, the two things a run of a network costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tunediff.models.network import LanguageModel


@dataclass
class Account:
    """Tokens times blocks, and tokens mapped to logits; padding counts, as it costs the same."""

    token_blocks: int = 0
    token_logits: int = 0

    def taken(self) -> Account:
        """What has been counted since this was last asked."""
        taken = Account(self.token_blocks, self.token_logits)
        self.token_blocks = self.token_logits = 0
        return taken


@contextmanager
def counted(*models: LanguageModel) -> Iterator[Account]:
    """Count what these models run while inside, whoever calls them; sides that share a module need to be named once.

    The hook is torch's global one: models do not see it and run as they would without.
    """
    account = Account()
    blocks = {id(block) for model in models for block in model.blocks}
    unembeddings = {id(model.family.unembedding(model.network)) for model in models}

    def hook(module: nn.Module, arguments: Sequence, output: object) -> None:
        if id(module) in blocks:
            if "forward" not in vars(module):  # else it is passed by
                account.token_blocks += _tokens(output[0] if isinstance(output, tuple) else output)
        elif id(module) in unembeddings and output is not None:
            account.token_logits += _tokens(
                arguments[0] if arguments else output
            )  # of logits that are never in memory, too

    handle = register_module_forward_hook(hook)
    try:
        yield account
    finally:
        handle.remove()


def _tokens(tensor) -> int:
    return tensor.numel() // tensor.shape[-1]
