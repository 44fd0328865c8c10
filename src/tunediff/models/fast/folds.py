"""Folds: rows packed so that what several of them begin with is run once, and what nobody asks for is not run at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunediff.core.chance import generator

PAYS = 0.9
"""A fold is used if it leaves at most this share of the positions."""

DEPTHS = (0, 3, 6)
"""How many more positions rows must have in common to be one tree. Many questions begin with the same word, and a row as long
as all of them is worse than that word run again."""
SHARES = (1.0, 0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2)
"""Numbers of packed rows that are tried, as shares of how many the largest tree alone would allow."""
LONG = 1000
"""Length of a row at which attention costs about as much as all else."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows (B, T) as packed ones (C, L), each of one or more trees of rows that begin alike.

    A packed position stands for all positions of the same beginning, and sees what that beginning holds and nothing else.

    first_CL      the place among the B * T that a packed position stands for; the first of them
    place_BT      the place among the C * L where a position is found; any for what nobody asks for
    position_CL   how far from the row's beginning
    sees_CLL      which positions of its packed row one sees
    """

    first_CL: Tensor
    place_BT: Tensor
    position_CL: Tensor
    sees_CLL: Tensor

    @classmethod
    def of(cls, ids_BT: Tensor, stream_BTX: Tensor | None = None, wanted_BT: Tensor | None = None) -> Fold | None:
        """The fold of token ids, or None where it does not pay.

        stream_BTX   what the run goes on from, if not from the tokens: then beginnings are alike if this is, to the bit
        wanted_BT    positions whose values will be used, all if None; what comes after a row's last is left out
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
        """Values of the rows' positions (B, T, ...) as those of the packed ones (C, L, ...)."""
        return value_BTX.flatten(0, 1)[self.first_CL.to(value_BTX.device)]

    def unpack(self, value_CLX: Tensor) -> Tensor:
        """Values of packed positions (C, L, ...) as those of the rows' (B, T, ...)."""
        return value_CLX.flatten(0, 1)[self.place_BT.to(value_CLX.device)]

    def total(self, value_BTX: Tensor) -> Tensor:
        """Sums over the rows' positions (B, T, ...) that a packed one stands for (C, L, ...)."""
        total = value_BTX.new_zeros(self.first_CL.numel(), *value_BTX.shape[2:])
        return total.index_add_(0, self.place_BT.flatten(), value_BTX.flatten(0, 1)).unflatten(0, self.first_CL.shape)

    def inputs(self, dtype: torch.dtype, before: int, device: torch.device) -> dict[str, Tensor]:
        """What a network is told beside the packed ids: positions and mask, `before` positions that all see coming first."""
        return {
            "position_ids": self.position_CL.to(device) + before,
            "attention_mask": self.mask(dtype, before).to(device),
        }

    def mask(self, dtype: torch.dtype, before: int) -> Tensor:
        """What is added to attention's scores (C, 1, L, before + L), `before` positions that all see coming first."""
        C, L, _ = self.sees_CLL.shape
        mask = torch.zeros(C, 1, L, before + L, dtype=dtype)
        mask[:, 0, :, before:].masked_fill_(~self.sees_CLL, torch.finfo(dtype).min)
        return mask


def _filled(sizes: list[int]) -> tuple[float, int, list[int], list[int]]:
    """Trees put into packed rows: what that costs, how long these are, and for each tree which one it is in and where it begins.

    Of some lengths the one that costs least: short rows leave more room unfilled, in long ones attention takes longer.
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
    """Keys as numbers in the order of their first places, and these places."""
    _, any_N = key_N.unique(return_inverse=True)
    first_K = torch.full((int(any_N.max()) + 1,), places).scatter_reduce_(0, any_N, place_N, "amin")
    first_K, order = first_K.sort()
    number_K = torch.empty_like(order)
    number_K[order] = torch.arange(len(order))
    return number_K[any_N], first_K


def _beginnings(ids_BT: Tensor, stream_BTX: Tensor | None) -> Tensor:
    """A 64-bit hash (B, T) of all that a row holds up to a position."""
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
