"""Latents of a dictionary fitted to the pair: the Delta-Crosscoder unless another is named."""

from __future__ import annotations

import torch

from tunediff.dictionaries.base import delta_of
from tunediff.finders.base import Finder, Found, View
from tunediff.fitting import fit

MIN_FIRINGS = 20
"""Latents that fire on fewer training tokens are not proposed: nothing could be said of them on held-out text."""


class Crosscode(Finder):
    """The latents whose two write directions differ most on the training text: largest sum of f^2 |d_b - d_a|^2.

    The dictionary reads what is left after the constant offset. Proposing by energy does not say a latent matters;
    that is ranking's to find out, on text the dictionary has not seen.
    """

    def find(self, view: View) -> Found:
        fitted = fit(view.spec, view.harvest, view.fit, view.folder / "dictionary", view.progress, view.device)
        squares, firings = 0.0, 0
        for _, x_NSMD in view.harvest.chunks("train"):
            code_NF = fitted.codes(x_NSMD)
            squares = squares + code_NF.double().pow(2).sum(0)
            firings = firings + (code_NF > 0).sum(0)
        difference_F = delta_of(fitted.dictionary.write_FSMD().detach()).double().pow(2).sum((1, 2))
        energy_F = squares * difference_F * (firings >= MIN_FIRINGS)
        order = torch.argsort(energy_F, descending=True, stable=True)[: view.candidates]
        changes = [
            fitted.change(latent, id=f"crosscode/{latent}", finder="crosscode")
            for latent in order.tolist() if energy_F[latent] > 0
        ]
        return Found(changes, {"crosscode": fitted})


VARIANT = Crosscode
