"""Folds: rows packed into fewer ones, so that shared beginnings run once and unwanted endings not at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff.core.chance import generator

PAYS = 0.9
"""Largest share of the positions that a fold may leave and still be used."""

DEPTHS = (0, 3, 6)
"""Shared positions after the first that make rows one tree, tried in turn: for one shared word a longer row does not pay."""
SHARES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2)
"""Numbers of packed rows to try, as shares of the number that the largest tree would allow."""
LONG = 1000
"""Row length at which attention costs about as much as everything else."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows (B, T) as packed rows (C, L), each of one or more trees of rows that begin alike.

    A packed position stands for all positions with the same tokens up to them, and attends to these alone.

    first_CL      the first of the B * T positions that a packed position stands for
    place_BT      where among the C * L a position is found; anywhere for positions that nobody wants
    position_CL   distance from the beginning of the row
    sees_CLL      which positions of its packed row a position attends to
    """

    first_CL: Tensor
    place_BT: Tensor
    position_CL: Tensor
    sees_CLL: Tensor

    @classmethod
    def of(cls, ids_BT: Tensor, stream_BTX: Tensor | None = None, wanted_BT: Tensor | None = None) -> Fold | None:
        """Fold token ids; None where it does not pay.

        stream_BTX   the stream that the pass starts from, if any; rows then begin alike only if it has equal bits
        wanted_BT    positions whose values will be used, all if None; positions after a row's last are left out
        """
        B, T = ids_BT.shape
        if B < 2:
            return None
        wanted_BT = torch.ones(B, T, dtype=torch.bool) if wanted_BT is None else wanted_BT.cpu()
        needed_BT = wanted_BT.flip(1).cumsum(1).flip(1) > 0
        place_N = needed_BT.flatten().nonzero()[:, 0]
        if not len(place_N):
            return None
        key_BT = _beginnings(ids_BT.cpu(), stream_BTX)
        best = None
        for depth in DEPTHS:
            node_N, first_K = _numbered(
                (key_BT + 3 * key_BT[:, min(depth, T - 1), None]).flatten()[place_N], place_N, B * T
            )
            node_BT = torch.zeros(B * T, dtype=torch.long).index_put_((place_N,), node_N).view(B, T)
            _, tree_K = node_BT[first_K // T, 0].unique(return_inverse=True)
            size_R = torch.bincount(tree_K)
            filled = _filled(size_R.tolist())
            if best is None or filled[0] < best[0]:
                best = *filled, node_BT, first_K, tree_K, size_R
        _, length, packed_R, offset_R, node_BT, first_K, tree_K, size_R = best
        packed = max(packed_R) + 1
        if packed * length > PAYS * B * T:
            return None
        start_K = torch.tensor(packed_R)[tree_K] * length + torch.tensor(offset_R)[tree_K]
        by_tree = tree_K.argsort(stable=True)
        within_K = torch.empty_like(tree_K)
        within_K[by_tree] = torch.arange(len(tree_K)) - (size_R.cumsum(0) - size_R)[tree_K[by_tree]]
        to_K = start_K + within_K
        place_BT = to_K[node_BT]
        first_CL = torch.zeros(packed * length, dtype=torch.long).index_put_((to_K,), first_K).view(-1, length)
        sees = torch.eye(length, dtype=torch.bool).repeat(packed, 1, 1)
        before_BTT = torch.ones(T, T, dtype=torch.bool).tril() & needed_BT[..., None]
        sees.view(-1)[(place_BT[:, :, None] * length + (place_BT % length)[:, None])[before_BTT]] = True
        return cls(first_CL, place_BT, first_CL % T, sees)

    def pack(self, value_BTX: Tensor) -> Tensor:
        """Turn values of the rows (B, T, ...) into values of the packed rows (C, L, ...)."""
        return value_BTX.flatten(0, 1)[self.first_CL.to(value_BTX.device)]

    def unpack(self, value_CLX: Tensor) -> Tensor:
        """Turn values of the packed rows (C, L, ...) into values of the rows (B, T, ...)."""
        return value_CLX.flatten(0, 1)[self.place_BT.to(value_CLX.device)]

    def total(self, value_BTX: Tensor) -> Tensor:
        """Sum values (B, T, ...) over the positions that each packed position stands for (C, L, ...)."""
        total = value_BTX.new_zeros(self.first_CL.numel(), *value_BTX.shape[2:])
        return total.index_add_(0, self.place_BT.flatten(), value_BTX.flatten(0, 1)).unflatten(0, self.first_CL.shape)

    def inputs(self, dtype: torch.dtype, before: int, device: torch.device) -> dict[str, Tensor]:
        """Return position ids and attention mask of the packed rows after a prefix of `before` positions that all see."""
        return {
            "position_ids": self.position_CL.to(device) + before,
            "attention_mask": self.mask(dtype, before).to(device),
        }

    def mask(self, dtype: torch.dtype, before: int) -> Tensor:
        """Return what is added to attention scores (C, 1, L, before + L), after a prefix of `before` positions."""
        C, L, _ = self.sees_CLL.shape
        mask = torch.zeros(C, 1, L, before + L, dtype=dtype)
        mask[:, 0, :, before:].masked_fill_(~self.sees_CLL, torch.finfo(dtype).min)
        return mask


def _filled(sizes: list[int]) -> tuple[float, int, list[int], list[int]]:
    """Put trees into packed rows; return the cost, the rows' length, and each tree's row and offset.

    The cheapest of several lengths is taken: short rows leave more room unfilled, in long rows attention costs more.
    """
    best: tuple[float, int, list[int], list[int]] | None = None
    for share in SHARES:
        length = max(max(sizes), -(-sum(sizes) // max(1, round(share * sum(sizes) / max(sizes)))))
        row_R, offset_R, taken = [0] * len(sizes), [0] * len(sizes), []
        for tree in sorted(
            range(len(sizes)), key=lambda t: -sizes[t]
        ):  # the largest first into the first row with room
            row = next((c for c, used in enumerate(taken) if used + sizes[tree] <= length), len(taken))
            taken += [0] * (row == len(taken))
            row_R[tree], offset_R[tree] = row, taken[row]
            taken[row] += sizes[tree]
        cost = len(taken) * length * (1 + length / LONG)
        if best is None or cost < best[0]:
            best = cost, length, row_R, offset_R
    return best


def _numbered(key_N: Tensor, place_N: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Number keys in the order of their first places; return the numbers and these places."""
    _, any_N = key_N.unique(return_inverse=True)
    first_K = torch.full((int(any_N.max()) + 1,), places).scatter_reduce_(0, any_N, place_N, "amin")
    first_K, order = first_K.sort()
    number_K = torch.empty_like(order)
    number_K[order] = torch.arange(len(order))
    return number_K[any_N], first_K


def _beginnings(ids_BT: Tensor, stream_BTX: Tensor | None) -> Tensor:
    """Return a 64-bit hash (B, T) of what a row holds up to each position."""
    own_BT = ids_BT.long() + 1
    if stream_BTX is not None:
        bits_BTX = stream_BTX.float().contiguous().view(torch.int32).long()
        odd_X = torch.randint(-(2**62), 2**62, bits_BTX.shape[-1:], generator=generator(0, "fold")) * 2 + 1
        own_BT = own_BT + (bits_BTX * odd_X.to(bits_BTX.device)).sum(-1).cpu()
    own_BT = own_BT * -7046029254386353131  # odd, and no bit pattern to speak of (2**64 over the golden ratio)
    hash_B, out = torch.zeros_like(own_BT[:, 0]), []
    for own_B in own_BT.unbind(1):
        hash_B = (hash_B ^ own_B) * -4417276706812531889
        hash_B = hash_B ^ (hash_B >> 29)
        out.append(hash_B)
    return torch.stack(out, 1)
