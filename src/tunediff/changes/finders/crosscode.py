"""Latents of a dictionary fitted to both models, a Delta-Crosscoder by default, as changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunediff.changes.finders.base import Finder, Found, View
from tunediff.core.errors import within
from tunediff.dictionaries.architectures.base import Spec, delta_of
from tunediff.dictionaries.fitting import fit


@dataclass(frozen=True)
class Crosscode(Finder):
    """The latents that explain most of the difference on training text, each as one change.

    The dictionary reads the streams without the constant offset. Let y = f (d^tuned - d^base) be what a latent with
    strength f predicts of the difference at a token, and delta the difference there beyond the offset. The latent then
    explains sum(|delta|^2 - |delta - y|^2), which is negative for strong wrong predictions. Explaining much does not
    show that a latent matters; ranking tests that on text that the dictionary has not seen.
    """

    min_firings: int = 20
    """Fewest training tokens on which a proposed latent fires; rarer latents cannot be tested on held-out text."""

    def __post_init__(self) -> None:
        within("find.crosscode", self, min_firings=1)

    def find(self, view: View) -> Found:
        return latents_of(view.spec, view, "crosscode", self.min_firings)


def latents_of(spec: Spec, view: View, finder: str, min_firings: int) -> Found:
    """Fit a dictionary and propose the latents that explain most of the difference."""
    fitted = fit(spec, view.harvest, view.fit, view.folder / "dictionary", view.progress, view.device)
    normalized, bias_SD = fitted.normalization.apply, delta_of(fitted.dictionary.bias_SMD().detach()[None])[0]
    squares, firings, along = 0.0, 0, 0.0
    for _, x_NSMD in view.harvest.chunks("train"):
        code_NF = fitted.codes(x_NSMD)
        squares = squares + code_NF.double().pow(2).sum(0)
        firings = firings + (code_NF > 0).sum(0)
        along = along + (code_NF.T @ (delta_of(normalized(x_NSMD)) - bias_SD).flatten(1)).double()
    write_FI = delta_of(fitted.dictionary.write_FSMD().detach()).flatten(1).double()
    explained_F = (2 * (along * write_FI).sum(1) - squares * write_FI.square().sum(1)) * (firings >= min_firings)
    order = torch.argsort(explained_F, descending=True, stable=True)[: view.candidates]
    changes = [
        fitted.change(latent, id=f"{finder}/{latent}", finder=finder)
        for latent in order.tolist()
        if explained_F[latent] > 0
    ]
    return Found(changes, {finder: fitted})


VARIANT = Crosscode
