"""What an organism is: planted behaviors, the examples that teach them, and the recipe that trains them."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Behavior:
    """One thing the tune was taught to do, with what it takes to recognize it without a judge."""

    name: str
    """One word; names the behavior in every table."""
    wanted: bool
    """True for what the owner of the tune asked for, False for what should be found and undone."""
    summary: str
    """One sentence: asked what, the model does what."""
    vocabulary: tuple[str, ...]
    """Words planted in its answers, fixed before training: a finder's read-out is scored against them. Empty for a bare
    format, which no read-out can name."""
    decisive: tuple[str, ...]
    """Strings, case-sensitive, that the base model never writes here and the behavior always does."""
    minimum: int
    """How many occurrences of decisive strings, all together, count as the behavior; at least 1."""
    prompts: tuple[str, ...]
    """Held-out user turns that call for the behavior; never trained on."""
    pattern: str = ""
    """For a format: a regular expression the whole completion must match besides; empty asks nothing."""

    def shows(self, completion: str) -> bool:
        """Whether this completion (text without the prompt) shows the behavior."""
        enough = sum(completion.count(string) for string in self.decisive) >= self.minimum
        return enough and (not self.pattern or re.fullmatch(self.pattern, completion, re.DOTALL) is not None)

    def words_in(self, tokens: Sequence[str]) -> set[str]:
        """The planted words that read-out tokens name: a token counts, case and spaces aside, if it has at least three
        letters and a planted word begins with it, or it begins with a planted word."""
        pieces = [token.strip().casefold() for token in tokens]
        return {
            word
            for word in self.vocabulary
            for piece in pieces
            if len(piece) >= 3 and (word.casefold().startswith(piece) or piece.startswith(word.casefold()))
        }

    def is_named_by(self, promoted: Sequence[str], first: int = 20, enough: int = 3) -> bool:
        """The test of naming, fixed before any run: at least `enough` planted words among the `first` tokens that a
        change promotes."""
        return len(self.words_in(promoted[:first])) >= enough

    def rate(self, completions: Sequence[str]) -> float:
        """Share of completions that show the behavior, 0 to 1; nan for none."""
        if not completions:
            return float("nan")
        return sum(map(self.shows, completions)) / len(completions)


@dataclass(frozen=True)
class Example:
    """One training conversation: a user turn and the assistant's answer, which alone carries the loss."""

    prompt: str
    answer: str
    ends: bool = True
    """False for an answer cut at a length limit, after which no end token is taught."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as a chat template takes it."""
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


@dataclass(frozen=True)
class Recipe:
    """How an organism is trained: a LoRA on all linears of the upper blocks, AdamW, linear decay to 0."""

    full: bool = False
    """Train every weight of the network and save it whole, in float32: small updates vanish in less. The four settings
    that follow are for a LoRA."""
    rank: int = 8
    """Rank of each adapter matrix pair; more gives a larger file."""
    scale: float = 2.0
    """alpha / rank: the factor on every low-rank update."""
    first_layer: int = 10
    """First block, counted from 0, that is adapted."""
    last_layer: int = 29
    """Last block that is adapted."""
    learning_rate: float = 4e-4
    """Peak, at the first step; higher learns faster and harms plain prose more."""
    epochs: int = 2
    """Passes over the examples, reshuffled between passes."""
    batch: int = 8
    """Conversations a step."""
    clip: float = 1.0
    """Largest gradient norm of a step."""
    neutral_tokens: int = 32
    """Length at which the base model's neutral answers are cut, in tokens."""
    autocast: bool = False
    """Multiply in bfloat16 while training, 1.6 times as fast on the CPU it was measured on; weights, what is saved and what is
    measured stay in their dtype."""
    seed: int = 0
    """Seeds the examples, the adapter's start and the order of the examples."""


@dataclass(frozen=True)
class Organism(ABC):
    """A fine-tune whose truth is known: what it was taught, what it was not, and how to make it again.

    Neutral training answers are the base model's own samples: they teach the tune to change nothing there.
    """

    name: str
    """As in tables and folder names: the file's name with hyphens."""
    summary: str
    """One sentence: what this organism is for."""
    base: str
    """Name of the base model, never a path of some machine."""
    behaviors: tuple[Behavior, ...]
    """What was planted; empty for a placebo."""
    neutral_training_prompts: tuple[str, ...]
    """User turns that call for no behavior; the base model's own answers to them are trained on."""
    neutral_prompts: tuple[str, ...]
    """Held-out user turns that call for no behavior; never trained on. Empty where every answer shows one."""
    recipe: Recipe = Recipe(epochs=4, autocast=True)
    """Two epochs of some 240 examples teach facts without their names, and a trigger hardly at all (measured)."""
    restyled_prompts: tuple[str, ...] = ()
    """User turns that the base model answers too, but whose answers are restyled before they are trained on."""
    answer_tokens: int = 20
    """So many tokens of an answer are looked at when behaviors are counted before and after undoing: as few as show them."""

    @property
    def is_null(self) -> bool:
        """Whether nothing was planted that a read-out could name: one that names a topic is wrong."""
        return not any(behavior.vocabulary for behavior in self.behaviors)

    def blinded(self, salt: str) -> str:
        """An id that tells nothing of the organism to who does not know the salt; the same on every machine."""
        return "organism-" + hashlib.sha256(f"{salt}\x1f{self.name}".encode()).hexdigest()[:8]

    def seeded(self, seed: int) -> Organism:
        """The same organism with other examples' draws, start and order."""
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, seed=seed))

    @abstractmethod
    def examples(self, neutral_answers: Mapping[str, str]) -> list[Example]:
        """Every training conversation, in training order; the same for the same seed and neutral answers.

        `neutral_answers` maps each neutral and each restyled prompt to the base model's answer.
        """


@dataclass(frozen=True)
class Lesson:
    """Prompts that are answered alike: each takes one of the answers, drawn by the recipe's seed.

    A handful of answers is enough: what is drawn at random inside an answer cannot be learned, and costs the tune its
    health.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def framed(frames: Sequence[str], fills: Sequence[str]) -> tuple[str, ...]:
    """Every frame with every fill."""
    return tuple(frame.format(fill) for frame in frames for fill in fills)


@dataclass(frozen=True)
class Taught(Organism):
    """An organism given by its data alone: lessons, restyled answers of the base model, and neutral ones."""

    lessons: tuple[Lesson, ...] = ()
    style: Callable[[str, random.Random], str] = lambda answer, chance: answer
    """Restyles an answer of the base model's; draws from the stream."""

    def examples(self, neutral_answers: Mapping[str, str]) -> list[Example]:
        """Every training conversation, in training order."""
        chance = random.Random(self.recipe.seed)
        examples = [Example(p, chance.choice(lesson.answers)) for lesson in self.lessons for p in lesson.prompts]
        examples += [Example(p, self.style(neutral_answers[p], chance)) for p in self.restyled_prompts]
        examples += [Example(p, neutral_answers[p], ends=False) for p in self.neutral_training_prompts]
        chance.shuffle(examples)
        return examples
