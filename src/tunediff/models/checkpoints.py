"""Checkpoints on disk: what a folder holds is checked before a library opens it, so that no index, link or config misleads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunediff.core.errors import SourceError
from tunediff.core.files import refuse_special

UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Endings of files that may hold pickles, which can run code when loaded."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
READ = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files that may be opened in a model's folder."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Files of which a tokenizer has at least one."""
CHAT_TEMPLATE = "chat_template.jinja"
"""File of a chat template; older ones are a field of `tokenizer_config.json`."""
WHOLE = "get a whole checkpoint"
SAFELY = "save it as safetensors: model.save_pretrained(FOLDER)"


KINDS_OF_NUMBERS = {
    "other": re.compile(r"position|token|window|_ids?$|^max_|chunk|batch|vocab|image|patch|audio|period|offset"),
    "layers": re.compile(r"layers$|^n_layer$|depth$|n_blocks?$"),
    "experts": re.compile(r"experts"),
    "size": re.compile(r"size|dim|heads?$|embd|inner|ffn|width|state|rank$"),
}
"""What whole numbers in a config count, by their names; the first that matches is taken."""


def check_checkpoint(folder: Path, source: str) -> list[str]:
    """Check a model's folder by file names, headers and numbers, and return notes on what a user should know.

    Raises `SourceError` for pickles, an index that names pickles or files elsewhere, files that are no regular files,
    damaged headers, quantized weights, and a configuration of a network that the weights cannot fill.
    """
    refuse_pickles(folder)
    notes = list(_links(folder))
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{source} holds no model",
            expected="config.json and *.safetensors",
            got=listing(folder),
            remedy="name the folder that holds config.json",
        )
    config = read_object(folder / "config.json")
    _refuse_quantized(source, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder, source, config):
        shapes.update(tensor_shapes(file))
    _refuse_absurd(source, config, shapes)
    return notes


def listing(folder: Path) -> str:
    """The first names in a folder, for an error."""
    return ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "an empty folder"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def own_template(folder: Path) -> str | None:
    """The chat template in a folder, whether or not it holds a tokenizer; None where there is none."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    config = folder / "tokenizer_config.json"
    template = read_object(config).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def refuse_pickles(folder: Path) -> None:
    """Raise `SourceError` for a folder whose weights are pickled, and not there in safetensors too, or that holds pipes."""
    refuse_special(folder, SourceError)
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    pickles = [p.name for p in folder.iterdir() if p.suffix in UNSAFE]
    if pickles and not weights:
        raise SourceError(
            f"{folder} holds pickled weights, which can run code when loaded",
            expected="*.safetensors",
            got=", ".join(sorted(pickles)[:3]),
            remedy="save it as safetensors: model.save_pretrained(FOLDER)",
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises `SourceError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} could not be read", expected="JSON", got=first_lines(error), remedy=WHOLE) from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} could not be read", expected="a JSON object", got=type(value).__name__, remedy=WHOLE)
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in a safetensors file's header; raises `SourceError` for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"{path} is not a whole safetensors file", got=first_lines(error), remedy=WHOLE) from None


def first_lines(error: BaseException) -> str:
    """The first line of an error's text, and the second where the first ends with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:200]


def _links(folder: Path) -> Iterator[str]:
    """Yield a note for each link to a file elsewhere but in a hub cache; raise `SourceError` for one to nowhere."""
    home = folder.resolve()
    for path in sorted(folder.iterdir()):
        if path.suffix not in READ or not path.is_symlink():
            continue
        target = path.resolve()
        if not target.exists():
            raise SourceError(
                f"{path} is a link to nowhere", got=str(target), remedy="name a folder whose files are all there"
            )
        cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if not (target.is_relative_to(home) or cached):
            yield f"{path.name} is a link to {target}, outside the folder"


def _weight_files(folder: Path, source: str, config: Mapping[str, Any]) -> list[Path]:
    """The files that hold the weights, by the rules of transformers, each shown to be safetensors inside the folder."""
    named = config.get("transformers_weights")
    if named is not None:
        names = [_inside(folder, source, "config.json", named, (".safetensors", ".safetensors.index.json"))]
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        names = [INDEX]
    if names[0].endswith(".index.json"):
        if not (folder / names[0]).is_file():
            raise SourceError(
                f"{source} holds no weights",
                expected=f"{WEIGHTS}, or shards with {INDEX}",
                got=listing(folder),
                remedy=WHOLE,
            )
        index = read_object(folder / names[0])
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise SourceError(
                f"{folder / names[0]} names no shards",
                expected="weight_map, from names of weights to names of files",
                got=type(shards).__name__,
                remedy=WHOLE,
            )
        unique = sorted(set(map(str, shards.values()))) if all(isinstance(s, str) for s in shards.values()) else [None]
        names = [_inside(folder, source, names[0], shard, (".safetensors",)) for shard in unique]
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{source} lacks a file of its weights", expected=name, got=listing(folder), remedy=WHOLE)
    return [folder / name for name in names]


def _inside(folder: Path, source: str, said_by: str, name: Any, endings: tuple[str, ...]) -> str:
    """`name`, shown to be that of a safetensors file inside the folder."""
    if isinstance(name, str) and Path(name).suffix in UNSAFE:
        raise SourceError(
            f"{said_by} of {source} names pickled weights, which can run code when loaded",
            expected="*.safetensors",
            got=name[:100],
            remedy=SAFELY,
        )
    if not isinstance(name, str) or not name.endswith(endings) or re.split(r"[\\/]", name) != [name]:
        raise SourceError(
            f"{said_by} of {source} names weights that are no safetensors file in its folder",
            expected="names of *.safetensors files beside it",
            got=str(name)[:100],
            remedy=SAFELY,
        )
    return name


def _refuse_quantized(source: str, config: Mapping[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        how = part.get("quantization_config") if isinstance(part, Mapping) else None
        if how:
            method = str(how.get("quant_method", "unknown")) if isinstance(how, Mapping) else str(how)
            bits = [b for b in ("4", "8") if isinstance(how, Mapping) and how.get(f"load_in_{b}bit")]
            raise SourceError(
                f"the weights of {source} are quantized",
                expected="weights in float32, bfloat16 or float16, which can be compared and edited",
                got=f"quantization_config of kind {method[:40]}" + "".join(f", {b} bits" for b in bits),
                remedy="name the model that it was quantized from, or a copy saved after model.dequantize()",
            )


def _refuse_absurd(source: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `SourceError` for numbers in a config that the weights cannot bear out; building such a network may not end."""
    sides = [side for shape in shapes.values() for side in shape]
    numbers = sum(map(math.prod, shapes.values()))
    limits = {"layers": len(shapes), "experts": max([len(shapes), *sides]), "size": max(1, numbers)}
    for path, value in _numbers(config):
        name = path.rpartition(".")[2]
        what = next((kind for kind, names in KINDS_OF_NUMBERS.items() if names.search(name)), "other")
        limit = limits.get(what, 1 << 53)
        if value > limit:
            raise SourceError(
                f"config.json of {source} speaks of a network that its weights cannot fill",
                expected=f"{path} of at most {limit:,}, as there are {len(shapes):,} tensors of {numbers:,} numbers",
                got=f"{value:,}"[:60],
                remedy="get the config.json that belongs to these weights",
            )


def _numbers(values: Any, path: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number in a config, with its dotted path."""
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{path}{name}", value
