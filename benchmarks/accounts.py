"""Count the tokens that pass through blocks and through the unembedding, which make most of a forward pass's cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from tunediff.models.network import LanguageModel


@dataclass
class Account:
    """Counts of tokens times blocks and of tokens mapped to logits; padding is counted, since it costs as much."""

    token_blocks: int = 0
    token_logits: int = 0

    def taken(self) -> Account:
        """Counts since the last call of `taken`, which are then reset to 0."""
        taken = Account(self.token_blocks, self.token_logits)
        self.token_blocks = self.token_logits = 0
        return taken


@contextmanager
def counted(*models: LanguageModel) -> Iterator[Account]:
    """Count what these models compute inside this context, whoever calls them; models that share modules count once.

    The count uses torch's global forward hook, which does not change how the models run.
    """
    account = Account()
    blocks = {id(block) for model in models for block in model.blocks}
    unembeddings = {id(model.family.unembedding(model.network)) for model in models}

    def hook(module: nn.Module, arguments: Sequence, output: object) -> None:
        if id(module) in blocks:
            if "forward" not in vars(module):  # a block whose `forward` was replaced was skipped
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
