"""Reading models: local folders, hub ids and GGUF files, each checked before anything is run."""

from __future__ import annotations

import copy
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from tunediff.core.errors import NumericsError, SettingError, SourceError, TunediffError
from tunediff.models import shipped as embedded
from tunediff.models.checkpoints import UNSAFE, check_checkpoint, first_lines, has_tokenizer, own_template
from tunediff.models.kinds import reader

FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""Names of files that are fetched from the hub; anything else is not read."""
ELSEWHERE = ("*/*", "consolidated*")
"""Names of files that are not fetched, though they are called so: other formats and copies."""


def check_runtime(dtype: str, device: str) -> None:
    """Raise `SettingError` for a dtype that is none, or a device that torch cannot use."""
    if not isinstance(getattr(torch, dtype, None), torch.dtype) or not getattr(torch, dtype).is_floating_point:
        raise SettingError(f"there is no dtype {dtype!r}", expected="float32, bfloat16, float16 or float64")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError(
            f"device {device!r} cannot be used",
            expected="cpu, or what torch was installed for",
            got=first_lines(error),
            remedy="--set runtime.device=cpu",
        ) from None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network with its tokenizer, and notes on what a user should know of how they were read."""

    module: nn.Module
    tokenizer: Any
    notes: list[str] = field(default_factory=list)


def load_frozen(source: str, dtype: str, device: str, spare: Any = None) -> Loaded:
    """Return a model on its device, frozen and checked to be finite; raise as `read_model` does.

    spare   tokenizer for a folder that holds none
    """
    loaded = read_model(located(source), source, dtype, spare)
    loaded.module.to(device).eval().requires_grad_(False)
    check_finite(source, loaded.module)
    return loaded


def located(source: str) -> Path:
    """Return the folder or GGUF file of a model or an adapter; of a hub id, the folder of its copy in the cache.

    Raises `SourceError` where there is none, and for a pickle.
    """
    if source == "default" or source in embedded.MODELS:
        return embedded.base_folder(source)
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user, a zero byte
        raise SourceError(f"{source[:200]} is not a model", got=first_lines(error), remedy="check the path") from None
    if path.suffix in UNSAFE:
        raise SourceError(
            f"{source} is a pickled checkpoint, which can run code when loaded",
            expected="a folder with *.safetensors, a GGUF file or a PEFT adapter",
            remedy="save it as safetensors: model.save_pretrained(FOLDER)",
        )
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{source} does not exist", expected="a GGUF file", remedy="check the path")
        return path
    if path.is_dir():
        return path.resolve()
    if path.exists() or source.startswith((".", "/", "~")):
        raise SourceError(
            f"{source} is not a model",
            expected="a folder, a hub id, a GGUF file or a PEFT adapter",
            got="a file" if path.exists() else "nothing there",
            remedy="check the path",
        )
    return _fetched(source)


def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Fetched first and read as a folder, so that what is checked is what is opened.
        return Path(
            snapshot_download(
                source,
                local_files_only=not _hub_answers(),
                allow_patterns=list(FETCHED),
                ignore_patterns=list(ELSEWHERE),
            )
        )
    except Exception as error:  # its client raises errors of many libraries
        raise SourceError(
            f"{source} could not be read",
            expected="a local folder, or the id of a model on the hub or in its cache",
            got=first_lines(error),
            remedy="download the model once, or name its local folder",
        ) from error


def read_model(place: Path, source: str, dtype: str, spare: Any = None) -> Loaded:
    """Read the model in a folder or GGUF file that `located` found; raise `SourceError` for anything else.

    source   what the user calls it
    spare    tokenizer for a folder that holds none
    """
    if place.suffix == ".gguf" and place.is_file():
        module, tokenizer = embedded.load_gguf(place)
        return Loaded(module.to(getattr(torch, dtype)), tokenizer)
    notes = check_checkpoint(place, source)
    lent = None
    if spare is not None and not has_tokenizer(place):
        lent = borrowed(spare, place)
        own = " with its own chat template" if lent is not spare else ""
        notes.append(f"{source} holds no tokenizer: base's is used{own}")
    module, tokenizer, told = _from_pretrained(place, source, dtype, lent)
    return Loaded(module, tokenizer, notes + told)


def borrowed(tokenizer: Any, place: Path) -> Any:
    """Another model's tokenizer for a folder that holds none: a copy with the folder's chat template where it has one."""
    template = own_template(place)
    if template is None or template == tokenizer.chat_template:
        return tokenizer
    lent = copy.deepcopy(tokenizer)
    lent.chat_template = template
    return lent


def _from_pretrained(place: Path, source: str, dtype: str, tokenizer: Any) -> tuple[nn.Module, Any, list[str]]:
    """What transformers makes of a checked folder: network, tokenizer, and notes."""
    from transformers import AutoConfig, AutoTokenizer

    safely = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(str(place), **safely)
        if getattr(config, "quantization_config", "") is None:
            del config.quantization_config  # older transformers take a null for a kind of quantization
        auto, notes = reader(config, source)
        module, loading = auto.from_pretrained(
            str(place),
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **safely,
        )
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(place), **safely)
    except TunediffError:
        raise
    except Exception as error:  # an odd field of a config makes transformers raise nearly anything
        if "trust_remote_code" in str(error):
            raise SourceError(
                f"{source} brings code of its own, which is not run",
                expected="an architecture that transformers knows",
                remedy="get a version of the model in transformers' own format",
            ) from None
        raise SourceError(
            f"{source} could not be read",
            expected="a decoder-only causal language model with its tokenizer, in safetensors",
            got=first_lines(error),
            remedy="get a whole checkpoint",
        ) from error
    if loading["missing_keys"]:
        # transformers fills what a checkpoint lacks with random numbers and only warns.
        raise SourceError(
            f"{source} lacks {len(loading['missing_keys'])} of its weights",
            expected="every weight",
            got=f"no {sorted(loading['missing_keys'])[0]}",
            remedy="get a whole checkpoint",
        )
    if lost := sorted(loading.get("unexpected_keys", ())):
        notes = [*notes, f"{len(lost)} weights of {source} have no place in its network (the first: {lost[0]})"]
    return module, tokenizer, notes


def _hub_answers(seconds: float = 3.0) -> bool:
    """Whether the hub can be reached; offline its own client would retry for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # the way there is the proxy's, and only a request can tell
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), seconds).close()
    except OSError:
        return False
    return True


def check_finite(name: str, module: nn.Module, *parts: str) -> None:
    """Raise `NumericsError` for weights that are not finite; with `parts`, look only at names that contain one of them."""
    for parameter_name, parameter in module.named_parameters():
        if parts and not any(part in parameter_name for part in parts):
            continue
        # A sum passes over memory once and writes nothing; where it is not finite, finite weights may have added up to that.
        if not (torch.isfinite(parameter.sum()) or torch.isfinite(parameter).all()):
            raise NumericsError(
                f"{name}: weight {parameter_name} holds NaN or infinite values",
                expected="finite weights",
                remedy="use a checkpoint from before it broke",
            )
