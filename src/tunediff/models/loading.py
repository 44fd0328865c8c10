"""Reading models: local folders, hub ids, GGUF files and PEFT adapters, each checked before anything is run."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tunediff.core.errors import MissingExtraError, NumericsError, SettingError, SourceError
from tunediff.core.files import refuse_special
from tunediff.models import shipped as embedded
from tunediff.models.deltas import lora_deltas

UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Endings of files that may hold pickles, which can run code when loaded."""


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
            got=_first_line(error),
            remedy="--set runtime.device=cpu",
        ) from None


def load_frozen(source: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """Return a model on its device, frozen and checked to be finite, and its tokenizer; raise as `read_model` does."""
    module, tokenizer = read_model(source, dtype)
    module.to(device).eval().requires_grad_(False)
    check_finite(source, module)
    return module, tokenizer


def read_model(source: str, dtype: str) -> tuple[nn.Module, Any]:
    """Return model and tokenizer of a folder, hub id, GGUF file or ``default``; raise `SourceError` for anything else."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded.base_folder() if source in ("default", embedded.BASE_NAME) else Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{source} does not exist", expected="a GGUF file", remedy="check the path")
        model, tokenizer = embedded.load_gguf(path)
        return model.to(getattr(torch, dtype)), tokenizer
    _refuse_what_is_no_model(source, path)
    try:
        local = path.is_dir() or not _hub_answers()
        name = str(path) if path.is_dir() else snapshot_download(source, local_files_only=True) if local else source
        safely = {"trust_remote_code": False, "local_files_only": local}
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True, **safely
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **safely)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise SourceError(
                f"{source} brings code of its own, which is not run",
                expected="an architecture that transformers knows",
                remedy="a version of the model in transformers' own format",
            ) from None
        raise SourceError(
            f"{source} could not be read",
            expected="a decoder-only causal language model with its tokenizer, in safetensors",
            got=_first_line(error),
            remedy="a whole checkpoint" if path.is_dir() else "download the model once, or name its local folder",
        ) from error
    if loading["missing_keys"]:
        # transformers fills what a checkpoint lacks with random numbers and only warns.
        raise SourceError(
            f"{source} lacks {len(loading['missing_keys'])} of its weights",
            expected="every weight",
            got=f"no {sorted(loading['missing_keys'])[0]}",
            remedy="a whole checkpoint",
        )
    return model, tokenizer


def _refuse_what_is_no_model(source: str, path: Path) -> None:
    """Raise `SourceError` for an adapter, for pickles, and for a path at which there is no model; a hub id passes."""
    if (path / "adapter_config.json").is_file():
        raise SourceError(
            f"{source} is an adapter",
            expected="a whole model as BASE",
            remedy="the adapter as TUNED, and the model it was trained on as BASE",
        )
    if path.suffix in UNSAFE:
        raise SourceError(
            f"{source} is a pickled checkpoint, which can run code when loaded",
            expected="a folder with *.safetensors, a GGUF file or a PEFT adapter",
            remedy="save it with safe_serialization=True and name the folder",
        )
    if path.is_dir():
        _refuse_pickles(path)
        if not (path / "config.json").is_file():
            raise SourceError(
                f"{source} holds no model",
                expected="config.json and *.safetensors",
                got=", ".join(sorted(p.name for p in path.iterdir())[:5]) or "an empty folder",
                remedy="the folder that holds config.json",
            )
    elif path.exists() or source.startswith((".", "/", "~")):
        raise SourceError(
            f"{source} is not a model",
            expected="a folder, a hub id, a GGUF file or a PEFT adapter",
            got="a file" if path.exists() else "nothing there",
            remedy="check the path",
        )


def _refuse_pickles(folder: Path) -> None:
    refuse_special(folder, SourceError)
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    pickles = [p.name for p in folder.iterdir() if p.suffix in UNSAFE]
    if pickles and not weights:
        raise SourceError(
            f"{folder} holds pickled weights, which can run code when loaded",
            expected="*.safetensors",
            got=", ".join(sorted(pickles)[:3]),
            remedy="save it with safe_serialization=True and try again",
        )


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


def adapter_folder(source: str) -> Path | None:
    """The folder of a PEFT adapter, if `source` is one."""
    folder = Path(source).expanduser()
    return folder if (folder / "adapter_config.json").is_file() else None


def with_adapter(module: nn.Module, folder: Path, base: str) -> Any:
    """Return a network wrapped by PEFT with the adapter in `folder`; raise `SourceError` where they do not fit."""
    try:
        from peft import PeftModel
    except ImportError:
        raise MissingExtraError("reading an adapter needs peft", remedy="pip install 'tunediff[adapters]'") from None
    _refuse_pickles(folder)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise SourceError(
            f"{folder} holds no adapter",
            expected=weights.name,
            got=", ".join(sorted(p.name for p in folder.iterdir())[:5]),
            remedy="save it with safe_serialization=True and try again",
        )
    try:
        with safe_open(weights, "pt") as file:
            given = _lora_names(file.keys())
        wrapped = PeftModel.from_pretrained(module, str(folder), is_trainable=False)
    except SafetensorError as error:
        raise SourceError(
            f"{weights} is not a whole safetensors file", got=_first_line(error), remedy="a whole checkpoint"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise SourceError(
            f"the adapter {folder} does not fit {base}",
            expected="an adapter trained on this base",
            got=_first_line(error),
            remedy="the model named in its adapter_config.json as BASE",
        ) from error
    for _ in lora_deltas(wrapped):
        pass  # what is not a plain LoRA is refused here, before hours are spent on it
    taken = _lora_names(wrapped.state_dict())
    if given != taken:
        # PEFT drops what finds no place and makes up what is missing, and at most warns.
        raise SourceError(
            f"the adapter {folder} does not fit {base}",
            expected=f"{taken} LoRA factors on this base",
            got=f"{given}",
            remedy="the model named in its adapter_config.json as BASE",
        )
    return wrapped


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


def peft_layers() -> tuple[type, ...]:
    """The classes that PEFT puts into a network: adapted layers, and modules that were trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def _lora_names(names: Iterable[str]) -> int:
    """How many of `names` are LoRA factors."""
    return sum(".lora_" in name for name in names)


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
                remedy="a checkpoint from before it broke",
            )


def fingerprint(module: nn.Module, adapters: bool = True) -> str:
    """Return a 16-digit hash over every parameter's and buffer's name, shape and bytes.

    Without `adapters`, what PEFT put into the network is left out: the hash is that of the network before.
    """
    tensors = module.state_dict()
    if not adapters:
        tensors = {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
            for name, tensor in tensors.items()
            if ".lora_" not in name and ".modules_to_save." not in name
        }
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprints(*of: tuple[nn.Module, bool]) -> list[str]:
    """Return the fingerprints of several networks, computed in threads: hashing releases the interpreter's lock."""
    with ThreadPoolExecutor(len(of)) as pool:
        return list(pool.map(lambda given: fingerprint(*given), of))


def _first_line(error: Exception) -> str:
    """The first line of an error's text, and the second where the first ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:200]
