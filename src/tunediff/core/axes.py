"""The axis letters that tensor names end in, and a shape check for tests and boundaries.

B rows in a batch · T positions in a row · N tokens (rows and positions flattened, padding gone) ·
M models (0 = base, 1 = tuned) · S sites · D stream width · F latents · K changes · R random draws · V vocabulary.
"""

from __future__ import annotations

from typing import Any

from tunediff.core.errors import NumericsError

MODELS = ("base", "tuned")
BASE, TUNED = 0, 1
WRITERS = (*MODELS, "amplified")
"""The possible writers of contrastive text; ``amplified`` is tuned with its difference from base scaled up."""


def check(tensor: Any, axes: str, **sizes: int) -> Any:
    """Return `tensor` if its rank is ``len(axes)`` and every axis named in `sizes` has that size.

    Raises `NumericsError` otherwise.
    """
    shape = tuple(tensor.shape)
    wrong = len(shape) != len(axes) or any(
        shape[i] != sizes[letter] for i, letter in enumerate(axes) if letter in sizes
    )
    if wrong:
        want = ", ".join(f"{letter}={sizes.get(letter, '?')}" for letter in axes)
        raise NumericsError("a tensor has the wrong shape", expected=f"({want})", got=str(shape))
    return tensor
