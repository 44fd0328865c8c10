"""Pairs: base and tuned, loaded, checked to be comparable, and what differs between their weights."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tunediff.core.chance import generator
from tunediff.core.errors import MissingExtraError, NumericsError, PairError, SettingError, SourceError
from tunediff.models import shipped as embedded
from tunediff.models.fast.layers import frozen
from tunediff.models.network import LanguageModel, Start, swapped
from tunediff.records.site import Site

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "In 1969, 3 people went to the Moon; two of them walked on it.",
    "Café, naïve, 東京, Москва — “quotes” and emoji 🙂.",
)
MERGE = "merge the adapter (merge_and_unload) and give the merged folder as TUNED"
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, eq=False)
class Delta:
    """What tuning added to one linear map: ``up @ down`` of shape (out, in), and the parameters that hold it.

    For a LoRA, up (out, r) already has the scale in it, and `down_parameter` is the adapter's A. For a full
    fine-tune, `up` is None, `down` is the whole difference (out, in), `down_parameter` is the tuned weight and
    `base_weight` the base's, both as the module keeps them.
    """

    name: str
    linear: nn.Module
    down: Tensor
    up: Tensor | None
    down_parameter: nn.Parameter
    up_parameter: nn.Parameter | None
    transposed: bool = False
    base_weight: Tensor | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the added map."""
        if self.up is None:
            return float(self.down.double().norm())
        # |UD|^2 = <U'U, DD'>, without forming the product.
        up, down = self.up.double(), self.down.double()
        return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt())

    def with_inputs(self, through: Callable[[Tensor], Tensor]) -> Mapping[nn.Parameter, Tensor]:
        """Parameters under which the added map is up @ through(down), where `through` takes (any, in) to (any, in), linearly.

        The identity gives tuned's weights to the bit, zeros give base's.
        """
        if self.up is not None:
            return {self.down_parameter: through(self.down.double()).to(self.down)}
        # `down` is rounded to float32; the difference in float64 is not, and leads back to either end exactly.
        whole = self.down_parameter.data.double() - self.base_weight.double()
        return self._over_base(through(whole.T if self.transposed else whole).to(whole))

    def _over_base(self, added: Tensor) -> Mapping[nn.Parameter, Tensor]:
        """Parameters under which a full fine-tune added `added` (out, in) to base."""
        weight = self.base_weight.double() + (added.T if self.transposed else added).double()
        return {self.down_parameter: weight.to(self.down_parameter.dtype)}

    def random(self, seed: int) -> Mapping[nn.Parameter, Tensor]:
        """Parameters under which the added map is Gaussian, of the same rank (at most 16) and the same norm."""
        rank = self.down.shape[0] if self.up is not None else min(16, *self.down.shape)
        out = (self.up if self.up is not None else self.down).shape[0]
        rng = generator(seed, "random lora", self.name)
        up = torch.randn(out, rank, generator=rng).to(self.down)
        down = torch.randn(rank, self.down.shape[1], generator=rng).to(self.down)
        scale = self.norm / float(((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum().sqrt())
        if self.up is None:
            return self._over_base((up.double() @ down.double()) * scale)
        ratio = float(self.up_parameter.data.norm() / self.up.norm().clamp_min(1e-30))  # undo the adapter's own scale
        return {self.down_parameter: down * scale, self.up_parameter: up * ratio}


@dataclass(eq=False)
class Pair:
    """Base and tuned, shown to be comparable. ``shared`` says whether one module serves as both (a LoRA over base).

    Token ids below ``vocabulary`` mean the same in both; `tokenizer` is base's.
    """

    base: LanguageModel
    tuned: LanguageModel
    shared: bool
    vocabulary: int
    base_fingerprint: str
    tuned_fingerprint: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(
        cls, base: str, tuned: str, *, dtype: str = "float32", device: str = "cpu", allow_identical: bool = False
    ) -> Pair:
        """Load and compare two models.

        base    a local folder, a hub id, a GGUF file, or ``default`` (the embedded SmolLM2-135M-Instruct)
        tuned   any of these, or a PEFT adapter folder over base; ``default`` again is base itself
        dtype   of both forwards; in bfloat16 the difference between two light tunes is up to 60 % rounding error
        allow_identical   accept identical weights, as a sanity null

        Raises `SourceError` for what cannot be read, `PairError` for what cannot be compared.
        """
        _check_runtime(dtype, device)
        module, tokenizer = _read(base, dtype)
        module.to(device).eval().requires_grad_(False)
        _check_finite(base, module)
        adapter = _adapter_folder(tuned)
        if adapter:
            untouched = LanguageModel(module, tokenizer, base)
            ids_BT = probe_ids(tokenizer, untouched.vocabulary)
            before = untouched.logits(untouched.states(ids_BT))
            wrapped = _with_adapter(module, adapter, base)
            wrapped.to(device).eval().requires_grad_(False)
            _check_finite(tuned, wrapped, ".lora_", "modules_to_save")

            layers = [m for m in wrapped.modules() if isinstance(m, _peft_layers())]
            for delta in _lora_deltas(wrapped):
                delta.linear.forward = MethodType(_lora_forward, delta.linear)

            @contextmanager
            def off() -> Iterator[None]:
                # PEFT's own switches look over the whole network, or over every weight's `requires_grad`, each time, which
                # takes longer than a block's run. That base comes back is checked below.
                for layer in layers:
                    layer._disable_adapters = True
                try:
                    yield
                finally:
                    for layer in layers:
                        layer._disable_adapters = False

            pair = cls(
                LanguageModel(wrapped, tokenizer, base, off),
                LanguageModel(wrapped, tokenizer, tuned),
                True,
                0,
                *_fingerprints((module, False), (wrapped, True)),
            )
            after = pair.base.logits(pair.base.states(ids_BT))
            if not torch.equal(before, after):
                # Trained biases and some initializations stay in the base's weights when PEFT switches off.
                raise PairError(
                    f"{base} does not come back when the adapter {tuned} is switched off",
                    expected="equal logits",
                    got=f"logits up to {float((before - after).abs().max()):.2g} apart",
                    remedy=MERGE,
                )
        else:
            other, other_tokenizer = _read(tuned, dtype)
            other.to(device).eval().requires_grad_(False)
            _check_finite(tuned, other)
            return cls.of(
                LanguageModel(module, tokenizer, base), LanguageModel(other, other_tokenizer, tuned), allow_identical
            )
        pair._compare(allow_identical)
        return pair

    @classmethod
    def of(cls, base: LanguageModel, tuned: LanguageModel, allow_identical: bool = False) -> Pair:
        """Compare two models that are loaded already, each with a network of its own; raises as `load` does."""
        pair = cls(base, tuned, False, 0, *_fingerprints((base.module, True), (tuned.module, True)))
        pair._compare(allow_identical)
        return pair

    @property
    def tokenizer(self) -> Any:
        """Base's tokenizer; the check on loading showed that tuned's reads shared text alike."""
        return self.base.tokenizer

    def _compare(self, allow_identical: bool) -> None:
        base, tuned = self.base, self.tuned
        for what, of in (("depth", lambda m: m.depth), ("width", lambda m: m.width)):
            if of(base) != of(tuned):
                raise PairError(
                    f"{base.name} and {tuned.name} differ in {what}",
                    expected=f"{of(base)} (base)",
                    got=f"{of(tuned)} (tuned)",
                    remedy="the model that tuned was made from as BASE",
                )
        for text in PROBES:
            ours, theirs = (m.tokenizer(text, add_special_tokens=False)["input_ids"] for m in (base, tuned))
            if ours != theirs:
                raise PairError(
                    f"{base.name} and {tuned.name} read the same text as different tokens",
                    expected=f"{ours[:8]} (base)",
                    got=f"{theirs[:8]} (tuned) for {text[:24]!r}",
                    remedy="a pair with one tokenizer; activations of different tokens cannot be compared",
                )
        self.vocabulary = min(base.vocabulary, tuned.vocabulary)
        if base.vocabulary != tuned.vocabulary:
            self.notes.append(
                f"vocabularies of {base.vocabulary} and {tuned.vocabulary} tokens: compared on the shared {self.vocabulary}"
            )
        ids_BT = probe_ids(self.tokenizer, self.vocabulary)
        with frozen():
            base.check_reading(ids_BT)
            tuned.check_reading(ids_BT)
            same = self.base_fingerprint == self.tuned_fingerprint
            if not same:
                gap = (
                    (
                        base.logits(base.states(ids_BT))[..., : self.vocabulary]
                        - tuned.logits(tuned.states(ids_BT))[..., : self.vocabulary]
                    )
                    .abs()
                    .max()
                )
                same = float(gap) == 0.0
        if same and not allow_identical:
            what = f"the adapter {tuned.name} changes no logits" if self.shared else "base and tuned are the same model"
            raise PairError(
                what,
                expected="a tuned model that differs from base",
                got="equal logits on every probe text",
                remedy="--set pair.allow_identical=true to run it as a sanity null",
            )

    @cached_property
    def common_blocks(self) -> int:
        """How many of the lowest blocks a shared module's adapter leaves alone: both models agree there exactly."""
        if not self.shared:
            return 0
        kinds = _peft_layers()
        blocks = set(map(id, self.base.blocks.modules()))
        outside = any(isinstance(m, kinds) and id(m) not in blocks for m in self.base.network.modules())
        touched = [any(isinstance(m, kinds) for m in block.modules()) for block in self.base.blocks]
        return 0 if outside or True not in touched else touched.index(True)

    def common_start(self, ids_BT: Tensor, sites: Sequence[Site] = (), wanted_BT: Tensor | None = None) -> Start | None:
        """Where runs of tuned and of its variants may begin, from the stream that base has there too: above the blocks that
        tuning left alone; None where there are none, or a site to be read is not above them."""
        below = self._common_site(sites)
        return below and Start(below, self.base.streams(ids_BT, [below], wanted_BT=wanted_BT)[:, :, 0])

    def both_streams(self, ids_BT: Tensor, sites: Sequence[Site], wanted_BT: Tensor | None = None) -> Tensor:
        """Streams (B, T, S, M, D) of both models. Blocks below the first that tuning touched are run once, for both.

        wanted_BT   positions whose values will be used, all if None; others may hold anything
        """
        return self._both(ids_BT, sites, False, wanted_BT)[0]

    def both_states(
        self, ids_BT: Tensor, sites: Sequence[Site] = (), wanted_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Base's and tuned's final normed states (B, T, D), and `both_streams` if sites are named, from one run of each."""
        streams, base_BTD, tuned_BTD = self._both(ids_BT, sites, True, wanted_BT)
        return base_BTD, tuned_BTD, streams

    def _both(self, ids_BT: Tensor, sites: Sequence[Site], final: bool, wanted_BT: Tensor | None) -> tuple:
        below = Site(self.common_blocks - 1) if self.common_blocks else None
        base, base_states = self.base.read(ids_BT, [below, *sites] if below else sites, final, None, wanted_BT)
        start = None
        if below:
            base, start = base[:, :, 1:], Start(below, base[:, :, 0])
        own = [s for s, site in enumerate(sites) if not below or site.layer > below.layer]  # below, both are the same
        tuned, tuned_states = base, None
        if own or final:
            streams, tuned_states = self.tuned.read(ids_BT, [sites[s] for s in own], final, start, wanted_BT)
            if len(own) == len(sites):
                tuned = streams
            elif own:
                tuned = base.clone()
                tuned[:, :, own] = streams
        return torch.stack([base, tuned], dim=3) if sites else None, base_states, tuned_states

    def _common_site(self, sites: Sequence[Site]) -> Site | None:
        common = self.common_blocks
        return Site(common - 1) if common and all(site.layer >= common for site in sites) else None

    def deltas(self) -> list[Delta]:
        """What tuning added, for every linear map it touched, in the order of the network."""
        return list(_lora_deltas(self.tuned.module) if self.shared else _full_deltas(self.base, self.tuned))

    def random_tuned(self, seed: int) -> LanguageModel:
        """A null for tuned: base plus, in every linear map, a random change of the tune's own rank and norm.

        What is not a linear map inside the blocks (norms, embeddings) is base's; tokens tuning added keep their rows.
        """
        tensors: dict[nn.Parameter, Tensor] = {}
        for delta in self.deltas():
            tensors.update(delta.random(seed))
        linear = {id(parameter) for parameter in tensors}
        for parameter, mine in counterparts(self):
            if id(parameter) not in linear:
                same = mine.shape == parameter.shape
                tensors[parameter] = mine if same else torch.cat([mine[: len(parameter)], parameter.data[len(mine) :]])
        return self.tuned.variant(f"random tune {seed}", tensors)


def probe_ids(tokenizer: Any, vocabulary: int) -> Tensor:
    """The probe texts as one (B, T) array cut to the shortest; ids of 0 stand where a token is not shared."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    length = min(map(len, rows))
    return torch.tensor([[i if i < vocabulary else 0 for i in row[:length]] for row in rows])


def fingerprint(module: nn.Module, adapters: bool = True) -> str:
    """A 16-digit hash over every parameter's and buffer's name, shape and bytes.

    Without `adapters`, what PEFT put into a network is passed over: the hash is that of the network before.
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


def _fingerprints(*of: tuple[nn.Module, bool]) -> list[str]:
    """Those of several networks at once: hashing gives up the interpreter's lock."""
    with ThreadPoolExecutor(len(of)) as pool:
        return list(pool.map(lambda given: fingerprint(*given), of))


def counterparts(pair: Pair) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter tuning could change as a whole, with base's value of it; LoRA factors have none."""
    if pair.shared:
        from peft.utils.other import ModulesToSaveWrapper

        for wrapper in pair.tuned.network.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                mine = dict(wrapper.original_module.named_parameters())
                for name, parameter in wrapper.modules_to_save[wrapper.active_adapter].named_parameters():
                    yield parameter, mine[name].data
        return
    mine = dict(pair.base.network.named_parameters())
    for name, parameter in pair.tuned.network.named_parameters():
        if name in mine and mine[name].shape[1:] == parameter.shape[1:]:
            yield parameter, mine[name].data


def _check_runtime(dtype: str, device: str) -> None:
    if not isinstance(getattr(torch, dtype, None), torch.dtype) or not getattr(torch, dtype).is_floating_point:
        raise SettingError(f"there is no dtype {dtype!r}", expected="float32, bfloat16, float16 or float64")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError(
            f"device {device!r} cannot be used", got=_first_line(error), remedy="cpu, or what torch was installed for"
        ) from None


def _check_finite(name: str, module: nn.Module, *parts: str) -> None:
    """Refuse weights that are not finite; of those only that have one of `parts` in their name, if given."""
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


def _adapter_folder(source: str) -> Path | None:
    """The folder of a PEFT adapter, if `source` is one."""
    folder = Path(source).expanduser()
    return folder if (folder / "adapter_config.json").is_file() else None


def _refuse_pickles(folder: Path) -> None:
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors"]
    pickles = [p.name for p in folder.iterdir() if p.suffix in UNSAFE]
    if pickles and not weights:
        raise SourceError(
            f"{folder} holds pickled weights, which can run code when loaded",
            expected="*.safetensors",
            got=", ".join(sorted(pickles)[:3]),
            remedy="save it with safe_serialization=True and try again",
        )


def _read(source: str, dtype: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer of a folder, hub id, GGUF file or ``default``."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded.base_folder() if source in ("default", embedded.BASE_NAME) else Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SourceError(f"{source} does not exist", expected="a GGUF file", remedy="check the path")
        model, tokenizer = embedded.load_gguf(path)
        return model.to(getattr(torch, dtype)), tokenizer
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


def _hub_answers(seconds: float = 3.0) -> bool:
    """Whether the hub can be reached. Offline, its client would try again for most of a minute before it gives up."""
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


def _with_adapter(module: nn.Module, folder: Path, base: str) -> nn.Module:
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
    for _ in _lora_deltas(wrapped):
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


def _peft_layers() -> tuple[type, ...]:
    """What PEFT puts into a network: adapted layers, and modules that were trained whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def _lora_forward(layer: nn.Module, x_BTI: Tensor) -> Tensor:
    """A plain LoRA layer's output as PEFT computes it, with the adapter's part added in place: PEFT's own forward goes over
    an output as large as the map's twice more."""
    out_BTO = layer.base_layer(x_BTI)
    if layer.disable_adapters:
        return out_BTO
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if not x_BTI.dtype == down.dtype == out_BTO.dtype:
        return type(layer).forward(layer, x_BTI)
    read_NR = x_BTI.flatten(0, -2) @ down.T
    return out_BTO.flatten(0, -2).addmm_(read_NR, up.T, alpha=layer.scaling[name]).view_as(out_BTO)


def _lora_names(names: Iterable[str]) -> int:
    """How many of `names` are LoRA factors."""
    return sum(".lora_" in name for name in names)


def _first_line(error: Exception) -> str:
    """What an error says first: its first line, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:200]


def _lora_deltas(module: nn.Module) -> Iterator[Delta]:
    """The LoRA layers of a PEFT model with one active plain-LoRA adapter; other kinds are refused (`SourceError`)."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    if module.active_peft_config.peft_type != "LORA":
        raise SourceError(
            f"the adapter is of kind {str(module.active_peft_config.peft_type.value)}",
            expected="plain LoRA",
            remedy=MERGE,
        )
    for name, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        active = layer.active_adapters
        if not isinstance(layer, LoraLayer) or len(active) != 1 or active[0] not in layer.lora_A:
            raise SourceError(
                f"{name} is not a plain LoRA layer",
                expected="one LoRA adapter on linear maps",
                got=type(layer).__name__,
                remedy=MERGE,
            )
        adapter = active[0]
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        variant = layer.lora_variant.get(adapter)  # DoRA and its like
        if variant is not None or layer.lora_bias.get(adapter):
            raise SourceError(
                f"{name} uses {type(variant).__name__ if variant else 'a LoRA bias'}",
                expected="plain LoRA",
                remedy=MERGE,
            )
        yield Delta(name, layer, down.data, up.data * layer.scaling[adapter], down, up)


def _full_deltas(base: LanguageModel, tuned: LanguageModel) -> Iterator[Delta]:
    """The linear maps inside the blocks whose weights differ between two whole models."""
    theirs = dict(base.blocks.named_modules())
    shapes = [{n: tuple(p.shape) for n, p in side.blocks.named_parameters() if p.dim() == 2} for side in (base, tuned)]
    if shapes[0] != shapes[1]:
        name = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise PairError(
            f"the blocks of {base.name} and {tuned.name} are built differently",
            expected=f"{name} of shape {shapes[0].get(name, 'none')} (base)",
            got=f"{shapes[1].get(name, 'none')} (tuned)",
            remedy="the model that tuned was made from as BASE",
        )
    for name, module in tuned.blocks.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        transposed = type(module).__name__ == "Conv1D"  # GPT-2 keeps (in, out)
        difference = weight.data.float() - theirs[name].weight.data.float()
        if difference.any():
            yield Delta(
                name,
                module,
                difference.T if transposed else difference,
                None,
                weight,
                None,
                transposed,
                theirs[name].weight.data,
            )


__all__ = ["Delta", "Pair", "fingerprint", "probe_ids", "swapped"]
