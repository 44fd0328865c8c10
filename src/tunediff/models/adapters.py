"""Adapters by PEFT: read, fitted to their base tensor by tensor, switched off and on, or merged into a copy of base."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunediff.core.errors import MissingExtraError, SourceError
from tunediff.models.checkpoints import first_lines, has_tokenizer, listing, read_object, refuse_pickles, tensor_shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INPUTS = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "ADAPTION_PROMPT": "an adaption prompt",
    "CPT": "context-aware prompt tuning",
    "CARTRIDGE": "a cartridge",
}
"""Kinds of adapters that give the network more inputs and leave its weights alone."""
PLAIN = frozenset(
    "peft_type task_type peft_version base_model_name_or_path revision inference_mode auto_mapping r lora_alpha "
    "lora_dropout target_modules exclude_modules rank_pattern alpha_pattern layers_to_transform layers_pattern "
    "modules_to_save use_rslora fan_in_fan_out runtime_config".split()
)
"""Fields of a LoRA's configuration that may hold anything, and still it is two factors added to each of its maps."""
NOT_PATTERNS = frozenset(
    "base_model_name_or_path revision auto_mapping peft_version task_type peft_type parent_library".split()
)
SECONDS = 10.0
"""Longest time that matching an adapter's patterns with the names of a network's modules may take."""
MERGED = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Largest accepted difference of logits between an adapter and the same merged, relative to the largest logit."""
MERGED_HALF = 0.05
"""The same in half precision, where merged weights are rounded."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A PEFT adapter on disk: its configuration, and the names and shapes of its tensors.

    name     what the user calls it
    notes    what a user should know of how it was found
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def at(cls, place: Path, name: str) -> Adapter | None:
        """Read the adapter in a folder, or the only one in its subfolders; None where the folder holds a whole model.

        Raises `SourceError` for several adapters to choose from, pickles, damaged files, and kinds that change no weights.
        """
        folder = place
        notes: list[str] = []
        if not (folder / CONFIG).is_file():
            inside = sorted(p.parent for p in place.glob(f"*/{CONFIG}")) if place.is_dir() else []
            if not inside or (place / "config.json").is_file():
                return None
            if len(inside) > 1:
                raise SourceError(
                    f"{name} holds several adapters",
                    expected="one adapter",
                    got=", ".join(p.name for p in inside[:8]),
                    remedy=f"name {Path(name) / inside[0].name} as TUNED",
                )
            folder = inside[0]
            notes.append(f"the adapter is {folder.name} in {name}")
        config = read_object(folder / CONFIG)
        kind = str(config.get("peft_type") or "").upper()
        if kind in INPUTS:
            raise SourceError(
                f"{name} is {INPUTS[kind]}",
                expected="an adapter that changes what weights do",
                got="virtual tokens or keys beside the text, which no text without them shows",
                remedy="give a LoRA or a whole fine-tune as TUNED",
            )
        refuse_pickles(folder)
        if not (folder / WEIGHTS).is_file():
            raise SourceError(
                f"{folder} holds no adapter",
                expected=WEIGHTS,
                got=listing(folder),
                remedy="save it as safetensors: model.save_pretrained(FOLDER)",
            )
        return cls(folder, name, config, tensor_shapes(folder / WEIGHTS), notes)

    @property
    def kind(self) -> str:
        """PEFT's name of the kind, such as ``LORA``."""
        return str(self.config.get("peft_type") or "").upper()

    @property
    def over(self) -> str:
        """The model that it was trained on, as its configuration names it; may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    def is_plain(self, network: nn.Module) -> bool:
        """Whether it is a plain LoRA on linear maps of `network`, so that a switch takes it off.

        Modules trained whole beside it may be there, and copies of the embeddings, which PEFT saves, equal to base's.
        """
        if self.kind != "LORA":
            return False
        usual = _peft().LoraConfig().to_dict()
        for name, value in self.config.items():
            initialized = name == "init_lora_weights" and value in (True, False, "gaussian")
            if not (name in PLAIN or initialized or not value or value == usual.get(name)):
                return False
        whole, own = self._whole, network.state_dict()
        for name, shape in self.shapes.items():
            factor = re.search(r"\.lora_[AB]\.weight$", name) and len(shape) == 2
            if not (factor or whole.intersection(name.split(".")) or self._holds(name, own)):
                return False
        return True

    def _holds(self, name: str, own: Mapping[str, Tensor]) -> bool:
        """Whether a tensor of the file is an embedding equal to base's."""
        theirs = own.get(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if theirs is None or not _is_embedding(name) or tuple(theirs.shape) != self.shapes[name]:
            return False
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            return torch.equal(file.get_tensor(name).to(theirs), theirs)

    @property
    def _whole(self) -> set[str]:
        """The names of modules that were trained whole."""
        named = self.config.get("modules_to_save")
        return {str(n).rpartition(".")[2] for n in named} if isinstance(named, list) else set()

    def rows(self, network: Any, tokenizer: Any) -> int:
        """The number of rows that embeddings need for this adapter; `tokenizer` is the adapter's own or None."""
        have = network.get_input_embeddings().weight.shape[0]
        ends = {
            name.rpartition(".")[2]
            for name, module in network.named_modules()
            if module is network.get_input_embeddings() or module is network.get_output_embeddings()
        }
        found: list[int] = [have]
        for name, shape in self.shapes.items():
            if not ends.intersection(name.split(".")) or not shape:
                continue
            if name.endswith(".lora_embedding_A"):
                found.append(shape[-1])
            elif name.endswith((".lora_B.weight", "lora_magnitude_vector")) or ".lora_" not in name:
                if name.endswith("weight") and (".lora_" in name or len(shape) == 2):
                    found.append(shape[0])
        return max([*found, len(tokenizer) if tokenizer is not None else 0])

    def tokenizer(self) -> Any:
        """The tokenizer beside the adapter, None where there is none; raises `SourceError` for one that cannot be read."""
        from transformers import AutoTokenizer

        if not has_tokenizer(self.folder):
            return None
        try:
            return AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # as of a model's
            raise SourceError(
                f"the tokenizer of {self.name} could not be read",
                expected="tokenizer files that belong together, or none",
                got=first_lines(error),
                remedy="get a whole checkpoint",
            ) from error


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("reading an adapter needs peft", remedy="pip install 'tunediff[adapters]'") from None
    return peft


def with_adapter(module: nn.Module, adapter: Adapter, base: str) -> Any:
    """Return a network wrapped by PEFT with the adapter, which is shown to fit tensor by tensor.

    Raises `SourceError` where a tensor finds no place, a place no tensor, or a shape is another.
    """
    peft = _peft()
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    _refuse_patterns(adapter, [name for name, _ in module.named_modules()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of what is compared by name here
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            kind = peft.PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else peft.PeftModel
            wrapped = kind(module, config)
            places = {
                name: tuple(tensor.shape)
                for name, tensor in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
            }
        except Exception as error:  # an odd field makes PEFT raise nearly anything
            raise _misfit(adapter, base, "an adapter trained on this base", first_lines(error)) from error
        given = {name: shape for name, shape in adapter.shapes.items() if name in places or not _is_embedding(name)}
        _refuse_shapes(adapter, base, given, places)
        lacking, left = sorted(places.keys() - given.keys()), sorted(given.keys() - places.keys())
        try:
            mapping = getattr(module, "_checkpoint_conversion_mapping", None) or None
            tensors = load_peft_weights(str(adapter.folder), device="cpu", key_mapping=mapping)
            result = set_peft_model_state_dict(wrapped, tensors)
            # Names of older transformers are converted on the way: then only PEFT knows which found their places.
            # Older PEFT makes VeRA's projections anew from their seed and leaves the file's, which may be the same numbers.
            there = get_peft_model_state_dict(wrapped, save_embedding_layers=False) if result.unexpected_keys else {}
            same = {n for n in there.keys() & tensors.keys() if torch.equal(there[n].float(), tensors[n].float())}
            unplaced = [name for name in result.unexpected_keys if name not in same]
            unfilled = [n for n in result.missing_keys if _plainly(n) in places and _plainly(n) not in same]
            left, lacking = unplaced and (left or unplaced), unfilled and (lacking or unfilled)
        except KeyError as error:
            lacking = lacking or [str(error.args[0])]
        except Exception as error:
            raise _misfit(adapter, base, "an adapter trained on this base", first_lines(error)) from error
    if lacking or left:
        # PEFT drops what finds no place and makes up what is missing, and at most warns.
        named = [f"{len(n)} {what} (the first: {n[0]})" for n, what in ((left, FIND_NONE), (lacking, LACK)) if n]
        raise _misfit(adapter, base, f"{len(places)} tensors, each in its place", "; ".join(named))
    return wrapped


FIND_NONE = "tensors of the file find no place"
LACK = "places find no tensor"


def _misfit(adapter: Adapter, base: str, expected: str, got: str) -> SourceError:
    named = f", which its {CONFIG} calls {adapter.over}" if adapter.over else ""
    return SourceError(
        f"the adapter {adapter.name} does not fit {base}",
        expected=expected,
        got=got,
        remedy=f"give the model that it was trained on as BASE{named}, or a whole copy of the adapter",
    )


def _refuse_shapes(
    adapter: Adapter, base: str, given: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, ...]]
) -> None:
    wrong = [name for name in sorted(given) if name in places and given[name] != places[name]]
    if wrong:
        raise _misfit(
            adapter,
            base,
            f"{wrong[0]} of shape {places[wrong[0]]}",
            f"shape {given[wrong[0]]}: size mismatch in {len(wrong)} of {len(places)} tensors",
        )


def _plainly(name: str) -> str:
    """A parameter's name as it stands in an adapter's file, without the adapter's name in it."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _is_embedding(name: str) -> bool:
    """Whether a tensor of an adapter's file is an embedding that PEFT saved beside it."""
    return (
        re.search(r"\.(embed\w*|wte|lm_head|embed_out|\w*embeddings?)(\.base_layer)?\.(weight|bias)$", name) is not None
    )


def _refuse_patterns(adapter: Adapter, names: Sequence[str]) -> None:
    """Raise `SourceError` for patterns that take too long to match: a few characters can ask for more steps than end.

    They are tried in a process of its own, which can be ended.
    """
    texts = {
        text
        for name, value in adapter.config.items()
        if name not in NOT_PATTERNS
        for text in ([value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else [])
        if isinstance(text, str) and re.search(r"[*+{?|(]", text)
    }
    if not texts:
        return
    code = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "for pattern in patterns:\n"
        "    for form in (pattern, rf'(.*\\.)?({pattern})$', rf'(^|.*\\.){pattern}($|\\..*)'):\n"
        "        try:\n"
        "            made = re.compile(form)\n"
        "        except (re.error, OverflowError, RecursionError):\n"
        "            continue\n"
        "        for name in names:\n"
        "            made.fullmatch(name), made.match(name), made.search(name)\n"
    )
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            input=json.dumps([sorted(texts), list(names)]),
            text=True,
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise SourceError(
            f"a pattern in {CONFIG} of {adapter.name} takes too long to match",
            expected=f"names of modules, or a pattern that is matched within {SECONDS:g} seconds",
            got=max(texts, key=len)[:100],
            remedy="write the names of the modules as a list in target_modules",
        ) from None


def adapter_off(wrapped: Any) -> Callable[[], AbstractContextManager[None]]:
    """A switch that turns a PEFT model's adapter off for as long as one is inside.

    PEFT's own switch marks the adapter's parameters as trainable on leaving; that is taken back.
    """
    before = [(parameter, parameter.requires_grad) for parameter in wrapped.parameters()]

    @contextmanager
    def off() -> Iterator[None]:
        try:
            with wrapped.disable_adapter():
                yield
        finally:
            for parameter, wanted in before:
                if parameter.requires_grad != wanted:
                    parameter.requires_grad_(wanted)

    return off


def peft_layers() -> tuple[type[Any], ...]:
    """The classes that PEFT puts into a network: adapted layers, and modules that were trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def merged_copy(module: nn.Module, adapter: Adapter, base: str, ids_BT: Tensor, rows: int = 0) -> nn.Module:
    """Return a copy of a network with an adapter of any kind merged into its weights, shown to give PEFT's own logits.

    ids_BT   token ids on which logits are compared
    rows     number of rows that embeddings are to have; new ones are the mean of the others, unless the adapter has them

    Raises `SourceError` for an adapter that does not fit or cannot be merged.
    """
    wrapped = _frozen(with_adapter(with_rows(copy.deepcopy(module), rows), adapter, base), ids_BT)
    dtype = next(module.parameters()).dtype
    error, fault, expected = float("inf"), "", None
    for untied in (False, True):
        if untied:
            # Merging into one of two tied embeddings changes both: the copy has to hold two.
            if (again := _untied(with_rows(copy.deepcopy(module), rows))) is None:
                break
            wrapped = _frozen(with_adapter(again, adapter, base), ids_BT)
        try:
            expected = _logits(wrapped, ids_BT) if expected is None else expected
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged: nn.Module = wrapped.merge_and_unload(safe_merge=True).eval().requires_grad_(False)
            vars(merged).pop("peft_config", None)
            error = float((_logits(merged, ids_BT) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        except Exception as raised:  # PEFT's kinds raise errors of their own
            fault = first_lines(raised)
            continue
        if error <= MERGED.get(dtype, MERGED_HALF):
            return merged
    raise SourceError(
        f"the adapter {adapter.name} cannot be merged into weights",
        expected=f"an adapter that adds the same to weights whatever the text; this one is of kind {adapter.kind}",
        got=fault or f"logits up to {error:.2g} of the largest apart",
        remedy="give a plain LoRA, or a whole fine-tune, as TUNED",
    )


def with_rows(network: Any, rows: int) -> Any:
    """The network with at least so many rows in its embeddings, the new ones being the mean of the others."""
    layers = [layer for layer in (network.get_input_embeddings(), network.get_output_embeddings()) if layer is not None]
    have = layers[0].weight.shape[0]
    if rows <= have:
        return network
    network.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (network.get_input_embeddings(), network.get_output_embeddings()):
            for values in (layer.weight, getattr(layer, "bias", None)) if layer is not None else ():
                if values is not None and len(values) == rows:
                    values[have:] = values[:have].float().mean(0).to(values)
    return network


def is_tied(module: Any) -> bool:
    """Whether input and output embeddings share their weights, and no adapter changes only one of them."""
    network = module.get_base_model() if hasattr(module, "get_base_model") else module
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    if any(end is None for end in ends):
        return False
    bare = [next(end.parameters()) for end in ends]  # PEFT keeps base's weights first
    adapted = hasattr(module, "get_base_model") and any(isinstance(end, peft_layers()) for end in ends)
    return bare[0] is bare[1] and not adapted


def _untied(network: Any) -> Any:
    """The network with input and output embeddings of their own; None where they are two already."""
    if not is_tied(network):
        return None
    out = network.get_output_embeddings()
    out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=False)
    network.config.tie_word_embeddings = False
    return network


def _frozen(wrapped: Any, ids_BT: Tensor) -> Any:
    return wrapped.to(ids_BT.device).eval().requires_grad_(False)


@torch.inference_mode()
def _logits(network: Any, ids_BT: Tensor) -> Tensor:
    logits_BTV: Tensor = network(input_ids=ids_BT, use_cache=False).logits.float()
    return logits_BTV
