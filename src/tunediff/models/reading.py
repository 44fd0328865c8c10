"""Is a network read right: its own logits come back from streams, states and resumed passes, and no position sees ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunediff.core.errors import FamilyError, NumericsError, TunediffError
from tunediff.models.passes import OTHER_NETWORK, Start, reason, taken
from tunediff.records.site import Site

if TYPE_CHECKING:
    from tunediff.models.network import LanguageModel

ROUNDING = 8
"""How many times the spacing of numbers in a network's dtype two ways of computing may differ by."""

PADDING = 3
"""Positions of padding with which it is tried."""

NEW = 3
"""Tokens with which completing is tried."""

DECODER = "a decoder-only language model, in which positions see only what is to their left"


def check(model: LanguageModel, ids_BT: Tensor, tolerance: float) -> None:
    """Refuse a network whose hooks, resumed pass or unembedding do not give its own logits back, or that sees ahead.

    Finds on the way what the network allows, and sets it: whether runs may be accelerated (`fast`), whether blocks below
    a start may be left out (`resumes`), whether rows may be padded on the left under a mask (`pads`), whether what
    transformers keeps from token to token is right (`caches`), and whether rows may share the run of a prefix
    (`shares_prefixes`).

    tolerance   largest difference allowed, relative to the largest logit or entry of a stream

    Raises `FamilyError` with the reason, `NumericsError` for logits that are not finite.
    """
    kind, ids_BT, fast = type(model.network).__name__, ids_BT.to(model.device), model.fast
    if model.positions < ids_BT.shape[1] + PADDING:
        raise FamilyError(
            f"{kind} has too few positions",
            expected=f"at least {ids_BT.shape[1] + PADDING}, for the texts on which a network is checked",
            got=f"{model.positions:g}",
            remedy=OTHER_NETWORK,
        )
    model.shares_prefixes, model.resumes, model.fast = False, True, False
    try:
        own = _own(model, ids_BT)
        _check_causal(model, ids_BT, own, tolerance)
        model.fast = fast and _accelerates(model, ids_BT, own, tolerance)
        model.pads = _pads(model, ids_BT, own, tolerance)
        model.caches = _caches(model, ids_BT, tolerance)
        with model.running():
            model.resumes = _resumes(model, ids_BT, tolerance)
            error = max(_read_back(model, ids_BT, _own(model, ids_BT)))
    except (TunediffError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as fault:  # of whatever kind a network raises that wants more than token ids
        raise FamilyError(
            f"{kind} does not run on token ids alone", expected=DECODER, got=reason(fault), remedy=OTHER_NETWORK
        ) from fault
    if error > tolerance:
        raise FamilyError(
            f"the logits of {kind} do not come back from what its blocks put out",
            expected=f"a difference below {tolerance} of the largest logit",
            got=f"{error:.2g}",
            remedy=OTHER_NETWORK,
        )
    with model.running(), model.run_context() as shortcuts:
        if (
            shortcuts
            and model.pads
            and model.caches
            and model.forms.once
            and model.family.cache(model.network) is not None
        ):
            model.shares_prefixes = shortcuts.is_exact(model, ids_BT, Site(model.depth // 2), tolerance)


def _own(model: LanguageModel, ids_BT: Tensor) -> Tensor:
    """The network's own logits (B, T, V), finite."""
    with model.run_context():
        logits: Tensor = model.network(input_ids=ids_BT, use_cache=False).logits.float()
    if not torch.isfinite(logits).all():
        raise NumericsError(f"{model.name} gives non-finite logits", remedy="--set pair.dtype=float32")
    return logits


def _apart(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest entry of the second."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def _check_causal(model: LanguageModel, ids_BT: Tensor, own: Tensor, tolerance: float) -> None:
    """Refuse a network in which other tokens to the right change the logits to the left.

    Rows are padded on the right without a mask, so nothing that such a network says of them would be true. What its
    modules say of themselves is not asked: some are wrong.
    """
    half = ids_BT.shape[1] // 2
    other_BT = torch.cat([ids_BT[:, :half], ids_BT[:, half:].flip(0, 1)], 1)
    error = _apart(_own(model, other_BT)[:, :half], own[:, :half])
    if error > tolerance:
        raise FamilyError(
            f"positions of {type(model.network).__name__} see what is to their right",
            expected=DECODER,
            got=f"logits that change by {error:.2g} of the largest when later tokens do",
            remedy='take a decoder-only model, or write "is_decoder": true into config.json if the network was trained as a decoder',
        )


def _accelerates(model: LanguageModel, ids_BT: Tensor, own: Tensor, tolerance: float) -> bool:
    """Whether accelerated runs give the network's own logits, up to what rounding does in its dtype."""
    model.fast = True
    try:
        return _apart(_own(model, ids_BT), own) <= max(tolerance, ROUNDING * torch.finfo(model.dtype).eps)
    except Exception:  # of whatever kind a network raises whose parts are not called as others' are
        return False


def _pads(model: LanguageModel, ids_BT: Tensor, own: Tensor, tolerance: float) -> bool:
    """Whether the logits of the last position stay when rows are padded on the left, as for completions."""
    wide_BT = torch.nn.functional.pad(ids_BT, (PADDING, 0))
    mask_BT = torch.nn.functional.pad(torch.ones_like(ids_BT), (PADDING, 0))
    positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)
    try:
        with model.run_context():
            padded = model.network(
                input_ids=wide_BT,
                attention_mask=mask_BT,
                use_cache=False,
                **taken(model.network, position_ids=positions_BT),
            ).logits.float()
    except Exception:  # of whatever kind a network raises that wants another mask
        return False
    return _apart(padded[:, -1], own[:, -1]) <= max(tolerance, ROUNDING * torch.finfo(model.dtype).eps)


def _caches(model: LanguageModel, ids_BT: Tensor, tolerance: float) -> bool:
    """Whether a batch that transformers completes token by token, with what it keeps, has the logits of whole rows."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=NEW, pad_token_id=0, output_logits=True, return_dict_in_generate=True, do_sample=False
    )
    try:
        with model.run_context():
            network: Any = model.network
            out = network.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)
        whole = _own(model, out.sequences[:, :-1])[:, -NEW:]
        said = torch.stack(out.logits, 1).float()
    except Exception:  # of whatever kind a network raises that cannot be completed so
        return False
    return _apart(said, whole) <= max(tolerance, ROUNDING * torch.finfo(model.dtype).eps)


def _resumes(model: LanguageModel, ids_BT: Tensor, tolerance: float) -> bool:
    """Whether every block puts out the same where all blocks before the one below it are left out.

    Blocks that take more from lower ones than the stream (keys and values, a first embedding, a state) need them.
    """
    sites = [Site(layer) for layer in range(model.depth)]
    streams_BTSD = model.streams(ids_BT, sites)
    try:
        for layer, site in enumerate(sites[1:]):
            start = Start(sites[layer], streams_BTSD[:, :, layer])
            if _apart(model.streams(ids_BT, [site], start)[:, :, 0], streams_BTSD[:, :, layer + 1]) > tolerance:
                return False
    except Exception:  # of whatever kind a block raises that lacks what others left it
        return False
    return True


def _read_back(model: LanguageModel, ids_BT: Tensor, own: Tensor) -> Iterator[float]:
    """How far logits are from the network's own, of states read from the tokens and from several starts."""
    yield _apart(model.logits(model.states(ids_BT)), own)
    for layer in sorted({0, model.depth // 2, model.depth - 1}):
        start = Start(Site(layer), model.streams(ids_BT, [Site(layer)])[:, :, 0])
        yield _apart(model.logits(model.states(ids_BT, start)), own)
