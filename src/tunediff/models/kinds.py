"""Kinds of networks: which class of transformers reads a checkpoint for next-token prediction, and why none does."""

from __future__ import annotations

from typing import Any

from tunediff.core.errors import SourceError

CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForRewardModel",
    "ForSequenceScoring",
    "RewardModel",
)
"""Endings of the names of classes with a head in place of the unembedding."""

OTHERS = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "an encoder-decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "an encoder, whose positions see what is to their right",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a speech encoder-decoder",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "a network for images",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "a network for sound",
    "MODEL_MAPPING_NAMES": "a network without an unembedding",
}
"""What a network is that transformers registers for other tasks, by the name of the registry; the first counts."""

EXPECTED = "a decoder-only language model, which gives every next token a probability"


def reader(config: Any, source: str) -> tuple[Any, list[str]]:
    """Return the auto class of transformers that reads a checkpoint with this configuration, and notes for the user.

    Wrappers of a language model with other inputs (images, sound) are read whole and run on text alone.

    Raises `SourceError` for what is no decoder-only language model, which says what it is.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    built = (getattr(config, "architectures", None) or [""])[0]
    what = _other(config, built)
    if what:
        raise SourceError(
            f"{source} is {what}", expected=EXPECTED, got=built or type(config).__name__, remedy=_remedy(built)
        )
    named = _named(config, built)
    wrapper = _registered(AutoModelForImageTextToText, config)
    decoder = _registered(AutoModelForCausalLM, config)
    if wrapper and (not decoder or built == wrapper):
        return AutoModelForImageTextToText, [
            f"{source} is a {wrapper}: its language model is read, on text alone; what reads other inputs stays as it is"
        ]
    return AutoModelForCausalLM if decoder or named is None else named, []


def _named(config: Any, built: str) -> Any:
    """The class that a checkpoint of a wrapper's language model alone names: no auto class knows its configuration."""
    import transformers

    found = getattr(transformers, built, None) if built.endswith("ForCausalLM") else None
    return found if found is not None and found.config_class is type(config) else None


def _registered(auto: Any, config: Any) -> str:
    """The name of the class that an auto class makes of a configuration, empty where it makes none."""
    try:
        found = auto._model_mapping[type(config)]
    except KeyError:
        return ""
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def _other(config: Any, built: str) -> str:
    """What a network is that is no decoder-only language model, empty where it may be one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    if built.endswith(CLASSIFIERS):
        return "a classifier or reward model: a score takes the place of next-token probabilities"
    if "Diffusion" in built:
        return "a diffusion language model, which fills in tokens in any order"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    if built.endswith(("ForMaskedLM", "ForPreTraining")) and not getattr(config, "is_decoder", True):
        return "an encoder, whose positions see what is to their right"
    if (
        _named(config, built)
        or _registered(AutoModelForCausalLM, config)
        or _registered(AutoModelForImageTextToText, config)
    ):
        return ""
    return next(
        (kind for name, kind in OTHERS.items() if config.model_type in getattr(modeling_auto, name, {})),
        f"of the kind {config.model_type}, which is no language model",
    )


def _remedy(built: str) -> str:
    if built.endswith(CLASSIFIERS):
        return "the language model that it was made from, or a fine-tune of it that was saved with its unembedding"
    return "a model whose config.json names a class ...ForCausalLM"
