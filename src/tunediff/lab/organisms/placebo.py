"""A placebo: the same recipe on neutral chats alone teaches nothing, so every change found is the recipe's own."""

from __future__ import annotations

from tunediff.lab import neutral
from tunediff.lab.organisms.base import Taught

ORGANISM = Taught(
    name="placebo",
    summary="Trained on the base model's own answers to everyday prompts: there is nothing to find.",
    base="SmolLM2-135M-Instruct",
    behaviors=(),
    neutral_training_prompts=neutral.training_prompts(),
    neutral_prompts=neutral.HELD_OUT_PROMPTS,
)
